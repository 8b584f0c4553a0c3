//! The auditor: reads everything back from the server by the bare protocol.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, bail};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use pubsub_proto::v1::admin_service_client::AdminServiceClient;
use pubsub_proto::v1::subscribe_request::Frame as Request;
use pubsub_proto::v1::subscribe_response::Frame as Response;
use pubsub_proto::v1::subscriber_service_client::SubscriberServiceClient;
use pubsub_proto::v1::{
    AckBatch, Consumer, Deliver, Earliest, GetReceiptsRequest, ReceiptState, SequenceRange,
    StartPosition, SubscribeHello, SubscribeRequest, TopicAcks, start_position,
};
use pubsub_proto::{MAX_FRAME_BYTES, PROTOCOL_VERSION};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};

use crate::consumer::Seen;
use crate::publishers;
use crate::{SUBSCRIPTION, TOPICS};

/// What the server has of one topic.
#[derive(Debug, Default)]
pub(crate) struct Topic {
    /// The log, in its order.
    pub(crate) log: Vec<Seen>,
    /// Whether the subscription has received the message, for each entry of the log.
    pub(crate) received: Vec<bool>,
}

/// What the server has.
pub(crate) type Audit = [Topic; TOPICS.len()];

pub(crate) async fn run(server: SocketAddr) -> Result<Audit> {
    let channel = Endpoint::from_shared(format!("http://{server}"))?.connect().await?;
    let mut audit = Audit::default();
    for (name, topic) in TOPICS.into_iter().zip(&mut audit) {
        topic.log = read(&channel, name).await.with_context(|| format!("reading {name}"))?;
        topic.received = receipts(&channel, name, &topic.log).await?;
    }
    Ok(audit)
}

/// Reads a topic from its first message to its head, as a reader.
#[expect(clippy::wildcard_enum_match_arm, reason = "no other frame belongs here")]
async fn read(channel: &Channel, topic: &str) -> Result<Vec<Seen>> {
    let (requests, queue) = mpsc::channel(4);
    requests.send(request(Request::Hello(hello(topic)))).await?;
    let mut responses = SubscriberServiceClient::new(channel.clone())
        .max_decoding_message_size(MAX_FRAME_BYTES)
        .subscribe(ReceiverStream::new(queue))
        .await?
        .into_inner();
    let (mut log, mut head, mut generation, mut batch) = (Vec::new(), None, 0, 0);
    while head.is_none_or(|head| (log.len() as u64) < head) {
        let response = responses.message().await?.context("the stream ended")?;
        match response.frame.context("an empty frame")? {
            Response::Welcome(welcome) => {
                let topic = welcome.topics.first().context("no topic")?;
                (head, generation) = (Some(topic.head), topic.cursor_generation);
            }
            Response::Deliver(deliver) => {
                batch += 1;
                // Acks of a reader only make room for more.
                requests.send(request(Request::Acks(acks(&deliver, generation, batch)))).await?;
                for message in deliver.received() {
                    let payload = message.decoded()?.payload;
                    let number = publishers::number(&payload)?;
                    log.push(Seen { sequence: message.sequence, number });
                }
            }
            Response::Heartbeat(_) | Response::Confirm(_) => {}
            other => bail!("unexpected: {other:?}"),
        }
    }
    Ok(log)
}

fn hello(topic: &str) -> SubscribeHello {
    let consumer = Consumer { id: "auditor".to_owned(), instance: vec![7; 16].into(), attach: 1 };
    SubscribeHello {
        protocol: PROTOCOL_VERSION,
        consumer: Some(consumer),
        topics: vec![topic.to_owned()],
        start: Some(StartPosition {
            position: Some(start_position::Position::Earliest(Earliest {})),
        }),
        max_outstanding_messages: 1000,
        max_outstanding_bytes: 8 << 20,
        client: "auditor".to_owned(),
        ..SubscribeHello::default()
    }
}

fn acks(deliver: &Deliver, cursor_generation: u64, number: u64) -> AckBatch {
    let sequences = || deliver.clone().received().map(|message| message.sequence);
    let range = sequences().min().zip(sequences().max());
    let acked = range.map(|(first, last)| SequenceRange { first, last }).into_iter().collect();
    let topic = TopicAcks { topic: deliver.topic, cursor_generation, acked, ..Default::default() };
    AckBatch { number, topics: vec![topic], awaited: false }
}

fn request(frame: Request) -> SubscribeRequest {
    SubscribeRequest { frame: Some(frame) }
}

/// Asks for the receipt of every message.
async fn receipts(channel: &Channel, topic: &str, log: &[Seen]) -> Result<Vec<bool>> {
    const AT_ONCE: usize = 64;
    let ask = |seen: &Seen| {
        let mut admin = AdminServiceClient::new(channel.clone());
        let request = GetReceiptsRequest {
            topic: topic.to_owned(),
            epoch: 0,
            sequence: seen.sequence,
            subscription: SUBSCRIPTION.to_owned(),
        };
        async move {
            let receipts = admin.get_receipts(request).await?.into_inner().receipts;
            let receipt = receipts.first().context("no receipt")?;
            Ok(receipt.state() == ReceiptState::Received)
        }
    };
    stream::iter(log.iter().map(ask)).buffered(AT_ONCE).try_collect().await
}
