//! Delivery to several consumers at once: each message to one of them, in no order or in order of
//! its key. Pure: events in, answers out, no clock and no I/O.
//!
//! Every message from the floor to `next` is in one of three states: done, **held** by a consumer,
//! or **waiting**, because it was handed back, or nobody could take it when its turn came. So one
//! message that waits holds up neither the floor's followers nor the other consumers. Messages of
//! one key share a **lane**: all that are held of it are with one consumer, and only the first that
//! waits in it can be next.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound::{Excluded, Unbounded};
use std::sync::Arc;

use tokio::time::Instant;

use super::{Claim, Cursor, Holder, Nack, Out, Rewound, backoff};
use crate::limits;
use crate::names::SubscriptionName;
use crate::record::{CursorRecord, Sequences, StoredMessage};

/// An ordering key.
pub type Key = Arc<str>;

/// What is kept in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Nothing.
    None,
    /// The messages of each key.
    Key,
}

/// The delivery of one topic to the consumers of one subscription.
#[derive(Debug)]
pub struct Competing {
    pub(super) cursor: Cursor,
    order: Order,
    /// The first message that was not looked at since the start. Beyond it there may be messages
    /// that are held or waiting all the same: consumers that came back named them.
    next: u64,
    held: BTreeMap<u64, Held>,
    waiting: BTreeMap<u64, Waiting>,
    /// Of the waiting ones, those that could go now if someone had room.
    ready: BTreeSet<u64>,
    /// Of the waiting ones, those that have to wait for a moment.
    due: BTreeSet<(Instant, u64)>,
    lanes: BTreeMap<Key, Lane>,
    out: BTreeMap<Holder, Out>,
    /// Messages up to here may be with consumers that have not come back since the start.
    withheld: u64,
    /// Messages below are gone, if nobody holds them.
    lost_below: u64,
}

#[derive(Debug)]
struct Held {
    holder: Holder,
    bytes: u32,
    key: Option<Key>,
}

#[derive(Debug, Default)]
struct Waiting {
    at: Option<Instant>,
    bytes: u32,
    key: Option<Key>,
}

#[derive(Debug, Default)]
struct Lane {
    held: BTreeSet<u64>,
    waiting: BTreeSet<u64>,
}

impl Competing {
    /// Goes on where `cursor` says, in a topic with this head.
    pub fn new(cursor: CursorRecord, head: u64, order: Order) -> Self {
        let next = cursor.floor + 1;
        Self {
            cursor: Cursor::new(cursor, head),
            order,
            next,
            held: BTreeMap::new(),
            waiting: BTreeMap::new(),
            ready: BTreeSet::new(),
            due: BTreeSet::new(),
            lanes: BTreeMap::new(),
            out: BTreeMap::new(),
            withheld: 0,
            lost_below: 0,
        }
    }

    /// Keeps everything up to the head for consumers that may hold it and have not come back yet.
    pub fn withhold(&mut self) {
        self.withheld = self.cursor.head();
    }

    /// All consumers that may hold something are back, or given up.
    pub fn withhold_no_more(&mut self) {
        self.withheld = 0;
    }

    /// Whether it waits for consumers since the start.
    pub fn is_withholding(&self) -> bool {
        self.withheld > self.cursor.floor()
    }

    /// All consumers that hold something, with what is with them.
    pub fn all_out(&self) -> impl Iterator<Item = (Holder, Out)> {
        self.out.iter().map(|(holder, out)| (*holder, *out))
    }

    /// Messages held by anyone.
    pub fn held(&self) -> usize {
        self.held.len()
    }

    /// What is with one consumer.
    pub fn out(&self, holder: Holder) -> Out {
        self.out.get(&holder).copied().unwrap_or_default()
    }

    /// Whether this consumer holds this message.
    pub fn holds(&self, sequence: u64, holder: Holder) -> bool {
        self.held.get(&sequence).is_some_and(|held| held.holder == holder)
    }

