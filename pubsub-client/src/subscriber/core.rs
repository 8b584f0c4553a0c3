//! What the application and the session task share.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use super::builder::Settings;
use super::convert;
use super::delivery::{Delivery, Nack};
use super::nacks::Nacked;
use super::order::Lane;
use super::resume::{Acked, Handle, Overdue, Resume, Settled, Shown};
use super::stop::{Drain, Stopping};
use super::topic::TopicKey;
use super::{DataLoss, Event, Position, TopicPosition};
use crate::client::Shared;
use crate::error::{AckError, Cause, SubscribeError};
use crate::limits;
use crate::message::{MessageId, Received, ReceivedMessage};
use crate::state::{ConnectionState, StateCell};

/// One subscriber: held by its handles, its deliveries and its session task.
#[derive(Debug)]
pub(crate) struct Core {
    pub(super) client: Arc<Shared>,
    pub(super) settings: Settings,
    pub(super) instance: [u8; 16],
    /// The name of the consumer.
    pub(super) consumer: String,
    pub(super) state: StateCell,
    attaches: AtomicU64,
    inner: Mutex<Inner>,
    /// Wakes the session: there are acks to send, or it is to stop.
    pub(super) wake: Notify,
    /// Wakes all who wait for a condition.
    changed: Notify,
    /// How many do.
    waiting: AtomicUsize,
}

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) resume: Resume<Received>,
    /// Whether messages may be handed out.
    pub(super) gate: Gate,
    /// The boot id and the subscription's epoch of the last welcome.
    pub(super) boot: Bytes,
    pub(super) epoch: u64,
    pub(super) stop: Option<Stopping>,
    /// Someone waits for a confirmation or nacked: acks are not to wait for company.
    pub(super) urgent: bool,
    /// Someone waits for the confirmation of what is sent next.
    pub(super) awaited: bool,
    pub(super) welcomed: bool,
    /// Whether the last thing heard is that this is an active consumer.
    active: bool,
    ended: bool,
    error: Option<SubscribeError>,
    consumer: Option<Waker>,
    // One for each caller of `ack_confirmed` that waits.
    confirmations: BTreeMap<(TopicKey, u64), Vec<Confirmation>>,
}

type Confirmation = oneshot::Sender<Result<(), AckError>>;

/// Whether messages may be handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Gate {
    /// Another consumer may have them.
    Closed,
    /// Nobody else can have them.
    Open,
    /// The server keeps them for this consumer until then.
    Until(Instant),
}

impl Gate {
    fn is_open(self, now: Instant) -> bool {
        match self {
            Self::Closed => false,
            Self::Open => true,
            Self::Until(end) => now < end,
        }
    }
}

impl Core {
    pub(super) fn new(client: Arc<Shared>, settings: Settings) -> Arc<Self> {
        let resume = Resume::new(settings.is_reader());
        let inner = Inner {
            resume,
            gate: Gate::Closed,
            boot: Bytes::new(),
            epoch: 0,
            stop: None,
            urgent: false,
            awaited: false,
            welcomed: false,
            active: false,
            ended: false,
            error: None,
            consumer: None,
            confirmations: BTreeMap::new(),
        };
        let instance = client.env.id();
        Arc::new(Self {
            consumer: settings.consumer(&instance),
            settings,
            instance,
            state: client.new_state(),
            client,
            attaches: AtomicU64::new(0),
            inner: Mutex::new(inner),
            wake: Notify::new(),
            changed: Notify::new(),
            waiting: AtomicUsize::new(0),
        })
    }

    /// A panic elsewhere leaves sets that are each valid, and a reconnect puts the whole right.
    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn next_attach(&self) -> u64 {
        self.attaches.fetch_add(1, Ordering::Relaxed) + 1
    }

    // For the application.

    pub(super) fn poll(
        self: &Arc<Self>,
        context: &mut Context<'_>,
        allowed: impl Fn(&Arc<str>, &Lane) -> bool,
    ) -> Poll<Option<Result<Event, SubscribeError>>> {
        let take = |resume: &mut Resume<Received>, now: Instant| {
            resume.take(now.into_std(), allowed).map(|shown| self.event(shown))
        };
        self.poll_with(context, take)
    }

    /// Adds what there is to `events`, up to `limit`, and answers how many that is: one at least.
    pub(super) fn poll_many(
        self: &Arc<Self>,
        context: &mut Context<'_>,
        events: &mut Vec<Event>,
        limit: usize,
    ) -> Poll<Option<Result<usize, SubscribeError>>> {
        let take = |resume: &mut Resume<Received>, now: Instant| {
            let before = events.len();
            let next = || resume.take(now.into_std(), |_, _| true);
            events.extend(std::iter::from_fn(next).take(limit).map(|shown| self.event(shown)));
            Some(events.len() - before).filter(|taken| *taken > 0)
        };
        self.poll_with(context, take)
    }

