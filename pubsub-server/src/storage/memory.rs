//! The engine that keeps everything in memory: the reference for what the others do, and the one
//! for tests. Its store outlives it, as a disk does.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, ready};
use tokio::sync::watch;
use tokio::time::Instant;

use super::admission::{Admission, Context, KeyRow, Publisher, admit};
use super::clock::{Age, Clock, Now, millis};
use super::{
    Append, AppendOutcome, AppendRefusal, Capabilities, Catalog, CatalogSubscription, Change,
    CommitError, Health, OpenOutcome, OpenPublisher, Promise, ReadError, ReadLimit, Storage,
    StorageError, Ticket, TopicStats, Urgency, ticket,
};
use crate::env::SharedEnv;
use crate::limits;
use crate::record::{
    CursorRecord, Departed, Epoch, NewMessage, StoredMessage, SubscriptionRecord, Timestamp,
    TopicRecord, Uuid,
};
use crate::schema::SchemaRecord;

/// The engine.
#[derive(Debug)]
pub struct Memory {
    env: SharedEnv,
    boot: Uuid,
    ordinal: u64,
    store: Arc<Mutex<Store>>,
    session: Mutex<Session>,
    health: watch::Sender<Health>,
}

/// At which write an engine fails.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// How many writes succeed before.
    pub after: u64,
    /// Whether the failing write takes effect nevertheless: its caller is told that nobody knows.
    pub applied: bool,
}

/// What a restart ends.
#[derive(Debug)]
struct Session {
    clock: Clock,
    fault: Option<Fault>,
    closed: bool,
}

/// What a restart does not end.
#[derive(Debug, Default)]
struct Store {
    boots: Vec<Uuid>,
    now: Now,
    topics: BTreeMap<Epoch, Topic>,
    subscriptions: BTreeMap<Epoch, SubscriptionRecord>,
    /// By topic and subscription.
    cursors: BTreeMap<(Epoch, Epoch), CursorRecord>,
    departed: BTreeMap<(Epoch, Epoch), Departed>,
}

#[derive(Debug)]
struct Topic {
    record: TopicRecord,
    schemas: BTreeMap<u32, Arc<SchemaRecord>>,
    head: watch::Sender<u64>,
    /// The sequence of the first of `messages`.
    first: u64,
    messages: Vec<StoredMessage>,
    last_at: Timestamp,
    publishers: HashMap<Uuid, Publisher>,
    keys: HashMap<[u8; 16], KeyRow>,
}

impl Memory {
    /// An empty store.
    pub fn new(env: SharedEnv) -> Self {
        Self::start(Arc::default(), env, None)
    }

    /// An empty store on which a write fails.
    pub fn failing(env: SharedEnv, fault: Fault) -> Self {
        Self::start(Arc::default(), env, Some(fault))
    }

    /// The same store after a restart, without faults. The old engine must not be used any more.
    #[must_use]
    pub fn reopen(&self) -> Self {
        Self::start(Arc::clone(&self.store), Arc::clone(&self.env), None)
    }

    fn start(shared: Arc<Mutex<Store>>, env: SharedEnv, fault: Option<Fault>) -> Self {
        let boot = env.uuid();
        let mut store = shared.lock().unwrap_or_else(PoisonError::into_inner);
        store.boots.push(boot);
        let ordinal = store.boots.len() as u64;
        let clock = Clock::resume(store.now, env.now(), Instant::now());
        drop(store);
        let session = Mutex::new(Session { clock, fault, closed: false });
        let health = watch::Sender::new(Health::Ok);
        Self { env, boot, ordinal, store: shared, session, health }
    }

    fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs one write, or fails it.
    fn write<T>(
        &self,
        promise: Promise<T>,
        work: impl FnOnce(&mut Store, Now) -> Result<T, CommitError>,
    ) {
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        if session.closed {
            return promise.fail(CommitError::Refused);
        }
        let fails = match &mut session.fault {
            Some(fault) if fault.after == 0 => Some(fault.applied),
            Some(fault) => {
                fault.after -= 1;
                None
            }
            None => None,
        };
        if fails == Some(false) {
            return self.fail(session, promise);
        }
        let now = session.clock.now(self.env.now(), Instant::now());
        let mut store = self.store();
        store.now = now;
        let outcome = work(&mut store, now);
        drop(store);
        if fails == Some(true) {
            return self.fail(session, promise);
        }
        match outcome {
            Ok(outcome) => promise.keep(outcome),
            Err(error) => promise.fail(error),
        }
    }

    fn fail<T>(&self, mut session: MutexGuard<'_, Session>, promise: Promise<T>) {
        session.closed = true;
        drop(session);
        self.health.send_replace(Health::Failed("the fault that was asked for".to_owned()));
        promise.fail(CommitError::Unknown);
    }
}

impl Store {
    fn append(&mut self, append: Append, now: Now, boot: u64) -> AppendOutcome {
        let keys: usize = self.topics.values().map(|topic| topic.keys.len()).sum();
        let key_room = limits::MAX_IDEMPOTENCY_KEYS.saturating_sub(keys as u64);
        let topic = self.topics.get_mut(&append.topic).ok_or(AppendRefusal::NoTopic)?;
        topic.keys.retain(|_, row| row.expires > now.age);
        let context = Context {
            now,
            head: topic.head(),
            last_at: topic.last_at,
            window: millis(topic.record.config.idempotency_window),
            key_room,
            boot,
        };
        let publisher = append.publisher.map(|publisher| publisher.id);
        let known = publisher.and_then(|id| topic.publishers.get(&id).cloned());
        let decided = admit(append, known, &context, |key| {
            Ok::<_, std::convert::Infallible>(topic.keys.get(key).copied())
        });
        let Ok(Admission { outcome, messages, keys, publisher: row }) = decided;
        topic.keys.extend(keys);
        topic.publishers.extend(publisher.zip(row));
        topic.store(messages, context.at());
        outcome
    }

    fn open(&mut self, open: &OpenPublisher, now: Now, boot: u64) -> OpenOutcome {
        let publishers: usize = self.topics.values().map(|topic| topic.publishers.len()).sum();
        let topic = self.topics.get_mut(&open.topic).ok_or(AppendRefusal::NoTopic)?;
        topic.forget_publishers(now.age);
        let known = topic.publishers.get(&open.publisher.id).cloned();
        if known.is_none() && publishers as u64 >= limits::MAX_PUBLISHERS {
            return Err(AppendRefusal::TooManyPublishers);
        }
        let publisher = Publisher::open(known, open, boot, now)?;
        let decided = publisher.decided();
        topic.publishers.insert(open.publisher.id, publisher);
        Ok(decided)
    }

    fn apply(&mut self, changes: Vec<Change>, now: Now) -> Result<(), CommitError> {
        let known = |change: &Change| match change {
            Change::Store { topic, .. } => self.topics.contains_key(topic),
            Change::CreateTopic(_)
            | Change::PutTopic(_)
            | Change::PutSchema(..)
            | Change::DeleteTopic(_)
            | Change::PutSubscription(_)
            | Change::DeleteSubscription(_)
            | Change::PutCursor { .. }
            | Change::DeleteCursor { .. }
            | Change::Trim { .. } => true,
        };
        if !changes.iter().all(known) {
            return Err(CommitError::NoTopic);
        }
        changes.into_iter().for_each(|change| self.apply_one(change, now));
        Ok(())
    }

