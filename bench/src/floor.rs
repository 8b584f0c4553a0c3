//! What no system can beat: a file that is appended to and synced, a table of keys, a socket, and
//! gRPC without anything behind it.

use std::collections::{HashMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::{Args, Subcommand};
use prost::Message as _;
use pubsub_proto::v1::publish_run::Outcome;
use pubsub_proto::v1::publish_stream_request::Frame as Request;
use pubsub_proto::v1::publish_stream_response::Frame as Response;
use pubsub_proto::v1::publisher_service_client::PublisherServiceClient;
use pubsub_proto::v1::publisher_service_server::{PublisherService, PublisherServiceServer};
use pubsub_proto::v1::{
    Message, PublishBatch, PublishRequest, PublishResponse, PublishResults, PublishRun,
    PublishStreamRequest, PublishStreamResponse, Stored,
};
use redb::{Database, TableDefinition};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::drive::{Measured, histogram, payload, record};

#[derive(Debug, Subcommand)]
pub enum Floor {
    /// Append groups of messages to a file, and sync each
    Log {
        #[command(flatten)]
        common: Common,
        /// Messages of a group
        #[arg(long, default_value_t = 1_000)]
        group: u64,
    },
    /// Insert random keys into one table, in groups
    Index {
        #[command(flatten)]
        common: Common,
    },
    /// Insert random keys into a map, and remove the oldest ones
    Map {
        #[command(flatten)]
        common: Common,
    },
    /// Carry messages through a socket, 64 KiB at a time
    Stream {
        #[command(flatten)]
        common: Common,
    },
    /// Send a message through a socket and back again, one after the other
    RoundTrips {
        #[command(flatten)]
        common: Common,
    },
    /// Answer publishes without storing them
    GrpcServer {
        #[arg(long)]
        port: u16,
    },
    /// Publish to that
    GrpcClient {
        #[arg(long)]
        address: String,
        #[command(flatten)]
        common: Common,
    },
}

#[derive(Debug, Args)]
pub struct Common {
    /// Where
    #[arg(long, default_value = ".")]
    directory: PathBuf,
    /// Bytes of a payload
    #[arg(long, default_value_t = 100)]
    size: usize,
    /// For how long
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
}

impl Common {
    fn end(&self) -> Instant {
        Instant::now() + Duration::from_secs_f64(self.seconds)
    }
}

pub fn run(floor: Floor) -> Result<()> {
    let measured = match floor {
        Floor::Log { common, group } => log(&common, group)?,
        Floor::Index { common } => index(&common)?,
        Floor::Map { common } => map(&common),
        Floor::Stream { common } => stream(&common)?,
        Floor::RoundTrips { common } => round_trips(&common)?,
        Floor::GrpcServer { port } => return runtime()?.block_on(serve(port)),
        Floor::GrpcClient { address, common } => runtime()?.block_on(publish(&address, &common))?,
    };
    println!("{}", measured.json());
    Ok(())
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?)
}

fn log(common: &Common, group: u64) -> Result<Measured> {
    let path = common.directory.join("log");
    let mut file: File = OpenOptions::new().create_new(true).append(true).open(path)?;
    let payload = payload(common.size);
    let (mut buffer, mut stored, mut messages) = (Vec::new(), histogram(), 0);
    let started = Instant::now();
    let end = common.end();
    while Instant::now() < end {
        let sent = Instant::now();
        buffer.clear();
        for number in messages..messages + group {
            buffer.extend_from_slice(&u32::try_from(payload.len())?.to_le_bytes());
            buffer.extend_from_slice(&number.to_le_bytes());
            buffer.extend_from_slice(&payload);
        }
        file.write_all(&buffer)?;
        file.sync_data()?;
        messages += group;
        record(&mut stored, sent.elapsed());
    }
    let latencies = vec![("stored", stored)];
    Ok(Measured { messages, took: started.elapsed(), latencies })
}

