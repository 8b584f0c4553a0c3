//! Delivery to one consumer at a time, each topic in the order of its log. Pure: events in, answers
//! out, no clock and no I/O.
//!
//! Beside what is done there is what is **held** by the active consumer (sent and neither acked nor
//! handed back), and the rest up to the head, which is shown in order.

use std::collections::BTreeMap;

use tokio::time::Instant;

use super::ascending::Ascending;
use super::timed::Timed;
use super::{Claim, Cursor, LOST, Moment, Nack, Out, Rewound, backoff};
use crate::limits;
use crate::record::{Sequences, StoredMessage};

/// The delivery of one topic to one exclusive subscription.
#[derive(Debug)]
pub struct Exclusive {
    pub(super) cursor: Cursor,
    held: Ascending<u32>,
    held_bytes: u64,
    started: Timed,
    /// Passed over, and to be shown when they are due.
    delayed: Timed,
    /// All up to here is done, or delayed: what lies beyond counts as outstanding.
    base: u64,
    /// No message below is to be shown in this session, but for those in `not_before`'s way.
    next: u64,
    generation: u32,
    not_before: BTreeMap<u64, Instant>,
    /// When a suspect was given out last.
    suspect_at: Option<Instant>,
    /// When it was asked last what is to be shown.
    asked_at: Option<Instant>,
}

impl Exclusive {
    /// Goes on at a position.
    pub fn new(cursor: Cursor) -> Self {
        let next = cursor.floor() + 1;
        Self {
            cursor,
            held: Ascending::new(),
            held_bytes: 0,
            started: Timed::default(),
            delayed: Timed::default(),
            base: 0,
            next,
            generation: 0,
            not_before: BTreeMap::new(),
            suspect_at: None,
            asked_at: None,
        }
    }

    /// Messages held by the consumer.
    pub fn held(&self) -> usize {
        self.held.len()
    }

    /// Whether the consumer holds this message.
    pub fn holds(&self, sequence: u64) -> bool {
        self.held.contains(sequence)
    }

    /// What is with the consumer.
    pub fn out(&self) -> Out {
        Out { messages: self.held.len() as u64, bytes: self.held_bytes }
    }

    /// The position.
    pub fn cursor(&self) -> &Cursor {
        &self.cursor
    }

    /// The delivery generation of this session.
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// A consumer takes over, or comes back. Answers what it claims to hold and is not wanted any
    /// more.
    pub fn attach(&mut self, claim: &Claim, now: Moment) -> Sequences {
        let before = std::mem::take(&mut self.started);
        let suspects = self.suspects_out().collect::<Vec<_>>();
        self.detach();
        self.generation = 0;
        if claim.cursor_generation != self.cursor.record().generation {
            return claim.held.clone();
        }
        self.ack(&claim.acked);
        self.miss(&claim.missed);
        for nack in &claim.nacked {
            self.fail(nack, now);
        }
        let dropped = self.hold(claim);
        if self.suspects_out().any(|suspect| !suspects.contains(&suspect)) {
            self.suspect_at = Some(now.at);
        }
        for sequence in claim.started.iter().flat_map(Clone::clone) {
            if self.held.contains(sequence) {
                self.started.insert(sequence, before.at(sequence).unwrap_or(now.at));
            }
        }
        dropped
    }

    fn hold(&mut self, claim: &Claim) -> Sequences {
        let head = self.cursor.head();
        let mut dropped = Sequences::new();
        let mut kept = Vec::new();
        for range in claim.held.iter() {
            let (first, last) = (*range.start(), *range.end());
            if last > head {
                dropped.insert(first.max(head + 1)..=last);
            }
            // Bounded: a consumer holds at most what it was sent.
            for sequence in first..=last.min(head) {
                if self.cursor.is_done(sequence) {
                    dropped.insert(sequence..=sequence);
                } else {
                    kept.push(sequence);
                }
            }
        }
        let each = claim.held_bytes / (kept.len() as u64).max(1);
        for sequence in kept {
            self.not_before.remove(&sequence);
            self.put_held(sequence, u32::try_from(each).unwrap_or(u32::MAX));
        }
        dropped
    }

    /// The consumer is gone, and what it held is to be shown again.
    pub fn detach(&mut self) {
        self.held.clear();
        self.held_bytes = 0;
        self.started = Timed::default();
        self.delayed = Timed::default();
        self.base = 0;
        self.next = self.cursor.floor() + 1;
    }

