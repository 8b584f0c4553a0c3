//! A publisher of values.

use std::marker::PhantomData;

use super::{PublishReceipt, PublishTicket, Publisher};
use crate::codec::{Codec, CodecError};
use crate::error::{EnqueueError, Outcome, PublishError};
use crate::message::Message;

/// A [`Publisher`] of values, encoded by a codec; made by [`Publisher::typed`].
///
/// The messages carry the codec's media type.
#[derive(Clone, Debug)]
pub struct TypedPublisher<T, C> {
    publisher: Publisher,
    codec: C,
    payload: PhantomData<fn(T)>,
}

impl<T, C> TypedPublisher<T, C> {
    pub(super) fn new(publisher: Publisher, codec: C) -> Self {
        Self { publisher, codec, payload: PhantomData }
    }

    /// The publisher without its codec.
    pub fn publisher(&self) -> &Publisher {
        &self.publisher
    }
}

impl<T, C: Codec<T>> TypedPublisher<T, C> {
    /// A message with this value as its payload, for keys and attributes to be added. Publish it
    /// by the [`publisher`](Self::publisher).
    ///
    /// # Errors
    ///
    /// The value cannot be encoded.
    pub fn message(&self, value: &T) -> Result<Message, CodecError> {
        let message = Message::new(self.codec.encode(value)?);
        Ok(match self.codec.content_type() {
            "" => message,
            content_type => message.with_content_type(content_type),
        })
    }

    /// Publishes a value and waits until it is on the server's disk, as [`Publisher::publish`].
    ///
    /// # Errors
    ///
    /// The value cannot be encoded, or as [`Publisher::publish`].
    pub async fn publish(&self, value: &T) -> Result<PublishReceipt, TypedPublishError> {
        Ok(self.enqueue(value).await?.await?)
    }

    /// Puts a value into the window, as [`Publisher::enqueue`].
    ///
    /// # Errors
    ///
    /// The value cannot be encoded, or as [`Publisher::enqueue`].
    pub async fn enqueue(&self, value: &T) -> Result<PublishTicket, TypedPublishError> {
        Ok(self.publisher.enqueue(self.message(value)?).await?)
    }
}

/// A value was not published.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TypedPublishError {
    /// It cannot be encoded.
    #[error("the value cannot be encoded: {0}")]
    Encode(#[from] CodecError),
    /// Its message was not accepted.
    #[error(transparent)]
    Enqueue(#[from] EnqueueError),
    /// Its message was not published.
    #[error(transparent)]
    Publish(#[from] PublishError),
}

impl TypedPublishError {
    /// Whether the message may be stored all the same.
    pub fn outcome(&self) -> Outcome {
        match self {
            Self::Encode(_) | Self::Enqueue(_) => Outcome::NotPersisted,
            Self::Publish(error) => error.outcome(),
        }
    }

    /// Whether publishing the same value again can succeed.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Encode(_) => false,
            Self::Enqueue(error) => error.is_retryable(),
            Self::Publish(error) => error.is_retryable(),
        }
    }
}
