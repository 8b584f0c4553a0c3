//! How a store is opened, and made.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;

use ::redb::{Builder, Database, ReadableDatabase, ReadableTable, TableError};
use tokio::time::Instant;

use super::blobs::{self, Sizes};
use super::disk::{Disk, HOT, LOG, TEMPORARY};
use super::log::{self, Log, Mark};
use super::rows::{decode_uuid, encode, encode_uuid};
use super::sealed;
use super::shared::{Shared, explain as explain_redb};
use super::state::{State, stored_now};
use super::tables::{
    FORMAT, META, META_CLOCK, META_FORMAT, META_LOG, Tables, Trouble, decoded, get, put,
};
use super::writer::{Writer, explain};
use crate::env::SharedEnv;
use crate::limits;
use crate::record::Uuid;
use crate::storage::StorageError;
use crate::storage::clock::{Clock, Now};

/// How a store is opened.
#[derive(Clone, Copy, Debug)]
pub(super) struct Opening {
    pub(super) cache_bytes: usize,
    pub(super) watermark: Option<u64>,
    /// The hot file may hold this many bytes of messages before some are sealed.
    pub(super) hot_bytes: u64,
    /// About this many go to a sealed file.
    pub(super) file_bytes: u64,
    /// The size of the log, if it is made.
    pub(super) log_bytes: usize,
    /// How many commits it has when they are moved to the tables.
    pub(super) log_commits: u32,
    /// What goes to blob files.
    pub(super) blobs: Sizes,
    /// Everything happens where it is called.
    pub(super) inline: bool,
}

/// An open store.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) shared: Arc<Shared>,
    pub(super) writer: Writer,
    pub(super) boot: Uuid,
    pub(super) boots: HashSet<Uuid>,
}

/// Opens the store on a disk, and makes it if there is none.
pub(super) fn open(
    disk: Arc<dyn Disk>,
    env: SharedEnv,
    opening: Opening,
) -> Result<Opened, StorageError> {
    let path = disk.path();
    let io = |error: io::Error| explain_redb(&path, ::redb::Error::Io(error));
    let names = disk.list().map_err(io)?;
    for name in names.iter().filter(|name| name.ends_with(TEMPORARY)) {
        disk.remove(name).map_err(io)?;
    }
    if !names.iter().any(|name| name == HOT) {
        let holds = |name: &String| sealed::number(name).or(blobs::number(name)).is_some();
        if names.iter().any(holds) {
            let detail = format!("there are files with messages, but no {HOT}");
            return Err(StorageError::Corrupt { path, detail });
        }
        // Whoever finds the hot file finds the log, too.
        log::create(disk.as_ref(), opening.log_bytes).map_err(io)?;
        create(disk.as_ref(), opening, &env).map_err(|trouble| explain(&path, trouble))?;
    }
    if !disk.is_clean() {
        let io = |error| explain_redb(&format!("{path}/{HOT}"), ::redb::Error::Io(error));
        disk.sync(HOT).and_then(|()| disk.sync(LOG)).map_err(io)?;
    }
    let database = open_hot(disk.as_ref(), opening)?;
    check_format(&path, &database)?;
    if !disk.list().map_err(io)?.iter().any(|name| name == LOG) {
        if !disk.is_clean() {
            let detail = "the file is missing, and it may hold messages".to_owned();
            return Err(StorageError::Corrupt { path: format!("{path}/{LOG}"), detail });
        }
        log::create(disk.as_ref(), opening.log_bytes).map_err(io)?;
    }
    disk.set_clean(false).map_err(io)?;
    if let Err(error) = disk.set_ballast(true) {
        tracing::warn!(%error, "there is no room for the ballast");
    }
    let boot = env.uuid();
    let sizes = opening.blobs;
    let (database, started) = match start(disk.as_ref(), &database, (&env, boot), sizes) {
        Err(trouble) if trouble.is_full() => {
            // The ballast is for this too: positions can be stored, and what is trimmed makes room.
            disk.set_ballast(false).map_err(io)?;
            close_full(database).map_err(|trouble| explain(&path, trouble))?;
            let database = open_hot(disk.as_ref(), opening)?;
            let started = start(disk.as_ref(), &database, (&env, boot), sizes);
            (database, started)
        }
        started => (database, started),
    };
    let (state, log, boots) = started.map_err(|trouble| explain(&path, trouble))?;
    let shared = Arc::new(Shared::new(path.clone(), database, &disk));
    state.files().for_each(|(file, digest)| shared.cabinet.register(file, digest));
    let known: HashSet<u64> = state.files().map(|(file, _)| file).collect();
    let blobs: HashSet<u64> = state.blobs().collect();
    for name in &names {
        // It was not registered, or is not used any more: the server stopped in between.
        if sealed::number(name).is_some_and(|file| !known.contains(&file))
            || blobs::number(name).is_some_and(|file| !blobs.contains(&file))
        {
            disk.remove(name).map_err(io)?;
        }
    }
    shared.blobs.reset(blobs);
    let writer = Writer::new(Arc::clone(&shared), disk, env, opening, (state, log));
    Ok(Opened { shared, writer, boot, boots })
}

