//! The subscriber's state against a model of a server, under random cuts, redeliveries, acks,
//! nacks and seeks.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::buffer::Item;
use super::nacks::Nacked;
use super::order::{Lane, Order};
use super::resume::{Acked, Broken, Handle, Overdue, Resume, Settled, Shown, TopicBatch};
use super::topic::{Joined, Missing, Position};

/// For how long the application may hold a message.
const MAX_PROCESSING: Duration = Duration::from_secs(5);

/// A time to count from.
pub(super) fn start() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// A server with two topics, as simple as can be.
#[derive(Debug, Default)]
struct Server {
    topics: [ServerTopic; 2],
    /// Frames on their way to the client, in order.
    frames: VecDeque<Frame>,
    deliveries: u64,
}

#[derive(Debug, Default)]
struct ServerTopic {
    head: u64,
    done: BTreeSet<u64>,
    held: BTreeSet<u64>,
    generation: u32,
    cursor_generation: u64,
    /// Acked by someone else, at any time: a seek forgets it before the client has heard.
    elsewhere: BTreeSet<u64>,
}

#[derive(Debug)]
enum Frame {
    Deliver { topic: usize, first: u64, generation: u32, sequences: Vec<u64> },
    Rewind { topic: usize, from: u64, generation: u32 },
    Repositioned(Joined),
    Confirm(u64),
}

/// A message as it arrives where all of a topic is in order.
fn item(attempt: u32, bytes: u64, message: u64) -> Item<u64> {
    Item { attempt, bytes, lane: Some(Lane::Topic), message }
}

pub(super) fn expand(ranges: &[RangeInclusive<u64>]) -> impl Iterator<Item = u64> + '_ {
    ranges.iter().flat_map(Clone::clone)
}

impl Server {
    fn joined(&self, topic: usize, dropped: Vec<RangeInclusive<u64>>) -> Joined {
        let state = &self.topics[topic];
        Joined {
            number: u32::try_from(topic).unwrap() + 1,
            name: format!("t{topic}").into(),
            epoch: 7,
            cursor_generation: state.cursor_generation,
            floor: (1..).find(|sequence| !state.done.contains(sequence)).unwrap() - 1,
            head: state.head,
            dropped,
        }
    }

    fn attach(&mut self, positions: &[Position]) -> Vec<Joined> {
        self.frames.clear();
        self.deliveries = 0;
        for topic in &mut self.topics {
            topic.held.clear();
            topic.generation = 0;
        }
        let mut dropped = [Vec::new(), Vec::new()];
        for position in positions {
            let number = usize::from(&*position.name == "t1");
            let topic = &mut self.topics[number];
            if position.cursor_generation != topic.cursor_generation {
                dropped[number] = position.held.clone();
                continue;
            }
            topic.done.extend(expand(&position.acked).filter(|sequence| *sequence <= topic.head));
            for sequence in expand(&position.held) {
                if topic.done.contains(&sequence) || sequence > topic.head {
                    dropped[number].push(sequence..=sequence);
                } else {
                    topic.held.insert(sequence);
                }
            }
        }
        let [first, second] = dropped;
        vec![self.joined(0, first), self.joined(1, second)]
    }

    fn pump(&mut self, topic: usize, count: usize) {
        let state = &mut self.topics[topic];
        let free =
            |sequence: &u64| !state.done.contains(sequence) && !state.held.contains(sequence);
        let sequences: Vec<u64> = (1..=state.head).filter(free).take(count).collect();
        if sequences.is_empty() {
            return;
        }
        state.held.extend(&sequences);
        let (first, generation) = (self.deliveries + 1, state.generation);
        self.deliveries += sequences.len() as u64;
        self.frames.push_back(Frame::Deliver { topic, first, generation, sequences });
    }

    fn take_batch(&mut self, number: u64, batch: Vec<TopicBatch>) {
        for acks in batch {
            let topic = usize::try_from(acks.number).unwrap() - 1;
            let state = &mut self.topics[topic];
            if acks.cursor_generation != state.cursor_generation {
                continue;
            }
            for sequence in expand(&acks.unsent.acks) {
                state.done.insert(sequence);
                state.held.remove(&sequence);
            }
            for (from, _) in acks.unsent.nacks {
                if state.done.contains(&from) {
                    continue;
                }
                state.held.split_off(&from);
                state.generation += 1;
                let generation = state.generation;
                self.frames.push_back(Frame::Rewind { topic, from, generation });
            }
        }
        self.frames.push_back(Frame::Confirm(number));
    }

