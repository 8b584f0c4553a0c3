//! The subscriber's state against a model of a server that spreads messages over two consumers,
//! in the kinds `SHARED` and `KEY_ORDERED`. The other consumer is part of the server.

use std::collections::{BTreeSet, VecDeque};
use std::ops::RangeInclusive;
use std::sync::Arc;

use proptest::prelude::*;

use super::buffer::Item;
use super::nacks::Nacked;
use super::order::{Lane, Order};
use super::resume::{Acked, Broken, Handle, Resume, Settled, Shown, TopicBatch};
use super::resume_model::{expand, joined, start, take};
use super::topic::{Joined, Missing, Position};

const KEYS: [&str; 4] = ["", "a", "b", "c"];

/// Where a message is, as the server has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Free,
    Ours,
    Theirs,
    Done,
}

#[derive(Debug)]
struct Message {
    key: &'static str,
    place: Place,
    failures: u32,
    /// It was with the other consumer, or was handed back, at some time.
    elsewhere: bool,
}

#[derive(Debug)]
enum Frame {
    Welcome(Joined),
    Deliver { first: u64, messages: Vec<(u64, u32)> },
    Rewind { from: u64, back: Vec<RangeInclusive<u64>> },
    Confirm(u64),
    Heartbeat { sent: u64, head: u64, passed: u64, floor: u64 },
}

/// A server with one topic.
#[derive(Debug)]
struct Server {
    order: Order,
    log: Vec<Message>,
    /// Frames on their way to the client, in order.
    frames: VecDeque<Frame>,
    deliveries: u64,
    /// The last batch, if it is not on disk yet.
    unconfirmed: Option<u64>,
    /// The consumer has no stream, and its grace has passed.
    gone: bool,
    /// The consumer was away for longer than the grace, and no welcome has told it yet.
    lost: bool,
    /// A welcome that would have told it was lost, too: the consumer may have an older delivery of
    /// what is its own again, of which it knows an older attempt.
    untold: bool,
}

impl Server {
    fn head(&self) -> u64 {
        self.log.len() as u64
    }

    fn at(&mut self, sequence: u64) -> &mut Message {
        &mut self.log[usize::try_from(sequence).unwrap() - 1]
    }

    fn place(&self, sequence: u64) -> Place {
        self.log[usize::try_from(sequence).unwrap() - 1].place
    }

    fn lane(&self, sequence: u64) -> Option<Lane> {
        self.order.lane(self.log[usize::try_from(sequence).unwrap() - 1].key)
    }

    /// The others of the lane of a message.
    fn lane_mates(&self, sequence: u64) -> Vec<u64> {
        let lane = self.lane(sequence);
        let mate = |other: &u64| *other != sequence && lane.is_some() && self.lane(*other) == lane;
        (1..=self.head()).filter(mate).collect()
    }

    /// Up to where no message is in this place.
    fn none_up_to(&self, bad: impl Fn(Place) -> bool) -> u64 {
        (1..=self.head()).take_while(|sequence| !bad(self.place(*sequence))).count() as u64
    }

    /// Gives messages that are free to a consumer, but not the first ones.
    fn assign(&mut self, to: Place, skip: usize, count: usize) -> Vec<u64> {
        let mut free = 0;
        let mut assigned = Vec::new();
        for sequence in 1..=self.head() {
            let fits = self.lane_mates(sequence).into_iter().all(|mate| match self.place(mate) {
                Place::Done => true,
                Place::Free => mate > sequence,
                with @ (Place::Ours | Place::Theirs) => with == to,
            });
            if self.place(sequence) == Place::Free && fits {
                free += 1;
                if free > skip && assigned.len() < count {
                    self.at(sequence).place = to;
                    self.at(sequence).elsewhere |= to == Place::Theirs;
                    assigned.push(sequence);
                }
            }
        }
        assigned
    }

