//! What a subscriber knows, and how it goes on after a disconnect. Pure: no I/O, no clock.
//!
//! The hello of every connection says what this side holds, and what it has acked and nacked
//! without a confirmation; the server delivers exactly the rest. So a disconnect shows nothing
//! twice and loses nothing, and nothing is decided by "the last id received".

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound::{Excluded, Unbounded};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::buffer::Item;
use super::nacks::Nacked;
use super::order::{Lane, Order};
use super::topic::{Joined, Missing, Next, Outstanding, Position, Sent, Topic, TopicKey, Unsent};

/// The wire's word for the reason of a gap.
const TOPIC_DELETED: i32 = pubsub_proto::v1::GapReason::TopicDeleted as i32;

/// The stream contradicts itself: a frame was lost, or one side has a bug. Attaching again puts
/// it right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Broken(pub(super) String);

/// The right to ack or nack one showing of one message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Handle {
    pub(super) topic: TopicKey,
    pub(super) sequence: u64,
    pub(super) showing: u64,
    pub(super) attempt: u32,
}

/// The next thing for the application.
#[derive(Debug)]
pub(super) enum Shown<M> {
    Message { handle: Handle, topic: Arc<str>, epoch: u64, message: M },
    Gap { topic: Arc<str>, epoch: u64, missing: Missing },
    DataLoss { topic: Arc<str>, epoch: u64, sequence: u64 },
}

/// A message that the application has held for too long.
#[derive(Debug)]
pub(super) struct Overdue {
    pub(super) handle: Handle,
    pub(super) topic: Arc<str>,
    pub(super) held_for: Duration,
}

/// Acks and nacks of one topic.
#[derive(Clone, Debug)]
pub(super) struct TopicBatch {
    pub(super) key: TopicKey,
    pub(super) number: u32,
    pub(super) cursor_generation: u64,
    pub(super) unsent: Unsent,
}

/// What has become of earlier acks.
#[derive(Debug, Default)]
pub(super) struct Settled {
    /// These are on the server's disk.
    pub(super) confirmed: Vec<(TopicKey, Vec<RangeInclusive<u64>>)>,
    /// Handles of these topics name nothing any more.
    pub(super) stale: Vec<TopicKey>,
}

#[derive(Debug)]
struct SentBatch {
    number: u64,
    topics: Vec<(TopicKey, Sent)>,
}

/// The state of a subscriber over all its topics and connections. `M` is a message.
#[derive(Debug)]
pub(super) struct Resume<M> {
    /// A reader has no acks: taking a message is all there is.
    reader: bool,
    order: Order,
    /// Whether the server wants to know what is in the application's hands.
    report_started: bool,
    topics: BTreeMap<TopicKey, Topic<M>>,
    by_number: BTreeMap<u32, TopicKey>,
    /// By name and epoch, those that are not deleted.
    present: BTreeMap<(Arc<str>, u64), TopicKey>,
    /// The last one of each name.
    latest: BTreeMap<Arc<str>, TopicKey>,
    ready: BTreeSet<TopicKey>,
    /// The topic that was served last, so that the others come next.
    served: TopicKey,
    keys: u64,
    showings: u64,
    queued: usize,
    // Of the present stream:
    deliveries: u64,
    batches: u64,
    sent: VecDeque<SentBatch>,
}

impl<M> Resume<M> {
    pub(super) fn new(reader: bool) -> Self {
        Self {
            reader,
            order: Order::Topic,
            report_started: false,
            topics: BTreeMap::new(),
            by_number: BTreeMap::new(),
            present: BTreeMap::new(),
            latest: BTreeMap::new(),
            ready: BTreeSet::new(),
            served: TopicKey(0),
            keys: 0,
            showings: 0,
            queued: 0,
            deliveries: 0,
            batches: 0,
            sent: VecDeque::new(),
        }
    }

