//! What the tests of all engines share, and an engine for those of others.

use std::mem;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use tokio::sync::watch;
use xxhash_rust::xxh3::xxh3_64;

use super::memory::Memory;
use super::{
    Append, AppendOutcome, Capabilities, Catalog, Change, Fate, Health, Item, OpenOutcome,
    OpenPublisher, Promise, PublisherRef, ReadError, ReadLimit, Run, Storage, StorageError, Ticket,
    TopicStats, Urgency, ticket,
};
use crate::env::Env;
use crate::limits;
use crate::names::{SubscriptionName, TopicName, TopicPattern};
use crate::record::{
    Epoch, FailurePolicy, IdempotencyKey, NewMessage, StoredMessage, SubscriptionKind,
    SubscriptionRecord, Timestamp, TopicConfig, TopicRecord, Uuid,
};

/// A clock that tests set and random numbers from a seed.
#[derive(Debug)]
pub(super) struct TestEnv {
    wall: AtomicU64,
    random: AtomicU64,
}

impl TestEnv {
    pub(super) fn new(seed: u64) -> Arc<Self> {
        Arc::new(Self { wall: AtomicU64::new(1_000_000), random: AtomicU64::new(seed) })
    }

    pub(super) fn set(&self, wall: u64) {
        self.wall.store(wall, Ordering::Relaxed);
    }

    pub(super) fn advance(&self, millis: u64) {
        self.wall.fetch_add(millis, Ordering::Relaxed);
    }
}

impl Env for TestEnv {
    fn now(&self) -> Timestamp {
        Timestamp(self.wall.load(Ordering::Relaxed))
    }

    fn fill(&self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let number = self.random.fetch_add(1, Ordering::Relaxed);
            let random = xxh3_64(&number.to_le_bytes()).to_le_bytes();
            chunk.copy_from_slice(&random[..chunk.len()]);
        }
    }
}

/// Random numbers that a seed repeats.
#[derive(Clone, Debug)]
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(1);
        xxh3_64(&self.0.to_le_bytes())
    }

    /// A number below a bound.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    pub(super) fn index(&mut self, bound: usize) -> usize {
        usize::try_from(self.below(bound as u64)).unwrap()
    }
}

pub(super) const ALL: ReadLimit = ReadLimit { messages: usize::MAX, bytes: usize::MAX };

pub(super) fn topic(name: &str, epoch: u64) -> TopicRecord {
    topic_with_window(name, epoch, limits::IDEMPOTENCY_WINDOW)
}

pub(super) fn topic_with_window(name: &str, epoch: u64, window: Duration) -> TopicRecord {
    TopicRecord {
        name: TopicName::parse(name).unwrap(),
        epoch: Epoch(epoch),
        purged: 0,
        config: TopicConfig { idempotency_window: window, ..TopicConfig::default() },
        created_at: Timestamp(1),
    }
}

pub(super) fn subscription(name: &str, epoch: u64) -> SubscriptionRecord {
    SubscriptionRecord {
        name: SubscriptionName::parse(name).unwrap(),
        epoch: Epoch(epoch),
        kind: SubscriptionKind::Exclusive,
        snapshot_of: None,
        expires_after: None,
        used_at: Timestamp(0),
        on_failure: FailurePolicy::Block,
        ack_timeout: None,
        filter: None,
        topics: vec![TopicPattern::parse("*").unwrap()],
        created_at: Timestamp(1),
        consumers: Vec::new(),
    }
}

pub(super) fn message(body: impl Into<Vec<u8>>) -> NewMessage {
    NewMessage { body: Bytes::from(body.into()), recipients: Vec::new(), key: None }
}

/// The same key with the same body is the same publish.
pub(super) fn keyed(key: u8, body: impl Into<Vec<u8>>) -> NewMessage {
    let message = message(body);
    let mut content = [0; 32];
    content[..8].copy_from_slice(&xxh3_64(&message.body).to_le_bytes());
    NewMessage { key: Some(IdempotencyKey { key: [key; 16], content }), ..message }
}

pub(super) fn publisher(id: u8, epoch: u32, stream: u64) -> PublisherRef {
    PublisherRef { id: Uuid([id; 16]), epoch, stream }
}

/// Messages outside of a publisher session.
pub(super) fn anonymous(topic: u64, messages: Vec<NewMessage>) -> Append {
    Append {
        topic: Epoch(topic),
        publisher: None,
        first_sequence: 1,
        resolved_below: 0,
        items: messages.into_iter().map(Item::Store).collect(),
        atomic: None,
        room: None,
    }
}

