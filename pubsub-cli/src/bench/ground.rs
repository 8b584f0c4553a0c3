//! What a measurement works on: a topic and subscriptions, which are gone afterwards.

use pubsub_client::{Client, Start, Subscriber, TopicConfig};

use super::load::unique;
use crate::failure::{Exit, Failure};

/// A topic, and the subscriptions made on it.
#[derive(Debug)]
pub(super) struct Ground<'a> {
    client: &'a Client,
    pub(super) topic: String,
    own: bool,
    subscriptions: Vec<String>,
}

impl<'a> Ground<'a> {
    /// On a topic that exists, or on a new one.
    pub(super) async fn new(client: &'a Client, topic: Option<String>) -> Result<Self, Failure> {
        let own = topic.is_none();
        let topic = match topic {
            Some(topic) => client.admin().topic(topic).await?.name,
            None => {
                let topic = format!("bench-{:x}", unique());
                client.admin().create_topic(&topic, TopicConfig::new()).await?.name
            }
        };
        Ok(Self { client, topic, own, subscriptions: Vec::new() })
    }

    /// A subscriber of a new durable subscription.
    pub(super) async fn subscribe(&mut self, start: Start) -> Result<Subscriber, Failure> {
        let name = format!("bench-{:x}", unique());
        self.subscriptions.push(name.clone());
        let subscriber = self.client.subscriber(name).topic(&self.topic).start(start);
        Ok(subscriber.open().await?)
    }

    /// How many messages there are.
    pub(super) async fn messages(&self) -> Result<u64, Failure> {
        let topic = self.client.admin().topic(&self.topic).await?;
        Ok((topic.head + 1).saturating_sub(topic.first))
    }

    /// Deletes what was made.
    pub(super) async fn clear(self) -> Result<(), Failure> {
        let admin = self.client.admin();
        for subscription in self.subscriptions {
            let deleted = admin.delete_subscription(subscription).await.map_err(Failure::from);
            // It may have been interrupted before it was made.
            if let Err(failure) = deleted
                && failure.exit() != Exit::NotFound
            {
                return Err(failure);
            }
        }
        if self.own {
            admin.delete_topic(self.topic).await?;
        }
        Ok(())
    }
}
