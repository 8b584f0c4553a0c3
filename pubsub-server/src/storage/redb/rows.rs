//! The encodings of rows, without their checksums. `docs/format.md` describes them.
//!
//! Records that people read and extend are postcard; what is written in every commit has a fixed
//! layout; messages have one that is read without copying them.

use std::ops::Range;
use std::sync::LazyLock;

use bytes::{Buf, BufMut, Bytes};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::blobs::Place;
use super::tables::{Damaged, MESSAGES};
use crate::body::{Body, field_len, put_field, read_field};
use crate::names::SubscriptionName;
use crate::record::{Epoch, NewMessage, StoredMessage, Timestamp, Uuid};

use ::redb::TableHandle;

/// Rows of messages stay just below a size of redb's pages: one that is a little larger than a
/// power of two takes twice its bytes on disk.
pub(super) const ROW_BYTES: usize = 64_000;

/// count, body bytes, published at, checksum of these
pub(super) const BATCH_HEADER_BYTES: usize = 4 + 4 + 8 + 8;
/// recipients length, checksum
const ENTRY_BYTES: usize = 2 + SUM_BYTES;
const SUM_BYTES: usize = 8;
/// file, offset, length, checksum of all before
const PLACE_BYTES: usize = 8 + 8 + 4 + SUM_BYTES;
/// In the count of a row: the messages are in a blob file.
const OUTSIDE: u32 = 1 << 31;

pub(super) fn encode<T: Serialize>(record: &T) -> Vec<u8> {
    postcard::to_allocvec(record).expect("records are plain data, which always encodes")
}

pub(super) fn decode<T: DeserializeOwned>(row: &[u8]) -> Option<T> {
    match postcard::take_from_bytes(row) {
        Ok((record, [])) => Some(record),
        Ok(_) | Err(_) => None,
    }
}

pub(super) fn encode_uuid(id: Uuid) -> Vec<u8> {
    id.0.to_vec()
}

pub(super) fn decode_uuid(row: &[u8]) -> Option<Uuid> {
    row.try_into().ok().map(Uuid)
}

/// A uuid or a hash as part of a key.
pub(super) fn wide(bytes: [u8; 16]) -> u128 {
    u128::from_be_bytes(bytes)
}

/// What a topic holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Head {
    /// The last message, 0 if there never was one.
    pub(super) head: u64,
    /// The first message that is not trimmed.
    pub(super) first: u64,
    /// No rows are left of messages below this one.
    pub(super) collected: u64,
    /// Messages below this one were sealed.
    pub(super) sealed_below: u64,
    /// Bytes of the bodies of all rows, here and in sealed files.
    pub(super) bytes: u64,
    /// Those of them that are in blob files.
    pub(super) outside: u64,
    /// When the last message was stored.
    pub(super) last_at: Timestamp,
}

impl Head {
    /// Of a new topic.
    pub(super) fn new() -> Self {
        Self { first: 1, collected: 1, sealed_below: 1, ..Self::default() }
    }

    /// Whether it says what can be.
    pub(super) fn is_sound(&self) -> bool {
        self.first >= 1
            && self.first <= self.head + 1
            && self.sealed_below <= self.head + 1
            && self.collected <= self.first.max(self.sealed_below)
            && self.outside <= self.bytes
    }
}

/// The size of a message in a row.
pub(super) fn encoded_len(message: &NewMessage) -> usize {
    ENTRY_BYTES + field_len(message.body.len()) + recipients_len(message)
}

fn recipients_len(message: &NewMessage) -> usize {
    message.recipients.iter().map(|name| 1 + name.as_str().len()).sum()
}

/// How many messages from the start of a slice share a row: as many as fit, or a large one alone.
pub(super) fn row_length(messages: &[NewMessage]) -> usize {
    let mut size = BATCH_HEADER_BYTES;
    let fits = |message: &&NewMessage| {
        size += encoded_len(message);
        size <= ROW_BYTES
    };
    messages.iter().take_while(fits).count().max(1)
}

/// A row of messages: dense from a sequence on, stored at one time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BatchHeader {
    pub(super) topic: Epoch,
    pub(super) base: u64,
    pub(super) count: u32,
    pub(super) bytes: u32,
    pub(super) at: Timestamp,
    /// Whether the messages are in a blob file, and the row says where.
    pub(super) outside: bool,
}

