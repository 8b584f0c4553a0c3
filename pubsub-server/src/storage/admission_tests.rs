use std::convert::Infallible;

use proptest::prelude::*;

use super::super::testing::{anonymous, keyed, message, publisher};
use super::*;
use crate::record::{Epoch, Uuid};

/// Everything that admission decides about, kept in the plainest way.
#[derive(Default)]
struct Naive {
    log: Vec<NewMessage>,
    /// By key: its content, the message, and when it expires.
    keys: HashMap<[u8; 16], ([u8; 32], u64, u64)>,
    epoch: u32,
    stream: Option<u64>,
    fates: Vec<NaiveFate>,
    resolved: usize,
}

#[derive(Clone, Debug, PartialEq)]
enum NaiveFate {
    Stored(u64),
    Refused(RefusalReason),
}

impl Naive {
    fn open(&mut self, epoch: u32, stream: u64, resolved: usize) -> Result<usize, AppendRefusal> {
        let stale = self.stream.is_some_and(|known| known >= stream);
        if epoch < self.epoch || (epoch == self.epoch && stale) {
            return Err(AppendRefusal::Fenced);
        }
        if epoch > self.epoch {
            self.epoch = epoch;
            self.fates.clear();
            self.resolved = 0;
        }
        self.stream = Some(stream);
        self.resolve(resolved);
        Ok(self.fates.len())
    }

    fn resolve(&mut self, below: usize) {
        self.resolved = self.resolved.max(below.saturating_sub(1)).min(self.fates.len());
    }

    fn append(&mut self, append: &Append, now: u64) -> Result<Vec<NaiveFate>, AppendRefusal> {
        let first = usize::try_from(append.first_sequence).unwrap();
        let mut known = 0;
        if let Some(publisher) = append.publisher {
            if self.stream != Some(publisher.stream) || self.epoch != publisher.epoch {
                return Err(AppendRefusal::Fenced);
            }
            if append.items.is_empty() {
                self.resolve(usize::try_from(append.resolved_below).unwrap());
                return Ok(Vec::new());
            }
            if first > self.fates.len() + 1 {
                return Err(AppendRefusal::OutOfOrder { expected: self.fates.len() as u64 + 1 });
            }
            if first <= self.resolved {
                return Err(AppendRefusal::ResultExpired { sequence: append.first_sequence });
            }
            known = (self.fates.len() + 1 - first).min(append.items.len());
        }
        let mut answer: Vec<_> = match append.publisher {
            Some(_) => self.fates[first - 1..first - 1 + known].to_vec(),
            None => Vec::new(),
        };
        let new = &append.items[known..];
        if append.atomic.is_some() && known > 0 && !new.is_empty() {
            return Err(AppendRefusal::OutOfOrder {
                expected: append.first_sequence + known as u64,
            });
        }
        let together = append.atomic.map(|atomic| self.decide_together(new, atomic));
        for (index, item) in new.iter().enumerate() {
            let fate = match &together {
                None => self.decide(item, now),
                Some(Err(reason)) => NaiveFate::Refused(*reason),
                Some(Ok(first)) => NaiveFate::Stored(first + index as u64),
            };
            if append.publisher.is_some() {
                self.fates.push(fate.clone());
            }
            answer.push(fate);
        }
        if append.publisher.is_some() {
            self.resolve(usize::try_from(append.resolved_below).unwrap());
        }
        Ok(answer)
    }

    fn decide_together(&mut self, items: &[Item], atomic: Atomic) -> Result<u64, RefusalReason> {
        let head = self.log.len() as u64;
        let mut messages = Vec::new();
        for item in items {
            match item {
                Item::Store(message) => messages.push(message.clone()),
                Item::Refuse(refusal) | Item::RefuseNew(_, refusal) => return Err(refusal.reason),
            }
        }
        if atomic.expected_head.is_some_and(|expected| expected != head) {
            return Err(RefusalReason::HeadMismatch);
        }
        self.log.extend(messages);
        Ok(head + 1)
    }

