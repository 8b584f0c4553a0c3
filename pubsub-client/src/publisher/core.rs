//! What the application and the session task of a publisher share.

#[cfg(feature = "outbox")]
use std::sync::atomic::AtomicU64;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prost::Message as _;
use pubsub_proto::v1 as pb;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::{Instant, timeout_at};

use super::ticket::{PublishReceipt, PublishTicket};
use super::window::{Then, Verdict, Window};
use super::{OnRecreated, Settings};
use crate::client::Shared;
use crate::error::{
    Cause, EnqueueError, FlushError, Outcome, PublishError, PublishErrorKind, Unresolved,
};
use crate::limits;
use crate::liveness::after;
use crate::message::Message;
use crate::state::{ConnectionState, StateCell};

/// One publisher: held by its handles and its session task.
#[derive(Debug)]
pub(crate) struct Core {
    pub(super) client: Arc<Shared>,
    pub(super) settings: Settings,
    pub(super) producer: [u8; 16],
    pub(super) state: StateCell,
    messages: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
    max_message: AtomicUsize,
    /// In milliseconds.
    #[cfg(feature = "outbox")]
    idempotency_window: AtomicU64,
    queue: Mutex<Queue>,
    /// Wakes the session: there is something to send, or it is to close.
    pub(super) wake: Notify,
    /// Wakes all who wait for a condition.
    changed: Notify,
}

#[derive(Debug)]
pub(super) struct Queue {
    pub(super) window: Window<Entry>,
    failures: Failures,
    entries: u64,
    /// Not later than the earliest deadline in the window.
    deadline: Option<Instant>,
    welcomed: bool,
    /// No more messages are taken; when to give up on those that are there.
    closing: Option<Instant>,
    ended: bool,
    failure: Option<PublishErrorKind>,
    /// What was open at the end, for whoever closes.
    unresolved: Vec<Unresolved>,
}

/// A message in the window, and who waits for it.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) message: pb::Message,
    number: u64,
    given: Option<Duration>,
    deadline: Option<Instant>,
    /// What holds for a batch of which this is the first message.
    pub(super) atomic: Option<pb::AtomicBatch>,
    /// Nothing once the fate is told.
    ticket: Option<oneshot::Sender<Result<PublishReceipt, PublishError>>>,
    _permits: Option<Permits>,
}

/// A place in the window.
#[derive(Debug)]
pub(super) struct Permits {
    _message: OwnedSemaphorePermit,
    _bytes: OwnedSemaphorePermit,
}

/// Failures of messages whose tickets were dropped: only a flush can tell these.
#[derive(Debug, Default)]
struct Failures {
    /// All there ever were.
    count: usize,
    /// As many of them as any flush has told.
    told: usize,
    /// The first one that no flush had told by then.
    first: Option<PublishError>,
}

