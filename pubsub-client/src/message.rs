//! What is published and what is received.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::{Buf as _, Bytes};
use pubsub_proto::v1 as pb;

/// A message to publish.
///
/// A payload is all it needs; everything else is optional.
///
/// ```
/// use pubsub_client::Message;
///
/// let message = Message::new("{\"total\": 12}")
///     .with_content_type("application/json")
///     .with_attribute("region", "eu")
///     .with_idempotency_key("order-4711");
/// assert_eq!(message.attributes["region"], "eu");
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Message {
    /// The application's data, opaque to the server. May be empty.
    pub payload: Bytes,
    /// Free key-value pairs: at most 64, and 8 KiB in all.
    pub attributes: BTreeMap<String, String>,
    /// Messages of one key keep their order in subscriptions that order by key. At most 128
    /// bytes.
    pub ordering_key: Option<String>,
    /// The media type of the payload. Without one a message gets that of its topic, if that has
    /// one; another one is refused then.
    pub content_type: Option<String>,
    /// The application's own identity of this publish, at most 128 bytes.
    ///
    /// A second publish with the same key within the topic's window (7 days by default) is
    /// answered with the id of the first one; with other content it is refused. It is what makes
    /// a retry by a *restarted* process safe. Retries by the SDK itself need no key.
    pub idempotency_key: Option<String>,
    /// The subscriptions that this message is for. Empty: all of them. An unknown one is
    /// refused.
    pub recipients: Vec<String>,
    /// Before which subscriptions are not to be shown the message, by the server's clock, up to
    /// 366 days ahead. What comes after it goes on meanwhile; when it is due it comes next, also in
    /// kinds that keep an order. It waits on the server's disk. A reader sees it where it is stored.
    pub not_before: Option<SystemTime>,
    /// How long to wait for the message's fate, counted from the call that enqueues it: also for
    /// room in the window. Without limit by default. When it has passed, the ticket resolves to an
    /// error whose [`outcome`](crate::PublishError::outcome) says whether the message was ever
    /// sent.
    pub deadline: Option<Duration>,
}

impl Message {
    /// A message with this payload and nothing else.
    pub fn new(payload: impl Into<Bytes>) -> Self {
        Self { payload: payload.into(), ..Self::default() }
    }

    /// Adds an attribute.
    #[must_use]
    pub fn with_attribute(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.attributes.insert(name.into(), value.into());
        self
    }

    /// Sets the [ordering key](Self::ordering_key).
    #[must_use]
    pub fn with_ordering_key(mut self, key: impl Into<String>) -> Self {
        self.ordering_key = Some(key.into());
        self
    }

    /// Sets the [media type](Self::content_type) of the payload.
    #[must_use]
    pub fn with_content_type(mut self, content_type: impl Into<String>) -> Self {
        self.content_type = Some(content_type.into());
        self
    }

    /// Sets the [idempotency key](Self::idempotency_key).
    #[must_use]
    pub fn with_idempotency_key(mut self, key: impl Into<String>) -> Self {
        self.idempotency_key = Some(key.into());
        self
    }

    /// Adds a [recipient](Self::recipients).
    #[must_use]
    pub fn with_recipient(mut self, subscription: impl Into<String>) -> Self {
        self.recipients.push(subscription.into());
        self
    }

    /// Sets the [time before which](Self::not_before) it is not to be shown.
    #[must_use]
    pub fn with_not_before(mut self, time: SystemTime) -> Self {
        self.not_before = Some(time);
        self
    }

    /// Sets the [deadline](Self::deadline).
    #[must_use]
    pub fn with_deadline(mut self, deadline: Duration) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// Whether it is a payload and nothing else, on the wire.
    pub(crate) fn is_plain(&self) -> bool {
        let is_empty = |text: &Option<String>| text.as_ref().is_none_or(String::is_empty);
        self.attributes.is_empty()
            && is_empty(&self.ordering_key)
            && is_empty(&self.content_type)
            && is_empty(&self.idempotency_key)
            && self.recipients.is_empty()
            && self.not_before.is_none()
    }

    pub(crate) fn into_wire(self) -> pb::Message {
        pb::Message {
            payload: self.payload,
            attributes: self.attributes,
            ordering_key: self.ordering_key.unwrap_or_default(),
            content_type: self.content_type.unwrap_or_default(),
            idempotency_key: self.idempotency_key.unwrap_or_default(),
            recipients: self.recipients,
            schema_revision: 0,
            not_before: self.not_before.map(Into::into),
        }
    }

