//! `pubsub snapshot`.

use clap::Subcommand;
use pubsub_client::Client;
use serde_json::json;

use crate::failure::{Exit, Failure};
use crate::format;
use crate::output::Output;

#[derive(Debug, Subcommand)]
pub(crate) enum Snapshot {
    /// Keep what a subscription has acked, and the messages that it has not
    #[command(after_help = "\
The messages that going back would show are kept until the snapshot is deleted.

Examples:
  pubsub snapshot create before-release billing
  pubsub subscription seek billing --snapshot before-release
  pubsub snapshot delete before-release")]
    Create {
        /// Its name, by the rules of topic names
        name: String,
        /// The subscription
        subscription: String,
    },
    /// List snapshots
    List,
    /// Delete a snapshot; the messages that were kept for it can go
    Delete {
        /// Its name
        name: String,
    },
}

pub(crate) async fn run(
    command: Snapshot,
    client: &Client,
    output: &mut Output,
) -> Result<Exit, Failure> {
    match command {
        Snapshot::Create { name, subscription } => {
            let made = client.admin().create_snapshot(name, subscription).await?;
            if output.is_json() {
                output.json(&format::snapshot(&made))?;
            } else {
                output.line(&format!(
                    "created snapshot {} of {}, with {} messages unacked",
                    made.name, made.subscription, made.backlog
                ))?;
            }
        }
        Snapshot::List => list(client, output).await?,
        Snapshot::Delete { name } => {
            client.admin().delete_snapshot(&name).await?;
            if output.is_json() {
                output.json(&json!({ "type": "deleted", "snapshot": name }))?;
            } else {
                output.line(&format!("deleted snapshot {name}"))?;
            }
        }
    }
    Ok(Exit::Ok)
}

async fn list(client: &Client, output: &mut Output) -> Result<(), Failure> {
    let mut rows = Vec::new();
    let mut after = None;
    loop {
        let page = client.admin().snapshots(after).await?;
        for snapshot in page.items {
            if output.is_json() {
                output.json(&format::snapshot(&snapshot))?;
                continue;
            }
            rows.push([
                snapshot.name,
                snapshot.subscription,
                format::time(snapshot.create_time),
                snapshot.backlog.to_string(),
            ]);
        }
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    if output.is_json() {
        return Ok(());
    }
    if rows.is_empty() {
        eprintln!("pubsub: there is no snapshot");
        return Ok(());
    }
    output.table(["SNAPSHOT", "SUBSCRIPTION", "CREATED", "BACKLOG"], &rows)?;
    Ok(())
}
