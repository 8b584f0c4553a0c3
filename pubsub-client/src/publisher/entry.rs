//! A message of a publisher, from the call that enqueues it to its fate.

use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use prost::Message as _;
use prost::encoding::encoded_len_varint;
use pubsub_proto::v1 as pb;
use tokio::time::Instant;

use super::fates::{Fate, Teller};
use crate::error::{Outcome, PublishError, PublishErrorKind};
use crate::message::Message;

/// A message in its wire form. Nobody looks at its fields on the way, so they are kept as bytes; one
/// that is handed back is decoded.
#[derive(Debug)]
pub(super) enum Body {
    /// A payload and nothing else.
    Plain(Bytes),
    /// An encoded message.
    Encoded(Bytes),
}

/// The key of the only field of a plain message, before its length.
const PAYLOAD_KEY: u8 = 1 << 3 | 2;

impl Body {
    pub(super) fn new(message: Message) -> Self {
        if message.is_plain() {
            return Self::Plain(message.payload);
        }
        Self::Encoded(message.into_wire().encoded())
    }

    /// How many bytes it is on the wire.
    pub(super) fn size(&self) -> usize {
        match self {
            Self::Plain(payload) if payload.is_empty() => 0,
            Self::Plain(payload) => 1 + encoded_len_varint(payload.len() as u64) + payload.len(),
            Self::Encoded(bytes) => bytes.len(),
        }
    }

    pub(super) fn write(&self, buffer: &mut BytesMut) {
        match self {
            Self::Plain(payload) if payload.is_empty() => {}
            Self::Plain(payload) => {
                buffer.put_u8(PAYLOAD_KEY);
                prost::encoding::encode_varint(payload.len() as u64, buffer);
                buffer.extend_from_slice(payload);
            }
            Self::Encoded(bytes) => buffer.extend_from_slice(bytes),
        }
    }

    pub(super) fn to_message(&self, deadline: Option<Duration>) -> Message {
        match self {
            Self::Plain(payload) => {
                Message { payload: payload.clone(), deadline, ..Message::default() }
            }
            Self::Encoded(bytes) => {
                let decoded = pb::Message::decode(bytes.clone());
                Message::from_wire(decoded.expect("it was encoded here"), deadline)
            }
        }
    }

    /// The idempotency key; empty if there is none.
    fn key(&self) -> String {
        match self {
            Self::Plain(_) => String::new(),
            Self::Encoded(_) => self.to_message(None).idempotency_key.unwrap_or_default(),
        }
    }
}

/// Where small messages are put one behind the other: an allocation for many, and what the
/// application has allocated is freed where that was.
#[derive(Debug, Default)]
pub(super) struct Chunk(BytesMut);

impl Chunk {
    const BYTES: usize = 16 * 1024;
    /// Larger ones are not copied.
    const SMALL: usize = 1024;

    /// The body, for as long as it takes.
    pub(super) fn keep(&mut self, body: Body, size: usize) -> Body {
        match body {
            Body::Plain(_) if size <= Self::SMALL => {
                if self.0.capacity() < size {
                    self.0 = BytesMut::with_capacity(Self::BYTES);
                }
                body.write(&mut self.0);
                Body::Encoded(self.0.split().freeze())
            }
            Body::Plain(_) | Body::Encoded(_) => body,
        }
    }
}

/// A message that the topic allows.
#[derive(Debug)]
pub(super) struct Checked {
    pub(super) body: Body,
    pub(super) size: usize,
    pub(super) given: Option<Duration>,
    pub(super) deadline: Option<Instant>,
}

impl Checked {
    pub(super) fn into_message(self) -> Message {
        self.body.to_message(self.given)
    }
}

/// What a message takes up of the window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Places {
    pub(super) messages: u32,
    pub(super) bytes: u32,
}

impl std::ops::AddAssign for Places {
    // What is taken is never more than the window has, and that fits.
    fn add_assign(&mut self, more: Self) {
        self.messages += more.messages;
        self.bytes += more.bytes;
    }
}

/// A message in the window, and who waits for it.
#[derive(Debug)]
pub(super) struct Entry {
    body: Body,
    pub(super) number: u64,
    /// To be given back once it has left the window.
    pub(super) places: Places,
    /// Nothing once the fate is told.
    pub(super) ticket: Option<Teller>,
    /// What few messages have.
    more: Option<Box<More>>,
}

