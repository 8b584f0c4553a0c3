//! Every malformed or oversized input gives a typed error, and harms nobody else.

mod calls;
mod consuming;
mod publishing;

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use pubsub_tests::admin;
use tonic::transport::Channel;

const WITHIN: Duration = Duration::from_secs(90);
const TOPIC: &str = "orders";
const SUBSCRIPTION: &str = "billing";

/// What was wrong, with what was expected and what came.
#[derive(Default)]
struct Findings(Vec<String>);

impl Findings {
    /// `expected` has the acceptable reasons, separated by bars.
    fn expect(&mut self, what: &str, expected: &str, found: Result<String>) {
        match found {
            Ok(reason) if expected.split('|').any(|one| one == reason) => {}
            Ok(reason) => self.0.push(format!("{what}: {reason} instead of {expected}")),
            Err(error) => self.0.push(format!("{what}: {error:#} instead of {expected}")),
        }
    }

    async fn verdict(self, channel: &Channel) -> Result<()> {
        ensure!(self.0.is_empty(), "\n{}", self.0.join("\n"));
        admin::topic(channel, TOPIC).await.context("the server serves on")?;
        Ok(())
    }
}

async fn prepared(channel: &Channel) -> Result<()> {
    admin::create_topic(channel, TOPIC).await?;
    admin::create_subscription(channel, SUBSCRIPTION, &[TOPIC]).await
}

fn at_most(characters: usize) -> String {
    "x".repeat(characters)
}
