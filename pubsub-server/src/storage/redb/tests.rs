//! What the engine does when something is wrong: with the disk, the files, or another server.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use std::{fs, io, thread};

use ::redb::{Database, ReadableDatabase, ReadableTable, ReadableTableMetadata};
use futures_util::FutureExt;
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use super::directory::Directory;
use super::disk::{Disk, HOT, LOG};
use super::open::Opening;
use super::queue::Request;
use super::simulation::{self, SimDisk};
use super::tables::{BLOBS, FORMAT, HEADS, KEYS, MESSAGES, META, META_FORMAT, put};
use super::{Committer, Options, Redb, blobs, log, sealed};
use crate::env::SharedEnv;
use crate::limits;
use crate::record::{CursorRecord, Epoch, IdempotencyKey, NewMessage, StoredMessage};
use crate::steps::Task;
use crate::storage::testing::{
    ALL, Random, TestEnv, anonymous, from, keyed, message, places, publisher, sequences,
    subscription, topic, topic_with_window,
};
use crate::storage::{
    Append, AppendOutcome, AppendRefusal, Change, CommitError, Health, ReadError, Storage,
    StorageError, Urgency, ticket,
};

pub(super) const T: u64 = 7;

/// Everything goes to tables.
const NO_BLOBS: blobs::Sizes = blobs::Sizes { commit: u64::MAX, ..simulation::OPENING.blobs };

pub(super) fn env() -> SharedEnv {
    TestEnv::new(1)
}

fn open(path: &Path) -> Result<Redb, StorageError> {
    Redb::open(Options { inline: true, ..Options::new(path, env()) })
}

/// A simulated store with topic `T`.
pub(super) fn simulated(disk: &SimDisk) -> Redb {
    let engine = simulation::open(disk, env()).unwrap();
    apply(&engine, Change::CreateTopic(topic("t", T))).unwrap();
    engine
}

pub(super) fn apply(engine: &Redb, change: Change) -> Result<(), CommitError> {
    let ticket = engine.apply(vec![change], Urgency::Now);
    ticket.now_or_never().unwrap().map(|committed| committed.into_inner())
}

pub(super) fn publish(
    engine: &Redb,
    topic: u64,
    body: Vec<u8>,
) -> Result<AppendOutcome, CommitError> {
    let ticket = engine.append(anonymous(topic, vec![message(body)]));
    ticket.now_or_never().unwrap().map(|committed| committed.into_inner())
}

pub(super) fn read(engine: &Redb, topic: u64, from: u64) -> Result<Vec<StoredMessage>, ReadError> {
    engine.read(Epoch(topic), from, ALL).now_or_never().unwrap()
}

fn head(engine: &Redb, topic: u64) -> u64 {
    *engine.head(Epoch(topic)).unwrap().borrow()
}

pub(super) fn floor(floor: u64) -> Change {
    let cursor = CursorRecord { floor, ..CursorRecord::default() };
    Change::PutCursor { subscription: Epoch(3), topic: Epoch(T), cursor }
}

fn close(engine: &Redb) {
    engine.close().now_or_never().unwrap().unwrap();
}

#[test]
fn a_failed_sync_stops_the_engine_and_shows_nothing() {
    // A system may find only in a sync that there is no room.
    for kind in [io::ErrorKind::Other, io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded] {
        failed_sync(kind);
    }
}

fn failed_sync(kind: io::ErrorKind) {
    let disk = SimDisk::new();
    let engine = simulated(&disk);
    publish(&engine, T, vec![1]).unwrap().unwrap();
    disk.fail_next_sync(kind);
    assert_eq!(publish(&engine, T, vec![2]).unwrap_err(), CommitError::Unknown);
    assert!(matches!(&*engine.health().borrow(), Health::Failed(_)));
    assert_eq!(head(&engine, T), 1, "a head is raised after the commit");
    assert_eq!(publish(&engine, T, vec![3]).unwrap_err(), CommitError::Refused);
    assert_eq!(apply(&engine, floor(1)).unwrap_err(), CommitError::Refused);
    drop(engine);
    // The system's cache still has what the disk does not. The next start must not believe it.
    let engine = simulation::open(&disk, env()).unwrap();
    assert_eq!(sequences(&read(&engine, T, 1).unwrap()), [1]);
    publish(&engine, T, vec![4]).unwrap().unwrap();
    let engine = simulation::open(&disk.after_cut(&mut Random(1)), env()).unwrap();
    assert_eq!(sequences(&read(&engine, T, 1).unwrap()), [1, 2]);
}

#[test]
fn what_is_durable_is_kept_also_if_its_commit_says_that_the_disk_is_full() {
    for syncs in 0.. {
        let disk = SimDisk::new();
        let engine = simulated(&disk);
        disk.fill_after_syncs(syncs);
        let mut stored = 0;
        for i in 0..40 {
            // Some go to blob files.
            let size = if i % 4 == 0 { 700 } else { 300 };
            stored += u64::from(matches!(publish(&engine, T, vec![i; size]), Ok(Ok(_))));
        }
        let filled = disk.was_filled();
        let read_all = |engine: &Redb| {
            let found = sequences(&read(engine, T, 1).unwrap());
            assert!(found.len() as u64 >= stored, "{found:?} of {stored} after {syncs} syncs");
        };
        read_all(&engine);
        // Housekeeping goes on with what is found on the disk.
        for i in 0..40 {
            let _ = apply(&engine, floor(i));
        }
        read_all(&engine);
        close(&engine);
        read_all(&simulation::open(&disk, env()).unwrap());
        if !filled {
            assert!(syncs > 40, "{syncs} syncs");
            break;
        }
    }
}

#[test]
fn a_full_disk_refuses_publishes_and_nothing_else() {
    let disk = SimDisk::new();
    let engine = simulated(&disk);
    apply(&engine, Change::PutSubscription(subscription("s", 3))).unwrap();
    disk.set_free_pages(100);
    let mut stored = 0;
    loop {
        match publish(&engine, T, vec![1; 2_000]) {
            Ok(Ok(_)) => stored += 1,
            Ok(Err(refusal)) => {
                assert_eq!(refusal, AppendRefusal::DiskFull);
                break;
            }
            Err(error) => assert_eq!(error, CommitError::Unknown),
        }
    }
    assert_eq!(*engine.health().borrow(), Health::DiskFull);
    assert!(stored > 10);
    for i in 1..20 {
        apply(&engine, floor(i)).unwrap();
    }
    assert!(read(&engine, T, 1).unwrap().len() >= stored);
    apply(&engine, Change::Trim { topic: Epoch(T), below: head(&engine, T) }).unwrap();
    drop(engine);
    disk.set_free_pages(0);
    let engine = simulation::open(&disk, env()).expect("the ballast makes room for the start");
    disk.set_free_pages(10_000);
    thread::sleep(Duration::from_millis(1100));
    publish(&engine, T, vec![2]).unwrap().unwrap();
    assert_eq!(*engine.health().borrow(), Health::Ok);
}