    /// The consumer is lost.
    pub fn crash(&mut self, now: Moment) {
        let held = self.held.keys();
        for sequence in held.filter(|held| self.started.contains(*held)).collect::<Vec<_>>() {
            let nack = self.failure(sequence, LOST);
            self.fail(&nack, now);
            self.cursor.suspect(sequence);
        }
        self.detach();
    }

    /// The present attempt of a message has failed.
    fn failure(&self, sequence: u64, reason: &str) -> Nack {
        let attempt = self.cursor.failures(sequence).saturating_add(1);
        Nack { sequence, attempt, reason: reason.to_owned(), ..Nack::default() }
    }

    /// The consumer has these in its handlers.
    pub fn start(&mut self, started: &Sequences, now: Instant) {
        for range in started.iter() {
            for sequence in self.held.keys_in(range.clone()) {
                self.started.insert(sequence, now);
            }
        }
    }

    /// The moment since which a message is in a handler, of all the earliest.
    pub fn started_at(&self) -> Option<Instant> {
        self.started.earliest()
    }

    /// What is in a handler for so long has failed.
    pub fn expire(&mut self, since: Instant, reason: &str, now: Moment) -> Option<Rewound> {
        let overdue = self.started.until(since);
        let nacks: Vec<Nack> = overdue.map(|sequence| self.failure(sequence, reason)).collect();
        nacks.iter().for_each(|nack| self.started.remove(nack.sequence));
        self.nack(&nacks, now)
    }

    /// The next message to read, if one may be shown now, and how many may be from there on: all
    /// of them lie within `window` of the floor.
    pub fn wants(&mut self, window: u64, now: Instant) -> Option<(u64, u64)> {
        self.skip_settled();
        self.asked_at = Some(now);
        if let Some(due) = self.due_now(now) {
            return Some((due, 1));
        }
        let mut last = self.base().saturating_add(window.max(1)).min(self.cursor.head());
        // What lies before the last of them was looked at already.
        let full = self.delayed.len() >= limits::MAX_DELAYED;
        if full && self.delayed.last().is_some_and(|delayed| delayed < self.next) {
            return None;
        }
        // One that is held back ends the run before it.
        let mut later = self.not_before.range(self.next + 1..);
        if let Some((held_back, _)) = later.find(|(_, at)| **at > now) {
            last = last.min(held_back - 1);
        }
        if let Some(condemned) = self.cursor.condemned().range(self.next..).next() {
            last = last.min(condemned - 1);
        }
        last = self.stop_at_suspect(last, now);
        let ready = self.next <= last && self.ready_at(now).is_none();
        if !ready {
            return None;
        }
        Some((self.next, last - self.next + 1))
    }

    /// The delayed message that is due first, unless what failed before it is in its way.
    fn due_now(&self, now: Instant) -> Option<u64> {
        let condemned = self.cursor.condemned().first().is_some_and(|first| *first <= self.next);
        let blocked = condemned || self.ready_at(now).is_some() || self.is_suspect_tried(now);
        self.delayed.until(now).next().filter(|_| !blocked)
    }

    /// When the first of the delayed messages is due.
    pub fn due_at(&self) -> Option<Instant> {
        self.delayed.earliest()
    }

    /// When this message is due, if it is delayed.
    pub fn delayed_until(&self, sequence: u64) -> Option<Instant> {
        self.delayed.at(sequence)
    }

    /// Messages that are not due yet.
    pub fn delayed(&self) -> usize {
        self.delayed.len()
    }

    fn base(&mut self) -> u64 {
        self.base = self.base.max(self.cursor.floor());
        loop {
            let next = self.cursor.after_done(self.base + 1);
            if !self.delayed.contains(next) {
                self.base = next - 1;
                return self.base;
            }
            self.base = next;
        }
    }

    /// A suspect goes alone, and while no other one is out.
    fn stop_at_suspect(&self, last: u64, now: Instant) -> u64 {
        match self.cursor.suspects().range(self.next..).next() {
            Some(suspect) if *suspect > self.next => last.min(suspect - 1),
            Some(suspect) if self.is_suspect_tried(now) => suspect - 1,
            Some(suspect) => last.min(*suspect),
            None => last,
        }
    }

