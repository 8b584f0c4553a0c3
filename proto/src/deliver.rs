//! The frame that brings messages to subscribers.
//!
//! Nearly everything that a subscriber receives comes this way, so its messages stay the bytes that
//! they are on the wire: a store that keeps them as they stand in a [`MessageRun`] sends them without
//! looking at each.

use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;

use bytes::{Buf, BufMut, Bytes};
use prost::encoding::{self, DecodeContext, WireType};
use prost::{DecodeError, Message as _};
use prost_types::Timestamp;

use crate::MAX_FRAME_BYTES;
use crate::pieces::Pieces;
use crate::v1::{ReceivedMessage, SubscribeResponse, subscribe_response};

/// `pubsub.v1.Deliver`: messages of one topic.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Deliver {
    /// The number of the topic in this session.
    pub topic: u32,
    /// The number of the first message in this stream, from 1.
    pub first_delivery: u64,
    /// The generation of the topic that the messages belong to.
    pub generation: u32,
    /// The messages.
    pub runs: Vec<MessageRun>,
}

/// `pubsub.v1.MessageRun`: messages that follow each other and have the rest in common.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MessageRun {
    /// The sequence of the first message in its topic.
    pub first_sequence: u64,
    /// When the server stored them.
    pub publish_time: Option<Timestamp>,
    /// Which showing of each this is, from 1: one more than the failures counted so far.
    pub attempt: u32,
    /// The messages as published.
    pub messages: Fields,
}

/// The tag of a `Deliver` in a [`SubscribeResponse`].
const DELIVER: u32 = 3;
/// The tag of [`Deliver::runs`].
const RUNS: u32 = 5;
/// The tag of [`MessageRun::messages`], with its wire type.
const FIELD: u8 = 4 << 3 | 2;

