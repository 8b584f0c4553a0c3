//! Measures pubsub beside other systems: real processes, fresh directories, one machine, one run.
//!
//! [`work`] says what is measured and of whom; [`cell`] measures one system at one kind of work
//! ([`quiet`] waits for its turn, [`server`] starts it, [`drive`] are the clients, [`floor`] is what no
//! system can beat);
//! [`report`] writes docs/performance.md from what was measured.

mod cell;
mod chart;
mod drive;
mod floor;
mod quiet;
mod reference;
mod report;
mod server;
mod targets;
mod work;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(version, about)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measure, and append what was measured to a file
    Run(cell::Run),
    /// Write docs/performance.md and its charts from what was measured
    Report {
        /// What `run` has written
        #[arg(default_value = "target/bench/results.jsonl")]
        results: PathBuf,
        /// Where docs/ is
        #[arg(long, default_value = "..")]
        root: PathBuf,
    },
    /// One client at work, for `run`
    #[command(hide = true)]
    Drive(drive::Drive),
    /// What no system can beat, for `run`
    #[command(hide = true, subcommand)]
    Floor(floor::Floor),
}

fn main() -> Result<()> {
    match Args::parse().command {
        Command::Run(run) => cell::run(&run),
        Command::Report { results, root } => report::write(&results, &root),
        Command::Drive(drive) => drive::run(drive),
        Command::Floor(floor) => floor::run(floor),
    }
}
