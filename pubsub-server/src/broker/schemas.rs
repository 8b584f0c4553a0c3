//! What topics take: setting and describing it, and checking what is published.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock};

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;

use super::error::{BrokerError, Problems};
use super::publisher::{Batch, Inspected};
use super::{Broker, Topic};
use crate::envelope::{Content, Label, Stamp, is_plain};
use crate::limits;
use crate::names::TopicName;
use crate::record::NewMessage;
use crate::schema::{
    Checker, Compatibility, InvalidSchema, PayloadRules, Problem, SchemaRecord, Violation,
    shortened,
};
use crate::storage::{Change, Fact, Item, Refusal, RefusalReason, Urgency};

/// The revisions of what a topic takes, with the present one ready for use.
#[derive(Debug, Default)]
pub(super) struct Payloads(Mutex<BTreeMap<u32, Arc<Revision>>>);

/// One of them.
#[derive(Debug)]
struct Revision {
    record: Arc<SchemaRecord>,
    /// Made when it is first needed: a server may have thousands of schemas, and needs few.
    checker: OnceLock<Result<Checker, InvalidSchema>>,
}

/// How a schema, or payloads, would fare.
#[derive(Debug)]
pub struct SchemaCheck {
    /// The present revision; 0 if there is none.
    pub current: u32,
    /// The last revision with the same rules; 0 if there is none.
    pub matching: u32,
    /// Why they could not become the next one.
    pub problems: Vec<Problem>,
    /// Why payloads that are valid by them could be refused by the present one.
    pub publisher_problems: Vec<Problem>,
    /// One for each payload.
    pub payloads: Vec<PayloadFate>,
}

/// How a payload would fare.
pub type PayloadFate = Result<(), Violation>;

impl Payloads {
    /// Adds a revision.
    pub(super) fn push(&self, record: Arc<SchemaRecord>, checker: Option<Checker>) {
        let checker = checker.map_or_else(OnceLock::new, |checker| OnceLock::from(Ok(checker)));
        let number = record.revision;
        self.all().insert(number, Arc::new(Revision { record, checker }));
    }

    fn all(&self) -> std::sync::MutexGuard<'_, BTreeMap<u32, Arc<Revision>>> {
        self.0.lock().expect("no holder of this lock panics")
    }

    fn current(&self) -> Option<Arc<Revision>> {
        self.all().last_key_value().map(|(_, revision)| Arc::clone(revision))
    }

    fn bytes(&self) -> usize {
        self.all().values().map(|revision| revision.record.rules.len()).sum()
    }
}

impl Revision {
    fn checker(&self) -> Result<&Checker, BrokerError> {
        let checker = self.checker.get_or_init(|| self.record.rules.compile());
        checker.as_ref().map_err(|error| {
            // It was usable when it was set: this is another version of the server.
            tracing::error!(%error, revision = self.record.revision, "a stored schema");
            BrokerError::Unavailable(
                "the topic's schema cannot be used by this server; set another",
            )
        })
    }

    /// Whether a batch of this size is checked within the blink of an eye.
    fn is_quick(&self, bytes: usize) -> bool {
        let is_ready = self.checker.get().is_some() && bytes <= limits::MAX_INLINE_CHECK_BYTES;
        self.record.rules.schema.is_none() || is_ready
    }
}

impl Broker {
    /// Sets what a topic takes from now on. Answers whether this is a new revision, or was the
    /// present one already.
    ///
    /// # Errors
    ///
    /// If there is no such topic, the schema cannot be used, it does not keep what it has to of the
    /// present one, or a limit is reached.
    pub async fn set_schema(
        &self,
        topic: TopicName,
        rules: PayloadRules,
        compatibility: Compatibility,
    ) -> Result<(Arc<SchemaRecord>, bool), BrokerError> {
        let broker = self.clone();
        let set = async move { broker.set_schema_now(topic, rules, compatibility).await };
        self.to_the_end(set).await
    }

    async fn set_schema_now(
        &self,
        name: TopicName,
        rules: PayloadRules,
        compatibility: Compatibility,
    ) -> Result<(Arc<SchemaRecord>, bool), BrokerError> {
        let rules = Arc::new(rules);
        let compiling = Arc::clone(&rules);
        let checker = self.beside(move || compiling.compile()).await?;
        let checker = checker.map_err(|error| BrokerError::Invalid(error.to_string()))?;
        let _admin = self.inner.admin.lock().await;
        let topic = self.topic(&name)?;
        let revision = match topic.payloads.current() {
            None if rules.is_empty() => {
                let text = format!("topic {name} takes everything already");
                return Err(BrokerError::Invalid(text));
            }
            None => 1,
            Some(current) => {
                let before = Arc::clone(&current.record);
                let next = Arc::clone(&rules);
                let compare = move || (before.rules.is(&next), before.rules.problems_with(&next));
                let (same, problems) = self.beside(compare).await?;
                let revision = current.record.revision;
                if same {
                    return Ok((Arc::clone(&current.record), false));
                }
                if compatibility == Compatibility::Backward && !problems.is_empty() {
                    let problems = Problems(problems);
                    return Err(BrokerError::SchemaIncompatible {
                        topic: name,
                        revision,
                        problems,
                    });
                }
                revision + 1
            }
        };
        self.check_schema_limits(revision, rules.len())?;
        let rules = Arc::unwrap_or_clone(rules);
        let created_at = self.inner.env.now();
        let record = Arc::new(SchemaRecord { revision, rules, compatibility, created_at });
        let change = Change::PutSchema(topic.record.epoch, Arc::clone(&record));
        self.inner.storage.apply(vec![change], Urgency::Now).await?.into_inner();
        topic.payloads.push(Arc::clone(&record), Some(checker));
        Ok((record, true))
    }

