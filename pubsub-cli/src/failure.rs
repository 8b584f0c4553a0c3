//! Errors as a terminal and a script need them: the cause, the fix, and an exit code.

use std::fmt;
use std::io;
use std::process::ExitCode;

use pubsub_client::{
    AdminError, ConnectError, EnqueueError, FileError, OutboxError, Outcome, PublishError,
    PublishErrorKind, Reason, ServerError, SubscribeError,
};
use serde_json::json;

/// How the command ends. `pubsub --help` lists these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Exit {
    Ok = 0,
    Failed = 1,
    Usage = 2,
    NotFound = 3,
    Conflict = 4,
    Unreachable = 5,
    Unknown = 6,
    Limit = 7,
    Interrupted = 130,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Why the command fails.
#[derive(Debug)]
pub(crate) struct Failure {
    exit: Exit,
    cause: String,
    fix: Option<String>,
    reason: Option<Reason>,
    broken_pipe: bool,
}

impl Failure {
    pub(crate) fn new(exit: Exit, cause: impl Into<String>) -> Self {
        Self { exit, cause: cause.into(), fix: None, reason: None, broken_pipe: false }
    }

    pub(crate) fn failed(cause: impl Into<String>) -> Self {
        Self::new(Exit::Failed, cause)
    }

    pub(crate) fn not_found(cause: impl Into<String>) -> Self {
        Self::new(Exit::NotFound, cause)
    }

    pub(crate) fn usage(cause: impl Into<String>) -> Self {
        Self::new(Exit::Usage, cause)
    }

    pub(crate) fn with_fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = Some(fix.into());
        self
    }

    /// It failed because it was interrupted, unless that is not the worst of it.
    pub(crate) fn interrupted(mut self) -> Self {
        if self.exit == Exit::Failed {
            self.exit = Exit::Interrupted;
        }
        self
    }

    pub(crate) fn exit(&self) -> Exit {
        self.exit
    }

    /// Whether nobody reads standard output any more.
    pub(crate) fn is_broken_pipe(&self) -> bool {
        self.broken_pipe
    }

    /// Writes it to standard error.
    pub(crate) fn report(&self, json: bool) {
        if json {
            let error = json!({
                "type": "error",
                "message": self.cause,
                "fix": self.fix,
                "reason": self.reason.map(|reason| reason.as_str()),
                "exit_code": self.exit as u8,
            });
            eprintln!("{error}");
        } else {
            eprintln!("{self}");
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pubsub: {}", self.cause)?;
        self.fix.as_ref().map_or(Ok(()), |fix| write!(f, "\n  {fix}"))
    }
}

/// Standard output fails.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        let broken_pipe = error.kind() == io::ErrorKind::BrokenPipe;
        let failure = Self::failed(format!("standard output cannot be written: {error}"));
        Self { broken_pipe, ..failure }
    }
}

impl From<&ServerError> for Failure {
    fn from(error: &ServerError) -> Self {
        let reason = error.reason();
        let failure = Self::new(exit(reason), error.message());
        Self { reason: Some(reason), fix: fix(reason).map(str::to_owned), ..failure }
    }
}

impl From<ConnectError> for Failure {
    fn from(error: ConnectError) -> Self {
        match &error {
            ConnectError::Unreachable { url, source } => unreachable(url, &source.to_string()),
            ConnectError::Refused(refused) => refused.into(),
            ConnectError::InvalidUrl { .. } => Self::usage(error.to_string())
                .with_fix("Give --server or PUBSUB_SERVER, such as http://127.0.0.1:7670."),
            _ => Self::failed(error.to_string()),
        }
    }
}

impl From<OutboxError> for Failure {
    #[expect(clippy::wildcard_enum_match_arm, reason = "the others say it all in their text")]
    fn from(error: OutboxError) -> Self {
        let text = error.to_string();
        match error {
            OutboxError::File(FileError::NotFound { .. }) => Self::new(Exit::NotFound, text),
            OutboxError::NotParked { .. } => Self::new(Exit::NotFound, text)
                .with_fix("`pubsub outbox inspect FILE` shows what was set aside."),
            OutboxError::File(FileError::InUse { .. }) => Self::new(Exit::Conflict, text)
                .with_fix("Stop the process that has it; its own state tells the same."),
            _ => Self::failed(text),
        }
    }
}

fn unreachable(url: &str, cause: &str) -> Failure {
    Failure::new(Exit::Unreachable, format!("server not reachable at {url}: {cause}")).with_fix(
        "Is it running? Start it with `pubsub-server`, or name another with --server or \
         PUBSUB_SERVER.",
    )
}

impl From<AdminError> for Failure {
    fn from(error: AdminError) -> Self {
        if let AdminError::Refused(refused) = &error {
            return refused.into();
        }
        match error.outcome() {
            Outcome::Unknown => Self::new(Exit::Unknown, error.to_string())
                .with_fix("It may have been done all the same: look before you repeat it."),
            Outcome::NotPersisted => Self::new(Exit::Unreachable, error.to_string()),
        }
    }
}

