//! What can go wrong, by operation. Trouble on the way to the server is not in here: it is
//! retried, and visible in the [state](crate::ConnectionState). Only what looks like an address
//! that is not the server's ends a session.

mod publish;
mod server;
mod subscribe;

pub use publish::{
    CloseError, EnqueueError, FlushError, Outcome, PublishError, PublishErrorKind, SchemaViolation,
    Unresolved,
};
pub(crate) use server::Verdict;
pub use server::{Cause, ForeignAnswer, Reason, ServerError, TransportError};
pub use subscribe::{AckError, SubscribeError};

/// The client could not be made.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The address is not one.
    #[error("{url:?} is not an address of a pubsub server: {detail}")]
    InvalidUrl {
        /// What was given.
        url: String,
        /// What is wrong with it.
        detail: String,
    },
    /// No pubsub server answered at the address; possibly something else did.
    #[error("no pubsub server answers at {url}: {source}")]
    Unreachable {
        /// The address.
        url: String,
        /// What happened.
        source: TransportError,
    },
    /// The server answered and refused.
    #[error(transparent)]
    Refused(ServerError),
}

impl ConnectError {
    /// Whether trying again later can succeed.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::InvalidUrl { .. } => false,
            Self::Unreachable { .. } => true,
            Self::Refused(error) => error.is_retryable(),
        }
    }
}

/// A request to administer the server failed.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdminError {
    /// The server answered and refused; nothing was changed.
    #[error(transparent)]
    Refused(ServerError),
    /// The server could not be reached.
    #[error("the server cannot be reached: {source}")]
    Unreachable {
        /// What happened.
        source: TransportError,
        /// Whether the request may have reached the server all the same.
        sent: bool,
    },
    /// The server answered with something that makes no sense.
    #[error("the server's answer is malformed: {0}")]
    Malformed(String),
}

impl AdminError {
    /// The server's reason, if it gave one.
    pub fn reason(&self) -> Option<Reason> {
        match self {
            Self::Refused(error) => Some(error.reason()),
            Self::Unreachable { .. } | Self::Malformed(_) => None,
        }
    }

    /// Whether the same request can succeed later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Refused(error) => error.is_retryable(),
            Self::Unreachable { .. } => true,
            Self::Malformed(_) => false,
        }
    }

    /// Whether the request may have taken effect.
    pub fn outcome(&self) -> Outcome {
        match self {
            Self::Refused(error) if error.reason() == Reason::CommitUnknown => Outcome::Unknown,
            Self::Refused(_) | Self::Unreachable { sent: false, .. } => Outcome::NotPersisted,
            Self::Unreachable { sent: true, .. } | Self::Malformed(_) => Outcome::Unknown,
        }
    }
}