    fn seek(&mut self, topic: usize, to: u64) {
        let state = &mut self.topics[topic];
        state.done = (1..to.min(state.head + 1)).collect();
        state.held.clear();
        state.cursor_generation += 1;
        let joined = self.joined(topic, Vec::new());
        self.frames.push_back(Frame::Repositioned(joined));
    }
}

/// What the application has seen of a topic since the last seek.
#[derive(Debug, Default)]
struct Seen {
    /// In its hands, or processed.
    shown: BTreeSet<u64>,
    acked: BTreeSet<u64>,
    /// What was there before, or is dealt with elsewhere.
    before: BTreeSet<u64>,
}

struct World {
    server: Server,
    client: Resume<u64>,
    seen: BTreeMap<u64, (usize, Seen)>,
    /// Live handles, and those whose messages were taken back.
    handles: Vec<Handle>,
    confirmed: BTreeSet<(u64, u64)>,
    now: Instant,
    /// When each showing was.
    shown_at: BTreeMap<u64, Instant>,
}

#[derive(Clone, Debug)]
enum Step {
    Publish(usize, u64),
    Pump(usize, usize),
    Arrive,
    Send,
    Take,
    Ack(usize),
    AckUpTo(usize),
    Nack(usize),
    /// Seconds pass, and what was held for too long is handed back.
    Wait(u64),
    Cut,
    /// The hello arrives, and the stream is cut before the welcome does.
    CutAfterHello,
    Seek(usize, u64),
    AckElsewhere(usize, u64),
}

fn step() -> impl Strategy<Value = Step> {
    let topic = 0..2_usize;
    prop_oneof![
        3 => (topic.clone(), 1..6_u64).prop_map(|(topic, count)| Step::Publish(topic, count)),
        5 => (topic.clone(), 1..5_usize).prop_map(|(topic, count)| Step::Pump(topic, count)),
        8 => Just(Step::Arrive),
        4 => Just(Step::Send),
        8 => Just(Step::Take),
        6 => (0..8_usize).prop_map(Step::Ack),
        1 => (0..8_usize).prop_map(Step::AckUpTo),
        2 => (0..8_usize).prop_map(Step::Nack),
        1 => (1..8_u64).prop_map(Step::Wait),
        2 => Just(Step::Cut),
        1 => Just(Step::CutAfterHello),
        1 => (topic.clone(), 1..20_u64).prop_map(|(topic, to)| Step::Seek(topic, to)),
        1 => (topic, 1..20_u64).prop_map(|(topic, nth)| Step::AckElsewhere(topic, nth)),
    ]
}

impl World {
    fn new() -> Self {
        let mut world = Self {
            server: Server::default(),
            client: Resume::new(false),
            seen: BTreeMap::new(),
            handles: Vec::new(),
            confirmed: BTreeSet::new(),
            now: start(),
            shown_at: BTreeMap::new(),
        };
        world.attach();
        world
    }

    fn attach(&mut self) {
        let positions = self.client.hello();
        let joined = self.server.attach(&positions);
        let settled = self.client.welcome(Order::Topic, joined);
        self.settle(settled);
    }

    fn settle(&mut self, settled: Settled) {
        for (key, ranges) in settled.confirmed {
            self.confirmed.extend(expand(&ranges).map(|sequence| (key.0, sequence)));
        }
        for key in settled.stale {
            self.handles.retain(|handle| handle.topic != key);
        }
    }

