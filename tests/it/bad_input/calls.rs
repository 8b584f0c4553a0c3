//! Bad unary calls, and calls that are no protobuf.

use anyhow::{Result, ensure};
use bytes::Bytes;
use prost_types::Duration as ProtoDuration;
use pubsub_proto::v1::{
    AcknowledgeRequest, CreateSubscriptionRequest, CreateTopicRequest, DeleteSubscriptionRequest,
    DeleteTopicRequest, GetReceiptsRequest, GetSubscriptionRequest, GetTopicRequest, MessageId,
    NackRequest, PullRequest, SeekSubscriptionRequest, StartPosition, TopicConfig,
    start_position::Position,
};
use pubsub_tests::{admin, garbage, lab::scenario, raw};
use tonic::transport::Channel;

use super::{Findings, SUBSCRIPTION, TOPIC, WITHIN, at_most, prepared};

#[test]
fn bad_names_are_refused() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let channel = raw::connect(&server.url()).await?;
        prepared(&channel).await?;
        let mut findings = Findings::default();
        let too_long = at_most(129);
        let names =
            ["", "a b", ".a", "-a", "_a", "a/b", "../a", "a*", "ä", "a\0", "a\n", &too_long];
        for name in names {
            let request = CreateTopicRequest { name: name.into(), ..CreateTopicRequest::default() };
            let answer = raw::admin(&channel).create_topic(request).await;
            findings.expect(&format!("topic {name:?}"), "INVALID_ARGUMENT", raw::refusal(answer));
            let request = CreateSubscriptionRequest {
                name: name.into(),
                topics: vec![TOPIC.into()],
                ..CreateSubscriptionRequest::default()
            };
            let answer = raw::admin(&channel).create_subscription(request).await;
            findings.expect(
                &format!("subscription {name:?}"),
                "INVALID_ARGUMENT",
                raw::refusal(answer),
            );
        }
        let longest = at_most(128);
        admin::create_topic(&channel, &longest).await?;
        findings.verdict(&channel).await
    });
}

/// Settings of topics with one bad value each.
fn bad_configs() -> [(&'static str, TopicConfig); 4] {
    let good = TopicConfig::default;
    let seconds = |seconds| Some(ProtoDuration { seconds, nanos: 0 });
    let eight_days = seconds(8 * 24 * 3600);
    [
        ("messages of any size", TopicConfig { max_message_bytes: u64::MAX, ..good() }),
        ("a negative window", TopicConfig { idempotency_window: seconds(-1), ..good() }),
        ("a long window", TopicConfig { idempotency_window: eight_days, ..good() }),
        ("a negative retention", TopicConfig { retention: seconds(-1), ..good() }),
    ]
}

#[test]
fn bad_requests_about_topics_are_refused() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let channel = raw::connect(&server.url()).await?;
        prepared(&channel).await?;
        let mut admin = raw::admin(&channel);
        let mut findings = Findings::default();
        let unknown = || "unknown".to_owned();
        let none = "TOPIC_NOT_FOUND";
        let answer = admin.get_topic(GetTopicRequest { name: unknown() }).await;
        findings.expect("get topic", none, raw::refusal(answer));
        let answer = admin.delete_topic(DeleteTopicRequest { name: unknown() }).await;
        findings.expect("delete topic", none, raw::refusal(answer));
        let answer = admin.create_topic(CreateTopicRequest {
            name: TOPIC.into(),
            ..CreateTopicRequest::default()
        });
        findings.expect("create topic", "TOPIC_EXISTS", raw::refusal(answer.await));
        for (what, config) in bad_configs() {
            let request = CreateTopicRequest {
                name: "bad".into(),
                config: Some(config),
                if_not_exists: false,
            };
            let answer = admin.create_topic(request).await;
            findings.expect(what, "INVALID_ARGUMENT", raw::refusal(answer));
        }
        for sequence in [0, 99] {
            let request = GetReceiptsRequest {
                topic: TOPIC.into(),
                sequence,
                ..GetReceiptsRequest::default()
            };
            let answer = admin.get_receipts(request).await;
            let what = format!("receipts of {sequence}");
            findings.expect(&what, "BEYOND_HEAD|INVALID_ARGUMENT", raw::refusal(answer));
        }
        findings.verdict(&channel).await
    });
}

