//! Competing consumers against a model as simple as can be: random publishes, acks, nacks, lost
//! sessions, lost frames, restarts and seeks.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use proptest::prelude::*;
use tokio::time::Instant;

use super::{Claim, Competing, Cursor, Holder, Key, Moment, Nack, Order};
use crate::record::{CursorRecord, Sequences, StoredMessage, Timestamp};

const CONSUMERS: usize = 3;
const CREDIT: usize = 4;

fn for_others(sequence: u64) -> bool {
    sequence.is_multiple_of(7)
}

/// A topic of the log: four keys, and every fifth message has none.
fn key(sequence: u64) -> Option<Key> {
    (!sequence.is_multiple_of(5)).then(|| Key::from(format!("k{}", sequence * sequence % 4)))
}

fn message(sequence: u64) -> StoredMessage {
    let body = Bytes::from_static(b"body");
    StoredMessage { sequence, published_at: Timestamp(0), recipients: Vec::new(), body }
}

fn set(sequences: impl IntoIterator<Item = u64>) -> Sequences {
    sequences.into_iter().map(|sequence| sequence..=sequence).collect()
}

/// One consumer, as it sees itself.
#[derive(Debug, Default)]
struct Consumer {
    connected: bool,
    /// Whether the server keeps its place.
    seated: bool,
    /// What it was sent and has received.
    hands: BTreeSet<u64>,
    /// What it was sent and has not received, because its connection is lost.
    in_transit: BTreeSet<u64>,
    /// Handed back while it was not connected.
    unsent: BTreeMap<u64, u32>,
}

impl Consumer {
    fn has(&self, sequence: u64) -> bool {
        self.hands.contains(&sequence) || self.in_transit.contains(&sequence)
    }

    fn count(&self) -> usize {
        self.hands.len() + self.in_transit.len()
    }
}

struct World {
    order: Order,
    delivery: Competing,
    head: u64,
    now: Instant,
    consumers: [Consumer; CONSUMERS],
    acked: BTreeSet<u64>,
    failures: BTreeMap<u64, u32>,
    not_before: BTreeMap<u64, Instant>,
    /// Withheld up to here since the restart.
    withheld: u64,
    floor: u64,
    taken: BTreeMap<&'static str, u32>,
}

#[derive(Clone, Debug)]
enum Step {
    Publish(u64),
    Deliver(usize),
    /// The connection of a consumer is going to be lost, and the frame with it.
    DeliverInVain(usize),
    Ack(usize, usize),
    Nack(usize, usize, u64),
    Wait(u64),
    Lose(usize),
    Release(usize),
    Return(usize),
    Restart,
    Seek(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let consumer = 0..CONSUMERS;
    prop_oneof![
        4 => (1..6_u64).prop_map(Step::Publish),
        8 => (1..6_usize).prop_map(Step::Deliver),
        2 => consumer.clone().prop_map(Step::DeliverInVain),
        8 => (consumer.clone(), 0..CREDIT).prop_map(|(c, nth)| Step::Ack(c, nth)),
        4 => (consumer.clone(), 0..CREDIT, 0..3_u64).prop_map(|(c, n, s)| Step::Nack(c, n, s)),
        2 => (1..4_u64).prop_map(Step::Wait),
        1 => consumer.clone().prop_map(Step::Lose),
        1 => consumer.clone().prop_map(Step::Release),
        4 => consumer.prop_map(Step::Return),
        1 => Just(Step::Restart),
        1 => (1..30_u64).prop_map(Step::Seek),
    ]
}

impl World {
    fn new(order: Order) -> Self {
        let mut world = Self {
            order,
            delivery: Competing::new(Cursor::new(CursorRecord::default(), 0, None), order),
            head: 0,
            now: Instant::now(),
            consumers: Default::default(),
            acked: BTreeSet::new(),
            failures: BTreeMap::new(),
            not_before: BTreeMap::new(),
            withheld: 0,
            floor: 0,
            taken: BTreeMap::new(),
        };
        world.come_back(0);
        world.come_back(1);
        world
    }