/// An encoded [`Message`](crate::v1::Message).
#[derive(Debug)]
pub enum Encoded<'a> {
    /// These bytes, which are copied.
    Alone(&'a [u8]),
    /// A field in a row of them, as a [`MessageRun`] has them. It stays where it is.
    InRow(&'a Bytes, Range<usize>),
}

fn field_of(body: &[u8]) -> Bytes {
    let mut row = Vec::with_capacity(1 + encoding::encoded_len_varint(u64::MAX) + body.len());
    row.put_u8(FIELD);
    encoding::encode_varint(body.len() as u64, &mut row);
    row.put_slice(body);
    row.into()
}

impl Deliver {
    /// Adds a message. Those of a run have one publish time and one attempt.
    ///
    /// # Panics
    ///
    /// If a row ends before the message that is said to be in it.
    pub fn push(
        &mut self,
        sequence: u64,
        publish_time: Option<Timestamp>,
        attempt: u32,
        body: Encoded<'_>,
    ) {
        let alone;
        let (row, field) = match body {
            Encoded::InRow(row, field) => (row, field),
            Encoded::Alone(body) => {
                alone = field_of(body);
                (&alone, 0..alone.len())
            }
        };
        assert!(field.start <= field.end && field.end <= row.len(), "a field that is not there");
        let follows = |run: &MessageRun| {
            run.first_sequence.checked_add(run.messages.count as u64) == Some(sequence)
                && run.publish_time == publish_time
                && run.attempt == attempt
        };
        if !self.runs.last().is_some_and(follows) {
            let messages = Fields::default();
            let run = MessageRun { first_sequence: sequence, publish_time, attempt, messages };
            self.runs.push(run);
        }
        if let Some(run) = self.runs.last_mut() {
            run.messages.push(row, field);
        }
    }

    fn put_head(&self, buf: &mut impl BufMut) {
        if self.topic != 0 {
            encoding::uint32::encode(1, &self.topic, buf);
        }
        if self.first_delivery != 0 {
            encoding::uint64::encode(2, &self.first_delivery, buf);
        }
        if self.generation != 0 {
            encoding::uint32::encode(3, &self.generation, buf);
        }
    }

    /// Bytes that are sent from where they are.
    fn spliced(&self) -> usize {
        let pieces = self.runs.iter().flat_map(|run| &run.messages.pieces);
        pieces.filter(|piece| piece.is_spliced()).map(Piece::len).sum()
    }

    /// How many messages there are.
    pub fn count(&self) -> usize {
        self.runs.iter().map(|run| run.messages.count).sum()
    }

    /// The messages, each with what its run says.
    pub fn received(self) -> impl Iterator<Item = ReceivedMessage> {
        self.runs.into_iter().flat_map(|run| {
            let MessageRun { first_sequence, publish_time, attempt, messages } = run;
            // Beyond the last sequence there is none, and 0 says so.
            let sequence = move |at: u64| first_sequence.checked_add(at).unwrap_or(0);
            (0..).zip(messages).map(move |(at, message)| {
                let (sequence, message) = (sequence(at), Some(message));
                ReceivedMessage { sequence, message, publish_time, attempt }
            })
        })
    }
}

impl FromIterator<ReceivedMessage> for Deliver {
    fn from_iter<I: IntoIterator<Item = ReceivedMessage>>(messages: I) -> Self {
        let mut deliver = Self::default();
        for message in messages {
            let ReceivedMessage { sequence, message, publish_time, attempt } = message;
            let body = message.unwrap_or_default();
            deliver.push(sequence, publish_time, attempt, Encoded::Alone(&body));
        }
        deliver
    }
}

/// Messages as they stand in a run: a field each, one after the other.
#[derive(Clone, Default)]
pub struct Fields {
    count: usize,
    pieces: Vec<Piece>,
}

/// Some of these, in one place.
#[derive(Clone)]
struct Piece {
    row: Bytes,
    from: usize,
    end: usize,
}

impl Piece {
    fn bytes(&self) -> &[u8] {
        self.row.get(self.from..self.end).unwrap_or_default()
    }

    fn len(&self) -> usize {
        self.end - self.from
    }

    fn is_spliced(&self) -> bool {
        self.len() >= SPLICED
    }

    /// Whether a field of this row is what follows.
    fn is_before(&self, row: &Bytes, field: &Range<usize>) -> bool {
        let same = self.row.as_ptr() == row.as_ptr() && self.row.len() == row.len();
        same && self.end == field.start
    }
}

impl Fields {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    fn push(&mut self, row: &Bytes, field: Range<usize>) {
        self.count += 1;
        match self.pieces.last_mut() {
            Some(last) if last.is_before(row, &field) => last.end = field.end,
            _ => {
                let Range { start: from, end } = field;
                self.pieces.push(Piece { row: row.clone(), from, end });
            }
        }
    }

    fn bytes(&self) -> usize {
        self.pieces.iter().map(Piece::len).sum()
    }

    /// What is left of a run, if it is nothing but messages.
    fn of(row: &Bytes) -> Option<Self> {
        let (mut count, mut at) = (0, 0);
        while at < row.len() {
            at = read_field(row, at)?.end;
            count += 1;
        }
        let piece = Piece { from: 0, end: row.len(), row: row.clone() };
        Some(Self { count, pieces: vec![piece] })
    }
}

impl IntoIterator for Fields {
    type Item = Bytes;
    type IntoIter = IntoFields;

    fn into_iter(self) -> IntoFields {
        IntoFields(self.pieces.into())
    }
}

/// The messages of a run.
#[derive(Debug)]
pub struct IntoFields(VecDeque<Piece>);

impl Iterator for IntoFields {
    type Item = Bytes;

    fn next(&mut self) -> Option<Bytes> {
        loop {
            let piece = self.0.front_mut()?;
            if let Some(body) = read_field(piece.row.get(..piece.end)?, piece.from) {
                piece.from = body.end;
                return Some(piece.row.slice(body));
            }
            self.0.pop_front();
        }
    }
}

impl fmt::Debug for Piece {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("Piece").field(&self.len()).finish()
    }
}

impl fmt::Debug for Fields {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_list().entries(self.clone()).finish()
    }
}

impl PartialEq for Fields {
    fn eq(&self, other: &Self) -> bool {
        self.count == other.count && self.clone().into_iter().eq(other.clone())
    }
}

/// Where the body of the field is that begins there.
fn read_field(row: &[u8], at: usize) -> Option<Range<usize>> {
    let (tag, mut rest) = row.get(at..)?.split_first()?;
    let length = usize::try_from(encoding::decode_varint(&mut rest).ok()?).ok()?;
    let start = row.len() - rest.len();
    (*tag == FIELD && length <= rest.len()).then(|| start..start + length)
}

/// What is in a run beside its messages.
#[derive(Clone, PartialEq, prost::Message)]
struct Head {
    #[prost(uint64, tag = "1")]
    first_sequence: u64,
    #[prost(message, optional, tag = "2")]
    publish_time: Option<Timestamp>,
    #[prost(uint32, tag = "3")]
    attempt: u32,
}

