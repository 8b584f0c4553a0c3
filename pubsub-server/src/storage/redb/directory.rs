//! The files of a store in a directory of the operating system.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::ops::Bound;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use ::redb::backends::FileBackend;
use ::redb::{BackendError, Builder, Database, DatabaseError, ReadOnlyDatabase, StorageBackend};
use rustix::buffer::spare_capacity;
use rustix::fs::{Advice, fadvise, statvfs};
use rustix::io::{Errno, pread};
use xxhash_rust::xxh3::Xxh3;

use super::disk::{Digest, Disk, LogFile, Space, failed_sync};
use crate::record::Timestamp;
use crate::storage::StorageError;

/// Locked while a server runs, and says which one.
const LOCK: &str = "LOCK";
/// How often it is waited for, and how long.
const LOCK_PAUSES: u32 = 40;
const LOCK_PAUSE: Duration = Duration::from_millis(50);
/// Exists while nothing is open and everything was closed in order.
const CLEAN: &str = "CLEAN";
const BALLAST: &str = "ballast";
/// Enough for the commits of positions and trims that make room.
const BALLAST_BYTES: u64 = 4 * 1024 * 1024;
const CHUNK_BYTES: usize = 1024 * 1024;

/// A data directory that no other server uses.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    /// Open, so that a commit needs no more of what the system may run out of.
    directory: File,
    /// The operating system releases the lock with the file, however the process ends.
    lock: Mutex<Option<File>>,
}

impl Directory {
    /// Makes the directory if need be and locks it. Whoever has it gets 2 s to let go of it: a server
    /// that was killed just now may not be gone yet.
    pub(super) fn lock(path: &Path, now: Timestamp) -> Result<Self, StorageError> {
        let io = |error: io::Error| StorageError::Io {
            path: path.display().to_string(),
            detail: error.to_string(),
        };
        make(path).map_err(io)?;
        let mut lock = private().create(true).truncate(false).open(path.join(LOCK)).map_err(io)?;
        let mut pauses = 0..LOCK_PAUSES;
        while let Err(error) = lock.try_lock() {
            if let TryLockError::Error(error) = error {
                return Err(io(error));
            }
            if pauses.next().is_none() {
                let mut holder = String::new();
                // The text helps people; the lock itself has spoken already.
                let _ = lock.take(200).read_to_string(&mut holder);
                let holder = holder.trim();
                let holder = if holder.is_empty() { "another server" } else { holder };
                let path = path.display().to_string();
                return Err(StorageError::InUse { path, holder: holder.to_owned() });
            }
            thread::sleep(LOCK_PAUSE);
        }
        let holder = format!("process {}, started at {} ms", std::process::id(), now.0);
        lock.set_len(0).map_err(io)?;
        lock.rewind().map_err(io)?;
        writeln!(lock, "{holder}").map_err(io)?;
        let directory = File::open(path).map_err(io)?;
        Ok(Self { path: path.to_owned(), directory, lock: Mutex::new(Some(lock)) })
    }

    fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    fn sync_directory(&self) -> io::Result<()> {
        self.directory.sync_all()
    }
}

/// Makes a directory and those above it, so that a power cut leaves their names.
fn make(path: &Path) -> io::Result<()> {
    let path = std::path::absolute(path)?;
    let missing: Vec<_> = path.ancestors().take_while(|path| !path.exists()).collect();
    DirBuilder::new().recursive(true).mode(0o700).create(&path)?;
    let mut parents = missing.into_iter().filter_map(Path::parent);
    parents.try_for_each(|parent| File::open(parent)?.sync_all())
}

/// The backend of redb, but that a failed sync is never taken for a full disk.
#[derive(Debug)]
struct HotFile(FileBackend);

impl StorageBackend for HotFile {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read(offset, out)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.0.set_len(length)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data().map_err(failed_sync)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.0.close()
    }

    fn try_lock_range(&self, from: Bound<u64>, to: Bound<u64>) -> Result<bool, BackendError> {
        self.0.try_lock_range(from, to)
    }

    fn try_lock_shared_range(
        &self,
        from: Bound<u64>,
        to: Bound<u64>,
    ) -> Result<bool, BackendError> {
        self.0.try_lock_shared_range(from, to)
    }

    fn lock_range(&self, from: Bound<u64>, to: Bound<u64>) -> Result<(), BackendError> {
        self.0.lock_range(from, to)
    }

    fn lock_shared_range(&self, from: Bound<u64>, to: Bound<u64>) -> Result<(), BackendError> {
        self.0.lock_shared_range(from, to)
    }

    fn unlock_range(&self, from: Bound<u64>, to: Bound<u64>) -> Result<(), BackendError> {
        self.0.unlock_range(from, to)
    }

    fn query_lock_range(&self, from: Bound<u64>, to: Bound<u64>) -> Result<bool, BackendError> {
        self.0.query_lock_range(from, to)
    }
}

/// The log or a blob file.
#[derive(Debug)]
struct PlainFile(File);

