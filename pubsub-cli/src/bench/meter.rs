//! Counting, progress, and what is told at the end.

use std::future::Future;
use std::io::IsTerminal as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hdrhistogram::Histogram;
use serde_json::{Map, Value, json};
use tokio::time::Instant;

use crate::failure::Failure;
use crate::format;
use crate::interrupt::Interrupt;

const PERCENTILES: [(&str, f64); 4] = [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999)];

/// Durations, to three digits.
pub(super) struct Latencies(Histogram<u64>);

impl Latencies {
    pub(super) fn new() -> Self {
        Self(Histogram::new(3).expect("three digits can be had"))
    }

    pub(super) fn record(&mut self, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.0.record(nanos).expect("it grows");
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.0.add(&other.0).expect("both grow");
    }

    fn json(&self) -> Value {
        let micros = |nanos: u64| json!(nanos as f64 / 1e3);
        let percentile =
            |(name, at): (&str, f64)| (name.to_owned(), micros(self.0.value_at_quantile(at)));
        let mut value: Map<_, _> = PERCENTILES.map(percentile).into_iter().collect();
        value.insert("max".to_owned(), micros(self.0.max()));
        value.into()
    }

    fn text(&self) -> String {
        let all = PERCENTILES.map(|(name, at)| (name, self.0.value_at_quantile(at)));
        let all = all.into_iter().chain([("max", self.0.max())]);
        let each = all.map(|(name, nanos)| format!("{name} {:.2?}", Duration::from_nanos(nanos)));
        each.collect::<Vec<_>>().join("  ")
    }
}

/// What was measured.
pub(super) struct Report {
    pub(super) work: &'static str,
    pub(super) messages: u64,
    pub(super) bytes: u64,
    pub(super) took: Duration,
    /// What took how long.
    pub(super) latencies: Vec<(&'static str, Latencies)>,
}

impl Report {
    fn per_second(&self, count: u64) -> f64 {
        count as f64 / self.took.as_secs_f64().max(f64::EPSILON)
    }

    pub(super) fn json(&self) -> Value {
        let mut value = json!({
            "type": "bench",
            "work": self.work,
            "messages": self.messages,
            "message_bytes": self.bytes,
            "seconds": self.took.as_secs_f64(),
            "messages_per_second": self.per_second(self.messages),
        });
        for (what, latencies) in &self.latencies {
            value[format!("{what}_us")] = latencies.json();
        }
        value
    }

    pub(super) fn lines(&self) -> Vec<String> {
        let per_second = self.per_second(self.messages);
        let bytes = format::bytes(whole(per_second * self.bytes as f64));
        let first = format!(
            "{}: {} messages of {} in {:.2?}: {}/s, {bytes}/s",
            self.work,
            grouped(self.messages),
            format::bytes(self.bytes),
            self.took,
            grouped(whole(per_second)),
        );
        let others = self.latencies.iter();
        let others = others.map(|(what, latencies)| format!("{what}: {}", latencies.text()));
        std::iter::once(first).chain(others).collect()
    }
}

/// Without what is behind the point.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it saturates")]
pub(super) fn whole(number: f64) -> u64 {
    number as u64
}

/// A number with a comma after each third digit.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// How far a measurement is.
#[derive(Debug)]
pub(super) struct Meter {
    done: AtomicU64,
    total: AtomicU64,
    told: bool,
}

impl Meter {
    /// Progress is told if anybody can see it.
    pub(super) fn new(for_people: bool) -> Self {
        let told = for_people && std::io::stderr().is_terminal();
        Self { done: AtomicU64::new(0), total: AtomicU64::new(0), told }
    }

    /// The next part of the work begins. Of how much; 0 if there is no end of it.
    pub(super) fn begin(&self, total: u64) {
        self.total.store(total, Ordering::Relaxed);
        self.done.store(0, Ordering::Relaxed);
    }

    pub(super) fn add(&self, done: u64) {
        self.done.fetch_add(done, Ordering::Relaxed);
    }

    /// Does the work and tells how far it is. Nothing if it was interrupted.
    pub(super) async fn watch<T>(
        &self,
        work: impl Future<Output = Result<T, Failure>>,
        interrupt: &mut Interrupt,
    ) -> Result<Option<T>, Failure> {
        tokio::pin!(work);
        let mut second = tokio::time::interval(Duration::from_secs(1));
        let (mut before, mut at) = (0, Instant::now());
        let result = loop {
            tokio::select! {
                result = &mut work => break result.map(Some),
                () = interrupt.asked() => break Ok(None),
                now = second.tick(), if self.told => {
                    let done = self.done.load(Ordering::Relaxed);
                    let took = now.duration_since(at).as_secs_f64().max(f64::EPSILON);
                    let per_second = done.saturating_sub(before) as f64 / took;
                    (before, at) = (done, now);
                    self.tell(done, whole(per_second));
                }
            }
        };
        if self.told {
            eprint!("\r\x1b[K");
        }
        result
    }

    fn tell(&self, done: u64, per_second: u64) {
        let of = match self.total.load(Ordering::Relaxed) {
            0 => String::new(),
            total => format!(" of {}", grouped(total)),
        };
        eprint!("\r\x1b[K{}{of}, {}/s", grouped(done), grouped(per_second));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_by_thousands() {
        let of = |number| grouped(number);
        assert_eq!([of(0), of(999), of(1_000), of(1_234_567)], ["0", "999", "1,000", "1,234,567"]);
    }
}
