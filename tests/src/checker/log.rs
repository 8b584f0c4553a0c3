//! What is really stored, as an auditor found it.

use std::{collections::BTreeMap, sync::Arc};

use super::{Id, Value};
use crate::auditor::Audit;

/// A stored message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What it is; `None` if nobody published these bytes.
    pub value: Option<Value>,
    /// The subscriptions it is for; empty: all of them.
    pub recipients: Vec<String>,
}

/// The messages of one topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    /// The topic.
    pub topic: Arc<str>,
    /// Its incarnation.
    pub epoch: u64,
    /// The first sequence that is still stored; what lies below cannot be judged.
    pub first: u64,
    /// The messages by sequence.
    pub entries: BTreeMap<u64, Entry>,
}

impl Log {
    /// A log of these values, from sequence 1.
    pub fn of(topic: &str, values: impl IntoIterator<Item = Value>) -> Self {
        let entries =
            values.into_iter().map(|value| Entry { value: Some(value), recipients: Vec::new() });
        Self { topic: topic.into(), epoch: 1, first: 1, entries: (1..).zip(entries).collect() }
    }

    /// The id of one of its messages.
    pub fn id(&self, sequence: u64) -> Id {
        Id { topic: self.topic.clone(), epoch: self.epoch, sequence }
    }

    /// Whether an id belongs to this incarnation of the topic.
    pub fn covers(&self, id: &Id) -> bool {
        self.topic == id.topic && self.epoch == id.epoch && self.first <= id.sequence
    }

    /// The sequences, below `end`, that a subscription must see.
    pub fn addressed_to<'a>(
        &'a self,
        subscription: &'a str,
        from: u64,
        end: u64,
    ) -> impl Iterator<Item = u64> + 'a {
        let range = from..end.max(from);
        self.entries
            .range(range)
            .filter(move |(_, entry)| {
                entry.recipients.is_empty()
                    || entry.recipients.iter().any(|name| name == subscription)
            })
            .map(|(sequence, _)| *sequence)
    }
}

impl From<&Audit> for Log {
    fn from(audit: &Audit) -> Self {
        let entries = audit.messages.iter().map(|stored| {
            let message = stored.message.clone().unwrap_or_default();
            let entry =
                Entry { value: Value::of(&message.payload), recipients: message.recipients };
            (stored.sequence, entry)
        });
        Self {
            topic: audit.topic.name.as_str().into(),
            epoch: audit.topic.epoch,
            first: audit.topic.first,
            entries: entries.collect(),
        }
    }
}
