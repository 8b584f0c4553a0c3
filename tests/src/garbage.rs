//! Calls whose request is bytes that need not be protobuf.

use bytes::{Buf as _, BufMut as _, Bytes};
use tonic::{
    Request, Status,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    codegen::{http::uri::PathAndQuery, tokio_stream},
    transport::Channel,
};

use anyhow::Result;

use crate::{raw::FRAME_WITHIN, wait};

/// Sends these bytes as the only request of a call, and gives the status of its end.
///
/// # Errors
///
/// If the call does not end.
pub async fn call(channel: &Channel, method: &str, request: Bytes) -> Result<Status> {
    let path = method.parse::<PathAndQuery>()?;
    let mut grpc = Grpc::new(channel.clone());
    wait::soon("the client", FRAME_WITHIN, grpc.ready()).await??;
    let requests = Request::new(tokio_stream::iter([request]));
    let end = async {
        let mut answers = match grpc.streaming(requests, path, Untouched).await {
            Ok(answers) => answers.into_inner(),
            Err(status) => return status,
        };
        loop {
            match answers.message().await {
                Ok(Some(_)) => {}
                Ok(None) => return Status::ok(""),
                Err(status) => return status,
            }
        }
    };
    wait::soon("the end of the call", FRAME_WITHIN, end).await
}

/// Passes bytes on as they are.
#[derive(Debug, Default)]
struct Untouched;

impl Codec for Untouched {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Untouched {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(item);
        Ok(())
    }
}

impl Decoder for Untouched {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining())))
    }
}
