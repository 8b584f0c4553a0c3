//! A release has processed some orders wrongly: take a snapshot before it, and go back to it
//! afterwards. The consumer stays connected and follows; what was done before is not shown again.
//!
//! ```text
//! cargo run --release --example seek_replay
//! ```

use anyhow::{Context as _, Result, ensure};
use pubsub_client::{Client, Start, Subscriber, TopicConfig};
use pubsub_server::{Config, Server};

#[tokio::main]
async fn main() -> Result<()> {
    let server = Server::start(Config::in_memory()).await?;
    let client = Client::connect(server.url()).await?;
    let admin = client.admin();
    admin.create_topic("orders", TopicConfig::new()).await?;
    let mut billing = client.subscriber("billing").topic("orders").open().await?;
    let publisher = client.publisher("orders").open().await?;
    for order in 1..=3 {
        publisher.publish(format!("order {order}")).await?;
    }
    println!("before the release: {:?}", process(&mut billing, 3).await?);

    admin.create_snapshot("before-release", "billing").await?;
    for order in 4..=6 {
        publisher.publish(format!("order {order}")).await?;
    }
    println!("by the bad release: {:?}", process(&mut billing, 3).await?);

    admin.seek_to_snapshot("billing", "before-release").await?;
    let again = process(&mut billing, 3).await?;
    println!("after the fix:      {again:?}");
    ensure!(again == ["order 4", "order 5", "order 6"]);

    // Or to a message, a time, or the beginning, in one topic or in all.
    admin.seek("billing", Some("orders"), Start::Sequence(2)).await?;
    let replayed = process(&mut billing, 5).await?;
    println!("from message 2 on:  {replayed:?}");
    ensure!(replayed.first().map(String::as_str) == Some("order 2"));
    admin.delete_snapshot("before-release").await?;
    drop(billing);
    Ok(server.stop().await?)
}

async fn process(subscriber: &mut Subscriber, count: usize) -> Result<Vec<String>> {
    let mut orders = Vec::new();
    while orders.len() < count {
        let event = subscriber.next().await.context("the subscriber ended")??;
        let delivery = event.into_message().context("not a message")?;
        orders.push(String::from_utf8_lossy(&delivery.payload).into_owned());
        // Confirmed, since what is next looks at what the server knows.
        delivery.ack_confirmed().await?;
    }
    Ok(orders)
}
