//! Moving messages from the log to those who consume, as far as their credit goes.

use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;

use super::delivery::{Delivery, Out};
use super::session::{Credit, Event, GapReason};
use super::subscription::{Damage, Keeper, Subscription, Topic};
use crate::envelope::{self, Label};
use crate::limits;
use crate::record::{Epoch, StoredMessage, SubscriptionRecord};
use crate::storage::{ReadError, ReadLimit};

/// How long to wait after a read that may succeed later.
const READ_RETRY: Duration = Duration::from_secs(1);

/// When to go on delivering.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// When something has changed.
    Idle,
    /// When a stream has room.
    Room,
    /// At once: there may be more.
    Again,
}

impl Subscription {
    /// Sends a frame, or one to each of several consumers, if there is something to send and room
    /// for it.
    pub(super) async fn deliver(&mut self) -> Next {
        let more = self.serve_pulls().await;
        let next =
            if self.is_competing() { self.share().await } else { self.deliver_to_one().await };
        if more { Next::Again } else { next }
    }

    /// The ways to the active sessions whose streams have no room.
    pub(super) fn without_room(&mut self) -> Vec<mpsc::Sender<Event>> {
        // One that is gone never has room, and is heard of otherwise.
        let full = self.active().filter(|session| !session.is_gone());
        full.filter_map(|session| (!session.has_room()).then(|| session.sender())).collect()
    }

    async fn deliver_to_one(&mut self) -> Next {
        for _ in 0..self.turns.len() {
            let Some(session) = self.active().next() else {
                return Next::Idle;
            };
            if !session.has_room() {
                return Next::Room;
            }
            let credit = session.credit;
            // What a filter leaves out lies between, and is nothing that the consumer holds.
            let least = if self.record.filter.is_some() { limits::FILTERED_WINDOW } else { 0 };
            let next = self.next_read(credit, credit.messages.max(least));
            let Some((epoch, from, limit)) = next else {
                return Next::Idle;
            };
            let messages = self.read(epoch, from, limit).await;
            let fits = messages.first().is_none_or(|first| first.body.len() <= limit.bytes);
            if fits || self.topics.get(&epoch).is_some_and(|topic| topic.delivery.held() == 0) {
                self.send(epoch, limit, messages);
                return Next::Again;
            }
            // The message has to wait for credit; another topic's may be smaller.
        }
        Next::Idle
    }

    fn send(&mut self, epoch: Epoch, limit: ReadLimit, messages: Vec<StoredMessage>) {
        // A reader sees the log as it is.
        let (now, delays) = (self.now(), self.keeper == Keeper::Server);
        let held = self.outstanding().messages;
        let topic = self.topics.get_mut(&epoch);
        let session = self.seats.values_mut().find_map(|seat| seat.session.as_mut());
        let (Some(topic), Some(session)) = (topic, session) else {
            return;
        };
        let Delivery::Exclusive(delivery) = &mut topic.delivery else {
            return;
        };
        let mut out = Vec::with_capacity(messages.len());
        let mut bytes = 0;
        let mut passed_over = false;
        // One may always go, or there would have been no read.
        let most = session.credit.messages.saturating_sub(held).max(1);
        for message in messages {
            let size = message.body.len();
            if bytes + size > limit.bytes && !out.is_empty() || out.len() as u64 >= most {
                break;
            }
            let due = now.when(Label::of(&message.body).not_before()).filter(|_| delays);
            let wanted = self.record.wants(&message);
            topic.ahead.meet(message.sequence, !wanted);
            if let Some(attempt) = delivery.offer(&message, wanted, due) {
                bytes += size;
                out.push((message, attempt));
                passed_over = false;
            } else {
                passed_over = true;
            }
        }
        if passed_over && delivery.passed() == delivery.cursor().head() {
            // The consumer has caught up, which it cannot see from what it receives.
            session.next_heartbeat = Instant::now();
        }
        if out.is_empty() {
            topic.reach = (topic.reach * 2).min(limits::MAX_FRAME_MESSAGES as u64);
            return;
        }
        topic.reach = 1;
        session.deliver(topic.number, delivery.generation(), out);
    }

