//! Whoever waits for a position to be durable waits for nothing else.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::delivery::Nack;
use super::publisher::Batch;
use super::session::{AckBatch, Attach, Command, Credit, Event, TopicAcks};
use super::{Broker, Consume, NewSubscription, Start, Stream};
use crate::env::System;
use crate::names::{ConsumerId, SubscriptionName, TopicName, TopicPattern};
use crate::record::{ConsumerRecord, Epoch, NewMessage, Sequences, TopicConfig, Uuid};
use crate::storage::Item;
use crate::storage::memory::Memory;
use crate::storage::testing::Lonely;

/// Far more than anything waits for company.
const LONG: Duration = Duration::from_secs(20);

fn topic() -> TopicName {
    TopicName::parse("t").unwrap()
}

fn subscription() -> SubscriptionName {
    SubscriptionName::parse("s").unwrap()
}

/// A consumer that was shown four messages, on an engine where no company comes.
async fn consumer() -> (Broker, Epoch, Stream) {
    let env = Arc::new(System);
    let storage = Lonely::new(Memory::new(Arc::clone(&env) as _));
    let broker = Broker::start(Arc::new(storage), env).await.unwrap();
    let (info, _) = broker.create_topic(topic(), TopicConfig::default(), false).await.unwrap();
    let new = NewSubscription {
        filter: None,
        name: subscription(),
        topics: vec![TopicPattern::parse("t").unwrap()],
        kind: None,
        on_failure: None,
        ack_timeout: None,
        expires_after: None,
        start: Start::Earliest,
    };
    broker.create_subscription(new, false).await.unwrap();
    let body = Bytes::from_static(b"\x0a\x01x");
    let message = NewMessage { body, recipients: Vec::new(), key: None };
    let items = vec![Item::Store(message); 4];
    let batch = Batch { first_sequence: 1, resolved_below: 0, items, atomic: None };
    broker.publish(&topic(), batch).await.unwrap();
    let consume = Consume {
        subscription: Some(subscription()),
        topics: Vec::new(),
        kind: None,
        on_failure: None,
        ack_timeout: None,
        filter: None,
        start: Start::Earliest,
        must_exist: true,
        known_boot: None,
        positions: Vec::new(),
        attach: Attach {
            consumer: ConsumerRecord {
                id: ConsumerId::parse("c").unwrap(),
                instance: Uuid([1; 16]),
                attach: 1,
            },
            known_epoch: None,
            claims: [].into(),
            credit: Credit { messages: 10, bytes: 1 << 20 },
            heartbeat: Duration::from_secs(60),
        },
    };
    let mut stream = broker.consume(consume).await.unwrap();
    while !matches!(stream.events.recv().await.unwrap(), Event::Deliver(_)) {}
    (broker, info.record.epoch, stream)
}

/// Acks the message with the number of the batch.
async fn ack(stream: &Stream, number: u64, awaited: bool) {
    let acks = TopicAcks {
        topic: 1,
        cursor_generation: 0,
        acked: Sequences::from_iter([number..=number]),
        nacked: Vec::new(),
        missed: Sequences::default(),
        started: Sequences::default(),
    };
    let batch = AckBatch { number, topics: vec![acks], awaited };
    stream.commands.send(Command::Acks(stream.id, Box::new(batch))).await.unwrap();
}

/// The number that is confirmed next, if one is.
async fn confirmed(stream: &mut Stream) -> Option<u64> {
    let confirm = async {
        loop {
            if let Event::Confirm(number) = stream.events.recv().await.unwrap() {
                return number;
            }
        }
    };
    tokio::time::timeout(LONG, confirm).await.ok()
}

async fn soon<T>(answer: impl Future<Output = T>) -> T {
    tokio::time::timeout(LONG, answer).await.expect("it waits for company")
}

#[tokio::test(start_paused = true)]
async fn an_ack_that_is_awaited_does_not_wait_for_company() {
    let (_broker, _, mut stream) = consumer().await;
    ack(&stream, 1, true).await;
    assert_eq!(confirmed(&mut stream).await, Some(1));
    // One that is not awaited is under way.
    ack(&stream, 2, false).await;
    assert_eq!(confirmed(&mut stream).await, None);
    ack(&stream, 3, true).await;
    assert_eq!(confirmed(&mut stream).await, Some(2));
    assert_eq!(confirmed(&mut stream).await, Some(3));
    // It does not hurry what comes later.
    ack(&stream, 4, false).await;
    assert_eq!(confirmed(&mut stream).await, None);
}

#[tokio::test(start_paused = true)]
async fn whoever_asks_for_something_durable_does_not_wait_for_company() {
    let (broker, epoch, stream) = consumer().await;
    ack(&stream, 1, false).await;
    let acked = [((topic(), epoch), Sequences::from_iter([2..=2]))];
    soon(broker.acknowledge(&subscription(), acked.into())).await.unwrap();
    ack(&stream, 3, false).await;
    soon(broker.release(&subscription(), Vec::new(), Nack::default())).await.unwrap();
    ack(&stream, 4, false).await;
    soon(broker.receipts(&topic(), None, 4, None)).await.unwrap();
}
