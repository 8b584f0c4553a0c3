//! From the wire's types to the domain's, and back: the only place that names both.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use pubsub_proto::v1;
use tonic::Status;

use super::status::{self, invalid};
use crate::broker::Start;
use crate::broker::delivery::{Claim, Nack};
use crate::broker::session::{self, GapReason, Lease, Leased, Missing, TopicAcks};
use crate::envelope;
use crate::filter::Filter;
use crate::limits;
use crate::names::{SnapshotName, SubscriptionName, TopicName, TopicPattern};
use crate::record::{
    Epoch, FailurePolicy, IdempotencyKey, NewMessage, Sequences, StoredMessage, SubscriptionKind,
    Timestamp, Uuid,
};
use crate::storage::{Atomic, Fact, Fate, Item, Refusal, RefusalReason, Run};

// ---- small things

pub(super) fn duration(duration: Duration) -> Option<prost_types::Duration> {
    // Every duration the server has is far below the limit of 10,000 years.
    duration.try_into().ok()
}

/// A duration; absent stays absent, and negative is refused.
pub(super) fn parse_duration(
    field: &str,
    duration: Option<prost_types::Duration>,
) -> Result<Option<Duration>, Status> {
    let Some(duration) = duration else {
        return Ok(None);
    };
    match duration.try_into() {
        Ok(duration) => Ok(Some(duration)),
        Err(_) => Err(invalid(format!("{field} is not a positive duration"))),
    }
}

pub(super) fn timestamp(at: Timestamp) -> Option<prost_types::Timestamp> {
    let seconds = i64::try_from(at.0 / 1000).unwrap_or(i64::MAX);
    let millis = i32::try_from(at.0 % 1000).unwrap_or(0);
    Some(prost_types::Timestamp { seconds, nanos: millis * 1_000_000 })
}

fn parse_timestamp(at: prost_types::Timestamp) -> Timestamp {
    let seconds = u64::try_from(at.seconds).unwrap_or(0);
    let nanos = u64::try_from(at.nanos).unwrap_or(0);
    // Rounded up: "at or after" must not include the millisecond before.
    Timestamp(seconds.saturating_mul(1000).saturating_add(nanos.div_ceil(1_000_000)))
}

pub(super) fn parse_topic(name: &str) -> Result<TopicName, Status> {
    TopicName::parse(name).map_err(|error| invalid(error.to_string()))
}

pub(super) fn parse_subscription(name: &str) -> Result<SubscriptionName, Status> {
    SubscriptionName::parse(name).map_err(|error| invalid(error.to_string()))
}

pub(super) fn parse_snapshot(name: &str) -> Result<SnapshotName, Status> {
    SnapshotName::parse(name).map_err(|error| invalid(error.to_string()))
}

pub(super) fn parse_patterns(patterns: &[String]) -> Result<Vec<TopicPattern>, Status> {
    if patterns.len() > limits::MAX_PATTERNS {
        return Err(invalid(format!("more than {} topics", limits::MAX_PATTERNS)));
    }
    let parse = |pattern: &String| TopicPattern::parse(pattern);
    patterns.iter().map(parse).collect::<Result<_, _>>().map_err(|error| invalid(error.to_string()))
}

/// A filter; `None` if there is none.
pub(super) fn parse_filter(text: &str) -> Result<Option<Filter>, Status> {
    if text.is_empty() {
        return Ok(None);
    }
    Filter::parse(text).map(Some).map_err(|error| invalid(error.to_string()))
}

/// 16 bytes.
pub(super) fn parse_uuid(field: &str, bytes: &[u8]) -> Result<Uuid, Status> {
    let bytes = bytes.try_into().map_err(|_| invalid(format!("{field} must have 16 bytes")))?;
    Ok(Uuid(bytes))
}

/// 16 bytes or none.
pub(super) fn parse_optional_uuid(field: &str, bytes: &[u8]) -> Result<Option<Uuid>, Status> {
    if bytes.is_empty() { Ok(None) } else { parse_uuid(field, bytes).map(Some) }
}

pub(super) fn uuid(uuid: Uuid) -> Bytes {
    Bytes::copy_from_slice(&uuid.0)
}

pub(super) fn parse_epoch(epoch: u64) -> Option<Epoch> {
    (epoch != 0).then_some(Epoch(epoch))
}

