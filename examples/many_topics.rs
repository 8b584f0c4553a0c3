//! One subscriber, many topics: a pattern, topics that join while it runs, and a handler that
//! runs for several topics at once, but for each in order.
//!
//! ```text
//! cargo run --release --example many_topics
//! ```

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use pubsub_client::{Client, Drain, TopicConfig};
use pubsub_server::{Config, Server};
use tokio::task::JoinSet;

const TOPICS: usize = 100;
const MESSAGES: u64 = 50;

#[tokio::main]
async fn main() -> Result<()> {
    let server = Server::start(Config::in_memory()).await?;
    let client = Client::connect(server.url()).await?;

    // No topic matches yet. Each joins in the step that creates it, so none of its messages is
    // missed.
    let subscriber = client.subscriber("dashboard").topic("sensors.*").open().await?;
    let stopper = subscriber.stopper();

    let seen: Arc<Mutex<BTreeMap<Arc<str>, u64>>> = Arc::default();
    let handler = {
        let seen = Arc::clone(&seen);
        move |message: pubsub_client::ReceivedMessage| {
            let seen = Arc::clone(&seen);
            async move {
                tokio::time::sleep(Duration::from_millis(1)).await;
                let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                let last = seen.entry(message.id.topic).or_default();
                assert_eq!(message.id.sequence, *last + 1, "each topic comes in its order");
                *last = message.id.sequence;
                // Returning `Ok` acks; an error or a panic would show the message again.
                Ok::<_, Infallible>(())
            }
        }
    };
    // 32 handlers at once, at most one for each topic.
    let mut tasks = JoinSet::new();
    tasks.spawn(subscriber.run(32, handler));

    for number in 0..TOPICS {
        let topic = format!("sensors.{number:03}");
        client.admin().create_topic(&topic, TopicConfig::new()).await?;
        let publisher = client.publisher(topic).open().await?;
        for value in 1..=MESSAGES {
            // Does not wait for the answer. Dropping the ticket cancels nothing, and leaves it to
            // the flush to tell a failure.
            drop(publisher.enqueue(value.to_string()).await?);
        }
        publisher.flush().await?;
    }

    let all = TOPICS as u64 * MESSAGES;
    while seen.lock().unwrap_or_else(PoisonError::into_inner).values().sum::<u64>() < all {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let report = stopper.stop(Drain::Finish, Duration::from_secs(5)).await;
    println!("{all} messages of {TOPICS} topics handled, each topic in order: {report:?}");
    tasks.join_next().await.transpose()?.transpose()?;
    server.stop().await?;
    Ok(())
}
