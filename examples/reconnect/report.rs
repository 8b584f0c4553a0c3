//! Compares what was published, what was shown and what the server has.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use pubsub_client::PublishReceipt;

use crate::MESSAGES;
use crate::audit::{Audit, Topic};
use crate::consumer::{Seen, Shown};
use crate::publishers::Published;
use crate::tally::Tally;

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
        // What never got a receipt was not published; that is no better.
        report.lost += MESSAGES.saturating_sub(report.published as u64);
        report
    }

    fn topic(&mut self, published: &[PublishReceipt], shown: &[Seen], topic: &Topic) {
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
            let key = (receipt.id.sequence, number);
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
