//! What the writer knows without reading: the small part of the store, in memory.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use ::redb::{Database, ReadableTable, ReadableTableMetadata};

use super::batch::{Batch, Rows};
use super::blobs::{BLOCK, Blob, BlobRow, Place, Sizes};
use super::disk::{Digest, Disk};
use super::keys::Keys;
use super::log::{Log, Mark};
use super::queue::Request;
use super::rows::{self, Head, weight};
use super::sealed::{Segment, SegmentRow};
use super::stored::Stored;
use super::tables::{Damaged, META_CLOCK, META_LOG, Tables, Trouble, decoded, get, put};
use crate::limits;
use crate::record::{Epoch, TopicRecord, Uuid};
use crate::storage::Change;
use crate::storage::admission::{KeyRow, Publisher};
use crate::storage::clock::{self, Age, Clock, Now};

/// Publishers whose rows are kept in memory; beyond it they are read again.
const CACHED_PUBLISHERS: usize = 10_000;

/// Owned by the writer. While a commit runs it is ahead of the disk; when one fails it is loaded
/// again or never used again.
#[derive(Debug)]
pub(super) struct State {
    /// The ordinal of this run.
    pub(super) boot: u64,
    pub(super) clock: Clock,
    pub(super) topics: HashMap<Epoch, Topic>,
    pub(super) subscriptions: HashSet<Epoch>,
    pub(super) publisher_rows: u64,
    pub(super) keys: Keys,
    publishers: HashMap<(Epoch, Uuid), Publisher>,
    /// What is in the log, and neither in the tables nor being moved there.
    pub(super) pending: Batch,
    /// The publishers of what is being moved.
    moving: BTreeSet<(Epoch, Uuid)>,
    stored: Stored,
    /// The registered sealed files, and how many segments each holds.
    files: BTreeMap<u64, (Digest, usize)>,
    pub(super) sizes: Sizes,
    /// The number of the next blob file. None is used twice in a run: a reader may still have the
    /// file open that had it before.
    pub(super) next_blob: u64,
    /// Blob files that have grown and grow no more.
    pub(super) finished: Vec<u64>,
}

/// One topic.
#[derive(Clone, Debug)]
pub(super) struct Topic {
    /// How long it remembers keys, in milliseconds.
    pub(super) window: u64,
    /// Unknown if its row is damaged.
    pub(super) head: Option<Head>,
    /// Its sealed files, ascending.
    pub(super) segments: Arc<Vec<Segment>>,
    /// Its blob files, ascending.
    pub(super) blobs: Vec<Blob>,
}

impl State {
    /// Reads what was committed.
    pub(super) fn load(
        tables: &mut Tables<'_>,
        disk: &dyn Disk,
        (boot, clock): (u64, Clock),
        sizes: Sizes,
    ) -> Result<(Self, Log), Trouble> {
        let mut state = Self::of_tables(tables, boot, clock, sizes)?;
        let (log, records) = Log::open(disk, stored_mark(tables)?)?;
        for record in records {
            state.replay(record)?;
        }
        state.next_blob = state.blobs().map(|file| file + 1).max().unwrap_or(1);
        Ok((state, log))
    }

    fn of_tables(
        tables: &mut Tables<'_>,
        boot: u64,
        clock: Clock,
        sizes: Sizes,
    ) -> Result<Self, Trouble> {
        let records = Self::topics(tables)?;
        let mut state = Self {
            boot,
            clock,
            topics: HashMap::new(),
            subscriptions: HashSet::new(),
            publisher_rows: tables.publishers.open()?.len()?,
            keys: Self::load_keys(tables, &records)?,
            publishers: HashMap::new(),
            pending: Batch::default(),
            moving: BTreeSet::new(),
            stored: Stored::default(),
            files: BTreeMap::new(),
            sizes,
            next_blob: 1,
            finished: Vec::new(),
        };
        for entry in tables.files.open()?.iter()? {
            let (file, row) = entry?;
            let digest = decoded::<u64, _>("files", &file.value(), row.value(), rows::decode)?;
            state.files.insert(file.value(), (digest, 0));
        }
        for record in records {
            let topic = Topic::load(tables, &record)?;
            for segment in topic.segments.iter() {
                state.use_file(segment.file);
            }
            state.topics.insert(record.epoch, topic);
        }
        for entry in tables.subscriptions.open()?.iter()? {
            state.subscriptions.insert(Epoch(entry?.0.value()));
        }
        Ok(state)
    }

