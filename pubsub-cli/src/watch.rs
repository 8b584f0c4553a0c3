//! Tells on standard error what happens to a connection.

use std::sync::Arc;

use pubsub_client::{ConnectionState, StateWatch};
use tokio::task::JoinSet;
use tokio::time::Instant;

/// Announces the changes of a connection's state until it is dropped.
#[derive(Debug)]
pub(crate) struct Announcer {
    _task: JoinSet<()>,
}

impl Announcer {
    pub(crate) fn new(state: StateWatch) -> Self {
        let mut task = JoinSet::new();
        task.spawn(announce(state));
        Self { _task: task }
    }
}

async fn announce(mut state: StateWatch) {
    let mut lost = None;
    let mut last_cause = String::new();
    let mut waiting = false;
    while let Some(state) = state.changed().await {
        match state {
            ConnectionState::Reconnecting { since, cause, .. } => {
                lost.get_or_insert(Instant::from_std(since));
                let cause = Arc::as_ref(&cause).to_string();
                // One line for each new cause, not one for each of many attempts.
                if cause != last_cause {
                    eprintln!("pubsub: connection lost: {cause}; reconnecting");
                    last_cause = cause;
                }
            }
            ConnectionState::Standby { active } => {
                eprintln!("pubsub: standing by: consumer {active} is active");
                waiting = true;
            }
            ConnectionState::Blocked { reason, detail } => {
                eprintln!("pubsub: waiting: {detail} ({reason})");
                waiting = true;
            }
            ConnectionState::Connected => {
                if let Some(since) = lost.take() {
                    eprintln!("pubsub: reconnected after {:.1?}", since.elapsed());
                } else if waiting {
                    eprintln!("pubsub: going on");
                }
                waiting = false;
                last_cause.clear();
            }
            ConnectionState::Connecting
            | ConnectionState::Draining
            | ConnectionState::Closed { .. }
            | _ => {}
        }
    }
}
