//! A subscriber that can be killed at any moment and goes on where it was.
//!
//! ```text
//! cargo run --release --bin pubsub-server            # in another terminal
//! cargo run --release --example resume_subscriber    # let it run, kill -9 it, run it again
//! ```
//!
//! Kill the server too, and start it again. PUBSUB_SERVER is its address.

use std::time::Duration;

use anyhow::Result;
use pubsub_client::{
    Client, ConnectionState, Event, Message, Publisher, Start, StateWatch, TopicConfig,
};
use tokio::task::JoinSet;
use tokio::time::{interval, sleep};

const TOPIC: &str = "resume-demo";

#[tokio::main]
async fn main() -> Result<()> {
    let url = std::env::var("PUBSUB_SERVER").unwrap_or_else(|_| "http://127.0.0.1:7670".to_owned());
    let client = Client::connect(url).await?;
    client.admin().ensure_topic(TOPIC, TopicConfig::new()).await?;

    // The server remembers the position under this name. The start counts only the first time.
    let subscriber = client.subscriber("resume-demo").topic(TOPIC).start(Start::Earliest);
    let mut subscriber = subscriber.open().await?;
    for topic in subscriber.position().topics {
        let waiting = topic.head - topic.acked_floor;
        println!("received up to {}, {waiting} messages wait", topic.acked_floor);
    }

    let publisher = client.publisher(TOPIC).open().await?;
    let mut tasks = JoinSet::new();
    tasks.spawn(publish(publisher));
    tasks.spawn(tell_state(subscriber.state()));

    while let Some(event) = subscriber.next().await {
        match event? {
            Event::Message(delivery) => {
                // The work. Killed here, the message comes again: it is not acked yet.
                sleep(Duration::from_millis(150)).await;
                println!(
                    "{:>6}  {}",
                    delivery.id.sequence,
                    String::from_utf8_lossy(&delivery.payload)
                );
                delivery.ack();
            }
            Event::Gap(gap) => println!("will never come: {:?}, {:?}", gap.range, gap.reason),
            Event::DataLoss(loss) => println!("damaged on the server: {}", loss.id),
            _ => {}
        }
    }
    Ok(())
}

/// Five messages in a second, so that there is something to receive.
async fn publish(publisher: Publisher) {
    let mut beat = interval(Duration::from_millis(200));
    for number in 1.. {
        beat.tick().await;
        let text = format!("message {number} of process {}", std::process::id());
        if publisher.enqueue(Message::new(text)).await.is_err() {
            return;
        }
    }
}

async fn tell_state(mut state: StateWatch) {
    while let Some(state) = state.changed().await {
        if let ConnectionState::Reconnecting { cause, .. } = &state {
            println!("        reconnecting: {cause}");
        }
    }
}
