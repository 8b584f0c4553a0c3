//! How the things of the server look: numbers, times, and everything as JSON.

use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use pubsub_client::{
    ActiveConsumer, DataLoss, DeadLetter, FailurePolicy, Gap, GapReason, HeadOfLine, Message,
    OutboxTopic, Parked, PublishReceipt, Receipt, ReceiptState, ReceivedMessage, ServerInfo,
    SnapshotInfo, SubscriptionInfo, SubscriptionKind, SubscriptionPosition, TopicInfo, WhenFull,
};
use serde_json::{Value, json};

pub(crate) fn time(time: SystemTime) -> String {
    humantime::format_rfc3339_millis(time).to_string()
}

/// In whole seconds: nobody wants the nanoseconds of an age.
pub(crate) fn duration(duration: Duration) -> String {
    humantime::format_duration(Duration::from_secs(duration.as_secs())).to_string()
}

pub(crate) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    let mut unit = 1;
    let mut name = "B";
    for larger in UNITS {
        if bytes / unit < 1024 {
            break;
        }
        unit *= 1024;
        name = larger;
    }
    match (bytes / unit, bytes % unit * 10 / unit) {
        (whole, 0) => format!("{whole} {name}"),
        (whole, tenths) => format!("{whole}.{tenths} {name}"),
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn base64(bytes: &[u8]) -> String {
    BASE64.encode(bytes)
}

/// The epoch as it stands in ids; as a number it would not survive most JSON readers.
pub(crate) fn epoch(epoch: u64) -> String {
    format!("{epoch:x}")
}

pub(crate) fn kind(kind: SubscriptionKind) -> &'static str {
    match kind {
        SubscriptionKind::Exclusive => "exclusive",
        SubscriptionKind::Shared => "shared",
        SubscriptionKind::KeyOrdered => "key-ordered",
        _ => "unknown",
    }
}

pub(crate) fn policy(policy: &FailurePolicy) -> String {
    match policy {
        FailurePolicy::Block => "show it again until it is acked".to_owned(),
        FailurePolicy::DeadLetter { topic, max_attempts } => {
            format!("dead letter to {topic} after {max_attempts} attempts")
        }
        FailurePolicy::Skip { max_attempts } => format!("skip after {max_attempts} attempts"),
        _ => "unknown".to_owned(),
    }
}

fn policy_value(policy: &FailurePolicy) -> Value {
    match policy {
        FailurePolicy::Block => json!({ "policy": "block" }),
        FailurePolicy::DeadLetter { topic, max_attempts } => {
            json!({ "policy": "dead_letter", "topic": topic, "max_attempts": max_attempts })
        }
        FailurePolicy::Skip { max_attempts } => {
            json!({ "policy": "skip", "max_attempts": max_attempts })
        }
        _ => json!({ "policy": "unknown" }),
    }
}

pub(crate) fn snapshot(snapshot: &SnapshotInfo) -> Value {
    json!({
        "name": snapshot.name,
        "subscription": snapshot.subscription,
        "create_time": time(snapshot.create_time),
        "backlog": snapshot.backlog,
    })
}

pub(crate) fn dead_letter(letter: &DeadLetter) -> Value {
    json!({
        "type": "dead_letter",
        "number": letter.id.sequence,
        "id": letter.id.to_string(),
        "origin": letter.origin.to_string(),
        "attempts": letter.attempts,
        "reason": letter.reason,
        "first_failure_time": time(letter.first_failure_time),
        "last_failure_time": time(letter.last_failure_time),
        "message": message(&letter.message),
    })
}

pub(crate) fn when_full(when_full: Option<WhenFull>) -> &'static str {
    match when_full {
        Some(WhenFull::Reject) => "reject",
        Some(WhenFull::DropOldest) => "drop oldest",
        _ => "-",
    }
}

