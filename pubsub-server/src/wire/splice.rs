//! Messages on their way to subscribers, sent from where the storage has them.
//!
//! tonic encodes what it sends into a buffer of its own. Here each frame is made of pieces beside it:
//! tonic sees an empty frame in its place, with all that it does for streams, and the body of the
//! response has the pieces instead.

use std::convert::Infallible;
use std::future::Future;
use std::io::IoSlice;
use std::mem;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use http_body::{Body, Frame, SizeHint};
use pubsub_proto::v1::SubscribeResponse;
use pubsub_proto::v1::subscribe_response::Frame as Response;
use pubsub_proto::{Courtesy, Pieces};
use tokio::time::Instant;
use tokio_stream::Stream;
use tonic::Status;
use tonic::codegen::{Service as HttpService, http};

use super::stream::Outbound;

/// Frames are gathered up to so many bytes, as far as they are there.
const GATHERED: usize = 32 * 1024;

/// What was encoded, and is not sent yet.
#[derive(Clone, Debug, Default)]
struct Slot(Arc<Mutex<Pieces>>);

impl Slot {
    /// A panic elsewhere may have left half of a frame; nobody reads on then.
    fn lock(&self) -> MutexGuard<'_, Pieces> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A response with these frames.
pub(super) fn response(frames: Outbound<SubscribeResponse>) -> tonic::Response<Splicing> {
    let slot = Slot::default();
    let courtesy = Courtesy::default();
    let mut response = tonic::Response::new(Splicing { frames, slot: slot.clone(), courtesy });
    response.extensions_mut().insert(slot);
    response
}

/// Frames that leave their bytes in a slot.
#[derive(Debug)]
pub(crate) struct Splicing {
    frames: Outbound<SubscribeResponse>,
    slot: Slot,
    courtesy: Courtesy,
}

impl Stream for Splicing {
    type Item = Result<SubscribeResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.slot.lock().remaining() >= GATHERED {
            // The body comes back once they are gone: it has been told of a frame.
            return Poll::Pending;
        }
        let next = Pin::new(&mut self.frames).poll_next(cx);
        if next.is_pending() {
            self.courtesy.waits();
        }
        let frame = match ready!(next) {
            Some(Ok(frame)) => frame,
            end @ (Some(Err(_)) | None) => return Poll::Ready(end),
        };
        let is_bulk = matches!(&frame.frame, Some(Response::Deliver(deliver)) if deliver.is_bulk());
        // Here, since the connection has the most to do for it.
        self.courtesy.before(is_bulk, || Instant::now().into_std());
        let spliced = frame.splice(&mut self.slot.lock());
        let spliced = spliced.map_err(|error| Status::internal(error.to_string()));
        Poll::Ready(Some(spliced.map(|()| SubscribeResponse::default())))
    }
}

/// A service that sends what responses have in their slots.
#[derive(Clone, Debug)]
pub(crate) struct Service<S>(pub(crate) S);

impl<S, B> HttpService<http::Request<B>> for Service<S>
where
    S: HttpService<
            http::Request<B>,
            Response = http::Response<tonic::body::Body>,
            Error = Infallible,
        >,
    S::Future: Send + 'static,
{
    type Response = http::Response<Outgoing>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let response = self.0.call(request);
        Box::pin(async move {
            let Ok(mut response) = response.await;
            let slot = response.extensions_mut().remove();
            Ok(response.map(|body| Outgoing { body, slot }))
        })
    }
}

/// The body of a response, whose frames may be in a slot.
#[derive(Debug)]
pub(crate) struct Outgoing {
    body: tonic::body::Body,
    slot: Option<Slot>,
}

