//! Creating, describing and deleting topics.

use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::error::BrokerError;
use super::events::{TopicFate, What};
use super::session::Command;
use super::subscription::AdminCommand;
use super::{Broker, Handle, Topic};
use crate::failpoint;
use crate::limits;
use crate::names::{SubscriptionName, TopicName};
use crate::record::{CursorRecord, TopicConfig, TopicRecord};
use crate::storage::{Change, TopicStats, Urgency};

/// How things stand with a topic.
#[derive(Clone, Debug)]
pub struct TopicInfo {
    /// Its record.
    pub record: TopicRecord,
    /// What it holds.
    pub stats: TopicStats,
    /// Who listens.
    pub subscriptions: Vec<SubscriptionName>,
}

impl Broker {
    /// Creates a topic, which the subscriptions whose patterns match it join in the same commit.
    /// Answers whether it was created, or was there already.
    ///
    /// # Errors
    ///
    /// If it exists and may not, or a limit is reached.
    pub async fn create_topic(
        &self,
        name: TopicName,
        config: TopicConfig,
        if_not_exists: bool,
    ) -> Result<(TopicInfo, bool), BrokerError> {
        check_config(&config)?;
        let broker = self.clone();
        let create = async move { broker.create_topic_now(name, config, if_not_exists).await };
        self.to_the_end(create).await
    }

    async fn create_topic_now(
        &self,
        name: TopicName,
        config: TopicConfig,
        if_not_exists: bool,
    ) -> Result<(TopicInfo, bool), BrokerError> {
        let _admin = self.inner.admin.lock().await;
        if let Ok(present) = self.topic(&name) {
            let error = BrokerError::TopicExists(name);
            return if_not_exists.then(|| (self.info(&present), false)).ok_or(error);
        }
        if self.state().topics.len() >= limits::MAX_TOPICS {
            let limit = limits::MAX_TOPICS as u64;
            return Err(BrokerError::LimitReached { what: "topics", limit });
        }
        let env = &self.inner.env;
        let (epoch, created_at) = (env.epoch(), env.now());
        let record = TopicRecord { name, epoch, config, created_at, purged: 0 };
        let listeners = self.listeners(&record.name);
        let mut changes = vec![Change::CreateTopic(record.clone())];
        changes.extend(listeners.iter().map(|(listener, _)| Change::PutCursor {
            subscription: listener.record.epoch,
            topic: record.epoch,
            cursor: CursorRecord::default(),
        }));
        self.inner.storage.apply(changes, Urgency::Now).await?.into_inner();
        let topic = self.add_topic(record).ok_or(BrokerError::Unavailable("the topic is gone"))?;
        for (listener, reader) in listeners {
            let cursor = CursorRecord::default();
            let start = match reader {
                true => topic.reader_start(cursor),
                false => topic.start(&listener.record.name, cursor),
            };
            // A task that has ended does not need to know.
            let _ = listener.commands.send(Command::Admin(AdminCommand::TopicCreated(start))).await;
        }
        self.tell_of(&topic, TopicFate::Created);
        Ok((self.info(&topic), true))
    }

    /// Changes the settings of a topic to what is made of those that it has.
    ///
    /// # Errors
    ///
    /// If there is none, or a setting breaks a rule.
    pub async fn update_topic(
        &self,
        name: TopicName,
        change: impl FnOnce(TopicConfig) -> TopicConfig + Send + 'static,
    ) -> Result<TopicInfo, BrokerError> {
        let broker = self.clone();
        let update = async move {
            let _admin = broker.inner.admin.lock().await;
            let topic = broker.topic(&name)?;
            let config = change(topic.config());
            check_config(&config)?;
            let record = TopicRecord { config: config.clone(), ..topic.present() };
            let change = Change::PutTopic(record);
            broker.inner.storage.apply(vec![change], Urgency::Now).await?.into_inner();
            topic.set_config(config);
            broker.tell_of(&topic, TopicFate::Updated);
            Ok(broker.info(&topic))
        };
        self.to_the_end(update).await
    }

    /// Removes the messages below a sequence, or all, whoever has not received them. Answers how
    /// many that were.
    ///
    /// # Errors
    ///
    /// If there is no such topic, or the sequence lies beyond its head.
    pub async fn purge(
        &self,
        name: TopicName,
        below: Option<u64>,
    ) -> Result<(TopicInfo, u64), BrokerError> {
        let broker = self.clone();
        let purge = async move {
            let _admin = broker.inner.admin.lock().await;
            let topic = broker.topic(&name)?;
            let TopicStats { first, head, .. } = broker.stats(&topic);
            let below = below.unwrap_or(head + 1);
            if below > head + 1 {
                return Err(BrokerError::BeyondHead { topic: name, sequence: below, head });
            }
            let purged = topic.purged.load(Ordering::Acquire).max(below);
            let record = TopicRecord { purged, ..topic.present() };
            let trim = Change::Trim { topic: record.epoch, below };
            let changes = vec![Change::PutTopic(record), trim];
            // Before it happens: whoever comes across the gap is to know why.
            let before = topic.purged.swap(purged, Ordering::AcqRel);
            failpoint::pass("purging");
            if let Err(error) = broker.inner.storage.apply(changes, Urgency::Now).await {
                topic.purged.store(before, Ordering::Release);
                return Err(error.into());
            }
            failpoint::pass("purged");
            let (epoch, purged) = (topic.record.epoch, below.saturating_sub(first));
            broker.inner.events.tell(What::Purged { topic: name, epoch, before: below, purged });
            Ok((broker.info(&topic), purged))
        };
        self.to_the_end(purge).await
    }

