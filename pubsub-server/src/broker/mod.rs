//! The domain: topics, publishers, subscriptions. It knows neither the wire nor the engine.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::env::SharedEnv;
use crate::limits;
use crate::names::{SnapshotName, SubscriptionName, TopicName};
use crate::record::{
    CursorRecord, Epoch, SubscriptionRecord, Timestamp, TopicConfig, TopicRecord, Uuid,
};
use crate::storage::{Catalog, CatalogSubscription, Health, Storage, StorageError, TopicStats};

mod ahead;
mod consumers;
pub mod counting;
mod dead_letters;
mod delivering;
pub mod delivery;
pub mod describing;
pub mod error;
pub mod events;
mod lease;
mod listening;
mod missing;
pub mod publisher;
mod receipts;
mod redriving;
mod retention;
mod saving;
#[cfg(test)]
mod saving_tests;
mod schemas;
pub mod session;
mod sharing;
mod snapshots;
mod stalls;
pub mod subscription;
mod subscriptions;
mod topics;
pub mod waiting;

pub use dead_letters::{LetterPage, Letters};
pub use error::{BrokerError, Code};
pub use listening::Relisten;
pub use receipts::ReceiptAnswer;
pub use schemas::{PayloadFate, SchemaCheck};
pub use snapshots::Snapshot;
pub use subscriptions::{Consume, NewSubscription, Start, Stream};
pub use topics::TopicInfo;

use dead_letters::DeadLetters;
use events::Events;
use schemas::Payloads;
use session::{Command, SessionId};
use subscription::{Keeper, Subscription, TopicStart, Topics};

/// The broker; cheap to clone.
#[derive(Clone, Debug)]
pub struct Broker {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    storage: Arc<dyn Storage>,
    env: SharedEnv,
    state: Mutex<State>,
    /// Held while topics and subscriptions are created and deleted: one at a time, so that
    /// patterns and topics cannot miss each other.
    admin: tokio::sync::Mutex<()>,
    /// Bytes between arrival and commit.
    uncommitted: Arc<Semaphore>,
    tasks: TaskTracker,
    stop: CancellationToken,
    next_id: AtomicU64,
    events: Events,
}

#[derive(Debug, Default)]
struct State {
    topics: BTreeMap<TopicName, Arc<Topic>>,
    subscriptions: BTreeMap<SubscriptionName, Handle>,
    snapshots: BTreeMap<SnapshotName, Arc<Snapshot>>,
    readers: BTreeMap<SessionId, Handle>,
}

/// A topic that exists.
#[derive(Debug)]
struct Topic {
    /// As it was when the server started, or when it was created.
    record: TopicRecord,
    config: Mutex<TopicConfig>,
    /// Messages below were purged by an operator, if they were still there.
    purged: Arc<AtomicU64>,
    head: watch::Receiver<u64>,
    /// Bytes on their way to the disk.
    uncommitted: AtomicU64,
    /// What it takes.
    payloads: Payloads,
    /// Whom its messages are kept for, and the durable floor of each: what lies beyond is.
    floors: Mutex<BTreeMap<Owed, Arc<AtomicU64>>>,
}

/// Whom the messages of a topic are kept for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Owed {
    /// A subscription that listens.
    Subscription(SubscriptionName),
    /// Whoever looks after the dead letters of a subscription.
    DeadLetters(SubscriptionName),
    /// Whoever goes back to a snapshot.
    Snapshot(SnapshotName),
}

/// The way to a subscription's task.
#[derive(Clone, Debug)]
struct Handle {
    record: Arc<SubscriptionRecord>,
    commands: mpsc::Sender<Command>,
    /// Deleted topics that the subscription's consumer does not know of yet.
    departed: Arc<AtomicUsize>,
}

/// Commands that may wait for a subscription's task: it is never away for longer than a read or
/// a commit, and whoever sends more waits.
const COMMAND_QUEUE: usize = 64;

