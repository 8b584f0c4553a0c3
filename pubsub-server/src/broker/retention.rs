//! What may be removed, and when: what everyone has received, after its time or for want of room.

use std::sync::{Arc, Weak};
use std::time::Duration;

use super::{Broker, Inner, Topic};
use crate::record::Timestamp;
use crate::storage::{Change, Urgency};

/// How often old messages are looked for. Their age is counted in days.
const INTERVAL: Duration = Duration::from_secs(60);

impl Broker {
    /// Removes messages that everyone has received once they are old enough.
    pub(super) fn spawn_retention(&self) {
        let stop = self.inner.stop.clone();
        let broker = Arc::downgrade(&self.inner);
        self.inner.tasks.spawn(stop.run_until_cancelled_owned(run(broker)));
    }

    async fn trim_old(&self) {
        let topics: Vec<_> = self.state().topics.values().cloned().collect();
        let now = self.inner.env.now();
        for topic in topics {
            if self.owed_from(&topic) <= self.stats(&topic).first {
                continue;
            }
            let retention = topic.record.config.retention;
            let millis = u64::try_from(retention.as_millis()).unwrap_or(u64::MAX);
            let horizon = Timestamp(now.0.saturating_sub(millis));
            let epoch = topic.record.epoch;
            // A topic that cannot be read is not trimmed.
            let Ok(young) = self.inner.storage.find(epoch, horizon).await else {
                continue;
            };
            self.trim(&topic, young.min(self.owed_from(&topic)));
        }
    }

    /// Removes the older half of what nobody is owed.
    pub(super) fn trim_for_space(&self, topic: &Topic) {
        let first = self.stats(topic).first;
        let owed = self.owed_from(topic);
        self.trim(topic, first + owed.saturating_sub(first).div_ceil(2));
    }

    /// The first message that someone has not dealt with.
    fn owed_from(&self, topic: &Topic) -> u64 {
        let head = self.stats(topic).head;
        topic.lowest_floor().map_or(head, |(_, floor)| floor) + 1
    }

    fn trim(&self, topic: &Topic, below: u64) {
        if below > self.stats(topic).first {
            let change = Change::Trim { topic: topic.record.epoch, below };
            // If it fails it is tried again at the next round.
            drop(self.inner.storage.apply(vec![change], Urgency::Soon));
        }
    }
}

async fn run(broker: Weak<Inner>) {
    let mut rounds = tokio::time::interval(INTERVAL);
    loop {
        rounds.tick().await;
        let Some(inner) = broker.upgrade() else {
            return;
        };
        Broker { inner }.trim_old().await;
    }
}
