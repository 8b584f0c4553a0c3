//! The committer: one owner of all writes.

use std::collections::HashSet;
use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::Duration;

use ::redb::{Database, WriteTransaction};
use tokio::time::Instant;

use super::batch::Batch;
use super::blobs::{self, FILES_OF_A_COMMIT, Sizes};
use super::chores::Chores;
use super::disk::{Disk, HOT, LOG, Space};
use super::group::{Effects, Group, Outside};
use super::log::{KEYED_RECORD_BYTES, Log, RECORD_BYTES};
use super::mover::{Move, Mover};
use super::open::{Opening, close_full, open_hot};
use super::queue::{Queue, Request, Taken};
use super::rows::weight;
use super::sealing::Sealing;
use super::shared::Shared;
use super::state::State;
use super::tables::{Tables, Trouble};
use crate::env::SharedEnv;
use crate::failpoint;
use crate::limits;
use crate::record::Epoch;
use crate::steps::Steps;
use crate::storage::clock::{Clock, Now};
use crate::storage::{AppendOutcome, CommitError, Health, OpenOutcome, Promise, StorageError};

/// How often an idle writer looks after itself.
const IDLE: Duration = Duration::from_millis(500);
/// How often it does while something runs beside it.
const BUSY: Duration = Duration::from_millis(20);
/// How many commits may pass before one piece of housekeeping gets its turn.
const COMMITS_PER_CHORE: u32 = 8;
/// How many bytes may be stored before: a piece removes more than that, so that it keeps up.
const BYTES_PER_CHORE: u64 = 2 * 1024 * 1024;
/// After a write met a full disk it stays "full" at least this long, whatever the disk says.
const FULL_AT_LEAST: Duration = Duration::from_secs(1);

/// Commits requests in groups, and keeps the house in between.
#[derive(Debug)]
pub(super) struct Writer {
    pub(super) shared: Arc<Shared>,
    pub(super) disk: Arc<dyn Disk>,
    pub(super) env: SharedEnv,
    pub(super) opening: Opening,
    pub(super) state: State,
    pub(super) log: Log,
    pub(super) mover: Mover,
    pub(super) chores: Chores,
    pub(super) sealing: Sealing,
    /// Since when the disk is too full for publishes.
    full: Option<Instant>,
    pub(super) failed: bool,
}

/// An answer that waits for the commit.
enum Answer {
    Append(Promise<AppendOutcome>, AppendOutcome),
    Open(Promise<OpenOutcome>, OpenOutcome),
    Apply(Promise<()>, Result<(), CommitError>),
}

impl Answer {
    fn keep(self) {
        match self {
            Self::Append(promise, outcome) => promise.keep(outcome),
            Self::Open(promise, outcome) => promise.keep(outcome),
            Self::Apply(promise, Ok(())) => promise.keep(()),
            Self::Apply(promise, Err(error)) => promise.fail(error),
        }
    }
}

impl Writer {
    pub(super) fn new(
        shared: Arc<Shared>,
        disk: Arc<dyn Disk>,
        env: SharedEnv,
        opening: Opening,
        (state, log): (State, Log),
    ) -> Self {
        let chores = Chores::after_open(&state);
        let sealing = Sealing::after_open(&state);
        let (mover, full, failed) = (Mover::inline(), None, false);
        let writer =
            Self { shared, disk, env, opening, state, log, mover, chores, sealing, full, failed };
        writer.show_all();
        writer
    }

    /// Moves the log to the tables on a thread of its own from now on.
    pub(super) fn move_beside(&mut self) -> std::io::Result<()> {
        self.mover = Mover::spawn()?;
        Ok(())
    }

    /// Works until the queue is closed, then closes the store.
    pub(super) fn run(mut self, queue: &Queue) -> Result<(), StorageError> {
        let _guard = PanicGuard { shared: Arc::clone(&self.shared), queue };
        let (mut commits, mut bytes) = (0, 0);
        let mut chores_wait = true;
        loop {
            let patience = match (chores_wait, self.sealing.is_busy()) {
                (true, _) => Duration::ZERO,
                (false, true) => BUSY,
                (false, false) => IDLE,
            };
            match queue.take(patience, self.commit_bytes()) {
                Taken::Group(requests) => {
                    let stored = self.commit_from(queue, requests);
                    thread::sleep(self.pace(stored));
                    commits += 1;
                    bytes += stored;
                    if commits < COMMITS_PER_CHORE && bytes < BYTES_PER_CHORE {
                        continue;
                    }
                }
                Taken::Idle => self.checkpoint(),
                Taken::Closed => return self.finish(),
            }
            (commits, bytes) = (0, 0);
            chores_wait = self.tend();
        }
    }

