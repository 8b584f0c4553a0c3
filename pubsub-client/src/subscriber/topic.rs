//! What a subscriber knows of one topic. Pure: no I/O, no clock.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rangemap::RangeInclusiveSet;

use super::ascending::Ascending;
use super::buffer::{Buffer, Item};
use super::dedup::Dedup;
use super::nacks::{Nacked, Nacks};
use super::order::{Lane, Order};
use super::runs::Runs;

/// Names one topic with one epoch and one position generation, for the life of the subscriber.
/// A seek or a recreated topic makes a new key, so that older handles name nothing any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct TopicKey(pub(super) u64);

/// What the server says about a topic when it joins a session.
#[derive(Clone, Debug)]
pub(super) struct Joined {
    pub(super) number: u32,
    pub(super) name: Arc<str>,
    pub(super) epoch: u64,
    pub(super) cursor_generation: u64,
    pub(super) floor: u64,
    pub(super) head: u64,
    /// What the hello named as held and the server has no use for.
    pub(super) dropped: Vec<RangeInclusive<u64>>,
}

/// What the hello tells the server about a topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Position {
    pub(super) name: Arc<str>,
    pub(super) epoch: u64,
    pub(super) cursor_generation: u64,
    pub(super) held: Vec<RangeInclusive<u64>>,
    pub(super) held_bytes: u64,
    pub(super) acked: Vec<RangeInclusive<u64>>,
    pub(super) nacked: Vec<(u64, Nacked)>,
    pub(super) missed: Vec<RangeInclusive<u64>>,
    pub(super) last_received: u64,
    pub(super) started: Vec<RangeInclusive<u64>>,
}

impl Position {
    pub(super) fn sent(&self) -> Sent {
        let nacks = self.nacked.iter().map(|(sequence, nack)| (*sequence, nack.showing)).collect();
        Sent { acks: self.acked.clone(), nacks, missed: self.missed.clone() }
    }
}

/// Messages that will never be received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Missing {
    pub(super) range: RangeInclusive<u64>,
    pub(super) reason: i32,
}

/// What the server is to be told of a topic.
#[derive(Clone, Debug)]
pub(super) struct Unsent {
    pub(super) acks: Vec<RangeInclusive<u64>>,
    pub(super) nacks: Vec<(u64, Nacked)>,
    pub(super) missed: Vec<RangeInclusive<u64>>,
    /// In the application's hands. It needs no confirmation: the next hello says it again.
    pub(super) started: Vec<RangeInclusive<u64>>,
}

/// What it was told, and has to confirm.
#[derive(Debug)]
pub(super) struct Sent {
    pub(super) acks: Vec<RangeInclusive<u64>>,
    /// Sequences and showings.
    pub(super) nacks: Vec<(u64, u64)>,
    pub(super) missed: Vec<RangeInclusive<u64>>,
}

impl Unsent {
    pub(super) fn sent(&self) -> Sent {
        let nacks = self.nacks.iter().map(|(sequence, nack)| (*sequence, nack.showing)).collect();
        Sent { acks: self.acks.clone(), nacks, missed: self.missed.clone() }
    }
}

/// The next thing to show.
#[derive(Debug)]
pub(super) enum Next<M> {
    Message {
        sequence: u64,
        attempt: u32,
        message: M,
    },
    Gap(Missing),
    /// The server cannot read this message, and sends nothing from there on.
    DataLoss(u64),
}

/// Which thing that is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    Message(u64),
    Gap,
    DataLoss,
}

/// A message in the application's hands.
#[derive(Debug)]
pub(super) struct Outstanding {
    pub(super) showing: u64,
    pub(super) attempt: u32,
    bytes: u64,
    since: Instant,
    lane: Option<Lane>,
}

