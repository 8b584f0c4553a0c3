//! What to show next, and what has been dealt with, in one topic of one subscription. Pure: events
//! in, answers out, no clock and no I/O.

use std::time::Duration;

use tokio::time::Instant;

use crate::limits;
use crate::record::{CursorRecord, Release, Sequences, SubscriptionKind, Timestamp};

mod ascending;
mod competing;
#[cfg(test)]
mod competing_tests;
mod cursor;
mod delaying;
#[cfg(test)]
mod delivery_model;
mod exclusive;
mod failing;
#[cfg(test)]
mod model_consumer;
#[cfg(test)]
mod model_steps;
#[cfg(test)]
mod model_truth;
#[cfg(test)]
mod model_world;
mod timed;
mod waiting;

pub use competing::{Competing, Key, Order};
pub use cursor::Cursor;
pub use exclusive::Exclusive;
pub use waiting::Wait;

/// A moment, by the clock that measures and by the one that people read.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// For delays.
    pub at: Instant,
    /// For what is kept.
    pub wall: Timestamp,
}

impl Moment {
    /// When a time comes; nothing if it is over already.
    pub fn when(&self, time: Option<Timestamp>) -> Option<Instant> {
        let ahead = time?.since(self.wall);
        (!ahead.is_zero()).then(|| self.at + ahead)
    }
}

/// What of a message decides on its delivery, beside its recipients.
#[derive(Clone, Debug, Default)]
pub struct Terms {
    /// The key that orders it, if its subscription orders by key.
    pub key: Option<Key>,
    /// Until when it waits, if that is not over.
    pub due: Option<Instant>,
}

/// Who holds messages: a consumer that has a place in the subscription, or a pull.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Holder {
    /// A consumer, by the number of its place.
    Seat(u64),
    /// A pull, by its number.
    Pull(u64),
}

/// What is with one consumer, or with all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Out {
    /// Messages.
    pub messages: u64,
    /// Bytes of these.
    pub bytes: u64,
}

impl Out {
    /// Both together.
    pub fn and(self, other: Self) -> Self {
        Self { messages: self.messages + other.messages, bytes: self.bytes + other.bytes }
    }
}

/// The delivery of one topic to one subscription, by its kind.
#[derive(Debug)]
pub enum Delivery {
    /// To one consumer at a time.
    Exclusive(Exclusive),
    /// To several.
    Competing(Competing),
}

impl Delivery {
    /// Goes on at a position.
    pub fn new(kind: SubscriptionKind, cursor: Cursor) -> Self {
        let competing = |cursor, order| Self::Competing(Competing::new(cursor, order));
        match kind {
            SubscriptionKind::Exclusive => Self::Exclusive(Exclusive::new(cursor)),
            SubscriptionKind::Shared => competing(cursor, Order::None),
            SubscriptionKind::KeyOrdered => competing(cursor, Order::Key),
        }
    }

    /// The position.
    pub fn cursor(&self) -> &Cursor {
        match self {
            Self::Exclusive(delivery) => &delivery.cursor,
            Self::Competing(delivery) => &delivery.cursor,
        }
    }

    /// The position, to be told of the head and of commits.
    pub fn cursor_mut(&mut self) -> &mut Cursor {
        match self {
            Self::Exclusive(delivery) => &mut delivery.cursor,
            Self::Competing(delivery) => &mut delivery.cursor,
        }
    }

    /// What is with one consumer.
    pub fn out(&self, holder: Holder) -> Out {
        match self {
            Self::Exclusive(delivery) => delivery.out(),
            Self::Competing(delivery) => delivery.out(holder),
        }
    }

    /// Messages held by anyone.
    pub fn held(&self) -> usize {
        match self {
            Self::Exclusive(delivery) => delivery.held(),
            Self::Competing(delivery) => delivery.held(),
        }
    }

    /// Whether this consumer holds this message.
    pub fn holds(&self, sequence: u64, holder: Holder) -> bool {
        match self {
            Self::Exclusive(delivery) => delivery.holds(sequence),
            Self::Competing(delivery) => delivery.holds(sequence, holder),
        }
    }

    /// A consumer comes, or comes back, and may have kept its place. Answers what it claims to hold
    /// and is not wanted any more.
    pub fn attach(
        &mut self,
        holder: Holder,
        claim: &Claim,
        kept_place: bool,
        now: Moment,
    ) -> Sequences {
        match self {
            Self::Exclusive(delivery) => delivery.attach(claim, now),
            Self::Competing(delivery) => delivery.attach(holder, claim, kept_place, now),
        }
    }

    /// A consumer is gone, and what it held is to be shown again.
    pub fn detach(&mut self, holder: Holder) {
        match self {
            Self::Exclusive(delivery) => delivery.detach(),
            Self::Competing(delivery) => delivery.detach(holder),
        }
    }

    /// A consumer is lost, and what it held is to be shown again. What it had in a handler has
    /// failed, and may be what killed it.
    pub fn crash(&mut self, holder: Holder, now: Moment) {
        match self {
            Self::Exclusive(delivery) => delivery.crash(now),
            Self::Competing(delivery) => delivery.crash(holder, now),
        }
    }

