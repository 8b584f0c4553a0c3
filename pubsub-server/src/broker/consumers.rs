//! Who consumes: attaching, standing by, taking over, leaving; acks and signs of life.

use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::time::Instant;

use super::delivery::{Claim, Holder};
use super::error::BrokerError;
use super::events::{Presence, What};
use super::session::{AckBatch, Event, Gone, Session, SessionId, SessionTopic, Welcome};
use super::subscription::{Keeper, Subscription};
use crate::limits;
use crate::names::ConsumerId;
use crate::record::{ConsumerRecord, SubscriptionKind};

/// The place of a consumer that is active, or awaited within its grace.
#[derive(Debug)]
pub(super) struct Seat {
    pub(super) consumer: ConsumerRecord,
    pub(super) session: Option<Session>,
    /// Until when it keeps its place without a session.
    pub(super) grace: Option<Instant>,
}

/// How a consumer goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Parting {
    /// As it said.
    Goodbye,
    /// Its grace is over.
    Lost,
}

impl Seat {
    /// Of a consumer that is not connected.
    pub(super) fn awaited(consumer: ConsumerRecord) -> Self {
        Self { consumer, session: None, grace: Some(Instant::now() + limits::GRACE) }
    }
}

impl Subscription {
    /// Whether all consumers are active, and not one.
    pub(super) fn is_competing(&self) -> bool {
        self.record.kind != SubscriptionKind::Exclusive
    }

    /// The sessions of those that are active.
    pub(super) fn active(&mut self) -> impl Iterator<Item = &mut Session> {
        self.seats.values_mut().filter_map(|seat| seat.session.as_mut())
    }

    /// All sessions.
    pub(super) fn sessions(&mut self) -> impl Iterator<Item = &mut Session> {
        let active = self.seats.values_mut().filter_map(|seat| seat.session.as_mut());
        active.chain(&mut self.standby)
    }

    fn session(&mut self, id: SessionId) -> Option<&mut Session> {
        self.sessions().find(|session| session.id == id)
    }

    /// The place that a session has, if it is active.
    fn place_of(&self, id: SessionId) -> Option<Holder> {
        let has = |seat: &Seat| seat.session.as_ref().is_some_and(|session| session.id == id);
        self.seats.iter().find(|(_, seat)| has(seat)).map(|(holder, _)| *holder)
    }

    fn seat_of(&self, consumer: &ConsumerId) -> Option<Holder> {
        let found = self.seats.iter().find(|(_, seat)| seat.consumer.id == *consumer);
        found.map(|(holder, _)| *holder)
    }

    /// `gone` resolves when the session's stream is.
    pub(super) async fn on_attach(&mut self, mut session: Session, gone: Gone) {
        let id = session.id;
        self.losses.push(Box::pin(gone.map(move |_| id)));
        let consumer = &session.consumer;
        if self.is_overtaken(consumer) {
            let error = BrokerError::Superseded(consumer.id.clone());
            session.tell(Event::Ended(error));
            return;
        }
        if let Some(holder) = self.seat_of(&consumer.id) {
            self.activate(holder, session).await;
        } else if self.is_competing() && self.seats.len() >= limits::MAX_CONSUMERS {
            let limit = limits::MAX_CONSUMERS as u64;
            session.tell(Event::Ended(BrokerError::LimitReached { what: "consumers", limit }));
        } else if let Some(holder) = self.exclusive_holder()
            && holder != consumer.id
        {
            let waits = session.consumer.id.clone();
            session.tell(Event::Standby(holder.clone()));
            self.tell_presence(&waits, Presence::Standby(holder));
            self.take_claimed_acks(&mut session);
            self.wait_in_line(session);
        } else {
            self.seat(session).await;
        }
    }

    /// Whether a later connection of the same instance was here already: connections overtake
    /// each other.
    fn is_overtaken(&self, consumer: &ConsumerRecord) -> bool {
        let standby = self.standby.iter().map(|session| &session.consumer);
        self.seats.values().map(|seat| &seat.consumer).chain(standby).any(|known| {
            (&known.id, known.instance) == (&consumer.id, consumer.instance)
                && known.attach >= consumer.attach
        })
    }

