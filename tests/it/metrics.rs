//! What a server counts, as Prometheus sees it.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use pubsub_client::{
    CreateSubscription, DeadLetters, Event as Item, FailurePolicy, Nack, Start, TopicConfig,
};
use pubsub_tests::{lab::scenario, process::Server, wait};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::app::{self, SOON};

const WITHIN: Duration = Duration::from_secs(120);

/// A request as simple as can be; the head and the body of the answer.
async fn get(address: &str, path: &str) -> Result<(String, String)> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: test\r\n\r\n").as_bytes()).await?;
    let mut answer = String::new();
    wait::soon("the answer", SOON, stream.read_to_string(&mut answer)).await??;
    let (head, body) = answer.split_once("\r\n\r\n").context("no body")?;
    Ok((head.to_owned(), body.to_owned()))
}

#[test]
fn gaps_and_dead_letters_are_counted_and_topics_are_measured() {
    scenario(WITHIN, async |lab| {
        let variables = [("PUBSUB_METRICS", "127.0.0.1:0")];
        let server = Server::start_with(&lab.path("data"), &variables, lab.log()).await?;
        let address = server.log().after("metrics are at http://").context("no address")?;
        let address = address.strip_suffix("/metrics").context("no path")?;
        let client = app::client(&server.url())?;
        let admin = client.admin();
        for topic in ["jobs", "jobs-dead"] {
            admin.create_topic(topic, TopicConfig::new()).await?;
        }
        let from = CreateSubscription::to(["jobs"])
            .with_start(Start::Earliest)
            .with_on_failure(FailurePolicy::dead_letter("jobs-dead").after(1));
        admin.create_subscription("work", from).await?;
        app::publish_numbers(&app::publisher(&client, "jobs").await?, 0..10).await?;
        admin.purge_topic("jobs", Some(4)).await?;
        let mut subscriber = client.subscriber("work").open().await?;
        let item = wait::soon("the gap", SOON, subscriber.next()).await?;
        ensure!(matches!(item.context("the end")??, Item::Gap(_)));
        app::next(&mut subscriber).await?.nack(Nack::for_good());
        app::next(&mut subscriber).await?.ack_confirmed().await?;
        admin.redrive("work", DeadLetters::Oldest(1)).await?;

        let wanted = [
            "pubsub_missed_messages_total{reason=\"purged\"} 3",
            "pubsub_missed_messages_total{reason=\"retention\"} 0",
            "pubsub_dead_letters_total 1",
            "pubsub_skipped_messages_total 0",
            "pubsub_redriven_messages_total 1",
            "pubsub_topic_messages{topic=\"jobs\"} 8",
            "pubsub_topic_published_messages_total{topic=\"jobs\"} 11",
            // Five that were not acked yet, and the one that came back.
            "pubsub_subscription_behind_messages{topic=\"jobs\",subscription=\"work\"} 6",
            "# EOF",
        ];
        wait::until_ok("the metrics", SOON, async || {
            let (head, body) = get(address, "/metrics").await?;
            ensure!(head.starts_with("HTTP/1.1 200 "), "{head}");
            ensure!(head.contains("openmetrics-text"), "{head}");
            for line in wanted {
                ensure!(body.lines().any(|found| found == line), "no {line:?} in\n{body}");
            }
            Ok(())
        })
        .await?;
        let (head, body) = get(address, "/").await?;
        ensure!(head.starts_with("HTTP/1.1 404 ") && body.contains("/metrics"), "{head} {body}");
        app::shutdown(client).await
    });
}
