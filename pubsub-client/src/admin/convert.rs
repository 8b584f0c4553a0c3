//! Between the wire and the types of administration.

use pubsub_proto::v1 as pb;

use super::lag::head_of_line;
use super::optional;
use super::types::{
    ActiveConsumer, CreateSubscription, DeadLetter, DeadLetters, Receipt, ReceiptState, ServerInfo,
    SnapshotInfo, SubscriptionInfo, SubscriptionPosition, TopicConfig, TopicInfo, WhenFull,
};
use crate::error::AdminError;
use crate::message::{
    Content, MessageId, Received, ReceivedMessage, duration, non_empty, time, wire_duration,
};
use crate::subscriber::{
    kind_from_wire, kind_to_wire, policy_from_wire, policy_to_wire, start_to_wire,
};

pub(super) fn topic_config(config: &TopicConfig) -> pb::TopicConfig {
    pb::TopicConfig {
        retention: optional(config.retention),
        max_bytes: config.max_bytes.unwrap_or(0),
        max_message_bytes: config.max_message_bytes.unwrap_or(0),
        idempotency_window: optional(config.idempotency_window),
        max_age_unacked: optional(config.max_age_unacked),
        when_full: match config.when_full {
            None => pb::WhenFull::Unspecified,
            Some(WhenFull::Reject) => pb::WhenFull::Reject,
            Some(WhenFull::DropOldest) => pb::WhenFull::DropOldest,
        }
        .into(),
    }
}

pub(super) fn topic(topic: Option<pb::Topic>) -> Result<TopicInfo, AdminError> {
    let topic = topic.ok_or_else(|| missing("topic"))?;
    let config = topic.config.unwrap_or_default();
    let positive = |number: u64| (number > 0).then_some(number);
    Ok(TopicInfo {
        name: topic.name,
        epoch: topic.epoch,
        config: TopicConfig {
            when_full: match config.when_full() {
                pb::WhenFull::Unspecified => None,
                pb::WhenFull::Reject => Some(WhenFull::Reject),
                pb::WhenFull::DropOldest => Some(WhenFull::DropOldest),
            },
            retention: duration(config.retention),
            max_bytes: positive(config.max_bytes),
            max_message_bytes: positive(config.max_message_bytes),
            idempotency_window: duration(config.idempotency_window),
            max_age_unacked: duration(config.max_age_unacked),
        },
        create_time: time(topic.create_time),
        first: topic.first,
        head: topic.head,
        stored_bytes: topic.stored_bytes,
        subscriptions: topic.subscriptions,
    })
}

pub(super) fn create_subscription(
    name: String,
    settings: CreateSubscription,
) -> pb::CreateSubscriptionRequest {
    pb::CreateSubscriptionRequest {
        name,
        topics: settings.topics,
        kind: kind_to_wire(settings.kind).into(),
        start: Some(start_to_wire(settings.start)),
        if_not_exists: settings.if_not_exists,
        on_failure: settings.on_failure.as_ref().map(policy_to_wire),
        ack_timeout: settings.ack_timeout.and_then(wire_duration),
        expires_after: settings.expires_after.and_then(wire_duration),
        filter: settings.filter.unwrap_or_default(),
    }
}

pub(super) fn snapshot(snapshot: Option<pb::Snapshot>) -> Result<SnapshotInfo, AdminError> {
    let pb::Snapshot { name, subscription, create_time, backlog } =
        snapshot.ok_or_else(|| missing("snapshot"))?;
    Ok(SnapshotInfo { name, subscription, create_time: time(create_time), backlog })
}