/// A run in whatever order its fields are.
#[derive(Clone, PartialEq, prost::Message)]
struct Loose {
    #[prost(uint64, tag = "1")]
    first_sequence: u64,
    #[prost(message, optional, tag = "2")]
    publish_time: Option<Timestamp>,
    #[prost(uint32, tag = "3")]
    attempt: u32,
    #[prost(bytes = "bytes", repeated, tag = "4")]
    messages: Vec<Bytes>,
}

impl MessageRun {
    fn head(&self) -> Head {
        let Self { first_sequence, publish_time, attempt, .. } = *self;
        Head { first_sequence, publish_time, attempt }
    }

    /// Its bytes without its own tag and length.
    fn len(&self) -> usize {
        self.head().encoded_len() + self.messages.bytes()
    }

    fn put_head(&self, buf: &mut impl BufMut) {
        encoding::encode_key(RUNS, WireType::LengthDelimited, buf);
        encoding::encode_varint(self.len() as u64, buf);
        self.head().encode_raw(buf);
    }

    fn merge(wire: WireType, buf: &mut impl Buf, ctx: DecodeContext) -> Result<Self, DecodeError> {
        let begun = Begun::of(buf.chunk(), buf.remaining());
        let Some(Begun { head, bytes, rest }) = begun.filter(|_| wire == WireType::LengthDelimited)
        else {
            let mut loose = Loose::default();
            encoding::message::merge(wire, &mut loose, buf, ctx)?;
            return Ok(loose.into());
        };
        let Head { first_sequence, publish_time, attempt } = head;
        buf.advance(bytes);
        let rest = buf.copy_to_bytes(rest);
        if let Some(messages) = Fields::of(&rest) {
            return Ok(Self { first_sequence, publish_time, attempt, messages });
        }
        let mut loose = Loose { first_sequence, publish_time, attempt, messages: Vec::new() };
        loose.merge(rest)?;
        Ok(loose.into())
    }
}

/// A run that was read up to its messages.
struct Begun {
    head: Head,
    /// What was read, with the length of the run.
    bytes: usize,
    /// Bytes that are left of the run.
    rest: usize,
}

impl Begun {
    /// Nothing if it is written in another way than here, which need not be wrong.
    fn of(chunk: &[u8], remaining: usize) -> Option<Self> {
        let mut run = chunk;
        let length = usize::try_from(encoding::decode_varint(&mut run).ok()?).ok()?;
        let before = chunk.len() - run.len();
        if length > remaining - before {
            return None;
        }
        let run = run.get(..length).unwrap_or(run);
        let mut at = 0;
        while run.get(at).is_some_and(|tag| *tag != FIELD) {
            at = skip(run, at)?;
        }
        let head = Head::decode(run.get(..at)?).ok()?;
        Some(Self { head, bytes: before + at, rest: length - at })
    }
}

/// Where a field of the head ends.
fn skip(run: &[u8], at: usize) -> Option<usize> {
    let mut rest = run.get(at..)?;
    let (tag, wire_type) = encoding::decode_key(&mut rest).ok()?;
    encoding::skip_field(wire_type, tag, &mut rest, DecodeContext::default()).ok()?;
    Some(run.len() - rest.len())
}

impl From<Loose> for MessageRun {
    fn from(loose: Loose) -> Self {
        let Loose { first_sequence, publish_time, attempt, messages } = loose;
        let mut deliver = Deliver::default();
        for (at, body) in messages.iter().enumerate() {
            deliver.push(at as u64, None, 0, Encoded::Alone(body));
        }
        let messages = deliver.runs.pop().unwrap_or_default().messages;
        Self { first_sequence, publish_time, attempt, messages }
    }
}

/// Messages that are sent from where they are, and not copied into their frame, have so many bytes in one
/// place: a write takes 16 places at most.
const SPLICED: usize = 16 * 1024;

