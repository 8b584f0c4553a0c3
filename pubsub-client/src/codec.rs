//! Typed payloads.

use std::error::Error;
use std::sync::Arc;

use bytes::Bytes;

/// A payload could not be encoded or decoded.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct CodecError(Arc<dyn Error + Send + Sync>);

impl CodecError {
    /// Wraps the codec's own error.
    pub fn new(error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self(error.into().into())
    }
}

/// Turns values into payloads and back.
///
/// A codec is a value that is handed to [`Publisher::typed`](crate::Publisher::typed) and
/// [`Subscriber::typed`](crate::Subscriber::typed), not a trait of the payload's type: so any
/// type can have any codec, also a foreign one.
pub trait Codec<T>: Send + Sync + 'static {
    /// The media type that published messages carry, unless they set their own. Empty: none.
    fn content_type(&self) -> &str;

    /// Makes a payload.
    ///
    /// # Errors
    ///
    /// The value has no representation.
    fn encode(&self, value: &T) -> Result<Bytes, CodecError>;

    /// Reads a payload.
    ///
    /// # Errors
    ///
    /// The payload is not a representation of any value.
    fn decode(&self, payload: &Bytes) -> Result<T, CodecError>;
}

/// Payloads as they are.
#[derive(Clone, Copy, Debug, Default)]
pub struct Raw;

impl Codec<Bytes> for Raw {
    fn content_type(&self) -> &str {
        ""
    }

    fn encode(&self, value: &Bytes) -> Result<Bytes, CodecError> {
        Ok(value.clone())
    }

    fn decode(&self, payload: &Bytes) -> Result<Bytes, CodecError> {
        Ok(payload.clone())
    }
}

/// JSON, by serde.
#[cfg(feature = "json")]
#[derive(Clone, Copy, Debug, Default)]
pub struct Json;

#[cfg(feature = "json")]
impl<T> Codec<T> for Json
where
    T: serde::Serialize + serde::de::DeserializeOwned,
{
    fn content_type(&self) -> &str {
        "application/json"
    }

    fn encode(&self, value: &T) -> Result<Bytes, CodecError> {
        serde_json::to_vec(value).map(Bytes::from).map_err(CodecError::new)
    }

    fn decode(&self, payload: &Bytes) -> Result<T, CodecError> {
        serde_json::from_slice(payload).map_err(CodecError::new)
    }
}

/// Protocol buffers, by prost.
#[cfg(feature = "prost")]
#[derive(Clone, Copy, Debug, Default)]
pub struct Prost;

#[cfg(feature = "prost")]
impl<T> Codec<T> for Prost
where
    T: prost::Message + Default,
{
    fn content_type(&self) -> &str {
        "application/protobuf"
    }

    fn encode(&self, value: &T) -> Result<Bytes, CodecError> {
        Ok(value.encode_to_vec().into())
    }

    fn decode(&self, payload: &Bytes) -> Result<T, CodecError> {
        T::decode(payload.clone()).map_err(CodecError::new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(feature = "json")]
    fn json_round_trips_and_says_what_is_wrong() {
        let payload = Json.encode(&vec![1, 2]).unwrap();
        assert_eq!(&payload[..], b"[1,2]");
        assert_eq!(Codec::<Vec<u8>>::decode(&Json, &payload).unwrap(), [1, 2]);
        let error = Codec::<Vec<u8>>::decode(&Json, &Bytes::from("[1")).unwrap_err();
        assert!(error.to_string().contains("EOF"), "{error}");
    }

    #[test]
    #[cfg(feature = "prost")]
    fn protobuf_round_trips() {
        let payload = Codec::<String>::encode(&Prost, &"text".to_owned()).unwrap();
        assert_eq!(Codec::<String>::decode(&Prost, &payload).unwrap(), "text");
        assert!(Codec::<String>::decode(&Prost, &Bytes::from_static(&[0xff])).is_err());
    }
}
