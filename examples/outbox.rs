//! Messages that are published although the server is away when they are made, and although the
//! process that made them is killed before it could send them.
//!
//! They go to a local file first. Whatever process opens the file next goes on with what is left,
//! under the same identities, so that nothing is stored twice.
//!
//! ```text
//! cargo run --release --example outbox
//! ```

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use pubsub_client::{Client, Message, Start, TopicConfig};
use pubsub_server::{Config, Server};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::Command;
use tokio::time::{sleep, timeout};

const TOPIC: &str = "orders";

#[tokio::main]
async fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [url, file, first] = &args[..] {
        return publish(url, Path::new(file), first.parse()?).await;
    }
    let directory = tempfile::tempdir()?;
    let (data, file) = (directory.path().join("data"), directory.path().join("orders.outbox"));
    let server = Server::start(Config::at(&data)).await?;
    let (url, address) = (server.url(), server.address());
    Client::connect(&url).await?.admin().create_topic(TOPIC, TopicConfig::new()).await?;
    server.stop().await?;

    // The first of these find no server, the others do. None of them ends by itself.
    let mut taken = Vec::new();
    let mut server = None;
    for round in 1..=6 {
        if round == 3 {
            println!("the server starts");
            server = Some(Server::start(Config::at(&data).listen(address)).await?);
        }
        let before = taken.len();
        let first = taken.last().map_or(1, |last| last + 1);
        run_and_kill(&url, &file, first, Duration::from_millis(50 * round), &mut taken).await?;
        println!("publisher {round} was killed: {} orders are its", taken.len() - before);
    }

    let client = Client::connect(&url).await?;
    let outbox = client.outbox(&file).open().await?;
    println!("{} orders are left in the file", outbox.state().get().pending.messages);
    outbox.flush().await?;
    outbox.close(Duration::from_secs(5)).await?;

    let mut reader = client.reader([TOPIC]).start(Start::Earliest).open().await?;
    let mut stored: Vec<u64> = Vec::new();
    while let Ok(event) = timeout(Duration::from_secs(1), reader.next()).await {
        let message = event.context("the reader ended")??.into_message().context("a message")?;
        stored.push(std::str::from_utf8(&message.payload)?.parse()?);
    }
    println!("{} orders were taken, {} are stored", taken.len(), stored.len());
    ensure!(taken.iter().all(|order| stored.contains(order)), "an order is lost");
    ensure!(stored.is_sorted_by(|a, b| a < b), "an order is stored twice, or out of order");
    println!("each of them once, in order");
    drop(reader);
    Ok(server.context("a server")?.stop().await?)
}

/// Takes orders, and says so for each: that it is on disk. For the rest of its life.
async fn publish(url: &str, file: &Path, first: u64) -> Result<()> {
    // Does not insist on a server.
    let client = Client::builder(url).connect_lazy()?;
    let outbox = client.outbox(file).open().await?;
    for order in first.. {
        // One that was killed between these two lines has taken the order and not said so. The next
        // one takes it again: a key of the application's own makes these two the same message.
        let message =
            Message::new(order.to_string()).with_idempotency_key(format!("order-{order}"));
        outbox.enqueue(TOPIC, message).await?;
        println!("{order}");
        sleep(Duration::from_millis(1)).await;
    }
    Ok(())
}

async fn run_and_kill(
    url: &str,
    file: &Path,
    first: u64,
    after: Duration,
    taken: &mut Vec<u64>,
) -> Result<()> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg(url).arg(file).arg(first.to_string()).stdout(Stdio::piped()).kill_on_drop(true);
    let mut publisher = command.spawn()?;
    let mut lines = BufReader::new(publisher.stdout.take().context("stdout")?).lines();
    taken.push(lines.next_line().await?.context("the publisher has ended")?.parse()?);
    sleep(after).await;
    publisher.kill().await?;
    while let Some(line) = lines.next_line().await? {
        taken.push(line.parse()?);
    }
    Ok(())
}