    fn check_schema_limits(&self, revision: u32, bytes: usize) -> Result<(), BrokerError> {
        if revision > limits::MAX_SCHEMA_REVISIONS {
            let limit = u64::from(limits::MAX_SCHEMA_REVISIONS);
            return Err(BrokerError::LimitReached { what: "schema revisions of a topic", limit });
        }
        let topics: Vec<_> = self.state().topics.values().cloned().collect();
        let all: usize = topics.iter().map(|topic| topic.payloads.bytes()).sum();
        if all + bytes > limits::MAX_SCHEMAS_BYTES {
            let limit = limits::MAX_SCHEMAS_BYTES as u64;
            return Err(BrokerError::LimitReached { what: "bytes of all schemas", limit });
        }
        Ok(())
    }

    /// A revision of what a topic takes; the present one if none is named. `None` if the topic
    /// takes everything, and always has.
    ///
    /// # Errors
    ///
    /// If there is no such topic or revision.
    pub fn schema(
        &self,
        topic: &TopicName,
        revision: Option<u32>,
    ) -> Result<Option<Arc<SchemaRecord>>, BrokerError> {
        let payloads = &self.topic(topic)?.payloads;
        let Some(number) = revision else {
            return Ok(payloads.current().map(|current| Arc::clone(&current.record)));
        };
        let found = payloads.all().get(&number).map(|found| Arc::clone(&found.record));
        match found {
            Some(record) => Ok(Some(record)),
            None => {
                let text = format!("topic {topic} has no schema revision {number}");
                Err(BrokerError::Invalid(text))
            }
        }
    }

    /// All revisions of what a topic takes, oldest first.
    ///
    /// # Errors
    ///
    /// If there is no such topic.
    pub fn schemas(&self, topic: &TopicName) -> Result<Vec<Arc<SchemaRecord>>, BrokerError> {
        let topic = self.topic(topic)?;
        let all = topic.payloads.all();
        Ok(all.values().map(|revision| Arc::clone(&revision.record)).collect())
    }

    /// How rules, or payloads, would fare.
    ///
    /// # Errors
    ///
    /// If there is no such topic, or the schema cannot be used.
    pub async fn check_schema(
        &self,
        topic: &TopicName,
        rules: Option<PayloadRules>,
        payloads: Vec<bytes::Bytes>,
    ) -> Result<SchemaCheck, BrokerError> {
        let all = self.topic(topic)?.payloads.all().clone();
        self.beside(move || check(&all, rules.as_ref(), &payloads)).await?
    }

    /// Checks each message of a batch by itself.
    pub(super) fn inspect(
        &self,
        topic: &Arc<Topic>,
        mut batch: Batch,
    ) -> BoxFuture<'static, Result<Inspected, BrokerError>> {
        let current = topic.payloads.current();
        let topic = Arc::clone(topic);
        let quick = current.as_ref().is_none_or(|current| current.is_quick(batch.bytes()));
        let delay = u64::try_from(limits::MAX_DELAY.as_millis()).unwrap_or(u64::MAX);
        let bounds = Bounds {
            bytes: topic.config().max_message_bytes,
            not_before: self.inner.env.now().0.saturating_add(delay),
        };
        let inspect = move || {
            let checker = current.as_ref().map(|current| current.checker()).transpose()?;
            let rules = current.as_ref().map(|current| current.record.revision).zip(checker);
            for item in &mut batch.items {
                if let Item::Store(message) = item
                    && let Err(refusal) = topic.inspect(message, rules, bounds)
                {
                    *item = message.refused(refusal);
                }
            }
            Ok(Inspected(batch))
        };
        if quick {
            return std::future::ready(inspect()).boxed();
        }
        let broker = self.clone();
        async move { broker.beside(inspect).await? }.boxed()
    }

    /// Runs what takes long beside the runtime.
    async fn beside<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, BrokerError> {
        let done = self.inner.tasks.spawn_blocking(work).await;
        done.map_err(|_| BrokerError::Unavailable("a schema could not be checked"))
    }
}

/// What holds for each message of a batch.
#[derive(Clone, Copy)]
struct Bounds {
    /// The largest one.
    bytes: u64,
    /// The latest time for which one can wait.
    not_before: u64,
}

