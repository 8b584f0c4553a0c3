//! The history checker: records what happened and judges it against what is stored.
//!
//! It knows nothing of how the system works, only what was promised: nothing confirmed is lost,
//! nothing comes from nowhere, one identity has one id, order is kept, and what a consumer is
//! shown has no holes and no repetitions.

mod anomaly;
mod deliveries;
mod history;
mod log;
mod publishes;
mod value;

use std::fmt;

use anyhow::{Result, bail, ensure};

pub use self::{
    anomaly::Anomaly,
    history::{Event, Id, Process, Recorder},
    log::{Entry, Log},
    value::Value,
};

/// How many anomalies a report shows, and how many events with each.
const SHOWN_ANOMALIES: usize = 10;
const SHOWN_EVENTS: usize = 16;

/// What a subscription has to see.
#[derive(Clone, Debug)]
pub struct Expectation {
    /// Its name.
    pub subscription: String,
    /// The first sequence it has to see.
    pub start: u64,
    /// Whether it must have seen everything by now.
    pub complete: bool,
}

impl Expectation {
    /// The subscription sees everything from the first message on.
    pub fn everything(subscription: &str) -> Self {
        Self { subscription: subscription.into(), start: 1, complete: true }
    }
}

/// What a run must contain to mean anything. A run in which nothing broke proves nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Gate {
    /// Confirmed publishes.
    pub stored: usize,
    /// Messages shown to an application.
    pub delivered: usize,
    /// Faults that were injected.
    pub faults: usize,
    /// Publishes that were unanswered while a fault was injected, or whose outcome is unknown.
    pub in_doubt: usize,
}

impl Gate {
    /// What a history contains.
    pub fn of(history: &[Event]) -> Self {
        let mut found = Self::default();
        let mut open = 0_usize;
        for event in history {
            match event {
                Event::Invoked(..) => open += 1,
                Event::Stored(..) => {
                    found.stored += 1;
                    open = open.saturating_sub(1);
                }
                Event::Refused(_) => open = open.saturating_sub(1),
                Event::Unknown(_) => {
                    found.in_doubt += 1;
                    open = open.saturating_sub(1);
                }
                Event::Delivered(..) => found.delivered += 1,
                Event::Fault(_) => {
                    found.faults += 1;
                    found.in_doubt += open;
                }
                Event::Gap(..) | Event::Acked(..) | Event::AckConfirmed(..) | Event::Nacked(..) => {
                }
            }
        }
        found
    }

    fn is_met_by(self, found: Self) -> bool {
        found.stored >= self.stored
            && found.delivered >= self.delivered
            && found.faults >= self.faults
            && found.in_doubt >= self.in_doubt
    }
}

/// Everything that is wrong with a history.
pub fn check(history: &[Event], logs: &[Log], expected: &[Expectation]) -> Vec<Anomaly> {
    let mut anomalies = publishes::check(history, logs);
    for log in logs {
        for expectation in expected {
            anomalies.extend(deliveries::check(history, log, expectation));
        }
    }
    anomalies
}

/// Passes a history that is right and contains enough.
///
/// # Errors
///
/// A report of what is wrong with it, or that the run is void.
pub fn judge(
    history: &[Event],
    logs: &[Log],
    expected: &[Expectation],
    gate: Gate,
) -> Result<Gate> {
    let anomalies = check(history, logs, expected);
    if !anomalies.is_empty() {
        bail!("{}", Report { history, anomalies });
    }
    let found = Gate::of(history);
    ensure!(gate.is_met_by(found), "the run is void: it needs {gate:?} and has {found:?}");
    Ok(found)
}

/// Anomalies, each with the events that explain it.
struct Report<'a> {
    history: &'a [Event],
    anomalies: Vec<Anomaly>,
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (count, events) = (self.anomalies.len(), self.history.len());
        writeln!(f, "{count} anomalies in a history of {events} events")?;
        for anomaly in self.anomalies.iter().take(SHOWN_ANOMALIES) {
            writeln!(f, "{anomaly}")?;
            let events = self.history.iter().enumerate();
            let related = events
                .filter(|(_, event)| matches!(event, Event::Fault(_)) || anomaly.concerns(event));
            let related: Vec<_> = related.collect();
            let hidden = related.len().saturating_sub(SHOWN_EVENTS);
            if hidden > 0 {
                writeln!(f, "    ... {hidden} earlier events")?;
            }
            for (index, event) in &related[hidden..] {
                writeln!(f, "    [{index}] {event}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
