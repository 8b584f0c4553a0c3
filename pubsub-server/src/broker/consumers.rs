//! Who consumes: attaching, standing by, taking over, leaving; acks and signs of life.

use std::time::Duration;

use tokio::time::Instant;

use super::delivery::Claim;
use super::error::BrokerError;
use super::session::{AckBatch, Event, Heartbeat, Session, SessionId, SessionTopic, Told, Welcome};
use super::subscription::{Keeper, Subscription};
use crate::limits;
use crate::names::ConsumerId;
use crate::record::ConsumerRecord;

impl Subscription {
    /// Who holds the place, if it is not this consumer.
    pub(super) fn other_holder(&self, consumer: &ConsumerId) -> Option<ConsumerId> {
        // A session is never pulled from, not even by its own consumer.
        let session = self.active.as_ref().map(|active| active.consumer.id.clone());
        session.or_else(|| self.holder().filter(|holder| holder != consumer))
    }

    pub(super) async fn on_attach(&mut self, mut session: Session) {
        let consumer = &session.consumer;
        if self.is_overtaken(consumer) {
            let error = BrokerError::Superseded(consumer.id.clone());
            session.tell(Event::Ended(error));
            return;
        }
        if let Some(active) = &mut self.active
            && active.consumer.id == consumer.id
        {
            active.tell(Event::Ended(BrokerError::Superseded(consumer.id.clone())));
            self.activate(session).await;
        } else if let Some(holder) = self.holder()
            && holder != consumer.id
        {
            session.tell(Event::Standby(holder));
            self.take_claimed_acks(&mut session);
            self.wait_in_line(session);
        } else {
            self.activate(session).await;
        }
    }

    /// Whether a later connection of the same instance was here already: connections overtake
    /// each other.
    fn is_overtaken(&self, consumer: &ConsumerRecord) -> bool {
        let sessions = self.active.iter().chain(&self.standby).map(|session| &session.consumer);
        sessions.chain(&self.record.consumer).any(|known| {
            (&known.id, known.instance) == (&consumer.id, consumer.instance)
                && known.attach >= consumer.attach
        })
    }

    /// What a consumer has received counts, also if it has to stand by. What it holds and hands
    /// back is another one's by now.
    fn take_claimed_acks(&mut self, session: &mut Session) {
        for (epoch, claim) in &session.claims {
            if let Some(topic) = self.topics.get_mut(epoch)
                && topic.delivery.cursor().generation == claim.cursor_generation
            {
                topic.delivery.ack(&claim.acked);
                topic.delivery.miss(&claim.missed);
            }
        }
        // The hello counts as batch 0, to be confirmed if there was something in it.
        session.acks_taken = (!session.claims.is_empty()).then_some(0);
    }

    /// Whose turn it is, connected or awaited.
    pub(super) fn holder(&self) -> Option<ConsumerId> {
        let on_record = self.record.consumer.as_ref().filter(|_| self.grace.is_some());
        let consumer = self.active.as_ref().map(|active| &active.consumer).or(on_record);
        consumer.map(|consumer| consumer.id.clone()).or_else(|| self.leases.holder())
    }

    pub(super) fn wait_in_line(&mut self, mut session: Session) {
        if let Some(older) =
            self.standby.iter().position(|other| other.consumer.id == session.consumer.id)
            && let Some(mut older) = self.standby.remove(older)
        {
            older.tell(Event::Ended(BrokerError::Superseded(session.consumer.id.clone())));
        }
        self.standby.retain(|other| !other.sender().is_closed());
        if self.standby.len() >= limits::MAX_STANDBY {
            let limit = limits::MAX_STANDBY as u64;
            session.tell(Event::Ended(BrokerError::LimitReached { what: "standby", limit }));
            return;
        }
        self.standby.push_back(session);
    }

    /// Makes a session the active one, durably, before it is told so: its place has to survive a
    /// restart, and so have the acks that it brought along.
    pub(super) async fn activate(&mut self, mut session: Session) {
        self.leases.clear();
        let claims = std::mem::take(&mut session.claims);
        let now = Instant::now();
        let mut topics = Vec::with_capacity(self.topics.len());
        for (epoch, topic) in &mut self.topics {
            let none =
                Claim { cursor_generation: topic.delivery.cursor().generation, ..Claim::default() };
            let dropped = topic.delivery.attach(claims.get(epoch).unwrap_or(&none), now);
            topic.told = topic.tell();
            // It may be readable again; if not, this consumer is to hear of it.
            topic.damaged = None;
            topics.push(SessionTopic { dropped, ..topic.describe(*epoch) });
        }
        let known = self.record.consumer.as_ref();
        let moved = known.is_none_or(|known| {
            known.id != session.consumer.id || known.instance != session.consumer.instance
        });
        self.record.consumer = Some(session.consumer.clone());
        self.record_changed |= moved;
        if let Err(error) = self.settle_saves().await {
            session.tell(Event::Ended(error.into()));
            self.active = None;
            self.grace = Some(now + limits::GRACE);
            return;
        }
        topics.retain(|topic| self.topics.contains_key(&topic.epoch));
        // A topic that is gone is told before its successor of the same name.
        topics.sort_by_key(|topic| !self.topics.get(&topic.epoch).is_some_and(|topic| topic.gone));
        let epoch = (self.keeper == Keeper::Server).then_some(self.record.epoch);
        session.tell(Event::Welcome(Welcome { epoch, topics }));
        (session.acks_taken, session.acks_confirmed) = (Some(0), Some(0));
        self.grace = None;
        self.active = Some(session);
        self.tell_departed();
    }

    pub(super) async fn on_goodbye(&mut self, id: SessionId) {
        self.standby.retain(|session| session.id != id);
        if self.active.as_ref().is_some_and(|active| active.id == id) {
            self.active = None;
            self.release_place();
        }
    }

