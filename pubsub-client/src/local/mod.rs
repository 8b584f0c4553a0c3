//! A redb file of the application's own: how it is made, opened and written. All of it blocks.

mod committer;

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use redb::{Builder, Database, ReadableDatabase as _, TableDefinition, TableError};

pub(crate) use self::committer::{Committer, Journal};
use crate::env::SharedEnv;

/// What the file is, and small things beside its rows.
pub(crate) const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
const FORMAT: &str = "format";

/// The files are small, and what is read was written a moment ago.
const CACHE_BYTES: usize = 16 * 1024 * 1024;

/// A local file cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// It is open elsewhere: in another process, or twice in this one.
    #[error("{} is in use by another process; a file belongs to one process at a time", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// There is no such file.
    #[error("there is no file {}", path.display())]
    NotFound {
        /// The file.
        path: PathBuf,
    },
    /// It is a file of something else, or of another version.
    #[error("{} is not {expected:?}: it is {found}; give another path", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What it should be.
        expected: &'static str,
        /// What it is.
        found: String,
    },
    /// It failed its checksums. Nothing was changed.
    #[error("{} is damaged: {detail}; restore it, or move it away and start with an empty one", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// It could not be read or written. After a failed write nothing more is written: what is on
    /// disk is known when the file is opened again.
    #[error("{} cannot be used: {detail}; nothing more is written to it until it is opened again", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What happened.
        detail: String,
    },
    /// It was closed.
    #[error("the file is closed")]
    Closed,
}

impl FileError {
    #[expect(clippy::wildcard_enum_match_arm, reason = "the others need no word of their own")]
    pub(crate) fn explain(path: &Path, error: redb::Error) -> Self {
        let path = path.to_owned();
        match error {
            redb::Error::DatabaseAlreadyOpen => Self::InUse { path },
            redb::Error::Corrupted(detail) => Self::Damaged { path, detail },
            redb::Error::Io(error) if error.kind() == ErrorKind::NotFound => {
                Self::NotFound { path }
            }
            redb::Error::Io(error) if error.kind() == ErrorKind::InvalidData => {
                Self::Damaged { path, detail: error.to_string() }
            }
            redb::Error::DatabaseClosed => Self::Closed,
            error => Self::Io { path, detail: error.to_string() },
        }
    }

    pub(crate) fn io(path: &Path, error: io::Error) -> Self {
        Self::explain(path, redb::Error::Io(error))
    }

    /// Whether the file is fit for use later, without anything being changed about it.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::InUse { .. })
    }
}

/// Opens a file, and makes it if there is none. All of it is read and checked.
pub(crate) fn open_or_create(
    path: &Path,
    format: &'static str,
    env: &SharedEnv,
) -> Result<Database, FileError> {
    if !path.exists() {
        create(path, format, env).map_err(|error| FileError::explain(path, error))?;
    }
    open(path, format)
}

/// Opens a file that must exist. All of it is read and checked.
pub(crate) fn open(path: &Path, format: &'static str) -> Result<Database, FileError> {
    // What is in the system's cache only must not be built upon.
    let synced = File::options().write(true).open(path).and_then(|file| file.sync_all());
    synced.map_err(|error| FileError::io(path, error))?;
    let mut builder = Builder::new();
    builder.set_cache_size(CACHE_BYTES).set_check_integrity_on_open(true);
    // redb asserts what a damaged file need not keep.
    let opened = catch_unwind(AssertUnwindSafe(|| builder.open(path)));
    let damaged =
        |_| FileError::Damaged { path: path.to_owned(), detail: "reading it panicked".to_owned() };
    let database = opened.map_err(damaged)?;
    let database = database.map_err(|error| FileError::explain(path, error.into()))?;
    let found = read_format(&database).map_err(|error| FileError::explain(path, error))?;
    if found.as_deref() != Some(format.as_bytes()) {
        let found = found.map_or_else(
            || "a file of something else".to_owned(),
            |found| format!("{:?}", String::from_utf8_lossy(&found)),
        );
        return Err(FileError::Format { path: path.to_owned(), expected: format, found });
    }
    Ok(database)
}