    /// Messages that were looked at and wait.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Whether so many messages are unacked that no more are looked at.
    pub fn is_full(&self) -> bool {
        self.held.len() + self.waiting.len() >= limits::MAX_UNSETTLED
    }

    /// When the next of the waiting messages may be shown that have to wait for a moment.
    pub fn ready_at(&self, now: Instant) -> Option<Instant> {
        let later = (Excluded((now, u64::MAX)), Unbounded);
        self.due.range(later).next().map(|(at, _)| *at)
    }

    /// All messages up to here are done or with a consumer.
    pub fn passed(&self) -> u64 {
        let first = self.waiting.first_key_value().map_or(self.next, |(first, _)| *first);
        first.min(self.next).max(self.cursor.floor() + 1) - 1
    }

    /// A consumer comes, or comes back. Answers what it claims to hold and is not wanted any more.
    /// What it names counts only if it has kept its place: otherwise its messages are anybody's.
    pub fn attach(
        &mut self,
        holder: Holder,
        claim: &Claim,
        kept_place: bool,
        now: Instant,
    ) -> Sequences {
        let generation = self.cursor.record().generation;
        if claim.cursor_generation != generation {
            self.detach(holder);
            return claim.held.clone();
        }
        self.ack(&claim.acked);
        self.miss(&claim.missed);
        if !kept_place {
            self.detach(holder);
            return claim.held.clone();
        }
        for nack in &claim.nacked {
            self.fail(holder, nack, true, now);
        }
        // What it was sent and has not received, or not as far as it knows.
        let mine = self.held.iter().filter(|(_, held)| held.holder == holder);
        let lost = mine.map(|(sequence, _)| *sequence).filter(|s| !claim.held.contains(s));
        for sequence in lost.collect::<Vec<_>>() {
            self.hand_back(sequence, None);
        }
        self.hold(holder, claim)
    }

    fn hold(&mut self, holder: Holder, claim: &Claim) -> Sequences {
        let head = self.cursor.head();
        let mut dropped = Sequences::new();
        let claimed = claim.held.iter().flat_map(Clone::clone);
        let count = claim.held.iter().map(|range| range.end() - range.start() + 1).sum::<u64>();
        let each = u32::try_from(claim.held_bytes / count.max(1)).unwrap_or(u32::MAX);
        for sequence in claimed {
            let others = self.held.get(&sequence).map(|held| held.holder != holder);
            // No more than could be out before, whatever is claimed.
            let too_many = others.is_none() && self.is_full();
            let another = others == Some(true);
            if sequence > head || self.cursor.is_done(sequence) || another || too_many {
                dropped.insert(sequence..=sequence);
            } else if others.is_none() {
                let known = self.unwait(sequence);
                let Waiting { bytes, key, .. } = known.unwrap_or_default();
                let bytes = if bytes == 0 { each } else { bytes };
                self.put_held(sequence, Held { holder, bytes, key });
            }
        }
        dropped
    }

    /// A consumer is gone, and what it held is anybody's.
    pub fn detach(&mut self, holder: Holder) {
        let mine = self.held.iter().filter(|(_, held)| held.holder == holder);
        for sequence in mine.map(|(sequence, _)| *sequence).collect::<Vec<_>>() {
            self.hand_back(sequence, None);
        }
    }

    /// The next message to read, if one may be shown now, and how many from there on. `can` says
    /// whether a message of so many bytes could go to the consumer of its key, or to anyone.
    pub fn wants(
        &mut self,
        now: Instant,
        can: impl Fn(Option<Holder>, u64) -> bool,
    ) -> Option<(u64, u64)> {
        self.tick(now);
        self.skip_settled();
        let mut ready = self.ready.range(self.withheld + 1..).filter_map(|sequence| {
            let waiting = self.waiting.get(sequence)?;
            let owner = self.owner(waiting.key.as_ref());
            let able = can(owner, u64::from(waiting.bytes));
            (able || owner.is_none()).then_some((*sequence, able))
        });
        match ready.next() {
            Some((first, true)) => {
                let reach = first.saturating_add(limits::MAX_FRAME_MESSAGES as u64).min(self.next);
                let last = self.waiting.range(first..reach).next_back().map_or(first, |(s, _)| *s);
                return Some((first, last - first + 1));
            }
            // It is too large for what is left of anyone's credit, and would never go if smaller
            // ones went past it.
            Some((_, false)) => return None,
            None => {}
        }
        let looked_at = self.held.len() + self.waiting.len();
        let room = limits::MAX_UNSETTLED.saturating_sub(looked_at) as u64;
        let last = self.cursor.head().min(self.next.saturating_add(room) - 1);
        (self.next <= last && can(None, 1)).then(|| (self.next, last - self.next + 1))
    }

