//! NATS JetStream, with async-nats: asynchronous publishes with a window of acks, pull consumers
//! that ask for 5,000 messages at a time and ack each.

use std::collections::VecDeque;
use std::future::IntoFuture as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use async_nats::HeaderMap;
use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, PullConsumer, pull};
use async_nats::jetstream::context::{ContextBuilder, PublishAckFuture};
use async_nats::jetstream::{Context, stream};
use bytes::Bytes;
use futures_util::StreamExt as _;
use hdrhistogram::Histogram;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::{Drive, Measured, Work, histogram, late, paced, payload, record, stamped};

const STREAM: &str = "S";
const SUBJECT: &str = "s.t";
/// A server refuses what comes when it has 10,000 messages to store.
const IN_FLIGHT: u64 = 8_000;

pub(super) async fn run(drive: &Drive) -> Result<Measured> {
    let context = connect(drive).await?;
    let settings = stream::Config {
        name: STREAM.to_owned(),
        subjects: vec![SUBJECT.to_owned()],
        storage: stream::StorageType::File,
        allow_atomic_publish: drive.batch > 0,
        num_replicas: 1,
        ..stream::Config::default()
    };
    context.create_stream(settings).await?;
    match drive.work {
        Work::Publish => publish(drive, &context).await,
        Work::Latency => latency(drive, &context).await,
        Work::Rate => rate(drive, &context).await,
        Work::Replay => replay(drive, &context).await,
        Work::Fanout => fanout(drive, &context).await,
    }
}

async fn connect(drive: &Drive) -> Result<Context> {
    let options =
        async_nats::ConnectOptions::new().client_capacity(65_536).subscription_capacity(1 << 20);
    let client = options.connect(&drive.address).await?;
    let minute = Duration::from_secs(60);
    let builder = ContextBuilder::new().timeout(minute).ack_timeout(minute);
    Ok(builder.max_ack_inflight(200_000).build(client))
}

async fn publish(drive: &Drive, context: &Context) -> Result<Measured> {
    let mut contexts = Vec::new();
    for _ in 0..drive.publishers {
        contexts.push(connect(drive).await?);
    }
    let started = Instant::now();
    let end = started + Duration::from_secs_f64(drive.seconds);
    let mut running = JoinSet::new();
    for (number, context) in contexts.into_iter().enumerate() {
        let drive = drive.clone();
        running.spawn(async move {
            let until = |_| Instant::now() < end;
            match drive.batch {
                0 => send(&context, &drive, until).await,
                _ => send_atomic(&context, &drive, number, until).await,
            }
        });
    }
    let mut messages = 0;
    while let Some(sent) = running.join_next().await {
        messages += sent??;
    }
    let took = started.elapsed();
    let stored = context.get_stream(STREAM).await?.info().await?.state.messages;
    ensure!(stored == messages, "{messages} were answered and {stored} are stored");
    Ok(Measured::new(messages, took))
}

/// Publishes with a window, as long as it should, and waits for all acks.
async fn send(context: &Context, drive: &Drive, more: impl Fn(u64) -> bool) -> Result<u64> {
    let payload = Bytes::from(payload(drive.size));
    let in_flight = drive.in_flight.min((IN_FLIGHT / drive.publishers.max(1)) as usize);
    let mut window: VecDeque<PublishAckFuture> = VecDeque::with_capacity(in_flight);
    let mut sent = 0;
    while more(sent) {
        if window.len() >= in_flight {
            window.pop_front().context("it is full")?.into_future().await?;
        }
        window.push_back(context.publish(SUBJECT, payload.clone()).await?);
        sent += 1;
    }
    for ack in window {
        ack.into_future().await?;
    }
    Ok(sent)
}

/// Atomic batches, several in flight.
async fn send_atomic(
    context: &Context,
    drive: &Drive,
    publisher: usize,
    more: impl Fn(u64) -> bool,
) -> Result<u64> {
    let payload = Bytes::from(payload(drive.size));
    let client = context.client();
    let depth = (drive.in_flight as u64 / drive.batch).max(1) as usize;
    let mut window: VecDeque<PublishAckFuture> = VecDeque::with_capacity(depth);
    let mut sent = 0;
    while more(sent) {
        if window.len() >= depth {
            window.pop_front().context("it is full")?.into_future().await?;
        }
        let id = format!("{publisher}-{sent}");
        for number in 1..=drive.batch {
            let mut headers = HeaderMap::new();
            headers.insert("Nats-Batch-Id", id.as_str());
            headers.insert("Nats-Batch-Sequence", number.to_string());
            if number == drive.batch {
                headers.insert("Nats-Batch-Commit", "1");
                let ack = context.publish_with_headers(SUBJECT, headers, payload.clone()).await?;
                window.push_back(ack);
            } else if number == 1 {
                // The first one is answered, and says whether the batch may go on.
                let reply = client.request_with_headers(SUBJECT, headers, payload.clone()).await?;
                ensure!(reply.payload.is_empty(), "a batch is refused: {:?}", reply.payload);
            } else {
                client.publish_with_headers(SUBJECT, headers, payload.clone()).await?;
            }
        }
        sent += drive.batch;
    }
    for ack in window {
        ack.into_future().await?;
    }
    Ok(sent)
}

