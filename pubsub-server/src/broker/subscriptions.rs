//! Creating, describing, moving and deleting subscriptions, and attaching consumers to them.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::dead_letters::DeadLetters;
use super::delivery::{Claim, Nack, starting_at};
use super::describing::Description;
use super::error::BrokerError;
use super::events::{SubscriptionFate, What};
use super::session::{Attach, Command, Event, Lease, Outlet, Pull, Pulled, SessionId};
use super::subscription::{AdminCommand, Keeper, Target, TopicStart, Topics};
use super::{Broker, Handle, Owed, Topic};
use crate::failpoint;
use crate::filter::Filter;
use crate::limits;
use crate::names::{SubscriptionName, TopicName, TopicPattern};
use crate::record::{
    Epoch, FailurePolicy, Sequences, SubscriptionKind, SubscriptionRecord, Timestamp, Uuid,
};
use crate::storage::{Change, Urgency};

/// Where a new subscription or reader starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Before the first message that is stored.
    Earliest,
    /// After the last message.
    Latest,
    /// At a message.
    Sequence(u64),
    /// At the first message stored at or after a time.
    Time(Timestamp),
}

/// A subscription to be created.
#[derive(Clone, Debug)]
pub struct NewSubscription {
    /// Its name.
    pub name: SubscriptionName,
    /// What it listens to.
    pub topics: Vec<TopicPattern>,
    /// How it spreads its messages; as it does already, or exclusive, if that is not said.
    pub kind: Option<SubscriptionKind>,
    /// What becomes of messages that fail; as it is already, or nothing, if that is not said.
    pub on_failure: Option<FailurePolicy>,
    /// How long a handler may take; as it is already, or for ever, if that is not said.
    pub ack_timeout: Option<Duration>,
    /// Which messages it is shown; as it is already, or all, if that is not said.
    pub filter: Option<Filter>,
    /// After how long without a consumer it is deleted.
    pub expires_after: Option<Duration>,
    /// Where it starts.
    pub start: Start,
}

/// A consumer wants to consume.
#[derive(Debug)]
pub struct Consume {
    /// The subscription; `None` for a reader.
    pub subscription: Option<SubscriptionName>,
    /// What it listens to; may be empty if it exists.
    pub topics: Vec<TopicPattern>,
    /// How it spreads its messages; as it does already, or exclusive, if that is not said.
    pub kind: Option<SubscriptionKind>,
    /// What becomes of messages that fail; as it is already, or nothing, if that is not said.
    pub on_failure: Option<FailurePolicy>,
    /// How long a handler may take; as it is already, or for ever, if that is not said.
    pub ack_timeout: Option<Duration>,
    /// Which messages it is shown; as it is already, or all, if that is not said.
    pub filter: Option<Filter>,
    /// Where it starts, if it is new.
    pub start: Start,
    /// Whether it may be created.
    pub must_exist: bool,
    /// The boot of the server that the consumer knows, if it has been here before.
    pub known_boot: Option<Uuid>,
    /// What it knows of each topic, by name and epoch, with the highest sequence received.
    pub positions: Vec<(TopicName, Epoch, Claim, u64)>,
    /// The rest.
    pub attach: Attach,
}

/// A consumer's stream, attached or standing by. Dropping it is a lost connection.
#[derive(Debug)]
pub struct Stream {
    /// Which session.
    pub id: SessionId,
    /// To the subscription.
    pub commands: mpsc::Sender<Command>,
    /// From the subscription.
    pub events: mpsc::Receiver<Event>,
    /// Tells the subscription when it is dropped.
    _alive: oneshot::Sender<Infallible>,
}

/// Frames that may wait for a stream's peer. The messages in them are bounded by the credit.
const EVENT_QUEUE: usize = 16;

impl Broker {
    /// Creates a subscription. Answers whether it was created, or was there already.
    ///
    /// # Errors
    ///
    /// If it exists and may not, or differs, or means a topic that does not exist.
    pub async fn create_subscription(
        &self,
        new: NewSubscription,
        if_not_exists: bool,
    ) -> Result<(Description, bool), BrokerError> {
        let name = new.name.clone();
        let (handle, created) = self.find_or_create(new).await?;
        if !created && !if_not_exists {
            return Err(BrokerError::SubscriptionExists(name));
        }
        Ok((self.ask_description(&handle).await?, created))
    }