impl Core {
    pub(super) fn new(client: Arc<Shared>, settings: Settings) -> Arc<Self> {
        let queue = Queue {
            window: Window::new(settings.on_recreated == OnRecreated::Continue),
            failures: Failures::default(),
            entries: 0,
            deadline: None,
            welcomed: false,
            closing: None,
            ended: false,
            failure: None,
            unresolved: Vec::new(),
        };
        Arc::new(Self {
            producer: client.env.id(),
            state: client.new_state(),
            client,
            messages: Arc::new(Semaphore::new(settings.window_messages)),
            bytes: Arc::new(Semaphore::new(settings.window_bytes)),
            max_message: AtomicUsize::new(limits::MAX_MESSAGE_BYTES),
            #[cfg(feature = "outbox")]
            idempotency_window: AtomicU64::new(0),
            settings,
            queue: Mutex::new(queue),
            wake: Notify::new(),
            changed: Notify::new(),
        })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn topic(&self) -> &str {
        &self.settings.topic
    }

    /// How many permits a message of this size needs. One larger than the window takes all of
    /// them, and so is admitted alone.
    fn permits(&self, bytes: usize) -> u32 {
        u32::try_from(bytes.clamp(1, self.settings.window_bytes)).unwrap_or(u32::MAX)
    }

    /// Waits for a place in the window. Cancel-safe; those who wait are served in order.
    pub(super) async fn admit(&self, bytes: usize) -> Result<Permits, EnqueueError> {
        let message = Arc::clone(&self.messages).acquire_owned().await;
        let message = message.map_err(|_| self.closed(None))?;
        let many = self.permits(bytes);
        let bytes = Arc::clone(&self.bytes).acquire_many_owned(many).await;
        let bytes = bytes.map_err(|_| self.closed(None))?;
        Ok(Permits { _message: message, _bytes: bytes })
    }

    pub(super) fn try_admit(&self, bytes: usize) -> Option<Permits> {
        let message = Arc::clone(&self.messages).try_acquire_owned().ok()?;
        let bytes = Arc::clone(&self.bytes).try_acquire_many_owned(self.permits(bytes)).ok()?;
        Some(Permits { _message: message, _bytes: bytes })
    }

    /// A message in its wire form, and its bytes, if the topic allows it.
    pub(super) fn check(&self, message: Message) -> Result<Checked, EnqueueError> {
        let given = message.deadline;
        let deadline = given.map(|given| after(Instant::now(), given));
        let message = message.into_wire();
        let size = message.encoded_len();
        let limit = self.max_message.load(Ordering::Relaxed);
        let checked = Checked { message, size, given, deadline };
        if size > limit {
            let message = Box::new(checked.into_message());
            return Err(EnqueueError::TooLarge { size, limit, message });
        }
        Ok(checked)
    }

    pub(super) fn set_max_message(&self, bytes: u64) {
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        self.max_message.store(bytes.clamp(1, limits::MAX_MESSAGE_BYTES), Ordering::Relaxed);
    }

    #[cfg(feature = "outbox")]
    pub(super) fn set_idempotency_window(&self, window: Duration) {
        let millis = u64::try_from(window.as_millis()).unwrap_or(u64::MAX);
        self.idempotency_window.store(millis, Ordering::Relaxed);
    }

    #[cfg(feature = "outbox")]
    pub(super) fn idempotency_window(&self) -> Duration {
        Duration::from_millis(self.idempotency_window.load(Ordering::Relaxed))
    }

    pub(super) fn push(
        &self,
        checked: Checked,
        permits: Permits,
    ) -> Result<PublishTicket, EnqueueError> {
        let mut queue = self.lock();
        if queue.closing.is_some() || queue.ended {
            drop(queue);
            return Err(self.closed(Some(checked)));
        }
        let now = Instant::now();
        let Checked { message, size, given, deadline } = checked;
        let (ticket, receiver) = oneshot::channel();
        let number = queue.entries;
        queue.entries += 1;
        let (ticket, atomic) = (Some(ticket), None);
        let entry =
            Entry { message, number, given, deadline, atomic, ticket, _permits: Some(permits) };
        queue.window.push(entry, size, now);
        let sooner = deadline.is_some_and(|new| queue.deadline.is_none_or(|old| new < old));
        if sooner {
            queue.deadline = deadline;
        }
        drop(queue);
        if sooner {
            self.changed.notify_waiters();
        }
        self.wake.notify_one();
        Ok(PublishTicket::new(receiver))
    }

    /// Waits for as many places as a batch takes, or all there are. Cancel-safe.
    pub(super) async fn admit_together(
        &self,
        messages: usize,
        bytes: usize,
    ) -> Result<Permits, EnqueueError> {
        let places = messages.clamp(1, self.settings.window_messages);
        let places = u32::try_from(places).unwrap_or(u32::MAX);
        let message = Arc::clone(&self.messages).acquire_many_owned(places).await;
        let message = message.map_err(|_| self.closed(None))?;
        let bytes = Arc::clone(&self.bytes).acquire_many_owned(self.permits(bytes)).await;
        let bytes = bytes.map_err(|_| self.closed(None))?;
        Ok(Permits { _message: message, _bytes: bytes })
    }

    /// Puts messages into the window that are stored all together or not at all. They have one
    /// deadline, so that they are given up together, too.
    pub(super) fn push_together(
        &self,
        messages: Vec<Checked>,
        atomic: pb::AtomicBatch,
        deadline: Option<Instant>,
        permits: Permits,
    ) -> Result<Vec<PublishTicket>, EnqueueError> {
        let mut queue = self.lock();
        if queue.closing.is_some() || queue.ended {
            drop(queue);
            return Err(self.closed(None));
        }
        let (mut atomic, mut permits) = (Some(atomic), Some(permits));
        let mut tickets = Vec::with_capacity(messages.len());
        let mut entries = Vec::with_capacity(messages.len());
        for Checked { message, size, given, .. } in messages {
            let (ticket, receiver) = oneshot::channel();
            let number = queue.entries;
            queue.entries += 1;
            // The first one holds the places of all: they have one fate, at one time.
            let (atomic, _permits, ticket) = (atomic.take(), permits.take(), Some(ticket));
            let entry = Entry { message, number, given, deadline, atomic, ticket, _permits };
            entries.push((entry, size));
            tickets.push(PublishTicket::new(receiver));
        }
        queue.window.push_together(entries, Instant::now());
        let sooner = deadline.is_some_and(|new| queue.deadline.is_none_or(|old| new < old));
        if sooner {
            queue.deadline = deadline;
        }
        drop(queue);
        if sooner {
            self.changed.notify_waiters();
        }
        self.wake.notify_one();
        Ok(tickets)
    }

    pub(super) fn closed(&self, message: Option<Checked>) -> EnqueueError {
        let cause = self.lock().failure.clone().map(Box::new);
        let message = message.map(|message| Box::new(message.into_message()));
        EnqueueError::Closed { cause, message }
    }

    pub(super) async fn flush(&self) -> Result<(), FlushError> {
        let (below, told, ended) = {
            let queue = self.lock();
            (queue.entries, queue.failures.told, queue.ended)
        };
        self.wait_until(|core| core.lock().first_untold().is_none_or(|first| first >= below)).await;
        let mut queue = self.lock();
        // Another flush may have told them meanwhile, to someone else.
        let failed = queue.failures.count - told;
        queue.failures.told = queue.failures.count;
        let first = queue.failures.first.clone().filter(|_| failed > 0);
        let over = || {
            let kind = queue.failure.clone().unwrap_or(PublishErrorKind::Closed);
            PublishError::new(kind, Outcome::NotPersisted)
        };
        let first = first.or_else(|| ended.then(over));
        first.map_or(Ok(()), |first| Err(FlushError { failed, first }))
    }

    /// Takes no more messages, and gives up on those that are there when the time is up.
    pub(super) fn start_closing(&self, within: Duration) {
        let end = after(Instant::now(), within);
        {
            let mut queue = self.lock();
            let end = queue.closing.map_or(end, |earlier| earlier.min(end));
            queue.closing = Some(end);
        }
        // Whoever waits for a place waits in vain.
        self.messages.close();
        self.bytes.close();
        self.wake.notify_one();
        self.changed.notify_waiters();
    }

    /// Closes, waits for it, and hands out what is left.
    pub(crate) async fn close(&self, within: Duration) -> Vec<Unresolved> {
        self.start_closing(within);
        let deadline = after(Instant::now(), within);
        let told = self.wait_until(|core| {
            let queue = core.lock();
            queue.ended || queue.first_untold().is_none()
        });
        // Either way: what is left is looked at below.
        let _ = timeout_at(deadline, told).await;
        self.end(PublishErrorKind::Closed, None);
        // Whoever else closes it wants to know, too.
        self.lock().unresolved.clone()
    }

    /// Waits until the server has taken the publisher in, or it has failed.
    pub(super) async fn ready(&self) -> Result<(), PublishError> {
        self.wait_until(|core| {
            let queue = core.lock();
            queue.welcomed || queue.ended
        })
        .await;
        match &self.lock().failure {
            Some(kind) => Err(PublishError::new(kind.clone(), Outcome::NotPersisted)),
            None => Ok(()),
        }
    }

    pub(super) async fn wait_until(&self, condition: impl Fn(&Self) -> bool) {
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

    /// Keeps the deadlines of messages and of closing, whether connected or not; returns when
    /// the publisher has nothing more to do.
    pub(super) async fn keep_time(&self) {
        loop {
            let now = Instant::now();
            let next = {
                let mut queue = self.lock();
                queue.expire(now);
                let over = queue.closing.is_some_and(|end| now >= end);
                if over || queue.ended || queue.has_closed() {
                    return;
                }
                [queue.deadline, queue.closing].into_iter().flatten().min()
            };
            self.changed.notify_waiters();
            let change = self.wait_until_sooner(next);
            match next {
                Some(next) => drop(timeout_at(next, change).await),
                None => change.await,
            }
        }
    }

    async fn wait_until_sooner(&self, known: Option<Instant>) {
        self.wait_until(|core| {
            let queue = core.lock();
            let next = [queue.deadline, queue.closing].into_iter().flatten().min();
            let sooner = next.is_some_and(|next| known.is_none_or(|known| next < known));
            sooner || queue.ended || queue.has_closed()
        })
        .await;
    }

    pub(super) fn settle(&self, verdict: Verdict<Entry>) -> Then {
        let mut queue = self.lock();
        let loss = verdict.lost.first().filter(|_| self.settings.stop_at_loss);
        let then = loss.map_or(verdict.then, |(_, kind)| Then::Fail(kind.clone()));
        for (entry, kind) in verdict.lost {
            queue
                .resolve(entry, |key| Err(PublishError::new(kind, Outcome::Unknown).with_key(key)));
        }
        drop(queue);
        self.changed.notify_waiters();
        then
    }

    pub(super) fn is_closed(&self) -> bool {
        let queue = self.lock();
        queue.ended || queue.closing.is_some()
    }

    /// Whether the server has ever taken the publisher in.
    pub(super) fn is_welcomed(&self) -> bool {
        self.lock().welcomed
    }

    pub(super) fn set_welcomed(&self) {
        self.lock().welcomed = true;
        self.changed.notify_waiters();
    }

    pub(super) fn notify(&self) {
        self.changed.notify_waiters();
    }

    /// The publisher is over: tells the fate of everything that is left.
    pub(super) fn end(&self, kind: PublishErrorKind, cause: Option<Cause>) {
        {
            let mut queue = self.lock();
            let first = !std::mem::replace(&mut queue.ended, true);
            if first && cause.is_some() {
                queue.failure = Some(kind.clone());
            }
            for (entry, sent) in queue.window.drain() {
                let outcome = if sent { Outcome::Unknown } else { Outcome::NotPersisted };
                if entry.ticket.is_some() {
                    let message = Message::from_wire(entry.message.clone(), entry.given);
                    queue.unresolved.push(Unresolved { message, outcome });
                }
                let kind = kind.clone();
                queue.resolve(entry, |key| Err(PublishError::new(kind, outcome).with_key(key)));
            }
        }
        self.messages.close();
        self.bytes.close();
        if !self.state.get().is_closed() {
            self.state.set(ConnectionState::Closed { cause: cause.map(Arc::new) });
        }
        self.wake.notify_one();
        self.changed.notify_waiters();
    }
}

impl Queue {
    pub(super) fn is_closing(&self) -> bool {
        self.closing.is_some()
    }

    /// The number of the oldest message whose fate is not told.
    fn first_untold(&self) -> Option<u64> {
        self.window.iter().find(|entry| entry.ticket.is_some()).map(|entry| entry.number)
    }

    /// Whether nothing is left to do: messages that were sent and have outlived their deadline
    /// keep their places, but nobody waits for them.
    fn has_closed(&self) -> bool {
        self.closing.is_some() && self.first_untold().is_none()
    }

    /// Tells the fate of a message, unless its deadline has told it before.
    pub(super) fn resolve(
        &mut self,
        mut entry: Entry,
        result: impl FnOnce(&str) -> Result<PublishReceipt, PublishError>,
    ) {
        let result = result(&entry.message.idempotency_key);
        tell(&mut self.failures, &mut entry, result);
    }

    /// Tells those whose deadline has passed. A message that was sent keeps its place: its
    /// sequence must not be skipped.
    fn expire(&mut self, now: Instant) {
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return;
        }
        let is_over = |entry: &Entry| entry.deadline.is_some_and(|deadline| now >= deadline);
        let error = |outcome, entry: &Entry| {
            let error = PublishError::new(PublishErrorKind::DeadlineElapsed, outcome);
            Err(error.with_key(&entry.message.idempotency_key))
        };
        for mut entry in self.window.give_up_unsent(is_over) {
            let result = error(Outcome::NotPersisted, &entry);
            tell(&mut self.failures, &mut entry, result);
        }
        for entry in self.window.sent_mut().filter(|entry| is_over(entry)) {
            let result = error(Outcome::Unknown, entry);
            tell(&mut self.failures, entry, result);
            entry.deadline = None;
        }
        self.deadline = self.window.iter().filter_map(|entry| entry.deadline).min();
    }
}

fn tell(failures: &mut Failures, entry: &mut Entry, fate: Result<PublishReceipt, PublishError>) {
    let Some(ticket) = entry.ticket.take() else { return };
    if let Err(Err(error)) = ticket.send(fate) {
        failures.add(error);
    }
}

impl Failures {
    fn add(&mut self, error: PublishError) {
        if self.told == self.count {
            self.first = Some(error);
        }
        self.count += 1;
    }
}

/// A message that the topic allows, in its wire form.
#[derive(Debug)]
pub(super) struct Checked {
    message: pb::Message,
    pub(super) size: usize,
    given: Option<Duration>,
    pub(super) deadline: Option<Instant>,
}

impl Checked {
    pub(super) fn into_message(self) -> Message {
        Message::from_wire(self.message, self.given)
    }
}
