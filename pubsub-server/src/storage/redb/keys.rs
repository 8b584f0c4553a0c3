//! Idempotency keys: in chunks that are appended to their table, and found by an index in memory.
//!
//! A key is random, so that a table sorted by it has most of its pages rewritten for a few thousand new
//! ones. Here a key is written once, beside those that came with it, and goes with them. The index says
//! where each one is and is made again at each start; what is found is read and compared, so that two
//! keys are never taken for one.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{BuildHasher, Hasher};
use std::ops::RangeInclusive;

use ::redb::{ReadableTable, StorageError, Table, TableHandle};
use bytes::{Buf, BufMut};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::tables::{Damaged, KEYS, Row, Trouble, get, put, unsealed};
use crate::names::TopicName;
use crate::record::{Epoch, Timestamp};
use crate::storage::admission::{KeyRow, NewKey};
use crate::storage::clock::Age;

/// hash, content, sequence, time, age of expiry
const KEY_BYTES: usize = 16 + 32 + 8 + 8 + 8;
/// Keys of a chunk: as many as just fit into two pages of redb's.
const CHUNK_KEYS: usize = 113;
/// Places of a chunk, as a power of two.
const OFFSET_BITS: u32 = 8;
/// Chunks that one piece of housekeeping removes: a megabyte.
const PIECE_CHUNKS: usize = 128;

/// A key of a topic.
type TopicKey = (Epoch, [u8; 16]);
type KeyTable<'t> = Table<'t, (u64, u64), Row>;

/// What is remembered of keys.
#[derive(Debug)]
pub(super) struct Keys {
    seed: Seeded,
    /// Those in no chunk yet: they are in the log, or the commit that runs adds them.
    fresh: HashMap<TopicKey, KeyRow, Seeded>,
    /// Places by fingerprint. All together there are [`crate::limits::MAX_IDEMPOTENCY_KEYS`] at most.
    index: HashMap<u64, Place, Seeded>,
    /// Those whose fingerprint another one has: hardly ever any.
    others: HashMap<TopicKey, Place>,
    /// The chunks of each topic that has any.
    runs: BTreeMap<Epoch, Vec<Run>>,
    /// Chunks that could not be read when the index was made: what they hold is not in it.
    damaged: BTreeSet<(Epoch, u64)>,
    /// The number of the next chunk, of whatever topic.
    next: u64,
    #[cfg(test)]
    mask: u64,
}

/// The number of a chunk, and which of its keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place(u64);

/// The keys of a chunk as they are stored.
#[derive(Clone, Copy)]
struct Chunk<'r>(&'r [[u8; KEY_BYTES]]);

/// Chunks of a topic of which none expires before an earlier one. If the window of the topic gets
/// shorter, another run begins.
#[derive(Clone, Copy, Debug)]
struct Run {
    first: u64,
    last: u64,
    /// The first one does not expire earlier.
    expires: Age,
    /// When the last one does.
    latest: Age,
}

/// Hashes with a seed that nobody knows, so that keys cannot be chosen to collide.
#[derive(Clone, Copy, Debug)]
struct Seeded(u64);

/// For fingerprints, which it leaves as they are, and for keys of topics.
struct Hashed(u64);

impl BuildHasher for Seeded {
    type Hasher = Hashed;

    fn build_hasher(&self) -> Hashed {
        Hashed(self.0)
    }
}

impl Hasher for Hashed {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        self.0 = xxh3_64_with_seed(bytes, self.0);
    }

    fn write_u64(&mut self, number: u64) {
        self.0 ^= number;
    }

    fn write_usize(&mut self, _: usize) {
        // The length of a key, which is always the same.
    }
}

impl Keys {
    /// None yet. Nobody else knows the seed.
    pub(super) fn new(seed: u64) -> Self {
        Self {
            seed: Seeded(seed),
            fresh: HashMap::with_hasher(Seeded(seed)),
            index: HashMap::with_hasher(Seeded(0)),
            others: HashMap::new(),
            runs: BTreeMap::new(),
            damaged: BTreeSet::new(),
            next: 1,
            #[cfg(test)]
            mask: u64::MAX,
        }
    }

