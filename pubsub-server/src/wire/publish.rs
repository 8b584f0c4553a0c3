//! Publisher streams and the unary publish.

use std::collections::VecDeque;
use std::future::Future as _;
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use prost::Message as _;
use pubsub_proto::PROTOCOL_VERSION;
use pubsub_proto::v1::publish_stream_request::Frame as Request;
use pubsub_proto::v1::publish_stream_response::Frame as Response;
use pubsub_proto::v1::publisher_service_server::PublisherService;
use pubsub_proto::v1::{
    AtomicBatch, ErrorReason, Message, PublishBatch, PublishRequest, PublishResponse,
    PublishResults, PublishStreamRequest, PublishStreamResponse, PublisherBlocked,
    PublisherHeartbeat, PublisherHello, PublisherWelcome,
};
use tokio::time::Instant;
use tonic::{Status, Streaming};

use super::convert;
use super::status::{self, invalid, protocol, status};
use super::stream::{
    End, Frames, Outbound, dead_after, drain, first_frame, heartbeat_interval, unreadable,
};
use super::{Context, turned};
use crate::broker::BrokerError;
use crate::broker::publisher::{Batch, Inspected, Open, Pending, Publisher};
use crate::limits;
use crate::steps::Task;
use crate::storage::{Atomic, Item, Run};

/// The publisher service.
#[derive(Debug)]
pub(crate) struct Service(pub(super) Context);

#[tonic::async_trait]
impl PublisherService for Service {
    type PublishStreamStream = Outbound<PublishStreamResponse>;

    async fn publish(
        &self,
        request: tonic::Request<PublishRequest>,
    ) -> Result<tonic::Response<PublishResponse>, Status> {
        let request = request.into_inner();
        let topic = convert::parse_topic(&request.topic)?;
        let (items, atomic) = match request.atomic {
            None => {
                check_count(request.messages.len(), limits::MAX_BATCH_MESSAGES)?;
                (request.messages.into_iter().map(convert::parse_message).collect(), None)
            }
            Some(atomic) => parse_atomic(request.messages, &atomic)?,
        };
        let batch = Batch { first_sequence: 1, resolved_below: 0, items, atomic };
        let published = self.0.broker.publish(&topic, batch).await;
        let (epoch, runs) = published.map_err(|error| status(&error))?;
        let results = convert::publish_results(epoch, runs);
        Ok(tonic::Response::new(PublishResponse { results }))
    }

    async fn publish_stream(
        &self,
        request: tonic::Request<Streaming<PublishStreamRequest>>,
    ) -> Result<tonic::Response<Self::PublishStreamStream>, Status> {
        let (frames, outbound) = Frames::new();
        let context = self.0.clone();
        let inbound = request.into_inner();
        // The response has to be under way before the hello is read: clients may wait for it.
        self.0.streams.spawn(Task::new(serve(context, inbound, frames)));
        Ok(tonic::Response::new(outbound))
    }
}

async fn serve(
    context: Context,
    mut inbound: Streaming<PublishStreamRequest>,
    frames: Frames<PublishStreamResponse>,
) {
    let end = match open(&context, &mut inbound, &frames).await {
        Ok(stream) => stream.run(context, inbound, &frames).await,
        Err(end) => end,
    };
    frames.end(end).await;
}

async fn open(
    context: &Context,
    inbound: &mut Streaming<PublishStreamRequest>,
    frames: &Frames<PublishStreamResponse>,
) -> Result<Stream, End> {
    let first = first_frame(context, inbound).await?;
    let PublishStreamRequest { frame: Some(Request::Hello(hello)) } = first else {
        return Err(protocol("the first frame must be a hello").into());
    };
    let heartbeat = heartbeat_interval(hello.heartbeat_interval)?;
    let publisher = context.broker.open_publisher(parse_hello(&hello)?).await?;
    let welcome = PublisherWelcome {
        boot_id: convert::uuid(context.broker.boot_id()),
        topic_epoch: publisher.topic_epoch().0,
        last_sequence: publisher.last_sequence(),
        max_in_flight_messages: limits::MAX_IN_FLIGHT_MESSAGES,
        max_in_flight_bytes: limits::MAX_IN_FLIGHT_BYTES,
        max_message_bytes: publisher.max_message_bytes(),
        heartbeat_interval: convert::duration(heartbeat),
        session_horizon: convert::duration(limits::SESSION_HORIZON),
        idempotency_window: convert::duration(publisher.idempotency_window()),
    };
    send(frames, Response::Welcome(welcome)).await?;
    Ok(Stream {
        publisher,
        heartbeat,
        last_nonce: 0,
        inspecting: None,
        waiting: None,
        pending: VecDeque::new(),
        blocked: false,
        drained: false,
    })
}

