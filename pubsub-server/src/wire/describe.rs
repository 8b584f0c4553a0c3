//! Administration: from the wire's types to the domain's, and back.

use prost::Message as _;
use pubsub_proto::v1;
use tonic::Status;

use super::convert::{duration, kind, parse_duration, parse_ranges, policy, timestamp};
use super::events::head_of_line;
use super::status::invalid;
use crate::broker::delivery::Receipt;
use crate::broker::describing::{ActiveConsumer, Description, Position};
use crate::broker::{LetterPage, Letters, ReceiptAnswer, Snapshot, TopicInfo};
use crate::envelope::Origin;
use crate::limits;
use crate::record::{Release, StoredMessage, TopicConfig, WhenFull};

/// What settings make of those before: what is not said stays.
pub(super) fn parse_config(
    config: Option<v1::TopicConfig>,
) -> Result<impl FnOnce(TopicConfig) -> TopicConfig + Send + 'static, Status> {
    let config = config.unwrap_or_default();
    let retention = parse_duration("retention", config.retention)?;
    let max_age_unacked = parse_duration("max_age_unacked", config.max_age_unacked)?;
    let window = parse_duration("idempotency_window", config.idempotency_window)?;
    let when_full = match v1::WhenFull::try_from(config.when_full) {
        Ok(v1::WhenFull::Unspecified) => None,
        Ok(v1::WhenFull::Reject) => Some(WhenFull::Reject),
        Ok(v1::WhenFull::DropOldest) => Some(WhenFull::DropOldest),
        Err(_) => return Err(invalid("when_full is not known to this server")),
    };
    let or = |value, before| if value == 0 { before } else { value };
    Ok(move |before: TopicConfig| TopicConfig {
        retention: retention.unwrap_or(before.retention),
        max_age_unacked: match max_age_unacked {
            Some(age) => Some(age).filter(|age| !age.is_zero()),
            None => before.max_age_unacked,
        },
        max_bytes: or(config.max_bytes, before.max_bytes),
        when_full: when_full.unwrap_or(before.when_full),
        max_message_bytes: or(config.max_message_bytes, before.max_message_bytes),
        idempotency_window: window.unwrap_or(before.idempotency_window),
    })
}

pub(super) fn topic(info: TopicInfo) -> v1::Topic {
    let TopicConfig { retention, max_bytes, max_message_bytes, idempotency_window, .. } =
        info.record.config;
    let when_full = match info.record.config.when_full {
        WhenFull::Reject => v1::WhenFull::Reject,
        WhenFull::DropOldest => v1::WhenFull::DropOldest,
    };
    v1::Topic {
        name: info.record.name.to_string(),
        epoch: info.record.epoch.0,
        config: Some(v1::TopicConfig {
            retention: duration(retention),
            max_bytes,
            max_message_bytes,
            idempotency_window: duration(idempotency_window),
            max_age_unacked: info.record.config.max_age_unacked.and_then(duration),
            when_full: when_full.into(),
        }),
        create_time: timestamp(info.record.created_at),
        first: info.stats.first,
        head: info.stats.head,
        stored_bytes: info.stats.bytes,
        subscriptions: info.subscriptions.iter().map(ToString::to_string).collect(),
    }
}

pub(super) fn subscription(description: Description) -> v1::Subscription {
    let Description { record, consumers, standby, positions, dead_letters } = description;
    v1::Subscription {
        name: record.name.to_string(),
        epoch: record.epoch.0,
        kind: kind(record.kind).into(),
        topics: record.topics.iter().map(|pattern| pattern.as_str().to_owned()).collect(),
        create_time: timestamp(record.created_at),
        active_consumers: consumers.into_iter().map(active_consumer).collect(),
        standby_consumers: standby.iter().map(ToString::to_string).collect(),
        positions: positions.into_iter().map(position).collect(),
        on_failure: Some(policy(&record.on_failure)),
        ack_timeout: record.ack_timeout.and_then(duration),
        expires_after: record.expires_after.and_then(duration),
        dead_letters,
        filter: record.filter.map(String::from).unwrap_or_default(),
    }
}

