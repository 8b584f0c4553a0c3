//! The outside world that a simulation can replace: wall clock and randomness. Monotonic time is
//! tokio's.

use std::fmt;
use std::sync::Arc;

use crate::record::{Epoch, Timestamp, Uuid};

/// The wall clock and the source of random numbers.
pub trait Env: fmt::Debug + Send + Sync + 'static {
    /// The time of day. It may jump; the storage makes it monotonic where that matters.
    fn now(&self) -> Timestamp;

    /// Random bytes, unpredictable outside of simulations.
    fn fill(&self, bytes: &mut [u8]);
}

/// An environment, shared.
pub type SharedEnv = Arc<dyn Env>;

impl dyn Env {
    /// A random identity.
    pub fn uuid(&self) -> Uuid {
        let mut bytes = [0; 16];
        self.fill(&mut bytes);
        Uuid(bytes)
    }

    /// A random epoch.
    pub fn epoch(&self) -> Epoch {
        let mut bytes = [0; 8];
        self.fill(&mut bytes);
        Epoch(u64::from_le_bytes(bytes).max(1))
    }
}

/// The operating system.
#[derive(Clone, Copy, Debug, Default)]
pub struct System;

impl Env for System {
    #[expect(clippy::disallowed_methods, reason = "this is the injected clock")]
    fn now(&self) -> Timestamp {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let millis = since.map_or(0, |since| since.as_millis());
        Timestamp(u64::try_from(millis).unwrap_or(u64::MAX))
    }

    fn fill(&self, bytes: &mut [u8]) {
        getrandom::fill(bytes).expect("the operating system has a source of randomness");
    }
}
