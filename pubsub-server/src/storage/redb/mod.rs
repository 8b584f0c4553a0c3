//! The engine on [redb](https://www.redb.org): one committer, group commit with fsync.
//!
//! `docs/format.md` describes the files. The way of a write: [`Redb`] puts a request into the
//! `queue`; the `writer` takes what has queued, applies it as a `group`, and commits the `batch` that
//! comes out to the `log`, or with what else is in the log to the tables, and large rows before that to
//! `blobs`; it shows the new heads in `shared`, and answers. The `mover` brings the log to the tables
//! beside the commits that follow. The `reader` starts from the heads, and looks into the `tail` of the log first.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, ready};
use tokio::sync::watch;

use self::directory::Directory;
use self::disk::Disk;
use self::open::{Opened, Opening};
use self::queue::{Queue, Request};
use self::reader::Begun;
use self::shared::Shared;
use self::writer::Writer;
use super::{
    Append, AppendOutcome, Capabilities, Catalog, Change, Health, OpenOutcome, OpenPublisher,
    ReadError, ReadLimit, Storage, StorageError, Ticket, TopicStats, Urgency, ticket,
};
use crate::env::SharedEnv;
use crate::record::{Epoch, StoredMessage, Timestamp, Uuid};

mod batch;
mod blobs;
mod chores;
mod directory;
mod disk;
mod group;
mod keys;
mod log;
mod mover;
mod open;
#[cfg(test)]
mod power_cuts;
mod queue;
mod reader;
mod recent;
mod rows;
mod sealed;
mod sealing;
mod shared;
#[cfg(test)]
pub(super) mod simulation;
mod state;
mod stored;
mod tables;
mod tail;
#[cfg(test)]
mod tests;
mod writer;

/// A small cache: pages that are read again soon are in the system's cache anyway, and a large
/// one costs page faults while it grows.
const CACHE_BYTES: usize = 64 * 1024 * 1024;

/// Messages in the hot file: all of it is read when the store is opened, which may take seconds.
const HOT_BYTES: u64 = 256 * 1024 * 1024;
/// Messages in a sealed file.
const FILE_BYTES: u64 = 64 * 1024 * 1024;
/// The log: all of it is read when the store is opened, and what it holds is in memory as well.
const LOG_BYTES: usize = 8 * 1024 * 1024;
/// How many commits it has when they are moved to the tables.
const LOG_COMMITS: u32 = 512;

/// When messages are appended to files of their own.
const BLOBS: blobs::Sizes = blobs::Sizes {
    topic: 4 * 1024 * 1024,
    commit: 64 * 1024,
    file: 32 * 1024 * 1024,
    trimmed: 4 * 1024 * 1024,
};

/// How a store is opened.
#[derive(Clone, Debug)]
pub struct Options {
    /// The data directory. It is made if there is none.
    pub path: PathBuf,
    /// Clock and randomness.
    pub env: SharedEnv,
    /// Publishes are refused while the disk has less room than this, in bytes. By default 64 MiB
    /// or a hundredth of the disk, whichever is less.
    pub free_bytes: Option<u64>,
    /// Whether commits and reads run where they are called instead of on threads of their own: for
    /// simulations.
    pub inline: bool,
}

impl Options {
    /// The defaults.
    pub fn new(path: impl AsRef<Path>, env: SharedEnv) -> Self {
        Self { path: path.as_ref().to_owned(), env, free_bytes: None, inline: false }
    }
}

/// The engine. It should be closed; if it is dropped without, it closes while it is dropped.
#[derive(Debug)]
pub struct Redb {
    shared: Arc<Shared>,
    committer: Committer,
    boot: Uuid,
    boots: HashSet<Uuid>,
}

/// Who commits.
#[derive(Debug)]
enum Committer {
    Thread { queue: Arc<Queue>, thread: Mutex<Option<JoinHandle<Result<(), StorageError>>>> },
    Inline(Arc<Mutex<Option<Box<Writer>>>>),
}

impl Redb {
    /// Opens a data directory, and makes it if there is none. It blocks: after an unclean end the
    /// hot file is read completely.
    ///
    /// # Errors
    ///
    /// [`StorageError::InUse`] if it is open elsewhere, [`StorageError::Format`] and
    /// [`StorageError::Corrupt`] if it cannot be used as it is. Nothing is changed then.
    pub fn open(options: Options) -> Result<Self, StorageError> {
        let directory = Directory::lock(&options.path, options.env.now())?;
        let opening = Opening {
            cache_bytes: CACHE_BYTES,
            watermark: options.free_bytes,
            hot_bytes: HOT_BYTES,
            file_bytes: FILE_BYTES,
            log_bytes: LOG_BYTES,
            log_commits: LOG_COMMITS,
            blobs: BLOBS,
            inline: options.inline,
        };
        Self::open_on(Arc::new(directory), options.env, opening)
    }

    fn open_on(
        disk: Arc<dyn Disk>,
        env: SharedEnv,
        opening: Opening,
    ) -> Result<Self, StorageError> {
        let Opened { shared, mut writer, boot, boots } = open::open(disk, env, opening)?;
        let no_thread = |error| StorageError::Io {
            path: shared.path.clone(),
            detail: format!("the committer cannot be started: {error}"),
        };
        let committer = if opening.inline {
            Committer::Inline(Arc::new(Mutex::new(Some(Box::new(writer)))))
        } else {
            writer.move_beside().map_err(no_thread)?;
            Committer::spawn(writer).map_err(no_thread)?
        };
        Ok(Self { shared, committer, boot, boots })
    }

