//! `pubsub dlq`.

use std::time::Duration;

use clap::{Args as ClapArgs, Subcommand};
use pubsub_client::{Client, DeadLetter, DeadLetters};
use serde_json::json;
use tokio::time::{MissedTickBehavior, interval};

use crate::failure::{Exit, Failure};
use crate::format;
use crate::interrupt::Interrupt;
use crate::output::Output;

#[derive(Debug, Subcommand)]
pub(crate) enum Dlq {
    /// List the dead letters of a subscription that wait to be redriven or purged
    List {
        /// The subscription that could not process them
        subscription: String,
        /// Only those whose attributes match
        #[arg(long = "where", value_name = "FILTER")]
        filter: Option<String>,
    },
    /// Show one dead letter with its payload
    Show {
        /// The subscription that could not process it
        subscription: String,
        /// Its number, as `list` prints it
        number: u64,
    },
    /// Send dead letters back to the topics they come from, for this subscription only
    #[command(after_help = "\
Each is sent back once, however often that is asked. One that fails again is a new dead letter.

Examples:
  pubsub dlq redrive work 17 18            these two
  pubsub dlq redrive work --all --rate 50  all of them, 50 each second; Ctrl-C stops in between
  pubsub dlq redrive work --where 'attributes.dead-letter-reason = \"timeout\"'")]
    Redrive {
        #[command(flatten)]
        which: Letters,
        /// How many to send back each second [default: no limit]
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        rate: Option<u32>,
    },
    /// Let dead letters go, for good; the copies stay in their topic as long as it keeps messages
    Purge {
        #[command(flatten)]
        which: Letters,
    },
}

/// Which dead letters.
#[derive(Debug, ClapArgs)]
pub(crate) struct Letters {
    /// The subscription that could not process them
    pub(crate) subscription: String,
    /// Their numbers, as `list` prints them
    #[arg(value_name = "NUMBER", required_unless_present_any = ["all", "filter"],
        conflicts_with_all = ["all", "filter"])]
    pub(crate) numbers: Vec<u64>,
    /// All that there are
    #[arg(long)]
    pub(crate) all: bool,
    /// Those whose attributes match, such as dead-letter-reason
    #[arg(long = "where", value_name = "FILTER", conflicts_with = "all")]
    pub(crate) filter: Option<String>,
}

/// Dead letters of one call.
const BATCH: u32 = 500;
/// What of a reason fits into a table.
const REASON_CHARS: usize = 60;

pub(crate) async fn run(
    command: Dlq,
    client: &Client,
    output: &mut Output,
) -> Result<Exit, Failure> {
    match command {
        Dlq::List { subscription, filter } => {
            list(&subscription, &filter.unwrap_or_default(), client, output).await?;
        }
        Dlq::Show { subscription, number } => show(&subscription, number, client, output).await?,
        Dlq::Redrive { which, rate } => return redrive(which, rate, client, output).await,
        Dlq::Purge { which } => return purge(which, client, output).await,
    }
    Ok(Exit::Ok)
}

