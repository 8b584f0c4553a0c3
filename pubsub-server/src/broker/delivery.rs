//! What to show next, and what has been dealt with: the position of one subscription in one
//! topic. Pure: events in, answers out, no clock and no I/O.
//!
//! Three sets describe the topic: what is **done** (acked, or not for this subscription; the floor
//! has passed all of it up to the first hole), what is **held** by the active consumer (sent and
//! neither acked nor handed back), and the rest up to the head, which is shown in order.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::limits;
use crate::names::SubscriptionName;
use crate::record::{CursorRecord, Release, Sequences, StoredMessage};

/// The delivery of one topic to one exclusive subscription.
#[derive(Debug)]
pub struct Delivery {
    cursor: CursorRecord,
    head: u64,
    held: BTreeMap<u64, u32>,
    held_bytes: u64,
    /// No message below is to be shown in this session, but for those in `not_before`'s way.
    next: u64,
    generation: u32,
    not_before: BTreeMap<u64, Instant>,
    dirty: bool,
}

/// What a consumer brings along when it attaches.
#[derive(Clone, Debug, Default)]
pub struct Claim {
    /// In its buffer or in the application's hands.
    pub held: Sequences,
    /// Bytes of these.
    pub held_bytes: u64,
    /// Acked, unconfirmed.
    pub acked: Sequences,
    /// Handed back, unconfirmed.
    pub nacked: Vec<Nack>,
    /// Told to be gaps, unconfirmed.
    pub missed: Sequences,
    /// The generation of the cursor that this refers to.
    pub cursor_generation: u64,
}

/// A message is handed back.
#[derive(Clone, Debug)]
pub struct Nack {
    /// Which.
    pub sequence: u64,
    /// The attempt that failed, 0 if none did.
    pub attempt: u32,
    /// How long to wait; the backoff if `None`.
    pub delay: Option<Duration>,
}

/// A topic is going to be shown again from a point on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rewound {
    /// The first message that may be shown again.
    pub from: u64,
    /// The generation of what follows.
    pub generation: u32,
}

/// What a subscription knows about the fate of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Receipt {
    /// Acked.
    Received,
    /// To be shown or acked, unless it is for other recipients.
    Pending,
    /// Never meant for this subscription.
    NotAddressed,
    /// Let go without an ack.
    Released(Release),
    /// Not known any more.
    Trimmed {
        /// The oldest message that can be answered for.
        oldest: u64,
    },
}

impl Delivery {
    /// Goes on where `cursor` says, in a topic with this head.
    pub fn new(cursor: CursorRecord, head: u64) -> Self {
        debug_assert!(cursor.floor <= head, "a cursor is never ahead of its topic");
        let next = cursor.floor + 1;
        Self {
            cursor,
            head,
            held: BTreeMap::new(),
            held_bytes: 0,
            next,
            generation: 0,
            not_before: BTreeMap::new(),
            dirty: false,
        }
    }

    /// The durable part.
    pub fn cursor(&self) -> &CursorRecord {
        &self.cursor
    }

    /// The committed head, as far as told.
    pub fn head(&self) -> u64 {
        self.head
    }

    /// Messages held by the consumer.
    pub fn held(&self) -> usize {
        self.held.len()
    }

    /// Whether the consumer holds this message.
    pub fn holds(&self, sequence: u64) -> bool {
        self.held.contains_key(&sequence)
    }

    /// Bytes of the messages held by the consumer.
    pub fn held_bytes(&self) -> u64 {
        self.held_bytes
    }

    /// Messages after the floor that are not done.
    pub fn backlog(&self) -> u64 {
        let done: u64 = self.cursor.done.iter().map(|range| range.end() - range.start() + 1).sum();
        self.head - self.cursor.floor - done
    }

    /// The delivery generation of this session.
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// Whether the cursor has changed since it was taken.
    pub fn is_dirty(&self) -> bool {
        self.dirty
    }

    /// Whether the cursor has changed since the last call.
    pub fn take_dirty(&mut self) -> bool {
        std::mem::take(&mut self.dirty)
    }

    /// The cursor has to be saved, whether it has changed or not.
    pub fn mark_dirty(&mut self) {
        self.dirty = true;
    }

    /// Messages up to `head` are committed.
    pub fn on_head(&mut self, head: u64) {
        debug_assert!(head >= self.head, "a head never goes back");
        self.head = self.head.max(head);
    }

