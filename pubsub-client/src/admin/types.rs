//! What administration is about.

use std::time::{Duration, SystemTime};

use super::lag::HeadOfLine;
use crate::message::{MessageId, ReceivedMessage};
use crate::subscriber::{FailurePolicy, Start, SubscriptionKind};

/// What happens when a topic holds as many bytes as it may, and someone is owed all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum WhenFull {
    /// Publishers wait and say so, or are refused with
    /// [`Reason::TopicFull`](crate::Reason::TopicFull). Nothing is lost.
    Reject,
    /// The oldest messages go, and whoever was owed them is told of a [`Gap`](crate::Gap). For
    /// data that is of no use when it is late.
    DropOldest,
}

/// The settings of a topic. What is not set has the server's default, or in
/// [`Admin::update_topic`](crate::Admin::update_topic) stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TopicConfig {
    /// How long messages are kept after every subscription has received them: 7 days by default.
    pub retention: Option<Duration>,
    /// How long messages are kept that some subscription has not received: for ever by default,
    /// which [`Duration::ZERO`] brings back. At least 10 s. Older ones go, and the subscription is
    /// told of a [`Gap`](crate::Gap).
    pub max_age_unacked: Option<Duration>,
    /// How many bytes of messages the topic may hold: 10 GiB by default.
    pub max_bytes: Option<u64>,
    /// What happens then: [`WhenFull::Reject`] by default.
    pub when_full: Option<WhenFull>,
    /// The largest message, in bytes as encoded: 1 MiB by default, at most 16 MiB.
    pub max_message_bytes: Option<u64>,
    /// For how long idempotency keys are remembered: 7 days by default, and at most.
    pub idempotency_window: Option<Duration>,
}

impl TopicConfig {
    /// All defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the [retention](Self::retention).
    #[must_use]
    pub fn with_retention(mut self, retention: Duration) -> Self {
        self.retention = Some(retention);
        self
    }

    /// Sets how long [unacked messages](Self::max_age_unacked) are kept.
    #[must_use]
    pub fn with_max_age_unacked(mut self, age: Duration) -> Self {
        self.max_age_unacked = Some(age);
        self
    }

    /// Sets what happens [when it is full](Self::when_full).
    #[must_use]
    pub fn with_when_full(mut self, when_full: WhenFull) -> Self {
        self.when_full = Some(when_full);
        self
    }

    /// Sets the [bytes that the topic may hold](Self::max_bytes).
    #[must_use]
    pub fn with_max_bytes(mut self, bytes: u64) -> Self {
        self.max_bytes = Some(bytes);
        self
    }

    /// Sets the [largest message](Self::max_message_bytes).
    #[must_use]
    pub fn with_max_message_bytes(mut self, bytes: u64) -> Self {
        self.max_message_bytes = Some(bytes);
        self
    }

    /// Sets the [idempotency window](Self::idempotency_window).
    #[must_use]
    pub fn with_idempotency_window(mut self, window: Duration) -> Self {
        self.idempotency_window = Some(window);
        self
    }
}

/// A topic.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TopicInfo {
    /// Its name.
    pub name: String,
    /// Its incarnation.
    pub epoch: u64,
    /// Its settings, with defaults filled in.
    pub config: TopicConfig,
    /// When it was created.
    pub create_time: SystemTime,
    /// The first message that is still stored; one more than `head` if there is none.
    pub first: u64,
    /// The last message; 0 if there never was one.
    pub head: u64,
    /// The bytes of the messages that are stored.
    pub stored_bytes: u64,
    /// The subscriptions that listen to it.
    pub subscriptions: Vec<String>,
}

/// How to create a subscription.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CreateSubscription {
    /// Names of topics, and patterns in which `*` stands for any characters.
    pub topics: Vec<String>,
    /// How it spreads its messages.
    pub kind: SubscriptionKind,
    /// What becomes of messages that fail; [`FailurePolicy::Block`] if it is not said.
    pub on_failure: Option<FailurePolicy>,
    /// How long a message may be in a handler, 1 s to 24 h; for ever if it is not said.
    pub ack_timeout: Option<Duration>,
    /// After how long without a consumer it is deleted, 10 s or more; never if it is not said.
    pub expires_after: Option<Duration>,
    /// Which messages it is shown, by their attributes, in the language of
    /// [`SubscriberBuilder::filter`](crate::SubscriberBuilder::filter); all if it is not said.
    pub filter: Option<String>,
    /// Where it starts.
    pub start: Start,
    /// Answer with the existing subscription, if its settings are the same.
    pub if_not_exists: bool,
}

