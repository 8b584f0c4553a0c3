//! What was processed, in memory.

use std::sync::{Mutex, PoisonError};

use super::ProcessedStore;
use super::processed::{InboxError, Processed};
use crate::message::ReceivedMessage;
use crate::subscriber::Position;

/// Remembers what was processed as long as the process lives: against messages that are shown
/// again after a nack, after they were held for too long, or after a seek. Nothing is left of it
/// after a crash.
#[derive(Debug, Default)]
pub struct MemoryInbox {
    processed: Mutex<Processed>,
}

impl MemoryInbox {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }
}

impl ProcessedStore for MemoryInbox {
    type Error = InboxError;

    async fn is_processed(
        &self,
        subscription: &str,
        message: &ReceivedMessage,
    ) -> Result<bool, InboxError> {
        let processed = self.processed.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(processed.contains(subscription, message))
    }

    async fn record(
        &self,
        subscription: &str,
        message: &ReceivedMessage,
    ) -> Result<(), InboxError> {
        let mut processed = self.processed.lock().unwrap_or_else(PoisonError::into_inner);
        processed.check_room()?;
        processed.insert(subscription, message);
        Ok(())
    }

    async fn forget(&self, subscription: &str, position: &Position) -> Result<(), InboxError> {
        let mut processed = self.processed.lock().unwrap_or_else(PoisonError::into_inner);
        processed.forget(subscription, position);
        Ok(())
    }
}
