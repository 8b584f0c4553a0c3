//! A disk that keeps only what was synced: it can lose its power, fill up and fail.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard};

use ::redb::{BackendError, Builder, Database, DatabaseError, ReadOnlyDatabase, StorageBackend};
use xxhash_rust::xxh3::xxh3_64;

use super::blobs::Sizes;
use super::disk::{Digest, Disk, LogFile, Space, failed_sync};
use super::open::Opening;
use super::{CACHE_BYTES, Redb, log};
use crate::env::SharedEnv;
use crate::storage::testing::Random;
use crate::storage::{Storage, StorageError};

/// What a disk writes whole or not at all.
const SECTOR: usize = 512;
const PAGE: usize = 4096;

/// A disk. Clones are the same one.
#[derive(Clone, Debug)]
pub(super) struct SimDisk(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    /// Files by their names as programs see them, and as they are after a power cut.
    names: BTreeMap<String, FileId>,
    durable_names: BTreeMap<String, FileId>,
    /// Changes of names that are not durable.
    pending_names: Vec<(String, Option<FileId>)>,
    files: Vec<FileState>,
    operations: u64,
    /// The power goes at this operation.
    cut_at: u64,
    /// After how many more a sync fails, and how; what it should have kept is gone then, as on
    /// Linux.
    fail_sync: Option<(u64, io::ErrorKind)>,
    /// How many syncs succeed before there is no room for what a commit does after one.
    full_after_syncs: Option<u64>,
    /// How plain files fail to be read.
    fail_reads: Option<io::ErrorKind>,
    /// Whether no plain file can be made.
    fail_logs: bool,
    syncs: u64,
    /// How sealed files fail to be opened.
    fail_sealed: Option<io::ErrorKind>,
    /// Pages that can still be written for the first time.
    free_pages: u64,
    clean: bool,
    ballast: bool,
}

type FileId = usize;

#[derive(Debug, Default)]
struct FileState {
    live: Vec<u8>,
    durable: Vec<u8>,
    pending: Vec<Change>,
    pages: BTreeSet<usize>,
}

#[derive(Clone, Debug)]
enum Change {
    Write(usize, Vec<u8>),
    Length(usize),
}

/// What remains of writes that were not synced when the power goes.
#[derive(Clone, Copy, Debug)]
enum Remains {
    Nothing,
    Everything,
    Prefix,
    Sectors,
}

