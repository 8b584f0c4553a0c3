//! What happened, in the order in which the application saw it.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard},
};

use super::Value;

/// The identity of a stored message.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id {
    /// The topic.
    pub topic: Arc<str>,
    /// The topic's incarnation.
    pub epoch: u64,
    /// The position in it.
    pub sequence: u64,
}

impl Id {
    /// An id of this topic.
    pub fn new(topic: &str, epoch: u64, sequence: u64) -> Self {
        Self { topic: topic.into(), epoch, sequence }
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}/{}", self.topic, self.epoch, self.sequence)
    }
}

/// A consumer process of a subscription: what is shown once is shown once to it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Process {
    /// The subscription.
    pub subscription: Arc<str>,
    /// Which of its processes.
    pub number: u32,
}

impl Process {
    /// A process of this subscription.
    pub fn new(subscription: &str, number: u32) -> Self {
        Self { subscription: subscription.into(), number }
    }
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.subscription, self.number)
    }
}

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A publish begins. A retry by the application begins the same value again.
    Invoked(Value, Arc<str>),
    /// A publish is answered with an id.
    Stored(Value, Id),
    /// A publish is refused: it is certainly not stored.
    Refused(Value),
    /// A publish ends, and nobody knows how.
    Unknown(Value),
    /// The application is shown a message; no value: bytes that nobody published.
    Delivered(Process, Id, Option<Value>),
    /// The application is told that it will never see these messages: the first and the last.
    Gap(Process, Id, u64),
    /// The application acks.
    Acked(Process, Id),
    /// An ack is confirmed: from here on it is durable.
    AckConfirmed(Process, Id),
    /// The application hands a message back.
    Nacked(Process, Id),
    /// The scenario breaks something.
    Fault(String),
}

impl Event {
    /// Whether it has to do with this id.
    pub fn concerns_id(&self, wanted: &Id) -> bool {
        match self {
            Self::Stored(_, id)
            | Self::Delivered(_, id, _)
            | Self::Acked(_, id)
            | Self::AckConfirmed(_, id)
            | Self::Nacked(_, id) => id == wanted,
            Self::Gap(_, first, last) => {
                first.topic == wanted.topic
                    && first.epoch == wanted.epoch
                    && (first.sequence..=*last).contains(&wanted.sequence)
            }
            Self::Invoked(..) | Self::Refused(_) | Self::Unknown(_) | Self::Fault(_) => false,
        }
    }

    /// Whether it has to do with this value.
    pub fn concerns_value(&self, wanted: Value) -> bool {
        match self {
            Self::Invoked(value, _)
            | Self::Stored(value, _)
            | Self::Refused(value)
            | Self::Unknown(value)
            | Self::Delivered(_, _, Some(value)) => *value == wanted,
            Self::Delivered(_, _, None)
            | Self::Gap(..)
            | Self::Acked(..)
            | Self::AckConfirmed(..)
            | Self::Nacked(..)
            | Self::Fault(_) => false,
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invoked(value, topic) => write!(f, "publish {value} to {topic}"),
            Self::Stored(value, id) => write!(f, "stored {value} as {id}"),
            Self::Refused(value) => write!(f, "refused {value}"),
            Self::Unknown(value) => write!(f, "outcome of {value} unknown"),
            Self::Delivered(process, id, Some(value)) => {
                write!(f, "{process} is shown {id} = {value}")
            }
            Self::Delivered(process, id, None) => write!(f, "{process} is shown {id} = garbage"),
            Self::Gap(process, first, last) => {
                write!(f, "{process} is told of a gap {first} to {last}")
            }
            Self::Acked(process, id) => write!(f, "{process} acks {id}"),
            Self::AckConfirmed(process, id) => write!(f, "{process}'s ack of {id} is confirmed"),
            Self::Nacked(process, id) => write!(f, "{process} nacks {id}"),
            Self::Fault(what) => write!(f, "FAULT {what}"),
        }
    }
}

/// Collects events from all tasks of a scenario. Clones write to the same history.
///
/// Record an invocation before the call and its end after it, so that the order of the history
/// is an order in which things can have happened.
#[derive(Clone, Debug, Default)]
pub struct Recorder(Arc<Mutex<Vec<Event>>>);

impl Recorder {
    fn events(&self) -> MutexGuard<'_, Vec<Event>> {
        self.0.lock().expect("nothing panics while holding the history")
    }

    /// Adds what just happened.
    pub fn record(&self, event: Event) {
        self.events().push(event);
    }

    /// Everything so far.
    pub fn history(&self) -> Vec<Event> {
        self.events().clone()
    }

    /// How many events so far are like this.
    pub fn count(&self, like: impl Fn(&Event) -> bool) -> usize {
        self.events().iter().filter(|event| like(event)).count()
    }

    /// How many publishes have been confirmed.
    pub fn stored(&self) -> usize {
        self.count(|event| matches!(event, Event::Stored(..)))
    }

    /// How many deliveries there have been.
    pub fn delivered(&self) -> usize {
        self.count(|event| matches!(event, Event::Delivered(..)))
    }
}
