//! The promise of a message's fate.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::SystemTime;

use super::core::{Core, Place};
use super::fates::Fates;
use crate::error::{EnqueueError, PublishError};
use crate::message::{Message, MessageId};

/// A message that is on its way. A future of its fate.
///
/// Dropping it cancels nothing: the message is published all the same, and should it fail, the
/// next [`flush`](crate::Publisher::flush) tells. Disconnects and server restarts only make it
/// take longer.
#[derive(Debug)]
#[must_use = "without awaiting the ticket, nobody learns whether the message was published"]
pub struct PublishTicket {
    /// Nothing once the fate was told.
    fates: Option<Arc<Fates>>,
    index: usize,
}

impl PublishTicket {
    pub(super) fn new(fates: Arc<Fates>, index: usize) -> Self {
        Self { fates: Some(fates), index }
    }
}

impl Future for PublishTicket {
    type Output = Result<PublishReceipt, PublishError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let fates = self.fates.as_ref().expect("a future is not polled after its end");
        let fate = fates.poll(self.index, context);
        if fate.is_ready() {
            self.fates = None;
        }
        fate
    }
}

impl Drop for PublishTicket {
    fn drop(&mut self) {
        if let Some(fates) = &self.fates {
            fates.give_up(self.index);
        }
    }
}

/// A message is on the server's disk.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PublishReceipt {
    /// Its identity.
    pub id: MessageId,
    /// Whether an earlier publish with the same identity had stored it: the SDK's own retry
    /// across a disconnect, or one with the same idempotency key.
    pub duplicate: bool,
    /// When the server stored it.
    pub publish_time: SystemTime,
}

/// A place in a publisher's window; made by [`Publisher::reserve`](crate::Publisher::reserve).
/// Dropping it gives the place back.
#[must_use = "a permit that is dropped gives its place back"]
pub struct Permit<'a> {
    core: &'a Core,
    place: Place<'a>,
    bytes: usize,
}

impl<'a> Permit<'a> {
    pub(super) fn new(core: &'a Core, place: Place<'a>, bytes: usize) -> Self {
        Self { core, place, bytes }
    }

    /// Enqueues a message, without waiting.
    ///
    /// # Errors
    ///
    /// The message is larger than what was reserved or than the topic allows, or the publisher
    /// was closed meanwhile. It is handed back in the error.
    pub fn enqueue(self, message: impl Into<Message>) -> Result<PublishTicket, EnqueueError> {
        let checked = self.core.check(message.into())?;
        if checked.size > self.bytes {
            let (size, reserved) = (checked.size, self.bytes);
            let message = Box::new(checked.into_message());
            return Err(EnqueueError::ExceedsPermit { size, reserved, message });
        }
        self.core.push(checked, self.place)
    }
}

impl fmt::Debug for Permit<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Permit").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}
