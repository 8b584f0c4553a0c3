//! Why the broker refuses. Callers decide on [`BrokerError::code`], never on the text.

use std::fmt;
use std::time::Duration;

use crate::names::{ConsumerId, SnapshotName, SubscriptionName, TopicName};
use crate::schema::{Problem, Verdict};
use crate::storage::{AppendRefusal, CommitError, ReadError};

/// A closed list of reasons, one for each that a client can act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// A value breaks a rule.
    Invalid,
    /// Numbers contradict earlier ones.
    Protocol,
    /// No topic of this name.
    TopicNotFound,
    /// The name is taken.
    TopicExists,
    /// It cannot go while something needs it.
    TopicInUse,
    /// The topic is another one than the client knows.
    TopicRecreated,
    /// No subscription of this name.
    SubscriptionNotFound,
    /// The name is taken.
    SubscriptionExists,
    /// It exists with other settings.
    SubscriptionMismatch,
    /// It is gone, or another one than the client knows.
    SubscriptionDeleted,
    /// No snapshot of this name.
    SnapshotNotFound,
    /// The name is taken.
    SnapshotExists,
    /// A newer session of the consumer took over.
    Superseded,
    /// Another consumer has it.
    SubscriptionBusy,
    /// A newer stream of the publisher took over.
    Fenced,
    /// A publisher's sequence was skipped.
    OutOfOrder,
    /// The result of an old publish is not kept any more.
    ResultExpired,
    /// A limit is reached.
    LimitReached,
    /// The topic holds as much as it may.
    TopicFull,
    /// The disk is full.
    DiskFull,
    /// The client knows a history that the storage does not.
    Diverged,
    /// Stored data is damaged.
    DataLoss,
    /// Not now.
    Unavailable,
    /// A commit failed and may be durable.
    CommitUnknown,
    /// Beyond the head.
    BeyondHead,
    /// A new schema breaks what the present one promised, or may do so.
    SchemaIncompatible,
}

/// Why something was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BrokerError {
    /// A value breaks a rule.
    #[error("{0}")]
    Invalid(String),
    /// Numbers contradict earlier ones.
    #[error("{0}")]
    Protocol(String),
    /// No topic of this name.
    #[error("topic {0} does not exist; create it with `pubsub topic create {0}`")]
    TopicNotFound(TopicName),
    /// The name is taken.
    #[error("topic {0} exists already")]
    TopicExists(TopicName),
    /// It cannot go while something needs it.
    #[error(
        "topic {topic} holds the dead letters of subscription {subscription}; delete that first"
    )]
    TopicInUse {
        /// Which.
        topic: TopicName,
        /// Who needs it.
        subscription: SubscriptionName,
    },
    /// The topic is another one than the client knows.
    #[error("topic {0} was deleted and created again; ids of the old one have no meaning in it")]
    TopicRecreated(TopicName),
    /// No subscription of this name.
    #[error("subscription {0} does not exist")]
    SubscriptionNotFound(SubscriptionName),
    /// The name is taken.
    #[error("subscription {0} exists already")]
    SubscriptionExists(SubscriptionName),
    /// It exists with other settings.
    #[error("subscription {name} exists with other {field}: {present}")]
    SubscriptionMismatch {
        /// Which.
        name: SubscriptionName,
        /// The first setting that differs.
        field: &'static str,
        /// Its present value.
        present: String,
    },
    /// It is gone, or another one than the client knows.
    #[error("subscription {0} was deleted")]
    SubscriptionDeleted(SubscriptionName),
    /// No snapshot of this name.
    #[error("snapshot {0} does not exist")]
    SnapshotNotFound(SnapshotName),
    /// The name is taken.
    #[error("snapshot {0} exists already")]
    SnapshotExists(SnapshotName),
    /// A newer session of the consumer took over.
    #[error("a newer session of consumer {0} has taken over")]
    Superseded(ConsumerId),
    /// Another consumer has it.
    #[error("consumer {active} holds the subscription; only a subscribe stream can stand by")]
    SubscriptionBusy {
        /// Who.
        active: ConsumerId,
    },
    /// An append was refused.
    #[error("{0}")]
    Append(#[from] AppendRefusal),
    /// A limit is reached.
    #[error("{what}: the limit of {limit} is reached")]
    LimitReached {
        /// The limit's name.
        what: &'static str,
        /// Its value.
        limit: u64,
    },
    /// The topic holds as much as it may.
    #[error("topic {topic} is full ({limit} bytes): {cause}")]
    TopicFull {
        /// Which.
        topic: TopicName,
        /// How much it may hold.
        limit: u64,
        /// What keeps it full.
        cause: String,
    },
    /// The disk is full.
    #[error("the server's disk is full; free space on it, and publishing goes on by itself")]
    DiskFull,
    /// The client knows a history that the storage does not.
    #[error("the server's data is not the data this client has seen: it was restored or replaced")]
    Diverged,
    /// Stored data is damaged.
    #[error("topic {topic}: message {sequence} is damaged on disk")]
    DataLoss {
        /// Where.
        topic: TopicName,
        /// The first message that cannot be read.
        sequence: u64,
    },
    /// Not now.
    #[error("{0}")]
    Unavailable(&'static str),
    /// A new schema breaks what the present one promised, or may do so.
    #[error(
        "topic {topic}: the schema does not keep what revision {revision} promised: {problems}"
    )]
    SchemaIncompatible {
        /// Where.
        topic: TopicName,
        /// The present revision.
        revision: u32,
        /// What is in the way; at least one.
        problems: Problems,
    },
    /// A commit failed and may be durable.
    #[error("a commit failed, and its outcome is not known; retry with the same identity")]
    CommitUnknown,
    /// Beyond the head.
    #[error("{sequence} lies beyond the head of topic {topic}, which is {head}")]
    BeyondHead {
        /// Where.
        topic: TopicName,
        /// What was named.
        sequence: u64,
        /// The last message.
        head: u64,
    },
}

