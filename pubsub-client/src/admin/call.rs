//! How a unary call is made.

use std::future::Future;
use std::time::Duration;

use pubsub_proto::v1::admin_service_client::AdminServiceClient;
use tokio::time::{Instant, timeout, timeout_at};
use tonic::transport::Channel;
use tonic::{Response, Status};

use super::Admin;
use crate::error::{AdminError, TransportError, Verdict};
use crate::liveness::after;

/// Whether a call whose connection failed is made once more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Again {
    /// It changes nothing the second time.
    Always,
    /// Only if the first one certainly did not reach the server.
    IfUnsent,
}

type Client = AdminServiceClient<Channel>;

impl Admin {
    /// Makes a call, and makes it again once if the connection turns out to be dead: a
    /// connection that a server closed while it was idle shows only when it is used.
    pub(super) async fn call<Q, R, F>(
        &self,
        again: Again,
        request: Q,
        call: impl Fn(Client, Q) -> F,
    ) -> Result<R, AdminError>
    where
        Q: Clone,
        F: Future<Output = Result<Response<R>, Status>>,
    {
        let deadline = after(Instant::now(), self.client.request_timeout);
        let left = || deadline.saturating_duration_since(Instant::now());
        match self.call_once(left(), request.clone(), &call).await {
            Err(AdminError::Unreachable { sent, .. })
                if (again == Again::Always || !sent) && !left().is_zero() =>
            {
                let second = self.call_once(left(), request, &call).await;
                if sent { second.map_err(unknown) } else { second }
            }
            result => result,
        }
    }

    pub(super) async fn call_once<Q, R, F>(
        &self,
        limit: Duration,
        request: Q,
        call: impl Fn(Client, Q) -> F,
    ) -> Result<R, AdminError>
    where
        F: Future<Output = Result<Response<R>, Status>>,
    {
        let deadline = after(Instant::now(), limit);
        let late = || TransportError::new(format!("no answer within {limit:?}"));
        let channel = timeout(limit, self.channel()).await;
        let channel = channel
            .map_err(|_| AdminError::Unreachable { source: late(), sent: false })?
            .map_err(|source| AdminError::Unreachable { source, sent: false })?;
        let client = AdminServiceClient::new(channel)
            .max_decoding_message_size(pubsub_proto::MAX_FRAME_BYTES)
            .max_encoding_message_size(pubsub_proto::MAX_FRAME_BYTES);
        let failure = match timeout_at(deadline, call(client, request)).await {
            Ok(Ok(response)) => {
                self.client.set_reachable();
                return Ok(response.into_inner());
            }
            Ok(Err(status)) => match Verdict::of(&status) {
                Verdict::Server(error) => return Err(AdminError::Refused(error)),
                Verdict::Foreign(answer) => TransportError::new(answer.to_string()),
                Verdict::Transport(source) => source,
            },
            Err(_) => late(),
        };
        // Whatever is wrong with this connection: the next call has another one.
        *self.client.unary.lock().await = None;
        Err(AdminError::Unreachable { source: failure, sent: true })
    }

    /// The shared connection, made if need be.
    async fn channel(&self) -> Result<Channel, TransportError> {
        let mut shared = self.client.unary.lock().await;
        if let Some(channel) = &*shared {
            return Ok(channel.clone());
        }
        let channel = self.client.dialer.dial().await?;
        *shared = Some(channel.clone());
        Ok(channel)
    }
}

/// The failure of a second attempt after a first one that the server may have carried out: unless
/// it is one that the first would have met, too, it says nothing about that.
fn unknown(error: AdminError) -> AdminError {
    let source = match error {
        AdminError::Unreachable { source, .. } => source,
        AdminError::Refused(error) if error.is_retryable() => {
            TransportError::new(error.to_string())
        }
        AdminError::Refused(_) | AdminError::Malformed(_) => return error,
    };
    AdminError::Unreachable { source, sent: true }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Outcome, Reason, ServerError};

    #[test]
    fn a_second_attempt_tells_the_outcome_only_by_what_the_first_would_have_met_too() {
        let refused = |reason| unknown(AdminError::Refused(ServerError::new(reason, "")));
        assert_eq!(refused(Reason::Unavailable).outcome(), Outcome::Unknown);
        assert_eq!(refused(Reason::InvalidArgument).outcome(), Outcome::NotPersisted);
        let source = TransportError::new("refused");
        let unreachable = unknown(AdminError::Unreachable { source, sent: false });
        assert_eq!(unreachable.outcome(), Outcome::Unknown);
    }
}