    /// Which topic's turn it is, from where and how much, within the credit. A topic with nothing
    /// out always gets one message, so that no other topic can starve it.
    pub(super) fn next_read(
        &mut self,
        credit: Credit,
        window: u64,
    ) -> Option<(Epoch, u64, ReadLimit)> {
        let now = Instant::now();
        let Out { messages: out, bytes } = self.outstanding();
        for _ in 0..self.turns.len() {
            self.turns.rotate_left(1);
            let epoch = *self.turns.back()?;
            let Some(topic) = self.topics.get_mut(&epoch) else {
                continue;
            };
            if !topic.is_readable(now) {
                continue;
            }
            let Delivery::Exclusive(delivery) = &mut topic.delivery else {
                continue;
            };
            let alone = delivery.held() == 0;
            let messages = credit.messages.saturating_sub(out).max(u64::from(alone));
            let bytes = credit.bytes.saturating_sub(bytes).max(u64::from(alone));
            if messages == 0 || bytes == 0 {
                continue;
            }
            let Some((from, room)) = delivery.wants(window.max(topic.reach), now) else {
                continue;
            };
            let messages = messages.max(topic.reach).min(room);
            let messages = usize::try_from(messages).unwrap_or(usize::MAX);
            let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
            let limit = ReadLimit {
                messages: messages.min(limits::MAX_FRAME_MESSAGES),
                bytes: bytes.min(limits::FRAME_BYTES),
            };
            return Some((epoch, from, limit));
        }
        None
    }

    /// What is with the one consumer. What it holds of topics that are gone takes no room from the
    /// others.
    fn outstanding(&self) -> Out {
        let present = self.topics.values().filter(|topic| !topic.gone);
        let held = present.map(|topic| match &topic.delivery {
            Delivery::Exclusive(delivery) => delivery.out(),
            Delivery::Competing(_) => Out::default(),
        });
        held.fold(Out::default(), Out::and)
    }

    /// Reads a topic; what cannot be read is told, and empty.
    pub(super) async fn read(
        &mut self,
        epoch: Epoch,
        from: u64,
        limit: ReadLimit,
    ) -> Vec<StoredMessage> {
        let error = match self.storage.read(epoch, from, limit).await {
            Ok(messages) => return messages,
            Err(error) => error,
        };
        let Some(topic) = self.topics.get_mut(&epoch) else {
            return Vec::new();
        };
        match error {
            ReadError::Trimmed { first } => {
                let purged = from < topic.purged.load(Ordering::Acquire);
                let reason = if purged { GapReason::Purged } else { GapReason::Retention };
                self.tell_missing(epoch, first, reason);
            }
            // The broker is about to tell that the topic is gone; or the system has run short of
            // something, such as open files.
            ReadError::NoTopic | ReadError::Storage(_) => {
                tracing::warn!(topic = %topic.name, from, %error, "cannot read for now");
                let retry = Some(Instant::now() + READ_RETRY);
                topic.damaged = Some(Damage { sequence: from, retry });
            }
            ReadError::DataLoss { sequence } => {
                tracing::error!(topic = %topic.name, from, %error, "cannot read");
                topic.damaged = Some(Damage { sequence, retry: None });
                let number = topic.number;
                self.active().for_each(|session| session.tell(Event::DataLoss(number, sequence)));
            }
        }
        Vec::new()
    }
}

impl SubscriptionRecord {
    /// Whether it is to be shown a message: one that names its recipients, if it is one of them,
    /// whatever its filter says; and else, if its filter says so.
    pub(super) fn wants(&self, message: &StoredMessage) -> bool {
        match &self.filter {
            Some(filter) if message.recipients.is_empty() => {
                cfg!(pubsub_break = "filter_is_ignored")
                    || filter.matches(&envelope::attributes(&message.body))
            }
            Some(_) | None => message.is_for(&self.name),
        }
    }
}

impl Topic {
    /// Whether there is something to be read, as far as it is known.
    pub(super) fn is_readable(&mut self, now: Instant) -> bool {
        let retry = self.damaged.and_then(|damage| damage.retry);
        if retry.is_some_and(|at| at <= now) {
            self.damaged = None;
        }
        self.damaged.is_none() && !self.gone
    }
}
