//! What becomes of messages that fail, as it is said on the command line.

use std::time::Duration;

use clap::Args;
use pubsub_client::FailurePolicy;

use crate::failure::Failure;

/// What becomes of messages that fail.
#[derive(Debug, Args)]
pub(crate) struct Failures {
    /// Move a message that has failed too often to this topic, which must exist
    /// [default: show it again until it is acked]
    #[arg(long, value_name = "TOPIC", conflicts_with = "skip")]
    dead_letter: Option<String>,
    /// Let a message go that has failed too often
    #[arg(long)]
    skip: bool,
    /// How often a message is shown before, 1 to 1000 [default: 5]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    max_attempts: Option<u32>,
    /// How long a handler may have a message before it counts as failed, 1s to 24h
    /// [default: no limit]
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub(crate) ack_timeout: Option<Duration>,
}

impl Failures {
    /// Whether something was asked for.
    pub(crate) fn is_any(&self) -> bool {
        let Self { dead_letter, skip, max_attempts, ack_timeout } = self;
        dead_letter.is_some() || *skip || max_attempts.is_some() || ack_timeout.is_some()
    }

    /// What was asked for.
    pub(crate) fn policy(&self) -> Result<Option<FailurePolicy>, Failure> {
        let policy = match &self.dead_letter {
            Some(topic) => FailurePolicy::dead_letter(topic),
            None if self.skip => FailurePolicy::skip(),
            None if self.max_attempts.is_some() => {
                let text = "--max-attempts says when; --dead-letter TOPIC or --skip says what then";
                return Err(Failure::usage(text));
            }
            None => return Ok(None),
        };
        Ok(Some(match self.max_attempts {
            Some(attempts) => policy.after(attempts),
            None => policy,
        }))
    }
}
