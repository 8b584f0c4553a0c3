//! Batches: all of it or nothing, once, and after exactly what was expected, whatever dies.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use pubsub_client::{Client, Message, Outcome, PublishErrorKind, Reason, TopicConfig};
use pubsub_proto::v1::{self, AtomicBatch, PublishRequest, publish_result};
use pubsub_tests::{
    admin,
    auditor::{self, Audit},
    lab::scenario,
    proxy::{Cut, Direction, Mode},
    raw, wait,
};

use tokio::task::JoinSet;

use crate::app::{self, SOON};

const WITHIN: Duration = Duration::from_secs(90);
const TOPIC: &str = "orders";

fn payloads(audit: &Audit) -> Vec<String> {
    let messages = audit.messages.iter().filter_map(|stored| stored.message.as_ref());
    messages.map(|message| String::from_utf8_lossy(&message.payload).into_owned()).collect()
}

async fn log(url: &str) -> Result<Vec<String>> {
    Ok(payloads(&auditor::read(&raw::connect(url).await?, TOPIC).await?))
}

#[test]
fn a_server_killed_during_batches_has_all_of_each_or_none() {
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        let client = app::client(&rig.url())?;
        client.admin().create_topic(TOPIC, TopicConfig::new()).await?;
        let publisher = app::publisher(&client, TOPIC).await?;
        let (mut expected, mut tickets) = (Vec::new(), Vec::new());
        for number in 0..200_u64 {
            let size = 1 + lab.rng.below(150);
            let messages: Vec<_> =
                (0..size).map(|part| format!("{number}:{part}/{size}")).collect();
            // Every tenth has a message that is too large: none of it may be there.
            let bad = number % 10 == 3;
            let mut batch: Vec<_> = messages.iter().cloned().map(Message::new).collect();
            if bad {
                let last = batch.last_mut().context("a message")?;
                last.recipients.push("nobody".to_owned());
            } else {
                expected.extend(messages);
            }
            tickets.push((bad, size, publisher.publish_batch(batch).enqueue().await?));
            // In between, messages that go alone keep their place.
            let alone = format!("{number}");
            expected.push(alone.clone());
            drop(publisher.enqueue(alone).await?);
            if lab.rng.below(20) == 0 {
                rig.crash().await?;
            }
        }
        rig.crash().await?;
        wait::soon("the flush", SOON, publisher.flush()).await?.ok();
        let log = log(&rig.server.url()).await?;
        ensure!(log == expected, "{} messages, {} expected", log.len(), expected.len());
        for (bad, size, ticket) in tickets {
            match ticket.await {
                Ok(receipts) => {
                    ensure!(!bad && receipts.len() as u64 == size, "{receipts:?}");
                    let first = receipts[0].id.sequence;
                    let dense =
                        (first..).zip(&receipts).all(|(id, receipt)| receipt.id.sequence == id);
                    ensure!(dense, "{receipts:?}");
                    let named = &log[usize::try_from(first)? - 1];
                    ensure!(named.ends_with(&format!(":0/{size}")), "{named}");
                }
                Err(error) => {
                    ensure!(bad && error.reason() == Some(Reason::UnknownRecipient), "{error}");
                    ensure!(error.batch_index() == Some(usize::try_from(size)? - 1), "{error}");
                }
            }
        }
        app::shutdown(client).await
    });
}

#[test]
fn a_batch_whose_answer_is_cut_off_does_not_meet_the_head_that_it_moved() {
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        let direct = raw::connect(&rig.server.url()).await?;
        admin::create_topic(&direct, TOPIC).await?;
        let client = app::client(&rig.url())?;
        let publisher = app::publisher(&client, TOPIC).await?;
        rig.proxy.set(Direction::Down, Mode::Discard);
        let batch = publisher.publish_batch(["a", "b", "c"]).expect_head(0);
        let ticket = batch.enqueue().await?;
        wait::until_ok("the commit", SOON, async || {
            let head = admin::topic(&direct, TOPIC).await?.head;
            ensure!(head == 3, "the head is {head}");
            Ok(())
        })
        .await?;
        rig.proxy.cut_all(Cut::Reset);
        rig.crash().await?;
        rig.proxy.set(Direction::Down, Mode::Pass);
        let receipts = wait::soon("the receipts", SOON, ticket).await??;
        let ids: Vec<_> = receipts.iter().map(|receipt| receipt.id.sequence).collect();
        ensure!(
            ids == [1, 2, 3] && receipts.iter().all(|receipt| receipt.duplicate),
            "{receipts:?}"
        );

        let error = publisher.publish_batch(["x"]).expect_head(0).await.err();
        let error = error.context("others were first")?;
        ensure!(error.reason() == Some(Reason::HeadMismatch), "{error}");
        ensure!(error.actual_head() == Some(3) && !error.is_retryable(), "{error}");
        ensure!(error.outcome() == Outcome::NotPersisted);
        publisher.publish_batch(["d"]).expect_head(3).await?;
        ensure!(log(&rig.server.url()).await? == ["a", "b", "c", "d"]);
        app::shutdown(client).await
    });
}

