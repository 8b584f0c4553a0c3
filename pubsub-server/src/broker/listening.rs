//! Changing what a subscription listens to while it is in use.

use std::sync::Arc;

use super::delivery::starting_at;
use super::describing::Description;
use super::error::BrokerError;
use super::session::Command;
use super::subscription::{AdminCommand, Listening, Subscription};
use super::{Broker, Handle, Owed, Start, Topic};
use crate::limits;
use crate::names::{SubscriptionName, TopicPattern};
use crate::record::SubscriptionRecord;
use crate::storage::Change;

/// A change of what a subscription listens to.
#[derive(Clone, Debug)]
pub struct Relisten {
    /// Names and patterns that are added.
    pub add: Vec<TopicPattern>,
    /// Names and patterns that are removed.
    pub remove: Vec<TopicPattern>,
    /// Where it starts in topics that it does not listen to yet.
    pub start: Start,
}

impl Subscription {
    /// Listens to other topics from now on. If that fails everything is as it was.
    pub(super) async fn listen(&mut self, listening: Listening) -> Result<(), BrokerError> {
        let Listening { patterns, joining, leaving } = listening;
        let before = std::mem::replace(&mut self.record.topics, patterns);
        let subscription = self.record.epoch;
        let starts = joining.iter().map(|(topic, cursor)| {
            let (topic, cursor) = (topic.record.epoch, cursor.clone());
            Change::PutCursor { subscription, topic, cursor }
        });
        let ends = leaving.iter().map(|topic| Change::DeleteCursor { subscription, topic: *topic });
        let changes = starts.chain(ends).collect();
        self.record_changed = true;
        // The positions of those that leave are not to be saved after they are deleted.
        if let Err(error) = self.commit_with(changes).await {
            self.record.topics = before;
            return Err(error.into());
        }
        leaving.into_iter().for_each(|epoch| self.leave(epoch));
        for (topic, cursor) in joining {
            let start = topic.start(&self.record.name, cursor);
            self.join_and_tell(start);
        }
        self.leases.forget_settled(&self.topics);
        Ok(())
    }
}

impl Broker {
    /// Adds and removes topics of a subscription. Live sessions follow at once: what was delivered
    /// of a topic that leaves can still be processed, and its acks mean nothing.
    ///
    /// # Errors
    ///
    /// If there is no such subscription or topic, it does not listen to what is to be removed, or
    /// nothing would be left.
    pub async fn relisten(
        &self,
        name: SubscriptionName,
        change: Relisten,
    ) -> Result<Description, BrokerError> {
        let broker = self.clone();
        self.to_the_end(async move { broker.relisten_now(&name, &change).await }).await
    }

    async fn relisten_now(
        &self,
        name: &SubscriptionName,
        change: &Relisten,
    ) -> Result<Description, BrokerError> {
        let _admin = self.inner.admin.lock().await;
        let handle = self.existing(name)?;
        let patterns = changed(&handle.record, change)?;
        self.check_patterns(&patterns)?;
        let letters = handle.record.on_failure.dead_letter_topic();
        if let Some(topic) = letters.filter(|topic| matches(&patterns, topic)) {
            let text = format!("dead-letter topic {topic} cannot be one of the subscription's own");
            return Err(BrokerError::Invalid(text));
        }
        let before = self.matching(&handle.record.topics);
        let after = self.matching(&patterns);
        let among = |all: &[Arc<Topic>], one: &Topic| {
            all.iter().any(|other| other.record.epoch == one.record.epoch)
        };
        let mut joining = Vec::new();
        for topic in after.iter().filter(|topic| !among(&before, topic)) {
            let cursor = starting_at(self.resolve(topic, change.start).await?);
            joining.push((Arc::clone(topic), cursor));
        }
        let left: Vec<_> = before.iter().filter(|topic| !among(&after, topic)).collect();
        let leaving = left.iter().map(|topic| topic.record.epoch).collect();
        let listening = Listening { patterns: patterns.clone(), joining, leaving };
        handle.ask(|reply| Command::Admin(AdminCommand::Listen(listening, reply))).await??;
        for topic in left {
            topic.floors().remove(&Owed::Subscription(name.clone()));
        }
        let record = SubscriptionRecord { topics: patterns, ..(*handle.record).clone() };
        let handle = Handle { record: Arc::new(record), ..handle };
        self.state().subscriptions.insert(name.clone(), handle.clone());
        self.ask_description(&handle).await
    }
}

