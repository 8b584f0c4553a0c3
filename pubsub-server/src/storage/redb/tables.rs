//! The tables of the hot file and of the sealed files, and the checksum that ends every row.
//!
//! `docs/format.md` describes the bytes. redb does not verify its own checksums on ordinary
//! reads, hence ours; they cover the table and the key too, so that a row cannot pass for another.

use std::fmt;
use std::ops::Bound;

use ::redb::{
    Key, ReadableTable, StorageError, Table, TableDefinition, TableError, TableHandle,
    WriteTransaction,
};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use crate::record::Epoch;

/// The version of the format. A server reads exactly one.
pub(super) const FORMAT: u32 = 6;

/// Rows are bytes; their encodings are in [`super::rows`].
pub(super) type Row = &'static [u8];

/// Facts about the whole store by name.
pub(super) const META: TableDefinition<'_, &str, Row> = TableDefinition::new("meta");
/// Boot ordinal -> boot id.
pub(super) const BOOTS: TableDefinition<'_, u64, Row> = TableDefinition::new("boots");
/// Topic -> its record.
pub(super) const TOPICS: TableDefinition<'_, u64, Row> = TableDefinition::new("topics");
/// Topic -> what it holds. Apart from its record, since every commit writes it.
pub(super) const HEADS: TableDefinition<'_, u64, Row> = TableDefinition::new("heads");
/// (topic, revision) -> what the topic takes from this revision on.
pub(super) const SCHEMAS: TableDefinition<'_, (u64, u64), Row> = TableDefinition::new("schemas");
/// (topic, sequence of the first message) -> messages.
pub(super) const MESSAGES: TableDefinition<'_, (u64, u64), Row> = TableDefinition::new("messages");
/// (topic, publisher) -> what is remembered of the publisher.
pub(super) const PUBLISHERS: TableDefinition<'_, (u64, u128), Row> =
    TableDefinition::new("publishers");
/// (topic, number of the chunk) -> what is remembered of some idempotency keys.
pub(super) const KEYS: TableDefinition<'_, (u64, u64), Row> = TableDefinition::new("keys");
/// Subscription -> its record.
pub(super) const SUBSCRIPTIONS: TableDefinition<'_, u64, Row> =
    TableDefinition::new("subscriptions");
/// (topic, subscription) -> position.
pub(super) const CURSORS: TableDefinition<'_, (u64, u64), Row> = TableDefinition::new("cursors");
/// (subscription, topic that was deleted) -> what the subscription was not told of yet.
pub(super) const DEPARTED: TableDefinition<'_, (u64, u64), Row> = TableDefinition::new("departed");
/// (kind, epoch) of what is deleted and still has rows.
pub(super) const GARBAGE: TableDefinition<'_, (u8, u64), Row> = TableDefinition::new("garbage");
/// (topic, first sequence) -> a range in a sealed file.
pub(super) const SEGMENTS: TableDefinition<'_, (u64, u64), Row> = TableDefinition::new("segments");
/// Sealed file -> its length and the hash of its bytes.
pub(super) const FILES: TableDefinition<'_, u64, Row> = TableDefinition::new("files");
/// (topic, blob file) -> its last message and its length.
pub(super) const BLOBS: TableDefinition<'_, (u64, u64), Row> = TableDefinition::new("blobs");

/// Names in [`META`].
pub(super) const META_FORMAT: &str = "format";
/// Names in [`META`].
pub(super) const META_CLOCK: &str = "clock";
/// Names in [`META`].
pub(super) const META_LOG: &str = "log";

/// Kinds in [`GARBAGE`].
pub(super) const GARBAGE_TOPIC: u8 = 1;
/// Kinds in [`GARBAGE`].
pub(super) const GARBAGE_SUBSCRIPTION: u8 = 2;

