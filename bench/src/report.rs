//! docs/performance.md and its charts, from what was measured.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::chart::{Bar, OURS, SAFE, UNSAFE, bars};
use crate::reference;
use crate::server::System;
use crate::targets::{Figure, RATE, TARGETS, short};
use crate::work::{Task, Work};

/// What was measured, by work, system and round.
#[derive(Debug, Default)]
pub struct Results {
    cells: BTreeMap<(Work, System), BTreeMap<u64, Value>>,
}

impl Results {
    /// Those of the last run in a file.
    fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
        let results = Self::of_last_run(&text)?;
        ensure!(!results.cells.is_empty(), "nothing was measured");
        Ok(results)
    }

    pub fn of_last_run(text: &str) -> Result<Self> {
        let lines = text.lines().map(serde_json::from_str);
        let lines: Vec<Value> = lines.collect::<Result<_, _>>()?;
        let last = lines.last().map(|line| line["run"].clone());
        let mut results = Self::default();
        for line in lines {
            if Some(&line["run"]) != last.as_ref() || !line["error"].is_null() {
                continue;
            }
            let work = serde_json::from_value(line["work"].clone())?;
            let system = serde_json::from_value(line["system"].clone())?;
            let round = line["round"].as_u64().context("no round")?;
            results.cells.entry((work, system)).or_default().insert(round, line);
        }
        Ok(results)
    }

    pub fn rounds(&self) -> Vec<u64> {
        let rounds = self.cells.values().flat_map(|rounds| rounds.keys().copied());
        let mut rounds: Vec<_> = rounds.collect();
        rounds.sort_unstable();
        rounds.dedup();
        rounds
    }

    pub fn figure(&self, Figure(work, system, figure): Figure, round: u64) -> Option<f64> {
        self.cells.get(&(work, system))?.get(&round)?.pointer(figure)?.as_f64()
    }

    fn all(&self, figure: Figure) -> Vec<f64> {
        let rounds = self.rounds().into_iter();
        let mut all: Vec<_> = rounds.filter_map(|round| self.figure(figure, round)).collect();
        all.sort_by(f64::total_cmp);
        all
    }

    pub fn median(&self, figure: Figure) -> Option<f64> {
        median(&self.all(figure))
    }
}

fn median(sorted: &[f64]) -> Option<f64> {
    sorted.get(sorted.len() / 2).copied()
}

pub fn write(results: &Path, root: &Path) -> Result<()> {
    let results = Results::read(results)?;
    let docs = root.join("docs");
    let charts = docs.join("performance");
    fs::create_dir_all(&charts)?;
    let mut page = String::from(include_str!("head.md"));
    writeln!(page, "\n## The machine\n\n{}", machine(&results))?;
    let weakened = reference::weakened(&results);
    if !weakened.is_empty() {
        let weakened = weakened.join(", ");
        eprintln!("this run is void: {weakened} below 0.8 of what was to be expected");
        writeln!(
            page,
            "\n**This run is void**: below 0.8 of what was to be expected are {weakened}."
        )?;
    }
    writeln!(page, "\n## What has to hold\n\n{}", targets(&results))?;
    writeln!(page, "\n{}", include_str!("notes.md"))?;
    for work in Work::ALL {
        if results.cells.keys().all(|(of, _)| *of != work) {
            continue;
        }
        writeln!(page, "\n## {}: {}\n", work.number(), work.title())?;
        if let Some(chart) = chart(&results, work) {
            let name = format!("{}.svg", work.id());
            fs::write(charts.join(&name), chart)?;
            writeln!(page, "![{}](performance/{name})\n", work.title())?;
        }
        page.push_str(&table(&results, work)?);
    }
    writeln!(page, "\n{}\n{}", include_str!("reference.md"), reference::table(&results))?;
    fs::write(docs.join("performance.md"), page)?;
    Ok(())
}

fn machine(results: &Results) -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let cpu = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let cpus = cpuinfo.lines().filter(|line| line.starts_with("processor")).count();
    let cpu = cpu.map_or("an unknown CPU", |(_, cpu)| cpu);
    let kernel = read("/proc/sys/kernel/osrelease");
    let version = |program: &str, arg: &str| {
        let output = Command::new(program).arg(arg).output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Some(text.lines().next()?.to_owned())
    };
    let versions = [
        version("rustc", "--version"),
        version("redis-server", "--version"),
        version("../target/bench/nats/bin/nats-server", "--version"),
    ];
    let rabbit = Command::new("dpkg-query").args(["-W", "rabbitmq-server"]).output().ok();
    let rabbit =
        rabbit.map(|output| String::from_utf8_lossy(&output.stdout).trim().replace('\t', " "));
    let versions = versions.into_iter().flatten().chain(rabbit);
    let versions: Vec<_> = versions.collect();
    let rounds = results.rounds().len();
    format!(
        "{cpus} CPUs ({cpu}), Linux {}, {rounds} rounds. {}.",
        kernel.trim(),
        versions.join("; ")
    )
}

/// The section is that of notes.md.
const MISSED: &str = "**missed**, [why](#where-the-time-goes)";

