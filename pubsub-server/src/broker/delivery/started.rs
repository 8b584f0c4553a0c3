//! What consumers have said that they have in their handlers. Pure.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

use tokio::time::Instant;

/// Messages by since when they are in a handler. Each of them is held.
#[derive(Debug, Default)]
pub(super) struct Started {
    since: BTreeMap<u64, Instant>,
    by_time: BTreeSet<(Instant, u64)>,
}

impl Started {
    /// It is in a handler, since then at the latest.
    pub(super) fn start(&mut self, sequence: u64, now: Instant) {
        if let Entry::Vacant(entry) = self.since.entry(sequence) {
            entry.insert(now);
            self.by_time.insert((now, sequence));
        }
    }

    pub(super) fn contains(&self, sequence: u64) -> bool {
        self.since.contains_key(&sequence)
    }

    /// Since when.
    pub(super) fn since(&self, sequence: u64) -> Option<Instant> {
        self.since.get(&sequence).copied()
    }

    /// It is held no more.
    pub(super) fn end(&mut self, sequence: u64) {
        if let Some(since) = self.since.remove(&sequence) {
            self.by_time.remove(&(since, sequence));
        }
    }

    pub(super) fn end_all(&mut self, range: RangeInclusive<u64>) {
        let ended = self.since.range(range).map(|(sequence, _)| *sequence);
        for sequence in ended.collect::<Vec<_>>() {
            self.end(sequence);
        }
    }

    /// The moment since which one is in a handler, of all the earliest.
    pub(super) fn earliest(&self) -> Option<Instant> {
        self.by_time.first().map(|(since, _)| *since)
    }

    /// Those that were in a handler at that moment already.
    pub(super) fn since_before(&self, moment: Instant) -> Vec<u64> {
        let early = self.by_time.range(..=(moment, u64::MAX));
        early.map(|(_, sequence)| *sequence).collect()
    }
}
