//! What happens, told to whoever watches while it does. Nothing is kept, and nobody who tells waits
//! for anybody who listens: who is slow misses events, and learns how many.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, broadcast, watch};

use super::counting::Counts;
use super::error::BrokerError;
use super::session::{Command, GapReason};
use super::stalls;
use super::subscription::AdminCommand;
use super::waiting::HeadOfLine;
use super::{Broker, Inner};
use crate::env::SharedEnv;
use crate::limits;
use crate::names::{ConsumerId, SubscriptionName, TopicName};
use crate::record::{Epoch, Timestamp};
use crate::storage::Health;

/// Something that has happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerEvent {
    /// When.
    pub at: Timestamp,
    /// What.
    pub what: What,
}

/// What has happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// To a topic.
    Topic(TopicName, Epoch, TopicFate),
    /// Messages before one were removed by an operator: so many.
    Purged {
        /// The topic.
        topic: TopicName,
        /// Its incarnation.
        epoch: Epoch,
        /// The first message that stays.
        before: u64,
        /// How many were removed.
        purged: u64,
    },
    /// To a subscription.
    Subscription(SubscriptionName, Epoch, SubscriptionFate),
    /// To a consumer of a subscription.
    Consumer(SubscriptionName, ConsumerId, Presence),
    /// A subscription will never receive some messages.
    Gap {
        /// The subscription.
        subscription: SubscriptionName,
        /// The topic.
        topic: TopicName,
        /// Its incarnation.
        epoch: Epoch,
        /// The first of them.
        first: u64,
        /// The last of them.
        last: u64,
        /// Why.
        reason: GapReason,
    },
    /// Messages that failed were let go.
    LetGo {
        /// The subscription.
        subscription: SubscriptionName,
        /// The topic.
        topic: TopicName,
        /// Its incarnation.
        epoch: Epoch,
        /// How many.
        count: u64,
        /// The first of them.
        first: u64,
        /// Where they were moved to; they were skipped if nowhere.
        into: Option<TopicName>,
    },
    /// Dead letters were sent back, or let go.
    Settled {
        /// The subscription.
        subscription: SubscriptionName,
        /// The dead-letter topic.
        topic: TopicName,
        /// Whether they were sent back.
        redriven: bool,
        /// How many.
        count: u64,
        /// How many are left.
        left: u64,
    },
    /// The first message that is not done has been the same one for too long.
    Stalled {
        /// The subscription.
        subscription: SubscriptionName,
        /// The topic.
        topic: TopicName,
        /// Its incarnation.
        epoch: Epoch,
        /// The message.
        head: HeadOfLine,
        /// For how long.
        waiting: Duration,
    },
    /// A stall that was told is over.
    StallEnded {
        /// The subscription.
        subscription: SubscriptionName,
        /// The topic.
        topic: TopicName,
        /// Its incarnation.
        epoch: Epoch,
        /// The message.
        sequence: u64,
        /// For how long it was the first one.
        waited: Duration,
    },
    /// The disk is full.
    DiskFull,
    /// There is room on the disk again.
    DiskHasRoom,
}

/// What has become of a topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TopicFate {
    /// It is new.
    Created,
    /// Its settings are others.
    Updated,
    /// It is gone.
    Deleted,
}

/// What has become of a subscription.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SubscriptionFate {
    /// It is new.
    Created,
    /// It is gone, because somebody said so.
    Deleted,
    /// It is gone, because nobody used it.
    Expired,
}

/// What has become of a consumer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Presence {
    /// It is active.
    Attached,
    /// It waits for another one.
    Standby(ConsumerId),
    /// A new process of its name has taken over.
    Superseded,
    /// Its connection is lost.
    Disconnected,
    /// It has said goodbye.
    Left,
    /// Its grace is over.
    Lost,
}

impl What {
    fn subscription(&self) -> Option<&SubscriptionName> {
        match self {
            Self::Subscription(subscription, ..)
            | Self::Consumer(subscription, ..)
            | Self::Gap { subscription, .. }
            | Self::LetGo { subscription, .. }
            | Self::Settled { subscription, .. }
            | Self::Stalled { subscription, .. }
            | Self::StallEnded { subscription, .. } => Some(subscription),
            Self::Topic(..) | Self::Purged { .. } | Self::DiskFull | Self::DiskHasRoom => None,
        }
    }