impl Body for Outgoing {
    type Data = Data;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Data>, Status>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        Poll::Ready(frame.map(|frame| {
            frame.map(|frame| match &self.slot {
                // It says that there is something in the slot.
                Some(slot) => frame.map_data(|_| Data::Spliced(mem::take(&mut slot.lock()))),
                None => frame.map_data(Data::Whole),
            })
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        if self.slot.is_some() { SizeHint::default() } else { self.body.size_hint() }
    }
}

/// What is sent at once.
#[derive(Debug)]
pub(crate) enum Data {
    Whole(Bytes),
    Spliced(Pieces),
}

impl Buf for Data {
    fn remaining(&self) -> usize {
        match self {
            Self::Whole(bytes) => bytes.remaining(),
            Self::Spliced(pieces) => pieces.remaining(),
        }
    }

    fn chunk(&self) -> &[u8] {
        match self {
            Self::Whole(bytes) => bytes.chunk(),
            Self::Spliced(pieces) => pieces.chunk(),
        }
    }

    fn chunks_vectored<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        match self {
            Self::Whole(bytes) => bytes.chunks_vectored(slices),
            Self::Spliced(pieces) => pieces.chunks_vectored(slices),
        }
    }

    fn advance(&mut self, count: usize) {
        match self {
            Self::Whole(bytes) => bytes.advance(count),
            Self::Spliced(pieces) => pieces.advance(count),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use bytes::BufMut as _;
    use prost::Message as _;
    use pubsub_proto::Encoded;
    use pubsub_proto::v1::subscribe_response::Frame as Response;
    use pubsub_proto::v1::{AckConfirm, Deliver};
    use tokio::sync::mpsc;
    use tonic::codec::{Codec as _, EncodeBody, SingleMessageCompressionOverride};

    use super::*;

    fn confirm(number: u64) -> SubscribeResponse {
        SubscribeResponse { frame: Some(Response::Confirm(AckConfirm { number })) }
    }

    fn deliver(bytes: usize) -> SubscribeResponse {
        let mut deliver = Deliver::default();
        deliver.push(1, None, 1, Encoded::Alone(&vec![7; bytes]));
        SubscribeResponse { frame: Some(Response::Deliver(deliver)) }
    }

    /// What tonic makes of these frames, with what is sent of it.
    fn body(frames: mpsc::Receiver<Result<SubscribeResponse, Status>>) -> Outgoing {
        let mut response = response(Outbound::new(frames));
        let slot = response.extensions_mut().remove::<Slot>().unwrap();
        let codec = pubsub_proto::codec::Codec::<_, SubscribeResponse>::default().encoder();
        let none = SingleMessageCompressionOverride::default();
        let body = EncodeBody::new_server(codec, response.into_inner(), None, none, None);
        Outgoing { body: tonic::body::Body::new(body), slot: Some(slot) }
    }

    async fn next(body: &mut Outgoing) -> Option<Result<Frame<Bytes>, Status>> {
        let frame = poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)).await?;
        Some(frame.map(|frame| frame.map_data(|mut data| data.copy_to_bytes(data.remaining()))))
    }

    fn framed(frames: &[SubscribeResponse]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for frame in frames {
            bytes.put_u8(0);
            bytes.put_u32(frame.encoded_len().try_into().unwrap());
            bytes.put_slice(&frame.encode_to_vec());
        }
        bytes
    }

    #[tokio::test]
    async fn what_is_sent_are_the_frames_and_how_they_end() {
        let frames = [confirm(1), deliver(100_000), deliver(10), SubscribeResponse::default()];
        for refused in [false, true] {
            let (sender, receiver) = mpsc::channel(8);
            let mut body = body(receiver);
            for frame in &frames {
                sender.try_send(Ok(frame.clone())).unwrap();
            }
            if refused {
                sender.try_send(Err(Status::unavailable("stopping"))).unwrap();
            }
            drop(sender);
            let mut sent = Vec::new();
            let trailers = loop {
                match next(&mut body).await.unwrap().unwrap().into_data() {
                    Ok(data) => sent.extend(data),
                    Err(end) => break end.into_trailers().unwrap(),
                }
            };
            assert_eq!(sent, framed(&frames));
            let status = Status::from_header_map(&trailers).unwrap();
            let expected = if refused { tonic::Code::Unavailable } else { tonic::Code::Ok };
            assert_eq!(status.code(), expected);
            assert!(next(&mut body).await.is_none());
        }
    }

    #[tokio::test]
    async fn small_frames_are_sent_together_and_none_waits_for_another() {
        let (sender, receiver) = mpsc::channel(8);
        let mut body = body(receiver);
        for round in 0..3 {
            let frames = [confirm(3 * round), confirm(3 * round + 1)];
            for frame in &frames {
                sender.try_send(Ok(frame.clone())).unwrap();
            }
            let data = next(&mut body).await.unwrap().unwrap().into_data().unwrap();
            assert_eq!(data, framed(&frames));
        }
    }

    /// Whatever is there to be sent: a peer that does not read takes no more memory than this.
    #[tokio::test]
    async fn no_more_is_encoded_than_can_be_sent_next() {
        let (sender, receiver) = mpsc::channel(64);
        let mut body = body(receiver);
        let frames: Vec<_> = (0..64).map(|_| deliver(GATHERED / 4)).collect();
        for frame in &frames {
            sender.try_send(Ok(frame.clone())).unwrap();
        }
        drop(sender);
        let mut sent = Vec::new();
        while let Ok(data) = next(&mut body).await.unwrap().unwrap().into_data() {
            assert!(data.len() < GATHERED + GATHERED / 2, "{} bytes", data.len());
            sent.extend(data);
        }
        assert_eq!(sent, framed(&frames));
    }

    #[tokio::test]
    async fn a_frame_that_is_too_large_ends_the_stream_and_says_so() {
        let (sender, receiver) = mpsc::channel(8);
        let mut body = body(receiver);
        sender.try_send(Ok(confirm(1))).unwrap();
        sender.try_send(Ok(deliver(pubsub_proto::MAX_FRAME_BYTES))).unwrap();
        let data = next(&mut body).await.unwrap().unwrap().into_data().unwrap();
        assert_eq!(data, framed(&[confirm(1)]));
        let trailers = next(&mut body).await.unwrap().unwrap().into_trailers().unwrap();
        let status = Status::from_header_map(&trailers).unwrap();
        assert!(status.message().contains("a frame of"), "{status:?}");
    }
}
