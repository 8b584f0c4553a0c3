//! Between the wire and what is kept here.

use std::ops::RangeInclusive;
use std::sync::Arc;

use pubsub_proto::v1 as pb;
use pubsub_proto::v1::subscribe_request::Frame;

use super::buffer::Item;
use super::builder::{Settings, Start, SubscriptionKind};
use super::core::Core;
use super::failure::FailurePolicy;
use super::nacks::Nacked;
use super::order::Order;
use super::resume::TopicBatch;
use super::topic::{Joined, Missing, Position};
use super::{Gap, GapReason};
use crate::limits;
use crate::message::{Content, Received, wire_duration};

pub(super) fn request(frame: Frame) -> pb::SubscribeRequest {
    pb::SubscribeRequest { frame: Some(frame) }
}

/// The hello of the next connection.
pub(super) fn hello(core: &Core) -> pb::SubscribeRequest {
    let attach = core.next_attach();
    let mut inner = core.lock();
    let settings = &core.settings;
    // A reader shares its messages with nobody.
    let kind = settings.kind.filter(|_| !settings.is_reader()).map(kind).unwrap_or_default();
    let on_failure = settings.on_failure.as_ref().filter(|_| !settings.is_reader()).map(policy);
    let ack_timeout = settings.ack_timeout.filter(|_| !settings.is_reader());
    let positions = inner.resume.hello().into_iter().map(position).collect();
    request(Frame::Hello(pb::SubscribeHello {
        protocol: pubsub_proto::PROTOCOL_VERSION,
        subscription: settings.subscription.clone(),
        subscription_epoch: inner.epoch,
        consumer: Some(pb::Consumer {
            id: core.consumer.clone(),
            instance: core.instance.to_vec().into(),
            attach,
        }),
        topics: settings.topics.clone(),
        kind: kind.into(),
        start: Some(start(settings.start)),
        must_exist: settings.must_exist,
        max_outstanding_messages: settings.max_messages,
        max_outstanding_bytes: settings.max_bytes,
        positions,
        client: crate::client::VERSION.to_owned(),
        heartbeat_interval: wire_duration(settings.heartbeat),
        boot_id: inner.boot.clone(),
        on_failure,
        ack_timeout: ack_timeout.and_then(wire_duration),
        filter: settings.filter.clone(),
    }))
}

pub(crate) fn policy(policy: &FailurePolicy) -> pb::FailurePolicy {
    use pb::failure_policy::Policy;
    let policy = match policy {
        FailurePolicy::Block => Policy::Block(pb::BlockPolicy {}),
        FailurePolicy::DeadLetter { topic, max_attempts } => {
            let (topic, max_attempts) = (topic.clone(), *max_attempts);
            Policy::DeadLetter(pb::DeadLetterPolicy { topic, max_attempts })
        }
        FailurePolicy::Skip { max_attempts } => {
            Policy::Skip(pb::SkipPolicy { max_attempts: *max_attempts })
        }
    };
    pb::FailurePolicy { policy: Some(policy) }
}

pub(crate) fn policy_from_wire(policy: Option<pb::FailurePolicy>) -> FailurePolicy {
    use pb::failure_policy::Policy;
    match policy.and_then(|policy| policy.policy) {
        None | Some(Policy::Block(_)) => FailurePolicy::Block,
        Some(Policy::DeadLetter(pb::DeadLetterPolicy { topic, max_attempts })) => {
            FailurePolicy::DeadLetter { topic, max_attempts }
        }
        Some(Policy::Skip(pb::SkipPolicy { max_attempts })) => FailurePolicy::Skip { max_attempts },
    }
}

pub(crate) fn kind(kind: SubscriptionKind) -> pb::SubscriptionKind {
    match kind {
        SubscriptionKind::Exclusive => pb::SubscriptionKind::Exclusive,
        SubscriptionKind::Shared => pb::SubscriptionKind::Shared,
        SubscriptionKind::KeyOrdered => pb::SubscriptionKind::KeyOrdered,
    }
}

pub(crate) fn kind_from_wire(kind: pb::SubscriptionKind) -> SubscriptionKind {
    match kind {
        pb::SubscriptionKind::Unspecified | pb::SubscriptionKind::Exclusive => {
            SubscriptionKind::Exclusive
        }
        pb::SubscriptionKind::Shared => SubscriptionKind::Shared,
        pb::SubscriptionKind::KeyOrdered => SubscriptionKind::KeyOrdered,
    }
}

