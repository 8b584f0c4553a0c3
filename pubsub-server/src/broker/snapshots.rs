//! Snapshots: positions of a subscription that are kept, to be gone back to. What a snapshot would
//! show again is kept in its topics as long as it is there.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::delivery::Cursor;
use super::describing::Description;
use super::error::BrokerError;
use super::session::Command;
use super::subscription::{AdminCommand, Target};
use super::{Broker, Owed, Topic};
use crate::filter::Filter;
use crate::limits;
use crate::names::{SnapshotName, SubscriptionName};
use crate::record::{
    CursorRecord, Epoch, FailurePolicy, SubscriptionKind, SubscriptionRecord, Timestamp,
};
use crate::storage::{Change, Urgency};

/// A position that is kept.
#[derive(Debug)]
pub struct Snapshot {
    /// Its name.
    pub name: SnapshotName,
    /// Whose position it is.
    pub subscription: SubscriptionName,
    /// When it was made.
    pub created_at: Timestamp,
    epoch: Epoch,
    filter: Option<Filter>,
    positions: Vec<(Arc<Topic>, Target)>,
}

impl Snapshot {
    /// How many messages it would show again or for the first time, as things are.
    pub fn backlog(&self) -> u64 {
        let of = |(topic, target): &(Arc<Topic>, Target)| {
            let head = (*topic.head.borrow()).max(target.floor);
            Cursor::new(target.clone().into(), head, None).backlog()
        };
        // A topic that was deleted shows nothing any more.
        let present = self.positions.iter().filter(|(topic, _)| topic.head.has_changed().is_ok());
        present.map(of).sum()
    }
}

impl From<Target> for CursorRecord {
    fn from(target: Target) -> Self {
        let Target { floor, done } = target;
        Self { floor, done, ..Self::default() }
    }
}

impl Broker {
    /// Keeps the position of a subscription under a name.
    ///
    /// # Errors
    ///
    /// If there is no such subscription, or the name is taken.
    pub async fn create_snapshot(
        &self,
        name: SnapshotName,
        subscription: SubscriptionName,
    ) -> Result<Arc<Snapshot>, BrokerError> {
        let broker = self.clone();
        self.to_the_end(async move { broker.create_snapshot_now(name, subscription).await }).await
    }

    async fn create_snapshot_now(
        &self,
        name: SnapshotName,
        subscription: SubscriptionName,
    ) -> Result<Arc<Snapshot>, BrokerError> {
        let _admin = self.inner.admin.lock().await;
        let handle = self.existing(&subscription)?;
        if self.state().snapshots.contains_key(&name) {
            return Err(BrokerError::SnapshotExists(name));
        }
        if self.state().snapshots.len() >= limits::MAX_SNAPSHOTS {
            let limit = limits::MAX_SNAPSHOTS as u64;
            return Err(BrokerError::LimitReached { what: "snapshots", limit });
        }
        let topics = self.matching(&handle.record.topics);
        // Nothing that it will show goes meanwhile: the position is here, or further.
        for topic in &topics {
            let listener = Owed::Subscription(subscription.clone());
            let floor = topic.floors().get(&listener).map(|floor| floor.load(Ordering::Acquire));
            topic.keep_for(Owed::Snapshot(name.clone()), floor.unwrap_or(0));
        }
        let made = self.store_snapshot(&name, &subscription, &topics).await;
        if made.is_err() {
            self.let_go(&name);
        }
        let made = Arc::new(made?);
        self.state().snapshots.insert(name, Arc::clone(&made));
        Ok(made)
    }

    async fn store_snapshot(
        &self,
        name: &SnapshotName,
        subscription: &SubscriptionName,
        topics: &[Arc<Topic>],
    ) -> Result<Snapshot, BrokerError> {
        let handle = self.existing(subscription)?;
        let targets = handle.ask(|reply| Command::Admin(AdminCommand::Snapshot(reply))).await??;
        let (epoch, created_at) = (self.inner.env.epoch(), self.inner.env.now());
        let record = SubscriptionRecord {
            name: SubscriptionName::parse(name.as_str())?,
            epoch,
            kind: SubscriptionKind::Exclusive,
            on_failure: FailurePolicy::Block,
            ack_timeout: None,
            // What it left out is done in the position.
            filter: handle.record.filter.clone(),
            expires_after: None,
            used_at: created_at,
            topics: handle.record.topics.clone(),
            created_at,
            consumers: Vec::new(),
            snapshot_of: Some(subscription.clone()),
        };
        let mut changes = vec![Change::PutSubscription(record)];
        let mut positions = Vec::new();
        for (topic, target) in targets {
            let cursor = target.clone().into();
            changes.push(Change::PutCursor { subscription: epoch, topic, cursor });
            let known = topics.iter().find(|known| known.record.epoch == topic);
            positions.extend(known.map(|known| (Arc::clone(known), target)));
        }
        self.inner.storage.apply(changes, Urgency::Now).await?.into_inner();
        for (topic, target) in &positions {
            topic.keep_for(Owed::Snapshot(name.clone()), target.floor);
        }
        let (name, subscription) = (name.clone(), subscription.clone());
        let filter = handle.record.filter.clone();
        Ok(Snapshot { name, subscription, created_at, epoch, filter, positions })
    }

