//! Publishing that survives a crash of the publisher: messages go to a local file first.

mod books;
mod clock;
mod core;
mod error;
mod failpoint;
mod lane;
mod ledger;
mod offline;
#[cfg(test)]
mod power_cuts;
mod rows;
mod state;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use self::books::Bounds;
use self::core::Core;
pub use self::error::OutboxError;
pub use self::offline::OutboxFile;
pub use self::state::{OutboxState, OutboxTopic, OutboxWatch, Parked, Usage, Waiting};
use crate::client::Client;
use crate::limits;
use crate::local::FileError;
use crate::message::Message;

/// A durable queue between the application and the server: what is in it is published, also if the
/// server is away for long, and if this process crashes. Cheap to clone.
///
/// Made by [`Client::outbox`](crate::Client::outbox), with the feature `outbox`.
///
/// ```
/// # #[tokio::main]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let server = pubsub_server::Server::start(pubsub_server::Config::in_memory()).await?;
/// # let client = pubsub_client::Client::connect(server.url()).await?;
/// # client.admin().create_topic("orders", Default::default()).await?;
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("orders.outbox");
/// use std::time::Duration;
///
/// let outbox = client.outbox(path).open().await?;
/// outbox.enqueue("orders", "an order").await?; // in the file; it will be published
/// outbox.flush().await?; // it is on the server's disk
/// outbox.close(Duration::from_secs(5)).await?;
/// # Ok(())
/// # }
/// ```
///
/// # What is promised
///
/// - When [`enqueue`](Self::enqueue) returns, the message is in the file, with fsync. It stays there
///   until the server has answered that it is on *its* disk. A process that opens the file after a
///   crash goes on with what is left.
/// - The server stores each message once: its identity, an [idempotency
///   key](Message::idempotency_key), is fixed when it is enqueued, and whatever is sent again has the
///   same one.
/// - The messages of a topic are stored in the order in which they were enqueued, except those that
///   were set aside.
/// - A message that was sent, was never answered, and is older than the server remembers keys (7
///   days, unless the topic says otherwise) is **not** sent again: it could be stored twice. How long
///   it waited *before* it was sent does not matter. It is [set aside](Parked).
///
/// # What is set aside
///
/// A message that the server refuses for good (it is too large, or its key stands for other
/// content) is set aside with the reason, and so is one whose fate nobody knows any more. The
/// messages after it go on: a poisoned one must not stop all others, and the application with them
/// once the outbox is full. [`state`](Self::state) counts what was set aside, [`flush`](Self::flush)
/// fails because of it, [`parked`](Self::parked) shows it, and it counts against the bounds until
/// it is [resent](Self::resend) or [discarded](Self::discard).
///
/// What is wrong with a *topic* and not with a message, such as that there is none of this name, or
/// that it is full, sets nothing aside: its messages wait, the state tells
/// [why](OutboxTopic::waiting), and they go on once that is over. Other topics are not held up.
///
/// # Bounds
///
/// 100,000 messages and 64 MiB by default, in up to 64 topics, each of which has a connection. A
/// full outbox refuses. A server remembers 4 million keys: beyond that many messages within 7 days,
/// from all of its publishers with keys, it lets them wait.
///
/// # The file
///
/// It belongs to one process at a time. Its time is that of the wall clock: one that is set back
/// while no process has the file open makes messages look younger. After a failed write, for example
/// on a full disk, the outbox takes and publishes nothing more ([`OutboxState::failure`]): open it
/// again. `pubsub outbox inspect FILE` shows what is in it.
///
/// When the last handle is dropped publishing stops, and what is left stays in the file; use
/// [`close`](Self::close) to wait for it. Shutting its client down closes the outbox, too, without
/// waiting for what is in it.
#[derive(Clone, Debug)]
pub struct Outbox {
    handle: Arc<Handle>,
}

/// Shared by the clones, so that the last one can be noticed.
#[derive(Debug)]
struct Handle(Arc<Core>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.abandon();
    }
}

/// A message is in the file of the outbox.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Enqueued {
    /// Its number in the outbox, from 1.
    pub item: u64,
    /// The key under which it is published: that of the message, or a random one.
    pub idempotency_key: String,
}

impl Outbox {
    /// Takes a message, and returns when it is on disk: in the local file. Those that are enqueued
    /// at the same time share one fsync.
    ///
    /// Of two calls the one that has returned before the other is made comes first. If the future is dropped, the message may be enqueued or not. Its
    /// [deadline](Message::deadline) has no meaning here.
    ///
    /// Does not wait for the server, nor for room.
    ///
    /// # Errors
    ///
    /// There is no room, the message is too large for any topic, there are too many topics, the
    /// file has failed, or the outbox was closed.
    pub async fn enqueue(
        &self,
        topic: impl Into<Arc<str>>,
        message: impl Into<Message>,
    ) -> Result<Enqueued, OutboxError> {
        self.handle.0.enqueue(topic.into(), message.into()).await
    }

