//! What the other systems have reached before on a machine of this kind, measured by other programs:
//! a run in which one stays far below that compares with a weakened system, and is void.

use std::fmt::Write as _;

use crate::report::Results;
use crate::server::System;
use crate::targets::{Figure, RATE, short};
use crate::work::Work;
use System::{
    Log, Map, NatsAlways, NatsBatches, NatsDefault, RabbitQuorum, RabbitStream, RedisAlways,
    RedisEverysec, Tcp,
};

/// A system that reaches less of its reference than this is weakened.
const ENOUGH: f64 = 0.8;

const STORED: &str = "/stored_us/p50";

/// The floors of that time: a system may be slower by what the slowest of those that bound it is slower
/// by.
const FLOORS: &[(Work, System, f64)] = &[
    (Work::W1Bytes100, Log, 3_360_000.0),
    (Work::W1Kib1, Log, 1_170_000.0),
    (Work::W1Kib16, Log, 76_000.0),
    (Work::W2, Log, 3_360_000.0),
    (Work::W3, Log, 166.0),
    (Work::W3, Tcp, 67.0),
    (Work::W5Kib1, Tcp, 3_800_000_000.0 / 1_024.0),
    (Work::W7, Map, 12_500_000.0),
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
    /// As the floors of this run let expect it.
    expected: f64,
}

impl Comparison {
    /// What it reaches of what is expected.
    fn ratio(&self) -> f64 {
        if is_latency(self.work) {
            self.expected / self.measured
        } else {
            self.measured / self.expected
        }
    }
}

/// How fast this machine is beside that of the reference: by the log of the work, or that of small
/// messages; by what a socket carries, which is how fast it copies (for one message at a time by a round
/// trip); and by a map in memory, which is how fast its CPUs are.
fn scale(results: &Results, work: Work) -> Option<f64> {
    let of = |floor: Work, system: System| {
        let (.., reference) = FLOORS.iter().find(|(of, by, _)| (*of, *by) == (floor, system))?;
        let measured = results.median(Figure(floor, system, figure(floor)))?;
        Some(if is_latency(floor) { reference / measured } else { measured / reference })
    };
    let copying = if is_latency(work) { work } else { Work::W5Kib1 };
    // What has no log of its own is not bound by the disk: a faster one demands nothing.
    let log = of(work, Log).or_else(|| Some(of(Work::W1Bytes100, Log)?.min(1.0)));
    [log, of(copying, Tcp), of(Work::W7, Map)].into_iter().flatten().min_by(f64::total_cmp)
}

fn is_latency(work: Work) -> bool {
    work == Work::W3
}

fn figure(work: Work) -> &'static str {
    if is_latency(work) { STORED } else { RATE }
}

fn comparisons(results: &Results) -> Vec<Comparison> {
    let compare = |(work, system, reference): &(Work, System, f64)| {
        let measured = results.median(Figure(*work, *system, figure(*work)))?;
        let scale = scale(results, *work)?;
        let expected = if is_latency(*work) { reference / scale } else { reference * scale };
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
    fn a_system_may_be_slower_by_what_the_slowest_floor_is_slower_by() {
        let floors = |log, rest| {
            let log = (Work::W1Bytes100, Log, 3_360_000.0 * log);
            [log, (Work::W5Kib1, Tcp, 3_710_938.0 * rest), (Work::W7, Map, 12_500_000.0)]
        };
        let redis = |floors: &[_], of: f64| {
            results(&[floors, &[(Work::W6, RedisAlways, 428_000.0 * of)]].concat())
        };
        assert!(weakened(&redis(&floors(1.0, 0.5), 0.41)).is_empty());
        assert_eq!(weakened(&redis(&floors(1.0, 0.5), 0.39)).len(), 1);
        assert!(weakened(&redis(&floors(0.5, 2.0), 0.41)).is_empty());
        assert_eq!(weakened(&redis(&floors(0.5, 2.0), 0.39)).len(), 1);
        let slow = [(Work::W5Kib1, Tcp, 3_710_938.0), (Work::W7, Map, 6_250_000.0)];
        assert!(weakened(&redis(&slow, 0.41)).is_empty());
        assert_eq!(weakened(&redis(&slow, 0.39)).len(), 1);
        let floors = |log, tcp| [(Work::W3, Log, 166.0 * log), (Work::W3, Tcp, 67.0 * tcp)];
        let redis = |floors: &[_], of: f64| {
            results(&[floors, &[(Work::W3, RedisAlways, 188.0 * of)]].concat())
        };
        assert!(weakened(&redis(&floors(1.0, 2.0), 2.4)).is_empty());
        assert_eq!(weakened(&redis(&floors(1.0, 2.0), 2.6)).len(), 1);
        assert!(weakened(&redis(&floors(2.0, 0.5), 2.4)).is_empty());
        assert_eq!(weakened(&redis(&floors(2.0, 0.5), 2.6)).len(), 1);
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
