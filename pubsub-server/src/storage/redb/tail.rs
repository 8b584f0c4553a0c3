//! What is committed and not in the hot file yet, as far as readers need it.

use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

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
    /// Messages by topic and first sequence.
    rows: BTreeMap<(Epoch, u64), Bytes>,
    /// Positions by topic and subscription.
    cursors: BTreeMap<(Epoch, Epoch), CursorRecord>,
}

impl Tail {
    pub(super) fn extend(&self, batch: &Batch) {
        let mut content = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let rows = batch.rows.iter().map(|(topic, base, row)| ((*topic, *base), row.clone()));
        content.rows.extend(rows);
        content.cursors.extend(batch.cursors.iter().map(|(key, cursor)| (*key, cursor.clone())));
    }

    pub(super) fn clear(&self) {
        self.replace(&Batch::default());
    }

    /// Holds exactly this from now on.
    pub(super) fn replace(&self, batch: &Batch) {
        let new = Self::default();
        new.extend(batch);
        let new = new.0.into_inner().unwrap_or_else(PoisonError::into_inner);
        let mut content = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::replace(&mut *content, new);
        drop(content);
        // Not while readers wait.
        drop(old);
    }

    /// The row that holds a sequence, or says where it is.
    pub(super) fn row(&self, topic: Epoch, sequence: u64) -> Option<(BatchHeader, Bytes)> {
        let content = self.content();
        let ((_, base), row) = content.rows.range((topic, 0)..=(topic, sequence)).next_back()?;
        let header = decode_header(topic, *base, row).ok()?;
        (header.end() > sequence).then(|| (header, row.clone()))
    }

    /// The first sequence of a topic.
    pub(super) fn first(&self, topic: Epoch) -> Option<u64> {
        let content = self.content();
        content.rows.range((topic, 0)..=(topic, u64::MAX)).next().map(|((_, base), _)| *base)
    }

    /// The positions.
    pub(super) fn cursors(&self) -> BTreeMap<(Epoch, Epoch), CursorRecord> {
        self.content().cursors.clone()
    }

    fn content(&self) -> RwLockReadGuard<'_, Content> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }
}
