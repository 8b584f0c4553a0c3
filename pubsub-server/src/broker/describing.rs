//! How things stand with a subscription.

use std::time::Duration;

use tokio::time::Instant;

use super::consumers::Seat;
use super::dead_letters::DeadLetters;
use super::delivery::Holder;
use super::subscription::{Subscription, Topic};
use super::waiting::HeadOfLine;
use crate::names::{ConsumerId, TopicName};
use crate::record::{Epoch, SubscriptionRecord};

/// How things stand with a subscription.
#[derive(Clone, Debug)]
pub struct Description {
    /// Its record.
    pub record: SubscriptionRecord,
    /// Who is active, or awaited.
    pub consumers: Vec<ActiveConsumer>,
    /// Who stands by.
    pub standby: Vec<ConsumerId>,
    /// Its positions.
    pub positions: Vec<Position>,
    /// Its dead letters that wait to be redriven or purged.
    pub dead_letters: u64,
}

/// A consumer that has a place.
#[derive(Clone, Debug)]
pub struct ActiveConsumer {
    /// Its name.
    pub id: ConsumerId,
    /// Whether it is connected.
    pub connected: bool,
    /// Messages with it.
    pub outstanding: u64,
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
    /// Messages with consumers.
    pub outstanding: u64,
    /// The first one not done.
    pub oldest_unacked: Option<u64>,
    /// What keeps the topic from being delivered.
    pub waits_for: Option<String>,
    /// How long ago the first one not done was published, as far as it was looked up.
    pub oldest_age: Option<Duration>,
    /// Messages not done that have failed at least once.
    pub redelivered: u64,
    /// The first one not done, and what it waits for.
    pub head_of_line: Option<HeadOfLine>,
}

impl Subscription {
    pub(super) fn describe(&self) -> Description {
        let now = Instant::now();
        Description {
            record: self.record.clone(),
            consumers: self
                .seats
                .iter()
                .map(|(holder, seat)| self.active_one(*holder, seat))
                .collect(),
            standby: (self.standby.iter())
                .filter(|session| !session.is_gone())
                .map(|session| session.consumer.id.clone())
                .collect(),
            positions: (self.topics.iter())
                .map(|(epoch, topic)| topic.position(*epoch, now))
                .map(|position| self.why_it_waits(position))
                .map(|position| self.with_head_of_line(position, now))
                .collect(),
            dead_letters: self.letters.as_ref().map_or(0, DeadLetters::waiting),
        }
    }

    fn active_one(&self, holder: Holder, seat: &Seat) -> ActiveConsumer {
        let out = self.topics.values().map(|topic| topic.delivery.out(holder).messages);
        let (id, connected) = (seat.consumer.id.clone(), seat.session.is_some());
        ActiveConsumer { id, connected, outstanding: out.sum() }
    }
}

impl Topic {
    fn position(&self, epoch: Epoch, now: Instant) -> Position {
        let waits_for = match (self.damaged, self.delivery.waits_for(now)) {
            _ if self.gone => Some("the topic was deleted, which no consumer knows yet".to_owned()),
            (Some(damage), _) => Some(format!("message {} cannot be read", damage.sequence)),
            (None, waits_for) => waits_for,
        };
        let cursor = self.delivery.cursor();
        Position {
            topic: self.name.clone(),
            epoch,
            floor: cursor.floor(),
            head: cursor.head(),
            backlog: self.backlog(),
            outstanding: self.delivery.held() as u64,
            oldest_unacked: cursor.oldest_unsettled(),
            waits_for,
            oldest_age: None,
            redelivered: cursor.record().failures.len() as u64,
            head_of_line: None,
        }
    }
}