    async fn find_or_create(&self, new: NewSubscription) -> Result<(Handle, bool), BrokerError> {
        let broker = self.clone();
        self.to_the_end(async move { broker.find_or_create_now(&new).await }).await
    }

    async fn find_or_create_now(
        &self,
        new: &NewSubscription,
    ) -> Result<(Handle, bool), BrokerError> {
        let _admin = self.inner.admin.lock().await;
        if let Some(handle) = self.find(&new.name) {
            handle.check_same(new)?;
            return Ok((handle, false));
        }
        self.check_patterns(&new.topics)?;
        let letters = self.check_failures(new)?;
        if self.state().subscriptions.len() >= limits::MAX_SUBSCRIPTIONS {
            let limit = limits::MAX_SUBSCRIPTIONS as u64;
            return Err(BrokerError::LimitReached { what: "subscriptions", limit });
        }
        let env = &self.inner.env;
        let record = SubscriptionRecord {
            name: new.name.clone(),
            epoch: env.epoch(),
            kind: new.kind.unwrap_or(SubscriptionKind::Exclusive),
            on_failure: new.on_failure.clone().unwrap_or_default(),
            ack_timeout: new.ack_timeout,
            filter: new.filter.clone(),
            expires_after: new.expires_after,
            used_at: env.now(),
            topics: new.topics.clone(),
            created_at: env.now(),
            consumers: Vec::new(),
            snapshot_of: None,
        };
        let mut changes = vec![Change::PutSubscription(record.clone())];
        let mut starts = Vec::new();
        for topic in self.matching(&new.topics) {
            let cursor = starting_at(self.resolve(&topic, new.start).await?);
            let epoch = topic.record.epoch;
            let subscription = record.epoch;
            changes.push(Change::PutCursor { subscription, topic: epoch, cursor: cursor.clone() });
            starts.push((topic, cursor));
        }
        let letters = letters.map(|topic| {
            // What is there already is not this subscription's.
            let cursor = starting_at(self.stats(&topic).head + 1);
            (topic, cursor)
        });
        if let Some((topic, cursor)) = &letters {
            let (subscription, topic) = (record.epoch, topic.record.epoch);
            changes.push(Change::PutCursor { subscription, topic, cursor: cursor.clone() });
        }
        self.inner.storage.apply(changes, Urgency::Now).await?.into_inner();
        let name = &record.name;
        let starts = starts.into_iter().map(|(topic, cursor)| topic.start(name, cursor)).collect();
        let letters = letters.map(|(topic, cursor)| DeadLetters::new(topic, name, cursor));
        let (name, epoch) = (name.clone(), record.epoch);
        self.inner.events.tell(What::Subscription(name, epoch, SubscriptionFate::Created));
        Ok((self.run_subscription(record, Topics { starts, letters }), true))
    }

    /// Whether messages can fail like that; and the topic of the dead letters.
    fn check_failures(&self, new: &NewSubscription) -> Result<Option<Arc<Topic>>, BrokerError> {
        let allowed = limits::MIN_ACK_TIMEOUT..=limits::MAX_ACK_TIMEOUT;
        if new.ack_timeout.is_some_and(|timeout| !allowed.contains(&timeout)) {
            return Err(BrokerError::Invalid("ack_timeout must be 1 s to 24 h".to_owned()));
        }
        if new.expires_after.is_some_and(|after| after < limits::MIN_EXPIRY) {
            return Err(BrokerError::Invalid("expires_after must be at least 10 s".to_owned()));
        }
        let policy = new.on_failure.clone().unwrap_or_default();
        let most = limits::MAX_ATTEMPTS;
        if policy.max_attempts().is_some_and(|attempts| !(1..=most).contains(&attempts)) {
            return Err(BrokerError::Invalid(format!("max_attempts must be 1 to {most}")));
        }
        let Some(name) = policy.dead_letter_topic() else { return Ok(None) };
        if let Some(own) = new.topics.iter().find(|pattern| pattern.matches(name)) {
            let text = format!(
                "dead-letter topic {name} is one of the subscription's own topics ({own}): what \
                 fails would come back for ever; choose a topic that it does not listen to",
                own = own.as_str(),
            );
            return Err(BrokerError::Invalid(text));
        }
        self.topic(name).map(Some)
    }

