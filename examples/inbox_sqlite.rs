//! Each message takes effect exactly once, although the consumer is killed again and again at the
//! worst moment: between its own commit and its ack.
//!
//! The recipe needs the effect and the message's id in *one* transaction, and so in one database:
//! here SQLite, with an inbox table beside the accounts. What does not fit into a transaction, such
//! as a mail, cannot be had exactly once; for that `Subscriber::run_once` comes close.
//!
//! ```text
//! cargo run --release --example inbox_sqlite
//! ```

use std::hash::{BuildHasher as _, RandomState};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, ensure};
use pubsub_client::{Client, Drain, ReceivedMessage, Start, Subscriber, TopicConfig};
use pubsub_server::{Config, Server};
use rusqlite::{Connection, params};
use rustix::process::{Signal, getpid, kill_process};

const DEPOSITS: i64 = 300;

#[tokio::main]
async fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [url, database] = &args[..] {
        return consume(url, Path::new(database)).await;
    }
    let server = Server::start(Config::in_memory()).await?;
    let client = Client::connect(server.url()).await?;
    client.admin().create_topic("deposits", TopicConfig::new()).await?;
    let publisher = client.publisher("deposits").open().await?;
    for _ in 0..DEPOSITS {
        drop(publisher.enqueue("100").await?);
    }
    publisher.flush().await?;

    let directory = tempfile::tempdir()?;
    let path = directory.path().join("bank.db");
    let database = Connection::open(&path)?;
    database.execute_batch(
        "PRAGMA journal_mode = WAL;
         CREATE TABLE accounts (name TEXT PRIMARY KEY, balance INTEGER, deposits INTEGER);
         INSERT INTO accounts VALUES ('savings', 0, 0);
         CREATE TABLE inbox (id TEXT, published INTEGER, PRIMARY KEY (id, published));",
    )?;
    let mut killed = 0;
    loop {
        let mut consumer = tokio::process::Command::new(std::env::current_exe()?);
        let consumer = consumer.args([server.url().as_ref(), path.as_os_str()]).kill_on_drop(true);
        let status = consumer.status().await?;
        if status.success() {
            break;
        }
        ensure!(status.signal() == Some(Signal::KILL.as_raw()), "a consumer has failed: {status}");
        killed += 1;
    }
    let balance = "SELECT balance, deposits FROM accounts WHERE name = 'savings'";
    let (balance, deposits): (i64, i64) =
        database.query_row(balance, [], |row| Ok((row.get(0)?, row.get(1)?)))?;
    println!("{killed} consumers were killed between their commit and their ack");
    println!("{DEPOSITS} deposits of 100 took effect {deposits} times and make {balance}");
    ensure!(killed > 0, "nobody was killed: nothing is proven");
    ensure!(deposits == DEPOSITS && balance == 100 * DEPOSITS, "not exactly once");
    Ok(server.stop().await?)
}

async fn consume(url: &str, path: &Path) -> Result<()> {
    let mut database = Connection::open(path)?;
    database.busy_timeout(Duration::from_secs(5))?;
    let client = Client::connect(url).await?;
    let subscriber = client.subscriber("bank").topic("deposits").start(Start::Earliest);
    let mut subscriber: Subscriber = subscriber.open().await?;
    loop {
        let event = subscriber.next().await.context("the subscriber ended")??;
        let delivery = event.into_message().context("not a message")?;
        let new = deposit(&mut database, &delivery)?;
        // The worst moment.
        if new && RandomState::new().hash_one(()).is_multiple_of(20) {
            kill_process(getpid(), Signal::KILL)?;
        }
        let last = delivery.id.sequence == DEPOSITS.unsigned_abs();
        delivery.ack();
        if last {
            subscriber.stopper().stop(Drain::Finish, Duration::from_secs(5)).await;
            return Ok(());
        }
    }
}

/// The effect and the id, in one transaction. An id alone would do, were it not for a server that is
/// restored from an older copy: it gives ids again, to messages that are published later. Says
/// whether the message was new.
fn deposit(database: &mut Connection, message: &ReceivedMessage) -> Result<bool> {
    let published = message.publish_time.duration_since(SystemTime::UNIX_EPOCH)?.as_millis();
    let amount: i64 = std::str::from_utf8(&message.payload)?.parse()?;
    let transaction = database.transaction()?;
    let new = transaction.execute(
        "INSERT INTO inbox VALUES (?1, ?2) ON CONFLICT DO NOTHING",
        params![message.id.to_string(), i64::try_from(published)?],
    )?;
    if new == 1 {
        let deposit = "UPDATE accounts SET balance = balance + ?1, deposits = deposits + 1";
        transaction.execute(deposit, [amount])?;
    }
    transaction.commit()?;
    Ok(new == 1)
}