#[test]
fn publishes_are_refused_before_the_disk_is_full() {
    let disk = SimDisk::new();
    let opening = Opening {
        watermark: Some(1 << 20),
        hot_bytes: 1 << 20,
        file_bytes: 1 << 20,
        log_bytes: 1 << 20,
        log_commits: 512,
        ..simulation::OPENING
    };
    let engine = Redb::open_on(Arc::new(disk.clone()), env(), opening).unwrap();
    apply(&engine, Change::CreateTopic(topic("t", T))).unwrap();
    disk.set_free_pages(255);
    assert_eq!(publish(&engine, T, vec![1]), Ok(Err(AppendRefusal::DiskFull)));
    assert_eq!(*engine.health().borrow(), Health::DiskFull);
    assert_eq!(apply(&engine, Change::PutSubscription(subscription("s", 3))), Ok(()));
    let buried = Change::Store { topic: Epoch(T), message: message([1]) };
    let both = || engine.apply(vec![floor(5), buried.clone()], Urgency::Now).now_or_never();
    assert_eq!(both().unwrap().unwrap_err(), CommitError::DiskFull);
    let catalog = || engine.catalog().now_or_never().unwrap().unwrap();
    assert_eq!(catalog().subscriptions[0].cursors, [], "nothing of it is stored");
    disk.set_free_pages(1000);
    thread::sleep(Duration::from_millis(1100));
    publish(&engine, T, vec![1]).unwrap().unwrap();
    both().unwrap().unwrap().into_inner();
    assert_eq!((head(&engine, T), catalog().subscriptions[0].cursors.len()), (2, 1));
}

#[test]
fn what_is_left_of_a_ballast_that_finds_no_room_is_removed() {
    let directory = tempfile::tempdir().unwrap();
    let disk = Directory::lock(directory.path(), env().now()).unwrap();
    let ballast = directory.path().join("ballast");
    symlink("/dev/full", &ballast).unwrap();
    disk.set_ballast(true).unwrap_err();
    assert!(ballast.symlink_metadata().is_err());
    disk.set_ballast(true).unwrap();
    assert!(ballast.exists());
}

#[test]
fn a_full_disk_answers_what_is_stored() {
    let disk = SimDisk::new();
    let opening = Opening { watermark: Some(1 << 20), ..simulation::OPENING };
    let engine = Redb::open_on(Arc::new(disk.clone()), env(), opening).unwrap();
    apply(&engine, Change::CreateTopic(topic("t", T))).unwrap();
    let storage: &dyn Storage = &engine;
    let me = publisher(1, 1, 1);
    storage.opened(T, me).now_or_never().unwrap().unwrap();
    let decide = |append| storage.decided(append).now_or_never().unwrap();
    let both = || from(me, T, 1, vec![keyed(1, "a"), message("b")]);
    decide(both()).unwrap();
    disk.set_free_pages(255);
    assert_eq!(places(&decide(both()).unwrap()), [(1, 1, true), (2, 2, true)]);
    let same_key = anonymous(T, vec![keyed(1, "a")]);
    assert_eq!(places(&decide(same_key).unwrap()), [(1, 1, true)]);
    let one_more = from(me, T, 2, vec![message("b"), message("c")]);
    assert_eq!(decide(one_more.clone()), Err(AppendRefusal::DiskFull));
    disk.set_free_pages(1000);
    thread::sleep(Duration::from_millis(1100));
    assert_eq!(places(&decide(one_more).unwrap()), [(2, 2, true), (3, 3, false)]);
}

#[test]
fn room_is_given_back_by_the_commit_and_not_by_whoever_waits_for_it() {
    let directory = tempfile::tempdir().unwrap();
    let engine = Redb::open(Options::new(directory.path(), env())).unwrap();
    let room = Arc::new(());
    let append = Append { room: Some(Arc::clone(&room) as _), ..anonymous(T, vec![message("a")]) };
    let database = engine.shared.database.write().unwrap();
    drop(engine.append(append));
    assert_eq!(Arc::strong_count(&room), 2, "it waits for the committer");
    drop(database);
    drop(engine);
    assert_eq!(Arc::strong_count(&room), 1);
}

/// The numbers of the blob files.
fn blob_files(disk: &SimDisk) -> BTreeSet<u64> {
    disk.names().iter().filter_map(|name| blobs::number(name)).collect()
}

/// The numbers of the sealed files.
fn sealed_files(disk: &SimDisk) -> BTreeSet<u64> {
    disk.names().iter().filter_map(|name| sealed::number(name)).collect()
}

#[test]
fn nothing_is_sealed_without_room_for_a_file_above_what_is_kept_free() {
    let disk = SimDisk::new();
    let opening = Opening {
        watermark: Some(1 << 20),
        file_bytes: 1 << 20,
        blobs: NO_BLOBS,
        ..simulation::OPENING
    };
    let open = || Redb::open_on(Arc::new(disk.clone()), env(), opening).unwrap();
    let engine = open();
    apply(&engine, Change::CreateTopic(topic("t", T))).unwrap();
    apply(&engine, Change::PutSubscription(subscription("s", 3))).unwrap();
    disk.set_free_pages(700);
    for i in 0..20 {
        publish(&engine, T, vec![i; 1_000]).unwrap().unwrap();
    }
    disk.set_free_pages(200);
    for i in 0..20 {
        apply(&engine, floor(i)).unwrap();
    }
    assert_eq!(sealed_files(&disk), BTreeSet::new());
    close(&engine);
    disk.set_free_pages(1_000);
    publish(&open(), T, vec![1]).unwrap().unwrap();
    assert_eq!(sealed_files(&disk).len(), 1);
}

#[test]
fn the_number_of_a_sealed_file_is_not_used_again() {
    let disk = SimDisk::new();
    let engine = simulated(&disk);
    let mut used = BTreeSet::new();
    for epoch in T..T + 3 {
        for i in 0..40 {
            publish(&engine, epoch, vec![i; 300]).unwrap().unwrap();
        }
        let new = sealed_files(&disk);
        assert!(!new.is_empty() && new.is_disjoint(&used), "{new:?} after {used:?}");
        used.extend(new);
        // Whoever reads from a file that goes may have it open still.
        apply(&engine, Change::DeleteTopic(Epoch(epoch))).unwrap();
        apply(&engine, Change::CreateTopic(topic("t", epoch + 1))).unwrap();
        for i in 0..40 {
            apply(&engine, floor(i)).unwrap();
        }
        assert_eq!(sealed_files(&disk), BTreeSet::new());
    }
}

#[test]
fn the_cursors_of_each_deleted_subscription_go() {
    const LAST: u64 = 1_300;
    let engine = simulated(&SimDisk::new());
    let cursor = CursorRecord { floor: 1, ..CursorRecord::default() };
    let changes = (100..=LAST).flat_map(|epoch| {
        let subscription = subscription(&format!("s{epoch}"), epoch);
        let (topic, cursor) = (Epoch(T), cursor.clone());
        let put = Change::PutCursor { subscription: Epoch(epoch), topic, cursor };
        [Change::PutSubscription(subscription), put]
    });
    let changes = engine.apply(changes.collect(), Urgency::Now);
    changes.now_or_never().unwrap().unwrap().into_inner();
    // The first scan is half way when the second one begins, which is done before it.
    apply(&engine, Change::DeleteSubscription(Epoch(LAST))).unwrap();
    apply(&engine, Change::DeleteSubscription(Epoch(150))).unwrap();
    for i in 0..20 {
        apply(&engine, floor(i)).unwrap();
    }
    for epoch in [150, LAST] {
        apply(&engine, Change::PutSubscription(subscription("again", epoch))).unwrap();
    }
    let catalog = engine.catalog().now_or_never().unwrap().unwrap();
    let again = catalog.subscriptions.iter().filter(|each| each.record.name.as_str() == "again");
    assert_eq!(again.map(|each| each.cursors.len()).collect::<Vec<_>>(), [0, 0]);
}

