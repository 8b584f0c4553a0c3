//! Reading. Each call is one bounded piece of blocking work: no transaction outlives it, since one
//! that is open keeps redb from using freed pages again.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use ::redb::{ReadOnlyTable, ReadTransaction, ReadableDatabase, ReadableTable};
use bytes::Bytes;

use super::rows::{BatchHeader, Messages, decode, decode_header};
use super::sealed::Segment;
use super::shared::{Shared, ViewState};
use super::tables::{
    CURSORS, DEPARTED, MESSAGES, Row, SCHEMAS, SUBSCRIPTIONS, TOPICS, Trouble, decoded,
};
use super::writer::explain;
use crate::record::{
    CursorRecord, Departed, Epoch, StoredMessage, SubscriptionRecord, Timestamp, TopicRecord,
};
use crate::storage::{Catalog, CatalogSubscription, ReadError, ReadLimit};

type MessageTable = ReadOnlyTable<(u64, u64), Row>;

/// See [`crate::storage::Storage::read`].
pub(super) fn read(
    shared: &Shared,
    topic: Epoch,
    from: u64,
    limit: ReadLimit,
) -> Result<Vec<StoredMessage>, ReadError> {
    // The head comes first: whatever is looked up after it holds all that the head promises.
    let until = shared.view(topic).ok_or(ReadError::NoTopic)?.head();
    readable(shared, topic, from)?;
    let mut chunk = Chunk { topic, next: from, limit, bytes: 0, messages: Vec::new(), full: false };
    while chunk.next <= until && !chunk.full {
        let next = chunk.next;
        let first = shared.tail.first(topic);
        if let Some((header, row)) = shared.tail.row(topic, next) {
            chunk
                .take_or_end(header, row, until)
                .map_err(|_| ReadError::DataLoss { sequence: next })?;
            continue;
        }
        // What has left the tail since is in the hot file.
        let until = first.map_or(until, |first| until.min(first.max(next + 1) - 1));
        look_up(shared, topic, next, |table, end| chunk.fill(table, until.min(end)))?;
    }
    Ok(chunk.messages)
}

/// See [`crate::storage::Storage::find`].
pub(super) fn find(shared: &Shared, topic: Epoch, time: Timestamp) -> Result<u64, ReadError> {
    let head = shared.view(topic).ok_or(ReadError::NoTopic)?.head();
    let mut low = readable(shared, topic, u64::MAX)?.first;
    let mut high = head + 1;
    // All messages of a row have one time, and times never decrease.
    while low < high {
        let middle = low + (high - low) / 2;
        if let Some((header, _)) = shared.tail.row(topic, middle) {
            (low, high) = narrow(&header, time, low, high);
            continue;
        }
        let header = match look_up(shared, topic, middle, |table, _| locate(table, topic, middle)) {
            // Trimmed in the meantime.
            Err(ReadError::Trimmed { first }) => {
                low = first;
                continue;
            }
            header => header?,
        };
        (low, high) = narrow(&header, time, low, high);
    }
    Ok(low.min(head + 1))
}

/// What remains of a range to be searched for a time.
fn narrow(header: &BatchHeader, time: Timestamp, low: u64, high: u64) -> (u64, u64) {
    if header.at >= time { (low, header.base.max(low)) } else { (header.end(), high) }
}

