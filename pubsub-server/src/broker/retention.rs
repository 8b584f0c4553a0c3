//! What may be removed, and when: what everyone has received, after its time or for want of room.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::error::BrokerError;
use super::events::{SubscriptionFate, What};
use super::session::Command;
use super::subscription::AdminCommand;
use super::{Broker, Inner, Owed, Topic};
use crate::record::{Timestamp, TopicConfig, WhenFull};
use crate::storage::{Change, Health, Storage, TopicStats, Urgency};

/// How often old messages, and subscriptions that nobody uses, are looked for.
const INTERVAL: Duration = Duration::from_secs(5);
/// How much goes at once of a topic that drops its oldest: a part of this.
const DROP_PART: u64 = 32;
/// What such a topic may hold whatever its limit: space comes back by sealed files.
const DROP_SLACK: u64 = 256 * 1024 * 1024;

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
            let TopicConfig { retention, max_age_unacked, .. } = topic.config();
            let TopicStats { first, head, .. } = topic.stats(storage);
            let received = topic.owed_from(storage);
            let mut below = first;
            if received > first {
                below = below.max(topic.young_from(storage, now, retention).await.min(received));
            }
            if let Some(age) = max_age_unacked.filter(|_| head >= first) {
                let old = topic.young_from(storage, now, age).await;
                below = below.max(old.min(topic.kept_from()));
            }
            topic.trim(storage, below);
        }
    }

    /// Deletes subscriptions that were not used for as long as they say.
    async fn expire_subscriptions(&self) {
        let handles: Vec<_> = self.state().subscriptions.values().cloned().collect();
        for handle in handles.into_iter().filter(|handle| handle.record.expires_after.is_some()) {
            let _admin = self.inner.admin.lock().await;
            let expired = handle.ask(|reply| Command::Admin(AdminCommand::Expire(reply))).await;
            if expired.is_ok_and(|expired| expired) {
                let name = &handle.record.name;
                tracing::info!(subscription = %name, "deleted, since nobody used it for so long");
                self.forget_subscription(name);
                let (name, epoch) = (name.clone(), handle.record.epoch);
                self.inner.events.tell(What::Subscription(name, epoch, SubscriptionFate::Expired));
            }
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
        let TopicConfig { max_bytes: limit, when_full, .. } = self.config();
        // As long as there is any room the whole of it goes in: what is larger than the topic
        // would wait for ever.
        let held = stats.bytes + self.uncommitted.load(Ordering::Relaxed);
        if held < limit || bytes == 0 {
            return Ok(());
        }
        // Up to twice the limit, or what is trimmed and not gone yet would pile up.
        let drops = when_full == WhenFull::DropOldest;
        if drops
            && held < limit.saturating_mul(2).max(DROP_SLACK)
            && self.drop_oldest(storage, limit)
        {
            return Ok(());
        }
        let cause = match self.lowest_floor() {
            Some((who, floor)) if floor < stats.head => who.behind(stats.head - floor),
            Some(_) | None => "old messages are being removed".to_owned(),
        };
        self.trim_for_space(storage);
        Err(BrokerError::TopicFull { topic: self.record.name.clone(), limit, cause })
    }

    /// Removes the oldest messages, whoever has not received them, so that a part of the limit is
    /// free. It is queued before what is stored next. Says whether there is room now.
    fn drop_oldest(&self, storage: &dyn Storage, limit: u64) -> bool {
        let stats = self.stats(storage);
        let live = stats.live_bytes() + self.uncommitted.load(Ordering::Relaxed);
        let surplus = live.saturating_sub(limit - limit / DROP_PART);
        if live < limit {
            return true;
        }
        let count = (stats.head + 1).saturating_sub(stats.first);
        let average = (live / count.max(1)).max(1);
        let some = surplus.div_ceil(average).clamp(1, count.max(1));
        let below = (stats.first + some).min(stats.head + 1).min(self.kept_from());
        self.trim(storage, below);
        below > stats.first
    }

    /// The first message that is kept whatever its age: for a snapshot, or as a dead letter.
    fn kept_from(&self) -> u64 {
        let floors = self.floors();
        let kept = floors.iter().filter(|(whom, _)| !matches!(whom, Owed::Subscription(_)));
        kept.map(|(_, floor)| floor.load(Ordering::Acquire) + 1).min().unwrap_or(u64::MAX)
    }

    /// Removes the older half of what nobody is owed.
    fn trim_for_space(&self, storage: &dyn Storage) {
        let first = self.stats(storage).first;
        let owed = self.owed_from(storage);
        self.trim(storage, first + owed.saturating_sub(first).div_ceil(2));
    }

    /// The first message that is younger; of a topic that cannot be read, the first one.
    async fn young_from(&self, storage: &dyn Storage, now: Timestamp, age: Duration) -> u64 {
        let millis = u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
        let horizon = Timestamp(now.0.saturating_sub(millis));
        storage.find(self.record.epoch, horizon).await.unwrap_or(0)
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
        let broker = Broker { inner };
        broker.trim_old().await;
        broker.expire_subscriptions().await;
    }
}
