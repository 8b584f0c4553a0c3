//! Receiving.

mod ascending;
mod buffer;
mod builder;
mod convert;
mod core;
mod dedup;
mod delivery;
mod failure;
mod lag;
mod nacks;
mod order;
mod resume;
#[cfg(test)]
mod resume_competing_model;
#[cfg(test)]
mod resume_model;
mod run;
mod runs;
mod session;
mod stop;
mod topic;
mod typed;

use std::ops::RangeInclusive;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::Stream;

pub use self::builder::{Start, SubscriberBuilder, SubscriptionKind};
pub(crate) use self::convert::{
    gap_reason as gap_reason_from_wire, kind as kind_to_wire, kind_from_wire,
    policy as policy_to_wire, policy_from_wire, start as start_to_wire,
};
pub(crate) use self::core::Core;
pub use self::delivery::{Acker, Delivery, Nack};
pub use self::failure::FailurePolicy;
pub use self::lag::{Lag, TopicLag};
pub use self::stop::{Drain, StopReport, Stopper};
pub use self::typed::{TypedDelivery, TypedEvent, TypedSubscriber};
use crate::error::SubscribeError;
use crate::message::MessageId;
use crate::state::StateWatch;

/// A consumer of a subscription, or a reader: a stream of messages.
///
/// Made by [`Client::subscriber`](crate::Client::subscriber) or
/// [`Client::reader`](crate::Client::reader).
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let server = pubsub_server::Server::start(pubsub_server::Config::in_memory()).await?;
/// # let client = pubsub_client::Client::connect(server.url()).await?;
/// # client.admin().create_topic("orders", Default::default()).await?;
/// # client.publisher("orders").open().await?.publish("an order").await?;
/// use std::time::Duration;
/// use pubsub_client::{Drain, Event, Start};
///
/// let mut subscriber = client
///     .subscriber("billing")
///     .topic("orders")
///     .start(Start::Earliest)
///     .open()
///     .await?;
/// while let Some(event) = subscriber.next().await {
///     match event? {
///         Event::Message(delivery) => {
///             println!("{}: {:?}", delivery.id, delivery.payload);
///             delivery.ack();
///         }
///         Event::Gap(gap) => eprintln!("messages {:?} will never come", gap.range),
///         _ => {}
///     }
/// #   break;
/// }
/// let report = subscriber.stopper().stop(Drain::Finish, Duration::from_secs(5)).await;
/// assert!(report.is_clean());
/// # Ok(())
/// # }
/// ```
///
/// A disconnect or a server restart does not show in the stream: the subscriber reconnects, and
/// goes on with exactly the messages that the application has not seen. Deliveries handed out
/// before stay valid. The [state](Self::state) tells.
///
/// The topics take turns. What comes in order, and to whom, is up to the
/// [kind](SubscriptionKind) of the subscription:
///
/// * `Exclusive`: each topic comes in the order of its log, to one consumer; while another one is
///   active, nothing is handed out. Replicas stand by.
/// * `Shared`: each message goes to one of the consumers, in no order. Replicas share the work.
/// * `KeyOrdered`: the messages of one ordering key are with one consumer at a time and come in
///   order; those without a key as in `Shared`.
///
/// Nothing is handed out after the connection has been lost for longer than the server reserves
/// messages for this consumer (30 s): then another may have them. What of these was not handed out
/// is dropped when the connection is back.
///
/// When the subscriber is dropped it hands back what the application has not seen, and lives on
/// in the background until the deliveries it has handed out are settled and their acks confirmed,
/// for 30 s at most. Use [`stopper`](Self::stopper) to wait for that.
#[derive(Debug)]
pub struct Subscriber {
    core: Arc<Core>,
}

impl Subscriber {
    /// The next message or event. Cancel-safe. Nothing once the subscriber is stopped, or after
    /// a terminal error.
    pub async fn next(&mut self) -> Option<Result<Event, SubscribeError>> {
        std::future::poll_fn(|context| self.core.poll(context, |_, _| true)).await
    }

