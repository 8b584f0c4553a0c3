//! What the other systems have reached before on a machine of this kind, measured by other programs:
//! a run in which one stays far below that compares with a weakened system, and is void.

use std::fmt::Write as _;

use crate::report::Results;
use crate::server::System;
use crate::targets::{Figure, RATE, short};
use crate::work::Work;
use System::{
    Log, NatsAlways, NatsBatches, NatsDefault, RabbitQuorum, RabbitStream, RedisAlways,
    RedisEverysec,
};

/// A system that reaches less of its reference than this is weakened.
const ENOUGH: f64 = 0.8;

const STORED: &str = "/stored_us/p50";

/// The log of that time: what a system may be slower by is what the log is slower by.
const LOGS: &[(Work, &str, f64)] = &[
    (Work::W1Bytes100, RATE, 3_360_000.0),
    (Work::W1Kib1, RATE, 1_170_000.0),
    (Work::W1Kib16, RATE, 76_000.0),
    (Work::W2, RATE, 3_360_000.0),
    (Work::W3, STORED, 166.0),
];

const REFERENCES: &[(Work, System, f64)] = &[
    (Work::W1Bytes100, NatsDefault, 241_000.0),
    (Work::W1Bytes100, NatsAlways, 5_900.0),
    (Work::W1Bytes100, NatsBatches, 92_000.0),
    (Work::W1Bytes100, RedisAlways, 289_000.0),
    (Work::W1Bytes100, RedisEverysec, 700_000.0),
    (Work::W1Bytes100, RabbitQuorum, 43_000.0),
    (Work::W1Bytes100, RabbitStream, 40_000.0),
    (Work::W1Kib1, NatsDefault, 174_000.0),
    (Work::W1Kib1, NatsAlways, 5_300.0),
    (Work::W1Kib1, NatsBatches, 58_000.0),
    (Work::W1Kib1, RedisAlways, 54_000.0),
    (Work::W1Kib1, RedisEverysec, 247_000.0),
    (Work::W1Kib1, RabbitQuorum, 32_000.0),
    (Work::W1Kib1, RabbitStream, 38_000.0),
    (Work::W1Kib16, NatsDefault, 41_000.0),
    (Work::W1Kib16, NatsAlways, 4_400.0),
    (Work::W1Kib16, NatsBatches, 14_000.0),
    (Work::W1Kib16, RedisAlways, 8_400.0),
    (Work::W1Kib16, RedisEverysec, 32_000.0),
    (Work::W1Kib16, RabbitQuorum, 20_000.0),
    (Work::W1Kib16, RabbitStream, 25_000.0),
    (Work::W2, NatsDefault, 239_000.0),
    (Work::W2, NatsAlways, 5_500.0),
    (Work::W2, NatsBatches, 102_000.0),
    (Work::W2, RedisAlways, 617_000.0),
    (Work::W2, RedisEverysec, 680_000.0),
    (Work::W2, RabbitQuorum, 39_000.0),
    (Work::W2, RabbitStream, 47_000.0),
    (Work::W3, NatsDefault, 68.0),
    (Work::W3, NatsAlways, 280.0),
    (Work::W3, RedisAlways, 188.0),
    (Work::W3, RedisEverysec, 73.0),
    (Work::W3, RabbitQuorum, 419.0),
    (Work::W3, RabbitStream, 244.0),
    (Work::W5Bytes100, NatsDefault, 315_000.0),
    (Work::W5Bytes100, RedisAlways, 260_000.0),
    (Work::W5Bytes100, RedisEverysec, 345_000.0),
    (Work::W5Bytes100, RabbitQuorum, 29_000.0),
    (Work::W5Bytes100, RabbitStream, 22_000.0),
    (Work::W5Kib1, NatsDefault, 213_000.0),
    (Work::W5Kib1, RedisAlways, 196_000.0),
    (Work::W6, NatsDefault, 231_000.0),
    (Work::W6, NatsAlways, 44_000.0),
    (Work::W6, RedisAlways, 428_000.0),
    (Work::W6, RedisEverysec, 490_000.0),
    (Work::W6, RabbitQuorum, 28_000.0),
    (Work::W6, RabbitStream, 39_000.0),
];

/// How a system compares with its reference.
#[derive(Debug)]
struct Comparison {
    work: Work,
    system: System,
    measured: f64,
    /// As the log of this run lets expect it.
    expected: f64,
}

