//! What is kept, for how long, and who is told when it goes.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use pubsub_client::{
    Client, CreateSubscription, Event as Item, Gap, GapReason, Message, Reason, ReceiptState,
    Start, Subscriber, TopicConfig, WhenFull,
};
use pubsub_proto::v1::PullRequest;
use pubsub_tests::{lab::scenario, raw, wait};
use tokio::time::Instant;

use crate::app::{self, SOON};

const WITHIN: Duration = Duration::from_secs(120);
const TOPIC: &str = "orders";
const SUBSCRIPTION: &str = "billing";

async fn prepare(client: &Client, config: TopicConfig) -> Result<()> {
    client.admin().create_topic(TOPIC, config).await?;
    let from = CreateSubscription::to([TOPIC]).with_start(Start::Earliest);
    client.admin().create_subscription(SUBSCRIPTION, from).await?;
    Ok(())
}

async fn open(client: &Client) -> Result<Subscriber> {
    Ok(wait::soon("the subscription", SOON, client.subscriber(SUBSCRIPTION).open()).await??)
}

/// The next event, which has to be a gap.
async fn gap(subscriber: &mut Subscriber) -> Result<Gap> {
    let item = wait::soon("a gap", SOON, subscriber.next()).await?;
    match item.context("the stream has ended")?? {
        Item::Gap(gap) => Ok(gap),
        other => bail!("a gap was expected, not {other:?}"),
    }
}

#[test]
fn what_is_purged_is_told_with_the_reason_also_after_a_restart() {
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        let client = app::client(&rig.url())?;
        prepare(&client, TopicConfig::new()).await?;
        let admin = client.admin();
        app::publish_numbers(&app::publisher(&client, TOPIC).await?, 0..9).await?;
        let beyond = admin.purge_topic(TOPIC, Some(11)).await.err().context("it is purged")?;
        ensure!(beyond.reason() == Some(Reason::BeyondHead), "{beyond}");
        ensure!(admin.purge_topic(TOPIC, Some(4)).await? == 3);
        ensure!(admin.purge_topic(TOPIC, Some(2)).await? == 0, "it is purged already");
        rig.crash().await?;
        let mut subscriber = open(&client).await?;
        let told = gap(&mut subscriber).await?;
        ensure!((told.range.clone(), told.reason) == (1..=3, GapReason::Purged), "{told:?}");
        let next = app::next(&mut subscriber).await?;
        ensure!(next.id.sequence == 4, "{next:?}");
        next.ack_confirmed().await?;
        let receipts = admin.receipts(TOPIC, None, 2, None).await?;
        let state = receipts.first().map(|receipt| receipt.state.clone());
        ensure!(state == Some(ReceiptState::Released { by: "gap".to_owned() }), "{receipts:?}");
        // All of it: who is connected learns of what it has not been sent.
        drop(subscriber);
        ensure!(admin.purge_topic(TOPIC, None).await? == 6);
        let mut subscriber = open(&client).await?;
        let told = gap(&mut subscriber).await?;
        ensure!((*told.range.end(), told.reason) == (9, GapReason::Purged), "{told:?}");
        app::publish_numbers(&app::publisher(&client, TOPIC).await?, 9..10).await?;
        let next = app::next(&mut subscriber).await?;
        ensure!(next.id.sequence == 10, "{next:?}");
        next.ack();
        app::shutdown(client).await
    });
}

#[test]
fn a_topic_that_drops_its_oldest_never_blocks_and_tells_who_was_owed_them() {
    const LIMIT: u64 = 256 * 1024;
    const MESSAGES: u64 = 4000;
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let client = app::client(&server.url())?;
        let config = TopicConfig::new().with_max_bytes(LIMIT).with_when_full(WhenFull::DropOldest);
        prepare(&client, config).await?;
        let publisher = app::publisher(&client, TOPIC).await?;
        let payload = "x".repeat(1000);
        for _ in 0..MESSAGES {
            let receipt = wait::soon("a receipt", SOON, publisher.publish(payload.clone())).await?;
            drop(receipt?);
        }
        let info = client.admin().topic(TOPIC).await?;
        ensure!(info.head == MESSAGES, "{info:?}");
        let kept = info.head + 1 - info.first;
        // A message has a little more than its payload; a part is dropped at a time.
        ensure!((200..=260).contains(&kept), "{kept} messages are kept: {info:?}");
        let mut subscriber = open(&client).await?;
        let told = gap(&mut subscriber).await?;
        ensure!(told.reason == GapReason::Retention, "{told:?}");
        ensure!(told.range == (1..=info.first - 1), "{told:?} {info:?}");
        for sequence in info.first..=info.head {
            let delivery = app::next(&mut subscriber).await?;
            ensure!(delivery.id.sequence == sequence, "{delivery:?}");
            delivery.ack();
        }
        app::shutdown(client).await
    });
}