    /// Does blocking work on the part that everyone sees.
    fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Shared) -> T + Send + 'static,
    ) -> BoxFuture<'static, Result<T, StorageError>> {
        let shared = Arc::clone(&self.shared);
        match self.committer {
            Committer::Inline(_) => async move { Ok(work(&shared)) }.boxed(),
            Committer::Thread { .. } => async move {
                let path = shared.path.clone();
                let done = tokio::task::spawn_blocking(move || work(&shared)).await;
                done.map_err(|error| match error.try_into_panic() {
                    // redb asserts what a damaged file need not keep.
                    Ok(_) => StorageError::Corrupt { path, detail: "reading panicked".to_owned() },
                    Err(_) => StorageError::Closed,
                })
            }
            .boxed(),
        }
    }
}

impl Committer {
    fn spawn(writer: Writer) -> std::io::Result<Self> {
        let queue = Arc::new(Queue::default());
        let taken = Arc::clone(&queue);
        let thread = thread::Builder::new()
            .name("committer".to_owned())
            .spawn(move || writer.run(&taken))?;
        Ok(Self::Thread { queue, thread: Mutex::new(Some(thread)) })
    }

    fn push(&self, request: Request) {
        match self {
            Self::Thread { queue, .. } => queue.push(request),
            Self::Inline(writer) => {
                match writer.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
                    Some(writer) => {
                        writer.commit(vec![request]);
                        writer.tend();
                    }
                    None => request.fail(super::CommitError::Refused),
                }
            }
        }
    }

    /// Refuses everything from now on. What is returned commits what was accepted, and blocks.
    fn close(&self) -> Box<dyn FnOnce() -> Result<(), StorageError> + Send> {
        match self {
            Self::Thread { queue, thread } => {
                queue.close();
                let thread = thread.lock().unwrap_or_else(PoisonError::into_inner).take();
                // The last who has the store can be a task of which the committer takes a step. It
                // closes when it is back from that.
                let thread = thread.filter(|it| it.thread().id() != thread::current().id());
                Box::new(|| thread.map_or(Ok(()), |thread| thread.join().unwrap_or(Ok(()))))
            }
            Self::Inline(writer) => {
                let writer = writer.lock().unwrap_or_else(PoisonError::into_inner).take();
                Box::new(|| writer.map_or(Ok(()), |writer| writer.finish()))
            }
        }
    }
}

impl Drop for Redb {
    fn drop(&mut self) {
        if let Err(error) = self.committer.close()() {
            tracing::warn!(%error, "the store was not closed in order");
        }
    }
}

impl Storage for Redb {
    fn boot_id(&self) -> Uuid {
        self.boot
    }

    fn knows_boot(&self, id: Uuid) -> bool {
        self.boots.contains(&id)
    }

    fn catalog(&self) -> BoxFuture<'_, Result<Catalog, StorageError>> {
        let read = |shared: &Shared| {
            reader::catalog(shared).map_err(|trouble| writer::explain(&shared.path, trouble))
        };
        self.blocking(read).map(Result::flatten).boxed()
    }

    fn append(&self, mut append: Append) -> Ticket<AppendOutcome> {
        let (promise, ticket) = ticket();
        let promise = promise.holding(append.room.take());
        self.committer.push(Request::Append(append, promise));
        ticket
    }

    fn open_publisher(&self, open: OpenPublisher) -> Ticket<OpenOutcome> {
        let (promise, ticket) = ticket();
        self.committer.push(Request::Open(open, promise));
        ticket
    }

    fn apply(&self, changes: Vec<Change>, urgency: Urgency) -> Ticket<()> {
        let (promise, ticket) = ticket();
        self.committer.push(Request::Apply(changes, urgency, promise));
        ticket
    }

    fn head(&self, topic: Epoch) -> Option<watch::Receiver<u64>> {
        self.shared.subscribe(topic)
    }

    fn read(
        &self,
        topic: Epoch,
        from: u64,
        limit: ReadLimit,
    ) -> BoxFuture<'_, Result<Vec<StoredMessage>, ReadError>> {
        match reader::begin(&self.shared, topic, from, limit) {
            Err(error) => ready(Err(error)).boxed(),
            Ok(Begun::All(messages)) => ready(Ok(messages)).boxed(),
            Ok(Begun::Some(chunk)) => {
                let read = self.blocking(move |shared| reader::go_on(shared, chunk));
                read.map(|result| result?).boxed()
            }
        }
    }

    fn find(&self, topic: Epoch, time: Timestamp) -> BoxFuture<'_, Result<u64, ReadError>> {
        let find = self.blocking(move |shared| reader::find(shared, topic, time));
        find.map(|result| result?).boxed()
    }

    fn stats(&self, topic: Epoch) -> Option<TopicStats> {
        self.shared.stats(topic)
    }

    fn health(&self) -> watch::Receiver<Health> {
        self.shared.health()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { name: "redb", durable: true }
    }

    fn close(&self) -> BoxFuture<'_, Result<(), StorageError>> {
        let close = self.committer.close();
        self.blocking(|_| close()).map(Result::flatten).boxed()
    }
}
