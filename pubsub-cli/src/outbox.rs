//! `pubsub outbox`: a local file, without a server.

use pubsub_client::{OutboxFile, Parked, Reason};
use serde_json::json;

use crate::args::Outbox;
use crate::failure::{Exit, Failure};
use crate::format;
use crate::output::Output;

/// How many of the messages that were set aside are read at once.
const PAGE: usize = 1_000;

pub(crate) fn run(command: Outbox, output: &mut Output) -> Result<Exit, Failure> {
    match command {
        Outbox::Inspect { file } => inspect(&OutboxFile::open(file)?, output)?,
        Outbox::Resend { file, items } => {
            let mut file = OutboxFile::open(file)?;
            for item in items {
                let again = file.resend(item)?;
                if output.is_json() {
                    output.json(&json!({ "type": "resent", "item": item, "again": again }))?;
                } else {
                    output.line(&format!("message {item} waits again, as {again}"))?;
                }
            }
        }
        Outbox::Discard { file, items } => {
            let mut file = OutboxFile::open(file)?;
            for item in items {
                file.discard(item)?;
                if output.is_json() {
                    output.json(&json!({ "type": "discarded", "item": item }))?;
                } else {
                    output.line(&format!("discarded message {item}"))?;
                }
            }
        }
    }
    Ok(Exit::Ok)
}

fn inspect(file: &OutboxFile, output: &mut Output) -> Result<(), Failure> {
    let topics = file.topics()?;
    if output.is_json() {
        for topic in &topics {
            output.json(&format::outbox_topic(topic))?;
        }
        return pages(file, |parked| {
            parked.iter().try_for_each(|parked| output.json(&format::parked(parked)))?;
            Ok(())
        });
    }
    let rows: Vec<_> = topics
        .iter()
        .map(|topic| {
            let bytes = format::bytes(topic.pending.bytes);
            [topic.topic.to_string(), topic.pending.messages.to_string(), bytes]
        })
        .collect();
    output.table(["TOPIC", "WAITING", "BYTES"], &rows)?;
    let mut rows = Vec::new();
    pages(file, |parked| {
        rows.extend(parked.iter().map(row));
        Ok(())
    })?;
    if rows.is_empty() {
        return Ok(());
    }
    output.line("")?;
    output.line("set aside; `pubsub outbox resend` or `discard` decides:")?;
    Ok(output.table(["ITEM", "TOPIC", "SET ASIDE", "KEY", "REASON", ""], &rows)?)
}

/// All that was set aside, in parts.
fn pages(
    file: &OutboxFile,
    mut visit: impl FnMut(&[Parked]) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut from = 0;
    loop {
        let parked = file.parked(from, PAGE)?;
        let Some(last) = parked.last() else { return Ok(()) };
        from = last.item + 1;
        visit(&parked)?;
    }
}

fn row(parked: &Parked) -> [String; 6] {
    [
        parked.item.to_string(),
        parked.topic.clone(),
        format::time(parked.park_time),
        parked.message.idempotency_key.clone().unwrap_or_default(),
        parked.refused.as_ref().map_or("unknown fate", Reason::as_str).to_owned(),
        parked.detail.clone(),
    ]
}