    fn poll_with<T>(
        &self,
        context: &mut Context<'_>,
        take: impl FnOnce(&mut Resume<Received>, Instant) -> Option<T>,
    ) -> Poll<Option<Result<T, SubscribeError>>> {
        let mut inner = self.lock();
        if inner.ended {
            return Poll::Ready(inner.error.take().map(Err));
        }
        if inner.stop.is_some() {
            return Poll::Ready(None);
        }
        let before = inner.resume.queued();
        let now = Instant::now();
        let open = inner.gate.is_open(now);
        let taken = if open { take(&mut inner.resume, now) } else { None };
        let Some(taken) = taken else {
            inner.consumer = Some(context.waker().clone());
            return Poll::Pending;
        };
        // Before the handler that gets it can kill the process.
        inner.urgent |= inner.resume.reports_started();
        self.after_change(inner, before);
        self.tell_waiting();
        Poll::Ready(Some(Ok(taken)))
    }

    fn event(self: &Arc<Self>, shown: Shown<Received>) -> Event {
        match shown {
            Shown::Message { handle, topic, epoch, message } => {
                let id = MessageId { topic, epoch, sequence: handle.sequence };
                let core = (!self.settings.is_reader()).then(|| Arc::clone(self));
                let message = ReceivedMessage::from_wire(id, message);
                Event::Message(Delivery::new(message, core, handle))
            }
            Shown::Gap { topic, epoch, missing } => Event::Gap(convert::gap(topic, epoch, missing)),
            Shown::DataLoss { topic, epoch, sequence } => {
                Event::DataLoss(DataLoss { id: MessageId { topic, epoch, sequence } })
            }
        }
    }

    /// With which messages of its topic this one is in order.
    pub(super) fn lane(&self, message: &ReceivedMessage) -> Option<Lane> {
        self.lock().resume.order().lane(message.ordering_key.as_deref().unwrap_or_default())
    }

    pub(super) fn ack(&self, handle: Handle) {
        self.change(|inner| {
            inner.resume.ack(handle);
        });
    }

    pub(super) fn ack_all(&self, handles: impl Iterator<Item = Handle>) {
        self.change(|inner| {
            for handle in handles {
                inner.resume.ack(handle);
            }
        });
    }

    pub(super) fn ack_up_to(&self, handle: Handle) {
        self.change(|inner| inner.resume.ack_up_to(handle));
    }

    /// Nothing if the ack is confirmed already.
    pub(super) fn ack_confirmed(
        &self,
        handle: Handle,
    ) -> Option<oneshot::Receiver<Result<(), AckError>>> {
        self.change(|inner| {
            let (sender, receiver) = oneshot::channel();
            match inner.resume.ack(handle) {
                Acked::Done => return None,
                // Whoever waits for it is gone only if the future was dropped.
                Acked::Stale => drop(sender.send(Err(AckError::Stale))),
                // Dropping the sender says that the subscriber has ended.
                Acked::Queued if inner.ended => {}
                Acked::Queued => {
                    let key = (handle.topic, handle.sequence);
                    inner.confirmations.entry(key).or_default().push(sender);
                    inner.urgent = true;
                    inner.awaited = true;
                }
            }
            Some(receiver)
        })
    }

    /// Says whether the message was still the handle's to hand back.
    pub(super) fn nack(&self, handle: Handle, nack: Nack) -> bool {
        let Nack { delay, reason, for_good } = nack;
        let Handle { attempt, showing, .. } = handle;
        self.hand_back(handle, Nacked { attempt, delay, reason, for_good, showing })
    }

    pub(super) fn release(&self, handle: Handle) {
        self.hand_back(
            handle,
            Nacked {
                attempt: 0,
                delay: Some(limits::RELEASE_DELAY),
                reason: "released".to_owned(),
                for_good: false,
                showing: handle.showing,
            },
        );
    }

    fn hand_back(&self, handle: Handle, nacked: Nacked) -> bool {
        self.change(|inner| {
            let done = inner.resume.nack(handle, nacked);
            inner.urgent |= done;
            done
        })
    }

    fn change<T>(&self, change: impl FnOnce(&mut Inner) -> T) -> T {
        let mut inner = self.lock();
        let before = inner.resume.queued();
        let result = change(&mut inner);
        self.after_change(inner, before);
        result
    }

    /// How many acks do not wait for company any longer: with a small credit, there may be none.
    pub(super) fn ack_batch(&self) -> usize {
        limits::ACK_BATCH.min(self.settings.max_messages as usize / 2).max(1)
    }

    /// Wakes the session if it has something new to think about: not for each ack.
    fn after_change(&self, inner: MutexGuard<'_, Inner>, before: usize) {
        let queued = inner.resume.queued();
        let first = before == 0 && queued > 0;
        if first || queued >= self.ack_batch() || inner.urgent || inner.stop.is_some() {
            self.wake.notify_one();
        }
    }