impl BatchHeader {
    /// What remains of a range that is searched for the first message at or after a time.
    pub(super) fn narrow(&self, time: Timestamp, (low, high): (u64, u64)) -> (u64, u64) {
        if self.at >= time { (low, self.base.max(low)) } else { (self.end(), high) }
    }

    /// Bytes of the bodies that are in a blob file.
    pub(super) fn outside_bytes(&self) -> u64 {
        if self.outside { self.bytes.into() } else { 0 }
    }

    /// The sequence after the last one.
    pub(super) fn end(&self) -> u64 {
        self.base.saturating_add(u64::from(self.count))
    }
}

/// Encodes a row.
pub(super) fn encode_batch(
    topic: Epoch,
    base: u64,
    at: Timestamp,
    messages: &[NewMessage],
) -> Vec<u8> {
    let size: usize = messages.iter().map(encoded_len).sum();
    let mut row = Vec::with_capacity(BATCH_HEADER_BYTES + size);
    let bytes = length(messages.iter().map(|message| message.body.len()).sum());
    let count = length(messages.len());
    put_header(&mut row, &BatchHeader { topic, base, count, bytes, at, outside: false });
    let mut entry = row.len();
    row.put_bytes(0, messages.len() * ENTRY_BYTES);
    let mut recipients = Vec::new();
    for (message, sequence) in messages.iter().zip(base..) {
        let (field, names) = (row.len(), recipients.len());
        put_field(&message.body, &mut row);
        for name in &message.recipients {
            recipients.put_u8(u8::try_from(name.as_str().len()).expect("limits bound a name"));
            recipients.put_slice(name.as_str().as_bytes());
        }
        let names = &recipients[names..];
        let sum = sum_of(topic, sequence, names, &row[field..]);
        let mut fields = &mut row[entry..entry + ENTRY_BYTES];
        fields.put_u16_le(u16::try_from(names.len()).expect("limits bound the recipients"));
        fields.put_u64_le(sum);
        entry += ENTRY_BYTES;
    }
    row.extend_from_slice(&recipients);
    row
}

/// Encodes a row whose messages are in a blob file.
pub(super) fn encode_place(header: BatchHeader, place: Place) -> Vec<u8> {
    let mut row = Vec::with_capacity(BATCH_HEADER_BYTES + PLACE_BYTES);
    put_header(&mut row, &BatchHeader { outside: true, ..header });
    row.put_u64_le(place.file);
    row.put_u64_le(place.offset);
    row.put_u32_le(place.length);
    let sum = sum_at(header.topic, header.base, &row);
    row.put_u64_le(sum);
    row
}

fn put_header(row: &mut Vec<u8>, header: &BatchHeader) {
    let BatchHeader { topic, base, count, bytes, at, outside } = *header;
    row.put_u32_le(if outside { count | OUTSIDE } else { count });
    row.put_u32_le(bytes);
    row.put_u64_le(at.0);
    row.put_u64_le(sum_at(topic, base, row));
}

/// Where the messages of a row are whose header was read, if they are outside.
pub(super) fn decode_place(header: &BatchHeader, row: &[u8]) -> Result<Place, Damaged> {
    let place = || {
        let (summed, sum) = row.split_last_chunk::<SUM_BYTES>()?;
        if u64::from_le_bytes(*sum) != sum_at(header.topic, header.base, summed) {
            return None;
        }
        let mut fields = summed.get(BATCH_HEADER_BYTES..)?;
        let (file, offset) = (fields.try_get_u64_le().ok()?, fields.try_get_u64_le().ok()?);
        let length = fields.try_get_u32_le().ok()?;
        fields.is_empty().then_some(Place { file, offset, length })
    };
    place().ok_or_else(|| Damaged::in_table(MESSAGES.name()))
}

/// What bodies take up in a table, if some of them are outside: a row of 64,000 bytes leaves less than
/// a hundred behind.
pub(super) fn weight(bytes: u64, outside: u64) -> u64 {
    bytes.saturating_sub(outside) + outside / 512
}