    /// Reads what is stored of known topics. What of it is damaged has expired at `latest`.
    pub(super) fn load(
        mut self,
        table: &(impl ReadableTable<(u64, u64), Row> + TableHandle),
        topics: &HashMap<Epoch, &TopicName>,
        latest: Age,
    ) -> Result<Self, Trouble> {
        for entry in table.iter()? {
            let (key, row) = entry?;
            let (topic, chunk) = (Epoch(key.value().0), key.value().1);
            self.next = self.next.max(chunk.saturating_add(1));
            let Some(name) = topics.get(&topic) else { continue };
            let expires = match Chunk::read(&key.value(), row.value()) {
                Ok(found) => {
                    self.note(table, (topic, chunk), found.keys().map(|(hash, _)| hash))?;
                    found.expires()
                }
                Err(damaged) => {
                    // Nobody can say any more what is new in this topic. The others go on.
                    tracing::error!(topic = %name, %damaged, "no new idempotency keys are taken");
                    self.damaged.insert((topic, chunk));
                    latest
                }
            };
            self.append_chunk(topic, chunk, expires);
        }
        Ok(self)
    }

    /// How many there are. One that is used again after its time may count twice for a while.
    pub(super) fn len(&self) -> u64 {
        (self.fresh.len() + self.index.len() + self.others.len()) as u64
    }

    /// Remembers keys that the caller stores in the same commit.
    pub(super) fn add(&mut self, topic: Epoch, keys: &[NewKey]) {
        self.fresh.extend(keys.iter().map(|(hash, row)| ((topic, *hash), *row)));
    }

    /// A key that is in no chunk yet.
    pub(super) fn fresh(&self, topic: Epoch, hash: &[u8; 16]) -> Option<KeyRow> {
        self.fresh.get(&(topic, *hash)).copied()
    }

    /// A key that is in a chunk, unless its time is over.
    pub(super) fn find(
        &self,
        table: &(impl ReadableTable<(u64, u64), Row> + TableHandle),
        (topic, hash): TopicKey,
        age: Age,
    ) -> Result<Option<KeyRow>, Trouble> {
        let row = self.stored(table, &(topic, hash))?.filter(|row| row.expires > age);
        // It may be in what cannot be read, also if it was used before.
        if row.is_none() && self.has_damage(topic) {
            return Err(Damaged::in_table(KEYS.name()).into());
        }
        Ok(row)
    }

    fn has_damage(&self, topic: Epoch) -> bool {
        self.damaged.range(chunks_of(topic)).next().is_some()
    }

    /// A key of a chunk, whether it has expired or not.
    fn stored(
        &self,
        table: &(impl ReadableTable<(u64, u64), Row> + TableHandle),
        key: &TopicKey,
    ) -> Result<Option<KeyRow>, Trouble> {
        let places = [self.others.get(key), self.index.get(&self.fingerprint(key))];
        for place in places.into_iter().flatten() {
            let (topic, hash) = key;
            let at = |row: &[u8]| Chunk::of(row)?.keys().nth(place.offset());
            let found = get(table, (topic.0, place.chunk()), at)?;
            // There is none if it is a key of another topic.
            match found {
                Some((found, row)) if found == *hash => return Ok(Some(row)),
                Some(_) | None => {}
            }
        }
        Ok(None)
    }

    fn fingerprint(&self, key: &TopicKey) -> u64 {
        let fingerprint = self.seed.hash_one(key);
        #[cfg(test)]
        let fingerprint = fingerprint & self.mask;
        fingerprint
    }

    /// Writes keys of a topic, in the order in which they were used, to chunks.
    pub(super) fn store(
        &mut self,
        table: &mut KeyTable<'_>,
        topic: Epoch,
        keys: &[NewKey],
    ) -> Result<(), Trouble> {
        for keys in keys.chunks(CHUNK_KEYS) {
            let chunk = self.next;
            self.next += 1;
            put(table, (topic.0, chunk), encode(keys))?;
            self.note(table, (topic, chunk), keys.iter().map(|(hash, _)| *hash))?;
            let expire = keys.iter().map(|(_, row)| row.expires);
            self.append_chunk(topic, chunk, expire.max().unwrap_or_default());
        }
        Ok(())
    }

    /// All that was added is in chunks.
    pub(super) fn settled(&mut self) {
        self.fresh.clear();
    }