/// The tables of the hot file in one write transaction. Each is opened when it is used first:
/// opening all of them costs as much as storing a message.
pub(super) struct Tables<'t> {
    pub(super) meta: Lazy<'t, &'static str>,
    pub(super) boots: Lazy<'t, u64>,
    pub(super) topics: Lazy<'t, u64>,
    pub(super) heads: Lazy<'t, u64>,
    pub(super) schemas: Lazy<'t, (u64, u64)>,
    pub(super) messages: Lazy<'t, (u64, u64)>,
    pub(super) publishers: Lazy<'t, (u64, u128)>,
    pub(super) keys: Lazy<'t, (u64, u64)>,
    pub(super) subscriptions: Lazy<'t, u64>,
    pub(super) cursors: Lazy<'t, (u64, u64)>,
    pub(super) departed: Lazy<'t, (u64, u64)>,
    pub(super) garbage: Lazy<'t, (u8, u64)>,
    pub(super) segments: Lazy<'t, (u64, u64)>,
    pub(super) files: Lazy<'t, u64>,
    pub(super) blobs: Lazy<'t, (u64, u64)>,
}

/// A table that may not be open yet.
pub(super) struct Lazy<'t, K: Key + 'static> {
    txn: &'t WriteTransaction,
    definition: TableDefinition<'static, K, Row>,
    table: Option<Table<'t, K, Row>>,
}

impl<'t, K: Key + 'static> Lazy<'t, K> {
    fn new(txn: &'t WriteTransaction, definition: TableDefinition<'static, K, Row>) -> Self {
        Self { txn, definition, table: None }
    }

    /// The table, which is made if there is none.
    pub(super) fn open(&mut self) -> Result<&mut Table<'t, K, Row>, TableError> {
        let table = match self.table.take() {
            Some(table) => table,
            None => self.txn.open_table(self.definition)?,
        };
        Ok(self.table.insert(table))
    }
}

impl fmt::Debug for Tables<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tables").finish_non_exhaustive()
    }
}

impl<'t> Tables<'t> {
    pub(super) fn of(txn: &'t WriteTransaction) -> Self {
        Self {
            meta: Lazy::new(txn, META),
            boots: Lazy::new(txn, BOOTS),
            topics: Lazy::new(txn, TOPICS),
            heads: Lazy::new(txn, HEADS),
            schemas: Lazy::new(txn, SCHEMAS),
            messages: Lazy::new(txn, MESSAGES),
            publishers: Lazy::new(txn, PUBLISHERS),
            keys: Lazy::new(txn, KEYS),
            subscriptions: Lazy::new(txn, SUBSCRIPTIONS),
            cursors: Lazy::new(txn, CURSORS),
            departed: Lazy::new(txn, DEPARTED),
            garbage: Lazy::new(txn, GARBAGE),
            segments: Lazy::new(txn, SEGMENTS),
            files: Lazy::new(txn, FILES),
            blobs: Lazy::new(txn, BLOBS),
        }
    }

    /// Makes those that are missing, so that readers find all of them.
    pub(super) fn make(&mut self) -> Result<(), TableError> {
        self.meta.open()?;
        self.boots.open()?;
        self.topics.open()?;
        self.heads.open()?;
        self.schemas.open()?;
        self.messages.open()?;
        self.publishers.open()?;
        self.keys.open()?;
        self.subscriptions.open()?;
        self.cursors.open()?;
        self.departed.open()?;
        self.garbage.open()?;
        self.segments.open()?;
        self.files.open()?;
        self.blobs.open()?;
        Ok(())
    }
}

/// A row failed its checksum, or says what cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a row of table {table} is damaged")]
pub(super) struct Damaged {
    pub(super) table: String,
}

impl Damaged {
    pub(super) fn in_table(table: &str) -> Self {
        Self { table: table.to_owned() }
    }
}