    fn key(&self, sequence: u64) -> Option<Key> {
        key(sequence).filter(|_| self.order == Order::Key)
    }

    fn is_settled(&self, sequence: u64) -> bool {
        for_others(sequence) || self.acked.contains(&sequence)
    }

    /// Sends at most so many, and answers how many were sent.
    fn deliver(&mut self, most: usize) -> usize {
        let mut sent = 0;
        while sent < most {
            let counts: Vec<_> = self.consumers.iter().map(|c| (c.connected, c.count())).collect();
            let pick = |owner: Option<Holder>, _: u64| {
                let able = counts.iter().enumerate().filter(|(number, (connected, count))| {
                    let mine = owner.is_none_or(|owner| owner == holder(*number));
                    mine && *connected && *count < CREDIT
                });
                able.min_by_key(|(_, (_, count))| *count).map(|(number, _)| holder(number))
            };
            let wanted = self.delivery.wants(self.now, |owner, bytes| pick(owner, bytes).is_some());
            let Some((from, count)) = wanted else { return sent };
            assert!(count > 0 && from + count - 1 <= self.head);
            let before = self.delivery.passed();
            let mut routed = None;
            for sequence in from..from + count {
                let message = message(sequence);
                routed = self.delivery.route(&message, key(sequence), !for_others(sequence), pick);
                if let Some((holder, attempt)) = routed {
                    self.receive(number(holder), sequence, attempt);
                    sent += 1;
                    break;
                }
            }
            assert!(self.delivery.passed() >= before || routed.is_some());
        }
        sent
    }

    fn receive(&mut self, consumer: usize, sequence: u64, attempt: u32) {
        assert!(!self.is_settled(sequence), "{sequence} is acked, or for others");
        assert!(!self.consumers.iter().any(|c| c.has(sequence)), "{sequence} is held");
        assert!(sequence > self.withheld, "{sequence} may be with someone since the restart");
        let due = self.not_before.get(&sequence);
        assert!(due.is_none_or(|at| *at <= self.now), "{sequence} comes too early");
        let failures = self.failures.get(&sequence).copied().unwrap_or(0);
        assert_eq!(attempt, failures + 1, "{sequence} has failed {failures} times");
        if let Some(key) = self.key(sequence) {
            for other in (1..=self.head).filter(|other| self.key(*other).as_ref() == Some(&key)) {
                let mine = self.consumers[consumer].has(other);
                if other < sequence {
                    assert!(mine || self.is_settled(other), "{other} comes before {sequence}");
                } else {
                    let held = self.consumers.iter().any(|c| c.has(other));
                    assert!(!held, "{other} was sent before {sequence}");
                }
            }
        }
        self.not_before.remove(&sequence);
        self.consumers[consumer].hands.insert(sequence);
        assert!(self.consumers[consumer].count() <= CREDIT, "beyond the credit");
    }

    fn ack(&mut self, consumer: usize, sequence: u64) {
        self.delivery.ack(&set([sequence]));
        self.acked.insert(sequence);
        self.failures.remove(&sequence);
        self.not_before.remove(&sequence);
        self.consumers[consumer].hands.remove(&sequence);
    }

    fn nack(&mut self, consumer: usize, sequence: u64, seconds: u64) {
        let attempt = self.failures.get(&sequence).copied().unwrap_or(0) + 1;
        self.consumers[consumer].hands.remove(&sequence);
        if !self.consumers[consumer].connected {
            self.take_back_at_the_client(consumer, sequence);
            self.consumers[consumer].unsent.insert(sequence, attempt);
            return;
        }
        let delay = Some(Duration::from_secs(seconds));
        let nack = Nack { sequence, attempt, delay, ..Nack::default() };
        let rewound = self.delivery.nack(holder(consumer), &[nack], at(self.now));
        let taken_back = rewound.map(|rewound| rewound.taken_back).unwrap_or_default();
        self.failures.insert(sequence, attempt);
        self.not_before.insert(sequence, self.now + Duration::from_secs(seconds));
        for taken in taken_back.iter().flat_map(Clone::clone) {
            if taken == sequence {
                continue;
            }
            assert!(taken > sequence, "{taken} is taken back with {sequence}");
            let had = self.consumers[consumer].hands.remove(&taken);
            assert!(had, "{taken} is taken back and was not held");
        }
        if let Some(key) = self.key(sequence) {
            assert!(taken_back.contains(&sequence), "{sequence} itself is not named");
            let after = |s: &u64| *s > sequence && self.key(*s).as_ref() == Some(&key);
            assert!(!self.consumers[consumer].hands.iter().any(after), "not taken back");
        }
    }

