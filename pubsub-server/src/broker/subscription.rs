//! The task of one subscription: it owns the positions, knows who consumes, and moves messages
//! from the log to who is active, as far as their credit goes.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use futures_util::future::{BoxFuture, select_all};
use futures_util::stream::{BoxStream, FuturesUnordered, SelectAll};
use futures_util::{FutureExt as _, StreamExt as _};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::unconstrained;
use tokio::time::Instant;
use tokio_stream::wrappers::WatchStream;

use super::ahead::Ahead;
use super::consumers::Seat;
use super::dead_letters::DeadLetters;
use super::delivering::Next;
use super::delivery::{Cursor, Delivery, Holder, Moment, Receipt};
use super::describing::Description;
use super::error::BrokerError;
use super::events::Events;
use super::lease::Leases;
use super::redriving::LetterCommand;
use super::saving::{Save, Waiter, saved};
use super::session::{Command, Event, GapReason, Session, SessionId, SessionTopic, Told};
use super::stalls::Noted;
use crate::env::SharedEnv;
use crate::failpoint;
use crate::limits;
use crate::names::{TopicName, TopicPattern};
use crate::record::{CursorRecord, Epoch, Sequences, SubscriptionKind, SubscriptionRecord};
use crate::storage::{Change, CommitError, Storage, Urgency};

/// What administrators, and the broker itself, ask of a subscription.
#[derive(Debug)]
pub enum AdminCommand {
    /// A topic that it listens to was created.
    TopicCreated(TopicStart),
    /// A topic was deleted.
    TopicDeleted(Epoch),
    /// Listen to other topics.
    Listen(Listening, oneshot::Sender<Result<(), BrokerError>>),
    /// Move the position.
    Seek(Vec<(Epoch, Target)>, oneshot::Sender<Result<(), BrokerError>>),
    /// Tell the position, as far as it is durable.
    Snapshot(oneshot::Sender<Result<Vec<(Epoch, Target)>, BrokerError>>),
    /// Delete the subscription, and end, if nobody has used it for as long as it says.
    Expire(oneshot::Sender<bool>),
    /// Tell whoever watches if it does not go on.
    LookForStalls,
    /// Tell how things stand.
    Describe(oneshot::Sender<Description>),
    /// Tell what is known of a message.
    Receipt(Epoch, u64, oneshot::Sender<Result<Option<Receipt>, BrokerError>>),
    /// What is about dead letters.
    Letters(LetterCommand),
    /// Delete the subscription, and end.
    Delete(oneshot::Sender<Result<(), BrokerError>>),
}

/// What a subscription is to listen to from now on.
#[derive(Debug)]
pub struct Listening {
    /// Names and patterns.
    pub(super) patterns: Vec<TopicPattern>,
    /// Topics that join, with where they start.
    pub(super) joining: Vec<(Arc<super::Topic>, CursorRecord)>,
    /// Topics that leave.
    pub(super) leaving: Vec<Epoch>,
}

/// A position in a topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// All messages up to here are done.
    pub floor: u64,
    /// Beyond the floor: what is done, too.
    pub done: Sequences,
}

/// The topics that a subscription starts with.
#[derive(Debug, Default)]
pub struct Topics {
    /// Those that it listens to.
    pub(super) starts: Vec<TopicStart>,
    /// That of its dead letters, if it has one.
    pub(super) letters: Option<DeadLetters>,
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
    /// Messages below were purged.
    pub(super) purged: Arc<AtomicU64>,
    /// Whether the topic was deleted.
    pub(super) gone: bool,
}

