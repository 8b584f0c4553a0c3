//! What may happen to a subscription, for its model: random setups and steps.

use proptest::prelude::*;

use crate::record::{Release, SubscriptionKind};

/// Who may consume.
pub(super) const CONSUMERS: usize = 4;

/// What the subscription is like.
#[derive(Clone, Copy, Debug)]
pub(super) struct Setup {
    pub(super) kind: SubscriptionKind,
    pub(super) policy: Policy,
    /// Handlers that take too long have failed.
    pub(super) ack_timeout: bool,
    /// So many messages are there before the subscription.
    pub(super) start: u64,
}

/// What becomes of messages that fail.
#[derive(Clone, Copy, Debug)]
pub(super) enum Policy {
    Block,
    Skip(u32),
    DeadLetter(u32),
}

impl Setup {
    pub(super) fn is_exclusive(&self) -> bool {
        self.kind == SubscriptionKind::Exclusive
    }
}

impl Policy {
    pub(super) fn max_attempts(self) -> Option<u32> {
        match self {
            Self::Block => None,
            Self::Skip(attempts) | Self::DeadLetter(attempts) => Some(attempts),
        }
    }

    pub(super) fn release(self) -> Release {
        match self {
            Self::Block | Self::Skip(_) => Release::Skip,
            Self::DeadLetter(_) => Release::DeadLetter,
        }
    }
}

/// A message to be published.
#[derive(Clone, Copy, Debug)]
pub(super) struct Draft {
    /// Zero is none.
    pub(super) key: u8,
    pub(super) for_others: bool,
    pub(super) bytes: u64,
}

/// How an application hands a message back.
#[derive(Clone, Copy, Debug)]
pub(super) enum How {
    Now,
    /// After so many seconds.
    Later(u64),
    /// After the backoff.
    Backoff,
    Uncounted,
    ForGood,
}

/// Which direction of a connection is lost, while the server has not noticed.
#[derive(Clone, Copy, Debug)]
pub(super) enum Way {
    ToServer,
    ToClient,
    Both,
}

/// One of those that a step can be about, counted from the first and around.
pub(super) type Nth = usize;

#[derive(Clone, Debug)]
pub(super) enum Step {
    Publish(Vec<Draft>),
    /// Delivers at most so many frames.
    Pump(usize),
    /// Looks at so many messages before their turn, and passes over those that are for others.
    LookAhead(usize),
    /// A consumer takes a message into a handler, and reports it.
    Start(Nth, Nth),
    Ack(Nth, Nth),
    /// By a handle of an earlier showing.
    AckLate(Nth, Nth),
    /// Of any message, without a session.
    AckAny(Nth),
    Nack(Nth, Nth, How),
    /// What is in a handler for so many seconds has failed.
    /// Its consumer may not hear that it is taken back.
    Expire {
        seconds: u64,
        unheard: bool,
    },
    /// So many seconds pass.
    Wait(u64),
    /// A moment comes that is waited for, and the server delivers a frame.
    WakeUp(Nth),
    Cut(Nth, Way),
    /// The server notices that a connection is gone.
    Lose(Nth),
    /// A consumer connects again. It may lose the connection before it hears the welcome.
    Reconnect {
        who: Nth,
        deaf: bool,
    },
    /// A new process of a consumer, which may be the first one.
    Launch(usize),
    /// The process of a consumer dies, and its grace passes.
    Kill(Nth),
    Goodbye(Nth),
    /// The grace of a lost consumer is over.
    GiveUp(Nth),
    Save,
    /// The server is killed, and starts with what it has saved.
    Restart,
    /// To any message, or behind the last one.
    Seek(Nth),
    /// Retention takes so many messages.
    Trim(u64),
    /// A consumer has seen the gaps that it was told.
    Know(Nth),
    /// What has failed too often is let go.
    Bury,
    /// It is not, since the dead-letter topic is full.
    BuryInVain,
}

fn draft() -> impl Strategy<Value = Draft> {
    // Some are larger than all credit.
    let bytes = prop_oneof![12 => 1..4_u64, 1 => Just(30_u64)];
    let draft = |(key, others, bytes)| Draft { key, for_others: others == 0, bytes };
    (0..4_u8, 0..7_u8, bytes).prop_map(draft)
}

fn how() -> impl Strategy<Value = How> {
    prop_oneof![
        4 => Just(How::Now),
        3 => (1..40_u64).prop_map(How::Later),
        4 => Just(How::Backoff),
        2 => Just(How::Uncounted),
        2 => Just(How::ForGood),
    ]
}

fn way() -> impl Strategy<Value = Way> {
    prop_oneof![Just(Way::ToServer), Just(Way::ToClient), Just(Way::Both)]
}

fn step() -> impl Strategy<Value = Step> {
    let nth = || 0..8_usize;
    prop_oneof![
        16 => prop::collection::vec(draft(), 1..4).prop_map(Step::Publish),
        64 => (1..6_usize).prop_map(Step::Pump),
        12 => (1..6_usize).prop_map(Step::LookAhead),
        56 => (nth(), nth()).prop_map(|(who, which)| Step::Start(who, which)),
        20 => (nth(), nth()).prop_map(|(who, which)| Step::Ack(who, which)),
        4 => (nth(), nth()).prop_map(|(who, which)| Step::AckLate(who, which)),
        12 => (0..1_000_usize).prop_map(Step::AckAny),
        20 => (nth(), nth(), how()).prop_map(|(who, which, how)| Step::Nack(who, which, how)),
        26 => (0..3_u64, any::<bool>())
            .prop_map(|(seconds, unheard)| Step::Expire { seconds, unheard }),
        6 => (1..40_u64).prop_map(Step::Wait),
        24 => nth().prop_map(Step::WakeUp),
        4 => (nth(), way()).prop_map(|(who, way)| Step::Cut(who, way)),
        4 => nth().prop_map(Step::Lose),
        24 => (nth(), 0..8_u8).prop_map(|(who, deaf)| Step::Reconnect { who, deaf: deaf == 0 }),
        7 => (0..CONSUMERS).prop_map(Step::Launch),
        8 => nth().prop_map(Step::Kill),
        2 => nth().prop_map(Step::Goodbye),
        6 => nth().prop_map(Step::GiveUp),
        6 => Just(Step::Save),
        1 => Just(Step::Restart),
        1 => (0..1_000_usize).prop_map(Step::Seek),
        1 => (1..6_u64).prop_map(Step::Trim),
        8 => nth().prop_map(Step::Know),
        8 => Just(Step::Bury),
        2 => Just(Step::BuryInVain),
    ]
}

pub(super) fn setup(kind: SubscriptionKind) -> impl Strategy<Value = Setup> {
    let policy = prop_oneof![
        1 => Just(Policy::Block),
        2 => (1..6_u32).prop_map(Policy::Skip),
        2 => (1..6_u32).prop_map(Policy::DeadLetter),
    ];
    let setup = move |(policy, ack_timeout, start)| Setup { kind, policy, ack_timeout, start };
    (policy, prop::bool::weighted(0.75), 0..4_u64).prop_map(setup)
}

pub(super) fn steps() -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec(step(), 1..300)
}
