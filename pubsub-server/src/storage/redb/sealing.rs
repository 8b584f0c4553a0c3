//! Moving older messages from the hot file to sealed files.
//!
//! The hot file stays small, since all of it is read when the store is opened. When it holds more
//! than its limit, ranges of its largest topics are copied to a new file beside the writer; the
//! writer registers the file, and from then on readers go there; then it removes the rows from the
//! hot file in pieces. A stop in between leaves rows in both, of which the next start removes the
//! hot ones, or a file that is not registered, which it removes.

use std::collections::HashSet;
use std::mem;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use ::redb::{Builder, Database, ReadableDatabase};

use super::blobs::Doomed;
use super::disk::{Digest, Disk, Space, TEMPORARY};
use super::rows::{decode_header, encode, weight};
use super::sealed::{self, Segment, SegmentRow};
use super::shared::Shared;
use super::state::{State, Topic};
use super::tables::{MESSAGES, Tables, Trouble, append, put};
use super::writer::Writer;
use crate::limits;
use crate::record::Epoch;
use crate::storage::clock::Age;

/// Bytes of rows in one transaction of a copy: more would show in the latency of commits, which
/// use the same disk.
const COPY_BYTES: usize = 4 * 1024 * 1024;
/// A small cache for a file that is written once.
const CACHE_BYTES: usize = 8 * 1024 * 1024;
/// A topic with this part of a file's size gets a file of its own, which goes as a whole when the
/// topic is trimmed.
const OWN_FILE_PART: u64 = 4;
/// What a segment may have if its messages are in blob files, in sealed files: its bytes count until
/// all of it is trimmed.
const SEGMENT_FILES: u64 = 4;
/// Bytes of a commit while the sealer is behind.
const PACED_COMMIT_BYTES: usize = 256 * 1024;
/// Bytes per second while it is a little behind; halved for each eighth that the hot file has too
/// much.
const PACED_RATE: u64 = 64 * 1024 * 1024;
/// The longest pause, after a commit of a very large message.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// How long to wait after a failure, in milliseconds.
const RETRY_AFTER: u64 = 10_000;

/// What is going on.
#[derive(Debug, Default)]
pub(super) struct Sealing {
    job: Option<Job>,
    /// Files that nothing refers to any more.
    pub(super) doomed: Vec<Doomed>,
    /// Topics of which nothing could be copied: they stay in the hot file.
    stuck: HashSet<Epoch>,
    /// Topics that are being copied.
    copying: HashSet<Epoch>,
    /// Bytes of messages in the hot file, or more; see [`weight`].
    pub(super) hot_bytes: u64,
    /// The number of the next file. None is used twice in a run: a reader may still have the file
    /// open that had it before.
    next_file: u64,
    not_before: Age,
}

/// Work beside the writer: on a thread of its own, or done already.
#[derive(Debug)]
enum Job {
    Running(JoinHandle<Done>),
    Finished(Done),
}

#[derive(Debug)]
enum Done {
    Copied(Result<Sealed, Trouble>),
    Removed,
}

/// Which messages to copy to which file.
#[derive(Debug)]
struct Plan {
    file: u64,
    ranges: Vec<Range>,
}

/// Messages of a topic: rows from the one that holds `from` up to `last`, until there are enough.
#[derive(Clone, Copy, Debug)]
struct Range {
    topic: Epoch,
    from: u64,
    last: u64,
    bytes: u64,
}

/// A file that is complete.
#[derive(Debug)]
struct Sealed {
    file: u64,
    digest: Digest,
    segments: Vec<(Epoch, Segment)>,
    /// Topics of which nothing could be copied.
    stuck: Vec<Epoch>,
}

impl Sealing {
    pub(super) fn after_open(state: &State) -> Self {
        let hot_bytes = state.topics.values().map(Topic::hot_bytes).sum();
        Self { hot_bytes, next_file: state.next_file(), ..Self::default() }
    }

    pub(super) fn is_copying(&self, topic: Epoch) -> bool {
        self.copying.contains(&topic)
    }

