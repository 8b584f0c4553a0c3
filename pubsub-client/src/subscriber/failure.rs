//! What becomes of messages that fail.

/// What becomes of a message that fails again and again.
///
/// It is set when the subscription is created, and does not change. What counts as a failure is a
/// [nack](crate::Delivery::nack), a handler that takes longer than the
/// [ack timeout](crate::SubscriberBuilder::ack_timeout), and a consumer that is lost while it has
/// the message: not a [release](crate::Delivery), a shutdown in order, or a restart of the server.
///
/// In the [kinds](crate::SubscriptionKind) that keep an order, what comes after a failed message
/// waits for it: all of its topic, or all of its ordering key. Everything else goes on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum FailurePolicy {
    /// The message is shown again until it is acked.
    #[default]
    Block,
    /// After so many attempts a copy goes to another topic, and the subscription lets the message
    /// go: in one step, so that there is one copy, and one that says where it comes from.
    ///
    /// The other topic has to exist, and must be none that the subscription listens to. Dead
    /// letters wait in it until they are redriven or purged, whatever its retention; when it is
    /// full, the failed messages wait, and the subscription says so.
    DeadLetter {
        /// The other topic.
        topic: String,
        /// How often a message is shown before, 1 to 1,000.
        max_attempts: u32,
    },
    /// After so many attempts the subscription lets the message go.
    Skip {
        /// How often a message is shown before, 1 to 1,000.
        max_attempts: u32,
    },
}

/// As many attempts as other systems make by default.
const ATTEMPTS: u32 = 5;

impl FailurePolicy {
    /// After 5 attempts a copy goes to this topic.
    pub fn dead_letter(topic: impl Into<String>) -> Self {
        Self::DeadLetter { topic: topic.into(), max_attempts: ATTEMPTS }
    }

    /// After 5 attempts the message is let go.
    pub fn skip() -> Self {
        Self::Skip { max_attempts: ATTEMPTS }
    }

    /// Sets how often a message is shown before it is let go, 1 to 1,000.
    #[must_use]
    pub fn after(self, max_attempts: u32) -> Self {
        match self {
            Self::Block => Self::Block,
            Self::DeadLetter { topic, .. } => Self::DeadLetter { topic, max_attempts },
            Self::Skip { .. } => Self::Skip { max_attempts },
        }
    }
}