    /// A new stream is being opened: what its hello says.
    pub(super) fn hello(&mut self) -> Vec<Position> {
        self.by_number.clear();
        self.deliveries = 0;
        self.batches = 0;
        self.queued = 0;
        self.sent.clear();
        let mut topics = Vec::new();
        let mut positions = Vec::new();
        let started = self.report_started;
        for (key, topic) in self.topics.iter_mut().filter(|(_, topic)| !topic.left) {
            let position =
                if self.reader { topic.reader_position() } else { topic.position(started) };
            topics.push((*key, position.sent()));
            positions.push(position);
        }
        self.sent.push_back(SentBatch { number: 0, topics });
        self.refresh_all();
        positions
    }

    /// The server says whether it wants to know what is in the application's hands.
    pub(super) fn report_started(&mut self, wanted: bool) {
        self.report_started = wanted && !self.reader;
    }

    pub(super) fn reports_started(&self) -> bool {
        self.report_started
    }

    /// The server took the hello in: what it carried is confirmed.
    pub(super) fn welcome(&mut self, order: Order, joined: Vec<Joined>) -> Settled {
        // A reader shares its messages with nobody, whatever a server says.
        self.order = if self.reader { Order::Topic } else { order };
        let mut settled = Settled::default();
        let before: Vec<TopicKey> = self.topics.keys().copied().collect();
        let mut kept = BTreeSet::new();
        for joined in joined {
            kept.insert(self.join(joined, &mut settled));
        }
        for key in before.into_iter().filter(|key| !kept.contains(key)) {
            if self.reader {
                self.miss(key);
            }
            self.leave(key, &mut settled);
        }
        let confirmed = self.confirm(0);
        settled.confirmed.extend(confirmed.confirmed);
        self.refresh_all();
        settled
    }

    fn join(&mut self, joined: Joined, settled: &mut Settled) -> TopicKey {
        let identity = (Arc::clone(&joined.name), joined.epoch);
        if let Some(key) = self.present.get(&identity).copied()
            && let Some(topic) = self.topics.get_mut(&key)
        {
            if topic.cursor_generation == joined.cursor_generation {
                topic.resume(&joined, self.order);
                self.by_number.insert(joined.number, key);
                return key;
            }
            // A seek: nothing of what was known has a meaning any more.
            self.remove(key, settled);
        }
        self.keys += 1;
        let key = TopicKey(self.keys);
        self.by_number.insert(joined.number, key);
        let mut topic = Topic::new(&joined, self.order);
        topic.predecessor = self.latest.insert(Arc::clone(&joined.name), key);
        self.present.insert(identity, key);
        self.topics.insert(key, topic);
        key
    }

    fn remove(&mut self, key: TopicKey, settled: &mut Settled) {
        self.forget_number(key);
        self.forget_topic(key);
        self.ready.remove(&key);
        settled.stale.push(key);
    }

    fn forget_number(&mut self, key: TopicKey) {
        if let Some(number) = self.topics.get(&key).and_then(|topic| topic.number) {
            self.by_number.remove(&number);
        }
    }

    fn forget_topic(&mut self, key: TopicKey) {
        let Some(topic) = self.topics.remove(&key) else { return };
        let identity = (Arc::clone(&topic.name), topic.epoch);
        if self.present.get(&identity) == Some(&key) {
            self.present.remove(&identity);
        }
        if self.latest.get(&topic.name) == Some(&key) {
            match topic.predecessor.filter(|earlier| self.topics.contains_key(earlier)) {
                Some(earlier) => self.latest.insert(topic.name, earlier),
                None => self.latest.remove(&topic.name),
            };
        }
    }

    /// A topic was deleted while its reader was away: what is known to have been in it and has
    /// not arrived never will. Subscriptions are told by the server.
    fn miss(&mut self, key: TopicKey) {
        let Some(topic) = self.topics.get_mut(&key).filter(|topic| !topic.left) else { return };
        let first = topic.last_received.saturating_add(1);
        if topic.last_received < topic.head {
            let range = first..=topic.head;
            topic.receive_gap(&Missing { range, reason: TOPIC_DELETED });
        }
    }

    fn leave(&mut self, key: TopicKey, settled: &mut Settled) {
        self.forget_number(key);
        let Some(topic) = self.topics.get_mut(&key) else { return };
        if !topic.left {
            self.present.remove(&(Arc::clone(&topic.name), topic.epoch));
        }
        topic.leave();
        settled.stale.push(key);
        self.refresh(key);
    }

