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

/// The open log. It is empty whenever the hot file has been committed.
#[derive(Debug)]
pub(super) struct Log {
    file: Box<dyn LogFile>,
    length: usize,
    /// Random, and new with each start: nobody can publish what would pass for a record.
    salt: u64,
    /// The number of the last record.
    last: u64,
    /// Where the next one goes.
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
        let mut log = Self { file, length, salt, last: moved, end: 0, buffer: Vec::new() };
        let mut records = Vec::new();
        while let Some((number, content)) = decode(salt, &bytes, log.end)
            && number == log.last + 1
        {
            log.last = number;
            log.end += size(content.len());
            records.push(content.to_vec());
        }
        // A record is begun when the one before it is durable. So only the last one can be half
        // written, and one that can be read behind one that cannot says that this one is damaged.
        let later = (log.end..length).step_by(BLOCK).filter_map(|at| decode(salt, &bytes, at));
        if later.into_iter().any(|(number, _)| number > log.last) {
            return Err(Damaged::in_table(LOG).into());
        }
        Ok((log, records))
    }

    /// Goes on with an empty log once its mark is in the hot file.
    pub(super) fn clear(&mut self, salt: u64) {
        (self.salt, self.end) = (salt, 0);
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
        if content > limit || self.end + size > self.length {
            return Ok(false);
        }
        let number = self.last + 1;
        let sum = sum(self.salt, number, &self.buffer[HEADER_BYTES..]);
        let mut header = &mut self.buffer[..HEADER_BYTES];
        header.put_u64_le(number);
        header.put_u32_le(u32::try_from(content).expect("it is below a megabyte"));
        header.put_u64_le(sum);
        self.buffer.resize(size, 0);
        self.file.write(self.end as u64, &self.buffer)?;
        if !cfg!(pubsub_break = "commit_without_sync") {
            self.file.sync()?;
        }
        self.last = number;
        self.end += size;
        Ok(true)
    }
}

/// What a record takes up.
fn size(content: usize) -> usize {
    (HEADER_BYTES + content).next_multiple_of(BLOCK)
}

/// The number and the content of a record, if there is one.
fn decode(salt: u64, bytes: &[u8], at: usize) -> Option<(u64, &[u8])> {
    let (mut header, rest) = bytes.get(at..)?.split_at_checked(HEADER_BYTES)?;
    let (number, length, expected) =
        (header.get_u64_le(), header.get_u32_le(), header.get_u64_le());
    let content = rest.get(..usize::try_from(length).ok()?)?;
    (number > 0 && sum(salt, number, content) == expected).then_some((number, content))
}

fn sum(salt: u64, number: u64, content: &[u8]) -> u64 {
    xxh3_64_with_seed(content, xxh3_64_with_seed(&number.to_le_bytes(), salt))
}