pub(super) fn kind(kind: SubscriptionKind) -> v1::SubscriptionKind {
    match kind {
        SubscriptionKind::Exclusive => v1::SubscriptionKind::Exclusive,
        SubscriptionKind::Shared => v1::SubscriptionKind::Shared,
        SubscriptionKind::KeyOrdered => v1::SubscriptionKind::KeyOrdered,
    }
}

/// A kind; `None` if it is left to the server.
pub(super) fn parse_kind(kind: i32) -> Result<Option<SubscriptionKind>, Status> {
    match v1::SubscriptionKind::try_from(kind) {
        Ok(v1::SubscriptionKind::Unspecified) => Ok(None),
        Ok(v1::SubscriptionKind::Exclusive) => Ok(Some(SubscriptionKind::Exclusive)),
        Ok(v1::SubscriptionKind::Shared) => Ok(Some(SubscriptionKind::Shared)),
        Ok(v1::SubscriptionKind::KeyOrdered) => Ok(Some(SubscriptionKind::KeyOrdered)),
        Err(_) => Err(invalid(format!("kind {kind} is not known to this server"))),
    }
}

/// What becomes of messages that fail; `None` if it is left to the server.
pub(super) fn parse_policy(
    policy: Option<v1::FailurePolicy>,
) -> Result<Option<FailurePolicy>, Status> {
    use v1::failure_policy::Policy;
    let attempts = |attempts| if attempts == 0 { limits::DEFAULT_ATTEMPTS } else { attempts };
    Ok(match policy.and_then(|policy| policy.policy) {
        None => None,
        Some(Policy::Block(_)) => Some(FailurePolicy::Block),
        Some(Policy::DeadLetter(v1::DeadLetterPolicy { topic, max_attempts })) => {
            let (topic, max_attempts) = (parse_topic(&topic)?, attempts(max_attempts));
            Some(FailurePolicy::DeadLetter { topic, max_attempts })
        }
        Some(Policy::Skip(v1::SkipPolicy { max_attempts })) => {
            Some(FailurePolicy::Skip { max_attempts: attempts(max_attempts) })
        }
    })
}

pub(super) fn policy(policy: &FailurePolicy) -> v1::FailurePolicy {
    use v1::failure_policy::Policy;
    let policy = match policy {
        FailurePolicy::Block => Policy::Block(v1::BlockPolicy {}),
        FailurePolicy::DeadLetter { topic, max_attempts } => {
            let (topic, max_attempts) = (topic.to_string(), *max_attempts);
            Policy::DeadLetter(v1::DeadLetterPolicy { topic, max_attempts })
        }
        FailurePolicy::Skip { max_attempts } => {
            Policy::Skip(v1::SkipPolicy { max_attempts: *max_attempts })
        }
    };
    v1::FailurePolicy { policy: Some(policy) }
}

pub(super) fn parse_start(start: Option<v1::StartPosition>) -> Result<Start, Status> {
    use v1::start_position::Position;
    match start.and_then(|start| start.position) {
        None | Some(Position::Latest(_)) => Ok(Start::Latest),
        Some(Position::Earliest(_)) => Ok(Start::Earliest),
        Some(Position::Sequence(0)) => Err(invalid("start.sequence: sequences start at 1")),
        Some(Position::Sequence(sequence)) => Ok(Start::Sequence(sequence)),
        Some(Position::Time(time)) => Ok(Start::Time(parse_timestamp(time))),
    }
}

/// Ranges, each from 1 and not backwards.
pub(super) fn parse_ranges(ranges: &[v1::SequenceRange]) -> Result<Sequences, Status> {
    let mut sequences = Sequences::new();
    for range in ranges {
        if range.first == 0 || range.last < range.first || range.last == u64::MAX {
            let (first, last) = (range.first, range.last);
            return Err(invalid(format!("{first}..={last} is not a range of sequences")));
        }
        sequences.insert(range.first..=range.last);
    }
    Ok(sequences)
}

pub(super) fn ranges(sequences: &Sequences) -> Vec<v1::SequenceRange> {
    let range = |range: &std::ops::RangeInclusive<u64>| v1::SequenceRange {
        first: *range.start(),
        last: *range.end(),
    };
    sequences.iter().map(range).collect()
}

// ---- publishing

