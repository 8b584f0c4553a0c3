//! Messages with a moment each: since when they are in a handler, or until when they wait. Pure.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeBounds;

use tokio::time::Instant;

/// Messages by their moments.
#[derive(Debug, Default)]
pub(super) struct Timed {
    at: BTreeMap<u64, Instant>,
    by_time: BTreeSet<(Instant, u64)>,
}

impl Timed {
    /// Adds a message, if it is not there.
    pub(super) fn insert(&mut self, sequence: u64, at: Instant) {
        if let Entry::Vacant(entry) = self.at.entry(sequence) {
            entry.insert(at);
            self.by_time.insert((at, sequence));
        }
    }

    pub(super) fn contains(&self, sequence: u64) -> bool {
        self.at.contains_key(&sequence)
    }

    pub(super) fn at(&self, sequence: u64) -> Option<Instant> {
        self.at.get(&sequence).copied()
    }

    pub(super) fn len(&self) -> usize {
        self.at.len()
    }

    /// The lowest sequence.
    pub(super) fn first(&self) -> Option<u64> {
        self.at.first_key_value().map(|(sequence, _)| *sequence)
    }

    /// The highest sequence.
    pub(super) fn last(&self) -> Option<u64> {
        self.at.last_key_value().map(|(sequence, _)| *sequence)
    }

    pub(super) fn remove(&mut self, sequence: u64) {
        if let Some(at) = self.at.remove(&sequence) {
            self.by_time.remove(&(at, sequence));
        }
    }

    pub(super) fn remove_all(&mut self, range: impl RangeBounds<u64>) {
        let gone = self.at.range(range).map(|(sequence, _)| *sequence);
        for sequence in gone.collect::<Vec<_>>() {
            self.remove(sequence);
        }
    }

    /// The earliest moment.
    pub(super) fn earliest(&self) -> Option<Instant> {
        self.by_time.first().map(|(at, _)| *at)
    }

    /// Those whose moments are not later than this one, the earliest first.
    pub(super) fn until(&self, moment: Instant) -> impl Iterator<Item = u64> {
        self.by_time.range(..=(moment, u64::MAX)).map(|(_, sequence)| *sequence)
    }
}