    fn pump(&mut self, skip: usize, count: usize) {
        let assigned = self.assign(Place::Ours, skip, count);
        let first = self.deliveries + 1;
        self.deliveries += assigned.len() as u64;
        let attempt = |sequence| (sequence, self.at(sequence).failures + 1);
        let messages: Vec<_> = assigned.into_iter().map(attempt).collect();
        if !messages.is_empty() {
            self.frames.push_back(Frame::Deliver { first, messages });
        }
    }

    fn free(&mut self, sequence: u64) {
        let message = self.at(sequence);
        message.place = Place::Free;
        message.elsewhere = true;
    }

    /// A consumer hands a message back. Says what of its lane goes with it, itself included.
    fn hand_back(&mut self, by: Place, sequence: u64, attempt: u32) -> Vec<u64> {
        if self.place(sequence) != by {
            return Vec::new();
        }
        let failures = &mut self.at(sequence).failures;
        assert!(attempt <= *failures + 1, "{attempt} of {failures}");
        *failures = attempt.max(*failures);
        let mut back = self.lane_mates(sequence);
        back.retain(|mate| *mate > sequence && self.place(*mate) == by);
        back.insert(0, sequence);
        for sequence in &back {
            self.free(*sequence);
        }
        back
    }

    fn take_batch(&mut self, number: u64, batch: Vec<TopicBatch>) {
        for acks in batch {
            for sequence in expand(&acks.unsent.acks) {
                self.at(sequence).place = Place::Done;
            }
            for (from, nack) in acks.unsent.nacks {
                let now = [0, self.at(from).failures + 1].contains(&nack.attempt);
                let is_ours = self.place(from) == Place::Ours;
                assert!(now || self.untold || !is_ours, "an older delivery is nacked");
                let back = self.hand_back(Place::Ours, from, nack.attempt);
                if self.lane(from).is_some() && !back.is_empty() {
                    let back = back.into_iter().map(|sequence| sequence..=sequence).collect();
                    self.frames.push_back(Frame::Rewind { from, back });
                }
            }
        }
        self.unconfirmed = Some(number);
    }

    /// What has arrived is on disk. Until then it counts, and is not confirmed.
    fn commit(&mut self) {
        self.frames.extend(self.unconfirmed.take().map(Frame::Confirm));
    }

    /// The consumer is gone for longer than the grace.
    fn lose(&mut self) {
        self.frames.clear();
        self.unconfirmed = None;
        (self.gone, self.lost) = (true, true);
        for sequence in 1..=self.head() {
            if self.place(sequence) == Place::Ours {
                self.free(sequence);
            }
        }
    }

    fn attach(&mut self, positions: &[Position]) {
        self.frames.clear();
        self.unconfirmed = None;
        self.deliveries = 0;
        let mut held = BTreeSet::new();
        let mut dropped = Vec::new();
        for position in positions {
            for sequence in expand(&position.acked) {
                self.at(sequence).place = Place::Done;
            }
            held.extend(expand(&position.held));
            for (from, nack) in &position.nacked {
                let from = *from;
                assert!(!held.contains(&from), "{from} is held and nacked");
                let later =
                    self.lane_mates(from).into_iter().find(|m| *m > from && held.contains(m));
                assert_eq!(later, None, "is held, after {from}, which is nacked");
                self.hand_back(Place::Ours, from, nack.attempt);
            }
        }
        for sequence in 1..=self.head() {
            match (self.place(sequence), held.contains(&sequence)) {
                (Place::Ours, false) => self.free(sequence),
                (Place::Free | Place::Theirs, true) => {
                    assert!(self.lost, "{sequence} is claimed, and is not ours");
                    dropped.push(sequence..=sequence);
                }
                (Place::Done, true) => dropped.push(sequence..=sequence),
                (Place::Ours, true) | (Place::Free | Place::Theirs | Place::Done, false) => {}
            }
        }
        self.untold |= self.lost && !self.gone;
        self.gone = false;
        let floor = self.none_up_to(|place| place != Place::Done);
        let head = self.head();
        self.frames.push_back(Frame::Welcome(Joined { dropped, ..joined(floor, head) }));
    }