    pub(crate) fn from_wire(message: pb::Message, deadline: Option<Duration>) -> Self {
        Self {
            payload: message.payload,
            attributes: message.attributes,
            ordering_key: non_empty(message.ordering_key),
            content_type: non_empty(message.content_type),
            idempotency_key: non_empty(message.idempotency_key),
            recipients: message.recipients,
            not_before: message.not_before.and_then(|time| time.try_into().ok()),
            deadline,
        }
    }
}

impl From<Bytes> for Message {
    fn from(payload: Bytes) -> Self {
        Self::new(payload)
    }
}

impl From<Vec<u8>> for Message {
    fn from(payload: Vec<u8>) -> Self {
        Self::new(payload)
    }
}

impl From<String> for Message {
    fn from(payload: String) -> Self {
        Self::new(payload)
    }
}

impl From<&'static str> for Message {
    fn from(payload: &'static str) -> Self {
        Self::new(payload)
    }
}

/// The identity of a stored message: it never repeats and never changes.
///
/// Written as `topic/epoch/sequence`, with the epoch in hexadecimal: unique, and short enough to
/// be kept beside an effect in the application's own transaction, which is how an application
/// processes a message effectively once across its own crashes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MessageId {
    /// The name of the topic.
    pub topic: Arc<str>,
    /// The incarnation of the topic: deleting and creating a name gives a new one.
    pub epoch: u64,
    /// The position in the topic, from 1, without gaps.
    pub sequence: u64,
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{:x}/{}", self.topic, self.epoch, self.sequence)
    }
}

/// A text is not a message id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a message id: expected topic/epoch/sequence, with the epoch in hexadecimal")]
pub struct InvalidMessageId(String);

impl FromStr for MessageId {
    type Err = InvalidMessageId;

    fn from_str(text: &str) -> Result<Self, InvalidMessageId> {
        let parse = || {
            let (rest, sequence) = text.rsplit_once('/')?;
            let (topic, epoch) = rest.rsplit_once('/')?;
            let epoch = u64::from_str_radix(epoch, 16).ok()?;
            let sequence = sequence.parse().ok().filter(|sequence| *sequence > 0)?;
            (!topic.is_empty()).then(|| Self { topic: topic.into(), epoch, sequence })
        };
        parse().ok_or_else(|| InvalidMessageId(text.to_owned()))
    }
}

/// A message as a subscriber receives it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReceivedMessage {
    /// Its identity.
    pub id: MessageId,
    /// The application's data.
    pub payload: Bytes,
    /// Free key-value pairs.
    pub attributes: BTreeMap<String, String>,
    /// The ordering key.
    pub ordering_key: Option<String>,
    /// The media type of the payload.
    pub content_type: Option<String>,
    /// The revision of the topic's schema that the payload was checked with, if it had one.
    pub schema_revision: Option<u32>,
    /// The idempotency key that it was published with.
    pub idempotency_key: Option<String>,
    /// The subscriptions that it is for; empty: all of them.
    pub recipients: Vec<String>,
    /// Before which it was not to be shown.
    pub not_before: Option<SystemTime>,
    /// When the server stored it.
    pub publish_time: SystemTime,
    /// Which showing of the message this is, from 1: one more than the failures counted so far.
    pub attempt: u32,
}

/// A message as it came, decoded.
#[derive(Clone, Debug, Default)]
pub(crate) struct Received {
    pub(crate) content: Content,
    pub(crate) publish_time: Option<prost_types::Timestamp>,
    pub(crate) attempt: u32,
}

/// What was published. It is small, since it waits in a queue.
#[derive(Clone, Debug)]
pub(crate) enum Content {
    /// A payload, and nothing else.
    Plain(Bytes),
    Full(Box<pb::Message>),
}

impl Default for Content {
    fn default() -> Self {
        Self::Plain(Bytes::new())
    }
}

impl Content {
    pub(crate) fn decode(mut bytes: Bytes) -> Result<Self, prost::DecodeError> {
        match plain_payload(&bytes) {
            Some(from) => {
                bytes.advance(from);
                Ok(Self::Plain(bytes))
            }
            None => prost::Message::decode(bytes).map(|message| Self::Full(Box::new(message))),
        }
    }

    pub(crate) fn ordering_key(&self) -> &str {
        match self {
            Self::Plain(_) => "",
            Self::Full(message) => &message.ordering_key,
        }
    }
}

