//! Publishing: limits, recipients and back-pressure, then the log.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::OwnedSemaphorePermit;

use super::error::BrokerError;
use super::{Broker, Owed, Topic};
use crate::limits;
use crate::names::{SubscriptionName, TopicName};
use crate::record::{Epoch, NewMessage, Uuid};
use crate::storage::{
    self, Append, AppendOutcome, Atomic, Item, OpenPublisher, PublisherRef, Refusal, RefusalReason,
    Run, Ticket,
};

/// A publisher wants to open a stream.
#[derive(Clone, Debug)]
pub struct Open {
    /// The topic.
    pub topic: TopicName,
    /// The epoch of the topic that it knows, if it has been here before.
    pub known_epoch: Option<Epoch>,
    /// The boot of the server that it knows, if it has been here before.
    pub known_boot: Option<Uuid>,
    /// The publisher.
    pub producer: Uuid,
    /// How often it started over.
    pub producer_epoch: u32,
    /// The number of this connection.
    pub attach: u64,
    /// Results below this sequence are not needed any more.
    pub resolved_below: u64,
}

/// An open publisher stream.
#[derive(Debug)]
pub struct Publisher {
    broker: Broker,
    topic: Arc<Topic>,
    publisher: PublisherRef,
    last_sequence: Option<u64>,
}

/// A batch of which each message was checked by itself.
#[derive(Debug)]
pub struct Inspected(pub(super) Batch);

/// Messages with dense publisher sequences.
#[derive(Debug)]
pub struct Batch {
    /// The sequence of the first message.
    pub first_sequence: u64,
    /// Results below this sequence are not needed any more.
    pub resolved_below: u64,
    /// The messages, or why they are refused.
    pub items: Vec<Item>,
    /// Whether they are stored all together or not at all.
    pub atomic: Option<Atomic>,
}

/// Publishes on their way to the disk. Resolves when their fate is durable.
#[derive(Debug)]
pub struct Pending {
    ticket: Ticket<AppendOutcome>,
    bytes: u64,
}

/// What messages take up on their way to the disk.
#[derive(Debug)]
struct Room {
    topic: Arc<Topic>,
    bytes: u64,
    _permit: OwnedSemaphorePermit,
}

impl Room {
    fn new(topic: Arc<Topic>, bytes: u64, permit: OwnedSemaphorePermit) -> Self {
        topic.uncommitted.fetch_add(bytes, Ordering::Relaxed);
        Self { topic, bytes, _permit: permit }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.topic.uncommitted.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Broker {
    /// Opens a publisher's stream, and fences its earlier ones.
    ///
    /// # Errors
    ///
    /// If the topic is not there or not the one the publisher knows, or the publisher may not.
    pub async fn open_publisher(&self, open: Open) -> Result<Publisher, BrokerError> {
        self.check_boot(open.known_boot)?;
        let topic = self.topic(&open.topic)?;
        if open.known_epoch.is_some_and(|known| known != topic.record.epoch) {
            return Err(BrokerError::TopicRecreated(open.topic));
        }
        let Open { producer: id, producer_epoch: epoch, attach: stream, resolved_below, .. } = open;
        let publisher = PublisherRef { id, epoch, stream };
        let request = OpenPublisher { topic: topic.record.epoch, publisher, resolved_below };
        let opened = self.inner.storage.open_publisher(request).await?.into_inner();
        let last_sequence = opened?;
        Ok(Publisher { broker: self.clone(), topic, publisher, last_sequence })
    }

    /// Publishes outside of a publisher session.
    ///
    /// # Errors
    ///
    /// If nothing of it is stored.
    pub async fn publish(
        &self,
        topic: &TopicName,
        batch: Batch,
    ) -> Result<(Epoch, Vec<Run>), BrokerError> {
        let topic = self.topic(topic)?;
        let Inspected(batch) = self.inspect(&topic, batch).await?;
        topic.check_room(&*self.inner.storage, batch.bytes())?;
        let semaphore = Arc::clone(&self.inner.uncommitted);
        let permit = semaphore.acquire_many_owned(batch.permits()).await;
        let permit = permit.expect("it is never closed");
        let runs = self.append(&topic, None, batch, permit).await?;
        Ok((topic.record.epoch, runs))
    }

    /// Hands a batch to the log.
    fn append(
        &self,
        topic: &Arc<Topic>,
        publisher: Option<PublisherRef>,
        mut batch: Batch,
        permit: OwnedSemaphorePermit,
    ) -> Pending {
        for item in &mut batch.items {
            if let Item::Store(message) = item
                && let Some(refusal) = topic.refuse_recipients(message)
            {
                *item = message.refused(refusal);
            }
        }
        let bytes = batch.bytes() as u64;
        // It goes with the messages: neither a caller that hangs up gives it back too early, nor a
        // peer that does not take its answers too late.
        let room = Some(Arc::new(Room::new(Arc::clone(topic), bytes, permit)) as storage::Room);
        let Batch { first_sequence, resolved_below, items, atomic } = batch;
        let topic = topic.record.epoch;
        let append =
            Append { topic, publisher, first_sequence, resolved_below, items, atomic, room };
        Pending { ticket: self.inner.storage.append(append), bytes }
    }
}

impl Topic {
    fn refuse_recipients(&self, message: &NewMessage) -> Option<Refusal> {
        if message.recipients.is_empty() {
            return None;
        }
        let floors = self.floors();
        let listens =
            |name: &SubscriptionName| floors.contains_key(&Owed::Subscription(name.clone()));
        let unknown = message.recipients.iter().find(|name| !listens(name))?;
        let detail = format!("recipient {unknown} is no subscription of this topic");
        Some(Refusal::new(RefusalReason::UnknownRecipient, detail))
    }
}

impl NewMessage {
    /// This message as one that is refused for good.
    pub(super) fn refused(&self, refusal: Refusal) -> Item {
        match self.key {
            Some(key) => Item::RefuseNew(key, refusal),
            None => Item::Refuse(refusal),
        }
    }
}

impl Publisher {
    /// The topic's epoch.
    pub fn topic_epoch(&self) -> Epoch {
        self.topic.record.epoch
    }

    /// The last sequence that was decided when the stream was opened.
    pub fn last_sequence(&self) -> Option<u64> {
        self.last_sequence
    }

    /// The largest message.
    pub fn max_message_bytes(&self) -> u64 {
        self.topic.config().max_message_bytes
    }

    /// How long idempotency keys are remembered.
    pub fn idempotency_window(&self) -> Duration {
        self.topic.config().idempotency_window
    }

    /// Checks each message of a batch by itself, with the topic's schema, too. A batch that takes
    /// long is checked beside the runtime. Dropping the future loses the batch and nothing else.
    pub fn inspect(&self, batch: Batch) -> BoxFuture<'static, Result<Inspected, BrokerError>> {
        self.broker.inspect(&self.topic, batch)
    }

    /// Whether a batch can be taken now. Replays always can: their answers are stored.
    ///
    /// # Errors
    ///
    /// If the disk or the topic is full.
    pub fn check_room(&self, Inspected(batch): &Inspected) -> Result<(), BrokerError> {
        let last = batch.first_sequence + batch.items.len() as u64 - 1;
        if self.last_sequence.is_some_and(|decided| last <= decided) {
            return Ok(());
        }
        self.topic.check_room(&*self.broker.inner.storage, batch.bytes())
    }

    /// Says that the stream is in use, to be called every [`limits::SESSION_TOUCH`] at least:
    /// publishers that were not used for long are forgotten.
    pub fn touch(&self) {
        let (topic, publisher) = (self.topic.record.epoch, Some(self.publisher));
        let append = Append {
            topic,
            publisher,
            first_sequence: 0,
            resolved_below: 0,
            items: Vec::new(),
            atomic: None,
            room: None,
        };
        // If it is refused, so is the next batch, which says why.
        drop(self.broker.inner.storage.append(append));
    }

    /// Hands a batch to the log. Batches take effect in the order of the calls.
    ///
    /// # Errors
    ///
    /// Gives the batch back if too much is waiting for its commit. It has to be tried again when
    /// earlier batches are answered, or a little later.
    pub fn try_publish(&self, Inspected(batch): Inspected) -> Result<Pending, Inspected> {
        let semaphore = Arc::clone(&self.broker.inner.uncommitted);
        match semaphore.try_acquire_many_owned(batch.permits()) {
            Ok(permit) => Ok(self.broker.append(&self.topic, Some(self.publisher), batch, permit)),
            Err(_) => Err(Inspected(batch)),
        }
    }
}

impl Batch {
    fn permits(&self) -> u32 {
        let bytes = self.bytes() + self.items.len() * limits::MESSAGE_OVERHEAD_BYTES;
        u32::try_from(bytes.min(limits::MAX_UNCOMMITTED_BYTES)).expect("the limit fits")
    }

