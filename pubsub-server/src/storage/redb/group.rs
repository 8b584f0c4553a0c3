//! The requests of one commit, applied to one transaction.

use std::collections::{BTreeMap, BTreeSet};

use ::redb::{ReadableTable, ReadableTableMetadata};

use super::recent::Row;
use super::rows::{Head, decode, encode, encode_batch, row_length, wide};
use super::sealing::release;
use super::state::{State, Topic};
use super::tables::{
    GARBAGE_SUBSCRIPTION, GARBAGE_TOPIC, META_CLOCK, Tables, Trouble, decoded, get, put,
};
use crate::limits;
use crate::record::{CursorRecord, Departed, Epoch, NewMessage, TopicRecord, Uuid};
use crate::storage::admission::{Admission, Context, KeyRow, Publisher, admit};
use crate::storage::clock::{Age, Now};
use crate::storage::{
    Append, AppendOutcome, AppendRefusal, Change, CommitError, OpenOutcome, OpenPublisher,
};

/// Hashes in one row of the table of expiries.
const KEYS_PER_EXPIRY: usize = 1_000;

/// The hash of a key and the message under it.
type UsedKey = ([u8; 16], u64);

/// Applies requests in order. Rows that every request would write again are written once, by
/// [`Group::finish`].
pub(super) struct Group<'t, 's> {
    tables: Tables<'t>,
    state: &'s mut State,
    now: Now,
    /// Messages are refused, if they are not stored already.
    full: bool,
    messages: BTreeMap<Epoch, Vec<NewMessage>>,
    publishers: BTreeMap<(Epoch, Uuid), Publisher>,
    expiries: BTreeMap<(Age, Epoch), Vec<UsedKey>>,
    effects: Effects,
    row: Vec<u8>,
    #[cfg(pubsub_break = "dedup_in_second_transaction")]
    late_keys: Vec<(Epoch, [u8; 16], KeyRow)>,
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
    /// Topics and subscriptions that left rows behind.
    pub(super) garbage: bool,
    /// Sealed files that nothing refers to any more.
    pub(super) doomed: Vec<u64>,
    /// Whether there is anything to commit.
    pub(super) dirty: bool,
    #[cfg(pubsub_break = "dedup_in_second_transaction")]
    pub(super) late: Late,
}

/// The bug that a test has to find: identities are stored after their messages.
#[cfg(pubsub_break = "dedup_in_second_transaction")]
#[derive(Debug, Default)]
pub(super) struct Late {
    publishers: BTreeMap<(Epoch, Uuid), Publisher>,
    keys: Vec<(Epoch, [u8; 16], KeyRow)>,
}

