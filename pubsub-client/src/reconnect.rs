//! When a session reconnects, and how it says so.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::env::SharedEnv;
use crate::error::Cause;
use crate::retry::{Backoff, RetryPolicy};
use crate::state::{ConnectionState, StateCell};

/// A server that keeps announcing restarts is obeyed this often; in between, its streams are
/// used until they end.
const ADVICE_INTERVAL: Duration = Duration::from_secs(60);
/// Spreads the clients that follow the same announcement.
const ADVICE_JITTER: Duration = Duration::from_millis(100);

/// The reconnects of one session.
#[derive(Debug)]
pub(crate) struct Reconnect {
    backoff: Backoff,
    env: SharedEnv,
    since: Option<Instant>,
    advised: Option<Instant>,
    /// Contradictions in a row, without progress between.
    protocol_errors: u32,
    max_protocol_errors: u32,
}

impl Reconnect {
    /// `max_protocol_errors`: how many contradictions in a row end the session.
    pub(crate) fn new(policy: RetryPolicy, env: SharedEnv, max_protocol_errors: u32) -> Self {
        Self {
            backoff: Backoff::new(policy, Arc::clone(&env)),
            env,
            since: None,
            advised: None,
            protocol_errors: 0,
            max_protocol_errors,
        }
    }

    /// A connection was made. It proves nothing yet about the next one.
    pub(crate) fn connected(&mut self) {
        self.since = None;
    }

    /// Something was achieved.
    pub(crate) fn progress(&mut self) {
        self.backoff.progress();
        self.protocol_errors = 0;
    }

    /// Whether to follow the announcement of a restart.
    pub(crate) fn takes_advice(&self, now: Instant) -> bool {
        self.advised.is_none_or(|last| now >= last + ADVICE_INTERVAL)
    }

    /// The announcement was followed: how long to wait, without charge.
    pub(crate) fn advised(&mut self, reason: &str, after: Duration, state: &StateCell) -> Duration {
        let now = Instant::now();
        self.advised = Some(now);
        let delay = after + ADVICE_JITTER.mul_f64(self.env.fraction());
        self.show(Cause::Drain(reason.to_owned()), delay, state, now);
        delay
    }

    /// The connection is lost, or could not be made: how long to wait. `Err` if client and
    /// server contradict each other again and again.
    pub(crate) fn lost(&mut self, cause: Cause, state: &StateCell) -> Result<Duration, Cause> {
        if matches!(cause, Cause::Protocol(_)) {
            self.protocol_errors += 1;
            if self.protocol_errors >= self.max_protocol_errors {
                return Err(cause);
            }
        }
        let delay = self.backoff.next_delay(cause.retry_after());
        self.show(cause, delay, state, Instant::now());
        Ok(delay)
    }

    fn show(&mut self, cause: Cause, retry_in: Duration, state: &StateCell, now: Instant) {
        let since = *self.since.get_or_insert(now);
        let attempt = self.backoff.attempt();
        tracing::info!(attempt, ?retry_in, %cause, "reconnecting");
        state.set(ConnectionState::Reconnecting {
            attempt,
            since: since.into_std(),
            cause: Arc::new(cause),
            retry_in,
        });
    }
}