/// The states of a message, each a set below: buffered, outstanding (in the application's hands),
/// acked (and not confirmed), nacked (and not confirmed), done. What is in none of them is the
/// server's to deliver.
#[derive(Debug)]
pub(super) struct Topic<M> {
    pub(super) name: Arc<str>,
    pub(super) epoch: u64,
    pub(super) cursor_generation: u64,
    pub(super) order: Order,
    /// The deleted topic that had the name before, while something of it is here.
    pub(super) predecessor: Option<TopicKey>,
    /// Its number on the present stream.
    pub(super) number: Option<u32>,
    /// The rewinds on the present stream.
    pub(super) generation: u32,
    pub(super) head: u64,
    /// The server has sent all up to here on this stream, or has found it not to be for us.
    pub(super) passed: u64,
    pub(super) last_received: u64,
    /// All up to here was received, as far as it is to be; a nack or a rewind takes it back.
    read: u64,
    /// The last message that was handed out; 0 if none was.
    pub(super) last_shown: u64,
    /// All up to here is before the start.
    start: u64,
    /// Deleted on the server: what is here is still shown, acks have no meaning any more.
    pub(super) left: bool,
    pub(super) done: Dedup,
    // All of these are bounded by the credit that the server keeps to, and that the session
    // checks.
    buffered: Buffer<M>,
    outstanding: Ascending<Outstanding>,
    gaps: BTreeMap<u64, Missing>,
    /// The message that the server cannot read, and whether the application was told.
    damaged: Option<(u64, bool)>,
    announced: RangeInclusiveSet<u64>,
    /// Gaps that the application knows of, and the server does not know that yet.
    missed: RangeInclusiveSet<u64>,
    missed_to_send: RangeInclusiveSet<u64>,
    acked: Runs,
    acks_to_send: Runs,
    nacks: Nacks,
    /// Handed out since the server was told what is. Empty if it does not want to know.
    started_to_send: Runs,
}

impl<M> Topic<M> {
    pub(super) fn new(joined: &Joined, order: Order) -> Self {
        Self {
            name: Arc::clone(&joined.name),
            epoch: joined.epoch,
            cursor_generation: joined.cursor_generation,
            order,
            predecessor: None,
            number: Some(joined.number),
            generation: 0,
            head: joined.head,
            passed: joined.floor,
            // "Latest" is resolved once: a reader that is cut off before its first message goes
            // on from here.
            last_received: joined.floor,
            read: joined.floor,
            last_shown: 0,
            start: joined.floor,
            left: false,
            done: Dedup::new(joined.floor),
            buffered: Buffer::new(),
            outstanding: Ascending::new(),
            gaps: BTreeMap::new(),
            damaged: None,
            announced: RangeInclusiveSet::new(),
            missed: RangeInclusiveSet::new(),
            missed_to_send: RangeInclusiveSet::new(),
            acked: Runs::default(),
            acks_to_send: Runs::default(),
            nacks: Nacks::default(),
            started_to_send: Runs::default(),
        }
    }

    /// The same topic on a new stream, on which the server has applied what the hello said.
    pub(super) fn resume(&mut self, joined: &Joined, order: Order) {
        self.number = Some(joined.number);
        self.order = order;
        self.generation = 0;
        self.head = self.head.max(joined.head);
        self.passed = joined.floor;
        self.raise_floor(joined.floor);
        self.disown(&joined.dropped);
        // Handed back after the hello was made, when they were another's already. A nack that is
        // sent now could be taken for one of a later delivery.
        let dropped = |sequence| joined.dropped.iter().any(|range| range.contains(&sequence));
        self.nacks.retain(|sequence| !dropped(sequence));
    }

    /// The server says that all up to here is received or released. What is here nevertheless was
    /// acked by another showing, or elsewhere: it is shown, and its acks are done.
    pub(super) fn raise_floor(&mut self, floor: u64) {
        self.done.raise_floor(floor);
        self.prune();
    }

    /// These are not for this consumer any more. Older handles live on, and may ack.
    fn disown(&mut self, ranges: &[RangeInclusive<u64>]) {
        // A range that ends before it begins is a mistake of the server's, and names nothing.
        for range in ranges.iter().filter(|range| !range.is_empty()) {
            self.buffered.remove_all(range.clone());
            self.outstanding.retain(|sequence, _| !range.contains(&sequence));
        }
    }

    /// What the hello of a reader says: its position is what was handed out. The server keeps
    /// nothing that could spare it from sending again what is buffered here.
    pub(super) fn reader_position(&mut self) -> Position {
        self.buffered.clear();
        self.gaps.clear();
        self.announced.clear();
        self.missed.clear();
        self.acked.clear();
        self.last_received = self.last_shown.max(self.start);
        self.read = self.last_received;
        self.done = Dedup::new(self.last_received);
        self.position(false)
    }