    /// A consumer takes over, or comes back. Answers what it claims to hold and is not wanted any
    /// more.
    pub fn attach(&mut self, claim: &Claim, now: Instant) -> Sequences {
        self.detach();
        self.generation = 0;
        if claim.cursor_generation != self.cursor.generation {
            return claim.held.clone();
        }
        self.ack(&claim.acked);
        self.miss(&claim.missed);
        for nack in &claim.nacked {
            self.fail(nack, now);
        }
        self.hold(claim)
    }

    fn hold(&mut self, claim: &Claim) -> Sequences {
        let mut dropped = Sequences::new();
        let mut kept = Vec::new();
        for range in claim.held.iter() {
            let (first, last) = (*range.start(), *range.end());
            if last > self.head {
                dropped.insert(first.max(self.head + 1)..=last);
            }
            // Bounded: a consumer holds at most what it was sent.
            for sequence in first..=last.min(self.head) {
                if self.is_done(sequence) {
                    dropped.insert(sequence..=sequence);
                } else {
                    kept.push(sequence);
                }
            }
        }
        let each = claim.held_bytes / (kept.len() as u64).max(1);
        for sequence in kept {
            self.put_held(sequence, u32::try_from(each).unwrap_or(u32::MAX));
        }
        dropped
    }

    /// The consumer is gone, and what it held is to be shown again.
    pub fn detach(&mut self) {
        self.held.clear();
        self.held_bytes = 0;
        self.next = self.cursor.floor + 1;
    }

    /// The next message to read, if one may be shown now, and how many may be from there on: all
    /// of them lie within `window` of the floor.
    pub fn wants(&mut self, window: u64, now: Instant) -> Option<(u64, u64)> {
        self.skip_settled();
        let mut last = self.cursor.floor.saturating_add(window.max(1)).min(self.head);
        // One that is held back ends the run before it.
        let mut later = self.not_before.range(self.next + 1..);
        if let Some((held_back, _)) = later.find(|(_, at)| **at > now) {
            last = last.min(held_back - 1);
        }
        let ready = self.next <= last && self.ready_at(now).is_none();
        ready.then(|| (self.next, last - self.next + 1))
    }

    /// All messages up to here were sent in this session, or are not for it.
    pub fn passed(&self) -> u64 {
        self.next.max(self.cursor.floor + 1) - 1
    }

    /// When a message that is held back by a backoff may be shown.
    pub fn ready_at(&self, now: Instant) -> Option<Instant> {
        let (_, at) = self.not_before.range(..=self.next).next()?;
        (*at > now).then_some(*at)
    }

    fn skip_settled(&mut self) {
        loop {
            if self.next <= self.cursor.floor {
                self.next = self.cursor.floor + 1;
            } else if let Some(range) = self.cursor.done.get(&self.next) {
                self.next = *range.end() + 1;
            } else if self.held.contains_key(&self.next) {
                self.next += 1;
            } else {
                return;
            }
        }
    }

    /// The message that was read next: whether it is to be sent, and as which attempt.
    pub fn offer(&mut self, message: &StoredMessage, me: &SubscriptionName) -> Option<u32> {
        let sequence = message.sequence;
        if sequence < self.next || self.is_done(sequence) || self.held.contains_key(&sequence) {
            return None;
        }
        self.next = sequence + 1;
        self.not_before.remove(&sequence);
        if !message.recipients.is_empty() && !message.recipients.contains(me) {
            self.settle(sequence, sequence);
            return None;
        }
        let bytes = u32::try_from(message.body.len()).unwrap_or(u32::MAX);
        self.put_held(sequence, bytes);
        let failures = self.cursor.failures.get(&sequence).copied().unwrap_or(0);
        Some(failures.saturating_add(1))
    }

    fn put_held(&mut self, sequence: u64, bytes: u32) {
        if self.held.insert(sequence, bytes).is_none() {
            self.held_bytes += u64::from(bytes);
        }
    }

    fn drop_held(&mut self, sequence: u64) {
        if let Some(bytes) = self.held.remove(&sequence) {
            self.held_bytes -= u64::from(bytes);
        }
    }

    /// These are received. They need not have been delivered, by this session or at all; beyond
    /// the head there is nothing to ack.
    pub fn ack(&mut self, acked: &Sequences) {
        for range in acked.iter() {
            let first = (*range.start()).max(self.cursor.start + 1);
            let last = (*range.end()).min(self.head);
            if first > last {
                continue;
            }
            let before = self.cursor.received.gaps(&(first..=last)).next().is_some();
            self.dirty |= before;
            self.cursor.received.insert(first..=last);
            self.cursor.released.remove(first..=last);
            self.settle(first, last);
        }
        self.limit_ranges();
    }