impl LogFile for PlainFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn read(&self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        // To fill it with zeros first would cost as much as to read.
        let mut bytes = Vec::with_capacity(length);
        while bytes.len() < length {
            let at = offset + bytes.len() as u64;
            match pread(&self.0, spare_capacity(&mut bytes), at) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        bytes.truncate(length);
        Ok(bytes)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_all_at(data, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_data().map_err(failed_sync)
    }
}

/// Files are nobody else's business.
fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    options
}

impl Disk for Directory {
    fn path(&self) -> String {
        self.path.display().to_string()
    }

    fn open(&self, name: &str, builder: &Builder) -> Result<Option<Database>, DatabaseError> {
        let file = match private().open(self.file(name)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // redb would take an empty file for a new one.
        if file.metadata()?.len() == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the file is empty").into());
        }
        let ahead = File::open(self.file(name))?;
        let opened = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&opened);
        // redb reads pages in the order of its trees. A disk is several times faster in the order of
        // the file, so that this is ahead of it soon.
        let reading = thread::Builder::new().name("read-ahead".to_owned()).spawn(move || {
            let (mut chunk, mut offset) = (vec![0; CHUNK_BYTES], 0);
            while let Ok(read @ 1..) = ahead.read_at(&mut chunk, offset)
                && !stop.load(Ordering::Relaxed)
            {
                offset += read as u64;
            }
        });
        let database = builder.create_with_backend(HotFile(FileBackend::new(file)?));
        opened.store(true, Ordering::Relaxed);
        if let Ok(reading) = reading {
            let _ = reading.join();
        }
        database.map(Some)
    }

    fn create(&self, name: &str, builder: &Builder) -> Result<Database, DatabaseError> {
        let file = private().create(true).truncate(true).open(self.file(name))?;
        builder.create_with_backend(FileBackend::new(file)?)
    }

    fn open_log(&self, name: &str) -> io::Result<Box<dyn LogFile>> {
        Ok(Box::new(PlainFile(private().open(self.file(name))?)))
    }

    fn create_log(&self, name: &str) -> io::Result<Box<dyn LogFile>> {
        let file = private().create(true).truncate(true).open(self.file(name))?;
        Ok(Box::new(PlainFile(file)))
    }

    fn open_sealed(
        &self,
        name: &str,
        builder: &Builder,
    ) -> Result<ReadOnlyDatabase, DatabaseError> {
        let file = File::open(self.file(name))?;
        builder.open_read_only_with_backend(FileBackend::new(file)?)
    }

    fn digest(&self, name: &str) -> io::Result<Digest> {
        let mut file = File::open(self.file(name))?;
        let mut hash = Xxh3::new();
        let mut length = 0;
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            let read = file.read(&mut chunk)?;
            if read == 0 {
                return Ok(Digest { length, hash: hash.digest() });
            }
            length += read as u64;
            hash.update(&chunk[..read]);
        }
    }

    fn sync(&self, name: &str) -> io::Result<()> {
        let file = match private().open(self.file(name)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        file.sync_all()?;
        Ok(fadvise(&file, 0, None, Advice::DontNeed)?)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.file(from), self.file(to))?;
        self.sync_directory().map_err(failed_sync)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        match fs::remove_file(self.file(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let names = fs::read_dir(&self.path)?.map(|entry| Ok(entry?.file_name().into_string()));
        // A name that is not text is not one of ours.
        names.filter_map(|name: io::Result<_>| name.map(Result::ok).transpose()).collect()
    }

    fn space(&self) -> io::Result<Space> {
        let stat = statvfs(&self.path)?;
        Ok(Space {
            free: stat.f_bavail.saturating_mul(stat.f_frsize),
            total: stat.f_blocks.saturating_mul(stat.f_frsize),
        })
    }

    fn set_ballast(&self, wanted: bool) -> io::Result<()> {
        if !wanted {
            return self.remove(BALLAST);
        }
        let mut file = private().create(true).truncate(false).open(self.file(BALLAST))?;
        if file.metadata()?.len() == BALLAST_BYTES {
            return Ok(());
        }
        // Written, not only reserved: a sparse file would give nothing back.
        let zeros = vec![0; CHUNK_BYTES];
        let chunks = BALLAST_BYTES / CHUNK_BYTES as u64;
        let written =
            file.set_len(0).and_then(|()| (0..chunks).try_for_each(|_| file.write_all(&zeros)));
        if written.is_err() {
            // A part of it would only take the room that is left.
            let _ = self.remove(BALLAST);
        }
        written
    }

    fn is_clean(&self) -> bool {
        self.file(CLEAN).exists()
    }

    fn set_clean(&self, clean: bool) -> io::Result<()> {
        if clean {
            private().create(true).truncate(true).open(self.file(CLEAN))?;
        } else {
            self.remove(CLEAN)?;
        }
        self.sync_directory()
    }

    fn unlock(&self) {
        self.lock.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}
