//! What is true of a subscription in one topic, as simple as can be: a list of messages, and what
//! is known of each. The rules of delivery are said again here, without any index.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

use super::model_steps::Draft;
use super::{Claim, Holder, Nack, Receipt};
use crate::limits;
use crate::record::{Release, Sequences, SubscriptionKind};

/// Nothing else than the names of messages.
pub(super) type Set = BTreeSet<u64>;

/// One message.
#[derive(Clone, Debug, Default)]
pub(super) struct Fact {
    pub(super) ours: bool,
    pub(super) key: Option<u8>,
    pub(super) bytes: u64,
    pub(super) kept: Kept,
    /// Who has it.
    pub(super) holder: Option<Holder>,
    /// Since when it is in a handler of who has it.
    pub(super) started: Option<Instant>,
    pub(super) not_before: Option<Instant>,
    /// The server has got past it since its start.
    pub(super) read: bool,
    /// It has seen it then, and knows its key and its size.
    pub(super) sized: bool,
    /// Its holder has said that it has it, of which the server guesses how large it is.
    pub(super) claimed: bool,
    /// The consumers were told that it is gone.
    pub(super) told: bool,
    /// It was done once, even if the server has lost that.
    pub(super) once_done: bool,
}

/// What outlives the server.
#[derive(Clone, Debug, Default)]
pub(super) struct Kept {
    pub(super) before_start: bool,
    pub(super) done: bool,
    pub(super) received: bool,
    pub(super) released: Option<Release>,
    pub(super) failures: u32,
    pub(super) suspect: bool,
    pub(super) condemned: bool,
}

impl Fact {
    /// Neither done nor with anyone.
    pub(super) fn is_open(&self) -> bool {
        !self.kept.done && self.holder.is_none()
    }
}

/// Someone who could take messages.
#[derive(Clone, Copy, Debug)]
pub(super) struct Taker {
    pub(super) holder: Holder,
    /// What is left of its credit.
    pub(super) messages: u64,
    pub(super) bytes: u64,
    /// It has nothing.
    pub(super) alone: bool,
}

impl Taker {
    pub(super) fn can_take(&self, bytes: u64) -> bool {
        self.alone || self.messages > 0 && self.bytes >= bytes
    }
}

#[derive(Clone, Debug)]
pub(super) struct Truth {
    pub(super) kind: SubscriptionKind,
    pub(super) max_attempts: Option<u32>,
    pub(super) facts: Vec<Fact>,
    /// The first message that is there still.
    pub(super) first: u64,
    /// Up to here all may be with consumers that have not come back since the start.
    pub(super) withheld: u64,
    /// When a suspect was delivered last, and when one was claimed or delivered.
    pub(super) suspect_delivered: Option<Instant>,
    pub(super) suspect_given: Option<Instant>,
}

impl Truth {
    pub(super) fn new(kind: SubscriptionKind, max_attempts: Option<u32>, start: u64) -> Self {
        let kept = Kept { before_start: true, done: true, ..Kept::default() };
        let before = Fact { ours: true, bytes: 1, kept, ..Fact::default() };
        let facts = vec![before; usize::try_from(start).unwrap()];
        let (suspect_delivered, suspect_given) = (None, None);
        let (first, withheld) = (1, 0);
        Self { kind, max_attempts, facts, first, withheld, suspect_delivered, suspect_given }
    }

    pub(super) fn head(&self) -> u64 {
        self.facts.len() as u64
    }

    pub(super) fn at(&self, n: u64) -> &Fact {
        &self.facts[usize::try_from(n).unwrap() - 1]
    }

    pub(super) fn at_mut(&mut self, n: u64) -> &mut Fact {
        &mut self.facts[usize::try_from(n).unwrap() - 1]
    }

    /// All messages, with their names.
    pub(super) fn all(&self) -> impl Iterator<Item = (u64, &Fact)> {
        (1..).zip(&self.facts)
    }

    pub(super) fn find(&self, is: impl Fn(u64, &Fact) -> bool) -> Set {
        self.all().filter(|(n, fact)| is(*n, fact)).map(|(n, _)| n).collect()
    }

    /// Any of them, or the next one to be published.
    pub(super) fn any(&self, which: usize) -> u64 {
        (which % (self.facts.len() + 1)) as u64 + 1
    }

    pub(super) fn floor(&self) -> u64 {
        self.facts.iter().take_while(|fact| fact.kept.done).count() as u64
    }

    pub(super) fn is_exclusive(&self) -> bool {
        self.kind == SubscriptionKind::Exclusive
    }