    fn topics(tables: &mut Tables<'_>) -> Result<Vec<TopicRecord>, Trouble> {
        let mut records = Vec::new();
        for entry in tables.topics.open()?.iter()? {
            let (epoch, row) = entry?;
            let epoch = epoch.value();
            records.push(decoded::<u64, _>("topics", &epoch, row.value(), rows::decode)?);
        }
        Ok(records)
    }

    fn load_keys(tables: &mut Tables<'_>, topics: &[TopicRecord]) -> Result<Keys, Trouble> {
        let seed = stored_mark(tables)?.salt;
        let names = topics.iter().map(|record| (record.epoch, &record.name)).collect();
        // No key in the tables is younger, and none is remembered for longer.
        let stored = stored_now(tables, &Batch::default())?;
        let latest = stored.age.after(clock::millis(limits::IDEMPOTENCY_WINDOW));
        Keys::new(seed).load(tables.keys.open()?, &names, latest)
    }

    /// Whether a request can go to the log: it adds messages, publishers and positions, and looks at
    /// nothing else.
    pub(super) fn can_log(&self, request: &Request) -> bool {
        match request {
            Request::Append(..) | Request::Open(..) => true,
            Request::Apply(changes, ..) => changes.iter().all(|change| match change {
                Change::Store { .. } => true,
                Change::PutCursor { topic, .. } => self.topics.contains_key(topic),
                Change::CreateTopic(_)
                | Change::PutTopic(_)
                | Change::DeleteTopic(_)
                | Change::PutSchema(..)
                | Change::PutSubscription(_)
                | Change::DeleteSubscription(_)
                | Change::DeleteCursor { .. }
                | Change::Trim { .. } => false,
            }),
        }
    }

    /// A publisher, from memory or from its row.
    pub(super) fn publisher(
        &mut self,
        database: &Database,
        topic: Epoch,
        id: Uuid,
    ) -> Result<Option<Publisher>, Trouble> {
        if let Some(publisher) = self.publishers.get(&(topic, id)) {
            return Ok(Some(publisher.clone()));
        }
        self.stored.publisher(database, topic, id)
    }

    /// A publisher from memory.
    pub(super) fn cached_publisher(&self, topic: Epoch, id: Uuid) -> Option<&Publisher> {
        self.publishers.get(&(topic, id))
    }

    /// What is remembered of a key. A transaction that runs has it in its tables.
    pub(super) fn key(
        &mut self,
        database: &Database,
        tables: Option<&mut Tables<'_>>,
        (topic, hash): (Epoch, [u8; 16]),
        age: Age,
    ) -> Result<Option<KeyRow>, Trouble> {
        if let Some(row) = self.keys.fresh(topic, &hash) {
            return Ok(Some(row));
        }
        match tables {
            Some(tables) => self.keys.find(tables.keys.open()?, (topic, hash), age),
            None => self.keys.find(self.stored.keys(database)?, (topic, hash), age),
        }
    }

    /// Reads nothing more of the tables as they are.
    pub(super) fn close_stored(&mut self) {
        self.stored.close();
    }

    /// Moves what is in the log to the tables, and says whether there was something. The mark that
    /// it leaves counts with their commit.
    pub(super) fn settle(&mut self, tables: &mut Tables<'_>, mark: Mark) -> Result<bool, Trouble> {
        self.stored.close();
        if self.pending.is_empty() {
            return Ok(false);
        }
        std::mem::take(&mut self.pending).write(tables, self)?;
        put(tables.meta.open()?, META_LOG, rows::encode(&mark))?;
        Ok(true)
    }

    /// Takes what is in the log, to be moved to the tables beside the commits that follow; `None` if
    /// that can't be: there is nothing, or keys, of which the state has to know where they are.
    pub(super) fn lift(&mut self) -> Option<Rows> {
        if self.pending.is_empty() || !self.pending.keys.is_empty() {
            return None;
        }
        self.stored.close();
        let lifted = std::mem::take(&mut self.pending);
        self.moving.clone_from(&lifted.publishers);
        Some(lifted.into_rows(self))
    }

