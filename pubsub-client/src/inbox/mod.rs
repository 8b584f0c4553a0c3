//! Processing that does not repeat: what was processed is remembered across crashes.

#[cfg(feature = "inbox")]
mod file;
mod memory;
mod processed;

use std::collections::BTreeSet;
use std::fmt;
use std::future::{self, Future};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use tokio::time::sleep;

#[cfg(feature = "inbox")]
pub use self::file::FileInbox;
pub use self::memory::MemoryInbox;
pub use self::processed::InboxError;
use crate::error::SubscribeError;
use crate::limits;
use crate::message::{MessageId, ReceivedMessage};
use crate::subscriber::{Position, Subscriber};

/// Remembers which messages a subscription has processed, for
/// [`Subscriber::run_once`](crate::Subscriber::run_once).
///
/// Kept in memory by [`MemoryInbox`], in a file by `FileInbox` (feature `inbox`), or by the
/// application in a database of its own.
///
/// # What it can promise
///
/// A store of its own is written *after* the effect of a message: if the process dies between the
/// two, the effect happens again. So this is *at least once*, with a window that is as short as one
/// write, and without it for all that is shown again after its write: after a crash before the ack,
/// a nack, a seek.
///
/// *Exactly once* needs the effect and the id in one transaction, and so in one database. Then no
/// store is needed: let the handler of [`run`](crate::Subscriber::run) insert the id into a table
/// with a unique column, within the transaction of the effect, and return `Ok` without the effect
/// if it is there already. The example `inbox_sqlite` does that.
///
/// # Identity
///
/// Messages are remembered by the name of the subscription, also if that is deleted and created
/// again. A [`MessageId`] never repeats, unless the data of the server is restored from an older copy,
/// which then gives the ids after that copy once more, to other messages. These have later
/// [publish times](ReceivedMessage::publish_time): whoever keeps ids keeps that with them, as the
/// stores here do, or takes such a message for one that was processed.
///
/// ```
/// use pubsub_client::{ProcessedStore, ReceivedMessage};
/// # struct Pool;
/// # impl Pool {
/// #     async fn count(&self, _: &str, _: [&str; 2]) -> Result<u64, std::io::Error> { Ok(0) }
/// #     async fn execute(&self, _: &str, _: [&str; 2]) -> Result<(), std::io::Error> { Ok(()) }
/// # }
///
/// struct InPostgres(Pool);
///
/// fn key(message: &ReceivedMessage) -> String {
///     format!("{} {:?}", message.id, message.publish_time)
/// }
///
/// impl ProcessedStore for InPostgres {
///     type Error = std::io::Error;
///
///     async fn is_processed(&self, by: &str, message: &ReceivedMessage) -> Result<bool, Self::Error> {
///         let query = "SELECT count(*) FROM inbox WHERE subscription = $1 AND id = $2";
///         Ok(self.0.count(query, [by, &key(message)]).await? > 0)
///     }
///
///     async fn record(&self, by: &str, message: &ReceivedMessage) -> Result<(), Self::Error> {
///         let insert = "INSERT INTO inbox VALUES ($1, $2) ON CONFLICT DO NOTHING";
///         self.0.execute(insert, [by, &key(message)]).await
///     }
/// }
/// ```
pub trait ProcessedStore: Send + Sync + 'static {
    /// Why it can fail.
    type Error: fmt::Display + Send + 'static;

    /// Whether the message was [recorded](Self::record) by this subscription. Must not say so of
    /// one that was not: it would never be processed.
    fn is_processed(
        &self,
        subscription: &str,
        message: &ReceivedMessage,
    ) -> impl Future<Output = Result<bool, Self::Error>> + Send;

    /// Records that the message was processed by this subscription. Returns when that is durable;
    /// the message is acked after it. Recording one again changes nothing.
    fn record(
        &self,
        subscription: &str,
        message: &ReceivedMessage,
    ) -> impl Future<Output = Result<(), Self::Error>> + Send;

    /// The subscription is here. What may be forgotten: of each topic the messages up to
    /// [`acked_floor`](crate::TopicPosition::acked_floor), which the server has confirmed and never
    /// shows again by itself; and what was recorded under another epoch of a topic that is named,
    /// since that incarnation is gone.
    ///
    /// If the subscription is moved back behind the floor by a seek, or the server's data is
    /// restored from an older copy, messages that were forgotten are processed again. A seek is a
    /// wish to see them again; a store that shall resist it does nothing here, which is the
    /// default.
    fn forget(
        &self,
        subscription: &str,
        position: &Position,
    ) -> impl Future<Output = Result<(), Self::Error>> + Send {
        let _ = (subscription, position);
        future::ready(Ok(()))
    }
}

impl<S: ProcessedStore> ProcessedStore for Arc<S> {
    type Error = S::Error;

