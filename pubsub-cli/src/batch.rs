//! `pubsub publish --batch`: all messages together, or none.

use pubsub_client::Publisher;

use crate::args::Publish;
use crate::failure::{Exit, Failure};
use crate::format;
use crate::interrupt::Interrupt;
use crate::output::Output;
use crate::publish::{Source, Template};

/// Messages of one batch; the SDK refuses more, and knows how many more.
const MAX_MESSAGES: usize = 1_001;

pub(crate) async fn run(
    args: &Publish,
    publisher: &Publisher,
    mut interrupt: Interrupt,
    output: &mut Output,
) -> Result<Exit, Failure> {
    let mut source = Source::new(args.messages.clone());
    let mut messages = Vec::new();
    let read = async {
        while messages.len() < MAX_MESSAGES
            && let Some(payload) = source.next().await?
        {
            let mut message = Template(args).message(payload);
            // It is that of the batch.
            message.idempotency_key = None;
            messages.push(message);
        }
        Ok::<_, Failure>(())
    };
    tokio::select! {
        read = read => read?,
        // Nothing was sent.
        () = interrupt.asked() => return Ok(Exit::Interrupted),
    }
    let mut batch = publisher.publish_batch(messages);
    if let Some(head) = args.expect_head {
        batch = batch.expect_head(head);
    }
    if let Some(key) = &args.idempotency_key {
        batch = batch.idempotency_key(key);
    }
    let receipts = tokio::select! {
        receipts = batch => receipts?,
        () = interrupt.asked() => {
            let text = "interrupted before the fate of the batch was known";
            return Err(Failure::new(Exit::Interrupted, text));
        }
    };
    for receipt in receipts.iter().filter(|_| !args.quiet) {
        if output.is_json() {
            output.json(&format::published(receipt))?;
        } else {
            let duplicate = if receipt.duplicate { " duplicate" } else { "" };
            output.line(&format!("{}{duplicate}", receipt.id))?;
        }
    }
    Ok(Exit::Ok)
}
