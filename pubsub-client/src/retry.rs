//! When to try again: the one user of the `backoff` crate.

use std::time::Duration;

use backoff::backoff::Backoff as _;
use backoff::{ExponentialBackoff, ExponentialBackoffBuilder};

use crate::env::SharedEnv;
use crate::limits;

/// How long to wait between attempts to reconnect.
///
/// The delay doubles with each attempt in a row, from `initial` up to `max`, and the actual wait
/// is a random part of it ("full jitter"), so that ten thousand clients of a restarted server do
/// not return in the same millisecond. There is no limit to the number of attempts, except against
/// something that is no pubsub server ([`ForeignAnswer`](crate::ForeignAnswer)). The count starts
/// over on progress (a publish result, an ack confirmation, a new message, an answer on a
/// stream that has lasted), not merely because a
/// connection was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    initial: Duration,
    max: Duration,
}

impl RetryPolicy {
    /// A policy with delays from `initial` up to `max`. A `max` below `initial` counts as
    /// `initial`, and an `initial` below 1 ms as 1 ms.
    pub fn new(initial: Duration, max: Duration) -> Self {
        // Zero would double to zero: a hot loop.
        let initial = initial.max(Duration::from_millis(1));
        Self { initial, max: max.max(initial) }
    }
}

impl Default for RetryPolicy {
    /// From 100 ms up to 5 s.
    fn default() -> Self {
        Self::new(Duration::from_millis(100), Duration::from_secs(5))
    }
}

/// The delays of one session.
#[derive(Debug)]
pub(crate) struct Backoff {
    ceiling: ExponentialBackoff,
    env: SharedEnv,
    attempt: u32,
}

impl Backoff {
    pub(crate) fn new(policy: RetryPolicy, env: SharedEnv) -> Self {
        let ceiling = ExponentialBackoffBuilder::new()
            .with_initial_interval(policy.initial)
            .with_max_interval(policy.max)
            .with_multiplier(2.0)
            // The crate draws its own randomness and gives up after 15 minutes by default; ours
            // is injected, and a client never gives up.
            .with_randomization_factor(0.0)
            .with_max_elapsed_time(None)
            .build();
        Self { ceiling, env, attempt: 0 }
    }

    /// The next delay, at least what the server asked for within reason.
    pub(crate) fn next_delay(&mut self, asked: Option<Duration>) -> Duration {
        self.attempt = self.attempt.saturating_add(1);
        let ceiling = self.ceiling.next_backoff().unwrap_or(self.ceiling.max_interval);
        let delay = ceiling.min(self.ceiling.max_interval).mul_f64(self.env.fraction());
        delay.max(asked.unwrap_or_default().min(limits::MAX_ADVICE))
    }

    /// The attempts since the last progress.
    pub(crate) fn attempt(&self) -> u32 {
        self.attempt
    }

    /// Something was achieved: the next failure is a first one again.
    pub(crate) fn progress(&mut self) {
        if self.attempt > 0 {
            self.attempt = 0;
            self.ceiling.reset();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::env::Env;

    #[derive(Debug)]
    struct Always(u8);

    impl Env for Always {
        fn fill(&self, bytes: &mut [u8]) {
            bytes.fill(self.0);
        }
    }

    /// In milliseconds, rounded.
    fn delays(byte: u8, count: usize) -> Vec<u128> {
        let mut backoff = Backoff::new(RetryPolicy::default(), Arc::new(Always(byte)));
        (0..count).map(|_| (backoff.next_delay(None).as_micros() + 500) / 1000).collect()
    }

    #[test]
    fn delays_double_up_to_the_maximum() {
        let longest = [100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000];
        assert_eq!(delays(0xff, 9), longest);
    }

    #[test]
    fn jitter_is_full() {
        assert_eq!(delays(0, 9), [0; 9]);
        let half = delays(0x80, 3);
        assert!(
            half.iter().zip([50, 100, 200]).all(|(half, about)| half.abs_diff(about) < 3),
            "{half:?}"
        );
    }

    #[test]
    fn a_healthy_period_resets_and_a_server_can_ask_for_more() {
        let mut backoff = Backoff::new(RetryPolicy::default(), Arc::new(Always(0xff)));
        for _ in 0..1000 {
            backoff.next_delay(None);
        }
        assert_eq!(backoff.attempt(), 1000);
        backoff.progress();
        assert_eq!(backoff.attempt(), 0);
        assert!(backoff.next_delay(None) < Duration::from_millis(101));
        let asked = Duration::from_secs(7);
        assert_eq!(backoff.next_delay(Some(asked)), asked);
        assert_eq!(backoff.next_delay(Some(Duration::MAX)), limits::MAX_ADVICE);
    }

    #[test]
    fn a_policy_from_zero_is_no_hot_loop() {
        let policy = RetryPolicy::new(Duration::ZERO, Duration::from_secs(5));
        let mut backoff = Backoff::new(policy, Arc::new(Always(0xff)));
        let delays: Vec<_> = (0..20).map(|_| backoff.next_delay(None)).collect();
        assert!(delays[19] > Duration::from_secs(4), "{delays:?}");
    }
}
