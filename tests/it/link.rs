//! Connections that are cut, silent or slow, while both ends live.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use pubsub_client::{ConnectionState, Message, StateWatch};
use pubsub_proto::v1::{PublisherHello, SubscribeHello};
use pubsub_tests::{
    admin, auditor,
    checker::Gate,
    lab::{Rig, scenario},
    proxy::{At, Cut, Direction, Mode},
    raw::{self, PublishStream, SubscribeStream},
    wait,
};
use tokio::task::JoinSet;
use tonic::transport::Channel;

use crate::{
    app::{self, SOON},
    load::Load,
};

const WITHIN: Duration = Duration::from_secs(120);
const TOPIC: &str = "orders";
/// With heartbeats of 1 s, silence is noticed after 2.5 s; a busy machine gets more.
const NOTICED: Duration = Duration::from_secs(8);
/// Long enough for silence to be noticed, if there were any.
const IDLE: Duration = Duration::from_secs(4);

/// No conversation of these scenarios has more frames in one direction.
const MOST_FRAMES: u64 = 80;

async fn floor_is(channel: &Channel, subscription: &str, floor: u64) -> Result<()> {
    wait::until_ok(format!("the floor {floor}"), SOON, async || {
        let found = admin::subscription(channel, subscription).await?;
        let position = found.positions.first().context("no position")?;
        ensure!(position.floor == floor, "{position:?}");
        Ok(())
    })
    .await
}

/// Runs a conversation again and again, each time cut after one frame more, until it ends before
/// the cut. Gives the number of cuts.
async fn at_each_frame(
    rig: &Rig,
    direction: Direction,
    cut: Cut,
    conversation: impl AsyncFn(String) -> Result<()>,
) -> Result<u64> {
    for frame in 0..MOST_FRAMES {
        rig.proxy.arm(direction, At::Frame(frame), cut);
        conversation(format!("{direction:?}-{cut:?}-{frame}"))
            .await
            .with_context(|| format!("cut ({cut:?}) after frame {frame} {direction:?}"))?;
        if rig.proxy.disarm() {
            return Ok(frame);
        }
    }
    Ok(MOST_FRAMES)
}

#[test]
fn a_publish_conversation_cut_at_any_frame_stores_each_message_once() {
    scenario(WITHIN, async |lab| {
        let rig = lab.rig().await?;
        let direct = raw::connect(&rig.server.url()).await?;
        let mut cuts = 0;
        for direction in [Direction::Up, Direction::Down] {
            for cut in [Cut::Reset, Cut::Finish] {
                cuts += at_each_frame(&rig, direction, cut, async |topic| {
                    admin::create_topic(&direct, &topic).await?;
                    let client = app::client(&rig.url())?;
                    let publisher = app::publisher(&client, &topic).await?;
                    let ids = app::publish_numbers(&publisher, 1..=3).await?;
                    let more = app::publish_numbers(&publisher, 4..=5).await?;
                    let sequences = ids.iter().chain(&more).map(|id| id.sequence);
                    ensure!(sequences.eq(1..=5), "{ids:?} {more:?}");
                    let audit = auditor::read(&direct, &topic).await?;
                    ensure!(audit.messages.len() == 5, "{} messages", audit.messages.len());
                    app::shutdown(client).await
                })
                .await?;
            }
        }
        eprintln!("{cuts} cuts");
        ensure!(cuts >= 20, "the run is void: only {cuts} cuts");
        Ok(())
    });
}

#[test]
fn a_subscribe_conversation_cut_at_any_frame_shows_each_message_once() {
    scenario(WITHIN, async |lab| {
        let rig = lab.rig().await?;
        let direct = raw::connect(&rig.server.url()).await?;
        let mut cuts = 0;
        for direction in [Direction::Up, Direction::Down] {
            for cut in [Cut::Reset, Cut::Finish] {
                cuts += at_each_frame(&rig, direction, cut, async |topic| {
                    admin::create_topic(&direct, &topic).await?;
                    publish_directly(&direct, &topic, 3).await?;
                    let client = app::client(&rig.url())?;
                    let mut subscriber = app::subscribe(&client, &topic, &topic).await?;
                    let mut shown = app::next_many(&mut subscriber, 2).await?;
                    ensure!(app::sequences(&shown) == [1, 2], "{shown:?}");
                    app::confirm(vec![shown.remove(0)]).await?;
                    let third = app::next(&mut subscriber).await?;
                    ensure!(third.id.sequence == 3, "{third:?}");
                    publish_directly(&direct, &topic, 1).await?;
                    let fourth = app::next(&mut subscriber).await?;
                    ensure!(fourth.id.sequence == 4, "{fourth:?}");
                    shown.extend([third, fourth]);
                    app::confirm(shown).await?;
                    floor_is(&direct, &topic, 4).await?;
                    app::shutdown(client).await
                })
                .await?;
            }
        }
        eprintln!("{cuts} cuts");
        ensure!(cuts >= 20, "the run is void: only {cuts} cuts");
        Ok(())
    });
}