    /// What the hello says. Everything unconfirmed goes with it, and counts as sent. `started`:
    /// with what is in the application's hands.
    pub(super) fn position(&mut self, started: bool) -> Position {
        self.rewind_by_nacks();
        self.number = None;
        self.acks_to_send.clear();
        self.missed_to_send.clear();
        self.started_to_send.clear();
        // A deliberate bug, for tests of tests.
        if cfg!(pubsub_break = "acks_dropped_at_reconnect") {
            self.acked.clear();
        }
        let mut held = RangeInclusiveSet::new();
        for sequence in self.buffered.sequences().chain(self.outstanding.keys()) {
            // A deliberate bug, for tests of tests.
            let last = sequence + u64::from(cfg!(pubsub_break = "resume_off_by_one"));
            held.insert(sequence..=last);
        }
        let outstanding: u64 = self.outstanding.iter().map(|(_, out)| out.bytes).sum();
        let hands = self.outstanding.keys().filter(|_| started).map(|sequence| sequence..=sequence);
        let started: RangeInclusiveSet<u64> = hands.collect();
        Position {
            name: Arc::clone(&self.name),
            epoch: self.epoch,
            cursor_generation: self.cursor_generation,
            held: held.into_iter().collect(),
            held_bytes: self.buffered.bytes() + outstanding,
            acked: self.acked.all().iter().cloned().collect(),
            nacked: self.nacks.send_all(),
            missed: self.missed.iter().cloned().collect(),
            last_received: self.last_received,
            started: started.into_iter().collect(),
        }
    }

    /// A stream was lost between nacks and their rewinds. The server is going to deliver a lane
    /// from its nacked message on, and nothing after it may be shown before it.
    fn rewind_by_nacks(&mut self) {
        for (lane, from) in self.nacks.settle() {
            self.take_back(&lane, from);
        }
    }

    fn take_back(&mut self, lane: &Lane, from: u64) {
        self.buffered.take_back(lane, from);
        let stays =
            |sequence: u64, out: &Outstanding| sequence < from || out.lane.as_ref() != Some(lane);
        self.outstanding.retain(stays);
        if *lane == Lane::Topic {
            self.read = self.read.min(from.saturating_sub(1));
            self.passed = self.passed.min(from.saturating_sub(1));
        }
    }

    /// Takes a delivered message in. Says whether it is one to be shown.
    pub(super) fn receive(&mut self, sequence: u64, item: Item<M>) -> bool {
        // All that is known here, but for what the server says of its floor, was received.
        let seen = sequence <= self.last_received;
        // A deliberate bug, for tests of tests.
        let skip = cfg!(pubsub_break = "resume_by_last_received") && seen;
        self.last_received = self.last_received.max(sequence);
        self.read = self.read.max(sequence);
        self.head = self.head.max(sequence);
        self.damaged = self.damaged.filter(|(damaged, _)| sequence < *damaged);
        if skip {
            return false;
        }
        if seen && item.lane.is_none() {
            // It comes again, so that the server has its nack: one that went with the next hello
            // would be that of this delivery. In a lane the rewind of an earlier message can bring
            // it, too, and the confirmation tells.
            self.nacks.remove(sequence);
        }
        if self.done.contains(sequence) {
            // The ack was lost, not the work: ack again.
            self.queue_ack(sequence);
            return false;
        }
        let known = seen
            && (self.acked.contains(sequence)
                || self.buffered.contains(sequence)
                || self.outstanding.contains(sequence));
        if !known {
            self.buffered.insert(sequence, item);
        }
        !known
    }

    /// Takes the announcement of a gap in, as far as it is news: a server tells it again when it
    /// reads past the same place again, and does not know what has arrived here nevertheless.
    pub(super) fn receive_gap(&mut self, missing: &Missing) -> bool {
        let mut known = self.announced.clone();
        known.extend(self.acked.all().iter().cloned());
        known.extend(self.done.ranges());
        let held = self.buffered.sequences().chain(self.outstanding.keys());
        known.extend(held.map(|sequence| sequence..=sequence));
        let news: Vec<_> = known.gaps(&missing.range).collect();
        for range in &news {
            let piece = Missing { range: range.clone(), reason: missing.reason };
            self.gaps.insert(*range.start(), piece);
        }
        // Not all of it: what is held and handed back later is lost then, and that is news.
        self.announced.extend(news.iter().cloned());
        self.last_received = self.last_received.max(*missing.range.end());
        self.read = self.read.max(*missing.range.end());
        self.head = self.head.max(*missing.range.end());
        !news.is_empty()
    }

