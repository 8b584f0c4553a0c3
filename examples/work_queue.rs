//! A work queue: several workers share one subscription, each job goes to one of them, and a job
//! that fails holds up nobody. The workers are processes that are killed at random; each job takes
//! effect exactly once, because its id is written in the transaction of the effect.
//!
//! ```text
//! cargo run --release --example work_queue
//! ```

use std::hash::{BuildHasher as _, RandomState};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use pubsub_client::{Client, Nack, ReceivedMessage, Start, SubscriptionKind, TopicConfig};
use pubsub_server::{Config, Server};
use rusqlite::{Connection, params};
use tokio::process::{Child, Command};

const JOBS: u64 = 20_000;
const WORKERS: usize = 4;

#[tokio::main]
async fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [url, database, name] = &args[..] {
        return work(url, Path::new(database), name).await;
    }
    let directory = tempfile::tempdir()?;
    let server = Server::start(Config::at(directory.path().join("data"))).await?;
    let client = Client::connect(server.url()).await?;
    client.admin().create_topic("jobs", TopicConfig::new()).await?;
    let path = directory.path().join("done.db");
    let database = Connection::open(&path)?;
    database.execute_batch(
        "PRAGMA journal_mode = WAL;
         CREATE TABLE inbox (id TEXT PRIMARY KEY);
         CREATE TABLE effects (job TEXT, worker TEXT);",
    )?;
    let start = |number: usize| -> Result<Child> {
        let mut worker = Command::new(std::env::current_exe()?);
        worker.args([server.url().as_ref(), path.as_os_str()]).arg(format!("worker-{number}"));
        Ok(worker.kill_on_drop(true).spawn()?)
    };
    let mut workers: Vec<Child> = (0..WORKERS).map(start).collect::<Result<_>>()?;

    let publisher = client.publisher("jobs").open().await?;
    let mut killed = 0;
    for job in 0..JOBS {
        drop(publisher.enqueue(job.to_string()).await?);
        if job % 1_000 == 999 {
            // A process of the same name takes over what the killed one had.
            let victim = killed % WORKERS;
            tokio::time::sleep(Duration::from_millis(RandomState::new().hash_one(job) % 200)).await;
            workers[victim].kill().await?;
            workers[victim] = start(victim)?;
            killed += 1;
        }
    }
    publisher.flush().await?;
    loop {
        let positions = client.admin().subscription("work").await?.positions;
        if positions.iter().all(|position| position.head == JOBS && position.backlog == 0) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    drop(workers);
    let count = |what: &str| -> Result<u64> {
        let query = format!("SELECT count({what}) FROM effects");
        let count: i64 = database.query_row(&query, [], |row| row.get(0))?;
        Ok(count.unsigned_abs())
    };
    let (effects, jobs, by) = (count("*")?, count("DISTINCT job")?, count("DISTINCT worker")?);
    println!("{WORKERS} workers were killed {killed} times; {by} have worked");
    println!(
        "RESULT jobs={JOBS} effects={effects} missing={} repeated={}",
        JOBS - jobs,
        effects - jobs
    );
    ensure!(killed >= 10 && (effects, jobs) == (JOBS, JOBS), "not exactly once");
    Ok(server.stop().await?)
}

async fn work(url: &str, path: &Path, name: &str) -> Result<()> {
    let mut database = Connection::open(path)?;
    database.busy_timeout(Duration::from_secs(30))?;
    // A killed process loses nothing by this; a machine without power would.
    database.pragma_update(None, "synchronous", "NORMAL")?;
    let client = Client::connect(url).await?;
    let subscriber = client.subscriber("work").topic("jobs").start(Start::Earliest);
    // A small credit keeps jobs where another worker can still get them.
    let subscriber = subscriber.kind(SubscriptionKind::Shared).max_outstanding_messages(50);
    let mut subscriber = subscriber.consumer_id(name).open().await?;
    loop {
        let event = subscriber.next().await.context("the subscriber ended")??;
        let job = event.into_message().context("not a message")?;
        // Every hundredth fails when it is tried first; it comes again while others go on.
        if job.id.sequence.is_multiple_of(100) && job.attempt == 1 {
            job.nack(Nack::backoff().because("no luck"));
        } else {
            do_it(&mut database, &job, name)?;
            job.ack();
        }
    }
}

/// The effect and the id, in one transaction: a job that was done already is passed over.
fn do_it(database: &mut Connection, job: &ReceivedMessage, worker: &str) -> Result<()> {
    let transaction =
        database.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
    let id = params![job.id.to_string()];
    if transaction.execute("INSERT INTO inbox VALUES (?1) ON CONFLICT DO NOTHING", id)? == 1 {
        let payload = std::str::from_utf8(&job.payload)?;
        transaction.execute("INSERT INTO effects VALUES (?1, ?2)", params![payload, worker])?;
    }
    Ok(transaction.commit()?)
}
