//! Pulling: messages taken one call at a time, under a lease instead of a session.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::delivery::{Delivery, Holder, Nack};
use super::error::BrokerError;
use super::session::{Credit, Lease, Leased, Missing, Pull, Pulled};
use super::sharing::Takers;
use super::subscription::{Damage, Subscription, Topic};
use crate::envelope::Label;
use crate::limits::{self, FRAME_BYTES};
use crate::names::ConsumerId;
use crate::record::{Epoch, StoredMessage};
use crate::storage::{ReadError, ReadLimit};

/// The leases of one subscription, all of one consumer, and the pulls that wait for messages.
#[derive(Debug, Default)]
pub(super) struct Leases {
    consumer: Option<ConsumerId>,
    next_pull: u64,
    pulls: BTreeMap<u64, PullLease>,
    waiting: VecDeque<Waiting>,
    /// What the next answer is to tell; no more than one for each topic.
    pub(super) missing: Vec<Missing>,
}

#[derive(Debug)]
struct PullLease {
    until: Instant,
    messages: BTreeSet<Lease>,
}

#[derive(Debug)]
struct Waiting {
    pull: Pull,
    until: Instant,
    reply: oneshot::Sender<Result<Pulled, BrokerError>>,
}

/// Pulls that may wait at one subscription.
const MAX_WAITING: usize = 64;
/// Reads of one pull before its subscription looks after others: it may come across many messages
/// that are not for it.
const READS: usize = 16;

impl Leases {
    /// `first_pull`: tokens from before a restart are not to be taken for new ones.
    pub(super) fn new(first_pull: u64) -> Self {
        Self { next_pull: first_pull, ..Self::default() }
    }

    /// Who holds leases.
    pub(super) fn holder(&self) -> Option<ConsumerId> {
        self.consumer.clone().filter(|_| !self.pulls.is_empty())
    }

    /// Whether somebody holds leases, or waits for some.
    pub(super) fn are_used(&self) -> bool {
        !self.pulls.is_empty() || self.waiting.iter().any(|waiting| !waiting.reply.is_closed())
    }

    /// A streaming session takes over: leases end.
    pub(super) fn clear(&mut self) {
        self.pulls.clear();
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let leases = self.pulls.values().map(|pull| pull.until);
        leases.chain(self.waiting.iter().map(|waiting| waiting.until)).min()
    }

    /// Answers those that wait behind another one and have waited long enough.
    fn dismiss_overdue(&mut self) {
        let now = Instant::now();
        for waiting in std::mem::take(&mut self.waiting) {
            if waiting.until <= now {
                let _ = waiting.reply.send(Ok(Pulled::default()));
            } else {
                self.waiting.push_back(waiting);
            }
        }
    }

    /// Forgets leases of messages that are not held any more.
    pub(super) fn forget_settled(&mut self, topics: &BTreeMap<Epoch, Topic>) {
        self.pulls.retain(|_, pull| {
            pull.messages.retain(|lease| {
                let (topic, holder) = (topics.get(&lease.topic), Holder::Pull(lease.pull));
                topic.is_some_and(|topic| topic.delivery.holds(lease.sequence, holder))
            });
            !pull.messages.is_empty()
        });
    }
}

impl Subscription {
    pub(super) fn on_pull(
        &mut self,
        pull: Pull,
        reply: oneshot::Sender<Result<Pulled, BrokerError>>,
    ) {
        if let Some(active) = self.other_holder(&pull.consumer) {
            let _ = reply.send(Err(BrokerError::SubscriptionBusy { active }));
        } else if self.leases.waiting.len() >= MAX_WAITING {
            let limit = MAX_WAITING as u64;
            let _ = reply.send(Err(BrokerError::LimitReached { what: "waiting pulls", limit }));
        } else {
            let until = Instant::now() + pull.wait;
            self.leases.waiting.push_back(Waiting { pull, until, reply });
        }
    }

    /// Answers the pulls for which there is something, or whose time is over. Says whether one has
    /// not looked at everything yet, and is to go on at once.
    pub(super) async fn serve_pulls(&mut self) -> bool {
        while let Some(waiting) = self.leases.waiting.pop_front() {
            if waiting.reply.is_closed() {
                continue;
            }
            if let Some(active) = self.other_holder(&waiting.pull.consumer) {
                let _ = waiting.reply.send(Err(BrokerError::SubscriptionBusy { active }));
                continue;
            }
            let (leased, more) = self.take(&waiting.pull).await;
            let missing = std::mem::take(&mut self.leases.missing);
            if leased.is_empty() && missing.is_empty() && more {
                self.leases.waiting.push_front(waiting);
                return true;
            }
            if leased.is_empty() && missing.is_empty() && waiting.until > Instant::now() {
                self.leases.waiting.push_front(waiting);
                self.leases.dismiss_overdue();
                return false;
            }
            if leased.is_empty()
                && missing.is_empty()
                && let Some(error) = self.data_loss()
            {
                let _ = waiting.reply.send(Err(error));
                continue;
            }
            let ranges = missing.iter().map(Missing::range).collect::<Vec<_>>();
            match waiting.reply.send(Ok(Pulled { leased, missing })) {
                Ok(()) => self.miss(ranges),
                Err(Ok(pulled)) => self.take_back(pulled),
                Err(Err(_)) => {}
            }
        }
        false
    }

    /// What a pull that gets nothing is to be told: a topic that cannot be read is not empty.
    fn data_loss(&self) -> Option<BrokerError> {
        let damaged = |topic: &Topic| {
            let Damage { sequence, retry } = topic.damaged?;
            let lost = ReadError::DataLoss { sequence };
            retry.is_none().then(|| BrokerError::read(&topic.name, lost))
        };
        self.topics.values().find_map(damaged)
    }

