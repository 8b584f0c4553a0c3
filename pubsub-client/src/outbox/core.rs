//! One outbox: held by its handles, its watches and its lanes.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prost::Message as _;
use redb::Database;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::books::{Books, Bounds, NoRoom};
use super::clock::Clock;
use super::ledger::{Inner, Ledger, Writer};
use super::rows::{self, ParkedRow, PendingRow, Request, Stored};
use super::state::OutboxState;
use super::{Enqueued, OutboxError, lane};
use crate::client::Client;
use crate::limits;
use crate::local::{self, Committer, FileError};
use crate::message::Message;

#[derive(Debug)]
pub(super) struct Core {
    pub(super) client: Client,
    pub(super) clock: Clock,
    pub(super) ledger: Arc<Ledger>,
    committer: Committer<Request>,
    /// Nothing once it is closed.
    database: Mutex<Option<Arc<Database>>>,
    /// The lanes are to end.
    pub(super) stop: CancellationToken,
    lanes: TaskTracker,
}

impl Core {
    /// Opens the file. It blocks.
    pub(super) fn open(client: Client, path: &Path, bounds: Bounds) -> Result<Self, FileError> {
        let database = local::open_or_create(path, rows::FORMAT, client.env())?;
        let contents = rows::load(&database).map_err(|error| FileError::explain(path, error))?;
        let ledger = Arc::new(Ledger::new(Books::new(bounds, &contents)));
        let database = Arc::new(database);
        let writer = Writer(Arc::clone(&ledger));
        Ok(Self {
            clock: Clock::new(Arc::clone(client.env()), contents.clock),
            client,
            ledger,
            committer: Committer::spawn(path, Arc::clone(&database), writer)?,
            database: Mutex::new(Some(database)),
            stop: CancellationToken::new(),
            lanes: TaskTracker::new(),
        })
    }

    /// Begins to publish what the file holds.
    pub(super) fn start(self: &Arc<Self>) {
        let inner = self.ledger.lock();
        let topics: Vec<_> = inner.books.topics().map(|(topic, _)| Arc::clone(topic)).collect();
        drop(inner);
        topics.into_iter().for_each(|topic| self.start_lane(topic));
    }

    fn start_lane(self: &Arc<Self>, topic: Arc<str>) {
        self.lanes.spawn(lane::run(Arc::clone(self), topic));
    }

    pub(super) async fn enqueue(
        self: &Arc<Self>,
        topic: Arc<str>,
        message: Message,
    ) -> Result<Enqueued, OutboxError> {
        let given_key = message.idempotency_key.clone();
        let mut wire = message.into_wire();
        let size = wire.encoded_len();
        if size > limits::MAX_MESSAGE_BYTES {
            let message = Box::new(Message::from_wire(wire, None));
            let limit = limits::MAX_MESSAGE_BYTES;
            return Err(OutboxError::TooLarge { size, limit, message });
        }
        if wire.idempotency_key.is_empty() {
            // Random, and not counted: a file that is restored from a copy must not give a key
            // again to another message.
            wire.idempotency_key = format!("{:032x}", u128::from_be_bytes(self.client.env().id()));
        }
        let idempotency_key = wire.idempotency_key.clone();
        let row = PendingRow { enqueued: self.clock.now(), message: Some(wire) };
        let place = self.committer.reserve().await;
        let place = place.map_err(|error| self.refused(error))?;
        let (item, answer) = {
            // Under one lock, so that what is written first has the lower number.
            let mut inner = self.ledger.lock();
            let encoded = row.encode_to_vec();
            let admitted = admit(&mut inner, &topic, rows::size(&encoded), || {
                let message = Message::from_wire(row.message.unwrap_or_default(), None);
                Box::new(Message { idempotency_key: given_key, ..message })
            });
            let (item, new) = admitted?;
            if new {
                self.start_lane(Arc::clone(&topic));
            }
            (item, place.put(Request::Enqueue { topic, item, row: encoded }))
        };
        let written = self.committer.answered(answer).await;
        written.map_err(|error| self.refused(error))?;
        Ok(Enqueued { item, idempotency_key })
    }

    /// What a failure of the file means to whoever asked for something.
    fn refused(&self, error: FileError) -> OutboxError {
        if error == FileError::Closed {
            return OutboxError::Closed;
        }
        self.ledger.fail(error.clone());
        OutboxError::File(error)
    }

