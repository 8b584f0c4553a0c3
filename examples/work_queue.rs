//! A work queue: several workers share one subscription, each job goes to one of them, and a job
//! that fails holds up nobody. Workers come and go while it runs.
//!
//! ```text
//! cargo run --release --example work_queue
//! ```

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use pubsub_client::{
    Client, Drain, Message, ReceivedMessage, Stopper, SubscriptionKind, TopicConfig,
};
use pubsub_server::{Config, Server};
use tokio::task::JoinSet;

const JOBS: usize = 20_000;

/// How often each job was done, and how many each worker has done.
#[derive(Default)]
struct Done {
    jobs: BTreeMap<u64, u32>,
    workers: BTreeMap<usize, u32>,
    failures: u32,
}

type Shared = Arc<Mutex<Done>>;

#[tokio::main]
async fn main() -> Result<()> {
    let server = Server::start(Config::in_memory()).await?;
    let client = Client::connect(server.url()).await?;
    client.admin().create_topic("jobs", TopicConfig::new()).await?;
    let (mut tasks, done) = (JoinSet::new(), Shared::default());
    let mut workers = Vec::new();
    for number in 1..=3 {
        workers.push(worker(number, &client, &done, &mut tasks).await?);
    }

    let publisher = client.publisher("jobs").open().await?;
    for job in 0..JOBS {
        drop(publisher.enqueue(Message::new(job.to_string())).await?);
    }
    publisher.flush().await?;
    // One leaves: what it has and has not finished goes to the others. Another one comes.
    let report = workers.remove(0).stop(Drain::Finish, Duration::from_secs(5)).await;
    println!("worker 1 has left: {report:?}");
    workers.push(worker(4, &client, &done, &mut tasks).await?);

    while done.lock().unwrap_or_else(PoisonError::into_inner).jobs.len() < JOBS {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    for worker in workers {
        worker.stop(Drain::Finish, Duration::from_secs(5)).await;
    }
    server.stop().await?;
    let done = done.lock().unwrap_or_else(PoisonError::into_inner);
    let twice = done.jobs.values().filter(|times| **times > 1).count();
    println!("{JOBS} jobs done, {twice} of them twice; {} had failed before", done.failures);
    println!("jobs by worker: {:?}", done.workers);
    Ok(())
}

async fn worker(
    number: usize,
    client: &Client,
    done: &Shared,
    tasks: &mut JoinSet<Result<(), pubsub_client::SubscribeError>>,
) -> Result<Stopper> {
    let subscriber = client.subscriber("work").topic("jobs").kind(SubscriptionKind::Shared);
    // A small credit keeps jobs where another worker can still get them.
    let subscriber = subscriber.max_outstanding_messages(100).open().await?;
    let (stopper, done) = (subscriber.stopper(), Arc::clone(done));
    tasks.spawn(subscriber.run(16, move |job| do_it(number, job, Arc::clone(&done))));
    Ok(stopper)
}

/// Every hundredth job fails when it is tried first; it comes again after a second.
async fn do_it(worker: usize, job: ReceivedMessage, done: Shared) -> Result<(), String> {
    let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
    if job.id.sequence.is_multiple_of(100) && job.attempt == 1 {
        done.failures += 1;
        return Err("no luck".to_owned());
    }
    *done.jobs.entry(job.id.sequence).or_default() += 1;
    *done.workers.entry(worker).or_default() += 1;
    Ok(())
}
