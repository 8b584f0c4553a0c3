//! A topic that takes orders and nothing else: what breaks the schema is refused with the place,
//! the schema grows without breaking consumers, and every message names the revision it was
//! checked with.
//!
//! ```text
//! cargo run --release --example schema
//! ```

use anyhow::{Context as _, Result, ensure};
use pubsub_client::{Client, Compatibility, Json, Reason, Schema, Start, TopicConfig};
use pubsub_server::{Config, Server};
use serde_json::json;

#[tokio::main]
async fn main() -> Result<()> {
    let server = Server::start(Config::in_memory()).await?;
    let client = Client::connect(server.url()).await?;
    let admin = client.admin();
    admin.create_topic("orders", TopicConfig::new()).await?;
    let mut order = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "required": ["id", "lines"],
        "properties": {
            "id": {"type": "integer", "minimum": 1},
            "lines": {"type": "array", "items": {
                "type": "object", "properties": {"price": {"type": "number", "minimum": 0}},
            }},
        },
    });
    let schema = |order: &serde_json::Value| Schema::json(order.to_string());

    // The first publisher brings its schema along; the others only make sure of it.
    let opening = client.publisher("orders").schema(schema(&order)).register_schema();
    let publisher = opening.open().await?.typed(Json);
    publisher.publish(&json!({"id": 1, "lines": [{"price": 12.5}]})).await?;

    let bad = json!({"id": 2, "lines": [{"price": 3}, {"price": "free"}]});
    let error = publisher.publisher().publish(bad.to_string()).await.err();
    let error = error.context("a price is a number")?;
    let violation = error.schema_violation().context("the schema is broken")?;
    ensure!(violation.field == "/lines/1/price" && !error.is_retryable(), "{error}");
    println!("refused for good: {error}");

    // More is required: consumers of the next revision could not read what there is.
    let mut stricter = order.clone();
    stricter["required"] = json!(["id", "lines", "customer"]);
    let set = admin.set_schema("orders", schema(&stricter), Compatibility::Backward).await;
    let error = set.err().context("it breaks what was promised")?;
    ensure!(error.reason() == Some(Reason::SchemaIncompatible), "{error}");
    println!("not set: {error}");

    // A new property that is not required: everything that was valid is still.
    order["properties"]["note"] = json!({"type": "string"});
    let (set, _) = admin.set_schema("orders", schema(&order), Compatibility::Backward).await?;
    println!("set: revision {}", set.revision);
    publisher.publish(&json!({"id": 3, "lines": [], "note": "by noon"})).await?;

    let mut reader = client.reader(["orders"]).start(Start::Earliest).open().await?;
    for (id, revision) in [(1, 1), (3, 2)] {
        let event = reader.next().await.context("the reader ended")??;
        let message = event.into_message().context("not a message")?;
        let order: serde_json::Value = serde_json::from_slice(&message.payload)?;
        let is_it = order["id"] == id && message.schema_revision == Some(revision);
        ensure!(is_it, "order {id} was checked with revision {revision}: {message:?}");
        println!("order {id} was checked with revision {revision}");
    }
    server.stop().await?;
    Ok(())
}
