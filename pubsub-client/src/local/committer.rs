//! One thread that writes: whatever queues during a commit is in the next one.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use redb::{Database, WriteTransaction};
use tokio::sync::{mpsc, oneshot};

use super::FileError;

/// Requests of one commit, and those that wait for the next one.
const GROUP: usize = 1_024;

/// What a file holds, and how it is written.
pub(crate) trait Journal: Send + 'static {
    /// One thing to write.
    type Request: Send + 'static;

    /// Writes a group into a transaction.
    fn write(
        &mut self,
        transaction: &WriteTransaction,
        group: &[Self::Request],
    ) -> Result<(), redb::Error>;

    /// The group is on disk. Called before anyone is told.
    fn committed(&mut self, group: Vec<Self::Request>);
}

type Answer = oneshot::Sender<Result<(), FileError>>;

/// A file that is written by a thread of its own, which ends when the last sender is gone.
#[derive(Debug)]
pub(crate) struct Committer<R> {
    #[cfg(feature = "outbox")]
    path: PathBuf,
    sender: Mutex<Option<mpsc::Sender<(R, Answer)>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    failure: Arc<Mutex<Option<FileError>>>,
}

impl<R: Send + 'static> Committer<R> {
    pub(crate) fn spawn<J: Journal<Request = R>>(
        path: &Path,
        database: Arc<Database>,
        journal: J,
    ) -> Result<Self, FileError> {
        let (sender, receiver) = mpsc::channel(GROUP);
        let failure = Arc::new(Mutex::new(None));
        let writer =
            Writer { path: path.to_owned(), database, journal, failure: Arc::clone(&failure) };
        let thread = thread::Builder::new()
            .name("pubsub-local".to_owned())
            .spawn(move || writer.run(receiver))
            .map_err(|error| FileError::io(path, error))?;
        Ok(Self {
            #[cfg(feature = "outbox")]
            path: path.to_owned(),
            sender: Mutex::new(Some(sender)),
            thread: Mutex::new(Some(thread)),
            failure,
        })
    }

    /// Waits for a place in the queue. Cancel-safe.
    pub(crate) async fn reserve(&self) -> Result<Place<R>, FileError> {
        let sender = self.sender.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let sender = sender.ok_or(FileError::Closed)?;
        sender.reserve_owned().await.map(Place).map_err(|_| self.failure())
    }

    /// Writes something, and waits until it is on disk. If the future is dropped before it has its
    /// place in the queue, nothing is written; later it is all the same.
    pub(crate) async fn commit(&self, request: R) -> Result<(), FileError> {
        let answer = self.reserve().await?.put(request);
        self.answered(answer).await
    }

    /// The answer to what was put into the queue.
    pub(crate) async fn answered(
        &self,
        answer: oneshot::Receiver<Result<(), FileError>>,
    ) -> Result<(), FileError> {
        answer.await.unwrap_or_else(|_| Err(self.failure()))
    }

    /// Why nothing is written any more.
    fn failure(&self) -> FileError {
        let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.clone().unwrap_or(FileError::Closed)
    }

    /// Takes nothing more. What has queued is still written.
    pub(crate) fn closing(&self) -> Closing {
        drop(self.sender.lock().unwrap_or_else(PoisonError::into_inner).take());
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        Closing { thread, failure: Arc::clone(&self.failure) }
    }

    /// Something else is wrong with the file.
    #[cfg(feature = "outbox")]
    pub(crate) fn trouble(&self, detail: String) -> FileError {
        FileError::Io { path: self.path.clone(), detail }
    }
}

/// A file that is being closed.
#[derive(Debug)]
pub(crate) struct Closing {
    thread: Option<JoinHandle<()>>,
    failure: Arc<Mutex<Option<FileError>>>,
}

impl Closing {
    /// Waits until everything is written. It blocks.
    pub(crate) fn wait(self) -> Result<(), FileError> {
        if let Some(thread) = self.thread {
            // A panic of it was caught, and is a failure.
            let _ = thread.join();
        }
        let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone();
        failure.map_or(Ok(()), Err)
    }
}

/// A place in the queue.
#[derive(Debug)]
pub(crate) struct Place<R>(mpsc::OwnedPermit<(R, Answer)>);

impl<R> Place<R> {
    /// Puts something there, in the order of these calls.
    pub(crate) fn put(self, request: R) -> oneshot::Receiver<Result<(), FileError>> {
        let (answer, answered) = oneshot::channel();
        self.0.send((request, answer));
        answered
    }
}

struct Writer<J> {
    path: PathBuf,
    database: Arc<Database>,
    journal: J,
    failure: Arc<Mutex<Option<FileError>>>,
}

impl<J: Journal> Writer<J> {
    fn run(mut self, mut receiver: mpsc::Receiver<(J::Request, Answer)>) {
        let mut queued = Vec::new();
        while receiver.blocking_recv_many(&mut queued, GROUP) > 0 {
            let (group, answers): (Vec<_>, Vec<_>) = queued.drain(..).unzip();
            let result = self.commit(group);
            for answer in answers {
                // Whoever asked may have stopped waiting.
                let _ = answer.send(result.clone());
            }
            if let Err(error) = result {
                // No retry: whether it is on disk is known after the file is opened again.
                tracing::error!(%error, "a local file has failed");
                break;
            }
        }
        receiver.close();
        while let Some((_, answer)) = receiver.blocking_recv() {
            let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let _ = answer.send(Err(failure.unwrap_or(FileError::Closed)));
        }
    }

    fn commit(&mut self, group: Vec<J::Request>) -> Result<(), FileError> {
        let write = || {
            let mut transaction = self.database.begin_write()?;
            // A commit that fails half-way leaves a file that opens.
            transaction.set_two_phase_commit(true);
            self.journal.write(&transaction, &group)?;
            transaction.commit()?;
            self.journal.committed(group);
            Ok::<_, redb::Error>(())
        };
        let result = match catch_unwind(AssertUnwindSafe(write)) {
            Ok(result) => result.map_err(|error| FileError::explain(&self.path, error)),
            Err(_) => {
                let detail = "writing to it panicked".to_owned();
                Err(FileError::Io { path: self.path.clone(), detail })
            }
        };
        if let Err(error) = &result {
            *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.clone());
        }
        result
    }
}