    fn is_busy(&self) -> bool {
        let frames = self.frames.iter().any(|frame| !matches!(frame, Frame::Heartbeat { .. }));
        frames || self.log.iter().any(|message| message.place != Place::Done)
    }

    fn heartbeat(&mut self) {
        self.frames.push_back(Frame::Heartbeat {
            sent: self.deliveries,
            head: self.head(),
            passed: self.none_up_to(|place| place == Place::Free),
            floor: self.none_up_to(|place| place != Place::Done),
        });
    }
}

#[derive(Clone, Debug)]
enum Step {
    Publish(usize, usize),
    Pump(usize, usize),
    Heartbeat,
    Commit,
    Arrive,
    Send,
    /// Takes a message, if one is there of a key that is not in this set.
    Take(usize),
    Ack(usize),
    Nack(usize),
    Release(usize),
    Cut,
    /// The stream is cut, and the grace passes.
    Away,
    TheyTake(usize, usize),
    TheyAck(usize),
    TheyNack(usize),
    AckElsewhere(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let skip = || prop_oneof![3 => Just(0), 1 => 0..4_usize];
    prop_oneof![
        4 => (0..4_usize, 1..4_usize).prop_map(|(key, count)| Step::Publish(key, count)),
        6 => (skip(), 1..5_usize).prop_map(|(skip, count)| Step::Pump(skip, count)),
        2 => Just(Step::Heartbeat),
        3 => Just(Step::Commit),
        10 => Just(Step::Arrive),
        4 => Just(Step::Send),
        8 => (0..8_usize).prop_map(Step::Take),
        6 => (0..8_usize).prop_map(Step::Ack),
        3 => (0..8_usize).prop_map(Step::Nack),
        1 => (0..8_usize).prop_map(Step::Release),
        2 => Just(Step::Cut),
        1 => Just(Step::Away),
        2 => (skip(), 1..5_usize).prop_map(|(skip, count)| Step::TheyTake(skip, count)),
        2 => (0..8_usize).prop_map(Step::TheyAck),
        1 => (0..8_usize).prop_map(Step::TheyNack),
        1 => (1..20_u64).prop_map(Step::AckElsewhere),
    ]
}

struct World {
    server: Server,
    client: Resume<u64>,
    /// The welcome has arrived.
    attached: bool,
    /// The client may hand messages out.
    open: bool,
    handles: Vec<Handle>,
    /// With the application, or processed by it.
    shown: BTreeSet<u64>,
    acked: BTreeSet<u64>,
    ever: BTreeSet<u64>,
}

impl World {
    fn new(order: Order) -> Self {
        let server = Server {
            order,
            log: Vec::new(),
            frames: VecDeque::new(),
            deliveries: 0,
            unconfirmed: None,
            gone: false,
            lost: false,
            untold: false,
        };
        let mut world = Self {
            server,
            client: Resume::new(false),
            attached: false,
            open: false,
            handles: Vec::new(),
            shown: BTreeSet::new(),
            acked: BTreeSet::new(),
            ever: BTreeSet::new(),
        };
        world.attach();
        world
    }

    fn attach(&mut self) {
        self.attached = false;
        let positions = self.client.hello();
        for position in &positions {
            let acked = |sequence: &u64| self.acked.contains(sequence);
            assert_eq!(expand(&position.held).find(acked), None, "is held and acked");
        }
        self.server.attach(&positions);
    }

