//! Changing what a subscription listens to while it is in use.

use std::sync::Arc;

use super::delivery::starting_at;
use super::error::BrokerError;
use super::session::Command;
use super::subscription::{AdminCommand, Description, Listening};
use super::{Broker, Handle, Owed, Start, Topic};
use crate::limits;
use crate::names::{SubscriptionName, TopicPattern};
use crate::record::SubscriptionRecord;

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