    /// Writes something; if that fails, the outbox has failed.
    pub(super) async fn commit(&self, request: Request) -> Result<(), OutboxError> {
        self.committer.commit(request).await.map_err(|error| self.refused(error))
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Database) -> Result<T, redb::Error> + Send + 'static,
    ) -> Result<T, OutboxError> {
        let database = self.database.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let database = database.ok_or(OutboxError::Closed)?;
        let done = tokio::task::spawn_blocking(move || work(&database)).await;
        let detail = match done {
            Ok(Ok(done)) => return Ok(done),
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        };
        Err(self.refused(self.committer.trouble(detail)))
    }

    /// The next messages of a topic.
    pub(super) async fn read(
        &self,
        topic: &Arc<str>,
        after: u64,
    ) -> Result<Vec<Stored>, OutboxError> {
        let topic = Arc::clone(topic);
        let most = (limits::outbox::CHUNK_MESSAGES, limits::outbox::CHUNK_BYTES);
        self.blocking(move |database| rows::read(database, &topic, after, most)).await
    }

    pub(super) async fn parked(
        &self,
        from: u64,
        most: usize,
    ) -> Result<Vec<(u64, ParkedRow)>, OutboxError> {
        self.blocking(move |database| rows::parked(database, from, most)).await
    }

    pub(super) async fn resend(self: &Arc<Self>, item: u64) -> Result<u64, OutboxError> {
        let found = self.parked(item, 1).await?;
        let found = found.into_iter().find(|(found, _)| *found == item);
        let (_, row) = found.ok_or(OutboxError::NotParked { item })?;
        let topic: Arc<str> = row.topic.into();
        let place = self.committer.reserve().await.map_err(|error| self.refused(error))?;
        let (again, answer) = {
            let mut inner = self.ledger.lock();
            if inner.closing {
                return Err(OutboxError::Closed);
            }
            let books = &mut inner.books;
            let new = books.join(&topic);
            let new = new.map_err(|limit| OutboxError::TooManyTopics { limit, message: None })?;
            if new {
                self.start_lane(Arc::clone(&topic));
            }
            let size = books.take_back(item).ok_or(OutboxError::NotParked { item })?;
            let again = books.number();
            (again, place.put(Request::Resend { topic, item, again, size }))
        };
        self.committer.answered(answer).await.map_err(|error| self.refused(error))?;
        Ok(again)
    }

    pub(super) async fn discard(&self, item: u64) -> Result<(), OutboxError> {
        let taken = self.ledger.lock().books.take_back(item);
        taken.ok_or(OutboxError::NotParked { item })?;
        self.commit(Request::Discard { item }).await
    }

    pub(super) async fn flush(&self) -> Result<(), OutboxError> {
        let below = self.ledger.lock().books.next();
        let is_over = |inner: &Inner| inner.closed || inner.failure.is_some();
        let done = |inner: &Inner| is_over(inner) || !inner.books.has_pending_below(below);
        self.ledger.wait_until(done).await;
        let inner = self.ledger.lock();
        if inner.books.has_pending_below(below) {
            return Err(inner.failure.clone().map_or(OutboxError::Closed, OutboxError::File));
        }
        match inner.books.parked_below(below) {
            0 => Ok(()),
            messages => Err(OutboxError::Parked { messages }),
        }
    }

    pub(super) async fn close(&self, within: Duration) -> Result<OutboxState, OutboxError> {
        self.ledger.change(|inner| inner.closing = true);
        let empty = |inner: &Inner| {
            let next = inner.books.next();
            inner.closed || inner.failure.is_some() || !inner.books.has_pending_below(next)
        };
        // Either way: what is left stays in the file.
        let _ = timeout(within, self.ledger.wait_until(empty)).await;
        self.stop.cancel();
        self.lanes.close();
        self.lanes.wait().await;
        let committer = self.committer.closing();
        let database = self.database.lock().unwrap_or_else(PoisonError::into_inner).take();
        let closed = tokio::task::spawn_blocking(move || {
            let written = committer.wait();
            // It is the last one: the lanes and the thread that wrote have ended.
            drop(database);
            written
        });
        let closed = closed.await.unwrap_or(Err(FileError::Closed));
        self.ledger.close();
        closed?;
        Ok(self.snapshot())
    }

    /// Nobody holds it any more: what it has stays in the file.
    pub(super) fn abandon(&self) {
        self.stop.cancel();
        self.lanes.close();
        drop(self.committer.closing());
        drop(self.database.lock().unwrap_or_else(PoisonError::into_inner).take());
        self.ledger.close();
    }

    pub(super) fn snapshot(&self) -> OutboxState {
        self.ledger.snapshot()
    }

    pub(super) async fn changed(&self, changes: &mut watch::Receiver<()>) -> bool {
        self.ledger.changed(changes).await
    }
}

/// Takes the room for a message.
fn admit(
    inner: &mut Inner,
    topic: &Arc<str>,
    size: u64,
    message: impl FnOnce() -> Box<Message>,
) -> Result<(u64, bool), OutboxError> {
    if inner.closing {
        return Err(OutboxError::Closed);
    }
    let books = &mut inner.books;
    books.admit(topic, size).map_err(|no_room| match no_room {
        NoRoom::Full => OutboxError::Full {
            messages: books.pending_usage.messages + books.parked_usage.messages,
            bytes: books.pending_usage.bytes + books.parked_usage.bytes,
            parked: books.parked_usage.messages,
            message: message(),
        },
        NoRoom::Topics(limit) => OutboxError::TooManyTopics { limit, message: Some(message()) },
    })
}
