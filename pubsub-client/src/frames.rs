//! A stream of large frames, received without a copy.
//!
//! tonic gathers what a connection brings in a buffer of its own before it decodes a frame. Here the
//! pieces in which a frame came are handed over as they are: tonic sees an empty frame in its place, with
//! all that it does for streams, and the decoder takes the real one from a [`Slot`].

use std::future::Future;
use std::marker::PhantomData;
use std::mem;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use http_body::{Body, Frame};
use prost::Message;
use pubsub_proto::codec::Encoder;
use pubsub_proto::{MAX_FRAME_BYTES, Pieces};
use tonic::Status;
use tonic::client::Grpc;
use tonic::codec::{DecodeBuf, Decoder, Streaming};
use tonic::codegen::{Service, http};
use tonic::transport::Channel;
use tonic::{IntoStreamingRequest, Response};

/// Whether it is compressed, and its length.
const HEADER_BYTES: usize = 5;
/// A frame of nothing.
static EMPTY: [u8; HEADER_BYTES] = [0; HEADER_BYTES];

/// Calls a method whose answers are a stream of frames.
pub(crate) async fn call<Q, R>(
    channel: Channel,
    path: &'static str,
    requests: impl IntoStreamingRequest<Message = Q>,
) -> Result<Response<Streaming<R>>, Status>
where
    Q: Message + Send + Sync + 'static,
    R: Message + Default + Send + Sync + 'static,
{
    let slot = Slot::default();
    let codec = Codec { slot: slot.clone(), types: PhantomData };
    let mut grpc = Grpc::new(Whole { channel, slot })
        .max_decoding_message_size(MAX_FRAME_BYTES)
        .max_encoding_message_size(MAX_FRAME_BYTES);
    grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let path = http::uri::PathAndQuery::from_static(path);
    grpc.streaming(requests.into_streaming_request(), path, codec).await
}

/// The frame that is decoded next. tonic decodes each before it asks for more.
#[derive(Clone, Debug, Default)]
struct Slot(Arc<Mutex<Option<Pieces>>>);

impl Slot {
    fn put(&self, frame: Pieces) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(frame);
    }

    fn take(&self) -> Option<Pieces> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// A channel whose answers come in whole frames.
struct Whole {
    channel: Channel,
    slot: Slot,
}

type Answer = Result<http::Response<Frames>, tonic::transport::Error>;

impl Service<http::Request<tonic::body::Body>> for Whole {
    type Response = http::Response<Frames>;
    type Error = tonic::transport::Error;
    type Future = Pin<Box<dyn Future<Output = Answer> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.channel.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        let (answer, slot) = (self.channel.call(request), self.slot.clone());
        Box::pin(async move {
            Ok(answer.await?.map(|body| Frames { body, slot, cutter: Cutter::default() }))
        })
    }
}

/// The body of an answer.
struct Frames {
    body: tonic::body::Body,
    slot: Slot,
    cutter: Cutter,
}

impl Body for Frames {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        loop {
            match self.cutter.next() {
                Cut::Frame(frame) => {
                    self.slot.put(frame);
                    return Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(&EMPTY)))));
                }
                Cut::Foreign(bytes) => return Poll::Ready(Some(Ok(Frame::data(bytes)))),
                Cut::More => {}
            }
            match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.cutter.rest = data,
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                },
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                // tonic tells of a frame that is cut off.
                None => return Poll::Ready(self.cutter.torn().map(|torn| Ok(Frame::data(torn)))),
            }
        }
    }
}

/// Cuts what a connection brings into frames.
#[derive(Debug, Default)]
struct Cutter {
    /// What came last.
    rest: Bytes,
    /// The header of the frame that comes, as far as it is there.
    header: BytesMut,
    /// The frame itself, as far as it is there.
    frame: Pieces,
}

#[derive(Debug)]
enum Cut {
    Frame(Pieces),
    /// What no server of ours sends, which is for tonic to refuse.
    Foreign(Bytes),
    More,
}

impl Cutter {
    fn next(&mut self) -> Cut {
        let header = self.take(HEADER_BYTES - self.header.len());
        self.header.put(header);
        let Some(header) = self.header.first_chunk() else { return Cut::More };
        let Some(size) = size(*header) else {
            self.header.put(mem::take(&mut self.rest));
            return Cut::Foreign(self.header.split().freeze());
        };
        let part = self.take(size - self.frame.remaining());
        self.frame.push(part);
        if self.frame.remaining() < size {
            return Cut::More;
        }
        self.header.clear();
        Cut::Frame(mem::take(&mut self.frame))
    }

    /// So many bytes of what is there, if there are as many.
    fn take(&mut self, most: usize) -> Bytes {
        self.rest.split_to(most.min(self.rest.len()))
    }

    /// What is there of a frame that ends too early.
    fn torn(&mut self) -> Option<Bytes> {
        let mut torn = self.header.split();
        torn.put(mem::take(&mut self.frame));
        (!torn.is_empty()).then(|| torn.freeze())
    }
}

/// The bytes of a frame with this header, if it is one of ours.
fn size([compressed, length @ ..]: [u8; HEADER_BYTES]) -> Option<usize> {
    let length = usize::try_from(u32::from_be_bytes(length)).ok()?;
    (compressed == 0 && length <= MAX_FRAME_BYTES).then_some(length)
}