    fn step(&mut self, step: &Step) -> Result<(), Broken> {
        match *step {
            Step::Publish(topic, count) => self.server.topics[topic].head += count,
            Step::Pump(topic, count) => self.server.pump(topic, count),
            Step::Arrive => self.arrive()?,
            Step::Send => {
                if let Some((number, batch)) = self.client.batch() {
                    self.server.take_batch(number, batch);
                }
            }
            Step::Take => self.take(),
            Step::Ack(nth) => self.ack(nth, false),
            Step::AckUpTo(nth) => self.ack(nth, true),
            Step::Nack(nth) => self.nack(nth),
            Step::Wait(seconds) => self.wait(seconds),
            Step::Cut => self.attach(),
            Step::CutAfterHello => {
                let positions = self.client.hello();
                self.server.attach(&positions);
                self.attach();
            }
            Step::Seek(topic, to) => self.server.seek(topic, to),
            Step::AckElsewhere(topic, sequence) => self.ack_elsewhere(topic, sequence),
        }
        Ok(())
    }

    fn arrive(&mut self) -> Result<(), Broken> {
        match self.server.frames.pop_front() {
            None => {}
            Some(Frame::Deliver { topic, first, generation, sequences }) => {
                let items = sequences.into_iter().map(|sequence| (sequence, item(1, 1, sequence)));
                let topic = u32::try_from(topic).unwrap() + 1;
                self.client.deliver(topic, first, generation, items)?;
            }
            Some(Frame::Rewind { topic, from, generation }) => {
                self.client.rewind(u32::try_from(topic).unwrap() + 1, from, generation, &[])?;
            }
            Some(Frame::Repositioned(joined)) => {
                let settled = self.client.repositioned(joined);
                self.settle(settled);
            }
            Some(Frame::Confirm(number)) => {
                let settled = self.client.confirm(number);
                self.settle(settled);
            }
        }
        Ok(())
    }

    fn take(&mut self) {
        let Some(shown) = self.client.take(self.now, |_, _| true) else { return };
        let Shown::Message { handle, topic, message, .. } = shown else { panic!("{shown:?}") };
        assert_eq!(message, handle.sequence);
        let number = usize::from(&*topic == "t1");
        let state = self.client.topics().find(|other| other.name == topic).unwrap();
        let start = state.done.floor();
        // After a nack that the server had no use for, these do not come again.
        let in_hands = state.outstanding_up_to(message);
        let (_, seen) = self
            .seen
            .entry(handle.topic.0)
            .or_insert_with(|| (number, Seen { before: (1..=start).collect(), ..Seen::default() }));
        assert!(!seen.acked.contains(&message), "{message} was acked");
        assert!(seen.shown.insert(message), "{message} was shown before");
        let state = &self.server.topics[number];
        let skipped = (1..message).find(|sequence| {
            let elsewhere = state.elsewhere.contains(sequence) || seen.before.contains(sequence);
            let dealt_with = seen.acked.contains(sequence) || in_hands.contains(sequence);
            !(seen.shown.contains(sequence) || dealt_with || elsewhere)
        });
        assert_eq!(skipped, None, "it comes before {message} in {topic}");
        self.handles.push(handle);
        self.shown_at.insert(handle.showing, self.now);
    }

    fn ack(&mut self, nth: usize, all: bool) {
        if self.handles.is_empty() {
            return;
        }
        let handle = self.handles.swap_remove(nth % self.handles.len());
        let (_, seen) = self.seen.get_mut(&handle.topic.0).unwrap();
        if all {
            let topic = self.client.topic_of(handle.topic).unwrap();
            let held = topic.outstanding_up_to(handle.sequence);
            seen.acked.extend(&held);
            seen.shown.extend(&held);
            self.client.ack_up_to(handle);
        } else {
            assert_ne!(self.client.ack(handle), Acked::Stale);
        }
        seen.acked.insert(handle.sequence);
        seen.shown.insert(handle.sequence);
    }

    fn nack(&mut self, nth: usize) {
        if self.handles.is_empty() {
            return;
        }
        let handle = self.handles.swap_remove(nth % self.handles.len());
        self.hand_back(handle);
    }

    fn wait(&mut self, seconds: u64) {
        self.now += Duration::from_secs(seconds);
        for Overdue { handle, held_for, .. } in self.client.overdue(self.now, MAX_PROCESSING) {
            assert!(held_for > MAX_PROCESSING);
            assert_eq!(held_for, self.now - self.shown_at[&handle.showing]);
            // The application still has the handle, and may use it later.
            assert!(self.handles.contains(&handle));
            self.hand_back(handle);
        }
        assert!(self.client.overdue(self.now, MAX_PROCESSING).is_empty(), "once");
    }

