//! How a subscription can fail.

use crate::codec::CodecError;
use crate::error::{ForeignAnswer, Reason, ServerError};
use crate::subscriber::Delivery;

/// An error in the stream of a subscriber. Except for [`Decode`](Self::Decode) it is terminal:
/// the stream ends after it.
///
/// A lost connection or a restarted server is not among them; the subscriber reconnects.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SubscribeError {
    /// The server refused, or ended, the session for good: for example because a newer consumer
    /// of the same id took over ([`Reason::Superseded`]), the subscription was deleted, or it
    /// exists with other settings ([`Reason::SubscriptionMismatch`]; the metadata `field` says
    /// which).
    #[error(transparent)]
    Refused(ServerError),
    /// Client and server cannot agree on what was delivered.
    #[error("out of step with the server: {0}")]
    Protocol(String),
    /// Something that is no pubsub server has denied each attempt for a minute.
    #[error(transparent)]
    Foreign(ForeignAnswer),
    /// The subscriber's task is gone, with its runtime or by a panic.
    #[error("the subscriber's task is gone: its runtime has ended, or it panicked")]
    TaskGone,
    /// A payload could not be decoded. The stream goes on, and the delivery can still be acked
    /// or nacked; it is released when dropped.
    #[error("the payload of {} cannot be decoded: {source}", delivery.id)]
    Decode {
        /// The message.
        delivery: Box<Delivery>,
        /// What is wrong with it.
        source: CodecError,
    },
}

impl SubscribeError {
    /// The server's reason, if it gave one.
    pub fn reason(&self) -> Option<Reason> {
        match self {
            Self::Refused(error) => Some(error.reason()),
            Self::Protocol(_) | Self::Foreign(_) | Self::TaskGone | Self::Decode { .. } => None,
        }
    }

    /// Whether opening the same subscriber again can succeed.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Refused(error) => error.is_retryable(),
            Self::Protocol(_) | Self::TaskGone => true,
            // The address is wrong, or credentials are missing: waiting changes neither.
            Self::Foreign(_) | Self::Decode { .. } => false,
        }
    }
}

/// An ack was not confirmed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AckError {
    /// The position was moved by a seek, or the topic was deleted, since the message was
    /// delivered: the ack has no meaning any more.
    #[error("the position was moved, or the topic deleted, since the message was delivered")]
    Stale,
    /// The subscriber ended before the server confirmed the ack, which may or may not have
    /// arrived.
    #[error("the subscriber ended before the ack was confirmed")]
    Closed,
}

impl AckError {
    /// Whether acking again can succeed: never. A message whose ack is not known to the server
    /// is delivered again, and can be acked then.
    pub fn is_retryable(&self) -> bool {
        false
    }

    /// [`Outcome::Unknown`](crate::Outcome::Unknown) if the ack may have arrived.
    pub fn outcome(&self) -> crate::Outcome {
        match self {
            Self::Stale => crate::Outcome::NotPersisted,
            Self::Closed => crate::Outcome::Unknown,
        }
    }
}
