//! The frames that carry messages, with each message as the bytes that it is on the wire.
//!
//! A message passes through many hands that have no business with its fields: publisher, server, log,
//! subscribers. With these types it is encoded once, where it is published, and its bytes are what
//! every subscriber gets. On the wire a message within a message and its bytes are the same.

use std::ops::Range;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::DecodeError;
use prost::encoding::{self, DecodeContext, WireType};

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

/// `pubsub.v1.Deliver`: messages of one topic. Subscribers get nearly all of their messages this way,
/// so that what is derived for any message is written here for this one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Deliver {
    /// The number of the topic in this session.
    pub topic: u32,
    /// The number of the first message in this stream, from 1.
    pub first_delivery: u64,
    /// The generation of the topic that the messages belong to.
    pub generation: u32,
    /// The messages.
    pub messages: Vec<ReceivedMessage>,
}

/// The tag of [`Deliver::messages`].
const MESSAGES: u32 = 4;

impl prost::Message for Deliver {
    fn encode_raw(&self, buf: &mut impl BufMut) {
        if self.topic != 0 {
            encoding::uint32::encode(1, &self.topic, buf);
        }
        if self.first_delivery != 0 {
            encoding::uint64::encode(2, &self.first_delivery, buf);
        }
        if self.generation != 0 {
            encoding::uint32::encode(3, &self.generation, buf);
        }
        for message in &self.messages {
            put(message, buf);
        }
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buf: &mut impl Buf,
        ctx: DecodeContext,
    ) -> Result<(), DecodeError> {
        match tag {
            1 => encoding::uint32::merge(wire_type, &mut self.topic, buf, ctx),
            2 => encoding::uint64::merge(wire_type, &mut self.first_delivery, buf, ctx),
            3 => encoding::uint32::merge(wire_type, &mut self.generation, buf, ctx),
            MESSAGES => {
                let mut message = Bytes::new();
                encoding::bytes::merge(wire_type, &mut message, buf, ctx)?;
                self.messages.push(match take(&message) {
                    Some((mut taken, body)) => {
                        // What is left of the bytes is the body: nothing is copied or counted.
                        taken.message = body.map(|body| {
                            message.truncate(body.end);
                            message.advance(body.start);
                            message
                        });
                        taken
                    }
                    None => prost::Message::decode(message)?,
                });
                Ok(())
            }
            _ => encoding::skip_field(wire_type, tag, buf, ctx),
        }
    }

    fn encoded_len(&self) -> usize {
        let field = |tag: u32, value: u64| match value {
            0 => 0,
            value => encoding::uint64::encoded_len(tag, &value),
        };
        let messages = self.messages.iter().map(|message| {
            let length = length(message);
            1 + encoding::encoded_len_varint(length) + usize::try_from(length).unwrap_or(usize::MAX)
        });
        field(1, self.topic.into())
            + field(2, self.first_delivery)
            + field(3, self.generation.into())
            + messages.sum::<usize>()
    }

    fn clear(&mut self) {
        *self = Self::default();
    }
}

/// The tags of the fields of a [`ReceivedMessage`] and of a time, with their wire types.
mod tag {
    pub(super) const SEQUENCE: u8 = 1 << 3;
    pub(super) const MESSAGE: u8 = 2 << 3 | 2;
    pub(super) const TIME: u8 = 3 << 3 | 2;
    pub(super) const ATTEMPT: u8 = 4 << 3;
    pub(super) const SECONDS: u8 = 1 << 3;
    pub(super) const NANOS: u8 = 2 << 3;
}

/// What a field of a number takes, with a tag of one byte; nothing if it is 0.
fn number_len(value: u64) -> usize {
    if value == 0 { 0 } else { 1 + encoding::encoded_len_varint(value) }
}

/// A negative number is on the wire as one of ten bytes.
fn unsigned(value: i64) -> u64 {
    u64::from_le_bytes(value.to_le_bytes())
}

fn signed(value: u64) -> i64 {
    i64::from_le_bytes(value.to_le_bytes())
}

