//! Which messages of an append are new, which are known and which are refused.
//!
//! Decisions only: no I/O and no clock, one place for all engines. An engine reads what is asked
//! for, and stores what comes out in the commit that stores the messages.

use std::collections::{HashMap, VecDeque};

use serde::{Deserialize, Serialize};

use super::clock::{Age, Now};
use super::{
    Append, AppendOutcome, AppendRefusal, Atomic, Fact, Fate, Item, OpenPublisher, Refusal, Run,
};
use super::{PublisherRef, RefusalReason};
use crate::limits;
use crate::record::{IdempotencyKey, NewMessage, Timestamp};
use crate::schema::shortened;

/// What is remembered of one publisher in one topic.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Publisher {
    epoch: u32,
    /// The boot in which the stream was opened: stream numbers mean nothing in another one.
    boot: u64,
    stream: u64,
    /// The last sequence that is decided, 0 if none is.
    decided: u64,
    /// The fates of the last decided sequences: dense, and ending at `decided`.
    runs: VecDeque<KeptRun>,
    /// When it was used last.
    pub(super) used: Age,
}

/// The common fate of dense sequences, as remembered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct KeptRun {
    first: u64,
    count: u32,
    fate: KeptFate,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum KeptFate {
    Stored { sequence: u64, at: Timestamp },
    Refused(Refusal),
}

/// What is remembered of an idempotency key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct KeyRow {
    pub(super) content: [u8; 32],
    /// The message that was stored under it.
    pub(super) sequence: u64,
    pub(super) at: Timestamp,
    /// From here on the key is free again.
    pub(super) expires: Age,
}

/// The hash of a key that is stored now, with what is to be remembered of it.
pub(super) type NewKey = ([u8; 16], KeyRow);

/// What an append meets.
#[derive(Clone, Copy, Debug)]
pub(super) struct Context {
    pub(super) now: Now,
    /// The stored head of the topic.
    pub(super) head: u64,
    /// When the last message of the topic was stored.
    pub(super) last_at: Timestamp,
    /// How long the topic remembers keys, in milliseconds.
    pub(super) window: u64,
    /// How many keys may be added.
    pub(super) key_room: u64,
    /// The current boot.
    pub(super) boot: u64,
}

impl Context {
    /// The time of the messages that are stored now.
    pub(super) fn at(&self) -> Timestamp {
        self.now.wall.max(self.last_at)
    }
}

/// A decision with everything that has to be stored for it.
#[derive(Debug)]
pub(super) struct Admission {
    pub(super) outcome: AppendOutcome,
    /// To be stored from head + 1 on, at [`Context::at`].
    pub(super) messages: Vec<NewMessage>,
    /// Keys that are new, in the order of their messages.
    pub(super) keys: Vec<NewKey>,
    /// The publisher as it is from now on; `None` if it does not change.
    pub(super) publisher: Option<Publisher>,
}

impl Admission {
    fn refused(refusal: AppendRefusal) -> Self {
        Self { outcome: Err(refusal), messages: Vec::new(), keys: Vec::new(), publisher: None }
    }
}

/// Decides an append. `lookup` finds what is remembered of a key, expired or not.
///
/// # Errors
///
/// Those of `lookup`.
pub(super) fn admit<E>(
    append: Append,
    publisher: Option<Publisher>,
    context: &Context,
    mut lookup: impl FnMut(&[u8; 16]) -> Result<Option<KeyRow>, E>,
) -> Result<Admission, E> {
    let mut publisher = match admit_publisher(&append, publisher, context) {
        Ok(publisher) => publisher,
        Err(refused) => return Ok(*refused),
    };
    let mut known = Vec::new();
    let mut skip = 0;
    if let Some(publisher) = &mut publisher {
        let end = append.first_sequence.saturating_add(append.items.len() as u64);
        known = publisher.known(append.first_sequence, end);
        skip = known.iter().map(|run| run.count as usize).sum();
        publisher.used = context.now.age;
    }
    if append.atomic.is_some() && skip > 0 && skip < append.items.len() {
        // Half of it was decided before, which is not what was sent then.
        let expected = append.first_sequence.saturating_add(skip as u64);
        return Ok(Admission::refused(AppendRefusal::OutOfOrder { expected }));
    }
    let mut decider = Decider::new(*context, known);
    let mut sequence = append.first_sequence.saturating_add(skip as u64);
    let mut note = |runs: &mut Vec<Run>, fate: Fate| {
        if let Some(publisher) = &mut publisher {
            publisher.record(sequence, &fate);
        }
        push(runs, sequence, fate);
        sequence = sequence.saturating_add(1);
    };
    let items = append.items.into_iter().skip(skip);
    match append.atomic.filter(|_| items.len() > 0) {
        None => {
            for item in items {
                let fate = decider.decide(item, &mut lookup)?;
                note(&mut decider.runs, fate);
            }
        }
        Some(atomic) => {
            let count = items.len() as u64;
            let first = decider.decide_together(atomic, items, &mut lookup)?;
            (0..count).for_each(|offset| note(&mut decider.runs, first.nth(offset)));
        }
    }
    if decider.keys.len() as u64 > context.key_room {
        return Ok(Admission::refused(AppendRefusal::TooManyKeys));
    }
    if let Some(publisher) = &mut publisher {
        publisher.forget_below(append.resolved_below);
    }
    let Decider { runs, messages, keys, .. } = decider;
    Ok(Admission { outcome: Ok(runs), messages, keys, publisher })
}