    /// The topic, and the one that messages were moved to.
    fn topics(&self) -> [Option<&TopicName>; 2] {
        match self {
            Self::LetGo { topic, into, .. } => [Some(topic), into.as_ref()],
            Self::Topic(topic, ..)
            | Self::Purged { topic, .. }
            | Self::Gap { topic, .. }
            | Self::Settled { topic, .. }
            | Self::Stalled { topic, .. }
            | Self::StallEnded { topic, .. } => [Some(topic), None],
            Self::Subscription(..) | Self::Consumer(..) | Self::DiskFull | Self::DiskHasRoom => {
                [None, None]
            }
        }
    }
}

/// Which events are wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EventFilter {
    /// Those that name this subscription.
    pub subscription: Option<SubscriptionName>,
    /// Those that name this topic.
    pub topic: Option<TopicName>,
}

impl EventFilter {
    /// Whether an event names all that is wanted, or concerns the whole server.
    fn passes(&self, what: &What) -> bool {
        let (subscription, topics) = (what.subscription(), what.topics());
        if subscription.is_none() && topics == [None, None] {
            return true;
        }
        let named = |topic: &TopicName| topics.contains(&Some(topic));
        self.subscription.as_ref().is_none_or(|wanted| subscription == Some(wanted))
            && self.topic.as_ref().is_none_or(named)
    }
}

/// Where events are told. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Events {
    sender: broadcast::Sender<Arc<ServerEvent>>,
    places: Arc<Semaphore>,
    counts: Arc<Mutex<Counts>>,
    env: SharedEnv,
}

impl Events {
    pub(super) fn new(env: SharedEnv) -> Self {
        let (sender, _) = broadcast::channel(limits::EVENT_BUFFER);
        let places = Arc::new(Semaphore::new(limits::MAX_WATCHERS));
        Self { sender, places, counts: Arc::default(), env }
    }

    pub(super) fn is_watched(&self) -> bool {
        self.sender.receiver_count() > 0
    }

    /// Tells what has happened, and counts it.
    pub(super) fn tell(&self, what: What) {
        self.counted().count(&what);
        if self.is_watched() {
            // An error means that the last one has just left.
            let _ = self.sender.send(Arc::new(ServerEvent { at: self.env.now(), what }));
        }
    }

    /// Counts messages that a subscription will never receive.
    pub(super) fn count_missed(&self, reason: GapReason, messages: u64) {
        *self.counted().missed.entry(reason).or_default() += messages;
    }

    /// What was counted so far.
    pub(super) fn counts(&self) -> Counts {
        self.counted().clone()
    }

    fn counted(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().expect("no holder of this lock panics")
    }

    fn watch(&self, filter: EventFilter) -> Result<Watcher, BrokerError> {
        let limit = limits::MAX_WATCHERS as u64;
        let place = Arc::clone(&self.places).try_acquire_owned();
        let place = place.map_err(|_| BrokerError::LimitReached { what: "watchers", limit })?;
        Ok(Watcher { events: self.sender.subscribe(), filter, _place: place })
    }
}

/// Somebody who watches.
#[derive(Debug)]
pub struct Watcher {
    events: broadcast::Receiver<Arc<ServerEvent>>,
    filter: EventFilter,
    _place: OwnedSemaphorePermit,
}

/// What a watcher is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Noticed {
    /// An event.
    Event(Arc<ServerEvent>),
    /// So many were dropped, before anybody looked whether they were wanted.
    Missed(u64),
}