    /// Marks messages as dealt with and moves the floor as far as it goes.
    fn settle(&mut self, first: u64, last: u64) {
        let first = first.max(self.cursor.floor + 1);
        if first > last {
            return;
        }
        let held: Vec<u64> = self.held.range(first..=last).map(|(sequence, _)| *sequence).collect();
        for sequence in held {
            self.drop_held(sequence);
        }
        self.not_before.retain(|sequence, _| !(first..=last).contains(sequence));
        self.cursor.failures.retain(|sequence, _| !(first..=last).contains(sequence));
        self.dirty |= self.cursor.done.gaps(&(first..=last)).next().is_some();
        self.cursor.done.insert(first..=last);
        if let Some(range) = self.cursor.done.get(&(self.cursor.floor + 1)).cloned() {
            self.cursor.floor = *range.end();
            self.cursor.done.remove(range);
        }
    }

    /// Receipts are kept up to a limit; the oldest go first. So is what is done beyond the floor:
    /// the last goes first, and may be shown again.
    fn limit_ranges(&mut self) {
        while self.cursor.received.len() > limits::MAX_RECEIVED_RANGES {
            let Some(oldest) = self.cursor.received.first().cloned() else {
                return;
            };
            self.forget_receipts(*oldest.end());
        }
        while self.cursor.released.len() > limits::MAX_RECEIVED_RANGES {
            let Some((oldest, _)) = self.cursor.released.first_range_value() else {
                return;
            };
            self.forget_receipts(*oldest.end());
        }
        while self.cursor.done.len() > limits::MAX_DONE_RANGES {
            let Some(last) = self.cursor.done.last().cloned() else {
                return;
            };
            self.cursor.done.remove(last);
        }
    }

    fn forget_receipts(&mut self, up_to: u64) {
        self.cursor.receipts_from = self.cursor.receipts_from.max(up_to);
        self.cursor.received.remove(0..=up_to);
        self.cursor.released.remove(0..=up_to);
    }

    /// Messages are handed back: the first of them and everything after it is shown again, in
    /// order, skipping what is done. `None` if all are done already.
    pub fn nack(&mut self, nacks: &[Nack], now: Instant) -> Option<Rewound> {
        let failed = nacks.iter().filter(|nack| self.fail(nack, now)).map(|nack| nack.sequence);
        let first = failed.collect::<Vec<_>>().into_iter().min()?;
        self.rewind(first)
    }

    fn fail(&mut self, nack: &Nack, now: Instant) -> bool {
        let sequence = nack.sequence;
        // Nobody can have more than this in hand, and what fails has to be remembered.
        let last = self.cursor.floor.saturating_add(limits::MAX_OUTSTANDING_MESSAGES.into());
        if sequence > self.head.min(last) || self.is_done(sequence) {
            return false;
        }
        if nack.attempt > 0 {
            let failed = self.cursor.failures.entry(sequence).or_default();
            // The attempt's number, not a count: a nack that arrives twice counts once. An attempt
            // that was never made cannot have failed.
            let attempt = nack.attempt.min(failed.saturating_add(1));
            self.dirty |= *failed < attempt;
            *failed = (*failed).max(attempt);
        }
        let failures = self.cursor.failures.get(&sequence).copied().unwrap_or(0);
        let delay = nack.delay.unwrap_or_else(|| backoff(failures));
        self.not_before.insert(sequence, now + delay.min(limits::MAX_BACKOFF));
        true
    }

    /// Everything from `from` on that is not done is shown again.
    pub fn rewind(&mut self, from: u64) -> Option<Rewound> {
        let taken_back = self.held.split_off(&from);
        self.held_bytes -= taken_back.values().map(|bytes| u64::from(*bytes)).sum::<u64>();
        self.next = self.next.min(from).max(self.cursor.floor + 1);
        self.generation += 1;
        Some(Rewound { from, generation: self.generation })
    }

    /// Moves the position: `to` is the next message to be shown. What an ack has settled after it
    /// is forgotten, but stays received.
    pub fn seek(&mut self, to: u64) {
        let to = to.clamp(1, self.head + 1);
        let floor = self.cursor.floor;
        for range in self.cursor.done.gaps(&(floor + 1..=self.head.max(floor + 1))) {
            let (first, last) = (*range.start(), (*range.end()).min(to - 1).min(self.head));
            if first <= last {
                self.cursor.released.insert(first..=last, Release::Seek);
            }
        }
        if to <= self.head {
            self.cursor.released.remove(to..=self.head);
        }
        self.limit_ranges();
        self.cursor.start = self.cursor.start.min(to - 1);
        self.cursor.floor = to - 1;
        self.cursor.done.clear();
        self.cursor.failures.clear();
        self.cursor.generation += 1;
        self.not_before.clear();
        self.dirty = true;
        self.detach();
    }