pub(crate) fn gap_reason(reason: GapReason) -> &'static str {
    match reason {
        GapReason::Retention => "retention removed them",
        GapReason::TopicDeleted => "their topic was deleted",
        GapReason::DataLoss => "they were damaged on disk",
        GapReason::Purged => "an operator purged them",
        GapReason::Other | _ => "for a reason this version does not know",
    }
}

pub(crate) fn topic(topic: &TopicInfo) -> Value {
    json!({
        "name": topic.name,
        "epoch": epoch(topic.epoch),
        "create_time": time(topic.create_time),
        "first": topic.first,
        "head": topic.head,
        "stored_bytes": topic.stored_bytes,
        "subscriptions": topic.subscriptions,
        "retention_seconds": topic.config.retention.map(|time| time.as_secs_f64()),
        "max_age_unacked_seconds": topic.config.max_age_unacked.map(|time| time.as_secs_f64()),
        "max_bytes": topic.config.max_bytes,
        "when_full": when_full(topic.config.when_full),
        "max_message_bytes": topic.config.max_message_bytes,
        "idempotency_window_seconds":
            topic.config.idempotency_window.map(|time| time.as_secs_f64()),
    })
}

pub(crate) fn subscription(subscription: &SubscriptionInfo) -> Value {
    let positions: Vec<_> = subscription.positions.iter().map(position).collect();
    let consumers: Vec<_> = subscription.active_consumers.iter().map(consumer).collect();
    json!({
        "name": subscription.name,
        "epoch": epoch(subscription.epoch),
        "kind": kind(subscription.kind),
        "topics": subscription.topics,
        "create_time": time(subscription.create_time),
        "active_consumers": consumers,
        "standby_consumers": subscription.standby_consumers,
        "positions": positions,
        "on_failure": policy_value(&subscription.on_failure),
        "ack_timeout_seconds": subscription.ack_timeout.map(|time| time.as_secs_f64()),
        "dead_letters": subscription.dead_letters,
        "expires_after_seconds": subscription.expires_after.map(|time| time.as_secs_f64()),
        "filter": subscription.filter,
    })
}

fn consumer(consumer: &ActiveConsumer) -> Value {
    json!({
        "id": consumer.id,
        "connected": consumer.connected,
        "outstanding": consumer.outstanding,
    })
}

fn position(position: &SubscriptionPosition) -> Value {
    json!({
        "topic": position.topic,
        "epoch": epoch(position.epoch),
        "floor": position.floor,
        "head": position.head,
        "backlog": position.backlog,
        "outstanding": position.outstanding,
        "oldest_unacked": position.oldest_unacked,
        "waits_for": position.waits_for,
        "oldest_unacked_age_seconds": position.oldest_unacked_age.map(|age| age.as_secs_f64()),
        "redelivered": position.redelivered,
        "head_of_line": position.head_of_line.as_ref().map(head_of_line),
    })
}

pub(crate) fn head_of_line(head: &HeadOfLine) -> Value {
    json!({ "sequence": head.sequence, "cause": head.cause.as_str(), "text": head.text })
}

pub(crate) fn published(receipt: &PublishReceipt) -> Value {
    json!({
        "type": "published",
        "id": receipt.id.to_string(),
        "topic": &*receipt.id.topic,
        "epoch": epoch(receipt.id.epoch),
        "sequence": receipt.id.sequence,
        "duplicate": receipt.duplicate,
        "publish_time": time(receipt.publish_time),
    })
}

pub(crate) fn message(message: &ReceivedMessage) -> Value {
    let mut value = json!({
        "type": "message",
        "id": message.id.to_string(),
        "topic": &*message.id.topic,
        "epoch": epoch(message.id.epoch),
        "sequence": message.id.sequence,
        "publish_time": time(message.publish_time),
        "attempt": message.attempt,
        "attributes": message.attributes,
        "ordering_key": message.ordering_key,
        "content_type": message.content_type,
        "not_before": message.not_before.map(time),
        "schema_revision": message.schema_revision,
        "idempotency_key": message.idempotency_key,
        "recipients": message.recipients,
    });
    payload(&mut value, &message.payload);
    value
}