impl Watcher {
    /// The next one that is wanted; nothing once there will be no more. Cancel-safe.
    pub async fn next(&mut self) -> Option<Noticed> {
        loop {
            match self.events.recv().await {
                Ok(event) if self.filter.passes(&event.what) => {
                    return Some(Noticed::Event(event));
                }
                Ok(_) => {}
                #[cfg(pubsub_break = "events_missed_in_silence")]
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                #[cfg(not(pubsub_break = "events_missed_in_silence"))]
                Err(broadcast::error::RecvError::Lagged(count)) => {
                    return Some(Noticed::Missed(count));
                }
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    }
}

impl Broker {
    /// Watches what happens from now on.
    ///
    /// # Errors
    ///
    /// If too many watch already.
    pub fn watch(&self, filter: EventFilter) -> Result<Watcher, BrokerError> {
        self.inner.events.watch(filter)
    }

    /// Tells of what happens to nobody in particular, and looks for what should happen and does not.
    pub(super) fn spawn_overseer(&self) {
        let stop = self.inner.stop.clone();
        let (broker, health) = (Arc::downgrade(&self.inner), self.health());
        self.inner.tasks.spawn(stop.run_until_cancelled_owned(oversee(broker, health)));
    }

    fn look_for_stalls(&self) {
        if !self.inner.events.is_watched() {
            return;
        }
        let handles: Vec<_> = self.state().subscriptions.values().cloned().collect();
        for handle in handles {
            // One that is so busy is looked at the next time.
            let _ = handle.commands.try_send(Command::Admin(AdminCommand::LookForStalls));
        }
    }
}

async fn oversee(broker: std::sync::Weak<Inner>, mut health: watch::Receiver<Health>) {
    let mut looks = tokio::time::interval(stalls::INTERVAL);
    looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut was_full = matches!(&*health.borrow_and_update(), Health::DiskFull);
    loop {
        let changed = tokio::select! {
            changed = health.changed() => changed,
            _ = looks.tick() => Ok(()),
        };
        let (Some(inner), Ok(())) = (broker.upgrade(), changed) else { return };
        let broker = Broker { inner };
        let is_full = match &*health.borrow_and_update() {
            Health::DiskFull => true,
            Health::Ok => false,
            Health::Failed(_) => was_full,
        };
        if is_full != was_full {
            let what = if is_full { What::DiskFull } else { What::DiskHasRoom };
            broker.inner.events.tell(what);
            was_full = is_full;
        }
        broker.look_for_stalls();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::env::System;

    fn topic(name: &str) -> TopicName {
        TopicName::parse(name).unwrap()
    }

    fn created(name: &str) -> What {
        What::Topic(topic(name), Epoch(1), TopicFate::Created)
    }

    fn filter(subscription: &str, name: &str) -> EventFilter {
        let given = |name: &str| (!name.is_empty()).then(|| name.to_owned());
        EventFilter {
            subscription: given(subscription).map(|name| SubscriptionName::parse(&name).unwrap()),
            topic: given(name).map(|name| topic(&name)),
        }
    }

    #[tokio::test]
    async fn who_is_slow_learns_how_many_were_missed_and_goes_on() {
        let events = Events::new(Arc::new(System));
        let mut watcher = events.watch(EventFilter::default()).unwrap();
        let buffer = limits::EVENT_BUFFER as u64;
        for number in 0..buffer + 10 {
            events.tell(created(&format!("t{number}")));
        }
        assert_eq!(watcher.next().await, Some(Noticed::Missed(10)));
        for number in 10..buffer + 10 {
            let Some(Noticed::Event(event)) = watcher.next().await else { panic!("{number}") };
            assert_eq!(event.what, created(&format!("t{number}")));
        }
    }

    #[tokio::test]
    async fn there_is_an_end_to_watchers() {
        let events = Events::new(Arc::new(System));
        let watch = || events.watch(EventFilter::default());
        let mut watchers: Vec<_> = (0..limits::MAX_WATCHERS).map(|_| watch().unwrap()).collect();
        assert!(matches!(watch(), Err(BrokerError::LimitReached { what: "watchers", .. })));
        watchers.pop();
        assert!(watch().is_ok());
    }

    #[test]
    fn a_filter_wants_all_that_it_names_and_what_concerns_everybody() {
        let let_go = |into: Option<&str>| What::LetGo {
            subscription: SubscriptionName::parse("s").unwrap(),
            topic: topic("t"),
            epoch: Epoch(1),
            count: 1,
            first: 1,
            into: into.map(topic),
        };
        let consumer = ConsumerId::parse("c").unwrap();
        let subscription = SubscriptionName::parse("s").unwrap();
        let attached = What::Consumer(subscription, consumer, Presence::Attached);
        let cases = [
            ("", "", created("t"), true),
            ("", "t", created("t"), true),
            ("", "u", created("t"), false),
            ("s", "", created("t"), false),
            ("s", "t", created("t"), false),
            ("s", "", attached.clone(), true),
            ("s", "t", attached, false),
            ("s", "t", let_go(None), true),
            ("s", "dead", let_go(None), false),
            ("s", "dead", let_go(Some("dead")), true),
            ("r", "t", let_go(None), false),
            ("r", "u", What::DiskFull, true),
        ];
        for (subscription, topic, what, passes) in cases {
            assert_eq!(filter(subscription, topic).passes(&what), passes, "{topic} {what:?}");
        }
    }
}
