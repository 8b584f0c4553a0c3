//! Receiving: what is there, or what comes.

use std::sync::Arc;

use clap::Args as ClapArgs;
use pubsub_client::{Client, Delivery, Event, Start, Subscriber};
use tokio::time::Instant;

use super::ground::Ground;
use super::load::Messages;
use super::meter::{Meter, Report};
use super::publish::{Until, publish};
use super::{On, Size, apart};
use crate::failure::Failure;

/// How many messages are received and acked together.
const AT_ONCE: usize = 500;

#[derive(Debug, ClapArgs)]
pub(crate) struct Replay {
    /// How many messages to publish first, into a new topic
    #[arg(long, value_name = "N", default_value_t = 1_000_000, conflicts_with = "topic",
        value_parser = clap::value_parser!(u64).range(1..))]
    count: u64,
    #[command(flatten)]
    size: Size,
    /// As a reader, which keeps its position itself
    #[arg(long)]
    no_ack: bool,
    #[command(flatten)]
    pub(super) on: On,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Subscribe {
    /// The topic
    pub(super) topic: String,
    /// Stop after this many messages [default: at Ctrl-C]
    #[arg(long, short = 'n', value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
}

pub(super) async fn replay(
    args: Replay,
    client: &Client,
    ground: &mut Ground<'_>,
    meter: &Arc<Meter>,
) -> Result<Report, Failure> {
    if args.on.topic.is_none() {
        let size = usize::try_from(args.size.size.0).unwrap_or(usize::MAX);
        let publisher = client.publisher(&ground.topic).open().await?;
        meter.begin(args.count);
        let messages = Messages::new(size, false);
        publish(publisher, messages, Until::Count(args.count), Arc::clone(meter)).await?;
    }
    let count = ground.messages().await?;
    let subscriber = if args.no_ack {
        client.reader([&ground.topic]).start(Start::Earliest).open().await?
    } else {
        ground.subscribe(Start::Earliest).await?
    };
    meter.begin(count);
    let started = Instant::now();
    let bytes = apart(receive(subscriber, count, Arc::clone(meter))).await?;
    let took = started.elapsed();
    let bytes = bytes.checked_div(count).unwrap_or_default();
    Ok(Report { work: "replay", messages: count, bytes, took, latencies: Vec::new() })
}

pub(super) async fn subscribe(
    args: Subscribe,
    client: &Client,
    ground: &Ground<'_>,
    meter: &Arc<Meter>,
) -> Result<Report, Failure> {
    let subscriber = client.reader([&ground.topic]).open().await?;
    meter.begin(args.count.unwrap_or_default());
    let count = args.count.unwrap_or(u64::MAX);
    let started = Instant::now();
    let bytes = apart(receive(subscriber, count, Arc::clone(meter))).await?;
    let took = started.elapsed();
    let bytes = bytes.checked_div(count).unwrap_or_default();
    Ok(Report { work: "subscribe", messages: count, bytes, took, latencies: Vec::new() })
}

/// Receives and acks so many messages, until the last of the acks is on the server's disk. It
/// returns the bytes of their payloads.
pub(super) async fn receive(
    mut subscriber: Subscriber,
    count: u64,
    meter: Arc<Meter>,
) -> Result<u64, Failure> {
    let (mut bytes, mut rest) = (0, count);
    let mut events = Vec::with_capacity(AT_ONCE);
    while rest > 0 {
        let limit = usize::try_from(rest).unwrap_or(usize::MAX).min(AT_ONCE);
        match subscriber.next_many(&mut events, limit).await {
            Some(Ok(_)) => {}
            Some(Err(error)) => return Err(error.into()),
            None => return Err(Failure::failed("the subscriber was stopped")),
        }
        let mut received = 0;
        for event in &events {
            if let Some(delivery) = message(event)? {
                bytes += delivery.payload.len() as u64;
                received += 1;
            }
        }
        meter.add(received);
        rest -= received;
        let mut deliveries = events.drain(..).filter_map(Event::into_message);
        let last = if rest == 0 { deliveries.next_back() } else { None };
        Delivery::ack_all(deliveries);
        if let Some(last) = last {
            // Acks are confirmed in their order.
            let confirmed = last.ack_confirmed().await;
            confirmed.map_err(|error| Failure::failed(error.to_string()))?;
        }
    }
    Ok(bytes)
}

/// The next message.
pub(super) async fn next(subscriber: &mut Subscriber) -> Result<Delivery, Failure> {
    loop {
        match subscriber.next().await {
            Some(event) => {
                let event = event?;
                message(&event)?;
                if let Some(delivery) = event.into_message() {
                    return Ok(delivery);
                }
            }
            None => return Err(Failure::failed("the subscriber was stopped")),
        }
    }
}

/// The message, if it is one; what else may come spoils the measurement.
fn message(event: &Event) -> Result<Option<&Delivery>, Failure> {
    match event {
        Event::Message(delivery) => Ok(Some(delivery)),
        Event::Gap(gap) => {
            let (first, last) = (gap.range.start(), gap.range.end());
            let text = format!("messages {first} to {last} of {} are gone", gap.topic);
            Err(Failure::failed(text))
        }
        Event::DataLoss(loss) => Err(Failure::failed(format!("{} cannot be read", loss.id))),
        _ => Ok(None),
    }
}
