//! Measuring one system at one kind of work, and all of them in turns.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Instant, SystemTime};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use serde_json::{Value, json};

use crate::quiet::{Quiet, touch_pages};
use crate::server::{Server, System, Tools, Usage, disk, flushes};
use crate::work::{Task, Work, count};

/// What to measure.
#[derive(Debug, Args)]
pub struct Run {
    /// Only these, such as W1,W3 [default: all]
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Only these systems, such as pubsub,redis-always [default: all]
    #[arg(long, value_delimiter = ',')]
    systems: Vec<String>,
    /// How often. Medians are told, so that an odd number of 5 or more is best
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// How long each publishes
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// How many GiB a store has grown to, for W9
    #[arg(long, default_value_t = 10)]
    grown: u64,
    /// Where the repository is
    #[arg(long, default_value = "..")]
    root: PathBuf,
    /// Where to write what was measured, a line for each cell; what is there stays
    #[arg(long, default_value = "target/bench/results.jsonl")]
    results: PathBuf,
    /// Where servers keep their data meanwhile: on the disk that is to be measured
    #[arg(long, default_value = "target/bench/data")]
    data: PathBuf,
}

impl Run {
    fn wants(&self, work: Work, system: System) -> bool {
        let is_work =
            |only: &String| only.eq_ignore_ascii_case(work.number()) || *only == work.id();
        let work = self.only.is_empty() || self.only.iter().any(is_work);
        work && (self.systems.is_empty() || self.systems.contains(&system.id()))
    }
}

/// Rounds outermost, systems innermost: what is compared is measured within minutes of each other.
pub fn run(run: &Run) -> Result<()> {
    let root = fs::canonicalize(&run.root).context("--root")?;
    let tools = Tools::find(&root)?;
    fs::create_dir_all(&run.data)?;
    let data = fs::canonicalize(&run.data)?;
    let quiet = Quiet::of(&data)?;
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
    for round in 0..run.rounds {
        for work in Work::ALL {
            let wanted: Vec<_> =
                work.systems().iter().copied().filter(|system| run.wants(work, *system)).collect();
            // The log stays first; the others take turns at who follows it.
            let (first, mut others): (Vec<_>, Vec<_>) =
                wanted.into_iter().partition(|system| *system == System::Log);
            let turn = round as usize % others.len().max(1);
            others.rotate_left(turn);
            for system in first.into_iter().chain(others) {
                let cell = Cell { run, tools: &tools, data: &data, quiet: &quiet, work, system };
                let mut measured = cell.measure();
                if let Err(error) = &measured {
                    // Once more: a port that somebody else took is no result.
                    eprintln!("{} {}: {error:#}; once more", work.id(), system.id());
                    measured = cell.measure();
                }
                let mut value =
                    measured.unwrap_or_else(|error| json!({ "error": format!("{error:#}") }));
                value["run"] = since.into();
                value["round"] = round.into();
                value["work"] = work.id().into();
                value["system"] = system.id().into();
                eprintln!("{}", summary(&value));
                append(&run.results, &value)?;
            }
        }
    }
    Ok(())
}

fn append(path: &Path, value: &Value) -> Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let mut file = OpenOptions::new().create(true).append(true).open(path)?;
    Ok(writeln!(file, "{value}")?)
}

fn summary(value: &Value) -> String {
    let text = |key: &str| value[key].as_str().unwrap_or_default().to_owned();
    let number = |value: &Value| value.as_f64().map_or("-".to_owned(), |n| format!("{n:.1}"));
    format!(
        "{:2} {:12} {:16} {:>12}/s  stored p50 {:>8} p99 {:>8} µs  received p50 {:>8} p99 {:>8} µs  cpu {:>6} s/M  {}",
        value["round"],
        text("work"),
        text("system"),
        value["messages_per_second"].as_f64().map_or("-".to_owned(), |n| format!("{n:.0}")),
        number(&value["stored_us"]["p50"]),
        number(&value["stored_us"]["p99"]),
        number(&value["received_us"]["p50"]),
        number(&value["received_us"]["p99"]),
        number(&value["server_cpu_per_million"]),
        text("error"),
    )
}

/// One system at one kind of work.
struct Cell<'a> {
    run: &'a Run,
    tools: &'a Tools,
    data: &'a Path,
    quiet: &'a Quiet,
    work: Work,
    system: System,
}

