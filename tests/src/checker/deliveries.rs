//! Judges what the consumers of a subscription were shown.

use std::collections::{BTreeSet, HashMap};

use super::{Anomaly, Event, Expectation, Id, Log, Process};

/// Judges one subscription of kind `exclusive` in one topic.
pub(super) fn check(history: &[Event], log: &Log, expected: &Expectation) -> Vec<Anomaly> {
    let mut view = View {
        log,
        expected,
        done: BTreeSet::new(),
        confirmed: BTreeSet::new(),
        ever_shown: BTreeSet::new(),
        processes: HashMap::new(),
        anomalies: Vec::new(),
    };
    for event in history {
        view.see(event);
    }
    if expected.complete {
        view.never_delivered();
    }
    view.anomalies
}

/// What one process has seen of the topic.
#[derive(Default)]
struct Seen {
    shown: BTreeSet<u64>,
    last: Option<u64>,
    /// The lowest nacked message that has not been shown again yet.
    nacked: Option<u64>,
}

struct View<'a> {
    log: &'a Log,
    expected: &'a Expectation,
    /// Acked by anyone, or told as a gap: nobody has to be shown it any more.
    done: BTreeSet<u64>,
    confirmed: BTreeSet<u64>,
    ever_shown: BTreeSet<u64>,
    processes: HashMap<u32, Seen>,
    anomalies: Vec<Anomaly>,
}

impl View<'_> {
    fn is_ours(&self, process: &Process, id: &Id) -> bool {
        *process.subscription == *self.expected.subscription
            && id.topic == self.log.topic
            && id.epoch == self.log.epoch
    }

    fn see(&mut self, event: &Event) {
        match event {
            Event::Delivered(process, id, value) if self.is_ours(process, id) => {
                if value.is_none() {
                    let (process, id) = (process.clone(), id.clone());
                    self.anomalies.push(Anomaly::Garbage { process, id });
                }
                self.delivered(process, id);
            }
            Event::Gap(process, first, last) if self.is_ours(process, first) => {
                self.done.extend(first.sequence..=*last);
            }
            Event::Acked(process, id) if self.is_ours(process, id) => {
                self.done.insert(id.sequence);
            }
            Event::AckConfirmed(process, id) if self.is_ours(process, id) => {
                self.confirmed.insert(id.sequence);
            }
            Event::Nacked(process, id) if self.is_ours(process, id) => {
                let seen = self.processes.entry(process.number).or_default();
                let lowest = seen.nacked.unwrap_or(u64::MAX).min(id.sequence);
                seen.nacked = Some(lowest);
            }
            _ => {}
        }
    }

    fn delivered(&mut self, process: &Process, id: &Id) {
        let sequence = id.sequence;
        let seen = self.processes.entry(process.number).or_default();
        seen.rewind_to(sequence);
        if self.confirmed.contains(&sequence) {
            self.anomalies
                .push(Anomaly::RedeliveredAfterAck { process: process.clone(), id: id.clone() });
        } else if seen.shown.contains(&sequence) {
            self.anomalies.push(Anomaly::Repeated { process: process.clone(), id: id.clone() });
        } else if let Some(after) = seen.last.filter(|last| sequence < *last) {
            self.anomalies.push(Anomaly::Backwards {
                process: process.clone(),
                shown: id.clone(),
                after,
            });
        }
        let from = seen.last.map_or(self.expected.start, |last| last + 1);
        let missing = self
            .log
            .addressed_to(&self.expected.subscription, from, sequence)
            .find(|earlier| !self.done.contains(earlier));
        if let Some(missing) = missing {
            self.anomalies.push(Anomaly::Skipped {
                process: process.clone(),
                missing: self.log.id(missing),
                shown: id.clone(),
            });
        }
        seen.shown.insert(sequence);
        seen.last = seen.last.max(Some(sequence));
        self.ever_shown.insert(sequence);
    }

    fn never_delivered(&mut self) {
        let (subscription, start) = (&self.expected.subscription, self.expected.start);
        let missing = self.log.addressed_to(subscription, start, u64::MAX);
        let missing = missing.filter(|sequence| {
            !self.done.contains(sequence) && !self.ever_shown.contains(sequence)
        });
        let anomalies = missing.map(|sequence| Anomaly::NeverDelivered {
            subscription: subscription.clone(),
            id: self.log.id(sequence),
        });
        self.anomalies.extend(anomalies);
    }
}

impl Seen {
    /// After a nack everything from the nacked message on may be shown again, in order. What was
    /// under way when the application nacked may still be shown before that.
    fn rewind_to(&mut self, sequence: u64) {
        let Some(from) = self.nacked else { return };
        let goes_back = self.last.is_some_and(|last| sequence <= last);
        if goes_back && sequence >= from {
            self.shown.split_off(&from);
            self.last = Some(from - 1);
            self.nacked = None;
        }
    }
}
