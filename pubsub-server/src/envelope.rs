//! What the server reads and writes of a message's body, which is an encoded `pubsub.v1.Message`,
//! and of that of a dead letter. The rest is the application's.

use std::collections::HashMap;

use bytes::{Bytes, BytesMut};
use prost::Message as _;
use prost::encoding::{decode_varint, encoded_len_varint};
use pubsub_proto::v1;

use crate::record::{Epoch, Timestamp};

/// What decides on the delivery of a message, and nothing else: what is not named here is skipped.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Label {
    #[prost(string, tag = "3")]
    ordering_key: String,
    #[prost(message, optional, tag = "8")]
    not_before: Option<prost_types::Timestamp>,
}

impl Label {
    /// That of a body; an empty one if it is no message.
    pub(crate) fn of(body: &[u8]) -> Self {
        // Most messages have none, and are asked again each time that they are delivered.
        if has_none(body) { Self::default() } else { Self::decode(body).unwrap_or_default() }
    }

    /// The ordering key; none if it is empty.
    pub(crate) fn ordering_key(&self) -> Option<&str> {
        (!self.ordering_key.is_empty()).then_some(&self.ordering_key)
    }

    /// Before which the message is not to be shown.
    pub(crate) fn not_before(&self) -> Option<Timestamp> {
        let prost_types::Timestamp { seconds, nanos } = self.not_before?;
        let (seconds, nanos) = (u64::try_from(seconds).ok()?, u64::try_from(nanos).ok()?);
        // Rounded up, so that it is never shown too early.
        Some(Timestamp(seconds.saturating_mul(1000).saturating_add(nanos.div_ceil(1_000_000))))
    }
}

/// Whether a body is a message with a payload and nothing else, encoded as this server would encode
/// it. Most are, and need no more than this look.
pub(crate) fn is_plain(body: &[u8]) -> bool {
    const PAYLOAD: u8 = 1 << 3 | 2;
    let Some((&tag, mut rest)) = body.split_first() else { return true };
    let Ok(length) = decode_varint(&mut rest) else { return false };
    // An empty payload is not written, and a length in as few bytes as it can be.
    let is_short = body.len() == 1 + encoded_len_varint(length) + rest.len();
    tag == PAYLOAD && length > 0 && length == rest.len() as u64 && is_short
}

/// Whether a body has none of the fields of a label, as far as that is seen at a glance.
fn has_none(mut body: &[u8]) -> bool {
    /// With all fields below 16, these are in the first byte, and so is the kind of the field.
    const LENGTH: u8 = 2;
    while let Some((tag, rest)) = body.split_first() {
        let (field, kind) = (tag >> 3, tag & 7);
        if kind != LENGTH || matches!(field, 3 | 8) || field > 15 {
            return false;
        }
        body = rest;
        let length = decode_varint(&mut body).ok();
        match length.and_then(|length| body.get(usize::try_from(length).ok()?..)) {
            Some(rest) => body = rest,
            None => return false,
        }
    }
    true
}

/// The field that filters look at.
#[derive(Clone, PartialEq, prost::Message)]
struct Attributed {
    #[prost(map = "string, string", tag = "2")]
    attributes: HashMap<String, String>,
}

/// The attributes; none if the body is no message.
pub(crate) fn attributes(body: &[u8]) -> HashMap<String, String> {
    Attributed::decode(body).unwrap_or_default().attributes
}

/// Where a dead letter comes from, and why it is one. Attributes of the copy carry it, so that
/// whoever listens to the dead-letter topic can read it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Origin {
    /// The topic.
    pub topic: String,
    /// Its incarnation.
    pub epoch: Epoch,
    /// The message.
    pub sequence: u64,
    /// Who could not process it.
    pub subscription: String,
    /// How often it was tried.
    pub attempts: u32,
    /// Why it failed for the last time, for people; may be empty.
    pub reason: String,
    /// When it failed for the first time.
    pub first_failure: Timestamp,
    /// When it failed for the last time.
    pub last_failure: Timestamp,
}

