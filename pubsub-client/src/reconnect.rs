//! When a session reconnects, how it says so, and when it gives up.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::env::SharedEnv;
use crate::error::{Cause, ForeignAnswer};
use crate::limits;
use crate::retry::{Backoff, RetryPolicy};
use crate::state::{ConnectionState, StateCell};

/// A server that keeps announcing restarts is obeyed this often; in between, its streams are
/// used until they end.
const ADVICE_INTERVAL: Duration = Duration::from_secs(60);
/// Spreads the clients that follow the same announcement.
const ADVICE_JITTER: Duration = Duration::from_millis(100);

/// For how long denials by something that is no pubsub server are tried again: a proxy says so
/// while it is reloaded or its server is away, and that is over within a minute. A wrong address
/// stays wrong, and whoever has just given it should learn so.
const FOREIGN_PATIENCE: Duration = Duration::from_secs(60);

/// Why a session gives up.
#[derive(Debug)]
pub(crate) enum Hopeless {
    /// Client and server contradict each other again and again.
    Protocol(String),
    /// Nothing but such answers came for too long.
    Foreign(ForeignAnswer),
}

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
    /// The first of the foreign answers that came one after the other until now.
    foreign_since: Option<Instant>,
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
            foreign_since: None,
        }
    }

    /// A server has answered the hello. It proves nothing yet about the next connection.
    pub(crate) fn connected(&mut self) {
        self.since = None;
        self.foreign_since = None;
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
        self.foreign_since = None;
        let delay = after.min(limits::MAX_ADVICE) + ADVICE_JITTER.mul_f64(self.env.fraction());
        self.show(Cause::Drain(reason.to_owned()), delay, state, now);
        delay
    }

    /// The connection is lost, or could not be made: how long to wait. `Err` if that would be in
    /// vain.
    pub(crate) fn lost(&mut self, cause: Cause, state: &StateCell) -> Result<Duration, Hopeless> {
        let now = Instant::now();
        if let Cause::Protocol(detail) = &cause {
            self.protocol_errors += 1;
            if self.protocol_errors >= self.max_protocol_errors {
                return Err(Hopeless::Protocol(detail.clone()));
            }
        }
        if let Cause::Foreign(answer) = &cause {
            let since = *self.foreign_since.get_or_insert(now);
            if now >= since + FOREIGN_PATIENCE {
                return Err(Hopeless::Foreign(answer.clone()));
            }
        } else {
            self.foreign_since = None;
        }
        let delay = self.backoff.next_delay(cause.retry_after());
        self.show(cause, delay, state, now);
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

#[cfg(test)]
mod tests {
    use tokio::time::{advance, sleep};
    use tonic::Status;

    use super::*;
    use crate::env::System;
    use crate::error::{TransportError, Verdict};
    use crate::state::StateBoard;

    const SECOND: Duration = Duration::from_secs(1);

    fn start() -> (Reconnect, StateCell) {
        let reconnect = Reconnect::new(RetryPolicy::default(), Arc::new(System), 2);
        (reconnect, StateCell::new(1, StateBoard::new()))
    }

    fn denied() -> Cause {
        Verdict::of(&Status::permission_denied("log in first")).into()
    }

    fn cut() -> Cause {
        Cause::Transport(TransportError::new("cut"))
    }

    #[tokio::test(start_paused = true)]
    async fn denials_by_something_else_are_tried_again_for_a_minute() {
        let (mut reconnect, state) = start();
        let start = Instant::now();
        let hopeless = loop {
            match reconnect.lost(denied(), &state) {
                Ok(delay) => sleep(delay).await,
                Err(hopeless) => break hopeless,
            }
            assert!(start.elapsed() < 120 * SECOND, "it never ends");
        };
        let waited = start.elapsed();
        assert!(waited >= 60 * SECOND && waited <= 66 * SECOND, "{waited:?}");
        let Hopeless::Foreign(answer) = hopeless else { panic!("{hopeless:?}") };
        assert_eq!(answer.answer(), "PermissionDenied: log in first");
        assert!(state.get().is_reconnecting());
    }

    #[tokio::test(start_paused = true)]
    async fn whatever_comes_between_denials_starts_their_minute_anew() {
        let between: [fn(&mut Reconnect, &StateCell) -> Duration; 3] = [
            |reconnect, _| {
                reconnect.connected();
                Duration::ZERO
            },
            |reconnect, state| reconnect.lost(cut(), state).unwrap(),
            |reconnect, state| reconnect.advised("a restart", SECOND, state),
        ];
        for between in between {
            let (mut reconnect, state) = start();
            reconnect.lost(denied(), &state).unwrap();
            advance(59 * SECOND).await;
            reconnect.lost(denied(), &state).unwrap();
            let delay = between(&mut reconnect, &state);
            advance(delay + 59 * SECOND).await;
            reconnect.lost(denied(), &state).unwrap();
            advance(59 * SECOND).await;
            reconnect.lost(denied(), &state).unwrap();
            advance(SECOND).await;
            assert!(reconnect.lost(denied(), &state).is_err());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn advice_is_followed_within_reason() {
        let (mut reconnect, state) = start();
        assert!(reconnect.advised("a restart", Duration::MAX, &state) <= 301 * SECOND);
    }

    #[tokio::test(start_paused = true)]
    async fn other_trouble_is_tried_again_for_ever() {
        let (mut reconnect, state) = start();
        for _ in 0..1000 {
            let delay = reconnect.lost(cut(), &state).unwrap();
            advance(delay + 60 * SECOND).await;
        }
    }
}
