//! Publishing.

mod batch;
mod core;
mod entry;
mod fates;
mod schema;
mod session;
mod ticket;
mod typed;
mod window;
#[cfg(test)]
mod window_tests;

use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout_at;

pub use self::batch::{Batch, BatchTicket};
pub(crate) use self::core::Core;
use self::schema::Written;
pub use self::ticket::{Permit, PublishReceipt, PublishTicket};
pub use self::typed::{TypedPublishError, TypedPublisher};
use crate::admin::Schema;
use crate::client::Shared;
use crate::error::{CloseError, EnqueueError, FlushError, PublishError};
use crate::limits;
use crate::message::Message;
use crate::state::{ConnectionState, StateWatch};

/// Publishes messages to one topic, in the order of the calls. Cheap to clone; the clones share
/// one order and one window.
///
/// Made by [`Client::publisher`](crate::Client::publisher).
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let server = pubsub_server::Server::start(pubsub_server::Config::in_memory()).await?;
/// # let client = pubsub_client::Client::connect(server.url()).await?;
/// # client.admin().create_topic("orders", Default::default()).await?;
/// use std::time::Duration;
/// use pubsub_client::Message;
///
/// let publisher = client.publisher("orders").open().await?;
///
/// // One message, until it is on the server's disk:
/// publisher.publish("first").await?;
///
/// // Many, pipelined, in this order; a ticket tells the fate of each:
/// let second = publisher.enqueue("second").await?;
/// let third = Message::new("third").with_idempotency_key("order-3");
/// let third = publisher.enqueue(third).await?;
/// assert_eq!(second.await?.id.sequence, 2);
/// assert_eq!(third.await?.id.sequence, 3);
///
/// publisher.close(Duration::from_secs(5)).await?;
/// # Ok(())
/// # }
/// ```
///
/// Nothing fails merely because the server is away, restarts, or is full: messages wait in the
/// window, and when that is full, callers wait. After a reconnect everything without an answer
/// is sent again, in order; the server stores each message once. The [state](Self::state) tells
/// what is going on, and a [deadline](Message::deadline) limits the wait. Only something that is
/// no pubsub server ([`ForeignAnswer`](crate::ForeignAnswer)) fails the publisher, if it has denied
/// each attempt to reconnect for a minute.
///
/// When the last handle is dropped, what is in the window is still sent, in the background, for
/// 30 s at most. Use [`close`](Self::close) or [`Client::shutdown`](crate::Client::shutdown) to
/// wait for that.
#[derive(Clone, Debug)]
pub struct Publisher {
    handle: Arc<Handle>,
}

impl Publisher {
    /// Publishes a message and waits until it is on the server's disk.
    ///
    /// To publish many, [`enqueue`](Self::enqueue) them: waiting for each before the next costs
    /// a round trip and a disk sync each.
    ///
    /// # Errors
    ///
    /// The message was refused, its deadline passed, or the publisher has failed or was closed.
    /// [`PublishError::outcome`] says whether the message may be stored all the same.
    pub async fn publish(
        &self,
        message: impl Into<Message>,
    ) -> Result<PublishReceipt, PublishError> {
        self.enqueue(message).await?.await
    }