    /// Whether something runs that will want the writer.
    pub(super) fn is_busy(&self) -> bool {
        self.job.is_some()
    }
}

impl Writer {
    /// Does one step, and says whether it did.
    pub(super) fn seal(&mut self, age: Age) -> bool {
        if let Some(done) = self.finished_job() {
            let copied = mem::take(&mut self.sealing.copying);
            copied.into_iter().for_each(|topic| self.chores.trim_later(topic));
            match done {
                Done::Removed => {}
                Done::Copied(Ok(sealed)) => self.register(&sealed),
                Done::Copied(Err(trouble)) => {
                    tracing::warn!(%trouble, "older messages cannot be sealed for now");
                    self.sealing.not_before = age.after(RETRY_AFTER);
                }
            }
            return true;
        }
        if self.sealing.job.is_some() {
            return false;
        }
        let disk = Arc::clone(&self.disk);
        if !self.sealing.doomed.is_empty() {
            let doomed = mem::take(&mut self.sealing.doomed);
            self.start(move || {
                for file in doomed {
                    if let Err(error) = disk.remove(&file.name()) {
                        // The next start tries again.
                        tracing::warn!(%error, ?file, "a file cannot be removed");
                    }
                }
                Done::Removed
            });
            return true;
        }
        if self.sealing.not_before > age || self.sealing.hot_bytes <= self.opening.hot_bytes {
            return false;
        }
        if !self.has_room_to_seal() {
            self.sealing.not_before = age.after(RETRY_AFTER);
            return false;
        }
        // It is copied from the tables.
        self.checkpoint();
        let Some(plan) = self.plan() else {
            return false;
        };
        self.sealing.copying = plan.ranges.iter().map(|range| range.topic).collect();
        let shared = Arc::clone(&self.shared);
        let most = self.opening.file_bytes.saturating_mul(SEGMENT_FILES);
        self.start(move || {
            let copied = copy(&shared, disk.as_ref(), &plan, most);
            if copied.is_err() {
                // What is left of it goes at the next start at the latest.
                let _ = disk.remove(&format!("{}{TEMPORARY}", sealed::name(plan.file)));
            }
            Done::Copied(copied)
        });
        true
    }

    /// Whether a copy leaves what is kept free: that is for positions and for trims. redb's file may
    /// have twice the bytes of its messages.
    fn has_room_to_seal(&self) -> bool {
        let needed = |space: Space| {
            self.watermark(space).saturating_add(self.opening.file_bytes.saturating_mul(2))
        };
        !self.is_full() && self.disk.space().is_ok_and(|space| space.free >= needed(space))
    }

    fn start(&mut self, work: impl FnOnce() -> Done + Send + 'static) {
        self.sealing.job = if self.opening.inline {
            Some(Job::Finished(work()))
        } else {
            match thread::Builder::new().name("sealer".to_owned()).spawn(work) {
                Ok(thread) => Some(Job::Running(thread)),
                Err(error) => {
                    tracing::warn!(%error, "no thread can be started");
                    None
                }
            }
        };
    }

    fn finished_job(&mut self) -> Option<Done> {
        if matches!(&self.sealing.job, Some(Job::Running(thread)) if !thread.is_finished()) {
            return None;
        }
        match self.sealing.job.take()? {
            Job::Finished(done) => Some(done),
            Job::Running(thread) => Some(thread.join().unwrap_or_else(|_| {
                let panicked = std::io::Error::other("the sealer panicked");
                Done::Copied(Err(::redb::Error::Io(panicked).into()))
            })),
        }
    }

    /// Waits for what runs beside the writer; a copy is thrown away.
    pub(super) fn stop_sealing(&mut self) {
        if let Some(Job::Running(thread)) = self.sealing.job.take() {
            let _ = thread.join();
        }
    }

    /// How much the next commit may have. While the sealer is behind, commits are small, so that
    /// the pauses after them are short for the acks among the publishes.
    pub(super) fn commit_bytes(&self) -> usize {
        if self.surplus() == 0 { limits::MAX_COMMIT_BYTES } else { PACED_COMMIT_BYTES }
    }

