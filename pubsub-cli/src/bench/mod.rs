//! `pubsub bench`: what a server does for one client, measured with the SDK as it is.
//!
//! Everything that is sent and received goes the way of any application: [`publish`], [`latency`],
//! [`receive`] and [`fanout`] are the kinds of work, [`ground`] what they work on, [`meter`] how it
//! is counted and told.

mod fanout;
mod ground;
mod latency;
mod load;
mod meter;
mod publish;
mod receive;

use std::sync::Arc;
use std::time::Duration;

use clap::{Args as ClapArgs, Subcommand};
use pubsub_client::Client;
use tokio::task::JoinSet;

use self::ground::Ground;
use self::meter::{Meter, Report};
use crate::failure::{Exit, Failure};
use crate::interrupt::Interrupt;
use crate::output::Output;
use crate::values::Bytes;

/// Each makes a topic of its own and deletes it at the end, also after Ctrl-C, unless it is given
/// one: that is used as it is, and kept. Subscriptions are always made and deleted.
#[derive(Debug, Subcommand)]
pub(crate) enum Bench {
    /// How many messages a second can be stored, and how long each takes
    #[command(after_help = "\
Examples:
  pubsub bench publish
  pubsub bench publish --publishers 16 --size 1KiB --duration 1m
  pubsub bench publish --keys --json")]
    Publish(publish::Publish),
    /// How long a message takes: until it is stored, or at a rate, until it is received
    #[command(after_help = "\
Examples:
  pubsub bench latency                         one at a time, until it is on disk
  pubsub bench latency --rate 5000             sent on time, whatever happened to those before
  pubsub bench latency --rate 200 --duration 10m --json")]
    Latency(latency::Latency),
    /// How fast messages come that are there already, each of them acked
    #[command(after_help = "\
Examples:
  pubsub bench replay
  pubsub bench replay --topic orders           all that is in a topic
  pubsub bench replay --no-ack                 as a reader")]
    Replay(receive::Replay),
    /// How fast messages come from now on
    #[command(after_help = "\
Examples:
  pubsub bench subscribe orders                until Ctrl-C
  pubsub bench subscribe orders --count 100000")]
    Subscribe(receive::Subscribe),
    /// How fast many subscriptions receive what one publisher sends
    #[command(after_help = "\
Examples:
  pubsub bench fanout
  pubsub bench fanout --subscribers 50 --count 20000")]
    Fanout(fanout::Fanout),
}

/// What is published.
#[derive(Clone, Debug, ClapArgs)]
struct Size {
    /// How large each payload is
    #[arg(long, value_name = "SIZE", default_value = "100B")]
    size: Bytes,
}

/// On what.
#[derive(Debug, ClapArgs)]
struct On {
    /// A topic that exists; it is kept [default: a new one]
    #[arg(long, value_name = "TOPIC")]
    topic: Option<String>,
}

pub(crate) async fn run(
    command: Bench,
    client: &Client,
    output: &mut Output,
) -> Result<Exit, Failure> {
    let topic = match &command {
        Bench::Publish(publish::Publish { on, .. })
        | Bench::Latency(latency::Latency { on, .. })
        | Bench::Replay(receive::Replay { on, .. })
        | Bench::Fanout(fanout::Fanout { on, .. }) => on.topic.clone(),
        Bench::Subscribe(subscribe) => Some(subscribe.topic.clone()),
    };
    let mut interrupt = Interrupt::new().map_err(|error| Failure::failed(error.to_string()))?;
    let mut ground = Ground::new(client, topic).await?;
    let meter = Arc::new(Meter::new(!output.is_json()));
    let work = async {
        match command {
            Bench::Publish(args) => publish::run(args, client, &ground, &meter).await,
            Bench::Latency(args) => latency::run(args, client, &mut ground, &meter).await,
            Bench::Replay(args) => receive::replay(args, client, &mut ground, &meter).await,
            Bench::Subscribe(args) => receive::subscribe(args, client, &ground, &meter).await,
            Bench::Fanout(args) => fanout::run(args, client, &mut ground, &meter).await,
        }
    };
    let measured = meter.watch(work, &mut interrupt).await;
    // Also of what failed or was interrupted.
    let cleared = ground.clear().await;
    let Some(report) = measured? else { return Ok(Exit::Interrupted) };
    tell(&report, output)?;
    cleared.map(|()| Exit::Ok)
}

/// Runs work as a task: the main thread would have to be woken from another one for each message.
async fn apart<T: Send + 'static>(
    work: impl Future<Output = Result<T, Failure>> + Send + 'static,
) -> Result<T, Failure> {
    // It ends with this future.
    let mut tasks = JoinSet::new();
    tasks.spawn(work);
    let done = tasks.join_next().await.expect("there is one");
    done.map_err(|error| Failure::failed(error.to_string()))?
}

fn tell(report: &Report, output: &mut Output) -> Result<(), Failure> {
    if output.is_json() {
        return Ok(output.json(&report.json())?);
    }
    for line in report.lines() {
        output.line(&line)?;
    }
    Ok(())
}

/// How long something takes to get going that is not measured.
const SETTLING: Duration = Duration::from_millis(200);