/// See [`crate::storage::Storage::catalog`].
pub(super) fn catalog(shared: &Shared) -> Result<Catalog, Trouble> {
    // Before the tables, where they are if they are not here any more.
    let mut recent = shared.tail.cursors();
    let guard = shared.database();
    let database = guard.as_ref().ok_or(::redb::Error::DatabaseClosed)?;
    let txn = database.begin_read()?;
    let mut catalog = Catalog::default();
    let mut topics = HashSet::new();
    for entry in txn.open_table(TOPICS)?.iter()? {
        let (epoch, row) = entry?;
        let epoch = epoch.value();
        let topic: TopicRecord = decoded::<u64, _>("topics", &epoch, row.value(), decode)?;
        topics.insert(epoch);
        catalog.topics.push(topic);
    }
    for entry in txn.open_table(SCHEMAS)?.iter()? {
        let (key, row) = entry?;
        let topic = key.value().0;
        if topics.contains(&topic) {
            let schema = decoded::<(u64, u64), _>("schemas", &key.value(), row.value(), decode)?;
            catalog.schemas.push((Epoch(topic), Arc::new(schema)));
        }
    }
    let mut cursors: HashMap<u64, Vec<(Epoch, CursorRecord)>> = HashMap::new();
    for entry in txn.open_table(CURSORS)?.iter()? {
        let (key, row) = entry?;
        let (topic, subscription) = key.value();
        // The others are garbage that is not collected yet.
        if topics.contains(&topic) {
            let cursor = decoded::<(u64, u64), _>("cursors", &key.value(), row.value(), decode)?;
            let cursor = recent.remove(&(Epoch(topic), Epoch(subscription))).unwrap_or(cursor);
            cursors.entry(subscription).or_default().push((Epoch(topic), cursor));
        }
    }
    for ((topic, subscription), cursor) in recent {
        if topics.contains(&topic.0) {
            cursors.entry(subscription.0).or_default().push((topic, cursor));
        }
    }
    for entry in txn.open_table(SUBSCRIPTIONS)?.iter()? {
        let (epoch, row) = entry?;
        let epoch = epoch.value();
        let record: SubscriptionRecord =
            decoded::<u64, _>("subscriptions", &epoch, row.value(), decode)?;
        let cursors = cursors.remove(&epoch).unwrap_or_default();
        let departed = departed(&txn, epoch)?;
        catalog.subscriptions.push(CatalogSubscription { record, cursors, departed });
    }
    Ok(catalog)
}

fn departed(txn: &ReadTransaction, subscription: u64) -> Result<Vec<Departed>, Trouble> {
    let mut departed = Vec::new();
    let table = txn.open_table(DEPARTED)?;
    for entry in table.range((subscription, 0)..=(subscription, u64::MAX))? {
        let (key, row) = entry?;
        departed.push(decoded::<(u64, u64), _>("departed", &key.value(), row.value(), decode)?);
    }
    Ok(departed)
}

/// Where a sequence is.
#[derive(Debug, PartialEq)]
enum Place {
    Hot,
    Sealed(Segment),
}

impl Place {
    fn of(state: &ViewState, sequence: u64) -> Self {
        let after = state.segments.partition_point(|segment| segment.last < sequence);
        state.segments.get(after).map_or(Self::Hot, |segment| Self::Sealed(*segment))
    }
}

/// Why a sequence is not found where it should be.
enum Miss {
    /// It is not there, or damaged.
    Lost(u64),
    Trouble(Trouble),
}

impl<E: Into<Trouble>> From<E> for Miss {
    fn from(error: E) -> Self {
        Self::Trouble(error.into())
    }
}

/// Whether a sequence can be asked for.
fn readable(shared: &Shared, topic: Epoch, sequence: u64) -> Result<ViewState, ReadError> {
    let state = shared.view(topic).ok_or(ReadError::NoTopic)?.state();
    if state.damaged {
        return Err(ReadError::DataLoss { sequence });
    }
    if sequence < state.first {
        return Err(ReadError::Trimmed { first: state.first });
    }
    Ok(state)
}

/// Looks into the table that holds a sequence. The rows may have been trimmed or moved since we
/// looked where they are: they are lost only if they should still be there.
fn look_up<T>(
    shared: &Shared,
    topic: Epoch,
    sequence: u64,
    mut work: impl FnMut(&MessageTable, u64) -> Result<T, Miss>,
) -> Result<T, ReadError> {
    let mut place = Place::of(&readable(shared, topic, sequence)?, sequence);
    loop {
        let miss = match visit(shared, &place, &mut work) {
            Ok(found) => return Ok(found),
            Err(miss) => miss,
        };
        let now = Place::of(&readable(shared, topic, sequence)?, sequence);
        if now == place {
            return Err(match miss {
                Miss::Lost(sequence) => ReadError::DataLoss { sequence },
                Miss::Trouble(Trouble::Damaged(_) | Trouble::Redb(::redb::Error::Corrupted(_))) => {
                    ReadError::DataLoss { sequence }
                }
                Miss::Trouble(trouble) => explain(&shared.path, trouble).into(),
            });
        }
        place = now;
    }
}