    fn take_back_at_the_client(&mut self, consumer: usize, sequence: u64) {
        let Some(mine) = self.key(sequence) else { return };
        let order = self.order;
        self.consumers[consumer].hands.retain(|other| {
            *other < sequence || key(*other).filter(|_| order == Order::Key) != Some(mine.clone())
        });
    }

    fn lose(&mut self, consumer: usize) {
        self.consumers[consumer].connected = false;
    }

    /// Its grace is over.
    fn release(&mut self, consumer: usize) {
        if self.consumers[consumer].connected || !self.consumers[consumer].seated {
            return;
        }
        self.delivery.detach(holder(consumer));
        // What it has in its hands counts no more, but it does not know that.
        self.consumers[consumer] = Consumer::default();
        self.withhold_no_more_if_all_are_back();
    }

    fn come_back(&mut self, consumer: usize) {
        let Consumer { hands, unsent, seated, .. } = std::mem::take(&mut self.consumers[consumer]);
        let nack = |(sequence, attempt): (&u64, &u32)| Nack {
            sequence: *sequence,
            attempt: *attempt,
            delay: Some(Duration::ZERO),
            ..Nack::default()
        };
        let claim = Claim {
            held: set(hands.iter().copied()),
            nacked: unsent.iter().map(nack).collect(),
            cursor_generation: self.delivery.cursor.record().generation,
            ..Claim::default()
        };
        let dropped = self.delivery.attach(holder(consumer), &claim, seated, at(self.now));
        assert!(dropped.is_empty(), "{dropped:?} of {hands:?} is dropped");
        for (sequence, attempt) in unsent {
            if seated && !self.is_settled(sequence) {
                self.failures.insert(sequence, attempt);
                self.not_before.remove(&sequence);
            }
        }
        let connected = Consumer { connected: true, seated: true, hands, ..Consumer::default() };
        self.consumers[consumer] = connected;
        self.withhold_no_more_if_all_are_back();
    }

    fn withhold_no_more_if_all_are_back(&mut self) {
        if self.consumers.iter().all(|c| c.connected || !c.seated) {
            self.withheld = 0;
            self.delivery.withhold_no_more();
        }
    }

    fn restart(&mut self) {
        let record = self.delivery.cursor.record().clone();
        self.delivery = Competing::new(Cursor::new(record, self.head, None), self.order);
        for consumer in &mut self.consumers {
            // What was on its way is lost.
            consumer.connected = false;
            consumer.in_transit.clear();
        }
        // A moment that had to be waited for is forgotten.
        self.not_before.clear();
        if self.consumers.iter().any(|consumer| consumer.seated) {
            self.delivery.withhold();
            self.withheld = self.head;
        }
    }

    fn seek(&mut self, to: u64) {
        let to = to.min(self.head + 1);
        self.delivery.restore(to - 1, &Sequences::new());
        self.floor = to - 1;
        self.acked = (1..to).collect();
        self.failures.clear();
        self.not_before.clear();
        self.withheld = 0;
        for consumer in &mut self.consumers {
            consumer.hands.clear();
            consumer.in_transit.clear();
            consumer.unsent.clear();
        }
    }

