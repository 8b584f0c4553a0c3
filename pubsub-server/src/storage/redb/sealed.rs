//! Sealed files: older messages, never written again.
//!
//! A file holds ranges of one large topic or of several small ones, as the same rows that the hot
//! file had. It is found only if the hot file says so, which also knows a hash of all its bytes:
//! what redb reads from it is what redb wrote, so that redb cannot stumble over it.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ::redb::{Builder, ReadOnlyDatabase, TableHandle};
use serde::{Deserialize, Serialize};

use super::disk::{Digest, Disk};
use super::tables::{Damaged, FILES, Trouble};

/// Sealed files that are open at a time.
const OPEN_FILES: usize = 16;
/// Little, since a file is mostly read once, from its start to its end.
const CACHE_BYTES: usize = 4 * 1024 * 1024;

const PREFIX: &str = "sealed-";
const SUFFIX: &str = ".redb";

/// A dense range of one topic in a sealed file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) first: u64,
    pub(super) last: u64,
    /// Bytes of the bodies.
    pub(super) bytes: u64,
    /// Those of them that are in blob files.
    pub(super) outside: u64,
    pub(super) file: u64,
}

/// A [`Segment`] as stored; its key has the rest.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct SegmentRow {
    pub(super) last: u64,
    pub(super) bytes: u64,
    pub(super) outside: u64,
    pub(super) file: u64,
}

impl SegmentRow {
    pub(super) fn of(segment: &Segment) -> Self {
        let Segment { last, bytes, outside, file, .. } = *segment;
        Self { last, bytes, outside, file }
    }

    pub(super) fn starting_at(self, first: u64) -> Segment {
        let Self { last, bytes, outside, file } = self;
        Segment { first, last, bytes, outside, file }
    }
}

/// The name of a sealed file.
pub(super) fn name(file: u64) -> String {
    format!("{PREFIX}{file:016x}{SUFFIX}")
}

/// The number of a sealed file, by its name.
pub(super) fn number(name: &str) -> Option<u64> {
    let number = name.strip_prefix(PREFIX)?.strip_suffix(SUFFIX)?;
    u64::from_str_radix(number, 16).ok()
}

/// The sealed files that readers use.
#[derive(Debug)]
pub(super) struct Cabinet {
    disk: Arc<dyn Disk>,
    state: Mutex<CabinetState>,
}

#[derive(Default)]
struct CabinetState {
    /// All files that are registered.
    files: HashMap<u64, (Digest, Verdict)>,
    /// Those that are open, the last used ones first.
    open: VecDeque<(u64, Arc<ReadOnlyDatabase>)>,
}

impl fmt::Debug for CabinetState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // redb has no words for a file that is open for reading.
        f.debug_struct("CabinetState").field("files", &self.files).finish_non_exhaustive()
    }
}

/// Whether a file is what was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// Not known since the start: it is read completely before it is used.
    Open,
    Good,
    Bad,
}

impl Cabinet {
    pub(super) fn new(disk: Arc<dyn Disk>) -> Self {
        Self { disk, state: Mutex::default() }
    }

    pub(super) fn register(&self, file: u64, digest: Digest) {
        self.lock().files.entry(file).or_insert((digest, Verdict::Open));
    }

    /// Forgets a file. Readers that have it open go on.
    pub(super) fn forget(&self, file: u64) {
        let mut state = self.lock();
        state.files.remove(&file);
        state.open.retain(|(open, _)| *open != file);
    }

    /// Closes what nobody reads.
    pub(super) fn clear(&self) {
        self.lock().open.clear();
    }

    /// A file to read from.
    pub(super) fn get(&self, file: u64) -> Result<Arc<ReadOnlyDatabase>, Trouble> {
        let damaged = || Trouble::Damaged(Damaged::in_table(FILES.name()));
        let mut state = self.lock();
        if let Some(place) = state.open.iter().position(|(open, _)| *open == file) {
            let found = state.open.remove(place).expect("it was just found");
            state.open.push_front(found.clone());
            return Ok(found.1);
        }
        let (digest, verdict) = *state.files.get(&file).ok_or_else(damaged)?;
        drop(state);
        if verdict == Verdict::Open {
            let verdict = self.judge(file, digest)?;
            if let Some(entry) = self.lock().files.get_mut(&file) {
                entry.1 = verdict;
            }
        }
        if self.lock().files.get(&file).is_none_or(|(_, verdict)| *verdict != Verdict::Good) {
            return Err(damaged());
        }
        let mut builder = Builder::new();
        builder.set_cache_size(CACHE_BYTES);
        let opened = Arc::new(self.disk.open_sealed(&name(file), &builder)?);
        let mut state = self.lock();
        // One that was forgotten meanwhile would keep its space.
        if state.files.contains_key(&file) {
            state.open.push_front((file, Arc::clone(&opened)));
            state.open.truncate(OPEN_FILES);
        }
        Ok(opened)
    }

    fn judge(&self, file: u64, expected: Digest) -> Result<Verdict, Trouble> {
        match self.disk.digest(&name(file)) {
            Ok(found) if found == expected => Ok(Verdict::Good),
            Ok(_) => {
                tracing::error!(file = name(file), "a sealed file is damaged");
                Ok(Verdict::Bad)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                tracing::error!(file = name(file), "a sealed file is missing");
                Ok(Verdict::Bad)
            }
            // It may pass, as too many open files do: the messages are not lost.
            Err(error) => {
                tracing::error!(file = name(file), %error, "a sealed file cannot be read");
                Err(::redb::Error::Io(error).into())
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, CabinetState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
