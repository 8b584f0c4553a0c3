//! Messages that wait for a moment: after a failure, or because their publishers have named it. Pure.

use tokio::time::Instant;

use super::competing::{Competing, Waiting};

impl Competing {
    /// When the first of the delayed messages is due.
    pub fn due_at(&self) -> Option<Instant> {
        self.due_at.earliest()
    }

    /// Messages that are not due yet.
    pub fn delayed(&self) -> usize {
        self.delayed.len()
    }

    pub(super) fn undelay(&mut self, sequence: u64) -> Option<Waiting> {
        self.due_at.remove(sequence);
        self.delayed.remove(&sequence)
    }

    /// What has waited for a moment that is over waits no more for that.
    pub(super) fn tick(&mut self, now: Instant) {
        for sequence in self.due_at.until(now).collect::<Vec<_>>() {
            if let Some(waiting) = self.undelay(sequence) {
                self.put_waiting(sequence, waiting);
            }
        }
        while let Some((at, sequence)) = self.due.first().copied().filter(|(at, _)| *at <= now) {
            self.due.remove(&(at, sequence));
            if let Some(waiting) = self.waiting.get_mut(&sequence) {
                waiting.at = None;
            }
            self.classify(sequence);
        }
    }
}