    fn step(&mut self, step: &Step) {
        let nth = |consumer: usize, n| self.consumers[consumer].hands.iter().nth(n).copied();
        match *step {
            Step::Publish(count) => {
                self.head += count;
                self.delivery.cursor.on_head(self.head);
            }
            Step::Deliver(most) => drop(self.deliver(most)),
            Step::DeliverInVain(consumer) => {
                let before = self.consumers[consumer].hands.clone();
                self.deliver(2);
                let Consumer { hands, in_transit, connected, .. } = &mut self.consumers[consumer];
                in_transit.extend(hands.difference(&before));
                *hands = before;
                *connected = false;
            }
            Step::Ack(consumer, n) => {
                if let Some(sequence) = nth(consumer, n) {
                    self.ack(consumer, sequence);
                }
            }
            Step::Nack(consumer, n, seconds) => {
                if let Some(sequence) = nth(consumer, n) {
                    self.nack(consumer, sequence, seconds);
                }
            }
            Step::Wait(seconds) => self.now += Duration::from_secs(seconds),
            Step::Lose(consumer) => self.lose(consumer),
            Step::Release(consumer) => self.release(consumer),
            Step::Return(consumer) => self.come_back(consumer),
            Step::Restart => self.restart(),
            Step::Seek(to) => self.seek(to),
        }
        *self.taken.entry(step.name()).or_default() += 1;
        self.check();
    }

    fn check(&mut self) {
        let floor = self.delivery.cursor.floor();
        assert!(floor >= self.floor, "the floor went back");
        self.floor = floor;
        for (number, consumer) in self.consumers.iter().enumerate() {
            let out = self.delivery.out(holder(number)).messages;
            // After a restart nothing is known of those that have not come back; nor is it of what
            // one has handed back that is away.
            if consumer.connected {
                assert_eq!(out, consumer.count() as u64, "what is with {number}");
            }
        }
        let passed = self.delivery.passed();
        let held = |sequence| self.consumers.iter().any(|consumer| consumer.has(sequence));
        let skipped = (1..=passed).find(|s| {
            let unsent = self.consumers.iter().any(|c| !c.connected && c.seated);
            !(self.is_settled(*s) || held(*s) || unsent)
        });
        assert_eq!(skipped, None, "passed {passed}");
    }

    /// In the end everything is shown and acked.
    fn finish(&mut self) {
        for consumer in 0..CONSUMERS {
            self.come_back(consumer);
        }
        while self.delivery.cursor.floor() < self.head {
            self.now += Duration::from_secs(60);
            let sent = self.deliver(100);
            let mut acked = 0;
            for consumer in 0..CONSUMERS {
                for sequence in self.consumers[consumer].hands.clone() {
                    self.ack(consumer, sequence);
                    acked += 1;
                }
            }
            self.check();
            let done = self.delivery.cursor.floor() == self.head;
            assert!(sent + acked > 0 || done, "nothing moves");
        }
        let received = &self.delivery.cursor.record().received;
        for sequence in self.acked.iter().filter(|s| received.contains(s)) {
            assert!(!for_others(*sequence));
        }
        assert_eq!(self.delivery.waiting(), 0);
        assert_eq!(self.delivery.held(), 0);
    }
}

impl Step {
    fn name(&self) -> &'static str {
        match self {
            Self::Publish(_) => "publish",
            Self::Deliver(_) => "deliver",
            Self::DeliverInVain(_) => "deliver in vain",
            Self::Ack(..) => "ack",
            Self::Nack(..) => "nack",
            Self::Wait(_) => "wait",
            Self::Lose(_) => "lose",
            Self::Release(_) => "release",
            Self::Return(_) => "return",
            Self::Restart => "restart",
            Self::Seek(_) => "seek",
        }
    }
}

fn holder(number: usize) -> Holder {
    Holder::Seat(number as u64)
}

fn number(holder: Holder) -> usize {
    match holder {
        Holder::Seat(number) | Holder::Pull(number) => usize::try_from(number).unwrap(),
    }
}

proptest! {
    #[test]
    fn every_message_goes_to_one_consumer_until_it_is_acked(
        steps in proptest::collection::vec(step(), 1..150),
    ) {
        let mut world = World::new(Order::None);
        steps.iter().for_each(|step| world.step(step));
        world.finish();
    }

    #[test]
    fn the_messages_of_a_key_come_in_order_to_one_consumer_at_a_time(
        steps in proptest::collection::vec(step(), 1..150),
    ) {
        let mut world = World::new(Order::Key);
        steps.iter().for_each(|step| world.step(step));
        world.finish();
    }
}

