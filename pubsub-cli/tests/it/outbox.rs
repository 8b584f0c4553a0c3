//! The file of an outbox.

use std::time::Duration;

use anyhow::Result;
use pubsub_client::{Client, Message, Outbox};
use tokio::runtime::Runtime;

use crate::harness::{Lab, json};

/// An outbox with a message that waits for its topic, and two that were set aside: items 2 and 3.
async fn fill(url: &str, file: &str) -> Result<Outbox> {
    let outbox = Client::connect(url).await?.outbox(file).open().await?;
    outbox.enqueue("orders", Message::new("1").with_idempotency_key("key")).await?;
    outbox.enqueue("orders", Message::new("2").with_idempotency_key("key")).await?;
    outbox.enqueue("orders", Message::new("3").with_idempotency_key("key")).await?;
    outbox.enqueue("nowhere", "4").await?;
    let done = |state: &pubsub_client::OutboxState| {
        state.parked.messages == 2 && state.pending.messages == 1
    };
    outbox.state().wait_for(done).await;
    Ok(outbox)
}

#[test]
fn the_file_of_an_outbox_is_shown_and_decided_about_without_a_server() -> Result<()> {
    let lab = Lab::with_orders(&[])?;
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("orders.outbox");
    let file = file.to_str().expect("a path that is text");
    let runtime = Runtime::new()?;
    let outbox = runtime.block_on(fill(lab.url(), file))?;

    let inspect = format!("outbox inspect {file}");
    let in_use = lab.run(&inspect)?.fails(4)?;
    assert!(in_use.contains("in use by another process"), "{in_use}");
    runtime.block_on(outbox.close(Duration::ZERO))?;

    let offline = format!("--server http://127.0.0.1:9 {inspect}");
    let shown = lab.run(&offline)?.succeeds()?;
    assert!(shown.contains("nowhere") && shown.contains("IDEMPOTENCY_KEY_REUSED"), "{shown}");
    let lines = json(&lab.run(&format!("{inspect} --json"))?.succeeds()?)?;
    assert_eq!(lines.len(), 3, "{lines:?}");
    assert_eq!((&lines[0]["type"], &lines[0]["messages"]), (&"topic".into(), &1.into()));
    assert_eq!((&lines[1]["item"], &lines[1]["payload"]), (&2.into(), &"2".into()));
    assert_eq!(lines[2]["fate"], "refused");
    assert_eq!(lines[2]["reason"], "IDEMPOTENCY_KEY_REUSED");

    let resent = json(&lab.run(&format!("outbox resend {file} 2 --json"))?.succeeds()?)?;
    assert_eq!((&resent[0]["item"], &resent[0]["again"]), (&2.into(), &5.into()));
    let discarded = lab.run(&format!("outbox discard {file} 3"))?.succeeds()?;
    assert_eq!(discarded, "discarded message 3\n");
    let again = lab.run(&format!("outbox discard {file} 3"))?.fails(3)?;
    assert!(again.contains("no message 3 was set aside"), "{again}");
    let lines = json(&lab.run(&format!("{inspect} --json"))?.succeeds()?)?;
    let waiting: Vec<_> = lines.iter().map(|line| &line["topic"]).collect();
    assert_eq!(waiting, ["nowhere", "orders"], "{lines:?}");

    let missing = lab.run("outbox inspect /nowhere/at.all")?.fails(3)?;
    assert!(missing.contains("there is no file"), "{missing}");
    Ok(())
}