    /// What a consumer has received counts, also if it has to stand by. What it holds and hands
    /// back is another one's by now.
    fn take_claimed_acks(&mut self, session: &mut Session) {
        for (epoch, claim) in &session.claims {
            if let Some(topic) = self.topics.get_mut(epoch)
                && topic.delivery.cursor().record().generation == claim.cursor_generation
            {
                topic.delivery.ack(&claim.acked);
                topic.delivery.miss(&claim.missed);
            }
        }
        // The hello counts as batch 0, to be confirmed if there was something in it.
        session.acks_taken = (!session.claims.is_empty()).then_some(0);
    }

    /// Whose turn it is, connected or awaited; nobody's in particular where all are active.
    pub(super) fn exclusive_holder(&self) -> Option<ConsumerId> {
        if self.is_competing() {
            return None;
        }
        let seat = self.seats.values().next().map(|seat| seat.consumer.id.clone());
        seat.or_else(|| self.leases.holder())
    }

    /// Who keeps a consumer from pulling.
    pub(super) fn other_holder(&self, consumer: &ConsumerId) -> Option<ConsumerId> {
        let connected = self.seats.values().any(|seat| seat.session.is_some());
        // A session is never pulled from, not even by its own consumer.
        self.exclusive_holder().filter(|holder| connected || holder != consumer)
    }

    fn wait_in_line(&mut self, mut session: Session) {
        if let Some(older) =
            self.standby.iter().position(|other| other.consumer.id == session.consumer.id)
            && let Some(mut older) = self.standby.remove(older)
        {
            older.tell(Event::Ended(BrokerError::Superseded(session.consumer.id.clone())));
        }
        self.standby.retain(|other| !other.is_gone());
        if self.standby.len() >= limits::MAX_STANDBY {
            let limit = limits::MAX_STANDBY as u64;
            session.tell(Event::Ended(BrokerError::LimitReached { what: "standby", limit }));
            return;
        }
        self.standby.push_back(session);
    }

    /// Gives a consumer a place that it did not have.
    async fn seat(&mut self, session: Session) {
        self.next_seat += 1;
        self.unattended = None;
        self.activate(Holder::Seat(self.next_seat), session).await;
    }

    /// Makes a session the active one of a place, durably, before it is told so: its place has to
    /// survive a restart, and so have the acks that it brought along.
    async fn activate(&mut self, holder: Holder, mut session: Session) {
        if !self.is_competing() {
            self.leases.clear();
        }
        let consumer = session.consumer.clone();
        let before = self.seats.insert(holder, Seat::awaited(consumer.clone()));
        let kept_place = before.as_ref().is_some_and(|before| {
            let ConsumerRecord { id, instance, .. } = &before.consumer;
            (id, instance) == (&consumer.id, &consumer.instance)
        });
        // A new process of the same name: the one before is gone, and did not say goodbye.
        let crashed = before.as_ref().is_some_and(|_| !kept_place);
        if crashed {
            let now = self.now();
            for topic in self.topics.values_mut() {
                topic.delivery.crash(holder, now);
            }
        }
        if let Some(mut older) = before.and_then(|seat| seat.session) {
            older.tell(Event::Ended(BrokerError::Superseded(consumer.id.clone())));
        }
        if crashed {
            self.tell_presence(&consumer.id, Presence::Superseded);
        }
        let mut topics = self.attach_topics(holder, &mut session, kept_place);
        self.record_changed |= !kept_place;
        if let Err(error) = self.settle_saves().await {
            session.tell(Event::Ended(error.into()));
            return;
        }
        topics.retain(|topic| self.topics.contains_key(&topic.epoch));
        // A topic that is gone is told before its successor of the same name.
        topics.sort_by_key(|topic| !self.topics.get(&topic.epoch).is_some_and(|topic| topic.gone));
        let epoch = (self.keeper == Keeper::Server).then_some(self.record.epoch);
        let (kind, wants_started) = (self.record.kind, self.wants_started());
        session.tell(Event::Welcome(Welcome { epoch, topics, kind, wants_started }));
        (session.acks_taken, session.acks_confirmed) = (Some(0), Some(0));
        self.tell_lost(&mut session);
        if let Some(seat) = self.seats.get_mut(&holder) {
            (seat.session, seat.grace) = (Some(session), None);
        }
        self.tell_presence(&consumer.id, Presence::Attached);
        self.tell_departed();
        self.is_back(holder);
    }

    fn tell_presence(&self, consumer: &ConsumerId, presence: Presence) {
        let name = &self.record.name;
        self.tell_all(What::Consumer(name.clone(), consumer.clone(), presence));
    }

    /// What is in the application's hands is of use where it can fail.
    fn wants_started(&self) -> bool {
        let counted = self.record.on_failure.max_attempts().is_some();
        self.keeper == Keeper::Server && (counted || self.record.ack_timeout.is_some())
    }

