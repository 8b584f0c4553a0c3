//! Whether a session is connected, for everyone to see.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::error::{Cause, Reason};

/// The state of a publisher's or subscriber's connection.
///
/// Everything but [`Closed`](Self::Closed) heals by itself: nothing that was published, received
/// or acked is lost, and no call fails because of it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum ConnectionState {
    /// The first connection is being made.
    Connecting,
    /// Connected, and heard from within the last 2.5 heartbeat intervals.
    Connected,
    /// Connected, but another consumer of the subscription is active. This one takes over when
    /// that one leaves.
    Standby {
        /// The active consumer.
        active: String,
    },
    /// Connected, but the server cannot take messages: what is published waits.
    Blocked {
        /// Why.
        reason: Reason,
        /// The cause and the fix, for people.
        detail: String,
    },
    /// The connection is lost.
    Reconnecting {
        /// The attempts that have failed since the last progress, and the one to come.
        attempt: u32,
        /// When the connection was lost.
        since: Instant,
        /// Why the last attempt failed, or the connection was lost.
        cause: Arc<Cause>,
        /// How long the next attempt waits, counted from the moment of this state.
        retry_in: Duration,
    },
    /// Finishing what is in flight, because it was told to stop or the server restarts.
    Draining,
    /// At its end.
    Closed {
        /// Why; nothing if it was closed by the application.
        cause: Option<Arc<Cause>>,
    },
}

impl ConnectionState {
    /// Whether it is [`Connected`](Self::Connected).
    pub fn is_connected(&self) -> bool {
        matches!(self, Self::Connected)
    }

    /// Whether it is [`Reconnecting`](Self::Reconnecting).
    pub fn is_reconnecting(&self) -> bool {
        matches!(self, Self::Reconnecting { .. })
    }

    /// Whether it is [`Closed`](Self::Closed).
    pub fn is_closed(&self) -> bool {
        matches!(self, Self::Closed { .. })
    }

    fn badness(&self) -> u8 {
        match self {
            Self::Connected => 0,
            Self::Standby { .. } => 1,
            Self::Draining => 2,
            Self::Connecting => 3,
            Self::Blocked { .. } => 4,
            Self::Reconnecting { .. } => 5,
            Self::Closed { .. } => 6,
        }
    }
}

/// A state that can be looked at and waited for. Cheap to clone.
#[derive(Clone, Debug)]
pub struct StateWatch {
    /// That of a session ends with it; that of a client goes on.
    of_session: bool,
    receiver: watch::Receiver<ConnectionState>,
}

impl StateWatch {
    /// The present state.
    pub fn get(&self) -> ConnectionState {
        self.receiver.borrow().clone()
    }

    /// Waits until the state differs from the one last seen by this watch, and returns it;
    /// nothing once there will be no more changes. States that pass quickly may be skipped.
    pub async fn changed(&mut self) -> Option<ConnectionState> {
        // The sender lives on with the handle, and says nothing any more.
        if self.of_session && self.last_seen_is_closed() {
            return None;
        }
        self.receiver.changed().await.ok()?;
        Some(self.receiver.borrow_and_update().clone())
    }

    /// Waits for a state that satisfies the condition, which may be the present one; nothing if
    /// there will be no more changes.
    pub async fn wait_for(
        &mut self,
        mut condition: impl FnMut(&ConnectionState) -> bool,
    ) -> Option<ConnectionState> {
        let (of_session, mut holds) = (self.of_session, false);
        let seen = |state: &ConnectionState| {
            holds = condition(state);
            holds || (of_session && state.is_closed())
        };
        let state = self.receiver.wait_for(seen).await.ok()?.clone();
        holds.then_some(state)
    }

    fn last_seen_is_closed(&self) -> bool {
        let state = self.receiver.borrow();
        !state.has_changed() && state.is_closed()
    }
}

/// The states of all sessions of a client, and the worst of them.
#[derive(Debug)]
pub(crate) struct StateBoard {
    // Bounded by the number of sessions that someone holds: each removes its own entry.
    sessions: Mutex<BTreeMap<u64, ConnectionState>>,
    idle: Mutex<ConnectionState>,
    worst: watch::Sender<ConnectionState>,
}

