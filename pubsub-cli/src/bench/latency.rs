//! How long one message takes.

use std::sync::Arc;
use std::time::Duration;

use clap::Args as ClapArgs;
use pubsub_client::{Client, PublishTicket, Publisher, Start, Subscriber};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::ground::Ground;
use super::load::{Messages, payload};
use super::meter::{Latencies, Meter, Report, whole};
use super::receive::next;
use super::{On, SETTLING, Size, apart};
use crate::failure::Failure;

#[derive(Debug, ClapArgs)]
pub(crate) struct Latency {
    /// How many messages, one after the other
    #[arg(long, value_name = "N", default_value_t = 5_000, conflicts_with = "rate",
        value_parser = clap::value_parser!(u64).range(1..))]
    count: u64,
    /// Send so many each second, and receive them with a subscription
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    rate: Option<u64>,
    /// For how long
    #[arg(long, value_name = "DURATION", default_value = "10s", requires = "rate",
        value_parser = humantime::parse_duration)]
    duration: Duration,
    #[command(flatten)]
    size: Size,
    #[command(flatten)]
    pub(super) on: On,
}

/// Messages before anything is measured.
const WARM_UP: u64 = 50;
/// Sending times that may wait: when a server is away for a while, all that follows is late, and
/// counts as late.
const PACED: usize = 1 << 16;

pub(super) async fn run(
    args: Latency,
    client: &Client,
    ground: &mut Ground<'_>,
    meter: &Arc<Meter>,
) -> Result<Report, Failure> {
    match args.rate {
        None => {
            let publisher = client.publisher(&ground.topic).open().await?;
            apart(one_by_one(args, publisher, Arc::clone(meter))).await
        }
        Some(rate) => at_a_rate(args, rate, client, ground, meter).await,
    }
}

async fn one_by_one(
    args: Latency,
    publisher: Publisher,
    meter: Arc<Meter>,
) -> Result<Report, Failure> {
    let size = args.size.size.0;
    let messages = Messages::new(usize::try_from(size).unwrap_or(usize::MAX), false);
    for number in 0..WARM_UP {
        publisher.publish(messages.nth(number)).await?;
    }
    meter.begin(args.count);
    let mut stored = Latencies::new();
    let started = Instant::now();
    for number in 0..args.count {
        let sent = Instant::now();
        publisher.publish(messages.nth(number)).await?;
        stored.record(sent.elapsed());
        meter.add(1);
    }
    Ok(Report {
        work: "latency",
        messages: args.count,
        bytes: size,
        took: started.elapsed(),
        latencies: vec![("stored", stored)],
    })
}

/// Latencies count from when a message was to be sent: one that had to wait for its turn has waited.
async fn at_a_rate(
    args: Latency,
    rate: u64,
    client: &Client,
    ground: &mut Ground<'_>,
    meter: &Arc<Meter>,
) -> Result<Report, Failure> {
    // Each carries the time at which it was to be sent.
    let size = args.size.size.0.max(8);
    let count = whole(rate as f64 * args.duration.as_secs_f64()).max(1);
    let publisher = client.publisher(&ground.topic).open().await?;
    let subscriber = ground.subscribe(Start::Latest).await?;
    tokio::time::sleep(SETTLING).await;
    meter.begin(count);
    let started = Instant::now() + SETTLING;
    let (due, paced) = mpsc::channel(PACED);
    let (tickets, sent) = mpsc::channel(PACED);
    let mut running = JoinSet::new();
    running.spawn_blocking(move || {
        pace(started, rate, count, &due);
        Ok(None)
    });
    let payload = payload(usize::try_from(size).unwrap_or(usize::MAX)).to_vec();
    running.spawn(send(publisher, payload, paced, tickets));
    running.spawn(stored(started, sent));
    running.spawn(received(subscriber, count, started, Arc::clone(meter)));
    let mut latencies = Vec::new();
    while let Some(done) = running.join_next().await {
        let done = done.map_err(|error| Failure::failed(error.to_string()))?;
        latencies.extend(done?);
    }
    latencies.sort_by_key(|(what, _)| std::cmp::Reverse(*what));
    let took = started.elapsed();
    Ok(Report { work: "latency", messages: count, bytes: size, took, latencies })
}

type Measured = Result<Option<(&'static str, Latencies)>, Failure>;

/// Says when each message is to be sent, on time, however far the others are.
fn pace(started: Instant, rate: u64, count: u64, due: &mpsc::Sender<Duration>) {
    precise_sleep();
    for number in 0..count {
        let at = Duration::from_secs_f64(number as f64 / rate as f64);
        std::thread::sleep((started + at).saturating_duration_since(Instant::now()));
        if due.blocking_send(at).is_err() {
            return;
        }
    }
}

/// A thread is woken up to 50 µs late otherwise.
fn precise_sleep() {
    #[cfg(target_os = "linux")]
    // What fails is less precise.
    let _ = rustix::thread::set_current_timer_slack(std::num::NonZero::new(1));
}

async fn send(
    publisher: Publisher,
    mut payload: Vec<u8>,
    mut paced: mpsc::Receiver<Duration>,
    tickets: mpsc::Sender<(Duration, PublishTicket)>,
) -> Measured {
    while let Some(due) = paced.recv().await {
        let stamp = u64::try_from(due.as_nanos()).unwrap_or(u64::MAX);
        payload[..8].copy_from_slice(&stamp.to_le_bytes());
        let ticket = publisher.enqueue(payload.clone()).await?;
        if tickets.send((due, ticket)).await.is_err() {
            break;
        }
    }
    Ok(None)
}

async fn stored(started: Instant, mut sent: mpsc::Receiver<(Duration, PublishTicket)>) -> Measured {
    let mut latencies = Latencies::new();
    while let Some((due, ticket)) = sent.recv().await {
        ticket.await?;
        latencies.record(started.elapsed().saturating_sub(due));
    }
    Ok(Some(("stored", latencies)))
}

async fn received(
    mut subscriber: Subscriber,
    count: u64,
    started: Instant,
    meter: Arc<Meter>,
) -> Measured {
    let mut latencies = Latencies::new();
    for _ in 0..count {
        let delivery = next(&mut subscriber).await?;
        if let Some(stamp) = delivery.payload.first_chunk() {
            let due = Duration::from_nanos(u64::from_le_bytes(*stamp));
            latencies.record(started.elapsed().saturating_sub(due));
        }
        delivery.ack();
        meter.add(1);
    }
    Ok(Some(("received", latencies)))
}
