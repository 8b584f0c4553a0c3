//! The `pubsub` command.
//!
//! [`args`] is what can be said, with its help; there is a module for each group of commands;
//! [`failure`] turns every error into a cause, a fix and an exit code; [`output`] is the only
//! way to standard output.

mod args;
mod batch;
mod bench;
mod dlq;
mod events;
mod failure;
mod failures;
mod format;
mod interrupt;
mod outbox;
mod output;
mod publish;
mod receipts;
mod schema;
mod snapshot;
mod status;
mod subscribe;
mod subscription;
mod topic;
mod values;
mod watch;

use std::io::ErrorKind;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};
use pubsub_client::Client;

use crate::args::{Args, Command};
use crate::failure::{Exit, Failure};
use crate::output::Output;

fn main() -> ExitCode {
    let args = Args::parse();
    let json = args.json;
    match run(args) {
        Ok(exit) => exit.into(),
        // Nobody reads any more: `pubsub topic list | head` is no error.
        Err(failure) if failure.is_broken_pipe() => ExitCode::SUCCESS,
        Err(failure) => {
            failure.report(json);
            failure.exit().into()
        }
    }
}

fn run(args: Args) -> Result<Exit, Failure> {
    if let Command::Completions { shell } = args.command {
        return completions(shell);
    }
    if let Command::Outbox(command) = args.command {
        let mut output = Output::new(args.json);
        // What was done counts, and is told.
        let done = outbox::run(command, &mut output);
        output.flush()?;
        return done;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::failed(format!("no runtime: {error}")))?;
    let result = runtime.block_on(execute(args));
    // A read from a terminal cannot be cancelled, and nothing is left to wait for.
    runtime.shutdown_background();
    result
}

async fn execute(args: Args) -> Result<Exit, Failure> {
    let mut output = Output::new(args.json);
    let client = Client::connect(&args.server).await?;
    let done = match args.command {
        Command::Topic(command) => topic::run(command, &client, &mut output).await,
        Command::Schema(command) => schema::run(command, &client, &mut output).await,
        Command::Subscription(command) => subscription::run(command, &client, &mut output).await,
        Command::Snapshot(command) => snapshot::run(command, &client, &mut output).await,
        Command::Dlq(command) => dlq::run(command, &client, &mut output).await,
        Command::Publish(command) => publish::run(command, &client, &mut output).await,
        Command::Subscribe(command) => subscribe::run(command, &client, &mut output).await,
        Command::Receipts(command) => receipts::run(command, &client, &mut output).await,
        Command::Events(command) => events::run(command, &client, &mut output).await,
        Command::Bench(command) => bench::run(command, &client, &mut output).await,
        Command::Status => status::run(&client, &mut output).await,
        Command::Completions { .. } | Command::Outbox(_) => Ok(Exit::Ok),
    };
    let flushed = output.flush();
    // What was done counts, also when nobody reads about it any more.
    let exit = done?;
    match flushed {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(exit),
        flushed => Ok(flushed.map(|()| exit)?),
    }
}

fn completions(shell: clap_complete::Shell) -> Result<Exit, Failure> {
    // The generator panics on a broken pipe; a buffer has none.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Args::command(), "pubsub", &mut script);
    let mut output = Output::new(false);
    output.text(&String::from_utf8_lossy(&script))?;
    output.flush()?;
    Ok(Exit::Ok)
}
