//! The requests of one commit, applied to one transaction.

use std::collections::{BTreeMap, BTreeSet};

use ::redb::{Database, ReadableTable};
use bytes::Bytes;

use super::batch::Batch;
use super::blobs::Doomed;
use super::recent::Row;
use super::rows::{
    BatchHeader, Head, decode, decode_header, encode, encode_batch, encode_place, row_length,
};
use super::sealing::release;
use super::state::{State, Topic};
use super::tables::{GARBAGE_SUBSCRIPTION, GARBAGE_TOPIC, Tables, Trouble, decoded, get, put};
use crate::limits;
use crate::record::{CursorRecord, Departed, Epoch, NewMessage, TopicRecord, Uuid};
use crate::storage::admission::{Admission, Context, Publisher, admit};
use crate::storage::clock::Now;
use crate::storage::{
    Append, AppendOutcome, AppendRefusal, Change, CommitError, OpenOutcome, OpenPublisher,
};

/// Applies requests in order, and collects what they store. Changes that are rare are made in the
/// tables at once.
pub(super) struct Group<'t, 's> {
    database: &'s Database,
    /// Only if there are such changes.
    tables: Option<&'s mut Tables<'t>>,
    state: &'s mut State,
    now: Now,
    /// Messages are refused, if they are not stored already.
    full: bool,
    messages: BTreeMap<Epoch, Vec<NewMessage>>,
    outside: Outside,
    batch: Batch,
    effects: Effects,
}

/// What may go to blob files.
#[derive(Clone, Copy, Debug)]
pub(super) struct Outside {
    /// To so many of them.
    pub(super) files: usize,
    /// And whether one of these may be a new one.
    pub(super) can_begin: bool,
}

/// What to show once the commit is durable.
#[derive(Debug, Default)]
pub(super) struct Effects {
    /// Topics that are new or whose heads have changed.
    pub(super) touched: BTreeSet<Epoch>,
    /// Topics that are gone, with their last heads.
    pub(super) deleted: BTreeMap<Epoch, u64>,
    /// Topics of which rows may go.
    pub(super) trimmed: BTreeSet<Epoch>,
    /// Rows of messages, for those who read them at once.
    pub(super) rows: Vec<Row>,
    /// Bytes of bodies that were stored.
    pub(super) bytes: u64,
    /// Those of them that are in blob files.
    pub(super) outside: u64,
    /// Topics and subscriptions that left rows behind.
    pub(super) garbage: bool,
    /// Files that nothing refers to any more.
    pub(super) doomed: Vec<Doomed>,
    /// Whether there is anything to commit.
    pub(super) dirty: bool,
}

impl<'t, 's> Group<'t, 's> {
    pub(super) fn new(
        database: &'s Database,
        tables: Option<&'s mut Tables<'t>>,
        state: &'s mut State,
        (now, full): (Now, bool),
        outside: Outside,
    ) -> Self {
        let (messages, batch, effects) = Default::default();
        Self { database, tables, state, now, full, messages, outside, batch, effects }
    }

    pub(super) fn append(&mut self, append: Append) -> Result<AppendOutcome, ::redb::Error> {
        refuse_damaged(self.try_append(append))
    }

    fn try_append(&mut self, append: Append) -> Result<AppendOutcome, Trouble> {
        let topic = append.topic;
        let Some(context) = self.context(topic)? else {
            return Ok(Err(AppendRefusal::NoTopic));
        };
        let id = append.publisher.map(|publisher| publisher.id);
        let known = match id {
            Some(id) => self.state.publisher(self.database, topic, id)?,
            None => None,
        };
        let Self { database, tables, state, now, .. } = self;
        let admission = admit(append, known, &context, |key| {
            state.key(database, tables.as_deref_mut(), (topic, *key), now.age)
        })?;
        if self.full && !admission.messages.is_empty() {
            return Ok(Err(AppendRefusal::DiskFull));
        }
        let Admission { outcome, messages, keys, publisher } = admission;
        if let (Some(id), Some(publisher)) = (id, publisher) {
            self.remember(topic, id, publisher);
        }
        self.state.keys.add(topic, &keys);
        self.batch.add_keys(topic, keys);
        self.store(topic, &context, messages)?;
        Ok(outcome)
    }