    pub(super) async fn on_lost(&mut self) {
        self.active = None;
        if self.keeper == Keeper::Client {
            self.ended = true;
        } else {
            self.grace = Some(Instant::now() + limits::GRACE);
        }
    }

    /// The consumer gives up its place, or its grace is over.
    pub(super) fn release_place(&mut self) {
        self.grace = None;
        self.record.consumer = None;
        self.record_changed = true;
        for topic in self.topics.values_mut() {
            topic.delivery.detach();
        }
        if self.keeper == Keeper::Client {
            self.ended = true;
        }
    }

    /// Lets the next one in if nobody holds the place.
    pub(super) async fn promote_if_free(&mut self) {
        while !self.standby.is_empty() && self.holder().is_none() {
            let Some(next) = self.standby.pop_front() else {
                return;
            };
            if !next.sender().is_closed() {
                self.activate(next).await;
            }
        }
    }

    pub(super) fn session(&mut self, id: SessionId) -> Option<&mut Session> {
        self.active.iter_mut().chain(&mut self.standby).find(|session| session.id == id)
    }

    pub(super) fn on_acks(&mut self, id: SessionId, batch: AckBatch) {
        let now = Instant::now();
        if let Err(error) = self.check_acks(&batch) {
            if let Some(session) = self.session(id) {
                session.tell(Event::Ended(error));
            }
            return;
        }
        let Some(session) = self.active.iter_mut().chain(&mut self.standby).find(|s| s.id == id)
        else {
            return;
        };
        session.acks_taken = session.acks_taken.max(Some(batch.number));
        let active = self.active.as_ref().is_some_and(|active| active.id == id);
        for acks in batch.topics {
            let epoch = self.numbers.get(&acks.topic);
            let Some(topic) = epoch.and_then(|epoch| self.topics.get_mut(epoch)) else {
                continue;
            };
            if topic.delivery.cursor().generation != acks.cursor_generation {
                continue;
            }
            topic.delivery.ack(&acks.acked);
            topic.delivery.miss(&acks.missed);
            // Whoever does not hold the place can say what it has received, but moves nothing.
            if active
                && let Some(rewound) = topic.delivery.nack(&acks.nacked, now)
                && let Some(session) = &mut self.active
            {
                session.tell(Event::Rewind(topic.number, rewound));
            }
        }
        self.tell_departed();
    }

    /// Nobody can have received what is not committed. A topic that has left may be acked still.
    fn check_acks(&self, batch: &AckBatch) -> Result<(), BrokerError> {
        for acks in &batch.topics {
            if !(1..self.next_number).contains(&acks.topic) {
                let text = format!("no topic of this session has number {}", acks.topic);
                return Err(BrokerError::Protocol(text));
            }
            let epoch = self.numbers.get(&acks.topic);
            let Some(topic) = epoch.and_then(|epoch| self.topics.get(epoch)) else {
                continue;
            };
            let last_acked = acks.acked.last().map_or(0, |range| *range.end());
            let last_missed = acks.missed.last().map_or(0, |range| *range.end());
            let last_nacked = acks.nacked.iter().map(|nack| nack.sequence).max().unwrap_or(0);
            let (sequence, head) =
                (last_acked.max(last_nacked).max(last_missed), topic.delivery.head());
            if sequence > head {
                let topic = topic.name.clone();
                return Err(BrokerError::BeyondHead { topic, sequence, head });
            }
        }
        Ok(())
    }

    pub(super) fn on_ping(&mut self, id: SessionId, nonce: u64) {
        if let Some(session) = self.session(id) {
            session.last_nonce = nonce;
            session.next_heartbeat = Instant::now();
        }
        self.beat(Instant::now());
    }

    /// Sends the heartbeats that are due. The active session is told the heads that have moved.
    pub(super) fn beat(&mut self, now: Instant) {
        let due = |session: &&mut Session| session.next_heartbeat <= now;
        if let Some(session) = self.active.as_mut().filter(due) {
            let moved = self.topics.values_mut().filter_map(|topic| {
                let told = topic.tell();
                (told != std::mem::replace(&mut topic.told, told)).then_some(told)
            });
            session.beat(moved.collect());
        }
        for session in self.standby.iter_mut().filter(due) {
            session.beat(Vec::new());
        }
    }

    pub(super) fn next_deadline(&mut self) -> Instant {
        let now = Instant::now();
        let beats = self.active.iter().chain(&self.standby).map(|session| session.next_heartbeat);
        let backoffs = self.topics.values().filter_map(|topic| topic.delivery.ready_at(now));
        let retries = self.topics.values().filter_map(|topic| topic.damaged?.retry);
        let others = [self.grace, self.retry_save, self.leases.next_deadline()];
        let far = now + Duration::from_secs(3600);
        beats
            .chain(backoffs)
            .chain(retries)
            .chain(others.into_iter().flatten())
            .min()
            .unwrap_or(far)
    }

    pub(super) async fn on_time(&mut self) {
        let now = Instant::now();
        self.beat(now);
        if self.grace.is_some_and(|grace| grace <= now) {
            let consumer = self.record.consumer.as_ref().map(|consumer| consumer.id.as_str());
            tracing::info!(subscription = %self.record.name, consumer, "grace is over");
            self.release_place();
        }
        self.expire_leases(now);
    }
}

impl Session {
    pub(super) fn beat(&mut self, heads: Vec<Told>) {
        self.next_heartbeat = Instant::now() + self.heartbeat;
        let (nonce, last_delivery) = (self.last_nonce, self.last_delivery);
        self.tell(Event::Heartbeat(Heartbeat { nonce, last_delivery, heads }));
    }
}
