//! What the server reads of a stored message's body, which is an encoded `pubsub.v1.Message`. The
//! rest is the application's.

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
}