/// Reads and verifies the header of a row.
pub(super) fn decode_header(topic: Epoch, base: u64, row: &[u8]) -> Result<BatchHeader, Damaged> {
    let header = || {
        let (mut header, mut sum) =
            row.get(..BATCH_HEADER_BYTES)?.split_at_checked(BATCH_HEADER_BYTES - SUM_BYTES)?;
        if sum.get_u64_le() != sum_at(topic, base, header) {
            return None;
        }
        let (count, bytes) = (header.get_u32_le(), header.get_u32_le());
        let at = Timestamp(header.get_u64_le());
        let (count, outside) = (count & !OUTSIDE, count & OUTSIDE != 0);
        (count > 0).then_some(BatchHeader { topic, base, count, bytes, at, outside })
    };
    header().ok_or_else(|| Damaged::in_table(MESSAGES.name()))
}

/// Where a message is in its row.
#[derive(Clone, Debug)]
pub(super) struct Found {
    sum: u64,
    recipients: Range<usize>,
    field: Range<usize>,
}

impl Found {
    /// Whether it is what was stored.
    pub(super) fn is_sound(&self, topic: Epoch, sequence: u64, row: &[u8]) -> bool {
        let recipients = row.get(self.recipients.clone());
        let summed = recipients.zip(row.get(self.field.clone()));
        summed.is_some_and(|(names, field)| self.sum == sum_of(topic, sequence, names, field))
    }

    pub(super) fn recipients(&self, row: &[u8]) -> Option<Vec<SubscriptionName>> {
        decode_recipients(row.get(self.recipients.clone())?)
    }

    /// The message; it shares the row.
    pub(super) fn message(
        &self,
        sequence: u64,
        published_at: Timestamp,
        row: &Bytes,
    ) -> Option<StoredMessage> {
        let (recipients, body) = (self.recipients(row)?, Body::in_row(row, self.field.start)?);
        Some(StoredMessage { sequence, published_at, recipients, body })
    }
}

/// Finds the messages of a row, one after the other. It verifies nothing.
#[derive(Clone, Copy, Debug)]
pub(super) struct Finder {
    entry: usize,
    field: usize,
    recipients: usize,
}

impl Finder {
    /// Those of a row whose header was read.
    pub(super) fn new(count: u32, row: &[u8]) -> Option<Self> {
        let field = BATCH_HEADER_BYTES + count as usize * ENTRY_BYTES;
        let entries = row.get(BATCH_HEADER_BYTES..field)?.chunks_exact(ENTRY_BYTES);
        let recipients: usize = entries.map(|mut entry| usize::from(entry.get_u16_le())).sum();
        let recipients = row.len().saturating_sub(recipients);
        Some(Self { entry: BATCH_HEADER_BYTES, field, recipients })
    }

    pub(super) fn next(&mut self, row: &[u8]) -> Option<Found> {
        let mut entry = row.get(self.entry..self.entry + ENTRY_BYTES)?;
        let length = usize::from(entry.get_u16_le());
        let recipients = self.recipients + length;
        let end = read_field(row, self.field)?.end;
        let found = Found {
            sum: entry.get_u64_le(),
            // If a length is damaged, those without recipients are found all the same.
            recipients: if length == 0 { 0..0 } else { self.recipients..recipients },
            field: self.field..end,
        };
        *self = Self { entry: self.entry + ENTRY_BYTES, field: end, recipients };
        Some(found)
    }
}

/// The messages of a row in order; after a damaged one there are no more.
#[derive(Debug)]
pub(super) struct Messages {
    header: BatchHeader,
    next: u64,
    finder: Option<Finder>,
    row: Bytes,
}

impl Messages {
    /// Those of a row whose header was read.
    pub(super) fn new(header: BatchHeader, row: Bytes) -> Self {
        Self { header, next: header.base, finder: Finder::new(header.count, &row), row }
    }

    /// Goes on at a sequence of this row. What is passed is not verified, so that a damaged
    /// message does not keep those after it from being read.
    pub(super) fn skip_to(&mut self, sequence: u64) -> Option<()> {
        while self.next < sequence {
            self.finder.as_mut()?.next(&self.row)?;
            self.next += 1;
        }
        Some(())
    }

