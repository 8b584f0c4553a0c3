//! The files of a store, behind a seam so that a test can cut the power.

use std::fmt;
use std::io;

use serde::{Deserialize, Serialize};

use ::redb::{Builder, Database, DatabaseError, ReadOnlyDatabase};

/// The hot file.
pub(super) const HOT: &str = "hot.redb";
/// The log.
pub(super) const LOG: &str = "commits.log";
/// The ending of files that are being written. Whatever has it is removed at the next open.
pub(super) const TEMPORARY: &str = ".tmp";

/// A flat folder of database files.
///
/// What was written to a file survives a power cut once redb or [`Disk::sync`] has synced it. A
/// file is found under its name once [`Disk::rename`] has returned. [`Disk::remove`] may or may
/// not have happened.
pub(super) trait Disk: fmt::Debug + Send + Sync {
    /// Where it is, for people.
    fn path(&self) -> String;

    /// Opens a database for writing; `None` if there is no such file.
    fn open(&self, name: &str, builder: &Builder) -> Result<Option<Database>, DatabaseError>;

    /// Makes a new empty database, replacing a file of that name.
    fn create(&self, name: &str, builder: &Builder) -> Result<Database, DatabaseError>;

    /// Opens the log or a blob file for reading and writing.
    fn open_log(&self, name: &str) -> io::Result<Box<dyn LogFile>>;

    /// Makes a new empty file for a log or for blobs, replacing a file of that name.
    fn create_log(&self, name: &str) -> io::Result<Box<dyn LogFile>>;

    /// Opens a database that is never written again.
    fn open_sealed(&self, name: &str, builder: &Builder)
    -> Result<ReadOnlyDatabase, DatabaseError>;

    /// The length of a file and a hash of its bytes.
    fn digest(&self, name: &str) -> io::Result<Digest>;

    /// Makes sure that a file is on disk and, where that can be, that what is read of it from now
    /// on comes from there: after a failed sync the system's cache may hold what the disk does not.
    fn sync(&self, name: &str) -> io::Result<()>;

    /// Gives a file its name, durably.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Removes a file; it is no error if there is none.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// The names of all files.
    fn list(&self) -> io::Result<Vec<String>>;

    /// How much may still be written.
    fn space(&self) -> io::Result<Space>;

    /// Makes or removes the ballast: a file that is given up when a full disk keeps positions
    /// from being stored.
    fn set_ballast(&self, wanted: bool) -> io::Result<()>;

    /// Whether the last run ended with [`Disk::set_clean`].
    fn is_clean(&self) -> bool;

    /// Notes, durably, that everything is closed, or that it no longer is.
    fn set_clean(&self, clean: bool) -> io::Result<()>;

    /// Lets another server have it.
    fn unlock(&self);
}

/// A file of plain bytes.
pub(super) trait LogFile: fmt::Debug + Send + Sync {
    /// Its length.
    fn len(&self) -> io::Result<u64>;

    /// So many bytes from a place on.
    fn read(&self, offset: u64, length: usize) -> io::Result<Vec<u8>>;

    /// Writes to a place.
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Makes what was written durable.
    fn sync(&self) -> io::Result<()>;
}

/// A failed sync as it has to reach redb. Whatever the reason, also a disk without room: pages that
/// were not written may look as if they were, so that the file must not be opened again in place.
pub(super) fn failed_sync(error: io::Error) -> io::Error {
    io::Error::other(format!("the sync failed: {error}"))
}

/// What a file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Digest {
    pub(super) length: u64,
    pub(super) hash: u64,
}

/// Room on a disk, in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Space {
    pub(super) free: u64,
    pub(super) total: u64,
}