    /// A consumer has these in its handlers from now on.
    pub fn start(&mut self, holder: Holder, started: &Sequences, now: Instant) {
        match self {
            Self::Exclusive(delivery) => delivery.start(started, now),
            Self::Competing(delivery) => delivery.start(holder, started, now),
        }
    }

    /// The moment since which a message is in a handler, of all the earliest.
    pub fn started_at(&self) -> Option<Instant> {
        match self {
            Self::Exclusive(delivery) => delivery.started_at(),
            Self::Competing(delivery) => delivery.started_at(),
        }
    }

    /// What is in a handler since `since` or longer has failed. Answers what is to be taken back,
    /// and from whom; from the only one there is if it does not say.
    pub fn expire(
        &mut self,
        since: Instant,
        reason: &str,
        now: Moment,
    ) -> Vec<(Option<Holder>, Rewound)> {
        match self {
            Self::Exclusive(delivery) => {
                let rewound = delivery.expire(since, reason, now);
                rewound.map(|rewound| (None, rewound)).into_iter().collect()
            }
            Self::Competing(delivery) => {
                let rewound = delivery.expire(since, reason, now).into_iter();
                rewound.map(|(holder, rewound)| (Some(holder), rewound)).collect()
            }
        }
    }

    /// The position has let these go.
    pub fn let_go(&mut self, sequence: u64) {
        let gone = Sequences::from_iter([sequence..=sequence]);
        match self {
            Self::Exclusive(delivery) => delivery.let_go(&gone),
            Self::Competing(delivery) => delivery.let_go(sequence, sequence),
        }
    }

    /// These are received. They need not have been delivered, by this session or at all; beyond
    /// the head there is nothing to ack.
    pub fn ack(&mut self, acked: &Sequences) {
        match self {
            Self::Exclusive(delivery) => delivery.ack(acked),
            Self::Competing(delivery) => delivery.ack(acked),
        }
    }

    /// A consumer knows that it will never receive these.
    pub fn miss(&mut self, missed: &Sequences) {
        match self {
            Self::Exclusive(delivery) => delivery.miss(missed),
            Self::Competing(delivery) => delivery.miss(missed),
        }
    }

    /// A consumer hands messages back. Answers what it has to take back with them.
    pub fn nack(&mut self, holder: Holder, nacks: &[Nack], now: Moment) -> Option<Rewound> {
        match self {
            Self::Exclusive(delivery) => delivery.nack(nacks, now),
            Self::Competing(delivery) => delivery.nack(holder, nacks, now),
        }
    }

    /// Moves the position: all up to the floor is done, and these beyond it. What an ack has
    /// settled otherwise is forgotten, but stays received.
    pub fn restore(&mut self, floor: u64, done: &Sequences) {
        match self {
            Self::Exclusive(delivery) => delivery.restore(floor, done),
            Self::Competing(delivery) => delivery.restore(floor, done),
        }
    }

    /// Messages below `first` are gone. Answers what is to be told, if it is news: the first and
    /// the last one. The floor waits until a consumer knows.
    pub fn lose_below(&mut self, first: u64) -> Option<(u64, u64)> {
        match self {
            Self::Exclusive(delivery) => delivery.lose_below(first),
            Self::Competing(delivery) => delivery.lose_below(first),
        }
    }

    /// What is to be told to a consumer that has just come. To an exclusive one it is told in its
    /// place, when delivery gets there again.
    pub fn lost(&self) -> Option<(u64, u64)> {
        match self {
            Self::Exclusive(_) => None,
            Self::Competing(delivery) => delivery.lost(),
        }
    }

    /// All messages up to here were sent, or are not for the consumer.
    pub fn passed(&self) -> u64 {
        match self {
            Self::Exclusive(delivery) => delivery.passed(),
            Self::Competing(delivery) => delivery.passed(),
        }
    }

    /// All messages up to here were looked at: beyond it nothing is known.
    pub fn looked_at(&self) -> u64 {
        match self {
            Self::Exclusive(delivery) => delivery.passed(),
            Self::Competing(delivery) => delivery.looked_at(),
        }
    }

    /// A message is not for the subscription, which is found out before its turn. Says whether it
    /// is the next one, and passed over: in any other place its turn has to come.
    pub fn pass_over(&mut self, sequence: u64) -> bool {
        match self {
            Self::Exclusive(delivery) => delivery.pass_over(sequence),
            Self::Competing(delivery) => delivery.pass_over(sequence),
        }
    }

    /// Keeps everything for consumers that may hold it since before a restart.
    pub fn withhold(&mut self) {
        match self {
            Self::Exclusive(_) => {}
            Self::Competing(delivery) => delivery.withhold(),
        }
    }

    /// All of these are back, or given up.
    pub fn withhold_no_more(&mut self) {
        match self {
            Self::Exclusive(_) => {}
            Self::Competing(delivery) => delivery.withhold_no_more(),
        }
    }