    fn attach_topics(
        &mut self,
        holder: Holder,
        session: &mut Session,
        kept_place: bool,
    ) -> Vec<SessionTopic> {
        let mut claims = std::mem::take(&mut session.claims);
        if !self.wants_started() {
            claims.values_mut().for_each(|claim| claim.started.clear());
        }
        let now = self.now();
        let mut topics = Vec::with_capacity(self.topics.len());
        for (epoch, topic) in &mut self.topics {
            let cursor_generation = topic.delivery.cursor().record().generation;
            let none = Claim { cursor_generation, ..Claim::default() };
            let claim = claims.get(epoch).unwrap_or(&none);
            let dropped = topic.delivery.attach(holder, claim, kept_place, now);
            // It may be readable again; if not, this consumer is to hear of it.
            topic.damaged = None;
            topics.push(SessionTopic { dropped, ..topic.describe(*epoch) });
        }
        session.knows(self.topics.values().map(|topic| topic.tell()));
        topics
    }

    /// After a restart, what may be with consumers that have not come back is nobody else's. This
    /// one is back, or given up.
    fn is_back(&mut self, holder: Holder) {
        if self.awaited.remove(&holder) && self.awaited.is_empty() {
            for topic in self.topics.values_mut() {
                topic.delivery.withhold_no_more();
            }
        }
    }

    pub(super) async fn on_goodbye(&mut self, id: SessionId) {
        if let Some(waits) = self.standby.iter().find(|session| session.id == id) {
            self.tell_presence(&waits.consumer.id, Presence::Left);
        }
        self.standby.retain(|session| session.id != id);
        if let Some(holder) = self.place_of(id) {
            self.release_place(holder, Parting::Goodbye).await;
        }
    }

    pub(super) fn on_lost(&mut self, id: SessionId) {
        let Some(seat) = self.place_of(id).and_then(|holder| self.seats.get_mut(&holder)) else {
            return;
        };
        seat.session = None;
        seat.grace = Some(Instant::now() + limits::GRACE);
        let consumer = seat.consumer.id.clone();
        self.tell_presence(&consumer, Presence::Disconnected);
        self.ended |= self.keeper == Keeper::Client;
    }

    /// The consumer gives up its place, or its grace is over. That is durable before others get
    /// what it held: after a restart it must not count as the one who has it.
    pub(super) async fn release_place(&mut self, holder: Holder, parting: Parting) {
        let Some(seat) = self.seats.remove(&holder) else { return };
        self.record_changed = true;
        if self.is_competing() && self.settle_saves().await.is_err() {
            // To be tried again when the grace is over.
            let grace = Some(Instant::now() + limits::GRACE);
            self.seats.insert(holder, Seat { session: None, grace, ..seat });
            return;
        }
        let presence = match parting {
            Parting::Goodbye => Presence::Left,
            Parting::Lost => Presence::Lost,
        };
        self.tell_presence(&seat.consumer.id, presence);
        let now = self.now();
        for topic in self.topics.values_mut() {
            match parting {
                Parting::Goodbye => topic.delivery.detach(holder),
                Parting::Lost => topic.delivery.crash(holder, now),
            }
        }
        self.is_back(holder);
        self.tell_the_others();
        self.ended |= self.keeper == Keeper::Client;
    }

    /// Lets the next one in if nobody holds the place.
    pub(super) async fn promote_if_free(&mut self) {
        while !self.standby.is_empty() && self.exclusive_holder().is_none() {
            let Some(next) = self.standby.pop_front() else {
                return;
            };
            if !next.is_gone() {
                self.seat(next).await;
            }
        }
    }

