//! What the application and the session task of a publisher share.

#[cfg(feature = "outbox")]
use std::sync::atomic::AtomicU64;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pubsub_proto::v1 as pb;
use tokio::sync::{Notify, Semaphore};
use tokio::time::{Instant, timeout_at};

use super::entry::{Body, Checked, Chunk, Entry, Places, tell_all};
use super::fates::{Fate, Tickets};
use super::ticket::PublishTicket;
use super::window::{Hello, Then, Verdict, Window};
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
    started: Instant,
    /// What is free of the window. Messages in it have taken theirs out, and are given back many at
    /// a time.
    messages: Semaphore,
    bytes: Semaphore,
    max_message: AtomicUsize,
    /// In milliseconds.
    #[cfg(feature = "outbox")]
    idempotency_window: AtomicU64,
    queue: Mutex<Queue>,
    /// Wakes the session: there is something to send, or it is to close.
    pub(super) wake: Notify,
    /// Wakes all who wait for a condition.
    changed: Notify,
    /// Wakes who keeps the time: there is an earlier deadline, or nothing left to wait for.
    timing: Notify,
}

#[derive(Debug)]
pub(super) struct Queue {
    pub(super) window: Window<Entry>,
    failures: Failures,
    entries: u64,
    tickets: Tickets,
    chunk: Chunk,
    /// The session has nothing to do until it is woken.
    idle: bool,
    /// The oldest of the messages that have left the window and are just being told their fates.
    telling: Option<u64>,
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

/// A place in the window, taken before there is a message in it.
#[derive(Debug)]
pub(super) struct Place<'a> {
    core: &'a Core,
    places: Places,
}