pub(super) fn dead_letter(letter: pb::DeadLetter) -> Result<DeadLetter, AdminError> {
    let id = |id: Option<pb::MessageId>| {
        let pb::MessageId { topic, epoch, sequence } = id.ok_or_else(|| missing("id"))?;
        Ok::<_, AdminError>(MessageId { topic: topic.into(), epoch, sequence })
    };
    let (copy, origin) = (id(letter.id)?, id(letter.origin)?);
    let received = Received {
        content: Content::Full(Box::new(letter.message.unwrap_or_default())),
        publish_time: letter.publish_time,
        attempt: 0,
    };
    Ok(DeadLetter {
        message: ReceivedMessage::from_wire(copy.clone(), received),
        id: copy,
        origin,
        attempts: letter.attempts,
        reason: letter.reason,
        first_failure_time: time(letter.first_failure_time),
        last_failure_time: time(letter.last_failure_time),
    })
}

/// The named sequences, how many at most, and the filter.
pub(super) fn dead_letters(which: DeadLetters) -> (Vec<pb::SequenceRange>, u32, String) {
    match which {
        DeadLetters::Oldest(most) => (Vec::new(), most.max(1), String::new()),
        DeadLetters::Sequences(sequences) => {
            let each = |sequence| pb::SequenceRange { first: sequence, last: sequence };
            (sequences.into_iter().map(each).collect(), 0, String::new())
        }
        DeadLetters::Matching { filter, most } => (Vec::new(), most.max(1), filter),
    }
}

pub(super) fn subscription(
    subscription: Option<pb::Subscription>,
) -> Result<SubscriptionInfo, AdminError> {
    let subscription = subscription.ok_or_else(|| missing("subscription"))?;
    let kind = kind_from_wire(subscription.kind());
    Ok(SubscriptionInfo {
        name: subscription.name,
        epoch: subscription.epoch,
        kind,
        topics: subscription.topics,
        create_time: time(subscription.create_time),
        active_consumers: subscription.active_consumers.into_iter().map(consumer).collect(),
        standby_consumers: subscription.standby_consumers,
        positions: subscription.positions.into_iter().map(position).collect(),
        on_failure: policy_from_wire(subscription.on_failure),
        ack_timeout: duration(subscription.ack_timeout),
        dead_letters: subscription.dead_letters,
        expires_after: duration(subscription.expires_after),
        filter: non_empty(subscription.filter),
    })
}

fn consumer(consumer: pb::ActiveConsumer) -> ActiveConsumer {
    let pb::ActiveConsumer { id, connected, outstanding } = consumer;
    ActiveConsumer { id, connected, outstanding }
}

fn position(position: pb::SubscriptionPosition) -> SubscriptionPosition {
    let oldest = position.oldest_unacked;
    SubscriptionPosition {
        topic: position.topic,
        epoch: position.epoch,
        floor: position.floor,
        head: position.head,
        backlog: position.backlog,
        outstanding: position.outstanding,
        oldest_unacked: (oldest > 0).then_some(oldest),
        waits_for: non_empty(position.waits_for),
        oldest_unacked_age: duration(position.oldest_unacked_age),
        redelivered: position.redelivered,
        head_of_line: position.head_of_line.map(head_of_line),
    }
}

pub(super) fn receipt(receipt: pb::Receipt) -> Result<Receipt, AdminError> {
    let state = match receipt.state() {
        pb::ReceiptState::Received => ReceiptState::Received,
        pb::ReceiptState::Pending => ReceiptState::Pending,
        pb::ReceiptState::NotAddressed => ReceiptState::NotAddressed,
        pb::ReceiptState::Released => ReceiptState::Released { by: receipt.released_by },
        pb::ReceiptState::Trimmed => {
            ReceiptState::Trimmed { oldest_answerable: receipt.oldest_answerable }
        }
        pb::ReceiptState::Unspecified => return Err(missing("receipt state")),
    };
    Ok(Receipt { subscription: receipt.subscription, state })
}

pub(super) fn server(server: pb::GetServerResponse) -> ServerInfo {
    ServerInfo {
        version: server.version,
        boot_id: server.boot_id.to_vec(),
        start_time: time(server.start_time),
        storage: server.storage,
        topics: server.topics,
        subscriptions: server.subscriptions,
        connections: server.connections,
        state: server.state,
    }
}

fn missing(what: &str) -> AdminError {
    AdminError::Malformed(format!("the {what} is missing"))
}
