//! Reading. Each call is one bounded piece of blocking work: no transaction outlives it, since one
//! that is open keeps redb from using freed pages again.

use std::collections::{HashMap, HashSet};
use std::io::ErrorKind;
use std::sync::Arc;

use ::redb::{ReadOnlyTable, ReadTransaction, ReadableDatabase, ReadableTable};
use bytes::Bytes;

use super::recent::Row;
use super::rows::{BatchHeader, Messages, decode, decode_header, decode_place};
use super::sealed::Segment;
use super::shared::{Shared, ViewState};
use super::tables::{
    CURSORS, DEPARTED, MESSAGES, Row as Bytea, SCHEMAS, SUBSCRIPTIONS, TOPICS, Trouble, decoded,
};
use super::writer::explain;
use crate::limits;
use crate::record::{
    CursorRecord, Departed, Epoch, StoredMessage, SubscriptionRecord, Timestamp, TopicRecord,
};
use crate::storage::{Catalog, CatalogSubscription, ReadError, ReadLimit};

type MessageRange<'a> = ::redb::Range<'a, (u64, u64), Bytea>;
type MessageTable = ReadOnlyTable<(u64, u64), Bytea>;

/// How a read begins: with what is in memory.
pub(super) enum Begun {
    /// That is all of it.
    All(Vec<StoredMessage>),
    /// The rest is on disk.
    Some(Chunk),
}

/// See [`crate::storage::Storage::read`]. This does not block.
pub(super) fn begin(
    shared: &Shared,
    topic: Epoch,
    from: u64,
    limit: ReadLimit,
) -> Result<Begun, ReadError> {
    // The head comes first: whatever is looked up after it holds all that the head promises.
    let until = shared.view(topic).ok_or(ReadError::NoTopic)?.head();
    readable(shared, topic, from)?;
    let mut chunk = Chunk::new(topic, from, until, limit);
    while chunk.wants_more() {
        let next = chunk.next;
        let row = shared.recent.find(topic, next).or_else(|| {
            let (header, row) = shared.tail.row(topic, next)?;
            (!header.outside).then(|| Row::of(header, row))
        });
        match row {
            Some(row) => chunk.take(&row, until),
            None => return Ok(Begun::Some(chunk)),
        }
        if chunk.next == next && !chunk.full {
            return Ok(Begun::Some(chunk));
        }
    }
    Ok(Begun::All(chunk.messages))
}

/// Reads the rest from disk, but for what is in the log only.
pub(super) fn go_on(shared: &Shared, mut chunk: Chunk) -> Result<Vec<StoredMessage>, ReadError> {
    while chunk.wants_more() {
        let (topic, next, until) = (chunk.topic, chunk.next, chunk.until);
        let first = shared.tail.first(topic);
        if let Some((header, row)) = shared.tail.row(topic, next) {
            if let Err(miss) = chunk.take_row(shared, header, row, until) {
                // It may have been trimmed, with the file that has it.
                readable(shared, topic, next)?;
                return chunk.or(missed(shared, next, miss));
            }
            continue;
        }
        // What has left the tail since is in the hot file.
        let until = first.map_or(until, |first| until.min(first.max(next + 1) - 1));
        look_up(shared, topic, next, |table, end| chunk.fill(table, until.min(end), shared))?;
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
            (low, high) = header.narrow(time, (low, high));
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
        (low, high) = header.narrow(time, (low, high));
    }
    Ok(low.min(head + 1))
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
            return Err(missed(shared, sequence, miss));
        }
        place = now;
    }
}