    /// The server's data is not what it was: nothing that is known has a meaning.
    pub(super) fn forget(&mut self) -> Settled {
        let stale = self.topics.keys().copied().collect();
        self.topics.clear();
        self.by_number.clear();
        self.present.clear();
        self.latest.clear();
        self.ready.clear();
        self.sent.clear();
        self.queued = 0;
        Settled { confirmed: Vec::new(), stale }
    }

    pub(super) fn joined(&mut self, joined: Joined) -> Settled {
        let mut settled = Settled::default();
        self.join(joined, &mut settled);
        settled
    }

    pub(super) fn left(&mut self, number: u32) -> Result<Settled, Broken> {
        let mut settled = Settled::default();
        let key = self.key(number)?;
        self.leave(key, &mut settled);
        Ok(settled)
    }

    /// A seek moved the position in a topic. Its rewinds go on being counted: they count in the
    /// stream.
    pub(super) fn repositioned(&mut self, joined: Joined) -> Settled {
        let mut settled = Settled::default();
        let known = self.by_number.get(&joined.number).copied();
        let generation = known.and_then(|key| self.topics.get(&key)).map(|topic| topic.generation);
        if let Some(key) = known {
            self.remove(key, &mut settled);
        }
        let key = self.join(joined, &mut settled);
        if let Some(topic) = self.topics.get_mut(&key) {
            topic.generation = generation.unwrap_or(0);
        }
        settled
    }

    /// Messages arrive. Says how many of them are to be shown.
    pub(super) fn deliver(
        &mut self,
        number: u32,
        first: u64,
        generation: u32,
        messages: impl ExactSizeIterator<Item = (u64, Item<M>)>,
    ) -> Result<usize, Broken> {
        if first != self.deliveries + 1 {
            let expected = self.deliveries + 1;
            return Err(Broken(format!("delivery {first} came instead of {expected}")));
        }
        self.deliveries += messages.len() as u64;
        let key = self.key(number)?;
        let topic = self.topic(key)?;
        if generation > topic.generation {
            return Err(Broken(format!("a rewind of topic {number} is missing")));
        }
        if generation < topic.generation {
            return Ok(0);
        }
        let mut shown = 0;
        let mut again = 0;
        for (sequence, item) in messages {
            // A sequence that nothing can come before, or after.
            if matches!(sequence, 0 | u64::MAX) {
                return Err(Broken(format!("there is no message {sequence}")));
            }
            let done = topic.done.contains(sequence);
            again += usize::from(done);
            shown += usize::from(topic.receive(sequence, item));
        }
        self.queued += again;
        self.refresh(key);
        Ok(shown)
    }

    /// A topic, or what the server has taken `back` of it, is going to be delivered again.
    pub(super) fn rewind(
        &mut self,
        number: u32,
        from: u64,
        to: u32,
        back: &[RangeInclusive<u64>],
    ) -> Result<(), Broken> {
        let key = self.key(number)?;
        let topic = self.topic(key)?;
        if back.is_empty() && to <= topic.generation {
            return Err(Broken(format!("topic {number} was rewound to an older generation")));
        }
        topic.rewind(from, to, back);
        self.refresh(key);
        Ok(())
    }

    pub(super) fn gap(&mut self, number: u32, missing: &Missing) -> Result<bool, Broken> {
        let (first, last) = (*missing.range.start(), *missing.range.end());
        if first == 0 || first > last || last == u64::MAX {
            return Err(Broken(format!("there are no messages {first} to {last}")));
        }
        let key = self.key(number)?;
        let news = self.topic(key)?.receive_gap(missing);
        self.refresh(key);
        Ok(news)
    }

    pub(super) fn data_loss(&mut self, number: u32, sequence: u64) -> Result<(), Broken> {
        let key = self.key(number)?;
        self.topic(key)?.receive_damage(sequence);
        self.refresh(key);
        Ok(())
    }

    pub(super) fn head(&mut self, number: u32, head: u64, passed: u64, floor: u64) {
        if let Ok(topic) = self.key(number).and_then(|key| self.topic(key)) {
            topic.head = topic.head.max(head);
            topic.passed = passed;
            topic.raise_floor(floor);
        }
    }

