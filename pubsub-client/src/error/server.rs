//! What the server says, and how the connection to it can fail.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use pubsub_proto::v1 as pb;
use tonic::Code;
use tonic_types::StatusExt as _;

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// Why the server refused something.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Reason {
            $($(#[$doc])* $variant,)*
            /// A reason that this version of the client does not know.
            Other,
        }

        impl Reason {
            /// The name on the wire and in `docs/protocol.md`.
            pub fn as_str(&self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                    Self::Other => "OTHER",
                }
            }

            pub(crate) fn from_name(name: &str) -> Self {
                match name {
                    $($name => Self::$variant,)*
                    _ => Self::Other,
                }
            }
        }
    };
}

reasons! {
    /// A field is malformed.
    InvalidArgument = "INVALID_ARGUMENT",
    /// A frame came at the wrong moment: a bug on one of the sides.
    ProtocolViolation = "PROTOCOL_VIOLATION",
    /// The server does not speak this client's version of the protocol.
    UnsupportedProtocol = "UNSUPPORTED_PROTOCOL",
    /// There is no topic of this name.
    TopicNotFound = "TOPIC_NOT_FOUND",
    /// A topic of this name exists already.
    TopicExists = "TOPIC_EXISTS",
    /// The topic was deleted, or deleted and created again.
    TopicRecreated = "TOPIC_RECREATED",
    /// There is no subscription of this name.
    SubscriptionNotFound = "SUBSCRIPTION_NOT_FOUND",
    /// A subscription of this name exists already.
    SubscriptionExists = "SUBSCRIPTION_EXISTS",
    /// The subscription exists with other settings.
    SubscriptionMismatch = "SUBSCRIPTION_MISMATCH",
    /// The subscription was deleted, or deleted and created again.
    SubscriptionDeleted = "SUBSCRIPTION_DELETED",
    /// A newer session of the same consumer has taken over.
    Superseded = "SUPERSEDED",
    /// Another consumer holds the subscription.
    SubscriptionBusy = "SUBSCRIPTION_BUSY",
    /// A newer stream or epoch of the same publisher has taken over.
    Fenced = "FENCED",
    /// A publish sequence was skipped.
    OutOfOrder = "OUT_OF_ORDER",
    /// The idempotency key was used before with other content.
    IdempotencyKeyReused = "IDEMPOTENCY_KEY_REUSED",
    /// The message is larger than the topic allows.
    MessageTooLarge = "MESSAGE_TOO_LARGE",
    /// A recipient names no subscription of the topic.
    UnknownRecipient = "UNKNOWN_RECIPIENT",
    /// A limit is reached; the metadata `limit` names it.
    LimitReached = "LIMIT_REACHED",
    /// The topic holds as many unreceived bytes as it may.
    TopicFull = "TOPIC_FULL",
    /// The disk is full, or fuller than the server allows.
    DiskFull = "DISK_FULL",
    /// The server's data was restored from an older copy, or replaced.
    Diverged = "DIVERGED",
    /// Stored data failed its checksum.
    DataLoss = "DATA_LOSS",
    /// The server is starting, stopping or over its capacity.
    Unavailable = "UNAVAILABLE",
    /// The server failed to commit and cannot say whether the write is durable.
    CommitUnknown = "COMMIT_UNKNOWN",
    /// A bug in the server.
    Internal = "INTERNAL",
    /// An ack or seek names a message beyond the head of the topic.
    BeyondHead = "BEYOND_HEAD",
    /// The result of a publish from so long ago is not kept any more.
    ResultExpired = "RESULT_EXPIRED",
    /// There is no snapshot of this name.
    SnapshotNotFound = "SNAPSHOT_NOT_FOUND",
    /// A snapshot of this name exists already.
    SnapshotExists = "SNAPSHOT_EXISTS",
    /// The topic holds the dead letters of a subscription; the metadata `subscription` names it.
    TopicInUse = "TOPIC_IN_USE",
    /// The payload is not valid by the topic's schema.
    SchemaViolation = "SCHEMA_VIOLATION",
    /// The content type is not the topic's.
    ContentTypeMismatch = "CONTENT_TYPE_MISMATCH",
    /// A new schema breaks what the present one promised, or may do so.
    SchemaIncompatible = "SCHEMA_INCOMPATIBLE",
    /// The last message of the topic is not the one that a batch expected.
    HeadMismatch = "HEAD_MISMATCH",
}

