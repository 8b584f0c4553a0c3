//! Moving a subscription, and going back to how it was.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use pubsub_client::{
    Client, CreateSubscription, Reason, Start, SubscriptionKind, TopicConfig, WhenFull,
};
use pubsub_tests::{lab::scenario, wait};

use crate::app::{self, SOON};

const WITHIN: Duration = Duration::from_secs(120);
const TOPIC: &str = "orders";

async fn backlog(client: &Client, name: &str) -> Result<u64> {
    let info = client.admin().subscription(name).await?;
    Ok(info.positions.iter().map(|position| position.backlog).sum())
}

#[test]
fn a_snapshot_brings_back_what_was_unacked_and_nothing_else() {
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        let client = app::client(&rig.url())?;
        let admin = client.admin();
        admin.create_topic(TOPIC, TopicConfig::new()).await?;
        for kind in [SubscriptionKind::Exclusive, SubscriptionKind::Shared] {
            let name = format!("{kind:?}");
            let opening = client.subscriber(&name).topic(TOPIC).kind(kind);
            let mut subscriber = opening.consumer_id("c").open().await?;
            let publisher = app::publisher(&client, TOPIC).await?;
            let first = app::publish_numbers(&publisher, 0..6).await?[0].sequence;
            let mut shown = app::next_many(&mut subscriber, 6).await?;
            // 1, 3 and 4 are acked, with holes between them.
            let held = [5, 4, 1].map(|index| shown.remove(index));
            app::confirm(shown).await?;
            let made = admin.create_snapshot("then", &*name).await?;
            ensure!((made.backlog, &*made.subscription) == (3, &*name), "{made:?}");
            app::confirm(held.into()).await?;
            app::publish_numbers(&publisher, 6..8).await?;
            app::confirm(app::next_many(&mut subscriber, 2).await?).await?;
            ensure!(backlog(&client, &name).await? == 0);
            rig.crash().await?;
            let listed = admin.snapshots(None).await?.items;
            ensure!(listed.len() == 1 && listed[0].backlog == 5, "{listed:?}");
            // The consumer is connected and follows; its first process goes on to live.
            admin.seek_to_snapshot(&*name, "then").await?;
            let again = app::next_many(&mut subscriber, 5).await?;
            let expected =
                [1, 4, 5, 6, 7].map(|offset| first.max(7) * u64::from(first > 1) + offset);
            let sequences = app::sequences(&again);
            ensure!(sequences.len() == 5 && sequences.is_sorted(), "{sequences:?} {expected:?}");
            let base = sequences[0] - 1;
            let offsets: Vec<u64> = sequences.iter().map(|sequence| sequence - base).collect();
            ensure!(offsets == [1, 4, 5, 6, 7], "{offsets:?}");
            app::confirm(again).await?;
            ensure!(backlog(&client, &name).await? == 0);
            admin.delete_snapshot("then").await?;
            drop(subscriber);
        }
        let gone = admin.seek_to_snapshot("Shared", "then").await.err().context("it is there")?;
        ensure!(gone.reason() == Some(Reason::SnapshotNotFound), "{gone}");
        app::shutdown(client).await
    });
}

#[test]
fn what_a_snapshot_shows_is_kept_however_full_the_topic_is() {
    is_kept(WhenFull::Reject);
}

#[test]
fn what_a_snapshot_shows_is_kept_by_a_topic_that_drops_its_oldest() {
    is_kept(WhenFull::DropOldest);
}

fn is_kept(when_full: WhenFull) {
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        let client = app::client(&rig.url())?;
        let admin = client.admin();
        let small = TopicConfig::new().with_max_bytes(1000).with_retention(Duration::ZERO);
        admin.create_topic(TOPIC, small.with_when_full(when_full)).await?;
        let from = CreateSubscription::to([TOPIC]).with_start(Start::Earliest);
        admin.create_subscription("billing", from).await?;
        admin.create_snapshot("then", "billing").await?;
        rig.crash().await?;
        let mut subscriber = client.subscriber("billing").open().await?;
        let publisher = app::publisher(&client, TOPIC).await?;
        let payload = "x".repeat(100);
        let mut full = None;
        for _ in 0..50 {
            match tokio::time::timeout(Duration::from_secs(2), publisher.publish(payload.clone()))
                .await
            {
                Ok(receipt) => drop(receipt?),
                Err(_) => {
                    full = Some(publisher.state().get());
                    break;
                }
            }
            app::next(&mut subscriber).await?.ack_confirmed().await?;
        }
        let full = format!("{:?}", full.context("the topic never was full")?);
        ensure!(full.contains("snapshot then keeps"), "{full}");
        // Another subscription can go back to it, too.
        admin.create_subscription("audit", CreateSubscription::to([TOPIC])).await?;
        admin.seek_to_snapshot("audit", "then").await?;
        let mut audit = client.subscriber("audit").open().await?;
        let first = app::next(&mut audit).await?;
        ensure!(first.id.sequence == 1, "{first:?}");
        first.ack_confirmed().await?;
        drop(audit);
        // When it goes, so does what it has kept.
        admin.delete_subscription("audit").await?;
        admin.delete_snapshot("then").await?;
        wait::until_ok("room", SOON, async || {
            let info = admin.topic(TOPIC).await?;
            ensure!(info.first > 1, "{info:?}");
            Ok(())
        })
        .await?;
        app::next(&mut subscriber).await?.ack();
        app::shutdown(client).await
    });
}
