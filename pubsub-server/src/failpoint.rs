//! Places where a test can have the process killed: with the feature `failpoints`, which is for
//! tests, the environment variable `PUBSUB_FAILPOINT` names some, divided by commas. They are
//! passed one after the other, and at the last one the process is gone as if by `kill -9`.

/// Passes a place.
#[cfg(feature = "failpoints")]
pub(crate) fn pass(place: &str) {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use rustix::process::{Signal, getpid, kill_process};

    static PLACES: LazyLock<Vec<String>> = LazyLock::new(|| {
        let places = std::env::var("PUBSUB_FAILPOINT").unwrap_or_default();
        places.split(',').filter(|place| !place.is_empty()).map(str::to_owned).collect()
    });
    static PASSED: AtomicUsize = AtomicUsize::new(0);

    let passed = PASSED.load(Ordering::SeqCst);
    if PLACES.get(passed).is_none_or(|next| next != place) {
        return;
    }
    PASSED.store(passed + 1, Ordering::SeqCst);
    if passed + 1 == PLACES.len() {
        // Its own signal is delivered before the call returns to this thread; the others stop too.
        let _ = kill_process(getpid(), Signal::KILL);
    }
}

/// Passes a place.
#[cfg(not(feature = "failpoints"))]
pub(crate) fn pass(_: &str) {}