    /// Messages below `first` are gone. Answers the first and the last one that the consumer is
    /// to be told of; it may hold some between them. The floor waits until it knows.
    pub fn lose_below(&mut self, first: u64) -> Option<(u64, u64)> {
        let first = first.min(self.head + 1);
        // What lies before `next` is with the consumer, or told already.
        let (from, to) = (self.next.max(self.cursor.floor + 1), first - 1);
        if from > to {
            return None;
        }
        self.next = first;
        let mut known = self.cursor.done.clone();
        known.extend(self.held.range(from..=to).map(|(sequence, _)| *sequence..=*sequence));
        let missing = from..=to;
        let mut missing = known.gaps(&missing);
        let first = missing.next()?;
        let last = missing.last().unwrap_or_else(|| first.clone());
        Some((*first.start(), *last.end()))
    }

    /// The consumer knows that it will never receive these.
    pub fn miss(&mut self, missed: &Sequences) {
        for range in missed.iter() {
            let first = (*range.start()).max(self.cursor.floor + 1);
            let last = (*range.end()).min(self.head);
            if first > last {
                continue;
            }
            // What is done was acked, or is for others.
            let pieces: Vec<_> = self.cursor.done.gaps(&(first..=last)).collect();
            for piece in pieces {
                self.cursor.released.insert(piece, Release::Gap);
            }
            self.settle(first, last);
        }
        self.limit_ranges();
    }

    /// What is known about a message.
    pub fn receipt(&self, sequence: u64) -> Receipt {
        if self.cursor.received.contains(&sequence) {
            Receipt::Received
        } else if sequence <= self.cursor.receipts_from {
            Receipt::Trimmed { oldest: self.cursor.receipts_from + 1 }
        } else if let Some(release) = self.cursor.released.get(&sequence) {
            Receipt::Released(*release)
        } else if sequence <= self.cursor.start || self.is_done(sequence) {
            Receipt::NotAddressed
        } else {
            Receipt::Pending
        }
    }

    fn is_done(&self, sequence: u64) -> bool {
        sequence <= self.cursor.floor || self.cursor.done.contains(&sequence)
    }

    /// The first message that is not done, if there is one.
    pub fn oldest_unsettled(&self) -> Option<u64> {
        // The floor ends where the first hole begins.
        let first = self.cursor.floor + 1;
        (first <= self.head).then_some(first)
    }
}

/// A cursor for a new subscription whose first message is `first`.
pub fn starting_at(first: u64) -> CursorRecord {
    let floor = first.max(1) - 1;
    CursorRecord { floor, start: floor, ..CursorRecord::default() }
}

