//! Compiles `pubsub/v1/*.proto` with protox, a protobuf compiler in pure Rust: no `protoc` needed.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message as _;

const FILES: [&str; 7] = [
    "pubsub/v1/admin.proto",
    "pubsub/v1/error.proto",
    "pubsub/v1/events.proto",
    "pubsub/v1/message.proto",
    "pubsub/v1/publisher.proto",
    "pubsub/v1/schema.proto",
    "pubsub/v1/subscriber.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=pubsub");
    let descriptors = protox::compile(FILES, ["."])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("pubsub.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        // Payloads are reference-counted slices of the frame that brought them.
        .bytes(".pubsub.v1")
        // One message has one encoding, so that its hash identifies it.
        .btree_map(".pubsub.v1")
        // Written by hand, with messages as bytes: see src/hot.rs and src/deliver.rs.
        .extern_path(".pubsub.v1.Deliver", "crate::deliver::Deliver")
        .extern_path(".pubsub.v1.MessageRun", "crate::deliver::MessageRun")
        .extern_path(".pubsub.v1.PublishBatch", "crate::hot::PublishBatch")
        .extern_path(".pubsub.v1.PublishStreamRequest", "crate::hot::PublishStreamRequest")
        .extern_path(".pubsub.v1.ReceivedMessage", "crate::hot::ReceivedMessage")
        .codec_path("crate::codec::Codec")
        // Trait and client are generated together; the linker drops the half that is not used.
        .build_transport(false)
        .compile_fds(descriptors)?;
    Ok(())
}