    fn is_processed(
        &self,
        subscription: &str,
        message: &ReceivedMessage,
    ) -> impl Future<Output = Result<bool, Self::Error>> + Send {
        S::is_processed(self, subscription, message)
    }

    fn record(
        &self,
        subscription: &str,
        message: &ReceivedMessage,
    ) -> impl Future<Output = Result<(), Self::Error>> + Send {
        S::record(self, subscription, message)
    }

    fn forget(
        &self,
        subscription: &str,
        position: &Position,
    ) -> impl Future<Output = Result<(), Self::Error>> + Send {
        S::forget(self, subscription, position)
    }
}

impl Subscriber {
    /// As [`run`](Self::run), but the handler is not called for messages that `store` knows as
    /// processed: these are acked at once.
    ///
    /// A message is recorded in the store when its handler has returned `Ok`, and acked when that
    /// is durable. Concurrency, order, retries, stopping and errors are those of
    /// [`run`](Self::run): a handler that fails or panics nacks its message and records nothing. So
    /// does a store that fails; if that is after the handler has returned `Ok`, the message comes
    /// again *and is processed again*. The store is not consulted by anything else, so that one
    /// [`Stopper`](crate::Stopper) ends it all.
    ///
    /// No message is in two handlers of one call at once, also in the kinds without order, where a
    /// message that is held for too long may come again: the second showing waits for the first.
    ///
    /// How often the effect of a message can happen is up to the [store](ProcessedStore). With
    /// several consumers of one subscription, each with a file of its own, a message that goes from
    /// one to another is unknown there; only a store that they share knows it.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let server = pubsub_server::Server::start(pubsub_server::Config::in_memory()).await?;
    /// # let client = pubsub_client::Client::connect(server.url()).await?;
    /// # client.admin().create_topic("orders", Default::default()).await?;
    /// # client.publisher("orders").open().await?.publish("an order").await?;
    /// # use pubsub_client::{Drain, Start};
    /// use pubsub_client::MemoryInbox;
    ///
    /// let subscriber = client.subscriber("billing").topic("orders").start(Start::Earliest);
    /// let subscriber = subscriber.open().await?;
    /// let stopper = subscriber.stopper();
    /// subscriber
    ///     .run_once(MemoryInbox::new(), 8, move |message| {
    ///         let stopper = stopper.clone();
    ///         async move {
    ///             println!("billed once: {}", message.id);
    ///             # drop(tokio::task::spawn(async move {
    ///             #     stopper.stop(Drain::Finish, std::time::Duration::from_secs(5)).await
    ///             # }));
    ///             Ok::<(), String>(())
    ///         }
    ///     })
    ///     .await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// The session has ended for good, as [`SubscribeError`] tells. Handlers that run are waited
    /// for.
    pub async fn run_once<S, H, F, E>(
        self,
        store: S,
        concurrency: usize,
        handler: H,
    ) -> Result<(), SubscribeError>
    where
        S: ProcessedStore,
        H: Fn(ReceivedMessage) -> F + Send + Sync + 'static,
        F: Future<Output = Result<(), E>> + Send + 'static,
        E: fmt::Display + Send + 'static,
    {
        let (subscription, position) = self.observe();
        let once = Arc::new(Once { subscription, store, handler, running: Running::default() });
        let forget = once.forget(position);
        let handled = {
            let once = Arc::clone(&once);
            move |message| {
                let once = Arc::clone(&once);
                async move { once.handle(message).await }
            }
        };
        tokio::select! {
            ended = self.run(concurrency, handled) => ended,
            () = forget => Ok(()),
        }
    }
}

/// What the handlers of one `run_once` share.
struct Once<S, H> {
    subscription: String,
    store: S,
    handler: H,
    running: Running,
}

impl<S: ProcessedStore, H> Once<S, H> {
    async fn handle<F, E>(&self, message: ReceivedMessage) -> Result<(), String>
    where
        H: Fn(ReceivedMessage) -> F,
        F: Future<Output = Result<(), E>>,
        E: fmt::Display,
    {
        let _alone = self.running.alone(&message.id).await;
        let by = &self.subscription;
        let failed = |error: S::Error| format!("what was processed cannot be looked up: {error}");
        // A deliberate bug, for tests of tests.
        let asks = !cfg!(pubsub_break = "inbox_is_not_asked");
        if asks && self.store.is_processed(by, &message).await.map_err(failed)? {
            tracing::debug!(id = %message.id, "processed before: acked");
            return Ok(());
        }
        let kept = message.clone();
        (self.handler)(message).await.map_err(|error| error.to_string())?;
        let failed = |error: S::Error| format!("processed, but that cannot be recorded: {error}");
        self.store.record(by, &kept).await.map_err(failed)
    }

