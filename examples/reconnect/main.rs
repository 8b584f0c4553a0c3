//! What a subscriber and its publishers notice of a server that is killed, frozen and cut off
//! under load: nothing.
//!
//! ```text
//! cargo run --release --example reconnect
//! ```
//!
//! Publishes 30,000 messages to 3 topics, which one durable subscription consumes and acks, all
//! through a proxy. Meanwhile it kills the server with SIGKILL 4 times, cuts all connections 10
//! times and freezes the server once, always with messages in flight in both directions. Then
//! an auditor that knows nothing of the SDK compares the log and the receipts on the server with
//! what was published and what was shown. Takes about half a minute; exits with 0 only if
//! nothing was lost, shown twice or out of order.

mod audit;
mod consumer;
mod faults;
mod proxy;
mod publishers;
mod report;
mod server;
mod tally;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use pubsub_client::{Client, RetryPolicy, Start, Subscriber, TopicConfig};
use tokio::signal::unix::{SignalKind, signal};

use crate::consumer::Consumer;
use crate::faults::Faults;
use crate::proxy::Proxy;
use crate::publishers::Publishers;
use crate::report::Report;
use crate::server::ServerProcess;
use crate::tally::{Progress, Tally};

const TOPICS: [&str; 3] = ["orders", "payments", "shipments"];
const MESSAGES: u64 = 30_000;
const SUBSCRIPTION: &str = "warehouse";

/// How long the rest may take after the last fault.
const TAIL: Duration = Duration::from_secs(30);

#[tokio::main]
async fn main() -> ExitCode {
    if let Some(directory) = server::directory_to_serve() {
        return server::serve(&directory).await;
    }
    match run_or_interrupt().await {
        Ok(report) => {
            println!("{report}");
            if report.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            println!("\nVOID: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whatever happens, the server does not outlive this, and its directory is removed.
async fn run_or_interrupt() -> Result<Report> {
    let directory = tempfile::tempdir()?;
    server::clean_up_on_panic(directory.path().to_owned());
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        report = Box::pin(run(directory.path())) => report,
        _ = tokio::signal::ctrl_c() => anyhow::bail!("interrupted"),
        _ = terminate.recv() => anyhow::bail!("terminated"),
    }
}

async fn run(directory: &Path) -> Result<Report> {
    let mut server = ServerProcess::start(directory).await?;
    let proxy = Proxy::start(server.address()).await?;
    let client = connect(&proxy).await?;
    for topic in TOPICS {
        client.admin().create_topic(topic, TopicConfig::new()).await?;
    }
    let subscriber = subscribe(&client).await?;

    let tally = Arc::new(Tally::new());
    let progress = Progress::show(&tally);
    let publishers = Publishers::start(&client, &tally).await?;
    let mut faults = Faults::new(&tally, &proxy, &publishers, &subscriber);
    let consumer = Consumer::start(subscriber, &tally);

    faults.inject(&mut server).await?;

    let published = publishers.finish(TAIL).await?;
    let shown = consumer.finish(TAIL).await?;
    drop(progress);
    let left = client.shutdown(Duration::from_secs(5)).await;
    ensure!(left.is_clean(), "the client did not end cleanly: {left:?}");

    println!("\nauditing the log and {MESSAGES} receipts without the SDK ...");
    let audit = audit::run(server.address()).await?;
    let again = shown_to_a_new_consumer(&server).await?;
    server.kill().await?;
    Ok(Report::new(&tally, &published, &shown, &audit, again))
}

/// All defaults, except that a silent server is noticed after 2.5 s, not 25 s.
async fn connect(proxy: &Proxy) -> Result<Client> {
    let retry = RetryPolicy::new(Duration::from_millis(50), Duration::from_secs(1));
    Ok(Client::builder(proxy.url()).fast().retry(retry).connect().await?)
}

async fn subscribe(client: &Client) -> Result<Subscriber> {
    let builder = client.subscriber(SUBSCRIPTION).topics(TOPICS).start(Start::Earliest);
    Ok(builder.open().await?)
}

/// Everything is acked, so a consumer that comes later has nothing to do.
async fn shown_to_a_new_consumer(server: &ServerProcess) -> Result<u64> {
    /// Three heartbeats: a message that is owed would have come long ago.
    const PATIENCE: Duration = Duration::from_secs(3);
    let client = Client::builder(server.url()).fast().connect().await?;
    let mut subscriber = client.subscriber(SUBSCRIPTION).must_exist().open().await?;
    let mut shown = 0;
    while let Ok(event) = tokio::time::timeout(PATIENCE, subscriber.next()).await {
        event.context("the new consumer ended")??;
        shown += 1;
    }
    Ok(shown)
}