    /// Messages that are stored all together, one after another, or not at all: at most 1,000
    /// with 4 MiB as encoded. They keep their place in the order of the calls.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let server = pubsub_server::Server::start(pubsub_server::Config::in_memory()).await?;
    /// # let client = pubsub_client::Client::connect(server.url()).await?;
    /// # client.admin().create_topic("account-7", Default::default()).await?;
    /// let publisher = client.publisher("account-7").open().await?;
    /// let receipts = publisher.publish_batch(["opened", "paid in"]).expect_head(0).await?;
    /// assert_eq!(receipts[1].id.sequence, 2);
    ///
    /// // Somebody who has not seen these does not add to them.
    /// let error = publisher.publish_batch(["paid out"]).expect_head(0).await.unwrap_err();
    /// assert_eq!(error.actual_head(), Some(2));
    /// # Ok(())
    /// # }
    /// ```
    pub fn publish_batch(
        &self,
        messages: impl IntoIterator<Item = impl Into<Message>>,
    ) -> Batch<'_> {
        Batch::new(&self.handle.core, messages.into_iter().map(Into::into).collect())
    }

    /// Puts a message into the window, waiting for room, and returns a ticket for its fate.
    ///
    /// Messages are stored in the order in which this is called. If the future is dropped, the
    /// message is either enqueued or gone; [`reserve`](Self::reserve) avoids that.
    ///
    /// # Errors
    ///
    /// The message is too large, its deadline passed before there was room, or the publisher has
    /// failed or was closed. The message is handed back in the error.
    pub async fn enqueue(
        &self,
        message: impl Into<Message>,
    ) -> Result<PublishTicket, EnqueueError> {
        let core = &self.handle.core;
        let checked = core.check(message.into())?;
        if let Some(place) = core.try_admit(checked.size) {
            return core.push(checked, place);
        }
        let admit = core.admit(checked.size);
        let admitted = match checked.deadline {
            Some(deadline) => timeout_at(deadline, admit).await,
            None => Ok(admit.await),
        };
        match admitted {
            Ok(Ok(place)) => core.push(checked, place),
            Ok(Err(_)) => Err(core.closed(Some(checked))),
            Err(_) => {
                Err(EnqueueError::DeadlineElapsed { message: Box::new(checked.into_message()) })
            }
        }
    }

    /// Puts a message into the window if there is room.
    ///
    /// # Errors
    ///
    /// There is no room, the server cannot take messages for now, the message is too large, or
    /// the publisher has failed or was closed. The message is handed back in the error.
    pub fn try_enqueue(&self, message: impl Into<Message>) -> Result<PublishTicket, EnqueueError> {
        let core = &self.handle.core;
        let checked = core.check(message.into())?;
        if let ConnectionState::Blocked { reason, detail } = core.state.get() {
            let message = Box::new(checked.into_message());
            return Err(EnqueueError::Blocked { reason, detail, message });
        }
        match core.try_admit(checked.size) {
            Some(place) => core.push(checked, place),
            None if core.is_closed() => Err(core.closed(Some(checked))),
            None => Err(EnqueueError::Full { message: Box::new(checked.into_message()) }),
        }
    }

    /// Waits for room for a message of up to `bytes` bytes as encoded: payload, attributes, keys
    /// and a few bytes for each of these.
    ///
    /// Cancel-safe: for `select!`, where losing a message with a cancelled
    /// [`enqueue`](Self::enqueue) would not do.
    ///
    /// ```
    /// # async fn example(publisher: pubsub_client::Publisher) -> Result<(), Box<dyn std::error::Error>> {
    /// let permit = publisher.reserve(1024).await?;
    /// let ticket = permit.enqueue("a message of up to 1 KiB")?;
    /// ticket.await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// The publisher has failed or was closed.
    pub async fn reserve(&self, bytes: usize) -> Result<Permit<'_>, EnqueueError> {
        let core = &self.handle.core;
        let place = core.admit(bytes).await?;
        Ok(Permit::new(core, place, bytes))
    }

    /// Waits until the fate of all messages enqueued before is known, and reports the failures
    /// that nobody has seen: of messages whose [tickets](PublishTicket) were dropped, since the
    /// last flush. Where a ticket is still held when its message fails, it alone tells.
    ///
    /// # Errors
    ///
    /// Messages have failed, or the publisher had failed or was closed before this call.
    pub async fn flush(&self) -> Result<(), FlushError> {
        self.handle.core.flush().await
    }

    /// Takes no more messages, on this handle and its clones, and waits until the fate of all is
    /// known, at most for `within`.
    ///
    /// # Errors
    ///
    /// Some messages are unresolved. The error has them, and says of each whether it was sent.
    pub async fn close(self, within: Duration) -> Result<(), CloseError> {
        let unresolved = self.handle.core.close(within).await;
        if unresolved.is_empty() { Ok(()) } else { Err(CloseError { unresolved }) }
    }

    /// A publisher of values, encoded by a codec.
    ///
    /// ```
    /// # #[cfg(feature = "json")]
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let server = pubsub_server::Server::start(pubsub_server::Config::in_memory()).await?;
    /// # let client = pubsub_client::Client::connect(server.url()).await?;
    /// # client.admin().create_topic("orders", Default::default()).await?;
    /// use pubsub_client::{Json, Start};
    ///
    /// #[derive(serde::Serialize, serde::Deserialize)]
    /// struct Order {
    ///     total: u32,
    /// }
    ///
    /// let orders = client.publisher("orders").open().await?.typed::<Order, _>(Json);
    /// orders.publish(&Order { total: 12 }).await?;
    ///
    /// let reader = client.reader(["orders"]).start(Start::Earliest).open().await?;
    /// let mut reader = reader.typed::<Order, _>(Json);
    /// let event = reader.next().await.expect("a reader does not end")?;
    /// let order = event.into_message().expect("there are no gaps here");
    /// assert_eq!(order.payload.total, 12);
    /// # Ok(())
    /// # }
    /// # #[cfg(not(feature = "json"))]
    /// # fn main() {}
    /// ```
    pub fn typed<T, C>(&self, codec: C) -> TypedPublisher<T, C> {
        TypedPublisher::new(self.clone(), codec)
    }

    /// The state of its connection.
    pub fn state(&self) -> StateWatch {
        self.handle.core.state.watch()
    }

    /// The topic.
    pub fn topic(&self) -> &str {
        self.handle.core.topic()
    }

    /// Waits until the server has taken it in.
    #[cfg(feature = "outbox")]
    pub(crate) async fn ready(&self) -> Result<(), PublishError> {
        self.handle.core.ready().await
    }

    /// For how long the server remembers an idempotency key, by its last welcome.
    #[cfg(feature = "outbox")]
    pub(crate) fn idempotency_window(&self) -> Duration {
        self.handle.core.idempotency_window()
    }
}