impl SubscribeResponse {
    /// Writes it with the header that it has in a gRPC stream.
    ///
    /// # Errors
    ///
    /// If it has more than [`MAX_FRAME_BYTES`].
    pub fn splice(&self, pieces: &mut Pieces) -> Result<(), TooLarge> {
        let length = self.encoded_len();
        let header = u32::try_from(length).ok().filter(|_| length <= MAX_FRAME_BYTES);
        let header = header.ok_or(TooLarge { length })?;
        let tail = pieces.tail();
        tail.put_u8(0);
        tail.put_u32(header);
        let Some(subscribe_response::Frame::Deliver(deliver)) = &self.frame else {
            self.encode_raw(tail);
            return Ok(());
        };
        // To grow means to copy what is there.
        tail.reserve(length - deliver.spliced());
        encoding::encode_key(DELIVER, WireType::LengthDelimited, tail);
        encoding::encode_varint(deliver.encoded_len() as u64, tail);
        deliver.put_head(tail);
        for run in &deliver.runs {
            run.put_head(pieces.tail());
            for piece in &run.messages.pieces {
                if piece.is_spliced() {
                    pieces.push(piece.row.slice(piece.from..piece.end));
                } else {
                    pieces.tail().put_slice(piece.bytes());
                }
            }
        }
        Ok(())
    }
}

/// A frame that no peer would accept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLarge {
    /// Its bytes.
    pub length: usize,
}

impl fmt::Display for TooLarge {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "a frame of {} bytes; at most {MAX_FRAME_BYTES} can be sent", self.length)
    }
}

impl std::error::Error for TooLarge {}

impl prost::Message for Deliver {
    fn encode_raw(&self, buf: &mut impl BufMut) {
        self.put_head(buf);
        for run in &self.runs {
            run.put_head(buf);
            run.messages.pieces.iter().for_each(|piece| buf.put_slice(piece.bytes()));
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
            RUNS => {
                self.runs.push(MessageRun::merge(wire_type, buf, ctx)?);
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
        field(1, self.topic.into())
            + field(2, self.first_delivery)
            + field(3, self.generation.into())
            + self
                .runs
                .iter()
                .map(|run| 1 + encoding::encoded_len_varint(run.len() as u64) + run.len())
                .sum::<usize>()
    }

    fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, PartialEq, prost::Message)]
    struct Generated {
        #[prost(uint32, tag = "1")]
        topic: u32,
        #[prost(uint64, tag = "2")]
        first_delivery: u64,
        #[prost(uint32, tag = "3")]
        generation: u32,
        #[prost(message, repeated, tag = "5")]
        runs: Vec<Loose>,
    }

    impl From<Generated> for Deliver {
        fn from(generated: Generated) -> Self {
            let Generated { topic, first_delivery, generation, runs } = generated;
            let runs = runs.into_iter().map(MessageRun::from).collect();
            Self { topic, first_delivery, generation, runs }
        }
    }

    /// Deliveries in which every field is absent, small, and as large as it can be.
    fn deliveries() -> Vec<Generated> {
        let times = [(0, 0), (1, 0), (0, 1), (1_700_000_000, 999_999_999), (-1, -1)];
        let time = |(seconds, nanos)| Some(Timestamp { seconds, nanos });
        let far = time((i64::MIN, i32::MIN));
        let times: Vec<_> = times.into_iter().map(time).chain([None, far]).collect();
        let bodies: [Bytes; 3] = [Bytes::new(), vec![7; 127].into(), vec![7; 300].into()];
        let mut deliveries = vec![Generated::default()];
        for (first_sequence, attempt) in [(0, 0), (1, 1), (127, 128), (u64::MAX, u32::MAX)] {
            let run = |publish_time: &Option<Timestamp>| Loose {
                first_sequence,
                publish_time: *publish_time,
                attempt,
                messages: bodies.to_vec(),
            };
            let mut runs: Vec<_> = times.iter().map(run).collect();
            runs.push(Loose { first_sequence, ..Loose::default() });
            let (topic, first_delivery, generation) = (attempt, first_sequence, attempt / 2);
            deliveries.push(Generated { topic, first_delivery, generation, runs });
        }
        deliveries
    }

    #[test]
    fn a_delivery_is_on_the_wire_as_any_message() {
        for generated in deliveries() {
            let encoded = generated.encode_to_vec();
            let here = Deliver::decode(&*encoded).unwrap();
            assert_eq!(here, Deliver::from(generated));
            assert_eq!(here.encode_to_vec(), encoded);
            assert_eq!(here.encoded_len(), encoded.len());
        }
    }

    /// Whatever the bytes are: cut short, and with each byte changed.
    #[test]
    fn a_delivery_is_decoded_as_any_message() {
        let same = |bytes: &[u8]| {
            let generated = Generated::decode(bytes).ok().map(Deliver::from);
            assert_eq!(Deliver::decode(bytes).ok(), generated, "{bytes:?}");
        };
        for generated in deliveries() {
            for mut run in generated.runs {
                run.messages.truncate(2);
                let generated = Generated { runs: vec![run], ..Generated::default() };
                let mut encoded = generated.encode_to_vec();
                (0..encoded.len()).for_each(|end| same(&encoded[..end]));
                for place in 0..encoded.len().min(60) {
                    let was = encoded[place];
                    for now in [0, 1, 8, 10, 18, 24, 26, 34, 42, was ^ 0x80, was.wrapping_add(1)] {
                        encoded[place] = now;
                        same(&encoded);
                    }
                    encoded[place] = was;
                }
            }
        }
    }