/// Appends so many messages, each after exactly the one that it has seen last.
async fn count_up(client: Client, name: &'static str, count: u64) -> Result<u64> {
    let publisher = app::publisher(&client, TOPIC).await?;
    let (mut head, mut lost) = (0, 0);
    for number in 0..count {
        loop {
            let batch = publisher.publish_batch([format!("{name}{number}")]).expect_head(head);
            match wait::soon("a fate", SOON, batch.into_future()).await? {
                Ok(receipts) => {
                    ensure!(receipts[0].id.sequence == head + 1, "{receipts:?} after {head}");
                    head += 1;
                    break;
                }
                Err(error) => {
                    lost += 1;
                    head = error.actual_head().with_context(|| error.to_string())?;
                }
            }
        }
    }
    app::shutdown(client).await?;
    Ok(lost)
}

#[test]
fn writers_that_expect_the_head_never_overtake_each_other_unseen() {
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        admin::create_topic(&raw::connect(&rig.server.url()).await?, TOPIC).await?;
        let writers = [("a", app::client(&rig.url())?), ("b", app::client(&rig.url())?)];
        let mut running = JoinSet::new();
        for (name, client) in writers {
            running.spawn(count_up(client, name, 150));
        }
        for _ in 0..4 {
            tokio::time::sleep(Duration::from_millis(lab.rng.below(400))).await;
            rig.crash().await?;
        }
        let mut lost = 0;
        for writer in running.join_all().await {
            lost += writer?;
        }
        let log = log(&rig.server.url()).await?;
        ensure!(log.len() == 300 && lost > 0, "{} messages, {lost} were late", log.len());
        for name in ["a", "b"] {
            let own: Vec<_> = log.iter().filter(|payload| payload.starts_with(name)).collect();
            let expected: Vec<_> = (0..150).map(|number| format!("{name}{number}")).collect();
            ensure!(own == expected.iter().collect::<Vec<_>>(), "{own:?}");
        }
        Ok(())
    });
}

#[test]
fn a_batch_under_a_key_is_stored_once_through_restarts() {
    scenario(WITHIN, async |lab| {
        let mut server = lab.server().await?;
        admin::create_topic(&raw::connect(&server.url()).await?, TOPIC).await?;
        let publish = async |url: String, messages: &[&str], expected_head| {
            let request = PublishRequest {
                topic: TOPIC.into(),
                messages: messages.iter().map(|text| raw::message((*text).to_owned())).collect(),
                atomic: Some(AtomicBatch { expected_head, idempotency_key: "k".into() }),
            };
            let answer = raw::publisher(&raw::connect(&url).await?).publish(request).await;
            Ok::<_, anyhow::Error>(answer?.into_inner().results)
        };
        let stored = |results: &[v1::PublishResult]| -> Vec<(u64, bool)> {
            let outcomes = results.iter().filter_map(|result| result.outcome.as_ref());
            let stored = outcomes.filter_map(|outcome| match outcome {
                publish_result::Outcome::Stored(stored) => {
                    Some((stored.sequence, stored.duplicate))
                }
                publish_result::Outcome::Refused(_) => None,
            });
            stored.collect()
        };
        let first = publish(server.url(), &["a", "b"], Some(0)).await?;
        ensure!(stored(&first) == [(1, false), (2, false)], "{first:?}");
        for _ in 0..2 {
            let again = publish(server.url(), &["a", "b"], Some(0)).await?;
            ensure!(stored(&again) == [(1, true), (2, true)], "{again:?}");
            let other = publish(server.url(), &["a", "c"], None).await?;
            ensure!(stored(&other).is_empty() && other.len() == 2, "{other:?}");
            server.kill().await?;
            server.start_again().await?;
        }
        ensure!(log(&server.url()).await? == ["a", "b"]);
        Ok(())
    });
}

#[test]
fn a_batch_that_is_too_large_is_refused_by_name_and_harms_nobody() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let client = app::client(&server.url())?;
        client.admin().create_topic(TOPIC, TopicConfig::new()).await?;
        let publisher = app::publisher(&client, TOPIC).await?;
        let large = vec![0_u8; 900_000];
        for batch in [vec![Vec::new(); 1001], vec![large.clone(); 5], Vec::new()] {
            let error = publisher.publish_batch(batch).await.err().context("no error")?;
            let is_size = matches!(error.kind(), PublishErrorKind::BatchSize { .. });
            ensure!(is_size && error.outcome() == Outcome::NotPersisted, "{error}");
        }
        let receipts = publisher.publish_batch(vec![Vec::new(); 1000]).await?;
        ensure!(receipts.len() == 1000 && receipts[999].id.sequence == 1000);
        publisher.publish_batch(vec![large; 4]).await?;
        // The server has the same bounds, for those who have no SDK.
        let channel = raw::connect(&server.url()).await?;
        let request = PublishRequest {
            topic: TOPIC.into(),
            messages: vec![raw::message(""); 1001],
            atomic: Some(AtomicBatch::default()),
        };
        let answer = raw::publisher(&channel).publish(request).await;
        ensure!(raw::refusal(answer)? == "INVALID_ARGUMENT");
        let keyed = v1::Message { idempotency_key: "k".into(), ..raw::message("") };
        let request = PublishRequest {
            topic: TOPIC.into(),
            messages: vec![raw::message(""), keyed],
            atomic: Some(AtomicBatch::default()),
        };
        let answer = raw::publisher(&channel).publish(request).await;
        ensure!(raw::publish_refusal(answer)? == "INVALID_ARGUMENT");
        ensure!(admin::topic(&channel, TOPIC).await?.head == 1004);
        app::shutdown(client).await
    });
}