impl From<EnqueueError> for Failure {
    fn from(error: EnqueueError) -> Self {
        PublishError::from(error).into()
    }
}

impl From<PublishError> for Failure {
    #[expect(clippy::wildcard_enum_match_arm, reason = "the others are told by their text")]
    fn from(error: PublishError) -> Self {
        let failure = match error.kind() {
            PublishErrorKind::Refused(refused) | PublishErrorKind::Session(refused) => {
                refused.into()
            }
            PublishErrorKind::TooLarge { .. } => Self::new(Exit::Limit, error.to_string())
                .with_fix("Create the topic with a larger --max-message-bytes, up to 16MiB."),
            PublishErrorKind::BatchSize { .. } => Self::new(Exit::Limit, error.to_string()),
            PublishErrorKind::DeadlineElapsed | PublishErrorKind::Closed => {
                let again = "It was never sent, so publishing it again is safe.";
                Self::failed(error.to_string()).with_fix(again)
            }
            PublishErrorKind::TopicRecreated => Self::new(Exit::Conflict, error.to_string()),
            _ => Self::failed(error.to_string()),
        };
        if error.outcome() == Outcome::NotPersisted {
            return failure;
        }
        let again =
            "Publish it again only under the same --idempotency-key: then it is stored once.";
        Self { exit: Exit::Unknown, cause: error.to_string(), ..failure }.with_fix(again)
    }
}

impl From<SubscribeError> for Failure {
    fn from(error: SubscribeError) -> Self {
        match &error {
            SubscribeError::Refused(refused) => refused.into(),
            SubscribeError::Protocol(_) | SubscribeError::Decode { .. } | _ => {
                Self::failed(error.to_string())
            }
        }
    }
}

fn exit(reason: Reason) -> Exit {
    match reason {
        Reason::InvalidArgument => Exit::Usage,
        Reason::TopicNotFound
        | Reason::SubscriptionNotFound
        | Reason::SnapshotNotFound
        | Reason::SubscriptionDeleted
        | Reason::UnknownRecipient
        | Reason::BeyondHead => Exit::NotFound,
        Reason::TopicExists
        | Reason::TopicRecreated
        | Reason::TopicInUse
        | Reason::SubscriptionExists
        | Reason::SnapshotExists
        | Reason::SubscriptionMismatch
        | Reason::SubscriptionBusy
        | Reason::Superseded
        | Reason::Fenced
        | Reason::SchemaViolation
        | Reason::ContentTypeMismatch
        | Reason::SchemaIncompatible
        | Reason::HeadMismatch
        | Reason::IdempotencyKeyReused => Exit::Conflict,
        Reason::MessageTooLarge | Reason::LimitReached | Reason::TopicFull | Reason::DiskFull => {
            Exit::Limit
        }
        Reason::Unavailable => Exit::Unreachable,
        Reason::CommitUnknown | Reason::ResultExpired => Exit::Unknown,
        Reason::ProtocolViolation
        | Reason::UnsupportedProtocol
        | Reason::OutOfOrder
        | Reason::Diverged
        | Reason::DataLoss
        | Reason::Internal
        | Reason::Other
        | _ => Exit::Failed,
    }
}

#[expect(clippy::wildcard_enum_match_arm, reason = "most messages of the server say it all")]
fn fix(reason: Reason) -> Option<&'static str> {
    Some(match reason {
        Reason::TopicNotFound => {
            "`pubsub publish --create` creates it on the way; `pubsub topic list` shows what there is."
        }
        Reason::SubscriptionNotFound => {
            "`pubsub subscription list` shows what there is; `pubsub subscribe TOPIC \
             --subscription NAME` creates one."
        }
        Reason::TopicExists => "To let it be, say --if-not-exists.",
        Reason::SubscriptionExists => {
            "To let it be if its settings are the same, say --if-not-exists."
        }
        Reason::SubscriptionMismatch => {
            "`pubsub subscription describe NAME` shows its settings; to consume it as it is, leave \
             the topics out."
        }
        Reason::Superseded => {
            "Another process consumes under the same name; give each its own with --consumer."
        }
        Reason::UnknownRecipient => "--to takes subscriptions of the topic that exist already.",
        Reason::IdempotencyKeyReused => "Use another key for other content.",
        Reason::MessageTooLarge => {
            "Create the topic with a larger --max-message-bytes, up to 16MiB."
        }
        Reason::TopicFull => {
            "`pubsub topic describe TOPIC` shows its subscriptions; one of them is far behind."
        }
        Reason::SchemaViolation | Reason::ContentTypeMismatch => {
            "`pubsub schema show TOPIC` shows what the topic takes; `pubsub schema check TOPIC` \
             checks payloads without publishing them."
        }
        Reason::HeadMismatch => {
            "Somebody else has published: read what has come since, and decide again."
        }
        Reason::SchemaIncompatible => {
            "`pubsub schema check TOPIC` lists all problems; to set it all the same, say \
             --compatibility none."
        }
        Reason::BeyondHead => "`pubsub topic describe TOPIC` shows its last message.",
        _ => return None,
    })
}