    pub(super) fn position(&self) -> Position {
        let inner = self.lock();
        let topics = inner.resume.topics().map(|topic| TopicPosition {
            topic: Arc::clone(&topic.name),
            epoch: topic.epoch,
            last_delivered: topic.last_shown,
            acked_floor: topic.done.floor(),
            head: topic.head,
            caught_up: topic.caught_up(),
            behind: match self.settings.is_reader() {
                true => topic.head.saturating_sub(topic.last_shown.max(topic.done.floor())),
                false => topic.done.open_up_to(topic.head),
            },
            buffered: topic.held().saturating_sub(topic.outstanding()) as u64,
            in_hand: topic.outstanding() as u64,
        });
        let topics: Vec<_> = topics.collect();
        let caught_up = inner.active && topics.iter().all(|topic| topic.caught_up);
        Position { topics, caught_up }
    }

    /// Waits until the server has taken the subscriber in, or has refused it.
    pub(super) async fn opened(&self) -> Option<SubscribeError> {
        self.wait_until(|core| {
            let inner = core.lock();
            inner.welcomed || inner.ended
        })
        .await;
        self.lock().error.take()
    }

    pub(super) fn has_ended(&self) -> bool {
        self.lock().ended
    }

    pub(super) async fn wait_until(&self, condition: impl Fn(&Self) -> bool) {
        let _counted = Waiting::of(&self.waiting);
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // Registered before looking, so that no change falls between.
            changed.as_mut().enable();
            if condition(self) {
                return;
            }
            changed.await;
        }
    }

    /// Something has changed that may be waited for. For each message, and so for nothing where
    /// nobody waits: who comes later looks first.
    fn tell_waiting(&self) {
        if self.waiting.load(Ordering::SeqCst) > 0 {
            self.changed.notify_waiters();
        }
    }

    pub(super) fn request_stop(&self, drain: Drain, within: Duration) {
        {
            let mut inner = self.lock();
            if inner.ended {
                return;
            }
            let asked = Stopping::new(drain, within);
            inner.stop = Some(inner.stop.map_or(asked, |earlier| earlier.sooner(asked)));
            if let Some(consumer) = inner.consumer.take() {
                consumer.wake();
            }
        }
        self.wake.notify_one();
        self.tell_waiting();
    }

    // For the session.

    /// Hands back what the application has held for too long. Its handles live on, and may ack.
    pub(super) fn give_up_overdue(&self, now: Instant) {
        let overdue = self.lock().resume.overdue(now.into_std(), self.settings.max_processing);
        for Overdue { handle, topic, held_for } in overdue {
            let nack = Nack::backoff().because("not acked within max processing");
            // It may have been acked since.
            if self.nack(handle, nack) {
                let sequence = handle.sequence;
                tracing::warn!(%topic, sequence, ?held_for, "held for too long: handed back");
            }
        }
    }

    /// Something arrived that the application may be waiting for.
    pub(super) fn arrived(&self, inner: &mut Inner, settled: Settled) {
        for (topic, ranges) in settled.confirmed {
            for range in ranges {
                inner.resolve((topic, *range.start()), (topic, *range.end()), Ok(()));
            }
        }
        for topic in settled.stale {
            inner.resolve((topic, 0), (topic, u64::MAX), Err(AckError::Stale));
        }
        if let Some(consumer) = inner.consumer.take() {
            consumer.wake();
        }
        self.tell_waiting();
    }

    /// The server has taken the subscriber in: as the active consumer, or to stand by.
    pub(super) fn welcomed(&self, inner: &mut Inner, active: bool) {
        inner.welcomed = true;
        inner.active = active;
        self.arrived(inner, Settled::default());
    }

    /// The session is over, for good.
    pub(super) fn end(&self, error: Option<SubscribeError>) {
        let cause = error.as_ref().map(|error| match error {
            SubscribeError::Refused(error) => Cause::Server(error.clone()),
            SubscribeError::Foreign(answer) => Cause::Foreign(answer.clone()),
            SubscribeError::Protocol(detail) => Cause::Protocol(detail.clone()),
            SubscribeError::TaskGone => Cause::TaskGone,
            SubscribeError::Decode { .. } => Cause::Protocol(error.to_string()),
        });
        {
            let mut inner = self.lock();
            inner.ended = true;
            inner.error = error;
            inner.confirmations.clear();
            self.arrived(&mut inner, Settled::default());
        }
        self.state.set(ConnectionState::Closed { cause: cause.map(Arc::new) });
    }
}

/// Someone waits for a condition, and may stop at any time.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn of(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Inner {
    fn resolve(
        &mut self,
        first: (TopicKey, u64),
        last: (TopicKey, u64),
        result: Result<(), AckError>,
    ) {
        if self.confirmations.is_empty() {
            return;
        }
        let keys: Vec<_> = self.confirmations.range(first..=last).map(|(key, _)| *key).collect();
        for waiter in keys.into_iter().filter_map(|key| self.confirmations.remove(&key)).flatten() {
            // Whoever waited may have stopped waiting.
            let _ = waiter.send(result);
        }
    }
}
