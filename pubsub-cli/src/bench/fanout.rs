//! One publisher, many subscriptions.

use std::sync::Arc;

use clap::Args as ClapArgs;
use pubsub_client::{Client, Start};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::ground::Ground;
use super::load::Messages;
use super::meter::{Meter, Report};
use super::publish::{Until, publish};
use super::receive::receive;
use super::{On, SETTLING, Size};
use crate::failure::Failure;

#[derive(Debug, ClapArgs)]
pub(crate) struct Fanout {
    /// How many durable subscriptions, each with a consumer that acks
    #[arg(long, value_name = "N", default_value_t = 10,
        value_parser = clap::value_parser!(u64).range(1..=1000))]
    subscribers: u64,
    /// How many messages
    #[arg(long, value_name = "N", default_value_t = 100_000,
        value_parser = clap::value_parser!(u64).range(1..))]
    count: u64,
    #[command(flatten)]
    size: Size,
    #[command(flatten)]
    pub(super) on: On,
}

/// It counts deliveries.
pub(super) async fn run(
    args: Fanout,
    client: &Client,
    ground: &mut Ground<'_>,
    meter: &Arc<Meter>,
) -> Result<Report, Failure> {
    let size = args.size.size.0;
    let publisher = client.publisher(&ground.topic).open().await?;
    let mut subscribers = Vec::new();
    for _ in 0..args.subscribers {
        subscribers.push(ground.subscribe(Start::Latest).await?);
    }
    tokio::time::sleep(SETTLING).await;
    let deliveries = args.subscribers * args.count;
    meter.begin(deliveries);
    let started = Instant::now();
    let mut running = JoinSet::new();
    for subscriber in subscribers {
        running.spawn(receive(subscriber, args.count, Arc::clone(meter)));
    }
    let messages = Messages::new(usize::try_from(size).unwrap_or(usize::MAX), false);
    let unseen = Arc::new(Meter::new(false));
    publish(publisher, messages, Until::Count(args.count), unseen).await?;
    while let Some(received) = running.join_next().await {
        received.map_err(|error| Failure::failed(error.to_string()))??;
    }
    let took = started.elapsed();
    Ok(Report { work: "fanout", messages: deliveries, bytes: size, took, latencies: Vec::new() })
}