    pub(super) fn publish(&mut self, draft: Draft) {
        let Draft { key, for_others, bytes } = draft;
        let key = (key > 0).then_some(key);
        self.facts.push(Fact { ours: !for_others, key, bytes, ..Fact::default() });
    }

    /// Whether these are shown one after the other: all of a topic, or of a key.
    pub(super) fn same_lane(&self, one: u64, other: u64) -> bool {
        match self.kind {
            SubscriptionKind::Exclusive => true,
            SubscriptionKind::Shared => false,
            SubscriptionKind::KeyOrdered => {
                self.at(one).key.is_some() && self.at(one).key == self.at(other).key
            }
        }
    }

    pub(super) fn has_lane(&self, n: u64) -> bool {
        self.same_lane(n, n)
    }

    // What is done.

    fn settle(&mut self, n: u64) {
        let fact = self.at_mut(n);
        let Kept { before_start, received, released, .. } = fact.kept;
        fact.kept = Kept { before_start, done: true, received, released, ..Kept::default() };
        (fact.holder, fact.started, fact.not_before) = (None, None, None);
        fact.once_done = true;
    }

    pub(super) fn ack(&mut self, acked: &Set) {
        for n in acked.iter().filter(|n| **n <= self.head()).copied().collect::<Vec<_>>() {
            if !self.at(n).kept.before_start {
                let kept = &mut self.at_mut(n).kept;
                (kept.received, kept.released) = (true, None);
                self.settle(n);
            }
        }
    }

    /// Lets a message go, if it is not done.
    pub(super) fn release(&mut self, n: u64, how: Release) {
        if !self.at(n).kept.done {
            self.at_mut(n).kept.released = Some(how);
            self.settle(n);
        }
    }

    pub(super) fn miss(&mut self, missed: &Set) {
        missed.iter().for_each(|n| self.release(*n, Release::Gap));
    }

    /// The server has read a message. If it is for others, that is all.
    pub(super) fn read(&mut self, n: u64) {
        let by_key = self.kind == SubscriptionKind::KeyOrdered;
        let fact = self.at_mut(n);
        fact.read = true;
        if by_key || fact.holder.is_none() {
            (fact.sized, fact.claimed) = (true, false);
        }
        if !self.at(n).ours && !self.at(n).kept.done {
            self.settle(n);
        }
    }

    pub(super) fn seek(&mut self, to: u64) {
        let to = to.clamp(1, self.head() + 1);
        for n in 1..to {
            self.release(n, Release::Seek);
        }
        for n in to..=self.head() {
            let Fact { ours, key, bytes, .. } = *self.at(n);
            let kept = Kept { received: self.at(n).kept.received, ..Kept::default() };
            *self.at_mut(n) = Fact { ours, key, bytes, kept, ..Fact::default() };
        }
        self.withheld = 0;
    }

    pub(super) fn receipt(&self, n: u64) -> Receipt {
        match &self.at(n).kept {
            kept if kept.received => Receipt::Received,
            Kept { released: Some(how), .. } => Receipt::Released(*how),
            kept if kept.done => Receipt::NotAddressed,
            _ => Receipt::Pending,
        }
    }

    // What fails.

    /// An attempt has failed. What was counted already is not counted again.
    fn fail(&mut self, nack: &Nack) {
        let max = self.max_attempts;
        let kept = &mut self.at_mut(nack.sequence).kept;
        if nack.attempt > 0 {
            kept.failures += u32::from(nack.attempt > kept.failures);
            kept.condemned |= max.is_some_and(|max| kept.failures >= max || nack.for_good);
        }
    }

    /// When a message may be shown again that is handed back.
    fn delay(&self, nack: &Nack) -> Duration {
        let failures = self.at(nack.sequence).kept.failures;
        let backoff = 1 << failures.saturating_sub(1).min(6);
        nack.delay.unwrap_or(Duration::from_secs(backoff)).min(Duration::from_secs(60))
    }

    /// The message is anybody's.
    fn free(&mut self, n: u64) {
        let fact = self.at_mut(n);
        (fact.holder, fact.started, fact.told) = (None, None, false);
    }

    /// What a consumer has that comes after a message of its, as far as that is known.
    fn successors(&self, holder: Holder, n: u64) -> Set {
        let by_key = self.kind == SubscriptionKind::KeyOrdered;
        let sized = self.at(n).sized;
        let keyless = by_key && self.at(n).read && (!sized || self.at(n).key.is_none());
        self.find(|other, fact| {
            let known = sized && fact.sized;
            let unknown = by_key && !keyless && !fact.read;
            let mine = other > n && fact.holder == Some(holder);
            mine && (unknown || self.same_lane(n, other) && (known || !by_key))
        })
    }

