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

use super::timed::Timed;
use super::{Claim, Cursor, Holder, Moment, Out, Terms};
use crate::limits;
use crate::record::{Sequences, StoredMessage};

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
    pub(super) order: Order,
    /// The first message that was not looked at since the start. Beyond it there may be messages
    /// that are held or waiting all the same: consumers that came back named them.
    pub(super) next: u64,
    pub(super) held: BTreeMap<u64, Held>,
    pub(super) waiting: BTreeMap<u64, Waiting>,
    /// Of the waiting ones, those that could go now if someone had room.
    ready: BTreeSet<u64>,
    /// Of the waiting ones, those that have to wait for a moment.
    pub(super) due: BTreeSet<(Instant, u64)>,
    pub(super) lanes: BTreeMap<Key, Lane>,
    out: BTreeMap<Holder, Out>,
    pub(super) started: Timed,
    /// To wait for a moment that their publishers have named; they are in nobody's way.
    pub(super) delayed: BTreeMap<u64, Waiting>,
    pub(super) due_at: Timed,
    /// Of the suspects, those that are held.
    suspects_out: usize,
    /// When one was given out last, unless that is so long ago that it kills nobody.
    suspect_at: Option<Instant>,
    /// When it was asked last what is to be shown, or told what is held.
    asked_at: Option<Instant>,
    /// Messages up to here may be with consumers that have not come back since the start.
    withheld: u64,
    /// Messages below are gone, if nobody holds them.
    lost_below: u64,
}

#[derive(Debug)]
pub(super) struct Held {
    pub(super) holder: Holder,
    bytes: u32,
    key: Option<Key>,
    /// Whether it was a suspect when it was given out.
    suspect: bool,
}

#[derive(Debug, Default)]
pub(super) struct Waiting {
    pub(super) at: Option<Instant>,
    bytes: u32,
    key: Option<Key>,
}

#[derive(Debug, Default)]
pub(super) struct Lane {
    pub(super) held: BTreeSet<u64>,
    waiting: BTreeSet<u64>,
}