    fn hand_back(&mut self, handle: Handle) {
        let Handle { sequence, showing, attempt, topic } = handle;
        let nacked = Nacked::of(attempt, showing);
        if self.client.nack(handle, nacked) {
            // From here on everything comes again, but what is acked.
            let (_, seen) = self.seen.get_mut(&topic.0).unwrap();
            let again = seen.shown.split_off(&sequence);
            seen.shown.extend(again.intersection(&seen.acked));
        }
    }

    fn ack_elsewhere(&mut self, topic: usize, sequence: u64) {
        let state = &mut self.server.topics[topic];
        if sequence <= state.head {
            state.elsewhere.insert(sequence);
            state.done.insert(sequence);
            state.held.remove(&sequence);
        }
    }

    /// A topic that is caught up has nothing more to show of what it knows of.
    fn check_caught_up(&self) {
        for topic in self.client.topics().filter(|topic| topic.caught_up()) {
            let number = usize::from(&*topic.name == "t1");
            let elsewhere = &self.server.topics[number].elsewhere;
            let in_hands = topic.outstanding_up_to(topic.head);
            let seen = self.seen.iter().rfind(|(_, (of, _))| *of == number);
            let missing = (topic.done.floor() + 1..=topic.head).find(|sequence| {
                let seen = seen.is_some_and(|(_, (_, seen))| seen.shown.contains(sequence));
                let done = topic.done.contains(*sequence) || elsewhere.contains(sequence);
                !(seen || done || in_hands.contains(sequence))
            });
            assert_eq!(missing, None, "was not shown by {}, which is caught up", topic.name);
        }
    }

