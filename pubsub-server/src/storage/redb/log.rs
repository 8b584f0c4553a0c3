//! The log: commits in the order in which they came, until they are moved to the hot file.
//!
//! A commit of the hot file writes half a dozen pages in as many places. What most commits hold,
//! some messages with the state of their publisher, is appended here instead, with one write and one
//! sync, to a file whose blocks exist already. `docs/format.md` describes the bytes.

use bytes::{Buf, BufMut};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::disk::{Disk, LOG, LogFile, TEMPORARY};
use super::tables::{Damaged, Trouble};

/// Records begin at multiples of this: no write touches what an earlier one has made durable.
pub(super) const BLOCK: usize = 4096;
/// number, length, checksum of number and content
const HEADER_BYTES: usize = 8 + 4 + 8;
/// Larger commits go to the hot file directly: writing them twice costs more than it saves.
pub(super) const RECORD_BYTES: usize = 128 * 1024;
/// But not if they have keys: those are cheaper the more of them are moved together.
pub(super) const KEYED_RECORD_BYTES: usize = 1024 * 1024;
const ZEROS: usize = 64 * 1024;

/// The open log: a ring of records from the oldest that is not in the hot file to the last.
#[derive(Debug)]
pub(super) struct Log {
    file: Box<dyn LogFile>,
    length: usize,
    /// Random, and new with each start: nobody can publish what would pass for a record.
    salt: u64,
    /// The number of the last record.
    last: u64,
    /// Where the oldest record that is needed begins, unless it had to go to the start of the file.
    start: usize,
    /// What is being moved ends here.
    moving_end: usize,
    /// Where the next one goes, unless it has to go to the start of the file.
    end: usize,
    buffer: Vec<u8>,
}

/// What the hot file knows of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct Mark {
    /// The last record that has been moved.
    pub(super) moved: u64,
    pub(super) salt: u64,
}

/// Makes an empty log. It gets its name when it is complete.
pub(super) fn create(disk: &dyn Disk, bytes: usize) -> std::io::Result<()> {
    let temporary = format!("{LOG}{TEMPORARY}");
    let file = disk.create_log(&temporary)?;
    let zeros = vec![0; ZEROS.min(bytes)];
    for offset in (0..bytes).step_by(zeros.len()) {
        file.write(offset as u64, &zeros)?;
    }
    drop(file);
    disk.sync(&temporary)?;
    disk.rename(&temporary, LOG)
}

impl Log {
    /// Opens the log, with the contents of the records that have not been moved.
    pub(super) fn open(disk: &dyn Disk, mark: Mark) -> Result<(Self, Vec<Vec<u8>>), Trouble> {
        let io = ::redb::Error::Io;
        let file = disk.open_log(LOG).map_err(io)?;
        let length = usize::try_from(file.len().map_err(io)?).expect("logs are small");
        let bytes = file.read(0, length).map_err(io)?;
        let Mark { moved, salt } = mark;
        let at = |at: usize, wanted: u64| {
            decode(salt, &bytes, at, |number| number == wanted).map(|content| (at, content))
        };
        let blocks = || (0..length).step_by(BLOCK);
        let start = blocks().find(|block| at(*block, moved + 1).is_some()).unwrap_or(0);
        let (moving_end, end, buffer) = (start, start, Vec::new());
        let mut log = Self { file, length, salt, last: moved, start, moving_end, end, buffer };
        let mut records = Vec::new();
        while let Some((at, content)) = at(log.end, log.last + 1).or_else(|| at(0, log.last + 1)) {
            log.last += 1;
            log.end = at + size(content.len());
            records.push(content.to_vec());
        }
        // A record is begun when the one before it is durable. So only the last one can be half
        // written, and one with a higher number says that one that cannot be read is damaged.
        let later = |block| decode(salt, &bytes, block, |number| number > log.last).is_some();
        if blocks().any(later) {
            return Err(Damaged::in_table(LOG).into());
        }
        Ok((log, records))
    }

    /// Goes on with an empty log once its mark is in the hot file.
    pub(super) fn clear(&mut self, salt: u64) {
        (self.salt, self.start, self.moving_end, self.end) = (salt, 0, 0, 0);
    }

    /// All that is here is being moved from now on; the records that follow are not. It returns the
    /// mark for the hot file.
    pub(super) fn lift(&mut self) -> Mark {
        self.moving_end = self.end;
        self.mark()
    }

    /// What was being moved is in the hot file, and its room is free.
    pub(super) fn landed(&mut self) {
        self.start = self.moving_end;
        if self.start == self.end {
            self.clear(self.salt);
        }
    }

    pub(super) fn mark(&self) -> Mark {
        Mark { moved: self.last, salt: self.salt }
    }

    pub(super) fn salt(&self) -> u64 {
        self.salt
    }

    /// Appends a record of so many bytes at most, and makes it durable; `false` if it has to go
    /// elsewhere.
    pub(super) fn append(
        &mut self,
        limit: usize,
        encode: impl FnOnce(&mut Vec<u8>),
    ) -> std::io::Result<bool> {
        self.buffer.clear();
        self.buffer.resize(HEADER_BYTES, 0);
        encode(&mut self.buffer);
        let content = self.buffer.len() - HEADER_BYTES;
        let size = size(content);
        let Some(at) = self.room(size).filter(|_| content <= limit) else { return Ok(false) };
        let number = self.last + 1;
        let sum = sum(self.salt, number, &self.buffer[HEADER_BYTES..]);
        let mut header = &mut self.buffer[..HEADER_BYTES];
        header.put_u64_le(number);
        header.put_u32_le(u32::try_from(content).expect("it is below a megabyte"));
        header.put_u64_le(sum);
        self.buffer.resize(size, 0);
        self.file.write(at as u64, &self.buffer)?;
        if !cfg!(pubsub_break = "commit_without_sync") {
            self.file.sync()?;
        }
        self.last = number;
        self.end = at + size;
        Ok(true)
    }

