//! The tables of the hot file and of the sealed files, and the checksum that ends every row.
//!
//! `docs/format.md` describes the bytes. redb does not verify its own checksums on ordinary
//! reads, hence ours; they cover the table and the key too, so that a row cannot pass for another.

use std::fmt;

use ::redb::{
    Key, ReadableTable, StorageError, Table, TableDefinition, TableError, TableHandle,
    WriteTransaction,
};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

/// The version of the format. A server reads exactly one.
pub(super) const FORMAT: u32 = 2;

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
/// (topic, hash of the key) -> what is remembered of the idempotency key.
pub(super) const KEYS: TableDefinition<'_, (u64, u128), Row> = TableDefinition::new("keys");
/// (age at which they expire, topic, number) -> hashes of keys. Expiry reads it from its start.
pub(super) const EXPIRIES: TableDefinition<'_, (u64, u64, u64), Row> =
    TableDefinition::new("expiries");
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

/// Names in [`META`].
pub(super) const META_FORMAT: &str = "format";
/// Names in [`META`].
pub(super) const META_CLOCK: &str = "clock";

/// Kinds in [`GARBAGE`].
pub(super) const GARBAGE_TOPIC: u8 = 1;
/// Kinds in [`GARBAGE`].
pub(super) const GARBAGE_SUBSCRIPTION: u8 = 2;

/// All tables of the hot file in one write transaction.
pub(super) struct Tables<'t> {
    pub(super) meta: Table<'t, &'static str, Row>,
    pub(super) boots: Table<'t, u64, Row>,
    pub(super) topics: Table<'t, u64, Row>,
    pub(super) heads: Table<'t, u64, Row>,
    pub(super) schemas: Table<'t, (u64, u64), Row>,
    pub(super) messages: Table<'t, (u64, u64), Row>,
    pub(super) publishers: Table<'t, (u64, u128), Row>,
    pub(super) keys: Table<'t, (u64, u128), Row>,
    pub(super) expiries: Table<'t, (u64, u64, u64), Row>,
    pub(super) subscriptions: Table<'t, u64, Row>,
    pub(super) cursors: Table<'t, (u64, u64), Row>,
    pub(super) departed: Table<'t, (u64, u64), Row>,
    pub(super) garbage: Table<'t, (u8, u64), Row>,
    pub(super) segments: Table<'t, (u64, u64), Row>,
    pub(super) files: Table<'t, u64, Row>,
}

impl fmt::Debug for Tables<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tables").finish_non_exhaustive()
    }
}

impl<'t> Tables<'t> {
    pub(super) fn open(txn: &'t WriteTransaction) -> Result<Self, TableError> {
        Ok(Self {
            meta: txn.open_table(META)?,
            boots: txn.open_table(BOOTS)?,
            topics: txn.open_table(TOPICS)?,
            heads: txn.open_table(HEADS)?,
            schemas: txn.open_table(SCHEMAS)?,
            messages: txn.open_table(MESSAGES)?,
            publishers: txn.open_table(PUBLISHERS)?,
            keys: txn.open_table(KEYS)?,
            expiries: txn.open_table(EXPIRIES)?,
            subscriptions: txn.open_table(SUBSCRIPTIONS)?,
            cursors: txn.open_table(CURSORS)?,
            departed: txn.open_table(DEPARTED)?,
            garbage: txn.open_table(GARBAGE)?,
            segments: txn.open_table(SEGMENTS)?,
            files: txn.open_table(FILES)?,
        })
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

macro_rules! trouble {
    ($($error:ident)*) => {$(
        impl From<::redb::$error> for Trouble {
            fn from(error: ::redb::$error) -> Self {
                Self::Redb(error.into())
            }
        }
    )*};
}

trouble!(StorageError TableError TransactionError CommitError DatabaseError);

const SUM_BYTES: usize = size_of::<u64>();

/// The checksum of some bytes at a place.
pub(super) fn checksum(table: &str, key: &[u8], bytes: &[u8]) -> u64 {
    xxh3_64_with_seed(bytes, xxh3_64_with_seed(key, xxh3_64(table.as_bytes())))
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