    fn apply_one(&mut self, change: Change, now: Now) {
        match change {
            Change::CreateTopic(record) => {
                self.topics.insert(record.epoch, Topic::new(record));
            }
            Change::PutTopic(record) => {
                if let Some(topic) = self.topics.get_mut(&record.epoch) {
                    topic.record = record;
                }
            }
            Change::DeleteTopic(topic) => self.delete_topic(topic),
            Change::PutSchema(topic, schema) => {
                if let Some(topic) = self.topics.get_mut(&topic) {
                    topic.schemas.insert(schema.revision, schema);
                }
            }
            Change::PutSubscription(record) => {
                self.subscriptions.insert(record.epoch, record);
            }
            Change::DeleteSubscription(subscription) => {
                self.subscriptions.remove(&subscription);
                self.cursors.retain(|(_, of), _| *of != subscription);
                self.departed.retain(|(_, of), _| *of != subscription);
            }
            Change::PutCursor { subscription, topic, cursor } => {
                let both = self.topics.contains_key(&topic)
                    && self.subscriptions.contains_key(&subscription);
                let key = (topic, subscription);
                if both {
                    self.cursors.insert(key, cursor);
                } else if let Some(departed) = self.departed.get_mut(&key) {
                    departed.cursor = cursor;
                    if departed.cursor.floor >= departed.head {
                        self.departed.remove(&key);
                    }
                }
            }
            Change::DeleteCursor { subscription, topic } => {
                self.cursors.remove(&(topic, subscription));
            }
            Change::Store { topic, message } => {
                if let Some(topic) = self.topics.get_mut(&topic) {
                    topic.store(vec![message], now.wall.max(topic.last_at));
                }
            }
            Change::Trim { topic, below } => {
                if let Some(topic) = self.topics.get_mut(&topic) {
                    topic.trim(below);
                }
            }
        }
    }
}

impl Store {
    fn delete_topic(&mut self, epoch: Epoch) {
        let Some(topic) = self.topics.remove(&epoch) else { return };
        let (name, head) = (&topic.record.name, topic.head());
        let cursors = std::mem::take(&mut self.cursors).into_iter();
        let (gone, kept): (BTreeMap<_, _>, _) = cursors.partition(|((of, _), _)| *of == epoch);
        self.cursors = kept;
        for (key, cursor) in gone.into_iter().filter(|(_, cursor)| cursor.floor < head) {
            self.departed.insert(key, Departed { name: name.clone(), epoch, head, cursor });
        }
    }
}

impl Topic {
    fn new(record: TopicRecord) -> Self {
        Self {
            record,
            schemas: BTreeMap::new(),
            head: watch::Sender::new(0),
            first: 1,
            messages: Vec::new(),
            last_at: Timestamp::default(),
            publishers: HashMap::new(),
            keys: HashMap::new(),
        }
    }

    fn head(&self) -> u64 {
        *self.head.borrow()
    }

    fn index(&self, sequence: u64) -> usize {
        usize::try_from(sequence - self.first).expect("messages are counted in memory")
    }

    fn store(&mut self, messages: Vec<NewMessage>, at: Timestamp) {
        for (message, sequence) in messages.into_iter().zip(self.head() + 1..) {
            self.last_at = at;
            self.messages.push(StoredMessage {
                sequence,
                published_at: at,
                recipients: message.recipients,
                body: message.body.into(),
            });
        }
        let head = self.first + self.messages.len() as u64 - 1;
        self.head.send_if_modified(|known| std::mem::replace(known, head) != head);
    }

    fn trim(&mut self, below: u64) {
        let below = below.clamp(self.first, self.head() + 1);
        self.messages.drain(..self.index(below));
        self.first = below;
    }

    fn forget_publishers(&mut self, age: Age) {
        let horizon = millis(limits::SESSION_HORIZON);
        self.publishers.retain(|_, publisher| publisher.used.after(horizon) > age);
    }

    fn read(&self, from: u64, limit: ReadLimit) -> Result<Vec<StoredMessage>, ReadError> {
        if from < self.first {
            return Err(ReadError::Trimmed { first: self.first });
        }
        if from > self.head() {
            return Ok(Vec::new());
        }
        let mut bytes = 0;
        let mut messages = Vec::new();
        for message in &self.messages[self.index(from)..] {
            bytes += message.body.len();
            let full = messages.len() >= limit.messages || bytes > limit.bytes;
            if full && !messages.is_empty() {
                break;
            }
            messages.push(message.clone());
        }
        Ok(messages)
    }
}