/// The publisher, if the append may go on.
fn admit_publisher(
    append: &Append,
    publisher: Option<Publisher>,
    context: &Context,
) -> Result<Option<Publisher>, Box<Admission>> {
    let refuse = |refusal| Err(Box::new(Admission::refused(refusal)));
    let Some(from) = append.publisher else {
        return Ok(None);
    };
    // Without a row there is no open stream; after a restart none is open either.
    let Some(publisher) = publisher else {
        return refuse(AppendRefusal::Fenced);
    };
    if !publisher.is_current(from, context.boot) {
        #[cfg(pubsub_break = "fenced_frame_consumes_sequence")]
        return Err(Box::new(publisher.broken_by_fenced_frame(append)));
        #[cfg(not(pubsub_break = "fenced_frame_consumes_sequence"))]
        return refuse(AppendRefusal::Fenced);
    }
    if append.items.is_empty() {
        // There are no sequences to be checked.
        return Ok(Some(publisher));
    }
    let expected = publisher.decided + 1;
    if append.first_sequence > expected {
        return refuse(AppendRefusal::OutOfOrder { expected });
    }
    if append.first_sequence < publisher.kept_from() {
        return refuse(AppendRefusal::ResultExpired { sequence: append.first_sequence });
    }
    Ok(Some(publisher))
}

impl Publisher {
    /// Opens a stream on what is remembered.
    pub(super) fn open(
        known: Option<Self>,
        open: &OpenPublisher,
        boot: u64,
        now: Now,
    ) -> Result<Self, AppendRefusal> {
        let OpenPublisher { publisher: PublisherRef { epoch, stream, .. }, .. } = *open;
        let fresh = Self { epoch, boot, stream, decided: 0, runs: VecDeque::new(), used: now.age };
        let mut publisher = match known {
            // Connections overtake each other: what was sent first may arrive last.
            Some(known) if (known.epoch, known.stream) >= (epoch, stream) => {
                return Err(AppendRefusal::Fenced);
            }
            Some(known) if known.epoch == epoch => Self { boot, stream, used: now.age, ..known },
            Some(_) | None => fresh,
        };
        publisher.forget_below(open.resolved_below);
        Ok(publisher)
    }

    /// The last sequence that is decided.
    pub(super) fn decided(&self) -> Option<u64> {
        (self.decided > 0).then_some(self.decided)
    }

    fn is_current(&self, from: PublisherRef, boot: u64) -> bool {
        (self.epoch, self.boot, self.stream) == (from.epoch, boot, from.stream)
    }

    /// The first sequence whose fate is known; the next sequence if none is.
    fn kept_from(&self) -> u64 {
        self.runs.front().map_or(self.decided + 1, |run| run.first)
    }

    /// The fates of the decided sequences in `from..end`, where `from` is not forgotten.
    fn known(&self, from: u64, end: u64) -> Vec<Run> {
        if from >= end {
            return Vec::new();
        }
        let start = self.runs.partition_point(|run| run.end() <= from);
        let overlapping = self.runs.range(start..).take_while(|run| run.first < end);
        overlapping.map(|run| run.part(from, end).answer()).collect()
    }

    fn record(&mut self, sequence: u64, fate: &Fate) {
        debug_assert_eq!(sequence, self.decided + 1, "publisher sequences are dense");
        self.decided = sequence;
        let fate = match fate {
            Fate::Stored { sequence, at, .. } => KeptFate::Stored { sequence: *sequence, at: *at },
            Fate::Refused(refusal) => KeptFate::Refused(refusal.clone()),
        };
        match self.runs.back_mut() {
            Some(last) if last.extends_to(&fate) => last.count += 1,
            Some(_) | None => self.runs.push_back(KeptRun { first: sequence, count: 1, fate }),
        }
    }

