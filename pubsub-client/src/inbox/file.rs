//! What was processed, in a redb file.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use redb::{Database, ReadableTable as _, TableDefinition, WriteTransaction};

use super::ProcessedStore;
use super::processed::{Change, InboxError, Processed, Run, Scope, scope};
use crate::env::{SharedEnv, System};
use crate::local::{self, Committer, FileError, Journal};
use crate::message::ReceivedMessage;
use crate::subscriber::Position;

const FORMAT: &str = "pubsub inbox 1";

/// Runs of processed messages: subscription, topic, epoch and first sequence; last sequence and
/// latest publish time.
const RUNS: TableDefinition<'_, (&str, &str, u64, u64), (u64, u64)> = TableDefinition::new("runs");

/// Remembers in a local file what was processed, across crashes of the process and of the machine.
///
/// A message is recorded with fsync, before it is acked; what is recorded at the same time, by
/// handlers that run at once, shares one. The file is small: it holds runs of sequences, and
/// forgets what lies below the acked floor of its subscriptions. One process has it at a time, for
/// any number of subscriptions and servers whose subscriptions have different names.
///
/// What it promises, and what not, is with [`ProcessedStore`].
///
/// ```no_run
/// # async fn example(subscriber: pubsub_client::Subscriber) -> Result<(), Box<dyn std::error::Error>> {
/// use pubsub_client::FileInbox;
///
/// let inbox = FileInbox::open("billing.inbox").await?;
/// subscriber
///     .run_once(inbox, 8, |message| async move {
///         println!("billed: {}", message.id);
///         Ok::<(), String>(())
///     })
///     .await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct FileInbox {
    processed: Arc<Mutex<Processed>>,
    committer: Committer<Request>,
}

#[derive(Debug)]
enum Request {
    Record { subscription: String, message: Box<ReceivedMessage> },
    Forget { subscription: String, position: Position },
}

impl FileInbox {
    /// Opens a file, and makes it if there is none. All of it is read and checked.
    ///
    /// # Errors
    ///
    /// Another process has it, it is something else, it is damaged, or it cannot be read or
    /// written.
    ///
    /// # Panics
    ///
    /// Outside of a Tokio runtime.
    pub async fn open(path: impl AsRef<Path>) -> Result<Self, FileError> {
        let path = path.as_ref().to_owned();
        let opened = tokio::task::spawn_blocking(move || Self::open_blocking(&path)).await;
        opened.map_err(|_| FileError::Closed)?
    }

    fn open_blocking(path: &Path) -> Result<Self, FileError> {
        let env: SharedEnv = Arc::new(System);
        let database = local::open_or_create(path, FORMAT, &env)?;
        let processed = load(&database).map_err(|error| FileError::explain(path, error))?;
        let processed = Arc::new(Mutex::new(processed));
        let writer = Writer { processed: Arc::clone(&processed) };
        let committer = Committer::spawn(path, Arc::new(database), writer)?;
        Ok(Self { processed, committer })
    }

    /// Closes the file, and waits until another process can open it; nothing is recorded any more.
    /// Dropping closes it, too, a moment later.
    ///
    /// # Errors
    ///
    /// A write has failed since it was opened.
    pub async fn close(&self) -> Result<(), FileError> {
        let closing = self.committer.closing();
        let closed = tokio::task::spawn_blocking(move || closing.wait()).await;
        closed.map_err(|_| FileError::Closed)?
    }

