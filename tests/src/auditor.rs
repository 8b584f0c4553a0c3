//! Reads everything back, without the SDK and without a subscription.

use anyhow::{Context as _, Result, bail, ensure};
use pubsub_proto::v1::{
    AckBatch, Deliver, Message, SequenceRange, StartPosition, SubscribeHello, Topic, TopicAcks,
    start_position::Position, subscribe_request, subscribe_response::Frame,
};
use tonic::transport::Channel;

use crate::{
    admin,
    raw::{self, SubscribeStream},
};

/// Everything that a topic holds, as one reader sees it.
#[derive(Clone, Debug)]
pub struct Audit {
    /// The topic when the audit began.
    pub topic: Topic,
    /// Its messages, from the first that is still stored to the head, without holes.
    pub messages: Vec<Stored>,
}

/// The server says that it cannot read a message, and all after it.
#[derive(Debug)]
pub struct Damaged {
    /// The first message that cannot be read.
    pub sequence: u64,
}

impl std::fmt::Display for Damaged {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "message {} is damaged", self.sequence)
    }
}

impl std::error::Error for Damaged {}

/// Reads a topic from its first message to its head.
///
/// # Errors
///
/// If the topic cannot be read, or the reader sees anything but a dense log; [`Damaged`] if the
/// server says why.
pub async fn read(channel: &Channel, topic: &str) -> Result<Audit> {
    let topic = admin::topic(channel, topic).await?;
    let mut messages = Vec::new();
    if topic.first > topic.head {
        return Ok(Audit { topic, messages });
    }
    let hello = SubscribeHello {
        start: Some(StartPosition { position: Some(Position::Sequence(topic.first)) }),
        ..raw::consumer_hello("", "auditor", &[&topic.name])
    };
    let (mut reader, welcome) = SubscribeStream::welcomed(channel, hello).await?;
    let session = welcome.topics.first().context("a welcome without topics")?;
    ensure!(session.epoch == topic.epoch, "the topic was recreated meanwhile");
    let (number, generation) = (session.number, session.cursor_generation);
    let mut batch = 0;
    while next_sequence(&topic, &messages) <= topic.head {
        match reader.next().await? {
            Frame::Deliver(deliver) => {
                let range = append(&topic, &mut messages, deliver)?;
                batch += 1;
                // A reader keeps nothing on the server: its acks only make room for more.
                let frame = ack_frame(number, generation, range, batch);
                // If the stream has ended, its status says why, and comes next.
                let _ = reader.send(frame).await;
            }
            Frame::Gap(gap) => bail!("a gap in {}: {gap:?}", topic.name),
            Frame::DataLoss(loss) => bail!(Damaged { sequence: loss.sequence }),
            _ => {}
        }
    }
    Ok(Audit { topic, messages })
}

/// A message of the log.
#[derive(Clone, Debug)]
pub struct Stored {
    /// Its place in the log.
    pub sequence: u64,
    /// The message.
    pub message: Option<Message>,
}

fn next_sequence(topic: &Topic, messages: &[Stored]) -> u64 {
    messages.last().map_or(topic.first, |message| message.sequence + 1)
}

fn append(topic: &Topic, messages: &mut Vec<Stored>, deliver: Deliver) -> Result<SequenceRange> {
    let first = next_sequence(topic, messages);
    for message in deliver.received() {
        let expected = next_sequence(topic, messages);
        ensure!(
            message.sequence == expected,
            "{} is not dense: {} comes where {expected} belongs",
            topic.name,
            message.sequence
        );
        let (sequence, message) = (message.sequence, message.decoded()?);
        messages.push(Stored { sequence, message: Some(message) });
    }
    let last = next_sequence(topic, messages) - 1;
    Ok(SequenceRange { first, last })
}

fn ack_frame(
    topic: u32,
    cursor_generation: u64,
    acked: SequenceRange,
    number: u64,
) -> subscribe_request::Frame {
    subscribe_request::Frame::Acks(AckBatch {
        number,
        topics: vec![TopicAcks {
            topic,
            cursor_generation,
            acked: vec![acked],
            ..TopicAcks::default()
        }],
        awaited: false,
    })
}
