//! How far a subscriber is behind.

use std::sync::Arc;
use std::time::Duration;

use super::{Subscriber, TopicPosition};
use crate::admin::{Admin, HeadOfLine, SubscriptionPosition};
use crate::error::AdminError;

/// How far a subscription is behind, or a reader.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Lag {
    /// In each topic.
    pub topics: Vec<TopicLag>,
}

/// How far a subscription is behind in a topic.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TopicLag {
    /// The topic.
    pub topic: Arc<str>,
    /// Its epoch.
    pub epoch: u64,
    /// How many messages are not acked; of a reader, how many it has not handed out. Messages for
    /// other recipients count until delivery has come across them.
    pub backlog: u64,
    /// How long ago the first of them was published; unknown to a reader.
    pub oldest_unacked_age: Option<Duration>,
    /// How many of them are with consumers; of a reader, how many wait in its buffer.
    pub outstanding: u64,
    /// How many of them have failed at least once; 0 of a reader.
    pub redelivered: u64,
    /// The first of them, and why it waits; unknown to a reader.
    pub head_of_line: Option<HeadOfLine>,
}

impl Lag {
    /// How many messages are not acked, in all topics.
    pub fn backlog(&self) -> u64 {
        self.topics.iter().map(|topic| topic.backlog).sum()
    }

    /// How long ago the oldest message was published that is not acked.
    pub fn oldest_unacked_age(&self) -> Option<Duration> {
        self.topics.iter().filter_map(|topic| topic.oldest_unacked_age).max()
    }
}

impl Subscriber {
    /// How far its subscription is behind, of all consumers together: asks the server. A reader
    /// tells what it knows by itself, which is as new as the last heartbeat.
    ///
    /// # Errors
    ///
    /// The server cannot be reached within the client's
    /// [request timeout](crate::ClientBuilder::request_timeout), or the subscription was deleted.
    pub async fn lag(&self) -> Result<Lag, AdminError> {
        if self.core.settings.is_reader() {
            let topics = self.position().topics.into_iter().map(of_reader);
            return Ok(Lag { topics: topics.collect() });
        }
        let admin = Admin::new(Arc::clone(&self.core.client));
        let subscription = admin.subscription(&self.core.settings.subscription).await?;
        Ok(Lag { topics: subscription.positions.into_iter().map(of_subscription).collect() })
    }
}

fn of_reader(position: TopicPosition) -> TopicLag {
    TopicLag {
        topic: position.topic,
        epoch: position.epoch,
        backlog: position.behind,
        oldest_unacked_age: None,
        outstanding: position.buffered,
        redelivered: 0,
        head_of_line: None,
    }
}

fn of_subscription(position: SubscriptionPosition) -> TopicLag {
    TopicLag {
        topic: position.topic.into(),
        epoch: position.epoch,
        backlog: position.backlog,
        oldest_unacked_age: position.oldest_unacked_age,
        outstanding: position.outstanding,
        redelivered: position.redelivered,
        head_of_line: position.head_of_line,
    }
}
