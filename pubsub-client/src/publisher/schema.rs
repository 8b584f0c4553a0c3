//! The schema that a publisher was written for, and that of its topic.

use std::sync::Arc;

use tokio::time::sleep;

use super::Publisher;
use crate::admin::{Admin, Compatibility, Schema};
use crate::client::Shared;
use crate::error::{AdminError, Outcome, PublishError, PublishErrorKind, Reason};
use crate::retry::Backoff;

/// What a publisher does about the schema that it was written for.
#[derive(Clone, Debug)]
pub(super) struct Written {
    pub(super) schema: Schema,
    /// Whether the topic gets it if it does not have it yet.
    pub(super) register: bool,
}

impl Written {
    /// Makes sure that what this publisher is going to publish is taken. While the server is away
    /// this waits, without limit.
    pub(super) async fn settle(
        &self,
        client: &Arc<Shared>,
        publisher: &Publisher,
    ) -> Result<(), PublishError> {
        let admin = Admin::new(Arc::clone(client));
        let mut backoff = Backoff::new(client.retry, Arc::clone(&client.env));
        loop {
            let error = match self.attempt(&admin, publisher.topic()).await {
                Ok(settled) => return settled,
                Err(error) if is_passing(&error) => error,
                Err(error) => return Err(refused(error)),
            };
            tracing::warn!(topic = publisher.topic(), %error, "the schema is not checked yet");
            sleep(backoff.next_delay(None)).await;
        }
    }

    async fn attempt(
        &self,
        admin: &Admin,
        topic: &str,
    ) -> Result<Result<(), PublishError>, AdminError> {
        let rules = || self.schema.clone().into();
        let check = admin.check_schema(topic, Some(rules()), Vec::new()).await?;
        let known = check.matching_revision.is_some();
        if self.register && !known {
            admin.set_schema(topic, rules(), Compatibility::Backward).await?;
            return Ok(Ok(()));
        }
        let taken = check.current_revision.is_some() && check.publisher_problems.is_empty();
        Ok(if taken {
            Ok(())
        } else {
            let (revision, problems) = (check.current_revision, check.publisher_problems);
            let kind = PublishErrorKind::SchemaMismatch { revision, problems };
            Err(PublishError::new(kind, Outcome::NotPersisted))
        })
    }
}

/// Whether it goes by itself, as a limit that is reached does not.
fn is_passing(error: &AdminError) -> bool {
    let reason = error.reason();
    reason.is_none_or(|reason| matches!(reason, Reason::Unavailable | Reason::CommitUnknown))
        && error.is_retryable()
}

fn refused(error: AdminError) -> PublishError {
    let kind = match error {
        AdminError::Refused(error) => PublishErrorKind::Session(error),
        AdminError::Unreachable { source, .. } => PublishErrorKind::Protocol(source.to_string()),
        AdminError::Malformed(detail) => PublishErrorKind::Protocol(detail),
    };
    PublishError::new(kind, Outcome::NotPersisted)
}