/// The names of the attributes, in the order of the fields.
const ATTRIBUTES: [&str; 8] = [
    "dead-letter-topic",
    "dead-letter-epoch",
    "dead-letter-sequence",
    "dead-letter-subscription",
    "dead-letter-attempts",
    "dead-letter-reason",
    "dead-letter-first-failure",
    "dead-letter-last-failure",
];

impl Origin {
    /// The copy of a message for the dead-letter topic: for all who listen there. `None` if the
    /// body is no message.
    pub(crate) fn dead_letter(&self, body: &[u8]) -> Option<Bytes> {
        let mut message = v1::Message::decode(body).ok()?;
        message.recipients.clear();
        let values = [
            self.topic.clone(),
            self.epoch.0.to_string(),
            self.sequence.to_string(),
            self.subscription.clone(),
            self.attempts.to_string(),
            self.reason.clone(),
            rfc3339(self.first_failure),
            rfc3339(self.last_failure),
        ];
        message.attributes.extend(ATTRIBUTES.map(str::to_owned).into_iter().zip(values));
        Some(message.encode_to_vec().into())
    }

    /// What the attributes of a dead letter say; `None` if it is no dead letter.
    pub(crate) fn of(body: &[u8]) -> Option<Self> {
        Self::of_message(&v1::Message::decode(body).ok()?)
    }

    /// As [`of`](Self::of).
    pub(crate) fn of_message(message: &v1::Message) -> Option<Self> {
        let mut values = ATTRIBUTES.iter().map(|name| message.attributes.get(*name));
        let mut next = || values.next().flatten();
        Some(Self {
            topic: next()?.clone(),
            epoch: Epoch(next()?.parse().ok()?),
            sequence: next()?.parse().ok()?,
            subscription: next()?.clone(),
            attempts: next()?.parse().ok()?,
            reason: next()?.clone(),
            first_failure: parse_rfc3339(next()?)?,
            last_failure: parse_rfc3339(next()?)?,
        })
    }
}

/// The message that a dead letter is the copy of, for one recipient. `None` if it is no message.
pub(crate) fn revived(body: &[u8], recipient: &str) -> Option<Bytes> {
    let mut message = v1::Message::decode(body).ok()?;
    for name in ATTRIBUTES {
        message.attributes.remove(name);
    }
    message.recipients = vec![recipient.to_owned()];
    Some(message.encode_to_vec().into())
}

fn rfc3339(at: Timestamp) -> String {
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_millis(at.0);
    humantime::format_rfc3339_millis(time).to_string()
}

fn parse_rfc3339(text: &str) -> Option<Timestamp> {
    let time = humantime::parse_rfc3339(text).ok()?;
    let millis = time.duration_since(std::time::UNIX_EPOCH).ok()?.as_millis();
    u64::try_from(millis).ok().map(Timestamp)
}

/// What a schema is about.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Content {
    /// The application's data.
    #[prost(bytes = "bytes", tag = "1")]
    pub(crate) payload: Bytes,
    /// Its media type; empty if it is not said.
    #[prost(string, tag = "4")]
    pub(crate) content_type: String,
}

impl Content {
    /// That of a body; nothing if it is no message.
    pub(crate) fn of(body: &Bytes) -> Option<Self> {
        Self::decode(body.clone()).ok()
    }
}

/// What the server adds to a message that was checked with a schema.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Stamp {
    /// The media type, if the publisher has not said it.
    #[prost(string, tag = "4")]
    pub(crate) content_type: String,
    /// The revision of the schema.
    #[prost(uint32, tag = "7")]
    pub(crate) schema_revision: u32,
}