async fn publish_directly(channel: &Channel, topic: &str, count: usize) -> Result<()> {
    let request = pubsub_proto::v1::PublishRequest {
        topic: topic.into(),
        messages: vec![raw::message("x"); count],
        atomic: None,
    };
    raw::publisher(channel).publish(request).await?;
    Ok(())
}

#[test]
fn connections_cut_at_random_bytes_under_load_lose_and_repeat_nothing() {
    const CUTS: usize = 60;
    scenario(WITHIN, async |lab| {
        let rig = lab.rig().await?;
        admin::create_topic(&raw::connect(&rig.url()).await?, TOPIC).await?;
        let mut load = Load::new(rig.url(), TOPIC);
        for _ in 0..2 {
            load.publisher(lab.rng.fork()).await?;
        }
        load.consumer("billing", lab.rng.fork()).await?;
        while rig.proxy.cuts() < CUTS as u64 {
            let before = rig.proxy.cuts();
            let direction = match lab.rng.below(2) {
                0 => Direction::Up,
                _ => Direction::Down,
            };
            let cut = if lab.rng.one_in(2) { Cut::Reset } else { Cut::Finish };
            // Counted from the start of a connection: some are past it, and the next is not.
            rig.proxy.arm(direction, At::Byte(lab.rng.between(1, 20_000)), cut);
            load.progress(20, 20).await?;
            if rig.proxy.disarm() {
                rig.proxy.cut_all(cut);
            }
            if rig.proxy.cuts() > before {
                load.fault("cut");
            }
        }
        load.progress(50, 50).await?;
        let gate = Gate { stored: 500, delivered: 500, faults: CUTS / 3, in_doubt: 10 };
        load.finish(&rig.server.url(), gate).await?;
        Ok(())
    });
}

#[test]
fn a_slow_and_choppy_link_changes_nothing_but_time() {
    scenario(WITHIN, async |lab| {
        let rig = lab.rig().await?;
        admin::create_topic(&raw::connect(&rig.server.url()).await?, TOPIC).await?;
        for mode in [Mode::Trickle, Mode::Delay(Duration::from_millis(30))] {
            rig.proxy.set_both(mode);
            let client = app::client(&rig.url())?;
            let ids = app::publish_numbers(&app::publisher(&client, TOPIC).await?, 1..=20).await?;
            ensure!(ids.windows(2).all(|pair| pair[0] < pair[1]), "{ids:?}");
        }
        let client = app::client(&rig.url())?;
        let mut subscriber = app::subscribe(&client, "billing", TOPIC).await?;
        let shown = app::next_many(&mut subscriber, 40).await?;
        ensure!(app::sequences(&shown).into_iter().eq(1..=40), "{shown:?}");
        app::confirm(shown).await
    });
}

#[test]
fn an_idle_link_stays_up() {
    scenario(WITHIN, async |lab| {
        let rig = lab.rig().await?;
        admin::create_topic(&raw::connect(&rig.server.url()).await?, TOPIC).await?;
        let client = app::client(&rig.url())?;
        let publisher = app::publisher(&client, TOPIC).await?;
        let subscriber = app::subscribe(&client, "billing", TOPIC).await?;
        let stays = async |watch: StateWatch| {
            app::state(watch.clone(), "connected", SOON, ConnectionState::is_connected).await?;
            match app::state(watch, "lost", IDLE, ConnectionState::is_reconnecting).await {
                Ok(state) => bail!("an idle link is lost: {state:?}"),
                Err(_) => Ok(()),
            }
        };
        let (publisher, subscriber) =
            tokio::join!(stays(publisher.state()), stays(subscriber.state()));
        publisher.and(subscriber)
    });
}