/// A store with sealed files that was closed, and what it holds.
fn filled() -> (SimDisk, BTreeMap<u64, Vec<StoredMessage>>) {
    let disk = SimDisk::new();
    let engine = simulated(&disk);
    apply(&engine, Change::CreateTopic(topic("u", 8))).unwrap();
    apply(&engine, Change::PutSubscription(subscription("s", 3))).unwrap();
    apply(&engine, floor(5)).unwrap();
    let mut random = Random(9);
    for i in 0..60u8 {
        let large = if i % 5 == 0 { 500 } else { 0 };
        publish(&engine, T, vec![i; large + 100 + random.index(300)]).unwrap().unwrap();
        publish(&engine, 8, vec![i; 10 + random.index(50)]).unwrap().unwrap();
    }
    let held = [T, 8].map(|topic| (topic, read(&engine, topic, 1).unwrap())).into();
    close(&engine);
    assert!(disk.names().iter().filter(|name| sealed::number(name).is_some()).count() >= 3);
    assert!(
        blob_files(&disk).len() >= 2 && disk.names().iter().all(|name| !name.ends_with(".tmp"))
    );
    (disk, held)
}

/// Reads all that can be read, and says whether something could not.
fn agrees(engine: &Redb, held: &BTreeMap<u64, Vec<StoredMessage>>) -> bool {
    let mut complete = true;
    for (topic, messages) in held {
        let mut from = 1;
        while from <= messages.len() as u64 {
            match read(engine, *topic, from) {
                Ok(found) => {
                    assert!(!found.is_empty(), "a silent end at {from}");
                    let start = usize::try_from(from).unwrap() - 1;
                    assert_eq!(found, messages[start..start + found.len()], "wrong bytes");
                    from += found.len() as u64;
                }
                Err(ReadError::DataLoss { sequence }) => {
                    assert!(sequence >= from);
                    complete = false;
                    from = sequence + 1;
                }
                Err(error) => panic!("{error}"),
            }
        }
    }
    complete
}

#[test]
fn a_flipped_bit_is_an_error_and_never_a_wrong_byte() {
    const FLIPS: u64 = 1_500;
    let (disk, held) = filled();
    let mut random = Random(4);
    let (mut refused, mut lost, mut harmless) = (0, 0, 0);
    for flip in 0..FLIPS {
        let disk = disk.copy();
        let names = disk.names();
        let name = if flip % 2 == 0 { HOT } else { &names[random.index(names.len())] };
        disk.edit(name, |bytes| {
            let at = random.index(bytes.len());
            bytes[at] ^= 1 << random.below(8);
        });
        let outcome = catch_unwind(AssertUnwindSafe(|| match simulation::open(&disk, env()) {
            Ok(engine) => Some(agrees(&engine, &held)),
            Err(_) => None,
        }));
        match outcome {
            Ok(None) => refused += 1,
            Ok(Some(false)) => lost += 1,
            Ok(Some(true)) => harmless += 1,
            Err(_) => panic!("flip {flip} in {name}"),
        }
    }
    println!("{FLIPS} flips: {refused} refused, {lost} with lost messages, {harmless} harmless");
    assert!(refused > 0 && lost > 0 && harmless > 0);
}

#[test]
fn a_damaged_sealed_file_costs_its_messages_only() {
    let (disk, held) = filled();
    let names = disk.names();
    let name = names.iter().find(|name| sealed::number(name).is_some()).unwrap();
    disk.edit(name, |bytes| bytes[5000] ^= 1);
    let engine = simulation::open(&disk, env()).unwrap();
    assert!(!agrees(&engine, &held));
    publish(&engine, T, vec![1]).unwrap().unwrap();
    let last = held[&T].len() as u64 + 1;
    assert_eq!(sequences(&read(&engine, T, last).unwrap()), [last]);
}

#[test]
fn a_sealed_file_that_cannot_be_read_for_now_is_not_lost() {
    let (disk, held) = filled();
    let engine = simulation::open(&disk, env()).unwrap();
    for kind in [io::ErrorKind::Other, io::ErrorKind::OutOfMemory] {
        disk.fail_sealed(Some(kind));
        let error = read(&engine, T, 1).unwrap_err();
        assert!(matches!(error, ReadError::Storage(StorageError::Io { .. })), "{error:?}");
    }
    disk.fail_sealed(None);
    assert!(agrees(&engine, &held));
    disk.fail_sealed(Some(io::ErrorKind::NotFound));
    let engine = simulation::open(&disk, env()).unwrap();
    assert_eq!(read(&engine, T, 1), Err(ReadError::DataLoss { sequence: 1 }));
}

#[test]
fn a_damaged_head_stops_its_topic_only() {
    let (disk, held) = filled();
    {
        let database =
            disk.open(HOT, &::redb::Builder::new()).unwrap().expect("the store has a hot file");
        let txn = database.begin_write().unwrap();
        let mut heads = txn.open_table(HEADS).unwrap();
        let mut row = heads.get(T).unwrap().unwrap().value().to_vec();
        row[0] ^= 1;
        heads.insert(T, row.as_slice()).unwrap();
        drop(heads);
        txn.commit().unwrap();
        database.close().unwrap();
    }
    let engine = simulation::open(&disk, env()).unwrap();
    assert_eq!(read(&engine, T, 1), Err(ReadError::DataLoss { sequence: 1 }));
    assert_eq!(publish(&engine, T, vec![1]), Ok(Err(AppendRefusal::Damaged)));
    assert_eq!(read(&engine, 8, 1).unwrap(), held[&8]);
    publish(&engine, 8, vec![1]).unwrap().unwrap();
    apply(&engine, Change::DeleteTopic(Epoch(T))).unwrap();
    assert_eq!(read(&engine, T, 1), Err(ReadError::NoTopic));
}

#[test]
fn sealed_files_go_when_they_are_trimmed_or_their_topic_is_deleted() {
    let (disk, held) = filled();
    let sealed =
        |disk: &SimDisk| disk.names().iter().filter(|name| sealed::number(name).is_some()).count();
    let engine = simulation::open(&disk, env()).unwrap();
    let last = held[&T].len() as u64;
    let before = sealed(&disk);
    apply(&engine, Change::Trim { topic: Epoch(T), below: last }).unwrap();
    apply(&engine, Change::DeleteTopic(Epoch(8))).unwrap();
    for i in 0..20 {
        apply(&engine, floor(i)).unwrap();
    }
    assert!(before >= 3);
    assert_eq!(sealed(&disk), 0);
    assert_eq!(sequences(&read(&engine, T, last).unwrap()), [last]);
    let stats = engine.stats(Epoch(T)).unwrap();
    assert_eq!(stats.bytes, held[&T].last().unwrap().body.len() as u64);
}

/// A message that goes to a blob file of `T` once there is enough before it.
fn publish_large(engine: &Redb, number: u8) {
    publish(engine, T, vec![number; 600]).unwrap().unwrap();
}

