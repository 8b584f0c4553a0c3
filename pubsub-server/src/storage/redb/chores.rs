//! Housekeeping between commits, in pieces that hold nobody up.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::sync::Arc;

use ::redb::{Key, ReadableTable, ReadableTableMetadata, Table, Value};

use super::blobs::{Doomed, GROWING_FILES, Sizes};
use super::group::Effects;
use super::rows::{self, Head, ROW_BYTES, decode_header, encode};
use super::sealing::release;
use super::state::{State, Topic};
use super::tables::{GARBAGE_SUBSCRIPTION, Row, Tables, Trouble, decoded, put};
use super::writer::Writer;
use crate::failpoint;
use crate::limits;
use crate::record::{Epoch, Uuid};
use crate::storage::admission::Publisher;
use crate::storage::clock::{self, Age};

/// Rows that one piece removes or looks at.
const PIECE_ROWS: usize = 1_000;
/// Bytes of messages that one piece removes: it has to read them.
const PIECE_BYTES: usize = 4 * 1024 * 1024;
/// How often all publishers are looked at, in milliseconds.
const SWEEP_EVERY: u64 = 10 * 60 * 1000;
/// How often blob files are looked at, in milliseconds.
const REST_EVERY: u64 = 10_000;

/// What there is to do.
#[derive(Debug, Default)]
pub(super) struct Chores {
    /// Topics with rows that may be trimmed.
    trims: BTreeSet<Epoch>,
    /// Whether something deleted has rows left.
    garbage: bool,
    /// Where the scan for cursors of a deleted subscription goes on.
    cursor_scan: Option<Scan>,
    /// Where the sweep of publishers goes on.
    sweep: Option<(u64, u128)>,
    next_sweep: Age,
    next_rest: Age,
    next_expiry: Age,
}

/// A place in the table of cursors.
#[derive(Clone, Copy, Debug)]
struct Scan {
    subscription: u64,
    from: (u64, u64),
}

impl Chores {
    /// Everything may have been left undone.
    pub(super) fn after_open(state: &State) -> Self {
        Self { trims: state.topics.keys().copied().collect(), garbage: true, ..Self::default() }
    }

    pub(super) fn note(&mut self, effects: &Effects) {
        self.trims.extend(&effects.trimmed);
        self.garbage |= effects.garbage;
    }

    pub(super) fn trim_later(&mut self, topic: Epoch) {
        self.trims.insert(topic);
    }
}

impl Writer {
    /// Does one piece of something, and says whether it did.
    pub(super) fn do_chore(&mut self) -> bool {
        let age = self.now().age;
        self.seal(age)
            || self.trim()
            || self.collect_garbage()
            || self.expire_keys(age)
            || self.sweep(age)
            || self.rest(age)
    }

    /// Blob files that have not grown for a while go as soon as they are trimmed; if many grow, they
    /// make room for others.
    fn rest(&mut self, age: Age) -> bool {
        if self.chores.next_rest > age {
            return false;
        }
        self.chores.next_rest = age.after(REST_EVERY);
        let trims = self.chores.trims.len();
        let growing = |topic: &Topic| topic.blobs.last().is_some_and(|blob| blob.grows);
        let many = self.state.topics.values().filter(|topic| growing(topic)).count();
        let many = many > GROWING_FILES / 2;
        for (epoch, topic) in &mut self.state.topics {
            let Some(blob) = topic.blobs.last_mut().filter(|blob| blob.grows) else { continue };
            blob.rests = blob.seen == blob.length;
            blob.seen = blob.length;
            if blob.rests {
                self.chores.trims.insert(*epoch);
                if many {
                    blob.grows = false;
                    self.state.finished.push(blob.file);
                }
            }
        }
        self.finish_blobs();
        self.chores.trims.len() > trims
    }

    /// Removes rows of which all messages are trimmed or sealed.
    fn trim(&mut self) -> bool {
        while let Some(epoch) = self.chores.trims.first().copied() {
            // What is being copied has to stay: its bytes would be counted off twice.
            let copying = self.sealing.is_copying(epoch);
            let topic = self.state.topics.get(&epoch);
            let sizes = self.state.sizes;
            let surplus = topic.is_some_and(|topic| has_surplus(topic, copying, sizes));
            let piece = surplus
                .then(|| self.transact(|tables, state| trim_piece(tables, state, epoch, copying)));
            if let Some(doomed) = piece.flatten() {
                failpoint::pass("collected");
                self.show_topic(epoch);
                doomed.iter().for_each(|file| self.shared.forget(*file));
                self.sealing.doomed.extend(doomed);
                return true;
            }
            self.chores.trims.remove(&epoch);
        }
        false
    }