/// One of the two, so that no program takes one for the other.
fn payload(value: &mut Value, payload: &[u8]) {
    match std::str::from_utf8(payload) {
        Ok(text) => value["payload"] = text.into(),
        Err(_) => value["payload_base64"] = BASE64.encode(payload).into(),
    }
}

pub(crate) fn gap(gap: &Gap) -> Value {
    json!({
        "type": "gap",
        "topic": &*gap.topic,
        "epoch": epoch(gap.epoch),
        "first": gap.range.start(),
        "last": gap.range.end(),
        "reason": gap_reason(gap.reason),
    })
}

pub(crate) fn data_loss(loss: &DataLoss) -> Value {
    json!({
        "type": "data_loss",
        "topic": &*loss.id.topic,
        "epoch": epoch(loss.id.epoch),
        "sequence": loss.id.sequence,
    })
}

/// The state of a receipt, and what else there is to say about it.
pub(crate) fn receipt_state(state: &ReceiptState) -> (&'static str, String) {
    match state {
        ReceiptState::Received => ("received", String::new()),
        ReceiptState::Pending => ("pending", String::new()),
        ReceiptState::NotAddressed => {
            ("not_addressed", "for other recipients, or before the start".to_owned())
        }
        ReceiptState::Released { by } => ("released", format!("by {by}")),
        ReceiptState::Trimmed { oldest_answerable } => {
            ("trimmed", format!("known from message {oldest_answerable} on"))
        }
        _ => ("unknown", String::new()),
    }
}

pub(crate) fn receipt(receipt: &Receipt) -> Value {
    let (state, _) = receipt_state(&receipt.state);
    let mut value = json!({ "subscription": receipt.subscription, "state": state });
    match &receipt.state {
        ReceiptState::Released { by } => value["released_by"] = by.as_str().into(),
        ReceiptState::Trimmed { oldest_answerable } => {
            value["oldest_answerable"] = (*oldest_answerable).into();
        }
        ReceiptState::Received | ReceiptState::Pending | ReceiptState::NotAddressed | _ => {}
    }
    value
}

pub(crate) fn outbox_topic(topic: &OutboxTopic) -> Value {
    json!({
        "type": "topic",
        "topic": &*topic.topic,
        "messages": topic.pending.messages,
        "bytes": topic.pending.bytes,
    })
}

pub(crate) fn parked(parked: &Parked) -> Value {
    let Message { attributes, ordering_key, content_type, recipients, .. } = &parked.message;
    let mut value = json!({
        "type": "parked",
        "item": parked.item,
        "topic": parked.topic,
        "fate": if parked.refused.is_some() { "refused" } else { "unknown" },
        "reason": parked.refused.map(|reason| reason.as_str()),
        "detail": parked.detail,
        "enqueue_time": time(parked.enqueue_time),
        "park_time": time(parked.park_time),
        "first_sent": parked.first_sent.map(time),
        "idempotency_key": parked.message.idempotency_key,
        "attributes": attributes,
        "ordering_key": ordering_key,
        "content_type": content_type,
        "recipients": recipients,
    });
    payload(&mut value, &parked.message.payload);
    value
}

pub(crate) fn server(url: &str, server: &ServerInfo) -> Value {
    json!({
        "url": url,
        "state": server.state,
        "version": server.version,
        "boot_id": hex(&server.boot_id),
        "start_time": time(server.start_time),
        "storage": server.storage,
        "topics": server.topics,
        "subscriptions": server.subscriptions,
        "connections": server.connections,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_readable() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1024), "1 KiB");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(10 << 30), "10 GiB");
        assert_eq!(bytes((1 << 20) - 1), "1023.9 KiB");
        assert_eq!(bytes(5 << 50), "5120 TiB");
    }
}