    /// Commits requests, and brings the answers on their way if nothing is left in the queue.
    fn commit_from(&mut self, queue: &Queue, requests: Vec<Request>) -> u64 {
        let steps = Steps::collect();
        let stored = self.commit(requests);
        if queue.is_empty() {
            steps.take();
        }
        stored
    }

    /// Commits requests together and answers them. It returns how many bytes were stored.
    pub(super) fn commit(&mut self, requests: Vec<Request>) -> u64 {
        if self.failed {
            requests.into_iter().for_each(|request| request.fail(CommitError::Refused));
            return 0;
        }
        self.watch_space();
        let mut answers = Vec::with_capacity(requests.len());
        match self.try_commit(requests, &mut answers) {
            Ok(mut effects) => {
                self.shared.recent.keep_written(std::mem::take(&mut effects.rows));
                self.show(&effects);
                self.chores.note(&effects);
                effects.doomed.iter().for_each(|file| self.shared.forget(*file));
                self.sealing.doomed.extend(&effects.doomed);
                self.finish_blobs();
                self.sealing.hot_bytes += weight(effects.bytes, effects.outside);
                answers.into_iter().for_each(Answer::keep);
                self.state.shed();
                effects.bytes
            }
            Err(trouble) => {
                // The answers are dropped after it, which says "unknown".
                self.fail(&trouble);
                0
            }
        }
    }

    fn try_commit(
        &mut self,
        requests: Vec<Request>,
        answers: &mut Vec<Answer>,
    ) -> Result<Effects, Trouble> {
        let shared = Arc::clone(&self.shared);
        let guard = shared.database();
        let database = opened(&guard)?;
        if requests.iter().all(|request| self.state.can_log(request)) {
            let (effects, mut batch) = self.apply(database, None, requests, answers)?;
            if !batch.is_empty() {
                self.break_early(&effects, answers);
                self.write_outside(&mut batch)?;
                self.commit_log(database, batch)?;
            }
            return Ok(effects);
        }
        self.land()?;
        let txn = begin(database)?;
        let mut tables = Tables::of(&txn);
        let settled = self.state.settle(&mut tables, self.log.mark())?;
        let (effects, mut batch) = self.apply(database, Some(&mut tables), requests, answers)?;
        if batch.is_empty() && !settled {
            return Ok(effects);
        }
        self.break_early(&effects, answers);
        self.write_outside(&mut batch)?;
        batch.write(&mut tables, &mut self.state)?;
        drop(tables);
        failpoint::pass("committing");
        self.commit_hot(txn)?;
        failpoint::pass("committed");
        Ok(effects)
    }

