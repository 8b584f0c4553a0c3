//! What passes between a consumer's stream and the task of its subscription.

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::ops::RangeInclusive;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::delivery::{Claim, Nack, Rewound};
use super::error::BrokerError;
use super::subscription::AdminCommand;
use crate::names::{ConsumerId, TopicName};
use crate::record::{ConsumerRecord, Epoch, Sequences, StoredMessage, SubscriptionKind};

/// Tells the sessions of one server apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

/// A consumer wants to attach.
#[derive(Debug)]
pub struct Attach {
    /// Who.
    pub consumer: ConsumerRecord,
    /// The epoch of the subscription that it knows, if it has been attached before.
    pub known_epoch: Option<Epoch>,
    /// What it brings along, by topic.
    pub claims: BTreeMap<Epoch, Claim>,
    /// How much it takes.
    pub credit: Credit,
    /// How often it wants a sign of life.
    pub heartbeat: Duration,
}

/// How much may be out with a session.
#[derive(Clone, Copy, Debug)]
pub struct Credit {
    /// Messages.
    pub messages: u64,
    /// Bytes, beside one message of any size.
    pub bytes: u64,
}

/// What a consumer's stream asks of the subscription.
#[derive(Debug)]
pub enum Command {
    /// Attach a session.
    Attach(SessionId, Box<Attach>, Outlet),
    /// Acks and nacks.
    Acks(SessionId, Box<AckBatch>),
    /// A sign of life, to be answered.
    Ping(SessionId, u64),
    /// The consumer leaves for good.
    Goodbye(SessionId),
    /// Take messages under a lease.
    Pull(Pull, oneshot::Sender<Result<Pulled, BrokerError>>),
    /// Hand leased messages back.
    Release(Vec<Lease>, Nack, oneshot::Sender<Result<(), BrokerError>>),
    /// Ack outside of a session.
    Ack(BTreeMap<Epoch, Sequences>, oneshot::Sender<Result<(), BrokerError>>),
    /// Something an administrator asks.
    Admin(AdminCommand),
}

/// The way to a consumer's stream.
#[derive(Debug)]
pub struct Outlet {
    /// For events.
    pub events: mpsc::Sender<Event>,
    /// Resolves when the stream is gone.
    pub gone: Gone,
}

/// Resolves when a stream is gone.
pub type Gone = oneshot::Receiver<Infallible>;

/// Acks and nacks of one frame.
#[derive(Debug)]
pub struct AckBatch {
    /// Its number in the stream.
    pub number: u64,
    /// By topic number.
    pub topics: Vec<TopicAcks>,
    /// Whether someone waits for its confirmation.
    pub awaited: bool,
}

/// Acks and nacks of one topic.
#[derive(Debug)]
pub struct TopicAcks {
    /// The number of the topic in the session.
    pub topic: u32,
    /// The generation of the cursor that this refers to.
    pub cursor_generation: u64,
    /// Received.
    pub acked: Sequences,
    /// Handed back.
    pub nacked: Vec<Nack>,
    /// Told to be gaps.
    pub missed: Sequences,
    /// In the application's hands from now on.
    pub started: Sequences,
}

/// Asks for messages under a lease.
#[derive(Debug)]
pub struct Pull {
    /// Who.
    pub consumer: ConsumerId,
    /// At most.
    pub max_messages: usize,
    /// How long to wait for the first one.
    pub wait: Duration,
    /// For how long; as long as the subscription allows a handler if `None`.
    pub lease: Option<Duration>,
}

/// The right to nack a pulled message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Lease {
    /// The message's topic.
    pub topic: Epoch,
    /// The message.
    pub sequence: u64,
    /// Which showing of it.
    pub attempt: u32,
    /// The pull that took it.
    pub pull: u64,
}

/// What a pull takes.
#[derive(Debug, Default)]
pub struct Pulled {
    /// Messages.
    pub leased: Vec<Leased>,
    /// What will never be taken.
    pub missing: Vec<Missing>,
}

/// Messages that will never come.
#[derive(Debug)]
pub struct Missing {
    /// The name of their topic.
    pub topic: TopicName,
    /// Its incarnation.
    pub epoch: Epoch,
    /// The first one.
    pub first: u64,
    /// The last one.
    pub last: u64,
    /// Why.
    pub reason: GapReason,
}