    /// How long to wait after a commit. The larger the surplus of the hot file, the slower it
    /// grows, until the sealer keeps up: what a start has to read stays bounded.
    pub(super) fn pace(&self, stored: u64) -> Duration {
        let surplus = self.surplus();
        if surplus == 0 {
            return Duration::ZERO;
        }
        let halvings = surplus.saturating_mul(8) / self.opening.hot_bytes.max(1);
        let rate = PACED_RATE >> halvings.min(6);
        Duration::from_millis(stored.saturating_mul(1000) / rate).min(LONGEST_PAUSE)
    }

    /// Bytes in the hot file beyond half as much again as it should have.
    fn surplus(&self) -> u64 {
        self.sealing.hot_bytes.saturating_sub(self.opening.hot_bytes / 2 * 3)
    }

    fn plan(&mut self) -> Option<Plan> {
        let (limit, size) = (self.opening.hot_bytes, self.opening.file_bytes);
        let hot = |(topic, state): (&Epoch, &Topic)| {
            let head = state.head.filter(|_| !self.sealing.stuck.contains(topic))?;
            // Where a row begins, also one that is trimmed and still counts.
            let from = state.hot_from().max(head.collected);
            let bytes = state.hot_bytes();
            (from <= head.head).then_some(Range { topic: *topic, from, last: head.head, bytes })
        };
        let mut topics: Vec<Range> = self.state.topics.iter().filter_map(hot).collect();
        self.sealing.hot_bytes = topics.iter().map(|range| range.bytes).sum();
        if self.sealing.hot_bytes <= limit {
            return None;
        }
        topics.sort_unstable_by_key(|range| (std::cmp::Reverse(range.bytes), range.topic));
        let mut ranges = Vec::new();
        let mut room = size;
        for range in topics {
            let own_file = range.bytes >= size / OWN_FILE_PART;
            if room == 0 || (own_file && !ranges.is_empty()) {
                break;
            }
            let bytes = range.bytes.min(room);
            ranges.push(Range { bytes, ..range });
            room = if own_file { 0 } else { room - bytes };
        }
        let file = self.sealing.next_file;
        self.sealing.next_file += 1;
        Some(Plan { file, ranges })
    }

    /// Makes a complete file part of the store.
    fn register(&mut self, sealed: &Sealed) {
        self.sealing.stuck.extend(&sealed.stuck);
        let registered = self.transact(|tables, state| register(tables, state, sealed));
        let Some(topics) = registered else {
            // Nothing in it is of interest any more, or the commit has failed: then only the store
            // that was opened again knows, or the next start.
            if !self.failed && self.state.files().all(|(file, _)| file != sealed.file) {
                self.sealing.doomed.push(Doomed::Sealed(sealed.file));
            }
            return;
        };
        self.shared.cabinet.register(sealed.file, sealed.digest);
        for topic in topics {
            self.show_topic(topic);
            self.chores.trim_later(topic);
        }
    }
}

fn register(
    tables: &mut Tables<'_>,
    state: &mut State,
    sealed: &Sealed,
) -> Result<Option<Vec<Epoch>>, Trouble> {
    let mut topics = Vec::new();
    state.add_file(sealed.file, sealed.digest);
    for (epoch, segment) in &sealed.segments {
        // It may have been deleted while it was copied.
        let Some(topic) = state.topics.get_mut(epoch) else {
            continue;
        };
        let mut segments = topic.segments.as_ref().clone();
        segments.push(*segment);
        topic.segments = Arc::new(segments);
        state.use_file(segment.file);
        let row = encode(&SegmentRow::of(segment));
        put(tables.segments.open()?, (epoch.0, segment.first), row)?;
        topics.push(*epoch);
    }
    if topics.is_empty() {
        state.release_file(sealed.file);
        return Ok(None);
    }
    put(tables.files.open()?, sealed.file, encode(&sealed.digest))?;
    Ok(Some(topics))
}