    /// Remembers where the keys of a chunk are, instead of where they were. It is in the table already.
    fn note(
        &mut self,
        table: &(impl ReadableTable<(u64, u64), Row> + TableHandle),
        (topic, chunk): (Epoch, u64),
        hashes: impl Iterator<Item = [u8; 16]>,
    ) -> Result<(), Trouble> {
        for (offset, hash) in hashes.enumerate() {
            let (key, place) = ((topic, hash), Place::new(chunk, offset));
            let fingerprint = self.fingerprint(&key);
            // The same key, used again after its time, stays where it is; another one with its
            // fingerprint is one of the others.
            let is_other = self.others.contains_key(&key)
                || self.index.contains_key(&fingerprint)
                    && match self.stored(table, &key) {
                        Ok(known) => known.is_none(),
                        Err(Trouble::Damaged(_)) => true,
                        Err(trouble @ Trouble::Redb(_)) => return Err(trouble),
                    };
            if is_other {
                self.others.insert(key, place);
            } else {
                self.index.insert(fingerprint, place);
            }
        }
        Ok(())
    }

    /// Takes over when a chunk of a topic expires.
    fn append_chunk(&mut self, topic: Epoch, chunk: u64, expires: Age) {
        let runs = self.runs.entry(topic).or_default();
        match runs.last_mut() {
            Some(run) if run.latest <= expires => (run.last, run.latest) = (chunk, expires),
            Some(_) | None => {
                runs.push(Run { first: chunk, last: chunk, expires, latest: expires });
            }
        }
    }

