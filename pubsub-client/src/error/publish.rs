//! How a publish can fail.

use crate::admin::SchemaProblem;
use crate::error::{ForeignAnswer, Reason, ServerError};
use crate::limits;
use crate::message::Message;

/// Whether something that failed may have happened all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It certainly did not happen: the message is not stored and never will be.
    NotPersisted,
    /// Nobody can say any more. Publishing again is safe only under the same idempotency key.
    Unknown,
}

/// A message's fate is an error.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{kind}{}", match outcome { Outcome::NotPersisted => "", Outcome::Unknown => "; the message may or may not be stored" })]
pub struct PublishError {
    kind: PublishErrorKind,
    outcome: Outcome,
    idempotency_key: Option<String>,
}

/// Why a message's fate is an error.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PublishErrorKind {
    /// The server refused this message for good; others are not affected.
    #[error("the server refused the message: {0}")]
    Refused(ServerError),
    /// The server refused this publisher for good, for example because there is no such topic.
    #[error("the server refused the publisher: {0}")]
    Session(ServerError),
    /// The message is larger than the topic allows.
    #[error("the message has {size} bytes, {limit} are allowed")]
    TooLarge {
        /// The bytes of the message as encoded.
        size: usize,
        /// The bytes that are allowed.
        limit: usize,
    },
    /// A batch is empty, or larger than one that can be stored at once.
    #[error(
        "the batch has {messages} messages with {bytes} bytes; 1 to {} with {} are allowed",
        limits::ATOMIC_MESSAGES,
        limits::ATOMIC_BYTES
    )]
    BatchSize {
        /// How many messages.
        messages: usize,
        /// Their bytes as encoded.
        bytes: usize,
    },
    /// The message's own deadline passed.
    #[error("the message's deadline passed")]
    DeadlineElapsed,
    /// The message was first sent so long ago that the server may have forgotten it: sending it
    /// again could store it twice.
    #[error("the message was sent longer ago than the server remembers its publishers")]
    HorizonElapsed,
    /// The server has forgotten this publisher.
    #[error("the server has forgotten this publisher")]
    ProducerStateLost,
    /// The server's data was restored from an older copy, or replaced.
    #[error("the server's data was restored from an older copy, or replaced")]
    Diverged,
    /// The topic was deleted and created again.
    #[error("the topic was deleted and created again")]
    TopicRecreated,
    /// The server has lost messages that it had acknowledged.
    #[error(
        "the server lost acknowledged messages: it should know sequence {expected}, but only knows {found}"
    )]
    ServerRegressed {
        /// The last sequence that the server had answered.
        expected: u64,
        /// The last sequence that it knows of now.
        found: u64,
    },
    /// The topic's schema does not take everything that the schema of this publisher does.
    #[error("the topic's schema does not take what this publisher was written for: {}", told(*revision, problems))]
    SchemaMismatch {
        /// The topic's present revision, if it has one.
        revision: Option<u32>,
        /// What of the publisher's schema it does not take. Empty if the topic has none.
        problems: Vec<SchemaProblem>,
    },
    /// Something else publishes under this publisher's identity.
    #[error("a newer publisher of the same identity has taken over")]
    Fenced,
    /// Client and server cannot agree on what was sent.
    #[error("out of step with the server: {0}")]
    Protocol(String),
    /// Something that is no pubsub server has denied each attempt for a minute.
    #[error(transparent)]
    Foreign(ForeignAnswer),
    /// The publisher's window is full.
    #[error("the publisher's window is full")]
    Full,
    /// The server cannot take messages for now.
    #[error("the server cannot take messages: {0}")]
    Blocked(ServerError),
    /// The publisher's task is gone: the runtime on which it was opened has ended, or the task has
    /// panicked.
    #[error("the publisher's task is gone, with its runtime or by a panic")]
    TaskGone,
    /// The publisher was closed before the message's fate was known.
    #[error("the publisher is closed")]
    Closed,
}

impl PublishError {
    pub(crate) fn new(kind: PublishErrorKind, outcome: Outcome) -> Self {
        Self { kind, outcome, idempotency_key: None }
    }

    pub(crate) fn with_key(mut self, key: &str) -> Self {
        self.idempotency_key = (!key.is_empty()).then(|| key.to_owned());
        self
    }

    /// Why.
    pub fn kind(&self) -> &PublishErrorKind {
        &self.kind
    }

    /// Whether the message may be stored all the same.
    pub fn outcome(&self) -> Outcome {
        self.outcome
    }

    /// The idempotency key of the message, under which it can be published again safely.
    pub fn idempotency_key(&self) -> Option<&str> {
        self.idempotency_key.as_deref()
    }

