//! Tells on standard error what happens to a connection.

use std::future::Future;

use pubsub_client::{ConnectionState, StateWatch};
use tokio::task::JoinSet;
use tokio::time::Instant;

/// Announces the changes of a connection's state.
#[derive(Debug, Default)]
pub(crate) struct Announcer {
    lost: Option<Instant>,
    /// The trouble that was announced last: one line for each, not one for each of many attempts.
    said: String,
    waiting: bool,
}

impl Announcer {
    /// Announces changes until a session is opened.
    pub(crate) async fn until<T>(
        &mut self,
        mut state: StateWatch,
        opening: impl Future<Output = T>,
    ) -> T {
        tokio::pin!(opening);
        loop {
            tokio::select! {
                // First: with a session that fails its trouble ends, too, and that is no news.
                biased;
                opened = &mut opening => return opened,
                Some(state) = state.changed() => self.announce(state),
            }
        }
    }

    /// Announces changes until the task is dropped.
    pub(crate) fn go_on(mut self, mut state: StateWatch) -> JoinSet<()> {
        let mut task = JoinSet::new();
        task.spawn(async move {
            self.announce(state.get());
            while let Some(state) = state.changed().await {
                self.announce(state);
            }
        });
        task
    }

    fn announce(&mut self, state: ConnectionState) {
        match state {
            ConnectionState::Reconnecting { since, cause, .. } => {
                self.lost.get_or_insert(Instant::from_std(since));
                self.say(format!("connection lost: {cause}; reconnecting"));
            }
            ConnectionState::Standby { active } => {
                self.say(format!("standing by: consumer {active} is active"));
                self.waiting = true;
            }
            ConnectionState::Blocked { reason, detail } => {
                self.say(format!("waiting: {detail} ({reason})"));
                self.waiting = true;
            }
            ConnectionState::Connected => {
                if let Some(since) = self.lost.take() {
                    eprintln!("pubsub: reconnected after {:.1?}", since.elapsed());
                } else if self.waiting {
                    eprintln!("pubsub: going on");
                }
                self.waiting = false;
                self.said.clear();
            }
            ConnectionState::Connecting
            | ConnectionState::Draining
            | ConnectionState::Closed { .. }
            | _ => {}
        }
    }

    fn say(&mut self, trouble: String) {
        if trouble != self.said {
            eprintln!("pubsub: {trouble}");
            self.said = trouble;
        }
    }
}
