//! Servers that die, stop, and come back, under load.

use std::time::Duration;

use anyhow::ensure;
use pubsub_client::Message;
use pubsub_proto::v1::{CreateTopicRequest, DeleteSubscriptionRequest, PublishRequest};
use pubsub_tests::{
    admin, auditor,
    checker::Gate,
    lab::scenario,
    process::Server,
    proxy::{Direction, Mode},
    raw, wait,
};
use tokio::time::Instant;

use crate::{
    app::{self, SOON},
    load::Load,
};

const WITHIN: Duration = Duration::from_secs(120);
const TOPIC: &str = "orders";

#[test]
fn a_server_killed_under_load_loses_nothing_and_repeats_nothing() {
    const KILLS: usize = 10;
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        admin::create_topic(&raw::connect(&rig.url()).await?, TOPIC).await?;
        let mut load = Load::new(rig.url(), TOPIC);
        for _ in 0..3 {
            load.publisher(lab.rng.fork()).await?;
        }
        for subscription in ["billing", "shipping"] {
            load.consumer(subscription, lab.rng.fork()).await?;
        }
        for _ in 0..KILLS {
            let (stored, delivered) = (lab.rng.between(1, 300), lab.rng.between(1, 300));
            load.progress(usize::try_from(stored)?, usize::try_from(delivered)?).await?;
            load.fault("kill");
            rig.crash().await?;
        }
        load.progress(50, 50).await?;
        let gate = Gate { stored: 100, delivered: 200, faults: KILLS, in_doubt: KILLS };
        load.finish(&rig.server.url(), gate).await?;
        Ok(())
    });
}

#[test]
fn retry_after_lost_ack_returns_the_same_id() {
    const ROUNDS: u64 = 5;
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        let direct = raw::connect(&rig.server.url()).await?;
        admin::create_topic(&direct, TOPIC).await?;
        let client = app::client(&rig.url())?;
        let publisher = app::publisher(&client, TOPIC).await?;
        publisher.publish(Message::new("first")).await?;
        for round in 1..=ROUNDS {
            // The server commits, and its answer never arrives.
            rig.proxy.set(Direction::Down, Mode::Discard);
            let ticket = publisher.enqueue(Message::new(round.to_string())).await?;
            let direct = raw::connect(&rig.server.url()).await?;
            wait::until_ok("the commit", SOON, async || {
                let head = admin::topic(&direct, TOPIC).await?.head;
                ensure!(head == round + 1, "the head is {head}");
                Ok(())
            })
            .await?;
            rig.server.kill().await?;
            rig.proxy.set(Direction::Down, Mode::Pass);
            rig.revive().await?;
            let receipt = wait::soon("the receipt", SOON, ticket).await??;
            ensure!(receipt.id.sequence == round + 1, "{receipt:?}");
            ensure!(receipt.duplicate, "{receipt:?}");
        }
        let audit = auditor::read(&raw::connect(&rig.server.url()).await?, TOPIC).await?;
        ensure!(audit.messages.len() as u64 == ROUNDS + 1, "it is stored twice");
        Ok(())
    });
}

#[test]
fn a_server_killed_in_mid_delivery_shows_nothing_twice_and_skips_nothing() {
    const MESSAGES: u64 = 2000;
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        admin::create_topic(&raw::connect(&rig.url()).await?, TOPIC).await?;
        let client = app::client(&rig.url())?;
        app::publish_numbers(&app::publisher(&client, TOPIC).await?, 1..=MESSAGES).await?;
        let mut subscriber = app::subscribe(&client, "billing", TOPIC).await?;
        let mut held = Vec::new();
        let mut expected = 1;
        for _ in 0..6 {
            for _ in 0..lab.rng.between(1, 150) {
                let delivery = app::next(&mut subscriber).await?;
                ensure!(delivery.id.sequence == expected, "{} for {expected}", delivery.id);
                expected += 1;
                if lab.rng.one_in(2) {
                    delivery.ack();
                } else {
                    held.push(delivery);
                }
            }
            rig.crash().await?;
        }
        for delivery in held {
            delivery.ack();
        }
        while expected <= MESSAGES {
            let delivery = app::next(&mut subscriber).await?;
            ensure!(delivery.id.sequence == expected, "{} for {expected}", delivery.id);
            expected += 1;
            delivery.ack();
        }
        app::all_acked(&raw::connect(&rig.server.url()).await?, "billing").await
    });
}

