//! What an outbox shows of itself.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::watch;

use super::core::Core;
use super::rows::ParkedRow;
use crate::error::Reason;
use crate::local::FileError;
use crate::message::Message;

/// How much there is of something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Usage {
    /// Messages.
    pub messages: u64,
    /// Their bytes, as encoded, with what is kept beside them.
    pub bytes: u64,
}

impl Usage {
    pub(super) fn add(&mut self, bytes: u64) {
        self.messages += 1;
        self.bytes += bytes;
    }

    pub(super) fn remove(&mut self, bytes: u64) {
        self.messages -= 1;
        self.bytes -= bytes;
    }
}

/// What an outbox holds, and whether it gets rid of it.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct OutboxState {
    /// What waits to be published, or for the answer to that.
    pub pending: Usage,
    /// What was [set aside](Parked).
    pub parked: Usage,
    /// The topics for which there were messages since the outbox was opened, by name.
    pub topics: Vec<OutboxTopic>,
    /// The last failure of a message or of a topic, with its time. It may be over by now.
    pub last_error: Option<(SystemTime, Arc<str>)>,
    /// The file has failed: nothing is taken or published any more. What it holds is safe.
    pub failure: Option<FileError>,
}

/// What an outbox holds for a topic.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct OutboxTopic {
    /// Its name.
    pub topic: Arc<str>,
    /// What waits to be published, or for the answer to that.
    pub pending: Usage,
    /// Why nothing of it is published for now. All of it heals by itself once the cause is gone.
    pub waiting: Option<Waiting>,
}

/// Why the messages of a topic wait.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Waiting {
    /// What the server says, such as [`TopicNotFound`](Reason::TopicNotFound) or
    /// [`TopicFull`](Reason::TopicFull); nothing if it cannot be reached.
    pub reason: Option<Reason>,
    /// The cause and the fix, for people.
    pub detail: Arc<str>,
}

impl fmt::Display for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.detail)?;
        self.reason.map_or(Ok(()), |reason| write!(f, " ({reason})"))
    }
}

/// A message that was set aside: it is not sent any more unless that is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Parked {
    /// Its number in the outbox.
    pub item: u64,
    /// Its topic.
    pub topic: String,
    /// The message, under its idempotency key.
    pub message: Message,
    /// When it was enqueued.
    pub enqueue_time: SystemTime,
    /// When it was set aside.
    pub park_time: SystemTime,
    /// When it was sent first, if it was.
    pub first_sent: Option<SystemTime>,
    /// The server's reason for refusing it: it is certainly not stored. Nothing: it may or may not
    /// be stored, and nobody can say any more.
    pub refused: Option<Reason>,
    /// The cause and the fix, for people.
    pub detail: String,
}

impl Parked {
    pub(super) fn from_row(item: u64, row: ParkedRow) -> Self {
        let refused = (!row.reason.is_empty()).then(|| Reason::from_name(&row.reason));
        Self {
            item,
            topic: row.topic,
            message: Message::from_wire(row.message.unwrap_or_default(), None),
            enqueue_time: super::clock::time(row.enqueued),
            park_time: super::clock::time(row.parked),
            first_sent: (row.sent > 0).then(|| super::clock::time(row.sent)),
            refused,
            detail: row.detail,
        }
    }
}

/// A state that can be looked at and waited for. Cheap to clone.
#[derive(Clone, Debug)]
pub struct OutboxWatch {
    core: Arc<Core>,
    changes: watch::Receiver<()>,
}

impl OutboxWatch {
    pub(super) fn new(core: Arc<Core>, changes: watch::Receiver<()>) -> Self {
        Self { core, changes }
    }

    /// The present state.
    pub fn get(&self) -> OutboxState {
        self.core.snapshot()
    }

    /// Waits until something has changed since this watch was made or asked last, and returns the
    /// state. Changes that come quickly are seen as one. Nothing once the outbox is closed.
    pub async fn changed(&mut self) -> Option<OutboxState> {
        self.core.changed(&mut self.changes).await.then(|| self.get())
    }

    /// Waits for a state that satisfies the condition, which may be the present one; nothing if
    /// the outbox is closed before.
    pub async fn wait_for(
        &mut self,
        mut condition: impl FnMut(&OutboxState) -> bool,
    ) -> Option<OutboxState> {
        loop {
            let state = self.get();
            if condition(&state) {
                return Some(state);
            }
            self.changed().await?;
        }
    }
}