fn one(_: Option<Holder>, _: u64) -> Option<Holder> {
    Some(holder(1))
}

fn at(now: Instant) -> Moment {
    Moment { at: now, wall: Timestamp(1) }
}

fn nack(sequence: u64, seconds: u64) -> Nack {
    Nack { sequence, attempt: 1, delay: Some(Duration::from_secs(seconds)), ..Nack::default() }
}

/// A topic of which one consumer was sent the first messages.
fn sent(order: Order, head: u64, messages: u64) -> Competing {
    let mut delivery = Competing::new(Cursor::new(CursorRecord::default(), head, None), order);
    for sequence in 1..=messages {
        delivery.route(&message(sequence), key(sequence), !for_others(sequence), one);
    }
    delivery
}

#[test]
fn what_may_be_of_the_same_key_is_taken_back_too() {
    let now = Instant::now();
    let mut delivery = Competing::new(Cursor::new(CursorRecord::default(), 10, None), Order::Key);
    let claim = Claim { held: set([1, 9]), ..Claim::default() };
    delivery.attach(holder(1), &claim, true, at(now));
    // The key of 9 is not known yet.
    for sequence in 1..=2 {
        delivery.route(&message(sequence), key(sequence), !for_others(sequence), one);
    }
    assert_eq!(key(1), key(9));
    let rewound = delivery.nack(holder(1), &[nack(1, 0)], at(now)).unwrap();
    assert_eq!(rewound.taken_back, set([1, 9]));
    assert!(!delivery.holds(9, holder(1)));
}

#[test]
fn consumers_cannot_claim_more_than_there_can_be() {
    let most = crate::limits::MAX_UNSETTLED as u64;
    let mut delivery =
        Competing::new(Cursor::new(CursorRecord::default(), 2 * most, None), Order::None);
    let claim = Claim { held: Sequences::from_iter([1..=2 * most]), ..Claim::default() };
    let dropped = delivery.attach(holder(1), &claim, true, at(Instant::now()));
    assert_eq!(dropped, Sequences::from_iter([most + 1..=2 * most]));
    assert_eq!(delivery.held() as u64, most);
}

#[test]
fn what_is_handed_back_of_a_gap_is_part_of_it() {
    let now = Instant::now();
    let mut delivery = sent(Order::None, 10, 2);
    assert_eq!(delivery.lose_below(8), Some((3, 7)));
    assert_eq!(delivery.lose_below(8), None, "it is told");
    delivery.nack(holder(1), &[nack(2, 0)], at(now));
    assert_eq!(delivery.lose_below(8), Some((2, 7)));
    assert_eq!(delivery.wants(now, |_, _| true), Some((8, 3)));
    delivery.miss(&set(2..=7));
    assert_eq!(delivery.lost(), None);
}

#[test]
fn a_moment_that_has_passed_is_waited_for_no_more() {
    let now = Instant::now();
    let mut delivery = sent(Order::None, 1, 1);
    delivery.nack(holder(1), &[nack(1, 5)], at(now));
    assert_eq!(delivery.ready_at(now), Some(now + Duration::from_secs(5)));
    assert_eq!(delivery.ready_at(now + Duration::from_secs(5)), None);
}

#[test]
fn a_message_that_is_too_large_for_now_is_not_overtaken_by_smaller_ones() {
    let now = Instant::now();
    let mut delivery =
        Competing::new(Cursor::new(CursorRecord::default(), 100_000, None), Order::None);
    // Somebody has room for three bytes, and each message has four.
    let fits = |bytes| bytes <= 3;
    assert_eq!(delivery.wants(now, |_, bytes| fits(bytes)).map(|(from, _)| from), Some(1));
    let small = |_: Option<Holder>, bytes: u64| fits(bytes).then(|| holder(1));
    assert_eq!(delivery.route(&message(1), None, true, small), None);
    assert_eq!(delivery.wants(now, |_, bytes| fits(bytes)), None);
    assert_eq!(delivery.wants(now, |_, _| true), Some((1, 1)));
    assert_eq!(delivery.route(&message(1), None, true, one), Some((holder(1), 1)));
}