    /// Who has the messages of a key.
    fn owner(&self, key: Option<&Key>) -> Option<Holder> {
        let held = &self.lanes.get(key?)?.held;
        self.held.get(held.last()?).map(|held| held.holder)
    }

    /// A message that was read, with its key: to whom it is to be sent, and as which attempt.
    /// `choose` says who could take so many bytes: the consumer of its key, or anyone.
    pub fn route(
        &mut self,
        message: &StoredMessage,
        key: Option<Key>,
        me: &SubscriptionName,
        choose: impl FnOnce(Option<Holder>, u64) -> Option<Holder>,
    ) -> Option<(Holder, u32)> {
        let sequence = message.sequence;
        if sequence == self.next {
            self.look_at(message, key, me);
        }
        if sequence <= self.withheld || !self.ready.contains(&sequence) {
            return None;
        }
        let waiting = self.waiting.get(&sequence)?;
        // One that was named by a consumer, and not looked at, has not told its size yet.
        let bytes = u32::try_from(message.body.len()).unwrap_or(u32::MAX);
        let holder = choose(self.owner(waiting.key.as_ref()), u64::from(bytes))?;
        let Waiting { key, .. } = self.unwait(sequence)?;
        self.put_held(sequence, Held { holder, bytes, key });
        Some((holder, self.cursor.failures(sequence).saturating_add(1)))
    }

    /// The first look at a message: from now on it is known what has to come before it.
    fn look_at(&mut self, message: &StoredMessage, key: Option<Key>, me: &SubscriptionName) {
        let sequence = message.sequence;
        self.next += 1;
        if self.cursor.is_done(sequence) {
            return;
        }
        if !message.is_for(me) {
            self.cursor.settle(sequence, sequence);
            self.let_go(sequence, sequence);
            return;
        }
        let key = key.filter(|_| self.order == Order::Key);
        let bytes = u32::try_from(message.body.len()).unwrap_or(u32::MAX);
        if let Some(held) = self.take_held(sequence) {
            self.put_held(sequence, Held { bytes, key, ..held });
        } else {
            let early = self.unwait(sequence).unwrap_or_default();
            self.put_waiting(sequence, Waiting { bytes, key, ..early });
        }
    }

    /// Passes what needs no look.
    fn skip_settled(&mut self) {
        loop {
            let next = self.cursor.after_done(self.next);
            let early = self.held.contains_key(&next) || self.waiting.contains_key(&next);
            // In the order of keys a look has to tell the key.
            let passed = early && self.order == Order::None;
            if next == self.next && !passed {
                return;
            }
            self.next = next + u64::from(passed);
            self.classify(next);
        }
    }

    /// What has waited for a moment that is over waits no more for that.
    fn tick(&mut self, now: Instant) {
        while let Some((at, sequence)) = self.due.first().copied().filter(|(at, _)| *at <= now) {
            self.due.remove(&(at, sequence));
            if let Some(waiting) = self.waiting.get_mut(&sequence) {
                waiting.at = None;
            }
            self.classify(sequence);
        }
    }

    /// These are received.
    pub fn ack(&mut self, acked: &Sequences) {
        self.cursor.ack(acked);
        for range in acked.iter() {
            self.let_go(*range.start(), *range.end());
        }
    }

