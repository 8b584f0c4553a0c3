//! What may be removed, and when: what everyone has received, after its time or for want of room.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::error::BrokerError;
use super::{Broker, Inner, Owed, Topic};
use crate::record::Timestamp;
use crate::storage::{Change, Health, Storage, Urgency};

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
        let storage = &*self.inner.storage;
        for topic in topics {
            if topic.owed_from(storage) <= topic.stats(storage).first {
                continue;
            }
            let retention = topic.record.config.retention;
            let millis = u64::try_from(retention.as_millis()).unwrap_or(u64::MAX);
            let horizon = Timestamp(now.0.saturating_sub(millis));
            let epoch = topic.record.epoch;
            // A topic that cannot be read is not trimmed.
            let Ok(young) = storage.find(epoch, horizon).await else {
                continue;
            };
            topic.trim(storage, young.min(topic.owed_from(storage)));
        }
    }
}

impl Topic {
    /// Whether so many bytes can be stored now. If not, room is made for later, if that is possible.
    pub(super) fn check_room(
        &self,
        storage: &dyn Storage,
        bytes: usize,
    ) -> Result<(), BrokerError> {
        match &*storage.health().borrow() {
            Health::Ok => {}
            Health::DiskFull => return Err(BrokerError::DiskFull),
            Health::Failed(_) => return Err(BrokerError::Unavailable("the storage has failed")),
        }
        let stats = self.stats(storage);
        let limit = self.record.config.max_bytes;
        // As long as there is any room the whole of it goes in: what is larger than the topic
        // would wait for ever.
        let held = stats.bytes + self.uncommitted.load(Ordering::Relaxed);
        if held < limit || bytes == 0 {
            return Ok(());
        }
        let cause = match self.lowest_floor() {
            Some((who, floor)) if floor < stats.head => who.behind(stats.head - floor),
            Some(_) | None => "old messages are being removed".to_owned(),
        };
        self.trim_for_space(storage);
        Err(BrokerError::TopicFull { topic: self.record.name.clone(), limit, cause })
    }

    /// Removes the older half of what nobody is owed.
    fn trim_for_space(&self, storage: &dyn Storage) {
        let first = self.stats(storage).first;
        let owed = self.owed_from(storage);
        self.trim(storage, first + owed.saturating_sub(first).div_ceil(2));
    }

    /// The first message that someone has not dealt with.
    fn owed_from(&self, storage: &dyn Storage) -> u64 {
        let head = self.stats(storage).head;
        self.lowest_floor().map_or(head, |(_, floor)| floor) + 1
    }

    fn trim(&self, storage: &dyn Storage, below: u64) {
        if below > self.stats(storage).first {
            let change = Change::Trim { topic: self.record.epoch, below };
            // If it fails it is tried again at the next round.
            drop(storage.apply(vec![change], Urgency::Soon));
        }
    }
}

impl Owed {
    fn behind(&self, messages: u64) -> String {
        match self {
            Self::Subscription(name) => {
                format!("subscription {name} has not acked {messages} messages")
            }
            Self::Snapshot(name) => {
                format!("snapshot {name} keeps {messages} messages; delete it, and they can go")
            }
            Self::DeadLetters(name) => format!(
                "dead letters of subscription {name} wait to be redriven or purged, the oldest \
                 {messages} messages behind"
            ),
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