    /// The server cannot read this message. It says so on every stream.
    pub(super) fn receive_damage(&mut self, sequence: u64) {
        if self.damaged.is_none_or(|(known, _)| known != sequence) {
            self.damaged = Some((sequence, false));
        }
    }

    /// The server is going to deliver again: all from there on, or what it has taken back.
    pub(super) fn rewind(&mut self, from: u64, generation: u32, back: &[RangeInclusive<u64>]) {
        if back.is_empty() {
            self.generation = generation;
            self.take_back(&Lane::Topic, from);
            return;
        }
        self.disown(back);
        // What is done elsewhere by now is not named, and must not be shown before the others.
        for (lane, from) in self.nacks.lanes_in(back) {
            self.take_back(&lane, from);
        }
    }

    /// What is next to show in a lane that is allowed: nothing before it is here or on the way.
    pub(super) fn next(&self, allowed: impl Fn(&Lane) -> bool) -> Option<Turn> {
        let is_open = |lane: Option<&Lane>| {
            lane.is_none_or(|lane| !self.nacks.silence(lane) && allowed(lane))
        };
        let whole = self.order.lane("");
        let first = self.buffered.first();
        if is_open(whole.as_ref()) {
            // Where the topic has an order, a gap has its place in it.
            let comes_first =
                |gap: &u64| whole.is_none() || first.is_none_or(|first| *gap <= first);
            if self.gaps.keys().next().is_some_and(comes_first) {
                return Some(Turn::Gap);
            }
            // The server has sent everything before it.
            if first.is_none() && self.untold_damage().is_some() {
                return Some(Turn::DataLoss);
            }
        }
        self.buffered.next(is_open).map(Turn::Message)
    }

    /// Whether there is something to show, and nothing that must come before it.
    pub(super) fn is_ready(&self) -> bool {
        self.next(|_| true).is_some()
    }

    fn untold_damage(&self) -> Option<u64> {
        self.damaged.filter(|(_, told)| !told).map(|(sequence, _)| sequence)
    }

    /// The server is to be told that this is in the application's hands.
    pub(super) fn report(&mut self, sequence: u64) {
        if self.outstanding.contains(sequence) {
            self.started_to_send.insert(sequence);
        }
    }

    /// Hands out what is next. `auto_ack`: it needs no ack by the application.
    pub(super) fn take(
        &mut self,
        turn: Turn,
        showing: u64,
        now: Instant,
        auto_ack: bool,
    ) -> Option<Next<M>> {
        match turn {
            Turn::Gap => {
                let (_, missing) = self.gaps.pop_first()?;
                self.last_shown = self.last_shown.max(*missing.range.end());
                if !self.left {
                    self.missed.insert(missing.range.clone());
                    self.missed_to_send.insert(missing.range.clone());
                }
                Some(Next::Gap(missing))
            }
            Turn::DataLoss => {
                let sequence = self.untold_damage()?;
                self.damaged = Some((sequence, true));
                Some(Next::DataLoss(sequence))
            }
            Turn::Message(sequence) => {
                let Item { attempt, bytes, lane, message } = self.buffered.remove(sequence)?;
                self.last_shown = sequence;
                if auto_ack {
                    self.queue_ack(sequence);
                } else {
                    let out = Outstanding { showing, attempt, bytes, since: now, lane };
                    self.outstanding.insert(sequence, out);
                }
                Some(Next::Message { sequence, attempt, message })
            }
        }
    }

    /// The application has processed a message. It does not matter which showing of it, nor
    /// whether the server has taken it back meanwhile. Says whether that is news, and whether
    /// something else may be the next to be shown now.
    pub(super) fn ack(&mut self, sequence: u64) -> (bool, bool) {
        // It is in one place at most.
        let held = self.outstanding.remove(sequence).is_some();
        let buffered = !held && self.buffered.remove(sequence).is_some();
        let was_next = buffered || self.nacks.has_unsent();
        self.nacks.remove_unsent(sequence);
        let known = self.done.contains(sequence) || !held && self.acked.contains(sequence);
        if self.left || known {
            return (false, was_next);
        }
        self.queue_ack(sequence);
        (true, was_next)
    }

    /// All messages in the application's hands up to this one.
    pub(super) fn outstanding_up_to(&self, sequence: u64) -> Vec<u64> {
        self.outstanding.keys_in(0..=sequence).collect()
    }

