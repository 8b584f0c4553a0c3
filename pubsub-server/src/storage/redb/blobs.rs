//! Blob files: rows of messages that are appended to a file instead of being put into a table.
//!
//! What is published in large amounts is written once, to where it stays, and the tables say where
//! each row is. A file holds rows of one topic in their order, and goes as a whole when all of them
//! are trimmed. Rows carry checksums that name their place, so that a file needs none.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::disk::{Disk, LogFile};
use super::sealed;

/// Blob files that are open for reading at a time.
const OPEN_FILES: usize = 64;
/// Blob files that grow at a time.
pub(super) const GROWING_FILES: usize = 64;
/// Blob files that one commit writes to: each costs a sync.
pub(super) const FILES_OF_A_COMMIT: usize = 4;
/// What a commit writes to a file begins at a multiple of this: no write touches what an earlier one
/// has made durable.
pub(super) const BLOCK: u64 = 4096;

const PREFIX: &str = "blob-";
const SUFFIX: &str = ".log";
/// A file that has no rows yet; what is left of it is removed at the next start.
pub(super) const SPARE: &str = "blob.tmp";

/// When rows go to a blob file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    /// A topic gets its first one when it has so many bytes of messages in the hot file, so that ten
    /// thousand small topics do not have ten thousand files.
    pub(super) topic: u64,
    /// Bytes that a commit has to have for the topic: it costs a sync more.
    pub(super) commit: u64,
    /// A file that has so many bytes grows no more.
    pub(super) file: u64,
    /// One of which all is trimmed goes before that if it has so many bytes.
    pub(super) trimmed: u64,
}

impl Sizes {
    /// Whether a commit that has so many bytes for a topic may take them to a blob file.
    pub(super) fn is_large(self, bytes: u64) -> bool {
        bytes >= self.commit
    }
}

/// A blob file as its topic knows it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Blob {
    pub(super) file: u64,
    /// The last message in it.
    pub(super) last: u64,
    pub(super) length: u64,
    /// Only what this run has made: behind what is known of an older one there may be anything.
    pub(super) grows: bool,
    /// How long it was when it was looked at last.
    pub(super) seen: u64,
    /// Whether it had not grown then.
    pub(super) rests: bool,
}

/// A [`Blob`] as stored; its key has the rest.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct BlobRow {
    pub(super) last: u64,
    pub(super) length: u64,
}

/// Where a row is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) file: u64,
    pub(super) offset: u64,
    pub(super) length: u32,
}

impl Blob {
    /// One that an earlier run has written.
    pub(super) fn found(file: u64, last: u64, length: u64) -> Self {
        Self { file, last, length, grows: false, seen: length, rests: true }
    }

    pub(super) fn stored(self) -> BlobRow {
        BlobRow { last: self.last, length: self.length }
    }

    /// Whether it can go when all messages below `first` are trimmed. One that grows just now is not
    /// worth a new one as long as it is small.
    pub(super) fn is_trimmed(&self, first: u64, sizes: Sizes) -> bool {
        self.last < first && (!self.grows || self.rests || self.length >= sizes.trimmed)
    }
}

/// A file that nothing refers to any more.
#[derive(Clone, Copy, Debug)]
pub(super) enum Doomed {
    Sealed(u64),
    Blob(u64),
}

impl Doomed {
    pub(super) fn name(self) -> String {
        match self {
            Self::Sealed(file) => sealed::name(file),
            Self::Blob(file) => name(file),
        }
    }
}

/// The name of a blob file.
pub(super) fn name(file: u64) -> String {
    format!("{PREFIX}{file:016x}{SUFFIX}")
}

/// The number of a blob file, by its name.
pub(super) fn number(name: &str) -> Option<u64> {
    let number = name.strip_prefix(PREFIX)?.strip_suffix(SUFFIX)?;
    u64::from_str_radix(number, 16).ok()
}

/// The blob files, for whoever reads them and for the one who writes them.
#[derive(Debug)]
pub(super) struct Blobs {
    disk: Arc<dyn Disk>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    known: HashSet<u64>,
    /// Made and not used: so that a commit needs no more of what the system may run out of.
    spare: Option<Arc<dyn LogFile>>,
    /// Those that grow.
    growing: HashMap<u64, Arc<dyn LogFile>>,
    /// Others that are open, the last used ones first.
    open: VecDeque<(u64, Arc<dyn LogFile>)>,
}

impl Blobs {
    pub(super) fn new(disk: Arc<dyn Disk>) -> Self {
        Self { disk, state: Mutex::default() }
    }

    /// There are exactly these.
    pub(super) fn reset(&self, known: HashSet<u64>) {
        *self.lock() = State { known, ..State::default() };
    }

    /// Forgets a file. Readers that have it open go on.
    pub(super) fn forget(&self, file: u64) {
        let mut state = self.lock();
        state.known.remove(&file);
        state.growing.remove(&file);
        state.open.retain(|(open, _)| *open != file);
    }