    fn take(&mut self) -> Option<StoredMessage> {
        let found = self.finder.as_mut()?.next(&self.row)?;
        let sound = found.is_sound(self.header.topic, self.next, &self.row);
        sound.then(|| found.message(self.next, self.header.at, &self.row))?
    }
}

impl Iterator for Messages {
    /// A message, or the sequence of a damaged one.
    type Item = Result<StoredMessage, u64>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.next >= self.header.end() {
            return None;
        }
        let message = self.take().ok_or(self.next);
        self.next = if message.is_ok() { self.next + 1 } else { u64::MAX };
        Some(message)
    }
}

fn decode_recipients(mut bytes: &[u8]) -> Option<Vec<SubscriptionName>> {
    let mut recipients = Vec::new();
    while let Some((length, rest)) = bytes.split_first() {
        let (name, rest) = rest.split_at_checked(usize::from(*length))?;
        recipients.push(SubscriptionName::parse(str::from_utf8(name).ok()?).ok()?);
        bytes = rest;
    }
    Some(recipients)
}

/// The sum of a message.
fn sum_of(topic: Epoch, sequence: u64, recipients: &[u8], field: &[u8]) -> u64 {
    let seed = seed_at(topic, sequence);
    let named = |seed| xxh3_64_with_seed(recipients, seed);
    xxh3_64_with_seed(field, if recipients.is_empty() { seed } else { named(seed) })
}

fn sum_at(topic: Epoch, sequence: u64, bytes: &[u8]) -> u64 {
    xxh3_64_with_seed(bytes, seed_at(topic, sequence))
}

fn seed_at(topic: Epoch, sequence: u64) -> u64 {
    let mut key = [0; 16];
    key[..8].copy_from_slice(&topic.0.to_le_bytes());
    key[8..].copy_from_slice(&sequence.to_le_bytes());
    // As every checksum, but that the name of the table is not hashed for each message.
    static TABLE: LazyLock<u64> = LazyLock::new(|| xxh3_64(MESSAGES.name().as_bytes()));
    xxh3_64_with_seed(&key, *TABLE)
}

fn length(length: usize) -> u32 {
    u32::try_from(length).expect("limits bound a commit")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::testing::message;

    #[test]
    fn a_row_says_where_its_messages_are_or_nothing() {
        let (topic, base) = (Epoch(7), 10);
        let inside = encode_batch(topic, base, Timestamp(5), &[]);
        assert!(decode_header(topic, base, &inside).is_err(), "a row has messages");
        let header =
            BatchHeader { topic, base, count: 3, bytes: 60, at: Timestamp(5), outside: false };
        let place = Place { file: 1, offset: 1 << 40, length: 100 };
        let row = encode_place(header, place);
        let found = decode_header(topic, base, &row).unwrap();
        assert_eq!((found.outside, found.outside_bytes()), (true, 60));
        assert_eq!((found.end(), found.at), (13, Timestamp(5)));
        assert_eq!(decode_place(&found, &row), Ok(place));
        for bit in 0..8 * row.len() {
            let mut damaged = row.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(decode_place(&found, &damaged).is_err(), "{bit}");
        }
        assert!(decode_header(Epoch(8), base, &row).is_err());
    }

    #[test]
    fn a_damaged_length_hides_none_of_the_messages_without_recipients() {
        let (topic, base, count) = (Epoch(7), 10, 4);
        let messages: Vec<_> = (0..count).map(|number| message(vec![number; 20])).collect();
        let row = encode_batch(topic, base, Timestamp(5), &messages);
        let sound = |row: &[u8]| {
            let mut finder = Finder::new(u32::from(count), row).unwrap();
            let found = |sequence| finder.next(row).unwrap().is_sound(topic, sequence, row);
            (base..base + u64::from(count)).map(found).collect::<Vec<_>>()
        };
        assert_eq!(sound(&row), [true; 4]);
        for entry in 0..usize::from(count) {
            for bit in 0..16 {
                let mut damaged = row.clone();
                damaged[BATCH_HEADER_BYTES + entry * ENTRY_BYTES + bit / 8] ^= 1 << (bit % 8);
                let rest: Vec<_> = (0..usize::from(count)).map(|at| at != entry).collect();
                assert_eq!(sound(&damaged), rest, "bit {bit} of entry {entry}");
            }
        }
    }
}
