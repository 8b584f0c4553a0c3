use std::collections::BTreeMap;

use ::redb::backends::InMemoryBackend;
use ::redb::{Builder, Database, ReadableDatabase};

use super::*;
use crate::storage::testing::Random;

const T: Epoch = Epoch(7);
const WEEK: u64 = 7 * 24 * 3_600_000;

/// Keys with their table, of which every step is a transaction.
struct Lab {
    database: Database,
    keys: Keys,
}

impl Lab {
    /// `mask` is what there is of fingerprints.
    fn new(mask: u64) -> Self {
        let database = Builder::new().create_with_backend(InMemoryBackend::new()).unwrap();
        let keys = Keys { mask, ..Keys::new(3) };
        let mut lab = Self { database, keys };
        lab.write(|_, _| ());
        lab
    }

    fn write<T>(&mut self, work: impl FnOnce(&mut Keys, &mut KeyTable<'_>) -> T) -> T {
        let txn = self.database.begin_write().unwrap();
        let done = work(&mut self.keys, &mut txn.open_table(KEYS).unwrap());
        txn.commit().unwrap();
        done
    }

    /// Stores keys that are used at an age and expire at another one.
    fn store(&mut self, topic: Epoch, numbers: impl IntoIterator<Item = u64>, expires: u64) {
        let keys: Vec<_> = numbers.into_iter().map(|number| key(number, expires)).collect();
        self.keys.add(topic, &keys);
        self.write(|all, table| all.store(table, topic, &keys).unwrap());
        self.keys.settled();
    }

    /// When a key expires, if it is known at an age.
    fn find(&self, topic: Epoch, number: u64, age: u64) -> Result<Option<u64>, Trouble> {
        let (hash, _) = key(number, 0);
        let table = self.database.begin_read().unwrap().open_table(KEYS).unwrap();
        let found = self.keys.find(&table, (topic, hash), Age(age))?;
        assert!(found.is_none_or(|row| row.sequence == number), "one key is taken for another");
        Ok(found.map(|row| row.expires.0))
    }

    fn expires(&self, topic: Epoch, number: u64) -> Option<u64> {
        self.find(topic, number, 0).unwrap()
    }

    /// Removes what can be removed.
    fn expire(&mut self, age: u64) {
        while self.write(|keys, table| keys.expire(table, Age(age)).unwrap()) {}
        assert!(!self.keys.is_due(Age(age)));
    }

    fn chunks(&mut self) -> Vec<(u64, u64)> {
        self.write(|_, table| table.iter().unwrap().map(|entry| entry.unwrap().0.value()).collect())
    }

    fn damage(&mut self, chunk: (u64, u64)) {
        self.write(|_, table| {
            let mut row = table.get(chunk).unwrap().unwrap().value().to_vec();
            row[40] ^= 1;
            table.insert(chunk, row.as_slice()).unwrap();
        });
    }

    /// As after a start, at which what is damaged has expired at an age.
    fn restart(&mut self, topics: &[Epoch], latest: u64) {
        let name = TopicName::parse("t").unwrap();
        let names = topics.iter().map(|topic| (*topic, &name)).collect();
        let keys = Keys { mask: self.keys.mask, ..Keys::new(4) };
        self.keys = self.write(|_, table| keys.load(table, &names, Age(latest)).unwrap());
    }
}

/// The sequence says which one it is.
fn key(number: u64, expires: u64) -> NewKey {
    let mut hash = [9; 16];
    hash[3..11].copy_from_slice(&number.to_le_bytes());
    let (sequence, at) = (number, Timestamp(expires));
    (hash, KeyRow { content: [5; 32], sequence, at, expires: Age(expires) })
}

#[test]
fn keys_of_one_fingerprint_are_two() {
    let mut lab = Lab::new(0);
    lab.store(T, [1, 2, 3], 10);
    lab.store(Epoch(8), [1], 20);
    let all = |lab: &Lab| [1, 2, 3].map(|number| lab.expires(T, number));
    for _ in 0..2 {
        assert_eq!(all(&lab), [Some(10); 3]);
        assert_eq!((lab.expires(Epoch(8), 1), lab.expires(Epoch(8), 2)), (Some(20), None));
        assert_eq!((lab.expires(T, 4), lab.keys.len()), (None, 4));
        lab.restart(&[T, Epoch(8)], 0);
    }
    // Used again after their time: the one in the index, and one of the others.
    lab.store(T, [1, 2], 30);
    assert_eq!(all(&lab), [Some(30), Some(30), Some(10)]);
    lab.expire(10);
    assert_eq!(all(&lab), [Some(30), Some(30), None]);
    assert_eq!((lab.expires(Epoch(8), 1), lab.keys.len()), (Some(20), 3));
    // Whoever was in the index has made room there. The others stay where they are.
    lab.expire(20);
    lab.store(T, [3], 40);
    lab.expire(30);
    lab.store(T, [1], 50);
    lab.store(T, [3], 60);
    assert_eq!(all(&lab), [Some(50), None, Some(60)]);
    lab.expire(60);
    assert_eq!((all(&lab), lab.keys.len(), lab.chunks()), ([None; 3], 0, vec![]));
}

#[test]
fn a_shorter_window_is_not_kept_waiting_by_a_longer_one() {
    let mut lab = Lab::new(u64::MAX);
    for expires in [WEEK, WEEK + 1, 100, 110, 120, WEEK + 2, 130] {
        lab.store(T, [expires], expires);
    }
    for restart in [true, false] {
        lab.expire(99);
        assert_eq!(lab.keys.len(), 7);
        lab.expire(110);
        assert_eq!((lab.expires(T, 100), lab.expires(T, 110)), (None, None));
        assert_eq!((lab.expires(T, 120), lab.keys.len()), (Some(120), 5));
        if restart {
            lab.restart(&[T], 0);
            lab.store(T, [100, 110], 110);
        }
    }
    lab.expire(WEEK);
    assert_eq!((lab.keys.len(), lab.expires(T, WEEK + 2)), (2, Some(WEEK + 2)));
    lab.expire(WEEK + 2);
    assert_eq!((lab.keys.len(), lab.chunks()), (0, vec![]));
}

#[test]
fn many_chunks_go_in_pieces() {
    let mut lab = Lab::new(u64::MAX);
    let chunk = CHUNK_KEYS as u64;
    let count = (2 * PIECE_CHUNKS as u64 + 5) * chunk;
    lab.store(T, 0..count, 10);
    lab.store(Epoch(8), 0..count, 20);
    assert_eq!((lab.keys.len(), lab.chunks().len()), (2 * count, 4 * PIECE_CHUNKS + 10));
    let piece = lab.write(|keys, table| keys.expire(table, Age(10)).unwrap());
    assert!(piece && lab.keys.is_due(Age(10)));
    assert_eq!(lab.keys.len(), 2 * count - PIECE_CHUNKS as u64 * chunk);
    lab.expire(10);
    assert_eq!((lab.keys.len(), lab.keys.runs.len()), (count, 1));
    lab.keys.drop_topic(Epoch(8));
    let mut pieces = Vec::new();
    while pieces.last() != Some(&0) {
        pieces.push(lab.write(|keys, table| keys.collect(table, Epoch(8)).unwrap()));
    }
    assert_eq!(pieces, [PIECE_CHUNKS, PIECE_CHUNKS, 5, 0]);
    assert_eq!((lab.keys.len(), lab.chunks(), lab.keys.is_due(Age(20))), (0, vec![], false));
}

#[test]
fn what_is_damaged_at_a_start_makes_its_topic_doubtful_until_it_has_expired() {
    let mut lab = Lab::new(u64::MAX);
    for (number, expires) in [(1, 10), (2, 20), (3, 30)] {
        lab.store(T, [number], expires);
    }
    lab.store(Epoch(8), [1], 20);
    let second = lab.chunks()[1];
    lab.damage(second);
    lab.restart(&[T, Epoch(8)], 25);
    for number in [2, 4] {
        assert!(matches!(lab.find(T, number, 0), Err(Trouble::Damaged(_))), "{number}");
    }
    assert_eq!((lab.expires(T, 1), lab.expires(T, 3)), (Some(10), Some(30)));
    // Nobody knows whether it was used again.
    assert!(matches!(lab.find(T, 1, 10), Err(Trouble::Damaged(_))));
    assert_eq!((lab.expires(Epoch(8), 1), lab.expires(Epoch(8), 2)), (Some(20), None));
    lab.expire(24);
    assert!(matches!(lab.find(T, 4, 0), Err(Trouble::Damaged(_))));
    lab.expire(30);
    assert_eq!((lab.expires(T, 2), lab.expires(T, 4)), (None, None));
    assert_eq!((lab.keys.len(), lab.chunks()), (0, vec![]));
}

#[test]
fn what_is_left_of_a_deleted_topic_is_not_counted() {
    let mut lab = Lab::new(u64::MAX);
    lab.store(T, [1, 2], 10);
    lab.store(Epoch(8), [1, 2, 3], 10);
    lab.restart(&[Epoch(8)], 0);
    assert_eq!((lab.keys.len(), lab.expires(T, 1)), (3, None));
    lab.expire(10);
    assert_eq!((lab.keys.len(), lab.chunks()), (0, vec![(T.0, 1)]));
    assert_eq!(lab.write(|keys, table| keys.collect(table, T).unwrap()), 1);
    assert_eq!((lab.keys.len(), lab.chunks()), (0, vec![]));
}

#[test]
fn what_gets_damaged_later_is_known_to_be_there_and_keeps_nothing_waiting() {
    for mask in [0, u64::MAX] {
        let mut lab = Lab::new(mask);
        for (number, expires) in [(1, 10), (2, 20), (3, 30), (4, 40)] {
            lab.store(T, [number], expires);
        }
        let chunks = lab.chunks();
        lab.damage(chunks[1]);
        assert!(matches!(lab.find(T, 2, 0), Err(Trouble::Damaged(_))));
        assert_eq!((lab.expires(T, 1), lab.expires(T, 3)), (Some(10), Some(30)));
        assert_eq!(lab.expires(T, 5), None, "all that is damaged is known");
        lab.expire(20);
        assert_eq!(lab.chunks(), chunks[1..], "it goes with the next one");
        lab.damage(chunks[3]);
        lab.expire(30);
        assert_eq!((lab.chunks(), lab.keys.len()), (chunks[3..].to_vec(), 1));
        assert_eq!((lab.expires(T, 2), lab.expires(T, 5)), (None, None));
        assert!(matches!(lab.find(T, 4, 0), Err(Trouble::Damaged(_))));
        lab.expire(40);
        assert_eq!((lab.keys.len(), lab.chunks()), (0, vec![]));
    }
}

/// What should be known, kept in the plainest way: when each key expires.
type Naive = BTreeMap<(Epoch, u64), u64>;

fn agree(lab: &Lab, naive: &Naive, topics: &[Epoch], age: u64) {
    for topic in topics {
        for number in 0..40 {
            let expected = naive.get(&(*topic, number)).filter(|expires| **expires > age);
            assert_eq!(lab.find(*topic, number, age).unwrap().as_ref(), expected, "{number}");
        }
    }
}

/// Lets keys be used, expire and go, with few fingerprints, so that they have them in common.
fn live(seed: u64) {
    let mut random = Random(seed << 32);
    let mut lab = Lab::new([0, 1, 7, u64::MAX][random.index(4)]);
    let (mut naive, mut age) = (Naive::new(), 0);
    let mut topics = vec![Epoch(1), Epoch(2)];
    for step in 0..150 {
        let topic = topics[random.index(topics.len())];
        match random.below(8) {
            0 => lab.expire(age),
            1 => lab.restart(&topics, 0),
            2 if random.below(4) == 0 => {
                lab.keys.drop_topic(topic);
                topics.retain(|of| *of != topic);
                topics.push(Epoch(10 + step));
                while lab.write(|keys, table| keys.collect(table, topic).unwrap()) > 0 {}
            }
            _ => {
                let expires = age + [1, 5, 20, 100][random.index(4)];
                let is_free = |number: &u64| {
                    naive.get(&(topic, *number)).is_none_or(|expires| *expires <= age)
                };
                let mut numbers: Vec<_> = (0..40).filter(is_free).collect();
                numbers.retain(|_| random.below(8) == 0);
                naive.extend(numbers.iter().map(|number| ((topic, *number), expires)));
                lab.store(topic, numbers, expires);
            }
        }
        agree(&lab, &naive, &topics, age);
        age += random.below(4);
    }
    lab.expire(age + 100);
    assert_eq!((lab.keys.len(), lab.chunks()), (0, vec![]));
}

#[test]
fn keys_are_known_until_they_expire_as_in_a_naive_model() {
    (0..60).for_each(live);
}