impl Place<'_> {
    /// What a message takes of it. The rest is given back.
    fn take(&mut self, bytes: u32) -> Places {
        let taken = Places { bytes: self.places.bytes.min(bytes), ..self.places };
        self.places = Places { messages: 0, bytes: self.places.bytes - taken.bytes };
        taken
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.core.release(self.places);
    }
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
            tickets: Tickets::new(Arc::clone(&settings.topic)),
            chunk: Chunk::default(),
            idle: false,
            telling: None,
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
            messages: Semaphore::new(settings.window_messages),
            bytes: Semaphore::new(settings.window_bytes),
            max_message: AtomicUsize::new(limits::MAX_MESSAGE_BYTES),
            #[cfg(feature = "outbox")]
            idempotency_window: AtomicU64::new(0),
            settings,
            queue: Mutex::new(queue),
            wake: Notify::new(),
            changed: Notify::new(),
            timing: Notify::new(),
            started: Instant::now(),
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
    pub(super) async fn admit(&self, bytes: usize) -> Result<Place<'_>, EnqueueError> {
        self.admit_together(1, bytes).await
    }

    pub(super) fn try_admit(&self, bytes: usize) -> Option<Place<'_>> {
        let message = self.messages.try_acquire().ok()?;
        let many = self.permits(bytes);
        self.bytes.try_acquire_many(many).ok()?.forget();
        message.forget();
        Some(Place { core: self, places: Places { messages: 1, bytes: many } })
    }

    /// Gives places back.
    fn release(&self, places: Places) {
        // The messages are what is waited for first.
        if places.bytes > 0 {
            self.bytes.add_permits(places.bytes as usize);
        }
        if places.messages > 0 {
            self.messages.add_permits(places.messages as usize);
        }
    }

    /// A message in its wire form, and its bytes, if the topic allows it.
    pub(super) fn check(&self, message: Message) -> Result<Checked, EnqueueError> {
        let given = message.deadline;
        let deadline = given.map(|given| after(Instant::now(), given));
        let body = Body::new(message);
        let size = body.size();
        let limit = self.max_message.load(Ordering::Relaxed);
        let checked = Checked { body, size, given, deadline };
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
        mut place: Place<'_>,
    ) -> Result<PublishTicket, EnqueueError> {
        // Only a message that waits for company has to know since when.
        let now = if self.settings.linger.is_zero() { self.started } else { Instant::now() };
        let mut queue = self.lock();
        if queue.closing.is_some() || queue.ended {
            drop(queue);
            return Err(self.closed(Some(checked)));
        }
        let places = place.take(self.permits(checked.size));
        let Checked { body, size, given, deadline } = checked;
        let body = queue.chunk.keep(body, size);
        let (mut entry, ticket) = queue.entry(body, places);
        entry.set_deadline(given, deadline);
        queue.window.push(entry, size, now);
        self.pushed(queue, deadline);
        Ok(ticket)
    }

    /// There is more in the window.
    fn pushed(&self, mut queue: MutexGuard<'_, Queue>, deadline: Option<Instant>) {
        let sooner = deadline.is_some_and(|new| queue.deadline.is_none_or(|old| new < old));
        if sooner {
            queue.deadline = deadline;
        }
        let idle = std::mem::take(&mut queue.idle);
        drop(queue);
        if sooner {
            self.timing.notify_waiters();
        }
        if idle {
            self.wake.notify_one();
        }
    }

    /// Waits for as many places as a batch takes, or all there are. Cancel-safe.
    pub(super) async fn admit_together(
        &self,
        messages: usize,
        bytes: usize,
    ) -> Result<Place<'_>, EnqueueError> {
        let places = messages.clamp(1, self.settings.window_messages);
        let places = u32::try_from(places).unwrap_or(u32::MAX);
        let message = self.messages.acquire_many(places).await;
        let message = message.map_err(|_| self.closed(None))?;
        let many = self.permits(bytes);
        let bytes = self.bytes.acquire_many(many).await.map_err(|_| self.closed(None))?;
        bytes.forget();
        message.forget();
        Ok(Place { core: self, places: Places { messages: places, bytes: many } })
    }

    /// Puts messages into the window that are stored all together or not at all. They have one
    /// deadline, so that they are given up together, too.
    pub(super) fn push_together(
        &self,
        messages: Vec<Checked>,
        atomic: pb::AtomicBatch,
        deadline: Option<Instant>,
        mut place: Place<'_>,
    ) -> Result<Vec<PublishTicket>, EnqueueError> {
        let mut queue = self.lock();
        if queue.closing.is_some() || queue.ended {
            drop(queue);
            return Err(self.closed(None));
        }
        let mut atomic = Some(atomic);
        let mut tickets = Vec::with_capacity(messages.len());
        let mut entries = Vec::with_capacity(messages.len());
        for Checked { body, size, given, .. } in messages {
            // The first one holds the places of all: they have one fate, at one time.
            let (mut entry, ticket) = queue.entry(body, place.take(u32::MAX));
            entry.set_deadline(given, deadline);
            entry.set_atomic(atomic.take());
            entries.push((entry, size));
            tickets.push(ticket);
        }
        queue.window.push_together(entries, Instant::now());
        self.pushed(queue, deadline);
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
        let told_by_now = |core: &Self| core.lock().first_untold().is_none_or(|n| n >= below);
        self.wait_until(&self.changed, told_by_now).await;
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
        self.timing.notify_waiters();
        self.changed.notify_waiters();
    }

    /// Closes, waits for it, and hands out what is left.
    pub(crate) async fn close(&self, within: Duration) -> Vec<Unresolved> {
        self.start_closing(within);
        let deadline = after(Instant::now(), within);
        let told = self.wait_until(&self.changed, |core| {
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
        self.wait_until(&self.changed, |core| {
            let queue = core.lock();
            queue.welcomed || queue.ended
        })
        .await;
        match &self.lock().failure {
            Some(kind) => Err(PublishError::new(kind.clone(), Outcome::NotPersisted)),
            None => Ok(()),
        }
    }

    async fn wait_until(&self, changed: &Notify, condition: impl Fn(&Self) -> bool) {
        loop {
            let changed = changed.notified();
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
                self.release(queue.expire(now));
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
        self.wait_until(&self.timing, |core| {
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
        let mut freed = Places::default();
        for (mut entry, kind) in verdict.lost {
            freed += entry.places;
            queue.fail(&mut entry, kind, Outcome::Unknown);
        }
        drop(queue);
        self.release(freed);
        self.notify();
        then
    }

    /// The results of consecutive messages have come. `Err` if these are not the ones whose results
    /// are due.
    pub(super) fn answered(
        &self,
        first: u64,
        count: u32,
        fate: impl Fn(u64, &Entry) -> Fate,
    ) -> Result<(), String> {
        let mut queue = self.lock();
        let mut entries: Vec<Entry> = queue.window.results(first, count)?.collect();
        queue.telling = entries.iter().find(|entry| entry.ticket.is_some()).map(|e| e.number);
        drop(queue);
        // Without the lock: others go on meanwhile.
        let mut freed = Places::default();
        entries.iter().for_each(|entry| freed += entry.places);
        self.release(freed);
        let unheard = tell_all(&mut entries, fate);
        let mut queue = self.lock();
        queue.telling = None;
        queue.failures.add(unheard);
        Ok(())
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

    /// Fates were told.
    pub(super) fn notify(&self) {
        if self.lock().closing.is_some() {
            self.timing.notify_waiters();
        }
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
            for (mut entry, sent) in queue.window.drain() {
                let outcome = if sent { Outcome::Unknown } else { Outcome::NotPersisted };
                if entry.ticket.is_some() {
                    let message = entry.to_message();
                    queue.unresolved.push(Unresolved { message, outcome });
                }
                queue.fail(&mut entry, kind.clone(), outcome);
            }
        }
        self.messages.close();
        self.bytes.close();
        if !self.state.get().is_closed() {
            self.state.set(ConnectionState::Closed { cause: cause.map(Arc::new) });
        }
        self.wake.notify_one();
        self.timing.notify_waiters();
        self.changed.notify_waiters();
    }
}

impl Queue {
    pub(super) fn is_closing(&self) -> bool {
        self.closing.is_some()
    }

    /// The number of the oldest message whose fate is not told.
    fn first_untold(&self) -> Option<u64> {
        let in_window = || self.window.iter().find(|entry| entry.ticket.is_some());
        self.telling.or_else(|| in_window().map(|entry| entry.number))
    }

    /// Whether nothing is left to do: messages that were sent and have outlived their deadline
    /// keep their places, but nobody waits for them.
    fn has_closed(&self) -> bool {
        self.closing.is_some() && self.first_untold().is_none()
    }

    /// Whether the session has to be woken for what comes next.
    pub(super) fn set_idle(&mut self, idle: bool) {
        self.idle = idle;
    }

    /// A new connection is made. One that ended by a panic may have left something half done.
    pub(super) fn hello(&mut self) -> Hello {
        self.telling = None;
        self.window.hello()
    }

    fn entry(&mut self, body: Body, places: Places) -> (Entry, PublishTicket) {
        let (teller, ticket) = self.tickets.make();
        let number = self.entries;
        self.entries += 1;
        (Entry::new(body, number, places, teller), ticket)
    }

    fn fail(&mut self, entry: &mut Entry, kind: PublishErrorKind, outcome: Outcome) {
        self.failures.add(entry.fail(kind, outcome));
    }

    /// Tells those whose deadline has passed, and answers the places that this frees. A message
    /// that was sent keeps its place: its sequence must not be skipped.
    fn expire(&mut self, now: Instant) -> Places {
        let mut freed = Places::default();
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return freed;
        }
        let is_over = |entry: &Entry| entry.deadline().is_some_and(|deadline| now >= deadline);
        let given_up = self.window.give_up_unsent(is_over);
        if !given_up.is_empty() {
            // Few that stay must not keep the memory of many that go.
            self.window.unsent_mut().for_each(Entry::keep_alone);
        }
        for mut entry in given_up {
            freed += entry.places;
            self.fail(&mut entry, PublishErrorKind::DeadlineElapsed, Outcome::NotPersisted);
        }
        for entry in self.window.sent_mut().filter(|entry| is_over(entry)) {
            let unheard = entry.fail(PublishErrorKind::DeadlineElapsed, Outcome::Unknown);
            self.failures.add(unheard);
            entry.clear_deadline();
        }
        self.deadline = self.window.iter().filter_map(Entry::deadline).min();
        freed
    }
}

impl Failures {
    fn add(&mut self, errors: impl IntoIterator<Item = PublishError>) {
        for error in errors {
            if self.told == self.count {
                self.first = Some(error);
            }
            self.count += 1;
        }
    }
}