/// How long to wait after so many failures.
fn backoff(failures: u32) -> Duration {
    let doublings = failures.saturating_sub(1).min(16);
    (limits::MIN_BACKOFF * 2_u32.pow(doublings)).min(limits::MAX_BACKOFF)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;
    use crate::record::Timestamp;

    fn me() -> SubscriptionName {
        SubscriptionName::parse("me").unwrap()
    }

    /// A topic of the log: every seventh message is for someone else.
    fn message(sequence: u64) -> StoredMessage {
        let other = SubscriptionName::parse("other").unwrap();
        let recipients = if for_others(sequence) { vec![other] } else { Vec::new() };
        let body = Bytes::from_static(b"body");
        StoredMessage { sequence, published_at: Timestamp(0), recipients, body }
    }

    fn for_others(sequence: u64) -> bool {
        sequence.is_multiple_of(7)
    }

    fn set(sequences: impl IntoIterator<Item = u64>) -> Sequences {
        sequences.into_iter().map(|sequence| sequence..=sequence).collect()
    }

    /// Sends all that may be sent now, in frames of three.
    fn pump(delivery: &mut Delivery, window: u64, now: Instant) -> Vec<(u64, u32)> {
        let mut sent = Vec::new();
        while let Some((from, room)) = delivery.wants(window, now) {
            for sequence in from..from + room.min(3) {
                if let Some(attempt) = delivery.offer(&message(sequence), &me()) {
                    sent.push((sequence, attempt));
                }
            }
        }
        sent
    }

    fn check(head: u64, act: impl FnOnce(&mut Delivery, Instant)) -> Delivery {
        let mut delivery = Delivery::new(CursorRecord::default(), head);
        act(&mut delivery, Instant::now());
        delivery
    }

    #[test]
    fn nack_of_the_first_of_three_shows_all_three_again_but_for_what_is_acked() {
        check(3, |delivery, now| {
            assert_eq!(pump(delivery, 100, now), [(1, 1), (2, 1), (3, 1)]);
            let nack = Nack { sequence: 1, attempt: 1, delay: Some(Duration::ZERO) };
            assert_eq!(
                delivery.nack(std::slice::from_ref(&nack), now),
                Some(Rewound { from: 1, generation: 1 })
            );
            delivery.ack(&set([2]));
            assert_eq!(pump(delivery, 100, now), [(1, 2), (3, 1)]);
        });
    }

    #[test]
    fn a_nack_that_arrives_twice_counts_once() {
        let delivery = check(1, |delivery, now| {
            pump(delivery, 100, now);
            let nack = Nack { sequence: 1, attempt: 1, delay: Some(Duration::ZERO) };
            delivery.nack(std::slice::from_ref(&nack), now);
            let claim = Claim { nacked: vec![nack], ..Claim::default() };
            delivery.attach(&claim, now);
        });
        assert_eq!(delivery.cursor().failures[&1], 1);
    }

    #[test]
    fn a_failed_message_holds_its_topic_back_until_its_time() {
        check(2, |delivery, now| {
            pump(delivery, 100, now);
            let nack = Nack { sequence: 1, attempt: 1, delay: Some(Duration::from_secs(5)) };
            delivery.nack(std::slice::from_ref(&nack), now);
            assert_eq!(pump(delivery, 100, now + Duration::from_secs(4)), []);
            assert_eq!(pump(delivery, 100, now + Duration::from_secs(5)), [(1, 2), (2, 1)]);
        });
    }

    #[test]
    fn each_failed_message_has_its_own_delay() {
        check(4, |delivery, now| {
            pump(delivery, 100, now);
            let delays = [(2, Duration::ZERO), (3, Duration::from_secs(5))];
            let nack = |(sequence, delay)| Nack { sequence, attempt: 1, delay: Some(delay) };
            let rewound = delivery.nack(&delays.map(nack), now);
            assert_eq!(rewound, Some(Rewound { from: 2, generation: 1 }), "one for both");
            assert_eq!(pump(delivery, 100, now), [(2, 2)]);
            assert_eq!(pump(delivery, 100, now + Duration::from_secs(5)), [(3, 2), (4, 1)]);
        });
    }

    #[test]
    fn what_was_never_shown_cannot_fail() {
        let delivery = check(limits::MAX_OUTSTANDING_MESSAGES.into(), |delivery, now| {
            pump(delivery, 1, now);
            delivery.on_head(1_000_000);
            let nack = |sequence, attempt| Nack { sequence, attempt, delay: None };
            delivery.nack(&[nack(1, u32::MAX), nack(500_000, 1)], now);
        });
        assert_eq!(delivery.cursor().failures, BTreeMap::from([(1, 1)]));
    }

    #[test]
    fn what_a_consumer_claims_to_hold_is_not_sent_again() {
        check(5, |delivery, now| {
            let claim = Claim { held: set([1, 3, 9]), acked: set([2]), ..Claim::default() };
            assert_eq!(delivery.attach(&claim, now), set([9]), "9 lies beyond the head");
            assert_eq!(pump(delivery, 100, now), [(4, 1), (5, 1)]);
        });
    }

    #[test]
    fn an_ack_needs_no_delivery_and_ends_at_the_head() {
        let delivery = check(3, |delivery, _| delivery.ack(&set([1, 2, 3, 4])));
        assert_eq!(delivery.cursor().floor, 3);
        assert!(!delivery.cursor().received.contains(&4));
    }

    #[test]
    fn a_seek_releases_what_it_passes_and_keeps_what_was_received() {
        let mut delivery = check(6, |delivery, _| {
            delivery.ack(&set([1, 3]));
            delivery.seek(5);
        });
        let receipt = |delivery: &Delivery, sequence| delivery.receipt(sequence);
        assert_eq!(receipt(&delivery, 2), Receipt::Released(Release::Seek));
        assert_eq!(receipt(&delivery, 3), Receipt::Received);
        assert_eq!(receipt(&delivery, 5), Receipt::Pending);
        delivery.seek(1);
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
        assert_eq!(delivery.cursor().floor, 4);
        assert_eq!(delivery.lose_below(5), None);
        assert_eq!(delivery.receipt(1), Receipt::Received);
        assert_eq!(delivery.receipt(2), Receipt::Released(Release::Gap));
        // A late ack is an ack.
        delivery.ack(&set([2]));
        assert_eq!(delivery.receipt(2), Receipt::Received);
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
        assert_eq!(delivery.receipt(2), Receipt::Trimmed { oldest: 3 });
        assert_eq!(delivery.receipt(4), Receipt::Received);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Publish(u64),
        Pump,
        AckNth(usize),
        NackNth(usize),
        Reconnect,
        LoseConsumer,
        Restart,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (1..5_u64).prop_map(Step::Publish),
            Just(Step::Pump),
            (0..20_usize).prop_map(Step::AckNth),
            (0..20_usize).prop_map(Step::NackNth),
            Just(Step::Reconnect),
            Just(Step::LoseConsumer),
            Just(Step::Restart),
        ]
    }

    /// A consumer as simple as can be, and what it has seen.
    #[derive(Default)]
    struct Consumer {
        held: BTreeSet<u64>,
        acked: BTreeSet<u64>,
        /// The next sequence may be at most one after what was seen since the last rewind.
        last: u64,
    }

    impl Consumer {
        fn receive(&mut self, sent: &[(u64, u32)]) {
            for (sequence, _) in sent {
                assert!(!for_others(*sequence), "{sequence} is for others");
                assert!(!self.acked.contains(sequence), "{sequence} is acked");
                assert!(self.held.insert(*sequence), "{sequence} is held");
                let skipped = (self.last + 1..*sequence)
                    .find(|s| !for_others(*s) && !self.acked.contains(s) && !self.held.contains(s));
                assert_eq!(skipped, None, "skipped before {sequence}");
                self.last = *sequence;
            }
        }

        fn rewind(&mut self, from: u64) {
            self.held.split_off(&from);
            self.last = self.last.min(from - 1);
        }
    }

    proptest! {
        #[test]
        fn every_message_is_shown_in_order_until_it_is_acked(
            steps in proptest::collection::vec(step(), 1..120),
        ) {
            let now = Instant::now();
            let mut delivery = Delivery::new(CursorRecord::default(), 0);
            let mut consumer = Consumer::default();
            let mut head = 0;
            let mut floor = 0;
            for step in steps {
                let nth = |n: usize| consumer.held.iter().nth(n).copied();
                match step {
                    Step::Publish(count) => {
                        head += count;
                        delivery.on_head(head);
                    }
                    Step::Pump => consumer.receive(&pump(&mut delivery, 16, now)),
                    Step::AckNth(n) => if let Some(sequence) = nth(n) {
                        delivery.ack(&set([sequence]));
                        consumer.held.remove(&sequence);
                        consumer.acked.insert(sequence);
                    },
                    Step::NackNth(n) => if let Some(sequence) = nth(n) {
                        let nack = Nack { sequence, attempt: 1, delay: Some(Duration::ZERO) };
                        let rewound = delivery.nack(std::slice::from_ref(&nack), now).unwrap();
                        consumer.rewind(rewound.from);
                    },
                    Step::Reconnect => {
                        let held = set(consumer.held.iter().copied());
                        let dropped = delivery.attach(&Claim { held, ..Claim::default() }, now);
                        prop_assert!(dropped.is_empty());
                        consumer.last = 0;
                    }
                    Step::LoseConsumer => {
                        delivery.detach();
                        consumer.rewind(1);
                    }
                    Step::Restart => {
                        delivery = Delivery::new(delivery.cursor().clone(), head);
                        let held = set(consumer.held.iter().copied());
                        delivery.attach(&Claim { held, ..Claim::default() }, now);
                        consumer.last = 0;
                    }
                }
                prop_assert!(delivery.cursor().floor >= floor, "the floor went back");
                floor = delivery.cursor().floor;
            }
            // In the end, everything is shown and acked.
            while floor < head {
                consumer.receive(&pump(&mut delivery, 16, now));
                delivery.ack(&set(consumer.held.iter().copied()));
                consumer.acked.append(&mut consumer.held);
                prop_assert!(delivery.cursor().floor > floor, "nothing moves");
                floor = delivery.cursor().floor;
            }
            let received = &delivery.cursor().received;
            for sequence in 1..=head {
                prop_assert_eq!(received.contains(&sequence), !for_others(sequence));
            }
        }
    }
}