impl Competing {
    /// Goes on at a position.
    pub fn new(cursor: Cursor, order: Order) -> Self {
        let next = cursor.floor() + 1;
        Self {
            cursor,
            order,
            next,
            held: BTreeMap::new(),
            waiting: BTreeMap::new(),
            ready: BTreeSet::new(),
            due: BTreeSet::new(),
            lanes: BTreeMap::new(),
            out: BTreeMap::new(),
            started: Timed::default(),
            delayed: BTreeMap::new(),
            due_at: Timed::default(),
            suspects_out: 0,
            suspect_at: None,
            asked_at: None,
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

    /// Who holds this message.
    pub fn holder_of(&self, sequence: u64) -> Option<Holder> {
        self.held.get(&sequence).map(|held| held.holder)
    }

    /// Messages that were looked at and wait.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Messages that were looked at and are not done: each may be a hole.
    fn unsettled(&self) -> usize {
        self.held.len() + self.waiting.len() + self.delayed.len()
    }

    /// Whether so many messages are unacked that no more are looked at.
    pub fn is_full(&self) -> bool {
        let condemned = self.cursor.condemned().len();
        self.unsettled() >= limits::MAX_UNSETTLED
            || condemned >= limits::MAX_CONDEMNED
            || self.delayed.len() >= limits::MAX_DELAYED
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
        now: Moment,
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
        // It has what it claims since now, as far as it is known.
        self.asked_at = Some(now.at);
        let dropped = self.hold(holder, claim);
        self.start(holder, &claim.started, now.at);
        dropped
    }

    fn hold(&mut self, holder: Holder, claim: &Claim) -> Sequences {
        let (mut dropped, mut refused) = (Sequences::new(), false);
        let claimed = claim.held.iter().flat_map(Clone::clone);
        let count = claim.held.iter().map(|range| range.end() - range.start() + 1).sum::<u64>();
        let each = u32::try_from(claim.held_bytes / count.max(1)).unwrap_or(u32::MAX);
        for sequence in claimed {
            let others = self.held.get(&sequence).map(|held| held.holder != holder);
            // No more than could be out before, whatever is claimed.
            let too_many = others.is_none() && self.is_full();
            let overtakes = self.would_overtake(sequence, holder, refused);
            let another = others == Some(true) || others.is_none() && overtakes;
            let done = sequence > self.cursor.head() || self.cursor.is_done(sequence);
            refused |= !done && (another || too_many);
            if done || another || too_many {
                dropped.insert(sequence..=sequence);
            } else if others.is_none() {
                let known = self.unwait(sequence).or_else(|| self.undelay(sequence));
                let Waiting { bytes, key, .. } = known.unwrap_or_default();
                let bytes = if bytes == 0 { each } else { bytes };
                self.give(sequence, holder, bytes, key);
            }
        }
        dropped
    }

    /// Whether a message must not go to a consumer that claims to have it: one of the same key that
    /// comes first waits, or is another's. It was taken back from the consumer before.
    fn would_overtake(&self, sequence: u64, holder: Holder, refused: bool) -> bool {
        // Of what was not looked at the key is unknown. Only from before a restart can somebody have
        // it, unless it was taken back, unheard, with one before it that is refused.
        let is_unknown = self.order == Order::Key && sequence >= self.next;
        if is_unknown && (refused || sequence > self.withheld) {
            return true;
        }
        let key = self.waiting.get(&sequence).and_then(|waiting| waiting.key.as_ref());
        let Some(lane) = key.and_then(|key| self.lanes.get(key)) else { return false };
        let is_first = lane.waiting.first() == Some(&sequence);
        !is_first || self.owner(key).is_some_and(|owner| owner != holder)
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
        self.suspect_at = self.suspect_at.filter(|at| now < *at + limits::SUSPICION);
        self.asked_at = Some(now);
        if self.cursor.condemned().len() >= limits::MAX_CONDEMNED {
            return None;
        }
        let mut ready = self.ready.range(self.withheld + 1..).filter_map(|sequence| {
            if self.waits_for_another_suspect(*sequence) {
                return None;
            }
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
        let room = limits::MAX_UNSETTLED.saturating_sub(self.unsettled());
        let room = room.min(limits::MAX_DELAYED.saturating_sub(self.delayed.len())) as u64;
        let last = self.cursor.head().min(self.next.saturating_add(room) - 1);
        (self.next <= last && can(None, 1)).then(|| (self.next, last - self.next + 1))
    }

    /// Of the suspects one at a time is tried.
    pub(super) fn waits_for_another_suspect(&self, sequence: u64) -> bool {
        self.is_suspect_tried() && self.cursor.suspects().contains(&sequence)
    }

    fn is_suspect_tried(&self) -> bool {
        self.suspects_out > 0 && self.suspect_at.is_some()
    }

    /// When the next suspect may be shown, if some wait for another one.
    pub fn tried_until(&self) -> Option<Instant> {
        let wait = self.is_suspect_tried() && self.cursor.suspects().len() > self.suspects_out;
        self.suspect_at.filter(|_| wait).map(|at| at + limits::SUSPICION)
    }

    /// Who has the messages of a key.
    fn owner(&self, key: Option<&Key>) -> Option<Holder> {
        let held = &self.lanes.get(key?)?.held;
        self.held.get(held.last()?).map(|held| held.holder)
    }

    /// A message that was read, which the subscription wants or not, with its terms: to whom it is to
    /// be sent, and as which attempt.
    /// `choose` says who could take so many bytes: the consumer of its key, or anyone.
    pub fn route(
        &mut self,
        message: &StoredMessage,
        terms: Terms,
        wanted: bool,
        choose: impl FnOnce(Option<Holder>, u64) -> Option<Holder>,
    ) -> Option<(Holder, u32)> {
        let sequence = message.sequence;
        if sequence == self.next {
            self.look_at(message, terms, wanted);
        }
        // One that was named by a consumer, and not looked at, has not told its size yet. It is
        // remembered: to `wants` it would fit again, for ever, or not as long as it seems too large.
        let bytes = u32::try_from(message.body.len()).unwrap_or(u32::MAX);
        let waiting = self.waiting.get_mut(&sequence)?;
        waiting.bytes = bytes;
        let key = waiting.key.clone();
        if sequence <= self.withheld
            || !self.ready.contains(&sequence)
            || self.waits_for_another_suspect(sequence)
        {
            return None;
        }
        let holder = choose(self.owner(key.as_ref()), u64::from(bytes))?;
        let Waiting { key, .. } = self.unwait(sequence)?;
        self.give(sequence, holder, bytes, key);
        Some((holder, self.cursor.failures(sequence).saturating_add(1)))
    }

    /// The first look at a message: from now on it is known what has to come before it.
    fn look_at(&mut self, message: &StoredMessage, terms: Terms, wanted: bool) {
        let sequence = message.sequence;
        self.next += 1;
        if self.cursor.is_done(sequence) {
            return;
        }
        if !wanted {
            self.cursor.settle(sequence, sequence);
            self.let_go(sequence, sequence);
            return;
        }
        let key = terms.key.filter(|_| self.order == Order::Key);
        let bytes = u32::try_from(message.body.len()).unwrap_or(u32::MAX);
        let since = self.started.at(sequence);
        if let Some(held) = self.take_held(sequence) {
            self.put_held(sequence, Held { bytes, key, ..held });
            since.into_iter().for_each(|since| self.started.insert(sequence, since));
            return;
        }
        let early = self.unwait(sequence);
        match terms.due.filter(|_| early.is_none()) {
            Some(due) => {
                self.due_at.insert(sequence, due);
                self.delayed.insert(sequence, Waiting { at: None, bytes, key });
            }
            None => self.put_waiting(sequence, Waiting { bytes, key, ..early.unwrap_or_default() }),
        }
    }

    /// All messages up to here were looked at.
    pub fn looked_at(&self) -> u64 {
        self.next.max(self.cursor.floor() + 1) - 1
    }

    /// A message that is not wanted is passed over, if it is the next one to be looked at.
    pub fn pass_over(&mut self, sequence: u64) -> bool {
        self.skip_settled();
        let is_next = sequence == self.next;
        if is_next {
            self.next += 1;
            self.cursor.settle(sequence, sequence);
            self.let_go(sequence, sequence);
        }
        is_next
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
    pub(super) fn let_go(&mut self, first: u64, last: u64) {
        let held = self.held.range(first..=last).map(|(sequence, _)| *sequence);
        let waiting = self.waiting.range(first..=last).map(|(sequence, _)| *sequence);
        for sequence in held.chain(waiting).collect::<Vec<_>>() {
            self.take_held(sequence);
            self.unwait(sequence);
        }
        let delayed = self.delayed.range(first..=last).map(|(sequence, _)| *sequence);
        for sequence in delayed.collect::<Vec<_>>() {
            self.undelay(sequence);
        }
    }

    /// Makes a message wait that is held, or that nothing is known of. Answers its key.
    pub(super) fn hand_back(&mut self, sequence: u64, at: Option<Instant>) -> Option<Key> {
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

    /// Moves the position: all up to the floor is done, and these beyond it.
    pub fn restore(&mut self, floor: u64, done: &Sequences) {
        self.cursor.restore(floor, done);
        self.held.clear();
        self.waiting.clear();
        self.ready.clear();
        self.due.clear();
        self.lanes.clear();
        self.out.clear();
        (self.started, self.suspects_out, self.suspect_at) = (Timed::default(), 0, None);
        self.delayed.clear();
        self.due_at = Timed::default();
        self.next = self.cursor.floor() + 1;
        (self.withheld, self.lost_below) = (0, 0);
    }

    /// Messages below `first` are gone. Answers what the consumers are to be told, if it is news.
    /// The floor waits until one knows.
    pub fn lose_below(&mut self, first: u64) -> Option<(u64, u64)> {
        let first = first.min(self.cursor.head() + 1).max(self.lost_below);
        // What is handed back of it is lost, too.
        let waiting =
            self.waiting.first_key_value().into_iter().chain(self.delayed.first_key_value());
        let handed_back = waiting.map(|(waits, _)| *waits).min().is_some_and(|waits| waits < first);
        if first == self.lost_below && !handed_back {
            return None;
        }
        self.lost_below = first;
        self.next = self.next.max(first);
        let gone = self.waiting.range(..first).map(|(sequence, _)| *sequence);
        let delayed = self.delayed.range(..first).map(|(sequence, _)| *sequence);
        for sequence in gone.chain(delayed).collect::<Vec<_>>() {
            self.unwait(sequence);
            self.undelay(sequence);
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

    fn give(&mut self, sequence: u64, holder: Holder, bytes: u32, key: Option<Key>) {
        let suspect = self.cursor.suspects().contains(&sequence);
        if suspect {
            self.suspect_at = self.asked_at;
        }
        self.put_held(sequence, Held { holder, bytes, key, suspect });
    }

    fn put_held(&mut self, sequence: u64, held: Held) {
        self.suspects_out += usize::from(held.suspect);
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
        self.started.remove(sequence);
        self.suspects_out -= usize::from(held.suspect);
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

    pub(super) fn put_waiting(&mut self, sequence: u64, waiting: Waiting) {
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
    pub(super) fn classify(&mut self, sequence: u64) {
        let could = self.waiting.get(&sequence).is_some_and(|waiting| {
            let lane = waiting.key.as_ref().and_then(|key| self.lanes.get(key));
            let first = lane.is_none_or(|lane| lane.waiting.first() == Some(&sequence));
            let condemned = self.cursor.condemned().contains(&sequence);
            sequence < self.next && waiting.at.is_none() && first && !condemned
        });
        if could {
            self.ready.insert(sequence);
        } else {
            self.ready.remove(&sequence);
        }
    }
}
