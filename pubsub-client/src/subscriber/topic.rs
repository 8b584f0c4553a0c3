//! What a subscriber knows of one topic. Pure: no I/O, no clock.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rangemap::RangeInclusiveSet;

use super::dedup::Dedup;

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
}

impl Position {
    pub(super) fn sent(&self) -> Sent {
        let nacks = self.nacked.iter().map(|(sequence, nack)| (*sequence, nack.showing)).collect();
        Sent { acks: self.acked.clone(), nacks, missed: self.missed.clone() }
    }
}

/// A message handed back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Nacked {
    /// The attempt that failed; 0 if none did.
    pub(super) attempt: u32,
    pub(super) delay: Option<Duration>,
    pub(super) reason: String,
    /// Tells this nack from an earlier one of the same message.
    pub(super) showing: u64,
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

#[derive(Debug)]
struct Buffered<M> {
    message: M,
    attempt: u32,
    bytes: u64,
}

/// A message in the application's hands.
#[derive(Debug)]
pub(super) struct Outstanding {
    pub(super) showing: u64,
    pub(super) attempt: u32,
    bytes: u64,
    since: Instant,
}

/// The states of a message, each a set below: buffered, outstanding (in the application's hands),
/// acked (and not confirmed), nacked (and not confirmed), done. What is in none of them is the
/// server's to deliver.
#[derive(Debug)]
pub(super) struct Topic<M> {
    pub(super) name: Arc<str>,
    pub(super) epoch: u64,
    pub(super) cursor_generation: u64,
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
    buffered: BTreeMap<u64, Buffered<M>>,
    outstanding: BTreeMap<u64, Outstanding>,
    gaps: BTreeMap<u64, Missing>,
    /// The message that the server cannot read, and whether the application was told.
    damaged: Option<(u64, bool)>,
    announced: RangeInclusiveSet<u64>,
    /// Gaps that the application knows of, and the server does not know that yet.
    missed: RangeInclusiveSet<u64>,
    missed_to_send: RangeInclusiveSet<u64>,
    acked: RangeInclusiveSet<u64>,
    acks_to_send: RangeInclusiveSet<u64>,
    nacked: BTreeMap<u64, Nacked>,
    nacks_to_send: BTreeSet<u64>,
    /// Nothing is shown while there are any: their rewinds are on the way.
    unsettled_nacks: BTreeSet<u64>,
}

impl<M> Topic<M> {
    pub(super) fn new(joined: &Joined) -> Self {
        Self {
            name: Arc::clone(&joined.name),
            epoch: joined.epoch,
            cursor_generation: joined.cursor_generation,
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
            buffered: BTreeMap::new(),
            outstanding: BTreeMap::new(),
            gaps: BTreeMap::new(),
            damaged: None,
            announced: RangeInclusiveSet::new(),
            missed: RangeInclusiveSet::new(),
            missed_to_send: RangeInclusiveSet::new(),
            acked: RangeInclusiveSet::new(),
            acks_to_send: RangeInclusiveSet::new(),
            nacked: BTreeMap::new(),
            nacks_to_send: BTreeSet::new(),
            unsettled_nacks: BTreeSet::new(),
        }
    }

