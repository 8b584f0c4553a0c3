//! What a topic takes: checked where it is published, with the same answer for ever.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use pubsub_client::{
    Client, Compatibility, Message, Outcome, PayloadRules, PublishErrorKind, Reason, Schema, Start,
    TopicConfig,
};
use pubsub_proto::v1::{
    self, ErrorReason, PublishRequest, PublisherHello, Refused, publish_result,
    publish_run::Outcome as Fate,
};
use pubsub_tests::{
    lab::scenario,
    raw::{self, PublishStream},
    wait,
};

use crate::app::{self, SOON};

const WITHIN: Duration = Duration::from_secs(60);
const TOPIC: &str = "orders";
const PRODUCER: [u8; 16] = [9; 16];

const ORDER: &str = r#"{
    "type": "object",
    "required": ["id"],
    "properties": {
        "id": {"type": "integer"},
        "lines": {"items": {"properties": {"price": {"type": "number"}}}}
    }
}"#;

fn order() -> Schema {
    Schema::json(ORDER)
}

async fn create(client: &Client, rules: impl Into<PayloadRules>) -> Result<()> {
    let admin = client.admin();
    admin.create_topic(TOPIC, TopicConfig::new()).await?;
    admin.set_schema(TOPIC, rules, Compatibility::Backward).await?;
    Ok(())
}

/// All messages: payload, content type, revision.
async fn stored(
    client: &Client,
    count: usize,
) -> Result<Vec<(String, Option<String>, Option<u32>)>> {
    let mut reader = client.reader([TOPIC]).start(Start::Earliest).open().await?;
    let messages = app::next_many(&mut reader, count).await?;
    let message = |message: &pubsub_client::Delivery| {
        let payload = String::from_utf8_lossy(&message.payload).into_owned();
        (payload, message.content_type.clone(), message.schema_revision)
    };
    Ok(messages.iter().map(message).collect())
}