    /// A consumer knows that these will never come.
    pub fn miss(&mut self, missed: &Sequences) {
        self.cursor.miss(missed);
        for range in missed.iter() {
            self.let_go(*range.start(), *range.end());
        }
    }

    /// What is done is neither held nor waited for.
    fn let_go(&mut self, first: u64, last: u64) {
        let held = self.held.range(first..=last).map(|(sequence, _)| *sequence);
        let waiting = self.waiting.range(first..=last).map(|(sequence, _)| *sequence);
        for sequence in held.chain(waiting).collect::<Vec<_>>() {
            self.take_held(sequence);
            self.unwait(sequence);
        }
    }

    /// A consumer hands messages back. Answers what is taken back from it, where there is an order:
    /// what comes after them of the same keys, and themselves, since it may have received them again
    /// before this nack of an earlier showing was heard.
    pub fn nack(&mut self, holder: Holder, nacks: &[Nack], now: Instant) -> Option<Rewound> {
        let mut taken_back = Sequences::new();
        for nack in nacks {
            taken_back.extend(self.fail(holder, nack, false, now));
        }
        let from = *taken_back.first()?.start();
        Some(Rewound { from, generation: 0, taken_back })
    }

    /// `returning`: the consumer says what it handed back before its connection was lost, of which
    /// this side may know nothing.
    fn fail(&mut self, holder: Holder, nack: &Nack, returning: bool, now: Instant) -> Sequences {
        let sequence = nack.sequence;
        let current = self.held.get(&sequence).map(|held| held.holder);
        let free = returning && current.is_none() && !self.is_full();
        if sequence > self.cursor.head()
            || self.cursor.is_done(sequence)
            || !(current == Some(holder) || free)
        {
            return Sequences::new();
        }
        let failures = self.cursor.fail(nack);
        let delay = nack.delay.unwrap_or_else(|| backoff(failures)).min(limits::MAX_BACKOFF);
        let key = self.hand_back(sequence, (!delay.is_zero()).then(|| now + delay));
        let after = self.held_after(holder, sequence, key.as_ref());
        for sequence in &after {
            self.hand_back(*sequence, None);
        }
        let has_lane = key.is_some() || self.order == Order::Key && sequence >= self.next;
        let itself = has_lane.then_some(sequence);
        itself.into_iter().chain(after).map(|sequence| sequence..=sequence).collect()
    }

    /// What a consumer holds that must not be processed before a message that it has handed back.
    fn held_after(&self, holder: Holder, sequence: u64, key: Option<&Key>) -> Vec<u64> {
        let keyless = key.is_none() && sequence < self.next;
        if self.order == Order::None || keyless {
            return Vec::new();
        }
        let lane = key.and_then(|key| self.lanes.get(key));
        let of_key = lane.into_iter().flat_map(|lane| lane.held.range(sequence + 1..)).copied();
        // What was not looked at may be of the same key.
        let unknown = self.held.range(self.next.max(sequence + 1)..);
        let unknown = unknown.filter(|(_, held)| held.holder == holder);
        of_key.chain(unknown.map(|(sequence, _)| *sequence)).collect()
    }

    /// Makes a message wait that is held, or that nothing is known of. Answers its key.
    fn hand_back(&mut self, sequence: u64, at: Option<Instant>) -> Option<Key> {
        let (bytes, key) = match self.take_held(sequence) {
            Some(Held { bytes, key, .. }) => (bytes, key),
            None => {
                let Waiting { bytes, key, .. } = self.unwait(sequence).unwrap_or_default();
                (bytes, key)
            }
        };
        self.put_waiting(sequence, Waiting { at, bytes, key: key.clone() });
        key
    }

    /// Moves the position: `to` is the next message to be shown.
    pub fn seek(&mut self, to: u64) {
        self.cursor.seek(to);
        self.held.clear();
        self.waiting.clear();
        self.ready.clear();
        self.due.clear();
        self.lanes.clear();
        self.out.clear();
        self.next = self.cursor.floor() + 1;
        (self.withheld, self.lost_below) = (0, 0);
    }

