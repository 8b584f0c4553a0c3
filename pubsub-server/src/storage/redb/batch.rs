//! What commits have stored: first in the log and in memory, then in the tables.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use ::redb::ReadableTableMetadata;
use bytes::{Buf, BufMut, Bytes};

use super::blobs::{Blob, Place};
use super::rows::{self, decode_header, decode_place, encode, wide};
use super::state::State;
use super::tables::{Damaged, META_CLOCK, Tables, Trouble, put};
use crate::record::{CursorRecord, Epoch, Uuid};
use crate::storage::admission::{KeyRow, Publisher};
use crate::storage::clock::{Age, Now};

/// Hashes in one row of the table of expiries.
const KEYS_PER_EXPIRY: usize = 1_000;

/// The message under a key, and the key's hash.
type UsedKey = (u64, [u8; 16]);

/// The parts of a record.
const ROW: u8 = 1;
const PUBLISHER: u8 = 2;
const KEY: u8 = 3;
const CURSOR: u8 = 4;

/// Rows to be written. Those of heads and publishers are in the state, which is where they change.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// Messages by topic and first sequence, or where they are.
    pub(super) rows: Vec<(Epoch, u64, Bytes)>,
    /// Messages for blob files. They are written before the rest of the commit.
    pub(super) outside: Vec<(Place, Bytes)>,
    /// Blob files that have grown, by topic.
    pub(super) blobs: BTreeSet<(Epoch, u64)>,
    /// Topics whose heads have changed.
    pub(super) heads: BTreeSet<Epoch>,
    pub(super) publishers: BTreeSet<(Epoch, Uuid)>,
    pub(super) keys: HashMap<(Epoch, [u8; 16]), KeyRow>,
    /// Positions by topic and subscription.
    pub(super) cursors: BTreeMap<(Epoch, Epoch), CursorRecord>,
    /// When it was stored; `None` if it was not.
    pub(super) now: Option<Now>,
    /// How many commits it is.
    pub(super) commits: u32,
}

impl Batch {
    pub(super) fn is_empty(&self) -> bool {
        self.commits == 0
    }

    /// Adds what was stored after it.
    pub(super) fn extend(&mut self, later: Self) {
        self.rows.extend(later.rows);
        self.blobs.extend(later.blobs);
        self.heads.extend(later.heads);
        self.publishers.extend(later.publishers);
        self.keys.extend(later.keys);
        self.cursors.extend(later.cursors);
        self.now = later.now.or(self.now);
        self.commits += later.commits;
    }

    /// The bug that a test has to find: identities are stored after their messages.
    #[cfg(pubsub_break = "dedup_in_second_transaction")]
    pub(super) fn halves(mut self) -> [Self; 2] {
        let late = Self {
            publishers: std::mem::take(&mut self.publishers),
            keys: std::mem::take(&mut self.keys),
            now: self.now,
            commits: self.commits,
            ..Self::default()
        };
        [self, late]
    }

    /// Forgets what belongs to a topic.
    pub(super) fn drop_topic(&mut self, topic: Epoch) {
        self.heads.remove(&topic);
        self.blobs.retain(|(of, _)| *of != topic);
        self.publishers.retain(|(of, _)| *of != topic);
        self.keys.retain(|(of, _), _| *of != topic);
    }

    /// Writes all of it to its tables.
    pub(super) fn write(
        mut self,
        tables: &mut Tables<'_>,
        state: &mut State,
    ) -> Result<(), Trouble> {
        self.rows.sort_unstable_by_key(|(topic, base, _)| (*topic, *base));
        for (topic, base, row) in &self.rows {
            tables.messages.open()?.insert((topic.0, *base), row.as_ref())?;
        }
        for topic in &self.heads {
            if let Some(head) = state.topics.get(topic).and_then(|topic| topic.head.as_ref()) {
                put(tables.heads.open()?, topic.0, encode(head))?;
            }
        }
        for (topic, file) in &self.blobs {
            // It may have been trimmed, and be gone.
            if let Some(blob) = state.blob(*topic, *file) {
                put(tables.blobs.open()?, (topic.0, *file), encode(&blob.stored()))?;
            }
        }
        for (topic, id) in &self.publishers {
            if let Some(publisher) = state.cached_publisher(*topic, *id) {
                put(tables.publishers.open()?, (topic.0, wide(id.0)), encode(publisher))?;
            }
        }
        if !self.publishers.is_empty() {
            state.publisher_rows = tables.publishers.open()?.len()?;
        }
        for ((topic, subscription), cursor) in &self.cursors {
            put(tables.cursors.open()?, (topic.0, subscription.0), encode(cursor))?;
        }
        if !self.keys.is_empty() {
            self.write_keys(tables)?;
            state.key_rows = tables.keys.open()?.len()?;
        }
        if let Some(now) = &self.now {
            put(tables.meta.open()?, META_CLOCK, encode(now))?;
        }
        Ok(())
    }

