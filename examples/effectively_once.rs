//! Each message takes effect once, although the consumer crashes at the worst moment: between
//! its own commit and its ack.
//!
//! The server shows such a message again, as it must. The recipe is an inbox: the message's id is
//! written in the same transaction as the effect, and what is there already is skipped. Here the
//! database is a redb file; in SQL the inbox is a table with a unique column.
//!
//! ```text
//! cargo run --release --example effectively_once
//! ```

use std::time::Duration;

use anyhow::{Context as _, Result};
use pubsub_client::{Client, Drain, ReceivedMessage, Start, TopicConfig};
use pubsub_server::{Config, Server};
use redb::{Database, ReadableDatabase as _, ReadableTable as _, TableDefinition};

/// The messages that have taken effect; those below the subscription's floor may be removed.
const INBOX: TableDefinition<&str, ()> = TableDefinition::new("inbox");
const ACCOUNTS: TableDefinition<&str, u64> = TableDefinition::new("accounts");

#[tokio::main]
async fn main() -> Result<()> {
    let server = Server::start(Config::in_memory()).await?;
    let client = Client::connect(server.url()).await?;
    client.admin().create_topic("deposits", TopicConfig::new()).await?;
    let publisher = client.publisher("deposits").open().await?;
    for _ in 0..10 {
        publisher.publish("100").await?;
    }

    let directory = tempfile::tempdir()?;
    let database = Database::create(directory.path().join("bank.redb"))?;
    println!("first process, which dies before its acks:");
    consume(&server.url(), &database, 6, false).await?;
    println!("second process:");
    consume(&server.url(), &database, 10, true).await?;

    let accounts = database.begin_read()?.open_table(ACCOUNTS)?;
    let balance = accounts.get("savings")?.context("no account")?.value();
    println!("10 deposits of 100 make {balance}");
    assert_eq!(balance, 1000, "each deposit counts once");
    server.stop().await?;
    Ok(())
}

async fn consume(url: &str, database: &Database, count: usize, acks: bool) -> Result<()> {
    let client = Client::connect(url).await?;
    let subscriber = client.subscriber("bank").topic("deposits").start(Start::Earliest);
    let mut subscriber = subscriber.open().await?;
    let mut unacked = Vec::new();
    for _ in 0..count {
        let event = subscriber.next().await.context("the subscriber ended")??;
        let delivery = event.into_message().context("not a message")?;
        let new = deposit(database, &delivery)?;
        println!("  {}: {}", delivery.id, if new { "deposited" } else { "was deposited before" });
        if acks { delivery.ack() } else { unacked.push(delivery) }
    }
    // Waits until the acks are confirmed, and gives back the rest, as the process's end would.
    subscriber.stopper().stop(Drain::Release, Duration::from_secs(5)).await;
    Ok(())
}

/// The effect and the inbox, in one transaction. Says whether the message was new.
fn deposit(database: &Database, message: &ReceivedMessage) -> Result<bool> {
    let amount: u64 = std::str::from_utf8(&message.payload)?.parse()?;
    let transaction = database.begin_write()?;
    if transaction.open_table(INBOX)?.insert(&*message.id.to_string(), ())?.is_some() {
        return Ok(false);
    }
    {
        let mut accounts = transaction.open_table(ACCOUNTS)?;
        let balance = accounts.get("savings")?.map_or(0, |balance| balance.value());
        accounts.insert("savings", balance + amount)?;
    }
    transaction.commit()?;
    Ok(true)
}
