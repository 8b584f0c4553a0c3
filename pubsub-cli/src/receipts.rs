//! `pubsub receipts`.

use pubsub_client::Client;

use crate::args::Receipts;
use crate::failure::{Exit, Failure};
use crate::format;
use crate::output::Output;
use crate::values::MessageRef;

pub(crate) async fn run(
    args: Receipts,
    client: &Client,
    output: &mut Output,
) -> Result<Exit, Failure> {
    let (epoch, sequence) = match args.message {
        MessageRef::Sequence(sequence) => (None, sequence),
        MessageRef::Id(id) if *id.topic == *args.topic => (Some(id.epoch), id.sequence),
        MessageRef::Id(id) => {
            let text = format!("{id} is a message of topic {}, not of {}", id.topic, args.topic);
            return Err(Failure::usage(text));
        }
    };
    let only = args.subscription.as_deref();
    let receipts = client.admin().receipts(&args.topic, epoch, sequence, only).await?;
    if output.is_json() {
        for receipt in &receipts {
            let mut value = format::receipt(receipt);
            value["topic"] = args.topic.as_str().into();
            value["sequence"] = sequence.into();
            output.json(&value)?;
        }
        return Ok(Exit::Ok);
    }
    if receipts.is_empty() {
        eprintln!("pubsub: no subscription listens to topic {}", args.topic);
        return Ok(Exit::Ok);
    }
    let rows: Vec<_> = receipts
        .into_iter()
        .map(|receipt| {
            let (state, detail) = format::receipt_state(&receipt.state);
            [receipt.subscription, state.to_owned(), detail]
        })
        .collect();
    output.table(["SUBSCRIPTION", "STATE", ""], &rows)?;
    Ok(Exit::Ok)
}
