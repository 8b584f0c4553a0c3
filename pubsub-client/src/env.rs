//! The source of randomness and the wall clock, which tests and simulations can replace. Monotonic
//! time is tokio's, which they can pause.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

/// Where random identities, the jitter of reconnects and the time of day come from.
///
/// The default is the operating system. A simulation gives its own seeded source with
/// [`ClientBuilder::env`](crate::ClientBuilder::env).
pub trait Env: fmt::Debug + Send + Sync + 'static {
    /// Fills `bytes` with random bytes, unpredictable outside of simulations.
    fn fill(&self, bytes: &mut [u8]);

    /// The time of day, by which an outbox tells how old its messages are; that of the operating
    /// system by default.
    #[expect(clippy::disallowed_methods, reason = "this is the injected clock")]
    fn now(&self) -> SystemTime {
        SystemTime::now()
    }
}

pub(crate) type SharedEnv = Arc<dyn Env>;

impl dyn Env {
    /// A random identity.
    pub(crate) fn id(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        self.fill(&mut bytes);
        bytes
    }

    /// A random number from 0 up to, but not including, 1.
    pub(crate) fn fraction(&self) -> f64 {
        let mut bytes = [0; 4];
        self.fill(&mut bytes);
        f64::from(u32::from_le_bytes(bytes)) / (f64::from(u32::MAX) + 1.0)
    }
}

/// The operating system's randomness.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct System;

impl Env for System {
    fn fill(&self, bytes: &mut [u8]) {
        getrandom::fill(bytes).expect("the operating system has a source of randomness");
    }
}
