//! Why a subscription does not go on: its first message that is not done, and what that waits for.

use std::sync::Arc;

use tokio::time::Instant;

use super::Broker;
use super::consumers::Seat;
use super::delivery::{Holder, Wait};
use super::describing::{Description, Position};
use super::subscription::{Subscription, Topic};
use crate::storage::ReadLimit;

/// What the first message waits for that is not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitCause {
    /// A consumer has it.
    WithConsumer,
    /// There is no consumer.
    NoConsumer,
    /// The consumers have no credit or no room for it.
    NoCredit,
    /// It has failed, and is shown again after its delay.
    Backoff,
    /// Its publisher has delayed it, and it is not due yet.
    Delayed,
    /// Another message that may have killed its consumer is being tried.
    Suspect,
    /// Consumers may hold it that are not connected.
    AwaitedConsumer,
    /// So many are unacked that no more are looked at.
    TooManyUnacked,
    /// It has failed too often, and is to be let go.
    DeadLetter,
    /// It cannot be read.
    Damaged,
    /// Its topic was deleted, which no consumer knows yet.
    TopicDeleted,
}

/// The first message that is not done, and why it waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeadOfLine {
    /// The message.
    pub sequence: u64,
    /// Why, for programs.
    pub cause: WaitCause,
    /// Why, for people.
    pub text: String,
}

impl Subscription {
    /// What waits for the dead-letter topic says so.
    pub(super) fn why_it_waits(&self, position: Position) -> Position {
        let topic = self.topics.get(&position.epoch);
        let condemned = topic.is_some_and(|t| !t.delivery.cursor().condemned().is_empty());
        let cause = self.letters.as_ref().and_then(|letters| letters.waits_for.clone());
        match cause.filter(|_| condemned) {
            Some(cause) => Position { waits_for: Some(cause), ..position },
            None => position,
        }
    }

    /// Completes the description of a topic with what its first message waits for.
    pub(super) fn with_head_of_line(&self, position: Position, now: Instant) -> Position {
        let topic = self.topics.get(&position.epoch);
        let head_of_line = topic.and_then(|topic| self.head_of_line(topic, now));
        Position { head_of_line, ..position }
    }

    pub(super) fn head_of_line(&self, topic: &Topic, now: Instant) -> Option<HeadOfLine> {
        let (sequence, wait) = topic.delivery.head_of_line(now)?;
        let (cause, text) = self.why(topic, wait, now);
        Some(HeadOfLine { sequence, cause, text })
    }

    fn why(&self, topic: &Topic, wait: Wait, now: Instant) -> (WaitCause, String) {
        let until = |at: Instant| at.saturating_duration_since(now).as_secs_f32();
        if let Wait::Held(holder) = wait {
            return self.who_has_it(holder);
        }
        if topic.gone {
            let text = "its topic was deleted, which no consumer knows yet";
            return (WaitCause::TopicDeleted, text.to_owned());
        }
        if let Some(damage) = topic.damaged {
            let text = format!("message {} cannot be read", damage.sequence);
            return (WaitCause::Damaged, text);
        }
        match wait {
            Wait::Held(holder) => self.who_has_it(holder),
            Wait::Backoff(at) => {
                (WaitCause::Backoff, format!("it has failed, and is shown in {:.1} s", until(at)))
            }
            Wait::Delayed(at) => {
                (WaitCause::Delayed, format!("it is delayed, and due in {:.1} s", until(at)))
            }
            Wait::Suspect(at) => {
                let what = "another message that may have killed its consumer is tried";
                (WaitCause::Suspect, format!("{what} for {:.1} s more", until(at)))
            }
            Wait::Awaited => {
                let text = "consumers that may hold it since before the restart are awaited";
                (WaitCause::AwaitedConsumer, text.to_owned())
            }
            Wait::Full { unacked, waiting } => {
                let text =
                    format!("{unacked} messages are unacked and {waiting} wait; no more can");
                (WaitCause::TooManyUnacked, text)
            }
            Wait::Condemned => {
                let cause = self.letters.as_ref().and_then(|letters| letters.waits_for.clone());
                let moving = || "it has failed too often, and is to be let go".to_owned();
                (WaitCause::DeadLetter, cause.unwrap_or_else(moving))
            }
            Wait::Taker => self.who_could_take_it(),
        }
    }

    fn who_has_it(&self, holder: Option<Holder>) -> (WaitCause, String) {
        // An exclusive subscription has one place, if it is not pulled from.
        let seat = match holder {
            Some(holder) => self.seats.get(&holder),
            None => self.seats.values().next(),
        };
        let id = |seat: &Seat| seat.consumer.id.clone();
        match (seat, self.leases.holder()) {
            (Some(seat), _) if seat.session.is_none() => {
                let text = format!("consumer {} has it, and is not connected", id(seat));
                (WaitCause::AwaitedConsumer, text)
            }
            (Some(seat), _) => {
                let text = format!("consumer {} has it, and has not acked it", id(seat));
                (WaitCause::WithConsumer, text)
            }
            (None, Some(puller)) => {
                (WaitCause::WithConsumer, format!("consumer {puller} has pulled it"))
            }
            (None, None) => (WaitCause::WithConsumer, "a consumer has it".to_owned()),
        }
    }

    fn who_could_take_it(&self) -> (WaitCause, String) {
        let mut seats = self.seats.values();
        if self.seats.values().any(|seat| seat.session.is_some()) {
            let text = "the consumers have no credit or no room for it";
            (WaitCause::NoCredit, text.to_owned())
        } else if let Some(seat) = seats.next() {
            let text = format!("consumer {} is not connected, and awaited", seat.consumer.id);
            (WaitCause::AwaitedConsumer, text)
        } else {
            (WaitCause::NoConsumer, "there is no consumer".to_owned())
        }
    }
}

impl Broker {
    /// Tells how old the first message is that is not done: one read for each topic, and not in the
    /// subscription's task, which has better to do than to wait for the disk.
    pub(super) async fn with_ages(&self, mut description: Description) -> Description {
        let (storage, now) = (Arc::clone(&self.inner.storage), self.inner.env.now());
        for position in &mut description.positions {
            let Some(first) = position.oldest_unacked else { continue };
            // The first message always comes, however large it is.
            let one = ReadLimit { messages: 1, bytes: 1 };
            let read = storage.read(position.epoch, first, one).await;
            // One that is gone or damaged has no age; what it waits for says so.
            let message = read.ok().and_then(|messages| messages.into_iter().next());
            position.oldest_age = message.map(|message| now.since(message.published_at));
        }
        description
    }
}
