//! The file of an outbox, without a server.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use redb::{Database, WriteTransaction};

use super::OutboxError;
use super::rows::{self, Request};
use super::state::{OutboxTopic, Parked, Usage};
use crate::local::{self, FileError};

/// The file of an [`Outbox`](super::Outbox) that no process publishes from: to look into it, and to
/// decide about what was set aside. All of it blocks.
///
/// ```no_run
/// # fn main() -> Result<(), pubsub_client::OutboxError> {
/// use pubsub_client::OutboxFile;
///
/// let mut file = OutboxFile::open("orders.outbox")?;
/// for parked in file.parked(0, 100)? {
///     println!("{}: {}", parked.item, parked.detail);
///     file.resend(parked.item)?;
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct OutboxFile {
    path: PathBuf,
    database: Database,
    next: u64,
}

impl OutboxFile {
    /// Opens a file, which must exist. All of it is read and checked.
    ///
    /// # Errors
    ///
    /// There is none, another process has it, it is something else, it is damaged, or it cannot be
    /// read or written.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, OutboxError> {
        let path = path.as_ref().to_owned();
        let database = local::open(&path, rows::FORMAT)?;
        let mut file = Self { path, database, next: 0 };
        file.next = file.contents()?.next;
        Ok(file)
    }

    fn contents(&self) -> Result<rows::Contents, OutboxError> {
        Ok(rows::load(&self.database).map_err(|error| self.explain(error))?)
    }

    fn explain(&self, error: redb::Error) -> FileError {
        FileError::explain(&self.path, error)
    }

    /// What waits to be published, by topic.
    ///
    /// # Errors
    ///
    /// The file cannot be read.
    pub fn topics(&self) -> Result<Vec<OutboxTopic>, OutboxError> {
        let usage = |items: BTreeMap<u64, u64>| {
            let mut usage = Usage::default();
            items.values().for_each(|bytes| usage.add(*bytes));
            usage
        };
        let topics = self.contents()?.pending.into_iter();
        let topic = |(topic, items)| OutboxTopic { topic, pending: usage(items), waiting: None };
        Ok(topics.map(topic).collect())
    }

    /// What was set aside, as [`Outbox::parked`](super::Outbox::parked).
    ///
    /// # Errors
    ///
    /// The file cannot be read.
    pub fn parked(&self, from: u64, most: usize) -> Result<Vec<Parked>, OutboxError> {
        let rows = rows::parked(&self.database, from, most);
        let rows = rows.map_err(|error| self.explain(error))?;
        Ok(rows.into_iter().map(|(item, row)| Parked::from_row(item, row)).collect())
    }

    /// Lets a message that was set aside wait again, as [`Outbox::resend`](super::Outbox::resend).
    ///
    /// # Errors
    ///
    /// There is no such message, or the file cannot be written.
    pub fn resend(&mut self, item: u64) -> Result<u64, OutboxError> {
        let topic: Arc<str> = self.find(item)?.topic.into();
        let again = self.next;
        self.write(Request::Resend { topic, item, again, size: 0 })?;
        self.next += 1;
        Ok(again)
    }

    /// Forgets a message that was set aside. It is not published.
    ///
    /// # Errors
    ///
    /// There is no such message, or the file cannot be written.
    pub fn discard(&mut self, item: u64) -> Result<(), OutboxError> {
        self.find(item)?;
        self.write(Request::Discard { item })
    }

    fn find(&self, item: u64) -> Result<Parked, OutboxError> {
        let found = self.parked(item, 1)?.into_iter().find(|found| found.item == item);
        found.ok_or(OutboxError::NotParked { item })
    }

    fn write(&self, request: Request) -> Result<(), OutboxError> {
        let write = || {
            let mut transaction: WriteTransaction = self.database.begin_write()?;
            transaction.set_two_phase_commit(true);
            rows::write(&transaction, &[request])?;
            Ok::<_, redb::Error>(transaction.commit()?)
        };
        Ok(write().map_err(|error| self.explain(error))?)
    }
}
