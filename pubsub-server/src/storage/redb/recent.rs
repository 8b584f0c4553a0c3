//! Rows of messages that are kept in memory: the newest ones, for those who receive what is published
//! just now, and those that were read from disk last, for those who go on from there.
//!
//! It holds nothing but what is committed, and nothing of which a checksum has not been verified, or
//! made here. Whether a message can be read at all is for the reader to say: rows of topics that were
//! trimmed or deleted stay until others need their room.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use super::rows::{BatchHeader, Finder};
use crate::limits;
use crate::record::{Epoch, StoredMessage, Timestamp};

/// A row of which every message can be read.
#[derive(Clone, Debug)]
pub(super) struct Row {
    topic: Epoch,
    base: u64,
    /// The sequence after the last one.
    end: u64,
    at: Timestamp,
    bytes: Bytes,
}

impl Row {
    /// One that was encoded here.
    pub(super) fn of(header: BatchHeader, bytes: Bytes) -> Self {
        let BatchHeader { topic, base, at, .. } = header;
        Self { topic, base, end: header.end(), at, bytes }
    }

    /// One that was read, if no message of it is damaged.
    pub(super) fn verified(header: BatchHeader, bytes: &Bytes) -> Option<Self> {
        let mut finder = Finder::new(header.count, bytes)?;
        for sequence in header.base..header.end() {
            let found = finder.next(bytes)?;
            if !found.is_sound(header.topic, sequence, bytes) {
                return None;
            }
            found.recipients(bytes)?;
        }
        Some(Self::of(header, bytes.clone()))
    }

    /// Its messages from a sequence on.
    pub(super) fn messages(&self, from: u64) -> impl Iterator<Item = StoredMessage> {
        let count = u32::try_from(self.end - self.base).unwrap_or(u32::MAX);
        let mut finder = Finder::new(count, &self.bytes);
        (self.base..self.end)
            .map_while(move |sequence| Some((sequence, finder.as_mut()?.next(&self.bytes)?)))
            .skip_while(move |(sequence, _)| *sequence < from)
            .map_while(|(sequence, found)| found.message(sequence, self.at, &self.bytes))
    }

    fn size(&self) -> usize {
        self.bytes.len() + limits::MESSAGE_OVERHEAD_BYTES
    }
}

/// The rows in memory.
#[derive(Debug)]
pub(super) struct Recent(Mutex<Both>);

#[derive(Debug)]
struct Both {
    written: Rows,
    read: Rows,
}

impl Default for Recent {
    fn default() -> Self {
        let written = Rows::new(limits::RECENT_BYTES);
        let read = Rows::new(limits::READ_BYTES);
        Self(Mutex::new(Both { written, read }))
    }
}

impl Recent {
    /// These are committed, and nobody has been told so.
    pub(super) fn keep_written(&self, rows: Vec<Row>) {
        if !rows.is_empty() {
            let mut both = self.lock();
            rows.into_iter().for_each(|row| both.written.keep(row));
        }
    }

    /// This one was read from disk.
    pub(super) fn keep_read(&self, row: Row) {
        self.lock().read.keep(row);
    }

    /// The row that has a message, if it is here.
    pub(super) fn find(&self, topic: Epoch, sequence: u64) -> Option<Row> {
        let both = self.lock();
        both.written.find(topic, sequence).or_else(|| both.read.find(topic, sequence)).cloned()
    }

    /// Nothing is certain any more.
    pub(super) fn clear(&self) {
        *self.lock() = Self::default().0.into_inner().unwrap_or_else(PoisonError::into_inner);
    }

    /// A panic elsewhere leaves rows that are each valid.
    fn lock(&self) -> MutexGuard<'_, Both> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Rows up to so many bytes. The oldest go first.
#[derive(Debug)]
struct Rows {
    most: usize,
    bytes: usize,
    order: VecDeque<(Epoch, u64)>,
    rows: BTreeMap<(Epoch, u64), Row>,
}

impl Rows {
    fn new(most: usize) -> Self {
        Self { most, bytes: 0, order: VecDeque::new(), rows: BTreeMap::new() }
    }