    #[cfg(test)]
    pub(super) fn has_gone_round(&self) -> bool {
        self.end < self.start
    }

    /// Where a record can go. It never comes up to the start from below: full would look like empty.
    fn room(&self, size: usize) -> Option<usize> {
        let (start, end) = (self.start, self.end);
        if end < start {
            return (end + size < start).then_some(end);
        }
        (end + size <= self.length).then_some(end).or_else(|| (size < start).then_some(0))
    }
}

/// What a record takes up.
fn size(content: usize) -> usize {
    (HEADER_BYTES + content).next_multiple_of(BLOCK)
}

/// The content of a record, if there is one with a number that is wanted.
fn decode(salt: u64, bytes: &[u8], at: usize, is_wanted: impl Fn(u64) -> bool) -> Option<&[u8]> {
    let (mut header, rest) = bytes.get(at..)?.split_at_checked(HEADER_BYTES)?;
    let (number, length, expected) =
        (header.get_u64_le(), header.get_u32_le(), header.get_u64_le());
    // What a publisher has sent may look like headers, each of a long content to sum up.
    let length = usize::try_from(length).ok().filter(|length| *length <= KEYED_RECORD_BYTES)?;
    let content = rest.get(..length)?;
    (number > 0 && is_wanted(number) && sum(salt, number, content) == expected).then_some(content)
}

fn sum(salt: u64, number: u64, content: &[u8]) -> u64 {
    xxh3_64_with_seed(content, xxh3_64_with_seed(&number.to_le_bytes(), salt))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::simulation::SimDisk;
    use super::*;
    use crate::storage::testing::Random;

    /// The records behind a mark, read as the next start reads them.
    fn behind(disk: &SimDisk, mark: Mark) -> Vec<Vec<u8>> {
        Log::open(disk, mark).unwrap().1
    }

    #[test]
    fn the_largest_record_is_found_again() {
        let disk = SimDisk::new();
        create(&disk, 2 * KEYED_RECORD_BYTES).unwrap();
        let mark = Mark { moved: 0, salt: 7 };
        let content = vec![7; KEYED_RECORD_BYTES];
        let (mut log, _) = Log::open(&disk, mark).unwrap();
        let mut append =
            |content: &[u8]| log.append(KEYED_RECORD_BYTES, |record| record.extend(content));
        assert!(!append(&[&content[..], &[7]].concat()).unwrap());
        assert!(append(&content).unwrap());
        assert_eq!(behind(&disk, mark), [content]);
    }

    #[test]
    fn records_go_round_and_all_that_were_not_moved_are_found() {
        let (mut rounds, mut refused) = (0, 0);
        for seed in 0..200 {
            let mut random = Random(seed);
            let disk = SimDisk::new();
            create(&disk, 8 * BLOCK).unwrap();
            let mut hot = Mark { moved: 0, salt: seed };
            let (mut log, _) = Log::open(&disk, hot).unwrap();
            let mut records = BTreeMap::new();
            let mut lifted = None;
            for number in 0..60_u8 {
                match random.below(9) {
                    // As after a disk that was full.
                    0 if lifted.is_none() => log = Log::open(&disk, hot).unwrap().0,
                    0..3 => match lifted.take() {
                        None => lifted = Some(log.lift()),
                        Some(mark) => {
                            // Its commit is durable, and then the log is told so.
                            assert_eq!(behind(&disk, mark), after(&records, mark));
                            hot = mark;
                            log.landed();
                        }
                    },
                    _ => {
                        let content = vec![number; random.index(2 * BLOCK)];
                        let end = log.end;
                        if log.append(RECORD_BYTES, |record| record.extend(&content)).unwrap() {
                            records.insert(log.last, content);
                            rounds += usize::from(log.end < end);
                        } else {
                            refused += 1;
                        }
                    }
                }
                let disk = disk.after_cut(&mut random);
                assert_eq!(behind(&disk, hot), after(&records, hot), "seed {seed}");
                if let Some(mark) = lifted {
                    assert_eq!(behind(&disk, mark), after(&records, mark), "seed {seed}");
                }
            }
        }
        assert!(rounds > 200 && refused > 200, "{rounds} {refused}");
    }

    fn after(records: &BTreeMap<u64, Vec<u8>>, mark: Mark) -> Vec<Vec<u8>> {
        records.range(mark.moved + 1..).map(|(_, content)| content.clone()).collect()
    }

    #[test]
    fn a_damaged_record_is_told_from_the_end_also_if_the_next_is_at_the_start_of_the_file() {
        let disk = SimDisk::new();
        create(&disk, 4 * BLOCK).unwrap();
        let (mut log, _) = Log::open(&disk, Mark { moved: 0, salt: 7 }).unwrap();
        let append = |log: &mut Log| assert!(log.append(BLOCK, |r| r.push(1)).unwrap());
        (0..2).for_each(|_| append(&mut log));
        let mark = log.lift();
        append(&mut log);
        log.landed();
        (0..2).for_each(|_| append(&mut log));
        assert_eq!((log.start, log.end), (2 * BLOCK, BLOCK));
        assert_eq!(behind(&disk, mark).len(), 3);
        disk.edit(LOG, |bytes| bytes[3 * BLOCK + HEADER_BYTES] ^= 1);
        assert!(matches!(Log::open(&disk, mark), Err(Trouble::Damaged(_))));
    }
}