    fn context(&mut self, topic: Epoch) -> Result<Option<Context>, Trouble> {
        let key_room = limits::MAX_IDEMPOTENCY_KEYS.saturating_sub(self.state.keys.len());
        let (now, boot) = (self.now, self.state.boot);
        let Some(Topic { window, .. }) = self.state.topics.get(&topic) else {
            return Ok(None);
        };
        let window = *window;
        let Some(head) = self.state.head(topic)? else {
            return Ok(None);
        };
        let Head { head, last_at, .. } = *head;
        Ok(Some(Context { now, head, last_at, window, key_room, boot }))
    }

    fn store(
        &mut self,
        topic: Epoch,
        context: &Context,
        messages: Vec<NewMessage>,
    ) -> Result<(), Trouble> {
        if messages.is_empty() {
            return Ok(());
        }
        if let Some(head) = self.state.head(topic)? {
            head.head += messages.len() as u64;
            let bytes = messages.iter().map(|message| message.body.len() as u64).sum::<u64>();
            head.bytes += bytes;
            self.effects.bytes += bytes;
            head.last_at = context.at();
        }
        self.touch(topic);
        self.messages.entry(topic).or_default().extend(messages);
        Ok(())
    }

    pub(super) fn open(&mut self, open: &OpenPublisher) -> Result<OpenOutcome, ::redb::Error> {
        refuse_damaged(self.try_open(open))
    }

