//! How an outbox can fail.

use crate::error::Outcome;
use crate::local::FileError;
use crate::message::Message;

/// An outbox cannot do what it was asked for.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OutboxError {
    /// There is no room: as many messages or bytes wait, or were set aside, as it may hold.
    #[error(
        "the outbox is full: it holds {messages} messages with {bytes} bytes, of which {parked} \
         were set aside; see its state for what it waits for"
    )]
    Full {
        /// The messages it holds.
        messages: u64,
        /// Their bytes.
        bytes: u64,
        /// Those of the messages that were set aside.
        parked: u64,
        /// The message, handed back.
        message: Box<Message>,
    },
    /// It publishes to as many topics as it may.
    #[error("the outbox publishes to {limit} topics, its limit; use another one for more")]
    TooManyTopics {
        /// How many it may.
        limit: usize,
        /// The message, handed back; nothing if it was set aside, and is still.
        message: Option<Box<Message>>,
    },
    /// The message is larger than any topic can allow.
    #[error("the message has {size} bytes, {limit} are allowed at most")]
    TooLarge {
        /// The bytes of the message as encoded.
        size: usize,
        /// The bytes that are allowed.
        limit: usize,
        /// The message, handed back.
        message: Box<Message>,
    },
    /// Some of what was enqueued was set aside, and is not published.
    #[error("{messages} messages were set aside and are not published; see which, and why")]
    Parked {
        /// How many.
        messages: usize,
    },
    /// No message of this number was set aside.
    #[error("no message {item} was set aside: it may be published, resent or discarded by now")]
    NotParked {
        /// The number.
        item: u64,
    },
    /// The file cannot be used. Whether a message that was being enqueued is in it is known when
    /// it is opened again.
    #[error(transparent)]
    File(#[from] FileError),
    /// It is closed.
    #[error("the outbox is closed")]
    Closed,
}

impl OutboxError {
    /// Whether the same can succeed later without anything being changed about it.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Full { .. } => true,
            Self::File(error) => error.is_retryable(),
            Self::TooManyTopics { .. }
            | Self::TooLarge { .. }
            | Self::Parked { .. }
            | Self::NotParked { .. }
            | Self::Closed => false,
        }
    }

    /// Whether a message may be in the outbox although enqueueing it failed. It has an identity
    /// then that another attempt does not have, unless the application has given it an
    /// [idempotency key](Message::idempotency_key).
    pub fn outcome(&self) -> Outcome {
        match self {
            Self::File(FileError::Io { .. }) => Outcome::Unknown,
            Self::File(_)
            | Self::Full { .. }
            | Self::TooManyTopics { .. }
            | Self::TooLarge { .. }
            | Self::Parked { .. }
            | Self::NotParked { .. }
            | Self::Closed => Outcome::NotPersisted,
        }
    }

    /// The message, handed back.
    pub fn into_message(self) -> Option<Message> {
        match self {
            Self::Full { message, .. } | Self::TooLarge { message, .. } => Some(*message),
            Self::TooManyTopics { message, .. } => message.map(|message| *message),
            Self::Parked { .. } | Self::NotParked { .. } | Self::File(_) | Self::Closed => None,
        }
    }
}