/// Works on a table with the last sequence that it can hold.
fn visit<T>(
    shared: &Shared,
    place: &Place,
    work: &mut impl FnMut(&MessageTable, u64) -> Result<T, Miss>,
) -> Result<T, Miss> {
    match place {
        Place::Hot => {
            let guard = shared.database();
            let database = guard.as_ref().ok_or(::redb::Error::DatabaseClosed)?;
            work(&database.begin_read()?.open_table(MESSAGES)?, u64::MAX)
        }
        Place::Sealed(segment) => {
            let file = shared.cabinet.get(segment.file)?;
            work(&file.begin_read()?.open_table(MESSAGES)?, segment.last)
        }
    }
}

/// The first sequence of the row that should hold a sequence.
fn base_of(table: &MessageTable, topic: Epoch, sequence: u64) -> Result<u64, Miss> {
    let row = table.range((topic.0, 0)..=(topic.0, sequence))?.next_back().transpose()?;
    row.map(|(key, _)| key.value().1).ok_or(Miss::Lost(sequence))
}

/// The header of the row that holds a sequence.
fn locate(table: &MessageTable, topic: Epoch, sequence: u64) -> Result<BatchHeader, Miss> {
    let lost = Miss::Lost(sequence);
    let base = base_of(table, topic, sequence)?;
    let Some(row) = table.get((topic.0, base))? else {
        return Err(lost);
    };
    match decode_header(topic, base, row.value()) {
        Ok(header) if header.end() > sequence => Ok(header),
        Ok(_) | Err(_) => Err(lost),
    }
}

/// What is read so far.
#[derive(Debug)]
struct Chunk {
    topic: Epoch,
    /// The next sequence.
    next: u64,
    limit: ReadLimit,
    bytes: usize,
    messages: Vec<StoredMessage>,
    /// It ends here, at its limit or before something that cannot be read.
    full: bool,
}

impl Chunk {
    /// Reads on. What cannot be read is an error only if nothing precedes it: whoever goes on from
    /// there meets it again.
    fn fill(&mut self, table: &MessageTable, until: u64) -> Result<(), Miss> {
        let filled = self.try_fill(table, until);
        self.or_end(filled)
    }

    /// Reads on in one row, likewise.
    fn take_or_end(&mut self, header: BatchHeader, row: Bytes, until: u64) -> Result<(), Miss> {
        let taken = self.take(header, row, until);
        self.or_end(taken)
    }

    fn or_end(&mut self, result: Result<(), Miss>) -> Result<(), Miss> {
        if result.is_err() && !self.messages.is_empty() {
            self.full = true;
            return Ok(());
        }
        result
    }

    fn try_fill(&mut self, table: &MessageTable, until: u64) -> Result<(), Miss> {
        let topic = self.topic;
        let base = base_of(table, topic, self.next)?;
        for entry in table.range((topic.0, base)..=(topic.0, until))? {
            let (key, row) = entry?;
            let lost = || Miss::Lost(self.next);
            let header = decode_header(topic, key.value().1, row.value()).map_err(|_| lost())?;
            // Rows follow each other without gaps, or something is missing.
            if !(header.base..header.end()).contains(&self.next) {
                return Err(lost());
            }
            self.take(header, Bytes::copy_from_slice(row.value()), until)?;
            if self.full {
                return Ok(());
            }
        }
        if self.next <= until { Err(Miss::Lost(self.next)) } else { Ok(()) }
    }

    /// Reads on in the row that holds the next sequence.
    fn take(&mut self, header: BatchHeader, row: Bytes, until: u64) -> Result<(), Miss> {
        let mut messages = Messages::new(header, row);
        messages.skip_to(self.next).ok_or(Miss::Lost(self.next))?;
        for message in messages
            .take_while(|message| message.as_ref().map_or(true, |each| each.sequence <= until))
        {
            self.push(message.map_err(Miss::Lost)?);
            if self.full {
                break;
            }
        }
        Ok(())
    }

    fn push(&mut self, message: StoredMessage) {
        let bytes = self.bytes + message.body.len();
        if !self.messages.is_empty() && bytes > self.limit.bytes {
            self.full = true;
            return;
        }
        debug_assert_eq!(message.sequence, self.next, "sequences are dense");
        self.bytes = bytes;
        self.next += 1;
        self.messages.push(message);
        self.full = self.messages.len() >= self.limit.messages || bytes >= self.limit.bytes;
    }
}