    /// Forgets fates that nobody asks for any more. More than a publisher may have unanswered are
    /// never kept, whatever it says.
    fn forget_below(&mut self, resolved_below: u64) {
        let window = u64::from(limits::MAX_IN_FLIGHT_MESSAGES);
        let below = resolved_below.max((self.decided + 1).saturating_sub(window));
        let below = below.min(self.decided + 1);
        while self.runs.front().is_some_and(|run| run.end() <= below) {
            self.runs.pop_front();
        }
        if let Some(run) = self.runs.front_mut()
            && run.first < below
        {
            *run = run.part(below, run.end());
        }
    }

    /// The bug that a test has to find: a frame of a fenced stream takes its sequences.
    #[cfg(pubsub_break = "fenced_frame_consumes_sequence")]
    fn broken_by_fenced_frame(mut self, append: &Append) -> Admission {
        let refusal = Refusal::new(RefusalReason::Invalid, "");
        for _ in &append.items {
            self.record(self.decided + 1, &Fate::Refused(refusal.clone()));
        }
        Admission { publisher: Some(self), ..Admission::refused(AppendRefusal::Fenced) }
    }
}

impl KeptRun {
    fn end(&self) -> u64 {
        self.first + u64::from(self.count)
    }

    /// Whether the fate of the sequence after this run is the same.
    fn extends_to(&self, next: &KeptFate) -> bool {
        match (&self.fate, next) {
            (
                KeptFate::Stored { sequence, at },
                KeptFate::Stored { sequence: next_sequence, at: next_at },
            ) => sequence + u64::from(self.count) == *next_sequence && at == next_at,
            (KeptFate::Refused(refusal), KeptFate::Refused(next)) => refusal == next,
            (KeptFate::Stored { .. }, KeptFate::Refused(_))
            | (KeptFate::Refused(_), KeptFate::Stored { .. }) => false,
        }
    }

    /// The part of the run in `from..end`, which it overlaps.
    fn part(&self, from: u64, end: u64) -> Self {
        let first = self.first.max(from);
        let end = self.end().min(end);
        let count = u32::try_from(end - first).expect("a part is not longer than its run");
        let fate = match &self.fate {
            KeptFate::Stored { sequence, at } => {
                KeptFate::Stored { sequence: sequence + (first - self.first), at: *at }
            }
            KeptFate::Refused(refusal) => KeptFate::Refused(refusal.clone()),
        };
        Self { first, count, fate }
    }

    fn answer(self) -> Run {
        let fate = match self.fate {
            KeptFate::Stored { sequence, at } => Fate::Stored { sequence, duplicate: true, at },
            KeptFate::Refused(refusal) => Fate::Refused(refusal),
        };
        Run { first_sequence: self.first, count: self.count, fate }
    }
}

/// Decides the items of one append that no publisher sequence has decided before.
struct Decider {
    context: Context,
    runs: Vec<Run>,
    messages: Vec<NewMessage>,
    keys: Vec<NewKey>,
    /// Which of the new keys it is.
    numbers: HashMap<[u8; 16], usize>,
}

impl Decider {
    fn new(context: Context, runs: Vec<Run>) -> Self {
        Self { context, runs, messages: Vec::new(), keys: Vec::new(), numbers: HashMap::new() }
    }

    /// The fate of the first of messages that have one fate. The identity comes first: an append
    /// whose first attempt was stored has moved the head itself.
    fn decide_together<E>(
        &mut self,
        atomic: Atomic,
        items: impl Iterator<Item = Item>,
        lookup: &mut impl FnMut(&[u8; 16]) -> Result<Option<KeyRow>, E>,
    ) -> Result<Fate, E> {
        let Atomic { expected_head, key } = atomic;
        let mismatch = expected_head.and_then(|expected| self.head_mismatch(expected));
        // The bug that a test has to find, as the two below.
        if cfg!(pubsub_break = "head_before_identity")
            && let Some(refusal) = &mismatch
        {
            return Ok(Fate::Refused(refusal.clone()));
        }
        if let Some(key) = key
            && let Some(row) = self.known(&key, lookup)?
        {
            return Ok(known_key(&row, &key));
        }
        let mut messages = Vec::new();
        for (index, item) in (0..).zip(items) {
            match item {
                Item::Store(message) => messages.push(message),
                Item::Refuse(_) if cfg!(pubsub_break = "batch_in_part") => {}
                Item::Refuse(refusal) | Item::RefuseNew(_, refusal) => {
                    return Ok(Fate::Refused(refusal.of_one(index)));
                }
            }
        }
        if let Some(refusal) = mismatch {
            return Ok(Fate::Refused(refusal));
        }
        let (sequence, at) = (self.context.head + 1, self.context.at());
        if let Some(key) = key {
            self.remember(&key, sequence);
        }
        self.messages = messages;
        Ok(Fate::Stored { sequence, duplicate: false, at })
    }