fn time_len(time: &prost_types::Timestamp) -> usize {
    number_len(unsigned(time.seconds)) + number_len(unsigned(time.nanos.into()))
}

/// The bytes of a message in a frame, without its own tag and length.
fn length(message: &ReceivedMessage) -> u64 {
    let body = message
        .message
        .as_ref()
        .map_or(0, |body| 1 + encoding::encoded_len_varint(body.len() as u64) + body.len());
    let time = message.publish_time.as_ref().map_or(0, |time| 2 + time_len(time));
    let rest = number_len(message.sequence) + number_len(message.attempt.into());
    (body + time + rest) as u64
}

/// A few fields, to be written at once.
struct Fields {
    bytes: [u8; 64],
    used: usize,
}

impl Fields {
    fn new() -> Self {
        Self { bytes: [0; 64], used: 0 }
    }

    #[inline]
    fn byte(&mut self, byte: u8) {
        if let Some(place) = self.bytes.get_mut(self.used) {
            *place = byte;
            self.used += 1;
        }
    }

    #[inline]
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.byte(value.to_le_bytes()[0] | 0x80);
            value >>= 7;
        }
        self.byte(value.to_le_bytes()[0]);
    }

    #[inline]
    fn number(&mut self, tag: u8, value: u64) {
        if value != 0 {
            self.byte(tag);
            self.varint(value);
        }
    }

    fn flush(self, buf: &mut impl BufMut) {
        buf.put_slice(self.bytes.get(..self.used).unwrap_or_default());
    }
}

/// Writes a message of a frame: at most 1 + 10 + 11 + 11 bytes before its body, and 2 + 22 + 11 after.
fn put(message: &ReceivedMessage, buf: &mut impl BufMut) {
    let mut fields = Fields::new();
    fields.byte((MESSAGES << 3 | 2).to_le_bytes()[0]);
    fields.varint(length(message));
    fields.number(tag::SEQUENCE, message.sequence);
    if let Some(body) = &message.message {
        fields.byte(tag::MESSAGE);
        fields.varint(body.len() as u64);
        fields.flush(buf);
        buf.put_slice(body);
        fields = Fields::new();
    }
    if let Some(time) = &message.publish_time {
        fields.byte(tag::TIME);
        fields.varint(time_len(time) as u64);
        fields.number(tag::SECONDS, unsigned(time.seconds));
        fields.number(tag::NANOS, unsigned(time.nanos.into()));
    }
    fields.number(tag::ATTEMPT, message.attempt.into());
    fields.flush(buf);
}

/// A message as [`put`] writes it, and where its body is; nothing if it is written in another way,
/// which need not be wrong.
fn take(bytes: &[u8]) -> Option<(ReceivedMessage, Option<Range<usize>>)> {
    let (mut message, mut body) = (ReceivedMessage::default(), None);
    let mut rest = bytes;
    message.sequence = number(&mut rest, tag::SEQUENCE)?;
    if let Some(after) = field(rest, tag::MESSAGE) {
        rest = after;
        let length = usize::try_from(varint(&mut rest)?).ok()?;
        let from = bytes.len() - rest.len();
        rest = rest.get(length..)?;
        body = Some(from..from + length);
    }
    if let Some(after) = field(rest, tag::TIME) {
        rest = after;
        let length = usize::try_from(varint(&mut rest)?).ok()?;
        let (mut time, after) = rest.split_at_checked(length)?;
        rest = after;
        let seconds = signed(number(&mut time, tag::SECONDS)?);
        let nanos = i32::try_from(signed(number(&mut time, tag::NANOS)?)).ok()?;
        message.publish_time = time.is_empty().then_some(prost_types::Timestamp { seconds, nanos });
        message.publish_time?;
    }
    message.attempt = u32::try_from(number(&mut rest, tag::ATTEMPT)?).ok()?;
    rest.is_empty().then_some((message, body))
}