#[test]
fn bad_requests_about_subscriptions_are_refused() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let channel = raw::connect(&server.url()).await?;
        prepared(&channel).await?;
        let mut admin = raw::admin(&channel);
        let mut findings = Findings::default();
        let unknown = || "unknown".to_owned();
        let none = "SUBSCRIPTION_NOT_FOUND";
        let request = GetSubscriptionRequest { name: unknown() };
        let answer = admin.get_subscription(request).await;
        findings.expect("get subscription", none, raw::refusal(answer));
        let request = DeleteSubscriptionRequest { name: unknown() };
        let answer = admin.delete_subscription(request).await;
        findings.expect("delete subscription", none, raw::refusal(answer));
        let answer = admin.create_subscription(CreateSubscriptionRequest {
            name: "new".into(),
            topics: vec![unknown()],
            ..CreateSubscriptionRequest::default()
        });
        findings.expect("unknown topic", "TOPIC_NOT_FOUND", raw::refusal(answer.await));
        let answer = admin.create_subscription(CreateSubscriptionRequest {
            name: "new".into(),
            topics: Vec::new(),
            ..CreateSubscriptionRequest::default()
        });
        findings.expect("no topics", "INVALID_ARGUMENT", raw::refusal(answer.await));
        let answer = admin.seek_subscription(SeekSubscriptionRequest {
            name: SUBSCRIPTION.into(),
            topic: TOPIC.into(),
            to: Some(StartPosition { position: Some(Position::Sequence(99)) }),
            ..SeekSubscriptionRequest::default()
        });
        let expected = "BEYOND_HEAD|INVALID_ARGUMENT";
        findings.expect("seek beyond the head", expected, raw::refusal(answer.await));
        findings.verdict(&channel).await
    });
}

#[test]
fn bad_pulls_acks_and_nacks_are_refused() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let channel = raw::connect(&server.url()).await?;
        prepared(&channel).await?;
        let mut subscriber = raw::subscriber(&channel);
        let mut findings = Findings::default();
        let pull = |subscription: &str, max_messages| PullRequest {
            subscription: subscription.into(),
            max_messages,
            ..PullRequest::default()
        };
        let answer = subscriber.pull(pull("unknown", 1)).await;
        findings.expect("pull", "SUBSCRIPTION_NOT_FOUND", raw::refusal(answer));
        let answer = subscriber.pull(pull(SUBSCRIPTION, 1001)).await;
        findings.expect("1001 messages", "INVALID_ARGUMENT", raw::refusal(answer));
        let answer = subscriber.pull(PullRequest {
            lease: Some(ProtoDuration { seconds: 100_000, nanos: 0 }),
            ..pull(SUBSCRIPTION, 1)
        });
        findings.expect("a long lease", "INVALID_ARGUMENT", raw::refusal(answer.await));

        let epoch = admin::topic(&channel, TOPIC).await?.epoch;
        let id = |epoch, sequence| MessageId { topic: TOPIC.into(), epoch, sequence };
        let table = [
            ("beyond the head", "BEYOND_HEAD", vec![id(epoch, 1)]),
            ("sequence 0", "INVALID_ARGUMENT|BEYOND_HEAD", vec![id(epoch, 0)]),
            ("another epoch", "TOPIC_RECREATED|TOPIC_NOT_FOUND", vec![id(epoch + 7, 1)]),
            ("1001 acks", "INVALID_ARGUMENT", vec![id(epoch, 1); 1001]),
        ];
        for (what, expected, ids) in table {
            let subscription = SUBSCRIPTION.into();
            let answer = subscriber.acknowledge(AcknowledgeRequest { subscription, ids });
            findings.expect(what, expected, raw::refusal(answer.await));
        }
        let answer = subscriber.nack(NackRequest {
            subscription: SUBSCRIPTION.into(),
            lease_tokens: vec!["garbage".into()],
            delay: None,
            ..NackRequest::default()
        });
        findings.expect("a lease token", "INVALID_ARGUMENT", raw::refusal(answer.await));
        findings.verdict(&channel).await
    });
}

#[test]
fn frames_that_are_no_protobuf_are_refused() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let channel = raw::connect(&server.url()).await?;
        prepared(&channel).await?;
        let before = server.usage()?;
        for length in [0, 1, 5, 100, 10_000] {
            let garbage = Bytes::from(lab.rng.bytes(length));
            garbage_calls(&channel, &garbage).await?;
        }
        let after = server.usage()?;
        ensure!(after.resident_kib < before.resident_kib + (64 << 10), "{before:?} {after:?}");
        admin::topic(&channel, TOPIC).await?;
        Ok(())
    });
}

/// Sends bytes as if they were a request. Whatever they mean, an answer has to come.
async fn garbage_calls(channel: &Channel, garbage: &Bytes) -> Result<()> {
    let methods = [
        "/pubsub.v1.PublisherService/Publish",
        "/pubsub.v1.PublisherService/PublishStream",
        "/pubsub.v1.SubscriberService/Subscribe",
        "/pubsub.v1.SubscriberService/Pull",
        "/pubsub.v1.AdminService/CreateTopic",
        "/pubsub.v1.Nothing/Nothing",
    ];
    for method in methods {
        let status = garbage::call(channel, method, garbage.clone()).await?;
        ensure!(status.code() != tonic::Code::Ok || garbage.is_empty(), "{method}: {status:?}");
    }
    Ok(())
}