/// Shared by the clones of a publisher, so that the last one can be noticed.
#[derive(Debug)]
struct Handle {
    core: Arc<Core>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        /// As long as a server may take to come back after a restart, and a little more.
        const LINGER: Duration = Duration::from_secs(30);
        self.core.start_closing(LINGER);
    }
}

/// What to do when a topic turns out to have been deleted and created again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnRecreated {
    /// The publisher fails: the new topic may be meant for something else.
    #[default]
    Fail,
    /// It goes on with the new topic, and waits for it while there is none. What was sent and not
    /// answered is [unknown](crate::Outcome::Unknown).
    Continue,
}

#[derive(Clone, Debug)]
struct Settings {
    topic: Arc<str>,
    window_messages: usize,
    window_bytes: usize,
    batch_messages: usize,
    batch_bytes: usize,
    linger: Duration,
    on_recreated: OnRecreated,
    /// It fails where it would go on with what comes after a message whose fate is unknown.
    stop_at_loss: bool,
    heartbeat: Duration,
}

/// Opens a [`Publisher`]; made by [`Client::publisher`](crate::Client::publisher).
#[derive(Clone, Debug)]
#[must_use = "nothing happens until it is opened"]
pub struct PublisherBuilder {
    client: Arc<Shared>,
    settings: Settings,
    written: Option<Written>,
}

impl PublisherBuilder {
    pub(crate) fn new(client: Arc<Shared>, topic: String) -> Self {
        let settings = Settings {
            topic: topic.into(),
            window_messages: limits::WINDOW_MESSAGES,
            window_bytes: limits::WINDOW_BYTES,
            batch_messages: limits::BATCH_MESSAGES,
            batch_bytes: limits::BATCH_BYTES,
            linger: Duration::ZERO,
            on_recreated: OnRecreated::default(),
            stop_at_loss: false,
            heartbeat: client.heartbeat,
        };
        Self { client, settings, written: None }
    }

    /// Sets how many messages may wait for their fate: 20,000 by default.
    pub fn window_messages(mut self, messages: usize) -> Self {
        self.settings.window_messages = messages.clamp(1, 1_000_000);
        self
    }

    /// Sets how many bytes of messages may wait for their fate: 8 MiB by default, at most 1 GiB.
    /// A message larger than that is admitted alone, when the window is empty.
    pub fn window_bytes(mut self, bytes: usize) -> Self {
        self.settings.window_bytes = bytes.clamp(1, 1 << 30);
        self
    }

    /// Sets how many messages go out together: up to 512, the default.
    pub fn batch_messages(mut self, messages: usize) -> Self {
        self.settings.batch_messages = messages.clamp(1, limits::BATCH_MESSAGES);
        self
    }

    /// Sets how many bytes of messages go out together: up to 256 KiB, the default. One message
    /// always can.
    pub fn batch_bytes(mut self, bytes: usize) -> Self {
        self.settings.batch_bytes = bytes.clamp(1, limits::BATCH_BYTES);
        self
    }