    /// Every name must exist, or a typing error would wait for ever; a pattern may match nothing
    /// yet.
    pub(super) fn check_patterns(&self, patterns: &[TopicPattern]) -> Result<(), BrokerError> {
        if patterns.is_empty() {
            let rule = "a new subscription needs the topics it listens to";
            return Err(BrokerError::Invalid(rule.to_owned()));
        }
        for name in patterns.iter().filter_map(TopicPattern::as_name) {
            self.topic(name)?;
        }
        Ok(())
    }

    pub(super) fn matching(&self, patterns: &[TopicPattern]) -> Vec<Arc<Topic>> {
        let state = self.state();
        let topics = state.topics.values();
        topics
            .filter(|topic| patterns.iter().any(|pattern| pattern.matches(&topic.record.name)))
            .cloned()
            .collect()
    }

    /// The first message to be shown.
    pub(super) async fn resolve(&self, topic: &Topic, start: Start) -> Result<u64, BrokerError> {
        let stats = self.stats(topic);
        let name = &topic.record.name;
        match start {
            Start::Earliest => Ok(stats.first),
            Start::Latest => Ok(stats.head + 1),
            Start::Sequence(sequence) if (1..=stats.head + 1).contains(&sequence) => Ok(sequence),
            Start::Sequence(sequence) => {
                Err(BrokerError::BeyondHead { topic: name.clone(), sequence, head: stats.head })
            }
            Start::Time(time) => {
                let found = self.inner.storage.find(topic.record.epoch, time).await;
                found.map_err(|error| BrokerError::read(name, error))
            }
        }
    }

    /// Attaches a consumer. The first event is a welcome, or that it stands by, or the end.
    ///
    /// # Errors
    ///
    /// If the subscription is not there, or another one than the consumer knows or means.
    pub async fn consume(&self, consume: Consume) -> Result<Stream, BrokerError> {
        self.check_boot(consume.known_boot)?;
        let id = SessionId(self.next_id());
        for (topic, epoch, _, last_received) in &consume.positions {
            self.check_received(topic, *epoch, *last_received)?;
        }
        let handle = match &consume.subscription {
            Some(name) => self.subscription_for(name, &consume).await?,
            None => self.new_reader(id, &consume).await?,
        };
        let known_epoch = consume.attach.known_epoch;
        if consume.subscription.is_some()
            && known_epoch.is_some_and(|known| known != handle.record.epoch)
        {
            return Err(BrokerError::SubscriptionDeleted(handle.record.name.clone()));
        }
        let mut attach = consume.attach;
        attach
            .claims
            .extend(consume.positions.into_iter().map(|(_, epoch, claim, _)| (epoch, claim)));
        let (sender, events) = mpsc::channel(EVENT_QUEUE);
        let (alive, gone) = oneshot::channel();
        let command = Command::Attach(id, Box::new(attach), Outlet { events: sender, gone });
        let gone = |_| BrokerError::SubscriptionDeleted(handle.record.name.clone());
        handle.commands.send(command).await.map_err(gone)?;
        Ok(Stream { id, commands: handle.commands, events, _alive: alive })
    }

    /// A client that has received what the topic does not have has seen another history.
    fn check_received(
        &self,
        name: &TopicName,
        epoch: Epoch,
        last_received: u64,
    ) -> Result<(), BrokerError> {
        match self.topic(name) {
            Ok(topic) if topic.record.epoch == epoch && *topic.head.borrow() < last_received => {
                Err(BrokerError::Diverged)
            }
            Ok(_) | Err(_) => Ok(()),
        }
    }