    fn step(&mut self, step: &Step) -> Result<(), Broken> {
        match *step {
            Step::Publish(key, count) => {
                let key = KEYS[key];
                let message = || Message { key, place: Place::Free, failures: 0, elsewhere: false };
                self.server.log.extend(std::iter::repeat_with(message).take(count));
            }
            Step::Pump(skip, count) if !self.server.gone => self.server.pump(skip, count),
            Step::Heartbeat if !self.server.gone => self.server.heartbeat(),
            Step::Pump(..) | Step::Heartbeat => {}
            Step::Commit => self.server.commit(),
            Step::Arrive => self.arrive()?,
            Step::Send if self.attached => {
                if let Some((number, batch)) = self.client.batch() {
                    self.server.take_batch(number, batch);
                }
            }
            Step::Send => {}
            Step::Take(busy) => self.take(busy),
            Step::Ack(nth) => self.ack(nth),
            Step::Nack(nth) => self.nack(nth, false),
            Step::Release(nth) => self.nack(nth, true),
            Step::Cut => self.attach(),
            Step::Away => {
                self.attached = false;
                self.open = false;
                self.server.lose();
            }
            Step::TheyTake(skip, count) => {
                self.server.assign(Place::Theirs, skip, count);
            }
            Step::TheyAck(nth) => {
                if let Some(sequence) = self.theirs(nth) {
                    self.server.at(sequence).place = Place::Done;
                }
            }
            Step::TheyNack(nth) => {
                if let Some(sequence) = self.theirs(nth) {
                    let attempt = self.server.at(sequence).failures + 1;
                    self.server.hand_back(Place::Theirs, sequence, attempt);
                }
            }
            Step::AckElsewhere(sequence) => {
                if sequence <= self.server.head() {
                    self.server.at(sequence).place = Place::Done;
                }
            }
        }
        Ok(())
    }

    fn theirs(&self, nth: usize) -> Option<u64> {
        let theirs = |sequence: &u64| self.server.place(*sequence) == Place::Theirs;
        let all: Vec<u64> = (1..=self.server.head()).filter(theirs).collect();
        (!all.is_empty()).then(|| all[nth % all.len()])
    }

    fn arrive(&mut self) -> Result<(), Broken> {
        match self.server.frames.pop_front() {
            None => {}
            Some(Frame::Welcome(joined)) => {
                for sequence in expand(&joined.dropped).filter(|n| !self.acked.contains(n)) {
                    self.shown.remove(&sequence);
                }
                self.client.welcome(self.server.order, vec![joined]);
                (self.attached, self.open, self.server.lost) = (true, true, false);
            }
            Some(Frame::Deliver { first, messages }) => {
                let item = |(sequence, attempt)| {
                    let lane = self.server.lane(sequence);
                    (sequence, Item { attempt, bytes: 1, lane, message: sequence })
                };
                let items: Vec<_> = messages.into_iter().map(item).collect();
                self.client.deliver(1, first, 0, items.into_iter())?;
            }
            Some(Frame::Rewind { from, back }) => self.client.rewind(1, from, 0, &back)?,
            Some(Frame::Confirm(number)) => {
                let Settled { stale, .. } = self.client.confirm(number);
                assert!(stale.is_empty());
            }
            Some(Frame::Heartbeat { sent, head, passed, floor }) => {
                self.client.check_deliveries(sent)?;
                self.client.head(1, head, passed, floor);
                assert!(self.client.topics().all(|topic| topic.done.floor() >= floor));
            }
        }
        Ok(())
    }

    fn take(&mut self, busy: usize) {
        let is_free = |_: &Arc<str>, lane: &Lane| match lane {
            Lane::Topic => panic!("there is no such order"),
            Lane::Key(key) => KEYS[1..]
                .iter()
                .enumerate()
                .all(|(bit, name)| busy >> bit & 1 == 0 || **name != **key),
        };
        if !self.open {
            return;
        }
        let Some(shown) = self.client.take(start(), is_free) else { return };
        let Shown::Message { handle, message, .. } = shown else { panic!("{shown:?}") };
        assert_eq!(message, handle.sequence);
        assert!(!self.acked.contains(&message), "{message} was acked");
        assert!(self.shown.insert(message), "{message} was shown before");
        let place = self.server.place(message);
        assert!(matches!(place, Place::Ours | Place::Done), "{message} is {place:?}");
        let is_new = self.ever.insert(message);
        // After a nack that the server had no use for, these do not come again.
        let in_hands = self.client.topic_of(handle.topic).unwrap().outstanding_up_to(message);
        for mate in self.server.lane_mates(message) {
            if mate < message {
                let shown = self.shown.contains(&mate) || in_hands.contains(&mate);
                assert!(
                    shown || self.server.place(mate) == Place::Done,
                    "{mate} comes before {message}"
                );
            } else {
                let later = !self.acked.contains(&mate) && self.shown.contains(&mate);
                assert!(!later, "{mate} was shown, and not handed back, before {message}");
                assert!(!is_new || !self.ever.contains(&mate), "{mate} was shown before {message}");
            }
        }
        self.handles.push(handle);
    }