pub(crate) fn start(start: Start) -> pb::StartPosition {
    use pb::start_position::Position;
    let position = match start {
        Start::Earliest => Position::Earliest(pb::Earliest {}),
        Start::Latest => Position::Latest(pb::Latest {}),
        Start::Sequence(sequence) => Position::Sequence(sequence),
        Start::Time(time) => Position::Time(time.into()),
    };
    pb::StartPosition { position: Some(position) }
}

fn position(position: Position) -> pb::TopicPosition {
    pb::TopicPosition {
        topic: position.name.as_ref().to_owned(),
        epoch: position.epoch,
        cursor_generation: position.cursor_generation,
        held: ranges(position.held),
        held_bytes: position.held_bytes,
        acked: ranges(position.acked),
        nacked: position.nacked.into_iter().map(nack).collect(),
        missed: ranges(position.missed),
        last_received: position.last_received,
        started: ranges(position.started),
    }
}

fn ranges(ranges: Vec<RangeInclusive<u64>>) -> Vec<pb::SequenceRange> {
    let range = |range: RangeInclusive<u64>| pb::SequenceRange {
        first: *range.start(),
        last: *range.end(),
    };
    ranges.into_iter().map(range).collect()
}

pub(super) fn ranges_from(ranges: Vec<pb::SequenceRange>) -> Vec<RangeInclusive<u64>> {
    ranges.into_iter().map(|range| range.first..=range.last).collect()
}

fn nack((sequence, nacked): (u64, Nacked)) -> pb::NackItem {
    pb::NackItem {
        sequence,
        attempt: nacked.attempt,
        delay: nacked.delay.and_then(|delay| wire_duration(delay.min(limits::NACK_DELAY))),
        reason: nacked.reason,
        for_good: nacked.for_good,
    }
}

/// A batch of acks and nacks.
pub(super) fn acks(number: u64, topics: Vec<TopicBatch>, awaited: bool) -> pb::SubscribeRequest {
    let topic = |topic: TopicBatch| pb::TopicAcks {
        topic: topic.number,
        cursor_generation: topic.cursor_generation,
        acked: ranges(topic.unsent.acks),
        nacked: topic.unsent.nacks.into_iter().map(nack).collect(),
        missed: ranges(topic.unsent.missed),
        started: ranges(topic.unsent.started),
    };
    let topics = topics.into_iter().map(topic).collect();
    request(Frame::Acks(pb::AckBatch { number, topics, awaited }))
}

pub(super) fn joined(topic: pb::SessionTopic) -> Joined {
    Joined {
        number: topic.number,
        name: topic.topic.into(),
        epoch: topic.epoch,
        cursor_generation: topic.cursor_generation,
        floor: sequence(topic.floor),
        head: sequence(topic.head),
        dropped: ranges_from(topic.dropped),
    }
}

/// A position that there can be a message after.
pub(super) fn sequence(sequence: u64) -> u64 {
    sequence.min(u64::MAX - 1)
}

/// A delivered message, and its sequence.
pub(super) fn item(
    order: Order,
    received: pb::ReceivedMessage,
) -> Result<(u64, Item<Received>), prost::DecodeError> {
    let pb::ReceivedMessage { sequence, message, publish_time, attempt } = received;
    let message = message.unwrap_or_default();
    let bytes = message.len() as u64;
    let content = Content::decode(message)?;
    let lane = order.lane(content.ordering_key());
    let message = Received { content, publish_time, attempt };
    Ok((sequence, Item { attempt, bytes, lane, message }))
}

pub(super) fn gap(topic: Arc<str>, epoch: u64, missing: Missing) -> Gap {
    Gap { topic, epoch, range: missing.range, reason: gap_reason(missing.reason) }
}

pub(crate) fn gap_reason(reason: i32) -> GapReason {
    match pb::GapReason::try_from(reason).unwrap_or_default() {
        pb::GapReason::Unspecified => GapReason::Other,
        pb::GapReason::Retention => GapReason::Retention,
        pb::GapReason::TopicDeleted => GapReason::TopicDeleted,
        pb::GapReason::DataLoss => GapReason::DataLoss,
        pb::GapReason::Purged => GapReason::Purged,
    }
}

/// What is asked for, for people.
pub(super) fn describe(settings: &Settings) -> String {
    if settings.is_reader() {
        format!("reader of {}", settings.topics.join(", "))
    } else {
        format!("subscription {}", settings.subscription)
    }
}