impl StateBoard {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            sessions: Mutex::default(),
            idle: Mutex::new(ConnectionState::Connecting),
            worst: watch::Sender::new(ConnectionState::Connecting),
        })
    }

    pub(crate) fn watch(&self) -> StateWatch {
        StateWatch { of_session: false, receiver: self.worst.subscribe() }
    }

    /// What the client is without any session.
    pub(crate) fn set_idle(&self, state: ConnectionState) {
        *self.idle.lock().unwrap_or_else(PoisonError::into_inner) = state;
        self.update(|_| {});
    }

    fn update(&self, change: impl FnOnce(&mut BTreeMap<u64, ConnectionState>)) {
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut sessions);
        let worst = sessions.values().max_by_key(|state| state.badness()).cloned();
        let idle = || self.idle.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let worst = worst.unwrap_or_else(idle);
        // Sent under the lock, so that the last change is the last one seen.
        self.worst.send_replace(worst);
    }
}

/// The state of one session: what it is here, its watchers and the client see.
#[derive(Debug)]
pub(crate) struct StateCell {
    session: u64,
    own: watch::Sender<ConnectionState>,
    board: Arc<StateBoard>,
}

impl StateCell {
    pub(crate) fn new(session: u64, board: Arc<StateBoard>) -> Self {
        let cell = Self { session, own: watch::Sender::new(ConnectionState::Connecting), board };
        cell.set(ConnectionState::Connecting);
        cell
    }

    pub(crate) fn watch(&self) -> StateWatch {
        StateWatch { of_session: true, receiver: self.own.subscribe() }
    }

    pub(crate) fn get(&self) -> ConnectionState {
        self.own.borrow().clone()
    }

    /// Nothing comes after the end.
    pub(crate) fn set(&self, state: ConnectionState) {
        let news = self.own.send_if_modified(|own| {
            let news = !own.is_closed();
            if news {
                own.clone_from(&state);
            }
            news
        });
        if !news {
            return;
        }
        self.board.update(|sessions| {
            // One that has failed is trouble until its handle is dropped.
            if matches!(state, ConnectionState::Closed { cause: None }) {
                sessions.remove(&self.session);
            } else {
                sessions.insert(self.session, state);
            }
        });
    }
}

impl Drop for StateCell {
    fn drop(&mut self) {
        self.board.update(|sessions| {
            sessions.remove(&self.session);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_client_shows_the_worst_of_its_sessions() {
        let board = StateBoard::new();
        board.set_idle(ConnectionState::Connected);
        let watch = board.watch();
        let first = StateCell::new(1, Arc::clone(&board));
        let second = StateCell::new(2, Arc::clone(&board));
        assert!(matches!(watch.get(), ConnectionState::Connecting));
        first.set(ConnectionState::Connected);
        second.set(ConnectionState::Blocked { reason: Reason::DiskFull, detail: String::new() });
        assert!(matches!(watch.get(), ConnectionState::Blocked { .. }));
        second.set(ConnectionState::Closed { cause: None });
        assert!(watch.get().is_connected());
        first.set(ConnectionState::Draining);
        assert!(matches!(watch.get(), ConnectionState::Draining));
        drop(first);
        assert!(watch.get().is_connected());
    }

    #[test]
    fn a_session_that_failed_is_shown_by_its_client_until_it_is_dropped() {
        let board = StateBoard::new();
        board.set_idle(ConnectionState::Connected);
        let failed = StateCell::new(1, Arc::clone(&board));
        failed.set(ConnectionState::Closed { cause: Some(Arc::new(Cause::Panicked)) });
        failed.set(ConnectionState::Connected);
        assert!(failed.get().is_closed(), "nothing comes after the end");
        assert!(board.watch().get().is_closed());
        drop(failed);
        assert!(board.watch().get().is_connected());
    }

    #[tokio::test(start_paused = true)]
    async fn a_watch_ends_with_its_session_and_that_of_a_client_does_not() {
        let board = StateBoard::new();
        let cell = StateCell::new(1, Arc::clone(&board));
        let (mut first, mut second, mut client) = (cell.watch(), cell.watch(), board.watch());
        cell.set(ConnectionState::Closed { cause: Some(Arc::new(Cause::Panicked)) });
        let wait = async { second.wait_for(ConnectionState::is_connected).await.is_none() };
        assert!(tokio::time::timeout(Duration::from_secs(1), wait).await.unwrap());
        assert!(second.wait_for(ConnectionState::is_closed).await.is_some());
        let changes = async {
            let closed = first.changed().await.is_some_and(|state| state.is_closed());
            closed && first.changed().await.is_none()
        };
        assert!(tokio::time::timeout(Duration::from_secs(1), changes).await.unwrap());
        assert!(client.changed().await.is_some_and(|state| state.is_closed()));
        let more = async { client.changed().await.is_some() };
        assert!(tokio::time::timeout(Duration::from_secs(1), more).await.is_err());
    }
}
