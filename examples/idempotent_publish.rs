//! Publishing again without storing twice, also after the publisher's process has died.
//!
//! The SDK's own retries, across disconnects and server restarts, need nothing of this: they are
//! idempotent by themselves. An idempotency key is for a retry by the *application*, which knows
//! what "the same" means, and survives where the SDK's memory does not.
//!
//! ```text
//! cargo run --release --example idempotent_publish
//! ```

use anyhow::Result;
use pubsub_client::{Client, Message, Outcome, PublishReceipt, Reason, TopicConfig};
use pubsub_server::{Config, Server};

#[tokio::main]
async fn main() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let server = Server::start(Config::at(directory.path())).await?;
    let address = server.address();
    let client = Client::connect(server.url()).await?;
    client.admin().create_topic("payments", TopicConfig::new()).await?;

    let first = pay(&server.url(), "12.00").await?;
    println!("first process:   {} duplicate={}", first.id, first.duplicate);

    // It crashed before it noted that it had paid. It starts again, and pays again.
    let second = pay(&server.url(), "12.00").await?;
    println!("second process:  {} duplicate={}", second.id, second.duplicate);
    assert_eq!(second.id, first.id, "one payment, one message, one id");

    // The server remembers keys for a week, across its own restarts.
    server.stop().await?;
    let server = Server::start(Config::at(directory.path()).listen(address)).await?;
    let third = pay(&server.url(), "12.00").await?;
    println!("server restart:  {} duplicate={}", third.id, third.duplicate);
    assert_eq!(third.id, first.id, "still the same");

    // The same key with other content is a mistake, and is told.
    let publisher = client.publisher("payments").open().await?;
    let other = Message::new("99.00").with_idempotency_key("order-4711-paid");
    match publisher.publish(other).await {
        Err(error) if error.reason() == Some(Reason::IdempotencyKeyReused) => {
            assert_eq!(error.outcome(), Outcome::NotPersisted, "it is certain");
            println!("other content:   {error}");
        }
        result => anyhow::bail!("expected a conflict, not {result:?}"),
    }

    let topic = client.admin().topic("payments").await?;
    println!("messages stored: {}", topic.head);
    server.stop().await?;
    Ok(())
}

/// What a process does that does not know whether an earlier one has done it already: the key is
/// made of the business, not of the attempt.
async fn pay(url: &str, amount: &'static str) -> Result<PublishReceipt> {
    let client = Client::connect(url).await?;
    let publisher = client.publisher("payments").open().await?;
    let message = Message::new(amount).with_idempotency_key("order-4711-paid");
    Ok(publisher.publish(message).await?)
}
