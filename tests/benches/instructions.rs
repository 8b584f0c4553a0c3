//! How many instructions a message costs, from the application through SDK, wire, server and log,
//! and back: on one thread, so that nothing else counts, and nothing is left to chance.
//!
//! ```text
//! cargo bench -p pubsub-tests --bench instructions                 compares with instructions.json
//! cargo bench -p pubsub-tests --bench instructions -- --update     writes it
//! cargo bench -p pubsub-tests --bench instructions --profile dev   the quick form: nothing is built
//! ```
//!
//! It runs itself in valgrind, each path with two numbers of messages: what their difference costs
//! does not depend on how long it takes to get going. Times are not looked at.

#![allow(clippy::print_stdout, reason = "it is a program")]

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use pubsub_client::{Client, Event, Publisher, Start, Subscriber};
use pubsub_server::env::System;
use pubsub_server::names::TopicName;
use pubsub_server::record::{Epoch, NewMessage, TopicConfig};
use pubsub_server::storage::redb::{Options, Redb};
use pubsub_server::storage::{Append, Item, Storage as _};
use pubsub_server::{Config, Server};

/// What is measured.
const PATHS: [&str; 4] = ["publish", "receive", "reconnect", "commit"];
/// Fewer and more messages: few where each costs a lot.
const COUNTS: [u64; 2] = if cfg!(debug_assertions) { [2_000, 6_000] } else { [10_000, 30_000] };
const PROFILE: &str = if cfg!(debug_assertions) { "dev" } else { "release" };
/// A path may cost so much more than it did, in parts of it: compilers differ, and batches are cut
/// a little differently each time.
const TOLERANCE: f64 = 0.10;
const PAYLOAD: &[u8] = &[7; 100];

fn main() -> Result<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["run", path, count] => run(path, count.parse()?).map(|()| ExitCode::SUCCESS),
        [] => compare(),
        ["--update"] => update().map(|()| ExitCode::SUCCESS),
        other => bail!("expected nothing or --update, not {other:?}"),
    }
}

type Costs = BTreeMap<String, f64>;
type Profiles = BTreeMap<String, Costs>;

fn baseline() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/instructions.json")
}

fn compare() -> Result<ExitCode> {
    let profiles: Profiles = serde_json::from_slice(&std::fs::read(baseline())?)?;
    let known = profiles.get(PROFILE).with_context(|| format!("{PROFILE} is not known"))?;
    let mut worse = false;
    for (path, cost) in costs()? {
        let before = known.get(&path).copied().with_context(|| format!("{path} is not known"))?;
        let change = cost / before - 1.0;
        let verdict = match change {
            change if change > TOLERANCE => "WORSE",
            change if change < -TOLERANCE => "better: say so with --update",
            _ => "as it was",
        };
        worse |= change > TOLERANCE;
        println!(
            "{path:10} {cost:8.0} instructions a message, {:+.1} %: {verdict}",
            change * 100.0
        );
    }
    Ok(if worse { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn update() -> Result<()> {
    let costs: Costs = costs()?.into_iter().map(|(path, cost)| (path, cost.round())).collect();
    println!("{costs:#?}");
    let mut profiles: Profiles = serde_json::from_slice(&std::fs::read(baseline())?)?;
    profiles.insert(PROFILE.to_owned(), costs);
    Ok(std::fs::write(baseline(), format!("{}\n", serde_json::to_string_pretty(&profiles)?))?)
}

/// What each path costs for one message.
fn costs() -> Result<Costs> {
    let mut costs = Costs::new();
    for path in PATHS {
        let [fewer, more] = COUNTS;
        let cost = (instructions(path, more)? - instructions(path, fewer)?) / (more - fewer) as f64;
        // What is received has to be published first.
        let published = costs.get("publish").copied().filter(|_| path == "receive");
        costs.insert(path.to_owned(), cost - published.unwrap_or_default());
    }
    Ok(costs)
}

/// How many instructions it takes in all.
fn instructions(path: &str, count: u64) -> Result<f64> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(std::env::current_exe()?)
        .args(["run", path, &count.to_string()])
        .output()
        .context("valgrind is needed: apt-get install valgrind")?;
    let text = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        bail!("{path} fails: {text}");
    }
    let collected = text.lines().find_map(|line| line.split_once("Collected : "));
    let (_, collected) = collected.with_context(|| format!("valgrind does not tell: {text}"))?;
    Ok(collected.trim().parse()?)
}

fn run(path: &str, count: u64) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        match path {
            "publish" => publish_and_receive(count, 0).await,
            "receive" => publish_and_receive(count, count).await,
            "reconnect" => reconnect(count).await,
            "commit" => commit(count).await,
            other => bail!("there is no path {other}"),
        }
    })
}

