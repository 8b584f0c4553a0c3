//! What can be wrong with a history.

use std::fmt;

use super::{Event, Id, Process, Value};

/// A broken promise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Anomaly {
    /// A confirmed publish is not stored under its id.
    Lost {
        /// What was confirmed.
        value: Value,
        /// As what.
        id: Id,
    },
    /// Something is stored that nobody published, or that was refused.
    Phantom {
        /// Where.
        id: Id,
        /// What; `None` if the bytes are no value at all.
        value: Option<Value>,
    },
    /// One identity has several ids: in confirmations, in deliveries, or in the log.
    SeveralIds {
        /// The identity.
        value: Value,
        /// Its ids.
        ids: Vec<Id>,
    },
    /// One id has several values: in confirmations, in deliveries, or in the log.
    SeveralValues {
        /// The id.
        id: Id,
        /// Its values.
        values: Vec<Value>,
    },
    /// The messages of one publisher are not stored in the order of its calls.
    Reordered {
        /// Called first and stored later.
        first: Value,
        /// Called later and stored first.
        second: Value,
        /// Where the second is stored.
        id: Id,
    },
    /// A publish that began after another one was confirmed is stored before it.
    BackInTime {
        /// What began later.
        value: Value,
        /// Where it is stored.
        id: Id,
        /// What had been confirmed by then.
        confirmed: Id,
    },
    /// A process is shown a message before an earlier one that nobody has acked.
    Skipped {
        /// To whom.
        process: Process,
        /// What was left out.
        missing: Id,
        /// What was shown instead.
        shown: Id,
    },
    /// A process is shown a message although it has seen later ones.
    Backwards {
        /// To whom.
        process: Process,
        /// What was shown.
        shown: Id,
        /// What was shown before.
        after: u64,
    },
    /// A process is shown a message twice, without a nack.
    Repeated {
        /// To whom.
        process: Process,
        /// What.
        id: Id,
    },
    /// A message is shown after its ack was confirmed.
    RedeliveredAfterAck {
        /// To whom.
        process: Process,
        /// What.
        id: Id,
    },
    /// A process is shown bytes that nobody published.
    Garbage {
        /// To whom.
        process: Process,
        /// As what.
        id: Id,
    },
    /// A subscription never saw a message.
    NeverDelivered {
        /// Which.
        subscription: String,
        /// What.
        id: Id,
    },
}

impl Anomaly {
    /// Whether an event helps to understand it.
    pub fn concerns(&self, event: &Event) -> bool {
        match self {
            Self::Lost { value, id } | Self::BackInTime { value, id, .. } => {
                event.concerns_id(id) || event.concerns_value(*value)
            }
            Self::Phantom { id, value } => {
                event.concerns_id(id) || value.is_some_and(|value| event.concerns_value(value))
            }
            Self::SeveralIds { value, .. } => event.concerns_value(*value),
            Self::Reordered { first, second, .. } => {
                event.concerns_value(*first) || event.concerns_value(*second)
            }
            Self::Skipped { missing, shown, .. } => {
                event.concerns_id(missing) || event.concerns_id(shown)
            }
            Self::Backwards { shown: id, .. }
            | Self::SeveralValues { id, .. }
            | Self::Repeated { id, .. }
            | Self::RedeliveredAfterAck { id, .. }
            | Self::Garbage { id, .. }
            | Self::NeverDelivered { id, .. } => event.concerns_id(id),
        }
    }
}

impl fmt::Display for Anomaly {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lost { value, id } => write!(f, "LOST: {value}, confirmed as {id}"),
            Self::Phantom { id, value: None } => write!(f, "PHANTOM: garbage at {id}"),
            Self::Phantom { id, value: Some(value) } => {
                write!(f, "PHANTOM: {value} at {id} was never published or was refused")
            }
            Self::SeveralIds { value, ids } => {
                write!(f, "SEVERAL IDS: {value} is")?;
                ids.iter().try_for_each(|id| write!(f, " {id}"))
            }
            Self::SeveralValues { id, values } => {
                write!(f, "SEVERAL VALUES: {id} is")?;
                values.iter().try_for_each(|value| write!(f, " {value}"))
            }
            Self::Reordered { first, second, id } => {
                write!(f, "REORDERED: {second} at {id} stands before {first}")
            }
            Self::BackInTime { value, id, confirmed } => {
                write!(f, "BACK IN TIME: {value} at {id} began after {confirmed} was confirmed")
            }
            Self::Skipped { process, missing, shown } => {
                write!(f, "SKIPPED: {process} is shown {shown} and not {missing}")
            }
            Self::Backwards { process, shown, after } => {
                write!(f, "BACKWARDS: {process} is shown {shown} after {after}")
            }
            Self::Repeated { process, id } => {
                write!(f, "REPEATED: {process} is shown {id} twice")
            }
            Self::RedeliveredAfterAck { process, id } => {
                write!(f, "REDELIVERED: {process} is shown {id}, whose ack was confirmed")
            }
            Self::Garbage { process, id } => {
                write!(f, "GARBAGE: {process} is shown wrong bytes as {id}")
            }
            Self::NeverDelivered { subscription, id } => {
                write!(f, "NEVER DELIVERED: {id} to {subscription}")
            }
        }
    }
}