    /// Lets the store forget, now and then, for ever.
    async fn forget(&self, position: impl Fn() -> Position) {
        // The readers of all topics have the same name, and positions of their own.
        if self.subscription.is_empty() {
            future::pending::<()>().await;
        }
        loop {
            sleep(limits::FORGET_INTERVAL).await;
            if let Err(error) = self.store.forget(&self.subscription, &position()).await {
                tracing::warn!(%error, "what was processed long ago cannot be forgotten");
            }
        }
    }
}

/// The messages that are in a handler: at most the concurrency of `run`.
#[derive(Debug, Default)]
struct Running {
    ids: Mutex<BTreeSet<MessageId>>,
    left: Notify,
}

impl Running {
    /// Waits until the message is in no handler.
    async fn alone(&self, id: &MessageId) -> Alone<'_> {
        loop {
            let left = self.left.notified();
            tokio::pin!(left);
            // Registered before looking, so that nothing leaves between.
            left.as_mut().enable();
            if self.lock().insert(id.clone()) {
                return Alone { running: self, id: id.clone() };
            }
            left.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeSet<MessageId>> {
        self.ids.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A message is in a handler, until this is dropped.
struct Alone<'a> {
    running: &'a Running,
    id: MessageId,
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        self.running.lock().remove(&self.id);
        self.running.left.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::{Duration, SystemTime};

    use futures_util::FutureExt as _;
    use futures_util::future::join_all;

    use super::*;
    use crate::message::Received;

    pub(super) fn message(sequence: u64, second: u64) -> ReceivedMessage {
        let id = MessageId { topic: "t".into(), epoch: 7, sequence };
        let publish_time = SystemTime::UNIX_EPOCH + Duration::from_secs(second);
        let publish_time = Some(publish_time.into());
        ReceivedMessage::from_wire(id, Received { publish_time, ..Received::default() })
    }

    /// Forgets everything, and fails when it is told to.
    struct Failing(AtomicUsize);

    impl ProcessedStore for Failing {
        type Error = &'static str;

        async fn is_processed(&self, _: &str, _: &ReceivedMessage) -> Result<bool, &'static str> {
            Ok(false)
        }

        async fn record(&self, _: &str, _: &ReceivedMessage) -> Result<(), &'static str> {
            match self.0.fetch_add(1, Ordering::Relaxed) {
                0 => Err("no room"),
                _ => Ok(()),
            }
        }
    }

    fn once<S, H>(store: S, handler: H) -> Once<S, H> {
        Once { subscription: "s".to_owned(), store, handler, running: Running::default() }
    }

    #[tokio::test]
    async fn a_message_is_handled_until_it_succeeds_and_not_again() {
        let calls = AtomicUsize::new(0);
        let handler = |_| {
            let call = calls.fetch_add(1, Ordering::Relaxed);
            async move { if call == 0 { Err("not yet") } else { Ok(()) } }
        };
        let once = once(MemoryInbox::new(), handler);
        assert_eq!(once.handle(message(1, 1)).await, Err("not yet".to_owned()));
        assert_eq!(once.handle(message(1, 1)).await, Ok(()));
        assert_eq!(once.handle(message(1, 1)).await, Ok(()));
        assert_eq!(calls.load(Ordering::Relaxed), 2);
    }

    #[tokio::test]
    async fn what_cannot_be_recorded_is_not_acked() {
        let once = once(Failing(AtomicUsize::new(0)), |_| async { Ok::<_, String>(()) });
        let error = once.handle(message(1, 1)).await.unwrap_err();
        assert!(error.contains("no room"), "{error}");
        assert_eq!(once.handle(message(1, 1)).await, Ok(()));
    }

    #[tokio::test]
    async fn two_showings_of_a_message_do_not_run_at_once() {
        let calls = AtomicUsize::new(0);
        let handler = |_| async {
            calls.fetch_add(1, Ordering::Relaxed);
            tokio::task::yield_now().await;
            Ok::<_, String>(())
        };
        let once = once(MemoryInbox::new(), handler);
        let shown = (0..10).map(|_| once.handle(message(1, 1)));
        assert!(join_all(shown).await.into_iter().all(|result| result.is_ok()));
        assert_eq!(calls.load(Ordering::Relaxed), 1);
        assert!(once.running.lock().is_empty());
    }

    #[tokio::test]
    async fn a_handler_that_panics_is_not_running_any_more() {
        let once = once(MemoryInbox::new(), |_| async { panic!("oh") });
        let handled = once.handle::<_, String>(message(1, 1));
        let handled: Result<Result<(), String>, _> =
            std::panic::AssertUnwindSafe(handled).catch_unwind().await;
        assert!(handled.is_err());
        assert!(once.running.lock().is_empty());
    }
}