/// A message as a publisher has encoded it. What it has encoded is what is stored, unless there is
/// more in it than this server knows of.
pub(super) fn parse_encoded(encoded: Bytes) -> Item {
    if envelope::is_plain(&encoded) {
        return Item::Store(NewMessage { body: encoded, recipients: Vec::new(), key: None });
    }
    match v1::Message::decode(encoded.clone()) {
        Ok(message) => parse(message, Some(encoded)),
        Err(error) => {
            let detail = format!("it cannot be decoded: {error}");
            Item::Refuse(Refusal::new(RefusalReason::Invalid, detail))
        }
    }
}

/// A message.
pub(super) fn parse_message(message: v1::Message) -> Item {
    parse(message, None)
}

fn parse(mut message: v1::Message, encoded: Option<Bytes>) -> Item {
    let stamped = std::mem::take(&mut message.schema_revision) > 0;
    let item = check_message(&message).and_then(|()| {
        let recipients: Result<_, _> =
            message.recipients.iter().map(|name| SubscriptionName::parse(name)).collect();
        recipients.map_err(|error| error.to_string())
    });
    let recipients = match item {
        Ok(recipients) => recipients,
        Err(detail) => {
            return Item::Refuse(Refusal::new(RefusalReason::Invalid, detail));
        }
    };
    // Of the same length it holds the same fields, each once, in whatever order.
    let is_all = |encoded: &Bytes| !stamped && encoded.len() == message.encoded_len();
    let body = encoded.filter(is_all).unwrap_or_else(|| message.encode_to_vec().into());
    let key = (!message.idempotency_key.is_empty()).then(|| {
        let key = truncated(blake3::hash(message.idempotency_key.as_bytes()));
        message.idempotency_key.clear();
        IdempotencyKey { key, content: *blake3::hash(&message.encode_to_vec()).as_bytes() }
    });
    Item::Store(NewMessage { body, recipients, key })
}

/// The messages of a batch that is stored whole or not at all, and what holds for all of it.
pub(super) fn parse_atomic(
    messages: Vec<v1::Message>,
    atomic: &v1::AtomicBatch,
) -> Result<(Vec<Item>, Atomic), Status> {
    let (bytes, limit) =
        (messages.iter().map(v1::Message::encoded_len).sum::<usize>(), limits::MAX_ATOMIC_BYTES);
    if bytes > limit {
        return Err(invalid(format!("an atomic batch has {bytes} bytes; {limit} are allowed")));
    }
    let (key, limit) = (&atomic.idempotency_key, limits::MAX_KEY_BYTES);
    if key.len() > limit {
        let size = key.len();
        return Err(invalid(format!("idempotency_key has {size} bytes; {limit} are allowed")));
    }
    let mut content = blake3::Hasher::new();
    let parse = |mut message: v1::Message| {
        if !message.idempotency_key.is_empty() {
            let detail = "a message of an atomic batch has no idempotency key of its own";
            return Item::Refuse(Refusal::new(RefusalReason::Invalid, detail));
        }
        message.schema_revision = 0;
        if !key.is_empty() {
            content.update(blake3::hash(&message.encode_to_vec()).as_bytes());
        }
        parse_message(message)
    };
    let items = messages.into_iter().map(parse).collect();
    let key = (!key.is_empty()).then(|| IdempotencyKey {
        key: truncated(blake3::hash(key.as_bytes())),
        content: *content.finalize().as_bytes(),
    });
    Ok((items, Atomic { expected_head: atomic.expected_head, key }))
}

fn truncated(hash: blake3::Hash) -> [u8; 16] {
    let mut short = [0; 16];
    short.copy_from_slice(&hash.as_bytes()[..16]);
    short
}