    /// A message is handed back. Answers what is taken back with it; `None` if nothing comes of it.
    pub(super) fn nack(
        &mut self,
        holder: Holder,
        nack: &Nack,
        returning: bool,
        now: Instant,
    ) -> Option<Set> {
        let n = nack.sequence;
        let Fact { holder: current, read, sized, key, .. } = *self.at(n);
        let may = current == Some(holder) || current.is_none() && returning;
        if self.at(n).kept.done || !(may || self.is_exclusive()) {
            return None;
        }
        self.fail(nack);
        let delay = self.delay(nack);
        let mut back = self.successors(holder, n);
        // Without an order it has been looked at by this.
        self.at_mut(n).read |= self.kind == SubscriptionKind::Shared;
        let named = self.kind == SubscriptionKind::KeyOrdered && (sized && key.is_some() || !read);
        if self.is_exclusive() && returning {
            // All that it has is said by the claim.
            back = Set::new();
        } else {
            self.free(n);
            back.iter().for_each(|n| self.free(*n));
        }
        if self.is_exclusive() && !returning {
            (n..=self.head()).for_each(|n| self.at_mut(n).told = false);
        }
        self.at_mut(n).not_before = (!delay.is_zero()).then(|| now + delay);
        if named {
            back.insert(n);
        }
        Some(back)
    }

    fn failure(&self, n: u64) -> Nack {
        Nack { sequence: n, attempt: self.at(n).kept.failures + 1, ..Nack::default() }
    }

    /// What is in a handler since then has failed. Answers what is taken back, and from whom.
    pub(super) fn expire(&mut self, since: Instant, now: Instant) -> BTreeMap<Holder, Set> {
        let overdue = self.find(|_, fact| fact.started.is_some_and(|at| at <= since));
        let whose = |n: u64| (n, self.at(n).holder.expect("what is in a handler is held"));
        let mut all: BTreeMap<Holder, Set> = BTreeMap::new();
        for (n, holder) in overdue.into_iter().map(whose).collect::<Vec<_>>() {
            let nack = self.failure(n);
            let taken_back = if self.at(n).holder.is_some() {
                self.nack(holder, &nack, false, now).unwrap_or_default()
            } else {
                // With one before it. It has failed all the same.
                self.fail(&nack);
                self.at_mut(n).not_before = Some(now + self.delay(&nack));
                Set::new()
            };
            let back = all.entry(holder).or_default();
            back.extend(taken_back);
            back.insert(n);
        }
        all
    }

    pub(super) fn start(&mut self, holder: Holder, n: u64, now: Instant) {
        let fact = self.at_mut(n);
        if fact.holder == Some(holder) {
            fact.started.get_or_insert(now);
        }
    }

    // Who comes and goes.

    pub(super) fn detach(&mut self, holder: Holder) {
        let mine = self.find(|_, fact| fact.holder == Some(holder));
        mine.iter().for_each(|n| self.free(*n));
        if self.is_exclusive() {
            self.facts.iter_mut().for_each(|fact| fact.told = false);
        }
    }

    /// Answers how many messages have failed.
    pub(super) fn crash(&mut self, holder: Holder, now: Instant) -> usize {
        let started = self.find(|_, fact| fact.holder == Some(holder) && fact.started.is_some());
        for n in &started {
            let nack = self.failure(*n);
            self.fail(&nack);
            self.at_mut(*n).kept.suspect = true;
            self.at_mut(*n).not_before = Some(now + self.delay(&nack));
        }
        // Where keys have an order, what comes after them is freed with the rest.
        self.detach(holder);
        started.len()
    }

