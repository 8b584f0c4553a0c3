//! The protocol without the SDK: frames as they are, for scenarios that need to send what the
//! SDK never would, and for an auditor that does not trust the SDK.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use pubsub_proto::{
    ERROR_DOMAIN, MAX_FRAME_BYTES, PROTOCOL_VERSION,
    v1::{
        Consumer, Message, Ping, PublishBatch, PublishResponse, PublishRun, PublishStreamRequest,
        PublishStreamResponse, PublisherHello, PublisherWelcome, Refused, SubscribeHello,
        SubscribeRequest, SubscribeResponse, SubscribeWelcome,
        admin_service_client::AdminServiceClient, publish_result, publish_stream_request,
        publish_stream_response, publisher_service_client::PublisherServiceClient,
        subscribe_request, subscribe_response, subscriber_service_client::SubscriberServiceClient,
    },
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Response, Status, Streaming,
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt as _;

use crate::wait;

/// How long a frame may take that must come.
pub const FRAME_WITHIN: Duration = Duration::from_secs(10);

/// How many frames may wait to be sent.
const QUEUE: usize = 64;

/// Connects to a server.
///
/// # Errors
///
/// If nobody listens there.
pub async fn connect(url: &str) -> Result<Channel> {
    let endpoint = Endpoint::from_shared(url.to_owned())?.connect_timeout(FRAME_WITHIN);
    endpoint.connect().await.with_context(|| format!("connecting to {url}"))
}

/// The unary calls for topics, subscriptions and receipts.
pub fn admin(channel: &Channel) -> AdminServiceClient<Channel> {
    AdminServiceClient::new(channel.clone())
        .max_decoding_message_size(MAX_FRAME_BYTES)
        .max_encoding_message_size(MAX_FRAME_BYTES)
}

/// The calls for publishing.
pub fn publisher(channel: &Channel) -> PublisherServiceClient<Channel> {
    PublisherServiceClient::new(channel.clone())
        .max_decoding_message_size(MAX_FRAME_BYTES)
        .max_encoding_message_size(MAX_FRAME_BYTES)
}

/// The calls for subscribing.
pub fn subscriber(channel: &Channel) -> SubscriberServiceClient<Channel> {
    SubscriberServiceClient::new(channel.clone())
        .max_decoding_message_size(MAX_FRAME_BYTES)
        .max_encoding_message_size(MAX_FRAME_BYTES)
}

/// The typed reason of an error of the server; `None` for transport trouble.
pub fn reason(status: &Status) -> Option<String> {
    let info = status.get_details_error_info()?;
    (info.domain == ERROR_DOMAIN).then_some(info.reason)
}

/// The reason that an answer failed with.
///
/// # Errors
///
/// If the answer is not an error, or an error without a reason of ours.
pub fn refusal<T: std::fmt::Debug>(answer: Result<T, Status>) -> Result<String> {
    match answer {
        Ok(answer) => bail!("a refusal was expected, not {answer:?}"),
        Err(status) => reason(&status).with_context(|| format!("no ErrorInfo in {status:?}")),
    }
}

/// Why an answer refuses the first message: by its status, or by a fate of its own.
///
/// # Errors
///
/// If the message is not refused, or without a reason of ours.
pub fn publish_refusal(answer: Result<Response<PublishResponse>, Status>) -> Result<String> {
    let Ok(answer) = answer else {
        return refusal(answer);
    };
    let fate = answer.into_inner().results.into_iter().next();
    match fate.and_then(|fate| fate.outcome) {
        Some(publish_result::Outcome::Refused(refused)) => Ok(name_of(&refused)),
        other => bail!("a refusal was expected, not {other:?}"),
    }
}

/// The name of a refusal's reason, as an error would carry it.
pub fn name_of(refused: &Refused) -> String {
    let name = refused.reason().as_str_name();
    name.trim_start_matches("ERROR_REASON_").to_owned()
}

/// A message of these bytes and nothing else.
pub fn message(payload: impl Into<bytes::Bytes>) -> Message {
    Message { payload: payload.into(), ..Message::default() }
}