    /// Removes rows of deleted topics and subscriptions.
    fn collect_garbage(&mut self) -> bool {
        if !self.chores.garbage {
            return false;
        }
        let scan = self.chores.cursor_scan;
        let piece = self.transact(|tables, state| garbage_piece(tables, state, scan));
        self.chores.garbage = piece.is_some();
        self.chores.cursor_scan = piece.flatten();
        self.chores.garbage
    }

    /// Removes idempotency keys whose time is over.
    fn expire_keys(&mut self, age: Age) -> bool {
        if self.chores.next_expiry > age {
            return false;
        }
        let piece = |tables: &mut Tables<'_>, state: &mut State| {
            Ok(state.keys.expire(tables.keys.open()?, age)?.then_some(()))
        };
        let did = self.state.keys.is_due(age) && self.transact(piece).is_some();
        if !did {
            // Each is a transaction: what comes to its end meanwhile goes together.
            self.chores.next_expiry = age.after(1_000);
        }
        did
    }

    /// Removes publishers that were not used for long.
    fn sweep(&mut self, age: Age) -> bool {
        if self.chores.sweep.is_none() && self.chores.next_sweep > age {
            return false;
        }
        let from = self.chores.sweep.unwrap_or_default();
        let mut next = None;
        self.transact(|tables, state| {
            let (removed, end) = sweep_piece(tables, state, from, age)?;
            next = end;
            Ok((removed > 0).then_some(()))
        });
        self.chores.sweep = next;
        self.chores.next_sweep = age.after(SWEEP_EVERY);
        next.is_some()
    }
}

/// Whether the hot file or a sealed one may hold what nobody reads there.
fn has_surplus(topic: &Topic, copying: bool, sizes: Sizes) -> bool {
    let Some(head) = topic.head else { return false };
    let sealed = Head { sealed_below: topic.hot_from(), ..head };
    head.collected < surplus_below(&sealed, copying)
        || topic.segments.first().is_some_and(|segment| segment.last < head.first)
        || topic.blobs.first().is_some_and(|blob| blob.is_trimmed(head.first, sizes))
}

/// Rows below this sequence can go.
fn surplus_below(head: &Head, copying: bool) -> u64 {
    if copying { head.sealed_below } else { head.first.max(head.sealed_below) }
}

/// Removes trimmed segments and some rows that are trimmed or sealed; `Some` if something was
/// done, with the files that are not used any more.
fn trim_piece(
    tables: &mut Tables<'_>,
    state: &mut State,
    epoch: Epoch,
    copying: bool,
) -> Result<Option<Vec<Doomed>>, Trouble> {
    let Some(topic) = state.topics.get(&epoch) else {
        return Ok(None);
    };
    let Some(mut head) = topic.head else {
        return Ok(None);
    };
    // Kept here for when the segments are gone.
    head.sealed_below = topic.hot_from();
    let trimmed = topic.segments.partition_point(|segment| segment.last < head.first);
    let (trimmed, kept) = topic.segments.split_at(trimmed);
    let (trimmed, kept) = (trimmed.to_vec(), Arc::new(kept.to_vec()));
    let emptied = topic.blobs.iter().take_while(|blob| blob.is_trimmed(head.first, state.sizes));
    let emptied: Vec<_> = emptied.map(|blob| blob.file).collect();
    let mut doomed = Vec::new();
    for segment in &trimmed {
        head.bytes = head.bytes.saturating_sub(segment.bytes);
        head.outside = head.outside.saturating_sub(segment.outside);
        doomed.extend(release(tables, state, epoch, segment)?);
    }
    for file in &emptied {
        tables.blobs.open()?.remove((epoch.0, *file))?;
        doomed.push(Doomed::Blob(*file));
    }
    let below = surplus_below(&head, copying);
    let removed = trim_rows(tables, epoch, &mut head, below)?;
    if removed == 0 && doomed.is_empty() && trimmed.is_empty() {
        return Ok(None);
    }
    put(tables.heads.open()?, epoch.0, encode(&head))?;
    failpoint::pass("collecting");
    if let Some(topic) = state.topics.get_mut(&epoch) {
        topic.head = Some(head);
        topic.segments = kept;
        topic.blobs.drain(..emptied.len());
    }
    Ok(Some(doomed))
}

/// Removes the first rows of the hot file that are trimmed or sealed.
fn trim_rows(
    tables: &mut Tables<'_>,
    topic: Epoch,
    head: &mut Head,
    below: u64,
) -> Result<usize, Trouble> {
    let mut removed = Vec::new();
    let mut read = 0;
    for entry in tables.messages.open()?.range((topic.0, 0)..(topic.0, below))? {
        let (key, row) = entry?;
        let (_, base) = key.value();
        match decode_header(topic, base, row.value()) {
            Ok(header) if header.end() > below => break,
            Ok(header) => {
                // Those of sealed rows count with their segment.
                if header.end() > head.sealed_below {
                    head.bytes = head.bytes.saturating_sub(u64::from(header.bytes));
                    head.outside = head.outside.saturating_sub(header.outside_bytes());
                }
                head.collected = header.end();
            }
            // Nobody can read it. How far it reached shows in the row that follows it.
            Err(damaged) => tracing::warn!(%damaged, ?topic, base, "a trimmed row was damaged"),
        }
        removed.push(base);
        read += row.value().len();
        if removed.len() >= PIECE_ROWS || read >= PIECE_BYTES {
            break;
        }
    }
    for base in &removed {
        tables.messages.open()?.remove((topic.0, *base))?;
    }
    Ok(removed.len())
}

