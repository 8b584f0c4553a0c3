//! Values on the command line: positions, sizes, attributes.

use std::str::FromStr;
use std::time::{Duration, SystemTime};

use pubsub_client::{Compatibility, MessageId, Start, SubscriptionKind, WhenFull};

/// The help of every option that takes a [`Where`].
macro_rules! from_help {
    ($what:literal) => {
        concat!(
            $what,
            ": earliest, latest, a sequence (with one topic), a time such as \
             2026-01-31T12:00:00Z, or how long ago, such as 10m"
        )
    };
}
pub(crate) use from_help;

/// How a subscription spreads its messages over consumers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Kind {
    /// One consumer at a time sees each topic in order; others stand by
    Exclusive,
    /// Each message goes to one of all consumers, in no order: a work queue
    Shared,
    /// As shared, but messages of one ordering key go to one consumer at a time, in order
    KeyOrdered,
}

impl Kind {
    pub(crate) fn kind(self) -> SubscriptionKind {
        match self {
            Self::Exclusive => SubscriptionKind::Exclusive,
            Self::Shared => SubscriptionKind::Shared,
            Self::KeyOrdered => SubscriptionKind::KeyOrdered,
        }
    }
}

/// What happens when a topic is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Full {
    /// Publishers wait, or are refused
    Reject,
    /// The oldest messages go; whoever was owed them is told of a gap
    DropOldest,
}

impl Full {
    pub(crate) fn when_full(self) -> WhenFull {
        match self {
            Self::Reject => WhenFull::Reject,
            Self::DropOldest => WhenFull::DropOldest,
        }
    }
}

/// What a new revision of a schema has to keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Keep {
    /// What was written by the present revision can be read by the new one
    Backward,
    /// Nothing
    None,
}

impl Keep {
    pub(crate) fn compatibility(self) -> Compatibility {
        match self {
            Self::Backward => Compatibility::Backward,
            Self::None => Compatibility::None,
        }
    }
}

/// Where to start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Where {
    Earliest,
    Latest,
    Sequence(u64),
    Time(SystemTime),
    Ago(Duration),
}

impl Where {
    pub(crate) fn start(self) -> Start {
        match self {
            Self::Earliest => Start::Earliest,
            Self::Latest => Start::Latest,
            Self::Sequence(sequence) => Start::Sequence(sequence),
            Self::Time(time) => Start::Time(time),
            Self::Ago(ago) => Start::Time(now().checked_sub(ago).unwrap_or(SystemTime::UNIX_EPOCH)),
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "a command has no other clock than the system's")]
pub(crate) fn now() -> SystemTime {
    SystemTime::now()
}

impl FromStr for Where {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "earliest" => return Ok(Self::Earliest),
            "latest" => return Ok(Self::Latest),
            _ => {}
        }
        if let Ok(sequence) = text.parse::<u64>() {
            let first = "sequences start at 1; for everything that is stored, say earliest";
            return if sequence == 0 { Err(first.into()) } else { Ok(Self::Sequence(sequence)) };
        }
        if let Ok(time) = humantime::parse_rfc3339_weak(text) {
            return Ok(Self::Time(time));
        }
        let ago = text.strip_suffix("ago").unwrap_or(text).trim();
        humantime::parse_duration(ago).map(Self::Ago).map_err(|_| {
            "expected earliest, latest, a sequence, a time such as 2026-01-31T12:00:00Z, or how \
             long ago, such as 10m"
                .into()
        })
    }
}

/// A size in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bytes(pub(crate) u64);

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected =
            || "expected a size in bytes, such as 500000, 64KiB, 10MB or 2GiB".to_owned();
        let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(end);
        let unit: u64 = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "k" | "kib" => 1 << 10,
            "kb" => 1000,
            "m" | "mib" => 1 << 20,
            "mb" => 1_000_000,
            "g" | "gib" => 1 << 30,
            "gb" => 1_000_000_000,
            "t" | "tib" => 1 << 40,
            "tb" => 1_000_000_000_000,
            _ => return Err(expected()),
        };
        let bytes = number.parse::<u64>().ok().and_then(|number| number.checked_mul(unit));
        // The wire's 0 means the default, which is not what whoever types it means.
        bytes.filter(|bytes| *bytes > 0).map(Self).ok_or_else(expected)
    }
}

/// Which message is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum MessageRef {
    Sequence(u64),
    Id(MessageId),
}

impl FromStr for MessageRef {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(sequence) = text.parse() {
            return Ok(Self::Sequence(sequence));
        }
        text.parse().map(Self::Id).map_err(|_| {
            "expected a sequence, such as 17, or an id as `pubsub publish` prints it".into()
        })
    }
}

/// `NAME=VALUE`.
pub(crate) fn attribute(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("expected NAME=VALUE, such as region=eu".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_understood() {
        let from = |text: &str| text.parse::<Where>();
        assert_eq!(from("earliest"), Ok(Where::Earliest));
        assert_eq!(from("latest"), Ok(Where::Latest));
        assert_eq!(from("17"), Ok(Where::Sequence(17)));
        assert_eq!(from("10m"), Ok(Where::Ago(Duration::from_secs(600))));
        assert_eq!(from("2h 30m ago"), Ok(Where::Ago(Duration::from_secs(9000))));
        let day = SystemTime::UNIX_EPOCH + Duration::from_secs(86_400);
        assert_eq!(from("1970-01-02T00:00:00Z"), Ok(Where::Time(day)));
        assert_eq!(from("1970-01-02 00:00:00"), Ok(Where::Time(day)));
        for bad in ["", "0", "-1", "soon", "10 parsecs", "2026-13-01T00:00:00Z"] {
            assert!(from(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn sizes_are_understood() {
        let bytes = |text: &str| text.parse::<Bytes>().map(|bytes| bytes.0).ok();
        assert_eq!(bytes("500000"), Some(500_000));
        assert_eq!(bytes("64KiB"), Some(65_536));
        assert_eq!(bytes("64 kib"), Some(65_536));
        assert_eq!(bytes("10MB"), Some(10_000_000));
        assert_eq!(bytes("1g"), Some(1 << 30));
        for bad in ["", "0", "KiB", "-1", "1.5GiB", "9999999999TiB", "1 parsec"] {
            assert_eq!(bytes(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn attributes_need_a_name() {
        assert_eq!(attribute("a=b=c"), Ok(("a".into(), "b=c".into())));
        assert_eq!(attribute("a="), Ok(("a".into(), String::new())));
        assert!(attribute("a").is_err());
        assert!(attribute("=b").is_err());
    }
}