    fn decide(&mut self, item: &Item, now: u64) -> NaiveFate {
        let message = match item {
            Item::Refuse(refusal) => return NaiveFate::Refused(refusal.reason),
            Item::RefuseNew(key, refusal) => {
                let known = self
                    .keys
                    .get(&key.key)
                    .filter(|(content, _, expires)| *content == key.content && *expires > now);
                let refused = NaiveFate::Refused(refusal.reason);
                return known.map_or(refused, |(_, sequence, _)| NaiveFate::Stored(*sequence));
            }
            Item::Store(message) => message,
        };
        let next = self.log.len() as u64 + 1;
        if let Some(key) = message.key {
            match self.keys.get(&key.key) {
                Some((content, sequence, expires)) if *expires > now => {
                    return if *content == key.content {
                        NaiveFate::Stored(*sequence)
                    } else {
                        NaiveFate::Refused(RefusalReason::KeyReused)
                    };
                }
                Some(_) | None => {
                    self.keys.insert(key.key, (key.content, next, now + WINDOW));
                }
            }
        }
        self.log.push(message.clone());
        NaiveFate::Stored(next)
    }
}

const WINDOW: u64 = 100;

#[derive(Clone, Debug)]
enum Step {
    Open {
        epoch: u32,
        stream: u64,
        resolved: u64,
    },
    Append {
        known: bool,
        stream: u64,
        back: u64,
        skip: u64,
        items: Vec<Item>,
        resolved: u64,
        /// Whether it is atomic, and how far its expected head is from the real one.
        atomic: Option<Option<u64>>,
    },
    Wait(u64),
}

