//! How a subscriber is opened.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::Subscriber;
use super::core::Core;
use super::session;
use crate::client::Shared;
use crate::error::SubscribeError;
use crate::limits;
use crate::message::shorten;

/// How a subscription spreads its messages over consumers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum SubscriptionKind {
    /// One active consumer sees each topic in order; others stand by.
    #[default]
    Exclusive,
    /// All consumers are active, and each message goes to one of them: a work queue. There is no
    /// order; what was handed back comes again while others go on.
    Shared,
    /// All consumers are active. Messages of one ordering key go to one consumer at a time, in
    /// order; those without a key as in `Shared`.
    KeyOrdered,
}

/// Where a new subscription, or a reader, starts. It counts at creation only: an existing
/// subscription goes on from where it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Start {
    /// Before the first message that is still stored.
    Earliest,
    /// After the last message: only what is published from now on. Resolved once, so that a
    /// disconnect right afterwards misses nothing.
    #[default]
    Latest,
    /// At this message, which is the first to be delivered. Only with a single topic.
    Sequence(u64),
    /// At the first message stored at or after this time.
    Time(SystemTime),
}

#[derive(Clone, Debug)]
pub(super) struct Settings {
    /// Empty for a reader.
    pub(super) subscription: String,
    pub(super) topics: Vec<String>,
    pub(super) kind: SubscriptionKind,
    pub(super) start: Start,
    pub(super) must_exist: bool,
    pub(super) max_messages: u32,
    pub(super) max_bytes: u64,
    pub(super) consumer: String,
    pub(super) heartbeat: Duration,
    pub(super) max_processing: Duration,
}

impl Settings {
    pub(super) fn is_reader(&self) -> bool {
        self.subscription.is_empty()
    }
}

/// Opens a [`Subscriber`]; made by [`Client::subscriber`](crate::Client::subscriber) or
/// [`Client::reader`](crate::Client::reader).
#[derive(Clone, Debug)]
#[must_use = "nothing happens until it is opened"]
pub struct SubscriberBuilder {
    client: Arc<Shared>,
    settings: Settings,
}

impl SubscriberBuilder {
    pub(crate) fn new(client: Arc<Shared>, subscription: String) -> Self {
        let consumer = default_consumer(&subscription);
        let heartbeat = client.heartbeat;
        let settings = Settings {
            subscription,
            topics: Vec::new(),
            kind: SubscriptionKind::default(),
            start: Start::default(),
            must_exist: false,
            max_messages: limits::OUTSTANDING_MESSAGES,
            max_bytes: limits::OUTSTANDING_BYTES,
            consumer,
            heartbeat,
            max_processing: limits::MAX_PROCESSING,
        };
        Self { client, settings }
    }

    /// Adds a topic, or a pattern in which `*` stands for any characters.
    ///
    /// Without any, those of the existing subscription are meant. With other ones than the
    /// existing subscription has, opening is refused.
    pub fn topic(mut self, topic: impl Into<String>) -> Self {
        self.settings.topics.push(topic.into());
        self
    }

    /// Adds [topics](Self::topic).
    pub fn topics(mut self, topics: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.settings.topics.extend(topics.into_iter().map(Into::into));
        self
    }

    /// Sets how a new subscription spreads its messages; [`SubscriptionKind::Exclusive`] by
    /// default.
    pub fn kind(mut self, kind: SubscriptionKind) -> Self {
        self.settings.kind = kind;
        self
    }

    /// Sets where a new subscription, or a reader, starts; [`Start::Latest`] by default.
    pub fn start(mut self, start: Start) -> Self {
        self.settings.start = start;
        self
    }

    /// Refuses to create the subscription: it must exist.
    pub fn must_exist(mut self) -> Self {
        self.settings.must_exist = true;
        self
    }

    /// Sets how many messages may be unacked in this process, buffered or in the application's
    /// hands: 1,000 by default.
    pub fn max_outstanding_messages(mut self, messages: u32) -> Self {
        self.settings.max_messages = messages.max(1);
        self
    }