#[test]
fn what_is_in_a_blob_file_is_found_in_memory_on_disk_and_after_a_kill() {
    let disk = SimDisk::new();
    let mut engine = simulated(&disk);
    let mut held = BTreeMap::from([(T, Vec::new())]);
    for number in 0..40 {
        if number % 3 == 0 {
            publish(&engine, T, vec![number; 450]).unwrap().unwrap();
        } else {
            publish_large(&engine, number);
        }
        held.get_mut(&T).unwrap().extend(read(&engine, T, u64::from(number) + 1).unwrap());
        engine.shared.recent.clear();
        assert!(agrees(&engine, &held));
        let one = read(&engine, T, u64::from(number) + 1).unwrap();
        assert_eq!(one[..], held[&T][usize::from(number)..]);
        if number % 7 == 0 {
            // Before what the log holds is moved, or after.
            engine = simulation::open(&disk.copy(), env()).unwrap();
            assert!(agrees(&engine, &held));
            engine = simulation::open(&disk, env()).unwrap();
        }
    }
    assert!(blob_files(&disk).len() > 3 && !sealed_files(&disk).is_empty(), "{:?}", disk.names());
    assert_eq!(engine.shared.blobs.growing(), 1);
    let stored: u64 = held[&T].iter().map(|message| message.body.len() as u64).sum();
    assert_eq!(engine.stats(Epoch(T)).unwrap().bytes, stored);
}

#[test]
fn blob_files_go_when_they_are_trimmed_or_their_topic_is_deleted() {
    let disk = SimDisk::new();
    let engine = simulated(&disk);
    let mut used = BTreeSet::new();
    for epoch in T..T + 3 {
        for number in 0..20 {
            publish(&engine, epoch, vec![number; 600]).unwrap().unwrap();
        }
        let new = blob_files(&disk);
        assert!(new.len() >= 3 && new.is_disjoint(&used), "{new:?} after {used:?}");
        used.extend(&new);
        apply(&engine, Change::Trim { topic: Epoch(epoch), below: 15 }).unwrap();
        (0..9).for_each(|number| apply(&engine, floor(number)).unwrap());
        let left = blob_files(&disk);
        assert_eq!(left, new.into_iter().skip(2).collect());
        assert_eq!(sequences(&read(&engine, epoch, 15).unwrap()), [15, 16, 17, 18, 19, 20]);
        apply(&engine, Change::DeleteTopic(Epoch(epoch))).unwrap();
        apply(&engine, Change::CreateTopic(topic("t", epoch + 1))).unwrap();
        (0..9).for_each(|number| apply(&engine, floor(number)).unwrap());
        assert_eq!(blob_files(&disk), BTreeSet::new());
    }
    close(&engine);
    let database = disk.open(HOT, &::redb::Builder::new()).unwrap().unwrap();
    let rows = database.begin_read().unwrap().open_table(BLOBS).unwrap();
    assert!(rows.is_empty().unwrap());
}

#[tokio::test(start_paused = true)]
async fn a_blob_file_stays_while_it_is_small_and_grows() {
    let disk = SimDisk::new();
    let engine = simulated(&disk);
    let trimmed = |count: u8, below: u64| {
        (0..count).for_each(|number| publish_large(&engine, number));
        apply(&engine, Change::Trim { topic: Epoch(T), below }).unwrap();
        (0..9).for_each(|number| apply(&engine, floor(number)).unwrap());
        blob_files(&disk)
    };
    // The first two are below the size of a topic that has any, the others below that of a file.
    assert_eq!(trimmed(4, 5), BTreeSet::from([1]));
    // Soon it is large enough to be replaced by another one.
    assert_eq!(trimmed(2, 7), BTreeSet::new());
    assert_eq!(trimmed(4, 11), BTreeSet::from([2]));
    for expected in [BTreeSet::from([2]), BTreeSet::new()] {
        tokio::time::advance(Duration::from_secs(11)).await;
        assert_eq!(trimmed(0, 11), expected);
    }
    publish_large(&engine, 6);
    assert_eq!(sequences(&read(&engine, T, 11).unwrap()), [11]);
    // One that has rested and grows again is as before.
    assert_eq!(trimmed(2, 11), BTreeSet::from([3]));
    for _ in 0..2 {
        tokio::time::advance(Duration::from_secs(11)).await;
        assert_eq!(trimmed(0, 11), BTreeSet::from([3]));
    }
    assert_eq!(trimmed(1, 15), BTreeSet::from([3]));
}

#[test]
fn what_is_in_blob_files_needs_no_sealing() {
    let disk = SimDisk::new();
    let mut engine = simulated(&disk);
    for number in 0..40 {
        publish_large(&engine, number);
        if number % 5 == 0 {
            // What is moved from the log counts as before.
            let restarted = simulation::open(&disk.copy(), env()).unwrap();
            assert_eq!(hot_bytes(&restarted), hot_bytes(&engine));
            drop((restarted, engine));
            engine = simulation::open(&disk, env()).unwrap();
        }
    }
    assert!(hot_bytes(&engine) < 2_000, "{}", hot_bytes(&engine));
    assert_eq!(sealed_files(&disk), BTreeSet::new());
}

#[test]
fn rows_share_pages_also_if_the_next_topic_begins_with_a_large_one() {
    let disk = SimDisk::new();
    let opening = Opening { hot_bytes: 1 << 20, blobs: NO_BLOBS, ..simulation::OPENING };
    let engine = Redb::open_on(Arc::new(disk.clone()), env(), opening).unwrap();
    apply(&engine, Change::CreateTopic(topic("t", T))).unwrap();
    apply(&engine, Change::CreateTopic(topic("u", T + 1))).unwrap();
    publish(&engine, T + 1, vec![1; 6_000]).unwrap().unwrap();
    checkpoint(&engine);
    // One at a time, and many in one transaction.
    for _ in 0..100 {
        publish(&engine, T, vec![2; 60]).unwrap().unwrap();
        checkpoint(&engine);
    }
    for _ in 0..200 {
        publish(&engine, T, vec![3; 60]).unwrap().unwrap();
    }
    drop(engine);
    let database = disk.open(HOT, &::redb::Builder::new()).unwrap().unwrap();
    let messages = database.begin_read().unwrap().open_table(MESSAGES).unwrap();
    assert!(messages.len().unwrap() > 250);
    let stats = messages.stats().unwrap();
    assert!(stats.leaf_pages() < 40, "{stats:?}");
}

/// Moves what is in the log to the hot file.
pub(super) fn checkpoint(engine: &Redb) {
    let Committer::Inline(writer) = &engine.committer else { unreachable!() };
    writer.lock().unwrap().as_mut().unwrap().checkpoint();
}

/// What the messages of `T` take up in the hot file.
fn hot_bytes(engine: &Redb) -> u64 {
    let Committer::Inline(writer) = &engine.committer else { unreachable!() };
    let writer = writer.lock().unwrap();
    writer.as_ref().unwrap().state.topics[&Epoch(T)].hot_bytes()
}

#[test]
fn a_blob_file_of_a_commit_that_has_failed_goes_and_its_number_is_not_used_again() {
    let disk = SimDisk::new();
    let engine = simulated(&disk);
    (0..2).for_each(|number| publish_large(&engine, number));
    disk.set_free_pages(0);
    assert_eq!(publish(&engine, T, vec![3; 600]).unwrap_err(), CommitError::Unknown);
    assert_eq!(blob_files(&disk), BTreeSet::new());
    disk.set_free_pages(1_000);
    thread::sleep(Duration::from_millis(1_100));
    publish_large(&engine, 4);
    assert_eq!(blob_files(&disk), BTreeSet::from([2]));
    assert_eq!(sequences(&read(&engine, T, 1).unwrap()), [1, 2, 3]);
}