    async fn subscription_for(
        &self,
        name: &SubscriptionName,
        consume: &Consume,
    ) -> Result<Handle, BrokerError> {
        let first_time = consume.attach.known_epoch.is_none();
        match self.find(name) {
            Some(handle) => {
                // Who was here before listens to what the subscription listens to by now.
                if first_time {
                    handle.check_same(&consume.to_new(name))?;
                }
                Ok(handle)
            }
            None if !first_time => Err(BrokerError::SubscriptionDeleted(name.clone())),
            None if consume.must_exist || consume.topics.is_empty() => {
                Err(BrokerError::SubscriptionNotFound(name.clone()))
            }
            None => Ok(self.find_or_create(consume.to_new(name)).await?.0),
        }
    }

    /// A reader goes on after what it has received. A topic that it does not know although it has
    /// been here before was created meanwhile.
    async fn new_reader(&self, id: SessionId, consume: &Consume) -> Result<Handle, BrokerError> {
        let _admin = self.inner.admin.lock().await;
        self.check_patterns(&consume.topics)?;
        let env = &self.inner.env;
        let record = SubscriptionRecord {
            name: SubscriptionName::parse("reader").expect("it is a valid name"),
            epoch: env.epoch(),
            kind: SubscriptionKind::Exclusive,
            on_failure: FailurePolicy::Block,
            ack_timeout: None,
            filter: consume.filter.clone(),
            expires_after: None,
            used_at: env.now(),
            topics: consume.topics.clone(),
            created_at: env.now(),
            consumers: Vec::new(),
            snapshot_of: None,
        };
        let mut starts: Vec<TopicStart> = Vec::new();
        for topic in self.matching(&consume.topics) {
            let known =
                consume.positions.iter().find(|(_, epoch, ..)| *epoch == topic.record.epoch);
            let first = match known {
                Some((_, _, _, last_received)) => (*last_received).min(*topic.head.borrow()) + 1,
                None if consume.known_boot.is_some() => 1,
                None => self.resolve(&topic, consume.start).await?,
            };
            starts.push(topic.reader_start(starting_at(first)));
        }
        let handle = self.spawn(record, Keeper::Client, Topics { starts, letters: None });
        let mut state = self.state();
        state.readers.retain(|_, reader| !reader.commands.is_closed());
        state.readers.insert(id, handle.clone());
        Ok(handle)
    }

    /// Takes messages under a lease.
    ///
    /// # Errors
    ///
    /// If the subscription is not there, or another consumer has it.
    pub async fn pull(&self, name: &SubscriptionName, pull: Pull) -> Result<Pulled, BrokerError> {
        self.existing(name)?.ask(|reply| Command::Pull(pull, reply)).await?
    }

    /// Acks messages, durably.
    ///
    /// # Errors
    ///
    /// If the subscription is not there, or a message lies beyond the head.
    pub async fn acknowledge(
        &self,
        name: &SubscriptionName,
        acked: BTreeMap<(TopicName, Epoch), Sequences>,
    ) -> Result<(), BrokerError> {
        let handle = self.existing(name)?;
        for ((topic, epoch), sequences) in &acked {
            self.check_acked(topic, *epoch, sequences)?;
        }
        let acked = acked.into_iter().map(|((_, epoch), sequences)| (epoch, sequences)).collect();
        handle.ask(|reply| Command::Ack(acked, reply)).await?
    }

    fn check_acked(
        &self,
        name: &TopicName,
        epoch: Epoch,
        sequences: &Sequences,
    ) -> Result<(), BrokerError> {
        let topic = self.topic(name)?;
        if topic.record.epoch != epoch {
            return Err(BrokerError::TopicRecreated(name.clone()));
        }
        let (head, last) = (*topic.head.borrow(), sequences.last().map_or(0, |range| *range.end()));
        if last > head {
            return Err(BrokerError::BeyondHead { topic: name.clone(), sequence: last, head });
        }
        Ok(())
    }

    /// Hands pulled messages back.
    ///
    /// # Errors
    ///
    /// If the subscription is not there.
    pub async fn release(
        &self,
        name: &SubscriptionName,
        leases: Vec<Lease>,
        nack: Nack,
    ) -> Result<(), BrokerError> {
        self.existing(name)?.ask(|reply| Command::Release(leases, nack, reply)).await?
    }