    /// The same topic on a new stream, on which the server has applied what the hello said.
    pub(super) fn resume(&mut self, joined: &Joined) {
        self.number = Some(joined.number);
        self.generation = 0;
        self.head = self.head.max(joined.head);
        self.passed = joined.floor;
        self.done.raise_floor(joined.floor);
        self.prune();
        for range in &joined.dropped {
            self.buffered.retain(|sequence, _| !range.contains(sequence));
            self.outstanding.retain(|sequence, _| !range.contains(sequence));
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
        self.position()
    }

    /// What the hello says. Everything unconfirmed goes with it, and counts as sent.
    pub(super) fn position(&mut self) -> Position {
        self.rewind_by_nack();
        self.number = None;
        self.acks_to_send.clear();
        self.nacks_to_send.clear();
        self.missed_to_send.clear();
        // A deliberate bug, for tests of tests.
        if cfg!(pubsub_break = "acks_dropped_at_reconnect") {
            self.acked.clear();
        }
        let mut held = RangeInclusiveSet::new();
        for sequence in self.buffered.keys().chain(self.outstanding.keys()) {
            // A deliberate bug, for tests of tests.
            let last = sequence + u64::from(cfg!(pubsub_break = "resume_off_by_one"));
            held.insert(*sequence..=last);
        }
        let bytes = self.buffered.values().map(|message| message.bytes);
        Position {
            name: Arc::clone(&self.name),
            epoch: self.epoch,
            cursor_generation: self.cursor_generation,
            held: held.into_iter().collect(),
            held_bytes: bytes.chain(self.outstanding.values().map(|out| out.bytes)).sum(),
            acked: self.acked.iter().cloned().collect(),
            nacked: self.nacked.iter().map(|(seq, nack)| (*seq, nack.clone())).collect(),
            missed: self.missed.iter().cloned().collect(),
            last_received: self.last_received,
        }
    }

    /// A stream was lost between a nack and its rewind. The server is going to deliver from the
    /// nacked message on, and nothing after it may be shown before it.
    fn rewind_by_nack(&mut self) {
        if let Some(from) = self.unsettled_nacks.pop_first() {
            self.take_back(from);
        }
        self.unsettled_nacks.clear();
    }

    fn take_back(&mut self, from: u64) {
        self.buffered.split_off(&from);
        self.outstanding.split_off(&from);
        self.read = self.read.min(from.saturating_sub(1));
        self.passed = self.passed.min(from.saturating_sub(1));
    }

    /// Takes a delivered message in. Says whether it is one to be shown.
    pub(super) fn receive(&mut self, sequence: u64, item: (u32, u64, M)) -> bool {
        let (attempt, bytes, message) = item;
        // A deliberate bug, for tests of tests.
        let skip = cfg!(pubsub_break = "resume_by_last_received") && sequence <= self.last_received;
        self.last_received = self.last_received.max(sequence);
        self.read = self.read.max(sequence);
        self.head = self.head.max(sequence);
        self.damaged = self.damaged.filter(|(damaged, _)| sequence < *damaged);
        if skip {
            return false;
        }
        if self.done.contains(sequence) {
            // The ack was lost, not the work: ack again.
            self.queue_ack(sequence);
            return false;
        }
        let known = self.acked.contains(&sequence)
            || self.buffered.contains_key(&sequence)
            || self.outstanding.contains_key(&sequence);
        if !known {
            self.buffered.insert(sequence, Buffered { message, attempt, bytes });
        }
        !known
    }

    /// Takes the announcement of a gap in, as far as it is news: a server tells it again when it
    /// reads past the same place again, and does not know what has arrived here nevertheless.
    pub(super) fn receive_gap(&mut self, missing: &Missing) -> bool {
        let mut known = self.announced.clone();
        known.extend(self.acked.iter().cloned());
        known.extend(self.done.ranges());
        let held = self.buffered.keys().chain(self.outstanding.keys());
        known.extend(held.map(|sequence| *sequence..=*sequence));
        let news: Vec<_> = known.gaps(&missing.range).collect();
        for range in &news {
            let piece = Missing { range: range.clone(), reason: missing.reason };
            self.gaps.insert(*range.start(), piece);
        }
        self.announced.insert(missing.range.clone());
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

    /// The server is going to deliver again from here on.
    pub(super) fn rewind(&mut self, from: u64, generation: u32) {
        self.generation = generation;
        self.take_back(from);
    }

    /// Whether there is something to show, and nothing that must come before it.
    pub(super) fn is_ready(&self) -> bool {
        let something = !(self.buffered.is_empty() && self.gaps.is_empty());
        self.unsettled_nacks.is_empty() && (something || self.untold_damage().is_some())
    }

    fn untold_damage(&self) -> Option<u64> {
        self.damaged.filter(|(_, told)| !told).map(|(sequence, _)| sequence)
    }

    /// Hands out the next thing, in the order of the log. `auto_ack`: it needs no ack by the
    /// application.
    pub(super) fn take(&mut self, showing: u64, now: Instant, auto_ack: bool) -> Option<Next<M>> {
        let message = self.buffered.first_key_value().map(|(sequence, _)| *sequence);
        let gap = self.gaps.first_key_value().map(|(sequence, _)| *sequence);
        if let Some(gap) = gap
            && message.is_none_or(|message| gap <= message)
        {
            let (_, missing) = self.gaps.pop_first()?;
            self.last_shown = self.last_shown.max(*missing.range.end());
            if !self.left {
                self.missed.insert(missing.range.clone());
                self.missed_to_send.insert(missing.range.clone());
            }
            return Some(Next::Gap(missing));
        }
        // The server has sent everything before it.
        if message.is_none()
            && let Some(sequence) = self.untold_damage()
        {
            self.damaged = Some((sequence, true));
            return Some(Next::DataLoss(sequence));
        }
        let (sequence, Buffered { message, attempt, bytes }) = self.buffered.pop_first()?;
        self.last_shown = sequence;
        if auto_ack {
            self.queue_ack(sequence);
        } else {
            let out = Outstanding { showing, attempt, bytes, since: now };
            self.outstanding.insert(sequence, out);
        }
        Some(Next::Message { sequence, attempt, message })
    }

    /// The application has processed a message. It does not matter which showing of it, nor
    /// whether the server has taken it back meanwhile. Says whether that is news.
    pub(super) fn ack(&mut self, sequence: u64) -> bool {
        self.outstanding.remove(&sequence);
        self.buffered.remove(&sequence);
        if self.nacks_to_send.remove(&sequence) {
            self.nacked.remove(&sequence);
            self.unsettled_nacks.remove(&sequence);
        }
        if self.left || self.done.contains(sequence) || self.acked.contains(&sequence) {
            return false;
        }
        self.queue_ack(sequence);
        true
    }

    /// All messages in the application's hands up to this one.
    pub(super) fn outstanding_up_to(&self, sequence: u64) -> Vec<u64> {
        self.outstanding.range(..=sequence).map(|(sequence, _)| *sequence).collect()
    }

    /// The messages that the application has held for longer than `limit`, and for how long.
    pub(super) fn overdue(
        &self,
        now: Instant,
        limit: Duration,
    ) -> impl Iterator<Item = (u64, &Outstanding, Duration)> {
        self.outstanding.iter().filter_map(move |(sequence, out)| {
            let held_for = now.saturating_duration_since(out.since);
            (held_for > limit).then_some((*sequence, out, held_for))
        })
    }

    fn queue_ack(&mut self, sequence: u64) {
        self.acked.insert(sequence..=sequence);
        self.acks_to_send.insert(sequence..=sequence);
    }

    /// The application hands a message back. Only the handle of the present showing can: what
    /// the server took back is not the older handle's any more. Says whether it could.
    pub(super) fn nack(&mut self, sequence: u64, nacked: Nacked) -> bool {
        let current = self.outstanding.get(&sequence).map(|out| out.showing);
        if self.left || current != Some(nacked.showing) {
            return false;
        }
        self.outstanding.remove(&sequence);
        self.nacked.insert(sequence, nacked);
        self.nacks_to_send.insert(sequence);
        self.unsettled_nacks.insert(sequence);
        true
    }

    /// What is to be sent and was not yet on this stream.
    pub(super) fn unsent(&mut self) -> Unsent {
        let nacks = std::mem::take(&mut self.nacks_to_send);
        let item = |sequence| self.nacked.get(&sequence).map(|nack| (sequence, nack.clone()));
        Unsent {
            acks: std::mem::take(&mut self.acks_to_send).into_iter().collect(),
            nacks: nacks.into_iter().filter_map(item).collect(),
            missed: std::mem::take(&mut self.missed_to_send).into_iter().collect(),
        }
    }

    pub(super) fn has_unsent(&self) -> bool {
        !(self.acks_to_send.is_empty()
            && self.nacks_to_send.is_empty()
            && self.missed_to_send.is_empty())
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
            if self.nacked.get(sequence).is_some_and(|nack| nack.showing == *showing) {
                self.nacked.remove(sequence);
                // The rewind has come before the confirmation; or it never will, since the server
                // had no use for the nack. The rewind alone could be that of an earlier nack.
                self.unsettled_nacks.remove(sequence);
            }
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
        !(self.acked.is_empty() && self.nacked.is_empty() && self.missed.is_empty())
    }

    pub(super) fn unconfirmed(&self) -> u64 {
        let acks = self.acked.iter().map(|range| range.end() - range.start() + 1).sum::<u64>();
        acks.saturating_add(self.nacked.len() as u64)
    }

    /// Whether everything up to the head was shown.
    pub(super) fn caught_up(&self) -> bool {
        let read = self.read.max(self.done.floor()).max(self.passed);
        let nothing_here = self.buffered.is_empty() && self.gaps.is_empty();
        read >= self.head && nothing_here && self.unsettled_nacks.is_empty()
    }

    /// The topic was deleted.
    pub(super) fn leave(&mut self) {
        self.left = true;
        self.number = None;
        self.acked.clear();
        self.acks_to_send.clear();
        self.nacked.clear();
        self.nacks_to_send.clear();
        self.missed.clear();
        self.missed_to_send.clear();
        self.unsettled_nacks.clear();
        self.outstanding.clear();
    }

    /// Whether nothing is left of a topic that was deleted.
    pub(super) fn is_over(&self) -> bool {
        self.left && self.buffered.is_empty() && self.gaps.is_empty()
    }
}
