//! The task of one subscription: it owns the positions, knows who consumes, and moves messages
//! from the log to the active consumer as far as its credit goes.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use futures_util::stream::{BoxStream, SelectAll};
use futures_util::{FutureExt as _, StreamExt as _};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::unconstrained;
use tokio::time::Instant;
use tokio_stream::wrappers::WatchStream;

use super::delivery::{Delivery, Receipt};
use super::error::BrokerError;
use super::lease::Leases;
use super::saving::{Save, Waiter, saved};
use super::session::{Command, Event, Session, SessionTopic, Told};
use crate::limits;
use crate::names::{ConsumerId, SubscriptionName, TopicName};
use crate::record::{CursorRecord, Epoch, Sequences, SubscriptionRecord};
use crate::storage::{Change, Storage, Urgency};

/// What administrators, and the broker itself, ask of a subscription.
#[derive(Debug)]
pub enum AdminCommand {
    /// A topic that it listens to was created.
    TopicCreated(TopicStart),
    /// A topic was deleted.
    TopicDeleted(Epoch),
    /// Move the position: by topic, the next message to be shown.
    Seek(Vec<(Epoch, u64)>, oneshot::Sender<Result<(), BrokerError>>),
    /// Tell how things stand.
    Describe(oneshot::Sender<Description>),
    /// Tell what is known of a message.
    Receipt(Epoch, u64, oneshot::Sender<Result<Option<Receipt>, BrokerError>>),
    /// Delete the subscription, and end.
    Delete(oneshot::Sender<Result<(), BrokerError>>),
}

/// A topic with the position to start from.
#[derive(Debug)]
pub struct TopicStart {
    pub(super) name: TopicName,
    pub(super) epoch: Epoch,
    pub(super) cursor: CursorRecord,
    pub(super) head: watch::Receiver<u64>,
    /// Where the task publishes its durable floor, for retention.
    pub(super) floor: Arc<AtomicU64>,
    /// Whether the topic was deleted.
    pub(super) gone: bool,
}

/// How things stand with a subscription.
#[derive(Clone, Debug)]
pub struct Description {
    /// Its record.
    pub record: SubscriptionRecord,
    /// Whether its consumer is connected.
    pub connected: bool,
    /// Who stands by.
    pub standby: Vec<ConsumerId>,
    /// Its positions.
    pub positions: Vec<Position>,
}

/// How things stand in one topic.
#[derive(Clone, Debug)]
pub struct Position {
    /// The topic.
    pub topic: TopicName,
    /// Its epoch.
    pub epoch: Epoch,
    /// The floor.
    pub floor: u64,
    /// The head.
    pub head: u64,
    /// Messages not done.
    pub backlog: u64,
    /// Messages with the consumer.
    pub outstanding: u64,
    /// The first one not done.
    pub oldest_unacked: Option<u64>,
    /// What keeps the topic from being delivered.
    pub waits_for: Option<String>,
}

#[derive(Debug)]
pub(super) struct Topic {
    pub(super) name: TopicName,
    pub(super) number: u32,
    pub(super) delivery: Delivery,
    /// The durable floor, for retention.
    pub(super) floor: Arc<AtomicU64>,
    /// What the session knows.
    pub(super) told: Told,
    /// What cannot be read.
    pub(super) damaged: Option<Damage>,
    /// Deleted, and here until the consumer knows what it will miss.
    pub(super) gone: bool,
}

/// A message that cannot be read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Damage {
    pub(super) sequence: u64,
    /// When to try again; `None` if it is no passing failure.
    pub(super) retry: Option<Instant>,
}

/// Whether the server keeps the positions, or the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keeper {
    Server,
    Client,
}

pub(super) struct Subscription {
    pub(super) record: SubscriptionRecord,
    pub(super) keeper: Keeper,
    pub(super) storage: Arc<dyn Storage>,
    pub(super) topics: BTreeMap<Epoch, Topic>,
    /// The numbers of the topics, which sessions use instead of their names.
    pub(super) numbers: BTreeMap<u32, Epoch>,
    heads: SelectAll<BoxStream<'static, (Epoch, u64)>>,
    /// The order in which topics take their turns.
    pub(super) turns: VecDeque<Epoch>,
    pub(super) next_number: u32,
    pub(super) active: Option<Session>,
    pub(super) standby: VecDeque<Session>,
    /// Until when a consumer that is not connected keeps its place.
    pub(super) grace: Option<Instant>,
    pub(super) leases: Leases,
    /// How many of the topics are gone.
    pub(super) departed: Arc<AtomicUsize>,
    pub(super) record_changed: bool,
    pub(super) save: Option<Save>,
    /// Not before then is a commit tried again that has failed.
    pub(super) retry_save: Option<Instant>,
    pub(super) waiters: Vec<Waiter>,
    pub(super) ended: bool,
}

