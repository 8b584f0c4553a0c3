//! What the server stores: messages, topics, subscriptions and their positions.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use rangemap::{RangeInclusiveMap, RangeInclusiveSet};
use serde::{Deserialize, Serialize};

use crate::body::Body;
use crate::filter::Filter;
use crate::limits;
use crate::names::{ConsumerId, SubscriptionName, TopicName, TopicPattern};

/// A set of message sequences.
pub type Sequences = RangeInclusiveSet<u64>;

/// Milliseconds since 1970 by the server's clock, which never goes back.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Timestamp(pub u64);

impl Timestamp {
    /// The time that has passed since `earlier`; zero if it lies ahead.
    pub fn since(self, earlier: Timestamp) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

/// One incarnation of a topic or subscription: a random number other than 0, so that deleting
/// and recreating a name, even on a fresh disk, never brings an old id back.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Epoch(pub u64);

impl fmt::Debug for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// A random identity: of a publisher, of a boot, of a consumer's process.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Uuid(pub [u8; 16]);

impl fmt::Debug for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

/// A message as it waits to be stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewMessage {
    /// The encoded message; the storage does not look inside.
    pub body: Bytes,
    /// The subscriptions it is for; empty for all.
    pub recipients: Vec<SubscriptionName>,
    /// The application's identity for it.
    pub key: Option<IdempotencyKey>,
}

/// An idempotency key, as hashes: fixed size on disk, and nothing of the application's in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IdempotencyKey {
    /// Hash of the key.
    pub key: [u8; 16],
    /// Hash of what is published under it. The same key with another hash is a conflict.
    pub content: [u8; 32],
}

/// A message as stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredMessage {
    /// Its place in the topic, from 1.
    pub sequence: u64,
    /// When it was stored. Never decreases along a topic.
    pub published_at: Timestamp,
    /// The subscriptions it is for; empty for all.
    pub recipients: Vec<SubscriptionName>,
    /// The encoded message.
    pub body: Body,
}

impl StoredMessage {
    /// Whether it is for this subscription.
    pub fn is_for(&self, subscription: &SubscriptionName) -> bool {
        self.recipients.is_empty() || self.recipients.contains(subscription)
    }
}

/// A topic as stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopicRecord {
    /// Its name.
    pub name: TopicName,
    /// Its incarnation, which keys everything that belongs to it.
    pub epoch: Epoch,
    /// Its settings.
    pub config: TopicConfig,
    /// When it was created.
    pub created_at: Timestamp,
    /// Messages below were purged by an operator, if they were still there.
    pub purged: u64,
}

/// The settings of a topic.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopicConfig {
    /// How long messages are kept after every subscription has received them.
    pub retention: Duration,
    /// How long messages are kept that some subscription has not received; for ever if `None`.
    pub max_age_unacked: Option<Duration>,
    /// How many bytes it may hold.
    pub max_bytes: u64,
    /// What happens then.
    pub when_full: WhenFull,
    /// The largest message, as encoded.
    pub max_message_bytes: u64,
    /// How long idempotency keys are remembered.
    pub idempotency_window: Duration,
}

/// What happens when a topic holds as many bytes as it may, and someone is owed all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WhenFull {
    /// Publishes wait, or are refused.
    Reject,
    /// The oldest messages go, and whoever was owed them is told of a gap.
    DropOldest,
}

impl Default for TopicConfig {
    fn default() -> Self {
        Self {
            retention: limits::RETENTION,
            max_age_unacked: None,
            when_full: WhenFull::Reject,
            max_bytes: limits::DEFAULT_TOPIC_BYTES,
            max_message_bytes: limits::DEFAULT_MESSAGE_BYTES,
            idempotency_window: limits::IDEMPOTENCY_WINDOW,
        }
    }
}

/// A subscription as stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SubscriptionRecord {
    /// Its name.
    pub name: SubscriptionName,
    /// Its incarnation, which keys its cursors.
    pub epoch: Epoch,
    /// How it spreads its messages.
    pub kind: SubscriptionKind,
    /// What becomes of messages that fail.
    pub on_failure: FailurePolicy,
    /// How long a message may be in a handler before it counts as failed; for ever if `None`.
    pub ack_timeout: Option<Duration>,
    /// Which messages it is shown; all if `None`.
    pub filter: Option<Filter>,
    /// After how long without a consumer it is deleted; never if `None`.
    pub expires_after: Option<Duration>,
    /// When it was known to be in use last.
    pub used_at: Timestamp,
    /// What it listens to.
    pub topics: Vec<TopicPattern>,
    /// When it was created.
    pub created_at: Timestamp,
    /// The consumers that were active last and have not said goodbye: they have their grace after
    /// a restart of the server. One at most if it is exclusive.
    pub consumers: Vec<ConsumerRecord>,
    /// Of which subscription it is a snapshot: then it has positions, and nobody consumes.
    pub snapshot_of: Option<SubscriptionName>,
}