impl Topic {
    /// Checks a message, and notes with which schema.
    fn inspect(
        &self,
        message: &mut NewMessage,
        rules: Option<(u32, &Checker)>,
        bounds: Bounds,
    ) -> Result<(), Refusal> {
        let (size, limit) = (message.body.len() as u64, bounds.bytes);
        if size > limit {
            let detail = format!("the message has {size} bytes, and the topic allows {limit}");
            return Err(Refusal::new(RefusalReason::TooLarge, detail).with(Fact::Limit(limit)));
        }
        let not_before = || Label::of(&message.body).not_before();
        if !is_plain(&message.body) && not_before().is_some_and(|due| due.0 > bounds.not_before) {
            let detail = "not_before lies more than 366 days ahead";
            return Err(Refusal::new(RefusalReason::Invalid, detail));
        }
        let Some((revision, checker)) = rules else {
            return Ok(());
        };
        let content = Content::of(&message.body).unwrap_or_default();
        checker
            .check(&content.content_type, &content.payload)
            .map_err(|violation| self.refusal(revision, violation))?;
        let said = !content.content_type.is_empty();
        let content_type = if said { "" } else { checker.content_type() }.to_owned();
        message.body = Stamp { content_type, schema_revision: revision }.on(&message.body);
        Ok(())
    }

    fn refusal(&self, revision: u32, violation: Violation) -> Refusal {
        let name = &self.record.name;
        let detail = format!("topic {name}, schema revision {revision}: {violation}");
        let detail = shortened(detail, limits::MAX_REFUSAL_BYTES);
        let (reason, fact) = match violation {
            Violation::ContentType { expected, .. } => {
                (RefusalReason::ContentType, Fact::Expected(expected))
            }
            Violation::Payload { field, .. } => (RefusalReason::Schema, Fact::Field(field)),
        };
        Refusal::new(reason, detail).with(Fact::SchemaRevision(revision)).with(fact)
    }
}

fn check(
    all: &BTreeMap<u32, Arc<Revision>>,
    rules: Option<&PayloadRules>,
    payloads: &[bytes::Bytes],
) -> Result<SchemaCheck, BrokerError> {
    let current = all.last_key_value().map(|(_, revision)| revision);
    let compiled = rules.map(PayloadRules::compile).transpose();
    let compiled = compiled.map_err(|error| BrokerError::Invalid(error.to_string()))?;
    let before = current.map(|current| &current.record.rules);
    let checker = match (&compiled, current) {
        (Some(checker), _) => Some(checker),
        (None, Some(current)) => Some(current.checker()?),
        (None, None) => None,
    };
    let both = before.zip(rules);
    let is_same =
        |revision: &&Arc<Revision>| rules.is_some_and(|rules| revision.record.rules.is(rules));
    let matching = all.values().rev().find(is_same);
    Ok(SchemaCheck {
        current: current.map_or(0, |current| current.record.revision),
        matching: matching.map_or(0, |revision| revision.record.revision),
        problems: both.map(|(before, rules)| before.problems_with(rules)).unwrap_or_default(),
        publisher_problems: both
            .map(|(before, rules)| rules.problems_with(before))
            .unwrap_or_default(),
        payloads: payloads
            .iter()
            .map(|payload| checker.map_or(Ok(()), |checker| checker.check("", payload)))
            .collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::env::System;
    use crate::record::TopicConfig;
    use crate::storage::memory::Memory;

    fn media(number: u32) -> PayloadRules {
        PayloadRules { content_type: format!("text/{number}"), schema: None }
    }

    #[tokio::test]
    async fn revisions_are_counted_and_bounded() {
        let env = Arc::new(System);
        let broker = Broker::start(Arc::new(Memory::new(Arc::clone(&env) as _)), env).await;
        let broker = broker.unwrap();
        let name = TopicName::parse("t").unwrap();
        let set = async |number| {
            let set = broker.set_schema(name.clone(), media(number), Compatibility::None).await;
            set.map(|(record, created)| (record.revision, created))
        };
        assert_eq!(set(1).await, Err(BrokerError::TopicNotFound(name.clone())));
        broker.create_topic(name.clone(), TopicConfig::default(), false).await.unwrap();
        let nothing = PayloadRules::default();
        let nothing = broker.set_schema(name.clone(), nothing, Compatibility::Backward).await;
        assert_eq!(nothing.unwrap_err().code(), crate::broker::Code::Invalid);
        for number in 1..=limits::MAX_SCHEMA_REVISIONS {
            assert_eq!(set(number).await, Ok((number, true)));
            assert_eq!(set(number).await, Ok((number, false)), "the present one");
        }
        let full = set(0).await.unwrap_err();
        assert_eq!(full.metadata(), [("limit", "schema revisions of a topic".to_owned())]);
        assert_eq!(broker.schemas(&name).unwrap().len(), 100);
        assert_eq!(broker.schema(&name, Some(7)).unwrap().unwrap().rules, media(7));
        assert!(broker.schema(&name, Some(101)).is_err());
    }
}
