//! Crashes at every write of a commit, and power cuts right after an answer.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

use redb::{Builder, Database, StorageBackend};

use super::books::{Books, Bounds};
use super::ledger::{Ledger, Writer};
use super::rows::{self, Contents, PendingRow, Request, Why};
use crate::local::{Committer, FileError};

/// A disk that remembers what it was.
#[derive(Clone, Debug, Default)]
struct Disk(Arc<Mutex<Image>>);

#[derive(Debug, Default)]
struct Image {
    now: Vec<u8>,
    /// What a power cut leaves: what was synced.
    synced: Vec<u8>,
    /// What a crash of the process leaves after each write, if that is of interest.
    writes: Option<Vec<Vec<u8>>>,
    /// Whether there is no room any more.
    full: bool,
}

impl Image {
    fn change(&mut self, change: impl FnOnce(&mut Vec<u8>)) {
        change(&mut self.now);
        if let Some(writes) = &mut self.writes {
            writes.push(self.now.clone());
        }
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> Result<u64, io::Error> {
        Ok(self.0.lock().unwrap().now.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), io::Error> {
        let offset = usize::try_from(offset).unwrap();
        out.copy_from_slice(&self.0.lock().unwrap().now[offset..offset + out.len()]);
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<(), io::Error> {
        self.0.lock().unwrap().change(|image| image.resize(usize::try_from(len).unwrap(), 0));
        Ok(())
    }

    fn sync_data(&self) -> Result<(), io::Error> {
        let mut image = self.0.lock().unwrap();
        image.synced = image.now.clone();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), io::Error> {
        let offset = usize::try_from(offset).unwrap();
        let mut image = self.0.lock().unwrap();
        if image.full {
            return Err(io::ErrorKind::StorageFull.into());
        }
        image.change(|image| image[offset..offset + data.len()].copy_from_slice(data));
        Ok(())
    }
}

fn open(image: Vec<u8>) -> Database {
    let disk = Disk(Arc::new(Mutex::new(Image { now: image, ..Image::default() })));
    Builder::new().set_check_integrity_on_open(true).create_with_backend(disk).unwrap()
}

/// The items that wait, and those that were set aside.
fn items(image: Vec<u8>) -> (Vec<u64>, Vec<u64>) {
    let contents = rows::load(&open(image)).unwrap();
    let pending = contents.pending.into_values().flat_map(|items| items.into_keys()).collect();
    (pending, contents.parked.into_keys().collect())
}

fn start(disk: &Disk) -> Committer<Request> {
    let database = Builder::new().create_with_backend(disk.clone()).unwrap();
    let contents = rows::load(&database).unwrap();
    let bounds = Bounds { messages: 100, bytes: 1_000_000, topics: 1 };
    let ledger = Arc::new(Ledger::new(Books::new(bounds, &contents)));
    Committer::spawn(Path::new("outbox"), Arc::new(database), Writer(ledger)).unwrap()
}

fn enqueue(item: u64) -> Request {
    let row = PendingRow { enqueued: 1, message: Some(Default::default()) };
    Request::Enqueue { topic: "t".into(), item, row: prost::Message::encode_to_vec(&row) }
}

#[tokio::test]
async fn what_was_answered_survives_a_power_cut() {
    let disk = Disk::default();
    let committer = start(&disk);
    for item in 1..=10 {
        committer.commit(enqueue(item)).await.unwrap();
        let (pending, _) = items(disk.0.lock().unwrap().synced.clone());
        assert_eq!(pending, (1..=item).collect::<Vec<_>>());
    }
}

#[tokio::test]
async fn a_crash_at_any_write_of_a_removal_leaves_all_of_it_or_nothing() {
    let disk = Disk::default();
    let committer = start(&disk);
    for item in 1..=10 {
        committer.commit(enqueue(item)).await.unwrap();
    }
    disk.0.lock().unwrap().writes = Some(Vec::new());
    let why = Why { reason: None, detail: String::new() };
    let (published, parked) = (vec![1, 2, 3], vec![(4, why)]);
    let settle = Request::Settle { topic: "t".into(), now: 2, published, parked };
    committer.commit(settle).await.unwrap();
    let writes = disk.0.lock().unwrap().writes.take().unwrap();
    let (before, after) = ((1..=10).collect::<Vec<_>>(), (5..=10).collect::<Vec<_>>());
    let mut seen = [0, 0];
    for image in writes {
        let found = items(image);
        let is_after = found == (after.clone(), vec![4]);
        assert!(is_after || found == (before.clone(), vec![]), "{found:?}");
        seen[usize::from(is_after)] += 1;
    }
    assert!(seen[0] > 0 && seen[1] > 0, "crashes before and after: {seen:?}");
}

#[tokio::test]
async fn a_failed_write_is_told_and_nothing_is_written_after_it() {
    let disk = Disk::default();
    let committer = start(&disk);
    committer.commit(enqueue(1)).await.unwrap();
    disk.0.lock().unwrap().full = true;
    let error = committer.commit(enqueue(2)).await.unwrap_err();
    assert!(matches!(error, FileError::Io { .. }), "{error}");
    disk.0.lock().unwrap().full = false;
    // What is on disk of the second is known after the file is opened again.
    assert_eq!(committer.commit(enqueue(3)).await.unwrap_err(), error);
    assert_eq!(committer.closing().wait().unwrap_err(), error);
    let (pending, _) = items(disk.0.lock().unwrap().now.clone());
    assert!(pending == [1] || pending == [1, 2], "{pending:?}");
}

#[test]
fn an_item_never_gets_the_number_of_an_earlier_one() {
    let disk = Disk::default();
    let database = Builder::new().create_with_backend(disk).unwrap();
    let Contents { next, .. } = rows::load(&database).unwrap();
    let write = |request| {
        let transaction = database.begin_write().unwrap();
        rows::write(&transaction, &[request]).unwrap();
        transaction.commit().unwrap();
    };
    write(enqueue(next));
    let published = vec![next];
    write(Request::Settle { topic: "t".into(), now: 2, published, parked: Vec::new() });
    let contents = rows::load(&database).unwrap();
    assert!(contents.pending.is_empty());
    assert_eq!(contents.next, next + 1);
}