impl Missing {
    pub(super) fn range(&self) -> (Epoch, RangeInclusive<u64>) {
        (self.epoch, self.first..=self.last)
    }
}

/// A message under a lease.
#[derive(Debug)]
pub struct Leased {
    /// The name of its topic.
    pub topic: TopicName,
    /// The lease.
    pub lease: Lease,
    /// The message.
    pub message: StoredMessage,
}

/// What the subscription tells a consumer's stream.
#[derive(Debug)]
pub enum Event {
    /// The session is active.
    Welcome(Welcome),
    /// Another consumer is active.
    Standby(ConsumerId),
    /// Messages.
    Deliver(Deliver),
    /// Acks up to this number are durable.
    Confirm(u64),
    /// A sign of life.
    Heartbeat(Heartbeat),
    /// A topic is shown again.
    Rewind(u32, Rewound),
    /// Messages that will never come.
    Gap(u32, u64, u64, GapReason),
    /// A topic cannot be read from this message on.
    DataLoss(u32, u64),
    /// A topic joined.
    Joined(SessionTopic),
    /// A topic left.
    Left(u32),
    /// A seek moved the position.
    Repositioned(SessionTopic),
    /// The session is over.
    Ended(BrokerError),
}

/// A session is active.
#[derive(Debug)]
pub struct Welcome {
    /// The subscription's epoch, `None` for a reader.
    pub epoch: Option<Epoch>,
    /// The topics so far.
    pub topics: Vec<SessionTopic>,
    /// How the subscription spreads its messages.
    pub kind: SubscriptionKind,
    /// Whether it wants to know what is in the application's hands.
    pub wants_started: bool,
}

/// A topic of a session.
#[derive(Clone, Debug)]
pub struct SessionTopic {
    /// Its number in the session.
    pub number: u32,
    /// Its name.
    pub name: TopicName,
    /// Its incarnation.
    pub epoch: Epoch,
    /// The floor.
    pub floor: u64,
    /// The head.
    pub head: u64,
    /// The generation of the cursor.
    pub cursor_generation: u64,
    /// Claimed, and not wanted any more.
    pub dropped: Sequences,
}

/// Messages of one topic.
#[derive(Debug)]
pub struct Deliver {
    /// The number of the topic.
    pub topic: u32,
    /// The number of the first message in the stream, from 1.
    pub first_delivery: u64,
    /// The delivery generation.
    pub generation: u32,
    /// The messages with their attempts.
    pub messages: Vec<(StoredMessage, u32)>,
}

/// A sign of life.
#[derive(Debug)]
pub struct Heartbeat {
    /// The nonce of the last ping, 0 if there was none.
    pub nonce: u64,
    /// The number of the last message sent.
    pub last_delivery: u64,
    /// The topics in which something has moved.
    pub heads: Vec<Told>,
}

/// What a session was told of a topic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Told {
    /// Its number.
    pub topic: u32,
    /// Its head.
    pub head: u64,
    /// All messages up to here were sent in this session, or are not for it.
    pub passed: u64,
    /// All messages up to here are received, released, or before the start.
    pub floor: u64,
}

/// Why messages will never come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum GapReason {
    /// Retention removed them.
    Retention,
    /// Their topic is gone.
    TopicDeleted,
    /// An operator purged them.
    Purged,
}

impl GapReason {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Retention, Self::TopicDeleted, Self::Purged];

    /// As in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Retention => "retention",
            Self::TopicDeleted => "topic_deleted",
            Self::Purged => "purged",
        }
    }
}

/// One attached stream, as the subscription's task sees it.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) id: SessionId,
    pub(super) consumer: ConsumerRecord,
    pub(super) claims: BTreeMap<Epoch, Claim>,
    pub(super) credit: Credit,
    pub(super) heartbeat: Duration,
    pub(super) next_heartbeat: Instant,
    last_heartbeat: Instant,
    /// What it knows of each topic, by number.
    told: BTreeMap<u32, Told>,
    pub(super) last_nonce: u64,
    pub(super) last_delivery: u64,
    /// The highest batch of acks that was taken, and the highest that was confirmed. The hello is
    /// batch 0.
    pub(super) acks_taken: Option<u64>,
    pub(super) acks_confirmed: Option<u64>,
    events: mpsc::Sender<Event>,
    /// Events that found the channel full, to be sent before anything else.
    backlog: VecDeque<Event>,
}