#[test]
fn a_sync_that_fails_while_a_full_disk_is_dealt_with_stops_the_engine() {
    let filled = || {
        let disk = SimDisk::new();
        let engine = simulated(&disk);
        (0..2).for_each(|number| publish_large(&engine, number));
        disk.set_free_pages(0);
        (disk, engine)
    };
    // When the tables are closed, of their file, and of the log.
    for before in 0..3 {
        let (disk, engine) = filled();
        disk.fail_sync_after(before, io::ErrorKind::Other);
        assert_eq!(publish(&engine, T, vec![3; 600]).unwrap_err(), CommitError::Unknown);
        let health = engine.health().borrow().clone();
        assert!(matches!(&health, Health::Failed(why) if why.contains("sync")), "{health:?}");
        drop(engine);
        disk.set_free_pages(1_000);
        let engine = simulation::open(&disk, env()).unwrap();
        assert_eq!(sequences(&read(&engine, T, 1).unwrap()), [1, 2]);
    }
    // That there is no room for what closing writes is nothing new.
    let (disk, engine) = filled();
    disk.fill_after_syncs(0);
    assert_eq!(publish(&engine, T, vec![3; 600]).unwrap_err(), CommitError::Unknown);
    assert!(disk.was_filled());
    assert_eq!(*engine.health().borrow(), Health::DiskFull);
}

#[test]
fn a_blob_file_that_is_damaged_or_missing_costs_its_messages_only() {
    let (disk, held) = filled();
    let file = *blob_files(&disk).first().unwrap();
    disk.edit(&blobs::name(file), |bytes| bytes[100] ^= 1);
    let engine = simulation::open(&disk, env()).unwrap();
    assert!(!agrees(&engine, &held));
    disk.edit(&blobs::name(file), |bytes| bytes[100] ^= 1);
    let engine = simulation::open(&disk, env()).unwrap();
    assert!(agrees(&engine, &held));
    disk.remove(&blobs::name(file)).unwrap();
    let engine = simulation::open(&disk, env()).unwrap();
    assert!(!agrees(&engine, &held));
    publish_large(&engine, 1);
    let last = held[&T].len() as u64 + 1;
    assert_eq!(sequences(&read(&engine, T, last).unwrap()), [last]);
}

#[test]
fn what_only_the_log_points_to_is_verified_too() {
    let disk = SimDisk::new();
    let engine = simulated(&disk);
    (0..4).for_each(|number| publish_large(&engine, number));
    engine.shared.recent.clear();
    let name = blobs::name(1);
    disk.edit(&name, |bytes| bytes[4_200] ^= 1);
    assert_eq!(sequences(&read(&engine, T, 3).unwrap()), [3]);
    assert_eq!(read(&engine, T, 4), Err(ReadError::DataLoss { sequence: 4 }));
    disk.edit(&name, |bytes| bytes[4_200] ^= 1);
    assert_eq!(sequences(&read(&engine, T, 4).unwrap()), [4]);
    // It may pass: nothing is lost.
    engine.shared.recent.clear();
    disk.fail_reads(Some(io::ErrorKind::Other));
    let error = read(&engine, T, 4).unwrap_err();
    assert!(matches!(error, ReadError::Storage(StorageError::Io { .. })), "{error:?}");
    disk.fail_reads(None);
    assert_eq!(sequences(&read(&engine, T, 4).unwrap()), [4]);
    assert_eq!(engine.shared.tail.first(Epoch(T)), Some(1), "nothing was moved to the tables");
}

#[test]
fn messages_go_to_the_tables_if_no_file_can_be_made() {
    let disk = SimDisk::new();
    let engine = simulated(&disk);
    disk.fail_logs(true);
    (0..6).for_each(|number| publish_large(&engine, number));
    assert_eq!(blob_files(&disk), BTreeSet::new());
    disk.fail_logs(false);
    (6..9).for_each(|number| publish_large(&engine, number));
    assert_eq!(blob_files(&disk).len(), 1);
    assert_eq!(read(&engine, T, 1).unwrap().len(), 9);
}

#[test]
fn a_commit_writes_to_few_blob_files() {
    let disk = SimDisk::new();
    let engine = simulated(&disk);
    for epoch in 20..30 {
        apply(&engine, Change::CreateTopic(topic(&format!("t{epoch}"), epoch))).unwrap();
        (0..3).for_each(|number| drop(publish(&engine, epoch, vec![number; 600]).unwrap()));
    }
    let Committer::Inline(writer) = &engine.committer else { unreachable!() };
    let before = disk.syncs();
    let requests = (20..30).map(|epoch| {
        let append = anonymous(epoch, vec![message(vec![1; 600])]);
        Request::Append(append, ticket().0)
    });
    writer.lock().unwrap().as_mut().unwrap().commit(requests.collect());
    assert!(disk.syncs() - before <= 5, "{} syncs", disk.syncs() - before);
    (20..30).for_each(|epoch| assert_eq!(read(&engine, epoch, 1).unwrap().len(), 4));
}

#[test]
fn a_segment_has_no_more_than_a_few_files_of_what_is_outside() {
    let disk = SimDisk::new();
    let engine = simulated(&disk);
    // Little of it is in the table.
    (0..60).for_each(|number| publish_large(&engine, number));
    assert_eq!((engine.shared.blobs.growing(), blob_files(&disk).len()), (1, 12));
    (0..20).for_each(|number| drop(publish(&engine, T, vec![number; 400]).unwrap()));
    let Committer::Inline(writer) = &engine.committer else { unreachable!() };
    let writer = writer.lock().unwrap();
    let topics = &writer.as_ref().unwrap().state.topics;
    let most = 4 * simulation::OPENING.file_bytes + 1_000;
    let segments = topics.values().flat_map(|topic| topic.segments.iter());
    assert!(segments.clone().any(|segment| segment.outside > 0));
    assert!(segments.clone().all(|segment| segment.bytes <= most), "{:?}", topics[&Epoch(T)]);
}

/// Publishes of `publisher(1, 1, 1)` to `T` with a key each, numbered from 1.
fn publish_keyed(engine: &Redb, number: u8) -> Vec<(u64, u64, bool)> {
    let storage: &dyn Storage = engine;
    let append = from(publisher(1, 1, 1), T, u64::from(number), vec![keyed(number, [number; 50])]);
    places(&storage.decided(append).now_or_never().unwrap().unwrap())
}

/// All that `publish_keyed` has stored is there, and is known by both of its identities.
fn knows(engine: &Redb, numbers: std::ops::RangeInclusive<u8>) {
    let storage: &dyn Storage = engine;
    let last = *numbers.end();
    let decided = storage.opened(T, publisher(1, 1, 2)).now_or_never().unwrap().unwrap();
    assert_eq!(decided, Some(u64::from(last)), "a publisher is forgotten");
    for number in numbers {
        let again = anonymous(T, vec![keyed(number, [number; 50])]);
        let found = storage.decided(again).now_or_never().unwrap().unwrap();
        assert_eq!(places(&found), [(1, u64::from(number), true)], "a key is forgotten");
    }
    assert_eq!(head(engine, T), u64::from(last));
}

#[test]
fn what_is_only_in_the_log_is_found_after_a_kill() {
    for commits in 1..25 {
        let disk = SimDisk::new();
        let clock = TestEnv::new(1);
        let engine = simulation::open(&disk, Arc::clone(&clock) as SharedEnv).unwrap();
        apply(&engine, Change::CreateTopic(topic("t", T))).unwrap();
        apply(&engine, Change::PutSubscription(subscription("s", 3))).unwrap();
        (&engine as &dyn Storage).opened(T, publisher(1, 1, 1)).now_or_never().unwrap().unwrap();
        clock.set(9_000_000);
        for number in 1..=commits {
            assert_eq!(publish_keyed(&engine, number), [(number.into(), number.into(), false)]);
            apply(&engine, floor(number.into())).unwrap();
        }
        let messages = read(&engine, T, 1).unwrap();
        let engine = simulation::open(&disk.copy(), env()).unwrap();
        assert_eq!(read(&engine, T, 1).unwrap(), messages);
        knows(&engine, 1..=commits);
        let catalog = engine.catalog().now_or_never().unwrap().unwrap();
        assert_eq!(catalog.subscriptions[0].cursors[0].1.floor, u64::from(commits));
        publish(&engine, T, vec![1]).unwrap().unwrap();
        let next = read(&engine, T, u64::from(commits) + 1).unwrap();
        assert_eq!(next[0].published_at, messages[0].published_at, "the clock went back");
    }
}