    /// What was taken is in the tables.
    pub(super) fn landed(&mut self) {
        self.moving.clear();
        self.stored.close();
    }

    /// Remembers a publisher that the caller stores in the same commit.
    pub(super) fn remember(&mut self, topic: Epoch, id: Uuid, publisher: Publisher) {
        self.publishers.insert((topic, id), publisher);
    }

    /// Bounds the memory, between commits. Beside what is in the log it is a cache of rows: emptying
    /// it costs reads and nothing else.
    pub(super) fn shed(&mut self) {
        let (pending, moving) = (&self.pending.publishers, &self.moving);
        if self.publishers.len() > CACHED_PUBLISHERS + 2 * (pending.len() + moving.len()) {
            self.publishers.retain(|id, _| pending.contains(id) || moving.contains(id));
        }
    }

    /// Forgets a publisher whose row is removed.
    pub(super) fn forget(&mut self, topic: Epoch, id: Uuid) {
        self.publishers.remove(&(topic, id));
    }

    /// Forgets a topic.
    pub(super) fn drop_topic(&mut self, topic: Epoch) -> Option<Topic> {
        self.publishers.retain(|(of, _), _| *of != topic);
        self.keys.drop_topic(topic);
        self.topics.remove(&topic)
    }

    /// The blob files of all topics.
    pub(super) fn blobs(&self) -> impl Iterator<Item = u64> {
        self.topics.values().flat_map(|topic| &topic.blobs).map(|blob| blob.file)
    }

    /// A blob file of a topic.
    pub(super) fn blob(&self, topic: Epoch, file: u64) -> Option<Blob> {
        self.topics.get(&topic)?.blobs.iter().rev().find(|blob| blob.file == file).copied()
    }

    /// Makes room for what a commit has for a topic in its blob file, if it is to go to one. `can_begin`
    /// is whether a new file can begin to grow.
    pub(super) fn open_blob(&mut self, topic: Epoch, bytes: u64, can_begin: &mut bool) -> bool {
        let (sizes, next) = (self.sizes, self.next_blob);
        let Some(topic) = self.topics.get_mut(&topic) else { return false };
        let grown = topic.blobs.last().filter(|blob| blob.grows).map(|blob| blob.length);
        let is_enough = grown.is_some() || topic.hot_bytes() >= sizes.topic;
        if !sizes.is_large(bytes) || !is_enough {
            return false;
        }
        if grown.is_none_or(|length| length >= sizes.file) && *can_begin {
            // The one before it grows no more.
            if let Some(last) = topic.blobs.last_mut().filter(|blob| blob.grows) {
                last.grows = false;
                self.finished.push(last.file);
            }
            *can_begin = false;
            self.next_blob += 1;
            let fresh = Blob { grows: true, rests: false, ..Blob::found(next, 0, 0) };
            topic.blobs.push(fresh);
        }
        let Some(blob) = topic.blobs.last_mut().filter(|blob| blob.grows) else { return false };
        blob.length = blob.length.next_multiple_of(BLOCK);
        blob.rests = false;
        true
    }

    /// The place of the next row in the blob file of a topic; the row ends with a message.
    pub(super) fn place(&mut self, topic: Epoch, last: u64, length: usize) -> Option<Place> {
        let length = u32::try_from(length).ok()?;
        let blob = self.topics.get_mut(&topic)?.blobs.last_mut()?;
        let place = Place { file: blob.file, offset: blob.length, length };
        (blob.last, blob.length) = (last, blob.length + u64::from(length));
        Some(place)
    }

    /// The registered sealed files.
    pub(super) fn files(&self) -> impl Iterator<Item = (u64, Digest)> {
        self.files.iter().map(|(file, (digest, _))| (*file, *digest))
    }

    /// A number above those of all sealed files.
    pub(super) fn next_file(&self) -> u64 {
        self.files.last_key_value().map_or(1, |(last, _)| last + 1)
    }

    /// Makes a new sealed file known.
    pub(super) fn add_file(&mut self, file: u64, digest: Digest) {
        self.files.insert(file, (digest, 0));
    }

    /// Counts a segment of a sealed file.
    pub(super) fn use_file(&mut self, file: u64) {
        if let Some((_, uses)) = self.files.get_mut(&file) {
            *uses += 1;
        }
    }