    /// Sets how long a message waits for company: not at all by default. Messages that are
    /// enqueued while others are being sent go out together anyway.
    pub fn linger(mut self, linger: Duration) -> Self {
        self.settings.linger = linger;
        self
    }

    /// Sets what to do when the topic turns out to have been deleted and created again:
    /// [`OnRecreated::Fail`] by default.
    pub fn on_recreated(mut self, choice: OnRecreated) -> Self {
        self.settings.on_recreated = choice;
        self
    }

    /// Fails the publisher when the fate of a message is lost: what comes after it must not
    /// overtake it.
    #[cfg(feature = "outbox")]
    pub(crate) fn stop_at_loss(mut self) -> Self {
        self.settings.stop_at_loss = true;
        self
    }

    /// Asks for a heartbeat interval, 1 s to 60 s; that of the
    /// [client](crate::ClientBuilder::heartbeat) by default.
    pub fn heartbeat(mut self, interval: Duration) -> Self {
        self.settings.heartbeat = interval.clamp(limits::MIN_HEARTBEAT, limits::MAX_HEARTBEAT);
        self
    }

    /// Names the schema that this publisher was written for: [`open`](Self::open) fails unless the
    /// topic's present schema takes everything that this one does.
    ///
    /// What is published is checked by the server, with the topic's schema, in any case. This
    /// tells at the start what would show with the first message that does not fit.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let server = pubsub_server::Server::start(pubsub_server::Config::in_memory()).await?;
    /// # let client = pubsub_client::Client::connect(server.url()).await?;
    /// # client.admin().create_topic("orders", Default::default()).await?;
    /// use pubsub_client::{PublishErrorKind, Schema};
    ///
    /// let schema = Schema::json(r#"{"type": "object", "required": ["id"]}"#);
    /// let error = client.publisher("orders").schema(schema.clone()).open().await.unwrap_err();
    /// assert!(matches!(error.kind(), PublishErrorKind::SchemaMismatch { .. }));
    ///
    /// client.publisher("orders").schema(schema.clone()).register_schema().open().await?;
    /// client.publisher("orders").schema(schema).open().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn schema(mut self, schema: Schema) -> Self {
        let register = self.written.is_some_and(|written| written.register);
        self.written = Some(Written { schema, register });
        self
    }

    /// Lets [`open`](Self::open) make the [schema](Self::schema) the topic's next revision if it
    /// never was one: it has to be backward compatible, so that consumers of the present revision
    /// can be upgraded first. Without a schema this does nothing.
    pub fn register_schema(mut self) -> Self {
        if let Some(written) = &mut self.written {
            written.register = true;
        }
        self
    }

    /// Opens it, and waits until the server has taken it in. While the server is away this
    /// waits, without limit.
    ///
    /// # Errors
    ///
    /// The server refuses it, for example because there is no such topic, or because it has as many
    /// publishers as it may. Or something that is no pubsub server has answered for a minute.
    ///
    /// With a [schema](Self::schema) also if the topic's is not like it
    /// ([`PublishErrorKind::SchemaMismatch`](crate::PublishErrorKind::SchemaMismatch)), or it
    /// cannot be [registered](Self::register_schema)
    /// ([`Reason::SchemaIncompatible`](crate::Reason::SchemaIncompatible)).
    pub async fn open(mut self) -> Result<Publisher, PublishError> {
        let (client, written) = (Arc::clone(&self.client), self.written.take());
        let publisher = self.open_lazy();
        publisher.handle.core.ready().await?;
        if let Some(written) = written {
            written.settle(&client, &publisher).await?;
        }
        Ok(publisher)
    }

    /// Opens it without waiting: messages can be enqueued at once. What [`open`](Self::open)
    /// would fail with comes as the fate of the messages. A [schema](Self::schema) is not looked
    /// at.
    ///
    /// The publisher lives on the runtime on which this is called, and fails when that ends.
    ///
    /// # Panics
    ///
    /// Outside of a Tokio runtime.
    pub fn open_lazy(self) -> Publisher {
        let core = Core::new(Arc::clone(&self.client), self.settings);
        self.client.adopt_publisher(&core, session::run(Arc::clone(&core)));
        Publisher { handle: Arc::new(Handle { core }) }
    }
}