    /// Messages below `first` are gone. Answers what the consumers are to be told, if it is news.
    /// The floor waits until one knows.
    pub fn lose_below(&mut self, first: u64) -> Option<(u64, u64)> {
        let first = first.min(self.cursor.head() + 1).max(self.lost_below);
        // What is handed back of it is lost, too.
        let handed_back = self.waiting.first_key_value().is_some_and(|(waits, _)| *waits < first);
        if first == self.lost_below && !handed_back {
            return None;
        }
        self.lost_below = first;
        self.next = self.next.max(first);
        let gone = self.waiting.range(..first).map(|(sequence, _)| *sequence);
        for sequence in gone.collect::<Vec<_>>() {
            self.unwait(sequence);
        }
        self.lost()
    }

    /// The first and the last message that are gone, which no consumer knows yet. Some between
    /// them may be held.
    pub fn lost(&self) -> Option<(u64, u64)> {
        let (from, to) = (self.cursor.floor() + 1, self.lost_below.saturating_sub(1));
        if from > to {
            return None;
        }
        let held = self.held.range(from..=to).map(|(sequence, _)| *sequence);
        self.cursor.missing(&(from..=to), held)
    }

    fn put_held(&mut self, sequence: u64, held: Held) {
        let out = self.out.entry(held.holder).or_default();
        out.messages += 1;
        out.bytes += u64::from(held.bytes);
        if let Some(key) = &held.key {
            self.lanes.entry(Arc::clone(key)).or_default().held.insert(sequence);
        }
        self.held.insert(sequence, held);
    }

    fn take_held(&mut self, sequence: u64) -> Option<Held> {
        let held = self.held.remove(&sequence)?;
        if let Some(out) = self.out.get_mut(&held.holder) {
            out.messages -= 1;
            out.bytes -= u64::from(held.bytes);
            if out.messages == 0 {
                self.out.remove(&held.holder);
            }
        }
        self.leave_lane(held.key.as_ref(), sequence);
        Some(held)
    }

    fn put_waiting(&mut self, sequence: u64, waiting: Waiting) {
        if let Some(at) = waiting.at {
            self.due.insert((at, sequence));
        }
        if let Some(key) = &waiting.key {
            self.lanes.entry(Arc::clone(key)).or_default().waiting.insert(sequence);
        }
        let key = waiting.key.clone();
        self.waiting.insert(sequence, waiting);
        self.classify(sequence);
        // The one that was first in the lane before is it no more.
        let lane = key.and_then(|key| self.lanes.get(&key));
        if let Some(second) = lane.and_then(|lane| lane.waiting.iter().nth(1).copied()) {
            self.classify(second);
        }
    }

    fn unwait(&mut self, sequence: u64) -> Option<Waiting> {
        let waiting = self.waiting.remove(&sequence)?;
        self.ready.remove(&sequence);
        if let Some(at) = waiting.at {
            self.due.remove(&(at, sequence));
        }
        self.leave_lane(waiting.key.as_ref(), sequence);
        Some(waiting)
    }

    fn leave_lane(&mut self, key: Option<&Key>, sequence: u64) {
        let Some(key) = key else { return };
        let Some(lane) = self.lanes.get_mut(key) else { return };
        lane.held.remove(&sequence);
        lane.waiting.remove(&sequence);
        if lane.held.is_empty() && lane.waiting.is_empty() {
            self.lanes.remove(key);
        } else if let Some(first) = lane.waiting.first().copied() {
            self.classify(first);
        }
    }

    /// Whether a waiting message could go now.
    fn classify(&mut self, sequence: u64) {
        let could = self.waiting.get(&sequence).is_some_and(|waiting| {
            let lane = waiting.key.as_ref().and_then(|key| self.lanes.get(key));
            let first = lane.is_none_or(|lane| lane.waiting.first() == Some(&sequence));
            sequence < self.next && waiting.at.is_none() && first
        });
        if could {
            self.ready.insert(sequence);
        } else {
            self.ready.remove(&sequence);
        }
    }
}