/// The count of keys that the writer knows, and of chunks in their table.
fn keys(engine: &Redb) -> (u64, u64) {
    let Committer::Inline(writer) = &engine.committer else { unreachable!() };
    let writer = writer.lock().unwrap();
    let database = engine.shared.database();
    let table = database.as_ref().unwrap().begin_read().unwrap().open_table(KEYS).unwrap();
    (writer.as_ref().unwrap().state.keys.len(), table.len().unwrap())
}

/// A message with a key.
fn numbered(number: u64) -> NewMessage {
    let mut key = [3; 16];
    key[..8].copy_from_slice(&number.to_be_bytes());
    NewMessage { key: Some(IdempotencyKey { key, content: [4; 32] }), ..message("a") }
}

/// Publishes messages with a key each, and answers where they are.
fn publish_numbered(
    engine: &Redb,
    topic: u64,
    numbers: impl IntoIterator<Item = u64>,
) -> Result<Vec<(u64, bool)>, AppendRefusal> {
    let append = anonymous(topic, numbers.into_iter().map(numbered).collect());
    let outcome = (engine as &dyn Storage).decided(append).now_or_never().unwrap();
    Ok(places(&outcome?).into_iter().map(|(_, sequence, known)| (sequence, known)).collect())
}

/// Moves what is in the log to the tables, and does what there is to be done.
fn move_log(engine: &Redb) {
    for _ in 0..10 {
        apply(engine, Change::Trim { topic: Epoch(T), below: 1 }).unwrap();
    }
}

#[test]
fn every_key_is_found_in_the_log_in_the_tables_and_after_a_kill() {
    let disk = SimDisk::new();
    let mut engine = simulated(&disk);
    apply(&engine, Change::CreateTopic(topic("u", 8))).unwrap();
    let mut end = 0;
    for count in [1, 2, 3, 300, 1, 113, 112, 2_000, 1] {
        for topic in [T, 8] {
            let expected = (end..end + count).map(|number| (number + 1, false));
            let stored = publish_numbered(&engine, topic, end..end + count).unwrap();
            assert!(stored.into_iter().eq(expected));
        }
        end += count;
        for moved in [false, true] {
            if moved {
                move_log(&engine);
            }
            let killed = simulation::open(&disk.copy(), env()).unwrap();
            for engine in [&engine, &killed] {
                assert_eq!(keys(engine).0, 2 * end);
                for topic in [T, 8] {
                    let expected = (0..end).map(|number| (number + 1, true));
                    assert!(
                        publish_numbered(engine, topic, 0..end).unwrap().into_iter().eq(expected)
                    );
                }
            }
        }
        if end % 2 == 0 {
            drop(engine);
            engine = simulation::open(&disk, env()).unwrap();
        }
    }
}

#[test]
fn a_key_in_the_log_is_known_to_a_commit_that_goes_to_the_tables() {
    let engine = simulated(&SimDisk::new());
    assert_eq!(publish_keyed_alone(&engine), [(1, 1, false)]);
    let Committer::Inline(writer) = &engine.committer else { unreachable!() };
    let (promise, answer) = ticket();
    let trim = vec![Change::Trim { topic: Epoch(T), below: 1 }];
    let again = anonymous(T, vec![keyed(1, "a"), keyed(2, "a"), keyed(2, "a")]);
    let requests =
        vec![Request::Apply(trim, Urgency::Now, ticket().0), Request::Append(again, promise)];
    writer.lock().unwrap().as_mut().unwrap().commit(requests);
    let answer = answer.now_or_never().unwrap().unwrap().into_inner().unwrap();
    assert_eq!(places(&answer), [(1, 1, true), (2, 2, false), (3, 2, true)]);
    assert_eq!(publish_keyed_alone(&engine), [(1, 1, true)]);
}

#[test]
fn a_key_in_the_log_is_known_after_the_file_was_opened_again() {
    let disk = SimDisk::new();
    let engine = simulated(&disk);
    (0..2).for_each(|number| publish_large(&engine, number));
    publish_numbered(&engine, T, 0..2).unwrap();
    disk.set_free_pages(0);
    // No housekeeping comes in between.
    let Committer::Inline(writer) = &engine.committer else { unreachable!() };
    let commit = |message: NewMessage| {
        let (promise, answer) = ticket();
        let request = Request::Append(anonymous(T, vec![message]), promise);
        writer.lock().unwrap().as_mut().unwrap().commit(vec![request]);
        answer.now_or_never().unwrap().map(|committed| places(&committed.into_inner().unwrap()))
    };
    assert_eq!(commit(message(vec![3; 600])).unwrap_err(), CommitError::Unknown);
    assert_eq!(keys(&engine), (2, 0), "it is in the log still");
    assert_eq!(commit(numbered(1)).unwrap(), [(1, 4, true)]);
}

fn publish_keyed_alone(engine: &Redb) -> Vec<(u64, u64, bool)> {
    let append = anonymous(T, vec![keyed(1, "a")]);
    places(&(engine as &dyn Storage).decided(append).now_or_never().unwrap().unwrap())
}

#[tokio::test(start_paused = true)]
async fn keys_make_room_when_they_expire_but_for_those_used_again() {
    let disk = SimDisk::new();
    let engine = simulated(&disk);
    let window = Duration::from_secs(10);
    apply(&engine, Change::CreateTopic(topic_with_window("w", 8, window))).unwrap();
    publish_numbered(&engine, 8, 0..300).unwrap();
    publish_numbered(&engine, T, 0..5).unwrap();
    move_log(&engine);
    assert_eq!(keys(&engine), (305, 4));
    tokio::time::advance(Duration::from_secs(11)).await;
    // The chunks of the old ones go in the transaction that makes one of these.
    let stored = publish_numbered(&engine, 8, [7, 400, 299]).unwrap();
    assert_eq!(stored, [(301, false), (302, false), (303, false)]);
    move_log(&engine);
    assert_eq!(keys(&engine), (8, 2));
    for engine in [&engine, &simulation::open(&disk.copy(), env()).unwrap()] {
        let found = publish_numbered(engine, 8, [299, 7, 8, 400]).unwrap();
        assert_eq!(found, [(303, true), (301, true), (304, false), (302, true)]);
    }
    tokio::time::advance(Duration::from_secs(11)).await;
    move_log(&engine);
    assert_eq!(keys(&engine), (5, 1));
    assert_eq!(publish_numbered(&engine, T, [4]).unwrap(), [(5, true)]);
}

#[test]
fn the_keys_of_a_deleted_topic_make_room() {
    let disk = SimDisk::new();
    let engine = simulated(&disk);
    apply(&engine, Change::CreateTopic(topic("u", 8))).unwrap();
    for topic in [T, 8] {
        publish_numbered(&engine, topic, 0..500).unwrap();
    }
    apply(&engine, Change::DeleteTopic(Epoch(T))).unwrap();
    // Some are left when the server is killed.
    let killed = simulation::open(&disk.copy(), env()).unwrap();
    for engine in [&engine, &killed] {
        move_log(engine);
        assert_eq!(keys(engine), (500, 5));
        assert_eq!(publish_numbered(engine, 8, [499, 500]).unwrap(), [(500, true), (501, false)]);
    }
}