    pub(super) fn on_acks(&mut self, id: SessionId, batch: AckBatch) {
        let now = self.now();
        if let Err(error) = self.check_acks(&batch) {
            if let Some(session) = self.session(id) {
                session.tell(Event::Ended(error));
            }
            return;
        }
        let Some(session) = self.session(id) else {
            return;
        };
        session.acks_taken = session.acks_taken.max(Some(batch.number));
        if batch.awaited {
            self.hurry();
        }
        let (place, wanted) = (self.place_of(id), self.wants_started());
        for acks in batch.topics {
            let epoch = self.numbers.get(&acks.topic);
            let Some(topic) = epoch.and_then(|epoch| self.topics.get_mut(epoch)) else {
                continue;
            };
            if topic.delivery.cursor().record().generation != acks.cursor_generation {
                continue;
            }
            topic.delivery.ack(&acks.acked);
            topic.delivery.miss(&acks.missed);
            // Whoever has no place can say what it has received, but moves nothing.
            let Some(holder) = place else { continue };
            if wanted {
                topic.delivery.start(holder, &acks.started, now.at);
            }
            let (number, rewound) = (topic.number, topic.delivery.nack(holder, &acks.nacked, now));
            let session = self.seats.get_mut(&holder).and_then(|seat| seat.session.as_mut());
            if let (Some(rewound), Some(session)) = (rewound, session) {
                session.tell(Event::Rewind(number, rewound));
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
                (last_acked.max(last_nacked).max(last_missed), topic.delivery.cursor().head());
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

    /// Sends the heartbeats that are due. Active sessions are told what has moved.
    fn beat(&mut self, now: Instant) {
        let topics = &self.topics;
        let active = self.seats.values_mut().filter_map(|seat| seat.session.as_mut());
        for session in active.filter(|session| session.next_heartbeat <= now) {
            session.beat(topics.values().map(|topic| topic.tell()));
        }
        for session in self.standby.iter_mut().filter(|session| session.next_heartbeat <= now) {
            session.beat(std::iter::empty());
        }
    }

    pub(super) fn next_deadline(&mut self) -> Instant {
        let now = Instant::now();
        let graces = self.seats.values().filter_map(|seat| seat.grace).min();
        let ahead = self.looks_ahead_at();
        let others = [graces, self.unattended, self.retry_save, self.leases.next_deadline(), ahead];
        let backoffs = self.topics.values().filter_map(|topic| topic.delivery.ready_at(now));
        let handlers = self.topics.values().filter_map(|topic| topic.delivery.started_at());
        let timeout = self.record.ack_timeout;
        let handlers = handlers.filter_map(|since| timeout.map(|timeout| since + timeout));
        let burial = self.letters.as_ref().and_then(|letters| letters.retry);
        let trials = self.topics.values().filter_map(|topic| topic.delivery.tried_until(now));
        let delayed = self.topics.values().filter_map(|topic| topic.delivery.due_at());
        let delayed = delayed.filter(|due| *due > now);
        let backoffs = backoffs.chain(handlers).chain(trials).chain(delayed).chain(burial);
        let retries = self.topics.values().filter_map(|topic| topic.damaged?.retry);
        let times = backoffs.chain(retries).chain(others.into_iter().flatten());
        let first = times.min().unwrap_or(now + Duration::from_secs(3600));
        let beats = self.sessions().map(|session| session.next_heartbeat).min();
        beats.map_or(first, |beat| beat.min(first))
    }

    /// What is in a handler for too long comes again, or is let go.
    fn expire_handlers(&mut self) {
        let Some(timeout) = self.record.ack_timeout else { return };
        let now = self.now();
        let Some(since) = now.at.checked_sub(timeout) else { return };
        let reason = format!("not acked within {timeout:?}");
        for topic in self.topics.values_mut() {
            if topic.delivery.started_at().is_none_or(|at| at > since) {
                continue;
            }
            for (holder, rewound) in topic.delivery.expire(since, &reason, now) {
                let is_its = |seat: &Holder| holder.is_none_or(|holder| holder == *seat);
                let seats = self.seats.iter_mut().filter(|(seat, _)| is_its(seat));
                for session in seats.filter_map(|(_, seat)| seat.session.as_mut()) {
                    session.tell(Event::Rewind(topic.number, rewound.clone()));
                }
            }
        }
        self.tell_departed();
    }

    pub(super) async fn on_time(&mut self) {
        let now = Instant::now();
        self.beat(now);
        let is_over = |seat: &Seat| seat.grace.is_some_and(|grace| grace <= now);
        let over = self.seats.iter().filter(|(_, seat)| is_over(seat));
        for (holder, consumer) in
            over.map(|(holder, seat)| (*holder, seat.consumer.id.clone())).collect::<Vec<_>>()
        {
            tracing::info!(subscription = %self.record.name, %consumer, "grace is over");
            self.release_place(holder, Parting::Lost).await;
        }
        self.expire_handlers();
        // Also where nothing is to be read now, or its time would be over for ever.
        self.topics.values_mut().for_each(|topic| {
            topic.is_readable(now);
        });
        self.ended |= self.unattended.is_some_and(|until| until <= now);
        self.expire_leases(now);
    }
}
