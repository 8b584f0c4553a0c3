//! A message in the application's hands.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use super::core::Core;
use super::resume::Handle;
use crate::error::AckError;
use crate::limits;
use crate::message::{ReceivedMessage, shorten};

/// A message that was delivered and waits for its ack.
///
/// It derefs to the [`ReceivedMessage`]. Dropping it without [`ack`](Self::ack) or
/// [`nack`](Self::nack) *releases* it: it comes again after a second, without being counted as a
/// failure. It stays valid across disconnects and server restarts. One that is held for longer
/// than [`max_processing`](crate::SubscriberBuilder::max_processing) is given up, and comes again.
///
/// What else comes again after a nack or release of message n depends on the
/// [kind](crate::SubscriptionKind) of the subscription. In `Exclusive` all unacked messages of the
/// topic after n are shown again, in order, even those already handed out. In `KeyOrdered` that is
/// so for the messages after n of the same ordering key, and all of them may go to another
/// consumer. In `Shared`, and without a key, it is n alone, which may go to another consumer, too.
/// What the application still does with older deliveries counts, if it is an ack.
///
/// Where several consumers are active, a delivery also becomes an older one when the connection is
/// lost for longer than the server's grace (30 s): the message then goes to another consumer. Its
/// ack still counts, and a nack does nothing.
///
/// In a reader there is nothing to ack: acks and nacks do nothing.
#[derive(Debug)]
#[must_use = "a delivery that is dropped is released, and comes again"]
pub struct Delivery {
    message: ReceivedMessage,
    acker: Acker,
}

impl Delivery {
    pub(super) fn new(message: ReceivedMessage, core: Option<Arc<Core>>, handle: Handle) -> Self {
        Self { message, acker: Acker { core, handle } }
    }

    /// Acks the message: it was processed, and is never to be delivered again.
    ///
    /// Does not block. Acks are sent together, at the latest after 10 ms or 1,024 of them, or
    /// when they are half of what may be unacked; and sent again after a reconnect until the server
    /// has confirmed them. If the process dies before, the message comes again.
    pub fn ack(self) {
        self.acker.ack();
    }

    /// Acks the message and waits until the ack is on the server's disk. Neither side lets it wait for
    /// other acks, as it may those of [`ack`](Self::ack).
    ///
    /// Waits through disconnects. If the future is dropped, the ack is still on its way.
    ///
    /// # Errors
    ///
    /// The ack has no meaning any more, or the subscriber ended first.
    pub async fn ack_confirmed(self) -> Result<(), AckError> {
        self.acker.ack_confirmed().await
    }

    /// Acks the message and all earlier ones of the same topic that the application holds.
    ///
    /// Made for [`Exclusive`](crate::SubscriptionKind::Exclusive) subscriptions. In the other kinds
    /// earlier is not before, and only the message itself is acked.
    pub fn ack_up_to(self) {
        self.acker.ack_up_to();
    }

    /// Acks many messages, as [`ack`](Self::ack) does each of them, for a fraction of what it costs.
    /// They may be of any topics and subscribers.
    pub fn ack_all(deliveries: impl IntoIterator<Item = Self>) {
        Acker::ack_all(deliveries.into_iter().map(|delivery| delivery.acker));
    }

    /// Hands the message back as failed: it comes again, and counts as another attempt. Where
    /// several consumers are active, it may come to another one.
    pub fn nack(self, nack: Nack) {
        self.acker.nack(nack);
    }

    /// Takes the message out, to ack it later and elsewhere.
    pub fn split(self) -> (ReceivedMessage, Acker) {
        (self.message, self.acker)
    }
}

impl Deref for Delivery {
    type Target = ReceivedMessage;

    fn deref(&self) -> &ReceivedMessage {
        &self.message
    }
}

/// The right to ack or nack a message, without the message. Dropping it releases the message, as
/// with a [`Delivery`].
#[must_use = "an acker that is dropped releases its message, which comes again"]
pub struct Acker {
    /// Nothing in a reader, and once the message is acked or nacked.
    core: Option<Arc<Core>>,
    handle: Handle,
}