fn check_message(message: &v1::Message) -> Result<(), String> {
    let key = limits::MAX_KEY_BYTES;
    let short = [
        ("ordering_key", &message.ordering_key),
        ("content_type", &message.content_type),
        ("idempotency_key", &message.idempotency_key),
    ];
    for (field, value) in short {
        if value.len() > key {
            return Err(format!("{field} has {} bytes; {key} are allowed", value.len()));
        }
    }
    let (count, allowed) = (message.attributes.len(), limits::MAX_ATTRIBUTES);
    if count > allowed {
        return Err(format!("{count} attributes; {allowed} are allowed"));
    }
    let bytes: usize =
        message.attributes.iter().map(|(name, value)| name.len() + value.len()).sum();
    if bytes > limits::MAX_ATTRIBUTE_BYTES {
        let allowed = limits::MAX_ATTRIBUTE_BYTES;
        return Err(format!("attributes have {bytes} bytes; {allowed} are allowed"));
    }
    let (count, allowed) = (message.recipients.len(), limits::MAX_RECIPIENTS);
    if count > allowed {
        return Err(format!("{count} recipients; {allowed} are allowed"));
    }
    Ok(())
}

pub(super) fn publish_run(epoch: Epoch, run: Run) -> v1::PublishRun {
    use v1::publish_run::Outcome;
    let outcome = match run.fate {
        Fate::Stored { sequence, duplicate, at } => {
            Outcome::Stored(stored(epoch, sequence, duplicate, at))
        }
        Fate::Refused(refusal) => Outcome::Refused(refused(refusal)),
    };
    v1::PublishRun { first_sequence: run.first_sequence, count: run.count, outcome: Some(outcome) }
}

pub(super) fn publish_results(epoch: Epoch, runs: Vec<Run>) -> Vec<v1::PublishResult> {
    use v1::publish_result::Outcome;
    let each = |run: Run| {
        (0..u64::from(run.count)).map(move |offset| {
            let outcome = match run.fate.clone() {
                Fate::Stored { sequence, duplicate, at } => {
                    Outcome::Stored(stored(epoch, sequence + offset, duplicate, at))
                }
                Fate::Refused(refusal) => Outcome::Refused(refused(refusal)),
            };
            v1::PublishResult { outcome: Some(outcome) }
        })
    };
    runs.into_iter().flat_map(each).collect()
}

fn stored(epoch: Epoch, sequence: u64, duplicate: bool, at: Timestamp) -> v1::Stored {
    v1::Stored { epoch: epoch.0, sequence, duplicate, publish_time: timestamp(at) }
}

fn refused(refusal: Refusal) -> v1::Refused {
    let reason = status::refusal_reason(refusal.reason).into();
    let metadata = refusal.facts.into_iter().map(fact).collect();
    v1::Refused { reason, detail: refusal.detail, metadata }
}

/// A fact as the protocol names it.
fn fact(fact: Fact) -> (String, String) {
    let (name, value) = match fact {
        Fact::Limit(limit) => ("limit", limit.to_string()),
        Fact::Sequence(sequence) => ("sequence", sequence.to_string()),
        Fact::SchemaRevision(revision) => ("schema_revision", revision.to_string()),
        Fact::Field(field) => ("field", field),
        Fact::Expected(expected) => ("expected", expected),
        Fact::Head(head) => ("head", head.to_string()),
        Fact::Index(index) => ("index", index.to_string()),
    };
    (name.to_owned(), value)
}

// ---- consuming

pub(super) fn parse_claim(position: &v1::TopicPosition) -> Result<Claim, Status> {
    Ok(Claim {
        held: bounded("held", parse_ranges(&position.held)?)?,
        held_bytes: position.held_bytes,
        acked: parse_ranges(&position.acked)?,
        nacked: position.nacked.iter().map(parse_nack).collect::<Result<_, _>>()?,
        missed: parse_ranges(&position.missed)?,
        started: bounded("started", parse_ranges(&position.started)?)?,
        cursor_generation: position.cursor_generation,
    })
}

/// A set that cannot be larger than what may be out.
fn bounded(field: &str, sequences: Sequences) -> Result<Sequences, Status> {
    let count = |range: &std::ops::RangeInclusive<u64>| range.end() - range.start() + 1;
    let total = sequences.iter().map(count).fold(0, u64::saturating_add);
    if total > u64::from(limits::MAX_OUTSTANDING_MESSAGES) * 2 {
        return Err(invalid(format!("{field} names {total} messages, more than can be out")));
    }
    Ok(sequences)
}

fn parse_nack(item: &v1::NackItem) -> Result<Nack, Status> {
    if item.sequence == 0 {
        return Err(invalid("nack of sequence 0: sequences start at 1"));
    }
    let delay = parse_duration("nack delay", item.delay)?;
    let (sequence, attempt, for_good) = (item.sequence, item.attempt, item.for_good);
    Ok(Nack { sequence, attempt, delay, reason: short_reason(&item.reason), for_good })
}

