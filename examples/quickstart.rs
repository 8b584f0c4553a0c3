//! The smallest round trip: a topic, a durable subscription, a publish, an ack, a receipt.
//!
//! ```text
//! cargo run --release --example quickstart
//! ```

use anyhow::{Context as _, Result};
use pubsub_client::{Client, TopicConfig};
use pubsub_server::{Config, Server};

#[tokio::main]
async fn main() -> Result<()> {
    // A server of its own, so that there is nothing to set up. Yours is `pubsub-server`.
    let server = Server::start(Config::in_memory()).await?;
    let client = Client::connect(server.url()).await?;
    client.admin().create_topic("orders", TopicConfig::new()).await?;

    // From now on the server keeps messages for `billing`, whether it is connected or not.
    let mut billing = client.subscriber("billing").topic("orders").open().await?;

    let publisher = client.publisher("orders").open().await?;
    let receipt = publisher.publish("a book").await?;
    println!("published as {}", receipt.id);

    let event = billing.next().await.context("the subscriber ended")??;
    let delivery = event.into_message().context("not a message")?;
    println!("received: {}", String::from_utf8_lossy(&delivery.payload));

    // Without an ack it would come again. `ack()` is enough; this one waits until it is durable.
    delivery.ack_confirmed().await?;

    let receipts = client.admin().receipts("orders", None, receipt.id.sequence, None).await?;
    for receipt in receipts {
        println!("receipt: {} has {:?} it", receipt.subscription, receipt.state);
    }
    server.stop().await?;
    Ok(())
}
