//! Looking ahead in what delivery has not come to, for subscriptions with a filter: what it leaves
//! out is no backlog, and where nothing is owed before it, it holds back neither the floor nor the
//! space of its topic, whether anybody consumes or not.

use std::collections::VecDeque;
use std::ops::Bound;
use std::time::Duration;

use tokio::time::Instant;

use super::session::Session;
use super::subscription::{Keeper, Subscription, Topic};
use crate::limits;
use crate::record::{Epoch, StoredMessage, SubscriptionRecord};
use crate::storage::{ReadError, ReadLimit};

/// The pause after a look, so that nobody else waits for the disk.
const PACE: Duration = Duration::from_millis(10);
/// The pause after all was looked at, or could not be.
const PAUSE: Duration = Duration::from_secs(1);

/// What is known of the messages that delivery has not come to: runs of them, one after the other.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    runs: VecDeque<Run>,
    /// Not before then is it tried again to read what could not be read.
    retry: Option<Instant>,
}

/// Up to about a frame of messages.
#[derive(Debug)]
struct Run {
    first: u64,
    last: u64,
    /// How many of them are left out.
    left_out: u64,
}

impl Ahead {
    /// Nothing is known any more.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Delivery has met a message: from now on the position knows of it.
    pub(super) fn meet(&mut self, sequence: u64, left_out: bool) {
        let Some(run) = self.runs.front_mut() else { return };
        if run.first <= sequence && sequence <= run.last {
            run.left_out = run.left_out.saturating_sub(u64::from(left_out));
            self.forget_to(sequence);
        }
    }

    /// Delivery has come to here, and what it has not met was done.
    fn forget_to(&mut self, looked_at: u64) {
        while self.runs.front().is_some_and(|run| run.last <= looked_at) {
            self.runs.pop_front();
        }
        if let Some(run) = self.runs.front_mut() {
            run.first = run.first.max(looked_at + 1);
        }
    }

    /// The last message that was looked at, or that delivery has come to.
    fn end(&self, looked_at: u64) -> u64 {
        self.runs.back().map_or(looked_at, |run| run.last.max(looked_at))
    }

    /// A message was looked at; those since the last one are done, or gone.
    fn note(&mut self, sequence: u64, left_out: bool) {
        let frame = limits::MAX_FRAME_MESSAGES as u64;
        let full = |run: &Run| run.last - run.first + 1 >= frame;
        if self.runs.back().is_none_or(full) {
            self.runs.push_back(Run { first: sequence, last: sequence, left_out: 0 });
        }
        if let Some(run) = self.runs.back_mut() {
            run.last = sequence;
            run.left_out += u64::from(left_out);
        }
    }

    /// How many messages are left out of those that delivery has not come to.
    fn left_out(&self) -> u64 {
        self.runs.iter().map(|run| run.left_out).sum()
    }
}

impl Subscription {
    /// Looks at a few messages that delivery has not come to. Says whether it did.
    pub(super) async fn look_ahead(&mut self) -> bool {
        if self.looks_ahead_at().is_none_or(|at| at > Instant::now()) {
            return false;
        }
        let Some((epoch, from)) = self.unseen() else { return false };
        let limit = ReadLimit { messages: limits::MAX_FRAME_MESSAGES, bytes: limits::FRAME_BYTES };
        let read = self.storage.read(epoch, from, limit).await;
        let now = Instant::now();
        self.looked_ahead = epoch;
        let Some(topic) = self.topics.get_mut(&epoch) else { return false };
        topic.ahead.retry = None;
        match read {
            Ok(messages) => topic.look_ahead(&self.record, &messages),
            // Delivery tells of it when it gets there.
            Err(ReadError::Trimmed { first }) => topic.ahead.note(first - 1, false),
            // And looks at what is damaged.
            Err(_) => topic.ahead.retry = Some(now + PAUSE),
        }
        let cursor = topic.delivery.cursor();
        if topic.delivery.passed() == cursor.head() {
            // Those who consume have caught up, which they cannot see from what they receive.
            self.active().for_each(Session::hurry);
        }
        self.look_ahead_from = now + if self.unseen().is_some() { PACE } else { PAUSE };
        true
    }

    /// When to look ahead again, if there is something to be seen.
    pub(super) fn looks_ahead_at(&mut self) -> Option<Instant> {
        if self.record.filter.is_none() || self.keeper == Keeper::Client {
            return None;
        }
        if self.unseen().is_some() {
            return Some(self.look_ahead_from);
        }
        let now = Instant::now();
        self.topics.values().filter_map(|topic| topic.ahead.retry).filter(|at| *at > now).min()
    }