    /// As [`next`](Self::next), for many at once: waits until there is something, and adds what there
    /// is to `events`, up to `limit`. Answers how many that is: never zero, unless `limit` is.
    ///
    /// With [`Delivery::ack_all`] it costs a fraction of what one at a time does. What is added is
    /// with the application, and is acked, nacked or dropped as any other. The time of all of it
    /// begins now, so that a batch has to be done within
    /// [`max_processing`](crate::SubscriberBuilder::max_processing).
    ///
    /// Cancel-safe: if the future is dropped, nothing was added.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let server = pubsub_server::Server::start(pubsub_server::Config::in_memory()).await?;
    /// # let client = pubsub_client::Client::connect(server.url()).await?;
    /// # client.admin().create_topic("orders", Default::default()).await?;
    /// # client.publisher("orders").open().await?.publish("an order").await?;
    /// # let builder = client.subscriber("billing").topic("orders");
    /// # let mut subscriber = builder.start(pubsub_client::Start::Earliest).open().await?;
    /// use pubsub_client::{Delivery, Event};
    ///
    /// let mut events = Vec::new();
    /// while let Some(added) = subscriber.next_many(&mut events, 500).await {
    ///     println!("{} events", added?);
    ///     let orders: Vec<_> = events.drain(..).filter_map(Event::into_message).collect();
    ///     // store all of them in one transaction, and then
    ///     Delivery::ack_all(orders);
    /// #   break;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn next_many(
        &mut self,
        events: &mut Vec<Event>,
        limit: usize,
    ) -> Option<Result<usize, SubscribeError>> {
        if limit == 0 {
            return Some(Ok(0));
        }
        std::future::poll_fn(|context| self.core.poll_many(context, events, limit)).await
    }

    /// A subscriber whose payloads are decoded.
    pub fn typed<T, C>(self, codec: C) -> TypedSubscriber<T, C> {
        TypedSubscriber::new(self, codec)
    }

    /// Stops this subscriber, from anywhere.
    pub fn stopper(&self) -> Stopper {
        Stopper::new(Arc::clone(&self.core))
    }

    /// The state of its connection.
    pub fn state(&self) -> StateWatch {
        self.core.state.watch()
    }

    /// Where it is in each topic.
    pub fn position(&self) -> Position {
        self.core.position()
    }

    /// Its name, and its position as long as anyone asks: for an inbox.
    pub(crate) fn observe(&self) -> (String, impl Fn() -> Position + Send + Sync + use<>) {
        let core = Arc::clone(&self.core);
        (core.settings.subscription.clone(), move || core.position())
    }

    /// Waits until the application was handed everything that was published until now, as far as
    /// the server has told: it tells with each message and heartbeat. Also returns when the
    /// subscriber ends.
    ///
    /// Where several consumers are active, what is with others is not waited for, nor what was
    /// handed back and may come here again; and only heartbeats tell.
    pub async fn caught_up(&self) {
        self.core.wait_until(|core| core.position().caught_up || core.has_ended()).await;
    }
}

impl Stream for Subscriber {
    type Item = Result<Event, SubscribeError>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.core.poll(context, |_, _| true)
    }
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        /// A handler that takes longer than this after its subscriber is gone is shown its
        /// message again elsewhere.
        const LINGER: Duration = Duration::from_secs(30);
        self.core.request_stop(Drain::Finish, LINGER);
    }
}

/// What a subscriber yields.
#[derive(Debug)]
#[non_exhaustive]
#[expect(clippy::large_enum_variant, reason = "nearly all of them are messages")]
pub enum Event {
    /// A message.
    Message(Delivery),
    /// Messages that this subscription will never receive, told in the place where they would
    /// have come; at once where the topic has no order.
    Gap(Gap),
    /// What the server has stored of a topic is damaged, and nothing comes from there on until
    /// an operator moves the subscription past it. Other topics go on.
    DataLoss(DataLoss),
}

impl Event {
    /// The message, if it is one.
    pub fn into_message(self) -> Option<Delivery> {
        match self {
            Self::Message(delivery) => Some(delivery),
            Self::Gap(_) | Self::DataLoss(_) => None,
        }
    }
}

/// A message failed its checksum on the server, and its topic waits before it.
///
/// Told once in the life of a subscriber, unless the topic can be read again meanwhile. What ends
/// it is a seek of the subscription to a message after this one, as
/// `pubsub subscription seek NAME --topic TOPIC --to SEQUENCE` does, or a server whose data was
/// restored.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DataLoss {
    /// The first message that cannot be read.
    pub id: MessageId,
}

/// Messages that a subscription will never receive.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Gap {
    /// The topic.
    pub topic: Arc<str>,
    /// The epoch of the topic.
    pub epoch: u64,
    /// The messages.
    pub range: RangeInclusive<u64>,
    /// Why.
    pub reason: GapReason,
}

/// Why messages will never be received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GapReason {
    /// Retention removed them.
    Retention,
    /// Their topic was deleted.
    TopicDeleted,
    /// They failed their checksum, and an operator let them go.
    DataLoss,
    /// An operator purged them.
    Purged,
    /// A reason that this version of the client does not know.
    Other,
}

/// Where a subscriber is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Position {
    /// Where it is in each topic.
    pub topics: Vec<TopicPosition>,
    /// Whether it has handed out everything that it knows of.
    pub caught_up: bool,
}

/// Where a subscriber is in a topic.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TopicPosition {
    /// The topic.
    pub topic: Arc<str>,
    /// Its epoch.
    pub epoch: u64,
    /// The message that was handed out last; 0 if none was.
    pub last_delivered: u64,
    /// All messages up to here are known to be received or released, by whichever consumer.
    pub acked_floor: u64,
    /// The last message of the topic that is known of.
    pub head: u64,
    /// Whether everything up to `head` was handed out, or is with other consumers.
    pub caught_up: bool,
    /// How many messages up to `head` are not known to be received or released; of a reader, how
    /// many were not handed out.
    pub behind: u64,
    /// How many messages wait here to be handed out.
    pub buffered: u64,
    /// How many messages the application holds.
    pub in_hand: u64,
}