    /// Applies requests to what is in memory, and to the tables if there are any.
    fn apply<'t>(
        &mut self,
        database: &Database,
        tables: Option<&mut Tables<'t>>,
        requests: Vec<Request>,
        answers: &mut Vec<Answer>,
    ) -> Result<(Effects, Batch), Trouble> {
        let now = (self.now(), self.full.is_some());
        let bytes: usize = requests.iter().map(Request::bytes).sum();
        let can_begin = self.state.sizes.is_large(bytes as u64) && self.shared.blobs.prepare();
        let outside = Outside { files: FILES_OF_A_COMMIT, can_begin };
        let mut group = Group::new(database, tables, &mut self.state, now, outside);
        for request in requests {
            answers.push(match request {
                Request::Append(append, promise) => Answer::Append(promise, group.append(append)?),
                Request::Open(open, promise) => Answer::Open(promise, group.open(&open)?),
                Request::Apply(changes, _, promise) => {
                    Answer::Apply(promise, group.apply(changes)?)
                }
            });
        }
        group.finish()
    }

    /// Bugs that a test has to find.
    fn break_early(&self, effects: &Effects, answers: &mut Vec<Answer>) {
        if cfg!(pubsub_break = "ack_before_commit") {
            answers.drain(..).for_each(Answer::keep);
        }
        if cfg!(pubsub_break = "notify_before_commit") {
            self.show(effects);
        }
    }

    /// Closes the blob files that grow no more.
    pub(super) fn finish_blobs(&mut self) {
        self.state.finished.drain(..).for_each(|file| self.shared.blobs.finish(file));
    }

    /// Writes what goes to blob files, before anything says that it is there.
    fn write_outside(&self, batch: &mut Batch) -> Result<(), Trouble> {
        let outside = std::mem::take(&mut batch.outside);
        Ok(self.shared.blobs.write(&outside).map_err(::redb::Error::Io)?)
    }

    /// Commits by way of the log; if there is no room in it, by moving all of it to the hot file.
    fn commit_log(&mut self, database: &Database, batch: Batch) -> Result<(), Trouble> {
        #[cfg(pubsub_break = "dedup_in_second_transaction")]
        for half in batch.halves() {
            self.append(database, half)?;
        }
        #[cfg(not(pubsub_break = "dedup_in_second_transaction"))]
        self.append(database, batch)?;
        failpoint::pass("committed");
        Ok(())
    }

    fn append(&mut self, database: &Database, batch: Batch) -> Result<(), Trouble> {
        failpoint::pass("committing");
        let state = &self.state;
        let limit = if batch.keys.is_empty() { RECORD_BYTES } else { KEYED_RECORD_BYTES };
        let appended = self.log.append(limit, |record| batch.encode(state, record));
        if appended.map_err(::redb::Error::Io)? {
            self.shared.tail.extend(&batch);
            self.state.pending.extend(batch);
            return Ok(());
        }
        self.land()?;
        let txn = begin(database)?;
        let mut tables = Tables::of(&txn);
        self.state.settle(&mut tables, self.log.mark())?;
        batch.write(&mut tables, &mut self.state)?;
        drop(tables);
        self.commit_hot(txn)
    }

    fn commit_hot(&mut self, txn: WriteTransaction) -> Result<(), Trouble> {
        self.state.close_stored();
        txn.commit()?;
        self.log.clear(self.log.salt());
        self.shared.tail.clear();
        Ok(())
    }

    /// Begins to move what is in the log to the hot file, beside the commits that follow.
    fn begin_move(&mut self) {
        if let Err(trouble) = self.try_begin_move() {
            self.fail(&trouble);
        }
    }

    fn try_begin_move(&mut self) -> Result<(), Trouble> {
        let Some(rows) = self.state.lift() else {
            return self.try_transact(|_, _| Ok(Some(()))).map(drop);
        };
        let shared = Arc::clone(&self.shared);
        let txn = begin(opened(&shared.database())?)?;
        shared.tail.lift();
        self.mover.begin(Box::new(Move { txn, rows, mark: self.log.lift() }));
        Ok(())
    }

    /// Waits for what is being moved.
    fn land(&mut self) -> Result<(), Trouble> {
        let ended = self.mover.wait();
        self.landed(ended)
    }

    fn landed(&mut self, ended: Option<Result<(), Trouble>>) -> Result<(), Trouble> {
        if let Some(moved) = ended {
            moved?;
            self.state.landed();
            self.log.landed();
            self.shared.tail.landed();
        }
        Ok(())
    }

    /// Moves what is in the log to the hot file.
    pub(super) fn checkpoint(&mut self) {
        if let Err(trouble) = self.land() {
            self.fail(&trouble);
        }
        if !self.failed && !self.state.pending.is_empty() {
            self.transact(|_, _| Ok(Some(())));
        }
    }

    /// Runs a piece of housekeeping in a transaction of its own. It is committed if `work` says
    /// that it changed something.
    pub(super) fn transact<T>(
        &mut self,
        work: impl FnOnce(&mut Tables<'_>, &mut State) -> Result<Option<T>, Trouble>,
    ) -> Option<T> {
        let result = self.try_transact(work);
        result.unwrap_or_else(|trouble| {
            self.fail(&trouble);
            None
        })
    }

    fn try_transact<T>(
        &mut self,
        work: impl FnOnce(&mut Tables<'_>, &mut State) -> Result<Option<T>, Trouble>,
    ) -> Result<Option<T>, Trouble> {
        self.land()?;
        let shared = Arc::clone(&self.shared);
        let guard = shared.database();
        let txn = begin(opened(&guard)?)?;
        let mut tables = Tables::of(&txn);
        let settled = self.state.settle(&mut tables, self.log.mark())?;
        let done = work(&mut tables, &mut self.state)?;
        drop(tables);
        if done.is_some() || settled {
            self.commit_hot(txn)?;
        } else {
            txn.abort()?;
        }
        Ok(done)
    }

    pub(super) fn now(&mut self) -> Now {
        self.state.clock.now(self.env.now(), Instant::now())
    }

    fn show(&self, effects: &Effects) {
        for topic in &effects.touched {
            self.show_topic(*topic);
        }
        for (topic, head) in &effects.deleted {
            self.shared.hide(*topic, *head);
        }
    }

    pub(super) fn show_topic(&self, epoch: Epoch) {
        let Some(topic) = self.state.topics.get(&epoch) else {
            return;
        };
        match &topic.head {
            Some(head) => self.shared.show(epoch, head, Arc::clone(&topic.segments)),
            None => self.shared.show_damaged(epoch),
        }
    }

    fn show_all(&self) {
        self.state.topics.keys().for_each(|topic| self.show_topic(*topic));
    }

    /// A write failed. What of it is on disk can only be found out by opening the file again.
    fn fail(&mut self, trouble: &Trouble) {
        tracing::error!(%trouble, "a commit failed");
        // A move beside it may have failed, too, and before it. Then redb says no more than that.
        let may_follow = trouble.is_full() || trouble.is_previous();
        let moved = if may_follow { self.mover.wait().and_then(Result::err) } else { None };
        if let Some(moved) = &moved {
            tracing::error!(trouble = %moved, "a move of the log failed");
        }
        let follows = moved.is_some() && trouble.is_previous();
        let causes = || moved.iter().chain((!follows).then_some(trouble));
        let why = if let Some(cause) = causes().find(|cause| !cause.is_full()) {
            cause.to_string()
        } else {
            self.full = Some(Instant::now());
            self.shared.set_health(Health::DiskFull);
            let Err(error) = self.reopen() else { return };
            tracing::error!(%error, "the store cannot be opened again");
            error.to_string()
        };
        // Not retried and not reopened: after a failed sync the system's cache and the disk may
        // disagree, and only a new process starts from what the disk says.
        self.failed = true;
        self.shared.set_health(Health::Failed(why));
    }

    /// Opens the file again after the disk was full: redb takes no more writes until then.
    fn reopen(&mut self) -> Result<(), StorageError> {
        if let Err(error) = self.disk.set_ballast(false) {
            tracing::warn!(%error, "the ballast cannot be given up");
        }
        let shared = Arc::clone(&self.shared);
        let mut database = shared.database.write().unwrap_or_else(PoisonError::into_inner);
        self.state.close_stored();
        let closed = database.take().map_or(Ok(()), close_full);
        closed.map_err(|trouble| self.explain(trouble))?;
        shared.recent.clear();
        let io = |error: std::io::Error| shared.error(::redb::Error::Io(error));
        self.disk.sync(HOT).and_then(|()| self.disk.sync(LOG)).map_err(io)?;
        let opened = open_hot(self.disk.as_ref(), self.opening)?;
        let (clock, boot) = (self.state.clock, self.state.boot);
        let next_blob = self.state.next_blob;
        let loaded = load(self.disk.as_ref(), &opened, (boot, clock), self.opening.blobs);
        (self.state, self.log) = loaded.map_err(|trouble| self.explain(trouble))?;
        self.state.next_blob = self.state.next_blob.max(next_blob);
        self.remove_unknown_blobs();
        self.shared.tail.replace(&self.state.pending);
        self.chores = Chores::after_open(&self.state);
        *database = Some(opened);
        drop(database);
        // The commit that failed may have registered one.
        self.state.files().for_each(|(file, digest)| self.shared.cabinet.register(file, digest));
        self.show_all();
        Ok(())
    }

    /// Removes what the commit that failed has written outside, and nobody will know of.
    fn remove_unknown_blobs(&self) {
        let known: HashSet<u64> = self.state.blobs().collect();
        for name in self.disk.list().unwrap_or_default() {
            if blobs::number(&name).is_some_and(|file| !known.contains(&file))
                || name == blobs::SPARE
            {
                // The next start tries again.
                let _ = self.disk.remove(&name);
            }
        }
        self.shared.blobs.reset(known);
    }

    /// How much is kept free for what is no publish.
    pub(super) fn watermark(&self, space: Space) -> u64 {
        self.opening.watermark.unwrap_or((space.total / 100).min(64 << 20))
    }

    pub(super) fn is_full(&self) -> bool {
        self.full.is_some()
    }

    /// Refuses publishes before the disk is full, and takes them again when there is room.
    fn watch_space(&mut self) {
        let Ok(space) = self.disk.space() else { return };
        let watermark = self.watermark(space);
        match self.full {
            None if space.free < watermark => {
                tracing::warn!(free = space.free, watermark, "the disk is too full for publishes");
                self.full = Some(Instant::now());
                self.shared.set_health(Health::DiskFull);
            }
            // Twice the watermark, so that it does not flutter.
            Some(since)
                if space.free >= watermark.saturating_mul(2)
                    && since.elapsed() >= FULL_AT_LEAST
                    && self.disk.set_ballast(true).is_ok() =>
            {
                tracing::info!(free = space.free, "the disk has room again");
                self.full = None;
                self.shared.set_health(Health::Ok);
            }
            None | Some(_) => {}
        }
    }

    /// Does one bounded piece of housekeeping, and says whether there is more.
    pub(super) fn tend(&mut self) -> bool {
        if self.failed {
            return false;
        }
        self.watch_space();
        let ended = self.mover.ended();
        if let Err(trouble) = self.landed(ended) {
            self.fail(&trouble);
        } else if self.state.pending.commits >= self.opening.log_commits && !self.mover.is_busy() {
            self.begin_move();
        }
        if self.failed {
            return false;
        }
        self.do_chore()
    }

    /// Closes the store.
    pub(super) fn finish(mut self) -> Result<(), StorageError> {
        self.stop_sealing();
        if !self.failed {
            let now = self.now();
            self.transact(|tables, _| super::open::store_clock(tables, now).map(Some));
        }
        // If all has failed, it may still run.
        drop(self.mover.wait());
        self.state.close_stored();
        let database = self.shared.database.write().unwrap_or_else(PoisonError::into_inner).take();
        self.shared.cabinet.clear();
        self.shared.blobs.reset(HashSet::new());
        // If it cannot be removed, the next start does.
        let _ = self.disk.remove(blobs::SPARE);
        let closed = database.map_or(Ok(()), Database::close);
        if !self.failed && closed.is_ok() {
            let io = |error: std::io::Error| self.shared.error(::redb::Error::Io(error));
            self.disk.set_clean(true).map_err(io)?;
        }
        self.disk.unlock();
        closed.map_err(|error| self.shared.error(error))
    }

    pub(super) fn explain(&self, trouble: Trouble) -> StorageError {
        explain(&self.shared.path, trouble)
    }
}

/// A trouble as an error of the storage.
pub(super) fn explain(path: &str, trouble: Trouble) -> StorageError {
    match trouble {
        Trouble::Damaged(damaged) => {
            StorageError::Corrupt { path: path.to_owned(), detail: damaged.to_string() }
        }
        Trouble::Redb(error) => super::shared::explain(path, error),
    }
}

fn load(
    disk: &dyn Disk,
    database: &Database,
    run: (u64, Clock),
    sizes: Sizes,
) -> Result<(State, Log), Trouble> {
    let txn = database.begin_write()?;
    let mut tables = Tables::of(&txn);
    let loaded = State::load(&mut tables, disk, run, sizes)?;
    drop(tables);
    txn.abort()?;
    Ok(loaded)
}

/// The database; there is none only after the end.
fn opened(database: &Option<Database>) -> Result<&Database, Trouble> {
    Ok(database.as_ref().ok_or(::redb::Error::DatabaseClosed)?)
}

/// A durable transaction.
fn begin(database: &Database) -> Result<WriteTransaction, Trouble> {
    #[cfg_attr(not(pubsub_break = "commit_without_sync"), expect(unused_mut, reason = "see below"))]
    let mut txn = database.begin_write()?;
    #[cfg(pubsub_break = "commit_without_sync")]
    txn.set_durability(::redb::Durability::None).expect("there are no savepoints");
    Ok(txn)
}

/// A panic of the writer is a failure like any other: nobody waits for it for ever.
struct PanicGuard<'q> {
    shared: Arc<Shared>,
    queue: &'q Queue,
}

impl Drop for PanicGuard<'_> {
    fn drop(&mut self) {
        if !thread::panicking() {
            return;
        }
        self.shared.set_health(Health::Failed("the writer panicked".to_owned()));
        self.queue.close();
        while let Taken::Group(requests) = self.queue.take(Duration::ZERO, limits::MAX_COMMIT_BYTES)
        {
            requests.into_iter().for_each(|request| request.fail(CommitError::Refused));
        }
    }
}