    /// Makes a snapshot known that is in the storage.
    pub(super) fn add_snapshot(
        &self,
        record: &SubscriptionRecord,
        of: &SubscriptionName,
        cursors: Vec<(Epoch, CursorRecord)>,
        topics: &BTreeMap<Epoch, Arc<Topic>>,
    ) {
        let Ok(name) = SnapshotName::parse(record.name.as_str()) else { return };
        let mut positions = Vec::new();
        for (epoch, CursorRecord { floor, done, .. }) in cursors {
            if let Some(topic) = topics.get(&epoch) {
                topic.keep_for(Owed::Snapshot(name.clone()), floor);
                positions.push((Arc::clone(topic), Target { floor, done }));
            }
        }
        let (epoch, created_at, subscription) = (record.epoch, record.created_at, of.clone());
        let filter = record.filter.clone();
        let key = name.clone();
        let snapshot = Snapshot { name, subscription, created_at, epoch, filter, positions };
        self.state().snapshots.insert(key, Arc::new(snapshot));
    }

    /// The snapshots after a name, in order.
    pub fn list_snapshots(&self, after: Option<&SnapshotName>, limit: usize) -> Vec<Arc<Snapshot>> {
        let state = self.state();
        let after = after.map_or(Bound::Unbounded, Bound::Excluded);
        let range = state.snapshots.range((after, Bound::Unbounded));
        range.take(limit).map(|(_, snapshot)| Arc::clone(snapshot)).collect()
    }

    /// Deletes a snapshot; what it has kept can go.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub async fn delete_snapshot(&self, name: SnapshotName) -> Result<(), BrokerError> {
        let broker = self.clone();
        let delete = async move {
            let _admin = broker.inner.admin.lock().await;
            let change = Change::DeleteSubscription(broker.snapshot(&name)?.epoch);
            broker.inner.storage.apply(vec![change], Urgency::Now).await?.into_inner();
            broker.state().snapshots.remove(&name);
            broker.let_go(&name);
            Ok(())
        };
        self.to_the_end(delete).await
    }

    /// Moves a subscription to a snapshot, of its own or of another one's position, in the topics
    /// that both have.
    ///
    /// # Errors
    ///
    /// If there is no such subscription or snapshot, they have no topic in common, or what the
    /// snapshot's filter left out is meant for the subscription.
    pub async fn seek_to_snapshot(
        &self,
        subscription: &SubscriptionName,
        name: &SnapshotName,
    ) -> Result<Description, BrokerError> {
        let handle = self.existing(subscription)?;
        let snapshot = self.snapshot(name)?;
        if snapshot.filter.is_some() && snapshot.filter != handle.record.filter {
            let text = format!(
                "snapshot {name} is of subscription {}, whose filter is not that of {subscription}: \
                 what it left out would never be received",
                snapshot.subscription
            );
            return Err(BrokerError::Invalid(text));
        }
        let common = snapshot.positions.iter();
        let common = common.filter(|(topic, _)| handle.listens_to(&topic.record.name));
        let targets: Vec<_> =
            common.map(|(topic, target)| (topic.record.epoch, target.clone())).collect();
        if targets.is_empty() {
            let text =
                format!("snapshot {name} and subscription {subscription} have no topic in common");
            return Err(BrokerError::Invalid(text));
        }
        handle.ask(|reply| Command::Admin(AdminCommand::Seek(targets, reply))).await??;
        self.ask_description(&handle).await
    }

    fn snapshot(&self, name: &SnapshotName) -> Result<Arc<Snapshot>, BrokerError> {
        let found = self.state().snapshots.get(name).cloned();
        found.ok_or_else(|| BrokerError::SnapshotNotFound(name.clone()))
    }

    /// Keeps nothing for a snapshot any more.
    fn let_go(&self, name: &SnapshotName) {
        let topics: Vec<_> = self.state().topics.values().cloned().collect();
        for topic in topics {
            topic.floors().remove(&Owed::Snapshot(name.clone()));
        }
    }
}
