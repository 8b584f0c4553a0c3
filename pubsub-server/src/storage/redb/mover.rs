//! The move of the log to the tables, on a thread of its own: commits go on in the log meanwhile.

use std::io;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};

use ::redb::WriteTransaction;

use super::batch::Rows;
use super::log::Mark;
use super::rows::encode;
use super::tables::{META_LOG, Tables, Trouble, put};

/// How often a move in a simulation is asked for in vain, so that commits come meanwhile.
const INLINE_PATIENCE: u32 = 2;

#[cfg(target_os = "linux")]
const NICENESS: i32 = 10;

/// What is moved, and the transaction that is for it.
pub(super) struct Move {
    pub(super) txn: WriteTransaction,
    pub(super) rows: Rows,
    /// It goes with them: the log is empty up to here.
    pub(super) mark: Mark,
}

impl Move {
    fn make(self) -> Result<(), Trouble> {
        let mut tables = Tables::of(&self.txn);
        self.rows.write(&mut tables)?;
        put(tables.meta.open()?, META_LOG, encode(&self.mark))?;
        drop(tables);
        Ok(self.txn.commit()?)
    }
}

/// Makes one move at a time.
pub(super) struct Mover {
    busy: bool,
    by: By,
}

enum By {
    Thread(Thread),
    /// It is made when it is waited for.
    Inline(Option<Box<dyn FnOnce() -> Result<(), Trouble> + Send>>, u32),
}

struct Thread {
    /// `None` at the end.
    moves: Option<SyncSender<Box<Move>>>,
    made: Receiver<Result<(), Trouble>>,
    thread: Option<JoinHandle<()>>,
}

impl Mover {
    pub(super) fn inline() -> Self {
        Self { busy: false, by: By::Inline(None, 0) }
    }

    pub(super) fn spawn() -> io::Result<Self> {
        let (moves, asked) = sync_channel::<Box<Move>>(1);
        let (answer, made) = sync_channel(1);
        let work = move || {
            give_way();
            // It ends with whoever asks.
            while let Ok(next) = asked.recv()
                && answer.send(next.make()).is_ok()
            {}
        };
        let thread = thread::Builder::new().name("mover".to_owned()).spawn(work)?;
        let thread = Thread { moves: Some(moves), made, thread: Some(thread) };
        Ok(Self { busy: false, by: By::Thread(thread) })
    }

    /// Begins a move. The one before it has been waited for.
    pub(super) fn begin(&mut self, next: Box<Move>) {
        assert!(!self.busy, "one move at a time");
        self.busy = true;
        match &mut self.by {
            // If the thread is gone, its answer is missing.
            By::Thread(thread) => drop(thread.moves.as_ref().map(|moves| moves.send(next))),
            By::Inline(waiting, patience) => {
                *waiting = Some(Box::new(|| next.make()));
                *patience = INLINE_PATIENCE;
            }
        }
    }

    /// Makes the move that was begun. How it has ended is told later, as by a thread.
    #[cfg(test)]
    pub(super) fn make(&mut self) {
        let made = self.wait().expect("a move was begun");
        *self = Self { busy: true, by: By::Inline(Some(Box::new(|| made)), 0) };
    }

    /// Whether a move was begun, and nobody has been told how it has ended.
    pub(super) fn is_busy(&self) -> bool {
        self.busy
    }

    /// How the move has ended, if one was begun and it has.
    pub(super) fn ended(&mut self) -> Option<Result<(), Trouble>> {
        let ended = match &mut self.by {
            _ if !self.busy => None,
            By::Thread(thread) => match thread.made.try_recv() {
                Ok(made) => Some(made),
                Err(std::sync::mpsc::TryRecvError::Empty) => None,
                Err(std::sync::mpsc::TryRecvError::Disconnected) => Some(Err(gone())),
            },
            By::Inline(_, patience @ 1..) => {
                *patience -= 1;
                None
            }
            By::Inline(waiting, 0) => waiting.take().map(|make| make()),
        };
        self.busy &= ended.is_none();
        ended
    }

    /// Waits for the end of the move, if one was begun, and says how it has ended.
    pub(super) fn wait(&mut self) -> Option<Result<(), Trouble>> {
        if !std::mem::take(&mut self.busy) {
            return None;
        }
        match &mut self.by {
            By::Thread(thread) => Some(thread.made.recv().unwrap_or_else(|_| Err(gone()))),
            By::Inline(waiting, _) => waiting.take().map(|make| make()),
        }
    }
}