#[derive(Debug)]
struct More {
    given: Option<Duration>,
    deadline: Option<Instant>,
    atomic: Option<pb::AtomicBatch>,
}

impl Entry {
    pub(super) fn new(body: Body, number: u64, places: Places, ticket: Teller) -> Self {
        Self { body, number, places, ticket: Some(ticket), more: None }
    }

    pub(super) fn set_deadline(&mut self, given: Option<Duration>, deadline: Option<Instant>) {
        if given.is_some() || deadline.is_some() {
            let more = self.more();
            (more.given, more.deadline) = (given, deadline);
        }
    }

    /// Its deadline has passed, and is of no more interest.
    pub(super) fn clear_deadline(&mut self) {
        if let Some(more) = &mut self.more {
            more.deadline = None;
        }
    }

    pub(super) fn set_atomic(&mut self, atomic: Option<pb::AtomicBatch>) {
        if atomic.is_some() {
            self.more().atomic = atomic;
        }
    }

    fn more(&mut self) -> &mut More {
        self.more
            .get_or_insert_with(|| Box::new(More { given: None, deadline: None, atomic: None }))
    }

    /// Whether their fates can be told at once.
    fn goes_with(&self, next: &Self) -> bool {
        let both = self.ticket.as_ref().zip(next.ticket.as_ref());
        both.is_some_and(|(this, next)| {
            Arc::ptr_eq(&this.fates, &next.fates) && this.index + 1 == next.index
        })
    }

    pub(super) fn body(&self) -> &Body {
        &self.body
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.more.as_ref().and_then(|more| more.deadline)
    }

    /// What holds for a batch of which this is the first message.
    pub(super) fn atomic(&self) -> Option<&pb::AtomicBatch> {
        self.more.as_ref().and_then(|more| more.atomic.as_ref())
    }

    pub(super) fn to_message(&self) -> Message {
        self.body.to_message(self.more.as_ref().and_then(|more| more.given))
    }

    /// Lets go of the messages beside it that it shares memory with.
    pub(super) fn keep_alone(&mut self) {
        if let Body::Encoded(bytes) = &mut self.body {
            *bytes = Bytes::copy_from_slice(bytes);
        }
    }

    /// The error for this message.
    pub(super) fn error(&self, kind: PublishErrorKind, outcome: Outcome) -> Box<PublishError> {
        Box::new(PublishError::new(kind, outcome).with_key(&self.body.key()))
    }

    /// Tells that it has failed, unless its deadline has told before. Answers an error that nobody
    /// hears.
    pub(super) fn fail(
        &mut self,
        kind: PublishErrorKind,
        outcome: Outcome,
    ) -> Option<PublishError> {
        let Teller { fates, index } = self.ticket.take()?;
        fates.failed(index, self.error(kind, outcome))
    }
}

impl Drop for Entry {
    /// Should not find anyone waiting: a publisher tells all fates at its end, whatever ends it.
    fn drop(&mut self) {
        self.fail(PublishErrorKind::Closed, Outcome::Unknown);
    }
}