impl<'t, 's> Group<'t, 's> {
    pub(super) fn new(tables: Tables<'t>, state: &'s mut State, now: Now, full: bool) -> Self {
        Self {
            tables,
            state,
            now,
            full,
            messages: BTreeMap::new(),
            publishers: BTreeMap::new(),
            expiries: BTreeMap::new(),
            effects: Effects::default(),
            row: Vec::new(),
            #[cfg(pubsub_break = "dedup_in_second_transaction")]
            late_keys: Vec::new(),
        }
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
            Some(id) => self.state.publisher(&self.tables, topic, id)?,
            None => None,
        };
        let keys = &self.tables.keys;
        let admission =
            admit(append, known, &context, |key| get(keys, (topic.0, wide(*key)), KeyRow::decode))?;
        if self.full && !admission.messages.is_empty() {
            return Ok(Err(AppendRefusal::DiskFull));
        }
        if let (Some(id), Some(publisher)) = (id, &admission.publisher) {
            self.remember(topic, id, publisher.clone());
        }
        self.store(topic, &context, admission)
    }

    fn context(&mut self, topic: Epoch) -> Result<Option<Context>, Trouble> {
        let key_room = limits::MAX_IDEMPOTENCY_KEYS.saturating_sub(self.tables.keys.len()?);
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
        admission: Admission,
    ) -> Result<AppendOutcome, Trouble> {
        let Admission { outcome, messages, keys, .. } = admission;
        for (key, row) in keys {
            #[cfg(pubsub_break = "dedup_in_second_transaction")]
            self.late_keys.push((topic, key, row));
            #[cfg(not(pubsub_break = "dedup_in_second_transaction"))]
            put(&mut self.tables.keys, (topic.0, wide(key)), row.encode())?;
            self.expiries.entry((row.expires, topic)).or_default().push((key, row.sequence));
        }
        self.store_messages(topic, context, messages)?;
        Ok(outcome)
    }

    fn store_messages(
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
        let known = self.state.publisher(&self.tables, topic, id)?;
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
        self.publishers.insert((topic, id), publisher.clone());
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
            Change::CreateTopic(record) => {
                put(&mut self.tables.topics, record.epoch.0, encode(&record))?;
                self.state.topics.insert(record.epoch, Topic::new(&record));
                self.touch(record.epoch);
            }
            Change::PutTopic(record) => {
                if let Some(topic) = self.state.topics.get_mut(&record.epoch) {
                    topic.set(&record);
                    put(&mut self.tables.topics, record.epoch.0, encode(&record))?;
                }
            }
            Change::DeleteTopic(topic) => self.delete_topic(topic)?,
            Change::PutSchema(topic, schema) => {
                if self.state.topics.contains_key(&topic) {
                    let key = (topic.0, u64::from(schema.revision));
                    put(&mut self.tables.schemas, key, encode(&*schema))?;
                }
            }
            Change::PutSubscription(record) => {
                put(&mut self.tables.subscriptions, record.epoch.0, encode(&record))?;
                self.state.subscriptions.insert(record.epoch);
            }
            Change::DeleteSubscription(subscription) => {
                if self.state.subscriptions.remove(&subscription) {
                    self.tables.subscriptions.remove(subscription.0)?;
                    put(
                        &mut self.tables.garbage,
                        (GARBAGE_SUBSCRIPTION, subscription.0),
                        Vec::new(),
                    )?;
                    self.effects.garbage = true;
                }
            }
            Change::PutCursor { subscription, topic, cursor } => {
                if !self.state.subscriptions.contains(&subscription) {
                } else if self.state.topics.contains_key(&topic) {
                    put(&mut self.tables.cursors, (topic.0, subscription.0), encode(&cursor))?;
                } else {
                    self.move_departed((subscription.0, topic.0), cursor)?;
                }
            }
            Change::DeleteCursor { subscription, topic } => {
                self.tables.cursors.remove((topic.0, subscription.0))?;
            }
            Change::Store { topic, message } => {
                if let Some(context) = self.context(topic)? {
                    self.store_messages(topic, &context, vec![message])?;
                }
            }
            Change::Trim { topic, below } => {
                if let Some(head) = self.state.head(topic)? {
                    head.first = head.first.max(below.min(head.head + 1));
                    self.effects.trimmed.insert(topic);
                    self.touch(topic);
                }
            }
        }
        Ok(())
    }

    /// Makes a topic disappear at once; its rows go later, in pieces.
    fn delete_topic(&mut self, topic: Epoch) -> Result<(), Trouble> {
        self.depart(topic)?;
        let Some(Topic { segments, head, .. }) = self.state.drop_topic(topic) else {
            return Ok(());
        };
        for segment in segments.iter() {
            let doomed = release(&mut self.tables, self.state, topic, segment)?;
            self.effects.doomed.extend(doomed);
        }
        self.tables.topics.remove(topic.0)?;
        self.tables.heads.remove(topic.0)?;
        put(&mut self.tables.garbage, (GARBAGE_TOPIC, topic.0), Vec::new())?;
        self.messages.remove(&topic);
        self.publishers.retain(|(of, _), _| *of != topic);
        self.effects.touched.remove(&topic);
        self.effects.deleted.insert(topic, head.map_or(0, |head| head.head));
        self.effects.garbage = true;
        Ok(())
    }

    /// Keeps what subscriptions have to be told of a topic that is being deleted.
    fn depart(&mut self, topic: Epoch) -> Result<(), Trouble> {
        let record = get(&self.tables.topics, topic.0, decode::<TopicRecord>)?;
        let (Some(record), Some(state)) = (record, self.state.topics.get(&topic)) else {
            return Ok(());
        };
        let mut departed = Vec::new();
        for entry in self.tables.cursors.range((topic.0, 0)..=(topic.0, u64::MAX))? {
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
                put(&mut self.tables.departed, (subscription.0, topic.0), row)?;
            }
        }
        Ok(())
    }

    /// Moves the position in a topic that was deleted.
    fn move_departed(&mut self, key: (u64, u64), cursor: CursorRecord) -> Result<(), Trouble> {
        let departed = get(&self.tables.departed, key, decode::<Departed>)?;
        match departed {
            None => {}
            Some(departed) if cursor.floor >= departed.head => {
                self.tables.departed.remove(key)?;
            }
            Some(departed) => {
                let row = encode(&Departed { cursor, ..departed });
                put(&mut self.tables.departed, key, row)?;
            }
        }
        Ok(())
    }

    fn touch(&mut self, topic: Epoch) {
        self.effects.dirty = true;
        self.effects.touched.insert(topic);
    }

    /// Writes what was collected.
    pub(super) fn finish(mut self) -> Result<Effects, Trouble> {
        if !self.effects.dirty {
            return Ok(self.effects);
        }
        self.write_messages()?;
        for topic in &self.effects.touched {
            if let Some(head) = self.state.head(*topic)? {
                put(&mut self.tables.heads, topic.0, encode(head))?;
            }
        }
        #[cfg(pubsub_break = "dedup_in_second_transaction")]
        {
            self.effects.late = Late { publishers: self.publishers, keys: self.late_keys };
            self.publishers = BTreeMap::new();
        }
        for ((topic, id), publisher) in &self.publishers {
            put(&mut self.tables.publishers, (topic.0, wide(id.0)), encode(publisher))?;
        }
        for ((expires, topic), keys) in &self.expiries {
            for keys in keys.chunks(KEYS_PER_EXPIRY) {
                // The number of a message with a key is unique, and all that is asked of it.
                let number = keys.first().map_or(0, |(_, sequence)| *sequence);
                let hashes = keys.iter().flat_map(|(key, _)| *key).collect();
                put(&mut self.tables.expiries, (expires.0, topic.0, number), hashes)?;
            }
        }
        self.state.publisher_rows = self.tables.publishers.len()?;
        put(&mut self.tables.meta, META_CLOCK, encode(&self.now))?;
        Ok(self.effects)
    }

    fn write_messages(&mut self) -> Result<(), Trouble> {
        for (topic, messages) in &self.messages {
            let Some(head) = self.state.head(*topic)? else {
                continue;
            };
            let at = head.last_at;
            let mut base = head.head + 1 - messages.len() as u64;
            let mut rest = messages.as_slice();
            while !rest.is_empty() {
                let (row, after) = rest.split_at(row_length(rest));
                encode_batch(&mut self.row, *topic, base, at, row);
                self.tables.messages.insert((topic.0, base), self.row.as_slice())?;
                let end = base + row.len() as u64;
                self.effects.rows.push(Row::written(*topic, base, end, at, &self.row));
                base = end;
                rest = after;
            }
        }
        Ok(())
    }
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

#[cfg(pubsub_break = "dedup_in_second_transaction")]
impl Late {
    pub(super) fn write(&self, tables: &mut Tables<'_>) -> Result<(), Trouble> {
        for ((topic, id), publisher) in &self.publishers {
            put(&mut tables.publishers, (topic.0, wide(id.0)), encode(publisher))?;
        }
        for (topic, key, row) in &self.keys {
            put(&mut tables.keys, (topic.0, wide(*key)), row.encode())?;
        }
        Ok(())
    }
}