    /// The server's reason, if it gave one.
    pub fn reason(&self) -> Option<Reason> {
        match &self.kind {
            PublishErrorKind::Refused(error)
            | PublishErrorKind::Session(error)
            | PublishErrorKind::Blocked(error) => Some(error.reason()),
            PublishErrorKind::TooLarge { .. }
            | PublishErrorKind::BatchSize { .. }
            | PublishErrorKind::DeadlineElapsed
            | PublishErrorKind::HorizonElapsed
            | PublishErrorKind::ProducerStateLost
            | PublishErrorKind::Diverged
            | PublishErrorKind::TopicRecreated
            | PublishErrorKind::ServerRegressed { .. }
            | PublishErrorKind::SchemaMismatch { .. }
            | PublishErrorKind::Fenced
            | PublishErrorKind::Protocol(_)
            | PublishErrorKind::Foreign(_)
            | PublishErrorKind::Full
            | PublishErrorKind::TaskGone
            | PublishErrorKind::Closed => None,
        }
    }

    /// Where the payload breaks the topic's schema, if that is why it was refused.
    pub fn schema_violation(&self) -> Option<SchemaViolation<'_>> {
        let PublishErrorKind::Refused(error) = &self.kind else { return None };
        (error.reason() == Reason::SchemaViolation).then(|| SchemaViolation {
            revision: error
                .metadata("schema_revision")
                .and_then(|revision| revision.parse().ok())
                .unwrap_or_default(),
            field: error.metadata("field").unwrap_or_default(),
        })
    }

    /// The last message of the topic, if a batch was refused because it expected another one.
    pub fn actual_head(&self) -> Option<u64> {
        let PublishErrorKind::Refused(error) = &self.kind else { return None };
        error.metadata("head").and_then(|head| head.parse().ok())
    }

    /// Which message of a batch, from 0, it was refused for, if it was for one of them.
    pub fn batch_index(&self) -> Option<usize> {
        let PublishErrorKind::Refused(error) = &self.kind else { return None };
        error.metadata("index").and_then(|index| index.parse().ok())
    }

    /// Whether publishing the same message again can succeed. If the
    /// [outcome](Self::outcome) is unknown, do so only under the same idempotency key.
    pub fn is_retryable(&self) -> bool {
        match &self.kind {
            PublishErrorKind::DeadlineElapsed
            | PublishErrorKind::HorizonElapsed
            | PublishErrorKind::ProducerStateLost
            | PublishErrorKind::Diverged
            | PublishErrorKind::TopicRecreated
            | PublishErrorKind::Full
            | PublishErrorKind::Blocked(_)
            | PublishErrorKind::TaskGone
            | PublishErrorKind::Closed => true,
            PublishErrorKind::Refused(error) => error.reason() == Reason::ResultExpired,
            PublishErrorKind::Session(error) => error.is_retryable(),
            PublishErrorKind::TooLarge { .. }
            | PublishErrorKind::BatchSize { .. }
            | PublishErrorKind::ServerRegressed { .. }
            | PublishErrorKind::SchemaMismatch { .. }
            | PublishErrorKind::Fenced
            | PublishErrorKind::Protocol(_)
            | PublishErrorKind::Foreign(_) => false,
        }
    }
}

/// Where a payload breaks the schema of its topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SchemaViolation<'e> {
    /// The revision of the schema.
    pub revision: u32,
    /// A JSON pointer, or the path of a protobuf field. Empty: the payload as a whole.
    pub field: &'e str,
}

fn told(revision: Option<u32>, problems: &[SchemaProblem]) -> String {
    match (revision, problems) {
        (Some(revision), [first, ..]) => format!("revision {revision}: {first}"),
        _ => "it has none".to_owned(),
    }
}

/// A message was not accepted into the publisher's window. It was not sent.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EnqueueError {
    /// The window is full; only [`try_enqueue`](crate::Publisher::try_enqueue) says so, the others
    /// wait.
    #[error("the publisher's window is full")]
    Full {
        /// The message, handed back.
        message: Box<Message>,
    },
    /// The server cannot take messages for now; only
    /// [`try_enqueue`](crate::Publisher::try_enqueue) says so, the others wait.
    #[error("the server cannot take messages: {detail} ({reason})")]
    Blocked {
        /// Why.
        reason: Reason,
        /// The cause and the fix, for people.
        detail: String,
        /// The message, handed back.
        message: Box<Message>,
    },
    /// The message is larger than the topic allows.
    #[error("the message has {size} bytes, {limit} are allowed")]
    TooLarge {
        /// The bytes of the message as encoded.
        size: usize,
        /// The bytes that are allowed.
        limit: usize,
        /// The message, handed back.
        message: Box<Message>,
    },
    /// The message is larger than what the permit was reserved for.
    #[error("the message has {size} bytes, the permit was reserved for {reserved}")]
    ExceedsPermit {
        /// The bytes of the message as encoded.
        size: usize,
        /// The bytes of the permit.
        reserved: usize,
        /// The message, handed back.
        message: Box<Message>,
    },
    /// The message's own deadline passed before there was room in the window.
    #[error("the message's deadline passed before there was room for it")]
    DeadlineElapsed {
        /// The message, handed back.
        message: Box<Message>,
    },
    /// The publisher is closed, or has failed for good.
    #[error("the publisher is closed{}", cause.as_ref().map(|cause| format!(": {cause}")).unwrap_or_default())]
    Closed {
        /// Why it failed; nothing if it was closed.
        cause: Option<Box<PublishErrorKind>>,
        /// The message, handed back; nothing if there was none yet.
        message: Option<Box<Message>>,
    },
}