    /// Moves a subscription, in one topic or in all.
    ///
    /// # Errors
    ///
    /// If the subscription does not listen to the topic, or the position does not exist.
    pub async fn seek(
        &self,
        name: &SubscriptionName,
        topic: Option<&TopicName>,
        to: Start,
    ) -> Result<Description, BrokerError> {
        let handle = self.existing(name)?;
        let topics = match topic {
            Some(topic) if !handle.listens_to(topic) => {
                let text = format!("subscription {name} does not listen to topic {topic}");
                return Err(BrokerError::Invalid(text));
            }
            Some(topic) => vec![self.topic(topic)?],
            None => self.matching(&handle.record.topics),
        };
        let mut targets = Vec::with_capacity(topics.len());
        for topic in topics {
            let floor = self.resolve(&topic, to).await?.saturating_sub(1);
            targets.push((topic.record.epoch, Target { floor, done: Sequences::new() }));
        }
        handle.ask(|reply| Command::Admin(AdminCommand::Seek(targets, reply))).await??;
        failpoint::pass("sought");
        self.ask_description(&handle).await
    }

    /// Deletes a subscription; its sessions end.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub async fn delete_subscription(&self, name: SubscriptionName) -> Result<(), BrokerError> {
        let broker = self.clone();
        self.to_the_end(async move { broker.delete_subscription_now(&name).await }).await
    }

    async fn delete_subscription_now(&self, name: &SubscriptionName) -> Result<(), BrokerError> {
        let _admin = self.inner.admin.lock().await;
        let handle = self.existing(name)?;
        // By its own task: so nothing that it saves comes after the deletion.
        match handle.ask(|reply| Command::Admin(AdminCommand::Delete(reply))).await {
            Ok(deleted) => deleted?,
            // The task is gone, and nothing is saved any more.
            Err(_) => {
                let change = Change::DeleteSubscription(handle.record.epoch);
                self.inner.storage.apply(vec![change], Urgency::Now).await?.into_inner();
            }
        }
        self.forget_subscription(name);
        let epoch = handle.record.epoch;
        self.inner.events.tell(What::Subscription(name.clone(), epoch, SubscriptionFate::Deleted));
        Ok(())
    }

    /// Nothing is kept any more for a subscription that was deleted.
    pub(super) fn forget_subscription(&self, name: &SubscriptionName) {
        let topics: Vec<_> = {
            let mut state = self.state();
            state.subscriptions.remove(name);
            state.topics.values().cloned().collect()
        };
        for topic in topics {
            topic.floors().remove(&Owed::Subscription(name.clone()));
            topic.floors().remove(&Owed::DeadLetters(name.clone()));
        }
    }

    /// Describes a subscription.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub async fn describe(&self, name: &SubscriptionName) -> Result<Description, BrokerError> {
        self.ask_description(&self.existing(name)?).await
    }

    /// The subscriptions after a name, in order.
    pub async fn list_subscriptions(
        &self,
        after: Option<&SubscriptionName>,
        limit: usize,
    ) -> Vec<Description> {
        let handles: Vec<Handle> = {
            let state = self.state();
            let after = after.map_or(Bound::Unbounded, Bound::Excluded);
            let range = state.subscriptions.range((after, Bound::Unbounded));
            range.take(limit).map(|(_, handle)| handle.clone()).collect()
        };
        let mut descriptions = Vec::with_capacity(handles.len());
        for handle in handles {
            // One that was deleted meanwhile is left out.
            descriptions.extend(self.ask_description(&handle).await);
        }
        descriptions
    }

    pub(super) async fn ask_description(
        &self,
        handle: &Handle,
    ) -> Result<Description, BrokerError> {
        let ask = handle.ask(|reply| Command::Admin(AdminCommand::Describe(reply)));
        Ok(self.with_ages(ask.await?).await)
    }

    pub(super) fn find(&self, name: &SubscriptionName) -> Option<Handle> {
        self.state().subscriptions.get(name).cloned()
    }

    pub(super) fn existing(&self, name: &SubscriptionName) -> Result<Handle, BrokerError> {
        self.find(name).ok_or_else(|| BrokerError::SubscriptionNotFound(name.clone()))
    }
}