impl CreateSubscription {
    /// A subscription to these topics and patterns, from [`Start::Latest`].
    pub fn to(topics: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self { topics: topics.into_iter().map(Into::into).collect(), ..Self::default() }
    }

    /// Sets how it spreads its messages.
    #[must_use]
    pub fn with_kind(mut self, kind: SubscriptionKind) -> Self {
        self.kind = kind;
        self
    }

    /// Sets what becomes of messages that fail.
    #[must_use]
    pub fn with_on_failure(mut self, policy: FailurePolicy) -> Self {
        self.on_failure = Some(policy);
        self
    }

    /// Sets after how long without a consumer it is deleted.
    #[must_use]
    pub fn with_expiry(mut self, after: Duration) -> Self {
        self.expires_after = Some(after);
        self
    }

    /// Sets how long a message may be in a handler before it counts as failed.
    #[must_use]
    pub fn with_ack_timeout(mut self, timeout: Duration) -> Self {
        self.ack_timeout = Some(timeout);
        self
    }

    /// Sets which messages it is shown, in the language of
    /// [`SubscriberBuilder::filter`](crate::SubscriberBuilder::filter).
    #[must_use]
    pub fn with_filter(mut self, filter: impl Into<String>) -> Self {
        self.filter = Some(filter.into());
        self
    }

    /// Sets where it starts.
    #[must_use]
    pub fn with_start(mut self, start: Start) -> Self {
        self.start = start;
        self
    }

    /// Allows the subscription to exist already, if its settings are the same.
    #[must_use]
    pub fn if_not_exists(mut self) -> Self {
        self.if_not_exists = true;
        self
    }
}

/// A change of the topics of a subscription.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct UpdateSubscription {
    /// Names of topics and patterns to be added.
    pub add_topics: Vec<String>,
    /// Names of topics and patterns to be removed, as they were given.
    pub remove_topics: Vec<String>,
    /// Where it starts in topics that it does not listen to yet.
    pub start: Start,
}

impl UpdateSubscription {
    /// Changes nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a topic or pattern.
    #[must_use]
    pub fn add_topic(mut self, topic: impl Into<String>) -> Self {
        self.add_topics.push(topic.into());
        self
    }

    /// Removes a topic or pattern; the position in it is forgotten.
    #[must_use]
    pub fn remove_topic(mut self, topic: impl Into<String>) -> Self {
        self.remove_topics.push(topic.into());
        self
    }

    /// Sets where it starts in topics that it does not listen to yet: [`Start::Latest`] by default.
    #[must_use]
    pub fn with_start(mut self, start: Start) -> Self {
        self.start = start;
        self
    }
}

/// A subscription.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SubscriptionInfo {
    /// Its name.
    pub name: String,
    /// Its incarnation.
    pub epoch: u64,
    /// How it spreads its messages.
    pub kind: SubscriptionKind,
    /// Names of topics and patterns.
    pub topics: Vec<String>,
    /// When it was created.
    pub create_time: SystemTime,
    /// The consumers that are active, or awaited after they were lost. One at most in the kind
    /// [`Exclusive`](SubscriptionKind::Exclusive).
    pub active_consumers: Vec<ActiveConsumer>,
    /// The consumers that stand by.
    pub standby_consumers: Vec<String>,
    /// Its positions.
    pub positions: Vec<SubscriptionPosition>,
    /// What becomes of messages that fail.
    pub on_failure: FailurePolicy,
    /// How long a message may be in a handler; for ever if nothing is said.
    pub ack_timeout: Option<Duration>,
    /// How many dead letters wait to be redriven or purged.
    pub dead_letters: u64,
    /// After how long without a consumer it is deleted; never if nothing is said.
    pub expires_after: Option<Duration>,
    /// Which messages it is shown, by their attributes, as it was written; all if nothing is said.
    pub filter: Option<String>,
}

/// The position of a subscription that is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SnapshotInfo {
    /// Its name.
    pub name: String,
    /// Whose position it is.
    pub subscription: String,
    /// When it was made.
    pub create_time: SystemTime,
    /// How many messages a subscription would have before it that went back to it now. They are
    /// kept as long as the snapshot is there.
    pub backlog: u64,
}