impl SimDisk {
    pub(super) fn new() -> Self {
        Self(Arc::new(Mutex::new(State {
            names: BTreeMap::new(),
            durable_names: BTreeMap::new(),
            pending_names: Vec::new(),
            files: Vec::new(),
            operations: 0,
            cut_at: u64::MAX,
            fail_sync: None,
            full_after_syncs: None,
            fail_reads: None,
            fail_logs: false,
            syncs: 0,
            fail_sealed: None,
            free_pages: 1 << 20,
            clean: false,
            ballast: false,
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// The power goes after this many operations more.
    pub(super) fn cut_after(&self, operations: u64) {
        let mut state = self.state();
        state.cut_at = state.operations + operations;
    }

    pub(super) fn is_cut(&self) -> bool {
        let state = self.state();
        state.operations >= state.cut_at
    }

    pub(super) fn fail_next_sync(&self, kind: io::ErrorKind) {
        self.fail_sync_after(0, kind);
    }

    /// The sync after so many fails.
    pub(super) fn fail_sync_after(&self, syncs: u64, kind: io::ErrorKind) {
        self.state().fail_sync = Some((syncs, kind));
    }

    /// The commit after this many syncs is durable, and fails for lack of room.
    pub(super) fn fill_after_syncs(&self, syncs: u64) {
        self.state().full_after_syncs = Some(syncs);
    }

    /// Whether that has come.
    pub(super) fn was_filled(&self) -> bool {
        self.state().full_after_syncs.is_none()
    }

    pub(super) fn fail_sealed(&self, kind: Option<io::ErrorKind>) {
        self.state().fail_sealed = kind;
    }

    pub(super) fn fail_reads(&self, kind: Option<io::ErrorKind>) {
        self.state().fail_reads = kind;
    }

    pub(super) fn fail_logs(&self, fail: bool) {
        self.state().fail_logs = fail;
    }

    pub(super) fn syncs(&self) -> u64 {
        self.state().syncs
    }

    pub(super) fn set_free_pages(&self, pages: u64) {
        self.state().free_pages = pages;
    }

    pub(super) fn names(&self) -> Vec<String> {
        self.state().names.keys().cloned().collect()
    }

    /// The bytes of a file, to be damaged.
    pub(super) fn edit(&self, name: &str, edit: impl FnOnce(&mut Vec<u8>)) {
        let mut state = self.state();
        let id = state.names[name];
        let file = &mut state.files[id];
        edit(&mut file.live);
        file.durable = file.live.clone();
        file.pending.clear();
    }

    /// A copy of everything as it is, as on a disk that was unplugged after the last sync.
    pub(super) fn copy(&self) -> Self {
        self.after(Remains::Everything, &mut Random(0))
    }

    /// The disk that is found after a power cut.
    pub(super) fn after_cut(&self, random: &mut Random) -> Self {
        let remains = match random.below(4) {
            0 => Remains::Nothing,
            1 => Remains::Everything,
            2 => Remains::Prefix,
            _ => Remains::Sectors,
        };
        self.after(remains, random)
    }

    fn after(&self, remains: Remains, random: &mut Random) -> Self {
        let state = self.state();
        let found = Self::new();
        let mut new = found.state();
        let mut names = state.durable_names.clone();
        for (name, file) in &state.pending_names {
            let keep = match remains {
                Remains::Nothing => false,
                Remains::Everything => true,
                Remains::Prefix | Remains::Sectors => random.below(2) == 0,
            };
            match file {
                Some(file) if keep => drop(names.insert(name.clone(), *file)),
                None if keep => drop(names.remove(name)),
                Some(_) | None => {}
            }
        }
        for (name, file) in names {
            let bytes = state.files[file].after(remains, random);
            let id = new.files.len();
            let pages = (0..bytes.len().div_ceil(PAGE)).collect();
            let durable = bytes.clone();
            new.files.push(FileState { live: bytes, durable, pending: Vec::new(), pages });
            new.names.insert(name.clone(), id);
            new.durable_names.insert(name, id);
        }
        new.clean = state.clean;
        drop(new);
        found
    }
}

impl FileState {
    fn after(&self, remains: Remains, random: &mut Random) -> Vec<u8> {
        let mut bytes = self.durable.clone();
        let prefix = random.index(self.pending.len() + 1);
        for (index, change) in self.pending.iter().enumerate() {
            let mut keep = || match remains {
                Remains::Nothing => false,
                Remains::Everything => true,
                Remains::Prefix => index < prefix,
                Remains::Sectors => random.below(2) == 0,
            };
            match change {
                Change::Length(length) => {
                    if keep() {
                        bytes.resize(*length, 0);
                    }
                }
                Change::Write(offset, data) => {
                    let mut done = 0;
                    while done < data.len() {
                        let at = offset + done;
                        let length = (SECTOR - at % SECTOR).min(data.len() - done);
                        if keep() {
                            write_at(&mut bytes, at, &data[done..done + length]);
                        }
                        done += length;
                    }
                }
            }
        }
        bytes
    }
}

fn write_at(bytes: &mut Vec<u8>, offset: usize, data: &[u8]) {
    let end = offset + data.len();
    if bytes.len() < end {
        bytes.resize(end, 0);
    }
    bytes[offset..end].copy_from_slice(data);
}

impl State {
    /// Counts an operation; after the cut there are no more.
    fn tick(&mut self) -> io::Result<()> {
        self.operations += 1;
        if self.operations >= self.cut_at {
            return Err(io::Error::other("the power is gone"));
        }
        Ok(())
    }

    fn file(&self, name: &str) -> io::Result<FileId> {
        self.names.get(name).copied().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn rename(&mut self, name: &str, file: Option<FileId>) {
        match file {
            Some(file) => drop(self.names.insert(name.to_owned(), file)),
            None => drop(self.names.remove(name)),
        }
        self.pending_names.push((name.to_owned(), file));
    }
}

/// An open file.
#[derive(Debug)]
struct SimFile {
    disk: SimDisk,
    id: FileId,
}

impl StorageBackend for SimFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.disk.state().files[self.id].live.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let state = self.disk.state();
        let start = usize::try_from(offset).unwrap();
        let found = state.files[self.id].live.get(start..start + out.len());
        out.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        let mut state = self.disk.state();
        state.tick()?;
        let length = usize::try_from(length).unwrap();
        let file = &mut state.files[self.id];
        file.live.resize(length, 0);
        file.pending.push(Change::Length(length));
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.disk.sync_file(self.id).map_err(failed_sync)?;
        let mut state = self.disk.state();
        let left = state.full_after_syncs.take();
        if left == Some(0) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        state.full_after_syncs = left.map(|left| left - 1);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut state = self.disk.state();
        let offset = usize::try_from(offset).unwrap();
        let pages = offset / PAGE..(offset + data.len()).div_ceil(PAGE);
        let file = &state.files[self.id];
        let fresh: Vec<_> = pages.filter(|page| !file.pages.contains(page)).collect();
        let Some(free) = state.free_pages.checked_sub(fresh.len() as u64) else {
            return Err(io::ErrorKind::StorageFull.into());
        };
        state.free_pages = free;
        let ticked = state.tick();
        let file = &mut state.files[self.id];
        // What is written when the power goes may be on the disk, or a part of it.
        file.pending.push(Change::Write(offset, data.to_vec()));
        ticked?;
        file.pages.extend(fresh);
        write_at(&mut file.live, offset, data);
        Ok(())
    }

    fn try_lock_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<bool, BackendError> {
        Ok(true)
    }

    fn try_lock_shared_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<bool, BackendError> {
        Ok(true)
    }

    fn lock_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<(), BackendError> {
        Ok(())
    }

    fn lock_shared_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<(), BackendError> {
        Ok(())
    }

    fn unlock_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<(), BackendError> {
        Ok(())
    }

    fn query_lock_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<bool, BackendError> {
        Ok(false)
    }
}

impl SimDisk {
    fn sync_file(&self, id: FileId) -> io::Result<()> {
        let mut state = self.state();
        state.tick()?;
        state.syncs += 1;
        let fails = state.fail_sync.take_if(|(left, _)| *left == 0).map(|(_, kind)| kind);
        if let Some((left, _)) = &mut state.fail_sync {
            *left -= 1;
        }
        let file = &mut state.files[id];
        let pending = std::mem::take(&mut file.pending);
        if let Some(kind) = fails {
            return Err(kind.into());
        }
        for change in pending {
            match change {
                Change::Length(length) => file.durable.resize(length, 0),
                Change::Write(offset, data) => write_at(&mut file.durable, offset, &data),
            }
        }
        Ok(())
    }

    fn sealed(&self, name: &str) -> io::Result<FileId> {
        let state = self.state();
        state.fail_sealed.map_or_else(|| state.file(name), |kind| Err(kind.into()))
    }

    fn backend(&self, id: FileId) -> SimFile {
        SimFile { disk: self.clone(), id }
    }
}

impl LogFile for SimFile {
    fn len(&self) -> io::Result<u64> {
        StorageBackend::len(self)
    }

    fn read(&self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        if let Some(kind) = self.disk.state().fail_reads {
            return Err(kind.into());
        }
        let mut bytes = vec![0; length];
        StorageBackend::read(self, offset, &mut bytes)?;
        Ok(bytes)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        StorageBackend::write(self, offset, data)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }
}

impl Disk for SimDisk {
    fn path(&self) -> String {
        "simulated".to_owned()
    }

    fn open(&self, name: &str, builder: &Builder) -> Result<Option<Database>, DatabaseError> {
        let Ok(id) = self.state().file(name) else {
            return Ok(None);
        };
        builder.create_with_backend(self.backend(id)).map(Some)
    }

    fn create(&self, name: &str, builder: &Builder) -> Result<Database, DatabaseError> {
        let mut state = self.state();
        state.tick()?;
        let id = state.files.len();
        state.files.push(FileState::default());
        state.rename(name, Some(id));
        drop(state);
        builder.create_with_backend(self.backend(id))
    }

    fn open_log(&self, name: &str) -> io::Result<Box<dyn LogFile>> {
        let id = self.state().file(name)?;
        Ok(Box::new(self.backend(id)))
    }

    fn create_log(&self, name: &str) -> io::Result<Box<dyn LogFile>> {
        let mut state = self.state();
        state.tick()?;
        if state.fail_logs {
            return Err(io::Error::other("too many open files"));
        }
        let id = state.files.len();
        state.files.push(FileState::default());
        state.rename(name, Some(id));
        drop(state);
        Ok(Box::new(self.backend(id)))
    }

    fn open_sealed(
        &self,
        name: &str,
        builder: &Builder,
    ) -> Result<ReadOnlyDatabase, DatabaseError> {
        let id = self.sealed(name)?;
        builder.open_read_only_with_backend(self.backend(id))
    }

    fn digest(&self, name: &str) -> io::Result<Digest> {
        let id = self.sealed(name)?;
        let state = self.state();
        let bytes = &state.files[id].live;
        Ok(Digest { length: bytes.len() as u64, hash: xxh3_64(bytes) })
    }

    fn sync(&self, name: &str) -> io::Result<()> {
        let Ok(id) = self.state().file(name) else {
            return Ok(());
        };
        self.sync_file(id)?;
        let mut state = self.state();
        let file = &mut state.files[id];
        file.live = file.durable.clone();
        Ok(())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut state = self.state();
        state.tick()?;
        let id = state.file(from)?;
        state.rename(from, None);
        state.rename(to, Some(id));
        // The sync of the directory.
        state.tick()?;
        state.durable_names = state.names.clone();
        state.pending_names.clear();
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut state = self.state();
        state.tick()?;
        if let Ok(id) = state.file(name) {
            state.free_pages += state.files[id].pages.len() as u64;
            state.rename(name, None);
        }
        Ok(())
    }

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.names())
    }

    fn space(&self) -> io::Result<Space> {
        let pages = self.state().free_pages;
        Ok(Space { free: pages * PAGE as u64, total: 1 << 32 })
    }

    fn set_ballast(&self, wanted: bool) -> io::Result<()> {
        const PAGES: u64 = 64;
        let mut state = self.state();
        match (wanted, state.ballast) {
            (true, false) => {
                let free = state.free_pages.checked_sub(PAGES);
                state.free_pages = free.ok_or(io::ErrorKind::StorageFull)?;
            }
            (false, true) => state.free_pages += PAGES,
            (true, true) | (false, false) => {}
        }
        state.ballast = wanted;
        Ok(())
    }

    fn is_clean(&self) -> bool {
        self.state().clean
    }

    fn set_clean(&self, clean: bool) -> io::Result<()> {
        let mut state = self.state();
        state.tick()?;
        state.clean = clean;
        Ok(())
    }

    fn unlock(&self) {}
}

/// It seals early.
pub(super) const OPENING: Opening = Opening {
    cache_bytes: CACHE_BYTES,
    watermark: Some(0),
    hot_bytes: 6_000,
    file_bytes: 3_000,
    log_bytes: 10 * log::BLOCK,
    log_commits: 4,
    blobs: Sizes { topic: 1_500, commit: 500, file: 14_000, trimmed: 6_000 },
    inline: true,
};

/// Opens a store that seals early.
pub(super) fn open(disk: &SimDisk, env: SharedEnv) -> Result<Redb, StorageError> {
    Redb::open_on(Arc::new(disk.clone()), env, OPENING)
}

/// Opens such a store for the conformance suite.
pub(in crate::storage) fn opener() -> impl FnMut(SharedEnv) -> Arc<dyn Storage> {
    let disk = SimDisk::new();
    move |env| Arc::new(open(&disk, env).unwrap())
}
