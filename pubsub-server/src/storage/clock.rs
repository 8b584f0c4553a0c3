//! Time as the storage counts it.
//!
//! Two questions need two clocks. *When was this stored?* is the time of day, kept from going
//! back. *Is this identity old enough to be forgotten?* must not depend on the time of day at all:
//! a clock that is set back would prolong the window, and one that leaps ten years ahead would end
//! it. Its answer is an [`Age`]: it runs with the monotonic clock, and across a restart it believes
//! the time of day for at most [`MAX_DOWNTIME`].

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::record::Timestamp;

/// A longer pause between two runs counts as this long: identities live longer then, never
/// shorter.
const MAX_DOWNTIME: Duration = Duration::from_secs(24 * 3600);

/// Milliseconds that a store has lived.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub(super) struct Age(pub(super) u64);

impl Age {
    /// This much later.
    pub(super) fn after(self, millis: u64) -> Self {
        Self(self.0.saturating_add(millis))
    }
}

/// A moment on both clocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Now {
    /// The time of day, the highest that was ever seen.
    pub(super) wall: Timestamp,
    /// The age of the store.
    pub(super) age: Age,
}

/// The clock of one run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    highest: Timestamp,
    start: Now,
    started: Instant,
}

impl Clock {
    /// Goes on from the moment that was stored last.
    pub(super) fn resume(stored: Now, wall: Timestamp, instant: Instant) -> Self {
        let down = wall.since(stored.wall).min(MAX_DOWNTIME);
        let start = Now { wall: stored.wall.max(wall), age: stored.age.after(millis(down)) };
        Self { highest: start.wall, start, started: instant }
    }

    /// The moment, given what the outer clocks say.
    pub(super) fn now(&mut self, wall: Timestamp, instant: Instant) -> Now {
        self.highest = self.highest.max(wall);
        let running = instant.saturating_duration_since(self.started);
        Now { wall: self.highest, age: self.start.age.after(millis(running)) }
    }
}

/// Whole milliseconds.
pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: u64 = 3_600_000;

    #[test]
    fn the_time_of_day_never_goes_back_and_age_follows_the_monotonic_clock() {
        let start = Instant::now();
        let mut clock = Clock::resume(Now::default(), Timestamp(10 * HOUR), start);
        let first = clock.now(Timestamp(10 * HOUR), start);
        let later = start + Duration::from_secs(60);
        let back = clock.now(Timestamp(2 * HOUR), later);
        assert_eq!(back.wall, first.wall);
        assert_eq!(back.age, first.age.after(60_000));
        let leap = clock.now(Timestamp(90_000 * HOUR), later);
        assert_eq!(leap.wall, Timestamp(90_000 * HOUR));
        assert_eq!(leap.age, back.age);
    }

    #[test]
    fn a_restart_counts_the_pause_up_to_a_day() {
        let stored = Now { wall: Timestamp(100 * HOUR), age: Age(5 * HOUR) };
        let age = |wall: u64| {
            Clock::resume(stored, Timestamp(wall), Instant::now())
                .now(Timestamp(wall), Instant::now())
                .age
        };
        assert_eq!(age(103 * HOUR), Age(8 * HOUR));
        assert_eq!(age(90_000 * HOUR), Age(29 * HOUR));
        assert_eq!(age(7 * HOUR), Age(5 * HOUR));
    }
}