    fn head_mismatch(&self, expected: u64) -> Option<Refusal> {
        let head = self.context.head;
        let detail = format!("the last message of the topic is {head}, and not {expected}");
        let refusal = Refusal::new(RefusalReason::HeadMismatch, detail);
        (head != expected).then(|| refusal.with(Fact::Head(head)))
    }

    fn decide<E>(
        &mut self,
        item: Item,
        lookup: &mut impl FnMut(&[u8; 16]) -> Result<Option<KeyRow>, E>,
    ) -> Result<Fate, E> {
        let message = match item {
            Item::Store(message) => message,
            Item::Refuse(refusal) => return Ok(Fate::Refused(refusal)),
            Item::RefuseNew(key, refusal) => {
                let row = self.known(&key, lookup)?.filter(|row| row.content == key.content);
                let row = row.filter(|_| !cfg!(pubsub_break = "schema_before_identity"));
                let known = row.map(|row| known_key(&row, &key));
                return Ok(known.unwrap_or(Fate::Refused(refusal)));
            }
        };
        let sequence = self.context.head + 1 + self.messages.len() as u64;
        let at = self.context.at();
        if let Some(key) = message.key {
            if let Some(row) = self.known(&key, lookup)? {
                return Ok(known_key(&row, &key));
            }
            self.remember(&key, sequence);
        }
        self.messages.push(message);
        Ok(Fate::Stored { sequence, duplicate: false, at })
    }

    fn remember(&mut self, key: &IdempotencyKey, sequence: u64) {
        let (content, at) = (key.content, self.context.at());
        let expires = self.context.now.age.after(self.context.window);
        self.numbers.insert(key.key, self.keys.len());
        self.keys.push((key.key, KeyRow { content, sequence, at, expires }));
    }

    /// What is remembered of a key, unless its window is over.
    fn known<E>(
        &self,
        key: &IdempotencyKey,
        lookup: &mut impl FnMut(&[u8; 16]) -> Result<Option<KeyRow>, E>,
    ) -> Result<Option<KeyRow>, E> {
        // The items before this one in the same append count as stored.
        Ok(match self.numbers.get(&key.key) {
            Some(number) => Some(self.keys[*number].1),
            None => lookup(&key.key)?.filter(|row| row.expires > self.context.now.age),
        })
    }
}

impl Fate {
    /// The fate of a message that comes so many after the one with this fate.
    fn nth(&self, offset: u64) -> Self {
        match self {
            Self::Stored { sequence, duplicate, at } => {
                Self::Stored { sequence: sequence + offset, duplicate: *duplicate, at: *at }
            }
            Self::Refused(refusal) => Self::Refused(refusal.clone()),
        }
    }
}

impl Refusal {
    /// The refusal of all messages because of one of them.
    fn of_one(mut self, index: u32) -> Self {
        let detail = format!("message {} of the batch: {}", u64::from(index) + 1, self.detail);
        self.detail = shortened(detail, limits::MAX_REFUSAL_BYTES);
        self.with(Fact::Index(index))
    }
}

fn known_key(row: &KeyRow, key: &IdempotencyKey) -> Fate {
    if row.content == key.content {
        return Fate::Stored { sequence: row.sequence, duplicate: true, at: row.at };
    }
    let detail =
        format!("the idempotency key was used with other content by message {}", row.sequence);
    let refusal = Refusal::new(RefusalReason::KeyReused, detail);
    Fate::Refused(refusal.with(Fact::Sequence(row.sequence)))
}

/// Adds a fate to an answer, to its last run if it continues it.
fn push(runs: &mut Vec<Run>, first_sequence: u64, fate: Fate) {
    if let Some(last) = runs.last_mut() {
        let continues = match (&last.fate, &fate) {
            (
                Fate::Stored { sequence, duplicate, at },
                Fate::Stored { sequence: next, duplicate: next_duplicate, at: next_at },
            ) => {
                sequence + u64::from(last.count) == *next
                    && (duplicate, at) == (next_duplicate, next_at)
            }
            (Fate::Refused(refusal), Fate::Refused(next)) => refusal == next,
            (Fate::Stored { .. }, Fate::Refused(_)) | (Fate::Refused(_), Fate::Stored { .. }) => {
                false
            }
        };
        if continues {
            last.count += 1;
            return;
        }
    }
    runs.push(Run { first_sequence, count: 1, fate });
}

#[cfg(test)]
#[path = "admission_tests.rs"]
mod tests;
