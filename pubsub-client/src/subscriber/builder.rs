//! How a subscriber is opened.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::Subscriber;
use super::core::Core;
use super::failure::FailurePolicy;
use super::session;
use crate::client::Shared;
use crate::error::SubscribeError;
use crate::limits;
use crate::message::shorten;

/// How a subscription spreads its messages over consumers.
///
/// It is set when the subscription is created, and does not change. In each kind a message is with
/// one consumer at a time, and comes again until one has acked it. A consumer that is lost for
/// longer than the grace (30 s) loses its messages to the others; what its application still has
/// can be acked nevertheless.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum SubscriptionKind {
    /// One active consumer sees each topic in order; others stand by, and one of them takes over
    /// when it stops or is lost.
    ///
    /// A message that is handed back comes again before everything later of its topic.
    #[default]
    Exclusive,
    /// All consumers are active, and each message goes to one of them: a work queue. More replicas
    /// do more at once.
    ///
    /// There is no order. A message that is handed back comes again later, to any consumer, this
    /// one included, while others go on.
    Shared,
    /// All consumers are active. Messages of one ordering key go to one consumer at a time, in
    /// order; those without a key as in `Shared`. More replicas do more keys at once.
    ///
    /// A message that is handed back comes again before everything later of its key, and takes
    /// what the consumer has of that along: all of it may go to another consumer.
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
    /// Nothing: that of the subscription.
    pub(super) kind: Option<SubscriptionKind>,
    /// Nothing: that of the subscription.
    pub(super) on_failure: Option<FailurePolicy>,
    /// Nothing: that of the subscription.
    pub(super) ack_timeout: Option<Duration>,
    /// Empty: that of the subscription.
    pub(super) filter: String,
    pub(super) start: Start,
    pub(super) must_exist: bool,
    pub(super) max_messages: u32,
    pub(super) max_bytes: u64,
    /// Nothing: a default.
    consumer: Option<String>,
    pub(super) heartbeat: Duration,
    pub(super) max_processing: Duration,
}

impl Settings {
    fn new(subscription: String, heartbeat: Duration) -> Self {
        Self {
            subscription,
            topics: Vec::new(),
            kind: None,
            on_failure: None,
            ack_timeout: None,
            filter: String::new(),
            start: Start::default(),
            must_exist: false,
            max_messages: limits::OUTSTANDING_MESSAGES,
            max_bytes: limits::OUTSTANDING_BYTES,
            consumer: None,
            heartbeat,
            max_processing: limits::MAX_PROCESSING,
        }
    }

    pub(super) fn is_reader(&self) -> bool {
        self.subscription.is_empty()
    }