    /// The server says how many messages it has sent on this stream.
    pub(super) fn check_deliveries(&self, sent: u64) -> Result<(), Broken> {
        let seen = self.deliveries;
        if sent <= seen {
            return Ok(());
        }
        Err(Broken(format!("{sent} messages were sent on this stream and {seen} arrived")))
    }

    /// Batches up to this one are on the server's disk.
    pub(super) fn confirm(&mut self, number: u64) -> Settled {
        let mut settled = Settled::default();
        while self.sent.front().is_some_and(|batch| batch.number <= number) {
            let Some(batch) = self.sent.pop_front() else { break };
            for (key, sent) in batch.topics {
                let Some(topic) = self.topics.get_mut(&key) else { continue };
                topic.confirm(&sent);
                settled.confirmed.push((key, sent.acks));
                self.refresh(key);
            }
        }
        settled
    }

    /// Whether something is to be shown of an earlier topic of the same name: its end comes first.
    fn is_preceded(&self, key: TopicKey) -> bool {
        let predecessor = |key| self.topics.get(&key).and_then(|topic| topic.predecessor);
        std::iter::successors(predecessor(key), |key| predecessor(*key))
            .any(|earlier| self.ready.contains(&earlier))
    }

    /// Takes the next thing to show: the oldest of a topic that may be shown, the topics by turns.
    /// `allowed` says which lanes of the topics of which names may be served.
    pub(super) fn take(
        &mut self,
        now: Instant,
        allowed: impl Fn(&Arc<str>, &Lane) -> bool,
    ) -> Option<Shown<M>> {
        let turn = |key: &TopicKey| {
            let topic = self.topics.get(key)?;
            let turn = topic.next(|lane| allowed(&topic.name, lane))?;
            (!self.is_preceded(*key)).then_some((*key, turn))
        };
        let (key, turn) = if self.ready.len() == 1 {
            self.ready.first().and_then(turn)?
        } else {
            let after = self.ready.range((Excluded(self.served), Unbounded));
            after.chain(self.ready.range(..=self.served)).find_map(turn)?
        };
        let topic = self.topics.get_mut(&key)?;
        self.showings += 1;
        let showing = self.showings;
        let next = topic.take(turn, showing, now, self.reader)?;
        if let Next::Message { sequence, .. } = &next
            && self.report_started
        {
            topic.report(*sequence);
        }
        let (name, epoch) = (Arc::clone(&topic.name), topic.epoch);
        self.served = key;
        self.queued += usize::from(match next {
            Next::Message { .. } => self.reader || self.report_started,
            Next::Gap(_) => true,
            Next::DataLoss(_) => false,
        });
        self.refresh(key);
        Some(match next {
            Next::Message { sequence, attempt, message } => {
                let handle = Handle { topic: key, sequence, showing, attempt };
                Shown::Message { handle, topic: name, epoch, message }
            }
            Next::Gap(missing) => Shown::Gap { topic: name, epoch, missing },
            Next::DataLoss(sequence) => Shown::DataLoss { topic: name, epoch, sequence },
        })
    }

    /// Acks a message. Says what that means for someone who waits for the confirmation.
    pub(super) fn ack(&mut self, handle: Handle) -> Acked {
        let Some(topic) = self.topics.get_mut(&handle.topic).filter(|topic| !topic.left) else {
            return Acked::Stale;
        };
        let (news, was_next) = topic.ack(handle.sequence);
        let done = topic.done.contains(handle.sequence);
        self.queued += usize::from(news);
        if was_next {
            self.refresh(handle.topic);
        }
        if done { Acked::Done } else { Acked::Queued }
    }

    /// Acks a message and, where its topic has an order, all before it that are in the
    /// application's hands.
    pub(super) fn ack_up_to(&mut self, handle: Handle) {
        let topic = self.topics.get(&handle.topic).filter(|topic| topic.order == Order::Topic);
        let all = topic.map(|topic| topic.outstanding_up_to(handle.sequence)).unwrap_or_default();
        for sequence in all {
            self.ack(Handle { sequence, ..handle });
        }
        self.ack(handle);
    }

