//! What commits have stored: first in the log and in memory, then in the tables.

use std::collections::{BTreeMap, BTreeSet};

use ::redb::ReadableTableMetadata;
use bytes::{Buf, BufMut, Bytes};

use super::blobs::{Blob, Place};
use super::keys;
use super::rows::{self, decode_header, decode_place, encode, wide};
use super::state::State;
use super::tables::{Damaged, META_CLOCK, Tables, Trouble, append, put};
use crate::record::{CursorRecord, Epoch, Uuid};
use crate::storage::admission::{NewKey, Publisher};
use crate::storage::clock::{Age, Now};

/// The parts of a record.
const ROW: u8 = 1;
const PUBLISHER: u8 = 2;
const KEYS: u8 = 3;
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
    /// Keys by topic, in the order in which they were used.
    pub(super) keys: BTreeMap<Epoch, Vec<NewKey>>,
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
        for (topic, keys) in later.keys {
            self.add_keys(topic, keys);
        }
        self.cursors.extend(later.cursors);
        self.now = later.now.or(self.now);
        self.commits += later.commits;
    }

    pub(super) fn add_keys(&mut self, topic: Epoch, keys: Vec<NewKey>) {
        if !keys.is_empty() {
            self.keys.entry(topic).or_default().extend(keys);
        }
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
        self.keys.remove(&topic);
    }

    /// Writes all of it to its tables.
    pub(super) fn write(
        mut self,
        tables: &mut Tables<'_>,
        state: &mut State,
    ) -> Result<(), Trouble> {
        let keys = std::mem::take(&mut self.keys);
        let has_publishers = !self.publishers.is_empty();
        self.into_rows(state).write(tables)?;
        if has_publishers {
            state.publisher_rows = tables.publishers.open()?.len()?;
        }
        for (topic, keys) in &keys {
            state.keys.store(tables.keys.open()?, *topic, keys)?;
        }
        state.keys.settled();
        Ok(())
    }

    /// All of it but the keys, as it is in the tables.
    pub(super) fn into_rows(self, state: &State) -> Rows {
        let head = |topic: Epoch| Some((topic.0, encode(state.topics.get(&topic)?.head.as_ref()?)));
        // It may have been trimmed, and be gone.
        let blob = |(topic, file): (Epoch, u64)| {
            Some(((topic.0, file), encode(&state.blob(topic, file)?.stored())))
        };
        let publisher = |(topic, id): (Epoch, Uuid)| {
            Some(((topic.0, wide(id.0)), encode(state.cached_publisher(topic, id)?)))
        };
        Rows {
            messages: self.rows,
            heads: self.heads.into_iter().filter_map(head).collect(),
            blobs: self.blobs.into_iter().filter_map(blob).collect(),
            publishers: self.publishers.into_iter().filter_map(publisher).collect(),
            cursors: self.cursors,
            now: self.now,
        }
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
        for (topic, keys) in &self.keys {
            part(record, (KEYS, topic.0), &[], &keys::encode(keys));
        }
        for ((topic, subscription), cursor) in &self.cursors {
            let key = subscription.0.to_le_bytes();
            part(record, (CURSOR, topic.0), &key, &encode(cursor));
        }
    }
}

/// Rows for the tables, of which the state is not needed any more.
#[derive(Debug)]
pub(super) struct Rows {
    messages: Vec<(Epoch, u64, Bytes)>,
    heads: Vec<(u64, Vec<u8>)>,
    blobs: Vec<((u64, u64), Vec<u8>)>,
    publishers: Vec<((u64, u128), Vec<u8>)>,
    cursors: BTreeMap<(Epoch, Epoch), CursorRecord>,
    now: Option<Now>,
}

impl Rows {
    /// Writes them to their tables.
    pub(super) fn write(mut self, tables: &mut Tables<'_>) -> Result<(), Trouble> {
        self.messages.sort_unstable_by_key(|(topic, base, _)| (*topic, *base));
        for rows in self.messages.chunk_by(|(one, ..), (next, ..)| one == next) {
            let (topic, ..) = rows[0];
            let rows = rows.iter().map(|(_, base, row)| (*base, row.as_ref()));
            append(tables.messages.open()?, topic, rows)?;
        }
        for (topic, head) in self.heads {
            put(tables.heads.open()?, topic, head)?;
        }
        for (file, blob) in self.blobs {
            put(tables.blobs.open()?, file, blob)?;
        }
        for (id, publisher) in self.publishers {
            put(tables.publishers.open()?, id, publisher)?;
        }
        for ((topic, subscription), cursor) in &self.cursors {
            put(tables.cursors.open()?, (topic.0, subscription.0), encode(cursor))?;
        }
        if let Some(now) = &self.now {
            put(tables.meta.open()?, META_CLOCK, encode(now))?;
        }
        Ok(())
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
                KEYS => {
                    let keys = keys::decode_all(&row_of(&mut record)?)?;
                    self.keys.add(topic, &keys);
                    batch.add_keys(topic, keys);
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