const KEYS: TableDefinition<'_, u128, &[u8]> = TableDefinition::new("keys");
/// Keys that are there before anything is measured, and keys of one commit.
const KNOWN: u64 = 1_000_000;
const GROUP: u64 = 1_000;

/// As much beside each key as has to be known of a message: where it is, and what it was.
fn index(common: &Common) -> Result<Measured> {
    let database = Database::create(common.directory.join("index.redb"))?;
    let mut next = random();
    let mut insert = |count: u64| -> Result<()> {
        let transaction = database.begin_write()?;
        {
            let mut table = transaction.open_table(KEYS)?;
            for _ in 0..count {
                let key = u128::from(next()) << 64 | u128::from(next());
                table.insert(key, &[0; 56][..])?;
            }
        }
        Ok(transaction.commit()?)
    };
    for _ in 0..10 {
        insert(KNOWN / 10)?;
    }
    let started = Instant::now();
    let end = common.end();
    let mut messages = 0;
    while Instant::now() < end {
        insert(GROUP)?;
        messages += GROUP;
    }
    Ok(Measured::new(messages, started.elapsed()))
}

/// A window of so many keys: most of it fits into the cache of a CPU.
const WINDOW: usize = 100_000;

fn map(common: &Common) -> Measured {
    let mut next = random();
    let (mut map, mut oldest) = (HashMap::new(), VecDeque::new());
    let started = Instant::now();
    let end = common.end();
    let mut messages = 0;
    while Instant::now() < end {
        for number in messages..messages + GROUP {
            let key = u128::from(next()) << 64 | u128::from(next());
            map.insert(key.to_le_bytes(), number);
            oldest.push_back(key);
            if oldest.len() > WINDOW {
                let key = oldest.pop_front().expect("there are some");
                map.remove(&key.to_le_bytes());
            }
        }
        messages += GROUP;
    }
    Measured::new(messages, started.elapsed())
}

/// Two ends of a connection on this machine.
fn connected() -> Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let one = TcpStream::connect(listener.local_addr()?)?;
    let (other, _) = listener.accept()?;
    one.set_nodelay(true)?;
    other.set_nodelay(true)?;
    Ok((one, other))
}

fn stream(common: &Common) -> Result<Measured> {
    const WRITE: usize = 64 * 1024;
    let (mut one, mut other) = connected()?;
    let receiver = thread::spawn(move || -> std::io::Result<u64> {
        let (mut buffer, mut received) = (vec![0; WRITE], 0);
        loop {
            match other.read(&mut buffer)? {
                0 => return Ok(received),
                length => received += length as u64,
            }
        }
    });
    let written = payload(WRITE);
    let started = Instant::now();
    let end = common.end();
    while Instant::now() < end {
        one.write_all(&written)?;
    }
    drop(one);
    let received = receiver.join().expect("it does not panic")?;
    Ok(Measured::new(received / common.size as u64, started.elapsed()))
}

fn round_trips(common: &Common) -> Result<Measured> {
    let (mut one, mut other) = connected()?;
    let mut message = payload(common.size);
    let mut echoed = message.clone();
    // It ends with the connection.
    let echo = thread::spawn(move || {
        while other.read_exact(&mut echoed).and_then(|()| other.write_all(&echoed)).is_ok() {}
    });
    let (mut stored, mut messages) = (histogram(), 0);
    let started = Instant::now();
    let end = common.end();
    while Instant::now() < end {
        let sent = Instant::now();
        one.write_all(&message)?;
        one.read_exact(&mut message)?;
        record(&mut stored, sent.elapsed());
        messages += 1;
    }
    let took = started.elapsed();
    drop(one);
    echo.join().expect("it does not panic");
    Ok(Measured { messages, took, latencies: vec![("stored", stored)] })
}

fn random() -> impl FnMut() -> u64 {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    }
}

struct Skeleton;