    /// Hands a message back, if the handle still has a say in it.
    pub(super) fn nack(&mut self, handle: Handle, nacked: Nacked) -> bool {
        let Some(topic) = self.topics.get_mut(&handle.topic) else { return false };
        let done = topic.nack(handle.sequence, nacked);
        self.queued += usize::from(done);
        self.refresh(handle.topic);
        done
    }

    /// What the application has held for longer than `limit`, to be handed back in its stead.
    pub(super) fn overdue(&self, now: Instant, limit: Duration) -> Vec<Overdue> {
        let mut overdue = Vec::new();
        for (key, topic) in &self.topics {
            for (sequence, out, held_for) in topic.overdue(now, limit) {
                let Outstanding { showing, attempt, .. } = *out;
                let handle = Handle { topic: *key, sequence, showing, attempt };
                overdue.push(Overdue { handle, topic: Arc::clone(&topic.name), held_for });
            }
        }
        overdue
    }

    /// How many acks and nacks wait to be sent.
    pub(super) fn queued(&self) -> usize {
        self.queued
    }

    /// The next batch of acks and nacks, with its number.
    pub(super) fn batch(&mut self) -> Option<(u64, Vec<TopicBatch>)> {
        self.queued = 0;
        let mut batch = Vec::new();
        for (key, topic) in &mut self.topics {
            let Some(number) = topic.number.filter(|_| topic.has_unsent()) else { continue };
            let cursor_generation = topic.cursor_generation;
            let unsent = topic.unsent();
            if self.reader {
                // A server keeps nothing of a reader, and so has nothing to confirm.
                topic.confirm(&unsent.sent());
            }
            batch.push(TopicBatch { key: *key, number, cursor_generation, unsent });
        }
        if batch.is_empty() {
            return None;
        }
        self.batches += 1;
        if !self.reader {
            let topics = batch.iter().map(|topic| (topic.key, topic.unsent.sent())).collect();
            self.sent.push_back(SentBatch { number: self.batches, topics });
        }
        Some((self.batches, batch))
    }

    #[cfg(test)]
    pub(super) fn topic_of(&self, key: TopicKey) -> Option<&Topic<M>> {
        self.topics.get(&key)
    }

    pub(super) fn topics(&self) -> impl Iterator<Item = &Topic<M>> {
        self.topics.values()
    }

    /// What is kept in order, as the last welcome said.
    pub(super) fn order(&self) -> Order {
        self.order
    }

    /// How many messages are in the application's hands.
    pub(super) fn outstanding(&self) -> usize {
        self.topics.values().map(Topic::outstanding).sum()
    }

    /// How many messages are held, here or in the application's hands, in how many topics. Those
    /// of deleted topics take no credit.
    pub(super) fn held(&self) -> (usize, usize) {
        let held = self.topics.values().filter(|topic| !topic.left).map(Topic::held).sum();
        (held, self.present.len())
    }

    pub(super) fn is_unconfirmed(&self) -> bool {
        self.topics.values().any(Topic::is_unconfirmed)
    }

    pub(super) fn unconfirmed(&self) -> u64 {
        self.topics.values().map(Topic::unconfirmed).sum()
    }

    fn key(&self, number: u32) -> Result<TopicKey, Broken> {
        let unknown = || Broken(format!("topic {number} is not part of this session"));
        self.by_number.get(&number).copied().ok_or_else(unknown)
    }

    fn topic(&mut self, key: TopicKey) -> Result<&mut Topic<M>, Broken> {
        self.topics.get_mut(&key).ok_or_else(|| Broken("a topic is missing".to_owned()))
    }

    fn refresh(&mut self, key: TopicKey) {
        if self.topics.get(&key).is_some_and(Topic::is_over) {
            self.forget_topic(key);
        }
        if self.topics.get(&key).is_some_and(Topic::is_ready) {
            self.ready.insert(key);
        } else {
            self.ready.remove(&key);
        }
    }

    fn refresh_all(&mut self) {
        for key in self.topics.keys().copied().collect::<Vec<_>>() {
            self.refresh(key);
        }
    }
}

/// What an ack means for someone who waits for its confirmation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Acked {
    /// It was confirmed before.
    Done,
    /// The confirmation will come.
    Queued,
    /// It has no meaning any more.
    Stale,
}