/// How soon after a heartbeat another one may tell that a consumer has caught up.
const HURRY: Duration = Duration::from_secs(1);

/// More control events than this in a session's backlog mean that its peer provokes them without
/// reading.
const MAX_BACKLOG: usize = 1024;

impl Session {
    pub(super) fn new(id: SessionId, attach: Attach, events: mpsc::Sender<Event>) -> Self {
        let now = Instant::now();
        Self {
            id,
            consumer: attach.consumer,
            claims: attach.claims,
            credit: attach.credit,
            heartbeat: attach.heartbeat,
            next_heartbeat: now + attach.heartbeat,
            last_heartbeat: now,
            told: BTreeMap::new(),
            last_nonce: 0,
            last_delivery: 0,
            acks_taken: None,
            acks_confirmed: None,
            events,
            backlog: VecDeque::new(),
        }
    }

    /// Sends an event without waiting, behind those that wait already.
    pub(super) fn tell(&mut self, event: Event) {
        self.backlog.push_back(event);
        self.flush();
        if self.backlog.len() > MAX_BACKLOG {
            // The stream ends when its sender is dropped; the client comes back.
            self.events = mpsc::channel(1).0;
            self.backlog.clear();
        }
    }

    /// Sends what waits, as far as there is room. Answers whether all is sent.
    pub(super) fn flush(&mut self) -> bool {
        while let Some(event) = self.backlog.pop_front() {
            match self.events.try_send(event) {
                Ok(()) => {}
                Err(mpsc::error::TrySendError::Full(event)) => {
                    self.backlog.push_front(event);
                    return false;
                }
                Err(mpsc::error::TrySendError::Closed(_)) => {
                    self.backlog.clear();
                    return false;
                }
            }
        }
        true
    }

    /// Sends messages of one topic.
    pub(super) fn deliver(
        &mut self,
        topic: u32,
        generation: u32,
        messages: Vec<(StoredMessage, u32)>,
    ) {
        let first_delivery = self.last_delivery + 1;
        self.last_delivery += messages.len() as u64;
        self.tell(Event::Deliver(Deliver { topic, first_delivery, generation, messages }));
    }

    /// Sends a sign of life, with what has moved since it was told last.
    pub(super) fn beat(&mut self, topics: impl Iterator<Item = Told>) {
        self.last_heartbeat = Instant::now();
        self.next_heartbeat = self.last_heartbeat + self.heartbeat;
        let heads = topics.filter(|told| self.told.insert(told.topic, *told) != Some(*told));
        let heads = heads.collect();
        let (nonce, last_delivery) = (self.last_nonce, self.last_delivery);
        self.tell(Event::Heartbeat(Heartbeat { nonce, last_delivery, heads }));
    }

    /// It knows these from elsewhere.
    pub(super) fn knows(&mut self, topics: impl Iterator<Item = Told>) {
        self.told = topics.map(|told| (told.topic, told)).collect();
    }

    /// A topic has left.
    pub(super) fn forget(&mut self, topic: u32) {
        self.told.remove(&topic);
    }

    /// Tells soon, but not all the time, what it cannot see from what it receives.
    pub(super) fn hurry(&mut self) {
        self.next_heartbeat = self.next_heartbeat.min(self.last_heartbeat + HURRY);
    }

    /// Whether the stream has room for a frame now.
    pub(super) fn has_room(&mut self) -> bool {
        self.flush() && self.events.capacity() > 0 && !self.events.is_closed()
    }

    /// Whether nobody is at the other end.
    pub(super) fn is_gone(&self) -> bool {
        self.events.is_closed()
    }

    /// The sender, to wait for room.
    pub(super) fn sender(&self) -> mpsc::Sender<Event> {
        self.events.clone()
    }
}
