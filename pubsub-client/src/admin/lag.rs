//! Why a subscription does not go on.

use pubsub_proto::v1 as pb;

/// The first message of a topic that a subscription has not acked, and why it waits.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct HeadOfLine {
    /// The message.
    pub sequence: u64,
    /// Why, for programs.
    pub cause: WaitCause,
    /// Why, for people.
    pub text: String,
}

/// What the first message that is not acked waits for. Messages after it can wait for other things.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WaitCause {
    /// A consumer has it, and has not acked it.
    WithConsumer,
    /// There is no consumer.
    NoConsumer,
    /// The consumers have no credit or no room for it.
    NoCredit,
    /// It has failed, and is shown again after its delay.
    Backoff,
    /// It may have killed its consumer, and another one that may have done so is being tried.
    Suspect,
    /// Consumers may hold it since before a restart of the server, or since they lost their
    /// connection.
    AwaitedConsumer,
    /// So many messages are unacked that no more are looked at.
    TooManyUnacked,
    /// It has failed too often, and is to be let go; the text says what keeps the dead-letter topic
    /// from taking it, if anything does.
    DeadLetter,
    /// It cannot be read.
    Damaged,
    /// Its topic was deleted, which no consumer knows yet.
    TopicDeleted,
    /// Its publisher has delayed it, and it is not due yet.
    Delayed,
    /// A cause that this version of the client does not know.
    Other,
}

impl WaitCause {
    /// Its name, for logs and metrics, such as `no_consumer`.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::WithConsumer => "with_consumer",
            Self::NoConsumer => "no_consumer",
            Self::NoCredit => "no_credit",
            Self::Backoff => "backoff",
            Self::Suspect => "suspect",
            Self::AwaitedConsumer => "awaited_consumer",
            Self::TooManyUnacked => "too_many_unacked",
            Self::DeadLetter => "dead_letter",
            Self::Damaged => "damaged",
            Self::TopicDeleted => "topic_deleted",
            Self::Delayed => "delayed",
            Self::Other => "other",
        }
    }
}

pub(super) fn head_of_line(head: pb::HeadOfLine) -> HeadOfLine {
    let cause = match head.cause() {
        pb::WaitCause::WithConsumer => WaitCause::WithConsumer,
        pb::WaitCause::NoConsumer => WaitCause::NoConsumer,
        pb::WaitCause::NoCredit => WaitCause::NoCredit,
        pb::WaitCause::Backoff => WaitCause::Backoff,
        pb::WaitCause::Suspect => WaitCause::Suspect,
        pb::WaitCause::AwaitedConsumer => WaitCause::AwaitedConsumer,
        pb::WaitCause::TooManyUnacked => WaitCause::TooManyUnacked,
        pb::WaitCause::DeadLetter => WaitCause::DeadLetter,
        pb::WaitCause::Damaged => WaitCause::Damaged,
        pb::WaitCause::TopicDeleted => WaitCause::TopicDeleted,
        pb::WaitCause::Delayed => WaitCause::Delayed,
        pb::WaitCause::Unspecified => WaitCause::Other,
    };
    HeadOfLine { sequence: head.sequence, cause, text: head.text }
}