    /// The first message of a topic that was not looked at, of one topic after the other.
    fn unseen(&mut self) -> Option<(Epoch, u64)> {
        let now = Instant::now();
        for topic in self.topics.values_mut() {
            topic.ahead.forget_to(topic.delivery.looked_at());
        }
        let mut unseen = |(epoch, topic): (&Epoch, &mut Topic)| Some((*epoch, topic.unseen(now)?));
        let after = (Bound::Excluded(self.looked_ahead), Bound::Unbounded);
        let next = self.topics.range_mut(after).find_map(&mut unseen);
        next.or_else(|| self.topics.range_mut(..=self.looked_ahead).find_map(unseen))
    }
}

impl Topic {
    fn look_ahead(&mut self, record: &SubscriptionRecord, messages: &[StoredMessage]) {
        let head = self.delivery.cursor().head();
        // There may be more by now than this task has heard of.
        for message in messages.iter().take_while(|message| message.sequence <= head) {
            let (sequence, left_out) = (message.sequence, !record.wants(message));
            // Before the first that is wanted nothing has to be remembered.
            if !self.ahead.runs.is_empty() || !left_out || !self.delivery.pass_over(sequence) {
                let done = self.delivery.cursor().is_done(sequence);
                self.ahead.note(sequence, left_out && !done);
            }
        }
    }

    fn unseen(&mut self, now: Instant) -> Option<u64> {
        if self.ahead.retry.is_some_and(|at| at > now) {
            return None;
        }
        let looked_at = self.delivery.looked_at();
        let from = self.delivery.cursor().after_done(self.ahead.end(looked_at) + 1);
        let seen = from > self.delivery.cursor().head();
        let full = self.ahead.runs.len() >= limits::MAX_AHEAD_RUNS;
        (!seen && !full && self.is_readable(now)).then_some(from)
    }

    /// Messages that are neither done nor, as far as they were looked at, left out by a filter.
    pub(super) fn backlog(&self) -> u64 {
        self.delivery.cursor().backlog().saturating_sub(self.ahead.left_out())
    }
}

#[cfg(test)]
mod tests {
    use std::ops::RangeInclusive;
    use std::sync::Arc;

    use bytes::Bytes;
    use prost::Message as _;
    use pubsub_proto::v1;

    use super::super::publisher::Batch;
    use super::super::session::{Attach, Credit, Event, Told};
    use super::super::{Broker, Consume, NewSubscription, Start, Stream};
    use super::*;
    use crate::env::System;
    use crate::filter::Filter;
    use crate::names::{ConsumerId, SubscriptionName, TopicName, TopicPattern};
    use crate::record::{ConsumerRecord, NewMessage, SubscriptionKind, TopicConfig, Uuid};
    use crate::storage::Item;
    use crate::storage::memory::Memory;

    const FRAME: u64 = limits::MAX_FRAME_MESSAGES as u64;
    const TOPICS: [&str; 2] = ["t", "u"];
    const HEARTBEAT: Duration = Duration::from_secs(60);
    const KINDS: [SubscriptionKind; 3] =
        [SubscriptionKind::Exclusive, SubscriptionKind::Shared, SubscriptionKind::KeyOrdered];

    /// What was looked at; odd messages are left out.
    fn looked(messages: RangeInclusive<u64>) -> Ahead {
        let mut ahead = Ahead::default();
        messages.for_each(|sequence| ahead.note(sequence, sequence % 2 == 1));
        ahead
    }

    #[test]
    fn what_is_left_out_counts_until_delivery_gets_there() {
        let mut ahead = looked(11..=30);
        assert_eq!((ahead.left_out(), ahead.end(10)), (10, 30));
        ahead.meet(7, true);
        assert_eq!(ahead.left_out(), 10, "that was before");
        (11..=16).for_each(|sequence| ahead.meet(sequence, sequence % 2 == 1));
        assert_eq!(ahead.left_out(), 7);
        // Its consumer goes, it goes back, and meets again what it has met.
        (5..=16).for_each(|sequence| ahead.meet(sequence, sequence % 2 == 1));
        assert_eq!((ahead.left_out(), ahead.end(4)), (7, 30));
        // 17 was looked at, and is done; 18 is with a consumer.
        ahead.forget_to(18);
        ahead.meet(19, true);
        assert_eq!((ahead.left_out(), ahead.end(19)), (6, 30));
        ahead.forget_to(30);
        assert_eq!((ahead.left_out(), ahead.end(30)), (0, 30));
    }