impl EnqueueError {
    /// The message, handed back.
    pub fn into_message(self) -> Option<Message> {
        match self {
            Self::Full { message }
            | Self::Blocked { message, .. }
            | Self::TooLarge { message, .. }
            | Self::ExceedsPermit { message, .. }
            | Self::DeadlineElapsed { message } => Some(*message),
            Self::Closed { message, .. } => message.map(|message| *message),
        }
    }

    fn idempotency_key(&self) -> Option<&str> {
        match self {
            Self::Full { message }
            | Self::Blocked { message, .. }
            | Self::TooLarge { message, .. }
            | Self::ExceedsPermit { message, .. }
            | Self::DeadlineElapsed { message } => message.idempotency_key.as_deref(),
            Self::Closed { message, .. } => message.as_ref()?.idempotency_key.as_deref(),
        }
    }

    /// Whether the same message can be accepted later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Full { .. } | Self::Blocked { .. } | Self::DeadlineElapsed { .. } => true,
            Self::TooLarge { .. } | Self::ExceedsPermit { .. } | Self::Closed { .. } => false,
        }
    }

    /// Always [`Outcome::NotPersisted`].
    pub fn outcome(&self) -> Outcome {
        Outcome::NotPersisted
    }
}

impl From<EnqueueError> for PublishError {
    fn from(error: EnqueueError) -> Self {
        let key = error.idempotency_key().unwrap_or_default().to_owned();
        let kind = match error {
            EnqueueError::TooLarge { size, limit, .. } => {
                PublishErrorKind::TooLarge { size, limit }
            }
            EnqueueError::ExceedsPermit { size, reserved, .. } => {
                PublishErrorKind::TooLarge { size, limit: reserved }
            }
            EnqueueError::Blocked { reason, detail, .. } => {
                PublishErrorKind::Blocked(ServerError::new(reason, detail))
            }
            EnqueueError::DeadlineElapsed { .. } => PublishErrorKind::DeadlineElapsed,
            EnqueueError::Full { .. } => PublishErrorKind::Full,
            EnqueueError::Closed { cause: Some(cause), .. } => *cause,
            EnqueueError::Closed { cause: None, .. } => PublishErrorKind::Closed,
        };
        Self::new(kind, Outcome::NotPersisted).with_key(&key)
    }
}

/// Messages have failed that nobody had a ticket of any more, or the publisher had ended before it
/// was flushed.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{}", match failed { 0 => first.to_string(), _ => format!("{failed} messages were not published; the first: {first}") })]
pub struct FlushError {
    pub(crate) failed: usize,
    pub(crate) first: PublishError,
}

impl FlushError {
    /// How many messages have failed; 0 if the publisher had ended, and all of its failures were
    /// seen.
    pub fn failed(&self) -> usize {
        self.failed
    }

    /// The first failure, or why the publisher had ended.
    pub fn first(&self) -> &PublishError {
        &self.first
    }

    /// [`Outcome::Unknown`] as soon as that is so for the first failure.
    pub fn outcome(&self) -> Outcome {
        self.first.outcome
    }

    /// Whether publishing what failed again can succeed, judged by the first failure.
    pub fn is_retryable(&self) -> bool {
        self.first.is_retryable()
    }
}

/// A message whose fate was not known when its publisher ended.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Unresolved {
    /// The message.
    pub message: Message,
    /// [`Outcome::NotPersisted`] if it was never sent.
    pub outcome: Outcome,
}

/// A publisher was closed before it knew the fate of all messages.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{} messages were unresolved when the publisher was closed", unresolved.len())]
pub struct CloseError {
    pub(crate) unresolved: Vec<Unresolved>,
}

impl CloseError {
    /// The messages, in the order of their enqueueing.
    pub fn unresolved(&self) -> &[Unresolved] {
        &self.unresolved
    }

    /// The messages, in the order of their enqueueing.
    pub fn into_unresolved(self) -> Vec<Unresolved> {
        self.unresolved
    }

    /// [`Outcome::Unknown`] if any of the messages was sent.
    pub fn outcome(&self) -> Outcome {
        let sent = |left: &Unresolved| left.outcome == Outcome::Unknown;
        if self.unresolved.iter().any(sent) { Outcome::Unknown } else { Outcome::NotPersisted }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_that_finds_no_room_can_be_published_again_under_its_key() {
        let message = || Box::new(Message::new("x").with_idempotency_key("k"));
        let (reason, detail) = (Reason::TopicFull, "full".to_owned());
        let blocked = EnqueueError::Blocked { reason, detail, message: message() };
        for (error, reason) in [
            (EnqueueError::Full { message: message() }, None),
            (blocked, Some(Reason::TopicFull)),
            (EnqueueError::DeadlineElapsed { message: message() }, None),
        ] {
            let error = PublishError::from(error);
            assert_eq!((error.idempotency_key(), error.reason()), (Some("k"), reason));
            assert!(error.is_retryable(), "{error}");
            assert!(!matches!(error.kind(), PublishErrorKind::Closed), "{error}");
        }
    }
}