    pub(super) fn bytes(&self) -> usize {
        let stored = self.items.iter().map(|item| match item {
            Item::Store(message) => message.body.len(),
            Item::Refuse(_) | Item::RefuseNew(..) => 0,
        });
        stored.sum()
    }
}

impl Pending {
    /// Bytes of the messages.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Future for Pending {
    type Output = Result<Vec<Run>, BrokerError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.ticket).poll(cx).map(|result| Ok(result?.into_inner()?))
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::env::System;
    use crate::record::TopicConfig;
    use crate::storage::memory::Memory;

    fn open(producer: u8, attach: u64) -> Open {
        Open {
            topic: TopicName::parse("t").unwrap(),
            known_epoch: None,
            known_boot: None,
            producer: Uuid([producer; 16]),
            producer_epoch: 1,
            attach,
            resolved_below: 0,
        }
    }

    async fn publisher() -> Publisher {
        let env = Arc::new(System);
        let broker = Broker::start(Arc::new(Memory::new(Arc::clone(&env) as _)), env).await;
        let broker = broker.unwrap();
        broker.create_topic(open(1, 1).topic, TopicConfig::default(), false).await.unwrap();
        broker.open_publisher(open(1, 1)).await.unwrap()
    }

    fn batch(first_sequence: u64) -> Inspected {
        let body = Bytes::from(vec![1; 1000]);
        let message = NewMessage { body, recipients: Vec::new(), key: None };
        let items = vec![Item::Store(message)];
        let resolved_below = first_sequence;
        Inspected(Batch { first_sequence, resolved_below, items, atomic: None })
    }

    #[tokio::test]
    async fn a_peer_that_takes_no_answers_keeps_no_room_from_others() {
        let publisher = publisher().await;
        let committed = publisher.try_publish(batch(1)).unwrap();
        let semaphore = &publisher.broker.inner.uncommitted;
        assert_eq!(semaphore.available_permits(), limits::MAX_UNCOMMITTED_BYTES);
        assert_eq!(publisher.topic.uncommitted.load(Ordering::Relaxed), 0);
        assert_eq!(committed.bytes(), 1000);
        committed.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn an_open_stream_is_not_forgotten_however_long_it_publishes_nothing() {
        let publisher = publisher().await;
        publisher.try_publish(batch(1)).unwrap().await.unwrap();
        for attach in 1..10 {
            tokio::time::advance(limits::SESSION_TOUCH).await;
            publisher.touch();
            publisher.broker.open_publisher(open(2, attach)).await.unwrap();
        }
        publisher.try_publish(batch(2)).unwrap().await.unwrap();
    }
}