#[derive(Debug)]
pub(super) struct Topic {
    pub(super) name: TopicName,
    pub(super) number: u32,
    pub(super) delivery: Delivery,
    /// The durable floor, for retention.
    pub(super) floor: Arc<AtomicU64>,
    /// Messages below were purged.
    pub(super) purged: Arc<AtomicU64>,
    /// What cannot be read.
    pub(super) damaged: Option<Damage>,
    /// Why messages were lost, if any were.
    pub(super) lost: Option<GapReason>,
    /// Deleted, and here until the consumer knows what it will miss.
    pub(super) gone: bool,
    /// Messages to read at least, however little credit there is: more and more while all that
    /// comes is for others, or the last of a credit would look for its message one by one.
    pub(super) reach: u64,
    /// What a filter leaves out of what delivery has not come to.
    pub(super) ahead: Ahead,
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
    env: SharedEnv,
    pub(super) events: Events,
    pub(super) noted: Noted,
    started: Instant,
    /// When it was seen in use last, in this run.
    last_used: Option<Instant>,
    pub(super) letters: Option<DeadLetters>,
    pub(super) topics: BTreeMap<Epoch, Topic>,
    /// The numbers of the topics, which sessions use instead of their names.
    pub(super) numbers: BTreeMap<u32, Epoch>,
    heads: SelectAll<BoxStream<'static, (Epoch, u64)>>,
    /// Resolve with the sessions whose streams are gone.
    pub(super) losses: FuturesUnordered<BoxFuture<'static, SessionId>>,
    /// The order in which topics take their turns.
    pub(super) turns: VecDeque<Epoch>,
    pub(super) next_number: u32,
    /// Who is active, or awaited. One at most if it is exclusive.
    pub(super) seats: BTreeMap<Holder, Seat>,
    pub(super) next_seat: u64,
    pub(super) standby: VecDeque<Session>,
    /// Whose messages since before the start are nobody else's, until they are back.
    pub(super) awaited: BTreeSet<Holder>,
    /// Until when a reader is waited for that nobody has attached to.
    pub(super) unattended: Option<Instant>,
    pub(super) leases: Leases,
    /// How many of the topics are gone.
    pub(super) departed: Arc<AtomicUsize>,
    /// Not before then is looked at what delivery has not come to.
    pub(super) look_ahead_from: Instant,
    /// The topic of which was looked at something last.
    pub(super) looked_ahead: Epoch,
    pub(super) record_changed: bool,
    pub(super) save: Option<Save>,
    /// Not before then is a commit tried again that has failed.
    pub(super) retry_save: Option<Instant>,
    pub(super) waiters: Vec<Waiter>,
    /// Someone waits for what is to be saved next.
    pub(super) hurried: bool,
    pub(super) ended: bool,
}

impl Subscription {
    pub(super) fn new(
        record: SubscriptionRecord,
        keeper: Keeper,
        (storage, env, events): (Arc<dyn Storage>, SharedEnv, Events),
        topics: Topics,
    ) -> Self {
        let Topics { starts, letters } = topics;
        let gone = starts.iter().filter(|topic| topic.gone).count();
        let boot = storage.boot_id().0;
        let first_pull = u64::from(u32::from_le_bytes([boot[0], boot[1], boot[2], boot[3]])) << 32;
        // A reader that nobody attaches to, because its stream was lost meanwhile, ends with it.
        let unattended = (keeper == Keeper::Client).then(|| Instant::now() + limits::GRACE);
        let competing = record.kind != SubscriptionKind::Exclusive;
        let numbered = (1..).map(Holder::Seat).zip(&record.consumers);
        let seats: BTreeMap<_, _> =
            numbered.map(|(holder, consumer)| (holder, Seat::awaited(consumer.clone()))).collect();
        let mut this = Self {
            record,
            keeper,
            storage,
            env,
            events,
            noted: Noted::default(),
            started: Instant::now(),
            last_used: None,
            letters,
            topics: BTreeMap::new(),
            numbers: BTreeMap::new(),
            heads: SelectAll::new(),
            losses: FuturesUnordered::new(),
            turns: VecDeque::new(),
            next_number: 1,
            next_seat: seats.len() as u64,
            awaited: seats.keys().copied().filter(|_| competing).collect(),
            seats,
            standby: VecDeque::new(),
            unattended,
            leases: Leases::new(first_pull),
            departed: Arc::new(AtomicUsize::new(gone)),
            look_ahead_from: Instant::now(),
            looked_ahead: Epoch(0),
            record_changed: false,
            save: None,
            retry_save: None,
            waiters: Vec::new(),
            hurried: false,
            ended: false,
        };
        for start in starts {
            this.join(start);
        }
        if let Some(letters) = &this.letters {
            let (epoch, head) = (letters.epoch(), letters.head());
            this.heads.push(WatchStream::new(head).map(move |head| (epoch, head)).boxed());
        }
        this
    }

