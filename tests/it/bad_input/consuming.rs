//! Bad frames of consumers.

use anyhow::{Context as _, Result};
use pubsub_proto::v1::{
    AckBatch, Consumer, Ping, SequenceRange, SubscribeHello, TopicAcks, subscribe_request,
    subscribe_response,
};
use pubsub_tests::{
    lab::scenario,
    raw::{self, SubscribeStream},
};
use tonic::transport::Channel;

use super::{Findings, SUBSCRIPTION, TOPIC, WITHIN, at_most, prepared};

/// Hellos with a malformed consumer.
fn bad_consumers() -> Vec<(&'static str, &'static str, SubscribeHello)> {
    let good = || raw::consumer_hello(SUBSCRIPTION, "worker", &[]);
    let consumer = |id: &str, instance: usize, attach| SubscribeHello {
        consumer: Some(Consumer { id: id.into(), instance: vec![1; instance].into(), attach }),
        ..good()
    };
    let long = at_most(129);
    vec![
        ("no consumer", "INVALID_ARGUMENT", SubscribeHello { consumer: None, ..good() }),
        ("an empty consumer", "INVALID_ARGUMENT", consumer("", 16, 1)),
        ("a long consumer", "INVALID_ARGUMENT", consumer(&long, 16, 1)),
        ("a short instance", "INVALID_ARGUMENT", consumer("worker", 3, 1)),
        ("attach 0", "INVALID_ARGUMENT", consumer("worker", 16, 0)),
    ]
}

/// Hellos of consumers that are refused, with the reason.
fn bad_consumer_hellos() -> Vec<(&'static str, &'static str, SubscribeHello)> {
    let good = || raw::consumer_hello(SUBSCRIPTION, "worker", &[]);
    vec![
        ("protocol 0", "UNSUPPORTED_PROTOCOL", SubscribeHello { protocol: 0, ..good() }),
        (
            "a subscription that must exist",
            "SUBSCRIPTION_NOT_FOUND",
            SubscribeHello {
                must_exist: true,
                ..raw::consumer_hello("unknown", "worker", &[TOPIC])
            },
        ),
        (
            "a new subscription without topics",
            "SUBSCRIPTION_NOT_FOUND|INVALID_ARGUMENT",
            raw::consumer_hello("unknown", "worker", &[]),
        ),
        ("an unknown topic", "TOPIC_NOT_FOUND", raw::consumer_hello("new", "worker", &["unknown"])),
        ("a malformed topic", "INVALID_ARGUMENT", raw::consumer_hello("new", "worker", &["a b"])),
        (
            "other topics than those of the subscription",
            "SUBSCRIPTION_MISMATCH",
            raw::consumer_hello(SUBSCRIPTION, "worker", &["other-*"]),
        ),
        (
            "a boot of another server",
            "DIVERGED",
            SubscribeHello { boot_id: vec![9; 16].into(), ..good() },
        ),
    ]
}

/// Acks of the session's only topic.
fn acks(topic: u32, ranges: &[(u64, u64)]) -> subscribe_request::Frame {
    let acked =
        ranges.iter().map(|(first, last)| SequenceRange { first: *first, last: *last }).collect();
    subscribe_request::Frame::Acks(AckBatch {
        number: 1,
        topics: vec![TopicAcks { topic, acked, ..TopicAcks::default() }],
        awaited: false,
    })
}

#[test]
fn bad_consumer_frames_end_the_stream_with_a_reason() {
    use subscribe_request::Frame;

    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let channel = raw::connect(&server.url()).await?;
        prepared(&channel).await?;
        let mut findings = Findings::default();
        for (what, expected, hello) in bad_consumers().into_iter().chain(bad_consumer_hellos()) {
            let found = consumer_end(&channel, Frame::Hello(hello), None).await;
            findings.expect(what, expected, found);
        }
        let mut attach = 0;
        let mut hello = || {
            attach += 1;
            let mut hello = raw::consumer_hello(SUBSCRIPTION, "worker", &[]);
            if let Some(consumer) = &mut hello.consumer {
                consumer.attach = attach;
            }
            Frame::Hello(hello)
        };
        let wrong = "PROTOCOL_VIOLATION";
        let invalid = "PROTOCOL_VIOLATION|INVALID_ARGUMENT";
        let second = hello();
        let table = [
            ("acks before the hello", wrong, acks(1, &[(1, 1)]), None),
            ("a ping before the hello", wrong, Frame::Ping(Ping { nonce: 1 }), None),
            ("a second hello", wrong, hello(), Some(second)),
            ("an unknown topic number", invalid, hello(), Some(acks(9, &[(1, 1)]))),
            ("sequence 0", invalid, hello(), Some(acks(1, &[(0, 1)]))),
            ("a reversed range", invalid, hello(), Some(acks(1, &[(3, 2)]))),
            ("beyond the head", "BEYOND_HEAD", hello(), Some(acks(1, &[(1, 1)]))),
            (
                "the last of all sequences",
                "BEYOND_HEAD|PROTOCOL_VIOLATION|INVALID_ARGUMENT",
                hello(),
                Some(acks(1, &[(1, u64::MAX)])),
            ),
        ];
        for (what, expected, first, second) in table {
            let found = consumer_end(&channel, first, second).await;
            findings.expect(what, expected, found);
        }
        findings.verdict(&channel).await
    });
}

async fn consumer_end(
    channel: &Channel,
    first: subscribe_request::Frame,
    second: Option<subscribe_request::Frame>,
) -> Result<String> {
    use subscribe_request::Frame;
    use subscribe_response::Frame as Response;

    let mut stream = match SubscribeStream::open_with(channel, first).await {
        Ok(stream) => stream,
        Err(status) => return raw::refusal::<()>(Err(status)),
    };
    if let Some(mut second) = second {
        let welcome = stream.next().await?;
        if let (Response::Welcome(welcome), Frame::Acks(acks)) = (welcome, &mut second) {
            let generation = welcome.topics.first().context("no topic")?.cursor_generation;
            for topic in &mut acks.topics {
                topic.cursor_generation = generation;
            }
        }
        stream.send(second).await?;
    }
    let end = stream.end().await?;
    raw::refusal::<()>(Err(end))
}