#[test]
fn a_server_killed_again_and_again_while_it_starts_recovers() {
    const ROUNDS: u64 = 3;
    const KILLS: usize = 15;
    const MESSAGES: u64 = 200;
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        admin::create_topic(&raw::connect(&rig.url()).await?, TOPIC).await?;
        let client = app::client(&rig.url())?;
        let publisher = app::publisher(&client, TOPIC).await?;
        let mut subscriber = app::subscribe(&client, "billing", TOPIC).await?;
        for round in 0..ROUNDS {
            let first = round * MESSAGES + 1;
            app::publish_numbers(&publisher, first..first + MESSAGES).await?;
            let shown = app::next_many(&mut subscriber, usize::try_from(MESSAGES)?).await?;
            ensure!(app::sequences(&shown).into_iter().eq(first..first + MESSAGES), "{shown:?}");
            app::confirm(shown).await?;
            rig.server.kill().await?;
            for _ in 0..KILLS {
                let after = Duration::from_micros(lab.rng.below(60_000));
                Server::start_and_kill(rig.server.data(), after, lab.log()).await?;
            }
            rig.revive().await?;
        }
        let channel = raw::connect(&rig.server.url()).await?;
        let audit = auditor::read(&channel, TOPIC).await?;
        ensure!(audit.messages.len() as u64 == ROUNDS * MESSAGES, "messages are lost");
        app::all_acked(&channel, "billing").await
    });
}

#[test]
fn a_call_that_is_cut_off_has_happened_once_or_not_at_all() {
    const CUTS: u64 = 40;
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        for number in 1..=CUTS {
            let (name, patience) = (format!("topic-{number}"), lab.rng.below(2_000));
            let channel = raw::connect(&rig.server.url()).await?;
            let create = admin::create_topic(&channel, &name);
            // The stream is reset, at about the time of the commit.
            let _cut = tokio::time::timeout(Duration::from_micros(patience), create).await;
            let again = CreateTopicRequest { name, if_not_exists: true, config: None };
            raw::admin(&channel).create_topic(again).await?;
            let delete = DeleteSubscriptionRequest { name: format!("gone-{number}") };
            admin::create_subscription(&channel, &delete.name, &["topic-*"]).await?;
            let mut cut = raw::admin(&channel);
            let deleting = cut.delete_subscription(delete.clone());
            let _cut = tokio::time::timeout(Duration::from_micros(patience), deleting).await;
            let deleted = raw::admin(&channel).delete_subscription(delete).await;
            let reason = deleted.err().and_then(|status| raw::reason(&status));
            let gone = reason.as_deref().is_none_or(|reason| reason == "SUBSCRIPTION_NOT_FOUND");
            ensure!(gone, "{reason:?}");
        }
        let channel = raw::connect(&rig.server.url()).await?;
        let mut expected = Vec::new();
        for number in 1..=CUTS {
            let topic = format!("topic-{number}");
            let messages = vec![raw::message("kept")];
            let request = PublishRequest { topic: topic.clone(), messages, atomic: None };
            raw::publisher(&channel).publish(request).await?;
            expected.push(admin::topic(&channel, &topic).await?);
        }
        rig.crash().await?;
        let channel = raw::connect(&rig.server.url()).await?;
        for before in expected {
            let topic = admin::topic(&channel, &before.name).await?;
            ensure!(topic == before && topic.subscriptions.is_empty(), "{topic:?}, {before:?}");
        }
        ensure!(!lab.log().contains("stored twice"), "two of one name");
        Ok(())
    });
}

#[test]
fn a_drain_under_load_ends_within_seconds_and_nobody_notices() {
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        admin::create_topic(&raw::connect(&rig.url()).await?, TOPIC).await?;
        let mut load = Load::new(rig.url(), TOPIC);
        for _ in 0..2 {
            load.publisher(lab.rng.fork()).await?;
        }
        load.consumer("billing", lab.rng.fork()).await?;
        let mut quickest = Duration::MAX;
        for _ in 0..4 {
            load.progress(100, 100).await?;
            load.fault("stop");
            let asked = Instant::now();
            rig.server.begin_stop()?;
            let status = rig.server.exited(Duration::from_secs(8)).await?;
            ensure!(status.success(), "{status}");
            // The promise is 5 s; a busy machine gets one more.
            let took = asked.elapsed();
            ensure!(took < Duration::from_secs(6), "it took {took:?}");
            quickest = quickest.min(took);
            rig.revive().await?;
        }
        // Clients that are told leave by themselves. They follow the advice once a minute; for
        // those that do not, the server waits for 3 s.
        ensure!(quickest < Duration::from_secs(3), "nobody was told: {quickest:?} at least");
        load.progress(50, 50).await?;
        let gate = Gate { stored: 400, delivered: 400, faults: 4, in_doubt: 1 };
        load.finish(&rig.server.url(), gate).await?;
        Ok(())
    });
}

#[test]
fn a_server_that_returns_on_the_same_port_is_found_again() {
    scenario(WITHIN, async |lab| {
        let mut server = lab.server().await?;
        admin::create_topic(&raw::connect(&server.url()).await?, TOPIC).await?;
        let client = app::client(&server.url())?;
        let publisher = app::publisher(&client, TOPIC).await?;
        let mut subscriber = app::subscribe(&client, "billing", TOPIC).await?;
        for round in 1..=3 {
            app::publish_numbers(&publisher, [round]).await?;
            let delivery = app::next(&mut subscriber).await?;
            ensure!(delivery.id.sequence == round, "{}", delivery.id);
            app::confirm(vec![delivery]).await?;
            server.kill().await?;
            server.start_again().await?;
        }
        Ok(())
    });
}