impl Broker {
    /// Goes on where the storage was left.
    ///
    /// # Errors
    ///
    /// If the catalog cannot be read.
    pub async fn start(storage: Arc<dyn Storage>, env: SharedEnv) -> Result<Self, StorageError> {
        let Catalog { topics, schemas, subscriptions } = storage.catalog().await?;
        let uncommitted = Arc::new(Semaphore::new(limits::MAX_UNCOMMITTED_BYTES));
        let events = Events::new(Arc::clone(&env));
        let inner = Inner {
            events,
            storage,
            env,
            state: Mutex::default(),
            admin: tokio::sync::Mutex::default(),
            uncommitted,
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
            next_id: AtomicU64::new(1),
        };
        let broker = Self { inner: Arc::new(inner) };
        // A creation whose outcome was not known may have happened twice. Of two topics the one
        // with messages counts, of two subscriptions the one that was made last.
        let topics = only(topics, |topic| {
            let head = broker.inner.storage.stats(topic.epoch).map_or(0, |stats| stats.head);
            (topic.name.to_string(), (head, topic.created_at))
        });
        let subscriptions = only(subscriptions, |subscription| {
            let record = &subscription.record;
            let what = if record.snapshot_of.is_some() { "snapshot" } else { "subscription" };
            (format!("{what} {}", record.name), (0, record.created_at))
        });
        let topics = topics.into_iter().filter_map(|record| {
            let topic = broker.add_topic(record)?;
            Some((topic.record.epoch, topic))
        });
        let topics: BTreeMap<Epoch, Arc<Topic>> = topics.collect();
        for (epoch, schema) in schemas {
            if let Some(topic) = topics.get(&epoch) {
                topic.payloads.push(schema, None);
            }
        }
        for CatalogSubscription { record, cursors, departed } in subscriptions {
            if let Some(of) = &record.snapshot_of {
                broker.add_snapshot(&record, of, cursors, &topics);
                continue;
            }
            let mut starts: Vec<_> = departed.into_iter().map(TopicStart::departed).collect();
            let mut letters = None;
            for (epoch, cursor) in cursors {
                let Some(topic) = topics.get(&epoch) else { continue };
                if record.on_failure.dead_letter_topic() == Some(&topic.record.name) {
                    letters = Some(DeadLetters::new(Arc::clone(topic), &record.name, cursor));
                } else {
                    starts.push(topic.start(&record.name, cursor));
                }
            }
            broker.run_subscription(record, Topics { starts, letters });
        }
        broker.spawn_retention();
        broker.spawn_overseer();
        Ok(broker)
    }

    /// Saves the positions and ends all tasks. Streams must have ended before.
    pub async fn close(&self) {
        {
            let mut state = self.state();
            state.subscriptions.clear();
            state.readers.clear();
        }
        self.inner.stop.cancel();
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }

    /// This start of the server.
    pub fn boot_id(&self) -> Uuid {
        self.inner.storage.boot_id()
    }

    /// Whether the storage takes writes.
    pub fn health(&self) -> watch::Receiver<Health> {
        self.inner.storage.health()
    }

    /// The name of the storage engine.
    pub fn engine(&self) -> &'static str {
        self.inner.storage.capabilities().name
    }

    /// How many topics and subscriptions there are.
    pub fn counts(&self) -> (usize, usize) {
        let state = self.state();
        (state.topics.len(), state.subscriptions.len())
    }

    /// Refuses a client that has seen another history than this storage has.
    pub(crate) fn check_boot(&self, boot: Option<Uuid>) -> Result<(), BrokerError> {
        match boot {
            Some(boot) if !self.inner.storage.knows_boot(boot) => Err(BrokerError::Diverged),
            Some(_) | None => Ok(()),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.inner.state.lock().expect("no holder of this lock panics")
    }

    /// Runs a change to its end, whoever stops waiting for it: a caller that hangs up between the
    /// commit and what follows it must not leave memory and disk different.
    async fn to_the_end<T: Send + 'static>(
        &self,
        change: impl Future<Output = Result<T, BrokerError>> + Send + 'static,
    ) -> Result<T, BrokerError> {
        let ended = self.inner.tasks.spawn(change).await;
        ended.unwrap_or(Err(BrokerError::Unavailable("the change failed half-way")))
    }

    fn next_id(&self) -> u64 {
        self.inner.next_id.fetch_add(1, Ordering::Relaxed)
    }

    fn topic(&self, name: &TopicName) -> Result<Arc<Topic>, BrokerError> {
        let topic = self.state().topics.get(name).cloned();
        topic.ok_or_else(|| BrokerError::TopicNotFound(name.clone()))
    }

    fn stats(&self, topic: &Topic) -> TopicStats {
        topic.stats(&*self.inner.storage)
    }

    /// Makes a topic known that is in the storage.
    fn add_topic(&self, record: TopicRecord) -> Option<Arc<Topic>> {
        let head = self.inner.storage.head(record.epoch)?;
        let uncommitted = AtomicU64::new(0);
        let (config, floors) = (Mutex::new(record.config.clone()), Mutex::default());
        let purged = Arc::new(AtomicU64::new(record.purged));
        let payloads = Payloads::default();
        let topic = Arc::new(Topic { record, config, purged, head, uncommitted, payloads, floors });
        self.state().topics.insert(topic.record.name.clone(), Arc::clone(&topic));
        Some(topic)
    }

    /// Starts the task of a subscription that is in the storage.
    fn run_subscription(&self, record: SubscriptionRecord, topics: Topics) -> Handle {
        let name = record.name.clone();
        let handle = self.spawn(record, Keeper::Server, topics);
        self.state().subscriptions.insert(name, handle.clone());
        handle
    }

    fn spawn(&self, record: SubscriptionRecord, keeper: Keeper, topics: Topics) -> Handle {
        let (commands, receiver) = mpsc::channel(COMMAND_QUEUE);
        let (storage, env) = (Arc::clone(&self.inner.storage), Arc::clone(&self.inner.env));
        let events = self.inner.events.clone();
        let task = Subscription::new(record.clone(), keeper, (storage, env, events), topics);
        let departed = Arc::clone(&task.departed);
        let handle = Handle { record: Arc::new(record), commands, departed };
        self.inner.tasks.spawn(task.run(receiver));
        handle
    }
}

