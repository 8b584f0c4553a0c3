//! Publishing as fast as it goes.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use clap::Args as ClapArgs;
use futures_util::FutureExt as _;
use pubsub_client::{Client, PublishError, PublishReceipt, PublishTicket, Publisher};
use tokio::task::{JoinSet, unconstrained};
use tokio::time::Instant;

use super::ground::Ground;
use super::load::Messages;
use super::meter::{Latencies, Meter, Report};
use super::{On, Size};
use crate::failure::Failure;

#[derive(Debug, ClapArgs)]
pub(crate) struct Publish {
    /// For how long
    #[arg(long, value_name = "DURATION", default_value = "5s", conflicts_with = "count",
        value_parser = humantime::parse_duration)]
    duration: Duration,
    /// How many messages, instead
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    #[command(flatten)]
    size: Size,
    /// How many publishers, each with a connection of its own
    #[arg(long, value_name = "N", default_value_t = 1,
        value_parser = clap::value_parser!(u64).range(1..=1000))]
    publishers: u64,
    /// How many messages of each publisher may wait for their receipts [default: 20000]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    in_flight: Option<u64>,
    /// Give each message a random idempotency key
    #[arg(long)]
    keys: bool,
    #[command(flatten)]
    pub(super) on: On,
}

/// Of so many messages the time is taken of one.
const SAMPLE: u64 = 16;
/// How often is looked for receipts that have come.
const COLLECT: u64 = 64;

pub(super) async fn run(
    args: Publish,
    client: &Client,
    ground: &Ground<'_>,
    meter: &Arc<Meter>,
) -> Result<Report, Failure> {
    let size = args.size.size.0;
    let mut publishers = Vec::new();
    for number in 0..args.publishers {
        let mut builder = client.publisher(&ground.topic);
        if let Some(in_flight) = args.in_flight {
            builder = builder.window_messages(usize::try_from(in_flight).unwrap_or(usize::MAX));
        }
        let share = |count| count / args.publishers + u64::from(number < count % args.publishers);
        publishers.push((builder.open().await?, args.count.map(share)));
    }
    meter.begin(args.count.unwrap_or_default());
    let started = Instant::now();
    let mut running = JoinSet::new();
    for (publisher, share) in publishers {
        let messages = Messages::new(usize::try_from(size).unwrap_or(usize::MAX), args.keys);
        let until = share.map_or(Until::Time(started + args.duration), Until::Count);
        running.spawn(publish(publisher, messages, until, Arc::clone(meter)));
    }
    let (mut count, mut stored) = (0, Latencies::new());
    while let Some(published) = running.join_next().await {
        let published = published.map_err(|error| Failure::failed(error.to_string()))?;
        let (published, latencies) = published?;
        count += published;
        stored.add(&latencies);
    }
    Ok(Report {
        work: "publish",
        messages: count,
        bytes: size,
        took: started.elapsed(),
        latencies: vec![("stored", stored)],
    })
}

/// When it is enough.
#[derive(Clone, Copy, Debug)]
pub(super) enum Until {
    Count(u64),
    Time(Instant),
}

impl Until {
    fn is_over(self, number: u64) -> bool {
        match self {
            Self::Count(count) => number >= count,
            Self::Time(end) => number.is_multiple_of(COLLECT) && Instant::now() >= end,
        }
    }
}

/// Publishes, and waits for all receipts. It returns how many there were.
pub(super) async fn publish(
    publisher: Publisher,
    messages: Messages,
    until: Until,
    meter: Arc<Meter>,
) -> Result<(u64, Latencies), Failure> {
    let mut receipts = Receipts::new(&meter);
    let mut number = 0;
    while !until.is_over(number) {
        let sent = number.is_multiple_of(SAMPLE).then(Instant::now);
        let ticket = publisher.enqueue(messages.nth(number)).await?;
        receipts.waiting.push_back((sent, ticket));
        number += 1;
        if number.is_multiple_of(COLLECT) {
            receipts.collect()?;
        }
    }
    while let Some((sent, ticket)) = receipts.waiting.pop_front() {
        let receipt = ticket.await;
        receipts.take(sent, receipt)?;
    }
    Ok((number, receipts.latencies))
}

/// Receipts in the order in which they come. No more wait than the publisher's window has room for.
struct Receipts<'a> {
    waiting: VecDeque<(Option<Instant>, PublishTicket)>,
    latencies: Latencies,
    meter: &'a Meter,
}

impl<'a> Receipts<'a> {
    fn new(meter: &'a Meter) -> Self {
        Self { waiting: VecDeque::new(), latencies: Latencies::new(), meter }
    }

    /// Takes those that have come.
    fn collect(&mut self) -> Result<(), Failure> {
        while let Some((sent, ticket)) = self.waiting.front_mut() {
            // What enqueuing has left of the task's budget says nothing about receipts.
            let receipt = unconstrained(ticket).now_or_never();
            let (sent, Some(receipt)) = (*sent, receipt) else { break };
            self.waiting.pop_front();
            self.take(sent, receipt)?;
        }
        Ok(())
    }

    fn take(
        &mut self,
        sent: Option<Instant>,
        receipt: Result<PublishReceipt, PublishError>,
    ) -> Result<(), Failure> {
        receipt?;
        self.meter.add(1);
        if let Some(sent) = sent {
            self.latencies.record(sent.elapsed());
        }
        Ok(())
    }
}
