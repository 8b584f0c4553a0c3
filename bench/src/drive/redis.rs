//! Redis Streams, with one multiplexed connection for each publisher: pipelines of XADD, several
//! in flight; XREADGROUP of 1,000, and one XACK for all of them.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use hdrhistogram::Histogram;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, Cmd, RedisResult, cmd, pipe};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};

use super::{Drive, Measured, Work, histogram, late, paced, payload, record, stamped};

const STREAM: &str = "s";

pub(super) async fn run(drive: &Drive) -> Result<Measured> {
    match drive.work {
        Work::Publish => publish(drive).await,
        Work::Latency => latency(drive).await,
        Work::Rate => rate(drive).await,
        Work::Replay => replay(drive).await,
        Work::Fanout => fanout(drive).await,
    }
}

async fn connect(drive: &Drive) -> Result<MultiplexedConnection> {
    let client = Client::open(format!("redis://{}/", drive.address))?;
    let settings =
        AsyncConnectionConfig::new().set_response_timeout(None).set_pipeline_buffer_size(4_096);
    Ok(client.get_multiplexed_async_connection_with_config(&settings).await?)
}

fn add(payload: &[u8]) -> Cmd {
    let mut add = cmd("XADD");
    add.arg(STREAM).arg("*").arg("d").arg(payload);
    add
}

async fn publish(drive: &Drive) -> Result<Measured> {
    let mut connections = Vec::new();
    for _ in 0..drive.publishers {
        connections.push(connect(drive).await?);
    }
    let started = Instant::now();
    let end = started + Duration::from_secs_f64(drive.seconds);
    let mut running = JoinSet::new();
    for connection in connections {
        let drive = drive.clone();
        running.spawn(async move { send(connection, &drive, |_| Instant::now() < end).await });
    }
    let mut messages = 0;
    while let Some(sent) = running.join_next().await {
        messages += sent??;
    }
    Ok(Measured::new(messages, started.elapsed()))
}

/// Publishes in pipelines, as long as it should, and waits for all answers.
async fn send(
    connection: MultiplexedConnection,
    drive: &Drive,
    more: impl Fn(u64) -> bool,
) -> Result<u64> {
    let payload = payload(drive.size);
    let length: u64 = if drive.size > 4_096 { 16 } else { 64 };
    let depth = (drive.in_flight as u64 / length).max(1) as usize;
    let mut window: VecDeque<JoinHandle<RedisResult<()>>> = VecDeque::with_capacity(depth);
    let mut sent = 0;
    while more(sent) {
        if window.len() >= depth {
            window.pop_front().context("it is full")?.await??;
        }
        let mut pipeline = pipe();
        for _ in 0..length {
            pipeline.add_command(add(&payload)).ignore();
        }
        let mut connection = connection.clone();
        window.push_back(tokio::spawn(async move { pipeline.query_async(&mut connection).await }));
        sent += length;
    }
    for answer in window {
        answer.await??;
    }
    Ok(sent)
}

async fn latency(drive: &Drive) -> Result<Measured> {
    let mut connection = connect(drive).await?;
    let add = add(&payload(drive.size));
    for _ in 0..50 {
        add.query_async::<()>(&mut connection).await?;
    }
    let mut stored = histogram();
    let started = Instant::now();
    for _ in 0..drive.count {
        let sent = Instant::now();
        add.query_async::<()>(&mut connection).await?;
        record(&mut stored, sent.elapsed());
    }
    let latencies = vec![("stored", stored)];
    Ok(Measured { messages: drive.count, took: started.elapsed(), latencies })
}

async fn rate(drive: &Drive) -> Result<Measured> {
    let connection = connect(drive).await?;
    let mut receiver = connect(drive).await?;
    create_group(&mut receiver, "g").await?;
    let payload = payload(drive.size.max(8));
    let (started, count, mut due) = paced(drive.rate, drive.seconds);
    let receiving = tokio::spawn(async move {
        let mut received = histogram();
        receive(&mut receiver, "g", count, Some((started, &mut received))).await.map(|()| received)
    });
    let (answers, mut waiting) = mpsc::channel::<(Duration, JoinHandle<RedisResult<()>>)>(1 << 16);
    let answering = tokio::spawn(async move {
        let mut stored = histogram();
        while let Some((due, answer)) = waiting.recv().await {
            answer.await??;
            record(&mut stored, started.elapsed().saturating_sub(due));
        }
        anyhow::Ok(stored)
    });
    while let Some(at) = due.recv().await {
        let (add, mut connection) = (add(&stamped(&payload, at)), connection.clone());
        let answer = tokio::spawn(async move { add.query_async::<()>(&mut connection).await });
        answers.send((at, answer)).await?;
    }
    drop(answers);
    let latencies = vec![("stored", answering.await??), ("received", receiving.await??)];
    Ok(Measured { messages: count, took: started.elapsed(), latencies })
}

async fn create_group(connection: &mut MultiplexedConnection, group: &str) -> Result<()> {
    let mut create = cmd("XGROUP");
    create.arg("CREATE").arg(STREAM).arg(group).arg("0").arg("MKSTREAM");
    Ok(create.query_async::<()>(connection).await?)
}

type Entry = (String, Vec<(Vec<u8>, Vec<u8>)>);

/// Receives so many, and acks them by the frame.
async fn receive(
    connection: &mut MultiplexedConnection,
    group: &str,
    count: u64,
    mut latencies: Option<(Instant, &mut Histogram<u64>)>,
) -> Result<()> {
    let mut received = 0;
    let mut acks: VecDeque<JoinHandle<RedisResult<()>>> = VecDeque::new();
    while received < count {
        let mut read = cmd("XREADGROUP");
        read.arg("GROUP").arg(group).arg("c").arg("COUNT").arg(1_000).arg("BLOCK").arg(0);
        read.arg("STREAMS").arg(STREAM).arg(">");
        let streams: Option<Vec<(String, Vec<Entry>)>> = read.query_async(connection).await?;
        for (_, entries) in streams.unwrap_or_default() {
            let mut ack = cmd("XACK");
            ack.arg(STREAM).arg(group);
            for (id, fields) in &entries {
                ack.arg(id);
                if let (Some((started, latencies)), Some((_, payload))) =
                    (&mut latencies, fields.first())
                {
                    record(latencies, late(payload, *started));
                }
            }
            received += entries.len() as u64;
            let mut connection = connection.clone();
            acks.push_back(tokio::spawn(async move { ack.query_async(&mut connection).await }));
            if acks.len() > 4 {
                acks.pop_front().context("there are some")?.await??;
            }
        }
    }
    for ack in acks {
        ack.await??;
    }
    Ok(())
}

async fn replay(drive: &Drive) -> Result<Measured> {
    let mut connection = connect(drive).await?;
    send(connection.clone(), drive, |sent| sent < drive.count).await?;
    create_group(&mut connection, "g").await?;
    let started = Instant::now();
    receive(&mut connection, "g", drive.count, None).await?;
    Ok(Measured::new(drive.count, started.elapsed()))
}

async fn fanout(drive: &Drive) -> Result<Measured> {
    let mut running = JoinSet::new();
    for number in 0..drive.subscribers {
        let mut connection = connect(drive).await?;
        let group = format!("f{number}");
        create_group(&mut connection, &group).await?;
        let count = drive.count;
        running.spawn(async move { receive(&mut connection, &group, count, None).await });
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    let started = Instant::now();
    send(connect(drive).await?, drive, |sent| sent < drive.count).await?;
    while let Some(received) = running.join_next().await {
        received??;
    }
    Ok(Measured::new(drive.count * drive.subscribers, started.elapsed()))
}