#[test]
fn a_refused_payload_gets_the_same_answer_after_a_crash() {
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        let client = app::client(&rig.url())?;
        create(&client, order()).await?;
        let window = || {
            let payload = |text: &str| raw::message(text.to_owned());
            vec![
                payload(r#"{"id": 1}"#),
                payload(r#"{"id": 2, "lines": [{}, {"price": "free"}]}"#),
                payload(r#"{"id": 3}"#),
            ]
        };
        let refused = |runs: Vec<v1::PublishRun>| -> Result<Refused> {
            ensure!(runs.len() == 3, "{runs:?}");
            match runs.into_iter().nth(1).and_then(|run| run.outcome) {
                Some(Fate::Refused(refused)) => Ok(refused),
                other => anyhow::bail!("a refusal was expected, not {other:?}"),
            }
        };
        let channel = raw::connect(&rig.url()).await?;
        let hello = raw::publisher_hello(TOPIC, PRODUCER);
        let (mut stream, _) = PublishStream::welcomed(&channel, hello).await?;
        stream.publish(1, window()).await?;
        let first = refused(stream.results().await?)?;
        ensure!(first.reason() == ErrorReason::SchemaViolation, "{first:?}");
        ensure!(first.metadata["field"] == "/lines/1/price", "{first:?}");
        ensure!(first.metadata["schema_revision"] == "1", "{first:?}");
        ensure!(first.detail.contains("orders") && !first.detail.contains("free"), "{first:?}");

        // By now it would be taken; what was decided stays decided.
        let admin = client.admin();
        admin.set_schema(TOPIC, PayloadRules::new(), Compatibility::Backward).await?;
        for crash in [false, true] {
            if crash {
                rig.crash().await?;
            }
            let channel = raw::connect(&rig.url()).await?;
            let hello = raw::publisher_hello(TOPIC, PRODUCER);
            let hello = PublisherHello { next_sequence: 4, ..hello };
            let (mut stream, welcome) = PublishStream::welcomed(&channel, hello).await?;
            ensure!(welcome.last_sequence == Some(3), "{welcome:?}");
            stream.publish(1, window()).await?;
            let again = refused(stream.results().await?)?;
            ensure!(again == first, "crash {crash}: {again:?}");
        }
        ensure!(admin.topic(TOPIC).await?.head == 2);
        app::shutdown(client).await
    });
}

#[test]
fn a_key_that_was_stored_is_answered_whatever_the_topic_takes_by_now() {
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        let client = app::client(&rig.url())?;
        create(&client, order()).await?;
        let publish = async |url: String, payload: &str| {
            let message = raw::message(payload.to_owned());
            let message = v1::Message { idempotency_key: "k".into(), ..message };
            let request =
                PublishRequest { topic: TOPIC.into(), messages: vec![message], atomic: None };
            let channel = raw::connect(&url).await?;
            let answer = raw::publisher(&channel).publish(request).await?.into_inner();
            let fate = answer.results.into_iter().next().and_then(|result| result.outcome);
            fate.context("no fate")
        };
        let publish_result::Outcome::Stored(first) = publish(rig.url(), r#"{"id": 1}"#).await?
        else {
            anyhow::bail!("it is not stored");
        };
        let narrow = Schema::json(r#"{"type": "string"}"#);
        client.admin().set_schema(TOPIC, narrow, Compatibility::None).await?;
        for crash in [false, true] {
            if crash {
                rig.crash().await?;
            }
            match publish(rig.url(), r#"{"id": 1}"#).await? {
                publish_result::Outcome::Stored(again) => {
                    ensure!(again.duplicate && again.sequence == first.sequence, "{again:?}");
                }
                other @ publish_result::Outcome::Refused(_) => anyhow::bail!("{other:?}"),
            }
            match publish(rig.url(), r#"{"id": 2}"#).await? {
                publish_result::Outcome::Refused(refused) => {
                    ensure!(refused.reason() == ErrorReason::SchemaViolation, "{refused:?}");
                }
                other @ publish_result::Outcome::Stored(_) => anyhow::bail!("{other:?}"),
            }
        }
        app::shutdown(client).await
    });
}

#[test]
fn revisions_survive_crashes_and_each_message_names_its_own() {
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        let client = app::client(&rig.url())?;
        create(&client, order()).await?;
        let admin = client.admin();
        let publisher = app::publisher(&client, TOPIC).await?;
        publisher.publish(r#"{"id": 1}"#).await?;

        let narrower = Schema::json(ORDER.replace("\"id\"]", "\"id\", \"lines\"]"));
        let narrowed = admin.set_schema(TOPIC, narrower.clone(), Compatibility::Backward).await;
        let error = narrowed.err().context("it is no successor")?;
        ensure!(error.reason() == Some(Reason::SchemaIncompatible), "{error}");
        ensure!(error.to_string().contains("required"), "{error}");

        let wider = Schema::json(ORDER.replace("\"integer\"", "[\"integer\", \"string\"]"));
        admin.set_schema(TOPIC, wider.clone(), Compatibility::Backward).await?;
        let (same, created) =
            admin.set_schema(TOPIC, wider.clone(), Compatibility::Backward).await?;
        ensure!((same.revision, created) == (2, false), "{same:?}");
        rig.crash().await?;
        publisher.publish(r#"{"id": "2"}"#).await?;
        admin.set_schema(TOPIC, narrower.clone(), Compatibility::None).await?;
        rig.crash().await?;
        let message = Message::new(r#"{"id": 3, "lines": []}"#);
        publisher.publish(message.with_content_type("application/json; charset=utf-8")).await?;

        let revisions = admin.schemas(TOPIC).await?;
        let numbers: Vec<_> = revisions.iter().map(|revision| revision.revision).collect();
        ensure!(numbers == [1, 2, 3], "{revisions:?}");
        ensure!(revisions[2].compatibility == Compatibility::None, "{revisions:?}");
        let second = admin.schema(TOPIC, Some(2)).await?.context("a revision")?;
        ensure!(second.rules.schema == Some(wider), "{second:?}");
        let messages = stored(&client, 3).await?;
        let kept: Vec<_> =
            messages.iter().map(|(_, media, number)| (media.as_deref(), *number)).collect();
        let json = "application/json";
        let said = Some("application/json; charset=utf-8");
        ensure!(
            kept == [(Some(json), Some(1)), (Some(json), Some(2)), (said, Some(3))],
            "{kept:?}"
        );

        admin.delete_topic(TOPIC).await?;
        admin.create_topic(TOPIC, TopicConfig::new()).await?;
        rig.crash().await?;
        ensure!(admin.schemas(TOPIC).await?.is_empty(), "a new topic takes everything");
        app::shutdown(client).await
    });
}

#[test]
fn a_violation_is_typed_permanent_and_harms_no_neighbour() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let client = app::client(&server.url())?;
        create(&client, order()).await?;
        let publisher = app::publisher(&client, TOPIC).await?;
        // Large enough to be checked beside the runtime; what follows has to wait for it.
        let line = format!(r#"{{"price": 1, "note": "{}"}}"#, "x".repeat(1000));
        let lines = |last: &str| {
            let all = vec![line.as_str(); 900].join(",");
            format!(r#"{{"id": 1, "lines": [{all}, {{"price": {last}}}]}}"#)
        };
        let tickets = [
            publisher.enqueue(lines("1")).await?,
            publisher.enqueue(lines("\"1\"")).await?,
            publisher.enqueue(Message::new("1").with_content_type("text/plain")).await?,
            publisher.enqueue("{").await?,
            publisher.enqueue(r#"{"id": 2}"#).await?,
        ];
        let mut fates = Vec::new();
        for ticket in tickets {
            fates.push(ticket.await);
        }
        let sequences: Vec<_> = fates.iter().flatten().map(|receipt| receipt.id.sequence).collect();
        ensure!(sequences == [1, 2], "{sequences:?}");
        let errors: Vec<_> = fates.into_iter().filter_map(Result::err).collect();
        for error in &errors {
            ensure!(error.outcome() == Outcome::NotPersisted && !error.is_retryable(), "{error}");
        }
        let violation = errors[0].schema_violation().context("no violation")?;
        ensure!((violation.revision, violation.field) == (1, "/lines/900/price"), "{violation:?}");
        ensure!(errors[1].reason() == Some(Reason::ContentTypeMismatch), "{}", errors[1]);
        let violation = errors[2].schema_violation().context("no violation")?;
        ensure!(violation.field.is_empty(), "{violation:?}");
        app::shutdown(client).await
    });
}

#[test]
fn a_publisher_learns_at_its_opening_whether_its_schema_is_taken() {
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        let client = app::client(&rig.url())?;
        client.admin().create_topic(TOPIC, TopicConfig::new()).await?;
        let error = client.publisher(TOPIC).schema(order()).open().await.err();
        let error = error.context("the topic takes everything, and promises nothing")?;
        let none = matches!(error.kind(), PublishErrorKind::SchemaMismatch { revision: None, .. });
        ensure!(none, "{error}");
        client.publisher(TOPIC).schema(order()).register_schema().open().await?;

        let wider = Schema::json(ORDER.replace("\"integer\"", "\"number\""));
        let error = client.publisher(TOPIC).schema(wider.clone()).open().await.err();
        let error = error.context("its fractions are not taken")?;
        let PublishErrorKind::SchemaMismatch { revision, problems } = error.kind() else {
            anyhow::bail!("{error}");
        };
        let first = problems.first().context("no problem")?;
        ensure!((*revision, first.path.as_str()) == (Some(1), "/properties/id"), "{error}");
        ensure!(!error.is_retryable() && error.outcome() == Outcome::NotPersisted);

        // The server is away for a while in between.
        rig.server.kill().await?;
        let opening = client.publisher(TOPIC).schema(wider).register_schema().open();
        let opening = wait::soon("the opening", SOON, opening);
        let (opened, revived) = tokio::join!(opening, rig.revive());
        revived?;
        opened??;
        // One of the revision before: what it publishes is taken, and it registers nothing.
        client.publisher(TOPIC).schema(order()).register_schema().open().await?;
        let other = Schema::json(r#"{"type": "string"}"#);
        let error = client.publisher(TOPIC).schema(other).register_schema().open().await.err();
        let error = error.context("it is no successor")?;
        ensure!(error.reason() == Some(Reason::SchemaIncompatible), "{error}");
        ensure!(client.admin().schemas(TOPIC).await?.len() == 2);
        app::shutdown(client).await
    });
}

#[test]
fn what_cannot_be_a_schema_is_refused_by_name() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let client = app::client(&server.url())?;
        client.admin().create_topic(TOPIC, TopicConfig::new()).await?;
        let channel = raw::connect(&server.url()).await?;
        let json = v1::SchemaKind::Json;
        let schema = |kind: v1::SchemaKind, definition: &str, message_name: &str| v1::Schema {
            kind: kind.into(),
            definition: definition.to_owned().into(),
            message_name: message_name.to_owned(),
        };
        for (schema, expected) in [
            (schema(v1::SchemaKind::Unspecified, "{}", ""), "schema.kind"),
            (schema(json, "{}", "Order"), "message_name"),
            (schema(json, "{", ""), "not JSON"),
            (schema(json, r#"{"$ref": "http://127.0.0.1:1/x"}"#, ""), "127.0.0.1"),
            (schema(json, &format!("{{}}{}", " ".repeat(300_000)), ""), "262144"),
            (schema(v1::SchemaKind::Protobuf, "?", "Order"), "FileDescriptorSet"),
        ] {
            let request = v1::SetSchemaRequest {
                topic: TOPIC.into(),
                schema: Some(schema),
                ..Default::default()
            };
            let status = raw::admin(&channel).set_schema(request).await.err();
            let status = status.context(expected)?;
            ensure!(raw::reason(&status).as_deref() == Some("INVALID_ARGUMENT"), "{status:?}");
            ensure!(status.message().contains(expected), "{expected}: {}", status.message());
        }
        ensure!(client.admin().schema(TOPIC, None).await?.is_none());
        let error = client.admin().schema("nowhere", None).await.err().context("no error")?;
        ensure!(error.reason() == Some(Reason::TopicNotFound), "{error}");
        app::shutdown(client).await
    });
}
