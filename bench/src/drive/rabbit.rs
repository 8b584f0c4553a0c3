//! RabbitMQ, with lapin: publisher confirms with a window, consumers with a prefetch of 2,000 that
//! ack each delivery.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use futures_util::StreamExt as _;
use hdrhistogram::Histogram;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
    ConfirmSelectOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties, ExchangeKind, PublisherConfirm,
};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::{Drive, Measured, Work, histogram, late, paced, payload, record, stamped};

const QUEUE: &str = "q";
const EXCHANGE: &str = "fanout";

pub(super) async fn run(drive: &Drive) -> Result<Measured> {
    let link = Link::new(drive).await?;
    link.declare(drive, QUEUE).await?;
    match drive.work {
        Work::Publish => publish(drive).await,
        Work::Latency => latency(drive, &link).await,
        Work::Rate => rate(drive, &link).await,
        Work::Replay => replay(drive, &link).await,
        Work::Fanout => fanout(drive, &link).await,
    }
}

/// A channel on a connection of its own.
struct Link {
    channel: Channel,
    _connection: Connection,
}

impl Link {
    async fn new(drive: &Drive) -> Result<Self> {
        let url = format!("amqp://guest:guest@{}/%2f?frame_max=131072", drive.address);
        let connection = Connection::connect(&url, ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        Ok(Self { channel, _connection: connection })
    }

    async fn declare(&self, drive: &Drive, queue: &str) -> Result<()> {
        let kind = if drive.stream { "stream" } else { "quorum" };
        let mut table = FieldTable::default();
        table.insert("x-queue-type".into(), AMQPValue::LongString(kind.into()));
        let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        self.channel.queue_declare(queue.into(), options, table).await?;
        Ok(())
    }

    async fn publish(&self, exchange: &str, payload: &[u8]) -> Result<PublisherConfirm> {
        let key = if exchange.is_empty() { QUEUE } else { "" };
        let options = BasicPublishOptions::default();
        let persistent = BasicProperties::default().with_delivery_mode(2);
        let publish =
            self.channel.basic_publish(exchange.into(), key.into(), options, payload, persistent);
        Ok(publish.await?)
    }

    /// Publishes with a window, as long as it should, and waits for all confirms.
    async fn send(&self, drive: &Drive, exchange: &str, more: impl Fn(u64) -> bool) -> Result<u64> {
        let payload = payload(drive.size);
        let mut window: VecDeque<PublisherConfirm> = VecDeque::with_capacity(drive.in_flight);
        let mut sent = 0;
        while more(sent) {
            if window.len() >= drive.in_flight {
                confirmed(window.pop_front().context("it is full")?).await?;
            }
            window.push_back(self.publish(exchange, &payload).await?);
            sent += 1;
        }
        for confirm in window {
            confirmed(confirm).await?;
        }
        Ok(sent)
    }

    /// Receives so many, and acks each.
    async fn receive(
        &self,
        drive: &Drive,
        queue: &str,
        count: u64,
        mut latencies: Option<(Instant, &mut Histogram<u64>)>,
    ) -> Result<()> {
        self.channel.basic_qos(2_000, BasicQosOptions::default()).await?;
        let mut table = FieldTable::default();
        if drive.stream {
            table.insert("x-stream-offset".into(), AMQPValue::LongString("first".into()));
        }
        let options = BasicConsumeOptions::default();
        let consume = self.channel.basic_consume(queue.into(), "c".into(), options, table);
        let mut consumer = consume.await?;
        for _ in 0..count {
            let delivery = consumer.next().await.context("the consumer ended")??;
            if let Some((started, latencies)) = &mut latencies {
                record(latencies, late(&delivery.data, *started));
            }
            delivery.acker.ack(BasicAckOptions { multiple: false }).await?;
        }
        Ok(())
    }
}

async fn confirmed(confirm: PublisherConfirm) -> Result<()> {
    ensure!(confirm.await?.is_ack(), "a publish was refused");
    Ok(())
}

async fn publish(drive: &Drive) -> Result<Measured> {
    let mut links = Vec::new();
    for _ in 0..drive.publishers {
        links.push(Link::new(drive).await?);
    }
    let started = Instant::now();
    let end = started + Duration::from_secs_f64(drive.seconds);
    let mut running = JoinSet::new();
    for link in links {
        let drive = drive.clone();
        running.spawn(async move { link.send(&drive, "", |_| Instant::now() < end).await });
    }
    let mut messages = 0;
    while let Some(sent) = running.join_next().await {
        messages += sent??;
    }
    Ok(Measured::new(messages, started.elapsed()))
}

async fn latency(drive: &Drive, link: &Link) -> Result<Measured> {
    let payload = payload(drive.size);
    for _ in 0..50 {
        confirmed(link.publish("", &payload).await?).await?;
    }
    let mut stored = histogram();
    let started = Instant::now();
    for _ in 0..drive.count {
        let sent = Instant::now();
        confirmed(link.publish("", &payload).await?).await?;
        record(&mut stored, sent.elapsed());
    }
    let latencies = vec![("stored", stored)];
    Ok(Measured { messages: drive.count, took: started.elapsed(), latencies })
}

async fn rate(drive: &Drive, link: &Link) -> Result<Measured> {
    let payload = payload(drive.size.max(8));
    let receiver = Link::new(drive).await?;
    let (started, count, mut due) = paced(drive.rate, drive.seconds);
    let settings = drive.clone();
    let receiving = tokio::spawn(async move {
        let mut received = histogram();
        let latencies = Some((started, &mut received));
        receiver.receive(&settings, QUEUE, count, latencies).await.map(|()| received)
    });
    let (confirms, mut waiting) = mpsc::channel::<(Duration, PublisherConfirm)>(1 << 16);
    let confirming = tokio::spawn(async move {
        let mut stored = histogram();
        while let Some((due, confirm)) = waiting.recv().await {
            confirmed(confirm).await?;
            record(&mut stored, started.elapsed().saturating_sub(due));
        }
        anyhow::Ok(stored)
    });
    while let Some(at) = due.recv().await {
        confirms.send((at, link.publish("", &stamped(&payload, at)).await?)).await?;
    }
    drop(confirms);
    let latencies = vec![("stored", confirming.await??), ("received", receiving.await??)];
    Ok(Measured { messages: count, took: started.elapsed(), latencies })
}

async fn replay(drive: &Drive, link: &Link) -> Result<Measured> {
    link.send(drive, "", |sent| sent < drive.count).await?;
    let started = Instant::now();
    link.receive(drive, QUEUE, drive.count, None).await?;
    Ok(Measured::new(drive.count, started.elapsed()))
}

/// A queue for each subscription, or one stream that all of them read.
async fn fanout(drive: &Drive, link: &Link) -> Result<Measured> {
    let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    let declare = link.channel.exchange_declare(
        EXCHANGE.into(),
        ExchangeKind::Fanout,
        options,
        FieldTable::default(),
    );
    declare.await?;
    let mut running = JoinSet::new();
    for number in 0..drive.subscribers {
        let queue = if drive.stream { QUEUE.to_owned() } else { format!("f{number}") };
        let receiver = Link::new(drive).await?;
        if !drive.stream || number == 0 {
            receiver.declare(drive, &queue).await?;
            let (options, table) = (QueueBindOptions::default(), FieldTable::default());
            let name = queue.as_str().into();
            receiver.channel.queue_bind(name, EXCHANGE.into(), "".into(), options, table).await?;
        }
        let drive = drive.clone();
        running.spawn(async move { receiver.receive(&drive, &queue, drive.count, None).await });
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    let started = Instant::now();
    link.send(drive, EXCHANGE, |sent| sent < drive.count).await?;
    while let Some(received) = running.join_next().await {
        received??;
    }
    Ok(Measured::new(drive.count * drive.subscribers, started.elapsed()))
}
