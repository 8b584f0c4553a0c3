//! What has happened since the start, in numbers, and how much there is: for metrics.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use super::events::{Presence, What};
use super::session::GapReason;
use super::{Broker, Owed, Topic};
use crate::names::{SubscriptionName, TopicName};
use crate::storage::TopicStats;

/// Events, counted since the start of the server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Messages that subscriptions will never receive, by what has removed them, with those that
    /// a filter would have left out.
    pub missed: BTreeMap<GapReason, u64>,
    /// Messages that failed and were moved to dead-letter topics.
    pub dead_letters: u64,
    /// Messages that failed and were skipped.
    pub skipped: u64,
    /// Dead letters that were sent back.
    pub redriven: u64,
    /// Consumers that were lost without a goodbye.
    pub lost_consumers: u64,
}

impl Counts {
    pub(super) fn count(&mut self, what: &What) {
        match what {
            What::LetGo { count, into: Some(_), .. } => self.dead_letters += count,
            What::LetGo { count, into: None, .. } => self.skipped += count,
            What::Settled { count, redriven: true, .. } => self.redriven += count,
            What::Consumer(_, _, Presence::Lost) => self.lost_consumers += 1,
            // Counted where it is known how many are missed.
            What::Gap { .. }
            | What::Settled { redriven: false, .. }
            | What::Consumer(..)
            | What::Topic(..)
            | What::Purged { .. }
            | What::Subscription(..)
            | What::Stalled { .. }
            | What::StallEnded { .. }
            | What::DiskFull
            | What::DiskHasRoom => {}
        }
    }
}

/// How much there is.
#[derive(Clone, Debug)]
pub struct Census {
    /// What has happened.
    pub counts: Counts,
    /// Each topic.
    pub topics: Vec<TopicCensus>,
}

/// How much there is of a topic.
#[derive(Clone, Debug)]
pub struct TopicCensus {
    /// Its name.
    pub name: TopicName,
    /// What it holds.
    pub stats: TopicStats,
    /// The floors of those who listen, as they are on disk.
    pub floors: Vec<(SubscriptionName, u64)>,
}

impl Broker {
    /// Everything that is counted.
    pub fn census(&self) -> Census {
        let counts = self.inner.events.counts();
        let topics: Vec<_> = self.state().topics.values().cloned().collect();
        let topics = topics.iter().map(|topic| topic.census(self.stats(topic))).collect();
        Census { counts, topics }
    }
}

impl Topic {
    fn census(&self, stats: TopicStats) -> TopicCensus {
        let mut listening = Vec::new();
        for (whom, floor) in self.floors().iter() {
            if let Owed::Subscription(name) = whom {
                listening.push((name.clone(), floor.load(Ordering::Acquire)));
            }
        }
        TopicCensus { name: self.record.name.clone(), stats, floors: listening }
    }
}