impl Consume {
    /// The subscription that is meant, if it has to be created.
    fn to_new(&self, name: &SubscriptionName) -> NewSubscription {
        NewSubscription {
            name: name.clone(),
            topics: self.topics.clone(),
            kind: self.kind,
            on_failure: self.on_failure.clone(),
            ack_timeout: self.ack_timeout,
            filter: self.filter.clone(),
            expires_after: None,
            start: self.start,
        }
    }
}

impl Handle {
    /// Refuses settings that differ from those of the subscription; no topics mean those it has.
    fn check_same(&self, new: &NewSubscription) -> Result<(), BrokerError> {
        let NewSubscription { topics, kind, on_failure, ack_timeout, .. } = new;
        let mismatch = |field, present| {
            let name = self.record.name.clone();
            Err(BrokerError::SubscriptionMismatch { name, field, present })
        };
        if kind.is_some_and(|kind| kind != self.record.kind) {
            return mismatch("kind", self.record.kind.to_string());
        }
        if on_failure.as_ref().is_some_and(|policy| *policy != self.record.on_failure) {
            return mismatch("on_failure", self.record.on_failure.to_string());
        }
        let duration = |present: Option<Duration>| {
            present.map_or("none".to_owned(), |duration| format!("{duration:?}"))
        };
        let present = self.record.expires_after;
        if new.expires_after.is_some_and(|after| Some(after) != present) {
            return mismatch("expires_after", duration(present));
        }
        let present = self.record.ack_timeout;
        if ack_timeout.is_some_and(|timeout| Some(timeout) != present) {
            return mismatch("ack_timeout", duration(present));
        }
        if let Some(filter) = &new.filter
            && self.record.filter.as_ref() != Some(filter)
        {
            let present = self.record.filter.as_ref().map_or("none".to_owned(), Filter::to_string);
            return mismatch("filter", present);
        }
        let sorted = |topics: &[TopicPattern]| {
            let mut texts: Vec<String> = topics.iter().map(|t| t.as_str().to_owned()).collect();
            texts.sort();
            texts.dedup();
            texts
        };
        if !topics.is_empty() && sorted(topics) != sorted(&self.record.topics) {
            return mismatch("topics", sorted(&self.record.topics).join(", "));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::session::Credit;
    use super::*;
    use crate::env::System;
    use crate::names::ConsumerId;
    use crate::record::{ConsumerRecord, TopicConfig};
    use crate::storage::memory::Memory;

    fn reader() -> Consume {
        let consumer = ConsumerRecord {
            id: ConsumerId::parse("c").unwrap(),
            instance: Uuid([1; 16]),
            attach: 1,
        };
        Consume {
            subscription: None,
            topics: vec![TopicPattern::parse("t").unwrap()],
            kind: None,
            on_failure: None,
            ack_timeout: None,
            filter: None,
            start: Start::Earliest,
            must_exist: false,
            known_boot: None,
            positions: Vec::new(),
            attach: Attach {
                consumer,
                known_epoch: None,
                claims: BTreeMap::new(),
                credit: Credit { messages: 1, bytes: 1 },
                heartbeat: limits::HEARTBEAT,
            },
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_nobody_attaches_to_ends() {
        let env = Arc::new(System);
        let broker = Broker::start(Arc::new(Memory::new(Arc::clone(&env) as _)), env).await;
        let broker = broker.unwrap();
        let config = TopicConfig::default();
        broker.create_topic(TopicName::parse("t").unwrap(), config, false).await.unwrap();
        let attached = broker.consume(reader()).await.unwrap();
        // The call was dropped between the two steps of an attach.
        let abandoned = broker.new_reader(SessionId(99), &reader()).await.unwrap();
        tokio::time::sleep(limits::GRACE + Duration::from_secs(1)).await;
        assert!(abandoned.commands.is_closed());
        assert!(!attached.commands.is_closed());
    }
}