    /// The bytes at a place.
    pub(super) fn read(&self, place: Place) -> io::Result<Bytes> {
        Ok(self.get(place.file)?.read(place.offset, place.length as usize)?.into())
    }

    /// Whether another file can begin to grow. That takes what the system may run out of, and so it
    /// is no error if it cannot.
    pub(super) fn prepare(&self) -> bool {
        let state = self.lock();
        if state.growing.len() >= GROWING_FILES || state.spare.is_some() {
            return state.spare.is_some();
        }
        drop(state);
        match self.disk.create_log(SPARE) {
            Ok(spare) => {
                self.lock().spare = Some(spare.into());
                true
            }
            Err(error) => {
                tracing::warn!(%error, "no file can be made: messages go to the tables");
                false
            }
        }
    }

    /// Such a file grows no more.
    pub(super) fn finish(&self, file: u64) {
        self.lock().growing.remove(&file);
    }

    /// Writes rows that follow each other in each file, and makes them durable.
    pub(super) fn write(&self, rows: &[(Place, Bytes)]) -> io::Result<()> {
        for rows in rows.chunk_by(|(one, _), (next, _)| one.file == next.file) {
            let (Place { file, offset, .. }, _) = rows[0];
            if offset == 0 {
                self.begin(file)?;
            }
            let grows = self.lock().growing.get(&file).cloned();
            let file = grows.ok_or(io::ErrorKind::NotFound)?;
            for (place, row) in rows {
                file.write(place.offset, row)?;
            }
            if !cfg!(pubsub_break = "blob_without_sync") {
                file.sync()?;
            }
        }
        Ok(())
    }

    /// Gives the spare file its name, under which it is found from then on.
    fn begin(&self, file: u64) -> io::Result<()> {
        let spare = self.lock().spare.take().ok_or(io::ErrorKind::NotFound)?;
        self.disk.rename(SPARE, &name(file))?;
        let mut state = self.lock();
        state.known.insert(file);
        state.growing.insert(file, spare);
        Ok(())
    }

    fn get(&self, file: u64) -> io::Result<Arc<dyn LogFile>> {
        let mut state = self.lock();
        if let Some(grows) = state.growing.get(&file) {
            return Ok(Arc::clone(grows));
        }
        if let Some(at) = state.open.iter().position(|(open, _)| *open == file) {
            let found = state.open.remove(at).expect("it was just found");
            state.open.push_front(found.clone());
            return Ok(found.1);
        }
        drop(state);
        let opened: Arc<dyn LogFile> = self.disk.open_log(&name(file))?.into();
        let mut state = self.lock();
        // One that was forgotten meanwhile would keep its space.
        if state.known.contains(&file) {
            state.open.push_front((file, Arc::clone(&opened)));
            state.open.truncate(OPEN_FILES);
        }
        Ok(opened)
    }

    #[cfg(test)]
    pub(super) fn growing(&self) -> usize {
        self.lock().growing.len()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::super::simulation::SimDisk;
    use super::*;

    #[test]
    fn few_files_are_open_and_none_that_was_forgotten() {
        let disk = Arc::new(SimDisk::new());
        let blobs = Blobs::new(Arc::clone(&disk) as _);
        let place = |file| Place { file, offset: 0, length: 3 };
        for file in 1..=2 * OPEN_FILES as u64 {
            assert!(blobs.prepare());
            blobs.write(&[(place(file), Bytes::from_static(b"row"))]).unwrap();
            blobs.finish(file);
            assert_eq!(blobs.read(place(1)).unwrap(), "row");
            assert_eq!(blobs.read(place(file)).unwrap(), "row");
        }
        assert_eq!(blobs.lock().open.len(), OPEN_FILES);
        assert!(blobs.lock().growing.is_empty());
        // As a reader that has looked up its place before the file was forgotten.
        blobs.forget(1);
        assert_eq!(blobs.read(place(1)).unwrap(), "row");
        assert!(blobs.lock().open.iter().all(|(file, _)| *file != 1));
        assert_eq!(blobs.read(place(200)).unwrap_err().kind(), io::ErrorKind::NotFound);
        let longer = Place { length: 4, ..place(2) };
        assert_eq!(blobs.read(longer).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert!(disk.names().iter().all(|name| name != SPARE));
    }

    #[test]
    fn no_more_files_grow_than_may() {
        let blobs = Blobs::new(Arc::new(SimDisk::new()));
        for file in 1..=GROWING_FILES as u64 {
            assert!(blobs.prepare());
            let place = Place { file, offset: 0, length: 3 };
            blobs.write(&[(place, Bytes::from_static(b"row"))]).unwrap();
        }
        assert!(!blobs.prepare());
        blobs.finish(1);
        assert!(blobs.prepare() && blobs.prepare());
    }
}