    /// The name of the consumer. The default is the same after a restart on the same host, where
    /// one consumer is active at a time; where several are, each process gets its own.
    pub(super) fn consumer(&self, instance: &[u8; 16]) -> String {
        const MAX_BYTES: usize = 128;
        if let Some(name) = &self.consumer {
            return name.clone();
        }
        let suffix = match self.kind {
            None | Some(SubscriptionKind::Exclusive) => String::new(),
            Some(SubscriptionKind::Shared | SubscriptionKind::KeyOrdered) => {
                let [a, b, c, d, ..] = *instance;
                format!("/{:08x}", u32::from_be_bytes([a, b, c, d]))
            }
        };
        let mut name = format!("{}/{}", host(), self.subscription);
        shorten(&mut name, MAX_BYTES - suffix.len());
        name + &suffix
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
        let settings = Settings::new(subscription, client.heartbeat);
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

    /// Sets how a new subscription spreads its messages. By default that is what an existing one
    /// does, and [`SubscriptionKind::Exclusive`] for a new one.
    ///
    /// With another kind than the existing subscription has, opening is refused. A reader shares
    /// its messages with nobody, and has none.
    pub fn kind(mut self, kind: SubscriptionKind) -> Self {
        self.settings.kind = Some(kind);
        self
    }

    /// Sets what becomes of messages that fail in a new subscription. By default that is what an
    /// existing one does, and [`FailurePolicy::Block`] for a new one.
    ///
    /// With another policy than the existing subscription has, opening is refused. A reader has no
    /// failures.
    pub fn on_failure(mut self, policy: FailurePolicy) -> Self {
        self.settings.on_failure = Some(policy);
        self
    }

    /// Sets how long a new subscription lets a message be in the application's hands, 1 s to 24 h;
    /// for ever by default.
    ///
    /// The server takes back what is not acked in time: that is a failed attempt, and the message
    /// comes again after the backoff, perhaps to another consumer. The older delivery can still
    /// ack it. With another timeout than an existing subscription has, opening is refused.
    ///
    /// [`max_processing`](Self::max_processing) is the same on this side of the connection, and of
    /// no use to a process that hangs as a whole.
    pub fn ack_timeout(mut self, timeout: Duration) -> Self {
        self.settings.ack_timeout = Some(timeout);
        self
    }

    /// Sets which messages a new subscription, or a reader, is shown, by their attributes; all by
    /// default. Written as in Google Pub/Sub, in at most 1 KiB:
    ///
    /// ```text
    /// attributes:region                          there is an attribute `region`
    /// attributes.region = "eu"                   and it has this value
    /// attributes.region != "eu"                  it has another value, or there is none
    /// hasPrefix(attributes.region, "eu-")        its value begins like this
    /// attributes."odd/name" = "a \"quote\""      names of other than letters, digits, _ and -
    /// (... OR ...) AND NOT ...                   AND beside OR needs parentheses
    /// ```
    ///
    /// What does not match is never delivered, holds nothing up, and is no backlog;
    /// [`Admin::receipts`](crate::Admin::receipts) calls it not addressed. A message that names its
    /// recipients, such as a redriven dead letter, comes to them whatever their filters say.
    ///
    /// A subscription keeps the filter that it was created with: with another one, opening is
    /// refused. Without one, that of an existing subscription holds. A text that is no filter is
    /// refused ([`Reason::InvalidArgument`](crate::Reason::InvalidArgument)) with the column, what
    /// was expected there and what was found.
    pub fn filter(mut self, filter: impl Into<String>) -> Self {
        self.settings.filter = filter.into();
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
    /// hands: 10,000 by default.
    ///
    /// Where several consumers are active, what is buffered here waits for this one while others
    /// may be idle. With slow handlers, about as many as run at once are enough.
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
    /// of the host and the subscription; if a [kind](Self::kind) is asked for in which several
    /// consumers are active, random digits are added that are new for each subscriber.
    ///
    /// A consumer that restarts under the same name takes over from its earlier self at once, and
    /// gets the messages that it had. One of another name stands by, or in the kinds with several
    /// active consumers gets messages of its own; what an earlier self had then comes after the
    /// grace (30 s).
    ///
    /// So replicas on one host need names of their own. By default they have them only if they ask
    /// for the kind: those that open an existing subscription without it have all the same name,
    /// and each supersedes the one before.
    pub fn consumer_id(mut self, id: impl Into<String>) -> Self {
        self.settings.consumer = Some(id.into());
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
    /// [nack](crate::Delivery::nack), it comes again after the server's backoff, in the place that
    /// the [kind](SubscriptionKind) gives it; where several consumers are active, perhaps to
    /// another one. The older delivery can still ack it; whatever else is done with that one does
    /// not count any more. In [`run`](Subscriber::run) the message is not handled again here before
    /// its first handler has returned, unless the subscription does not keep it in order.
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
        let mut settings = Settings::new("s".to_owned(), limits::HEARTBEAT);
        let name = settings.consumer(&[1; 16]);
        assert!(name.ends_with("/s"), "{name}");
        for kind in [None, Some(SubscriptionKind::Exclusive)] {
            settings.kind = kind;
            assert_eq!(settings.consumer(&[2; 16]), name);
        }
        for kind in [SubscriptionKind::Shared, SubscriptionKind::KeyOrdered] {
            settings.kind = Some(kind);
            assert_eq!(settings.consumer(&[0x0a; 16]), format!("{name}/0a0a0a0a"));
            settings.consumer = Some("c".to_owned());
            assert_eq!(settings.consumer(&[0x0a; 16]), "c");
            settings.consumer = None;
        }
        settings.subscription = "ü".repeat(200);
        let long = settings.consumer(&[0xff; 16]);
        assert!(long.len() <= 128 && long.ends_with("/ffffffff"), "{long}");
        settings.kind = None;
        assert!(settings.consumer(&[0xff; 16]).len() <= 128);
    }
}
