//! Several topics in one subscription: they come and go while it is in use, and none starves.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use pubsub_client::{
    Admin, CreateSubscription, Reason, Start, SubscriptionKind, TopicConfig, UpdateSubscription,
};
use pubsub_tests::{lab::scenario, wait};

use crate::app::{self, SOON};

const WITHIN: Duration = Duration::from_secs(120);

async fn create(admin: &Admin, topics: &[&str]) -> Result<()> {
    for topic in topics {
        admin.create_topic(*topic, TopicConfig::new()).await?;
    }
    Ok(())
}

#[test]
fn topics_join_and_leave_a_live_subscription() {
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        let client = app::client(&rig.url())?;
        let admin = client.admin();
        create(&admin, &["a", "b", "c.1"]).await?;
        let mut publishers = Vec::new();
        for topic in ["a", "b", "c.1"] {
            publishers.push(app::publisher(&client, topic).await?);
        }
        for publisher in &publishers {
            publisher.publish("before").await?;
        }
        let opening = client.subscriber("s").topic("a").start(Start::Earliest);
        let mut subscriber = opening.open().await?;
        app::next(&mut subscriber).await?.ack();

        let add = UpdateSubscription::new().add_topic("b").add_topic("c.*");
        admin.update_subscription("s", add.with_start(Start::Earliest)).await?;
        let mut seen = Vec::new();
        for _ in 0..2 {
            let delivery = app::next(&mut subscriber).await?;
            seen.push((delivery.id.topic.to_string(), delivery.id.sequence));
            delivery.ack_confirmed().await?;
        }
        seen.sort();
        ensure!(seen == [("b".to_owned(), 1), ("c.1".to_owned(), 1)], "{seen:?}");

        // It knows the subscription by now, whatever topics it was opened with.
        rig.crash().await?;
        create(&admin, &["c.2"]).await?;
        app::publisher(&client, "c.2").await?.publish("joined by its pattern").await?;
        let joined = app::next(&mut subscriber).await?;
        ensure!(&*joined.id.topic == "c.2", "{joined:?}");
        joined.ack_confirmed().await?;

        let remove = UpdateSubscription::new().remove_topic("b").remove_topic("c.*");
        let info = admin.update_subscription("s", remove).await?;
        ensure!(info.topics == ["a"] && info.positions.len() == 1, "{info:?}");
        for publisher in &publishers {
            publisher.publish("after").await?;
        }
        let only = app::next(&mut subscriber).await?;
        ensure!((&*only.id.topic, only.id.sequence) == ("a", 2), "{only:?}");
        only.ack_confirmed().await?;
        let silent = tokio::time::timeout(Duration::from_secs(1), subscriber.next()).await;
        ensure!(silent.is_err(), "{silent:?}");
        ensure!(admin.topic("b").await?.subscriptions.is_empty());

        // What was forgotten starts anew.
        rig.crash().await?;
        let again = UpdateSubscription::new().add_topic("b").with_start(Start::Earliest);
        admin.update_subscription("s", again).await?;
        for sequence in 1..=2 {
            let delivery = app::next(&mut subscriber).await?;
            ensure!((&*delivery.id.topic, delivery.id.sequence) == ("b", sequence), "{delivery:?}");
            delivery.ack();
        }
        let refused = async |change| {
            let refused = admin.update_subscription("s", change).await.err();
            refused.and_then(|error| error.reason()).context("it is changed")
        };
        let new = UpdateSubscription::new;
        ensure!(refused(new().remove_topic("c.*")).await? == Reason::InvalidArgument);
        let all = new().remove_topic("a").remove_topic("b");
        ensure!(refused(all).await? == Reason::InvalidArgument);
        ensure!(refused(new().add_topic("nowhere")).await? == Reason::TopicNotFound);
        app::shutdown(client).await
    });
}

#[test]
fn a_trickle_is_not_held_up_by_a_long_backlog() {
    const BACKLOG: u64 = 20_000;
    const OUTSTANDING: u32 = 100;
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let client = app::client(&server.url())?;
        let admin = client.admin();
        create(&admin, &["flood", "trickle"]).await?;
        for kind in [SubscriptionKind::Exclusive, SubscriptionKind::Shared] {
            let settings = CreateSubscription::to(["flood", "trickle"]);
            let settings = settings.with_kind(kind).with_start(Start::Earliest);
            admin.create_subscription(format!("{kind:?}"), settings).await?;
        }
        app::publish_numbers(&app::publisher(&client, "flood").await?, 0..BACKLOG).await?;
        let trickle = app::publisher(&client, "trickle").await?;
        for kind in [SubscriptionKind::Exclusive, SubscriptionKind::Shared] {
            let opening = client.subscriber(format!("{kind:?}"));
            let mut subscriber = opening.max_outstanding_messages(OUTSTANDING).open().await?;
            let mut worst = 0;
            for _ in 0..20 {
                for _ in 0..50 {
                    app::next(&mut subscriber).await?.ack();
                }
                let id = trickle.publish("a drop").await?.id;
                // What is on its way already comes before it, and little more.
                let mut before = 0;
                loop {
                    let delivery = app::next(&mut subscriber).await?;
                    let found = delivery.id == id;
                    delivery.ack();
                    if found {
                        break;
                    }
                    before += 1;
                }
                worst = worst.max(before);
            }
            ensure!(worst <= 20 * OUTSTANDING, "{worst} messages came before a drop in {kind:?}");
            wait::until_ok("the acks", SOON, async || {
                ensure!(!subscriber.position().topics.is_empty());
                Ok(())
            })
            .await?;
        }
        app::shutdown(client).await
    });
}