    /// Lets everything run until nothing moves any more.
    fn finish(&mut self) -> Result<(), Broken> {
        for _ in 0..500 {
            for topic in 0..2 {
                self.server.pump(topic, 10);
            }
            while !self.server.frames.is_empty() {
                self.arrive()?;
            }
            self.take();
            self.ack(0, false);
            self.step(&Step::Send)?;
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn each_message_is_shown_once_in_order_until_it_is_acked(
        steps in prop::collection::vec(step(), 1..150),
    ) {
        let mut world = World::new();
        for step in &steps {
            world.step(step).unwrap();
            world.check_caught_up();
        }
        world.finish().unwrap();
        for topic in &world.server.topics {
            let missing = (1..=topic.head).find(|sequence| !topic.done.contains(sequence));
            prop_assert_eq!(missing, None, "never shown, or never acked");
        }
        prop_assert_eq!(world.client.held().0, 0);
        prop_assert!(!world.client.is_unconfirmed());
    }
}

pub(super) fn joined(floor: u64, head: u64) -> Joined {
    Joined {
        number: 1,
        name: "t".into(),
        epoch: 7,
        cursor_generation: 0,
        floor,
        head,
        dropped: Vec::new(),
    }
}

fn attached(reader: bool) -> Resume<u64> {
    let mut resume = Resume::new(reader);
    assert_eq!(resume.hello(), []);
    resume.welcome(Order::Topic, vec![joined(0, 9)]);
    resume
}

fn deliver(resume: &mut Resume<u64>, first: u64, sequences: RangeInclusive<u64>) {
    let items: Vec<_> = sequences.map(|sequence| (sequence, item(1, 10, sequence))).collect();
    resume.deliver(1, first, 0, items.into_iter()).unwrap();
}

pub(super) fn take(resume: &mut Resume<u64>) -> Option<Handle> {
    take_at(resume, start())
}

fn take_at(resume: &mut Resume<u64>, now: Instant) -> Option<Handle> {
    match resume.take(now, |_, _| true)? {
        Shown::Message { handle, .. } => Some(handle),
        other @ (Shown::Gap { .. } | Shown::DataLoss { .. }) => panic!("{other:?}"),
    }
}

#[test]
fn the_hello_names_what_is_held_and_what_is_unconfirmed() {
    let mut resume = attached(false);
    deliver(&mut resume, 1, 1..=6);
    let handles: Vec<_> = (0..4).map(|_| take(&mut resume).unwrap()).collect();
    resume.ack(handles[0]);
    resume.batch().unwrap();
    resume.ack(handles[2]);
    let position = resume.hello().pop().unwrap();
    assert_eq!(position.held, [2..=2, 4..=6]);
    assert_eq!(position.held_bytes, 40);
    assert_eq!(position.acked, [1..=1, 3..=3]);
    assert_eq!(position.last_received, 6);
}

#[test]
fn what_a_hello_carried_is_confirmed_by_the_welcome_and_not_before() {
    let mut resume = attached(false);
    deliver(&mut resume, 1, 1..=2);
    let first = take(&mut resume).unwrap();
    let second = take(&mut resume).unwrap();
    resume.ack(first);
    resume.hello();
    assert_eq!(resume.ack(second), Acked::Queued);
    let settled = resume.welcome(Order::Topic, vec![joined(1, 9)]);
    assert_eq!(settled.confirmed, [(first.topic, vec![1..=1])]);
    assert_eq!(resume.ack(first), Acked::Done);
    let (number, batch) = resume.batch().unwrap();
    assert_eq!((number, &batch[0].unsent.acks), (1, &vec![2..=2]));
}

#[test]
fn a_message_that_is_done_and_comes_again_is_swallowed_and_acked_again() {
    let mut resume = attached(false);
    deliver(&mut resume, 1, 1..=1);
    let handle = take(&mut resume).unwrap();
    resume.ack(handle);
    resume.batch().unwrap();
    resume.confirm(1);
    deliver(&mut resume, 2, 1..=1);
    assert!(take(&mut resume).is_none());
    assert_eq!(resume.batch().unwrap().1[0].unsent.acks, [1..=1]);
}

#[test]
fn a_lost_frame_is_noticed() {
    let mut resume = attached(false);
    deliver(&mut resume, 1, 1..=2);
    assert!(resume.check_deliveries(2).is_ok());
    assert!(resume.check_deliveries(3).is_err());
    let items = || [(4, item(1, 1, 4))].into_iter();
    assert!(resume.deliver(1, 4, 0, items()).is_err());
    assert!(resume.deliver(2, 3, 0, items()).is_err());
}

#[test]
fn a_frame_of_an_older_generation_is_dropped_and_of_a_newer_one_is_an_error() {
    let mut resume = attached(false);
    deliver(&mut resume, 1, 1..=2);
    resume.rewind(1, 2, 1, &[]).unwrap();
    let items = || [(2, item(1, 1, 2)), (3, item(1, 1, 3))].into_iter();
    assert_eq!(resume.deliver(1, 3, 0, items()), Ok(0));
    assert_eq!(take(&mut resume).unwrap().sequence, 1);
    assert!(take(&mut resume).is_none());
    assert_eq!(resume.deliver(1, 5, 1, items()), Ok(2));
    assert!(resume.deliver(1, 7, 2, items()).is_err());
    assert!(resume.rewind(1, 1, 1, &[]).is_err());
}

#[test]
fn nothing_is_shown_between_a_nack_and_its_rewind() {
    let mut resume = attached(false);
    deliver(&mut resume, 1, 1..=3);
    let handle = take(&mut resume).unwrap();
    let showing = handle.showing;
    let nacked = Nacked::of(1, showing);
    assert!(resume.nack(handle, nacked.clone()));
    assert!(!resume.nack(handle, nacked), "a handle can nack once");
    assert!(take(&mut resume).is_none());
    resume.batch().unwrap();
    // No rewind came before the confirmation: the server had no use for the nack.
    resume.confirm(1);
    assert_eq!(take(&mut resume).unwrap().sequence, 2);
}

#[test]
fn an_older_handle_acks_a_message_that_comes_again_before_it_is_shown() {
    let mut resume = attached(false);
    deliver(&mut resume, 1, 1..=2);
    let first = take(&mut resume).unwrap();
    let second = take(&mut resume).unwrap();
    resume.rewind(1, 1, 1, &[]).unwrap();
    let items = [(1, item(2, 1, 1)), (2, item(1, 1, 2))];
    resume.deliver(1, 3, 1, items.into_iter()).unwrap();
    resume.ack(first);
    assert_eq!(take(&mut resume).unwrap().sequence, 2);
    let nacked = Nacked::of(1, second.showing);
    assert!(!resume.nack(second, nacked), "it was taken back");
}

#[test]
fn a_message_is_overdue_once_and_an_ack_by_its_older_handle_wins() {
    const SECOND: Duration = Duration::from_secs(1);
    let mut resume = attached(false);
    deliver(&mut resume, 1, 1..=3);
    let start = start();
    let first = take_at(&mut resume, start).unwrap();
    let second = take_at(&mut resume, start + SECOND).unwrap();
    let overdue = |resume: &Resume<u64>, seconds| -> Vec<(Handle, Duration)> {
        let overdue = resume.overdue(start + seconds * SECOND, 5 * SECOND);
        overdue.into_iter().map(|overdue| (overdue.handle, overdue.held_for)).collect()
    };
    assert_eq!(overdue(&resume, 5), []);
    assert_eq!(overdue(&resume, 6), [(first, 6 * SECOND)]);
    assert_eq!(overdue(&resume, 7), [(first, 7 * SECOND), (second, 6 * SECOND)]);
    assert!(resume.overdue(start + 7 * SECOND, Duration::MAX).is_empty());
    let showing = first.showing;
    let nacked = Nacked::of(1, showing);
    assert!(resume.nack(first, nacked.clone()));
    assert_eq!(overdue(&resume, 6), []);
    // Before the nack is sent: then it never is.
    resume.ack(first);
    let (_, batch) = resume.batch().unwrap();
    assert_eq!((&batch[0].unsent.acks, batch[0].unsent.nacks.len()), (&vec![1..=1], 0));

    let nacked = Nacked { showing: second.showing, ..nacked };
    assert!(resume.nack(second, nacked));
    assert_eq!(resume.batch().unwrap().1[0].unsent.nacks.len(), 1);
    // After the message has come again: then it is not shown again.
    resume.rewind(1, 2, 1, &[]).unwrap();
    let items = [(2, item(2, 1, 2)), (3, item(1, 1, 3))];
    resume.deliver(1, 4, 1, items.into_iter()).unwrap();
    resume.confirm(2);
    assert_eq!(resume.ack(second), Acked::Queued);
    assert_eq!(take_at(&mut resume, start + 8 * SECOND).unwrap().sequence, 3);
    assert_eq!(overdue(&resume, 13), [], "what is shown again has its time anew");
}

#[test]
fn a_reader_holds_nothing_for_too_long() {
    let mut resume = attached(true);
    deliver(&mut resume, 1, 1..=1);
    take(&mut resume).unwrap();
    assert!(resume.overdue(start() + MAX_PROCESSING * 2, MAX_PROCESSING).is_empty());
}

#[test]
fn a_gap_is_told_once_in_its_place_and_without_what_has_arrived() {
    let mut resume = attached(false);
    deliver(&mut resume, 1, 1..=2);
    deliver(&mut resume, 3, 6..=6);
    let missing = Missing { range: 2..=7, reason: 1 };
    assert_eq!(resume.gap(1, &missing), Ok(true));
    assert_eq!(resume.gap(1, &missing), Ok(false));
    let mut order = Vec::new();
    while let Some(shown) = resume.take(start(), |_, _| true) {
        order.push(match shown {
            Shown::Message { message, .. } => message..=message,
            Shown::Gap { missing, .. } => missing.range,
            Shown::DataLoss { sequence, .. } => panic!("{sequence} is damaged"),
        });
    }
    assert_eq!(order, [1..=1, 2..=2, 3..=5, 6..=6, 7..=7]);
}

#[test]
fn a_gap_is_reported_by_each_hello_until_that_is_confirmed() {
    let mut resume = attached(false);
    let missing = Missing { range: 1..=3, reason: 1 };
    resume.gap(1, &missing).unwrap();
    assert_eq!(resume.queued(), 0, "nobody has seen it");
    assert!(matches!(resume.take(start(), |_, _| true), Some(Shown::Gap { .. })));
    assert_eq!(resume.queued(), 1);
    assert_eq!(resume.batch().unwrap().1[0].unsent.missed, [1..=3]);
    assert!(resume.is_unconfirmed());
    for _ in 0..2 {
        assert_eq!(resume.hello().pop().unwrap().missed, [1..=3]);
    }
    resume.welcome(Order::Topic, vec![joined(3, 7)]);
    assert!(!resume.is_unconfirmed());
    assert_eq!(resume.gap(1, &missing), Ok(false), "it is not told twice");
    assert!(resume.hello().pop().unwrap().missed.is_empty());
}

#[test]
fn a_reader_goes_on_after_what_was_taken_and_acks_by_taking() {
    let mut resume = attached(true);
    deliver(&mut resume, 1, 1..=5);
    take(&mut resume).unwrap();
    take(&mut resume).unwrap();
    assert_eq!(resume.batch().unwrap().1[0].unsent.acks, [1..=2]);
    assert!(!resume.is_unconfirmed());
    let position = resume.hello().pop().unwrap();
    assert_eq!((position.last_received, position.held.len()), (2, 0));
    resume.welcome(Order::Topic, vec![joined(2, 9)]);
    deliver(&mut resume, 1, 3..=4);
    assert_eq!(take(&mut resume).unwrap().sequence, 3);
    let mut latest = Resume::<u64>::new(true);
    latest.hello();
    latest.welcome(Order::Topic, vec![joined(9, 9)]);
    assert_eq!(latest.hello().pop().unwrap().last_received, 9);
}

#[test]
fn topics_take_turns() {
    let mut resume = Resume::new(false);
    resume.hello();
    let second = Joined { number: 2, name: "u".into(), ..joined(0, 9) };
    resume.welcome(Order::Topic, vec![joined(0, 9), second]);
    deliver(&mut resume, 1, 1..=3);
    let items = [(1, item(1, 1, 101)), (2, item(1, 1, 102))];
    resume.deliver(2, 4, 0, items.into_iter()).unwrap();
    let order: Vec<u64> = std::iter::from_fn(|| match resume.take(start(), |_, _| true)? {
        Shown::Message { message, .. } => Some(message),
        Shown::Gap { .. } | Shown::DataLoss { .. } => None,
    })
    .collect();
    assert_eq!(order, [1, 101, 2, 102, 3]);
}

#[test]
fn nothing_is_caught_up_between_a_nack_and_its_showing() {
    let mut resume = attached(false);
    deliver(&mut resume, 1, 1..=9);
    let caught_up = |resume: &Resume<u64>| resume.topics().all(|topic| topic.caught_up());
    let handle = take(&mut resume).unwrap();
    let showing = handle.showing;
    let nacked = Nacked::of(1, showing);
    assert!(resume.nack(handle, nacked));
    resume.batch().unwrap();
    resume.rewind(1, 1, 1, &[]).unwrap();
    assert!(!caught_up(&resume));
    resume.confirm(1);
    assert!(!caught_up(&resume));
    let items: Vec<_> = (1..=9).map(|sequence| (sequence, item(2, 10, sequence))).collect();
    resume.deliver(1, 10, 1, items.into_iter()).unwrap();
    assert!(!caught_up(&resume));
    while take(&mut resume).is_some() {}
    assert!(caught_up(&resume));
}

#[test]
fn a_gap_that_is_done_with_is_forgotten() {
    let mut resume = attached(false);
    for (number, first) in (1..=100).zip((1..).step_by(3)) {
        resume.gap(1, &Missing { range: first..=first + 1, reason: 1 }).unwrap();
        deliver(&mut resume, number, first + 2..=first + 2);
        assert!(matches!(resume.take(start(), |_, _| true), Some(Shown::Gap { .. })));
        let handle = take(&mut resume).unwrap();
        resume.ack(handle);
        resume.batch().unwrap();
        resume.confirm(number);
        assert_eq!(resume.topics().map(|topic| topic.announced()).sum::<usize>(), 0);
    }
    assert_eq!(resume.gap(1, &Missing { range: 1..=2, reason: 1 }), Ok(false));
}

#[test]
fn what_was_held_of_a_gap_and_is_handed_back_is_lost_too() {
    let mut resume = attached(false);
    deliver(&mut resume, 1, 1..=2);
    assert_eq!(resume.gap(1, &Missing { range: 1..=4, reason: 1 }), Ok(true));
    let handle = take(&mut resume).unwrap();
    let showing = handle.showing;
    assert!(resume.nack(handle, Nacked::of(1, showing)));
    resume.batch().unwrap();
    resume.rewind(1, 1, 1, &[]).unwrap();
    resume.confirm(1);
    assert_eq!(resume.gap(1, &Missing { range: 1..=2, reason: 1 }), Ok(true));
    let shown = resume.take(start(), |_, _| true);
    assert!(matches!(shown, Some(Shown::Gap { missing, .. }) if missing.range == (1..=2)));
}

#[test]
fn damage_is_told_once_and_after_what_came_before_it() {
    let mut resume = attached(false);
    deliver(&mut resume, 1, 1..=2);
    resume.data_loss(1, 3).unwrap();
    let first = take(&mut resume).unwrap();
    take(&mut resume).unwrap();
    let told = |resume: &mut Resume<u64>| match resume.take(start(), |_, _| true) {
        Some(Shown::DataLoss { sequence, .. }) => Some(sequence),
        _ => None,
    };
    assert_eq!(told(&mut resume), Some(3));
    resume.hello();
    resume.welcome(Order::Topic, vec![joined(0, 9)]);
    resume.data_loss(1, 3).unwrap();
    assert_eq!(told(&mut resume), None, "every stream says so, and it is known");
    assert_eq!(resume.ack(first), Acked::Queued);
    // It was restored, and is damaged again.
    deliver(&mut resume, 1, 3..=3);
    take(&mut resume).unwrap();
    resume.data_loss(1, 4).unwrap();
    assert_eq!(told(&mut resume), Some(4));
}

#[test]
fn ranges_and_sequences_that_cannot_be_are_an_error() {
    let mut resume = attached(false);
    let ends = [(0, 0), (0, 5), (5, 4), (5, u64::MAX)];
    for (first, last) in ends {
        let missing = Missing { range: RangeInclusive::new(first, last), reason: 1 };
        assert!(resume.gap(1, &missing).is_err(), "{first} to {last}");
    }
    for sequence in [0, u64::MAX] {
        let mut resume = attached(false);
        assert!(resume.deliver(1, 1, 0, [(sequence, item(1, 1, 1))].into_iter()).is_err());
    }
}

#[test]
fn a_message_of_a_deleted_topic_takes_no_credit() {
    let mut resume = attached(false);
    deliver(&mut resume, 1, 1..=3);
    assert_eq!(resume.held(), (3, 1));
    resume.left(1).unwrap();
    assert_eq!(resume.held(), (0, 0));
}

#[test]
fn the_end_of_a_deleted_topic_comes_before_its_successor_whatever_was_sought() {
    let mut resume = attached(false);
    deliver(&mut resume, 1, 1..=2);
    resume.left(1).unwrap();
    let successor = Joined { number: 2, epoch: 8, ..joined(0, 9) };
    resume.joined(successor.clone());
    resume.repositioned(Joined { cursor_generation: 1, ..successor });
    resume.deliver(2, 3, 0, [(1, item(1, 1, 101))].into_iter()).unwrap();
    let order: Vec<u64> = std::iter::from_fn(|| match resume.take(start(), |_, _| true)? {
        Shown::Message { message, .. } => Some(message),
        Shown::Gap { .. } | Shown::DataLoss { .. } => None,
    })
    .collect();
    assert_eq!(order, [1, 2, 101]);
}

#[test]
fn a_welcome_with_many_topics_is_quick() {
    let topics: Vec<_> = (1..=20_000)
        .map(|number| Joined { number, name: format!("t{number}").into(), ..joined(0, 9) })
        .collect();
    let started = start();
    let mut resume = Resume::<u64>::new(false);
    for _ in 0..2 {
        resume.hello();
        resume.welcome(Order::Topic, topics.clone());
    }
    let took = started.elapsed();
    assert!(took < Duration::from_secs(10), "{took:?}");
}