/// How a subscription spreads its messages over consumers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SubscriptionKind {
    /// One active consumer sees each topic in order; others stand by.
    Exclusive,
    /// Each message goes to one of several consumers, in no order.
    Shared,
    /// Each message goes to one of several consumers; those of one ordering key to one at a time,
    /// in order.
    KeyOrdered,
}

impl fmt::Display for SubscriptionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Exclusive => "exclusive",
            Self::Shared => "shared",
            Self::KeyOrdered => "key-ordered",
        })
    }
}

/// What becomes of a message that fails again and again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailurePolicy {
    /// It is shown again until it is acked.
    #[default]
    Block,
    /// A copy goes to another topic, and the subscription lets it go, in one step.
    DeadLetter {
        /// The other topic.
        topic: TopicName,
        /// How often it is shown before.
        max_attempts: u32,
    },
    /// The subscription lets it go.
    Skip {
        /// How often it is shown before.
        max_attempts: u32,
    },
}

impl FailurePolicy {
    /// How often a message is shown, if there is an end to it.
    pub fn max_attempts(&self) -> Option<u32> {
        match self {
            Self::Block => None,
            Self::DeadLetter { max_attempts, .. } | Self::Skip { max_attempts } => {
                Some(*max_attempts)
            }
        }
    }

    /// The dead-letter topic, if there is one.
    pub fn dead_letter_topic(&self) -> Option<&TopicName> {
        match self {
            Self::DeadLetter { topic, .. } => Some(topic),
            Self::Block | Self::Skip { .. } => None,
        }
    }
}

impl fmt::Display for FailurePolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Block => f.write_str("block"),
            Self::DeadLetter { topic, max_attempts } => {
                write!(f, "dead letter to {topic} after {max_attempts} attempts")
            }
            Self::Skip { max_attempts } => write!(f, "skip after {max_attempts} attempts"),
        }
    }
}

/// One connection of a consumer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsumerRecord {
    /// Its stable name.
    pub id: ConsumerId,
    /// Its process.
    pub instance: Uuid,
    /// The number of the connection within that process.
    pub attach: u64,
}

/// The position of a subscription in a topic.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CursorRecord {
    /// All messages up to here are received, released, or before the start.
    pub floor: u64,
    /// Beyond the floor: what the floor will pass, because it is acked or not for this
    /// subscription.
    pub done: Sequences,
    /// Received for good, over the whole life of the subscription: what receipts answer from.
    pub received: Sequences,
    /// Let go without an ack, and how.
    pub released: RangeInclusiveMap<u64, Release>,
    /// Messages up to here were there before the subscription.
    pub start: u64,
    /// Receipts are known for messages beyond here only.
    pub receipts_from: u64,
    /// Raised by every seek.
    pub generation: u64,
    /// What has failed and is not done.
    pub failures: BTreeMap<u64, Failure>,
}

/// How a message has failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// How often.
    pub count: u32,
    /// When for the first time.
    pub first_at: Timestamp,
    /// Whether it was in a handler of a consumer that was lost: it may be what killed it.
    pub suspect: bool,
    /// How it failed for the last time, if it is to be let go.
    pub verdict: Option<Verdict>,
}

/// The last failure of a message that is to be let go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// When.
    pub at: Timestamp,
    /// Why, for people.
    pub reason: String,
}

/// What a subscription has not dealt with of a topic that was deleted: it has to be told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Departed {
    /// The name that the topic had.
    pub name: TopicName,
    /// Its incarnation.
    pub epoch: Epoch,
    /// Its last message.
    pub head: u64,
    /// The position of the subscription in it.
    pub cursor: CursorRecord,
}

/// How a message was let go without an ack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Release {
    /// A seek passed it.
    Seek,
    /// It was lost to retention, a purge or damage, and the subscription was told.
    Gap,
    /// It failed too often, and a copy went to the dead-letter topic.
    DeadLetter,
    /// It failed too often, and was skipped.
    Skip,
}