    /// The messages that the application has held for longer than `limit`, and for how long.
    pub(super) fn overdue(
        &self,
        now: Instant,
        limit: Duration,
    ) -> impl Iterator<Item = (u64, &Outstanding, Duration)> {
        self.outstanding.iter().filter_map(move |(sequence, out)| {
            let held_for = now.saturating_duration_since(out.since);
            (held_for > limit).then_some((sequence, out, held_for))
        })
    }

    fn queue_ack(&mut self, sequence: u64) {
        self.acked.insert(sequence);
        self.acks_to_send.insert(sequence);
    }

    /// The application hands a message back. Only the handle of the present showing can: what
    /// the server took back is not the older handle's any more. Says whether it could.
    pub(super) fn nack(&mut self, sequence: u64, nacked: Nacked) -> bool {
        let current = self.outstanding.get(sequence).map(|out| out.showing);
        if self.left || current != Some(nacked.showing) {
            return false;
        }
        let lane = self.outstanding.remove(sequence).and_then(|out| out.lane);
        self.nacks.insert(sequence, nacked, lane);
        true
    }

    /// What is to be sent and was not yet on this stream.
    pub(super) fn unsent(&mut self) -> Unsent {
        Unsent {
            acks: self.acks_to_send.take(),
            nacks: self.nacks.send(),
            missed: std::mem::take(&mut self.missed_to_send).into_iter().collect(),
            // What is settled already is no news; the server knows that it does not hold it.
            started: self.started_to_send.take(),
        }
    }

    pub(super) fn has_unsent(&self) -> bool {
        let nothing = self.acks_to_send.is_empty()
            && self.missed_to_send.is_empty()
            && self.started_to_send.is_empty();
        !nothing || self.nacks.has_unsent()
    }

    /// The server has these on disk.
    pub(super) fn confirm(&mut self, sent: &Sent) {
        for range in &sent.acks {
            self.acked.remove(range.clone());
            self.acks_to_send.remove(range.clone());
            self.done.insert(range.clone());
        }
        for range in &sent.missed {
            self.missed.remove(range.clone());
            self.done.insert(range.clone());
        }
        for (sequence, showing) in &sent.nacks {
            // The rewind has come before the confirmation; or it never will, since the server had no
            // use for the nack. The rewind alone could be that of an earlier nack.
            self.nacks.confirm(*sequence, *showing);
        }
        self.prune();
    }

    /// What is done with needs no second set that says so.
    fn prune(&mut self) {
        self.announced.remove(0..=self.done.floor());
    }

    #[cfg(test)]
    pub(super) fn announced(&self) -> usize {
        self.announced.len()
    }

    /// How many messages are in the application's hands.
    pub(super) fn outstanding(&self) -> usize {
        self.outstanding.len()
    }

    /// How many messages are held, here or in the application's hands.
    pub(super) fn held(&self) -> usize {
        self.buffered.len() + self.outstanding.len()
    }

    /// Whether acks or nacks are unconfirmed.
    pub(super) fn is_unconfirmed(&self) -> bool {
        !(self.acked.is_empty() && self.nacks.is_empty() && self.missed.is_empty())
    }

    pub(super) fn unconfirmed(&self) -> u64 {
        self.acked.count().saturating_add(self.nacks.len() as u64)
    }

    /// Whether everything up to the head was shown, or is not for this consumer.
    pub(super) fn caught_up(&self) -> bool {
        let received = match self.order {
            Order::Topic => self.read,
            // What came last does not say that all before it has come.
            Order::Key | Order::None => 0,
        };
        let read = received.max(self.done.floor()).max(self.passed);
        let nothing_here = self.buffered.is_empty() && self.gaps.is_empty();
        read >= self.head && nothing_here && !self.nacks.silence_any()
    }

    /// The topic was deleted.
    pub(super) fn leave(&mut self) {
        self.left = true;
        self.number = None;
        self.acked.clear();
        self.acks_to_send.clear();
        self.nacks = Nacks::default();
        self.missed.clear();
        self.missed_to_send.clear();
        self.started_to_send.clear();
        self.outstanding.clear();
    }

    /// Whether nothing is left of a topic that was deleted.
    pub(super) fn is_over(&self) -> bool {
        self.left && self.buffered.is_empty() && self.gaps.is_empty()
    }
}