    /// What keeps messages from being delivered, for people.
    pub fn waits_for(&self, now: Instant) -> Option<String> {
        let failing = self.failing_for(now);
        let due = self.due_at().map(|at| at.saturating_duration_since(now).as_secs_f32());
        let delayed = due.map(|seconds| {
            format!("{} messages are not due; the first one is in {seconds:.1} s", self.delayed())
        });
        failing.or(delayed)
    }

    fn failing_for(&self, now: Instant) -> Option<String> {
        let until = |at: Instant| at.saturating_duration_since(now).as_secs_f32();
        match self {
            _ if !self.cursor().condemned().is_empty() => {
                let count = self.cursor().condemned().len();
                Some(format!("{count} messages have failed too often and are to be let go"))
            }
            Self::Exclusive(delivery) => {
                let seconds = until(delivery.ready_at(now)?);
                Some(format!("a failed message is shown again in {seconds:.1} s"))
            }
            Self::Competing(delivery) => {
                let (waiting, unacked) = (delivery.waiting(), delivery.held());
                if delivery.is_withholding() {
                    let what = "consumers that may hold messages since before the restart";
                    Some(what.to_owned())
                } else if delivery.is_full() {
                    Some(format!("{unacked} messages are unacked and {waiting} wait; no more can"))
                } else {
                    let seconds = until(delivery.ready_at(now)?);
                    Some(format!("{waiting} messages wait; a failed one comes in {seconds:.1} s"))
                }
            }
        }
    }

    /// When a message that is held back by a backoff may be shown.
    pub fn ready_at(&self, now: Instant) -> Option<Instant> {
        match self {
            Self::Exclusive(delivery) => delivery.ready_at(now),
            Self::Competing(delivery) => delivery.ready_at(now),
        }
    }

    /// When the next of the messages may be shown that were published to be shown later.
    pub fn due_at(&self) -> Option<Instant> {
        match self {
            Self::Exclusive(delivery) => delivery.due_at(),
            Self::Competing(delivery) => delivery.due_at(),
        }
    }

    /// Messages that were published to be shown later, and are not due yet.
    pub fn delayed(&self) -> usize {
        match self {
            Self::Exclusive(delivery) => delivery.delayed(),
            Self::Competing(delivery) => delivery.delayed(),
        }
    }

    /// When the next of the messages may be shown that may kill their consumer.
    pub fn tried_until(&self, now: Instant) -> Option<Instant> {
        match self {
            Self::Exclusive(delivery) => delivery.tried_until(now),
            Self::Competing(delivery) => delivery.tried_until().filter(|until| *until > now),
        }
    }

    /// The delivery generation of the session.
    pub fn generation(&self) -> u32 {
        match self {
            Self::Exclusive(delivery) => delivery.generation(),
            Self::Competing(_) => 0,
        }
    }
}

/// What a consumer brings along when it attaches.
#[derive(Clone, Debug, Default)]
pub struct Claim {
    /// In its buffer or in the application's hands.
    pub held: Sequences,
    /// Bytes of these.
    pub held_bytes: u64,
    /// Acked, unconfirmed.
    pub acked: Sequences,
    /// Handed back, unconfirmed.
    pub nacked: Vec<Nack>,
    /// Told to be gaps, unconfirmed.
    pub missed: Sequences,
    /// Of what it holds, what is in the application's hands.
    pub started: Sequences,
    /// The generation of the cursor that this refers to.
    pub cursor_generation: u64,
}

/// A message is handed back.
#[derive(Clone, Debug, Default)]
pub struct Nack {
    /// Which.
    pub sequence: u64,
    /// The attempt that failed, 0 if none did.
    pub attempt: u32,
    /// How long to wait; the backoff if `None`.
    pub delay: Option<Duration>,
    /// Why, for people.
    pub reason: String,
    /// Another attempt would be of no use.
    pub for_good: bool,
}

/// A topic, or a key, is going to be shown again from a point on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rewound {
    /// The first message that is shown again.
    pub from: u64,
    /// The generation of what follows.
    pub generation: u32,
    /// Where only some messages are: these, and `from` is the first of them. The generation means
    /// nothing then.
    pub taken_back: Sequences,
}

impl Rewound {
    fn nothing() -> Self {
        Self { from: 0, generation: 0, taken_back: Sequences::new() }
    }
}

/// What a subscription knows about the fate of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Receipt {
    /// Acked.
    Received,
    /// To be shown or acked, unless it is for other recipients.
    Pending,
    /// Never meant for this subscription.
    NotAddressed,
    /// Let go without an ack.
    Released(Release),
    /// Not known any more.
    Trimmed {
        /// The oldest message that can be answered for.
        oldest: u64,
    },
}

/// A cursor for a new subscription whose first message is `first`.
pub fn starting_at(first: u64) -> CursorRecord {
    let floor = first.max(1) - 1;
    CursorRecord { floor, start: floor, ..CursorRecord::default() }
}

/// How long to wait after so many failures.
fn backoff(failures: u32) -> Duration {
    let doublings = failures.saturating_sub(1).min(16);
    (limits::MIN_BACKOFF * 2_u32.pow(doublings)).min(limits::MAX_BACKOFF)
}

/// Why what was in a handler of a consumer that was lost has failed.
const LOST: &str = "its consumer was lost while it was being processed";
