//! What waits for the committer.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::limits;
use crate::storage::{
    Append, AppendOutcome, Change, CommitError, Item, OpenOutcome, OpenPublisher, Promise, Urgency,
};

/// A write with its answer to be.
#[derive(Debug)]
pub(super) enum Request {
    Append(Append, Promise<AppendOutcome>),
    Open(OpenPublisher, Promise<OpenOutcome>),
    Apply(Vec<Change>, Urgency, Promise<()>),
}

impl Request {
    pub(super) fn fail(self, error: CommitError) {
        match self {
            Self::Append(_, promise) => promise.fail(error),
            Self::Open(_, promise) => promise.fail(error),
            Self::Apply(_, _, promise) => promise.fail(error),
        }
    }

    fn is_urgent(&self) -> bool {
        !matches!(self, Self::Apply(_, Urgency::Soon, _))
    }

    /// About how much it adds to a commit.
    pub(super) fn bytes(&self) -> usize {
        let item = |item: &Item| match item {
            Item::Store(message) => 64 + message.body.len(),
            Item::Refuse(_) | Item::RefuseNew(..) => 64,
        };
        #[expect(clippy::wildcard_enum_match_arm, reason = "the others are small")]
        let change = |change: &Change| match change {
            Change::PutSchema(_, schema) => 256 + schema.rules.len(),
            Change::Store { message, .. } => 64 + message.body.len(),
            _ => 256,
        };
        match self {
            Self::Append(append, _) => 64 + append.items.iter().map(item).sum::<usize>(),
            Self::Open(..) => 64,
            Self::Apply(changes, ..) => changes.iter().map(change).sum(),
        }
    }

    /// How many requests may wait for this one to be accepted. Changes have room beyond that of
    /// messages, so that a flood of publishes cannot keep acks out.
    fn room(&self) -> usize {
        match self {
            Self::Append(..) | Self::Open(..) => limits::MAX_QUEUED_GROUPS,
            Self::Apply(..) => 2 * limits::MAX_QUEUED_GROUPS,
        }
    }
}

/// A queue with one reader. Bounded by [`Request::room`]; the bytes of messages are bounded before
/// they come here.
#[derive(Debug, Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    arrived: Condvar,
}

#[derive(Debug, Default)]
struct State {
    requests: VecDeque<Request>,
    urgent: usize,
    closed: bool,
}

/// What the reader finds.
#[derive(Debug)]
pub(super) enum Taken {
    /// Requests for one commit, in order.
    Group(Vec<Request>),
    /// Nothing came in time.
    Idle,
    /// Nothing will come any more.
    Closed,
}

impl Queue {
    /// Accepts a request, or fails it.
    pub(super) fn push(&self, request: Request) {
        let mut state = self.lock();
        let refusal = if state.closed {
            CommitError::Refused
        } else if state.requests.len() >= request.room() {
            CommitError::Overloaded
        } else {
            state.urgent += usize::from(request.is_urgent());
            state.requests.push_back(request);
            drop(state);
            // The reader may be waiting for the first one, or for an urgent one; with the lock held
            // it would wake up only to wait again.
            self.arrived.notify_one();
            return;
        };
        drop(state);
        request.fail(refusal);
    }

    /// Waits for requests, and takes as many as have so many bytes, or a single larger one. Requests that are not
    /// urgent wait for company.
    pub(super) fn take(&self, patience: Duration, max_bytes: usize) -> Taken {
        let state = self.lock();
        let nothing = |state: &mut State| state.requests.is_empty() && !state.closed;
        let (state, _) = self
            .arrived
            .wait_timeout_while(state, patience, nothing)
            .unwrap_or_else(PoisonError::into_inner);
        let lonely =
            |state: &mut State| !state.requests.is_empty() && state.urgent == 0 && !state.closed;
        let (mut state, _) = self
            .arrived
            .wait_timeout_while(state, limits::ACK_LINGER, lonely)
            .unwrap_or_else(PoisonError::into_inner);
        let group = state.pop_group(max_bytes);
        match (group.is_empty(), state.closed) {
            (false, _) => Taken::Group(group),
            (true, false) => Taken::Idle,
            (true, true) => Taken::Closed,
        }
    }

    /// Whether nothing waits.
    pub(super) fn is_empty(&self) -> bool {
        self.lock().requests.is_empty()
    }

    /// Refuses everything from now on; what was accepted can still be taken.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.arrived.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics with the lock held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn pop_group(&mut self, max_bytes: usize) -> Vec<Request> {
        let mut group = Vec::new();
        let mut bytes = 0;
        while let Some(request) = self.requests.front() {
            bytes += request.bytes();
            if bytes > max_bytes && !group.is_empty() {
                break;
            }
            let request = self.requests.pop_front().expect("it was just looked at");
            self.urgent -= usize::from(request.is_urgent());
            group.push(request);
        }
        group
    }
}
