//! Messages that are stored all together or not at all.

use std::future::{Future, IntoFuture};
use std::pin::Pin;

use pubsub_proto::v1 as pb;
use tokio::time::{Instant, timeout_at};

use super::core::Core;
use super::ticket::{PublishReceipt, PublishTicket};
use crate::error::{EnqueueError, Outcome, PublishError, PublishErrorKind};
use crate::limits;
use crate::liveness::after;
use crate::message::Message;

/// Messages that are stored all together or not at all; made by
/// [`Publisher::publish_batch`](crate::Publisher::publish_batch).
///
/// Awaiting it publishes them and waits until they are on the server's disk: the receipts come in
/// the order of the messages. They fail as one, with one error. They are retried as one as well:
/// across disconnects and restarts of the server they are stored once, and answered with the same
/// ids.
///
/// The messages have no [idempotency keys](Message::idempotency_key) of their own; the batch may
/// have [one](Self::idempotency_key). The shortest [deadline](Message::deadline) holds for all.
#[derive(Debug)]
#[must_use = "nothing is published until it is awaited or enqueued"]
pub struct Batch<'p> {
    core: &'p Core,
    messages: Vec<Message>,
    atomic: pb::AtomicBatch,
}

impl<'p> Batch<'p> {
    pub(super) fn new(core: &'p Core, messages: Vec<Message>) -> Self {
        Self { core, messages, atomic: pb::AtomicBatch::default() }
    }

    /// Stores the batch only if `sequence` is the last message of the topic; 0 if there must be
    /// none. Otherwise it is refused for good with
    /// [`Reason::HeadMismatch`](crate::Reason::HeadMismatch), and
    /// [`PublishError::actual_head`] tells the last message.
    ///
    /// The SDK's own retries are safe: a batch that is stored already is answered with its ids,
    /// and does not meet the head that it moved itself.
    pub fn expect_head(mut self, sequence: u64) -> Self {
        self.atomic.expected_head = Some(sequence);
        self
    }

    /// Sets the application's own identity of the whole batch, at most 128 bytes: published again
    /// under it within the topic's window, also by a restarted process, it is stored once. With
    /// other messages it is refused.
    pub fn idempotency_key(mut self, key: impl Into<String>) -> Self {
        self.atomic.idempotency_key = key.into();
        self
    }

    /// Puts the batch into the window, waiting for room, and returns a ticket for its fate.
    ///
    /// If the future is dropped, the batch is either enqueued or gone.
    ///
    /// # Errors
    ///
    /// It has no messages, or more than 1,000 or 4 MiB; a message is larger than the topic allows;
    /// the deadline passed before there was room; or the publisher has failed or was closed.
    /// Nothing was sent.
    pub async fn enqueue(self) -> Result<BatchTicket, PublishError> {
        let Self { core, messages, atomic } = self;
        let key = atomic.idempotency_key.clone();
        let fail = |kind| PublishError::new(kind, Outcome::NotPersisted).with_key(&key);
        let refuse = |error: EnqueueError| {
            let error = PublishError::from(error);
            fail(error.kind().clone())
        };
        let deadline = messages.iter().filter_map(|message| message.deadline).min();
        let deadline = deadline.map(|given| after(Instant::now(), given));
        let count = messages.len();
        let checked = messages.into_iter().map(|message| core.check(message));
        let checked: Vec<_> = checked.collect::<Result<_, _>>().map_err(refuse)?;
        let bytes = checked.iter().map(|message| message.size).sum();
        if count == 0 || count > limits::ATOMIC_MESSAGES || bytes > limits::ATOMIC_BYTES {
            return Err(fail(PublishErrorKind::BatchSize { messages: count, bytes }));
        }
        let admit = core.admit_together(count, bytes);
        let admitted = match deadline {
            Some(deadline) => timeout_at(deadline, admit).await,
            None => Ok(admit.await),
        };
        let place =
            admitted.map_err(|_| fail(PublishErrorKind::DeadlineElapsed))?.map_err(refuse)?;
        let tickets = core.push_together(checked, atomic, deadline, place).map_err(refuse)?;
        Ok(BatchTicket { tickets, receipts: Vec::with_capacity(count), key })
    }
}

impl<'p> IntoFuture for Batch<'p> {
    type Output = Result<Vec<PublishReceipt>, PublishError>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send + 'p>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move { self.enqueue().await?.await })
    }
}

/// A batch that is on its way. A future of its fate.
///
/// As with a [`PublishTicket`], dropping it cancels nothing.
#[derive(Debug)]
#[must_use = "without awaiting the ticket, nobody learns whether the batch was published"]
pub struct BatchTicket {
    /// One for each message; those before `receipts.len()` are used up.
    tickets: Vec<PublishTicket>,
    receipts: Vec<PublishReceipt>,
    key: String,
}

impl Future for BatchTicket {
    type Output = Result<Vec<PublishReceipt>, PublishError>;

    fn poll(
        mut self: Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Self::Output> {
        use std::task::Poll;
        let this = &mut *self;
        while let Some(ticket) = this.tickets.get_mut(this.receipts.len()) {
            match Pin::new(ticket).poll(context) {
                Poll::Ready(Ok(receipt)) => this.receipts.push(receipt),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error.with_key(&this.key))),
                Poll::Pending => return Poll::Pending,
            }
        }
        Poll::Ready(Ok(std::mem::take(&mut this.receipts)))
    }
}
