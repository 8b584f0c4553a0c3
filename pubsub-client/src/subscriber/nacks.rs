//! What was handed back of a topic, until the server has confirmed it. Pure: no I/O, no clock.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;
use std::time::Duration;

use super::order::Lane;

/// A message handed back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Nacked {
    /// The attempt that failed; 0 if none did.
    pub(super) attempt: u32,
    pub(super) delay: Option<Duration>,
    pub(super) reason: String,
    /// Another attempt would be of no use.
    pub(super) for_good: bool,
    /// Tells this nack from an earlier one of the same message.
    pub(super) showing: u64,
}

#[cfg(test)]
impl Nacked {
    /// Of this attempt in this showing, with nothing else to say.
    pub(super) fn of(attempt: u32, showing: u64) -> Self {
        Self { attempt, delay: None, reason: String::new(), for_good: false, showing }
    }
}

/// The unconfirmed nacks of a topic, by the sequences of their messages.
#[derive(Debug, Default)]
pub(super) struct Nacks {
    all: BTreeMap<u64, (Nacked, Option<Lane>)>,
    to_send: BTreeSet<u64>,
    /// Those of each lane that are not settled. Nothing of a lane is shown while there are any:
    /// their rewinds are on the way.
    unsettled: BTreeMap<Lane, BTreeSet<u64>>,
}

impl Nacks {
    pub(super) fn insert(&mut self, sequence: u64, nacked: Nacked, lane: Option<Lane>) {
        if let Some(lane) = &lane {
            self.unsettled.entry(lane.clone()).or_default().insert(sequence);
        }
        self.all.insert(sequence, (nacked, lane));
        self.to_send.insert(sequence);
    }

    /// The nack of a message is confirmed, or has no meaning any more.
    pub(super) fn remove(&mut self, sequence: u64) {
        self.to_send.remove(&sequence);
        if let Some((_, Some(lane))) = self.all.remove(&sequence)
            && let Some(nacks) = self.unsettled.get_mut(&lane)
        {
            nacks.remove(&sequence);
            if nacks.is_empty() {
                self.unsettled.remove(&lane);
            }
        }
    }

    /// As [`remove`](Self::remove), if it was not sent yet.
    pub(super) fn remove_unsent(&mut self, sequence: u64) {
        if self.to_send.contains(&sequence) {
            self.remove(sequence);
        }
    }

    /// The server has the nack of this showing on disk.
    pub(super) fn confirm(&mut self, sequence: u64, showing: u64) {
        if self.all.get(&sequence).is_some_and(|(nacked, _)| nacked.showing == showing) {
            self.remove(sequence);
        }
    }

    pub(super) fn retain(&mut self, stays: impl Fn(u64) -> bool) {
        for sequence in self.all.keys().copied().filter(|n| !stays(*n)).collect::<Vec<_>>() {
            self.remove(sequence);
        }
    }

    /// Whether nothing of this lane may be shown.
    pub(super) fn silence(&self, lane: &Lane) -> bool {
        self.unsettled.contains_key(lane)
    }

    pub(super) fn silence_any(&self) -> bool {
        !self.unsettled.is_empty()
    }

    /// The lanes of the messages among these that were handed back, and of each the first one.
    pub(super) fn lanes_in(&self, ranges: &[RangeInclusive<u64>]) -> BTreeMap<Lane, u64> {
        let mut lanes = BTreeMap::new();
        let among = |sequence: &u64| ranges.iter().any(|range| range.contains(sequence));
        for (sequence, (_, lane)) in self.all.iter().filter(|(sequence, _)| among(sequence)) {
            if let Some(lane) = lane {
                lanes.entry(lane.clone()).or_insert(*sequence);
            }
        }
        lanes
    }

    /// Of each lane that is silent, the first message that was handed back. From here on they
    /// count as settled.
    pub(super) fn settle(&mut self) -> Vec<(Lane, u64)> {
        let unsettled = std::mem::take(&mut self.unsettled).into_iter();
        unsettled.filter_map(|(lane, nacks)| Some((lane, *nacks.first()?))).collect()
    }

    /// All of them, which are about to be sent.
    pub(super) fn send_all(&mut self) -> Vec<(u64, Nacked)> {
        self.to_send.clear();
        self.all.iter().map(|(sequence, (nacked, _))| (*sequence, nacked.clone())).collect()
    }

    /// Those that were not sent yet, and are about to be.
    pub(super) fn send(&mut self) -> Vec<(u64, Nacked)> {
        let to_send = std::mem::take(&mut self.to_send).into_iter();
        let nacked =
            |sequence| self.all.get(&sequence).map(|(nacked, _)| (sequence, nacked.clone()));
        to_send.filter_map(nacked).collect()
    }

    pub(super) fn has_unsent(&self) -> bool {
        !self.to_send.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }
}
