//! What an application is told about its publishes: the truth, and in time.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use pubsub_client::{
    Client, ConnectionState, EnqueueError, Message, Outcome, PublishErrorKind, Reason,
};
use pubsub_proto::v1::TopicConfig;
use pubsub_tests::{
    admin, auditor,
    files::SmallDisk,
    lab::scenario,
    proxy::{Direction, Mode},
    raw, wait,
};

use crate::app::{self, SOON};

const WITHIN: Duration = Duration::from_secs(90);
const TOPIC: &str = "orders";

fn blocked_by(expected: Reason) -> impl Fn(&ConnectionState) -> bool {
    move |state| match state {
        ConnectionState::Blocked { reason, .. } => *reason == expected,
        _ => false,
    }
}

#[test]
fn a_deadline_says_whether_the_message_was_ever_sent() {
    const DEADLINE: Duration = Duration::from_millis(500);
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        admin::create_topic(&raw::connect(&rig.server.url()).await?, TOPIC).await?;
        let client = app::client(&rig.url())?;
        let publisher = app::publisher(&client, TOPIC).await?;
        // Sent, and never answered.
        rig.proxy.set(Direction::Down, Mode::Discard);
        let sent = publisher.publish(Message::new("sent").with_deadline(DEADLINE));
        let sent = wait::soon("an answer", SOON, sent).await?.err().context("no answer came")?;
        ensure!(matches!(sent.kind(), PublishErrorKind::DeadlineElapsed), "{sent}");
        ensure!(sent.outcome() == Outcome::Unknown, "{sent}");
        // Never sent: there is no server.
        rig.server.kill().await?;
        rig.proxy.set(Direction::Down, Mode::Pass);
        let reconnecting = ConnectionState::is_reconnecting;
        app::state(publisher.state(), "reconnecting", SOON, reconnecting).await?;
        let never = publisher.publish(Message::new("never").with_deadline(DEADLINE));
        let never = wait::soon("an answer", SOON, never).await?.err().context("no server")?;
        ensure!(matches!(never.kind(), PublishErrorKind::DeadlineElapsed), "{never}");
        ensure!(never.outcome() == Outcome::NotPersisted, "{never}");

        rig.revive().await?;
        app::publish_numbers(&publisher, [1]).await?;
        let audit = auditor::read(&raw::connect(&rig.server.url()).await?, TOPIC).await?;
        let stored: Vec<_> = audit.messages.into_iter().filter_map(|one| one.message).collect();
        ensure!(stored.iter().all(|one| one.payload != "never"), "it is stored: {stored:?}");
        Ok(())
    });
}

#[test]
fn a_client_for_a_wrong_address_fails_fast() {
    scenario(WITHIN, async |lab| {
        let mut server = lab.server().await?;
        let url = server.url();
        server.kill().await?;
        let refused = wait::soon("an answer", SOON, Client::connect(&url)).await?;
        let error = refused.err().context("it connects to nobody")?;
        ensure!(error.is_retryable(), "{error}");
        let malformed = Client::connect("not an address").await;
        ensure!(malformed.is_err_and(|error| !error.is_retryable()));
        Ok(())
    });
}

#[test]
fn a_publisher_without_a_topic_is_told() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let client = app::client(&server.url())?;
        let opening = wait::soon("an answer", SOON, client.publisher(TOPIC).open()).await?;
        let error = opening.err().context("it publishes to nothing")?;
        ensure!(error.reason() == Some(Reason::TopicNotFound), "{error}");
        ensure!(error.outcome() == Outcome::NotPersisted, "{error}");
        Ok(())
    });
}

#[test]
fn a_batch_larger_than_its_topic_is_stored_piece_by_piece() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let channel = raw::connect(&server.url()).await?;
        let config = TopicConfig { max_bytes: 64 << 10, ..TopicConfig::default() };
        admin::create_topic_with(&channel, TOPIC, config).await?;
        admin::create_subscription(&channel, "billing", &[TOPIC]).await?;
        let client = app::client(&server.url())?;
        let publisher = app::publisher(&client, TOPIC).await?;
        let mut tickets = Vec::new();
        for _ in 0..20 {
            tickets.push(publisher.enqueue(Message::new(vec![1; 8 << 10])).await?);
        }
        let mut subscriber = client.subscriber("billing").must_exist().open().await?;
        for expected in 1..=20 {
            let delivery = app::next(&mut subscriber).await?;
            ensure!(delivery.id.sequence == expected, "{} for {expected}", delivery.id);
            delivery.ack();
        }
        for ticket in tickets {
            wait::soon("a receipt", SOON, ticket).await??;
        }
        Ok(())
    });
}

#[test]
fn a_full_disk_blocks_publishers_and_nobody_else() {
    scenario(WITHIN, async |lab| {
        let Some(disk) = SmallDisk::mount(&lab.path("disk"), 128)? else {
            return Ok(());
        };
        let server = lab.server_on(&disk.path().join("data")).await?;
        let channel = raw::connect(&server.url()).await?;
        admin::create_topic(&channel, TOPIC).await?;
        let client = app::client(&server.url())?;
        let publisher = app::publisher(&client, TOPIC).await?;
        let mut subscriber = app::subscribe(&client, "billing", TOPIC).await?;
        app::publish_numbers(&publisher, 1..=20).await?;
        let mut shown = app::next_many(&mut subscriber, 10).await?;
        for left in [1024, 0] {
            disk.fill(left)?;
            let ticket = publisher.enqueue(Message::new(vec![1; 64 << 10])).await?;
            let full = blocked_by(Reason::DiskFull);
            app::state(publisher.state(), "blocked by a full disk", SOON, full)
                .await
                .with_context(|| format!("{left} KiB left"))?;
            let refused = publisher.try_enqueue("x");
            ensure!(matches!(refused, Err(EnqueueError::Blocked { .. })), "{refused:?}");
            let acked = shown.split_off(shown.len() - 5);
            app::confirm(acked).await.with_context(|| format!("acks, {left} KiB left"))?;
            disk.free()?;
            wait::soon("the receipt", SOON, ticket).await??;
        }
        let rest = app::next_many(&mut subscriber, 12).await?;
        ensure!(app::sequences(&rest).into_iter().eq(11..=22), "{rest:?}");
        app::confirm(rest).await?;
        app::all_acked(&channel, "billing").await
    });
}

#[test]
fn what_is_in_the_window_is_listed_when_a_publisher_is_closed_without_a_server() {
    scenario(WITHIN, async |lab| -> Result<()> {
        let mut rig = lab.rig().await?;
        admin::create_topic(&raw::connect(&rig.server.url()).await?, TOPIC).await?;
        let client = app::client(&rig.url())?;
        let publisher = app::publisher(&client, TOPIC).await?;
        app::publish_numbers(&publisher, [1]).await?;
        rig.server.kill().await?;
        let reconnecting = ConnectionState::is_reconnecting;
        app::state(publisher.state(), "reconnecting", SOON, reconnecting).await?;
        let _two = publisher.enqueue("2").await?;
        let _three = publisher.enqueue("3").await?;
        let closing = publisher.close(Duration::from_millis(300));
        let left = wait::soon("the close", SOON, closing).await?.err().context("no error")?;
        let unresolved = left.unresolved();
        let payloads: Vec<_> = unresolved.iter().map(|one| one.message.payload.clone()).collect();
        ensure!(payloads == ["2", "3"], "{left:?}");
        let never = unresolved.iter().all(|one| one.outcome == Outcome::NotPersisted);
        ensure!(never, "they were never sent: {left:?}");
        Ok(())
    });
}
