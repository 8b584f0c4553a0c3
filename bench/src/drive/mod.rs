//! The clients of the other systems. Each is used as its documentation says one gets the most of
//! it; all do the same work, and answer as `pubsub bench --json` does.

mod nats;
mod rabbit;
mod redis;

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};
use hdrhistogram::Histogram;
use serde_json::{Map, Value, json};
use tokio::sync::mpsc;

/// Whom to drive, and what it does.
#[derive(Clone, Debug, Args)]
pub struct Drive {
    /// The system
    pub system: System,
    /// The work
    pub work: Work,
    /// Where its server listens
    #[arg(long)]
    pub address: String,
    /// Bytes of a payload
    #[arg(long, default_value_t = 100)]
    pub size: usize,
    /// Messages, where the work has an end
    #[arg(long, default_value_t = 100_000)]
    pub count: u64,
    /// How long to publish, where it has none
    #[arg(long, default_value_t = 3.0)]
    pub seconds: f64,
    /// Messages a second
    #[arg(long, default_value_t = 5_000)]
    pub rate: u64,
    /// Publishers, each with its own connection
    #[arg(long, default_value_t = 1)]
    pub publishers: u64,
    /// Messages of each that may be unanswered
    #[arg(long, default_value_t = 5_000)]
    pub in_flight: usize,
    /// Subscriptions
    #[arg(long, default_value_t = 10)]
    pub subscribers: u64,
    /// Messages of one atomic batch of JetStream; 0 for none
    #[arg(long, default_value_t = 0)]
    pub batch: u64,
    /// Use streams of RabbitMQ, not quorum queues
    #[arg(long)]
    pub stream: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum System {
    Nats,
    Redis,
    Rabbit,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Work {
    /// As fast as it goes, for some time
    Publish,
    /// One after the other
    Latency,
    /// At a rate, until it is received
    Rate,
    /// Receive and ack what is there
    Replay,
    /// Many subscriptions at once
    Fanout,
}

pub fn run(drive: Drive) -> Result<()> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let limit = Duration::from_secs(180);
    // As a task: the main thread would have to be woken from another one for each answer.
    let work = runtime.spawn(async move {
        let work = async {
            match drive.system {
                System::Nats => nats::run(&drive).await,
                System::Redis => redis::run(&drive).await,
                System::Rabbit => rabbit::run(&drive).await,
            }
        };
        tokio::time::timeout(limit, work).await.context("it took longer than 180 s")?
    });
    let measured = runtime.block_on(work)??;
    println!("{}", measured.json());
    runtime.shutdown_background();
    Ok(())
}

/// What was measured.
#[derive(Debug)]
pub struct Measured {
    pub messages: u64,
    pub took: Duration,
    pub latencies: Vec<(&'static str, Histogram<u64>)>,
}

impl Measured {
    pub fn new(messages: u64, took: Duration) -> Self {
        Self { messages, took, latencies: Vec::new() }
    }

    pub fn json(&self) -> Value {
        let seconds = self.took.as_secs_f64();
        let mut value = json!({
            "messages": self.messages,
            "seconds": seconds,
            "messages_per_second": self.messages as f64 / seconds,
        });
        for (what, histogram) in &self.latencies {
            let at = [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999), ("max", 1.0)];
            let micros = |(name, at): (&str, f64)| {
                (name.to_owned(), json!(histogram.value_at_quantile(at) as f64 / 1e3))
            };
            let of: Map<_, _> = at.into_iter().map(micros).collect();
            value[format!("{what}_us")] = of.into();
        }
        value
    }
}

pub fn histogram() -> Histogram<u64> {
    Histogram::new(3).expect("three digits can be had")
}

pub fn record(histogram: &mut Histogram<u64>, took: Duration) {
    let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
    histogram.record(nanos).expect("it grows");
}

/// Bytes that do not compress.
pub fn payload(size: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..size).map(|_| next()).collect()
}

/// Says when each message is to be sent, on time, however late the others are: the latency of each
/// counts from then.
pub fn paced(rate: u64, seconds: f64) -> (Instant, u64, mpsc::Receiver<Duration>) {
    let count = (rate as f64 * seconds) as u64;
    let (due, paced) = mpsc::channel(1 << 16);
    let started = Instant::now() + Duration::from_millis(200);
    std::thread::spawn(move || {
        // Woken up to 50 µs late otherwise.
        let _ = rustix::thread::set_current_timer_slack(std::num::NonZero::new(1));
        for number in 0..count {
            let at = Duration::from_secs_f64(number as f64 / rate as f64);
            std::thread::sleep((started + at).saturating_duration_since(Instant::now()));
            if due.blocking_send(at).is_err() {
                return;
            }
        }
    });
    (started, count, paced)
}

/// A payload that says when it was due.
pub fn stamped(payload: &[u8], due: Duration) -> Vec<u8> {
    let mut payload = payload.to_vec();
    let stamp = u64::try_from(due.as_nanos()).unwrap_or(u64::MAX);
    payload[..8].copy_from_slice(&stamp.to_le_bytes());
    payload
}

/// How late a stamped payload is.
pub fn late(payload: &[u8], started: Instant) -> Duration {
    let stamp = payload.first_chunk().copied().unwrap_or_default();
    started.elapsed().saturating_sub(Duration::from_nanos(u64::from_le_bytes(stamp)))
}