/// A message that a subscription could not process.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct DeadLetter {
    /// The copy in the dead-letter topic, whose id names the dead letter.
    pub id: MessageId,
    /// The message that it is a copy of.
    pub origin: MessageId,
    /// How often it was tried.
    pub attempts: u32,
    /// Why it failed for the last time, as the consumer or the server said.
    pub reason: String,
    /// When it failed for the first time.
    pub first_failure_time: SystemTime,
    /// When it failed for the last time.
    pub last_failure_time: SystemTime,
    /// The copy. Its attributes say all of the above as well, in names that begin with
    /// `dead-letter-`, for whoever subscribes to the dead-letter topic.
    pub message: ReceivedMessage,
}

/// Which dead letters are meant.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeadLetters {
    /// The oldest ones, up to so many; 1,000 at most in one call.
    Oldest(u32),
    /// Those with these sequences in the dead-letter topic; 1,000 at most in one call.
    Sequences(Vec<u64>),
    /// The oldest ones of those that match.
    Matching {
        /// What the attributes of the dead letter have to be, in the language of
        /// [`SubscriberBuilder::filter`](crate::SubscriberBuilder::filter); among them are
        /// `dead-letter-reason` and the like. All match an empty one.
        filter: String,
        /// So many; 1,000 at most in one call.
        most: u32,
    },
}

/// What a call has done with dead letters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Redriven {
    /// How many were sent back.
    pub redriven: u64,
    /// How many of those that were looked at could not be: the subscription listens to no topic of
    /// the name that they come from. They stay.
    pub homeless: u64,
    /// How many dead letters are left.
    pub left: u64,
}

/// What a call has done with dead letters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Purged {
    /// How many were let go.
    pub purged: u64,
    /// How many dead letters are left.
    pub left: u64,
}

/// A consumer that has a place in a subscription.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ActiveConsumer {
    /// Its name.
    pub id: String,
    /// Whether it is connected.
    pub connected: bool,
    /// How many messages are with it.
    pub outstanding: u64,
}

/// The position of a subscription in one topic.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SubscriptionPosition {
    /// The name of the topic.
    pub topic: String,
    /// Its epoch.
    pub epoch: u64,
    /// All messages up to here are received, released, or before the start.
    pub floor: u64,
    /// The last message of the topic.
    pub head: u64,
    /// How many messages after the floor are not acked. Those that the filter leaves out do not
    /// count, a second or so after they were published; those for other recipients count until
    /// delivery has come across them, unless there is a filter.
    pub backlog: u64,
    /// How many of these are with the consumer.
    pub outstanding: u64,
    /// The first message that is not acked.
    pub oldest_unacked: Option<u64>,
    /// Why nothing is delivered although there is something, for people.
    pub waits_for: Option<String>,
    /// How long ago the first message was published that is not acked; nothing if there is none, or
    /// it cannot be read.
    pub oldest_unacked_age: Option<Duration>,
    /// How many of the messages that are not acked have failed at least once.
    pub redelivered: u64,
    /// The first message that is not acked, and what it waits for.
    pub head_of_line: Option<HeadOfLine>,
}

/// Whether a subscription has received a message.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Receipt {
    /// The subscription.
    pub subscription: String,
    /// The answer.
    pub state: ReceiptState,
}

/// Whether a message was received.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ReceiptState {
    /// A consumer acked it.
    Received,
    /// It is still to be delivered or acked.
    Pending,
    /// It was never meant for this subscription: other recipients, left out by its filter, or
    /// before the start.
    NotAddressed,
    /// It was let go without an ack.
    Released {
        /// How: a seek, a purge, a gap, a dead letter, a skip.
        by: String,
    },
    /// It is so old that nothing is known any more.
    Trimmed {
        /// The oldest message that can be answered for.
        oldest_answerable: u64,
    },
}

/// The server.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ServerInfo {
    /// Its version.
    pub version: String,
    /// Its boot: another one after each restart.
    pub boot_id: Vec<u8>,
    /// When it started.
    pub start_time: SystemTime,
    /// The storage engine.
    pub storage: String,
    /// How many topics there are.
    pub topics: u64,
    /// How many subscriptions there are.
    pub subscriptions: u64,
    /// How many connections are open.
    pub connections: u64,
    /// Whether it is SERVING, DRAINING, or REFUSING_WRITES, with the reason.
    pub state: String,
}

/// Some of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Page<T> {
    /// The items.
    pub items: Vec<T>,
    /// Asks for the next page; nothing on the last one.
    pub next: Option<String>,
}

impl<T> Page<T> {
    pub(super) fn new(items: Vec<T>, next: String) -> Self {
        Self { items, next: crate::message::non_empty(next) }
    }
}
