//! The frames that carry messages, with each message as the bytes that it is on the wire.
//!
//! A message passes through many hands that have no business with its fields: publisher, server, log,
//! subscribers. With these types it is encoded once, where it is published, and its bytes are what
//! every subscriber gets. On the wire a message within a message and its bytes are the same.

use bytes::{Bytes, BytesMut};
use prost::encoding::{self, WireType};

use crate::v1::{AtomicBatch, Message, Ping, PublisherHello};

/// `pubsub.v1.PublishStreamRequest`: a frame from a publisher.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PublishStreamRequest {
    /// Which one.
    #[prost(oneof = "publish_stream_request::Frame", tags = "1, 2, 3")]
    pub frame: Option<publish_stream_request::Frame>,
}

/// What a frame from a publisher can be.
pub mod publish_stream_request {
    use super::{Bytes, Ping, PublisherHello};

    /// Which one.
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum Frame {
        /// Opens the session; the first frame, and sent once.
        #[prost(message, tag = "1")]
        Hello(PublisherHello),
        /// Messages to store: an encoded [`PublishBatch`](super::PublishBatch). Its messages are cut
        /// out of these bytes, and share them.
        #[prost(bytes = "bytes", tag = "2")]
        Batch(Bytes),
        /// A sign of life, answered by a `PublisherHeartbeat`.
        #[prost(message, tag = "3")]
        Ping(Ping),
    }
}

/// `pubsub.v1.PublishBatch`: messages with dense sequences.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PublishBatch {
    /// The sequence of the first message.
    #[prost(uint64, tag = "1")]
    pub first_sequence: u64,
    /// The messages: each is an encoded [`Message`](crate::v1::Message).
    #[prost(bytes = "bytes", repeated, tag = "2")]
    pub messages: Vec<Bytes>,
    /// Results below this sequence are not needed any more.
    #[prost(uint64, tag = "3")]
    pub resolved_below: u64,
    /// What holds for all of them, if they are stored whole or not at all.
    #[prost(message, optional, tag = "4")]
    pub atomic: Option<AtomicBatch>,
}

/// `pubsub.v1.ReceivedMessage`: a message as a subscriber gets it.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ReceivedMessage {
    /// The sequence of the message in its topic.
    #[prost(uint64, tag = "1")]
    pub sequence: u64,
    /// The message as published: an encoded [`Message`](crate::v1::Message).
    #[prost(bytes = "bytes", optional, tag = "2")]
    pub message: Option<Bytes>,
    /// When the server stored it.
    #[prost(message, optional, tag = "3")]
    pub publish_time: Option<prost_types::Timestamp>,
    /// Which showing of the message this is, from 1: one more than the failures counted so far.
    #[prost(uint32, tag = "4")]
    pub attempt: u32,
}

impl PublishBatch {
    /// Its bytes on the wire.
    pub fn encoded(&self) -> Bytes {
        prost::Message::encode_to_vec(self).into()
    }
}

/// Writes the bytes of a [`PublishBatch`], one message after the other.
#[derive(Debug)]
pub struct BatchWriter(BytesMut);

impl BatchWriter {
    /// A batch without messages, in a buffer for so many bytes, which grows.
    pub fn new(first_sequence: u64, capacity: usize) -> Self {
        let mut buffer = BytesMut::with_capacity(capacity);
        encoding::uint64::encode(1, &first_sequence, &mut buffer);
        Self(buffer)
    }

    /// Adds a message of so many bytes, which are to be put into the buffer next.
    pub fn message(&mut self, bytes: usize) -> &mut BytesMut {
        encoding::encode_key(2, WireType::LengthDelimited, &mut self.0);
        encoding::encode_varint(bytes as u64, &mut self.0);
        &mut self.0
    }

    /// The batch, with what follows its messages.
    pub fn finish(mut self, resolved_below: u64, atomic: Option<&AtomicBatch>) -> Bytes {
        if resolved_below > 0 {
            encoding::uint64::encode(3, &resolved_below, &mut self.0);
        }
        if let Some(atomic) = atomic {
            encoding::message::encode(4, atomic, &mut self.0);
        }
        self.0.freeze()
    }
}

impl Message {
    /// Its bytes on the wire.
    pub fn encoded(&self) -> Bytes {
        prost::Message::encode_to_vec(self).into()
    }
}