    /// Whether a suspect is out, and may still kill its consumer.
    fn is_suspect_tried(&self, now: Instant) -> bool {
        self.suspect_at.is_some_and(|at| now < at + limits::SUSPICION)
            && self.suspects_out().next().is_some()
    }

    /// The suspects that are with the consumer.
    fn suspects_out(&self) -> impl Iterator<Item = u64> {
        self.cursor.suspects().iter().copied().filter(|suspect| self.held.contains(*suspect))
    }

    /// All messages up to here were sent in this session, or are not for it.
    pub fn passed(&self) -> u64 {
        self.next.max(self.cursor.floor() + 1) - 1
    }

    /// When a message that is held back by a backoff may be shown.
    pub fn ready_at(&self, now: Instant) -> Option<Instant> {
        self.not_before.get(&self.next).copied().filter(|at| *at > now)
    }

    /// Until when a message is held back by its backoff.
    pub fn held_back_until(&self, sequence: u64) -> Option<Instant> {
        self.not_before.get(&sequence).copied()
    }

    /// When the next suspect, or a message that is due, may be shown, if it waits for another one.
    pub fn tried_until(&self, now: Instant) -> Option<Instant> {
        let due = self.delayed.earliest().is_some_and(|at| at <= now);
        let waits = due || self.cursor.suspects().contains(&self.next);
        self.suspect_at
            .filter(|_| waits && self.is_suspect_tried(now))
            .map(|at| at + limits::SUSPICION)
    }

    fn skip_settled(&mut self) {
        loop {
            let next = self.cursor.after_done(self.next);
            let held = self.held.contains(next);
            if next == self.next && !held {
                return;
            }
            self.next = next + u64::from(held);
        }
    }

    /// The message that was read next, which the subscription wants or not: whether it is to be
    /// sent, and as which attempt. `due`: until when it waits, if that is not over.
    pub fn offer(
        &mut self,
        message: &StoredMessage,
        wanted: bool,
        due: Option<Instant>,
    ) -> Option<u32> {
        let sequence = message.sequence;
        let known = self.cursor.is_done(sequence) || self.held.contains(sequence);
        let was_delayed = self.delayed.contains(sequence);
        if known || sequence < self.next && !was_delayed {
            return None;
        }
        self.next = self.next.max(sequence + 1);
        // It may be due later than it was, when the clock was set.
        self.delayed.remove(sequence);
        if let Some(due) = due.filter(|_| wanted) {
            self.delayed.insert(sequence, due);
            return None;
        }
        self.not_before.remove(&sequence);
        if !wanted {
            self.cursor.settle(sequence, sequence);
            return None;
        }
        let bytes = u32::try_from(message.body.len()).unwrap_or(u32::MAX);
        self.put_held(sequence, bytes);
        if self.cursor.suspects().contains(&sequence) {
            self.suspect_at = self.asked_at;
        }
        Some(self.cursor.failures(sequence).saturating_add(1))
    }

    /// A message that is not wanted is passed over, if it is the next one.
    pub fn pass_over(&mut self, sequence: u64) -> bool {
        self.skip_settled();
        let is_next = sequence == self.next;
        if is_next {
            self.next += 1;
            self.not_before.remove(&sequence);
            self.cursor.settle(sequence, sequence);
        }
        is_next
    }

    fn put_held(&mut self, sequence: u64, bytes: u32) {
        if self.held.insert(sequence, bytes).is_none() {
            self.held_bytes += u64::from(bytes);
        }
    }

    /// These are received.
    pub fn ack(&mut self, acked: &Sequences) {
        self.cursor.ack(acked);
        self.let_go(acked);
    }

    /// The consumer knows that it will never receive these.
    pub fn miss(&mut self, missed: &Sequences) {
        self.cursor.miss(missed);
        self.let_go(missed);
    }

    /// What is done is held no more.
    pub(super) fn let_go(&mut self, settled: &Sequences) {
        for range in settled.iter() {
            self.delayed.remove_all(range.clone());
            self.started.remove_all(range.clone());
            let held_bytes = &mut self.held_bytes;
            self.held.remove_all(range.clone(), |_, bytes| *held_bytes -= u64::from(bytes));
            self.not_before.retain(|sequence, _| !range.contains(sequence));
        }
    }

