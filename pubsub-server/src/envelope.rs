//! What the server reads and writes of a message's body, which is an encoded `pubsub.v1.Message`.
//! The rest is the application's.

use bytes::{Bytes, BytesMut};
use prost::Message as _;

/// The field that orders messages, and nothing else: what is not named here is skipped.
#[derive(Clone, PartialEq, prost::Message)]
struct Keyed {
    #[prost(string, tag = "3")]
    ordering_key: String,
}

/// The ordering key; none if it is empty, or the body is no message.
pub(crate) fn ordering_key(body: &[u8]) -> Option<String> {
    let Keyed { ordering_key } = Keyed::decode(body).ok()?;
    (!ordering_key.is_empty()).then_some(ordering_key)
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
    use pubsub_proto::v1;

    use super::*;

    #[test]
    fn the_key_is_found_whatever_stands_around_it() {
        let message = |key: &str| v1::Message {
            payload: vec![0; 100].into(),
            attributes: [("a".to_owned(), "b".to_owned())].into(),
            ordering_key: key.to_owned(),
            content_type: "text/plain".to_owned(),
            recipients: vec!["r".to_owned()],
            ..v1::Message::default()
        };
        assert_eq!(ordering_key(&message("k").encode_to_vec()).as_deref(), Some("k"));
        assert_eq!(ordering_key(&message("").encode_to_vec()), None);
        assert_eq!(ordering_key(b"no message"), None);
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