    fn lock(&self) -> MutexGuard<'_, Processed> {
        self.processed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ProcessedStore for FileInbox {
    type Error = InboxError;

    async fn is_processed(
        &self,
        subscription: &str,
        message: &ReceivedMessage,
    ) -> Result<bool, InboxError> {
        Ok(self.lock().contains(subscription, message))
    }

    async fn record(
        &self,
        subscription: &str,
        message: &ReceivedMessage,
    ) -> Result<(), InboxError> {
        self.lock().check_room()?;
        let (subscription, message) = (subscription.to_owned(), Box::new(message.clone()));
        Ok(self.committer.commit(Request::Record { subscription, message }).await?)
    }

    async fn forget(&self, subscription: &str, position: &Position) -> Result<(), InboxError> {
        let (subscription, position) = (subscription.to_owned(), position.clone());
        Ok(self.committer.commit(Request::Forget { subscription, position }).await?)
    }
}

fn load(database: &Database) -> Result<Processed, redb::Error> {
    let mut processed = Processed::default();
    let transaction = database.begin_write()?;
    for entry in transaction.open_table(RUNS)?.iter()? {
        let (key, run) = entry?;
        let ((subscription, topic, epoch, first), (last, latest)) = (key.value(), run.value());
        processed.load((subscription.into(), topic.into(), epoch), first, Run { last, latest });
    }
    // Makes the table where there is none.
    transaction.commit()?;
    Ok(processed)
}

struct Writer {
    processed: Arc<Mutex<Processed>>,
}

impl Journal for Writer {
    type Request = Request;

    fn write(
        &mut self,
        transaction: &WriteTransaction,
        group: &[Request],
    ) -> Result<(), redb::Error> {
        let mut table = transaction.open_table(RUNS)?;
        let mut write = |(subscription, topic, epoch): &Scope, changes: Vec<Change>| {
            for change in changes {
                let key = |first| (&**subscription, &**topic, *epoch, first);
                match change {
                    Change::Put { first, run } => {
                        table.insert(key(first), (run.last, run.latest))?;
                    }
                    Change::Remove { first } => {
                        table.remove(key(first))?;
                    }
                }
            }
            Ok::<_, redb::Error>(())
        };
        // What is in memory is ahead of the disk for the time of a commit. What it says is true
        // all the same: these messages were processed.
        let mut processed = self.processed.lock().unwrap_or_else(PoisonError::into_inner);
        for request in group {
            match request {
                Request::Record { subscription, message } => {
                    let changes = processed.insert(subscription, message);
                    write(&scope(subscription, message), changes)?;
                }
                Request::Forget { subscription, position } => {
                    for (scope, changes) in processed.forget(subscription, position) {
                        write(&scope, changes)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn committed(&mut self, _: Vec<Request>) {}
}

#[cfg(test)]
mod tests {
    use super::super::tests::message;
    use super::*;

    #[tokio::test]
    async fn what_was_processed_is_known_after_the_file_is_opened_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("inbox");
        for round in 0..3 {
            let inbox = FileInbox::open(&path).await.unwrap();
            for sequence in 1..=30_u64 {
                let new = sequence > 10 * round;
                let known = inbox.is_processed("s", &message(sequence, 1)).await.unwrap();
                assert_eq!(known, !new, "{sequence}");
            }
            let records = (1..=10).map(|sequence| {
                let sequence = 10 * round + sequence;
                let inbox = &inbox;
                async move { inbox.record("s", &message(sequence, 1)).await }
            });
            let records = futures_util::future::join_all(records).await;
            assert!(records.into_iter().all(|record| record.is_ok()));
            let open = FileInbox::open(&path).await.unwrap_err();
            assert!(matches!(open, FileError::InUse { .. }), "{open}");
            inbox.close().await.unwrap();
        }
    }

    #[tokio::test]
    async fn what_was_forgotten_is_gone_from_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("inbox");
        let inbox = FileInbox::open(&path).await.unwrap();
        for sequence in [1, 2, 3, 5, 8, 9] {
            inbox.record("s", &message(sequence, 1)).await.unwrap();
        }
        let topic = crate::subscriber::TopicPosition {
            topic: "t".into(),
            epoch: 7,
            last_delivered: 9,
            acked_floor: 8,
            head: 9,
            caught_up: true,
            behind: 0,
            buffered: 0,
            in_hand: 0,
        };
        let position = Position { topics: vec![topic], caught_up: true };
        inbox.forget("s", &position).await.unwrap();
        inbox.close().await.unwrap();
        let inbox = FileInbox::open(&path).await.unwrap();
        for sequence in 1..=9 {
            let known = inbox.is_processed("s", &message(sequence, 1)).await.unwrap();
            assert_eq!(known, sequence == 9, "{sequence}");
        }
    }
}
