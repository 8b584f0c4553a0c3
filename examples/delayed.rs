//! Reminders: messages that are stored now and shown later. They hold up nothing, wait on the
//! server's disk, and come in the order in which they are due.
//!
//! ```text
//! cargo run --release --example delayed
//! ```

use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, ensure};
use pubsub_client::{Client, Message, TopicConfig};
use pubsub_server::{Config, Server};

#[tokio::main]
#[expect(clippy::disallowed_methods, reason = "a program has no other clock than the system's")]
async fn main() -> Result<()> {
    let server = Server::start(Config::in_memory()).await?;
    let client = Client::connect(server.url()).await?;
    client.admin().create_topic("reminders", TopicConfig::new()).await?;
    let mut subscriber = client.subscriber("pager").topic("reminders").open().await?;
    let publisher = client.publisher("reminders").open().await?;
    let begun = SystemTime::now();
    for (text, seconds) in [("in three seconds", 3), ("in one second", 1), ("now", 0)] {
        let message = Message::new(text);
        let due = begun + Duration::from_secs(seconds);
        publisher.publish(message.with_not_before(due)).await?;
    }
    let mut shown = Vec::new();
    for _ in 0..3 {
        let event = subscriber.next().await.context("the subscriber ended")??;
        let reminder = event.into_message().context("not a message")?;
        let now = SystemTime::now();
        println!("{:4.1} s: {:?}", now.duration_since(begun)?.as_secs_f32(), reminder.payload);
        ensure!(reminder.not_before.is_some_and(|due| due <= now), "too early");
        shown.push(reminder.id.sequence);
        reminder.ack();
    }
    ensure!(shown == [3, 2, 1], "{shown:?}");
    Ok(server.stop().await?)
}
