//! Moving messages from the log to the active session, as far as its credit goes.

use std::time::Duration;

use tokio::time::Instant;

use super::session::{Credit, Deliver, Event, GapReason};
use super::subscription::{Damage, Subscription};
use crate::limits;
use crate::record::{Epoch, StoredMessage};
use crate::storage::{ReadError, ReadLimit};

/// How long to wait after a read that may succeed later.
const READ_RETRY: Duration = Duration::from_secs(1);

impl Subscription {
    /// Sends one frame, if there is something to send and room for it. Answers whether there may
    /// be more.
    pub(super) async fn deliver(&mut self) -> bool {
        self.serve_pulls().await;
        for _ in 0..self.turns.len() {
            let Some(session) = &mut self.active else {
                return false;
            };
            if !session.has_room() {
                return true;
            }
            let credit = session.credit;
            let next = self.next_read(credit, credit.messages);
            let Some((epoch, from, limit)) = next else {
                return false;
            };
            let messages = self.read(epoch, from, limit).await;
            let fits = messages.first().is_none_or(|first| first.body.len() <= limit.bytes);
            if fits || self.topics.get(&epoch).is_some_and(|topic| topic.delivery.held() == 0) {
                self.send(epoch, limit, messages);
                return true;
            }
            // The message has to wait for credit; another topic's may be smaller.
        }
        false
    }

    pub(super) fn send(&mut self, epoch: Epoch, limit: ReadLimit, messages: Vec<StoredMessage>) {
        let topic = self.topics.get_mut(&epoch);
        let (Some(topic), Some(session)) = (topic, &mut self.active) else {
            return;
        };
        let mut out = Vec::with_capacity(messages.len());
        let mut bytes = 0;
        let mut passed_over = false;
        for message in messages {
            let size = message.body.len();
            if bytes + size > limit.bytes && !out.is_empty() {
                break;
            }
            if let Some(attempt) = topic.delivery.offer(&message, &self.record.name) {
                bytes += size;
                out.push((message, attempt));
                passed_over = false;
            } else {
                passed_over = true;
            }
        }
        if passed_over && topic.delivery.passed() == topic.delivery.head() {
            // The consumer has caught up, which it cannot see from what it receives.
            session.next_heartbeat = Instant::now();
        }
        if out.is_empty() {
            return;
        }
        let first_delivery = session.last_delivery + 1;
        session.last_delivery += out.len() as u64;
        session.tell(Event::Deliver(Deliver {
            topic: topic.number,
            first_delivery,
            generation: topic.delivery.generation(),
            messages: out,
        }));
    }

    /// Which topic's turn it is, from where and how much, within the credit. A topic with nothing
    /// out always gets one message, so that no other topic can starve it.
    pub(super) fn next_read(
        &mut self,
        credit: Credit,
        window: u64,
    ) -> Option<(Epoch, u64, ReadLimit)> {
        let now = Instant::now();
        // What is held of topics that are gone takes no room from the others.
        let present = || self.topics.values().filter(|topic| !topic.gone);
        let out: u64 = present().map(|topic| topic.delivery.held() as u64).sum();
        let bytes: u64 = present().map(|topic| topic.delivery.held_bytes()).sum();
        for _ in 0..self.turns.len() {
            self.turns.rotate_left(1);
            let epoch = *self.turns.back()?;
            let Some(topic) = self.topics.get_mut(&epoch) else {
                continue;
            };
            let retry = topic.damaged.and_then(|damage| damage.retry);
            if retry.is_some_and(|at| at <= now) {
                topic.damaged = None;
            }
            if topic.damaged.is_some() || topic.gone {
                continue;
            }
            let alone = topic.delivery.held() == 0;
            let messages = credit.messages.saturating_sub(out).max(u64::from(alone));
            let bytes = credit.bytes.saturating_sub(bytes).max(u64::from(alone));
            if messages == 0 || bytes == 0 {
                continue;
            }
            let Some((from, room)) = topic.delivery.wants(window, now) else {
                continue;
            };
            let messages = usize::try_from(messages.min(room)).unwrap_or(usize::MAX);
            let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
            let limit = ReadLimit {
                messages: messages.min(limits::MAX_FRAME_MESSAGES),
                bytes: bytes.min(limits::FRAME_BYTES),
            };
            return Some((epoch, from, limit));
        }
        None
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
            ReadError::Trimmed { first } => self.tell_missing(epoch, first, GapReason::Retention),
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
                if let Some(session) = &mut self.active {
                    session.tell(Event::DataLoss(topic.number, sequence));
                }
            }
        }
        Vec::new()
    }
}
