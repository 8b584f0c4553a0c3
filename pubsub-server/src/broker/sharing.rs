//! Moving messages from the log to several consumers: each to one of them, fair by credit.

use std::collections::BTreeMap;

use tokio::time::Instant;

use super::consumers::Seat;
use super::delivering::Next;
use super::delivery::{Delivery, Holder, Key, Out, Terms};
use super::subscription::Subscription;
use crate::envelope::Label;
use crate::limits;
use crate::record::{Epoch, StoredMessage, SubscriptionKind};
use crate::storage::ReadLimit;

/// Messages with their attempts, by who is to get them.
pub(super) type Routed = BTreeMap<Holder, Vec<(StoredMessage, u32)>>;

/// Who could take messages now.
#[derive(Debug, Default)]
pub(super) struct Takers(Vec<Taker>);

#[derive(Debug)]
struct Taker {
    holder: Holder,
    /// Messages that it has, of all topics.
    out: u64,
    /// Its credit, as far as it is left.
    messages: u64,
    bytes: u64,
    /// It has nothing of the topic in question.
    alone: bool,
}

impl Takers {
    /// One that takes as much as it is said to.
    pub(super) fn only(holder: Holder, messages: u64, bytes: u64) -> Self {
        Self(vec![Taker { holder, out: 0, messages, bytes, alone: true }])
    }

    /// From now on it is about this topic.
    fn look_at(&mut self, out: impl Fn(Holder) -> Out) {
        for taker in &mut self.0 {
            taker.alone = out(taker.holder).messages == 0;
        }
    }

    /// Who is to take a message of so many bytes: the one who has the others of its key, or else
    /// whoever has least. One who has nothing of a topic takes one message, however large.
    fn pick(&self, owner: Option<Holder>, bytes: u64) -> Option<Holder> {
        let able = self.0.iter().filter(|taker| {
            let fits = taker.messages > 0 && taker.bytes >= bytes;
            owner.is_none_or(|owner| owner == taker.holder) && (taker.alone || fits)
        });
        able.min_by_key(|taker| taker.out).map(|taker| taker.holder)
    }

    fn took(&mut self, holder: Holder, bytes: u64) {
        for taker in self.0.iter_mut().filter(|taker| taker.holder == holder) {
            taker.out += 1;
            taker.messages = taker.messages.saturating_sub(1);
            taker.bytes = taker.bytes.saturating_sub(bytes);
            taker.alone = false;
        }
    }
}

impl Subscription {
    /// Sends some messages, each to one of the consumers.
    pub(super) async fn share(&mut self) -> Next {
        let mut takers = self.takers();
        let Some((epoch, from, limit)) = self.next_run(&mut takers) else {
            let full = self.active().any(|session| !session.has_room());
            return if full { Next::Room } else { Next::Idle };
        };
        let messages = self.read(epoch, from, limit).await;
        let routed = self.route(epoch, messages, &mut takers);
        let Some(topic) = self.topics.get(&epoch) else {
            return Next::Again;
        };
        let caught_up = topic.delivery.passed() == topic.delivery.cursor().head();
        let number = topic.number;
        for (holder, messages) in routed {
            let session = self.seats.get_mut(&holder).and_then(|seat| seat.session.as_mut());
            if let Some(session) = session {
                session.deliver(number, 0, messages);
            }
        }
        if caught_up {
            // Which none of them can see from what it receives.
            self.active().for_each(|session| session.hurry());
        }
        Next::Again
    }

    /// The consumers whose streams have room, with what is left of their credit.
    fn takers(&mut self) -> Takers {
        let mut out: BTreeMap<Holder, Out> = BTreeMap::new();
        // What is held of topics that are gone takes no room from the others.
        for topic in self.topics.values().filter(|topic| !topic.gone) {
            if let Delivery::Competing(delivery) = &topic.delivery {
                for (holder, here) in delivery.all_out() {
                    let all = out.entry(holder).or_default();
                    *all = all.and(here);
                }
            }
        }
        let taker = |(holder, seat): (&Holder, &mut Seat)| {
            let session = seat.session.as_mut()?;
            if !session.has_room() {
                return None;
            }
            let Out { messages, bytes } = out.get(holder).copied().unwrap_or_default();
            Some(Taker {
                holder: *holder,
                out: messages,
                messages: session.credit.messages.saturating_sub(messages),
                bytes: session.credit.bytes.saturating_sub(bytes),
                alone: false,
            })
        };
        Takers(self.seats.iter_mut().filter_map(taker).collect())
    }

    /// Which topic's turn it is, from where and how much.
    pub(super) fn next_run(&mut self, takers: &mut Takers) -> Option<(Epoch, u64, ReadLimit)> {
        let now = Instant::now();
        for _ in 0..self.turns.len() {
            self.turns.rotate_left(1);
            let epoch = *self.turns.back()?;
            let Some(topic) = self.topics.get_mut(&epoch) else {
                continue;
            };
            if !topic.is_readable(now) {
                continue;
            }
            let Delivery::Competing(delivery) = &mut topic.delivery else {
                continue;
            };
            takers.look_at(|holder| delivery.out(holder));
            let can = |owner, bytes| takers.pick(owner, bytes).is_some();
            if let Some((from, count)) = delivery.wants(now, can) {
                let messages = usize::try_from(count).unwrap_or(usize::MAX);
                let messages = messages.min(limits::MAX_FRAME_MESSAGES);
                return Some((epoch, from, ReadLimit { messages, bytes: limits::FRAME_BYTES }));
            }
        }
        None
    }

    /// Decides who gets the messages that were read.
    pub(super) fn route(
        &mut self,
        epoch: Epoch,
        messages: Vec<StoredMessage>,
        takers: &mut Takers,
    ) -> Routed {
        let mut routed = Routed::new();
        let now = self.now();
        let Some(topic) = self.topics.get_mut(&epoch) else {
            return routed;
        };
        let Delivery::Competing(delivery) = &mut topic.delivery else {
            return routed;
        };
        let by_key = self.record.kind == SubscriptionKind::KeyOrdered;
        for message in messages {
            let label = Label::of(&message.body);
            let key = label.ordering_key().filter(|_| by_key).map(Key::from);
            let terms = Terms { key, due: now.when(label.not_before()) };
            let pick = |owner, bytes| takers.pick(owner, bytes);
            let wanted = self.record.wants(&message);
            topic.ahead.meet(message.sequence, !wanted);
            if let Some((holder, attempt)) = delivery.route(&message, terms, wanted, pick) {
                takers.took(holder, message.body.len() as u64);
                routed.entry(holder).or_default().push((message, attempt));
            }
        }
        routed
    }
}