/// Closes a database to which the disk was full.
///
/// That it was is no error again, but whatever else fails is: after a sync that did the file must
/// not be opened in place.
pub(super) fn close_full(database: Database) -> Result<(), Trouble> {
    match database.close().map_err(Trouble::from) {
        Err(trouble) if !trouble.is_full() && !trouble.is_previous() => Err(trouble),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Opens the hot file. All of it is read and checked, also after a clean end: redb may panic on
/// pages that it did not write, and may miss rows without a word.
pub(super) fn open_hot(disk: &dyn Disk, opening: Opening) -> Result<Database, StorageError> {
    let mut builder = Builder::new();
    builder.set_cache_size(opening.cache_bytes).set_check_integrity_on_open(true);
    let path = format!("{}/{HOT}", disk.path());
    match disk.open(HOT, &builder) {
        Ok(Some(database)) => Ok(database),
        Ok(None) => Err(StorageError::Corrupt { path, detail: "the file is missing".to_owned() }),
        Err(error) => Err(explain_redb(&path, error.into())),
    }
}

/// Makes an empty hot file. It gets its name when it is complete: a power cut leaves it whole or
/// not at all.
fn create(disk: &dyn Disk, opening: Opening, env: &SharedEnv) -> Result<(), Trouble> {
    let temporary = format!("{HOT}{TEMPORARY}");
    let mut builder = Builder::new();
    builder.set_cache_size(opening.cache_bytes);
    let database = disk.create(&temporary, &builder)?;
    let txn = database.begin_write()?;
    let mut tables = Tables::of(&txn);
    tables.make()?;
    put(tables.meta.open()?, META_FORMAT, FORMAT.to_le_bytes().to_vec())?;
    let [_, salt] = halves(env.uuid());
    put(tables.meta.open()?, META_LOG, encode(&Mark { moved: 0, salt }))?;
    drop(tables);
    txn.commit()?;
    database.close()?;
    let named = disk.sync(&temporary).and_then(|()| disk.rename(&temporary, HOT));
    named.map_err(|error| ::redb::Error::Io(error).into())
}

/// Refuses what was written by something else, before anything is written to it.
fn check_format(path: &str, database: &Database) -> Result<(), StorageError> {
    let path = format!("{path}/{HOT}");
    let found = (|| {
        let meta = match database.begin_read()?.open_table(META) {
            Ok(meta) => meta,
            Err(TableError::Storage(error)) => return Err(error.into()),
            Err(_) => return Ok(None),
        };
        let version = |row: &[u8]| row.try_into().ok().map(u32::from_le_bytes);
        get(&meta, META_FORMAT, version)
    })();
    match found.map_err(|trouble| explain(&path, trouble))? {
        Some(FORMAT) => Ok(()),
        Some(found) => Err(StorageError::Format { path, found, supported: FORMAT }),
        None => {
            let detail = "it is no store of this server".to_owned();
            Err(StorageError::Corrupt { path, detail })
        }
    }
}

/// Enters this start in the ledger and reads what the writer needs.
fn start(
    disk: &dyn Disk,
    database: &Database,
    (env, boot): (&SharedEnv, Uuid),
    sizes: Sizes,
) -> Result<(State, Log, HashSet<Uuid>), Trouble> {
    let txn = database.begin_write()?;
    let mut tables = Tables::of(&txn);
    let (ordinal, boots) = enter(&mut tables, boot)?;
    let clock = Clock::resume(Now::default(), env.now(), Instant::now());
    let (mut state, mut log) = State::load(&mut tables, disk, (ordinal, clock), sizes)?;
    let stored = stored_now(&mut tables, &state.pending)?;
    state.clock = Clock::resume(stored, env.now(), Instant::now());
    state.settle(&mut tables, log.mark())?;
    let now = state.clock.now(env.now(), Instant::now());
    store_clock(&mut tables, now)?;
    let [_, salt] = halves(env.uuid());
    log.clear(salt);
    put(tables.meta.open()?, META_LOG, encode(&log.mark()))?;
    drop(tables);
    txn.commit()?;
    Ok((state, log, boots))
}

fn halves(random: Uuid) -> [u64; 2] {
    let (halves, _) = random.0.as_chunks::<8>();
    [u64::from_le_bytes(halves[0]), u64::from_le_bytes(halves[1])]
}

fn enter(tables: &mut Tables<'_>, boot: Uuid) -> Result<(u64, HashSet<Uuid>), Trouble> {
    let mut boots = HashSet::from([boot]);
    let mut ordinals = Vec::new();
    for entry in tables.boots.open()?.iter()? {
        let (ordinal, row) = entry?;
        ordinals.push(ordinal.value());
        boots.insert(decoded::<u64, _>("boots", &ordinal.value(), row.value(), decode_uuid)?);
    }
    let ordinal = ordinals.last().map_or(1, |last| last + 1);
    put(tables.boots.open()?, ordinal, encode_uuid(boot))?;
    let surplus = (ordinals.len() + 1).saturating_sub(limits::MAX_BOOTS);
    for old in &ordinals[..surplus] {
        tables.boots.open()?.remove(old)?;
    }
    Ok((ordinal, boots))
}

/// Stores the moment, from which the next start goes on.
pub(super) fn store_clock(tables: &mut Tables<'_>, now: Now) -> Result<(), Trouble> {
    Ok(put(tables.meta.open()?, META_CLOCK, encode(&now))?)
}