impl Reason {
    pub(crate) fn from_wire(reason: i32) -> Self {
        let name = pb::ErrorReason::try_from(reason).unwrap_or_default().as_str_name();
        Self::from_name(name.trim_start_matches("ERROR_REASON_"))
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A refusal by the server.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message} ({reason})")]
pub struct ServerError {
    reason: Reason,
    message: String,
    metadata: BTreeMap<String, String>,
    retry_after: Option<Duration>,
}

impl ServerError {
    pub(crate) fn new(reason: Reason, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { reason, message, metadata: BTreeMap::new(), retry_after: None }
    }

    pub(crate) fn with_metadata(self, metadata: BTreeMap<String, String>) -> Self {
        Self { metadata, ..self }
    }

    /// Why: what programs decide on.
    pub fn reason(&self) -> Reason {
        self.reason
    }

    /// The cause and the fix, for people.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// Details for programs, such as `field`, `limit` or `expected`; which ones comes with the
    /// reason.
    pub fn metadata(&self, name: &str) -> Option<&str> {
        self.metadata.get(name).map(String::as_str)
    }

    /// How long the server asks to wait before trying again.
    pub fn retry_after(&self) -> Option<Duration> {
        self.retry_after
    }

    /// Whether the same request can succeed later without anything being changed about it.
    pub fn is_retryable(&self) -> bool {
        match self.reason {
            Reason::SubscriptionBusy
            | Reason::LimitReached
            | Reason::TopicFull
            | Reason::DiskFull
            | Reason::Unavailable
            | Reason::CommitUnknown
            | Reason::Internal => true,
            Reason::InvalidArgument
            | Reason::ProtocolViolation
            | Reason::UnsupportedProtocol
            | Reason::TopicNotFound
            | Reason::TopicExists
            | Reason::TopicRecreated
            | Reason::SubscriptionNotFound
            | Reason::SubscriptionExists
            | Reason::SubscriptionMismatch
            | Reason::SubscriptionDeleted
            | Reason::Superseded
            | Reason::Fenced
            | Reason::OutOfOrder
            | Reason::IdempotencyKeyReused
            | Reason::MessageTooLarge
            | Reason::UnknownRecipient
            | Reason::Diverged
            | Reason::DataLoss
            | Reason::BeyondHead
            | Reason::ResultExpired
            | Reason::TopicInUse
            | Reason::SnapshotNotFound
            | Reason::SnapshotExists
            | Reason::SchemaViolation
            | Reason::ContentTypeMismatch
            | Reason::SchemaIncompatible
            | Reason::HeadMismatch
            | Reason::Other => false,
        }
    }
}

/// Trouble on the way to the server. The text is for people; there is nothing to decide on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct TransportError(String);

impl TransportError {
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// An error with all that caused it.
    pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> Self {
        let mut text = error.to_string();
        let mut source = error.source();
        while let Some(error) = source {
            let more = error.to_string();
            if !text.contains(&more) {
                text = format!("{text}: {more}");
            }
            source = error.source();
        }
        Self(text)
    }

    /// With this in front, unless it says so already.
    fn after(self, text: &str) -> Self {
        if self.0.contains(text) { self } else { Self(format!("{text}: {}", self.0)) }
    }
}

/// A denial in words that are not a pubsub server's: the address is that of another service, or
/// of a proxy that lets nobody through.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "something that is no pubsub server answered {0:?}; the address may be that of another \
     service, or of a proxy that wants credentials"
)]
pub struct ForeignAnswer(String);

impl ForeignAnswer {
    /// What was answered: a code of gRPC, and a text for people.
    pub fn answer(&self) -> &str {
        &self.0
    }
}

/// Why a session lost its connection, or ended.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Cause {
    /// Nothing was heard from the server for this long, or it left a ping or a message unanswered.
    #[error("no sign of life from the server for {0:?}")]
    Silence(Duration),
    /// The server did not answer the hello in time.
    #[error("the server accepted the connection but did not answer within {0:?}")]
    HandshakeTimeout(Duration),
    /// The connection failed, or could not be made.
    #[error(transparent)]
    Transport(TransportError),
    /// The server refused.
    #[error(transparent)]
    Server(ServerError),
    /// Something that is no pubsub server denied the request. It is tried again for a minute, in
    /// which a proxy may find its server; then the session ends.
    #[error(transparent)]
    Foreign(ForeignAnswer),
    /// The server announced its restart.
    #[error("the server is restarting: {0}")]
    Drain(String),
    /// What the server sent contradicts what it sent before.
    #[error("out of step with the server: {0}")]
    Protocol(String),
    /// A bug in this client. The session starts over; nothing is lost.
    #[error("the session panicked")]
    Panicked,
    /// The session's task is gone: the runtime on which it was opened has ended, or the task has
    /// panicked.
    #[error("the session's task is gone, with its runtime or by a panic")]
    TaskGone,
}

