//! Waiting for conditions: a scenario never sleeps for a fixed time and hopes.

use std::{fmt::Display, time::Duration};

use anyhow::{Context as _, Result, bail};
use tokio::time::{Instant, sleep, timeout};

/// How often a condition without a notification of its own is looked at.
const POLL: Duration = Duration::from_millis(10);

/// Waits until `condition` holds.
///
/// # Errors
///
/// If it does not hold `within` this time; the message says `what` was waited for.
pub async fn until(
    what: impl Display,
    within: Duration,
    mut condition: impl FnMut() -> bool,
) -> Result<()> {
    until_ok(what, within, async || {
        if condition() {
            return Ok(());
        }
        bail!("it never held")
    })
    .await
}

/// Tries `attempt` until it succeeds, and gives its value.
///
/// # Errors
///
/// The last failure, if there is no success `within` this time.
pub async fn until_ok<T>(
    what: impl Display,
    within: Duration,
    mut attempt: impl AsyncFnMut() -> Result<T>,
) -> Result<T> {
    let deadline = Instant::now() + within;
    loop {
        let failure = match soon(&what, within, attempt()).await {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(failure)) | Err(failure) => failure,
        };
        if Instant::now() >= deadline {
            return Err(failure.context(format!("waited {within:?} for: {what}")));
        }
        sleep(POLL).await;
    }
}

/// Awaits `future`, but not for ever.
///
/// # Errors
///
/// If it is not ready `within` this time; the message says `what` was waited for.
pub async fn soon<T>(
    what: impl Display,
    within: Duration,
    future: impl Future<Output = T>,
) -> Result<T> {
    timeout(within, future).await.with_context(|| format!("not ready within {within:?}: {what}"))
}