#[test]
fn unacked_messages_go_at_the_age_that_the_topic_says() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let client = app::client(&server.url())?;
        let admin = client.admin();
        prepare(&client, TopicConfig::new()).await?;
        let young = TopicConfig::new().with_max_age_unacked(Duration::from_secs(3));
        let refused = admin.update_topic(TOPIC, young).await.err().context("it is set")?;
        ensure!(refused.reason() == Some(Reason::InvalidArgument), "{refused}");
        let publisher = app::publisher(&client, TOPIC).await?;
        app::publish_numbers(&publisher, 0..3).await?;
        let config = TopicConfig::new().with_max_age_unacked(Duration::from_secs(10));
        admin.update_topic(TOPIC, config).await?;
        wait::until_ok("the old ones gone", 2 * SOON, async || {
            let info = admin.topic(TOPIC).await?;
            ensure!(info.first == 4, "{info:?}");
            Ok(())
        })
        .await?;
        app::publish_numbers(&publisher, 3..4).await?;
        let mut subscriber = open(&client).await?;
        let told = gap(&mut subscriber).await?;
        ensure!((told.range.clone(), told.reason) == (1..=3, GapReason::Retention), "{told:?}");
        let next = app::next(&mut subscriber).await?;
        ensure!(next.id.sequence == 4, "{next:?}");
        next.ack();
        app::shutdown(client).await
    });
}

#[test]
fn settings_of_a_topic_change_and_stay_changed() {
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        let client = app::client(&rig.url())?;
        let admin = client.admin();
        prepare(&client, TopicConfig::new().with_max_message_bytes(100)).await?;
        let large = Message::new("x".repeat(1000));
        let publisher = app::publisher(&client, TOPIC).await?;
        let refused = publisher.publish(large.clone()).await.err().context("it is stored")?;
        ensure!(refused.to_string().contains("100 are allowed"), "{refused}");
        let config = TopicConfig::new().with_max_message_bytes(2000);
        let changed = admin.update_topic(TOPIC, config).await?;
        ensure!(changed.config.max_message_bytes == Some(2000), "{changed:?}");
        rig.crash().await?;
        let kept = admin.topic(TOPIC).await?;
        ensure!(kept.config == changed.config, "{kept:?} {changed:?}");
        app::publisher(&client, TOPIC).await?.publish(large).await?;
        let unknown = admin.update_topic("nowhere", TopicConfig::new()).await.err();
        ensure!(unknown.context("it is set")?.reason() == Some(Reason::TopicNotFound));
        drop(publisher);
        app::shutdown(client).await
    });
}

#[test]
fn a_subscription_that_nobody_uses_goes_if_it_says_so() {
    const AFTER: Duration = Duration::from_secs(10);
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        let client = app::client(&rig.url())?;
        prepare(&client, TopicConfig::new()).await?;
        let admin = client.admin();
        for name in ["idle", "used", "pulled"] {
            let settings = CreateSubscription::to([TOPIC]).with_expiry(AFTER);
            admin.create_subscription(name, settings).await?;
        }
        let used = client.subscriber("used").open().await?;
        rig.crash().await?;
        let channel = raw::connect(&rig.url()).await?;
        let pull = PullRequest { subscription: "pulled".into(), ..PullRequest::default() };
        let began = Instant::now();
        wait::until_ok("the end of it", 2 * SOON, async || {
            raw::subscriber(&channel).pull(pull.clone()).await?;
            ensure!(began.elapsed() > AFTER + AFTER, "a pull is a use");
            let gone = admin.subscription("idle").await.err().context("it is there")?;
            ensure!(gone.reason() == Some(Reason::SubscriptionNotFound), "{gone}");
            Ok(())
        })
        .await?;
        admin.subscription("pulled").await?;
        let kept = admin.subscription("used").await?;
        ensure!(kept.expires_after == Some(AFTER), "{kept:?}");
        admin.subscription(SUBSCRIPTION).await?;
        let topic = admin.topic(TOPIC).await?;
        ensure!(topic.subscriptions == [SUBSCRIPTION, "pulled", "used"], "{topic:?}");
        drop(used);
        app::shutdown(client).await
    });
}