impl Cause {
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Server(error) => error.retry_after,
            Self::Silence(_)
            | Self::HandshakeTimeout(_)
            | Self::Transport(_)
            | Self::Foreign(_)
            | Self::Drain(_)
            | Self::Protocol(_)
            | Self::Panicked
            | Self::TaskGone => None,
        }
    }
}

/// What a gRPC status means.
///
/// A status counts as the server's word only if it carries our `ErrorInfo`. The code of any
/// other one depends on proxies, on the moment and even on Cargo features; it is transport
/// trouble, whatever it says. Only a denial is told apart: it can be the last word of something
/// that is no pubsub server.
#[derive(Debug)]
pub(crate) enum Verdict {
    Server(ServerError),
    Foreign(ForeignAnswer),
    Transport(TransportError),
}

impl Verdict {
    pub(crate) fn of(status: &tonic::Status) -> Self {
        let info = status.get_details_error_info();
        let Some(info) = info.filter(|info| info.domain == pubsub_proto::ERROR_DOMAIN) else {
            let text = match status.message() {
                "" => status.code().description(),
                text => text,
            };
            let code = status.code();
            if matches!(code, Code::Unauthenticated | Code::PermissionDenied | Code::Unimplemented)
            {
                return Self::Foreign(ForeignAnswer(format!("{code:?}: {text}")));
            }
            return Self::Transport(match std::error::Error::source(status) {
                Some(source) => TransportError::chain(source).after(text),
                None => TransportError::new(text),
            });
        };
        let retry = status.get_details_retry_info();
        Self::Server(ServerError {
            reason: Reason::from_name(&info.reason),
            message: status.message().to_owned(),
            metadata: info.metadata.into_iter().collect(),
            retry_after: retry.and_then(|retry| retry.retry_delay),
        })
    }
}

impl From<Verdict> for Cause {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Server(error) => Self::Server(error),
            Verdict::Foreign(answer) => Self::Foreign(answer),
            Verdict::Transport(error) => Self::Transport(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use tonic::Status;
    use tonic_types::ErrorDetails;

    use super::*;

    fn status(domain: &str) -> Status {
        let mut details = ErrorDetails::new();
        details.set_error_info("TOPIC_FULL", domain, HashMap::from([("a".into(), "b".into())]));
        details.set_retry_info(Some(Duration::from_secs(3)));
        Status::with_error_details(Code::ResourceExhausted, "full", details)
    }

    #[test]
    fn only_our_domain_is_the_servers_word() {
        let Verdict::Server(error) = Verdict::of(&status("pubsub.v1")) else {
            panic!("not recognised");
        };
        assert_eq!(error.reason(), Reason::TopicFull);
        assert_eq!(error.metadata("a"), Some("b"));
        assert_eq!(error.retry_after(), Some(Duration::from_secs(3)));
        assert!(matches!(Verdict::of(&status("other")), Verdict::Transport(_)));
        for code in [Code::NotFound, Code::Unavailable, Code::Unknown, Code::Cancelled] {
            let status = Status::new(code, "a proxy says");
            assert!(matches!(Verdict::of(&status), Verdict::Transport(_)), "{code}");
        }
    }

    #[test]
    fn a_denial_is_the_servers_word_or_that_of_something_else() {
        for code in [Code::Unauthenticated, Code::PermissionDenied, Code::Unimplemented] {
            let status = Status::new(code, "a proxy says");
            let Verdict::Foreign(answer) = Verdict::of(&status) else { panic!("{code}") };
            assert_eq!(answer.answer(), format!("{code:?}: a proxy says"));
            let mut details = ErrorDetails::new();
            details.set_error_info("TOPIC_FULL", "pubsub.v1", HashMap::new());
            let status = Status::with_error_details(code, "full", details);
            assert!(matches!(Verdict::of(&status), Verdict::Server(_)), "{code}");
        }
    }

    #[test]
    fn every_reason_of_the_protocol_has_a_name_here() {
        for number in 1..100 {
            if pb::ErrorReason::try_from(number).is_ok() {
                assert_ne!(Reason::from_wire(number), Reason::Other, "reason {number}");
            }
        }
        assert_eq!(Reason::from_wire(0), Reason::Other);
        assert_eq!(Reason::from_wire(9999), Reason::Other);
    }
}
