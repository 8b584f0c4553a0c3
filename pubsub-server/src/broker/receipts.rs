//! Who has received a message.

use super::delivery::Receipt;
use super::error::BrokerError;
use super::session::Command;
use super::subscription::AdminCommand;
use super::{Broker, Topic};
use crate::names::{SubscriptionName, TopicName};
use crate::record::{Epoch, StoredMessage};
use crate::storage::{ReadError, ReadLimit};

/// What one subscription knows of a message.
#[derive(Clone, Debug)]
pub struct ReceiptAnswer {
    /// The subscription.
    pub subscription: SubscriptionName,
    /// The answer.
    pub receipt: Receipt,
}

impl Broker {
    /// Asks one subscription, or all that listen to the topic, about a message. What is answered
    /// is durable.
    ///
    /// # Errors
    ///
    /// If there is no such topic, subscription or message.
    pub async fn receipts(
        &self,
        topic: &TopicName,
        epoch: Option<Epoch>,
        sequence: u64,
        subscription: Option<&SubscriptionName>,
    ) -> Result<Vec<ReceiptAnswer>, BrokerError> {
        let topic = self.topic(topic)?;
        let name = &topic.record.name;
        if epoch.is_some_and(|epoch| epoch != topic.record.epoch) {
            return Err(BrokerError::TopicRecreated(name.clone()));
        }
        let head = *topic.head.borrow();
        if !(1..=head).contains(&sequence) {
            return Err(BrokerError::BeyondHead { topic: name.clone(), sequence, head });
        }
        let asked = match subscription {
            Some(subscription) => vec![subscription.clone()],
            None => topic.subscriptions(),
        };
        let message = self.stored(&topic, sequence).await;
        let mut answers = Vec::with_capacity(asked.len());
        for subscription in asked {
            let handle = self.existing(&subscription)?;
            let epoch = topic.record.epoch;
            let ask = |reply| Command::Admin(AdminCommand::Receipt(epoch, sequence, reply));
            let Some(mut receipt) = handle.ask(ask).await?? else {
                let text = format!("subscription {subscription} does not listen to topic {name}");
                return Err(BrokerError::Invalid(text));
            };
            let wanted = message.as_ref().is_none_or(|message| handle.record.wants(message));
            if receipt == Receipt::Pending && !wanted {
                receipt = Receipt::NotAddressed;
            }
            answers.push(ReceiptAnswer { subscription, receipt });
        }
        Ok(answers)
    }

    /// A message, if it is still stored.
    async fn stored(&self, topic: &Topic, sequence: u64) -> Option<StoredMessage> {
        let one = ReadLimit { messages: 1, bytes: 1 };
        let read: Result<_, ReadError> =
            self.inner.storage.read(topic.record.epoch, sequence, one).await;
        read.ok().and_then(|messages| messages.into_iter().next())
    }
}
