//! What the handles, the lanes and the thread that writes have in common.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use redb::WriteTransaction;
use tokio::sync::watch;

use super::books::Books;
use super::failpoint;
use super::rows::{self, Request, Why};
use super::state::{OutboxState, OutboxTopic, Waiting};
use crate::local::{FileError, Journal};

#[derive(Debug)]
pub(super) struct Ledger {
    inner: Mutex<Inner>,
    changes: watch::Sender<()>,
}

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) books: Books,
    /// Nothing is taken any more.
    pub(super) closing: bool,
    /// Nothing happens any more.
    pub(super) closed: bool,
    last_error: Option<(SystemTime, Arc<str>)>,
    pub(super) failure: Option<FileError>,
}

impl Ledger {
    pub(super) fn new(books: Books) -> Self {
        let inner = Inner { books, closing: false, closed: false, last_error: None, failure: None };
        Self { inner: Mutex::new(inner), changes: watch::Sender::new(()) }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes something, and tells everyone.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut Inner) -> T) -> T {
        let result = change(&mut self.lock());
        self.changes.send_replace(());
        result
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }

    /// Waits for a change; says whether there can be more.
    pub(super) async fn changed(&self, changes: &mut watch::Receiver<()>) -> bool {
        if self.lock().closed {
            return false;
        }
        changes.changed().await.is_ok()
    }

    pub(super) async fn wait_until(&self, condition: impl Fn(&Inner) -> bool) {
        let mut changes = self.subscribe();
        while !condition(&self.lock()) && changes.changed().await.is_ok() {}
    }

    /// Why the messages of a topic wait, if they do.
    pub(super) fn set_waiting(&self, topic: &str, waiting: Option<Waiting>) {
        let same = {
            let mut inner = self.lock();
            inner.books.topic_mut(topic).is_none_or(|topic| topic.waiting == waiting)
        };
        if !same {
            self.change(|inner| {
                if let Some(topic) = inner.books.topic_mut(topic) {
                    topic.waiting = waiting;
                }
            });
        }
    }

    pub(super) fn set_error(&self, at: SystemTime, error: &str) {
        self.change(|inner| inner.last_error = Some((at, error.into())));
    }

    /// The file has failed.
    pub(super) fn fail(&self, error: FileError) {
        self.change(|inner| {
            inner.failure.get_or_insert(error);
        });
    }

    /// Nothing is taken any more, and nothing happens.
    pub(super) fn close(&self) {
        self.change(|inner| {
            inner.closing = true;
            inner.closed = true;
        });
    }

    pub(super) fn snapshot(&self) -> OutboxState {
        let inner = self.lock();
        let topics = inner.books.topics().map(|(name, topic)| OutboxTopic {
            topic: Arc::clone(name),
            pending: topic.usage(),
            waiting: topic.waiting.clone(),
        });
        OutboxState {
            pending: inner.books.pending_usage,
            parked: inner.books.parked_usage,
            topics: topics.collect(),
            last_error: inner.last_error.clone(),
            failure: inner.failure.clone(),
        }
    }
}

/// Writes the file, and keeps the books by it.
pub(super) struct Writer(pub(super) Arc<Ledger>);

impl Journal for Writer {
    type Request = Request;

    fn write(
        &mut self,
        transaction: &WriteTransaction,
        group: &[Request],
    ) -> Result<(), redb::Error> {
        rows::write(transaction, group)?;
        if group.iter().any(|request| matches!(request, Request::Settle { .. })) {
            failpoint::block("removing");
        }
        Ok(())
    }

    fn committed(&mut self, group: Vec<Request>) {
        self.0.change(|inner| {
            for request in group {
                keep(&mut inner.books, request);
            }
        });
    }
}

fn keep(books: &mut Books, request: Request) {
    let park = |books: &mut Books, topic: &str, parked: Vec<(u64, Why)>| {
        for (item, _) in parked {
            if let Some(size) = books.settle(topic, item) {
                books.set_aside(item, size);
            }
        }
    };
    match request {
        // It has its place in them since it was asked for.
        Request::Enqueue { .. } | Request::Discard { .. } => {}
        Request::Prepare { topic, parked, .. } => park(books, &topic, parked),
        Request::Settle { topic, published, parked, .. } => {
            for item in published {
                books.settle(&topic, item);
            }
            park(books, &topic, parked);
        }
        Request::Resend { topic, again, size, .. } => books.pend(&topic, again, size),
    }
}