fn parse_hello(hello: &PublisherHello) -> Result<Open, Status> {
    if hello.protocol != PROTOCOL_VERSION {
        return Err(status::unsupported(hello.protocol));
    }
    if hello.next_sequence == 0 || hello.resolved_below > hello.next_sequence {
        let (next, resolved) = (hello.next_sequence, hello.resolved_below);
        let text = format!("next_sequence {next} and resolved_below {resolved} do not fit");
        return Err(protocol(text));
    }
    if hello.attach == 0 {
        return Err(invalid("attach counts from 1"));
    }
    Ok(Open {
        topic: convert::parse_topic(&hello.topic)?,
        known_epoch: convert::parse_epoch(hello.topic_epoch),
        known_boot: convert::parse_optional_uuid("boot_id", &hello.boot_id)?,
        producer: convert::parse_uuid("producer_id", &hello.producer_id)?,
        producer_epoch: hello.producer_epoch,
        attach: hello.attach,
        resolved_below: hello.resolved_below,
    })
}

type Inspecting = BoxFuture<'static, Result<Inspected, BrokerError>>;

/// An open publisher stream.
struct Stream {
    publisher: Publisher,
    heartbeat: Duration,
    last_nonce: u64,
    /// A batch whose messages are being checked.
    inspecting: Option<Inspecting>,
    /// A batch that has not been handed to the log, because there is no room.
    waiting: Option<Inspected>,
    /// Batches on their way to the disk, in order.
    pending: VecDeque<Pending>,
    /// Whether the client was told that it is blocked.
    blocked: bool,
    /// Whether the client was told that the server is about to stop.
    drained: bool,
}

/// Batches of one stream that are not answered: answers are kept for a peer that does not read.
const MAX_PENDING: usize = 512;

/// How often a batch that finds no room is tried again.
const ROOM_RETRY: Duration = Duration::from_millis(200);

impl Stream {
    async fn run(
        mut self,
        context: Context,
        mut inbound: Streaming<PublishStreamRequest>,
        frames: &Frames<PublishStreamResponse>,
    ) -> End {
        let Context { mut draining, mut stopping, .. } = context;
        let dead_after = dead_after(self.heartbeat);
        let mut dead_at = Instant::now() + dead_after;
        let mut beat = tokio::time::interval_at(Instant::now() + self.heartbeat, self.heartbeat);
        let touch_every = limits::SESSION_TOUCH;
        let mut touch = tokio::time::interval_at(Instant::now() + touch_every, touch_every);
        let mut open = true;
        loop {
            let reading = open && self.takes_more();
            if !reading {
                // Who is not listened to cannot be missed.
                dead_at = Instant::now() + dead_after;
            }
            let step = tokio::select! {
                biased;
                // Results first: they make room.
                runs = results(&mut self.pending), if !self.pending.is_empty() => {
                    self.answer(runs, frames).await
                }
                inspected = inspected(&mut self.inspecting), if self.inspecting.is_some() => {
                    self.on_inspected(inspected, frames).await
                }
                () = tokio::time::sleep(ROOM_RETRY), if self.waiting.is_some() => {
                    self.hand_over(frames).await
                }
                frame = inbound.message(), if reading => match frame {
                    Ok(Some(frame)) => {
                        dead_at = Instant::now() + dead_after;
                        self.on_frame(frame, frames).await
                    }
                    // What was received before is committed and answered still.
                    Ok(None) => {
                        open = false;
                        Ok(())
                    }
                    Err(error) => return unreadable(&error),
                },
                _ = beat.tick() => self.beat(frames).await,
                _ = touch.tick() => {
                    self.publisher.touch();
                    Ok(())
                }
                () = tokio::time::sleep_until(dead_at) => return End::Gone,
                () = turned(&mut draining), if !self.drained => {
                    self.drain(frames).await
                }
                () = turned(&mut stopping) => {
                    return BrokerError::Unavailable("the server is stopping").into();
                }
            };
            if let Err(end) = step {
                return end;
            }
            if !open && self.is_idle() {
                return End::Gone;
            }
        }
    }