/// A miss as an error, where nothing was moved meanwhile.
fn missed(shared: &Shared, sequence: u64, miss: Miss) -> ReadError {
    match miss {
        Miss::Lost(sequence) => ReadError::DataLoss { sequence },
        Miss::Trouble(Trouble::Damaged(_) | Trouble::Redb(::redb::Error::Corrupted(_))) => {
            ReadError::DataLoss { sequence }
        }
        Miss::Trouble(trouble) => explain(&shared.path, trouble).into(),
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

/// A row as it was stored, from the blob file that has it if it only says where that is. There is no
/// trouble if the file does not hold it.
fn whole(shared: &Shared, header: &BatchHeader, row: Bytes) -> Result<Bytes, Option<Trouble>> {
    if !header.outside {
        return Ok(row);
    }
    let place = decode_place(header, &row).map_err(|_| None)?;
    let row = shared.blobs.read(place).map_err(|error| {
        let is_missing = matches!(error.kind(), ErrorKind::NotFound | ErrorKind::UnexpectedEof);
        (!is_missing).then(|| ::redb::Error::Io(error).into())
    })?;
    match decode_header(header.topic, header.base, &row) {
        Ok(found) if found == (BatchHeader { outside: false, ..*header }) => Ok(row),
        Ok(_) | Err(_) => Err(None),
    }
}

/// Keeps a few rows more in memory, for whoever goes on reading, and ends at the first that cannot be
/// read: they meet it themselves.
fn read_ahead(topic: Epoch, mut next: u64, rows: MessageRange<'_>, shared: &Shared) {
    let mut bytes = 0;
    for entry in rows {
        let Ok((key, row)) = entry else { return };
        let Ok(header) = decode_header(topic, key.value().1, row.value()) else { return };
        bytes += header.bytes as usize;
        if bytes > limits::READ_AHEAD_BYTES {
            return;
        }
        let row = whole(shared, &header, Bytes::copy_from_slice(row.value())).ok();
        match row.and_then(|row| Row::verified(header, &row)) {
            Some(row) if header.base >= next => shared.recent.keep_read(row),
            Some(_) | None => return,
        }
        next = header.end();
    }
}

/// What is read so far.
#[derive(Debug)]
pub(super) struct Chunk {
    topic: Epoch,
    /// The next sequence.
    next: u64,
    /// The last one that is committed.
    until: u64,
    limit: ReadLimit,
    bytes: usize,
    messages: Vec<StoredMessage>,
    /// It ends here, at its limit or before something that cannot be read.
    full: bool,
}

impl Chunk {
    fn new(topic: Epoch, next: u64, until: u64, limit: ReadLimit) -> Self {
        Self { topic, next, until, limit, bytes: 0, messages: Vec::new(), full: false }
    }

    /// What was read, or the error if that is nothing.
    fn or(self, error: ReadError) -> Result<Vec<StoredMessage>, ReadError> {
        if self.messages.is_empty() { Err(error) } else { Ok(self.messages) }
    }

    fn wants_more(&self) -> bool {
        self.next <= self.until && !self.full
    }

    /// Takes what comes next from a row, up to `until`.
    fn take(&mut self, row: &Row, until: u64) {
        for message in row.messages(self.next).take_while(|message| message.sequence <= until) {
            self.push(message);
            if self.full {
                return;
            }
        }
    }

    /// Reads on. What cannot be read is an error only if nothing precedes it: whoever goes on from
    /// there meets it again.
    fn fill(&mut self, table: &MessageTable, until: u64, shared: &Shared) -> Result<(), Miss> {
        let filled = self.try_fill(table, until, shared);
        if filled.is_err() && !self.messages.is_empty() {
            self.full = true;
            return Ok(());
        }
        filled
    }

    fn try_fill(&mut self, table: &MessageTable, until: u64, shared: &Shared) -> Result<(), Miss> {
        let topic = self.topic;
        let base = base_of(table, topic, self.next)?;
        let mut rows = table.range((topic.0, base)..=(topic.0, until))?;
        while let Some(entry) = rows.next() {
            let (key, row) = entry?;
            let header = decode_header(topic, key.value().1, row.value());
            let header = header.map_err(|_| Miss::Lost(self.next))?;
            self.take_row(shared, header, Bytes::copy_from_slice(row.value()), until)?;
            if self.full {
                read_ahead(topic, self.next, rows, shared);
                return Ok(());
            }
        }
        if self.next <= until { Err(Miss::Lost(self.next)) } else { Ok(()) }
    }

    /// Takes what comes next from a row that was looked up, up to `until`, if it is what was stored.
    fn take_row(
        &mut self,
        shared: &Shared,
        header: BatchHeader,
        row: Bytes,
        until: u64,
    ) -> Result<(), Miss> {
        let lost = || Miss::Lost(self.next);
        // Rows follow each other without gaps, or something is missing.
        if !(header.base..header.end()).contains(&self.next) {
            return Err(lost());
        }
        let row = whole(shared, &header, row);
        let row = row.map_err(|trouble| trouble.map_or_else(lost, Miss::Trouble))?;
        if let Some(row) = Row::verified(header, &row) {
            self.take(&row, until);
            shared.recent.keep_read(row);
            return Ok(());
        }
        let mut messages = Messages::new(header, row);
        messages.skip_to(self.next).ok_or_else(lost)?;
        for message in messages
            .take_while(|message| message.as_ref().map_or(true, |one| one.sequence <= until))
        {
            self.push(message.map_err(Miss::Lost)?);
            if self.full {
                return Ok(());
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
