//! Names of topics, subscriptions and consumers: parsed once at the edge, then trusted.

use std::fmt;
use std::sync::Arc;

use globset::{GlobBuilder, GlobMatcher};
use serde::{Deserialize, Serialize};

use crate::limits;

/// A name broke the rules; the text says which one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} {name:?} is not valid: {rule}")]
pub struct InvalidName {
    what: &'static str,
    name: String,
    rule: &'static str,
}

const RULE: &str = "use 1 to 128 letters, digits, '.', '_' and '-', beginning with a letter or \
                    digit and without '..'";

fn check(what: &'static str, name: &str) -> Result<Arc<str>, InvalidName> {
    let body = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let valid = name.len() <= limits::MAX_NAME_BYTES
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(body)
        && !name.contains("..");
    if valid { Ok(name.into()) } else { Err(invalid(what, name, RULE)) }
}

fn invalid(what: &'static str, name: &str, rule: &'static str) -> InvalidName {
    let name = name.chars().take(limits::MAX_NAME_BYTES).collect();
    InvalidName { what, name, rule }
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $type(Arc<str>);

        impl $type {
            /// Parses a name.
            pub fn parse(name: &str) -> Result<Self, InvalidName> {
                check($what, name).map(Self)
            }

            /// The name.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl TryFrom<String> for $type {
            type Error = InvalidName;

            fn try_from(name: String) -> Result<Self, InvalidName> {
                Self::parse(&name)
            }
        }

        impl From<$type> for String {
            fn from(name: $type) -> String {
                name.0.as_ref().to_owned()
            }
        }
    };
}

name!(
    /// The name of a topic.
    TopicName, "topic name"
);
name!(
    /// The name of a subscription.
    SubscriptionName, "subscription name"
);

name!(
    /// The name of a snapshot of a subscription's position.
    SnapshotName, "snapshot name"
);

/// The stable name of a consumer: any printable text, since hosts have many kinds of names.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ConsumerId(Arc<str>);

impl ConsumerId {
    /// Parses a consumer id.
    pub fn parse(id: &str) -> Result<Self, InvalidName> {
        let valid =
            (1..=limits::MAX_NAME_BYTES).contains(&id.len()) && id.chars().all(|c| !c.is_control());
        if valid {
            Ok(Self(id.into()))
        } else {
            Err(invalid("consumer id", id, "use 1 to 128 bytes without control characters"))
        }
    }

    /// The id.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ConsumerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Which topics a subscription listens to: a name, or a pattern in which `*` stands for any
/// characters.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TopicPattern {
    text: Arc<str>,
    matcher: Matcher,
}

#[derive(Clone, Debug)]
enum Matcher {
    Name(TopicName),
    Glob(Box<GlobMatcher>),
}

impl TopicPattern {
    /// Parses a topic name or a pattern.
    pub fn parse(text: &str) -> Result<Self, InvalidName> {
        const WHAT: &str = "topic pattern";
        if !text.contains('*') {
            let name = TopicName::parse(text)?;
            return Ok(Self { text: text.into(), matcher: Matcher::Name(name) });
        }
        // A name with each '*' replaced by a letter must be a name: patterns that cannot match
        // are refused, and no other glob syntax gets through.
        check(WHAT, &text.replace('*', "x"))?;
        let glob = GlobBuilder::new(text)
            .literal_separator(false)
            .build()
            .map_err(|_| invalid(WHAT, text, "'*' is the only wildcard"))?;
        let matcher = Matcher::Glob(Box::new(glob.compile_matcher()));
        Ok(Self { text: text.into(), matcher })
    }

    /// Whether the topic is meant.
    pub fn matches(&self, topic: &TopicName) -> bool {
        match &self.matcher {
            Matcher::Name(name) => name == topic,
            Matcher::Glob(glob) => glob.is_match(topic.as_str()),
        }
    }

    /// The topic, if a single one is named.
    pub fn as_name(&self) -> Option<&TopicName> {
        match &self.matcher {
            Matcher::Name(name) => Some(name),
            Matcher::Glob(_) => None,
        }
    }

    /// The text it was parsed from.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl PartialEq for TopicPattern {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for TopicPattern {}

impl TryFrom<String> for TopicPattern {
    type Error = InvalidName;

    fn try_from(text: String) -> Result<Self, InvalidName> {
        Self::parse(&text)
    }
}

impl From<TopicPattern> for String {
    fn from(pattern: TopicPattern) -> String {
        pattern.text.as_ref().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_rule() {
        for good in ["a", "orders", "eu.orders-2", "0_x", &"n".repeat(128)] {
            assert!(TopicName::parse(good).is_ok(), "{good}");
        }
        for bad in ["", ".a", "_a", "-a", "a..b", "a/b", "a b", "ä", "a\n", &"n".repeat(129)] {
            assert!(TopicName::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_pattern_matches_by_star_only() {
        let check = |pattern: &str, topic: &str| {
            let topic = TopicName::parse(topic).unwrap();
            TopicPattern::parse(pattern).unwrap().matches(&topic)
        };
        assert!(check("orders", "orders"));
        assert!(!check("orders", "orders2"));
        assert!(check("orders.*", "orders.eu.de"));
        assert!(check("*", "anything"));
        assert!(!check("orders.*", "orders"));
        for bad in ["[a]*", "a?*", "{a,b}*", "!*", "a..*", ""] {
            assert!(TopicPattern::parse(bad).is_err(), "{bad}");
        }
    }
}
