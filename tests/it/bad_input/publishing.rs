//! Bad messages and bad frames of publishers.

use anyhow::{Result, ensure};
use pubsub_proto::v1::{
    Message, Ping, PublishBatch, PublishRequest, PublisherHello, publish_stream_request,
};
use pubsub_tests::{
    admin,
    lab::scenario,
    raw::{self, PublishStream},
};
use tonic::transport::Channel;

use super::{Findings, TOPIC, WITHIN, at_most, prepared};

/// Messages that are refused one by one, with the reason.
fn bad_messages() -> Vec<(&'static str, &'static str, Message)> {
    let attributes = |count: usize, length: usize| Message {
        attributes: (0..count).map(|index| (format!("a{index}"), at_most(length))).collect(),
        ..Message::default()
    };
    vec![
        ("a payload of 1 MiB and its frame", "MESSAGE_TOO_LARGE", raw::message(vec![0; 1 << 20])),
        ("65 attributes", "INVALID_ARGUMENT", attributes(65, 1)),
        ("9 KiB of attributes", "INVALID_ARGUMENT", attributes(9, 1024)),
        (
            "an idempotency key of 129 bytes",
            "INVALID_ARGUMENT",
            Message { idempotency_key: at_most(129), ..Message::default() },
        ),
        (
            "an unknown recipient",
            "UNKNOWN_RECIPIENT",
            Message { recipients: vec!["nobody".into()], ..Message::default() },
        ),
        (
            "a malformed recipient",
            "INVALID_ARGUMENT|UNKNOWN_RECIPIENT",
            Message { recipients: vec!["a b".into()], ..Message::default() },
        ),
    ]
}

#[test]
fn bad_messages_are_refused_one_by_one() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let channel = raw::connect(&server.url()).await?;
        prepared(&channel).await?;
        let mut findings = Findings::default();
        let publish = async |topic: &str, messages: Vec<Message>| {
            let topic = topic.into();
            let request = PublishRequest { topic, messages, atomic: None };
            raw::publish_refusal(raw::publisher(&channel).publish(request).await)
        };
        for (what, expected, message) in bad_messages() {
            let found = publish(TOPIC, vec![message]).await;
            findings.expect(what, expected, found);
        }
        let found = publish(TOPIC, Vec::new()).await;
        findings.expect("no messages", "INVALID_ARGUMENT", found);
        let found = publish(TOPIC, vec![raw::message("x"); 513]).await;
        findings.expect("513 messages", "INVALID_ARGUMENT", found);
        let found = publish("unknown", vec![raw::message("x")]).await;
        findings.expect("an unknown topic", "TOPIC_NOT_FOUND", found);
        let found = publish("a b", vec![raw::message("x")]).await;
        findings.expect("a malformed topic", "INVALID_ARGUMENT", found);
        let head = admin::topic(&channel, TOPIC).await?.head;
        ensure!(head == 0, "{head} of the bad messages are stored");
        findings.verdict(&channel).await
    });
}

/// Hellos of publishers that are refused, with the reason.
fn bad_publisher_hellos() -> Vec<(&'static str, &'static str, PublisherHello)> {
    let good = || raw::publisher_hello(TOPIC, [7; 16]);
    vec![
        ("protocol 99", "UNSUPPORTED_PROTOCOL", PublisherHello { protocol: 99, ..good() }),
        (
            "a producer id of 15 bytes",
            "INVALID_ARGUMENT",
            PublisherHello { producer_id: vec![7; 15].into(), ..good() },
        ),
        ("an unknown topic", "TOPIC_NOT_FOUND", raw::publisher_hello("unknown", [7; 16])),
        ("a malformed topic", "INVALID_ARGUMENT", raw::publisher_hello("a b", [7; 16])),
        (
            "next below resolved",
            "INVALID_ARGUMENT|PROTOCOL_VIOLATION",
            PublisherHello { resolved_below: 5, next_sequence: 4, ..good() },
        ),
        ("attach 0", "INVALID_ARGUMENT", PublisherHello { attach: 0, ..good() }),
        (
            "a boot of another server",
            "DIVERGED",
            PublisherHello { boot_id: vec![9; 16].into(), topic_epoch: 1, ..good() },
        ),
        (
            "a boot id of 3 bytes",
            "INVALID_ARGUMENT|DIVERGED",
            PublisherHello { boot_id: vec![9; 3].into(), ..good() },
        ),
    ]
}

#[test]
fn bad_publisher_frames_end_the_stream_with_a_reason() {
    use publish_stream_request::Frame;

    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let channel = raw::connect(&server.url()).await?;
        prepared(&channel).await?;
        let mut findings = Findings::default();
        for (what, expected, hello) in bad_publisher_hellos() {
            let found = publisher_end(&channel, Frame::Hello(hello), None).await;
            findings.expect(what, expected, found);
        }
        let batch = |first_sequence, messages: Vec<Message>| {
            let messages = messages.iter().map(|message| message.encoded()).collect();
            let batch = PublishBatch { first_sequence, messages, resolved_below: 0, atomic: None };
            Frame::Batch(batch.encoded())
        };
        let hello = || Frame::Hello(raw::publisher_hello(TOPIC, [7; 16]));
        let one = || vec![raw::message("x")];
        let wrong = "PROTOCOL_VIOLATION";
        let invalid = "PROTOCOL_VIOLATION|INVALID_ARGUMENT";
        let gap = "OUT_OF_ORDER|PROTOCOL_VIOLATION";
        let table = [
            ("a batch before the hello", wrong, batch(1, one()), None),
            ("a ping before the hello", wrong, Frame::Ping(Ping { nonce: 1 }), None),
            ("a second hello", wrong, hello(), Some(hello())),
            ("sequence 0", invalid, hello(), Some(batch(0, one()))),
            ("an empty batch", invalid, hello(), Some(batch(1, Vec::new()))),
            ("a skipped sequence", gap, hello(), Some(batch(2, one()))),
            (
                "the last of all sequences",
                "OUT_OF_ORDER|PROTOCOL_VIOLATION|INVALID_ARGUMENT",
                hello(),
                Some(batch(u64::MAX, vec![raw::message("x"); 3])),
            ),
            (
                "513 messages in a batch",
                invalid,
                hello(),
                Some(batch(1, vec![raw::message("x"); 513])),
            ),
        ];
        for (what, expected, first, second) in table {
            let found = publisher_end(&channel, first, second).await;
            findings.expect(what, expected, found);
        }
        findings.verdict(&channel).await
    });
}

async fn publisher_end(
    channel: &Channel,
    first: publish_stream_request::Frame,
    second: Option<publish_stream_request::Frame>,
) -> Result<String> {
    let mut stream = match PublishStream::open_with(channel, first).await {
        Ok(stream) => stream,
        Err(status) => return raw::refusal::<()>(Err(status)),
    };
    if let Some(second) = second {
        stream.send(second).await?;
    }
    let end = stream.end().await?;
    raw::refusal::<()>(Err(end))
}