impl Subscription {
    pub(super) fn new(
        record: SubscriptionRecord,
        keeper: Keeper,
        storage: Arc<dyn Storage>,
        topics: Vec<TopicStart>,
    ) -> Self {
        let gone = topics.iter().filter(|topic| topic.gone).count();
        let boot = storage.boot_id().0;
        let first_pull = u64::from(u32::from_le_bytes([boot[0], boot[1], boot[2], boot[3]])) << 32;
        // A reader that nobody attaches to, because its stream was lost meanwhile, ends with it.
        let awaited = record.consumer.is_some() || keeper == Keeper::Client;
        let grace = awaited.then(|| Instant::now() + limits::GRACE);
        let mut this = Self {
            record,
            keeper,
            storage,
            topics: BTreeMap::new(),
            numbers: BTreeMap::new(),
            heads: SelectAll::new(),
            turns: VecDeque::new(),
            next_number: 1,
            active: None,
            standby: VecDeque::new(),
            grace,
            leases: Leases::new(first_pull),
            departed: Arc::new(AtomicUsize::new(gone)),
            record_changed: false,
            save: None,
            retry_save: None,
            waiters: Vec::new(),
            ended: false,
        };
        for start in topics {
            this.join(start);
        }
        this
    }

    pub(super) async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        let mut more = false;
        while !self.ended {
            let deadline = self.next_deadline();
            let sender = self.active.as_ref().map(Session::sender);
            // In order: what frees credit and attaches consumers, what confirms, what there is to
            // deliver. Delivering comes last, or a long backlog would keep acks waiting.
            tokio::select! {
                biased;
                command = commands.recv() => match command {
                    Some(command) => self.on_command(command).await,
                    None => break,
                },
                result = saved(&mut self.save) => self.on_saved(result),
                () = closed(sender.as_ref()) => self.on_lost().await,
                Some((epoch, head)) = self.heads.next() => self.on_head(epoch, head),
                () = tokio::time::sleep_until(deadline) => self.on_time().await,
                () = room(sender.as_ref()), if more => {}
            }
            self.promote_if_free().await;
            self.start_save();
            more = self.deliver().await;
        }
        self.finish().await;
    }

    async fn on_command(&mut self, command: Command) {
        // Who sent it may have seen a later head than this task has.
        while let Some(Some((epoch, head))) = unconstrained(self.heads.next()).now_or_never() {
            self.on_head(epoch, head);
        }
        match command {
            Command::Attach(id, attach, events) => {
                self.on_attach(Session::new(id, *attach, events)).await;
            }
            Command::Acks(id, batch) => self.on_acks(id, batch),
            Command::Ping(id, nonce) => self.on_ping(id, nonce),
            Command::Goodbye(id) => self.on_goodbye(id).await,
            Command::Ack(acked, reply) => {
                for (epoch, sequences) in acked {
                    if let Some(topic) = self.topics.get_mut(&epoch) {
                        topic.delivery.ack(&sequences);
                    }
                }
                self.leases.forget_settled(&self.topics);
                self.waiters.push(reply);
            }
            Command::Pull(pull, reply) => self.on_pull(pull, reply),
            Command::Release(leases, delay, reply) => {
                self.on_release(&leases, delay);
                self.waiters.push(reply);
            }
            Command::Admin(command) => self.on_admin(command).await,
        }
    }

    async fn on_admin(&mut self, command: AdminCommand) {
        match command {
            AdminCommand::TopicCreated(start) => {
                let epoch = self.join(start);
                let joined = self.topics.get(&epoch).map(|topic| topic.describe(epoch));
                if let (Some(session), Some(joined)) = (&mut self.active, joined) {
                    session.tell(Event::Joined(joined));
                }
            }
            AdminCommand::TopicDeleted(epoch) => self.on_topic_deleted(epoch),
            AdminCommand::Seek(targets, reply) => {
                self.seek(targets);
                self.waiters.push(reply);
            }
            AdminCommand::Describe(reply) => {
                let _ = reply.send(self.describe());
            }
            AdminCommand::Receipt(epoch, sequence, reply) => {
                let settled = self.settle_saves().await.map_err(BrokerError::from);
                let topic = self.topics.get(&epoch);
                let receipt = topic.map(|topic| topic.delivery.receipt(sequence));
                let _ = reply.send(settled.map(|()| receipt));
            }
            AdminCommand::Delete(reply) => {
                let _ = reply.send(self.delete().await);
            }
        }
    }

    /// Deletes the subscription. If that fails everything is as it was.
    async fn delete(&mut self) -> Result<(), BrokerError> {
        // The task saves nothing meanwhile, and nothing after: it would come back from the dead.
        if self.save.is_some() {
            let result = saved(&mut self.save).await;
            self.on_saved(result);
        }
        let change = Change::DeleteSubscription(self.record.epoch);
        self.storage.apply(vec![change], Urgency::Now).await?.into_inner();
        self.keeper = Keeper::Client;
        self.ended = true;
        let error = BrokerError::SubscriptionDeleted(self.record.name.clone());
        for session in self.active.iter_mut().chain(&mut self.standby) {
            session.tell(Event::Ended(error.clone()));
        }
        Ok(())
    }

    fn join(&mut self, start: TopicStart) -> Epoch {
        let TopicStart { name, epoch, cursor, head, floor, gone } = start;
        floor.store(cursor.floor, Ordering::Release);
        let delivery = Delivery::new(cursor, *head.borrow());
        let (number, told) = (self.next_number, Told::default());
        self.next_number += 1;
        self.numbers.insert(number, epoch);
        let topic = Topic { name, number, delivery, floor, told, damaged: None, gone };
        self.topics.insert(epoch, topic);
        self.turns.push_back(epoch);
        self.heads.push(WatchStream::new(head).map(move |head| (epoch, head)).boxed());
        epoch
    }

    fn on_head(&mut self, epoch: Epoch, head: u64) {
        if let Some(topic) = self.topics.get_mut(&epoch) {
            topic.delivery.on_head(head);
        }
    }

    fn seek(&mut self, targets: Vec<(Epoch, u64)>) {
        for (epoch, to) in targets {
            let Some(topic) = self.topics.get_mut(&epoch) else {
                continue;
            };
            topic.delivery.seek(to);
            topic.damaged = None;
            if let Some(session) = &mut self.active {
                session.tell(Event::Repositioned(topic.describe(epoch)));
            }
        }
        self.leases.forget_settled(&self.topics);
    }

    pub(super) fn name(&self) -> &SubscriptionName {
        &self.record.name
    }

    fn describe(&self) -> Description {
        let now = Instant::now();
        Description {
            record: self.record.clone(),
            connected: self.active.is_some(),
            standby: (self.standby.iter())
                .filter(|session| !session.sender().is_closed())
                .map(|session| session.consumer.id.clone())
                .collect(),
            positions: (self.topics.iter())
                .map(|(epoch, topic)| topic.position(*epoch, now))
                .collect(),
        }
    }
}

