//! What is committed and not in the hot file yet, as far as readers need it.

use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use bytes::Bytes;

use super::batch::Batch;
use super::rows::{BatchHeader, decode_header};
use crate::record::{CursorRecord, Epoch};

/// Bounded by the log, which holds it as well. A row leaves when it is in the hot file: whoever does
/// not find it here finds it there.
#[derive(Debug, Default)]
pub(super) struct Tail(RwLock<Content>);

#[derive(Debug, Default)]
struct Content {
    /// What is being moved to the hot file.
    moving: Part,
    /// What came later.
    fresh: Part,
}

#[derive(Debug, Default)]
struct Part {
    /// Messages by topic and first sequence.
    rows: BTreeMap<(Epoch, u64), Bytes>,
    /// Positions by topic and subscription.
    cursors: BTreeMap<(Epoch, Epoch), CursorRecord>,
}

impl Tail {
    pub(super) fn extend(&self, batch: &Batch) {
        self.write().fresh.extend(batch);
    }

    /// All that is here is being moved from now on.
    pub(super) fn lift(&self) {
        let mut content = self.write();
        debug_assert!(content.moving.is_empty(), "one move at a time");
        content.moving = std::mem::take(&mut content.fresh);
    }

    /// What was being moved is in the hot file.
    pub(super) fn landed(&self) {
        let old = std::mem::take(&mut self.write().moving);
        // Not while readers wait.
        drop(old);
    }

    /// Whether something is being moved, and not known to be in the hot file.
    #[cfg(test)]
    pub(super) fn is_moving(&self) -> bool {
        !self.read().moving.is_empty()
    }

    pub(super) fn clear(&self) {
        self.replace(&Batch::default());
    }

    /// Holds exactly this from now on.
    pub(super) fn replace(&self, batch: &Batch) {
        let mut new = Content::default();
        new.fresh.extend(batch);
        let old = std::mem::replace(&mut *self.write(), new);
        // Not while readers wait.
        drop(old);
    }

    /// The row that holds a sequence, or says where it is.
    pub(super) fn row(&self, topic: Epoch, sequence: u64) -> Option<(BatchHeader, Bytes)> {
        let content = self.read();
        content.fresh.row(topic, sequence).or_else(|| content.moving.row(topic, sequence))
    }

    /// The first sequence of a topic.
    pub(super) fn first(&self, topic: Epoch) -> Option<u64> {
        let content = self.read();
        content.moving.first(topic).or_else(|| content.fresh.first(topic))
    }

    /// The positions.
    pub(super) fn cursors(&self) -> BTreeMap<(Epoch, Epoch), CursorRecord> {
        let content = self.read();
        let mut cursors = content.moving.cursors.clone();
        cursors.extend(content.fresh.cursors.clone());
        cursors
    }

    fn read(&self) -> RwLockReadGuard<'_, Content> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Content> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Part {
    fn is_empty(&self) -> bool {
        self.rows.is_empty() && self.cursors.is_empty()
    }

    fn extend(&mut self, batch: &Batch) {
        let rows = batch.rows.iter().map(|(topic, base, row)| ((*topic, *base), row.clone()));
        self.rows.extend(rows);
        self.cursors.extend(batch.cursors.iter().map(|(key, cursor)| (*key, cursor.clone())));
    }

    fn row(&self, topic: Epoch, sequence: u64) -> Option<(BatchHeader, Bytes)> {
        let ((_, base), row) = self.rows.range((topic, 0)..=(topic, sequence)).next_back()?;
        let header = decode_header(topic, *base, row).ok()?;
        (header.end() > sequence).then(|| (header, row.clone()))
    }

    fn first(&self, topic: Epoch) -> Option<u64> {
        self.rows.range((topic, 0)..=(topic, u64::MAX)).next().map(|((_, base), _)| *base)
    }
}
