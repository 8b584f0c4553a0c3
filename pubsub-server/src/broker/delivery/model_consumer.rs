//! A consumer as it sees itself, for the model: what it has, and what it has said that was not
//! confirmed.

use std::collections::{BTreeMap, BTreeSet};

use super::model_truth::{Set, Truth, ranges};
use super::{Claim, Holder, Nack};

/// A message that a consumer has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hand {
    pub(super) attempt: u32,
    /// It was handed to the application.
    pub(super) shown: bool,
}

/// What was said, whether it was sent, and whether nothing of its lane is to be shown.
#[derive(Clone, Debug)]
pub(super) struct Said {
    pub(super) nack: Nack,
    pub(super) sent: bool,
    unsettled: bool,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Consumer {
    /// There is a process.
    pub(super) runs: bool,
    /// Its place, as the server has it, and whether there is a session.
    pub(super) seat: Option<Holder>,
    pub(super) session: bool,
    pub(super) stands_by: bool,
    /// Whether frames arrive.
    pub(super) to_server: bool,
    pub(super) to_client: bool,
    pub(super) generation: u64,
    pub(super) hands: BTreeMap<u64, Hand>,
    /// Unconfirmed, and whether they were sent.
    pub(super) acks: BTreeMap<u64, bool>,
    pub(super) nacks: BTreeMap<u64, Said>,
    pub(super) missed: BTreeMap<u64, bool>,
    /// Told, and not yet seen by the application.
    pub(super) gaps: Set,
    /// What this process was shown, has acked, and knows to be missing, since the last seek.
    pub(super) seen: Set,
    pub(super) acked: Set,
    pub(super) known: Set,
}

impl Consumer {
    /// A new process.
    pub(super) fn launch(&mut self, generation: u64) {
        let Self { seat, session, .. } = *self;
        *self = Self { runs: true, seat, session, generation, ..Self::default() };
    }

    pub(super) fn is_connected(&self) -> bool {
        self.session && self.to_server && self.to_client
    }

    /// A seek has moved the position: nothing has a meaning any more.
    pub(super) fn forget(&mut self, generation: u64) {
        let Self { runs, seat, session, stands_by, to_server, to_client, .. } = *self;
        let blank = Self::default();
        *self = Self { runs, seat, session, stands_by, to_server, to_client, generation, ..blank };
    }

    /// Whether a message can be shown: nothing was handed back of its lane.
    pub(super) fn is_audible(&self, n: u64, truth: &Truth) -> bool {
        let shown = self.hands.get(&n).is_some_and(|hand| hand.shown);
        let silent = |(back, said): (&u64, &Said)| said.unsettled && truth.same_lane(n, *back);
        shown || !self.nacks.iter().any(silent)
    }

    pub(super) fn audible(&self, truth: &Truth) -> Vec<u64> {
        self.hands.keys().copied().filter(|n| self.is_audible(*n, truth)).collect()
    }

    pub(super) fn receive(&mut self, n: u64, attempt: u32, truth: &Truth) {
        if self.acks.get(&n) == Some(&false) {
            // The server could not know, and will with the next hello.
            return;
        }
        assert!(!self.acked.contains(&n), "{n} was acked by the same process");
        if !truth.has_lane(n) {
            self.nacks.remove(&n);
        }
        let before = self.hands.insert(n, Hand { attempt, shown: false });
        assert!(before.is_none(), "{n} is shown twice");
        self.seen.insert(n);
    }

    pub(super) fn ack(&mut self, n: u64, sent: bool) {
        self.hands.remove(&n);
        self.nacks.retain(|nacked, said| *nacked != n || said.sent);
        self.acks.insert(n, sent);
        self.acked.insert(n);
    }

    pub(super) fn nack(&mut self, nack: Nack, sent: bool, truth: &Truth) {
        let n = nack.sequence;
        self.hands.remove(&n);
        self.nacks.insert(n, Said { nack, sent, unsettled: truth.has_lane(n) });
    }

    /// The server takes messages back.
    pub(super) fn take_back(&mut self, back: &Set) {
        self.hands.retain(|n, _| !back.contains(n));
    }

    pub(super) fn hear_gap(&mut self, first: u64, last: u64) {
        let news = |n: &u64| {
            !(self.hands.contains_key(n) || self.acked.contains(n) || self.known.contains(n))
        };
        let news: Set = (first..=last).filter(news).collect();
        self.known.extend(&news);
        self.gaps.extend(news);
    }

    /// What the hello of the next connection says. All of it counts as sent then.
    pub(super) fn claim(&mut self, truth: &Truth, started: bool) -> Claim {
        for (n, said) in &mut self.nacks {
            if std::mem::take(&mut said.unsettled) {
                self.hands.retain(|hand, _| hand < n || !truth.same_lane(*n, *hand));
            }
            said.sent = true;
        }
        self.acks.values_mut().chain(self.missed.values_mut()).for_each(|sent| *sent = true);
        let shown = self.hands.iter().filter(|(_, hand)| started && hand.shown);
        Claim {
            held: ranges(&self.hands.keys().copied().collect()),
            held_bytes: self.hands.keys().map(|n| truth.at(*n).bytes).sum(),
            acked: ranges(&self.acks.keys().copied().collect()),
            nacked: self.nacks.values().map(|said| said.nack.clone()).collect(),
            missed: ranges(&self.missed.keys().copied().collect()),
            started: ranges(&shown.map(|(n, _)| *n).collect()),
            cursor_generation: self.generation,
        }
    }

    /// What was sent is on the server's disk.
    pub(super) fn confirm(&mut self) {
        self.acks.retain(|_, sent| !*sent);
        self.nacks.retain(|_, said| !said.sent);
        self.missed.retain(|_, sent| !*sent);
    }

    /// The server has no use for some of what the hello said.
    pub(super) fn welcome(&mut self, generation: u64, dropped: &BTreeSet<u64>) {
        if generation != self.generation {
            self.forget(generation);
        }
        self.take_back(dropped);
        self.confirm();
    }
}