/// A server in memory, and a client, on this thread.
async fn pair() -> Result<(Server, Client, Publisher)> {
    let server = Server::start(Config::in_memory()).await?;
    let client = Client::connect(server.url()).await?;
    client.admin().create_topic("t", pubsub_client::TopicConfig::new()).await?;
    let publisher = client.publisher("t").open().await?;
    Ok((server, client, publisher))
}

async fn publish_and_receive(published: u64, received: u64) -> Result<()> {
    let (_server, client, publisher) = pair().await?;
    publish(&publisher, published).await?;
    if received > 0 {
        let subscriber = client.subscriber("s").topic("t").start(Start::Earliest);
        receive(&mut subscriber.open().await?, received).await?;
    }
    Ok(())
}

async fn publish(publisher: &Publisher, count: u64) -> Result<()> {
    let mut tickets = VecDeque::new();
    for _ in 0..count {
        tickets.push_back(publisher.enqueue(Bytes::from_static(PAYLOAD)).await?);
        if tickets.len() >= 4_096 {
            tickets.pop_front().context("it is not empty")?.await?;
        }
    }
    for ticket in tickets {
        ticket.await?;
    }
    Ok(())
}

/// Receives and acks so many; the last ack is waited for.
async fn receive(subscriber: &mut Subscriber, count: u64) -> Result<()> {
    for number in 1..=count {
        let event = subscriber.next().await.context("it ended")??;
        let Event::Message(delivery) = event else { bail!("no message: {event:?}") };
        if number < count {
            delivery.ack();
        } else {
            delivery.ack_confirmed().await?;
        }
    }
    Ok(())
}

/// A subscriber that comes again and again with messages in hand that are not acked.
async fn reconnect(count: u64) -> Result<()> {
    const HELD: u64 = 500;
    let (_server, client, publisher) = pair().await?;
    publish(&publisher, HELD).await?;
    for _ in 0..count / HELD {
        let subscriber = client.subscriber("s").topic("t").start(Start::Earliest);
        let mut subscriber = subscriber.open().await?;
        let mut held = Vec::new();
        for _ in 0..HELD {
            held.push(subscriber.next().await.context("it ended")??);
        }
        drop(held);
        let stopper = subscriber.stopper();
        stopper.stop(pubsub_client::Drain::Release, std::time::Duration::from_secs(5)).await;
    }
    Ok(())
}

/// Commits of 500 messages to redb, without threads.
async fn commit(count: u64) -> Result<()> {
    const GROUP: u64 = 500;
    let directory = tempfile::tempdir()?;
    let options = Options { inline: true, ..Options::new(directory.path(), Arc::new(System)) };
    let storage = Redb::open(options)?;
    let topic = Epoch(7);
    let record = pubsub_server::record::TopicRecord {
        epoch: topic,
        name: TopicName::parse("t")?,
        created_at: pubsub_server::record::Timestamp(1),
        config: TopicConfig::default(),
        purged: 0,
    };
    let created = vec![pubsub_server::storage::Change::CreateTopic(record)];
    storage.apply(created, pubsub_server::storage::Urgency::Now).await?.into_inner();
    let body = Bytes::from_static(PAYLOAD);
    let message = NewMessage { body, recipients: Vec::new(), key: None };
    for _ in 0..count / GROUP {
        let items = (0..GROUP).map(|_| Item::Store(message.clone())).collect();
        let append = Append {
            topic,
            publisher: None,
            first_sequence: 1,
            resolved_below: 0,
            items,
            atomic: None,
            room: None,
        };
        if let Err(refusal) = storage.append(append).await?.into_inner() {
            bail!("it is refused: {refusal:?}");
        }
    }
    Ok(())
}