/// Counts all connections: so the numbers of each publisher and consumer grow.
static ATTACHES: AtomicU64 = AtomicU64::new(1);

/// The hello of a publisher that has sent nothing yet, on its next connection.
pub fn publisher_hello(topic: &str, producer_id: [u8; 16]) -> PublisherHello {
    PublisherHello {
        protocol: PROTOCOL_VERSION,
        topic: topic.into(),
        producer_id: producer_id.to_vec().into(),
        resolved_below: 1,
        next_sequence: 1,
        attach: ATTACHES.fetch_add(1, Ordering::Relaxed),
        client: "pubsub-tests".into(),
        ..PublisherHello::default()
    }
}

/// The hello of a consumer on its next connection.
pub fn consumer_hello(subscription: &str, consumer: &str, topics: &[&str]) -> SubscribeHello {
    SubscribeHello {
        protocol: PROTOCOL_VERSION,
        subscription: subscription.into(),
        consumer: Some(Consumer {
            id: consumer.into(),
            instance: vec![1; 16].into(),
            attach: ATTACHES.fetch_add(1, Ordering::Relaxed),
        }),
        topics: topics.iter().copied().map(Into::into).collect(),
        max_outstanding_messages: 1000,
        max_outstanding_bytes: 8 << 20,
        client: "pubsub-tests".into(),
        ..SubscribeHello::default()
    }
}

/// A publisher stream.
#[derive(Debug)]
pub struct PublishStream {
    frames: mpsc::Sender<PublishStreamRequest>,
    answers: Streaming<PublishStreamResponse>,
}

impl PublishStream {
    /// Opens a stream and sends this as its first frame.
    ///
    /// # Errors
    ///
    /// The server's status.
    pub async fn open(channel: &Channel, hello: PublisherHello) -> Result<Self, Status> {
        Self::open_with(channel, publish_stream_request::Frame::Hello(hello)).await
    }

    /// Opens a stream with any first frame.
    ///
    /// # Errors
    ///
    /// The server's status.
    pub async fn open_with(
        channel: &Channel,
        first: publish_stream_request::Frame,
    ) -> Result<Self, Status> {
        let (frames, queue) = mpsc::channel(QUEUE);
        let first = PublishStreamRequest { frame: Some(first) };
        frames.send(first).await.expect("the queue is open");
        let answers =
            publisher(channel).publish_stream(ReceiverStream::new(queue)).await?.into_inner();
        Ok(Self { frames, answers })
    }

    /// Opens a stream and takes the welcome.
    ///
    /// # Errors
    ///
    /// The server's status, or that there is no welcome.
    pub async fn welcomed(
        channel: &Channel,
        hello: PublisherHello,
    ) -> Result<(Self, PublisherWelcome)> {
        let mut stream = Self::open(channel, hello).await?;
        match stream.next().await? {
            publish_stream_response::Frame::Welcome(welcome) => Ok((stream, welcome)),
            other => bail!("a welcome was expected, not {other:?}"),
        }
    }

    /// Sends a frame.
    ///
    /// # Errors
    ///
    /// If the stream has ended.
    pub async fn send(&self, frame: publish_stream_request::Frame) -> Result<()> {
        let frame = PublishStreamRequest { frame: Some(frame) };
        self.frames.send(frame).await.context("the stream has ended")
    }

    /// Sends messages with consecutive sequences.
    ///
    /// # Errors
    ///
    /// If the stream has ended.
    pub async fn publish(&self, first_sequence: u64, messages: Vec<Message>) -> Result<()> {
        let messages = messages.iter().map(|message| message.encoded()).collect();
        let batch = PublishBatch { first_sequence, messages, resolved_below: 0, atomic: None };
        self.send(publish_stream_request::Frame::Batch(batch.encoded())).await
    }

    /// The next frame.
    ///
    /// # Errors
    ///
    /// The server's status; `UNKNOWN` if the stream ends without one or nothing comes.
    pub async fn next(&mut self) -> Result<publish_stream_response::Frame, Status> {
        let answer = wait::soon("a frame", FRAME_WITHIN, self.answers.message())
            .await
            .map_err(|silence| Status::unknown(silence.to_string()))??;
        answer
            .and_then(|answer| answer.frame)
            .ok_or_else(|| Status::unknown("the stream has ended"))
    }