#[test]
fn a_damaged_chunk_of_keys_stops_new_keys_of_its_topic_only() {
    let disk = SimDisk::new();
    let engine = simulated(&disk);
    apply(&engine, Change::CreateTopic(topic("u", 8))).unwrap();
    for topic in [T, 8] {
        publish_numbered(&engine, topic, 0..10).unwrap();
        move_log(&engine);
        publish_numbered(&engine, topic, 10..20).unwrap();
    }
    close(&engine);
    {
        let database = disk.open(HOT, &::redb::Builder::new()).unwrap().unwrap();
        let txn = database.begin_write().unwrap();
        let mut keys = txn.open_table(KEYS).unwrap();
        let chunk = keys.range((T, 0)..(8, 0)).unwrap().next_back().unwrap().unwrap().0.value();
        let mut row = keys.get(chunk).unwrap().unwrap().value().to_vec();
        row[100] ^= 1;
        keys.insert(chunk, row.as_slice()).unwrap();
        drop(keys);
        txn.commit().unwrap();
        database.close().unwrap();
    }
    let engine = simulation::open(&disk, env()).unwrap();
    move_log(&engine);
    for number in [13, 20] {
        assert_eq!(publish_numbered(&engine, T, [number]), Err(AppendRefusal::Damaged));
    }
    assert_eq!(publish_numbered(&engine, T, [0, 9]).unwrap(), [(1, true), (10, true)]);
    publish(&engine, T, vec![1]).unwrap().unwrap();
    let others = publish_numbered(&engine, 8, [3, 19, 20]).unwrap();
    assert_eq!(others, [(4, true), (20, true), (21, false)]);
    assert_eq!(head(&engine, T), 21);
    apply(&engine, Change::DeleteTopic(Epoch(T))).unwrap();
    move_log(&engine);
    assert_eq!(keys(&engine).0, 21);
}

#[test]
fn a_damaged_log_is_refused_unless_it_is_its_last_record() {
    let disk = SimDisk::new();
    let engine = simulated(&disk);
    (&engine as &dyn Storage).opened(T, publisher(1, 1, 1)).now_or_never().unwrap().unwrap();
    // The last ones are in the log, after some that were moved.
    (1..=17).for_each(|number| drop(publish_keyed(&engine, number)));
    let (mut refused, mut short, mut whole) = (0, 0, 0);
    for at in (0..10 * log::BLOCK).step_by(97) {
        let disk = disk.copy();
        disk.edit(LOG, |bytes| bytes[at] ^= 4);
        match simulation::open(&disk, env()) {
            Err(error) => {
                assert!(matches!(error, StorageError::Corrupt { .. }), "{error}");
                refused += 1;
            }
            // One that is torn looks the same.
            Ok(engine) if head(&engine, T) == 16 => {
                knows(&engine, 1..=16);
                short += 1;
            }
            Ok(engine) => {
                knows(&engine, 1..=17);
                whole += 1;
            }
        }
    }
    assert!(refused > 0 && short > 0 && whole > 0, "{refused} {short} {whole}");
}

#[test]
fn a_log_that_is_missing_is_missed_unless_the_store_was_closed() {
    let disk = SimDisk::new();
    let engine = simulated(&disk);
    publish(&engine, T, vec![1]).unwrap().unwrap();
    let killed = disk.copy();
    killed.remove(LOG).unwrap();
    let error = simulation::open(&killed, env()).unwrap_err();
    assert!(matches!(error, StorageError::Corrupt { .. }), "{error}");
    close(&engine);
    disk.remove(LOG).unwrap();
    let engine = simulation::open(&disk, env()).unwrap();
    publish(&engine, T, vec![2]).unwrap().unwrap();
    let engine = simulation::open(&disk.copy(), env()).unwrap();
    assert_eq!(sequences(&read(&engine, T, 1).unwrap()), [1, 2]);
}

#[test]
fn identities_outlive_their_messages_in_the_log_and_out_of_it() {
    for commits in [60, 61, 62, 63, 64] {
        let disk = SimDisk::new();
        let engine = simulated(&disk);
        (&engine as &dyn Storage).opened(T, publisher(1, 1, 1)).now_or_never().unwrap().unwrap();
        for number in 1..=commits {
            publish_keyed(&engine, number);
            if number % 7 == 0 {
                let below = u64::from(number) / 2;
                apply(&engine, Change::Trim { topic: Epoch(T), below }).unwrap();
            }
        }
        apply(&engine, Change::Trim { topic: Epoch(T), below: u64::from(commits) }).unwrap();
        let engine = simulation::open(&disk.copy(), env()).unwrap();
        knows(&engine, 1..=commits);
        assert_eq!(sequences(&read(&engine, T, commits.into()).unwrap()), [u64::from(commits)]);
    }
}

#[test]
fn a_commit_that_is_too_large_for_the_log_comes_after_what_is_in_it() {
    let disk = SimDisk::new();
    let engine = simulated(&disk);
    for (number, length) in [10, 10, 50_000, 10, 10].into_iter().enumerate() {
        publish(&engine, T, vec![u8::try_from(number).unwrap(); length]).unwrap().unwrap();
        for engine in [&engine, &simulation::open(&disk.copy(), env()).unwrap()] {
            let found = read(engine, T, 1).unwrap();
            let first = found.iter().map(|message| usize::from(message.body[0]));
            assert_eq!(first.collect::<Vec<_>>(), (0..=number).collect::<Vec<_>>());
        }
    }
}

#[test]
fn a_server_that_is_just_going_is_waited_for() {
    let directory = tempfile::tempdir().unwrap();
    let engine = open(directory.path()).unwrap();
    let going = thread::spawn(move || {
        thread::sleep(Duration::from_millis(200));
        close(&engine);
    });
    open(directory.path()).unwrap();
    going.join().unwrap();
}

#[test]
fn a_second_server_is_told_who_has_the_directory() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("data");
    let engine = open(&path).unwrap();
    match open(&path) {
        Err(StorageError::InUse { holder, .. }) => {
            assert!(holder.contains(&std::process::id().to_string()), "{holder}");
        }
        other => panic!("{other:?}"),
    }
    close(&engine);
    let again = open(&path).unwrap();
    drop(again);
    // What a dead server left in the file does not matter.
    fs::write(path.join("LOCK"), "process 1").unwrap();
    open(&path).unwrap();
}

#[test]
fn files_are_private() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("data");
    let engine = open(&path).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&path), 0o700);
    for name in [HOT, "LOCK", "ballast"] {
        assert_eq!(mode(&path.join(name)), 0o600, "{name}");
    }
    drop(engine);
}

#[test]
fn a_file_that_is_not_ours_is_refused_and_left_alone() {
    let check = |make: &dyn Fn(&Path)| {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join(HOT);
        make(&file);
        let before = fs::read(&file).ok();
        let error = open(directory.path()).unwrap_err();
        assert!(error.to_string().contains(HOT), "{error}");
        assert!(before.is_none_or(|before| before == fs::read(&file).unwrap()));
        error
    };
    let empty = check(&|file| fs::write(file, "").unwrap());
    assert!(matches!(empty, StorageError::Corrupt { .. }), "{empty:?}");
    let text = check(&|file| fs::write(file, "not a database".repeat(1000)).unwrap());
    assert!(matches!(text, StorageError::Corrupt { .. }), "{text:?}");
    check(&|file| fs::create_dir(file).unwrap());
}