    fn ack(&mut self, nth: usize) {
        if self.handles.is_empty() {
            return;
        }
        let handle = self.handles.swap_remove(nth % self.handles.len());
        match self.client.ack(handle) {
            Acked::Queued => {}
            Acked::Done => assert_eq!(self.server.place(handle.sequence), Place::Done),
            Acked::Stale => panic!("no topic has gone"),
        }
        self.acked.insert(handle.sequence);
        self.shown.insert(handle.sequence);
    }

    fn nack(&mut self, nth: usize, release: bool) {
        if self.handles.is_empty() {
            return;
        }
        let handle = self.handles.swap_remove(nth % self.handles.len());
        let Handle { sequence, showing, attempt, .. } = handle;
        let attempt = if release { 0 } else { attempt };
        let nacked = Nacked::of(attempt, showing);
        if self.client.nack(handle, nacked) {
            let mut back = self.server.lane_mates(sequence);
            back.retain(|mate| *mate > sequence && !self.acked.contains(mate));
            back.push(sequence);
            self.shown.retain(|sequence| !back.contains(sequence));
        }
    }

    /// What is not with another consumer and was not handed back was shown.
    fn check_caught_up(&self) {
        for topic in self.client.topics().filter(|topic| topic.caught_up()) {
            let missing = (1..=topic.head).zip(&self.server.log).find(|(sequence, message)| {
                let settled = message.place == Place::Done || message.elsewhere;
                !(self.ever.contains(sequence) || settled)
            });
            assert!(missing.is_none(), "{missing:?} was not shown, and all is caught up");
        }
    }