pub(super) fn from(
    publisher: PublisherRef,
    topic: u64,
    first_sequence: u64,
    messages: Vec<NewMessage>,
) -> Append {
    Append { publisher: Some(publisher), first_sequence, ..anonymous(topic, messages) }
}

pub(super) fn bodies(messages: &[StoredMessage]) -> Vec<&[u8]> {
    messages.iter().map(|message| message.body.as_ref()).collect()
}

pub(super) fn sequences(messages: &[StoredMessage]) -> Vec<u64> {
    messages.iter().map(|message| message.sequence).collect()
}

/// Where the messages of an answer are, and whether they were there before.
pub(super) fn places(runs: &[Run]) -> Vec<(u64, u64, bool)> {
    let place = |run: &Run| match &run.fate {
        Fate::Stored { sequence, duplicate, .. } => {
            (0..u64::from(run.count)).map(|i| (run.first_sequence + i, sequence + i, *duplicate))
        }
        .collect::<Vec<_>>(),
        Fate::Refused(_) => Vec::new(),
    };
    runs.iter().flat_map(place).collect()
}

/// Writes that must be committed.
impl dyn Storage {
    pub(super) async fn done(&self, changes: Vec<Change>) {
        self.apply(changes, Urgency::Now).await.unwrap().into_inner();
    }

    pub(super) async fn decided(&self, append: Append) -> AppendOutcome {
        self.append(append).await.unwrap().into_inner()
    }

    pub(super) async fn opened(&self, topic: u64, publisher: PublisherRef) -> OpenOutcome {
        let open = OpenPublisher { topic: Epoch(topic), publisher, resolved_below: 0 };
        self.open_publisher(open).await.unwrap().into_inner()
    }
}

/// An engine whose commits wait for company for ever, if they can wait.
#[derive(Debug)]
pub(crate) struct Lonely {
    memory: Memory,
    waiting: Mutex<Vec<(Vec<Change>, Promise<()>)>>,
}

impl Lonely {
    pub(crate) fn new(memory: Memory) -> Self {
        Self { memory, waiting: Mutex::default() }
    }

    /// Commits what waits, before anything that does not.
    fn commit(&self) {
        for (changes, promise) in mem::take(&mut *self.waiting.lock().unwrap()) {
            let done = self.memory.apply(changes, Urgency::Now).now_or_never();
            done.expect("memory is there at once").expect("memory does not fail here").into_inner();
            promise.keep(());
        }
    }
}

impl Storage for Lonely {
    fn apply(&self, changes: Vec<Change>, urgency: Urgency) -> Ticket<()> {
        match urgency {
            Urgency::Soon => {
                let (promise, ticket) = ticket();
                self.waiting.lock().unwrap().push((changes, promise));
                ticket
            }
            Urgency::Now => {
                self.commit();
                self.memory.apply(changes, urgency)
            }
        }
    }

    fn append(&self, append: Append) -> Ticket<AppendOutcome> {
        self.commit();
        self.memory.append(append)
    }

    fn open_publisher(&self, open: OpenPublisher) -> Ticket<OpenOutcome> {
        self.commit();
        self.memory.open_publisher(open)
    }

    fn boot_id(&self) -> Uuid {
        self.memory.boot_id()
    }

    fn knows_boot(&self, id: Uuid) -> bool {
        self.memory.knows_boot(id)
    }

    fn catalog(&self) -> BoxFuture<'_, Result<Catalog, StorageError>> {
        self.memory.catalog()
    }

    fn head(&self, topic: Epoch) -> Option<watch::Receiver<u64>> {
        self.memory.head(topic)
    }

    fn read(
        &self,
        topic: Epoch,
        from: u64,
        limit: ReadLimit,
    ) -> BoxFuture<'_, Result<Vec<StoredMessage>, ReadError>> {
        self.memory.read(topic, from, limit)
    }

    fn find(&self, topic: Epoch, time: Timestamp) -> BoxFuture<'_, Result<u64, ReadError>> {
        self.memory.find(topic, time)
    }

    fn stats(&self, topic: Epoch) -> Option<TopicStats> {
        self.memory.stats(topic)
    }

    fn health(&self) -> watch::Receiver<Health> {
        self.memory.health()
    }

    fn capabilities(&self) -> Capabilities {
        self.memory.capabilities()
    }

    fn close(&self) -> BoxFuture<'_, Result<(), StorageError>> {
        self.memory.close()
    }
}