fn targets(results: &Results) -> String {
    let mut table = String::from(
        "| work | what | at stake | median | least to most | |\n|---|---|---|---|---|---|\n",
    );
    for target in TARGETS {
        let ratios = target.ratios(results);
        let Some(middle) = median(&ratios) else { continue };
        let (least, most) = (ratios[0], ratios[ratios.len() - 1]);
        let holds = if target.bound.holds(middle) { "holds" } else { MISSED };
        let Figure(work, ..) = target.ours;
        let title = format!("{} {}", work.number(), work.title());
        let (text, bound) = (target.text(), target.bound.text());
        let _ = writeln!(
            table,
            "| {title} | {text} | {bound} | {} | {} to {} | {holds} |",
            short(middle),
            short(least),
            short(most)
        );
    }
    table
}

/// What the chart of a kind of work shows.
fn shown(work: Work) -> (&'static str, &'static str) {
    match work.task() {
        Task::Latency => ("/stored_us/p50", "p50 until stored, µs: less is better"),
        Task::Rate => ("/received_us/p50", "p50 until received, µs: less is better"),
        Task::Fanout => (RATE, "deliveries a second"),
        _ => (RATE, "messages a second"),
    }
}

fn chart(results: &Results, work: Work) -> Option<String> {
    if matches!(work.task(), Task::Mixed | Task::Grown) {
        return None;
    }
    let (figure, what) = shown(work);
    let bar = |system: &System| {
        let value = results.median(Figure(work, *system, figure))?;
        let color = match system {
            System::Pubsub => OURS,
            system if system.is_safe() => SAFE,
            _ => UNSAFE,
        };
        let text =
            if value >= 10_000.0 { format!("{:.0} k", value / 1e3) } else { format!("{value:.0}") };
        Some(Bar { name: system.name().to_owned(), value, text, color })
    };
    let all: Vec<_> = work.systems().iter().filter_map(bar).collect();
    let title = format!("{} {}: {what}", work.number(), work.title());
    Some(bars(&title, &all))
}

type Column = (&'static str, &'static str, fn(f64) -> String);

fn columns(work: Work) -> Vec<Column> {
    let count = |value: f64| grouped(value);
    let micros = |value: f64| format!("{value:.0}");
    let rate: Column = ("messages/s", RATE, count);
    let cpu: Column = ("server CPU s/M", "/server_cpu_per_million", |v| format!("{v:.2}"));
    let resident: Column = ("resident MiB", "/resident_bytes", |v| format!("{:.0}", v / 1048576.0));
    let disk: Column = ("disk B/message", "/disk_bytes_per_message", |v| format!("{v:.0}"));
    let flushes: Column = ("flushes/1,000", "/flushes_per_thousand", |v| format!("{v:.2}"));
    match work.task() {
        Task::Publish { .. } | Task::Keys => vec![rate, cpu, resident, disk, flushes],
        Task::Latency => vec![
            ("stored p50 µs", "/stored_us/p50", micros),
            ("p99", "/stored_us/p99", micros),
            ("p99.9", "/stored_us/p99.9", micros),
            cpu,
        ],
        Task::Rate | Task::Mixed => vec![
            ("received p50 µs", "/received_us/p50", micros),
            ("p99", "/received_us/p99", micros),
            ("p99.9", "/received_us/p99.9", micros),
            ("stored p50 µs", "/stored_us/p50", micros),
            cpu,
        ],
        Task::Replay { .. } => vec![rate, resident],
        Task::Fanout => vec![("deliveries/s", RATE, count), cpu, resident],
        Task::Grown => vec![
            ("fresh/s", RATE, count),
            ("full/s", "/full_per_second", count),
            ("many topics/s", "/many_per_second", count),
            ("restart, full, s", "/restart_full_seconds", |v| format!("{v:.2}")),
            ("restart, many, s", "/restart_many_seconds", |v| format!("{v:.2}")),
        ],
    }
}

fn table(results: &Results, work: Work) -> Result<String> {
    let columns = columns(work);
    let mut table = String::from("| system | a publish that is answered is |");
    columns.iter().for_each(|(name, ..)| {
        let _ = write!(table, " {name} |");
    });
    table.push_str(" pubsub beside it |\n|---|---|");
    table.push_str(&"---|".repeat(columns.len() + 1));
    table.push('\n');
    let (figure, _) = shown(work);
    for system in work.systems() {
        if !results.cells.contains_key(&(work, *system)) {
            continue;
        }
        write!(table, "| {} | {} |", system.name(), system.durability())?;
        for (index, (_, figure, text)) in columns.iter().enumerate() {
            let all = results.all(Figure(work, *system, figure));
            let cell = match (median(&all), index) {
                (None, _) => "-".to_owned(),
                (Some(middle), 0) if all.len() > 1 => {
                    format!("{} [{} to {}]", text(middle), text(all[0]), text(all[all.len() - 1]))
                }
                (Some(middle), _) => text(middle),
            };
            write!(table, " {cell} |")?;
        }
        let ratio = |round| {
            let ours = results.figure(Figure(work, System::Pubsub, figure), round)?;
            Some(ours / results.figure(Figure(work, *system, figure), round)?)
        };
        let mut ratios: Vec<_> = results.rounds().into_iter().filter_map(ratio).collect();
        ratios.sort_by(f64::total_cmp);
        let ratio = median(&ratios).map_or("-".to_owned(), |ratio| format!("{}x", short(ratio)));
        writeln!(table, " {ratio} |")?;
    }
    Ok(table)
}

fn grouped(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut grouped = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}
