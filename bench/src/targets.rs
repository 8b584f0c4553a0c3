//! What has to hold, as ratios within one run.

use crate::report::Results;
use crate::server::System;
use crate::work::Work;
use System::{Index, Log, NatsAlways, NatsBatches, NatsDefault, Pubsub, RedisAlways};

/// What of a cell is compared.
#[derive(Clone, Copy, Debug)]
pub struct Figure(pub Work, pub System, pub &'static str);

/// Our figure divided by another one, or alone.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    pub ours: Figure,
    pub other: Option<Figure>,
    pub bound: Bound,
}

#[derive(Clone, Copy, Debug)]
pub enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

pub const RATE: &str = "/messages_per_second";
const STORED: &str = "/stored_us/p50";
const RECEIVED: &str = "/received_us/p50";
const RECEIVED_P99: &str = "/received_us/p99";

impl Target {
    /// The ratio of each round, in order.
    pub fn ratios(&self, results: &Results) -> Vec<f64> {
        let rounds = results.rounds();
        let ratio = |round: u64| {
            let ours = results.figure(self.ours, round)?;
            let other = self.other.map_or(Some(1.0), |other| results.figure(other, round))?;
            Some(ours / other)
        };
        let mut ratios: Vec<_> = rounds.into_iter().filter_map(ratio).collect();
        ratios.sort_by(f64::total_cmp);
        ratios
    }

    pub fn text(&self) -> String {
        let Figure(work, _, figure) = self.ours;
        let what = match figure {
            RATE => "messages a second",
            STORED => "p50 until stored",
            RECEIVED => "p50 until received",
            RECEIVED_P99 => "p99 until received",
            "/server_cpu_per_million" => "seconds of the server's CPU for a million",
            "/resident_bytes" => "resident bytes",
            "/disk_bytes_per_message" => "bytes on disk for a message",
            "/full_per_second" => "with many GiB stored, messages a second",
            "/many_per_second" => "with 10,000 topics, messages a second",
            "/restart_full_seconds" => "seconds of a restart after a kill, with many GiB",
            _ => "seconds of a restart after a kill, with 10,000 topics",
        };
        let other = match self.other {
            Some(Figure(other, system, _)) if other == work && system != Pubsub => {
                format!(" beside {}", system.name())
            }
            Some(Figure(other, Pubsub, RATE)) if other == work => {
                " beside the fresh store".to_owned()
            }
            Some(Figure(other, system, _)) => {
                format!(" beside {} in {} ({})", system.name(), other.number(), other.title())
            }
            None => String::new(),
        };
        format!("{what}{other}")
    }
}

impl Bound {
    pub fn holds(self, value: f64) -> bool {
        match self {
            Self::AtLeast(bound) => value >= bound,
            Self::AtMost(bound) => value <= bound,
        }
    }

    pub fn text(self) -> String {
        match self {
            Self::AtLeast(bound) => format!("≥ {}", short(bound)),
            Self::AtMost(bound) => format!("≤ {}", short(bound)),
        }
    }
}

/// Three digits or so.
pub fn short(value: f64) -> String {
    match value {
        value if value >= 1e6 => format!("{:.0} M", value / 1e6),
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value => format!("{value:.2}"),
    }
}

const fn rate(work: Work, other: System, at_least: f64) -> Target {
    compare(work, RATE, other, Bound::AtLeast(at_least))
}

const fn compare(work: Work, figure: &'static str, other: System, bound: Bound) -> Target {
    let other = Some(Figure(work, other, figure));
    Target { ours: Figure(work, Pubsub, figure), other, bound }
}

const fn alone(work: Work, figure: &'static str, bound: Bound) -> Target {
    Target { ours: Figure(work, Pubsub, figure), other: None, bound }
}

const fn across(ours: Figure, other: Figure, bound: Bound) -> Target {
    Target { ours, other: Some(other), bound }
}

/// A resident server of this size is a small one.
const RESIDENT: Bound = Bound::AtMost(256.0 * 1024.0 * 1024.0);

pub const TARGETS: &[Target] = &[
    rate(Work::W1Bytes100, RedisAlways, 7.0),
    rate(Work::W1Bytes100, NatsDefault, 8.0),
    rate(Work::W1Bytes100, NatsBatches, 20.0),
    rate(Work::W1Bytes100, NatsAlways, 300.0),
    rate(Work::W1Bytes100, Log, 0.5),
    rate(Work::W1Kib1, RedisAlways, 6.0),
    rate(Work::W1Kib1, NatsDefault, 2.0),
    rate(Work::W1Kib1, Log, 0.4),
    rate(Work::W1Kib16, Log, 0.5),
    rate(Work::W2, RedisAlways, 2.5),
    rate(Work::W2, NatsDefault, 5.0),
    compare(Work::W3, STORED, RedisAlways, Bound::AtMost(1.4)),
    compare(Work::W3, STORED, NatsAlways, Bound::AtMost(1.0)),
    compare(Work::W4, RECEIVED, RedisAlways, Bound::AtMost(1.0)),
    compare(Work::W4, RECEIVED_P99, RedisAlways, Bound::AtMost(1.5)),
    rate(Work::W5Bytes100, NatsDefault, 5.0),
    rate(Work::W5Bytes100, RedisAlways, 6.0),
    rate(Work::W5Kib1, NatsDefault, 5.0),
    rate(Work::W5Kib1, RedisAlways, 6.0),
    rate(Work::W6, NatsDefault, 12.0),
    rate(Work::W6, RedisAlways, 6.0),
    rate(Work::W7, Index, 2.0),
    across(
        Figure(Work::W7, Pubsub, RATE),
        Figure(Work::W1Bytes100, RedisAlways, RATE),
        Bound::AtLeast(1.0),
    ),
    across(
        Figure(Work::W8, Pubsub, RECEIVED_P99),
        Figure(Work::W4, Pubsub, RECEIVED_P99),
        Bound::AtMost(2.0),
    ),
    across(
        Figure(Work::W9, Pubsub, "/full_per_second"),
        Figure(Work::W9, Pubsub, RATE),
        Bound::AtLeast(0.8),
    ),
    across(
        Figure(Work::W9, Pubsub, "/many_per_second"),
        Figure(Work::W9, Pubsub, RATE),
        Bound::AtLeast(0.7),
    ),
    alone(Work::W9, "/restart_full_seconds", Bound::AtMost(2.0)),
    alone(Work::W9, "/restart_many_seconds", Bound::AtMost(2.0)),
    alone(Work::W1Bytes100, "/server_cpu_per_million", Bound::AtMost(0.8)),
    alone(Work::W1Bytes100, "/resident_bytes", RESIDENT),
    alone(Work::W1Kib1, "/resident_bytes", RESIDENT),
    alone(Work::W1Kib16, "/resident_bytes", RESIDENT),
    alone(Work::W2, "/resident_bytes", RESIDENT),
    alone(Work::W3, "/resident_bytes", RESIDENT),
    alone(Work::W4, "/resident_bytes", RESIDENT),
    alone(Work::W5Bytes100, "/resident_bytes", RESIDENT),
    alone(Work::W5Kib1, "/resident_bytes", RESIDENT),
    alone(Work::W6, "/resident_bytes", RESIDENT),
    alone(Work::W1Kib1, "/disk_bytes_per_message", Bound::AtMost(1.35 * 1024.0)),
];
