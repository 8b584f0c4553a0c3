//! Which messages of a topic keep their order among each other. Pure: no I/O, no clock.

use std::sync::Arc;

use super::builder::SubscriptionKind;

/// What a subscription keeps in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// All messages of a topic.
    Topic,
    /// The messages of a topic that have the same ordering key.
    Key,
    /// Nothing.
    None,
}

/// Messages of a topic that keep their order among each other. What has no lane has no order: it
/// waits for nothing, and nothing waits for it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Lane {
    Topic,
    Key(Arc<str>),
}

impl From<SubscriptionKind> for Order {
    fn from(kind: SubscriptionKind) -> Self {
        match kind {
            SubscriptionKind::Exclusive => Self::Topic,
            SubscriptionKind::Shared => Self::None,
            SubscriptionKind::KeyOrdered => Self::Key,
        }
    }
}

impl Order {
    /// The lane of a message with this ordering key, which is empty if it has none; and so, with
    /// an empty one, of what concerns the topic as a whole.
    pub(super) fn lane(self, key: &str) -> Option<Lane> {
        match self {
            Self::Topic => Some(Lane::Topic),
            Self::Key => (!key.is_empty()).then(|| Lane::Key(key.into())),
            Self::None => None,
        }
    }
}