impl std::fmt::Debug for Mover {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mover").field("busy", &self.busy).finish_non_exhaustive()
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.moves = None;
        // If it has panicked, that was its answer.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Takes less of a processor than those who wait for a commit: there is time until the log is full.
fn give_way() {
    // Elsewhere it would be all threads of the process.
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::process::setpriority_process(None, NICENESS) {
        tracing::debug!(%error, "the mover has the priority of others");
    }
}

fn gone() -> Trouble {
    ::redb::Error::Io(io::Error::other("the move of the log panicked")).into()
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::sync::Arc;
    use std::thread;
    use std::time::Duration;

    use futures_util::FutureExt;

    use super::super::open::Opening;
    use super::super::simulation::{self, OPENING, SimDisk};
    use super::super::tests::{T, apply, checkpoint, env, floor, publish, read, simulated};
    use super::super::{Committer, Options, Redb};
    use super::*;
    use crate::record::Epoch;
    use crate::storage::testing::{
        ALL, anonymous, message, publisher, sequences, subscription, topic,
    };
    use crate::storage::{Change, Health, OpenPublisher, Storage};

    /// Does something with the mover of a simulated store.
    fn with<T>(engine: &Redb, work: impl FnOnce(&mut Mover) -> T) -> T {
        let Committer::Inline(writer) = &engine.committer else { unreachable!() };
        work(&mut writer.lock().unwrap().as_mut().unwrap().mover)
    }

    fn is_moving(engine: &Redb) -> bool {
        with(engine, |mover| mover.is_busy())
    }

    /// A store with messages of so many bytes that are being moved, and how many there are.
    fn moving_of(disk: &SimDisk, bytes: usize) -> (Redb, u64) {
        // Nothing is found in a cache of the tables.
        let opening = Opening { cache_bytes: 0, ..OPENING };
        let engine = Redb::open_on(Arc::new(disk.clone()), env(), opening).unwrap();
        apply(&engine, Change::CreateTopic(topic("t", T))).unwrap();
        for number in 1..100 {
            publish(&engine, T, vec![1; bytes]).unwrap().unwrap();
            if number > 10 && is_moving(&engine) {
                return (engine, number);
            }
        }
        panic!("nothing is moved");
    }

    fn moving(disk: &SimDisk) -> (Redb, u64) {
        moving_of(disk, 50)
    }

    #[test]
    fn what_is_being_moved_and_what_follows_is_read_and_kept() {
        let disk = SimDisk::new();
        let (engine, moved) = moving(&disk);
        let (mut beside, mut moves, mut was_moving) = (0, 1, true);
        for last in moved + 1..moved + 40 {
            publish(&engine, T, vec![1; 50]).unwrap().unwrap();
            let is_moving = is_moving(&engine);
            beside += u32::from(is_moving && was_moving);
            moves += u32::from(is_moving && !was_moving);
            was_moving = is_moving;
            let all: Vec<u64> = (1..=last).collect();
            for engine in [&engine, &simulation::open(&disk.copy(), env()).unwrap()] {
                engine.shared.recent.clear();
                assert_eq!(sequences(&read(engine, T, 1).unwrap()), all);
            }
        }
        assert!(beside > 5 && moves > 5, "{beside} commits beside {moves} moves");
    }

    #[test]
    fn positions_that_are_being_moved_are_known_and_the_latest_counts() {
        let disk = SimDisk::new();
        let engine = simulated(&disk);
        apply(&engine, Change::PutSubscription(subscription("s", 3))).unwrap();
        for position in 1..40 {
            apply(&engine, floor(position)).unwrap();
            let catalog = engine.catalog().now_or_never().unwrap().unwrap();
            assert_eq!(catalog.subscriptions[0].cursors[0].1.floor, position);
        }
    }

    #[test]
    fn a_transaction_waits_for_the_move() {
        let disk = SimDisk::new();
        let (engine, moved) = moving(&disk);
        apply(&engine, Change::Trim { topic: Epoch(T), below: moved }).unwrap();
        assert!(!is_moving(&engine));
        let engine = simulation::open(&disk.copy(), env()).unwrap();
        assert_eq!(sequences(&read(&engine, T, moved).unwrap()), [moved]);
    }

    #[test]
    fn a_move_that_fails_loses_nothing_and_is_told() {
        let disk = SimDisk::new();
        let (engine, moved) = moving(&disk);
        disk.fail_next_sync(ErrorKind::Other);
        checkpoint(&engine);
        assert!(matches!(&*engine.health().borrow(), Health::Failed(_)));
        publish(&engine, T, vec![1]).unwrap_err();
        drop(engine);
        let engine = simulation::open(&disk, env()).unwrap();
        assert_eq!(read(&engine, T, 1).unwrap().len() as u64, moved);
    }

    #[test]
    fn a_move_without_room_loses_nothing() {
        let disk = SimDisk::new();
        let (engine, moved) = moving(&disk);
        disk.set_free_pages(0);
        checkpoint(&engine);
        assert_eq!(*engine.health().borrow(), Health::DiskFull);
        engine.shared.recent.clear();
        assert_eq!(read(&engine, T, 1).unwrap().len() as u64, moved);
        disk.set_free_pages(1_000);
        thread::sleep(Duration::from_millis(1_100));
        publish(&engine, T, vec![1]).unwrap().unwrap();
        checkpoint(&engine);
        engine.shared.recent.clear();
        assert_eq!(read(&engine, T, 1).unwrap().len() as u64, moved + 1);
    }

    #[test]
    fn what_fails_after_a_move_without_room_does_not_stop_the_store() {
        let disk = SimDisk::new();
        let (engine, moved) = moving(&disk);
        disk.set_free_pages(0);
        with(&engine, Mover::make);
        // It looks into the tables, which answer nothing after the move has failed.
        let opened = (&engine as &dyn Storage).open_publisher(OpenPublisher {
            topic: Epoch(T),
            publisher: publisher(9, 1, 1),
            resolved_below: 1,
        });
        opened.now_or_never().unwrap().unwrap_err();
        assert_eq!(*engine.health().borrow(), Health::DiskFull);
        engine.shared.recent.clear();
        assert_eq!(read(&engine, T, 1).unwrap().len() as u64, moved);
    }

    #[test]
    fn a_failed_sync_of_a_move_or_beside_one_stops_the_store_also_if_the_disk_is_full() {
        for of_the_move in [true, false] {
            let disk = SimDisk::new();
            let (engine, moved) = moving_of(&disk, 600);
            if of_the_move {
                disk.fail_next_sync(ErrorKind::StorageFull);
                with(&engine, Mover::make);
                disk.set_free_pages(0);
                // There is no room for it in a blob file.
                publish(&engine, T, vec![1; 6_000]).unwrap_err();
            } else {
                disk.set_free_pages(0);
                with(&engine, Mover::make);
                disk.fail_next_sync(ErrorKind::StorageFull);
                publish(&engine, T, vec![1]).unwrap_err();
            }
            let health = engine.health().borrow().clone();
            let of_the_sync = matches!(&health, Health::Failed(why) if why.contains("sync"));
            assert!(of_the_sync, "{of_the_move}: {health:?}");
            drop(engine);
            disk.set_free_pages(10_000);
            let engine = simulation::open(&disk, env()).unwrap();
            assert_eq!(read(&engine, T, 1).unwrap().len() as u64, moved);
        }
    }

    #[test]
    fn a_thread_moves_beside_the_commits() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let open = || Redb::open(Options::new(path, env())).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let mut engine = open();
        let mut last = 0;
        for _ in 0..3 {
            last = runtime.block_on(async {
                if last == 0 {
                    let created = Change::CreateTopic(topic("t", T));
                    (&engine as &dyn Storage).done(vec![created]).await;
                }
                let (mut last, mut begun) = (last, false);
                let is_moving = || engine.shared.tail.is_moving();
                // What housekeeping moves meanwhile is not moved by the thread.
                for count in 1..=1_500 {
                    let append = anonymous(T, vec![message([1])]);
                    (&engine as &dyn Storage).decided(append).await.unwrap();
                    last += 1;
                    begun |= is_moving();
                    if begun && !is_moving() {
                        break;
                    }
                    if count > 600 {
                        thread::sleep(Duration::from_millis(5));
                    }
                }
                assert!(begun && !is_moving(), "nothing was moved");
                engine.shared.recent.clear();
                let read = engine.read(Epoch(T), 1, ALL).await.unwrap();
                assert_eq!(read.len() as u64, last);
                engine.close().await.unwrap();
                last
            });
            drop(engine);
            engine = open();
        }
    }
}