    /// Waits until everything that was enqueued before is published or set aside: while the server
    /// is away, or a topic waits, without limit.
    ///
    /// # Errors
    ///
    /// Some of it was set aside; or the file has failed, or the outbox was closed before.
    pub async fn flush(&self) -> Result<(), OutboxError> {
        self.handle.0.flush().await
    }

    /// What it holds, and whether it gets rid of it.
    pub fn state(&self) -> OutboxWatch {
        let core = Arc::clone(&self.handle.0);
        let changes = core.ledger.subscribe();
        OutboxWatch::new(core, changes)
    }

    /// What was set aside: at most so many, from this number on, in the order of the numbers.
    ///
    /// # Errors
    ///
    /// The file cannot be read, or the outbox was closed.
    pub async fn parked(&self, from: u64, most: usize) -> Result<Vec<Parked>, OutboxError> {
        let rows = self.handle.0.parked(from, most).await?;
        Ok(rows.into_iter().map(|(item, row)| Parked::from_row(item, row)).collect())
    }

    /// Lets a message that was set aside wait again, at the end of its topic and under the same
    /// idempotency key, and gives its new number.
    ///
    /// One that was refused is refused again unless the cause is gone. One whose fate is unknown
    /// may be stored a second time: the server has forgotten its key.
    ///
    /// # Errors
    ///
    /// There is no such message, the file has failed, or the outbox was closed.
    pub async fn resend(&self, item: u64) -> Result<u64, OutboxError> {
        self.handle.0.resend(item).await
    }

    /// Forgets a message that was set aside. It is not published.
    ///
    /// # Errors
    ///
    /// There is no such message, the file has failed, or the outbox was closed.
    pub async fn discard(&self, item: u64) -> Result<(), OutboxError> {
        self.handle.0.discard(item).await
    }

    /// Takes nothing more, on this handle and its clones, waits until everything is published or
    /// set aside, at most for `within`, and closes the file. What is left stays in it, and is told.
    ///
    /// # Errors
    ///
    /// A write of the file has failed since it was opened.
    pub async fn close(self, within: Duration) -> Result<OutboxState, OutboxError> {
        self.handle.0.close(within).await
    }
}

impl Client {
    /// Publishes by way of a local file, across crashes of this process; the file is made if there
    /// is none.
    ///
    /// It does not need the server: with [`connect_lazy`](crate::ClientBuilder::connect_lazy) an
    /// application starts, and enqueues, while that is away.
    pub fn outbox(&self, path: impl Into<PathBuf>) -> OutboxBuilder {
        let bounds = Bounds {
            messages: limits::outbox::MESSAGES,
            bytes: limits::outbox::BYTES,
            topics: limits::outbox::TOPICS,
        };
        OutboxBuilder { client: self.clone(), path: path.into(), bounds }
    }
}

/// Opens an [`Outbox`]; made by [`Client::outbox`](crate::Client::outbox).
#[derive(Clone, Debug)]
#[must_use = "nothing happens until it is opened"]
pub struct OutboxBuilder {
    client: Client,
    path: PathBuf,
    bounds: Bounds,
}

impl OutboxBuilder {
    /// Sets how many messages may be in it: 100,000 by default, at most 1,000,000.
    pub fn max_messages(mut self, messages: u64) -> Self {
        self.bounds.messages = messages.clamp(1, 1_000_000);
        self
    }

    /// Sets how many bytes of messages may be in it: 64 MiB by default, at most 1 GiB. A larger
    /// one makes opening slower, since all of the file is checked. One message always may.
    pub fn max_bytes(mut self, bytes: u64) -> Self {
        self.bounds.bytes = bytes.clamp(1, 1 << 30);
        self
    }

    /// Opens the file, and begins to publish what is in it.
    ///
    /// # Errors
    ///
    /// Another process has it, it is something else, it is damaged, or it cannot be read or
    /// written. The server is not needed for this.
    ///
    /// # Panics
    ///
    /// Outside of a Tokio runtime.
    pub async fn open(self) -> Result<Outbox, OutboxError> {
        let open = move || Core::open(self.client, &self.path, self.bounds);
        let opened = tokio::task::spawn_blocking(open).await;
        let core = Arc::new(opened.unwrap_or(Err(FileError::Closed))?);
        core.start();
        Ok(Outbox { handle: Arc::new(Handle(core)) })
    }
}