/// Copies rows to a new file and gives it its name.
fn copy(shared: &Shared, disk: &dyn Disk, plan: &Plan, most: u64) -> Result<Sealed, Trouble> {
    let name = sealed::name(plan.file);
    let temporary = format!("{name}{TEMPORARY}");
    let mut builder = Builder::new();
    builder.set_cache_size(CACHE_BYTES);
    let target = disk.create(&temporary, &builder)?;
    let (mut segments, mut stuck) = (Vec::new(), Vec::new());
    for range in &plan.ranges {
        match copy_range(shared, &target, range, (plan.file, most))? {
            Some(segment) => segments.push((range.topic, segment)),
            None => stuck.push(range.topic),
        }
    }
    target.close()?;
    let io = ::redb::Error::Io;
    disk.sync(&temporary).map_err(io)?;
    let digest = disk.digest(&temporary).map_err(io)?;
    disk.rename(&temporary, &name).map_err(io)?;
    Ok(Sealed { file: plan.file, digest, segments, stuck })
}

/// Copies rows of one topic; `None` if the first one cannot be.
fn copy_range(
    shared: &Shared,
    target: &Database,
    range: &Range,
    (file, most): (u64, u64),
) -> Result<Option<Segment>, Trouble> {
    let mut segment: Option<Segment> = None;
    loop {
        let next = segment.map_or(range.from, |segment| segment.last + 1);
        let copied = segment.map_or(0, |segment| weight(segment.bytes, segment.outside));
        let bytes = segment.map_or(0, |segment| segment.bytes);
        if next > range.last || copied >= range.bytes || bytes >= most {
            return Ok(segment);
        }
        let wanted = (range.bytes - copied).min(most - bytes);
        let rows = read_rows(shared, range, next, wanted)?;
        if rows.is_empty() {
            return Ok(segment);
        }
        let txn = target.begin_write()?;
        let mut table = txn.open_table(MESSAGES)?;
        for (base, row) in &rows {
            let header = decode_header(range.topic, *base, row)?;
            let fresh = Segment { first: *base, last: 0, bytes: 0, outside: 0, file };
            let grown = segment.get_or_insert(fresh);
            grown.last = header.end() - 1;
            grown.bytes += u64::from(header.bytes);
            grown.outside += header.outside_bytes();
        }
        append(&mut table, range.topic, rows.iter().map(|(base, row)| (*base, row.as_slice())))?;
        drop(table);
        txn.commit()?;
    }
}

/// Reads some whole rows, dense from the one that holds `next`. It ends before a damaged one.
fn read_rows(
    shared: &Shared,
    range: &Range,
    next: u64,
    wanted: u64,
) -> Result<Vec<(u64, Vec<u8>)>, Trouble> {
    let guard = shared.database();
    let database = guard.as_ref().ok_or(::redb::Error::DatabaseClosed)?;
    let table = database.begin_read()?.open_table(MESSAGES)?;
    let topic = range.topic;
    let Some(first) = table.range((topic.0, 0)..=(topic.0, next))?.next_back().transpose()? else {
        return Ok(Vec::new());
    };
    let (mut rows, mut bytes, mut copied, mut expected) = (Vec::new(), 0, 0, next);
    for entry in table.range(first.0.value()..=(topic.0, range.last))? {
        let (key, row) = entry?;
        let base = key.value().1;
        let Ok(header) = decode_header(topic, base, row.value()) else {
            break;
        };
        if !(header.base..header.end()).contains(&expected) {
            break;
        }
        expected = header.end();
        bytes += u64::from(header.bytes);
        copied += row.value().len();
        rows.push((base, row.value().to_vec()));
        if copied >= COPY_BYTES || bytes >= wanted {
            break;
        }
    }
    Ok(rows)
}

/// Stops using a part of a sealed file; the file, if that was the last part.
pub(super) fn release(
    tables: &mut Tables<'_>,
    state: &mut State,
    topic: Epoch,
    segment: &Segment,
) -> Result<Option<Doomed>, Trouble> {
    tables.segments.open()?.remove((topic.0, segment.first))?;
    if !state.release_file(segment.file) {
        return Ok(None);
    }
    tables.files.open()?.remove(segment.file)?;
    Ok(Some(Doomed::Sealed(segment.file)))
}