fn item() -> impl Strategy<Value = Item> {
    let refusal = Refusal::new(RefusalReason::TooLarge, "");
    prop_oneof![
        4 => any::<u8>().prop_map(|body| Item::Store(message([body]))),
        3 => (0..4u8, 0..2u8).prop_map(|(key, body)| Item::Store(keyed(key, [body]))),
        1 => Just(Item::Refuse(refusal.clone())),
        1 => (0..4u8, 0..2u8).prop_map(move |(key, body)| {
            Item::RefuseNew(keyed(key, [body]).key.unwrap(), refusal.clone())
        }),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let items = prop::collection::vec(item(), 0..6);
    let atomic = prop_oneof![
        2 => Just(None),
        1 => Just(Some(None)),
        1 => (0..2u64).prop_map(|off| Some(Some(off))),
    ];
    prop_oneof![
        1 => (1..4u32, 0..6u64, 0..4u64)
            .prop_map(|(epoch, stream, resolved)| Step::Open { epoch, stream, resolved }),
        8 => (prop::bool::weighted(0.8), 0..6u64, 0..6u64, 0..8u64, items, 0..4u64, atomic).prop_map(
            |(known, stream, back, skip, items, resolved, atomic)| Step::Append {
                known,
                stream,
                back,
                skip: skip / 6,
                items,
                resolved,
                atomic,
            }
        ),
        1 => (0..60u64).prop_map(Step::Wait),
    ]
}

/// The engine's side: what an engine does around admission, on maps.
#[derive(Default)]
struct Real {
    head: u64,
    keys: HashMap<[u8; 16], KeyRow>,
    publisher: Option<Publisher>,
    age: u64,
}

impl Real {
    fn now(&self) -> Now {
        Now { wall: Timestamp(self.age), age: Age(self.age) }
    }

    fn append(&mut self, append: Append) -> AppendOutcome {
        let context = Context {
            now: self.now(),
            head: self.head,
            last_at: Timestamp(0),
            window: WINDOW,
            key_room: u64::MAX,
            boot: 1,
        };
        let known = append.publisher.and(self.publisher.clone());
        let Ok(admission) =
            admit(append, known, &context, |key| Ok::<_, Infallible>(self.keys.get(key).copied()));
        if admission.outcome.is_err() {
            assert!(admission.messages.is_empty() && admission.keys.is_empty());
            assert_eq!(admission.publisher, None, "a refused append changes nothing");
        }
        self.head += admission.messages.len() as u64;
        self.keys.extend(admission.keys);
        if let Some(publisher) = admission.publisher {
            publisher.check();
            self.publisher = Some(publisher);
        }
        admission.outcome
    }
}

impl Publisher {
    /// What must always be true of it.
    fn check(&self) {
        let mut next = self.kept_from();
        for run in &self.runs {
            assert_eq!(run.first, next, "runs are dense");
            assert!(run.count > 0);
            next = run.end();
        }
        assert_eq!(next, self.decided + 1, "runs end at the last decided sequence");
    }
}

/// An answer, message by message.
fn flat(first: u64, runs: &[Run]) -> Vec<NaiveFate> {
    let mut next = first;
    let mut fates = Vec::new();
    for run in runs {
        assert_eq!(run.first_sequence, next, "answers are dense");
        next += u64::from(run.count);
        for i in 0..u64::from(run.count) {
            fates.push(match &run.fate {
                Fate::Stored { sequence, .. } => NaiveFate::Stored(sequence + i),
                Fate::Refused(refusal) => NaiveFate::Refused(refusal.reason),
            });
        }
    }
    fates
}

fn compare(steps: Vec<Step>) {
    let (mut real, mut naive) = (Real::default(), Naive::default());
    for step in steps {
        let decided = naive.fates.len() as u64;
        match step {
            Step::Wait(millis) => real.age += millis,
            Step::Open { epoch, stream, resolved } => {
                let publisher = publisher(1, epoch, stream);
                let resolved_below = (decided + 1).saturating_sub(resolved);
                let open = OpenPublisher { topic: Epoch(1), publisher, resolved_below };
                let opened = Publisher::open(real.publisher.clone(), &open, 1, real.now());
                let expected = naive.open(epoch, stream, usize::try_from(resolved_below).unwrap());
                match opened {
                    Ok(publisher) => {
                        publisher.check();
                        assert_eq!(publisher.decided().unwrap_or(0), expected.unwrap() as u64);
                        real.publisher = Some(publisher);
                    }
                    Err(refusal) => assert_eq!(Err(refusal), expected),
                }
            }
            Step::Append { known, stream, back, skip, items, resolved, atomic } => {
                let expected_head = |off: u64| (naive.log.len() as u64).saturating_sub(off);
                let atomic =
                    atomic.map(|off| Atomic { expected_head: off.map(expected_head), key: None });
                let epoch = naive.epoch;
                let append = Append {
                    publisher: known.then(|| publisher(1, epoch, stream)),
                    first_sequence: (decided + 1 + skip).saturating_sub(back).max(1),
                    resolved_below: decided.saturating_sub(resolved),
                    items,
                    atomic,
                    ..anonymous(1, Vec::new())
                };
                let expected = naive.append(&append, real.age);
                let first = append.first_sequence;
                let outcome = real.append(append).map(|runs| flat(first, &runs));
                assert_eq!(outcome, expected);
                assert_eq!(real.head, naive.log.len() as u64);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn admission_agrees_with_a_naive_model(steps in prop::collection::vec(step(), 1..60)) {
        compare(steps);
    }
}

fn context() -> Context {
    Context {
        now: Now::default(),
        head: 10,
        last_at: Timestamp(500),
        window: WINDOW,
        key_room: 2,
        boot: 1,
    }
}

#[test]
fn no_key_is_added_beyond_the_limit_and_nothing_else_either() {
    let append = |keys: &[u8]| {
        let messages = keys.iter().map(|key| keyed(*key, "a")).collect();
        let nothing = |_: &[u8; 16]| Ok::<_, Infallible>(None);
        let Ok(admission) = admit(anonymous(1, messages), None, &context(), nothing);
        admission
    };
    assert!(append(&[1, 2, 1, 2]).outcome.is_ok());
    let refused = append(&[1, 2, 3]);
    assert_eq!(refused.outcome, Err(AppendRefusal::TooManyKeys));
    assert!(refused.messages.is_empty() && refused.keys.is_empty());
}

#[test]
fn the_time_of_a_message_is_not_before_that_of_the_last_one() {
    let nothing = |_: &[u8; 16]| Ok::<_, Infallible>(None);
    let Ok(admission) = admit(anonymous(1, vec![message("a")]), None, &context(), nothing);
    let stored = Fate::Stored { sequence: 11, duplicate: false, at: Timestamp(500) };
    assert_eq!(admission.outcome.unwrap()[0].fate, stored);
}

#[test]
fn a_stream_of_an_earlier_boot_is_fenced() {
    let from = publisher(1, 1, 1);
    let open = OpenPublisher { topic: Epoch(1), publisher: from, resolved_below: 0 };
    let known = Publisher::open(None, &open, 1, Now::default()).unwrap();
    let append = Append { publisher: Some(from), ..anonymous(1, vec![message("a")]) };
    let nothing = |_: &[u8; 16]| Ok::<_, Infallible>(None);
    let later = Context { boot: 2, ..context() };
    let Ok(admission) = admit(append, Some(known), &later, nothing);
    assert_eq!(admission.outcome, Err(AppendRefusal::Fenced));
    assert_eq!(from.id, Uuid([1; 16]));
}