impl ReceivedMessage {
    /// The message as published.
    ///
    /// # Errors
    ///
    /// If the bytes are no message.
    pub fn decoded(&self) -> Result<Message, prost::DecodeError> {
        prost::Message::decode(self.message.clone().unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;
    use prost_types::Timestamp;

    use super::*;

    /// As they would be generated, with messages as messages.
    #[derive(Clone, PartialEq, prost::Message)]
    struct GeneratedBatch {
        #[prost(uint64, tag = "1")]
        first_sequence: u64,
        #[prost(message, repeated, tag = "2")]
        messages: Vec<Message>,
        #[prost(uint64, tag = "3")]
        resolved_below: u64,
        #[prost(message, optional, tag = "4")]
        atomic: Option<AtomicBatch>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    struct GeneratedReceived {
        #[prost(uint64, tag = "1")]
        sequence: u64,
        #[prost(message, optional, tag = "2")]
        message: Option<Message>,
        #[prost(message, optional, tag = "3")]
        publish_time: Option<Timestamp>,
        #[prost(uint32, tag = "4")]
        attempt: u32,
    }

    fn messages() -> Vec<Message> {
        let full = Message {
            payload: vec![7; 300].into(),
            attributes: [("a".to_owned(), "b".to_owned())].into(),
            ordering_key: "k".to_owned(),
            recipients: vec!["r".to_owned()],
            not_before: Some(Timestamp { seconds: 1, nanos: 2 }),
            ..Message::default()
        };
        vec![Message::default(), full]
    }

    #[test]
    fn bytes_and_messages_are_the_same_on_the_wire() {
        for atomic in [None, Some(AtomicBatch { expected_head: Some(0), ..Default::default() })] {
            let (first_sequence, resolved_below) = (7, 5);
            let encoded = messages().iter().map(Message::encoded).collect();
            let here = PublishBatch {
                first_sequence,
                messages: encoded,
                resolved_below,
                atomic: atomic.clone(),
            };
            let generated =
                GeneratedBatch { first_sequence, messages: messages(), resolved_below, atomic };
            assert_eq!(here.encode_to_vec(), generated.encode_to_vec());
            assert_eq!(PublishBatch::decode(&*generated.encode_to_vec()), Ok(here));
        }
        for message in messages().into_iter().map(Some).chain([None]) {
            let publish_time = Some(Timestamp { seconds: 3, nanos: 4 });
            let encoded = message.as_ref().map(Message::encoded);
            let here = ReceivedMessage { sequence: 9, message: encoded, publish_time, attempt: 1 };
            let generated = GeneratedReceived {
                sequence: 9,
                message: message.clone(),
                publish_time,
                attempt: 1,
            };
            assert_eq!(here.encode_to_vec(), generated.encode_to_vec());
            assert_eq!(here.decoded(), Ok(message.unwrap_or_default()));
            assert_eq!(ReceivedMessage::decode(&*generated.encode_to_vec()), Ok(here));
        }
    }

    /// As it would be generated.
    #[derive(Clone, PartialEq, prost::Message)]
    struct GeneratedRequest {
        #[prost(message, optional, tag = "2")]
        batch: Option<PublishBatch>,
    }

    #[test]
    fn a_batch_that_is_written_piece_by_piece_is_the_same() {
        for atomic in [None, Some(AtomicBatch { expected_head: Some(0), ..Default::default() })] {
            for resolved_below in [0, 5] {
                let messages: Vec<_> = messages().iter().map(Message::encoded).collect();
                let mut writer = BatchWriter::new(7, 0);
                for message in &messages {
                    writer.message(message.len()).extend_from_slice(message);
                }
                let written = writer.finish(resolved_below, atomic.as_ref());
                let atomic = atomic.clone();
                let batch = PublishBatch { first_sequence: 7, messages, resolved_below, atomic };
                assert_eq!(written, batch.encoded());
                assert_eq!(PublishBatch::decode(written.clone()), Ok(batch.clone()));
                let frame = Some(publish_stream_request::Frame::Batch(written));
                let frame = PublishStreamRequest { frame };
                let generated = GeneratedRequest { batch: Some(batch) };
                assert_eq!(frame.encode_to_vec(), generated.encode_to_vec());
                assert_eq!(PublishStreamRequest::decode(&*generated.encode_to_vec()), Ok(frame));
            }
        }
    }

    /// What was written by hand has the fields of the `.proto` files, and no others.
    #[test]
    fn the_fields_are_those_of_the_contract() {
        let files = prost_types::FileDescriptorSet::decode(crate::FILE_DESCRIPTOR_SET).unwrap();
        let fields = |name: &str| {
            let messages = files.file.iter().flat_map(|file| &file.message_type);
            let message = messages.into_iter().find(|message| message.name() == name).unwrap();
            let mut fields: Vec<_> = message
                .field
                .iter()
                .map(|field| (field.number(), field.name().to_owned()))
                .collect();
            fields.sort();
            fields
        };
        let named = |names: &[&str]| {
            (1..).zip(names.iter().map(|name| (*name).to_owned())).collect::<Vec<_>>()
        };
        assert_eq!(fields("PublishStreamRequest"), named(&["hello", "batch", "ping"]));
        let batch = ["first_sequence", "messages", "resolved_below", "atomic"];
        assert_eq!(fields("PublishBatch"), named(&batch));
        let received = ["sequence", "message", "publish_time", "attempt"];
        assert_eq!(fields("ReceivedMessage"), named(&received));
        let mut deliver = named(&["topic", "first_delivery", "generation"]);
        deliver.push((5, "runs".to_owned()));
        assert_eq!(fields("Deliver"), deliver);
        let run = ["first_sequence", "publish_time", "attempt", "messages"];
        assert_eq!(fields("MessageRun"), named(&run));
    }
}