async fn latency(drive: &Drive, context: &Context) -> Result<Measured> {
    let payload = Bytes::from(payload(drive.size));
    for _ in 0..50 {
        context.publish(SUBJECT, payload.clone()).await?.await?;
    }
    let mut stored = histogram();
    let started = Instant::now();
    for _ in 0..drive.count {
        let sent = Instant::now();
        context.publish(SUBJECT, payload.clone()).await?.await?;
        record(&mut stored, sent.elapsed());
    }
    let latencies = vec![("stored", stored)];
    Ok(Measured { messages: drive.count, took: started.elapsed(), latencies })
}

async fn rate(drive: &Drive, context: &Context) -> Result<Measured> {
    let consumer = consumer(context, "rate").await?;
    let publisher = connect(drive).await?;
    let payload = payload(drive.size.max(8));
    let (started, count, mut due) = paced(drive.rate, drive.seconds);
    let receiving = tokio::spawn(async move {
        let mut received = histogram();
        receive(&consumer, count, Some((started, &mut received))).await.map(|()| received)
    });
    let (acks, mut answers) = mpsc::channel::<(Duration, PublishAckFuture)>(1 << 16);
    let answering = tokio::spawn(async move {
        let mut stored = histogram();
        while let Some((due, ack)) = answers.recv().await {
            ack.into_future().await?;
            record(&mut stored, started.elapsed().saturating_sub(due));
        }
        anyhow::Ok(stored)
    });
    while let Some(at) = due.recv().await {
        let ack = publisher.publish(SUBJECT, stamped(&payload, at).into()).await?;
        acks.send((at, ack)).await?;
    }
    drop(acks);
    let latencies = vec![("stored", answering.await??), ("received", receiving.await??)];
    Ok(Measured { messages: count, took: started.elapsed(), latencies })
}

async fn consumer(context: &Context, name: &str) -> Result<PullConsumer> {
    let settings = pull::Config {
        durable_name: Some(name.to_owned()),
        ack_policy: AckPolicy::Explicit,
        max_ack_pending: 200_000,
        deliver_policy: DeliverPolicy::All,
        ..pull::Config::default()
    };
    Ok(context.get_stream(STREAM).await?.create_consumer(settings).await?)
}

/// Receives so many, and acks each.
async fn receive(
    consumer: &PullConsumer,
    count: u64,
    mut latencies: Option<(Instant, &mut Histogram<u64>)>,
) -> Result<()> {
    let mut messages = consumer.stream().max_messages_per_batch(5_000).messages().await?;
    for _ in 0..count {
        let message = messages.next().await.context("the stream ended")??;
        if let Some((started, latencies)) = &mut latencies {
            record(latencies, late(&message.payload, *started));
        }
        message.ack().await.map_err(|error| anyhow!("{error}"))?;
    }
    Ok(())
}

async fn replay(drive: &Drive, context: &Context) -> Result<Measured> {
    let loading = Drive { in_flight: 5_000, ..drive.clone() };
    send(context, &loading, |sent| sent < drive.count).await?;
    let mut consumer = consumer(context, "replay").await?;
    let started = Instant::now();
    receive(&consumer, drive.count, None).await?;
    // An ack has no answer: it counts when the server counts it.
    loop {
        let info = consumer.info().await?;
        if info.num_ack_pending == 0 && info.num_pending == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Ok(Measured::new(drive.count, started.elapsed()))
}

async fn fanout(drive: &Drive, context: &Context) -> Result<Measured> {
    let mut running = JoinSet::new();
    for number in 0..drive.subscribers {
        let consumer = consumer(&connect(drive).await?, &format!("f{number}")).await?;
        let count = drive.count;
        running.spawn(async move { receive(&consumer, count, None).await });
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    let started = Instant::now();
    send(context, drive, |sent| sent < drive.count).await?;
    while let Some(received) = running.join_next().await {
        received??;
    }
    Ok(Measured::new(drive.count * drive.subscribers, started.elapsed()))
}