    /// Whether another batch may come in.
    fn takes_more(&self) -> bool {
        let bytes: u64 = self.pending.iter().map(Pending::bytes).sum();
        let fits = self.pending.len() < MAX_PENDING && bytes < limits::MAX_IN_FLIGHT_BYTES;
        self.waiting.is_none() && self.inspecting.is_none() && fits
    }

    /// Whether nothing of what was received is under way.
    fn is_idle(&self) -> bool {
        self.pending.is_empty() && self.waiting.is_none() && self.inspecting.is_none()
    }

    async fn on_frame(
        &mut self,
        frame: PublishStreamRequest,
        frames: &Frames<PublishStreamResponse>,
    ) -> Result<(), End> {
        match frame.frame {
            Some(Request::Batch(batch)) => {
                let batch = PublishBatch::decode(batch);
                let batch = batch.map_err(|error| unreadable(&invalid(error.to_string())))?;
                let mut inspecting = self.publisher.inspect(parse_batch(batch)?);
                match (&mut inspecting).now_or_never() {
                    Some(inspected) => self.on_inspected(inspected, frames).await,
                    None => {
                        self.inspecting = Some(inspecting);
                        Ok(())
                    }
                }
            }
            Some(Request::Ping(ping)) => {
                self.last_nonce = ping.nonce;
                self.beat(frames).await
            }
            Some(Request::Hello(_)) => Err(protocol("a second hello").into()),
            None => Err(protocol("an empty frame").into()),
        }
    }

    async fn on_inspected(
        &mut self,
        inspected: Result<Inspected, BrokerError>,
        frames: &Frames<PublishStreamResponse>,
    ) -> Result<(), End> {
        self.waiting = Some(inspected?);
        self.hand_over(frames).await
    }

    /// Gives the waiting batch to the log, or keeps it and says why.
    async fn hand_over(&mut self, frames: &Frames<PublishStreamResponse>) -> Result<(), End> {
        let Some(batch) = self.waiting.take() else {
            return Ok(());
        };
        if let Err(error) = self.publisher.check_room(&batch) {
            self.waiting = Some(batch);
            if self.blocked {
                return Ok(());
            }
            self.blocked = true;
            let reason = status::reason(error.code()).into();
            let blocked = PublisherBlocked { reason, detail: error.to_string() };
            return send(frames, Response::Blocked(blocked)).await;
        }
        if std::mem::take(&mut self.blocked) {
            let reason = ErrorReason::Unspecified.into();
            let free = PublisherBlocked { reason, detail: String::new() };
            send(frames, Response::Blocked(free)).await?;
        }
        // Waiting for room here would wait for answers that only this task can take.
        match self.publisher.try_publish(batch) {
            Ok(pending) => self.pending.push_back(pending),
            Err(batch) => self.waiting = Some(batch),
        }
        Ok(())
    }

    async fn answer(
        &mut self,
        runs: Result<Vec<Run>, BrokerError>,
        frames: &Frames<PublishStreamResponse>,
    ) -> Result<(), End> {
        let epoch = self.publisher.topic_epoch();
        let runs = runs?.into_iter().map(|run| convert::publish_run(epoch, run)).collect();
        send(frames, Response::Results(PublishResults { runs })).await?;
        // What has just been committed may have made room.
        if self.waiting.is_some() { self.hand_over(frames).await } else { Ok(()) }
    }

