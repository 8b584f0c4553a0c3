//! Blob files: rows of messages that are appended to a file instead of being put into a table.
//!
//! What is published in large amounts is written once, to where it stays, and the tables say where
//! each row is. A file holds rows of one topic in their order, and goes as a whole when all of them
//! are trimmed. Rows carry checksums that name their place, so that a file needs none.

use std::collections::{HashSet, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::disk::{Disk, LogFile, TEMPORARY};
use super::sealed;

/// Blob files that are open at a time.
const OPEN_FILES: usize = 64;

const PREFIX: &str = "blob-";
const SUFFIX: &str = ".log";

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
        Self { file, last, length, grows: false, seen: length }
    }

    pub(super) fn stored(self) -> BlobRow {
        BlobRow { last: self.last, length: self.length }
    }

    /// Whether it can go when all messages below `first` are trimmed. One that still grows is not
    /// worth a new one as long as it is small.
    pub(super) fn is_trimmed(&self, first: u64, sizes: Sizes) -> bool {
        self.last < first && (!self.grows || self.length >= sizes.trimmed)
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
    /// Those that are open, the last used ones first.
    open: VecDeque<(u64, Arc<dyn LogFile>)>,
}

impl Blobs {
    pub(super) fn new(disk: Arc<dyn Disk>) -> Self {
        Self { disk, state: Mutex::default() }
    }

    /// There are exactly these.
    pub(super) fn reset(&self, known: HashSet<u64>) {
        *self.lock() = State { known, open: VecDeque::new() };
    }

    /// Forgets a file. Readers that have it open go on.
    pub(super) fn forget(&self, file: u64) {
        let mut state = self.lock();
        state.known.remove(&file);
        state.open.retain(|(open, _)| *open != file);
    }

    /// The bytes at a place.
    pub(super) fn read(&self, place: Place) -> io::Result<Bytes> {
        let mut bytes = vec![0; place.length as usize];
        self.get(place.file)?.read(place.offset, &mut bytes)?;
        Ok(bytes.into())
    }

    /// Writes rows that follow each other in each file, and makes them durable.
    pub(super) fn write(&self, rows: &[(Place, Bytes)]) -> io::Result<()> {
        for rows in rows.chunk_by(|(one, _), (next, _)| one.file == next.file) {
            let (Place { file, offset, .. }, _) = rows[0];
            let file = if offset == 0 { self.create(file)? } else { self.get(file)? };
            for (place, row) in rows {
                file.write(place.offset, row)?;
            }
            if !cfg!(pubsub_break = "blob_without_sync") {
                file.sync()?;
            }
        }
        Ok(())
    }

    /// Makes a file, which is found under its name from then on.
    fn create(&self, file: u64) -> io::Result<Arc<dyn LogFile>> {
        let temporary = format!("{}{TEMPORARY}", name(file));
        let opened: Arc<dyn LogFile> = self.disk.create_log(&temporary)?.into();
        self.disk.rename(&temporary, &name(file))?;
        let mut state = self.lock();
        state.known.insert(file);
        state.keep(file, &opened);
        Ok(opened)
    }

    fn get(&self, file: u64) -> io::Result<Arc<dyn LogFile>> {
        let mut state = self.lock();
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
            state.keep(file, &opened);
        }
        Ok(opened)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn keep(&mut self, file: u64, opened: &Arc<dyn LogFile>) {
        self.open.push_front((file, Arc::clone(opened)));
        self.open.truncate(OPEN_FILES);
    }
}

#[cfg(test)]
mod tests {
    use super::super::simulation::SimDisk;
    use super::*;

    #[test]
    fn few_files_are_open_and_none_that_was_forgotten() {
        let blobs = Blobs::new(Arc::new(SimDisk::new()));
        let place = |file| Place { file, offset: 0, length: 3 };
        for file in 1..=2 * OPEN_FILES as u64 {
            blobs.write(&[(place(file), Bytes::from_static(b"row"))]).unwrap();
            assert_eq!(blobs.read(place(1)).unwrap(), "row");
        }
        assert_eq!(blobs.lock().open.len(), OPEN_FILES);
        // As a reader that has looked up its place before the file was forgotten.
        blobs.forget(1);
        assert_eq!(blobs.read(place(1)).unwrap(), "row");
        assert!(blobs.lock().open.iter().all(|(file, _)| *file != 1));
        assert_eq!(blobs.read(place(200)).unwrap_err().kind(), io::ErrorKind::NotFound);
        let longer = Place { length: 4, ..place(2) };
        assert_eq!(blobs.read(longer).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