    /// The next fates of messages; heartbeats are passed over.
    ///
    /// # Errors
    ///
    /// The server's status.
    pub async fn results(&mut self) -> Result<Vec<PublishRun>, Status> {
        loop {
            if let publish_stream_response::Frame::Results(results) = self.next().await? {
                return Ok(results.runs);
            }
        }
    }

    /// The status that the stream ends with; other frames are passed over.
    ///
    /// # Errors
    ///
    /// If it does not end.
    pub async fn end(&mut self) -> Result<Status> {
        let end = async {
            loop {
                match self.answers.message().await {
                    Ok(Some(_)) => {}
                    Ok(None) => return Status::ok("the stream has ended"),
                    Err(status) => return status,
                }
            }
        };
        wait::soon("the end of the stream", FRAME_WITHIN, end).await
    }
}

/// A subscribe stream.
#[derive(Debug)]
pub struct SubscribeStream {
    frames: mpsc::Sender<SubscribeRequest>,
    answers: Streaming<SubscribeResponse>,
}

impl SubscribeStream {
    /// Opens a stream and sends this as its first frame.
    ///
    /// # Errors
    ///
    /// The server's status.
    pub async fn open(channel: &Channel, hello: SubscribeHello) -> Result<Self, Status> {
        Self::open_with(channel, subscribe_request::Frame::Hello(hello)).await
    }

    /// Opens a stream with any first frame.
    ///
    /// # Errors
    ///
    /// The server's status.
    pub async fn open_with(
        channel: &Channel,
        first: subscribe_request::Frame,
    ) -> Result<Self, Status> {
        let (frames, queue) = mpsc::channel(QUEUE);
        let first = SubscribeRequest { frame: Some(first) };
        frames.send(first).await.expect("the queue is open");
        let answers = subscriber(channel).subscribe(ReceiverStream::new(queue)).await?.into_inner();
        Ok(Self { frames, answers })
    }

    /// Opens a stream and takes the welcome.
    ///
    /// # Errors
    ///
    /// The server's status, or that there is no welcome.
    pub async fn welcomed(
        channel: &Channel,
        hello: SubscribeHello,
    ) -> Result<(Self, SubscribeWelcome)> {
        let mut stream = Self::open(channel, hello).await?;
        match stream.next().await? {
            subscribe_response::Frame::Welcome(welcome) => Ok((stream, welcome)),
            other => bail!("a welcome was expected, not {other:?}"),
        }
    }

    /// Sends a frame.
    ///
    /// # Errors
    ///
    /// If the stream has ended.
    pub async fn send(&self, frame: subscribe_request::Frame) -> Result<()> {
        let frame = SubscribeRequest { frame: Some(frame) };
        self.frames.send(frame).await.context("the stream has ended")
    }

    /// Sends a sign of life.
    ///
    /// # Errors
    ///
    /// If the stream has ended.
    pub async fn ping(&self, nonce: u64) -> Result<()> {
        self.send(subscribe_request::Frame::Ping(Ping { nonce })).await
    }

    /// The next frame.
    ///
    /// # Errors
    ///
    /// The server's status; `UNKNOWN` if the stream ends without one or nothing comes.
    pub async fn next(&mut self) -> Result<subscribe_response::Frame, Status> {
        let answer = wait::soon("a frame", FRAME_WITHIN, self.answers.message())
            .await
            .map_err(|silence| Status::unknown(silence.to_string()))??;
        answer
            .and_then(|answer| answer.frame)
            .ok_or_else(|| Status::unknown("the stream has ended"))
    }

    /// The status that the stream ends with; other frames are passed over.
    ///
    /// # Errors
    ///
    /// If it does not end.
    pub async fn end(&mut self) -> Result<Status> {
        let end = async {
            loop {
                match self.answers.message().await {
                    Ok(Some(_)) => {}
                    Ok(None) => return Status::ok("the stream has ended"),
                    Err(status) => return status,
                }
            }
        };
        wait::soon("the end of the stream", FRAME_WITHIN, end).await
    }
}
