//! A subscriber whose payloads are decoded.

use std::marker::PhantomData;
use std::ops::Deref;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_util::{Stream, StreamExt as _};

use super::{Acker, DataLoss, Delivery, Event, Gap, Nack, Subscriber};
use crate::codec::Codec;
use crate::error::{AckError, SubscribeError};

/// A [`Subscriber`] whose payloads are decoded; made by [`Subscriber::typed`].
///
/// A payload that cannot be decoded comes as [`SubscribeError::Decode`] with its delivery; the
/// stream goes on after it.
#[derive(Debug)]
pub struct TypedSubscriber<T, C> {
    subscriber: Subscriber,
    codec: C,
    payload: PhantomData<fn() -> T>,
}

impl<T, C> TypedSubscriber<T, C> {
    pub(super) fn new(subscriber: Subscriber, codec: C) -> Self {
        Self { subscriber, codec, payload: PhantomData }
    }

    /// The subscriber without its codec.
    pub fn into_inner(self) -> Subscriber {
        self.subscriber
    }
}

impl<T, C: Codec<T>> TypedSubscriber<T, C> {
    /// As [`Subscriber::next`].
    pub async fn next(&mut self) -> Option<Result<TypedEvent<T>, SubscribeError>> {
        let event = self.subscriber.next().await?;
        Some(self.decode(event))
    }

    fn decode(
        &self,
        event: Result<Event, SubscribeError>,
    ) -> Result<TypedEvent<T>, SubscribeError> {
        match event? {
            Event::Message(delivery) => match self.codec.decode(&delivery.payload) {
                Ok(payload) => Ok(TypedEvent::Message(TypedDelivery { payload, delivery })),
                Err(source) => Err(SubscribeError::Decode { delivery: Box::new(delivery), source }),
            },
            Event::Gap(gap) => Ok(TypedEvent::Gap(gap)),
            Event::DataLoss(loss) => Ok(TypedEvent::DataLoss(loss)),
        }
    }
}

impl<T, C> Deref for TypedSubscriber<T, C> {
    type Target = Subscriber;

    fn deref(&self) -> &Subscriber {
        &self.subscriber
    }
}

impl<T, C: Codec<T> + Unpin> Stream for TypedSubscriber<T, C> {
    type Item = Result<TypedEvent<T>, SubscribeError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let event = self.subscriber.poll_next_unpin(context);
        event.map(|event| event.map(|event| self.decode(event)))
    }
}

/// What a [`TypedSubscriber`] yields.
#[derive(Debug)]
#[non_exhaustive]
#[expect(clippy::large_enum_variant, reason = "nearly all of them are messages")]
pub enum TypedEvent<T> {
    /// A message.
    Message(TypedDelivery<T>),
    /// Messages that this subscription will never receive.
    Gap(Gap),
    /// A topic cannot be read any further for now.
    DataLoss(DataLoss),
}

impl<T> TypedEvent<T> {
    /// The message, if it is one.
    pub fn into_message(self) -> Option<TypedDelivery<T>> {
        match self {
            Self::Message(delivery) => Some(delivery),
            Self::Gap(_) | Self::DataLoss(_) => None,
        }
    }
}

/// A [`Delivery`] and its decoded payload.
#[derive(Debug)]
#[must_use = "a delivery that is dropped is released, and comes again"]
pub struct TypedDelivery<T> {
    /// The decoded payload.
    pub payload: T,
    /// The delivery; its own `payload` has the bytes.
    pub delivery: Delivery,
}

impl<T> TypedDelivery<T> {
    /// As [`Delivery::ack`].
    pub fn ack(self) {
        self.delivery.ack();
    }

    /// As [`Delivery::ack_confirmed`].
    ///
    /// # Errors
    ///
    /// The ack has no meaning any more, or the subscriber ended first.
    pub async fn ack_confirmed(self) -> Result<(), AckError> {
        self.delivery.ack_confirmed().await
    }

    /// As [`Delivery::nack`].
    pub fn nack(self, nack: Nack) {
        self.delivery.nack(nack);
    }

    /// Takes the payload out, to ack the message later and elsewhere.
    pub fn split(self) -> (T, Acker) {
        (self.payload, self.delivery.split().1)
    }
}
