//! The position of one subscription in one topic: what is dealt with, whoever had it. Pure.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use crate::limits;
use crate::record::{CursorRecord, Failure, Release, Sequences, Timestamp, Verdict};

use super::{Nack, Receipt};

/// A position, and the head of its topic as far as told.
///
/// What is **done** is acked, let go, or not for this subscription; the floor has passed all of it
/// up to the first hole.
///
/// What has failed as often as it may is **condemned**: it is not shown any more, and waits to be
/// let go. What was in a handler of a consumer that was lost is a **suspect**.
#[derive(Clone, Debug)]
pub struct Cursor {
    record: CursorRecord,
    head: u64,
    dirty: bool,
    /// How often a message may fail, if there is an end to it.
    max_attempts: Option<u32>,
    condemned: BTreeSet<u64>,
    suspects: BTreeSet<u64>,
}

impl Cursor {
    /// A position in a topic with this head.
    pub fn new(record: CursorRecord, head: u64, max_attempts: Option<u32>) -> Self {
        debug_assert!(record.floor <= head, "a cursor is never ahead of its topic");
        let which = |is: fn(&Failure) -> bool| {
            let failed = record.failures.iter().filter(|(_, failure)| is(failure));
            failed.map(|(sequence, _)| *sequence).collect()
        };
        let condemned = which(|failure| failure.verdict.is_some());
        let suspects = which(|failure| failure.suspect);
        Self { record, head, dirty: false, max_attempts, condemned, suspects }
    }

    /// The durable part.
    pub fn record(&self) -> &CursorRecord {
        &self.record
    }

    /// The committed head, as far as told.
    pub fn head(&self) -> u64 {
        self.head
    }

    /// All messages up to here are done.
    pub fn floor(&self) -> u64 {
        self.record.floor
    }

    /// Messages after the floor that are not done.
    pub fn backlog(&self) -> u64 {
        let done: u64 = self.record.done.iter().map(|range| range.end() - range.start() + 1).sum();
        self.head - self.record.floor - done
    }

    /// Messages after the floor and up to here that are not done.
    pub(super) fn undone_to(&self, sequence: u64) -> u64 {
        let all = self.record.floor + 1..=sequence;
        if all.is_empty() {
            return 0;
        }
        self.record.done.gaps(&all).map(|gap| gap.end() - gap.start() + 1).sum()
    }

    /// Whether the position has changed since it was taken.
    pub fn is_dirty(&self) -> bool {
        self.dirty
    }

    /// Whether the position has changed since the last call.
    pub fn take_dirty(&mut self) -> bool {
        std::mem::take(&mut self.dirty)
    }

    /// The position has to be saved, whether it has changed or not.
    pub fn mark_dirty(&mut self) {
        self.dirty = true;
    }

    /// Messages up to `head` are committed.
    pub fn on_head(&mut self, head: u64) {
        debug_assert!(head >= self.head, "a head never goes back");
        self.head = self.head.max(head);
    }

    /// Whether a message is done.
    pub fn is_done(&self, sequence: u64) -> bool {
        sequence <= self.record.floor || self.record.done.contains(&sequence)
    }

    /// The first message from here on that is not in a run of done ones that begins here.
    pub fn after_done(&self, sequence: u64) -> u64 {
        if sequence <= self.record.floor {
            return self.after_done(self.record.floor + 1);
        }
        self.record.done.get(&sequence).map_or(sequence, |range| *range.end() + 1)
    }

    /// How often a message has failed.
    pub(super) fn failures(&self, sequence: u64) -> u32 {
        self.record.failures.get(&sequence).map_or(0, |failure| failure.count)
    }

    /// Counts a failure. By the attempt's number: a nack that arrives twice counts once, and an
    /// attempt that was never made cannot have failed. Answers how often it has failed by now.
    pub(super) fn fail(&mut self, nack: &Nack, now: Timestamp) -> u32 {
        if nack.attempt == 0 {
            return self.failures(nack.sequence);
        }
        let first = Failure { count: 0, first_at: now, suspect: false, verdict: None };
        let failure = self.record.failures.entry(nack.sequence).or_insert(first);
        let attempt = nack.attempt.min(failure.count.saturating_add(1));
        self.dirty |= failure.count < attempt;
        failure.count = failure.count.max(attempt);
        let over = self.max_attempts.is_some_and(|max| failure.count >= max || nack.for_good);
        if over && failure.verdict.is_none() {
            failure.verdict = Some(Verdict { at: now, reason: nack.reason.clone() });
            self.condemned.insert(nack.sequence);
            self.dirty = true;
        }
        failure.count
    }

    /// A message that has failed was in the handler of a consumer that was lost.
    pub(super) fn suspect(&mut self, sequence: u64) {
        if let Some(failure) = self.record.failures.get_mut(&sequence) {
            failure.suspect = true;
            self.suspects.insert(sequence);
            self.dirty = true;
        }
    }

    /// What has failed as often as it may.
    pub fn condemned(&self) -> &BTreeSet<u64> {
        &self.condemned
    }

    /// What was in a handler of a consumer that was lost. Of these one at a time is shown, so that
    /// the others do not fail along with the one that kills.
    pub(super) fn suspects(&self) -> &BTreeSet<u64> {
        &self.suspects
    }

    /// Lets a message go without an ack.
    pub fn release(&mut self, sequence: u64, how: Release) {
        if !self.is_done(sequence) {
            self.record.released.insert(sequence..=sequence, how);
            self.settle(sequence, sequence);
            self.limit_ranges();
        }
    }