    /// Deletes a topic with its messages.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub async fn delete_topic(&self, name: TopicName) -> Result<(), BrokerError> {
        let broker = self.clone();
        self.to_the_end(async move { broker.delete_topic_now(&name).await }).await
    }

    async fn delete_topic_now(&self, name: &TopicName) -> Result<(), BrokerError> {
        let _admin = self.inner.admin.lock().await;
        let topic = self.topic(name)?;
        let epoch = topic.record.epoch;
        if let Some(subscription) = self.dead_letters_go_to(name) {
            return Err(BrokerError::TopicInUse { topic: name.clone(), subscription });
        }
        let listeners = self.listeners(name);
        let untold = |(listener, _): &(Handle, bool)| listener.departed.load(Ordering::Relaxed);
        if listeners.iter().map(untold).max() >= Some(limits::MAX_DEPARTED) {
            let what = "deleted topics of which a subscription was not told yet";
            return Err(BrokerError::LimitReached { what, limit: limits::MAX_DEPARTED as u64 });
        }
        let change = Change::DeleteTopic(epoch);
        self.inner.storage.apply(vec![change], Urgency::Now).await?.into_inner();
        self.state().topics.remove(name);
        for (listener, _) in listeners {
            let _ = listener.commands.send(Command::Admin(AdminCommand::TopicDeleted(epoch))).await;
        }
        self.tell_of(&topic, TopicFate::Deleted);
        Ok(())
    }

    fn tell_of(&self, topic: &Topic, fate: TopicFate) {
        let TopicRecord { name, epoch, .. } = &topic.record;
        self.inner.events.tell(What::Topic(name.clone(), *epoch, fate));
    }

    /// A subscription whose dead letters a topic holds.
    fn dead_letters_go_to(&self, name: &TopicName) -> Option<SubscriptionName> {
        let state = self.state();
        let mut records = state.subscriptions.values().map(|handle| &handle.record);
        let uses = records.find(|record| record.on_failure.dead_letter_topic() == Some(name));
        uses.map(|record| record.name.clone())
    }

    /// Describes a topic.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn get_topic(&self, name: &TopicName) -> Result<TopicInfo, BrokerError> {
        self.topic(name).map(|topic| self.info(&topic))
    }

    /// The topics after a name, in order.
    pub fn list_topics(&self, after: Option<&TopicName>, limit: usize) -> Vec<TopicInfo> {
        let topics: Vec<Arc<Topic>> = {
            let state = self.state();
            let after = after.map_or(Bound::Unbounded, Bound::Excluded);
            state
                .topics
                .range((after, Bound::Unbounded))
                .take(limit)
                .map(|(_, t)| t.clone())
                .collect()
        };
        topics.iter().map(|topic| self.info(topic)).collect()
    }

    fn info(&self, topic: &Topic) -> TopicInfo {
        TopicInfo {
            record: topic.present(),
            stats: self.stats(topic),
            subscriptions: topic.subscriptions(),
        }
    }

    /// The subscriptions and readers that mean this topic; `true` marks readers.
    fn listeners(&self, name: &TopicName) -> Vec<(Handle, bool)> {
        let state = self.state();
        let subscriptions = state.subscriptions.values().map(|handle| (handle, false));
        let readers = state.readers.values().map(|handle| (handle, true));
        subscriptions
            .chain(readers)
            .filter(|(handle, _)| handle.listens_to(name))
            .map(|(handle, reader)| (handle.clone(), reader))
            .collect()
    }
}

impl Handle {
    pub(super) fn listens_to(&self, name: &TopicName) -> bool {
        self.record.topics.iter().any(|pattern| pattern.matches(name))
    }
}

fn check_config(config: &TopicConfig) -> Result<(), BrokerError> {
    let limit = limits::MAX_MESSAGE_BYTES;
    if !(1..=limit).contains(&config.max_message_bytes) {
        return Err(BrokerError::Invalid(format!("max_message_bytes must be 1 to {limit}")));
    }
    if config.max_age_unacked.is_some_and(|age| age < limits::MIN_AGE_UNACKED) {
        return Err(BrokerError::Invalid("max_age_unacked must be at least 10 s".to_owned()));
    }
    if config.idempotency_window > limits::IDEMPOTENCY_WINDOW {
        return Err(BrokerError::Invalid("idempotency_window must be at most 7 days".to_owned()));
    }
    Ok(())
}