#[test]
fn a_client_that_says_nothing_is_given_up() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let channel = raw::connect(&server.url()).await?;
        admin::create_topic(&channel, TOPIC).await?;
        let heartbeat = Some(prost_types::Duration { seconds: 1, nanos: 0 });
        let hello = raw::consumer_hello("billing", "worker", &[TOPIC]);
        let hello = SubscribeHello { heartbeat_interval: heartbeat, ..hello };
        let (mut consumer, _) = SubscribeStream::welcomed(&channel, hello).await?;
        let hello = raw::publisher_hello(TOPIC, [7; 16]);
        let hello = PublisherHello { heartbeat_interval: heartbeat, ..hello };
        let (mut publisher, _) = PublishStream::welcomed(&channel, hello).await?;
        // Nothing is sent from here on.
        wait::soon("the end of the consumer", NOTICED, consumer.end()).await??;
        wait::soon("the end of the publisher", NOTICED, publisher.end()).await??;
        let consumers = admin::subscription(&channel, "billing").await?.active_consumers;
        ensure!(!consumers.iter().any(|one| one.connected), "a silent consumer counts");
        Ok(())
    });
}

#[test]
fn a_half_open_link_is_noticed_and_survived() {
    scenario(WITHIN, async |lab| {
        let rig = lab.rig().await?;
        let silent = async || {
            rig.proxy.set_both(Mode::Blackhole);
            Ok(())
        };
        let heard = async || {
            rig.proxy.set_both(Mode::Pass);
            Ok(())
        };
        survives_silence(&rig, silent, heard).await
    });
}

#[test]
fn a_link_that_is_silent_in_one_direction_is_noticed_and_survived() {
    scenario(WITHIN, async |lab| {
        let rig = lab.rig().await?;
        let silent = async || {
            rig.proxy.set(Direction::Down, Mode::Discard);
            Ok(())
        };
        let heard = async || {
            rig.proxy.set(Direction::Down, Mode::Pass);
            Ok(())
        };
        survives_silence(&rig, silent, heard).await
    });
}

#[test]
fn a_frozen_server_is_noticed_and_survived() {
    scenario(WITHIN, async |lab| {
        let rig = lab.rig().await?;
        survives_silence(&rig, async || rig.server.freeze(), async || rig.server.thaw()).await
    });
}

/// An application sees that the server is silent, goes on working, and catches up.
async fn survives_silence(
    rig: &Rig,
    silent: impl AsyncFn() -> Result<()>,
    heard: impl AsyncFn() -> Result<()>,
) -> Result<()> {
    admin::create_topic(&raw::connect(&rig.server.url()).await?, TOPIC).await?;
    let client = app::client(&rig.url())?;
    let publisher = app::publisher(&client, TOPIC).await?;
    let mut subscriber = app::subscribe(&client, "billing", TOPIC).await?;
    app::publish_numbers(&publisher, 1..=3).await?;
    let shown = app::next_many(&mut subscriber, 3).await?;

    silent().await?;
    let ticket = publisher.enqueue(Message::new("4")).await?;
    for delivery in shown {
        delivery.ack();
    }
    let reconnecting = ConnectionState::is_reconnecting;
    app::state(client.state(), "reconnecting", NOTICED, reconnecting).await?;
    app::state(publisher.state(), "reconnecting", NOTICED, reconnecting).await?;
    app::state(subscriber.state(), "reconnecting", NOTICED, reconnecting).await?;

    heard().await?;
    let receipt = wait::soon("the receipt", SOON, ticket).await??;
    ensure!(receipt.id.sequence == 4, "{receipt:?}");
    let fourth = app::next(&mut subscriber).await?;
    ensure!(fourth.id.sequence == 4, "{fourth:?}");
    app::confirm(vec![fourth]).await?;
    let connected = ConnectionState::is_connected;
    app::state(client.state(), "connected", SOON, connected).await?;
    floor_is(&raw::connect(&rig.server.url()).await?, "billing", 4).await
}

#[test]
fn acks_whose_confirmation_is_cut_off_are_not_redelivered() {
    acks_in_flight(Direction::Down, Mode::Discard);
}

#[test]
fn acks_that_are_cut_off_before_they_arrive_are_not_redelivered() {
    acks_in_flight(Direction::Up, Mode::Discard);
}