    /// Messages are handed back: the first of them and everything after it is shown again, in
    /// order, skipping what is done. `None` if all are done already.
    pub fn nack(&mut self, nacks: &[Nack], now: Moment) -> Option<Rewound> {
        let failed = nacks.iter().filter(|nack| self.fail(nack, now)).map(|nack| nack.sequence);
        let first = failed.collect::<Vec<_>>().into_iter().min()?;
        Some(self.rewind(first))
    }

    fn fail(&mut self, nack: &Nack, now: Moment) -> bool {
        let sequence = nack.sequence;
        if sequence > self.cursor.head() || self.cursor.is_done(sequence) {
            return false;
        }
        // Nobody can have more than this in hand, and what fails has to be remembered.
        let most = u64::from(limits::MAX_OUTSTANDING_MESSAGES) + limits::MAX_DELAYED as u64;
        if !self.held.contains(sequence) && self.cursor.undone_to(sequence) > most {
            return false;
        }
        let failures = self.cursor.fail(nack, now.wall);
        let delay = nack.delay.unwrap_or_else(|| backoff(failures));
        self.not_before.insert(sequence, now.at + delay.min(limits::MAX_BACKOFF));
        true
    }

    /// Everything from `from` on that is not done is shown again.
    fn rewind(&mut self, from: u64) -> Rewound {
        self.started.remove_all(from..=u64::MAX);
        let held_bytes = &mut self.held_bytes;
        self.held.remove_all(from..=u64::MAX, |_, bytes| *held_bytes -= u64::from(bytes));
        self.next = self.next.min(from).max(self.cursor.floor() + 1);
        self.base = 0;
        self.generation += 1;
        Rewound { from, generation: self.generation, taken_back: Sequences::new() }
    }

    /// Moves the position: all up to the floor is done, and these beyond it.
    pub fn restore(&mut self, floor: u64, done: &Sequences) {
        self.cursor.restore(floor, done);
        self.not_before.clear();
        self.detach();
    }