    /// Removes some chunks of which all keys have expired, and says whether there were any.
    pub(super) fn expire(&mut self, table: &mut KeyTable<'_>, age: Age) -> Result<bool, Trouble> {
        while let Some((topic, number)) = self.due(age) {
            let run = self.runs.get(&topic).and_then(|runs| runs.get(number)).copied();
            let Some(run) = run else { return Ok(false) };
            let (expired, rest) = run.expired(table, topic, age)?;
            for chunk in &expired {
                self.remove(table, topic, *chunk)?;
            }
            self.replace(topic, number, rest);
            if !expired.is_empty() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether some keys may have expired.
    pub(super) fn is_due(&self, age: Age) -> bool {
        self.due(age).is_some()
    }

    /// A run of a topic whose first chunk may have expired.
    fn due(&self, age: Age) -> Option<(Epoch, usize)> {
        self.runs.iter().find_map(|(topic, runs)| {
            Some((*topic, runs.iter().position(|run| run.expires <= age)?))
        })
    }

    /// Puts what is left of a run in its place.
    fn replace(&mut self, topic: Epoch, number: usize, rest: Option<Run>) {
        let Some(runs) = self.runs.get_mut(&topic) else { return };
        match rest {
            Some(rest) => runs[number] = rest,
            None => drop(runs.remove(number)),
        }
        if runs.is_empty() {
            self.runs.remove(&topic);
        }
    }

    /// Takes a topic out that is deleted. Its chunks stay in the table until they are collected.
    pub(super) fn drop_topic(&mut self, topic: Epoch) {
        self.runs.remove(&topic);
        self.damaged.retain(|(of, _)| *of != topic);
    }

    /// Removes some chunks of a topic that is deleted, and says how many.
    pub(super) fn collect(
        &mut self,
        table: &mut KeyTable<'_>,
        topic: Epoch,
    ) -> Result<usize, Trouble> {
        let range = (topic.0, 0)..=(topic.0, u64::MAX);
        let chunks = table.range(range)?.take(PIECE_CHUNKS);
        let chunks: Vec<u64> =
            chunks.map(|entry| Ok(entry?.0.value().1)).collect::<Result<_, StorageError>>()?;
        for chunk in &chunks {
            self.remove(table, topic, *chunk)?;
        }
        Ok(chunks.len())
    }

    fn remove(
        &mut self,
        table: &mut KeyTable<'_>,
        topic: Epoch,
        chunk: u64,
    ) -> Result<(), Trouble> {
        let Some(row) = table.remove((topic.0, chunk))? else { return Ok(()) };
        match Chunk::read(&(topic.0, chunk), row.value()) {
            Ok(keys) => {
                for (offset, (hash, _)) in keys.keys().enumerate() {
                    self.leave(&(topic, hash), Place::new(chunk, offset));
                }
            }
            Err(_) => {
                self.index.retain(|_, place| place.chunk() != chunk);
                self.others.retain(|_, place| place.chunk() != chunk);
            }
        }
        self.damaged.remove(&(topic, chunk));
        Ok(())
    }

    /// Forgets a key at a place. It may have been used again since, and be at another one.
    fn leave(&mut self, key: &TopicKey, place: Place) {
        let fingerprint = self.fingerprint(key);
        if self.index.get(&fingerprint) == Some(&place) {
            self.index.remove(&fingerprint);
        } else if self.others.get(key) == Some(&place) {
            self.others.remove(key);
        }
    }
}

impl Run {
    /// Some chunks from its start on that have expired, and the run without them.
    fn expired(
        self,
        table: &KeyTable<'_>,
        topic: Epoch,
        age: Age,
    ) -> Result<(Vec<u64>, Option<Self>), Trouble> {
        let mut expired = Vec::new();
        // Of which nobody knows when they expire: with the next one at the latest.
        let mut doubtful = Vec::new();
        for entry in table.range((topic.0, self.first)..=(topic.0, self.last))? {
            let (key, row) = entry?;
            let chunk = key.value().1;
            let expires = Chunk::read(&key.value(), row.value()).map(Chunk::expires);
            if expired.len() >= PIECE_CHUNKS {
                // To be looked at again.
                return Ok((expired, Some(Self { first: chunk, expires: age, ..self })));
            }
            match expires {
                Ok(expires) if expires > age => {
                    let first = doubtful.first().copied().unwrap_or(chunk);
                    return Ok((expired, Some(Self { first, expires, ..self })));
                }
                Ok(_) => {
                    expired.append(&mut doubtful);
                    expired.push(chunk);
                }
                Err(_) => doubtful.push(chunk),
            }
        }
        let rest = match doubtful.first() {
            Some(first) if self.latest > age => {
                Some(Self { first: *first, expires: self.latest, ..self })
            }
            Some(_) | None => {
                expired.append(&mut doubtful);
                None
            }
        };
        Ok((expired, rest))
    }
}

impl Place {
    fn new(chunk: u64, offset: usize) -> Self {
        Self(chunk << OFFSET_BITS | offset as u64)
    }

    fn chunk(self) -> u64 {
        self.0 >> OFFSET_BITS
    }

    fn offset(self) -> usize {
        usize::try_from(self.0 % (1 << OFFSET_BITS)).expect("it is one of few")
    }
}

impl<'r> Chunk<'r> {
    fn read(key: &(u64, u64), row: &'r [u8]) -> Result<Self, Damaged> {
        Self::of(unsealed::<(u64, u64)>(KEYS.name(), key, row)?)
            .ok_or_else(|| Damaged::in_table(KEYS.name()))
    }

    fn of(row: &'r [u8]) -> Option<Self> {
        let (keys, rest) = row.as_chunks();
        let fits = rest.is_empty() && (1..=1 << OFFSET_BITS).contains(&keys.len());
        fits.then_some(Self(keys))
    }

    fn keys(self) -> impl Iterator<Item = NewKey> + use<'r> {
        self.0.iter().map(decode)
    }

    /// When the last of its keys does.
    fn expires(self) -> Age {
        self.keys().map(|(_, row)| row.expires).max().unwrap_or_default()
    }
}

fn chunks_of(topic: Epoch) -> RangeInclusive<(Epoch, u64)> {
    (topic, 0)..=(topic, u64::MAX)
}

/// Encodes keys as they are in a chunk and in the log.
pub(super) fn encode(keys: &[NewKey]) -> Vec<u8> {
    let mut row = Vec::with_capacity(keys.len() * KEY_BYTES + size_of::<u64>());
    for (hash, KeyRow { content, sequence, at, expires }) in keys {
        row.put_slice(hash);
        row.put_slice(content);
        row.put_u64_le(*sequence);
        row.put_u64_le(at.0);
        row.put_u64_le(expires.0);
    }
    row
}

/// Decodes keys of the log.
pub(super) fn decode_all(row: &[u8]) -> Option<Vec<NewKey>> {
    let (keys, rest) = row.as_chunks();
    rest.is_empty().then(|| keys.iter().map(decode).collect())
}

fn decode(bytes: &[u8; KEY_BYTES]) -> NewKey {
    let (mut hash, mut content) = ([0; 16], [0; 32]);
    let mut rest: &[u8] = bytes;
    rest.copy_to_slice(&mut hash);
    rest.copy_to_slice(&mut content);
    let (sequence, at, expires) = (rest.get_u64_le(), rest.get_u64_le(), rest.get_u64_le());
    (hash, KeyRow { content, sequence, at: Timestamp(at), expires: Age(expires) })
}

#[cfg(test)]
#[path = "keys_tests.rs"]
mod tests;
