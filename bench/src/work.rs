//! What is measured, and of whom.

use serde::{Deserialize, Serialize};

use crate::server::System;
use System::{
    Grpc, Index, Log, Map, NatsAlways, NatsBatches, NatsDefault, Pubsub, RabbitQuorum,
    RabbitStream, RedisAlways, RedisEverysec, Tcp,
};

/// A kind of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Work {
    W1Bytes100,
    W1Kib1,
    W1Kib16,
    W2,
    W3,
    W4,
    W5Bytes100,
    W5Kib1,
    W6,
    W7,
    W8,
    W9,
}

/// What the clients do.
#[derive(Clone, Copy, Debug)]
pub enum Task {
    Publish { size: usize, publishers: u64 },
    Latency,
    Rate,
    Replay { size: usize },
    Fanout,
    Keys,
    Mixed,
    Grown,
}

const STORED: &[System] = &[
    Log,
    Pubsub,
    RedisAlways,
    NatsAlways,
    NatsBatches,
    RabbitQuorum,
    RedisEverysec,
    NatsDefault,
    RabbitStream,
    Grpc,
];
const SYSTEMS: &[System] =
    &[Pubsub, RedisAlways, NatsAlways, RabbitQuorum, RedisEverysec, NatsDefault, RabbitStream];

const REPLAYED: &[System] =
    &[Tcp, Pubsub, RedisAlways, RabbitQuorum, RedisEverysec, NatsDefault, RabbitStream];

impl Work {
    pub const ALL: [Self; 12] = [
        Self::W1Bytes100,
        Self::W1Kib1,
        Self::W1Kib16,
        Self::W2,
        Self::W3,
        Self::W4,
        Self::W5Bytes100,
        Self::W5Kib1,
        Self::W6,
        Self::W7,
        Self::W8,
        Self::W9,
    ];

    /// As in the titles of docs/performance.md, and for `--only`.
    pub fn number(self) -> &'static str {
        match self {
            Self::W1Bytes100 | Self::W1Kib1 | Self::W1Kib16 => "W1",
            Self::W2 => "W2",
            Self::W3 => "W3",
            Self::W4 => "W4",
            Self::W5Bytes100 | Self::W5Kib1 => "W5",
            Self::W6 => "W6",
            Self::W7 => "W7",
            Self::W8 => "W8",
            Self::W9 => "W9",
        }
    }

    pub fn title(self) -> &'static str {
        match self {
            Self::W1Bytes100 => "one publisher, 100 B",
            Self::W1Kib1 => "one publisher, 1 KiB",
            Self::W1Kib16 => "one publisher, 16 KiB",
            Self::W2 => "sixteen publishers, 100 B",
            Self::W3 => "one message at a time, 256 B",
            Self::W4 => "5,000 messages a second of 256 B, until received",
            Self::W5Bytes100 => "replay with acks, 100 B",
            Self::W5Kib1 => "replay with acks, 1 KiB",
            Self::W6 => "ten subscriptions, 100 B",
            Self::W7 => "random idempotency keys, a million of them known, 100 B",
            Self::W8 => "5,000 messages a second of 256 B while another subscription catches up",
            Self::W9 => "a store that has grown",
        }
    }

    pub fn id(self) -> String {
        serde_json::to_value(self)
            .ok()
            .and_then(|id| id.as_str().map(str::to_owned))
            .unwrap_or_default()
    }

    pub fn task(self) -> Task {
        match self {
            Self::W1Bytes100 => Task::Publish { size: 100, publishers: 1 },
            Self::W1Kib1 => Task::Publish { size: 1024, publishers: 1 },
            Self::W1Kib16 => Task::Publish { size: 16 * 1024, publishers: 1 },
            Self::W2 => Task::Publish { size: 100, publishers: 16 },
            Self::W3 => Task::Latency,
            Self::W4 => Task::Rate,
            Self::W5Bytes100 => Task::Replay { size: 100 },
            Self::W5Kib1 => Task::Replay { size: 1024 },
            Self::W6 => Task::Fanout,
            Self::W7 => Task::Keys,
            Self::W8 => Task::Mixed,
            Self::W9 => Task::Grown,
        }
    }

    /// The log comes first: it says how the disk is at the moment.
    pub fn systems(self) -> &'static [System] {
        match self {
            Self::W1Bytes100 | Self::W1Kib1 | Self::W1Kib16 => STORED,
            Self::W2 => &STORED[..STORED.len() - 1],
            Self::W3 => &[
                Log,
                Tcp,
                Pubsub,
                RedisAlways,
                NatsAlways,
                RabbitQuorum,
                RedisEverysec,
                NatsDefault,
                RabbitStream,
            ],
            Self::W4 | Self::W6 => SYSTEMS,
            Self::W5Bytes100 => &REPLAYED[1..],
            Self::W5Kib1 => REPLAYED,
            Self::W7 => &[Pubsub, Index, Map],
            Self::W8 | Self::W9 => &[Pubsub],
        }
    }
}

/// How many messages a system replays or fans out: those that are slow get fewer, or a run would
/// take hours.
pub fn count(system: System, task: Task) -> u64 {
    let slow = matches!(system, RabbitQuorum | RabbitStream);
    #[expect(clippy::match_same_arms, reason = "a table")]
    match task {
        Task::Replay { size } if size > 100 => {
            if slow {
                50_000
            } else {
                200_000
            }
        }
        Task::Replay { .. } => {
            if slow {
                100_000
            } else {
                1_000_000
            }
        }
        Task::Fanout => match system {
            Pubsub => 200_000,
            RedisAlways | RedisEverysec => 50_000,
            NatsDefault => 50_000,
            NatsAlways => 10_000,
            _ => 5_000,
        },
        _ => 0,
    }
}
