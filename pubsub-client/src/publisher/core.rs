//! What the application and the session task of a publisher share.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prost::Message as _;
use pubsub_proto::v1 as pb;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::{Instant, timeout_at};

use super::ticket::{PublishReceipt, PublishTicket};
use super::window::{Verdict, Window};
use super::{OnRecreated, Settings};
use crate::client::Shared;
use crate::error::{
    Cause, EnqueueError, FlushError, Outcome, PublishError, PublishErrorKind, Unresolved,
};
use crate::limits;
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
    queue: Mutex<Queue>,
    /// Wakes the session: there is something to send, or it is to close.
    pub(super) wake: Notify,
    /// Wakes all who wait for a condition.
    changed: Notify,
}

#[derive(Debug)]
pub(super) struct Queue {
    pub(super) window: Window<Entry>,
    // One for each caller of `flush` that waits.
    flushes: Vec<Flush>,
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
    /// Nothing once the fate is told.
    ticket: Option<oneshot::Sender<Result<PublishReceipt, PublishError>>>,
    _permits: Permits,
}

/// A place in the window.
#[derive(Debug)]
pub(super) struct Permits {
    _message: OwnedSemaphorePermit,
    _bytes: OwnedSemaphorePermit,
}

#[derive(Debug)]
struct Flush {
    /// Waits for all entries below this number.
    below: u64,
    open: usize,
    failed: usize,
    first: Option<PublishError>,
    done: Option<oneshot::Sender<Result<(), FlushError>>>,
}

impl Core {
    pub(super) fn new(client: Arc<Shared>, settings: Settings) -> Arc<Self> {
        let queue = Queue {
            window: Window::new(settings.on_recreated == OnRecreated::Continue),
            flushes: Vec::new(),
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
        let deadline = message.deadline;
        let message = message.into_wire();
        let size = message.encoded_len();
        let limit = self.max_message.load(Ordering::Relaxed);
        let checked = Checked { message, size, deadline };
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
        let Checked { message, size, deadline: given } = checked;
        let deadline = given.map(|given| now + given);
        let (ticket, receiver) = oneshot::channel();
        let number = queue.entries;
        queue.entries += 1;
        let entry =
            Entry { message, number, given, deadline, ticket: Some(ticket), _permits: permits };
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

    pub(super) fn closed(&self, message: Option<Checked>) -> EnqueueError {
        let cause = self.lock().failure.clone().map(Box::new);
        let message = message.map(|message| Box::new(message.into_message()));
        EnqueueError::Closed { cause, message }
    }

    pub(super) async fn flush(&self) -> Result<(), FlushError> {
        let done = {
            let mut queue = self.lock();
            let open = queue.window.iter().filter(|entry| entry.ticket.is_some()).count();
            if open == 0 {
                return Ok(());
            }
            let (done, receiver) = oneshot::channel();
            let below = queue.entries;
            let flush = Flush { below, open, failed: 0, first: None, done: Some(done) };
            // Those who have stopped waiting make room.
            queue.flushes.retain(|flush| flush.done.as_ref().is_some_and(|done| !done.is_closed()));
            queue.flushes.push(flush);
            receiver
        };
        let closed = PublishError::new(PublishErrorKind::Closed, Outcome::Unknown);
        done.await.unwrap_or(Err(FlushError { failed: 1, first: closed }))
    }

    /// Takes no more messages, and gives up on those that are there when the time is up.
    pub(super) fn start_closing(&self, within: Duration) {
        let end = Instant::now() + within;
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
        let deadline = Instant::now() + within;
        let empty = self.wait_until(|core| {
            let queue = core.lock();
            queue.ended || queue.window.is_empty()
        });
        // Either way: what is left is looked at below.
        let _ = timeout_at(deadline, empty).await;
        self.end(PublishErrorKind::Closed, None);
        std::mem::take(&mut self.lock().unresolved)
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
                let over = queue.closing.is_some_and(|end| now >= end || queue.window.is_empty());
                if over || queue.ended {
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
            sooner || queue.ended || (queue.closing.is_some() && queue.window.is_empty())
        })
        .await;
    }

    pub(super) fn settle(&self, verdict: Verdict<Entry>) -> super::window::Then {
        let mut queue = self.lock();
        for (entry, kind) in verdict.lost {
            queue
                .resolve(entry, |key| Err(PublishError::new(kind, Outcome::Unknown).with_key(key)));
        }
        drop(queue);
        self.changed.notify_waiters();
        verdict.then
    }

    pub(super) fn is_closed(&self) -> bool {
        let queue = self.lock();
        queue.ended || queue.closing.is_some()
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

    /// Tells the fate of a message, unless its deadline has told it before.
    pub(super) fn resolve(
        &mut self,
        mut entry: Entry,
        result: impl FnOnce(&str) -> Result<PublishReceipt, PublishError>,
    ) {
        let result = result(&entry.message.idempotency_key);
        tell(&mut self.flushes, &mut entry, result);
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
            tell(&mut self.flushes, &mut entry, result);
        }
        for entry in self.window.sent_mut().filter(|entry| is_over(entry)) {
            let result = error(Outcome::Unknown, entry);
            tell(&mut self.flushes, entry, result);
            entry.deadline = None;
        }
        self.deadline = self.window.iter().filter_map(|entry| entry.deadline).min();
    }
}

fn tell(flushes: &mut Vec<Flush>, entry: &mut Entry, result: Result<PublishReceipt, PublishError>) {
    let Some(ticket) = entry.ticket.take() else { return };
    for flush in flushes.iter_mut().filter(|flush| entry.number < flush.below) {
        flush.settled(result.as_ref().err());
    }
    flushes.retain(|flush| flush.done.is_some());
    // Whoever holds the ticket may not want to know.
    let _ = ticket.send(result);
}

impl Flush {
    fn settled(&mut self, error: Option<&PublishError>) {
        self.open = self.open.saturating_sub(1);
        if let Some(error) = error {
            self.failed += 1;
            self.first.get_or_insert_with(|| error.clone());
        }
        if self.open == 0
            && let Some(done) = self.done.take()
        {
            let failed = self.failed;
            let result =
                self.first.take().map_or(Ok(()), |first| Err(FlushError { failed, first }));
            // Whoever flushed may have stopped waiting.
            let _ = done.send(result);
        }
    }
}

/// A message that the topic allows, in its wire form.
#[derive(Debug)]
pub(super) struct Checked {
    message: pb::Message,
    pub(super) size: usize,
    deadline: Option<Duration>,
}

impl Checked {
    pub(super) fn into_message(self) -> Message {
        Message::from_wire(self.message, self.deadline)
    }
}