    fn write_keys(&self, tables: &mut Tables<'_>) -> Result<(), Trouble> {
        // Sorted, neighbours share the pages that have to be written.
        let mut keys: Vec<_> = self.keys.iter().collect();
        keys.sort_unstable_by_key(|(key, _)| **key);
        let table = tables.keys.open()?;
        for ((topic, key), row) in &keys {
            put(table, (topic.0, wide(*key)), row.encode())?;
        }
        let mut expiries: BTreeMap<(Age, Epoch), Vec<UsedKey>> = BTreeMap::new();
        for ((topic, key), row) in keys {
            expiries.entry((row.expires, *topic)).or_default().push((row.sequence, *key));
        }
        for ((expires, topic), keys) in &expiries {
            for keys in keys.chunks(KEYS_PER_EXPIRY) {
                // The number of a message with a key is unique, and all that is asked of it.
                let number = keys.first().map_or(0, |(sequence, _)| *sequence);
                let hashes = keys.iter().flat_map(|(_, key)| *key).collect();
                put(tables.expiries.open()?, (expires.0, topic.0, number), hashes)?;
            }
        }
        Ok(())
    }

    /// Encodes all of it for the log.
    pub(super) fn encode(&self, state: &State, record: &mut Vec<u8>) {
        let now = self.now.unwrap_or_default();
        record.put_u64_le(now.wall.0);
        record.put_u64_le(now.age.0);
        for (topic, base, row) in &self.rows {
            part(record, (ROW, topic.0), &base.to_le_bytes(), row);
        }
        for (topic, id) in &self.publishers {
            if let Some(publisher) = state.cached_publisher(*topic, *id) {
                part(record, (PUBLISHER, topic.0), &id.0, &encode(publisher));
            }
        }
        for ((topic, key), row) in &self.keys {
            part(record, (KEY, topic.0), key, &row.encode());
        }
        for ((topic, subscription), cursor) in &self.cursors {
            let key = subscription.0.to_le_bytes();
            part(record, (CURSOR, topic.0), &key, &encode(cursor));
        }
    }
}

fn part(record: &mut Vec<u8>, (kind, topic): (u8, u64), key: &[u8], row: &[u8]) {
    record.put_u8(kind);
    record.put_u64_le(topic);
    record.put_slice(key);
    record.put_u32_le(u32::try_from(row.len()).expect("limits bound a row"));
    record.put_slice(row);
}

impl State {
    /// Takes over what a record of the log says, as when it was committed.
    pub(super) fn replay(&mut self, record: Vec<u8>) -> Result<(), Damaged> {
        let damaged = || Damaged::in_table(super::disk::LOG);
        let mut batch = Batch { commits: 1, ..Batch::default() };
        self.decode(&mut batch, Bytes::from(record)).ok_or_else(damaged)?;
        self.publisher_rows += batch.publishers.len() as u64;
        self.key_rows += batch.keys.len() as u64;
        self.pending.extend(batch);
        Ok(())
    }

    fn decode(&mut self, batch: &mut Batch, mut record: Bytes) -> Option<()> {
        let wall = crate::record::Timestamp(record.try_get_u64_le().ok()?);
        batch.now = Some(Now { wall, age: Age(record.try_get_u64_le().ok()?) });
        while let Ok(kind) = record.try_get_u8() {
            let topic = Epoch(record.try_get_u64_le().ok()?);
            match kind {
                ROW => {
                    let base = record.try_get_u64_le().ok()?;
                    let row = row_of(&mut record)?;
                    batch.blobs.extend(self.replay_row(topic, base, &row)?);
                    batch.heads.insert(topic);
                    batch.rows.push((topic, base, row));
                }
                PUBLISHER => {
                    let id = Uuid(id_of(&mut record)?);
                    let publisher: Publisher = rows::decode(&row_of(&mut record)?)?;
                    self.remember(topic, id, publisher);
                    batch.publishers.insert((topic, id));
                }
                KEY => {
                    let key = id_of(&mut record)?;
                    batch.keys.insert((topic, key), KeyRow::decode(&row_of(&mut record)?)?);
                }
                CURSOR => {
                    let subscription = Epoch(record.try_get_u64_le().ok()?);
                    let cursor = rows::decode(&row_of(&mut record)?)?;
                    batch.cursors.insert((topic, subscription), cursor);
                }
                _ => return None,
            }
        }
        Some(())
    }

    /// Moves the head of a topic as the row has moved it; a damaged one stays unknown. Answers the
    /// blob file that it has let grow, if that is so.
    #[expect(clippy::option_option, reason = "no blob is no damage")]
    fn replay_row(&mut self, topic: Epoch, base: u64, row: &[u8]) -> Option<Option<(Epoch, u64)>> {
        let header = decode_header(topic, base, row).ok()?;
        let place = header.outside.then(|| decode_place(&header, row)).transpose().ok()?;
        if let Some(Place { file, offset, length }) = place {
            let blob = Blob::found(file, header.end() - 1, offset + u64::from(length));
            self.topics.get_mut(&topic)?.note_blob(blob);
        }
        if let Some(head) = self.topics.get_mut(&topic)?.head.as_mut() {
            if base != head.head + 1 {
                return None;
            }
            head.head = header.end() - 1;
            head.bytes += u64::from(header.bytes);
            head.outside += header.outside_bytes();
            head.last_at = header.at;
        }
        Some(place.map(|place| (topic, place.file)))
    }
}

fn id_of(record: &mut Bytes) -> Option<[u8; 16]> {
    let mut id = [0; 16];
    record.try_copy_to_slice(&mut id).ok()?;
    Some(id)
}

fn row_of(record: &mut Bytes) -> Option<Bytes> {
    let length = record.try_get_u32_le().ok()? as usize;
    (length <= record.len()).then(|| record.split_to(length))
}
