//! Values instead of bytes: a codec on both sides, and what happens to a payload that is no
//! such value.
//!
//! ```text
//! cargo run --release --example typed_payload
//! ```

use anyhow::{Context as _, Result};
use pubsub_client::{Client, Json, SubscribeError, TopicConfig};
use pubsub_server::{Config, Server};
use serde::{Deserialize, Serialize};

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Order {
    id: u64,
    item: String,
    quantity: u32,
}

#[tokio::main]
async fn main() -> Result<()> {
    let server = Server::start(Config::in_memory()).await?;
    let client = Client::connect(server.url()).await?;
    client.admin().create_topic("orders", TopicConfig::new()).await?;
    let subscriber = client.subscriber("shop").topic("orders").open().await?;
    // A codec is a value, not a trait of the type: any type can have any codec.
    let mut orders = subscriber.typed::<Order, _>(Json);

    let plain = client.publisher("orders").open().await?;
    let publisher = plain.typed(Json);
    let order = Order { id: 1, item: "tea".to_owned(), quantity: 2 };
    publisher.publish(&order).await?;

    // Attributes and keys go on the message that a value makes.
    let order = Order { id: 2, item: "coffee".to_owned(), quantity: 1 };
    let message = publisher.message(&order)?.with_attribute("region", "eu");
    plain.publish(message).await?;

    // Somebody publishes something else.
    plain.publish("{\"id\": \"three\"}").await?;
    let order = Order { id: 4, item: "milk".to_owned(), quantity: 1 };
    publisher.publish(&order).await?;

    for _ in 0..4 {
        match orders.next().await.context("the subscriber ended")? {
            Ok(event) => {
                let order = event.into_message().context("not a message")?;
                let content_type = order.delivery.content_type.as_deref().unwrap_or("-");
                println!("{content_type}: {:?} {:?}", order.payload, order.delivery.attributes);
                order.ack();
            }
            // The stream goes on. The message is still there, and this is the place to decide:
            // ack it away, put it aside, or nack it to stop the topic until someone has looked.
            Err(SubscribeError::Decode { delivery, source }) => {
                println!("not an order: {source}; the payload was {:?}", delivery.payload);
                delivery.ack();
            }
            Err(error) => return Err(error.into()),
        }
    }
    server.stop().await?;
    Ok(())
}