    #[test]
    fn a_run_is_about_a_frame_however_few_come_at_a_time() {
        let mut ahead = looked(1..=10 * FRAME);
        assert_eq!((ahead.runs.len(), ahead.left_out()), (10, 5 * FRAME));
        ahead.forget_to(FRAME + 1);
        assert_eq!((ahead.runs.len(), ahead.left_out()), (9, 9 * FRAME / 2));
    }

    async fn broker() -> Broker {
        let env = Arc::new(System);
        let memory = Arc::new(Memory::new(Arc::clone(&env) as _));
        let broker = Broker::start(memory, env).await.unwrap();
        for topic in TOPICS {
            let topic = TopicName::parse(topic).unwrap();
            broker.create_topic(topic, TopicConfig::default(), false).await.unwrap();
        }
        broker
    }

    async fn publish(broker: &Broker, topic: &str, color: &str, count: u64) {
        let attributes = [("color".to_owned(), color.to_owned())].into();
        let body = v1::Message { attributes, ..v1::Message::default() }.encode_to_vec();
        let message = NewMessage { body: Bytes::from(body), recipients: Vec::new(), key: None };
        let items = (0..count).map(|_| Item::Store(message.clone())).collect();
        let batch = Batch { first_sequence: 1, resolved_below: 0, items, atomic: None };
        broker.publish(&TopicName::parse(topic).unwrap(), batch).await.unwrap();
    }

    async fn want_green(broker: &Broker, name: &SubscriptionName, kind: SubscriptionKind) {
        let new = NewSubscription {
            filter: Some(Filter::parse("attributes.color = \"green\"").unwrap()),
            name: name.clone(),
            topics: TOPICS.map(|topic| TopicPattern::parse(topic).unwrap()).into(),
            kind: Some(kind),
            on_failure: None,
            ack_timeout: None,
            expires_after: None,
            start: Start::Earliest,
        };
        broker.create_subscription(new, false).await.unwrap();
    }

    /// A consumer that takes one message.
    async fn consume(broker: &Broker, name: &SubscriptionName) -> Stream {
        let id = ConsumerId::parse("c").unwrap();
        let attach = Attach {
            consumer: ConsumerRecord { id, instance: Uuid([1; 16]), attach: 1 },
            known_epoch: None,
            claims: [].into(),
            credit: Credit { messages: 1, bytes: 1 << 20 },
            heartbeat: HEARTBEAT,
        };
        let consume = Consume {
            subscription: Some(name.clone()),
            topics: Vec::new(),
            kind: None,
            on_failure: None,
            ack_timeout: None,
            filter: None,
            start: Start::Earliest,
            must_exist: true,
            known_boot: None,
            positions: Vec::new(),
            attach,
        };
        broker.consume(consume).await.unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn topics_are_looked_at_in_turn() {
        let broker = broker().await;
        for topic in TOPICS {
            publish(&broker, topic, "red", 3 * FRAME).await;
        }
        for kind in KINDS {
            let name = SubscriptionName::parse(&format!("{kind:?}")).unwrap();
            want_green(&broker, &name, kind).await;
            // Time for two looks, and not for a third one.
            tokio::time::sleep(PACE + PACE / 2).await;
            let positions = broker.describe(&name).await.unwrap().positions;
            let left = positions.iter().map(|position| position.backlog);
            assert_eq!(left.collect::<Vec<_>>(), [2 * FRAME; 2], "{kind:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_takes_no_more_hears_soon_that_the_rest_is_left_out() {
        for kind in KINDS {
            let broker = broker().await;
            let name = SubscriptionName::parse("s").unwrap();
            want_green(&broker, &name, kind).await;
            let mut stream = consume(&broker, &name).await;
            publish(&broker, "t", "green", 1).await;
            publish(&broker, "t", "red", 3 * FRAME).await;
            let start = Instant::now();
            let mut received = 0;
            let all = |told: &Told| told.passed == 3 * FRAME + 1;
            loop {
                let event = stream.events.recv().await.unwrap();
                if let Event::Deliver(deliver) = &event {
                    received += deliver.messages.len();
                }
                if let Event::Heartbeat(heartbeat) = &event
                    && heartbeat.heads.iter().any(all)
                {
                    break;
                }
            }
            assert_eq!(received, 1, "{kind:?}");
            assert!(start.elapsed() < HEARTBEAT / 10, "{kind:?}: after {:?}", start.elapsed());
        }
    }
}