impl BrokerError {
    /// The reason.
    pub fn code(&self) -> Code {
        match self {
            Self::Invalid(_) => Code::Invalid,
            Self::Protocol(_) => Code::Protocol,
            Self::TopicNotFound(_) => Code::TopicNotFound,
            Self::TopicExists(_) => Code::TopicExists,
            Self::TopicInUse { .. } => Code::TopicInUse,
            Self::TopicRecreated(_) | Self::Append(AppendRefusal::NoTopic) => Code::TopicRecreated,
            Self::SubscriptionNotFound(_) => Code::SubscriptionNotFound,
            Self::SubscriptionExists(_) => Code::SubscriptionExists,
            Self::SubscriptionMismatch { .. } => Code::SubscriptionMismatch,
            Self::SubscriptionDeleted(_) => Code::SubscriptionDeleted,
            Self::SnapshotNotFound(_) => Code::SnapshotNotFound,
            Self::SnapshotExists(_) => Code::SnapshotExists,
            Self::Superseded(_) => Code::Superseded,
            Self::SubscriptionBusy { .. } => Code::SubscriptionBusy,
            Self::Append(AppendRefusal::Fenced) => Code::Fenced,
            Self::Append(AppendRefusal::OutOfOrder { .. }) => Code::OutOfOrder,
            Self::Append(AppendRefusal::ResultExpired { .. }) => Code::ResultExpired,
            Self::LimitReached { .. }
            | Self::Append(AppendRefusal::TooManyPublishers | AppendRefusal::TooManyKeys) => {
                Code::LimitReached
            }
            Self::TopicFull { .. } => Code::TopicFull,
            Self::DiskFull | Self::Append(AppendRefusal::DiskFull) => Code::DiskFull,
            Self::Diverged => Code::Diverged,
            Self::DataLoss { .. } | Self::Append(AppendRefusal::Damaged) => Code::DataLoss,
            Self::Unavailable(_) => Code::Unavailable,
            Self::CommitUnknown => Code::CommitUnknown,
            Self::BeyondHead { .. } => Code::BeyondHead,
            Self::SchemaIncompatible { .. } => Code::SchemaIncompatible,
        }
    }