/// Tells the fates of messages that follow each other: those of a group that share an allocation at
/// once. `fate` says what became of one, and of those that follow, by its place among all. Answers
/// the errors that nobody hears.
pub(super) fn tell_all(
    entries: &mut [Entry],
    fate: impl Fn(u64, &Entry) -> Fate,
) -> Vec<PublishError> {
    let (mut unheard, mut offset) = (Vec::new(), 0);
    for group in entries.chunk_by_mut(Entry::goes_with) {
        let count = group.len();
        match fate(offset, &group[0]) {
            Fate::Stored(stored) => {
                let mut tellers = group.iter_mut().filter_map(|entry| entry.ticket.take());
                if let Some(Teller { fates, index }) = tellers.next() {
                    tellers.for_each(drop);
                    fates.stored(index, count, stored);
                }
            }
            Fate::Failed(_) => {
                let failed = (offset..).zip(group).filter_map(|(offset, entry)| {
                    let Fate::Failed(error) = fate(offset, entry) else { return None };
                    let Teller { fates, index } = entry.ticket.take()?;
                    fates.failed(index, error)
                });
                unheard.extend(failed);
            }
        }
        offset += count as u64;
    }
    unheard
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::super::fates::{Stored, Tickets};
    use super::super::ticket::PublishTicket;
    use super::*;

    fn entries(count: u64) -> (Vec<Entry>, Vec<PublishTicket>) {
        let mut tickets = Tickets::new("t".into());
        let entry = |number| {
            let (teller, ticket) = tickets.make();
            let body = Body::new(Message::new("payload"));
            (Entry::new(body, number, Places::default(), teller), ticket)
        };
        (0..count).map(entry).unzip()
    }

    fn stored(offset: u64, _: &Entry) -> Fate {
        let publish_time = std::time::SystemTime::UNIX_EPOCH;
        Fate::Stored(Stored { epoch: 7, sequence: 100 + offset, duplicate: false, publish_time })
    }

    fn failed(_: u64, entry: &Entry) -> Fate {
        Fate::Failed(entry.error(PublishErrorKind::Closed, Outcome::NotPersisted))
    }

    #[test]
    fn bodies_are_what_the_wire_has_and_are_handed_back_unchanged() {
        let mut chunk = Chunk::default();
        for size in [0, 1, 127, 128, Chunk::SMALL, 3 * Chunk::BYTES] {
            for keyed in [false, true] {
                let message = Message::new(vec![7; size]);
                let message = if keyed { message.with_idempotency_key("k") } else { message };
                let wire = message.clone().into_wire().encoded();
                let body = Body::new(message.clone());
                assert_eq!(
                    (body.size(), body.key()),
                    (wire.len(), if keyed { "k" } else { "" }.into())
                );
                let body = chunk.keep(body, wire.len());
                let mut written = BytesMut::new();
                body.write(&mut written);
                assert_eq!(written, wire);
                assert_eq!(body.to_message(None), message);
            }
        }
    }

    #[test]
    fn each_ticket_is_told_its_own_fate_also_when_many_are_told_at_once() {
        let (mut entries, mut tickets) = entries(200);
        let first = tickets.remove(0);
        // One was told before, and whoever holds this one hears of it alone.
        let early = tickets.remove(99);
        assert!(entries[100].fail(PublishErrorKind::Closed, Outcome::Unknown).is_none());
        // And one is gone from between the others.
        drop((entries.remove(30), tickets.remove(29)));
        let mut waiting = asked(&mut tickets);
        assert!(tell_all(&mut entries, stored).is_empty());
        let left = (1..).filter(|number| ![30, 100].contains(number));
        for ((offset, number), ticket) in (1..).zip(left).zip(&mut waiting) {
            let receipt = ticket.now_or_never().expect("its fate is told").unwrap();
            // The one that was told before took a place, the one that is gone did not.
            let offset = if number > 100 { offset + 1 } else { offset };
            assert_eq!(receipt.id.to_string(), format!("t/7/{}", 100 + offset));
        }
        assert_eq!(first.now_or_never().unwrap().unwrap().id.sequence, 100);
        assert!(early.now_or_never().unwrap().is_err());
    }

    /// Tickets that were asked in vain.
    fn asked(tickets: &mut Vec<PublishTicket>) -> Vec<PublishTicket> {
        for ticket in tickets.iter_mut() {
            assert!(ticket.now_or_never().is_none());
        }
        std::mem::take(tickets)
    }

    #[test]
    fn whoever_waits_is_woken() {
        let (mut entries, tickets) = entries(70);
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
        runtime.block_on(async {
            let mut waiting = tokio::task::JoinSet::new();
            tickets.into_iter().for_each(|ticket| drop(waiting.spawn(ticket)));
            tokio::task::yield_now().await;
            assert!(tell_all(&mut entries, stored).is_empty());
            let receipts = waiting.join_all().await;
            assert!(receipts.len() == 70 && receipts.iter().all(Result::is_ok));
        });
    }

    #[test]
    fn failures_of_dropped_tickets_are_answered_and_others_are_not() {
        let (mut entries, mut tickets) = entries(130);
        drop(tickets.split_off(65));
        assert_eq!(tell_all(&mut entries[..100], failed).len(), 35);
        assert!(entries[100].fail(PublishErrorKind::Closed, Outcome::Unknown).is_some());
        assert!(tell_all(&mut entries[101..], stored).is_empty());
        assert!(tickets.into_iter().all(|ticket| ticket.now_or_never().unwrap().is_err()));
    }

    #[test]
    fn a_message_that_is_lost_on_the_way_has_a_fate_all_the_same() {
        let (entries, tickets) = entries(1);
        drop(entries);
        let error = tickets.into_iter().next().unwrap().now_or_never().unwrap().unwrap_err();
        assert_eq!(error.outcome(), Outcome::Unknown);
    }
}