    fn keep(&mut self, row: Row) {
        // One that would take the room of all others is not worth it.
        if row.size() > self.most / 4 || self.rows.contains_key(&(row.topic, row.base)) {
            return;
        }
        self.bytes += row.size();
        self.order.push_back((row.topic, row.base));
        self.rows.insert((row.topic, row.base), row);
        while self.bytes > self.most {
            let Some(oldest) = self.order.pop_front() else { return };
            self.bytes -= self.rows.remove(&oldest).map_or(0, |row| row.size());
        }
    }

    fn find(&self, topic: Epoch, sequence: u64) -> Option<&Row> {
        let before = self.rows.range((topic, 0)..=(topic, sequence)).next_back();
        before.map(|(_, row)| row).filter(|row| sequence < row.end)
    }
}

#[cfg(test)]
mod tests {
    use super::super::rows::{BATCH_HEADER_BYTES, decode_header, encode_batch};
    use super::*;
    use crate::names::SubscriptionName;
    use crate::record::NewMessage;

    const TOPIC: Epoch = Epoch(7);

    fn encoded(base: u64, count: usize, size: usize) -> Bytes {
        let message = |number: usize| NewMessage {
            body: vec![7; size].into(),
            recipients: (0..number % 3)
                .map(|name| SubscriptionName::parse(&format!("s{name}")).unwrap())
                .collect(),
            key: None,
        };
        let messages: Vec<_> = (0..count).map(message).collect();
        encode_batch(TOPIC, base, Timestamp(5), &messages).into()
    }

    fn row(base: u64, count: usize, size: usize) -> Row {
        let bytes = encoded(base, count, size);
        Row::verified(decode_header(TOPIC, base, &bytes).unwrap(), &bytes).unwrap()
    }

    #[test]
    fn a_row_has_the_messages_that_were_written() {
        let bytes = encoded(10, 5, 100);
        let header = decode_header(TOPIC, 10, &bytes).unwrap();
        let expected = super::super::rows::Messages::new(header, bytes.clone());
        let expected: Vec<_> = expected.map(Result::unwrap).collect();
        let row = row(10, 5, 100);
        for from in 8..16 {
            let after = expected.iter().filter(|message| message.sequence >= from);
            assert!(row.messages(from).eq(after.cloned()), "{from}");
        }
    }

    #[test]
    fn no_row_with_damage_is_kept() {
        let bytes = encoded(10, 3, 20);
        let header = decode_header(TOPIC, 10, &bytes).unwrap();
        for place in BATCH_HEADER_BYTES..bytes.len() {
            let mut damaged = bytes.to_vec();
            damaged[place] ^= 1;
            assert!(Row::verified(header, &damaged.into()).is_none(), "{place}");
            assert!(Row::verified(header, &bytes.slice(..place)).is_none(), "{place}");
        }
    }

    #[test]
    fn they_are_bounded_and_the_oldest_go_first() {
        let recent = Recent::default();
        let of = |number: u64| row(10 * number + 1, 10, 10_000);
        let many = 2 * limits::RECENT_BYTES as u64 / 100_000;
        for number in 0..many {
            recent.keep_written(vec![of(number)]);
            recent.keep_read(of(number));
        }
        let both = recent.lock();
        for (rows, most) in
            [(&both.written, limits::RECENT_BYTES), (&both.read, limits::READ_BYTES)]
        {
            let bytes: usize = rows.rows.values().map(Row::size).sum();
            assert_eq!((rows.bytes, rows.order.len()), (bytes, rows.rows.len()));
            assert!((most - 200_000..=most).contains(&bytes), "{bytes} of {most}");
        }
        drop(both);
        assert!(recent.find(TOPIC, 5).is_none());
        let last = 10 * many;
        assert_eq!(recent.find(TOPIC, last).unwrap().messages(last).count(), 1);
        assert!(recent.find(TOPIC, last + 1).is_none());
        assert!(recent.find(Epoch(6), last).is_none() && recent.find(Epoch(8), last).is_none());
        recent.keep_written(vec![row(last + 1, 1, limits::RECENT_BYTES / 2)]);
        assert!(recent.find(TOPIC, last + 1).is_none(), "too large");
        recent.clear();
        assert!(recent.find(TOPIC, last).is_none());
    }
}