/// The highest of each name.
fn only<T>(all: Vec<T>, rank: impl Fn(&T) -> (String, (u64, Timestamp))) -> Vec<T> {
    let mut kept: BTreeMap<String, T> = BTreeMap::new();
    for one in all {
        let (name, mine) = rank(&one);
        let other = kept.get(&name).map(|other| rank(other).1);
        if let Some(other) = other {
            tracing::error!(name, "it is stored twice; the lesser one is left alone");
            if other > mine {
                continue;
            }
        }
        kept.insert(name, one);
    }
    kept.into_values().collect()
}

impl Topic {
    /// The start of a subscription in this topic.
    fn start(&self, subscription: &SubscriptionName, cursor: CursorRecord) -> TopicStart {
        let floor = self.keep_for(Owed::Subscription(subscription.clone()), cursor.floor);
        self.start_unregistered(cursor, floor)
    }

    /// The start of a reader, which holds nothing back from retention.
    fn reader_start(&self, cursor: CursorRecord) -> TopicStart {
        self.start_unregistered(cursor, Arc::default())
    }

    fn start_unregistered(&self, cursor: CursorRecord, floor: Arc<AtomicU64>) -> TopicStart {
        let name = self.record.name.clone();
        let (epoch, head, purged) =
            (self.record.epoch, self.head.clone(), Arc::clone(&self.purged));
        TopicStart { name, epoch, cursor, head, floor, purged, gone: false }
    }

    fn config(&self) -> TopicConfig {
        self.config.lock().expect("no holder of this lock panics").clone()
    }

    fn set_config(&self, config: TopicConfig) {
        *self.config.lock().expect("no holder of this lock panics") = config;
    }

    /// Its record as it is now.
    fn present(&self) -> TopicRecord {
        let purged = self.purged.load(Ordering::Acquire);
        TopicRecord { config: self.config(), purged, ..self.record.clone() }
    }

    fn stats(&self, storage: &dyn Storage) -> TopicStats {
        storage.stats(self.record.epoch).unwrap_or_default()
    }

    fn floors(&self) -> MutexGuard<'_, BTreeMap<Owed, Arc<AtomicU64>>> {
        self.floors.lock().expect("no holder of this lock panics")
    }

    /// Keeps what lies beyond a floor, which whoever it is kept for can raise.
    fn keep_for(&self, whom: Owed, floor: u64) -> Arc<AtomicU64> {
        let floor = Arc::new(AtomicU64::new(floor));
        self.floors().insert(whom, Arc::clone(&floor));
        floor
    }

    /// The subscriptions that listen.
    fn subscriptions(&self) -> Vec<SubscriptionName> {
        let floors = self.floors();
        let name = |owed: &Owed| match owed {
            Owed::Subscription(name) => Some(name.clone()),
            Owed::DeadLetters(_) | Owed::Snapshot(_) => None,
        };
        floors.keys().filter_map(name).collect()
    }

    /// The lowest floor, with whose it is.
    fn lowest_floor(&self) -> Option<(Owed, u64)> {
        let floors = self.floors();
        let floors = floors.iter().map(|(whom, floor)| (floor.load(Ordering::Acquire), whom));
        floors.min().map(|(floor, whom)| (whom.clone(), floor))
    }
}

impl Handle {
    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Result<T, BrokerError> {
        let (reply, answer) = oneshot::channel();
        // Either fails if the task has ended: the subscription was deleted or the server stops.
        let gone = || BrokerError::SubscriptionDeleted(self.record.name.clone());
        self.commands.send(command(reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())
    }
}
