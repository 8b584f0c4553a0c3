//! What is going on, for the faults to wait for and for people to see.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Result;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, interval, timeout};

/// A count that all tasks can see.
#[derive(Debug, Default)]
pub(crate) struct Count(AtomicU64);

impl Count {
    pub(crate) fn add(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

/// The state of the run.
#[derive(Debug)]
pub(crate) struct Tally {
    started: Instant,
    changed: Notify,
    pub(crate) enqueued: Count,
    /// Tickets that were resolved.
    pub(crate) answered: Count,
    /// Deliveries that were handed to the consumer.
    pub(crate) shown: Count,
    pub(crate) acked: Count,
    pub(crate) reconnects: Count,
    pub(crate) kills: Count,
    pub(crate) cuts: Count,
    pub(crate) freezes: Count,
}

impl Tally {
    pub(crate) fn new() -> Self {
        Self {
            started: Instant::now(),
            changed: Notify::new(),
            enqueued: Count::default(),
            answered: Count::default(),
            shown: Count::default(),
            acked: Count::default(),
            reconnects: Count::default(),
            kills: Count::default(),
            cuts: Count::default(),
            freezes: Count::default(),
        }
    }

    /// Publishes that wait for their answer.
    pub(crate) fn unanswered(&self) -> u64 {
        self.enqueued.get().saturating_sub(self.answered.get())
    }

    /// Deliveries that the consumer holds and has not acked.
    pub(crate) fn held(&self) -> u64 {
        self.shown.get().saturating_sub(self.acked.get())
    }

    pub(crate) fn changed(&self) {
        self.changed.notify_waiters();
    }

    /// Waits for a condition; whether it came true in time.
    pub(crate) async fn wait_for(
        &self,
        within: Duration,
        condition: impl Fn(&Self) -> bool,
    ) -> bool {
        let wait = async {
            loop {
                let changed = self.changed.notified();
                if condition(self) {
                    return;
                }
                changed.await;
            }
        };
        timeout(within, wait).await.is_ok()
    }

    /// Tells of a failure when it happens, since what follows from it is noticed first.
    pub(crate) fn told<T>(&self, who: &str, result: Result<T>) -> Result<T> {
        result.inspect_err(|error| self.event(&format!("FAILED   {who}: {error:#}")))
    }

    /// Tells what has happened.
    pub(crate) fn event(&self, text: &str) {
        println!("{:6.1}s  {text}", self.started.elapsed().as_secs_f64());
    }
}

/// Shows the counts every second until it is dropped.
#[derive(Debug)]
pub(crate) struct Progress {
    _task: JoinSet<()>,
}

impl Progress {
    pub(crate) fn show(tally: &Arc<Tally>) -> Self {
        let mut task = JoinSet::new();
        let tally = Arc::clone(tally);
        task.spawn(async move {
            let mut tick = interval(Duration::from_secs(1));
            loop {
                tick.tick().await;
                tally.event(&format!(
                    "published {:>6}   received {:>6}   unanswered {:>5}   held {:>4}",
                    tally.answered.get(),
                    tally.shown.get(),
                    tally.unanswered(),
                    tally.held(),
                ));
            }
        });
        Self { _task: task }
    }
}