    /// Messages below `first` are gone. Answers the first and the last one that the consumer is
    /// to be told of; it may hold some between them. The floor waits until it knows.
    pub fn lose_below(&mut self, first: u64) -> Option<(u64, u64)> {
        let first = first.min(self.cursor.head() + 1);
        // What lies before `next` is with the consumer, delayed, or told already.
        let untold = self.delayed.first().map_or(self.next, |delayed| self.next.min(delayed));
        let (from, to) = (untold.max(self.cursor.floor() + 1), first - 1);
        if from > to {
            return None;
        }
        self.next = self.next.max(first);
        self.delayed.remove_all(..first);
        let held = self.held.keys_in(from..=to);
        self.cursor.missing(&(from..=to), held)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;

    use super::super::Receipt;
    use super::*;
    use crate::record::{CursorRecord, Release, Timestamp};

    fn rewound(from: u64) -> Rewound {
        Rewound { from, generation: 1, taken_back: Sequences::new() }
    }

    fn at(now: Instant) -> Moment {
        Moment { at: now, wall: Timestamp(1) }
    }

    fn message(sequence: u64) -> StoredMessage {
        let body = Bytes::from_static(b"body");
        StoredMessage {
            sequence,
            published_at: Timestamp(0),
            recipients: Vec::new(),
            body: body.into(),
        }
    }

    /// Every seventh message is for someone else.
    fn for_others(sequence: u64) -> bool {
        sequence.is_multiple_of(7)
    }

    fn set(sequences: impl IntoIterator<Item = u64>) -> Sequences {
        sequences.into_iter().map(|sequence| sequence..=sequence).collect()
    }

    /// Sends all that may be sent now, in frames of three.
    fn pump(delivery: &mut Exclusive, window: u64, now: Instant) -> Vec<(u64, u32)> {
        let mut sent = Vec::new();
        while let Some((from, room)) = delivery.wants(window, now) {
            for sequence in from..from + room.min(3) {
                if let Some(attempt) =
                    delivery.offer(&message(sequence), !for_others(sequence), None)
                {
                    sent.push((sequence, attempt));
                }
            }
        }
        sent
    }

    fn check(head: u64, act: impl FnOnce(&mut Exclusive, Instant)) -> Exclusive {
        let mut delivery = Exclusive::new(Cursor::new(CursorRecord::default(), head, None));
        act(&mut delivery, Instant::now());
        delivery
    }

    #[test]
    fn nack_of_the_first_of_three_shows_all_three_again_but_for_what_is_acked() {
        check(3, |delivery, now| {
            assert_eq!(pump(delivery, 100, now), [(1, 1), (2, 1), (3, 1)]);
            let nack =
                Nack { sequence: 1, attempt: 1, delay: Some(Duration::ZERO), ..Nack::default() };
            assert_eq!(delivery.nack(std::slice::from_ref(&nack), at(now)), Some(rewound(1)));
            delivery.ack(&set([2]));
            assert_eq!(pump(delivery, 100, now), [(1, 2), (3, 1)]);
        });
    }

    #[test]
    fn a_nack_that_arrives_twice_counts_once() {
        let delivery = check(1, |delivery, now| {
            pump(delivery, 100, now);
            let nack =
                Nack { sequence: 1, attempt: 1, delay: Some(Duration::ZERO), ..Nack::default() };
            delivery.nack(std::slice::from_ref(&nack), at(now));
            let claim = Claim { nacked: vec![nack], ..Claim::default() };
            delivery.attach(&claim, at(now));
        });
        assert_eq!(delivery.cursor.failures(1), 1);
    }

    #[test]
    fn a_failed_message_holds_its_topic_back_until_its_time() {
        check(2, |delivery, now| {
            pump(delivery, 100, now);
            let nack = Nack {
                sequence: 1,
                attempt: 1,
                delay: Some(Duration::from_secs(5)),
                ..Nack::default()
            };
            delivery.nack(std::slice::from_ref(&nack), at(now));
            assert_eq!(pump(delivery, 100, now + Duration::from_secs(4)), []);
            assert_eq!(pump(delivery, 100, now + Duration::from_secs(5)), [(1, 2), (2, 1)]);
        });
    }

    #[test]
    fn each_failed_message_has_its_own_delay() {
        check(4, |delivery, now| {
            pump(delivery, 100, now);
            let delays = [(2, Duration::ZERO), (3, Duration::from_secs(5))];
            let nack = |(sequence, delay)| Nack {
                sequence,
                attempt: 1,
                delay: Some(delay),
                ..Nack::default()
            };
            let back = delivery.nack(&delays.map(nack), at(now));
            assert_eq!(back, Some(rewound(2)), "one for both");
            assert_eq!(pump(delivery, 100, now), [(2, 2)]);
            assert_eq!(pump(delivery, 100, now + Duration::from_secs(5)), [(3, 2), (4, 1)]);
        });
    }

    #[test]
    fn what_was_never_shown_cannot_fail() {
        let delivery = check(limits::MAX_OUTSTANDING_MESSAGES.into(), |delivery, now| {
            pump(delivery, 1, now);
            delivery.cursor.on_head(1_000_000);
            let nack = |sequence, attempt| Nack { sequence, attempt, ..Nack::default() };
            delivery.nack(&[nack(1, u32::MAX), nack(500_000, 1)], at(now));
        });
        let failed = delivery.cursor.record().failures.iter();
        assert_eq!(failed.map(|(n, failure)| (*n, failure.count)).collect::<Vec<_>>(), [(1, 1)]);
    }

    #[test]
    fn what_a_consumer_claims_to_hold_is_not_sent_again() {
        check(5, |delivery, now| {
            let claim = Claim { held: set([1, 3, 9]), acked: set([2]), ..Claim::default() };
            assert_eq!(delivery.attach(&claim, at(now)), set([9]), "9 lies beyond the head");
            assert_eq!(pump(delivery, 100, now), [(4, 1), (5, 1)]);
        });
    }

    #[test]
    fn an_ack_needs_no_delivery_and_ends_at_the_head() {
        let delivery = check(3, |delivery, _| delivery.ack(&set([1, 2, 3, 4])));
        assert_eq!(delivery.cursor.floor(), 3);
        assert!(!delivery.cursor.record().received.contains(&4));
    }

    #[test]
    fn a_seek_releases_what_it_passes_and_keeps_what_was_received() {
        let mut delivery = check(6, |delivery, _| {
            delivery.ack(&set([1, 3]));
            delivery.restore(4, &Sequences::new());
        });
        let receipt = |delivery: &Exclusive, sequence| delivery.cursor.receipt(sequence);
        assert_eq!(receipt(&delivery, 2), Receipt::Released(Release::Seek));
        assert_eq!(receipt(&delivery, 3), Receipt::Received);
        assert_eq!(receipt(&delivery, 5), Receipt::Pending);
        delivery.restore(0, &Sequences::new());
        assert_eq!(receipt(&delivery, 2), Receipt::Pending);
        assert_eq!(receipt(&delivery, 3), Receipt::Received);
        assert_eq!(pump(&mut delivery, 100, Instant::now()).len(), 6);
    }

    #[test]
    fn a_gap_is_told_to_every_consumer_until_one_knows() {
        let mut delivery = check(6, |delivery, now| {
            assert_eq!(pump(delivery, 2, now), [(1, 1), (2, 1)]);
            delivery.ack(&set([1]));
            assert_eq!(delivery.lose_below(5), Some((3, 4)), "2 is held, and may be acked still");
            assert_eq!(pump(delivery, 100, now), [(5, 1), (6, 1)]);
            delivery.detach();
            assert_eq!(delivery.lose_below(5), Some((2, 4)));
            delivery.miss(&set([2, 3, 4, 9]));
        });
        assert_eq!(delivery.cursor.floor(), 4);
        assert_eq!(delivery.lose_below(5), None);
        assert_eq!(delivery.cursor.receipt(1), Receipt::Received);
        assert_eq!(delivery.cursor.receipt(2), Receipt::Released(Release::Gap));
        // A late ack is an ack.
        delivery.ack(&set([2]));
        assert_eq!(delivery.cursor.receipt(2), Receipt::Received);
    }

    #[test]
    fn delayed_messages_are_passed_over_and_come_when_they_are_due_the_earliest_first() {
        let minutes = |minutes: u32| minutes * Duration::from_secs(60);
        check(6, |delivery, now| {
            let offer = |delivery: &mut Exclusive, sequence, due| {
                delivery.offer(&message(sequence), true, due)
            };
            assert_eq!(offer(delivery, 1, Some(now + minutes(2))), None);
            assert_eq!(offer(delivery, 2, Some(now + minutes(1))), None);
            assert_eq!(pump(delivery, 2, now), [(3, 1), (4, 1)], "the window is behind them");
            delivery.ack(&set([3, 4]));
            assert_eq!((delivery.passed(), delivery.cursor.floor()), (4, 0));
            assert_eq!(delivery.due_at(), Some(now + minutes(1)));
            assert_eq!(pump(delivery, 2, now + minutes(3)), [(2, 1), (1, 1), (5, 1), (6, 1)]);
            // One that fails is before everything later in the log.
            let nack = Nack { sequence: 2, attempt: 1, ..Nack::default() };
            let rewound = delivery.nack(std::slice::from_ref(&nack), at(now + minutes(3)));
            assert_eq!(rewound.unwrap().from, 2);
            assert_eq!(pump(delivery, 9, now + minutes(3)), []);
            assert_eq!(pump(delivery, 9, now + minutes(4)), [(2, 2), (5, 1), (6, 1)]);
        });
    }

    #[test]
    fn what_is_far_behind_a_delayed_message_can_fail() {
        let most = u64::from(limits::MAX_OUTSTANDING_MESSAGES);
        check(most + 4, |delivery, now| {
            delivery.offer(&message(1), true, Some(now + Duration::from_secs(9999)));
            let last = pump(delivery, 2 * most, now).last().map(|(last, _)| *last);
            assert_eq!(last, Some(most + 4));
            delivery.start(&set([most + 4]), now);
            let rewound = delivery.expire(now, "slow", at(now)).map(|rewound| rewound.from);
            assert_eq!((rewound, delivery.started_at()), (Some(most + 4), None));
            let nack = Nack { sequence: most + 2, attempt: 1, ..Nack::default() };
            assert!(delivery.nack(std::slice::from_ref(&nack), at(now)).is_some());
        });
    }

    #[test]
    fn a_message_is_due_later_when_the_clock_is_set_back() {
        check(2, |delivery, now| {
            let minute = Duration::from_secs(60);
            delivery.offer(&message(1), true, Some(now + minute));
            assert_eq!(pump(delivery, 2, now), [(2, 1)]);
            let soon = now + minute;
            assert_eq!(delivery.wants(2, soon), Some((1, 1)));
            delivery.offer(&message(1), true, Some(soon + minute));
            assert_eq!(delivery.wants(2, soon), None);
            assert_eq!(delivery.due_at(), Some(soon + minute));
        });
    }

    #[test]
    fn what_failed_is_shown_again_however_much_is_delayed() {
        let many = limits::MAX_DELAYED as u64;
        check(many + 9, |delivery, now| {
            assert_eq!(pump(delivery, 2, now), [(1, 1), (2, 1)]);
            for sequence in 3..=many + 2 {
                delivery.offer(&message(sequence), true, Some(now + Duration::from_secs(9999)));
            }
            assert_eq!(delivery.wants(10, now), None);
            let delay = Some(Duration::ZERO);
            let nack = Nack { sequence: 1, attempt: 1, delay, ..Nack::default() };
            delivery.nack(std::slice::from_ref(&nack), at(now));
            assert_eq!(delivery.wants(10, now).map(|(first, _)| first), Some(1));
        });
    }

    #[test]
    fn a_delayed_message_can_be_lost_acked_and_moved_past() {
        let delivery = check(4, |delivery, now| {
            let due = Some(now + Duration::from_secs(60));
            for sequence in 1..=4 {
                delivery.offer(&message(sequence), true, due);
            }
            delivery.ack(&set([2]));
            assert_eq!(delivery.lose_below(4), Some((1, 3)));
            delivery.miss(&set([1, 3]));
            assert_eq!((delivery.delayed(), delivery.cursor.floor()), (1, 3));
            delivery.restore(4, &Sequences::new());
        });
        assert_eq!((delivery.delayed(), delivery.due_at()), (0, None));
    }

    #[test]
    fn the_window_counts_from_the_floor() {
        check(10, |delivery, now| {
            assert_eq!(pump(delivery, 4, now).len(), 4);
            delivery.ack(&set([2, 3, 4]));
            assert_eq!(pump(delivery, 4, now), [], "1 keeps the floor where it is");
        });
    }

    #[test]
    fn receipts_are_kept_up_to_a_limit() {
        let limit = limits::MAX_RECEIVED_RANGES as u64;
        let delivery = check(limit * 3, |delivery, _| {
            delivery.ack(&set((1..=limit + 1).map(|n| n * 2)));
        });
        assert_eq!(delivery.cursor.receipt(2), Receipt::Trimmed { oldest: 3 });
        assert_eq!(delivery.cursor.receipt(4), Receipt::Received);
    }

    #[test]
    fn what_is_lost_or_held_again_holds_nothing_back() {
        let nack = |sequence, seconds| Nack {
            sequence,
            attempt: 1,
            delay: Some(Duration::from_secs(seconds)),
            ..Nack::default()
        };
        check(3, |delivery, now| {
            pump(delivery, 100, now);
            delivery.nack(&[nack(1, 5)], at(now));
            assert_eq!(delivery.lose_below(2), Some((1, 1)));
            assert_eq!(pump(delivery, 100, now), [(2, 1), (3, 1)]);
            // Nor does its time being over let others come before theirs.
            delivery.nack(&[nack(2, 50)], at(now));
            let later = now + Duration::from_secs(6);
            assert_eq!(pump(delivery, 100, later), []);
            let claim = Claim { held: set([2]), ..Claim::default() };
            delivery.attach(&claim, at(later));
            delivery.lose_below(2);
            assert_eq!(pump(delivery, 100, later), [(3, 1)]);
        });
    }

    #[test]
    fn a_suspect_that_is_claimed_after_a_restart_is_tried_still() {
        let before = check(3, |delivery, now| {
            pump(delivery, 100, now);
            delivery.start(&set([1, 2]), now);
            delivery.crash(at(now));
        });
        let now = Instant::now() + limits::MAX_BACKOFF;
        let mut delivery = Exclusive::new(Cursor::new(before.cursor.record().clone(), 3, None));
        delivery.attach(&Claim { held: set([1]), ..Claim::default() }, at(now));
        assert_eq!(pump(&mut delivery, 100, now), [], "2 may kill, too");
        assert_eq!(pump(&mut delivery, 100, now + limits::SUSPICION), [(2, 2), (3, 1)]);
    }
}