/// Encodes as ever, and decodes what is in the slot.
struct Codec<T, U> {
    slot: Slot,
    types: PhantomData<(T, U)>,
}

impl<T, U> tonic::codec::Codec for Codec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = Encoder<T>;
    type Decoder = FromSlot<U>;

    fn encoder(&mut self) -> Encoder<T> {
        pubsub_proto::codec::Codec::<T, U>::default().encoder()
    }

    fn decoder(&mut self) -> FromSlot<U> {
        FromSlot { slot: self.slot.clone(), types: PhantomData }
    }
}

struct FromSlot<U> {
    slot: Slot,
    types: PhantomData<U>,
}

impl<U: Message + Default> Decoder for FromSlot<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, _: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        let missing = || Status::internal("a frame was lost on the way to its decoder");
        let frame = self.slot.take().ok_or_else(missing)?;
        U::decode(frame).map(Some).map_err(|error| Status::internal(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, PartialEq)]
    enum Found {
        Frame(Bytes),
        Foreign(Bytes),
    }

    fn bytes(mut frame: Pieces) -> Bytes {
        frame.copy_to_bytes(frame.remaining())
    }

    fn framed(frames: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for frame in frames {
            bytes.put_u8(0);
            bytes.put_u32(u32::try_from(frame.len()).unwrap());
            bytes.put_slice(frame);
        }
        bytes
    }

    /// What comes out if these pieces come in.
    fn cut<'p>(pieces: impl IntoIterator<Item = &'p [u8]>) -> (Vec<Found>, Option<Bytes>) {
        let mut cutter = Cutter::default();
        let mut cuts = Vec::new();
        for piece in pieces {
            cutter.rest = Bytes::copy_from_slice(piece);
            loop {
                match cutter.next() {
                    Cut::More => break,
                    Cut::Frame(frame) => cuts.push(Found::Frame(bytes(frame))),
                    Cut::Foreign(bytes) => cuts.push(Found::Foreign(bytes)),
                }
            }
            assert!(cutter.rest.is_empty());
        }
        (cuts, cutter.torn())
    }

    proptest! {
        #[test]
        fn frames_are_what_was_sent_however_they_come(
            frames in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 0..12),
            piece in 1_usize..80,
        ) {
            let bytes = framed(&frames);
            let (cuts, torn) = cut(bytes.chunks(piece));
            let frame = |frame: Vec<u8>| Found::Frame(frame.into());
            let expected: Vec<_> = frames.into_iter().map(frame).collect();
            prop_assert_eq!(cuts, expected);
            prop_assert_eq!(torn, None);
        }
    }

    #[test]
    fn what_comes_in_large_pieces_is_not_copied() {
        let sent = Bytes::from(framed(&[vec![1; 1000], vec![2; 1000]]));
        let mut cutter = Cutter { rest: sent.clone(), ..Cutter::default() };
        for at in [HEADER_BYTES, 2 * HEADER_BYTES + 1000] {
            let Cut::Frame(frame) = cutter.next() else { panic!("there is a frame") };
            assert_eq!(frame.chunk().as_ptr(), sent[at..].as_ptr());
            assert_eq!(frame.chunk().len(), 1000);
        }
        let middle = HEADER_BYTES + 500;
        cutter.rest = sent.slice(..middle);
        assert!(matches!(cutter.next(), Cut::More));
        cutter.rest = sent.slice(middle..HEADER_BYTES + 1000);
        let Cut::Frame(mut frame) = cutter.next() else { panic!("there is a frame") };
        for from in [HEADER_BYTES, middle] {
            assert_eq!(frame.copy_to_bytes(500).as_ptr(), sent[from..].as_ptr());
        }
    }

    #[test]
    fn what_is_none_of_ours_is_passed_on_whole() {
        let mut compressed = framed(&[vec![1; 10]]);
        compressed[0] = 1;
        let mut large = framed(&[vec![1; 10]]);
        large[1..5].copy_from_slice(&(u32::try_from(MAX_FRAME_BYTES).unwrap() + 1).to_be_bytes());
        for bytes in [compressed, large] {
            for piece in [3, 100] {
                let (cuts, torn) = cut(bytes.chunks(piece).take(2));
                let foreign: Vec<u8> = cuts
                    .iter()
                    .flat_map(|cut| match cut {
                        Found::Foreign(bytes) => bytes.to_vec(),
                        Found::Frame(_) => panic!("{cut:?}"),
                    })
                    .collect();
                assert_eq!(foreign, bytes[..foreign.len()]);
                assert!(foreign.len() > HEADER_BYTES && torn.is_none());
            }
        }
    }

    #[test]
    fn a_frame_that_is_cut_off_is_not_lost_silently() {
        let bytes = framed(&[vec![1; 10], vec![2; 10]]);
        for end in 16..30 {
            let (cuts, torn) = cut([&bytes[..end]]);
            assert_eq!(cuts, [Found::Frame(vec![1; 10].into())]);
            assert_eq!(torn.unwrap(), &bytes[15..end]);
        }
    }
}