/// Where the payload begins of a message that has one, and nothing behind it or before it.
fn plain_payload(message: &[u8]) -> Option<usize> {
    /// The tag of the field.
    const PAYLOAD: u8 = 1 << 3 | 2;
    let Some((PAYLOAD, mut rest)) = message.split_first().map(|(tag, rest)| (*tag, rest)) else {
        return message.is_empty().then_some(0);
    };
    let length = prost::encoding::decode_varint(&mut rest).ok()?;
    (length == rest.len() as u64).then_some(message.len() - rest.len())
}

impl ReceivedMessage {
    pub(crate) fn from_wire(id: MessageId, received: Received) -> Self {
        let message = match received.content {
            Content::Full(message) => *message,
            Content::Plain(payload) => {
                return Self::plain(id, payload, received.publish_time, received.attempt);
            }
        };
        Self {
            id,
            payload: message.payload,
            attributes: message.attributes,
            ordering_key: non_empty(message.ordering_key),
            content_type: non_empty(message.content_type),
            schema_revision: (message.schema_revision > 0).then_some(message.schema_revision),
            idempotency_key: non_empty(message.idempotency_key),
            recipients: message.recipients,
            not_before: message.not_before.and_then(|time| time.try_into().ok()),
            publish_time: time(received.publish_time),
            attempt: received.attempt.max(1),
        }
    }
}

impl ReceivedMessage {
    fn plain(
        id: MessageId,
        payload: Bytes,
        publish_time: Option<prost_types::Timestamp>,
        attempt: u32,
    ) -> Self {
        Self {
            id,
            payload,
            attributes: BTreeMap::new(),
            ordering_key: None,
            content_type: None,
            schema_revision: None,
            idempotency_key: None,
            recipients: Vec::new(),
            not_before: None,
            publish_time: time(publish_time),
            attempt: attempt.max(1),
        }
    }
}

pub(crate) fn non_empty(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

/// The wire's time as the standard library's; the epoch if it is absent or out of range.
pub(crate) fn time(timestamp: Option<prost_types::Timestamp>) -> SystemTime {
    timestamp.and_then(|time| time.try_into().ok()).unwrap_or(SystemTime::UNIX_EPOCH)
}

/// The wire's duration, if it is there and not negative.
pub(crate) fn duration(duration: Option<prost_types::Duration>) -> Option<Duration> {
    duration.and_then(|duration| duration.try_into().ok())
}

/// Shortens a text to at most so many bytes, at the boundary of a character.
pub(crate) fn shorten(text: &mut String, max_bytes: usize) {
    let mut end = text.len().min(max_bytes);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
}

/// A duration for the wire; absent if it is out of the wire's range.
pub(crate) fn wire_duration(duration: Duration) -> Option<prost_types::Duration> {
    duration.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_ids_survive_being_written() {
        let id = MessageId { topic: "orders".into(), epoch: 0xdead_beef, sequence: 42 };
        assert_eq!(id.to_string(), "orders/deadbeef/42");
        assert_eq!(id.to_string().parse(), Ok(id));
        for bad in ["", "orders", "orders/1", "/1/1", "orders/x/1", "orders/1/0", "orders/1/-1"] {
            assert!(bad.parse::<MessageId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_payload_alone_is_decoded_as_any_message() {
        use prost::Message as _;
        let id = || MessageId { topic: "t".into(), epoch: 1, sequence: 1 };
        let received =
            |content| ReceivedMessage::from_wire(id(), Received { content, ..Received::default() });
        let full = Message::new("p").with_attribute("a", "1").with_ordering_key("k");
        let messages = [0, 1, 127, 128, 20_000].map(|length| Message::new(vec![7; length]));
        for message in messages.into_iter().chain([full]) {
            let encoded = message.into_wire().encode_to_vec();
            for end in 0..encoded.len().min(300) {
                // Cut short, with a field behind it, and as it is.
                for bytes in [&encoded[..end], &[&*encoded, &[0x3a, 0]].concat(), &*encoded] {
                    let bytes = Bytes::copy_from_slice(bytes);
                    let any = pb::Message::decode(bytes.clone());
                    let any = any.map(|message| received(Content::Full(Box::new(message))));
                    assert_eq!(Content::decode(bytes).map(received), any);
                }
            }
        }
    }

    #[test]
    fn messages_survive_the_wire() {
        let message = Message::new("payload")
            .with_attribute("a", "1")
            .with_ordering_key("k")
            .with_content_type("text/plain")
            .with_idempotency_key("i")
            .with_recipient("s");
        assert_eq!(Message::from_wire(message.clone().into_wire(), None), message);
        let plain = Message::new("");
        assert_eq!(Message::from_wire(plain.clone().into_wire(), None), plain);
    }
}