/// As much of a reason as is kept.
pub(super) fn short_reason(reason: &str) -> String {
    let most = reason.len().min(limits::MAX_REASON_BYTES);
    let end = (0..=most).rev().find(|end| reason.is_char_boundary(*end)).unwrap_or(0);
    reason[..end].to_owned()
}

pub(super) fn parse_acks(batch: v1::AckBatch) -> Result<session::AckBatch, Status> {
    let parse = |acks: v1::TopicAcks| {
        Ok(TopicAcks {
            topic: acks.topic,
            cursor_generation: acks.cursor_generation,
            acked: parse_ranges(&acks.acked)?,
            nacked: acks.nacked.iter().map(parse_nack).collect::<Result<_, _>>()?,
            missed: parse_ranges(&acks.missed)?,
            started: bounded("started", parse_ranges(&acks.started)?)?,
        })
    };
    let topics = batch.topics.into_iter().map(parse).collect::<Result<_, Status>>()?;
    Ok(session::AckBatch { number: batch.number, topics, awaited: batch.awaited })
}

pub(super) fn session_topic(topic: session::SessionTopic) -> v1::SessionTopic {
    v1::SessionTopic {
        number: topic.number,
        topic: topic.name.to_string(),
        epoch: topic.epoch.0,
        floor: topic.floor,
        head: topic.head,
        cursor_generation: topic.cursor_generation,
        dropped: ranges(&topic.dropped),
    }
}

pub(super) fn gap_reason(reason: GapReason) -> v1::GapReason {
    match reason {
        GapReason::Retention => v1::GapReason::Retention,
        GapReason::TopicDeleted => v1::GapReason::TopicDeleted,
        GapReason::Purged => v1::GapReason::Purged,
    }
}

/// A stored message for a consumer.
fn received(message: &StoredMessage, attempt: u32) -> v1::ReceivedMessage {
    v1::ReceivedMessage {
        sequence: message.sequence,
        message: Some(message.body.bytes()),
        publish_time: timestamp(message.published_at),
        attempt,
    }
}

pub(super) fn pulled(leased: Leased) -> v1::PulledMessage {
    let Leased { topic, lease, message } = leased;
    let Lease { topic: epoch, sequence, attempt, pull } = lease;
    let id = v1::MessageId { topic: topic.to_string(), epoch: epoch.0, sequence };
    v1::PulledMessage {
        id: Some(id),
        message: Some(received(&message, attempt)),
        lease_token: format!("{:016x}-{sequence:x}-{attempt:x}-{pull:x}", epoch.0),
    }
}

pub(super) fn pulled_gap(missing: Missing) -> v1::PulledGap {
    let Missing { topic, epoch, first, last, reason } = missing;
    v1::PulledGap {
        topic: topic.to_string(),
        epoch: epoch.0,
        range: Some(v1::SequenceRange { first, last }),
        reason: gap_reason(reason).into(),
    }
}

pub(super) fn parse_lease(token: &str) -> Result<Lease, Status> {
    let parse = || {
        let mut parts = token.split('-').map(|part| u64::from_str_radix(part, 16).ok());
        let mut next = || parts.next().flatten();
        let lease = Lease {
            topic: Epoch(next()?),
            sequence: next()?,
            attempt: u32::try_from(next()?).ok()?,
            pull: next()?,
        };
        Some(lease)
    };
    parse().ok_or_else(|| invalid("a lease token is not one that this server gave"))
}

/// Message ids by topic.
pub(super) fn parse_ids(
    ids: &[v1::MessageId],
) -> Result<BTreeMap<(TopicName, Epoch), Sequences>, Status> {
    let mut by_topic: BTreeMap<_, Sequences> = BTreeMap::new();
    for id in ids {
        let epoch = parse_epoch(id.epoch).ok_or_else(|| invalid("ids: epoch is missing"))?;
        if id.sequence == 0 || id.sequence == u64::MAX {
            return Err(invalid("ids: sequences start at 1"));
        }
        let sequences = by_topic.entry((parse_topic(&id.topic)?, epoch)).or_default();
        sequences.insert(id.sequence..=id.sequence);
    }
    Ok(by_topic)
}
