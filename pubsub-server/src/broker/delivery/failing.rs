//! How messages fail that are with competing consumers. Pure.

use std::collections::BTreeMap;

use tokio::time::Instant;

use super::competing::{Competing, Key, Order};
use super::{Holder, LOST, Moment, Nack, Rewound, backoff};
use crate::limits;
use crate::record::Sequences;

impl Competing {
    /// A consumer is lost. What it had in a handler has failed, and may be what killed it.
    pub fn crash(&mut self, holder: Holder, now: Moment) {
        let mine = self.held.iter().filter(|(_, held)| held.holder == holder);
        let mine = mine.map(|(sequence, _)| *sequence);
        for sequence in mine.filter(|mine| self.started.contains(*mine)).collect::<Vec<_>>() {
            self.fail_alone(&self.failure(sequence, LOST), now);
            self.cursor.suspect(sequence);
        }
        self.detach(holder);
    }

    /// The present attempt of a message has failed.
    fn failure(&self, sequence: u64, reason: &str) -> Nack {
        let attempt = self.cursor.failures(sequence).saturating_add(1);
        Nack { sequence, attempt, reason: reason.to_owned(), ..Nack::default() }
    }

    /// A consumer has these in its handlers.
    pub fn start(&mut self, holder: Holder, started: &Sequences, now: Instant) {
        for range in started.iter() {
            for (sequence, held) in self.held.range(range.clone()) {
                if held.holder == holder {
                    self.started.insert(*sequence, now);
                }
            }
        }
    }

    /// The moment since which a message is in a handler, of all the earliest.
    pub fn started_at(&self) -> Option<Instant> {
        self.started.earliest()
    }

    /// What is in a handler for so long has failed. Answers what is taken back from whom: all of
    /// it, since its consumer does not know.
    pub fn expire(
        &mut self,
        since: Instant,
        reason: &str,
        now: Moment,
    ) -> BTreeMap<Holder, Rewound> {
        let mut rewound: BTreeMap<Holder, Rewound> = BTreeMap::new();
        let overdue = self.started.until(since);
        let whose = |sequence| Some((sequence, self.held.get(&sequence)?.holder));
        for (sequence, holder) in overdue.filter_map(whose).collect::<Vec<_>>() {
            let nack = self.failure(sequence, reason);
            let mut taken_back = if self.holds(sequence, holder) {
                self.fail(holder, &nack, false, now)
            } else {
                // It was taken back with one before it, and has failed all the same.
                self.fail_alone(&nack, now);
                Sequences::new()
            };
            taken_back.insert(sequence..=sequence);
            let back = rewound.entry(holder).or_insert_with(Rewound::nothing);
            back.taken_back.extend(taken_back);
            back.from = back.taken_back.first().map_or(sequence, |range| *range.start());
        }
        rewound
    }

    /// A consumer hands messages back. Answers what is taken back from it, where there is an order:
    /// what comes after them of the same keys, and themselves, since it may have received them again
    /// before this nack of an earlier showing was heard.
    pub fn nack(&mut self, holder: Holder, nacks: &[Nack], now: Moment) -> Option<Rewound> {
        let mut taken_back = Sequences::new();
        for nack in nacks {
            taken_back.extend(self.fail(holder, nack, false, now));
        }
        let from = *taken_back.first()?.start();
        Some(Rewound { from, taken_back, ..Rewound::nothing() })
    }

    /// `returning`: the consumer says what it handed back before its connection was lost, of which
    /// this side may know nothing.
    pub(super) fn fail(
        &mut self,
        holder: Holder,
        nack: &Nack,
        returning: bool,
        now: Moment,
    ) -> Sequences {
        let sequence = nack.sequence;
        let current = self.held.get(&sequence).map(|held| held.holder);
        let free = returning && current.is_none() && !self.is_full();
        if sequence > self.cursor.head()
            || self.cursor.is_done(sequence)
            || !(current == Some(holder) || free)
        {
            return Sequences::new();
        }
        let key = self.fail_alone(nack, now);
        let after = self.held_after(holder, sequence, key.as_ref());
        for sequence in &after {
            self.hand_back(*sequence, None);
        }
        let has_lane = key.is_some() || self.order == Order::Key && sequence >= self.next;
        let itself = has_lane.then_some(sequence);
        itself.into_iter().chain(after).map(|sequence| sequence..=sequence).collect()
    }

    /// A message has failed, and what comes after it is left alone. Answers its key.
    fn fail_alone(&mut self, nack: &Nack, now: Moment) -> Option<Key> {
        let failures = self.cursor.fail(nack, now.wall);
        let delay = nack.delay.unwrap_or_else(|| backoff(failures)).min(limits::MAX_BACKOFF);
        self.hand_back(nack.sequence, (!delay.is_zero()).then(|| now.at + delay))
    }

    /// What a consumer holds that must not be processed before a message that it has handed back.
    fn held_after(&self, holder: Holder, sequence: u64, key: Option<&Key>) -> Vec<u64> {
        let keyless = key.is_none() && sequence < self.next;
        if self.order == Order::None
            || keyless
            || cfg!(pubsub_break = "key_goes_on_after_a_failure")
        {
            return Vec::new();
        }
        let lane = key.and_then(|key| self.lanes.get(key));
        let of_key = lane.into_iter().flat_map(|lane| lane.held.range(sequence + 1..)).copied();
        // Another has some of it if a restart has lost that this one was let go before.
        let of_key = of_key.filter(|after| self.holds(*after, holder));
        // What was not looked at may be of the same key.
        let unknown = self.held.range(self.next.max(sequence + 1)..);
        let unknown = unknown.filter(|(_, held)| held.holder == holder);
        of_key.chain(unknown.map(|(sequence, _)| *sequence)).collect()
    }
}