    /// These are received. They need not have been delivered, by this session or at all; beyond
    /// the head there is nothing to ack.
    pub(super) fn ack(&mut self, acked: &Sequences) {
        for range in acked.iter() {
            let first = (*range.start()).max(self.record.start + 1);
            let last = (*range.end()).min(self.head);
            if first > last {
                continue;
            }
            let before = self.record.received.gaps(&(first..=last)).next().is_some();
            self.dirty |= before;
            self.record.received.insert(first..=last);
            self.record.released.remove(first..=last);
            self.settle(first, last);
        }
        self.limit_ranges();
    }

    /// Marks messages as dealt with and moves the floor as far as it goes.
    pub fn settle(&mut self, first: u64, last: u64) {
        let first = first.max(self.record.floor + 1);
        if first > last {
            return;
        }
        let failed = self.record.failures.range(first..=last).map(|(sequence, _)| *sequence);
        for sequence in failed.collect::<Vec<_>>() {
            self.record.failures.remove(&sequence);
            self.condemned.remove(&sequence);
            self.suspects.remove(&sequence);
        }
        self.dirty |= self.record.done.gaps(&(first..=last)).next().is_some();
        self.record.done.insert(first..=last);
        if let Some(range) = self.record.done.get(&(self.record.floor + 1)).cloned() {
            self.record.floor = *range.end();
            self.record.done.remove(range);
        }
    }

    /// Receipts are kept up to a limit; the oldest go first. So is what is done beyond the floor:
    /// the last goes first, and may be shown again.
    fn limit_ranges(&mut self) {
        while self.record.received.len() > limits::MAX_RECEIVED_RANGES {
            let Some(oldest) = self.record.received.first().cloned() else {
                return;
            };
            self.forget_receipts(*oldest.end());
        }
        while self.record.released.len() > limits::MAX_RECEIVED_RANGES {
            let Some((oldest, _)) = self.record.released.first_range_value() else {
                return;
            };
            self.forget_receipts(*oldest.end());
        }
        while self.record.done.len() > limits::MAX_DONE_RANGES {
            let Some(last) = self.record.done.last().cloned() else {
                return;
            };
            self.record.done.remove(last);
        }
    }

    fn forget_receipts(&mut self, up_to: u64) {
        self.record.receipts_from = self.record.receipts_from.max(up_to);
        self.record.received.remove(0..=up_to);
        self.record.released.remove(0..=up_to);
    }

    /// Moves the position: all up to the floor is done, and these beyond it. What an ack has
    /// settled otherwise is forgotten, but stays received.
    pub(super) fn restore(&mut self, floor: u64, done: &Sequences) {
        let head = self.head;
        let floor = floor.min(head);
        let mut after = Sequences::new();
        after.extend((floor > 0).then_some(1..=floor));
        after.extend(done.iter().filter(|range| *range.start() <= head).cloned());
        for skipped in self.record.done.gaps(&(self.record.floor + 1..=head)) {
            // What was to be shown and is done afterwards is let go.
            for range in after.overlapping(&skipped) {
                let first = (*range.start()).max(*skipped.start());
                let last = (*range.end()).min(*skipped.end());
                self.record.released.insert(first..=last, Release::Seek);
            }
        }
        for shown in after.gaps(&(1..=head)) {
            self.record.released.remove(shown);
        }
        self.limit_ranges();
        self.record.start = self.record.start.min(floor);
        self.record.floor = floor;
        self.record.done = after;
        self.record.done.remove(0..=floor);
        self.record.failures.clear();
        self.condemned.clear();
        self.suspects.clear();
        self.record.generation += 1;
        self.dirty = true;
    }

    /// The consumer knows that it will never receive these.
    pub(super) fn miss(&mut self, missed: &Sequences) {
        for range in missed.iter() {
            let first = (*range.start()).max(self.record.floor + 1);
            let last = (*range.end()).min(self.head);
            if first > last {
                continue;
            }
            // What is done was acked, or is for others.
            let pieces: Vec<_> = self.record.done.gaps(&(first..=last)).collect();
            for piece in pieces {
                self.record.released.insert(piece, Release::Gap);
            }
            self.settle(first, last);
        }
        self.limit_ranges();
    }

    /// The first and the last of these that are neither done nor held.
    pub(super) fn missing(
        &self,
        range: &RangeInclusive<u64>,
        held: impl Iterator<Item = u64>,
    ) -> Option<(u64, u64)> {
        let mut known = self.record.done.clone();
        known.extend(held.map(|sequence| sequence..=sequence));
        let mut missing = known.gaps(range);
        let first = missing.next()?;
        let last = missing.last().unwrap_or_else(|| first.clone());
        Some((*first.start(), *last.end()))
    }

    /// What is known about a message.
    pub fn receipt(&self, sequence: u64) -> Receipt {
        if self.record.received.contains(&sequence) {
            Receipt::Received
        } else if sequence <= self.record.receipts_from {
            Receipt::Trimmed { oldest: self.record.receipts_from + 1 }
        } else if let Some(release) = self.record.released.get(&sequence) {
            Receipt::Released(*release)
        } else if sequence <= self.record.start || self.is_done(sequence) {
            Receipt::NotAddressed
        } else {
            Receipt::Pending
        }
    }

    /// The first message that is not done, if there is one.
    pub fn oldest_unsettled(&self) -> Option<u64> {
        // The floor ends where the first hole begins.
        let first = self.record.floor + 1;
        (first <= self.head).then_some(first)
    }
}