impl Stamp {
    /// The body with this in it: of a field that comes twice the last one counts.
    pub(crate) fn on(&self, body: &Bytes) -> Bytes {
        let mut stamped = BytesMut::with_capacity(body.len() + self.encoded_len());
        stamped.extend_from_slice(body);
        self.encode(&mut stamped).expect("the buffer grows");
        stamped.freeze()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_is_found_whatever_stands_around_it() {
        let message = |key: &str| v1::Message {
            payload: vec![0; 100].into(),
            attributes: [("a".to_owned(), "b".to_owned())].into(),
            ordering_key: key.to_owned(),
            content_type: "text/plain".to_owned(),
            recipients: vec!["r".to_owned()],
            not_before: Some(prost_types::Timestamp { seconds: 7, nanos: 1_000_001 }),
            ..v1::Message::default()
        };
        let label = |key: &str| Label::of(&message(key).encode_to_vec());
        assert_eq!(label("k").ordering_key(), Some("k"));
        assert_eq!(label("k").not_before(), Some(Timestamp(7_002)));
        assert_eq!(label("").ordering_key(), None);
        assert_eq!(Label::of(b"no message"), Label::default());
        for full in [message("k"), message(""), v1::Message { not_before: None, ..message("") }] {
            let full = v1::Message { schema_revision: 300, ..full }.encode_to_vec();
            for end in 0..=full.len() {
                let decoded = Label::decode(&full[..end]).unwrap_or_default();
                assert_eq!(Label::of(&full[..end]), decoded, "{end}");
            }
        }
    }

    #[test]
    fn a_plain_body_is_a_payload_and_nothing_else() {
        for size in [0, 1, 127, 128, 16_383, 16_384] {
            let message = v1::Message { payload: vec![7; size].into(), ..v1::Message::default() };
            let body = message.encode_to_vec();
            assert!(is_plain(&body), "{size}");
            let with_more = |more: &[u8]| is_plain(&[&body, more].concat());
            assert!(!with_more(&[0]) && !with_more(&[1 << 3 | 2, 0]), "{size}");
            assert!(size == 0 || !is_plain(&body[..body.len() - 1]), "{size}");
            let keyed = v1::Message { ordering_key: "k".to_owned(), ..message };
            assert!(!is_plain(&keyed.encode_to_vec()), "{size}");
        }
        for bad in
            [&[1 << 3 | 2][..], &[1 << 3 | 2, 0], &[1 << 3 | 2, 0x81, 0, 7], &[3 << 3 | 2, 1, 7]]
        {
            assert!(!is_plain(bad), "{bad:?}");
        }
    }

    #[test]
    fn a_dead_letter_says_where_it_comes_from_and_can_be_revived() {
        let message = v1::Message {
            payload: vec![0, 255].into(),
            attributes: [("a".to_owned(), "b".to_owned())].into(),
            ordering_key: "k".to_owned(),
            recipients: vec!["one".to_owned(), "two".to_owned()],
            ..v1::Message::default()
        };
        let origin = Origin {
            topic: "orders".to_owned(),
            epoch: Epoch(u64::MAX),
            sequence: 17,
            subscription: "one".to_owned(),
            attempts: 5,
            reason: "the mail server is down".to_owned(),
            first_failure: Timestamp(1_700_000_000_001),
            last_failure: Timestamp(1_700_000_009_999),
        };
        let copy = origin.dead_letter(&message.encode_to_vec()).unwrap();
        assert_eq!(Origin::of(&copy), Some(origin));
        let decoded = v1::Message::decode(&*copy).unwrap();
        assert_eq!((&*decoded.ordering_key, decoded.recipients.len()), ("k", 0));
        let revived = v1::Message::decode(&*revived(&copy, "one").unwrap()).unwrap();
        assert_eq!(revived, v1::Message { recipients: vec!["one".to_owned()], ..message.clone() });
        assert_eq!(Origin::of(&message.encode_to_vec()), None);
    }

    #[test]
    fn a_stamp_adds_to_a_message_and_changes_nothing_else() {
        let message = v1::Message {
            payload: "{}".into(),
            attributes: [("a".to_owned(), "b".to_owned())].into(),
            ..v1::Message::default()
        };
        let body = Bytes::from(message.encode_to_vec());
        let content = Content { payload: "{}".into(), content_type: String::new() };
        assert_eq!(Content::of(&body), Some(content));
        let stamp = Stamp { content_type: "application/json".to_owned(), schema_revision: 300 };
        let expected = v1::Message {
            content_type: "application/json".to_owned(),
            schema_revision: 300,
            ..message
        };
        assert_eq!(v1::Message::decode(stamp.on(&body)), Ok(expected));
    }
}
