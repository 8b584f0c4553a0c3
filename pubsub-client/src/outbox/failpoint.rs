//! Places where a test can stop a process, to kill it there: those that the environment variable
//! `PUBSUB_FAILPOINT` names, with the feature `failpoints`, which is for tests. Each says so on
//! standard error.

/// Stops the task here for ever.
pub(super) async fn stop(place: &str) {
    if is_named(place) {
        std::future::pending::<()>().await;
    }
}

/// Stops the thread here for ever.
pub(super) fn block(place: &str) {
    while is_named(place) {
        std::thread::park();
    }
}

#[cfg(feature = "failpoints")]
fn is_named(place: &str) -> bool {
    let named = std::env::var("PUBSUB_FAILPOINT").is_ok_and(|name| name == place);
    if named {
        eprintln!("failpoint {place}");
    }
    named
}

#[cfg(not(feature = "failpoints"))]
fn is_named(_: &str) -> bool {
    false
}