    /// Whoever pulled is gone: nothing of it has happened.
    fn take_back(&mut self, Pulled { leased, missing }: Pulled) {
        self.leases.missing.extend(missing);
        let unread = leased.iter().map(|leased| Lease { attempt: 0, ..leased.lease });
        let nack = Nack { delay: Some(Duration::ZERO), ..Nack::default() };
        self.fail_leases(&unread.collect::<Vec<_>>(), &nack);
    }

    /// Takes what there is for a pull, and says whether there may be more, which it has not looked
    /// at: of many messages that are for others a part is read at a time.
    async fn take(&mut self, pull: &Pull) -> (Vec<Leased>, bool) {
        self.leases.next_pull += 1;
        let number = self.leases.next_pull;
        self.tell_departed();
        let mut leased: Vec<Leased> = Vec::new();
        let (mut bytes, mut reads, mut more) = (0, 0, true);
        while more && reads < READS && leased.len() < pull.max_messages && bytes < FRAME_BYTES {
            let messages = pull.max_messages - leased.len();
            let room = ReadLimit { messages, bytes: FRAME_BYTES - bytes };
            let taken = match self.is_competing() {
                true => self.take_shared(number, room).await,
                false => self.take_exclusive(number, room).await,
            };
            reads += 1;
            more = taken.is_some();
            for one in taken.unwrap_or_default() {
                bytes += one.message.body.len();
                leased.push(one);
            }
        }
        if !leased.is_empty() {
            let allowed = self.record.ack_timeout.unwrap_or(limits::PULL_LEASE);
            let until = Instant::now() + pull.lease.unwrap_or(allowed);
            let messages = leased.iter().map(|leased| leased.lease).collect();
            self.leases.consumer = Some(pull.consumer.clone());
            self.leases.pulls.insert(number, PullLease { until, messages });
        }
        (leased, more)
    }

    /// What one read brings; `None` if there is nothing to read.
    async fn take_shared(&mut self, number: u64, room: ReadLimit) -> Option<Vec<Leased>> {
        let holder = Holder::Pull(number);
        let mut takers = Takers::only(holder, room.messages as u64, room.bytes as u64);
        let (epoch, from, limit) = self.next_run(&mut takers)?;
        let messages = self.read(epoch, from, limit).await;
        let routed = self.route(epoch, messages, &mut takers).remove(&holder);
        let topic = &self.topics.get(&epoch)?.name;
        let lease = |(message, attempt): (StoredMessage, u32)| {
            let sequence = message.sequence;
            let lease = Lease { topic: epoch, sequence, attempt, pull: number };
            Leased { topic: topic.clone(), lease, message }
        };
        Some(routed.unwrap_or_default().into_iter().map(lease).collect())
    }

    /// What one read brings; `None` if there is nothing to read.
    async fn take_exclusive(&mut self, number: u64, room: ReadLimit) -> Option<Vec<Leased>> {
        let window = u64::from(limits::MAX_OUTSTANDING_MESSAGES);
        let credit = Credit { messages: window, bytes: limits::MAX_OUTSTANDING_BYTES };
        let (epoch, from, mut limit) = self.next_read(credit, window)?;
        if self.record.filter.is_none() {
            limit.messages = limit.messages.min(room.messages);
        }
        let messages = self.read(epoch, from, limit).await;
        let now = self.now();
        let topic = self.topics.get_mut(&epoch)?;
        let Delivery::Exclusive(delivery) = &mut topic.delivery else { return None };
        let mut leased = Vec::new();
        for message in messages {
            if leased.len() >= room.messages {
                break;
            }
            let due = now.when(Label::of(&message.body).not_before());
            let wanted = self.record.wants(&message);
            topic.ahead.meet(message.sequence, !wanted);
            let Some(attempt) = delivery.offer(&message, wanted, due) else {
                continue;
            };
            let sequence = message.sequence;
            let lease = Lease { topic: epoch, sequence, attempt, pull: number };
            leased.push(Leased { topic: topic.name.clone(), lease, message });
        }
        Some(leased)
    }

    /// Hands messages back whose leases hold still.
    pub(super) fn on_release(&mut self, leases: &[Lease], nack: &Nack) {
        let pulls = &self.leases.pulls;
        let valid: Vec<Lease> = leases
            .iter()
            .filter(|lease| {
                pulls.get(&lease.pull).is_some_and(|pull| pull.messages.contains(lease))
            })
            .copied()
            .collect();
        self.fail_leases(&valid, nack);
    }

    /// Ends the leases whose time is over, as failures.
    pub(super) fn expire_leases(&mut self, now: Instant) {
        let expired = |pull: &PullLease| pull.until <= now;
        let leases: Vec<Lease> = (self.leases.pulls.values())
            .filter(|pull| expired(pull))
            .flat_map(|pull| pull.messages.iter().copied())
            .collect();
        self.leases.pulls.retain(|_, pull| !expired(pull));
        let reason = "its lease ended without an ack".to_owned();
        self.fail_leases(&leases, &Nack { reason, ..Nack::default() });
    }

    fn fail_leases(&mut self, leases: &[Lease], how: &Nack) {
        let now = self.now();
        for lease in leases {
            let Some(topic) = self.topics.get_mut(&lease.topic) else {
                continue;
            };
            let Lease { sequence, attempt, pull, .. } = *lease;
            let nack = Nack { sequence, attempt, ..how.clone() };
            topic.delivery.nack(Holder::Pull(pull), &[nack], now);
        }
        self.leases.forget_settled(&self.topics);
        self.tell_the_others();
    }
}
