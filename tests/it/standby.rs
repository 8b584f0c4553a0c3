//! Consumers that wait for their turn, and pulls that do: on the wire, without the SDK.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use pubsub_proto::v1::{
    NackRequest, PublishRequest, PullRequest, ReceiptState, SequenceRange, SubscribeHello,
    SubscribeWelcome, TopicPosition, subscribe_request::Frame as Request,
    subscribe_response::Frame,
};
use pubsub_tests::{
    admin,
    lab::{Lab, scenario},
    process::Server,
    raw::{self, SubscribeStream},
    wait,
};
use tokio::{task::JoinSet, time::Instant};
use tonic::transport::Channel;

const WITHIN: Duration = Duration::from_secs(60);
const TOPIC: &str = "orders";
const SUBSCRIPTION: &str = "billing";

async fn prepared(lab: &mut Lab, count: usize) -> Result<(Server, Channel)> {
    let server = lab.server().await?;
    let channel = raw::connect(&server.url()).await?;
    admin::create_topic(&channel, TOPIC).await?;
    admin::create_subscription(&channel, SUBSCRIPTION, &[TOPIC]).await?;
    if count > 0 {
        let messages = vec![raw::message("x"); count];
        let request = PublishRequest { topic: TOPIC.into(), messages, atomic: None };
        raw::publisher(&channel).publish(request).await?;
    }
    Ok((server, channel))
}

fn hello(consumer: &str) -> SubscribeHello {
    raw::consumer_hello(SUBSCRIPTION, consumer, &[])
}

async fn standing_by(channel: &Channel, hello: SubscribeHello) -> Result<SubscribeStream> {
    let mut stream = SubscribeStream::open(channel, hello).await?;
    match stream.next().await? {
        Frame::Standby(_) => Ok(stream),
        other => bail!("it is not told to stand by: {other:?}"),
    }
}

async fn turn(stream: &mut SubscribeStream) -> Result<SubscribeWelcome> {
    loop {
        match stream.next().await? {
            Frame::Welcome(welcome) => return Ok(welcome),
            Frame::Heartbeat(_) | Frame::Standby(_) | Frame::Confirm(_) => {}
            other => bail!("a welcome was expected, not {other:?}"),
        }
    }
}

#[test]
fn a_hello_that_is_overtaken_by_a_newer_one_ends_nobody_who_stands_by() {
    scenario(WITHIN, async |lab| {
        let (_server, channel) = prepared(lab, 1).await?;
        let (active, _) = SubscribeStream::welcomed(&channel, hello("first")).await?;
        let overtaken = hello("second");
        let mut newer = standing_by(&channel, hello("second")).await?;
        let end = match SubscribeStream::open(&channel, overtaken).await {
            Ok(mut late) => late.end().await?,
            Err(status) => status,
        };
        ensure!(raw::reason(&end).as_deref() == Some("SUPERSEDED"), "{end:?}");
        active.send(Request::Goodbye(Default::default())).await?;
        turn(&mut newer).await?;
        Ok(())
    });
}

#[test]
fn acks_of_a_consumer_that_has_to_stand_by_count() {
    scenario(WITHIN, async |lab| {
        let (_server, channel) = prepared(lab, 3).await?;
        let (_active, session) = SubscribeStream::welcomed(&channel, hello("first")).await?;
        let topic = session.topics.first().context("no topic")?;
        let position = TopicPosition {
            topic: TOPIC.into(),
            epoch: topic.epoch,
            cursor_generation: topic.cursor_generation,
            acked: vec![SequenceRange { first: 2, last: 2 }],
            last_received: 3,
            ..TopicPosition::default()
        };
        let late = SubscribeHello {
            positions: vec![position],
            subscription_epoch: session.subscription_epoch,
            ..hello("second")
        };
        let mut standby = standing_by(&channel, late).await?;
        loop {
            match standby.next().await? {
                Frame::Confirm(confirm) => {
                    ensure!(confirm.number == 0, "{confirm:?}");
                    break;
                }
                Frame::Heartbeat(_) => {}
                other => bail!("a confirmation was expected, not {other:?}"),
            }
        }
        let topic = admin::topic(&channel, TOPIC).await?;
        for (sequence, state) in [(1, ReceiptState::Pending), (2, ReceiptState::Received)] {
            let receipts = admin::receipts(&channel, &topic, sequence, SUBSCRIPTION).await?;
            let receipt = receipts.first().context("no receipt")?;
            ensure!(receipt.state() == state, "{sequence}: {receipt:?}");
        }
        Ok(())
    });
}

#[test]
fn who_stands_by_takes_over_when_a_pulled_message_is_handed_back() {
    scenario(WITHIN, async |lab| {
        let (_server, channel) = prepared(lab, 1).await?;
        let pull = PullRequest { subscription: SUBSCRIPTION.into(), ..PullRequest::default() };
        let pulled = raw::subscriber(&channel).pull(pull).await?.into_inner().messages;
        let mut standby = standing_by(&channel, hello("second")).await?;
        let nack = NackRequest {
            subscription: SUBSCRIPTION.into(),
            lease_tokens: pulled.into_iter().map(|message| message.lease_token).collect(),
            delay: None,
            ..NackRequest::default()
        };
        raw::subscriber(&channel).nack(nack).await?;
        turn(&mut standby).await?;
        Ok(())
    });
}

#[test]
fn a_pull_does_not_wait_for_one_that_waits_longer() {
    scenario(WITHIN, async |lab| {
        let (_server, channel) = prepared(lab, 0).await?;
        let pull = |seconds| PullRequest {
            subscription: SUBSCRIPTION.into(),
            wait: Some(prost_types::Duration { seconds, nanos: 0 }),
            ..PullRequest::default()
        };
        let mut patient = raw::subscriber(&channel);
        let waiting = pull(8);
        let mut others = JoinSet::from_iter([async move { patient.pull(waiting).await }]);
        tokio::time::sleep(Duration::from_millis(200)).await;
        let asked = Instant::now();
        let mut hasty = raw::subscriber(&channel);
        let answer =
            wait::soon("the answer", Duration::from_secs(5), hasty.pull(pull(1))).await??;
        ensure!(answer.into_inner().messages.is_empty());
        ensure!(asked.elapsed() >= Duration::from_millis(900), "it did not wait");
        ensure!(others.try_join_next().is_none(), "the other one did not wait");
        Ok(())
    });
}
