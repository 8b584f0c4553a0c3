//! gRPC: what comes over the wire is parsed here or refused, and nothing of it goes further.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use pubsub_proto::v1::admin_service_server::AdminServiceServer;
use pubsub_proto::v1::publisher_service_server::PublisherServiceServer;
use pubsub_proto::v1::subscriber_service_server::SubscriberServiceServer;
use pubsub_proto::{FILE_DESCRIPTOR_SET, MAX_FRAME_BYTES};
use tokio::sync::watch;
use tokio_util::task::TaskTracker;
use tonic::service::{Routes, RoutesBuilder};
use tonic_health::server::HealthReporter;

use crate::broker::Broker;
use crate::record::Timestamp;

mod admin;
mod convert;
mod describe;
mod events;
mod publish;
mod schema;
pub(crate) mod splice;
mod status;
mod stream;
mod subscribe;

/// What all services share.
#[derive(Clone, Debug)]
pub(crate) struct Context {
    pub(crate) broker: Broker,
    /// Owns the task of each stream, so that none ends in the middle when its connection does.
    pub(crate) streams: TaskTracker,
    /// Turns true when the server is about to stop.
    pub(crate) draining: watch::Receiver<bool>,
    /// Turns true when streams have to end.
    pub(crate) stopping: watch::Receiver<bool>,
    pub(crate) connections: Arc<AtomicU64>,
    pub(crate) started: Timestamp,
}

/// The services, and the means to say that the server is not serving any more.
///
/// # Errors
///
/// If the descriptors for reflection are not valid.
pub(crate) async fn routes(
    context: Context,
) -> Result<(Routes, HealthReporter), tonic_reflection::server::Error> {
    let (reporter, health) = tonic_health::server::health_reporter();
    let mut routes = RoutesBuilder::default();
    let publisher = PublisherServiceServer::new(publish::Service(context.clone()))
        .max_decoding_message_size(MAX_FRAME_BYTES)
        .max_encoding_message_size(MAX_FRAME_BYTES);
    let subscriber = SubscriberServiceServer::new(subscribe::Service(context.clone()))
        .max_decoding_message_size(MAX_FRAME_BYTES)
        .max_encoding_message_size(MAX_FRAME_BYTES);
    let admin = AdminServiceServer::new(admin::Service(context))
        .max_decoding_message_size(MAX_FRAME_BYTES)
        .max_encoding_message_size(MAX_FRAME_BYTES);
    reporter.set_service_status("", tonic_health::ServingStatus::Serving).await;
    reporter.set_serving::<PublisherServiceServer<publish::Service>>().await;
    reporter.set_serving::<SubscriberServiceServer<subscribe::Service>>().await;
    reporter.set_serving::<AdminServiceServer<admin::Service>>().await;
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    routes
        .add_service(health)
        .add_service(publisher)
        .add_service(subscriber)
        .add_service(admin)
        // Clients of both ages are about.
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?);
    Ok((routes.routes(), reporter))
}

/// Says NOT_SERVING to health checks.
pub(crate) async fn set_not_serving(reporter: &HealthReporter) {
    let status = tonic_health::ServingStatus::NotServing;
    reporter.set_service_status("", status).await;
    reporter.set_not_serving::<PublisherServiceServer<publish::Service>>().await;
    reporter.set_not_serving::<SubscriberServiceServer<subscribe::Service>>().await;
    reporter.set_not_serving::<AdminServiceServer<admin::Service>>().await;
}

/// Resolves when a signal turns true. A signal whose sender is gone stays as it was.
pub(crate) async fn turned(signal: &mut watch::Receiver<bool>) {
    if signal.wait_for(|on| *on).await.is_err() {
        std::future::pending().await
    }
}
