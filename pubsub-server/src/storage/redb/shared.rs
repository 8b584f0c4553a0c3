//! What the writer shows to readers, always as of the last commit.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use ::redb::Database;
use tokio::sync::watch;

use super::blobs::{Blobs, Doomed};
use super::disk::Disk;
use super::recent::Recent;
use super::rows::Head;
use super::sealed::{Cabinet, Segment};
use super::tail::Tail;
use crate::record::Epoch;
use crate::storage::{Health, StorageError, TopicStats};

/// The part of an engine that everyone sees.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) path: String,
    /// `None` once closed. The writer takes the lock for writing only to reopen or close.
    pub(super) database: RwLock<Option<Database>>,
    pub(super) cabinet: Cabinet,
    pub(super) blobs: Blobs,
    pub(super) tail: Tail,
    pub(super) recent: Recent,
    topics: RwLock<HashMap<Epoch, Arc<TopicView>>>,
    health: watch::Sender<Health>,
}

/// One topic, as of the last commit.
#[derive(Debug)]
pub(super) struct TopicView {
    head: watch::Sender<u64>,
    state: RwLock<ViewState>,
}

/// A topic without its head.
#[derive(Clone, Debug, Default)]
pub(super) struct ViewState {
    /// The first message that can be read.
    pub(super) first: u64,
    pub(super) bytes: u64,
    /// The first message whose row may be in the hot file.
    pub(super) collected: u64,
    /// The sealed files, ascending. What follows them is in the hot file.
    pub(super) segments: Arc<Vec<Segment>>,
    /// Its head is not known, so that nothing can be read or written.
    pub(super) damaged: bool,
}

impl TopicView {
    pub(super) fn head(&self) -> u64 {
        *self.head.borrow()
    }

    pub(super) fn state(&self) -> ViewState {
        self.state.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Shared {
    pub(super) fn new(path: String, database: Database, disk: &Arc<dyn Disk>) -> Self {
        Self {
            path,
            database: RwLock::new(Some(database)),
            cabinet: Cabinet::new(Arc::clone(disk)),
            blobs: Blobs::new(Arc::clone(disk)),
            tail: Tail::default(),
            recent: Recent::default(),
            topics: RwLock::default(),
            health: watch::Sender::new(Health::Ok),
        }
    }

    /// The database; the lock is held for one bounded piece of work.
    pub(super) fn database(&self) -> RwLockReadGuard<'_, Option<Database>> {
        self.database.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets a file that nothing refers to any more.
    pub(super) fn forget(&self, doomed: Doomed) {
        match doomed {
            Doomed::Sealed(file) => self.cabinet.forget(file),
            Doomed::Blob(file) => self.blobs.forget(file),
        }
    }

    pub(super) fn view(&self, topic: Epoch) -> Option<Arc<TopicView>> {
        self.topics.read().unwrap_or_else(PoisonError::into_inner).get(&topic).cloned()
    }

    pub(super) fn subscribe(&self, topic: Epoch) -> Option<watch::Receiver<u64>> {
        self.view(topic).map(|view| view.head.subscribe())
    }

    pub(super) fn stats(&self, topic: Epoch) -> Option<TopicStats> {
        let view = self.view(topic)?;
        let ViewState { first, bytes, collected, segments, .. } = view.state();
        let sealed_from = segments.first().map(|segment| segment.first);
        let stored_from = sealed_from.unwrap_or(collected).min(first);
        Some(TopicStats { first, head: view.head(), bytes, stored_from })
    }

    /// Shows a topic as committed. What can be read only shrinks before its rows go, and grows
    /// after they came: readers never miss what they were promised.
    pub(super) fn show(&self, topic: Epoch, head: &Head, segments: Arc<Vec<Segment>>) {
        let Head { first, bytes, collected, .. } = *head;
        let state = ViewState { first, bytes, collected, segments, damaged: false };
        match self.view(topic) {
            Some(view) => {
                *view.state.write().unwrap_or_else(PoisonError::into_inner) = state;
                view.head.send_if_modified(|known| {
                    debug_assert!(*known <= head.head, "a head never goes back");
                    std::mem::replace(known, head.head) != head.head
                });
            }
            None => self.insert(topic, head.head, state),
        }
    }

    /// Shows a topic of which nothing is known any more.
    pub(super) fn show_damaged(&self, topic: Epoch) {
        self.insert(topic, 0, ViewState { damaged: true, ..ViewState::default() });
    }

    /// Hides a topic that was deleted. Whoever has its head sees the last one.
    pub(super) fn hide(&self, topic: Epoch, head: u64) {
        let view = self.topics.write().unwrap_or_else(PoisonError::into_inner).remove(&topic);
        if let Some(view) = view {
            view.head.send_if_modified(|known| std::mem::replace(known, head.max(*known)) < head);
        }
    }

    fn insert(&self, topic: Epoch, head: u64, state: ViewState) {
        let view = TopicView { head: watch::Sender::new(head), state: RwLock::new(state) };
        self.topics.write().unwrap_or_else(PoisonError::into_inner).insert(topic, Arc::new(view));
    }

    pub(super) fn health(&self) -> watch::Receiver<Health> {
        self.health.subscribe()
    }

    /// Says how it is. A failure is for ever.
    pub(super) fn set_health(&self, health: Health) {
        self.health.send_if_modified(|known| {
            if *known == health || matches!(known, Health::Failed(_)) {
                return false;
            }
            *known = health;
            true
        });
    }

    /// An error of redb as ours.
    pub(super) fn error(&self, error: impl Into<::redb::Error>) -> StorageError {
        explain(&self.path, error.into())
    }
}

/// An error of redb as ours.
#[expect(clippy::wildcard_enum_match_arm, reason = "the kinds that need no word of their own")]
pub(super) fn explain(path: &str, error: ::redb::Error) -> StorageError {
    let path = path.to_owned();
    match error {
        ::redb::Error::DatabaseAlreadyOpen => {
            StorageError::InUse { path, holder: "another process".to_owned() }
        }
        ::redb::Error::Corrupted(detail) => StorageError::Corrupt { path, detail },
        ::redb::Error::Io(error) if error.kind() == std::io::ErrorKind::InvalidData => {
            StorageError::Corrupt { path, detail: error.to_string() }
        }
        ::redb::Error::DatabaseClosed => StorageError::Closed,
        error => StorageError::Io { path, detail: error.to_string() },
    }
}