    /// A consumer comes, with what it has. Answers what of that is not its own any more.
    pub(super) fn attach(
        &mut self,
        holder: Holder,
        claim: &Claim,
        (current, kept_place): (bool, bool),
        now: Instant,
    ) -> Set {
        let held = numbers(&claim.held);
        if current {
            self.ack(&numbers(&claim.acked));
            self.miss(&numbers(&claim.missed));
        }
        if !current || !(kept_place || self.is_exclusive()) {
            self.detach(holder);
            return held;
        }
        for nack in &claim.nacked {
            self.nack(holder, nack, true, now);
        }
        for n in self.find(|n, fact| fact.holder == Some(holder) && !held.contains(&n)) {
            self.free(n);
        }
        if self.is_exclusive() {
            self.facts.iter_mut().for_each(|fact| fact.told = false);
        }
        let mut dropped = Set::new();
        let started = numbers(&claim.started);
        let mut refused = false;
        for n in held {
            let fact = self.at(n);
            let is_another_s = fact.holder.is_some_and(|other| other != holder);
            let unknown = self.kind == SubscriptionKind::KeyOrdered && !fact.read;
            let overtakes = unknown && refused || self.would_overtake(holder, n);
            let another = is_another_s || fact.is_open() && overtakes;
            if fact.kept.done || another {
                refused |= !fact.kept.done;
                dropped.insert(n);
                continue;
            }
            let kind = self.kind;
            if fact.holder.is_none() && fact.kept.suspect {
                self.suspect_given = Some(now);
            }
            let fact = self.at_mut(n);
            fact.claimed |= kind == SubscriptionKind::Exclusive || !fact.sized;
            fact.read |= kind == SubscriptionKind::Shared;
            (fact.holder, fact.not_before) = (Some(holder), None);
            if started.contains(&n) {
                fact.started.get_or_insert(now);
            } else if kind == SubscriptionKind::Exclusive {
                fact.started = None;
            }
        }
        dropped
    }

    /// Whether one of the same key comes before a message that a consumer claims to have, and
    /// waits or is another's. Of what the server has not got to it can have nothing, but from before
    /// a restart.
    fn would_overtake(&self, holder: Holder, n: u64) -> bool {
        let by_key = self.kind == SubscriptionKind::KeyOrdered;
        if by_key && !self.at(n).read && n > self.withheld {
            return true;
        }
        let by_key = by_key && self.at(n).sized;
        let mut mates = self.all().filter(|(other, fact)| fact.sized && self.same_lane(n, *other));
        let first = |(other, fact): (u64, &Fact)| match fact.holder {
            Some(owner) => owner != holder,
            None => other < n && fact.is_open(),
        };
        by_key && mates.any(first)
    }

    /// The server starts again, with what was saved.
    pub(super) fn restart(&mut self, saved: &[Kept]) {
        let kept = saved.iter().cloned().chain(std::iter::repeat(Kept::default()));
        for (fact, kept) in self.facts.iter_mut().zip(kept) {
            let Fact { ours, key, bytes, once_done, .. } = *fact;
            *fact = Fact { ours, key, bytes, once_done, kept, ..Fact::default() };
        }
        self.withheld = 0;
        (self.suspect_delivered, self.suspect_given) = (None, None);
    }

    // What is delivered.

    /// All before `first` is gone, and the server knows it. Answers the first and the last of what
    /// no consumer knows, and whether some of it is news.
    pub(super) fn lose(&mut self) -> (Option<(u64, u64)>, bool) {
        let exclusive = self.is_exclusive();
        let gone = |n: u64, fact: &Fact| n < self.first && fact.is_open();
        let lost = self.find(|n, fact| gone(n, fact) && !(exclusive && fact.told));
        let news = lost.iter().any(|n| !self.at(*n).told);
        for n in 1..self.first.min(self.head() + 1) {
            let is_open = self.at(n).is_open();
            let fact = self.at_mut(n);
            fact.told |= is_open;
            fact.read |= !exclusive;
            if is_open && !exclusive {
                (fact.not_before, fact.sized) = (None, false);
            }
        }
        (lost.first().copied().zip(lost.last().copied()), news)
    }

    /// Who has the last of the others of the key of a message, as far as the server knows.
    fn owner(&self, n: u64) -> Option<Holder> {
        let of_key = |other: u64, fact: &&Fact| fact.sized && self.same_lane(n, other);
        let mates = self.all().filter(|(other, fact)| of_key(*other, fact));
        mates.filter_map(|(_, fact)| fact.holder).last().filter(|_| !self.is_exclusive())
    }

    /// What comes before a message, and waits.
    fn waits_before(&self, n: u64) -> impl Iterator<Item = (u64, &Fact)> {
        let waits =
            |fact: &Fact| fact.is_open() && !fact.told && (fact.ours || self.is_exclusive());
        let before = (1..n).map(|other| (other, self.at(other)));
        before.filter(move |(other, fact)| self.same_lane(n, *other) && waits(fact))
    }

    /// Whether the server knows that something comes before a message, and waits.
    fn must_wait(&self, n: u64) -> bool {
        self.waits_before(n).any(|(_, fact)| fact.sized || self.is_exclusive())
    }

    fn is_due(&self, n: u64, now: Instant) -> bool {
        self.at(n).not_before.is_none_or(|at| at <= now)
    }