/// Acks are on their way when the connection breaks.
fn acks_in_flight(direction: Direction, mode: Mode) {
    scenario(WITHIN, async |lab| {
        let rig = lab.rig().await?;
        let direct = raw::connect(&rig.server.url()).await?;
        admin::create_topic(&direct, TOPIC).await?;
        publish_directly(&direct, TOPIC, 10).await?;
        let client = app::client(&rig.url())?;
        let mut subscriber = app::subscribe(&client, "billing", TOPIC).await?;
        let shown = app::next_many(&mut subscriber, 10).await?;

        rig.proxy.set(direction, mode);
        let before = rig.proxy.bytes(Direction::Up);
        let mut acks = JoinSet::new();
        for delivery in shown {
            acks.spawn(delivery.ack_confirmed());
        }
        wait::until("the acks on their way", SOON, || rig.proxy.bytes(Direction::Up) > before)
            .await?;
        if direction == Direction::Down {
            floor_is(&direct, "billing", 10).await?;
        }
        ensure!(rig.proxy.cut_all(Cut::Reset) > 0, "nothing was cut");
        rig.proxy.set(direction, Mode::Pass);
        for ack in wait::soon("the confirmations", SOON, acks.join_all()).await? {
            ack?;
        }
        floor_is(&direct, "billing", 10).await?;
        publish_directly(&direct, TOPIC, 1).await?;
        let next = app::next(&mut subscriber).await?;
        ensure!(next.id.sequence == 11, "{} is shown again", next.id);
        next.ack();
        Ok(())
    });
}

#[test]
fn acks_queued_while_offline_arrive_after_a_restart() {
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        let direct = raw::connect(&rig.server.url()).await?;
        admin::create_topic(&direct, TOPIC).await?;
        publish_directly(&direct, TOPIC, 10).await?;
        let client = app::client(&rig.url())?;
        let mut subscriber = app::subscribe(&client, "billing", TOPIC).await?;
        let mut shown = app::next_many(&mut subscriber, 10).await?;
        let after = shown.split_off(7);

        rig.server.kill().await?;
        let reconnecting = ConnectionState::is_reconnecting;
        app::state(subscriber.state(), "reconnecting", SOON, reconnecting).await?;
        for delivery in shown {
            delivery.ack();
        }
        rig.revive().await?;
        let direct = raw::connect(&rig.server.url()).await?;
        floor_is(&direct, "billing", 7).await?;
        // What was handed out before the restart can be acked after it.
        app::confirm(after).await?;
        floor_is(&direct, "billing", 10).await?;
        publish_directly(&direct, TOPIC, 1).await?;
        let next = app::next(&mut subscriber).await?;
        ensure!(next.id.sequence == 11, "{} is shown again", next.id);
        next.ack();
        Ok(())
    });
}

#[test]
fn the_window_of_a_publisher_is_replayed_in_order() {
    const WINDOW: u64 = 1000;
    scenario(WITHIN, async |lab| {
        let rig = lab.rig().await?;
        let direct = raw::connect(&rig.server.url()).await?;
        admin::create_topic(&direct, TOPIC).await?;
        let client = app::client(&rig.url())?;
        let publisher = app::publisher(&client, TOPIC).await?;
        app::publish_numbers(&publisher, [1]).await?;
        rig.proxy.set(Direction::Down, Mode::Discard);
        let mut tickets = Vec::new();
        for number in 2..=WINDOW {
            tickets.push(publisher.enqueue(Message::new(number.to_string())).await?);
            if lab.rng.one_in(100) {
                // Some arrive, some do not, and of none the answer.
                rig.proxy.cut_all(Cut::Reset);
            }
        }
        rig.proxy.cut_all(Cut::Reset);
        rig.proxy.set(Direction::Down, Mode::Pass);
        for (number, ticket) in (2..).zip(tickets) {
            let receipt = wait::soon("a receipt", SOON, ticket).await??;
            ensure!(receipt.id.sequence == number, "{number} is {}", receipt.id);
        }
        let audit = auditor::read(&direct, TOPIC).await?;
        ensure!(audit.messages.len() as u64 == WINDOW, "{} messages", audit.messages.len());
        for stored in audit.messages {
            let payload = stored.message.unwrap_or_default().payload;
            ensure!(payload == stored.sequence.to_string(), "{payload:?} at {}", stored.sequence);
        }
        Ok(())
    });
}