fn active_consumer(consumer: ActiveConsumer) -> v1::ActiveConsumer {
    let ActiveConsumer { id, connected, outstanding } = consumer;
    v1::ActiveConsumer { id: id.to_string(), connected, outstanding }
}

fn position(position: Position) -> v1::SubscriptionPosition {
    v1::SubscriptionPosition {
        topic: position.topic.to_string(),
        epoch: position.epoch.0,
        floor: position.floor,
        head: position.head,
        backlog: position.backlog,
        outstanding: position.outstanding,
        oldest_unacked: position.oldest_unacked.unwrap_or(0),
        waits_for: position.waits_for.unwrap_or_default(),
        oldest_unacked_age: position.oldest_age.and_then(duration),
        redelivered: position.redelivered,
        head_of_line: position.head_of_line.map(head_of_line),
    }
}

pub(super) fn receipt(answer: ReceiptAnswer) -> v1::Receipt {
    let (state, released_by, oldest_answerable) = match answer.receipt {
        Receipt::Received => (v1::ReceiptState::Received, "", 0),
        Receipt::Pending => (v1::ReceiptState::Pending, "", 0),
        Receipt::NotAddressed => (v1::ReceiptState::NotAddressed, "", 0),
        Receipt::Released(Release::Seek) => (v1::ReceiptState::Released, "seek", 0),
        Receipt::Released(Release::Gap) => (v1::ReceiptState::Released, "gap", 0),
        Receipt::Released(Release::DeadLetter) => (v1::ReceiptState::Released, "dead letter", 0),
        Receipt::Released(Release::Skip) => (v1::ReceiptState::Released, "skip", 0),
        Receipt::Trimmed { oldest } => (v1::ReceiptState::Trimmed, "", oldest),
    };
    v1::Receipt {
        subscription: answer.subscription.to_string(),
        state: state.into(),
        released_by: released_by.to_owned(),
        oldest_answerable,
    }
}

pub(super) fn snapshot(snapshot: &Snapshot) -> v1::Snapshot {
    v1::Snapshot {
        name: snapshot.name.to_string(),
        subscription: snapshot.subscription.to_string(),
        create_time: timestamp(snapshot.created_at),
        backlog: snapshot.backlog(),
    }
}

pub(super) fn dead_letters(page: &LetterPage) -> Result<Vec<v1::DeadLetter>, Status> {
    let letter = |copy: &StoredMessage| {
        let message = v1::Message::decode(copy.body.bytes());
        let message = message.map_err(|_| Status::internal("a dead letter is no message"))?;
        let origin = Origin::of_message(&message);
        let origin = origin.ok_or_else(|| Status::internal("a dead letter has no origin"))?;
        let (topic, epoch) = (page.topic.to_string(), page.epoch.0);
        Ok(v1::DeadLetter {
            id: Some(v1::MessageId { topic, epoch, sequence: copy.sequence }),
            origin: Some(v1::MessageId {
                topic: origin.topic,
                epoch: origin.epoch.0,
                sequence: origin.sequence,
            }),
            attempts: origin.attempts,
            reason: origin.reason,
            first_failure_time: timestamp(origin.first_failure),
            last_failure_time: timestamp(origin.last_failure),
            message: Some(message),
            publish_time: timestamp(copy.published_at),
        })
    };
    page.letters.iter().map(letter).collect()
}

/// Which dead letters are meant; the oldest if none are named.
pub(super) fn parse_letters(ranges: &[v1::SequenceRange], most: u32) -> Result<Letters, Status> {
    let named = parse_ranges(ranges)?;
    let most = match usize::try_from(most).unwrap_or(usize::MAX) {
        0 => limits::MAX_DEAD_LETTERS,
        most => most.min(limits::MAX_DEAD_LETTERS),
    };
    Ok(if named.is_empty() { Letters::Oldest(most) } else { Letters::These(named) })
}