    /// Whether a message must not be shown for the sake of another one that may kill.
    fn is_another_tried(&self, n: u64, since: Option<Instant>, now: Instant) -> bool {
        let tried = |fact: &Fact| fact.kept.suspect && fact.holder.is_some();
        self.at(n).kept.suspect
            && since.is_some_and(|at| now < at + limits::SUSPICION)
            && self.facts.iter().any(tried)
    }

    pub(super) fn waits_for_another_suspect(&self, now: Instant) -> bool {
        let waits = |n: u64| self.is_another_tried(n, self.suspect_given, now);
        self.all().any(|(n, fact)| fact.is_open() && self.is_due(n, now) && waits(n))
    }

    /// A message is delivered: panics if it must not be.
    pub(super) fn deliver(&mut self, holder: Holder, n: u64, attempt: u32, now: Instant) {
        let fact = self.at(n);
        assert!(fact.ours, "{n} is for others");
        assert!(!fact.kept.done, "{n} is done");
        assert_eq!(fact.holder, None, "{n} is held");
        assert!(!fact.kept.condemned, "{n} is condemned");
        assert!(self.is_due(n, now), "{n} comes too early");
        assert!(n >= self.first, "{n} is gone");
        assert!(n > self.withheld, "{n} may be with someone since the restart");
        assert_eq!(attempt, fact.kept.failures + 1, "the attempt of {n}");
        let since = self.suspect_delivered.filter(|_| self.is_exclusive()).or(self.suspect_given);
        let another = self.is_another_tried(n, since, now);
        assert!(!another, "{n} may kill, and another one is tried");
        // What is gone will not come. Where there is one order, it has its place in it.
        let will_come = |other: &u64| self.is_exclusive() || *other >= self.first;
        let earlier = self.waits_before(n).map(|(other, _)| other).find(will_come);
        assert_eq!(earlier, None, "must come before {n}");
        for (other, mate) in self.all().filter(|(other, _)| self.same_lane(n, *other)) {
            // What was done once comes again if the server has lost that, and so out of order.
            // Of what is gone and was not seen since a restart, nobody knows the key.
            let unknown = other < self.first && !mate.sized;
            let unknown = unknown || fact.once_done || mate.once_done;
            let Some(with) = mate.holder.filter(|_| !unknown) else { continue };
            assert!(with == holder, "{other} is with another than {n}");
            assert!(other < n, "{other} came before {n}");
        }
        if fact.kept.suspect {
            (self.suspect_delivered, self.suspect_given) = (Some(now), Some(now));
        }
        let fact = self.at_mut(n);
        (fact.holder, fact.not_before, fact.claimed) = (Some(holder), None, false);
    }

    /// The message that should be delivered now, or be looked at, if there is one.
    pub(super) fn next(&self, takers: &[Taker], now: Instant) -> Option<u64> {
        let room = takers.iter().any(|taker| taker.can_take(1));
        for (n, fact) in self.all() {
            if !fact.is_open() || fact.told || n <= self.withheld && self.at(n).read {
                continue;
            }
            let waits = fact.kept.condemned
                || !self.is_due(n, now)
                || n <= self.withheld
                || self.is_another_tried(n, self.suspect_given, now)
                || self.must_wait(n);
            if waits && self.is_exclusive() {
                return None;
            }
            if waits && self.at(n).read {
                continue;
            }
            let owner = self.owner(n);
            let able = |taker: &&Taker| owner.is_none_or(|owner| owner == taker.holder);
            // The server may take it for larger than it is, as long as it has not seen it.
            let guessed = fact.read && !fact.sized && !self.is_exclusive();
            let bytes = if guessed { u64::MAX } else { fact.bytes };
            let able = takers.iter().filter(able).any(|taker| taker.can_take(bytes));
            if !fact.read && !self.is_exclusive() {
                return room.then_some(n);
            }
            if able {
                return Some(n);
            }
            // What fits nobody is not overtaken, unless it waits for one of them.
            owner?;
        }
        None
    }

    /// The moments at which something may be shown that has to wait for now.
    pub(super) fn moments(&self, now: Instant) -> Vec<Instant> {
        let open = self.facts.iter().filter(|fact| fact.is_open());
        let tried = self.suspect_given.map(|at| at + limits::SUSPICION);
        let mut moments: Vec<_> = open.filter_map(|fact| fact.not_before).chain(tried).collect();
        moments.retain(|at| *at > now);
        moments.sort();
        moments
    }
}

pub(super) fn numbers(sequences: &Sequences) -> Set {
    sequences.iter().flat_map(Clone::clone).collect()
}

pub(super) fn ranges(numbers: &Set) -> Sequences {
    numbers.iter().map(|n| *n..=*n).collect()
}
