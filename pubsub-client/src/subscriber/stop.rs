//! Leaving in good order.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use super::core::Core;
use crate::liveness::after;

/// What happens to deliveries that the application still holds when a subscriber stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drain {
    /// They are waited for.
    Finish,
    /// They are handed back at once, without being counted as failures. Their acks come too
    /// late.
    Release,
}

/// Stops a [`Subscriber`](crate::Subscriber) from anywhere. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Stopper {
    core: Arc<Core>,
}

impl Stopper {
    pub(crate) fn new(core: Arc<Core>) -> Self {
        Self { core }
    }

    /// Stops the subscriber and waits for it, at most for `within`.
    ///
    /// Nothing is handed out any more, and the stream ends. Deliveries that are held are waited
    /// for or not, as `drain` says; acks are sent and their confirmation is awaited, through a
    /// disconnect if need be; then the server is told, so that another consumer takes over at
    /// once. The report says what was left when the time was up.
    pub async fn stop(&self, drain: Drain, within: Duration) -> StopReport {
        let deadline = after(Instant::now(), within);
        self.core.request_stop(drain, within);
        // The session ends by itself in time; the timeout guards against one that cannot.
        let ended = self.core.wait_until(Core::has_ended);
        if timeout_at(deadline + Duration::from_millis(100), ended).await.is_err() {
            self.core.end(None);
        }
        let inner = self.core.lock();
        StopReport {
            unfinished: inner.resume.outstanding(),
            unconfirmed: inner.resume.unconfirmed(),
        }
    }
}

/// What was left when a subscriber had stopped. It comes again, to the next consumer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct StopReport {
    /// Deliveries that the application still held.
    pub unfinished: usize,
    /// Acks and nacks that the server did not confirm. They may have arrived.
    pub unconfirmed: u64,
}

impl StopReport {
    /// Whether nothing was left.
    pub fn is_clean(&self) -> bool {
        *self == Self::default()
    }
}

/// A stop was asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stopping {
    drain: Drain,
    /// When to say goodbye whatever is left.
    pub(super) last_call: Instant,
    /// When to be gone.
    pub(super) end: Instant,
}

impl Stopping {
    pub(super) fn new(drain: Drain, within: Duration) -> Self {
        let end = after(Instant::now(), within);
        let spare = (within / 10).min(Duration::from_millis(500));
        Self { drain, last_call: end - spare, end }
    }

    /// Two stops: what both ask for.
    pub(super) fn sooner(self, other: Self) -> Self {
        let release = self.drain == Drain::Release || other.drain == Drain::Release;
        Self {
            drain: if release { Drain::Release } else { Drain::Finish },
            last_call: self.last_call.min(other.last_call),
            end: self.end.min(other.end),
        }
    }
}

impl Core {
    /// Whether a stop was asked for and nothing is left to wait for.
    pub(super) fn may_leave(&self, now: Instant) -> bool {
        let inner = self.lock();
        let Some(stop) = inner.stop else { return false };
        let held = stop.drain == Drain::Finish && inner.resume.outstanding() > 0;
        now >= stop.last_call || !(held || inner.resume.is_unconfirmed())
    }

    /// Waits until a stop was asked for and its time is up.
    pub(super) async fn stop_overdue(&self) {
        self.wait_until(|core| core.lock().stop.is_some()).await;
        // A later stop can be a sooner one.
        loop {
            let end = self.lock().stop.map(|stop| stop.end);
            let Some(end) = end.filter(|end| Instant::now() < *end) else { return };
            let sooner = |core: &Self| core.lock().stop.is_some_and(|stop| stop.end < end);
            // Either way: look again.
            let _ = timeout_at(end, self.wait_until(sooner)).await;
        }
    }
}
