//! Compares what was published, what was shown and what the server has.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use crate::audit::{Audit, Topic};
use crate::consumer::{Seen, Shown};
use crate::publishers::{Published, Stored};
use crate::tally::Tally;
use crate::{MESSAGES, TOPICS};

/// The result of the run.
#[derive(Debug, Default)]
pub(crate) struct Report {
    published: usize,
    duplicates: usize,
    received: usize,
    receipts: usize,
    logged: usize,
    again: u64,
    lost: u64,
    shown_twice: u64,
    out_of_order: u64,
    faults: String,
    reconnects: u64,
    longest_silence: Duration,
}

impl Report {
    pub(crate) fn new(
        tally: &Tally,
        published: &Published,
        shown: &Shown,
        audit: &Audit,
        again: u64,
    ) -> Self {
        let mut report = Self {
            again,
            shown_twice: again,
            faults: format!(
                "{} kills, {} cuts, {} freeze",
                tally.kills.get(),
                tally.cuts.get(),
                tally.freezes.get()
            ),
            reconnects: tally.reconnects.get(),
            longest_silence: shown.longest_silence,
            ..Self::default()
        };
        for ((published, shown), topic) in published.iter().zip(&shown.topics).zip(audit) {
            report.topic(published, shown, topic);
        }
        report
    }

    fn topic(&mut self, published: &[Stored], shown: &[Seen], topic: &Topic) {
        // What never got a receipt was not published; that is no better.
        let share = MESSAGES / TOPICS.len() as u64;
        self.lost += share.saturating_sub(published.len() as u64);
        self.published += published.len();
        self.duplicates += published.iter().filter(|receipt| receipt.duplicate).count();
        self.received += shown.len();
        self.logged += topic.log.len();
        self.receipts += topic.received.iter().filter(|received| **received).count();

        // A message is safe if it is where its receipt says, was shown, and counts as received.
        let in_log: BTreeSet<_> = topic.log.iter().map(key).collect();
        let was_shown: BTreeSet<_> = shown.iter().map(key).collect();
        let received = topic.log.iter().zip(&topic.received).filter(|(_, received)| **received);
        let received: BTreeSet<_> = received.map(|(seen, _)| key(seen)).collect();
        for (receipt, number) in published.iter().zip(0..) {
            let key = (receipt.sequence, number);
            let safe = in_log.contains(&key) && was_shown.contains(&key) && received.contains(&key);
            self.lost += u64::from(!safe);
        }
        self.shown_twice += repeated(shown) + repeated(&topic.log);
        self.out_of_order += disordered(shown) + disordered(&topic.log);
    }

    pub(crate) fn is_clean(&self) -> bool {
        (self.lost, self.shown_twice, self.out_of_order) == (0, 0, 0)
    }
}

fn key(seen: &Seen) -> (u64, u64) {
    (seen.sequence, seen.number)
}

/// Messages that came before, by the call that published them.
fn repeated(seen: &[Seen]) -> u64 {
    let distinct: BTreeSet<_> = seen.iter().map(|seen| seen.number).collect();
    (seen.len() - distinct.len()) as u64
}

/// Messages that come before an earlier one, of the log or of the publisher.
fn disordered(seen: &[Seen]) -> u64 {
    let behind =
        |pair: &&[Seen]| pair[1].sequence <= pair[0].sequence || pair[1].number <= pair[0].number;
    seen.windows(2).filter(behind).count() as u64
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { lost, shown_twice, out_of_order, .. } = self;
        writeln!(f)?;
        writeln!(f, "  published              {:>8}   each with a receipt", self.published)?;
        writeln!(f, "  duplicates answered    {:>8}   sent again, stored once", self.duplicates)?;
        writeln!(f, "  in the log             {:>8}", self.logged)?;
        writeln!(f, "  received               {:>8}   by the application", self.received)?;
        writeln!(f, "  receipts               {:>8}   say `received`", self.receipts)?;
        writeln!(f, "  shown to a newcomer    {:>8}", self.again)?;
        writeln!(f, "  lost                   {lost:>8}")?;
        writeln!(f, "  shown twice            {shown_twice:>8}")?;
        writeln!(f, "  out of order           {out_of_order:>8}")?;
        writeln!(f, "  faults                 {}", self.faults)?;
        writeln!(f, "  reconnects             {:>8}   of 4 connections", self.reconnects)?;
        let silence = format!("{:.1?}", self.longest_silence);
        writeln!(f, "  longest silence        {silence:>8}   between two messages")?;
        writeln!(f)?;
        write!(f, "RESULT lost={lost} shown_twice={shown_twice} out_of_order={out_of_order}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A run in which everything went well, and what is then done to it.
    fn check(damage: impl FnOnce(&mut Published, &mut Shown, &mut Audit)) -> (u64, u64, u64) {
        let share = MESSAGES / TOPICS.len() as u64;
        let seen: Vec<_> = (0..share).map(|number| Seen { sequence: number + 1, number }).collect();
        let stored = |seen: &Seen| Stored { sequence: seen.sequence, duplicate: false };
        let topic = || Topic { log: seen.clone(), received: vec![true; seen.len()] };
        let mut published: Published = [(); 3].map(|()| seen.iter().map(stored).collect());
        let mut shown = Shown { topics: [(); 3].map(|()| seen.clone()), ..Shown::default() };
        let mut audit: Audit = [(); 3].map(|()| topic());
        damage(&mut published, &mut shown, &mut audit);
        let report = Report::new(&Tally::new(), &published, &shown, &audit, 0);
        assert_eq!(
            report.is_clean(),
            (report.lost, report.shown_twice, report.out_of_order) == (0, 0, 0)
        );
        (report.lost, report.shown_twice, report.out_of_order)
    }

    #[test]
    fn a_good_run_is_clean() {
        assert_eq!(check(|_, _, _| {}), (0, 0, 0));
    }

    #[test]
    fn each_kind_of_loss_is_found() {
        assert_eq!(check(|published, _, _| published[0].truncate(9_999)), (1, 0, 0));
        assert_eq!(
            check(|_, shown, _| shown.topics[1].retain(|seen| seen.number != 17)),
            (1, 0, 0)
        );
        assert_eq!(check(|_, _, audit| audit[2].received[17] = false), (1, 0, 0));
        let unlogged = check(|_, _, audit| {
            audit[0].log.remove(17);
            audit[0].received.remove(17);
        });
        assert_eq!(unlogged, (1, 0, 0));
        assert_eq!(check(|published, _, _| published[0][17].sequence += 1), (1, 0, 0));
    }

    #[test]
    fn what_comes_twice_is_found() {
        let shown_twice = check(|_, shown, _| {
            let seen = shown.topics[0][17];
            shown.topics[0].insert(18, seen);
        });
        assert_eq!(shown_twice, (0, 1, 1));
        let stored_twice = check(|_, _, audit| {
            let number = audit[0].log[17].number;
            audit[0].log.push(Seen { sequence: 10_001, number });
            audit[0].received.push(true);
        });
        assert_eq!(stored_twice, (0, 1, 1));
    }

    #[test]
    fn another_order_is_found() {
        assert_eq!(check(|_, shown, _| shown.topics[0].swap(17, 18)), (0, 0, 1));
        assert_eq!(check(|_, shown, _| shown.topics[0].swap(17, 19)), (0, 0, 2));
    }
}
