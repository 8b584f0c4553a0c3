//! The wire contract of pubsub, generated from `pubsub/v1/*.proto`; the frames that carry messages
//! are written by hand.
//!
//! What the frames mean, in which order they come and how each side answers is in
//! `docs/protocol.md`; each field is documented in the `.proto` files and here.

/// Version 1 of the protocol.
pub mod v1 {
    #![allow(
        missing_docs,
        clippy::all,
        clippy::pedantic,
        reason = "generated; documented in the .proto files"
    )]
    tonic::include_proto!("pubsub.v1");

    pub use crate::deliver::{Deliver, MessageRun};
    pub use crate::hot::{
        PublishBatch, PublishStreamRequest, ReceivedMessage, publish_stream_request,
    };
}

pub use courtesy::Courtesy;
pub use deliver::{Encoded, TooLarge};
pub use hot::BatchWriter;
pub use pieces::Pieces;

pub mod codec;
mod courtesy;
mod deliver;
mod hot;
mod pieces;

/// The compiled descriptors of all files, for the reflection service.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pubsub.bin"));

/// The protocol version that hello frames carry.
pub const PROTOCOL_VERSION: u32 = 1;

/// The `domain` of the `google.rpc.ErrorInfo` that every error of a pubsub server carries.
///
/// A status without it did not come from a pubsub server: it is transport trouble.
pub const ERROR_DOMAIN: &str = "pubsub.v1";

/// The largest gRPC message either side sends or accepts, in bytes.
///
/// One constant for both directions, larger than the largest message (16 MiB) with its
/// attributes: a frame that one side can send and the other cannot receive would be sent again
/// for ever.
pub const MAX_FRAME_BYTES: usize = 20 * 1024 * 1024;