async fn list(
    subscription: &str,
    filter: &str,
    client: &Client,
    output: &mut Output,
) -> Result<(), Failure> {
    let mut rows = Vec::new();
    let mut after = None;
    loop {
        let page = client.admin().dead_letters_matching(subscription, filter, after).await?;
        for letter in page.items {
            if output.is_json() {
                output.json(&format::dead_letter(&letter))?;
                continue;
            }
            let DeadLetter { id, origin, attempts, reason, last_failure_time, .. } = letter;
            let short: String = reason.lines().next().unwrap_or_default().to_owned();
            rows.push([
                id.sequence.to_string(),
                format!("{} {}", origin.topic, origin.sequence),
                attempts.to_string(),
                format::time(last_failure_time),
                short.chars().take(REASON_CHARS).collect(),
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
        let which = if filter.is_empty() { "no dead letters" } else { "no such dead letters" };
        eprintln!("pubsub: subscription {subscription} has {which}");
        return Ok(());
    }
    output.table(["NUMBER", "MESSAGE", "ATTEMPTS", "LAST FAILURE", "REASON"], &rows)?;
    Ok(())
}

async fn show(
    subscription: &str,
    number: u64,
    client: &Client,
    output: &mut Output,
) -> Result<(), Failure> {
    let after = number.checked_sub(1).map(|before| before.to_string());
    let page = client.admin().dead_letters(subscription, after).await?;
    let letter = page.items.into_iter().find(|letter| letter.id.sequence == number);
    let Some(letter) = letter else {
        return Err(Failure::not_found(format!(
            "subscription {subscription} has no dead letter {number}; `pubsub dlq list \
             {subscription}` shows what there is"
        )));
    };
    output.fields(
        &format::dead_letter(&letter),
        &[
            ("dead letter", letter.id.to_string()),
            ("copy of", letter.origin.to_string()),
            ("attempts", letter.attempts.to_string()),
            ("reason", letter.reason.clone()),
            ("first failure", format::time(letter.first_failure_time)),
            ("last failure", format::time(letter.last_failure_time)),
            ("ordering key", letter.message.ordering_key.clone().unwrap_or_default()),
            ("content type", letter.message.content_type.clone().unwrap_or_default()),
        ],
    )?;
    if !output.is_json() {
        let own = letter.message.attributes.iter();
        for (name, value) in own.filter(|(name, _)| !name.starts_with("dead-letter-")) {
            output.line(&format!("attribute      {name}={value}"))?;
        }
        output.raw("\n", &letter.message.payload)?;
    }
    Ok(())
}

/// Sends back a few at a time, so that it can be slow, and interrupted.
async fn redrive(
    which: Letters,
    rate: Option<u32>,
    client: &Client,
    output: &mut Output,
) -> Result<Exit, Failure> {
    let mut interrupt = Interrupt::new().map_err(|error| Failure::failed(error.to_string()))?;
    let mut ticks = interval(Duration::from_secs(1));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let batch = rate.unwrap_or(BATCH).min(BATCH);
    let mut numbers = which.numbers.as_slice();
    let (mut redriven, mut homeless, mut left) = (0, 0, 0);
    let exit = loop {
        let some = which.some(batch);
        let by_number = some.is_none();
        let next = some.unwrap_or_else(|| {
            let (now, later) = numbers.split_at(numbers.len().min(batch as usize));
            numbers = later;
            DeadLetters::Sequences(now.to_vec())
        });
        if rate.is_some() {
            tokio::select! {
                _ = ticks.tick() => {}
                () = interrupt.asked() => break Exit::Interrupted,
            }
        }
        let done = client.admin().redrive(&which.subscription, next).await?;
        redriven += done.redriven;
        // The oldest of them are met again each time.
        homeless = if by_number { homeless + done.homeless } else { homeless.max(done.homeless) };
        left = done.left;
        let over = if by_number { numbers.is_empty() } else { done.redriven == 0 || left == 0 };
        if over {
            break Exit::Ok;
        }
        if !output.is_json() {
            eprintln!("pubsub: {redriven} redriven, {left} left");
        }
        if interrupt.is_asked() {
            break Exit::Interrupted;
        }
    };
    if output.is_json() {
        output.json(&json!({
            "type": "redriven",
            "subscription": which.subscription,
            "redriven": redriven,
            "homeless": homeless,
            "left": left,
        }))?;
    } else {
        output.line(&format!("redriven {redriven} dead letters; {left} are left"))?;
        if homeless > 0 {
            eprintln!(
                "pubsub: {homeless} come from topics that the subscription does not listen to \
                 any more; `pubsub dlq show` tells which"
            );
        }
    }
    Ok(exit)
}

async fn purge(which: Letters, client: &Client, output: &mut Output) -> Result<Exit, Failure> {
    let interrupt = Interrupt::new().map_err(|error| Failure::failed(error.to_string()))?;
    let (mut purged, mut left) = (0, 0);
    let mut exit = Exit::Ok;
    let some = which.some(BATCH);
    let mut numbers = which.numbers.chunks(BATCH as usize);
    let mut by_number = || Some(DeadLetters::Sequences(numbers.next()?.to_vec()));
    while let Some(batch) = some.clone().or_else(&mut by_number) {
        let done = client.admin().purge_dead_letters(&which.subscription, batch).await?;
        purged += done.purged;
        left = done.left;
        if some.is_some() && (left == 0 || done.purged == 0) {
            break;
        }
        if interrupt.is_asked() {
            exit = Exit::Interrupted;
            break;
        }
    }
    if output.is_json() {
        output.json(&json!({
            "type": "purged",
            "subscription": which.subscription,
            "purged": purged,
            "left": left,
        }))?;
    } else {
        output.line(&format!("purged {purged} dead letters; {left} are left"))?;
    }
    Ok(exit)
}

impl Letters {
    /// So many of those that are not named by number; `None` if they are.
    fn some(&self, most: u32) -> Option<DeadLetters> {
        match &self.filter {
            Some(filter) => Some(DeadLetters::Matching { filter: filter.clone(), most }),
            None => self.all.then_some(DeadLetters::Oldest(most)),
        }
    }
}