fn read_format(database: &Database) -> Result<Option<Vec<u8>>, redb::Error> {
    match database.begin_read()?.open_table(META) {
        Ok(meta) => Ok(meta.get(FORMAT)?.map(|format| format.value().to_owned())),
        Err(TableError::Storage(error)) => Err(error.into()),
        Err(_) => Ok(None),
    }
}

/// The file gets its name when it is complete: a power cut leaves it whole or not at all. If
/// another process makes it at the same time, the first one's stays.
fn create(path: &Path, format: &str, env: &SharedEnv) -> Result<(), redb::Error> {
    let name = path.file_name().ok_or_else(|| io::Error::from(ErrorKind::InvalidInput))?;
    let mut temporary = name.to_owned();
    temporary.push(format!(".{:032x}.new", u128::from_be_bytes(env.id())));
    let temporary = path.with_file_name(temporary);
    let made: Result<(), redb::Error> = (|| {
        let database = Builder::new().set_cache_size(CACHE_BYTES).create(&temporary)?;
        keep_private(&temporary)?;
        let transaction = database.begin_write()?;
        transaction.open_table(META)?.insert(FORMAT, format.as_bytes())?;
        transaction.commit()?;
        database.close()?;
        File::options().write(true).open(&temporary)?.sync_all()?;
        match fs::hard_link(&temporary, path) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(error.into()),
            Ok(()) | Err(_) => Ok(()),
        }
    })();
    // It is not needed any more, whatever came of it.
    let removed = fs::remove_file(&temporary);
    made?;
    removed?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    sync_folder(folder.unwrap_or(Path::new(".")))?;
    Ok(())
}

/// Payloads are nobody else's business.
#[cfg(unix)]
fn keep_private(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))
}

/// Other systems have their own ways.
#[cfg(not(unix))]
fn keep_private(_: &Path) -> io::Result<()> {
    Ok(())
}

/// A name is durable when its folder is.
#[cfg(unix)]
fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Other systems have no such thing.
#[cfg(not(unix))]
fn sync_folder(_: &Path) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::env::System;

    const WHAT: &str = "a test 1";

    fn env() -> SharedEnv {
        Arc::new(System)
    }

    #[test]
    fn a_file_belongs_to_one_opener_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        assert_eq!(open(&path, WHAT).unwrap_err(), FileError::NotFound { path: path.clone() });
        let first = open_or_create(&path, WHAT, &env()).unwrap();
        let second = open_or_create(&path, WHAT, &env()).unwrap_err();
        assert_eq!(second, FileError::InUse { path: path.clone() });
        drop(first);
        drop(open(&path, WHAT).unwrap());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing else is left");
    }

    #[cfg(unix)]
    #[test]
    fn a_file_is_for_its_owner_only() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        drop(open_or_create(&path, WHAT, &env()).unwrap());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_file_of_something_else_is_refused_and_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        drop(open_or_create(&path, "another 1", &env()).unwrap());
        let error = open_or_create(&path, WHAT, &env()).unwrap_err();
        assert!(matches!(error, FileError::Format { .. }), "{error}");
        fs::write(&path, "no database").unwrap();
        assert!(open_or_create(&path, WHAT, &env()).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"no database");
    }

    #[test]
    fn a_flipped_bit_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let database = open_or_create(&path, WHAT, &env()).unwrap();
        let transaction = database.begin_write().unwrap();
        let payload = [0x5a; 3000];
        transaction.open_table(META).unwrap().insert("row", payload.as_slice()).unwrap();
        transaction.commit().unwrap();
        database.close().unwrap();
        let mut bytes = fs::read(&path).unwrap();
        let place = bytes.windows(100).position(|bytes| bytes == [0x5a; 100]).unwrap();
        bytes[place] ^= 1;
        fs::write(&path, bytes).unwrap();
        let error = open(&path, WHAT).unwrap_err();
        assert!(matches!(error, FileError::Damaged { .. }), "{error}");
    }
}