impl Storage for Memory {
    fn boot_id(&self) -> Uuid {
        self.boot
    }

    fn knows_boot(&self, id: Uuid) -> bool {
        self.store().boots.contains(&id)
    }

    fn catalog(&self) -> BoxFuture<'_, Result<Catalog, StorageError>> {
        let store = self.store();
        let topics = store.topics.values().map(|topic| topic.record.clone()).collect();
        let schemas = store.topics.iter().flat_map(|(epoch, topic)| {
            topic.schemas.values().map(|schema| (*epoch, Arc::clone(schema)))
        });
        let schemas = schemas.collect();
        let subscriptions = store.subscriptions.values().map(|record| {
            let own = |key: &(Epoch, Epoch)| key.1 == record.epoch;
            let cursors = store.cursors.iter().filter(|(key, _)| own(key));
            let departed = store.departed.iter().filter(|(key, _)| own(key));
            CatalogSubscription {
                record: record.clone(),
                cursors: cursors.map(|(key, cursor)| (key.0, cursor.clone())).collect(),
                departed: departed.map(|(_, departed)| departed.clone()).collect(),
            }
        });
        let subscriptions = subscriptions.collect();
        ready(Ok(Catalog { topics, schemas, subscriptions })).boxed()
    }

    fn append(&self, mut append: Append) -> Ticket<AppendOutcome> {
        let (promise, ticket) = ticket();
        let promise = promise.holding(append.room.take());
        self.write(promise, |store, now| Ok(store.append(append, now, self.ordinal)));
        ticket
    }

    fn open_publisher(&self, open: OpenPublisher) -> Ticket<OpenOutcome> {
        let (promise, ticket) = ticket();
        self.write(promise, |store, now| Ok(store.open(&open, now, self.ordinal)));
        ticket
    }

    fn apply(&self, changes: Vec<Change>, _: Urgency) -> Ticket<()> {
        let (promise, ticket) = ticket();
        self.write(promise, |store, now| store.apply(changes, now));
        ticket
    }

    fn head(&self, topic: Epoch) -> Option<watch::Receiver<u64>> {
        self.store().topics.get(&topic).map(|topic| topic.head.subscribe())
    }

    fn read(
        &self,
        topic: Epoch,
        from: u64,
        limit: ReadLimit,
    ) -> BoxFuture<'_, Result<Vec<StoredMessage>, ReadError>> {
        let store = self.store();
        let topic = store.topics.get(&topic).ok_or(ReadError::NoTopic);
        ready(topic.and_then(|topic| topic.read(from, limit))).boxed()
    }

    fn find(&self, topic: Epoch, time: Timestamp) -> BoxFuture<'_, Result<u64, ReadError>> {
        let store = self.store();
        let topic = store.topics.get(&topic).ok_or(ReadError::NoTopic);
        let found = topic.map(|topic| {
            let earlier = topic.messages.partition_point(|message| message.published_at < time);
            topic.first + earlier as u64
        });
        ready(found).boxed()
    }

    fn stats(&self, topic: Epoch) -> Option<TopicStats> {
        let store = self.store();
        let topic = store.topics.get(&topic)?;
        let bytes = topic.messages.iter().map(|message| message.body.len() as u64).sum();
        let first = topic.first;
        Some(TopicStats { first, head: topic.head(), bytes, stored_from: first })
    }

    fn health(&self) -> watch::Receiver<Health> {
        self.health.subscribe()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { name: "memory", durable: false }
    }

    fn close(&self) -> BoxFuture<'_, Result<(), StorageError>> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner).closed = true;
        ready(Ok(())).boxed()
    }
}