#[test]
fn another_format_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    drop(open(directory.path()).unwrap());
    let edit = |version: u32| {
        let database = Database::open(directory.path().join(HOT)).unwrap();
        let txn = database.begin_write().unwrap();
        let mut meta = txn.open_table(META).unwrap();
        put(&mut meta, META_FORMAT, version.to_le_bytes().to_vec()).unwrap();
        drop(meta);
        txn.commit().unwrap();
    };
    edit(9);
    let error = open(directory.path()).unwrap_err();
    assert!(matches!(error, StorageError::Format { found: 9, supported: FORMAT, .. }), "{error:?}");
    let foreign = tempfile::tempdir().unwrap();
    drop(Database::create(foreign.path().join(HOT)).unwrap());
    let error = open(foreign.path()).unwrap_err();
    assert!(matches!(error, StorageError::Corrupt { .. }), "{error:?}");
    let database = Database::open(foreign.path().join(HOT)).unwrap();
    assert_eq!(database.begin_read().unwrap().list_tables().unwrap().count(), 0);
}

#[test]
fn leftovers_of_a_stop_are_removed() {
    let directory = tempfile::tempdir().unwrap();
    drop(open(directory.path()).unwrap());
    let leftovers = [
        sealed::name(77),
        blobs::name(77),
        format!("{}.tmp", sealed::name(78)),
        format!("{}.tmp", blobs::name(78)),
        format!("{HOT}.tmp"),
    ];
    for name in &leftovers {
        fs::write(directory.path().join(name), "x").unwrap();
    }
    fs::write(directory.path().join("notes.txt"), "x").unwrap();
    drop(open(directory.path()).unwrap());
    for name in &leftovers {
        assert!(!directory.path().join(name).exists(), "{name}");
    }
    assert!(directory.path().join("notes.txt").exists());
    fs::remove_file(directory.path().join(HOT)).unwrap();
    for name in [sealed::name(1), blobs::name(1)] {
        fs::write(directory.path().join(&name), "x").unwrap();
        let error = open(directory.path()).unwrap_err();
        assert!(matches!(error, StorageError::Corrupt { .. }), "messages without their hot file");
        fs::remove_file(directory.path().join(&name)).unwrap();
    }
}

#[test]
fn only_an_end_in_order_is_clean() {
    let directory = tempfile::tempdir().unwrap();
    let is_clean = || directory.path().join("CLEAN").exists();
    let engine = open(directory.path()).unwrap();
    assert!(!is_clean());
    close(&engine);
    assert!(is_clean());
}

#[test]
fn old_boots_leave_the_ledger() {
    let disk = SimDisk::new();
    let boots: Vec<_> = (0..3)
        .map(|i| simulation::open(&disk, TestEnv::new(i * 1_000_000)).unwrap().boot_id())
        .collect();
    let engine = simulation::open(&disk, env()).unwrap();
    assert!(boots.iter().all(|boot| engine.knows_boot(*boot)));
    assert!(limits::MAX_BOOTS > boots.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_follow_messages_into_sealed_files() {
    let directory = tempfile::tempdir().unwrap();
    let opening = Opening {
        watermark: Some(0),
        hot_bytes: 200_000,
        file_bytes: 100_000,
        log_bytes: 100_000,
        log_commits: 512,
        blobs: NO_BLOBS,
        inline: false,
        ..simulation::OPENING
    };
    let disk = Arc::new(Directory::lock(directory.path(), env().now()).unwrap());
    let engine = Arc::new(Redb::open_on(Arc::clone(&disk) as _, env(), opening).unwrap());
    engine
        .apply(vec![Change::CreateTopic(topic("t", T))], Urgency::Now)
        .await
        .unwrap()
        .into_inner();
    let me = publisher(1, 1, 1);
    let storage: Arc<dyn Storage> = Arc::clone(&engine) as _;
    storage.opened(T, me).await.unwrap();
    let count = 600u64;
    let reader = {
        let engine = Arc::clone(&engine);
        async move {
            let mut head = engine.head(Epoch(T)).unwrap();
            let (mut next, mut from_start) = (1, 0);
            while next <= 5 * count {
                head.wait_for(|head| *head >= next).await.unwrap();
                let live = engine.read(Epoch(T), next, ALL).await.unwrap();
                assert_eq!(live[0].sequence, next);
                next += live.len() as u64;
                let old = engine.read(Epoch(T), 1 + from_start % next, ALL).await.unwrap();
                assert_eq!(old.first().map_or(next, |first| first.sequence), 1 + from_start % next);
                from_start += 97;
            }
        }
    };
    let writer = async {
        for i in 0..count {
            let body = vec![u8::try_from(i % 251).unwrap(); 500];
            let batch: Vec<NewMessage> = (0..5).map(|_| message(body.clone())).collect();
            storage.decided(from(me, T, 1 + 5 * i, batch)).await.unwrap();
        }
    };
    tokio::join!(reader, writer);
    let sealed = disk.list().unwrap().iter().filter(|name| sealed::number(name).is_some()).count();
    assert!(sealed >= 3, "{sealed} sealed files");
    let all = engine.read(Epoch(T), 1, ALL).await.unwrap();
    assert_eq!(sequences(&all), (1..=5 * count).collect::<Vec<_>>());
    engine.close().await.unwrap();
    let engine = Redb::open_on(
        Arc::new(Directory::lock(directory.path(), env().now()).unwrap()),
        env(),
        opening,
    );
    assert_eq!(engine.unwrap().read(Epoch(T), 1, ALL).await.unwrap(), all);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_committer_brings_an_answer_on_its_way() {
    let directory = tempfile::tempdir().unwrap();
    let engine = Redb::open(Options::new(directory.path(), env())).unwrap();
    engine
        .apply(vec![Change::CreateTopic(topic("t", T))], Urgency::Now)
        .await
        .unwrap()
        .into_inner();
    let mut tasks = JoinSet::new();
    // The runtime may have something to do just then, and does it itself.
    for _ in 0..1000 {
        let ticket = engine.append(anonymous(T, vec![message(vec![1])]));
        let (answered, answer) = oneshot::channel();
        tasks.spawn(Task::new(async move {
            ticket.await.unwrap().into_inner().unwrap();
            answered.send(thread::current().name().map(str::to_owned)).unwrap();
        }));
        if answer.await.unwrap().as_deref() == Some("committer") {
            return engine.close().await.unwrap();
        }
    }
    panic!("the runtime was woken each time");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_committer_can_be_the_last_who_has_the_store() {
    let mut tasks = JoinSet::new();
    for _ in 0..20 {
        let directory = tempfile::tempdir().unwrap();
        let engine = Redb::open(Options::new(directory.path(), env())).unwrap();
        let create = engine.apply(vec![Change::CreateTopic(topic("t", T))], Urgency::Now);
        create.await.unwrap().into_inner();
        let ticket = engine.append(anonymous(T, vec![message(vec![1])]));
        tasks.spawn(Task::new(async move {
            ticket.await.unwrap().into_inner().unwrap();
            drop(engine);
        }));
        tasks.join_next().await.unwrap().unwrap();
        let engine = Redb::open(Options::new(directory.path(), env())).unwrap();
        assert_eq!(sequences(&engine.read(Epoch(T), 1, ALL).await.unwrap()), [1]);
        engine.close().await.unwrap();
    }
}