    /// Lets everything run until nothing moves any more.
    fn finish(&mut self) -> Result<(), Broken> {
        if self.server.gone {
            self.attach();
        }
        for _ in 0..500 {
            let ours = self.client.is_unconfirmed() || self.client.held().0 > 0;
            if !(ours || self.server.is_busy()) {
                break;
            }
            self.server.commit();
            self.server.pump(0, 10);
            self.server.heartbeat();
            while !self.server.frames.is_empty() {
                self.arrive()?;
            }
            for step in [Step::Take(0), Step::Ack(0), Step::TheyAck(0), Step::Send] {
                self.step(&step)?;
            }
        }
        self.server.heartbeat();
        while !self.server.frames.is_empty() {
            self.arrive()?;
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn what_is_ours_is_shown_once_until_it_is_acked_and_each_key_in_order(
        order in prop_oneof![Just(Order::Key), Just(Order::None)],
        steps in prop::collection::vec(step(), 1..150),
    ) {
        let mut world = World::new(order);
        for step in &steps {
            world.step(step).unwrap();
            world.check_caught_up();
        }
        world.finish().unwrap();
        let missing = world.server.log.iter().position(|message| message.place != Place::Done);
        prop_assert_eq!(missing, None, "never shown, or never acked");
        prop_assert_eq!(world.client.held().0, 0);
        prop_assert!(!world.client.is_unconfirmed());
        prop_assert!(world.client.topics().all(|topic| topic.caught_up()));
    }
}

fn attached(order: Order) -> Resume<u64> {
    let mut resume = Resume::new(false);
    assert_eq!(resume.hello(), []);
    resume.welcome(order, vec![joined(0, 9)]);
    resume
}

/// Delivers messages with keys.
fn deliver(resume: &mut Resume<u64>, first: u64, messages: &[(u64, &str)]) {
    let order = resume.order();
    let item = |(sequence, key): (u64, &str)| {
        (sequence, Item { attempt: 1, bytes: 1, lane: order.lane(key), message: sequence })
    };
    let items: Vec<_> = messages.iter().copied().map(item).collect();
    resume.deliver(1, first, 0, items.into_iter()).unwrap();
}

fn nack(resume: &mut Resume<u64>, handle: Handle) -> bool {
    let Handle { attempt, showing, .. } = handle;
    resume.nack(handle, Nacked::of(attempt, showing))
}

fn take_all(resume: &mut Resume<u64>) -> Vec<u64> {
    std::iter::from_fn(|| take(resume)).map(|handle| handle.sequence).collect()
}

#[test]
fn a_nack_without_an_order_holds_nothing_up_and_its_redelivery_settles_it() {
    for (order, key) in [(Order::None, "a"), (Order::Key, "")] {
        let mut resume = attached(order);
        deliver(&mut resume, 1, &[(1, key), (2, key)]);
        let first = take(&mut resume).unwrap();
        assert!(nack(&mut resume, first));
        assert!(!nack(&mut resume, first), "a handle can nack once");
        assert_eq!(take_all(&mut resume), [2]);
        assert_eq!(resume.batch().unwrap().1[0].unsent.nacks.len(), 1);
        assert!(resume.is_unconfirmed());
        // Before the confirmation of the nack.
        deliver(&mut resume, 3, &[(1, key)]);
        assert!(!resume.is_unconfirmed());
        let position = resume.hello().pop().unwrap();
        assert_eq!((position.held, position.nacked), (vec![1..=2], vec![]));
        resume.welcome(order, vec![joined(0, 9)]);
        let again = take(&mut resume).unwrap();
        assert_ne!(again.showing, first.showing);
        assert_eq!(resume.ack(first), Acked::Queued, "older handles may ack");
        assert!(!nack(&mut resume, again));
    }
}

#[test]
fn a_nack_that_the_server_has_not_heard_of_is_repeated_by_the_hello() {
    let mut resume = attached(Order::None);
    deliver(&mut resume, 1, &[(1, ""), (2, "")]);
    let first = take(&mut resume).unwrap();
    assert!(nack(&mut resume, first));
    resume.batch().unwrap();
    let position = resume.hello().pop().unwrap();
    assert_eq!((position.held, position.nacked.len()), (vec![2..=2], 1));
}

#[test]
fn a_nack_holds_up_its_key_until_it_is_settled_and_no_other() {
    let mut resume = attached(Order::Key);
    let messages = [(1, "a"), (2, "b"), (3, "a"), (4, ""), (5, "b"), (6, "a")];
    deliver(&mut resume, 1, &messages);
    let first = take(&mut resume).unwrap();
    let second = take(&mut resume).unwrap();
    let third = take(&mut resume).unwrap();
    assert!(nack(&mut resume, first));
    assert_eq!(take_all(&mut resume), [4, 5]);
    resume.batch().unwrap();
    resume.rewind(1, 1, 0, &[1..=1, 3..=3, 6..=6]).unwrap();
    assert!(!nack(&mut resume, third), "it was taken back");
    deliver(&mut resume, 7, &[(1, "a"), (3, "a")]);
    assert!(take(&mut resume).is_none(), "the rewind may be that of an earlier nack");
    resume.confirm(1);
    assert_eq!(take_all(&mut resume), [1, 3]);
    assert_eq!(resume.ack(third), Acked::Queued, "older handles may ack");
    assert!(nack(&mut resume, second), "another key");
}

#[test]
fn a_rewind_takes_back_what_it_names_and_nothing_else() {
    let mut resume = attached(Order::Key);
    deliver(&mut resume, 1, &[(1, "a"), (2, "a"), (3, "b"), (4, "a")]);
    take(&mut resume).unwrap();
    resume.rewind(1, 2, 0, &[2..=2, RangeInclusive::new(9, 3), 4..=4]).unwrap();
    assert!(resume.rewind(1, 2, 0, &[]).is_err(), "it takes nothing back");
    assert_eq!(resume.hello().pop().unwrap().held, [1..=1, 3..=3]);
    assert_eq!(take_all(&mut resume), [3]);
}

#[test]
fn what_is_done_elsewhere_does_not_overtake_the_message_that_was_nacked() {
    let mut resume = attached(Order::Key);
    deliver(&mut resume, 1, &[(1, "a"), (2, "a"), (3, "b"), (4, "a")]);
    let first = take(&mut resume).unwrap();
    assert!(nack(&mut resume, first));
    resume.batch().unwrap();
    // The server does not name 2, which was acked by a consumer that had it before.
    resume.rewind(1, 1, 0, &[1..=1, 4..=4]).unwrap();
    resume.confirm(1);
    assert_eq!(take_all(&mut resume), [3]);
}

#[test]
fn the_hello_does_not_claim_a_key_from_an_unsettled_nack_on() {
    for (order, held) in
        [(Order::Key, vec![1..=1, 3..=3, 5..=5]), (Order::None, vec![1..=1, 3..=6])]
    {
        let mut resume = attached(order);
        let messages = [(1, "a"), (2, "a"), (3, "b"), (4, "a"), (5, ""), (6, "a")];
        deliver(&mut resume, 1, &messages);
        take(&mut resume).unwrap();
        let second = take(&mut resume).unwrap();
        take(&mut resume).unwrap();
        take(&mut resume).unwrap();
        assert!(nack(&mut resume, second));
        let position = resume.hello().pop().unwrap();
        assert_eq!((position.held, position.nacked[0].0), (held, 2));
    }
}

#[test]
fn a_message_that_is_nacked_while_it_is_dropped_is_not_nacked() {
    let mut resume = attached(Order::Key);
    deliver(&mut resume, 1, &[(1, "a"), (2, "a"), (3, "b")]);
    let first = take(&mut resume).unwrap();
    resume.hello();
    // The hello has said that it is held, and another has it by now.
    assert!(nack(&mut resume, first));
    resume.welcome(Order::Key, vec![Joined { dropped: vec![1..=2], ..joined(0, 9) }]);
    assert!(resume.batch().is_none());
    assert!(!resume.is_unconfirmed());
    deliver(&mut resume, 1, &[(1, "a")]);
    assert_eq!(take_all(&mut resume), [1, 3]);
}

#[test]
fn a_lane_that_is_busy_hides_no_other_and_no_other_topic() {
    let mut resume = attached(Order::Key);
    let second = Joined { number: 2, name: "u".into(), ..joined(0, 9) };
    resume.joined(second);
    let item = |sequence, key| {
        (sequence, Item { attempt: 1, bytes: 1, lane: Order::Key.lane(key), message: sequence })
    };
    deliver(&mut resume, 1, &[(1, "a"), (2, "a"), (3, "b"), (4, "")]);
    resume.deliver(2, 5, 0, [item(11, "a"), item(12, "c")].into_iter()).unwrap();
    let mut busy = BTreeSet::new();
    let mut order = Vec::new();
    while let Some(shown) = resume
        .take(start(), |topic, lane: &Lane| !busy.contains(&(Arc::clone(topic), lane.clone())))
    {
        let Shown::Message { topic, message, .. } = shown else { panic!("{shown:?}") };
        let key =
            [(1, "a"), (3, "b"), (11, "a"), (12, "c")].into_iter().find(|(n, _)| *n == message);
        busy.extend(key.and_then(|(_, key)| Order::Key.lane(key)).map(|lane| (topic, lane)));
        order.push(message);
    }
    assert_eq!(order, [1, 11, 3, 12, 4], "topics take turns, and 2 waits for 1");
}

#[test]
fn a_gap_is_told_at_once_where_there_is_no_order() {
    for order in [Order::Key, Order::None] {
        let mut resume = attached(order);
        deliver(&mut resume, 1, &[(1, "a"), (2, "a")]);
        let first = take(&mut resume).unwrap();
        nack(&mut resume, first);
        resume.gap(1, &Missing { range: 5..=6, reason: 1 }).unwrap();
        let nobody = |_: &Arc<str>, _: &Lane| false;
        let Some(Shown::Gap { missing, .. }) = resume.take(start(), nobody) else { panic!() };
        assert_eq!(missing.range, 5..=6);
    }
}

#[test]
fn acking_up_to_a_message_acks_it_alone_where_there_is_no_order() {
    for (order, acked) in [(Order::Topic, [1..=2]), (Order::Key, [2..=2]), (Order::None, [2..=2])] {
        let mut resume = attached(order);
        deliver(&mut resume, 1, &[(1, "a"), (2, "a")]);
        take(&mut resume).unwrap();
        let second = take(&mut resume).unwrap();
        resume.ack_up_to(second);
        assert_eq!(resume.batch().unwrap().1[0].unsent.acks, acked);
    }
}

#[test]
fn the_servers_floor_passes_what_others_have_acked_and_leaves_what_is_held_alone() {
    for order in [Order::Topic, Order::Key, Order::None] {
        let mut resume = attached(order);
        deliver(&mut resume, 1, &[(2, "a"), (4, "a"), (6, "a")]);
        let second = take(&mut resume).unwrap();
        assert_eq!(resume.ack(second), Acked::Queued);
        let fourth = take(&mut resume).unwrap();
        resume.head(1, 9, 5, 7);
        let floor = |resume: &Resume<u64>| resume.topics().next().unwrap().done.floor();
        assert_eq!(floor(&resume), 7);
        assert_eq!(resume.ack(fourth), Acked::Done);
        assert_eq!(take_all(&mut resume), [6]);
        assert_eq!(resume.hello().pop().unwrap().held, [6..=6]);
        resume.welcome(order, vec![joined(1, 9)]);
        resume.head(1, 9, 5, 3);
        assert_eq!(floor(&resume), 7, "it is never lowered");
        assert!(resume.batch().is_none());
        assert!(!resume.is_unconfirmed());
    }
}

#[test]
fn only_the_server_knows_when_a_consumer_among_others_is_caught_up() {
    let caught_up = |resume: &Resume<u64>| resume.topics().all(|topic| topic.caught_up());
    for (order, by_itself) in [(Order::Topic, true), (Order::Key, false), (Order::None, false)] {
        let mut resume = attached(order);
        deliver(&mut resume, 1, &[(9, "")]);
        let last = take(&mut resume).unwrap();
        assert_eq!(caught_up(&resume), by_itself);
        resume.head(1, 9, 9, 0);
        assert!(caught_up(&resume));
        resume.head(1, 9, 8, 0);
        assert_eq!(caught_up(&resume), by_itself, "something was handed back, maybe to us");
        resume.ack(last);
        resume.head(1, 9, 8, 9);
        assert!(caught_up(&resume), "all is done");
    }
}

#[test]
fn a_topic_that_joins_has_the_order_of_the_last_welcome_and_a_readers_stays() {
    let mut resume = attached(Order::None);
    resume.joined(Joined { number: 2, name: "u".into(), ..joined(0, 9) });
    assert!(resume.topics().all(|topic| topic.order == Order::None));
    resume.repositioned(Joined { cursor_generation: 1, ..joined(0, 9) });
    assert!(resume.topics().all(|topic| topic.order == Order::None));
    resume.hello();
    resume.welcome(Order::Key, vec![Joined { cursor_generation: 1, ..joined(0, 9) }]);
    assert_eq!(resume.order(), Order::Key);
    assert!(resume.topics().any(|topic| topic.number == Some(1) && topic.order == Order::Key));
    let mut reader = Resume::<u64>::new(true);
    reader.hello();
    reader.welcome(Order::None, vec![joined(0, 9)]);
    assert_eq!(reader.order(), Order::Topic);
    assert!(reader.topics().all(|topic| topic.order == Order::Topic));
}