/// Why a row cannot be had.
#[derive(Debug, thiserror::Error)]
pub(super) enum Trouble {
    /// This row is damaged; others may not be.
    #[error(transparent)]
    Damaged(#[from] Damaged),
    /// The whole file is in trouble.
    #[error(transparent)]
    Redb(#[from] ::redb::Error),
}

impl Trouble {
    /// Whether there was no room.
    pub(super) fn is_full(&self) -> bool {
        use std::io::ErrorKind;
        matches!(self, Self::Redb(::redb::Error::Io(error))
            if matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded))
    }

    /// Whether redb says no more than that something has failed before.
    pub(super) fn is_previous(&self) -> bool {
        matches!(self, Self::Redb(::redb::Error::PreviousIo))
    }
}

macro_rules! trouble {
    ($($error:ident)*) => {$(
        impl From<::redb::$error> for Trouble {
            fn from(error: ::redb::$error) -> Self {
                Self::Redb(error.into())
            }
        }
    )*};
}

trouble!(StorageError TableError TransactionError CommitError DatabaseError CursorError);

const SUM_BYTES: usize = size_of::<u64>();

/// The checksum of some bytes at a place.
pub(super) fn checksum(table: &str, key: &[u8], bytes: &[u8]) -> u64 {
    xxh3_64_with_seed(bytes, xxh3_64_with_seed(key, xxh3_64(table.as_bytes())))
}

/// Adds rows of a topic behind those that it has.
///
/// By a cursor: `insert` gives a row a page of its own if what follows it in the table is a single
/// large row, here the first one of the next topic, and so each of a topic's rows would have one.
pub(super) fn append<'r>(
    messages: &mut Table<'_, (u64, u64), Row>,
    topic: Epoch,
    rows: impl IntoIterator<Item = (u64, &'r [u8])>,
) -> Result<(), Trouble> {
    let mut end = messages.upper_bound_mut(Bound::Included((topic.0, u64::MAX)))?;
    for (base, row) in rows {
        end.insert_before((topic.0, base), row)?;
    }
    Ok(end.close()?)
}

/// Stores a row with its checksum.
pub(super) fn put<'k, K: Key + 'static>(
    table: &mut Table<'_, K, Row>,
    key: K::SelfType<'k>,
    mut row: Vec<u8>,
) -> Result<(), StorageError> {
    let sum = checksum(table.name(), K::as_bytes(&key).as_ref(), &row);
    row.extend_from_slice(&sum.to_le_bytes());
    table.insert(key, row.as_slice())?;
    Ok(())
}

/// The row without its checksum, which was verified.
pub(super) fn unsealed<'r, K: Key + 'static>(
    table: &str,
    key: &K::SelfType<'_>,
    row: &'r [u8],
) -> Result<&'r [u8], Damaged> {
    let (bytes, sum) =
        row.split_last_chunk::<SUM_BYTES>().ok_or_else(|| Damaged::in_table(table))?;
    if checksum(table, K::as_bytes(key).as_ref(), bytes) == u64::from_le_bytes(*sum) {
        Ok(bytes)
    } else {
        Err(Damaged::in_table(table))
    }
}

/// The row, verified and decoded.
pub(super) fn decoded<K: Key + 'static, T>(
    table: &str,
    key: &K::SelfType<'_>,
    row: &[u8],
    decode: impl FnOnce(&[u8]) -> Option<T>,
) -> Result<T, Damaged> {
    decode(unsealed::<K>(table, key, row)?).ok_or_else(|| Damaged::in_table(table))
}

/// Reads a row, verifies and decodes it.
pub(super) fn get<'k, K: Key + 'static, T>(
    table: &(impl ReadableTable<K, Row> + TableHandle),
    key: K::SelfType<'k>,
    decode: impl FnOnce(&[u8]) -> Option<T>,
) -> Result<Option<T>, Trouble>
where
    K::SelfType<'k>: Copy,
{
    let Some(row) = table.get(key)? else {
        return Ok(None);
    };
    Ok(Some(decoded::<K, T>(table.name(), &key, row.value(), decode)?))
}