impl Acker {
    /// As [`Delivery::ack`].
    pub fn ack(mut self) {
        if let Some(core) = self.core.take() {
            core.ack(self.handle);
        }
    }

    /// As [`Delivery::ack_all`].
    pub fn ack_all(ackers: impl IntoIterator<Item = Self>) {
        let mut ackers: Vec<_> = ackers.into_iter().collect();
        for ackers in ackers.chunk_by_mut(|one, other| one.is_of_core_of(other)) {
            let Some((first, others)) = ackers.split_first_mut() else { continue };
            let Some(core) = first.core.take() else { continue };
            let handles = others.iter_mut().map(|acker| {
                acker.core = None;
                acker.handle
            });
            core.ack_all(std::iter::once(first.handle).chain(handles));
        }
    }

    fn is_of_core_of(&self, other: &Self) -> bool {
        match (&self.core, &other.core) {
            (Some(core), Some(other)) => Arc::ptr_eq(core, other),
            (None, None) => true,
            (Some(_), None) | (None, Some(_)) => false,
        }
    }

    /// As [`Delivery::ack_confirmed`].
    ///
    /// # Errors
    ///
    /// The ack has no meaning any more, or the subscriber ended first.
    pub async fn ack_confirmed(mut self) -> Result<(), AckError> {
        let Some(core) = self.core.take() else { return Ok(()) };
        let confirmation = core.ack_confirmed(self.handle);
        drop(core);
        match confirmation {
            Some(confirmation) => confirmation.await.unwrap_or(Err(AckError::Closed)),
            None => Ok(()),
        }
    }

    /// As [`Delivery::ack_up_to`].
    pub fn ack_up_to(mut self) {
        if let Some(core) = self.core.take() {
            core.ack_up_to(self.handle);
        }
    }

    /// As [`Delivery::nack`].
    pub fn nack(mut self, nack: Nack) {
        if let Some(core) = self.core.take() {
            core.nack(self.handle, nack);
        }
    }
}

impl fmt::Debug for Acker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Acker").field("sequence", &self.handle.sequence).finish_non_exhaustive()
    }
}

impl Drop for Acker {
    fn drop(&mut self) {
        if let Some(core) = self.core.take() {
            core.release(self.handle);
        }
    }
}

/// How a message is handed back.
///
/// Until it comes again, what has to come after it waits: all of its topic, all of its ordering
/// key, or nothing, as the [kind](crate::SubscriptionKind) of the subscription says.
///
/// ```
/// use std::time::Duration;
/// use pubsub_client::Nack;
///
/// let nack = Nack::after(Duration::from_secs(30)).because("the mail server is down");
/// # let _ = nack;
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Nack {
    pub(super) delay: Option<Duration>,
    pub(super) reason: String,
    pub(super) for_good: bool,
}

impl Nack {
    /// The message comes again after the server's backoff: 1 s after the first failure, doubling
    /// up to 60 s.
    pub fn backoff() -> Self {
        Self::default()
    }

    /// The message comes again at once.
    pub fn now() -> Self {
        Self::after(Duration::ZERO)
    }

    /// The message comes again after this delay; a server waits for 60 s at most.
    pub fn after(delay: Duration) -> Self {
        Self { delay: Some(delay), ..Self::default() }
    }

    /// Another attempt would be of no use: the message goes to the dead-letter topic at once, or
    /// is skipped, as the [policy](crate::FailurePolicy) of the subscription says. Where that is to
    /// show it until it is acked, it comes again as after any other nack.
    pub fn for_good() -> Self {
        Self { for_good: true, ..Self::default() }
    }

    /// Says why, in 1 KiB at most: the rest is cut off. A dead letter carries the first 512 bytes.
    #[must_use]
    pub fn because(mut self, reason: impl Into<String>) -> Self {
        self.reason = reason.into();
        shorten(&mut self.reason, limits::NACK_REASON_BYTES);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_reason_is_cut_between_characters() {
        let nack = Nack::now().because(format!("a{}", "ü".repeat(1_000_000)));
        assert_eq!(nack.reason, format!("a{}", "ü".repeat(511)));
    }
}