impl Cell<'_> {
    fn measure(&self) -> Result<Value> {
        let directory = tempfile::tempdir_in(self.data)?;
        let directory = directory.path();
        self.quiet.wait(self.data)?;
        match self.system {
            System::Log => {
                let (size, group) = match self.work.task() {
                    Task::Publish { size, .. } if size > 4_096 => (size, 64),
                    Task::Publish { size, .. } => (size, 1_000),
                    _ => (256, 1),
                };
                let group = group.to_string();
                return self.floor(&["log", "--group", &group], size, directory);
            }
            System::Index => return self.floor(&["index"], 0, directory),
            System::Map => return self.floor(&["map"], 0, directory),
            System::Tcp => {
                return match self.work.task() {
                    Task::Replay { size } => self.floor(&["stream"], size, directory),
                    _ => self.floor(&["round-trips"], 256, directory),
                };
            }
            _ => {}
        }
        let server = Server::start(self.system, self.tools, directory)?;
        match self.work.task() {
            Task::Grown => self.grown(server, directory),
            Task::Mixed => self.mixed(&server),
            Task::Keys => {
                let seconds = self.seconds();
                self.ours(
                    &server,
                    &["publish", "--keys", "--count", "1000000", "--topic", "keys"],
                )?;
                let args = ["publish", "--keys", "--duration", &seconds, "--topic", "keys"];
                self.watched(&server, || self.ours(&server, &args))
            }
            _ => self.watched(&server, || self.drive(&server)),
        }
    }

    fn seconds(&self) -> String {
        format!("{}ms", (self.run.seconds * 1e3) as u64)
    }

    /// Does it, and adds what the server has used for it.
    fn watched(&self, server: &Server, work: impl FnOnce() -> Result<Value>) -> Result<Value> {
        let (before, flushed) = (server.usage(), flushes());
        let mut value = work()?;
        let (Usage { cpu, resident, disk }, flushed) = (server.usage(), flushes() - flushed);
        let messages = value["messages"].as_f64().unwrap_or(1.0);
        value["server_cpu_per_million"] = json!((cpu - before.cpu) / messages * 1e6);
        value["resident_bytes"] = resident.into();
        value["disk_bytes_per_message"] = json!((disk - before.disk.min(disk)) as f64 / messages);
        value["flushes_per_thousand"] = json!(flushed as f64 / messages * 1e3);
        Ok(value)
    }

    fn floor(&self, floor: &[&str], size: usize, directory: &Path) -> Result<Value> {
        let mut command = Command::new(&self.tools.bench);
        command.arg("floor").args(floor).arg("--directory").arg(directory);
        command.args(["--seconds", &self.run.seconds.to_string(), "--size", &size.to_string()]);
        let flushed = flushes();
        let mut value = answer(&mut command)?;
        let messages = value["messages"].as_f64().unwrap_or(1.0);
        value["disk_bytes_per_message"] = json!(disk(directory) as f64 / messages);
        value["flushes_per_thousand"] = json!((flushes() - flushed) as f64 / messages * 1e3);
        Ok(value)
    }

    fn drive(&self, server: &Server) -> Result<Value> {
        let task = self.work.task();
        if self.system == System::Pubsub {
            let seconds = self.seconds();
            let count = count(self.system, task).to_string();
            return match task {
                Task::Publish { size, publishers } => {
                    let (size, publishers) = (size.to_string(), publishers.to_string());
                    let args = ["publish", "--duration", &seconds, "--size", &size, "--publishers"];
                    self.ours(server, &[&args[..], &[&publishers]].concat())
                }
                Task::Latency => {
                    self.ours(server, &["latency", "--size", "256", "--count", "3000"])
                }
                Task::Rate => self.ours(server, &RATE),
                Task::Replay { size } => {
                    let size = size.to_string();
                    self.ours(server, &["replay", "--count", &count, "--size", &size])
                }
                Task::Fanout => self.ours(server, &["fanout", "--count", &count]),
                Task::Keys | Task::Mixed | Task::Grown => bail!("it is no single command"),
            };
        }
        let mut command = Command::new(&self.tools.bench);
        if self.system == System::Grpc {
            let Task::Publish { size, .. } = task else { bail!("it stores nothing") };
            command.args(["floor", "grpc-client", "--address", &server.address]);
            command.args(["--seconds", &self.run.seconds.to_string()]);
            command.args(["--size", &size.to_string()]);
            return answer(&mut command);
        }
        let (system, more): (_, &[&str]) = match self.system {
            System::RedisAlways | System::RedisEverysec => ("redis", &[]),
            System::NatsBatches => ("nats", &["--batch", "500"]),
            System::NatsAlways | System::NatsDefault => ("nats", &[]),
            System::RabbitStream => ("rabbit", &["--stream"]),
            _ => ("rabbit", &[]),
        };
        let count = count(self.system, task).to_string();
        let seconds = self.run.seconds.to_string();
        let (work, size, publishers) = match task {
            Task::Publish { size, publishers } => ("publish", size, publishers),
            Task::Latency => ("latency", 256, 1),
            Task::Rate => ("rate", 256, 1),
            Task::Replay { size } => ("replay", size, 1),
            Task::Fanout => ("fanout", 100, 1),
            Task::Keys | Task::Mixed | Task::Grown => bail!("nobody else does it"),
        };
        let count = if work == "latency" { "3000" } else { &count };
        let seconds = if work == "rate" { RATE_SECONDS } else { &seconds };
        // As large a window in bytes as ours, too.
        let in_flight = (8 * 1024 * 1024 / size).min(20_000);
        command.args(["drive", system, work, "--address", &server.address, "--count", count]);
        command.args(["--size", &size.to_string(), "--publishers", &publishers.to_string()]);
        command.args(["--seconds", seconds, "--in-flight", &in_flight.to_string()]).args(more);
        answer(&mut command)
    }

    fn command(&self, server: &Server, args: &[&str]) -> Command {
        let mut command = Command::new(&self.tools.pubsub);
        command.args(["--server", &format!("http://{}", server.address), "--json"]).args(args);
        command
    }

    /// `pubsub bench`.
    fn ours(&self, server: &Server, args: &[&str]) -> Result<Value> {
        if let Some(topic) = args.iter().skip_while(|arg| **arg != "--topic").nth(1) {
            answer(&mut self.command(server, &["topic", "create", topic, "--if-not-exists"]))?;
        }
        answer(self.command(server, &["bench"]).args(args))
    }

    /// The rate again, while another subscription receives a million messages again and again.
    fn mixed(&self, server: &Server) -> Result<Value> {
        self.ours(server, &["publish", "--count", "1000000", "--topic", "mixed"])?;
        let mut behind = self.command(server, &["bench", "replay", "--topic", "mixed"]);
        let mut replays = 0;
        let mut live = self.command(server, &["bench"]);
        live.args(RATE).args(["--topic", "mixed"]);
        let mut live = live.stdout(Stdio::piped()).spawn()?;
        while live.try_wait()?.is_none() {
            answer(&mut behind)?;
            replays += 1;
        }
        let output = live.wait_with_output()?;
        let mut value: Value = serde_json::from_slice(&output.stdout)?;
        value["replays"] = replays.into();
        Ok(value)
    }

    /// Publishing into a fresh store, into one with many GiB, and into one with many topics and
    /// subscriptions, each with the pages of the file cache in the same state; and how long it takes to
    /// come back after a kill.
    fn grown(&self, server: Server, directory: &Path) -> Result<Value> {
        let seconds = self.seconds();
        let publish = ["publish", "--duration", &seconds, "--topic", "measured"];
        touch_pages(self.data)?;
        self.quiet.wait(self.data)?;
        let fresh = self.ours(&server, &publish)?;
        let bytes = self.run.grown << 30;
        let count = (bytes / (16 * 1024)).to_string();
        create(&self.command(&server, &[]), "topic", "full", &["--max-bytes", "100GiB"])?;
        self.ours(&server, &["publish", "--size", "16KiB", "--count", &count, "--topic", "full"])?;
        touch_pages(self.data)?;
        self.quiet.wait(self.data)?;
        let full = self.ours(&server, &publish)?;
        let stored = server.usage().disk;
        drop(server);
        let restarted = Instant::now();
        let server = Server::start(self.system, self.tools, directory)?;
        // It listens when it is ready to.
        answer(&mut self.command(&server, &["status"]))?;
        let restart = restarted.elapsed();
        for number in 0..10_000 {
            let name = format!("topic-{number}");
            create(&self.command(&server, &[]), "topic", &name, &[])?;
            if number % 10 == 0 {
                let subscription = format!("subscription-{number}");
                create(&self.command(&server, &[]), "subscription", &subscription, &[&name])?;
            }
        }
        touch_pages(self.data)?;
        self.quiet.wait(self.data)?;
        let many = self.ours(&server, &publish)?;
        drop(server);
        let restarted = Instant::now();
        let server = Server::start(self.system, self.tools, directory)?;
        answer(&mut self.command(&server, &["status"]))?;
        Ok(json!({
            "messages_per_second": fresh["messages_per_second"],
            "full_per_second": full["messages_per_second"],
            "many_per_second": many["messages_per_second"],
            "stored_bytes": stored,
            "restart_full_seconds": restart.as_secs_f64(),
            "restart_many_seconds": restarted.elapsed().as_secs_f64(),
        }))
    }
}

const RATE_SECONDS: &str = "6";
const RATE: [&str; 7] = ["latency", "--size", "256", "--rate", "5000", "--duration", "6s"];

fn create(command: &Command, what: &str, name: &str, more: &[&str]) -> Result<()> {
    let mut create = Command::new(command.get_program());
    create.args(command.get_args()).args([what, "create", name]).args(more);
    answer(&mut create).map(drop)
}

/// Runs a command that answers in JSON.
fn answer(command: &mut Command) -> Result<Value> {
    let output = command.stdin(Stdio::null()).output()?;
    if !output.status.success() {
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        bail!("{command:?}: {} {error}", output.status);
    }
    let last = output.stdout.split(|byte| *byte == b'\n').rfind(|line| !line.is_empty());
    match last {
        Some(line) => Ok(serde_json::from_slice(line)?),
        None => Ok(Value::Null),
    }
}
