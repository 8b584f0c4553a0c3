//! What the file of an outbox holds.

use std::collections::BTreeMap;
use std::sync::Arc;

use prost::Message as _;
use pubsub_proto::v1 as pb;
use redb::{
    Database, ReadableDatabase as _, ReadableTable, Table, TableDefinition, WriteTransaction,
};

use crate::error::Reason;
use crate::local::META;

pub(super) const FORMAT: &str = "pubsub outbox 1";

/// Messages that wait to be published, by topic and item.
const PENDING: TableDefinition<'_, (&str, u64), &[u8]> = TableDefinition::new("pending");
/// When a message was handed to a connection first, in milliseconds, from before that on.
const SENT: TableDefinition<'_, (&str, u64), u64> = TableDefinition::new("sent");
/// Messages that were set aside, by item.
const PARKED: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("parked");
/// The next item, and the latest time that was ever seen.
const NEXT: &str = "next";
const CLOCK: &str = "clock";

/// A message that waits.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct PendingRow {
    #[prost(uint64, tag = "1")]
    pub(super) enqueued: u64,
    #[prost(message, optional, tag = "2")]
    pub(super) message: Option<pb::Message>,
}

/// A message that was set aside.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct ParkedRow {
    #[prost(string, tag = "1")]
    pub(super) topic: String,
    #[prost(uint64, tag = "2")]
    pub(super) enqueued: u64,
    #[prost(message, optional, tag = "3")]
    pub(super) message: Option<pb::Message>,
    #[prost(uint64, tag = "4")]
    pub(super) parked: u64,
    /// 0: it was never sent.
    #[prost(uint64, tag = "5")]
    pub(super) sent: u64,
    /// The name of the server's reason; empty: its fate is unknown.
    #[prost(string, tag = "6")]
    pub(super) reason: String,
    #[prost(string, tag = "7")]
    pub(super) detail: String,
}

/// Why a message is set aside.
#[derive(Clone, Debug)]
pub(super) struct Why {
    pub(super) reason: Option<Reason>,
    pub(super) detail: String,
}

/// A message as it was read.
#[derive(Debug)]
pub(super) struct Stored {
    pub(super) item: u64,
    pub(super) bytes: u64,
    /// When it was first sent, if ever.
    pub(super) sent: Option<u64>,
    pub(super) message: pb::Message,
}

/// One thing to write.
#[derive(Debug)]
pub(super) enum Request {
    Enqueue {
        topic: Arc<str>,
        item: u64,
        row: Vec<u8>,
    },
    /// Before messages are sent: those that are sent first now, and those that must not be.
    Prepare {
        topic: Arc<str>,
        now: u64,
        first: Vec<u64>,
        parked: Vec<(u64, Why)>,
    },
    /// After answers: what is published, and what is refused.
    Settle {
        topic: Arc<str>,
        now: u64,
        published: Vec<u64>,
        parked: Vec<(u64, Why)>,
    },
    /// What was set aside waits again, as a new item at the end.
    Resend {
        topic: Arc<str>,
        item: u64,
        again: u64,
        size: u64,
    },
    Discard {
        item: u64,
    },
}

/// How much room a message takes, in bytes.
pub(super) fn size(row: &[u8]) -> u64 {
    row.len() as u64
}

/// The tables, in a transaction.
struct Tables<'t> {
    meta: Table<'t, &'static str, &'static [u8]>,
    pending: Table<'t, (&'static str, u64), &'static [u8]>,
    sent: Table<'t, (&'static str, u64), u64>,
    parked: Table<'t, u64, &'static [u8]>,
}

impl<'t> Tables<'t> {
    fn open(transaction: &'t WriteTransaction) -> Result<Self, redb::Error> {
        Ok(Self {
            meta: transaction.open_table(META)?,
            pending: transaction.open_table(PENDING)?,
            sent: transaction.open_table(SENT)?,
            parked: transaction.open_table(PARKED)?,
        })
    }

    fn write(&mut self, request: &Request) -> Result<(), redb::Error> {
        match request {
            Request::Enqueue { topic, item, row } => {
                self.pending.insert((&**topic, *item), row.as_slice())?;
                self.put(NEXT, item + 1)
            }
            Request::Prepare { topic, now, first, parked } => {
                for item in first {
                    // Deliberate bugs, for tests of tests.
                    if cfg!(pubsub_break = "outbox_forgets_what_it_sent") {
                        continue;
                    }
                    if cfg!(pubsub_break = "outbox_removes_before_the_answer") {
                        self.pending.remove((&**topic, *item))?;
                    }
                    self.sent.insert((&**topic, *item), *now)?;
                }
                self.put(CLOCK, *now)?;
                parked.iter().try_for_each(|(item, why)| self.park(topic, *item, why, *now))
            }
            Request::Settle { topic, now, published, parked } => {
                for item in published {
                    self.pending.remove((&**topic, *item))?;
                    self.sent.remove((&**topic, *item))?;
                }
                parked.iter().try_for_each(|(item, why)| self.park(topic, *item, why, *now))
            }
            Request::Resend { item, again, .. } => self.resend(*item, *again),
            Request::Discard { item } => {
                self.parked.remove(item)?;
                Ok(())
            }
        }
    }