    async fn beat(&mut self, frames: &Frames<PublishStreamResponse>) -> Result<(), End> {
        let echoed_nonce = self.last_nonce;
        send(frames, Response::Heartbeat(PublisherHeartbeat { echoed_nonce })).await
    }

    async fn drain(&mut self, frames: &Frames<PublishStreamResponse>) -> Result<(), End> {
        self.drained = true;
        send(frames, Response::Drain(drain())).await
    }
}

async fn send(frames: &Frames<PublishStreamResponse>, frame: Response) -> Result<(), End> {
    frames.send(PublishStreamResponse { frame: Some(frame) }).await
}

/// The batch, once its messages are checked.
///
/// Cancel-safe: it leaves its place only when it is there.
async fn inspected(inspecting: &mut Option<Inspecting>) -> Result<Inspected, BrokerError> {
    match inspecting {
        Some(batch) => {
            let inspected = batch.await;
            *inspecting = None;
            inspected
        }
        None => std::future::pending().await,
    }
}

/// The results of all batches at the front that are decided, at least one.
///
/// Cancel-safe: a batch leaves the queue only together with its results.
async fn results(pending: &mut VecDeque<Pending>) -> Result<Vec<Run>, BrokerError> {
    std::future::poll_fn(|cx| {
        let mut runs: Vec<Run> = Vec::new();
        while let Some(front) = pending.front_mut() {
            match Pin::new(front).poll(cx) {
                Poll::Pending => break,
                // The stream ends here; what was decided in this call is answered at the replay.
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Ready(Ok(more)) => {
                    pending.pop_front();
                    for run in more {
                        merge(&mut runs, run);
                    }
                }
            }
        }
        if runs.is_empty() { Poll::Pending } else { Poll::Ready(Ok(runs)) }
    })
    .await
}

/// Appends a run, as a continuation of the last one if it is.
fn merge(runs: &mut Vec<Run>, run: Run) {
    use crate::storage::Fate::Stored;
    if let Some(last) = runs.last_mut()
        && let (
            Stored { sequence, duplicate, at },
            Stored { sequence: next, duplicate: next_duplicate, at: next_at },
        ) = (&last.fate, &run.fate)
        && *next == sequence + u64::from(last.count)
        && (duplicate, at) == (next_duplicate, next_at)
    {
        last.count += run.count;
        return;
    }
    runs.push(run);
}

fn parse_batch(batch: PublishBatch) -> Result<Batch, Status> {
    let PublishBatch { first_sequence, messages, resolved_below, atomic } = batch;
    if first_sequence == 0 || first_sequence.checked_add(messages.len() as u64).is_none() {
        return Err(invalid("first_sequence: sequences start at 1"));
    }
    if first_sequence.saturating_sub(resolved_below) > u64::from(limits::MAX_IN_FLIGHT_MESSAGES) {
        let limit = limits::MAX_IN_FLIGHT_MESSAGES;
        return Err(protocol(format!("more than {limit} messages are unanswered")));
    }
    let (items, atomic) = match atomic {
        None => {
            check_count(messages.len(), limits::MAX_BATCH_MESSAGES)?;
            (messages.into_iter().map(convert::parse_encoded).collect(), None)
        }
        Some(atomic) => {
            let messages = messages.into_iter().map(Message::decode).collect::<Result<_, _>>();
            let messages = messages.map_err(|error| invalid(format!("messages: {error}")))?;
            parse_atomic(messages, &atomic)?
        }
    };
    Ok(Batch { first_sequence, resolved_below, items, atomic })
}

fn parse_atomic(
    messages: Vec<Message>,
    atomic: &AtomicBatch,
) -> Result<(Vec<Item>, Option<Atomic>), Status> {
    check_count(messages.len(), limits::MAX_ATOMIC_MESSAGES)?;
    let (items, atomic) = convert::parse_atomic(messages, atomic)?;
    Ok((items, Some(atomic)))
}

fn check_count(messages: usize, limit: usize) -> Result<(), Status> {
    if (1..=limit).contains(&messages) {
        return Ok(());
    }
    Err(invalid(format!("messages: {messages} in one batch; 1 to {limit} are allowed")))
}