    pub(super) async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        let mut next = Next::Idle;
        while !self.ended {
            let deadline = self.next_deadline();
            let without_room = if next == Next::Room { self.without_room() } else { Vec::new() };
            // In order: what frees credit and attaches consumers, what confirms, what there is to
            // deliver. Delivering comes last, or a long backlog would keep acks waiting.
            tokio::select! {
                biased;
                command = commands.recv() => match command {
                    Some(command) => self.on_command(command).await,
                    None => break,
                },
                result = saved(&mut self.save) => self.on_saved(result),
                Some(id) = self.losses.next() => self.on_lost(id),
                Some((epoch, head)) = self.heads.next() => self.on_head(epoch, head),
                () = tokio::time::sleep_until(deadline) => self.on_time().await,
                () = room(without_room), if next == Next::Room => {}
                () = std::future::ready(()), if next == Next::Again => {}
            }
            if self.ended {
                break;
            }
            self.promote_if_free().await;
            let more = self.bury().await;
            self.start_save();
            next = self.deliver().await;
            if more || next != Next::Again && self.look_ahead().await {
                next = Next::Again;
            }
        }
        self.finish().await;
    }

    async fn on_command(&mut self, command: Command) {
        // Who sent it may have seen a later head than this task has.
        while let Some(Some((epoch, head))) = unconstrained(self.heads.next()).now_or_never() {
            self.on_head(epoch, head);
        }
        match command {
            Command::Attach(id, attach, outlet) => {
                let session = Session::new(id, *attach, outlet.events.clone());
                self.on_attach(session, outlet.gone).await;
            }
            Command::Acks(id, batch) => self.on_acks(id, *batch),
            Command::Ping(id, nonce) => self.on_ping(id, nonce),
            Command::Goodbye(id) => self.on_goodbye(id).await,
            Command::Ack(acked, reply) => {
                self.last_used = Some(Instant::now());
                for (epoch, sequences) in acked {
                    if let Some(topic) = self.topics.get_mut(&epoch) {
                        topic.delivery.ack(&sequences);
                    }
                }
                self.leases.forget_settled(&self.topics);
                self.wait(reply);
            }
            Command::Pull(pull, reply) => {
                self.last_used = Some(Instant::now());
                self.on_pull(pull, reply);
            }
            Command::Release(leases, nack, reply) => {
                self.last_used = Some(Instant::now());
                self.on_release(&leases, &nack);
                self.wait(reply);
            }
            Command::Admin(command) => self.on_admin(command).await,
        }
    }

    async fn on_admin(&mut self, command: AdminCommand) {
        match command {
            AdminCommand::TopicCreated(start) => self.join_and_tell(start),
            AdminCommand::Listen(listening, reply) => {
                let _ = reply.send(self.listen(listening).await);
            }
            AdminCommand::TopicDeleted(epoch) => self.on_topic_deleted(epoch),
            AdminCommand::Seek(targets, reply) => {
                failpoint::pass("seeking");
                #[cfg(pubsub_break = "seek_topic_by_topic")]
                for target in &targets {
                    self.seek(vec![target.clone()]);
                    let _ = self.settle_saves().await;
                }
                self.seek(targets);
                self.wait(reply);
            }
            AdminCommand::Snapshot(reply) => {
                let settled = self.settle_saves().await.map_err(BrokerError::from);
                let _ = reply.send(settled.map(|()| self.targets()));
            }
            AdminCommand::Expire(reply) => {
                let expired = self.is_expired() && self.delete().await.is_ok();
                let _ = reply.send(expired);
            }
            AdminCommand::LookForStalls => self.look_for_stalls(),
            AdminCommand::Describe(reply) => {
                let _ = reply.send(self.describe());
            }
            AdminCommand::Receipt(epoch, sequence, reply) => {
                let settled = self.settle_saves().await.map_err(BrokerError::from);
                let topic = self.topics.get(&epoch);
                let receipt = topic.map(|topic| topic.delivery.cursor().receipt(sequence));
                let _ = reply.send(settled.map(|()| receipt));
            }
            AdminCommand::Letters(command) => self.on_letters(command).await,
            AdminCommand::Delete(reply) => {
                let _ = reply.send(self.delete().await);
            }
        }
    }

    /// Ends with a topic: what is unacked of it is nobody's business any more.
    pub(super) fn leave(&mut self, epoch: Epoch) {
        let Some(topic) = self.topics.remove(&epoch) else { return };
        self.numbers.remove(&topic.number);
        self.noted.forget(epoch);
        self.turns.retain(|turn| *turn != epoch);
        for session in self.active() {
            session.tell(Event::Left(topic.number));
            session.forget(topic.number);
        }
    }

    pub(super) fn join_and_tell(&mut self, start: TopicStart) {
        let epoch = self.join(start);
        let joined = self.topics.get(&epoch).map(|topic| topic.describe(epoch));
        if let Some(joined) = joined {
            self.active().for_each(|session| session.tell(Event::Joined(joined.clone())));
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
        match self.storage.apply(vec![change], Urgency::Now).await {
            Err(CommitError::Unknown) if matches!(self.stored().await, Some(None)) => {}
            deleted => deleted?.into_inner(),
        }
        self.keeper = Keeper::Client;
        self.ended = true;
        let error = BrokerError::SubscriptionDeleted(self.record.name.clone());
        self.sessions().for_each(|session| session.tell(Event::Ended(error.clone())));
        Ok(())
    }

    fn join(&mut self, start: TopicStart) -> Epoch {
        let TopicStart { name, epoch, cursor, head, floor, purged, gone } = start;
        floor.store(cursor.floor, Ordering::Release);
        let max_attempts = self.record.on_failure.max_attempts();
        let cursor = Cursor::new(cursor, *head.borrow(), max_attempts);
        let mut delivery = Delivery::new(self.record.kind, cursor);
        if !self.awaited.is_empty() {
            delivery.withhold();
        }
        let number = self.next_number;
        self.next_number += 1;
        self.numbers.insert(number, epoch);
        let (damaged, lost) = (None, None);
        let (reach, ahead) = (1, Ahead::default());
        let topic =
            Topic { name, number, delivery, floor, purged, damaged, lost, gone, reach, ahead };
        self.topics.insert(epoch, topic);
        self.turns.push_back(epoch);
        self.heads.push(WatchStream::new(head).map(move |head| (epoch, head)).boxed());
        epoch
    }

    fn on_head(&mut self, epoch: Epoch, head: u64) {
        if let Some(topic) = self.topics.get_mut(&epoch) {
            topic.delivery.cursor_mut().on_head(head);
        }
    }

    fn targets(&self) -> Vec<(Epoch, Target)> {
        let present = self.topics.iter().filter(|(_, topic)| !topic.gone);
        let target = |(epoch, topic): (&Epoch, &Topic)| {
            let CursorRecord { floor, done, .. } = topic.delivery.cursor().record();
            (*epoch, Target { floor: *floor, done: done.clone() })
        };
        present.map(target).collect()
    }

    fn seek(&mut self, targets: Vec<(Epoch, Target)>) {
        for (epoch, to) in targets {
            let Some(topic) = self.topics.get_mut(&epoch) else {
                continue;
            };
            topic.delivery.restore(to.floor, &to.done);
            topic.damaged = None;
            topic.ahead.clear();
            let moved = topic.describe(epoch);
            self.active().for_each(|session| session.tell(Event::Repositioned(moved.clone())));
        }
        self.leases.forget_settled(&self.topics);
    }

    /// Whether nobody has used it for as long as it says: it has no consumer, and none has pulled or
    /// acked. Notes now and then that it is used, so that a restart does not make it look idle.
    fn is_expired(&mut self) -> bool {
        let Some(after) = self.record.expires_after else { return false };
        let now = self.now();
        let noted = now.wall.since(self.record.used_at);
        let connected = !self.seats.is_empty() || !self.standby.is_empty();
        if connected || self.leases.are_used() {
            self.last_used = Some(now.at);
        }
        let used_within = |time| self.last_used.is_some_and(|at| now.at.duration_since(at) < time);
        if noted > after / 4 && used_within(after / 4) {
            self.record_changed = true;
        }
        // Whoever was connected when the server stopped has time to come back.
        let is_up = now.at.duration_since(self.started) > after / 4;
        noted > after && is_up && !used_within(after)
    }

    pub(super) fn now(&self) -> Moment {
        Moment { at: Instant::now(), wall: self.env.now() }
    }
}

impl Topic {
    /// What there is to tell a session.
    pub(super) fn tell(&self) -> Told {
        let (cursor, passed) = (self.delivery.cursor(), self.delivery.passed());
        // What is acked and not durable may be forgotten still; a seek back shows at once.
        let floor = self.floor.load(Ordering::Acquire).min(cursor.floor());
        Told { topic: self.number, head: cursor.head(), passed, floor }
    }

    pub(super) fn describe(&self, epoch: Epoch) -> SessionTopic {
        let cursor = self.delivery.cursor();
        SessionTopic {
            number: self.number,
            name: self.name.clone(),
            epoch,
            floor: cursor.floor(),
            head: cursor.head(),
            cursor_generation: cursor.record().generation,
            dropped: Sequences::new(),
        }
    }
}

/// Resolves when one of the streams has room for a frame.
async fn room(senders: Vec<mpsc::Sender<Event>>) {
    if senders.is_empty() {
        return std::future::pending().await;
    }
    // An error means that a stream is gone, which the loop notices by itself.
    let rooms = senders.iter().map(|sender| sender.reserve().boxed());
    drop(select_all(rooms).await);
}