    fn park(&mut self, topic: &str, item: u64, why: &Why, now: u64) -> Result<(), redb::Error> {
        let Some(row) = self.pending.remove((topic, item))? else { return Ok(()) };
        let row = decode::<PendingRow>(row.value())?;
        let sent = self.sent.remove((topic, item))?.map_or(0, |sent| sent.value());
        let parked = ParkedRow {
            topic: topic.to_owned(),
            enqueued: row.enqueued,
            message: row.message,
            parked: now,
            sent,
            reason: why.reason.map(|reason| reason.as_str().to_owned()).unwrap_or_default(),
            detail: why.detail.clone(),
        };
        self.parked.insert(item, parked.encode_to_vec().as_slice())?;
        Ok(())
    }

    fn resend(&mut self, item: u64, again: u64) -> Result<(), redb::Error> {
        let Some(row) = self.parked.remove(item)? else { return Ok(()) };
        let parked = decode::<ParkedRow>(row.value())?;
        drop(row);
        let pending = PendingRow { enqueued: parked.enqueued, message: parked.message };
        self.pending.insert((&*parked.topic, again), pending.encode_to_vec().as_slice())?;
        self.put(NEXT, again + 1)
    }

    fn put(&mut self, name: &'static str, value: u64) -> Result<(), redb::Error> {
        self.meta.insert(name, value.to_le_bytes().as_slice())?;
        Ok(())
    }

    fn get(&self, name: &'static str) -> Result<u64, redb::Error> {
        let row = self.meta.get(name)?;
        let bytes = row.map(|row| row.value().try_into()).transpose();
        let bytes = bytes.map_err(|_| redb::Error::Corrupted(format!("the row {name:?}")))?;
        Ok(bytes.map_or(0, u64::from_le_bytes))
    }
}

fn decode<M: prost::Message + Default>(row: &[u8]) -> Result<M, redb::Error> {
    M::decode(row).map_err(|error| redb::Error::Corrupted(format!("a message: {error}")))
}

/// Writes a group into a transaction.
pub(super) fn write(transaction: &WriteTransaction, group: &[Request]) -> Result<(), redb::Error> {
    let mut tables = Tables::open(transaction)?;
    group.iter().try_for_each(|request| tables.write(request))
}

/// What a file holds, when it is opened.
#[derive(Debug, Default)]
pub(super) struct Contents {
    pub(super) next: u64,
    pub(super) clock: u64,
    /// Items and sizes.
    pub(super) pending: BTreeMap<Arc<str>, BTreeMap<u64, u64>>,
    pub(super) parked: BTreeMap<u64, u64>,
}

/// Reads all of it, and makes the tables where there are none.
pub(super) fn load(database: &Database) -> Result<Contents, redb::Error> {
    let transaction = database.begin_write()?;
    let tables = Tables::open(&transaction)?;
    let (next, clock) = (tables.get(NEXT)?.max(1), tables.get(CLOCK)?);
    let mut contents = Contents { next, clock, ..Contents::default() };
    for entry in tables.pending.iter()? {
        let (key, row) = entry?;
        let (topic, item) = key.value();
        if !contents.pending.contains_key(topic) {
            contents.pending.insert(topic.into(), BTreeMap::new());
        }
        contents.pending.get_mut(topic).map(|items| items.insert(item, size(row.value())));
    }
    for entry in tables.parked.iter()? {
        let (item, row) = entry?;
        contents.parked.insert(item.value(), size(row.value()));
    }
    drop(tables);
    transaction.commit()?;
    Ok(contents)
}

/// The next messages of a topic after an item: some, and not many more bytes than asked for.
pub(super) fn read(
    database: &Database,
    topic: &str,
    after: u64,
    most: (usize, u64),
) -> Result<Vec<Stored>, redb::Error> {
    let transaction = database.begin_read()?;
    let (pending, sent) = (transaction.open_table(PENDING)?, transaction.open_table(SENT)?);
    let (mut read, mut bytes) = (Vec::new(), 0);
    let (most_messages, most_bytes) = most;
    for entry in pending.range((topic, after.saturating_add(1))..=(topic, u64::MAX))? {
        let (key, row) = entry?;
        let (_, item) = key.value();
        let size = size(row.value());
        bytes += size;
        if read.len() == most_messages || (bytes > most_bytes && !read.is_empty()) {
            break;
        }
        let message = decode::<PendingRow>(row.value())?.message.unwrap_or_default();
        let sent = sent.get((topic, item))?.map(|sent| sent.value());
        read.push(Stored { item, bytes: size, sent, message });
    }
    Ok(read)
}

/// What was set aside, from an item on.
pub(super) fn parked(
    database: &Database,
    from: u64,
    most: usize,
) -> Result<Vec<(u64, ParkedRow)>, redb::Error> {
    let parked = database.begin_read()?.open_table(PARKED)?;
    let rows = parked.range(from..)?.take(most).map(|entry| {
        let (item, row) = entry?;
        Ok((item.value(), decode::<ParkedRow>(row.value())?))
    });
    rows.collect()
}