/// What follows a tag, if it comes next.
fn field(bytes: &[u8], tag: u8) -> Option<&[u8]> {
    bytes.split_first().filter(|(first, _)| **first == tag).map(|(_, rest)| rest)
}

/// A number, or 0 if it does not come next.
fn number(bytes: &mut &[u8], tag: u8) -> Option<u64> {
    match field(bytes, tag) {
        Some(rest) => {
            *bytes = rest;
            varint(bytes)
        }
        None => Some(0),
    }
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    encoding::decode_varint(bytes).ok()
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

    #[derive(Clone, PartialEq, prost::Message)]
    struct GeneratedDeliver {
        #[prost(uint32, tag = "1")]
        topic: u32,
        #[prost(uint64, tag = "2")]
        first_delivery: u64,
        #[prost(uint32, tag = "3")]
        generation: u32,
        #[prost(message, repeated, tag = "4")]
        messages: Vec<ReceivedMessage>,
    }

    /// Deliveries in which every field is absent, small, and as large as it can be.
    fn deliveries() -> Vec<GeneratedDeliver> {
        let times = [(0, 0), (1, 0), (0, 1), (1_700_000_000, 999_999_999), (-1, -1)];
        let time = |(seconds, nanos)| Some(Timestamp { seconds, nanos });
        let far = time((i64::MIN, i32::MIN));
        let times: Vec<_> = times.into_iter().map(time).chain([None, far]).collect();
        let bodies =
            [None, Some(Bytes::new()), Some(vec![7; 127].into()), Some(vec![7; 300].into())];
        let mut deliveries = vec![GeneratedDeliver::default()];
        for (sequence, attempt) in [(0, 0), (1, 1), (127, 128), (u64::MAX, u32::MAX)] {
            let mut messages = Vec::new();
            for message in &bodies {
                let received = |publish_time: &Option<Timestamp>| ReceivedMessage {
                    sequence,
                    message: message.clone(),
                    publish_time: *publish_time,
                    attempt,
                };
                messages.extend(times.iter().map(received));
            }
            let (topic, first_delivery, generation) = (attempt, sequence, attempt / 2);
            deliveries.push(GeneratedDeliver { topic, first_delivery, generation, messages });
        }
        deliveries
    }

    #[test]
    fn a_delivery_is_on_the_wire_as_any_message() {
        for generated in deliveries() {
            let encoded = generated.encode_to_vec();
            let here = Deliver::decode(&*encoded).unwrap();
            let GeneratedDeliver { topic, first_delivery, generation, messages } = generated;
            assert_eq!(here, Deliver { topic, first_delivery, generation, messages });
            assert_eq!(here.encode_to_vec(), encoded);
            assert_eq!(here.encoded_len(), encoded.len());
        }
    }

    /// Whatever the bytes are: cut short, and with each byte changed.
    #[test]
    fn a_delivery_is_decoded_as_any_message() {
        let same = |bytes: &[u8]| {
            let generated = GeneratedDeliver::decode(bytes).ok().map(|generated| {
                let GeneratedDeliver { topic, first_delivery, generation, messages } = generated;
                Deliver { topic, first_delivery, generation, messages }
            });
            assert_eq!(Deliver::decode(bytes).ok(), generated, "{bytes:?}");
        };
        for generated in deliveries() {
            for message in generated
                .messages
                .into_iter()
                .filter(|message| message.message.as_ref().is_none_or(|body| body.len() < 200))
            {
                let encoded = Deliver { messages: vec![message], ..Deliver::default() };
                let mut encoded = encoded.encode_to_vec();
                (0..encoded.len()).for_each(|end| same(&encoded[..end]));
                for place in 0..encoded.len().min(60) {
                    let was = encoded[place];
                    for now in [0, 1, 8, 10, 16, 18, 26, 32, was ^ 0x80, was.wrapping_add(1), 255] {
                        encoded[place] = now;
                        same(&encoded);
                    }
                    encoded[place] = was;
                }
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
        let deliver = ["topic", "first_delivery", "generation", "messages"];
        assert_eq!(fields("Deliver"), named(&deliver));
    }
}
