//! The time of day, as it stands in the file.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, SystemTime};

use crate::env::SharedEnv;

/// A time that is never behind what it, or an earlier process, has said: a clock that is set back
/// must not make an old message look young.
#[derive(Debug)]
pub(super) struct Clock {
    env: SharedEnv,
    latest: Mutex<u64>,
}

impl Clock {
    pub(super) fn new(env: SharedEnv, latest: u64) -> Self {
        Self { env, latest: Mutex::new(latest) }
    }

    /// In milliseconds since 1970.
    pub(super) fn now(&self) -> u64 {
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        *latest = (*latest).max(millis(self.env.now()));
        *latest
    }
}

fn millis(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

pub(super) fn time(millis: u64) -> SystemTime {
    let time = SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(millis));
    time.unwrap_or(SystemTime::UNIX_EPOCH)
}