/// Removes some rows of what is deleted; `Some` if something was done, with the place where a
/// scan goes on.
fn garbage_piece(
    tables: &mut Tables<'_>,
    state: &mut State,
    scan: Option<Scan>,
) -> Result<Option<Option<Scan>>, Trouble> {
    let Some((kind, epoch)) = tables.garbage.open()?.first()?.map(|(key, _)| key.value()) else {
        return Ok(None);
    };
    if kind == GARBAGE_SUBSCRIPTION {
        // Another one may have been deleted since, and be the first now.
        let own = scan.filter(|scan| scan.subscription == epoch);
        let from = own.map_or((0, 0), |scan| scan.from);
        let (next, cursors) = cursors_of(tables, from, epoch)?;
        for key in cursors {
            tables.cursors.open()?.remove(key)?;
        }
        let departed = (epoch, 0)..=(epoch, u64::MAX);
        let removed = remove_some(tables.departed.open()?, departed, PIECE_ROWS)?;
        let next = next.map(|from| Scan { subscription: epoch, from });
        if next.is_some() || removed > 0 {
            return Ok(Some(next));
        }
    } else {
        let rows = |low, high| (epoch, low)..=(epoch, high);
        let publishers = (epoch, 0)..=(epoch, u128::MAX);
        let removed = remove_some(tables.publishers.open()?, publishers, PIECE_ROWS)?
            + remove_some(tables.messages.open()?, rows(0, u64::MAX), PIECE_BYTES / ROW_BYTES)?
            + remove_some(tables.cursors.open()?, rows(0, u64::MAX), PIECE_ROWS)?
            + remove_some(tables.schemas.open()?, rows(0, u64::MAX), PIECE_ROWS)?
            + state.keys.collect(tables.keys.open()?, Epoch(epoch))?;
        state.publisher_rows = tables.publishers.open()?.len()?;
        if removed > 0 {
            return Ok(Some(None));
        }
    }
    tables.garbage.open()?.remove((kind, epoch))?;
    Ok(Some(None))
}

/// The cursors of a subscription among the next ones, and where the next ones begin.
#[expect(clippy::type_complexity, reason = "a place and places")]
fn cursors_of(
    tables: &mut Tables<'_>,
    from: (u64, u64),
    subscription: u64,
) -> Result<(Option<(u64, u64)>, Vec<(u64, u64)>), Trouble> {
    let mut found = Vec::new();
    for (seen, entry) in tables.cursors.open()?.range(from..)?.enumerate() {
        let key = entry?.0.value();
        if seen >= PIECE_ROWS {
            return Ok((Some(key), found));
        }
        if key.1 == subscription {
            found.push(key);
        }
    }
    Ok((None, found))
}

/// Removes the first rows of a range.
fn remove_some<K>(
    table: &mut Table<'_, K, Row>,
    range: RangeInclusive<K>,
    limit: usize,
) -> Result<usize, Trouble>
where
    K: Key + for<'a> Value<SelfType<'a> = K> + Copy + 'static,
{
    let keys = table.range(range)?.take(limit);
    let keys: Vec<K> =
        keys.map(|entry| entry.map(|(key, _)| key.value())).collect::<Result<_, _>>()?;
    for key in &keys {
        table.remove(*key)?;
    }
    Ok(keys.len())
}

fn sweep_piece(
    tables: &mut Tables<'_>,
    state: &mut State,
    from: (u64, u128),
    age: Age,
) -> Result<(usize, Option<(u64, u128)>), Trouble> {
    let horizon = clock::millis(limits::SESSION_HORIZON);
    let mut old = Vec::new();
    let mut next = None;
    for (seen, entry) in tables.publishers.open()?.range(from..)?.enumerate() {
        let (key, row) = entry?;
        let key = key.value();
        if seen >= PIECE_ROWS {
            next = Some(key);
            break;
        }
        let row = decoded::<(u64, u128), _>("publishers", &key, row.value(), rows::decode);
        if row.is_ok_and(|row: Publisher| row.used.after(horizon) <= age) {
            old.push(key);
        }
    }
    for (topic, id) in &old {
        tables.publishers.open()?.remove((*topic, *id))?;
        state.forget(Epoch(*topic), Uuid(id.to_be_bytes()));
    }
    state.publisher_rows = tables.publishers.open()?.len()?;
    Ok((old.len(), next))
}