impl Topic {
    /// What there is to tell a session.
    pub(super) fn tell(&self) -> Told {
        let (head, passed) = (self.delivery.head(), self.delivery.passed());
        Told { topic: self.number, head, passed, floor: self.delivery.cursor().floor }
    }

    pub(super) fn describe(&self, epoch: Epoch) -> SessionTopic {
        let cursor = self.delivery.cursor();
        SessionTopic {
            number: self.number,
            name: self.name.clone(),
            epoch,
            floor: cursor.floor,
            head: self.delivery.head(),
            cursor_generation: cursor.generation,
            dropped: Sequences::new(),
        }
    }

    fn position(&self, epoch: Epoch, now: Instant) -> Position {
        let waits_for = match (self.damaged, self.delivery.ready_at(now)) {
            _ if self.gone => Some("the topic was deleted, which no consumer knows yet".to_owned()),
            (Some(damage), _) => Some(format!("message {} cannot be read", damage.sequence)),
            (None, Some(at)) => {
                let seconds = (at - now).as_secs_f32();
                Some(format!("a failed message is shown again in {seconds:.1} s"))
            }
            (None, None) => None,
        };
        Position {
            topic: self.name.clone(),
            epoch,
            floor: self.delivery.cursor().floor,
            head: self.delivery.head(),
            backlog: self.delivery.backlog(),
            outstanding: self.delivery.held() as u64,
            oldest_unacked: self.delivery.oldest_unsettled(),
            waits_for,
        }
    }
}

/// Resolves when the stream has dropped its end.
async fn closed(sender: Option<&mpsc::Sender<Event>>) {
    match sender {
        Some(sender) => sender.closed().await,
        None => std::future::pending().await,
    }
}

/// Resolves when the stream has room for a frame.
async fn room(sender: Option<&mpsc::Sender<Event>>) {
    match sender {
        Some(sender) => {
            // An error means that the stream is gone, which the loop notices by itself.
            let _ = sender.reserve().await;
        }
        None => std::future::pending().await,
    }
}