fn matches(patterns: &[TopicPattern], topic: &crate::names::TopicName) -> bool {
    patterns.iter().any(|pattern| pattern.matches(topic))
}

/// The patterns after a change.
fn changed(
    record: &SubscriptionRecord,
    change: &Relisten,
) -> Result<Vec<TopicPattern>, BrokerError> {
    let is = |one: &TopicPattern, other: &TopicPattern| one.as_str() == other.as_str();
    let mut patterns = record.topics.clone();
    for gone in &change.remove {
        let count = patterns.len();
        patterns.retain(|pattern| !is(pattern, gone));
        if patterns.len() == count {
            let present: Vec<_> = record.topics.iter().map(TopicPattern::as_str).collect();
            let (gone, present) = (gone.as_str(), present.join(", "));
            let text =
                format!("subscription {} listens to {present}, and not to {gone}", record.name);
            return Err(BrokerError::Invalid(text));
        }
    }
    for new in &change.add {
        if !patterns.iter().any(|pattern| is(pattern, new)) {
            patterns.push(new.clone());
        }
    }
    if patterns.is_empty() {
        let text = "a subscription listens to one topic at least; delete it instead".to_owned();
        return Err(BrokerError::Invalid(text));
    }
    if patterns.len() > limits::MAX_PATTERNS {
        let limit = limits::MAX_PATTERNS as u64;
        return Err(BrokerError::LimitReached { what: "topics of a subscription", limit });
    }
    Ok(patterns)
}

#[cfg(test)]
mod tests {
    use super::super::subscriptions::NewSubscription;
    use super::*;
    use crate::env::System;
    use crate::names::TopicName;
    use crate::record::TopicConfig;
    use crate::storage::Storage as _;
    use crate::storage::memory::{Fault, Memory};

    fn name() -> SubscriptionName {
        SubscriptionName::parse("s").unwrap()
    }

    fn pattern(topic: &str) -> TopicPattern {
        TopicPattern::parse(topic).unwrap()
    }

    /// A subscription of one of two topics, if the engine does not fail before.
    async fn prepared(memory: &Arc<Memory>) -> Option<Broker> {
        let broker = Broker::start(Arc::clone(memory) as _, Arc::new(System)).await.ok()?;
        for topic in ["t", "u"] {
            let topic = TopicName::parse(topic).unwrap();
            broker.create_topic(topic, TopicConfig::default(), false).await.ok()?;
        }
        let new = NewSubscription {
            filter: None,
            name: name(),
            topics: vec![pattern("t")],
            kind: None,
            on_failure: None,
            ack_timeout: None,
            expires_after: None,
            start: Start::Earliest,
        };
        broker.create_subscription(new, false).await.ok()?;
        Some(broker)
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_answered_is_stored_also_if_a_commit_does_not_tell() {
        let mut failed = 0;
        for (after, applied) in (0..12).flat_map(|after| [(after, true), (after, false)]) {
            let memory = Memory::failing(Arc::new(System), Fault { after, applied });
            let memory = Arc::new(memory);
            let Some(broker) = prepared(&memory).await else { continue };
            let change =
                Relisten { add: vec![pattern("u")], remove: Vec::new(), start: Start::Earliest };
            let listens = broker.relisten(name(), change).await.is_ok();
            let stored = memory.catalog().await.unwrap().subscriptions;
            let at = format!("write {after}, applied: {applied}");
            assert_eq!(listens, stored[0].record.topics.len() == 2, "{at}");
            let deleted = broker.delete_subscription(name()).await.is_ok();
            let stored = memory.catalog().await.unwrap().subscriptions;
            assert_eq!(deleted, stored.is_empty(), "{at}");
            failed += u32::from(!listens) + u32::from(!deleted);
        }
        assert!(failed >= 2, "{failed}");
    }
}