    #[test]
    fn fields_in_another_order_say_the_same() {
        let mut run = vec![0x22, 1, 7, 0x08, 5, 0x22, 0, 0x18, 2];
        run.splice(0..0, [0x2a, u8::try_from(run.len()).unwrap()]);
        let deliver = Deliver::decode(&*run).unwrap();
        let received: Vec<_> = deliver.received().collect();
        let message = |sequence, body: &'static [u8]| ReceivedMessage {
            sequence,
            message: Some(body.into()),
            publish_time: None,
            attempt: 2,
        };
        assert_eq!(received, [message(5, &[7]), message(6, &[])]);
    }

    fn message(sequence: u64, seconds: i64, attempt: u32) -> ReceivedMessage {
        ReceivedMessage {
            sequence,
            message: Some(sequence.to_le_bytes().to_vec().into()),
            publish_time: Some(Timestamp { seconds, nanos: 0 }),
            attempt,
        }
    }

    #[test]
    fn a_run_ends_where_messages_have_something_else_in_common() {
        let messages = [
            message(7, 1, 1),
            message(8, 1, 1),
            message(10, 1, 1),
            message(11, 2, 1),
            message(12, 2, 2),
            message(13, 2, 2),
        ];
        let deliver: Deliver = messages.iter().cloned().collect();
        let firsts: Vec<_> = deliver.runs.iter().map(|run| run.first_sequence).collect();
        assert_eq!((firsts, deliver.count()), (vec![7, 10, 11, 12], 6));
        assert_eq!(deliver.received().collect::<Vec<_>>(), messages);
    }

    #[test]
    fn there_is_nothing_after_the_last_sequence() {
        let messages = [message(u64::MAX, 1, 1), message(0, 1, 1)];
        let deliver: Deliver = messages.iter().cloned().collect();
        assert_eq!(deliver.runs.len(), 2);
        let mut deliver: Deliver = [message(u64::MAX, 1, 1)].into_iter().collect();
        deliver.runs[0].messages.push(&Bytes::from_static(&[FIELD, 0]), 0..2);
        let sequences: Vec<_> = deliver.received().map(|message| message.sequence).collect();
        assert_eq!(sequences, [u64::MAX, 0]);
    }

    /// A row of messages, with where each is.
    fn row(bodies: &[&[u8]]) -> (Bytes, Vec<Range<usize>>) {
        let mut row = vec![1, 2, 3];
        let mut fields = Vec::new();
        for body in bodies {
            let from = row.len();
            encoding::bytes::encode(4, &body.to_vec(), &mut row);
            fields.push(from..row.len());
        }
        (row.into(), fields)
    }

    /// These messages of rows, one after the other.
    fn spliced(messages: &[(&Bytes, &Range<usize>)]) -> Deliver {
        let mut deliver = Deliver { topic: 1, first_delivery: 2, generation: 3, runs: Vec::new() };
        for (sequence, (row, field)) in (1..).zip(messages) {
            deliver.push(sequence, None, 1, Encoded::InRow(row, (*field).clone()));
        }
        deliver
    }

    fn bodies(deliver: Deliver) -> Vec<Bytes> {
        deliver.received().map(|message| message.message.unwrap()).collect()
    }

    #[test]
    fn what_lies_in_a_row_is_taken_from_it_as_it_is() {
        let sent: [&[u8]; 4] = [b"one", b"", &[7; 200], b"four"];
        let (row, fields) = row(&sent);
        let messages: Vec<_> = fields.iter().map(|field| (&row, field)).collect();
        let deliver = spliced(&messages);
        let [run] = &*deliver.runs else { panic!("one run: {deliver:?}") };
        let [piece] = &*run.messages.pieces else { panic!("one piece: {deliver:?}") };
        assert_eq!(piece.bytes().as_ptr(), row[3..].as_ptr());
        assert_eq!(piece.bytes(), &row[3..]);
        let decoded = Deliver::decode(&*deliver.encode_to_vec()).unwrap();
        assert_eq!(decoded, deliver);
        assert_eq!(bodies(decoded), sent);
    }

    #[test]
    fn what_does_not_follow_in_a_row_is_a_piece_of_its_own() {
        let (row_a, a) = row(&[b"one", b"two", b"three"]);
        let (row_b, b) = row(&[b"ONE", b"TWO", b"THREE"]);
        let order = [
            (&row_a, &a[0]),
            (&row_a, &a[2]),
            (&row_b, &b[0]),
            (&row_a, &a[1]),
            (&row_a, &a[1]),
            (&row_b, &b[2]),
        ];
        let deliver = spliced(&order);
        assert_eq!(deliver.runs[0].messages.pieces.len(), order.len());
        let decoded = Deliver::decode(&*deliver.encode_to_vec()).unwrap();
        assert_eq!(bodies(decoded), ["one", "three", "ONE", "two", "two", "THREE"]);
    }

    #[test]
    #[should_panic(expected = "a field that is not there")]
    fn what_is_not_in_the_row_is_not_sent() {
        let (row, fields) = row(&[b"one"]);
        let beyond = fields[0].start..fields[0].end + 1;
        Deliver::default().push(1, None, 1, Encoded::InRow(&row, beyond));
    }

    #[test]
    fn a_frame_in_pieces_is_the_same_frame() {
        let large = vec![7; SPLICED];
        let (row, fields) = row(&[b"one", &large, b"three"]);
        let messages: Vec<_> = fields.iter().map(|field| (&row, field)).collect();
        let mut deliver = spliced(&messages);
        deliver.push(4, None, 1, Encoded::Alone(&large));
        deliver.push(9, None, 2, Encoded::Alone(b"one"));
        let frames = [
            subscribe_response::Frame::Deliver(deliver),
            subscribe_response::Frame::Confirm(crate::v1::AckConfirm { number: 5 }),
        ];
        let frames = frames.map(|frame| SubscribeResponse { frame: Some(frame) });
        let mut pieces = Pieces::default();
        let mut expected = Vec::new();
        for frame in &frames {
            frame.splice(&mut pieces).unwrap();
            expected.put_u8(0);
            expected.put_u32(u32::try_from(frame.encoded_len()).unwrap());
            frame.encode_raw(&mut expected);
        }
        assert_eq!(pieces.remaining(), expected.len());
        let mut popped = Vec::new();
        while let Some(piece) = pieces.pop() {
            popped.push(piece);
        }
        assert_eq!(popped.len(), 4, "head, row, the large one, rest");
        assert_eq!(popped[1].as_ptr(), row[3..].as_ptr());
        assert_eq!(popped.concat(), expected);
    }

    #[test]
    fn what_came_in_a_piece_of_its_own_is_not_copied() {
        let large = vec![7; SPLICED];
        let (row, fields) = row(&[&large, b"two"]);
        let deliver = spliced(&[(&row, &fields[0]), (&row, &fields[1])]);
        let frame = Some(subscribe_response::Frame::Deliver(deliver));
        let mut pieces = Pieces::default();
        SubscribeResponse { frame }.splice(&mut pieces).unwrap();
        pieces.advance(5);
        let frame = SubscribeResponse::decode(pieces).unwrap().frame.unwrap();
        let subscribe_response::Frame::Deliver(deliver) = frame else { panic!() };
        let bodies = bodies(deliver);
        assert!(row.as_ptr_range().contains(&bodies[0].as_ptr()));
        assert_eq!(bodies, [&*large, b"two"]);
    }

    #[test]
    fn a_frame_that_nobody_accepts_is_not_sent() {
        let mut deliver = Deliver::default();
        deliver.push(1, None, 1, Encoded::Alone(&vec![7; MAX_FRAME_BYTES]));
        let frame = SubscribeResponse { frame: Some(subscribe_response::Frame::Deliver(deliver)) };
        let mut pieces = Pieces::default();
        assert_eq!(frame.splice(&mut pieces), Err(TooLarge { length: frame.encoded_len() }));
        assert_eq!(pieces.remaining(), 0);
    }

    #[test]
    fn a_field_that_is_cut_off_or_another_one_is_none() {
        let (row, _) = row(&[&[7; 200]]);
        assert!(read_field(&row, 3).is_some());
        assert!(read_field(&row[..row.len() - 1], 3).is_none());
        for at in [0, 1, 2, row.len(), row.len() + 1] {
            assert!(read_field(&row, at).is_none(), "{at}");
        }
    }
}