impl Comparison {
    /// What it reaches of what is expected.
    fn ratio(&self) -> f64 {
        match self.work {
            Work::W3 => self.expected / self.measured,
            _ => self.measured / self.expected,
        }
    }
}

/// How fast the log of this run is beside that of the reference. What has no log of its own is not
/// bound by the disk: it is compared with the one of small messages, and a faster one demands nothing.
fn scale(results: &Results, work: Work) -> Option<f64> {
    let of = |(work, figure, reference): &(Work, &'static str, f64)| {
        Some(results.median(Figure(*work, Log, figure))? / reference)
    };
    match LOGS.iter().find(|(of, ..)| *of == work) {
        Some(log) => of(log),
        None => of(LOGS.first()?).map(|scale| scale.min(1.0)),
    }
}

fn comparisons(results: &Results) -> Vec<Comparison> {
    let compare = |(work, system, reference): &(Work, System, f64)| {
        let figure = if *work == Work::W3 { STORED } else { RATE };
        let measured = results.median(Figure(*work, *system, figure))?;
        let expected = reference * scale(results, *work)?;
        Some(Comparison { work: *work, system: *system, measured, expected })
    };
    REFERENCES.iter().filter_map(compare).collect()
}

/// The systems that were weakened: with one of them the run is void.
pub fn weakened(results: &Results) -> Vec<String> {
    let all = comparisons(results).into_iter().filter(|one| one.ratio() < ENOUGH);
    all.map(|one| format!("{} in {}", one.system.name(), one.work.number())).collect()
}

/// All comparisons, as a table.
pub fn table(results: &Results) -> String {
    let mut table =
        String::from("| work | system | here | expected | ratio |\n|---|---|---|---|---|\n");
    for one in comparisons(results) {
        let ratio = one.ratio();
        let mark = if ratio < ENOUGH { " **weakened**" } else { "" };
        let _ = writeln!(
            table,
            "| {} {} | {} | {:.0} | {:.0} | {}{mark} |",
            one.work.number(),
            one.work.title(),
            one.system.name(),
            one.measured,
            one.expected,
            short(ratio),
        );
    }
    table
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// One round with these figures, after another run that counts no more.
    fn results(figures: &[(Work, System, f64)]) -> Results {
        let cell = |run: u64, (work, system, figure): &(Work, System, f64)| {
            let rates = json!({ "run": run, "round": 0, "work": work.id(), "system": system.id(),
                "messages_per_second": figure, "stored_us": { "p50": figure } });
            format!("{rates}\n")
        };
        let earlier = cell(1, &(Work::W1Bytes100, RedisAlways, 1.0));
        let text: String = figures.iter().map(|figure| cell(2, figure)).collect();
        Results::of_last_run(&(earlier + &text)).unwrap()
    }

    #[test]
    fn a_system_may_be_slower_by_what_the_log_is_slower_by() {
        let log = (Work::W1Bytes100, Log, 3_360_000.0 / 2.0);
        let redis =
            |of: f64| results(&[log, (Work::W1Bytes100, RedisAlways, 289_000.0 / 2.0 * of)]);
        assert!(weakened(&redis(0.81)).is_empty());
        assert_eq!(weakened(&redis(0.79)), ["Redis Streams, always in W1"]);
    }

    #[test]
    fn latencies_are_compared_the_other_way_round() {
        let log = (Work::W3, Log, 2.0 * 166.0);
        let logs = [(Work::W1Bytes100, Log, 3_360_000.0), log];
        let redis =
            |of: f64| results(&[&logs[..], &[(Work::W3, RedisAlways, 376.0 * of)]].concat());
        assert!(weakened(&redis(1.2)).is_empty());
        assert_eq!(weakened(&redis(1.3)).len(), 1);
    }

    #[test]
    fn what_does_not_depend_on_the_disk_is_not_expected_to_be_faster_with_it() {
        let nats = |log: f64, of: f64| {
            let log = (Work::W1Bytes100, Log, 3_360_000.0 * log);
            results(&[log, (Work::W6, NatsDefault, 231_000.0 * of)])
        };
        assert!(weakened(&nats(2.0, 0.81)).is_empty());
        assert_eq!(weakened(&nats(2.0, 0.79)).len(), 1);
        assert!(weakened(&nats(0.5, 0.41)).is_empty());
    }
}