    /// Sets how many bytes of messages may be unacked in this process: 32 MiB by default. One
    /// message always may.
    pub fn max_outstanding_bytes(mut self, bytes: u64) -> Self {
        self.settings.max_bytes = bytes.max(1);
        self
    }

    /// Sets the stable name of this consumer, 1 to 128 bytes. By default it is made of the names
    /// of the host and the subscription.
    ///
    /// A consumer that restarts under the same name takes over from its earlier self at once;
    /// one of another name stands by. So replicas on one host need names of their own.
    pub fn consumer_id(mut self, id: impl Into<String>) -> Self {
        self.settings.consumer = id.into();
        self
    }

    /// Asks for a heartbeat interval, 1 s to 60 s; that of the
    /// [client](crate::ClientBuilder::heartbeat) by default.
    pub fn heartbeat(mut self, interval: Duration) -> Self {
        self.settings.heartbeat = interval.clamp(limits::MIN_HEARTBEAT, limits::MAX_HEARTBEAT);
        self
    }

    /// Sets how long the application may hold a message without acking it: 60 min by default;
    /// [`Duration::MAX`] is for ever.
    ///
    /// A message that is held for longer is given up: a warning is logged, and the message is
    /// nacked in the application's stead, which counts as a failed attempt. As after any
    /// [nack](crate::Delivery::nack), it comes again after the server's backoff, before everything
    /// later of its topic. The older delivery can still ack it; whatever else is done with that
    /// one does not count any more. In [`run`](Subscriber::run) the message is not handled again
    /// before its first handler has returned.
    ///
    /// It is looked for with each heartbeat, and so is given up later by one at most; while
    /// disconnected, not before the connection is back. A reader has no acks, and keeps what it
    /// was handed.
    pub fn max_processing(mut self, limit: Duration) -> Self {
        self.settings.max_processing = limit;
        self
    }

    /// Opens it, and waits until the server has taken it in: as the active consumer, or as one
    /// that stands by.
    ///
    /// While the server is away this waits, without limit. If the future is dropped, the
    /// subscriber is stopped.
    ///
    /// # Errors
    ///
    /// The server refuses: there is no such topic, or a subscription of this name exists with
    /// other settings; it starts beyond the last message; there are too many of its kind. Or
    /// something that is no pubsub server has answered for a minute.
    pub async fn open(self) -> Result<Subscriber, SubscribeError> {
        let subscriber = self.open_lazy();
        match subscriber.core.opened().await {
            Some(error) => Err(error),
            None => Ok(subscriber),
        }
    }

    /// Opens it without waiting. What [`open`](Self::open) would fail with comes as the first
    /// item of the stream.
    pub fn open_lazy(self) -> Subscriber {
        let core = Core::new(Arc::clone(&self.client), self.settings);
        self.client.adopt_subscriber(&core, session::run(Arc::clone(&core)));
        Subscriber { core }
    }
}

/// A name that is the same after a restart on the same host.
fn default_consumer(subscription: &str) -> String {
    const MAX_BYTES: usize = 128;
    let mut name = format!("{}/{subscription}", host());
    shorten(&mut name, MAX_BYTES);
    name
}

fn host() -> String {
    let files = ["/proc/sys/kernel/hostname", "/etc/hostname"];
    let read = files.iter().find_map(|file| std::fs::read_to_string(file).ok());
    let name = read.or_else(|| std::env::var("HOSTNAME").ok());
    let name = name.or_else(|| std::env::var("COMPUTERNAME").ok()).unwrap_or_default();
    let name: String = name.trim().chars().filter(|c| !c.is_control()).collect();
    if name.is_empty() { "localhost".to_owned() } else { name }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_consumer_is_stable_and_short() {
        assert_eq!(default_consumer("s"), default_consumer("s"));
        assert!(default_consumer("s").ends_with("/s"));
        assert!(default_consumer(&"ü".repeat(200)).len() <= 128);
    }
}