    fn try_open(&mut self, open: &OpenPublisher) -> Result<OpenOutcome, Trouble> {
        let (topic, id) = (open.topic, open.publisher.id);
        if self.state.head(topic)?.is_none() {
            return Ok(Err(AppendRefusal::NoTopic));
        }
        let known = self.state.publisher(self.database, topic, id)?;
        let is_new = known.is_none();
        if is_new && self.state.publisher_rows >= limits::MAX_PUBLISHERS {
            return Ok(Err(AppendRefusal::TooManyPublishers));
        }
        let publisher = match Publisher::open(known, open, self.state.boot, self.now) {
            Ok(publisher) => publisher,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let decided = publisher.decided();
        self.state.publisher_rows += u64::from(is_new);
        self.remember(topic, id, publisher);
        Ok(Ok(decided))
    }

    fn remember(&mut self, topic: Epoch, id: Uuid, publisher: Publisher) {
        self.effects.dirty = true;
        self.batch.publishers.insert((topic, id));
        self.state.remember(topic, id, publisher);
    }

    pub(super) fn apply(
        &mut self,
        changes: Vec<Change>,
    ) -> Result<Result<(), CommitError>, ::redb::Error> {
        if let Err(refused) = self.check_stores(&changes) {
            return Ok(Err(refused));
        }
        for change in changes {
            match self.apply_one(change) {
                Ok(()) => {}
                // Only a trim reads, and a topic that is damaged has nothing left to trim.
                Err(Trouble::Damaged(damaged)) => tracing::warn!(%damaged, "a change is lost"),
                Err(Trouble::Redb(error)) => return Err(error),
            }
        }
        Ok(Ok(()))
    }

    /// Whether the messages among the changes can be stored: all of them, or nothing happens.
    fn check_stores(&mut self, changes: &[Change]) -> Result<(), CommitError> {
        for change in changes {
            let Change::Store { topic, .. } = change else { continue };
            if self.full {
                return Err(CommitError::DiskFull);
            }
            match self.state.head(*topic) {
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => return Err(CommitError::NoTopic),
            }
        }
        Ok(())
    }

    fn apply_one(&mut self, change: Change) -> Result<(), Trouble> {
        self.effects.dirty = true;
        match change {
            Change::PutCursor { subscription, topic, cursor } => {
                let known = self.state.subscriptions.contains(&subscription);
                match &mut self.tables {
                    _ if !known => {}
                    None => drop(self.batch.cursors.insert((topic, subscription), cursor)),
                    Some(tables) if self.state.topics.contains_key(&topic) => {
                        let key = (topic.0, subscription.0);
                        put(tables.cursors.open()?, key, encode(&cursor))?;
                    }
                    Some(_) => self.move_departed((subscription.0, topic.0), cursor)?,
                }
            }
            Change::Store { topic, message } => {
                if let Some(context) = self.context(topic)? {
                    self.store(topic, &context, vec![message])?;
                }
            }
            Change::Trim { topic, below } => {
                if let Some(head) = self.state.head(topic)? {
                    head.first = head.first.max(below.min(head.head + 1));
                    self.effects.trimmed.insert(topic);
                    self.touch(topic);
                }
            }
            Change::DeleteTopic(topic) => self.delete_topic(topic)?,
            Change::CreateTopic(_)
            | Change::PutTopic(_)
            | Change::PutSchema(..)
            | Change::PutSubscription(_)
            | Change::DeleteSubscription(_)
            | Change::DeleteCursor { .. } => self.change_tables(change)?,
        }
        Ok(())
    }

    fn change_tables(&mut self, change: Change) -> Result<(), Trouble> {
        let tables = opened(&mut self.tables);
        match change {
            Change::CreateTopic(record) => {
                put(tables.topics.open()?, record.epoch.0, encode(&record))?;
                self.state.topics.insert(record.epoch, Topic::new(&record));
                self.touch(record.epoch);
            }
            Change::PutTopic(record) => {
                if let Some(topic) = self.state.topics.get_mut(&record.epoch) {
                    topic.set(&record);
                    put(tables.topics.open()?, record.epoch.0, encode(&record))?;
                }
            }
            Change::PutSchema(topic, schema) => {
                if self.state.topics.contains_key(&topic) {
                    let key = (topic.0, u64::from(schema.revision));
                    put(tables.schemas.open()?, key, encode(&*schema))?;
                }
            }
            Change::PutSubscription(record) => {
                put(tables.subscriptions.open()?, record.epoch.0, encode(&record))?;
                self.state.subscriptions.insert(record.epoch);
            }
            Change::DeleteSubscription(subscription) => {
                if self.state.subscriptions.remove(&subscription) {
                    tables.subscriptions.open()?.remove(subscription.0)?;
                    let key = (GARBAGE_SUBSCRIPTION, subscription.0);
                    put(tables.garbage.open()?, key, Vec::new())?;
                    self.effects.garbage = true;
                }
            }
            Change::DeleteCursor { subscription, topic } => {
                tables.cursors.open()?.remove((topic.0, subscription.0))?;
            }
            Change::DeleteTopic(_)
            | Change::PutCursor { .. }
            | Change::Store { .. }
            | Change::Trim { .. } => unreachable!("they are made where this is called"),
        }
        Ok(())
    }

    /// Makes a topic disappear at once; its rows go later, in pieces.
    fn delete_topic(&mut self, topic: Epoch) -> Result<(), Trouble> {
        self.depart(topic)?;
        let Some(Topic { segments, blobs, head, .. }) = self.state.drop_topic(topic) else {
            return Ok(());
        };
        let tables = opened(&mut self.tables);
        for segment in segments.iter() {
            let doomed = release(tables, self.state, topic, segment)?;
            self.effects.doomed.extend(doomed);
        }
        for blob in blobs {
            tables.blobs.open()?.remove((topic.0, blob.file))?;
            self.effects.doomed.push(Doomed::Blob(blob.file));
        }
        tables.topics.open()?.remove(topic.0)?;
        tables.heads.open()?.remove(topic.0)?;
        put(tables.garbage.open()?, (GARBAGE_TOPIC, topic.0), Vec::new())?;
        self.messages.remove(&topic);
        self.batch.drop_topic(topic);
        self.effects.touched.remove(&topic);
        self.effects.deleted.insert(topic, head.map_or(0, |head| head.head));
        self.effects.garbage = true;
        Ok(())
    }

    /// Keeps what subscriptions have to be told of a topic that is being deleted.
    fn depart(&mut self, topic: Epoch) -> Result<(), Trouble> {
        let tables = opened(&mut self.tables);
        let record = get(tables.topics.open()?, topic.0, decode::<TopicRecord>)?;
        let (Some(record), Some(state)) = (record, self.state.topics.get(&topic)) else {
            return Ok(());
        };
        let mut departed = Vec::new();
        for entry in tables.cursors.open()?.range((topic.0, 0)..=(topic.0, u64::MAX))? {
            let (key, row) = entry?;
            let subscription = Epoch(key.value().1);
            if self.state.subscriptions.contains(&subscription) {
                // What is damaged is told as missed, too: better twice than never.
                let cursor = decoded::<(u64, u64), _>("cursors", &key.value(), row.value(), decode);
                let cursor: CursorRecord = cursor.unwrap_or_default();
                let head = state.head.map_or(cursor.floor + 1, |head| head.head);
                departed.push((subscription, head, cursor));
            }
        }
        for (subscription, head, cursor) in departed {
            if cursor.floor < head {
                let name = record.name.clone();
                let row = encode(&Departed { name, epoch: topic, head, cursor });
                put(tables.departed.open()?, (subscription.0, topic.0), row)?;
            }
        }
        Ok(())
    }

    /// Moves the position in a topic that was deleted.
    fn move_departed(&mut self, key: (u64, u64), cursor: CursorRecord) -> Result<(), Trouble> {
        let tables = opened(&mut self.tables);
        let departed = get(tables.departed.open()?, key, decode::<Departed>)?;
        match departed {
            None => {}
            Some(departed) if cursor.floor >= departed.head => {
                tables.departed.open()?.remove(key)?;
            }
            Some(departed) => {
                let row = encode(&Departed { cursor, ..departed });
                put(tables.departed.open()?, key, row)?;
            }
        }
        Ok(())
    }

    fn touch(&mut self, topic: Epoch) {
        self.effects.dirty = true;
        self.effects.touched.insert(topic);
        self.batch.heads.insert(topic);
    }

    /// What there is to be written.
    pub(super) fn finish(mut self) -> Result<(Effects, Batch), Trouble> {
        if self.effects.dirty {
            self.encode_messages()?;
            self.batch.now = Some(self.now);
            self.batch.commits = 1;
        }
        Ok((self.effects, self.batch))
    }

    fn encode_messages(&mut self) -> Result<(), Trouble> {
        for (topic, messages) in std::mem::take(&mut self.messages) {
            let Some(Head { head, last_at, .. }) = self.state.head(topic)?.copied() else {
                continue;
            };
            let bytes = messages.iter().map(|message| message.body.len() as u64).sum();
            let outside = self.outside.files > 0
                && self.state.open_blob(topic, bytes, &mut self.outside.can_begin);
            self.outside.files -= usize::from(outside);
            let mut base = head + 1 - messages.len() as u64;
            let mut rest = messages.as_slice();
            while !rest.is_empty() {
                let (row, after) = rest.split_at(row_length(rest));
                let encoded = Bytes::from(encode_batch(topic, base, last_at, row));
                let header = decode_header(topic, base, &encoded)?;
                self.effects.rows.push(Row::of(header, encoded.clone()));
                let stored = if outside { self.append_outside(header, encoded)? } else { encoded };
                self.batch.rows.push((topic, base, stored));
                base = header.end();
                rest = after;
            }
        }
        Ok(())
    }

    /// Lets a row go to a blob file. Answers what takes its place.
    fn append_outside(&mut self, header: BatchHeader, row: Bytes) -> Result<Bytes, Trouble> {
        let topic = header.topic;
        let Some(place) = self.state.place(topic, header.end() - 1, row.len()) else {
            return Ok(row);
        };
        if let Some(head) = self.state.head(topic)? {
            head.outside += u64::from(header.bytes);
        }
        self.effects.outside += u64::from(header.bytes);
        self.batch.outside.push((place, row));
        self.batch.blobs.insert((topic, place.file));
        Ok(encode_place(header, place).into())
    }
}

/// The tables; see [`State::can_log`].
fn opened<'s, 't>(tables: &'s mut Option<&mut Tables<'t>>) -> &'s mut Tables<'t> {
    tables.as_mut().expect("what changes tables is not logged")
}

/// Damage concerns one topic or publisher; anything else concerns the whole commit.
fn refuse_damaged<T>(
    result: Result<Result<T, AppendRefusal>, Trouble>,
) -> Result<Result<T, AppendRefusal>, ::redb::Error> {
    match result {
        Ok(outcome) => Ok(outcome),
        Err(Trouble::Damaged(damaged)) => {
            tracing::error!(%damaged, "an append is refused");
            Ok(Err(AppendRefusal::Damaged))
        }
        Err(Trouble::Redb(error)) => Err(error),
    }
}
