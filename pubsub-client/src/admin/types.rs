//! What administration is about.

use std::time::{Duration, SystemTime};

use crate::subscriber::{Start, SubscriptionKind};

/// The settings of a topic. What is not set has the server's default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TopicConfig {
    /// How long messages are kept after every subscription has received them: 7 days by default.
    pub retention: Option<Duration>,
    /// How many bytes of messages the topic may hold: 10 GiB by default.
    pub max_bytes: Option<u64>,
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
    /// How many messages after the floor are not acked.
    pub backlog: u64,
    /// How many of these are with the consumer.
    pub outstanding: u64,
    /// The first message that is not acked.
    pub oldest_unacked: Option<u64>,
    /// Why nothing is delivered although there is something, for people.
    pub waits_for: Option<String>,
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
    /// It was never meant for this subscription: other recipients, or before the start.
    NotAddressed,
    /// It was let go without an ack.
    Released {
        /// How: a seek, a purge, a gap.
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
