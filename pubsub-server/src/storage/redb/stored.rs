//! What is remembered of publishers and keys, as of the last transaction of the hot file, or the one
//! before while a move is not known to have ended.

use std::fmt;

use ::redb::{Database, ReadOnlyTable, ReadableDatabase};

use super::rows::{self, wide};
use super::tables::{KEYS, PUBLISHERS, Row, Trouble, get};
use crate::record::{Epoch, Uuid};
use crate::storage::admission::Publisher;

type KeyTable = ReadOnlyTable<(u64, u64), Row>;
type PublisherTable = ReadOnlyTable<(u64, u128), Row>;

/// Stays open between transactions; it has to be closed before one, or what that frees is not used
/// again until the next.
#[derive(Default)]
pub(super) struct Stored {
    keys: Option<KeyTable>,
    publishers: Option<PublisherTable>,
}

impl fmt::Debug for Stored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stored").finish_non_exhaustive()
    }
}

impl Stored {
    pub(super) fn keys(&mut self, database: &Database) -> Result<&KeyTable, Trouble> {
        let table = match self.keys.take() {
            Some(table) => table,
            None => database.begin_read()?.open_table(KEYS)?,
        };
        Ok(self.keys.insert(table))
    }

    pub(super) fn publisher(
        &mut self,
        database: &Database,
        topic: Epoch,
        id: Uuid,
    ) -> Result<Option<Publisher>, Trouble> {
        let table = match self.publishers.take() {
            Some(table) => table,
            None => database.begin_read()?.open_table(PUBLISHERS)?,
        };
        get(self.publishers.insert(table), (topic.0, wide(id.0)), rows::decode)
    }

    pub(super) fn close(&mut self) {
        *self = Self::default();
    }
}
