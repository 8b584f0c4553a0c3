//! Messages that are published to be shown later.

use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, ensure};
use pubsub_client::{Client, Message, MessageId, Start, Subscriber, SubscriptionKind, TopicConfig};
use pubsub_tests::lab::scenario;
use tokio::time::Instant;

use crate::app;

const WITHIN: Duration = Duration::from_secs(120);
const TOPIC: &str = "reminders";

#[expect(clippy::disallowed_methods, reason = "what it is compared with is the server's own clock")]
fn after(delay: Duration) -> SystemTime {
    SystemTime::now() + delay
}

async fn open(client: &Client, name: &str, kind: SubscriptionKind) -> Result<Subscriber> {
    let opening = client.subscriber(name).topic(TOPIC).kind(kind).start(Start::Earliest);
    Ok(opening.consumer_id("c").max_outstanding_messages(10).open().await?)
}

async fn publish(client: &Client, text: &str, delay: Duration) -> Result<MessageId> {
    let publisher = app::publisher(client, TOPIC).await?;
    let message = Message::new(text.to_owned()).with_ordering_key("k");
    let message = if delay.is_zero() { message } else { message.with_not_before(after(delay)) };
    Ok(publisher.publish(message).await?.id)
}

#[test]
fn a_delayed_message_comes_when_it_is_due_and_holds_up_nothing_before() {
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        let client = app::client(&rig.url())?;
        client.admin().create_topic(TOPIC, TopicConfig::new()).await?;
        let kinds =
            [SubscriptionKind::Exclusive, SubscriptionKind::Shared, SubscriptionKind::KeyOrdered];
        let mut subscribers = Vec::new();
        for kind in kinds {
            subscribers.push(open(&client, &format!("{kind:?}"), kind).await?);
        }
        let begun = Instant::now();
        publish(&client, "late", Duration::from_secs(9)).await?;
        publish(&client, "later", Duration::from_secs(10)).await?;
        // Far more than may be outstanding.
        let publisher = app::publisher(&client, TOPIC).await?;
        for _ in 0..30 {
            publisher.publish(Message::new("now").with_ordering_key("k")).await?;
        }
        for subscriber in &mut subscribers {
            for sequence in 3..=32 {
                let delivery = app::next(subscriber).await?;
                ensure!(delivery.id.sequence == sequence, "{delivery:?}");
                delivery.ack_confirmed().await?;
            }
            ensure!(subscriber.position().topics[0].last_delivered == 32);
        }
        ensure!(begun.elapsed() < Duration::from_secs(9), "too slow to show anything");
        // It waits on the disk.
        rig.crash().await?;
        for subscriber in &mut subscribers {
            for (sequence, seconds) in [(1, 9), (2, 10)] {
                let delivery = app::next(subscriber).await?;
                ensure!(delivery.id.sequence == sequence, "{delivery:?}");
                let early = begun.elapsed() < Duration::from_secs(seconds);
                ensure!(!early && delivery.attempt == 1, "{:?}: {delivery:?}", begun.elapsed());
                ensure!(delivery.not_before.is_some(), "{delivery:?}");
                delivery.ack_confirmed().await?;
            }
        }
        for kind in kinds {
            let info = client.admin().subscription(format!("{kind:?}")).await?;
            let position = info.positions.first().context("no position")?;
            ensure!((position.floor, position.backlog) == (32, 0), "{position:?}");
        }
        app::shutdown(client).await
    });
}

#[test]
fn a_reader_sees_a_delayed_message_where_it_is_stored() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let client = app::client(&server.url())?;
        client.admin().create_topic(TOPIC, TopicConfig::new()).await?;
        publish(&client, "late", Duration::from_secs(3600)).await?;
        publish(&client, "now", Duration::ZERO).await?;
        let mut reader = client.reader([TOPIC]).start(Start::Earliest).open().await?;
        for sequence in 1..=2 {
            ensure!(app::next(&mut reader).await?.id.sequence == sequence);
        }
        let mut subscriber = open(&client, "s", SubscriptionKind::Exclusive).await?;
        let now = app::next(&mut subscriber).await?;
        ensure!(now.id.sequence == 2, "{now:?}");
        now.ack_confirmed().await?;
        let info = client.admin().subscription("s").await?;
        let waits = info.positions.first().and_then(|position| position.waits_for.clone());
        ensure!(waits.is_some_and(|waits| waits.contains("1 messages are not due")), "{info:?}");
        let far = publish(&client, "a mistake", Duration::from_secs(400 * 24 * 3600)).await.err();
        let far = far.context("it is stored")?;
        ensure!(far.to_string().contains("366 days"), "{far}");
        app::shutdown(client).await
    });
}