#[tonic::async_trait]
impl PublisherService for Skeleton {
    type PublishStreamStream = ReceiverStream<Result<PublishStreamResponse, Status>>;

    async fn publish(
        &self,
        _: tonic::Request<PublishRequest>,
    ) -> Result<tonic::Response<PublishResponse>, Status> {
        Err(Status::unimplemented("this is a floor"))
    }

    async fn publish_stream(
        &self,
        request: tonic::Request<Streaming<PublishStreamRequest>>,
    ) -> Result<tonic::Response<Self::PublishStreamStream>, Status> {
        let mut inbound = request.into_inner();
        let (answers, outbound) = mpsc::channel(16);
        tokio::spawn(async move {
            while let Ok(Some(PublishStreamRequest { frame })) = inbound.message().await {
                let Some(Request::Batch(batch)) = frame else { continue };
                let Ok(batch) = PublishBatch::decode(batch) else { return };
                let stored = Stored { sequence: batch.first_sequence, ..Stored::default() };
                let run = PublishRun {
                    first_sequence: batch.first_sequence,
                    count: u32::try_from(batch.messages.len()).unwrap_or(u32::MAX),
                    outcome: Some(Outcome::Stored(stored)),
                    ..PublishRun::default()
                };
                let results = Response::Results(PublishResults { runs: vec![run] });
                if answers.send(Ok(PublishStreamResponse { frame: Some(results) })).await.is_err() {
                    return;
                }
            }
        });
        Ok(tonic::Response::new(ReceiverStream::new(outbound)))
    }
}

async fn serve(port: u16) -> Result<()> {
    let service = PublisherServiceServer::new(Skeleton)
        .max_decoding_message_size(pubsub_proto::MAX_FRAME_BYTES);
    let server = tonic::transport::Server::builder().tcp_nodelay(true);
    let server = server
        .initial_stream_window_size(4 << 20)
        .initial_connection_window_size(8 << 20)
        .max_frame_size(1 << 20);
    Ok({ server }.add_service(service).serve(([127, 0, 0, 1], port).into()).await?)
}

/// Batches as the SDK makes them, with a window as large as its own.
async fn publish(address: &str, common: &Common) -> Result<Measured> {
    let channel = tonic::transport::Endpoint::from_shared(format!("http://{address}"))?
        .initial_stream_window_size(4 << 20)
        .initial_connection_window_size(8 << 20)
        .connect()
        .await?;
    let (batches, requests) = mpsc::channel(4);
    let mut client = PublisherServiceClient::new(channel)
        .max_encoding_message_size(pubsub_proto::MAX_FRAME_BYTES);
    let mut results = client.publish_stream(ReceiverStream::new(requests)).await?.into_inner();
    let payload = bytes::Bytes::from(payload(common.size));
    let length = (256 * 1024 / common.size as u64).clamp(1, 512);
    let window = 20_000_u64.min(8 * 1024 * 1024 / common.size as u64);
    let started = Instant::now();
    let end = common.end();
    let (mut sent, mut answered) = (0, 0);
    while answered < sent || Instant::now() < end {
        if sent - answered + length <= window && Instant::now() < end {
            let message = || Message { payload: payload.clone(), ..Message::default() }.encoded();
            let messages = (0..length).map(|_| message()).collect();
            let first_sequence = sent + 1;
            let batch = PublishBatch { first_sequence, messages, ..PublishBatch::default() };
            let frame = Some(Request::Batch(batch.encoded()));
            batches.send(PublishStreamRequest { frame }).await?;
            sent += length;
            continue;
        }
        let answer = results.message().await?.context("the stream ended")?;
        let Some(Response::Results(results)) = answer.frame else { continue };
        answered += results.runs.iter().map(|run| u64::from(run.count)).sum::<u64>();
    }
    ensure!(answered == sent, "{sent} were sent and {answered} answered");
    Ok(Measured::new(sent, started.elapsed()))
}