    /// Counts a segment no more, and says whether it was the last one of its file.
    pub(super) fn release_file(&mut self, file: u64) -> bool {
        let Some((_, uses)) = self.files.get_mut(&file) else {
            return false;
        };
        *uses = uses.saturating_sub(1);
        let last = *uses == 0;
        if last {
            self.files.remove(&file);
        }
        last
    }

    /// What a topic holds, `None` if there is no such topic.
    pub(super) fn head(&mut self, topic: Epoch) -> Result<Option<&mut Head>, Damaged> {
        let Some(topic) = self.topics.get_mut(&topic) else {
            return Ok(None);
        };
        topic.head.as_mut().map(Some).ok_or_else(|| Damaged::in_table("heads"))
    }
}

impl Topic {
    /// A new one.
    pub(super) fn new(record: &TopicRecord) -> Self {
        let window = clock::millis(record.config.idempotency_window);
        let (head, segments) = (Some(Head::new()), Arc::default());
        Self { window, head, segments, blobs: Vec::new() }
    }

    /// Takes over other settings.
    pub(super) fn set(&mut self, record: &TopicRecord) {
        self.window = clock::millis(record.config.idempotency_window);
    }

    fn load(tables: &mut Tables<'_>, record: &TopicRecord) -> Result<Self, Trouble> {
        let head = match get(tables.heads.open()?, record.epoch.0, rows::decode::<Head>) {
            Ok(head) => head.filter(Head::is_sound),
            Err(Trouble::Damaged(_)) => None,
            Err(error @ Trouble::Redb(_)) => return Err(error),
        };
        if head.is_none() {
            // The other topics go on; this one answers that it is damaged.
            tracing::error!(topic = %record.name, "the head of the topic is damaged");
        }
        let mut segments = Vec::new();
        let epoch = record.epoch.0;
        for entry in tables.segments.open()?.range((epoch, 0)..=(epoch, u64::MAX))? {
            let (key, row) = entry?;
            let (key, row) = (key.value(), row.value());
            let row: SegmentRow = decoded::<(u64, u64), _>("segments", &key, row, rows::decode)?;
            segments.push(row.starting_at(key.1));
        }
        let mut blobs = Vec::new();
        for entry in tables.blobs.open()?.range((epoch, 0)..=(epoch, u64::MAX))? {
            let (key, row) = entry?;
            let (key, row) = (key.value(), row.value());
            let BlobRow { last, length } =
                decoded::<(u64, u64), _>("blobs", &key, row, rows::decode)?;
            blobs.push(Blob::found(key.1, last, length));
        }
        Ok(Self { head, segments: Arc::new(segments), blobs, ..Self::new(record) })
    }

    /// Takes over what is known of a blob file.
    pub(super) fn note_blob(&mut self, blob: Blob) {
        match self.blobs.last_mut().filter(|last| last.file == blob.file) {
            Some(last) => *last = blob,
            None => self.blobs.push(blob),
        }
    }

    /// The first message that is not in a sealed file.
    pub(super) fn hot_from(&self) -> u64 {
        let below = self.head.map_or(1, |head| head.sealed_below);
        self.segments.last().map_or(below, |segment| below.max(segment.last + 1))
    }

    /// Bytes of bodies in the hot file, beside those that are in sealed files too; see [`weight`].
    pub(super) fn hot_bytes(&self) -> u64 {
        let Some(head) = self.head else { return 0 };
        let sealed = |of: fn(&Segment) -> u64| self.segments.iter().map(of).sum();
        let bytes = head.bytes.saturating_sub(sealed(|segment| segment.bytes));
        weight(bytes, head.outside.saturating_sub(sealed(|segment| segment.outside)))
    }
}

/// The mark of the log.
pub(super) fn stored_mark(tables: &mut Tables<'_>) -> Result<Mark, Trouble> {
    Ok(get(tables.meta.open()?, META_LOG, rows::decode::<Mark>)?
        .ok_or_else(|| Damaged::in_table("meta"))?)
}

/// The moment that was stored last.
pub(super) fn stored_now(tables: &mut Tables<'_>, pending: &Batch) -> Result<Now, Trouble> {
    if let Some(now) = pending.now {
        return Ok(now);
    }
    Ok(get(tables.meta.open()?, META_CLOCK, rows::decode::<Now>)?.unwrap_or_default())
}
