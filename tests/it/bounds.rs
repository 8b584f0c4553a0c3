//! Limits and fairness: reaching a bound is a typed answer, and nobody stalls anybody else.

use std::time::Duration;

use anyhow::ensure;
use pubsub_client::{ConnectionState, Event as Item, Message, Reason, Start};
use pubsub_proto::v1::{DeleteTopicRequest, PublishRequest, TopicConfig};
use pubsub_tests::{admin, lab::scenario, raw, wait};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::app::{self, SOON};

const WITHIN: Duration = Duration::from_secs(120);

#[test]
fn a_full_topic_blocks_its_publisher_visibly_until_it_is_consumed() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let channel = raw::connect(&server.url()).await?;
        let config = TopicConfig { max_bytes: 64 * 1024, ..TopicConfig::default() };
        admin::create_topic_with(&channel, "small", config).await?;
        admin::create_topic(&channel, "other").await?;
        let client = app::client(&server.url())?;
        // Most of what it has to get stays with the server meanwhile.
        let builder = client.subscriber("slow").topic("small").start(Start::Earliest);
        let mut slow = builder.max_outstanding_messages(2).open().await?;
        let publisher = app::publisher(&client, "small").await?;

        let payload = vec![7; 4 * 1024];
        for _ in 0..16 {
            let publishing = publisher.publish(Message::new(payload.clone()));
            wait::soon("a receipt", SOON, publishing).await??;
        }
        let mut tickets = Vec::new();
        for _ in 16..24 {
            let enqueueing = publisher.enqueue(Message::new(payload.clone()));
            tickets.push(wait::soon("the window", SOON, enqueueing).await??);
        }
        let full = |state: &ConnectionState| match state {
            ConnectionState::Blocked { reason, detail } => {
                *reason == Reason::TopicFull && detail.contains("slow")
            }
            _ => false,
        };
        app::state(publisher.state(), "blocked by the slow subscription", SOON, full).await?;
        // Another topic has nothing to do with it.
        app::publish_numbers(&app::publisher(&client, "other").await?, 1..=3).await?;

        // What is consumed makes room, and nothing was lost or reordered by waiting.
        for expected in 1..=24 {
            let delivery = app::next(&mut slow).await?;
            ensure!(delivery.id.sequence == expected, "{delivery:?}");
            app::confirm(vec![delivery]).await?;
        }
        for (ticket, expected) in tickets.into_iter().zip(17..) {
            ensure!(wait::soon("a receipt", SOON, ticket).await??.id.sequence == expected);
        }
        app::state(publisher.state(), "connected", SOON, ConnectionState::is_connected).await?;
        Ok(())
    });
}

#[test]
fn topics_are_not_deleted_faster_than_their_consumers_are_told() {
    const MAX_DEPARTED: usize = 1_000;
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let channel = raw::connect(&server.url()).await?;
        admin::create_topic(&channel, "tmp.1").await?;
        admin::create_subscription(&channel, "away", &["tmp.*"]).await?;
        let mut refused = None;
        for number in 1..=MAX_DEPARTED + 1 {
            let topic = format!("tmp.{number}");
            if number > 1 {
                admin::create_topic(&channel, &topic).await?;
            }
            let messages = vec![raw::message("x")];
            let request = PublishRequest { topic: topic.clone(), messages, atomic: None };
            raw::publisher(&channel).publish(request).await?;
            let request = DeleteTopicRequest { name: topic };
            if let Err(status) = raw::admin(&channel).delete_topic(request).await {
                refused = raw::reason(&status).zip(Some(number));
                break;
            }
        }
        ensure!(refused == Some(("LIMIT_REACHED".to_owned(), MAX_DEPARTED + 1)), "{refused:?}");
        // Once they are told there is room again.
        let client = app::client(&server.url())?;
        let mut told = client.subscriber("away").open().await?;
        for _ in 0..MAX_DEPARTED {
            let item = wait::soon("a gap", SOON, told.next()).await?;
            ensure!(matches!(item, Some(Ok(Item::Gap(_) | Item::Message(_)))), "{item:?}");
        }
        wait::until_ok("room", SOON, async || {
            admin::delete_topic(&channel, &format!("tmp.{}", MAX_DEPARTED + 1)).await
        })
        .await
    });
}

#[test]
fn a_connection_that_begins_and_goes_no_further_is_ended() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let address = server.url().trim_start_matches("http://").to_owned();
        for begun in [0, 1, 23] {
            let mut connection = TcpStream::connect(&address).await?;
            connection.write_all(&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..begun]).await?;
            let ended = wait::soon("the end", SOON, connection.read(&mut [0])).await?;
            ensure!(!matches!(ended, Ok(1..)), "after {begun} bytes: {ended:?}");
        }
        Ok(())
    });
}

#[test]
fn a_consumer_that_never_reads_stalls_nobody_else() {
    /// Of 2 MiB.
    const ROUNDS: usize = 32;
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let channel = raw::connect(&server.url()).await?;
        admin::create_topic(&channel, "orders").await?;
        // On connections of their own, with all the credit there is, and never read.
        let mut stalled = Vec::new();
        for number in 0..8 {
            let mut hello = raw::consumer_hello(&format!("stalled-{number}"), "it", &["orders"]);
            hello.start = admin::earliest();
            hello.max_outstanding_messages = 10_000;
            hello.max_outstanding_bytes = 64 * 1024 * 1024;
            let channel = raw::connect(&server.url()).await?;
            stalled.push(raw::SubscribeStream::welcomed(&channel, hello).await?);
        }
        let client = app::client(&server.url())?;
        let mut live = app::subscribe(&client, "live", "orders").await?;
        let publisher = app::publisher(&client, "orders").await?;
        let before = server.usage()?.resident_kib;
        for _ in 0..ROUNDS {
            for _ in 0..128 {
                drop(publisher.enqueue(Message::new(vec![0; 16 * 1024])).await?);
            }
            for delivery in app::next_many(&mut live, 128).await? {
                delivery.ack();
            }
            wait::soon("the flush", SOON, publisher.flush()).await??;
        }
        let grown = server.usage()?.resident_kib.saturating_sub(before);
        eprintln!("the server grew by {grown} KiB");
        // 64 MiB went past eight stalled consumers. Of each of these 24 frames of 256 KiB may wait,
        // and the engine has a cache of 64 MiB: 112 MiB, and half as much again for the allocator.
        ensure!(grown < 168 * 1024, "the server grew by {grown} KiB");
        drop(stalled);
        Ok(())
    });
}

#[test]
fn a_topic_whose_messages_are_all_out_leaves_room_for_the_others() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let channel = raw::connect(&server.url()).await?;
        admin::create_topic(&channel, "busy").await?;
        admin::create_topic(&channel, "quiet").await?;
        let client = app::client(&server.url())?;
        app::publish_numbers(&app::publisher(&client, "busy").await?, 1..=50).await?;
        let builder = client.subscriber("both").topics(["busy", "quiet"]).start(Start::Earliest);
        let mut both = builder.max_outstanding_messages(10).open().await?;
        let held = app::next_many(&mut both, 10).await?;
        ensure!(held.iter().all(|delivery| &*delivery.id.topic == "busy"), "{held:?}");
        app::publish_numbers(&app::publisher(&client, "quiet").await?, 1..=1).await?;
        let item = wait::soon("the quiet topic", SOON, both.next()).await?;
        let Some(Ok(Item::Message(delivery))) = item else { anyhow::bail!("{item:?}") };
        ensure!(&*delivery.id.topic == "quiet", "{delivery:?}");
        Ok(())
    });
}