    /// What a program may want to read from the error, as names and values.
    pub fn metadata(&self) -> Vec<(&'static str, String)> {
        match self {
            Self::SubscriptionMismatch { field, .. } => vec![("field", (*field).to_owned())],
            Self::Append(AppendRefusal::OutOfOrder { expected }) => {
                vec![("expected", expected.to_string())]
            }
            Self::LimitReached { what, .. } => vec![("limit", (*what).to_owned())],
            Self::TopicInUse { subscription, .. } => {
                vec![("subscription", subscription.to_string())]
            }
            Self::TopicFull { limit, .. } => vec![("limit", limit.to_string())],
            Self::DataLoss { topic, sequence } => {
                vec![("topic", topic.to_string()), ("sequence", sequence.to_string())]
            }
            Self::BeyondHead { head, .. } => vec![("head", head.to_string())],
            Self::SchemaIncompatible { problems, .. } => {
                let names = |problem: &Problem| {
                    vec![("path", problem.path.clone()), ("keyword", problem.keyword.to_owned())]
                };
                problems.0.first().map(names).unwrap_or_default()
            }
            Self::Invalid(_)
            | Self::Protocol(_)
            | Self::TopicNotFound(_)
            | Self::TopicExists(_)
            | Self::TopicRecreated(_)
            | Self::SubscriptionNotFound(_)
            | Self::SubscriptionExists(_)
            | Self::SubscriptionDeleted(_)
            | Self::SnapshotNotFound(_)
            | Self::SnapshotExists(_)
            | Self::Superseded(_)
            | Self::SubscriptionBusy { .. }
            | Self::Append(_)
            | Self::DiskFull
            | Self::Diverged
            | Self::Unavailable(_)
            | Self::CommitUnknown => Vec::new(),
        }
    }

    /// How long to wait before trying again, where that helps.
    pub fn retry_after(&self) -> Option<Duration> {
        match self.code() {
            Code::LimitReached | Code::TopicFull | Code::DiskFull => Some(Duration::from_secs(1)),
            Code::Unavailable | Code::CommitUnknown | Code::SubscriptionBusy => {
                Some(Duration::from_millis(500))
            }
            Code::Invalid
            | Code::Protocol
            | Code::TopicNotFound
            | Code::TopicExists
            | Code::TopicInUse
            | Code::TopicRecreated
            | Code::SubscriptionNotFound
            | Code::SubscriptionExists
            | Code::SubscriptionMismatch
            | Code::SubscriptionDeleted
            | Code::SnapshotNotFound
            | Code::SnapshotExists
            | Code::Superseded
            | Code::Fenced
            | Code::OutOfOrder
            | Code::ResultExpired
            | Code::Diverged
            | Code::DataLoss
            | Code::BeyondHead
            | Code::SchemaIncompatible => None,
        }
    }

    /// A read of a topic failed.
    pub(super) fn read(topic: &TopicName, error: ReadError) -> Self {
        match error {
            ReadError::NoTopic => Self::TopicNotFound(topic.clone()),
            ReadError::Trimmed { first } => {
                Self::Invalid(format!("topic {topic} starts at message {first}"))
            }
            ReadError::DataLoss { sequence } => Self::DataLoss { topic: topic.clone(), sequence },
            ReadError::Storage(_) => Self::Unavailable("the storage cannot be read"),
        }
    }
}

/// What is in the way of a new schema.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problems(pub Vec<Problem>);

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// More than these nobody reads in one line; a check lists all.
        const TOLD: usize = 3;
        for (index, problem) in self.0.iter().take(TOLD).enumerate() {
            let Problem { path, keyword, verdict, detail } = problem;
            let place = if path.is_empty() { "the whole" } else { path };
            let undecided = match verdict {
                Verdict::Breaks => "",
                Verdict::Undecided => " (cannot be decided)",
            };
            let comma = if index == 0 { "" } else { "; " };
            write!(f, "{comma}{place}: {keyword}: {detail}{undecided}")?;
        }
        match self.0.len().saturating_sub(TOLD) {
            0 => Ok(()),
            more => write!(f, "; and {more} more"),
        }
    }
}

impl From<CommitError> for BrokerError {
    fn from(error: CommitError) -> Self {
        match error {
            CommitError::Refused => Self::Unavailable("the server is stopping"),
            CommitError::Overloaded => Self::Unavailable("too many commits are waiting"),
            CommitError::DiskFull => Self::DiskFull,
            CommitError::NoTopic => Self::Unavailable("the topic is gone, or damaged"),
            CommitError::Unknown => Self::CommitUnknown,
        }
    }
}

impl From<crate::names::InvalidName> for BrokerError {
    fn from(error: crate::names::InvalidName) -> Self {
        Self::Invalid(error.to_string())
    }
}
