//! The one place that makes a `tonic::Status`: a code for proxies, and for the client a reason
//! from the closed list of the protocol.

use std::collections::HashMap;

use pubsub_proto::ERROR_DOMAIN;
use pubsub_proto::v1::ErrorReason;
use tonic::{Code as GrpcCode, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::broker::{BrokerError, Code};
use crate::storage::RefusalReason;

/// The status of an error.
pub(super) fn status(error: &BrokerError) -> Status {
    let reason = reason(error.code());
    let metadata: HashMap<_, _> =
        error.metadata().into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    let name = reason_name(reason);
    let mut details = ErrorDetails::with_error_info(name, ERROR_DOMAIN, metadata);
    if let Some(delay) = error.retry_after() {
        details.set_retry_info(Some(delay));
    }
    Status::with_error_details(grpc_code(error.code()), error.to_string(), details)
}

/// The status of a malformed request.
pub(super) fn invalid(text: impl Into<String>) -> Status {
    status(&BrokerError::Invalid(text.into()))
}

/// The status of a frame that has no place where it came.
pub(super) fn protocol(text: impl Into<String>) -> Status {
    status(&BrokerError::Protocol(text.into()))
}

/// The status of a client that speaks another version.
pub(super) fn unsupported(version: u32) -> Status {
    let name = reason_name(ErrorReason::UnsupportedProtocol);
    let details = ErrorDetails::with_error_info(name, ERROR_DOMAIN, HashMap::new());
    let supported = pubsub_proto::PROTOCOL_VERSION;
    let text = format!("protocol version {version} is not supported; this server has {supported}");
    Status::with_error_details(GrpcCode::FailedPrecondition, text, details)
}

/// A reason's name on the wire.
fn reason_name(reason: ErrorReason) -> &'static str {
    reason.as_str_name().trim_start_matches("ERROR_REASON_")
}

/// The wire's reason for refusing a message.
pub(super) fn refusal_reason(reason: RefusalReason) -> ErrorReason {
    match reason {
        RefusalReason::Invalid => ErrorReason::InvalidArgument,
        RefusalReason::TooLarge => ErrorReason::MessageTooLarge,
        RefusalReason::UnknownRecipient => ErrorReason::UnknownRecipient,
        RefusalReason::KeyReused => ErrorReason::IdempotencyKeyReused,
        RefusalReason::Schema => ErrorReason::SchemaViolation,
        RefusalReason::ContentType => ErrorReason::ContentTypeMismatch,
        RefusalReason::HeadMismatch => ErrorReason::HeadMismatch,
    }
}

/// The wire's reason for an error.
pub(super) fn reason(code: Code) -> ErrorReason {
    match code {
        Code::Invalid => ErrorReason::InvalidArgument,
        Code::Protocol => ErrorReason::ProtocolViolation,
        Code::TopicNotFound => ErrorReason::TopicNotFound,
        Code::TopicExists => ErrorReason::TopicExists,
        Code::TopicInUse => ErrorReason::TopicInUse,
        Code::TopicRecreated => ErrorReason::TopicRecreated,
        Code::SubscriptionNotFound => ErrorReason::SubscriptionNotFound,
        Code::SubscriptionExists => ErrorReason::SubscriptionExists,
        Code::SubscriptionMismatch => ErrorReason::SubscriptionMismatch,
        Code::SubscriptionDeleted => ErrorReason::SubscriptionDeleted,
        Code::SnapshotNotFound => ErrorReason::SnapshotNotFound,
        Code::SnapshotExists => ErrorReason::SnapshotExists,
        Code::Superseded => ErrorReason::Superseded,
        Code::SubscriptionBusy => ErrorReason::SubscriptionBusy,
        Code::Fenced => ErrorReason::Fenced,
        Code::OutOfOrder => ErrorReason::OutOfOrder,
        Code::ResultExpired => ErrorReason::ResultExpired,
        Code::LimitReached => ErrorReason::LimitReached,
        Code::TopicFull => ErrorReason::TopicFull,
        Code::DiskFull => ErrorReason::DiskFull,
        Code::Diverged => ErrorReason::Diverged,
        Code::DataLoss => ErrorReason::DataLoss,
        Code::Unavailable => ErrorReason::Unavailable,
        Code::CommitUnknown => ErrorReason::CommitUnknown,
        Code::BeyondHead => ErrorReason::BeyondHead,
        Code::SchemaIncompatible => ErrorReason::SchemaIncompatible,
    }
}

fn grpc_code(code: Code) -> GrpcCode {
    match code {
        Code::Invalid | Code::Protocol => GrpcCode::InvalidArgument,
        Code::TopicNotFound | Code::SubscriptionNotFound | Code::SnapshotNotFound => {
            GrpcCode::NotFound
        }
        Code::TopicExists | Code::SubscriptionExists | Code::SnapshotExists => {
            GrpcCode::AlreadyExists
        }
        Code::BeyondHead => GrpcCode::OutOfRange,
        Code::TopicRecreated
        | Code::TopicInUse
        | Code::SubscriptionMismatch
        | Code::SubscriptionDeleted
        | Code::SubscriptionBusy
        | Code::OutOfOrder
        | Code::ResultExpired
        | Code::SchemaIncompatible
        | Code::Diverged => GrpcCode::FailedPrecondition,
        Code::Superseded | Code::Fenced => GrpcCode::Aborted,
        Code::LimitReached | Code::TopicFull | Code::DiskFull => GrpcCode::ResourceExhausted,
        Code::DataLoss => GrpcCode::DataLoss,
        Code::Unavailable | Code::CommitUnknown => GrpcCode::Unavailable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_carries_its_reason_its_metadata_and_a_delay() {
        let error = BrokerError::LimitReached { what: "topics", limit: 7 };
        let status = status(&error);
        let info = status.get_details_error_info().unwrap();
        assert_eq!((info.reason.as_str(), info.domain.as_str()), ("LIMIT_REACHED", ERROR_DOMAIN));
        assert_eq!(info.metadata["limit"], "topics");
        assert!(status.get_details_retry_info().unwrap().retry_delay.is_some());
    }
}
