//! The administration of a server, without the SDK.

use anyhow::{Context as _, Result};
use pubsub_proto::v1::{
    CreateSubscriptionRequest, CreateTopicRequest, DeleteTopicRequest, Earliest,
    GetReceiptsRequest, GetSubscriptionRequest, GetTopicRequest, Receipt, StartPosition,
    Subscription, SubscriptionKind, Topic, TopicConfig, start_position::Position,
};
use tonic::transport::Channel;

use crate::raw;

/// Before the first message that is stored.
pub fn earliest() -> Option<StartPosition> {
    Some(StartPosition { position: Some(Position::Earliest(Earliest {})) })
}

/// Creates a topic with default settings.
///
/// # Errors
///
/// The server's.
pub async fn create_topic(channel: &Channel, name: &str) -> Result<Topic> {
    create_topic_with(channel, name, TopicConfig::default()).await
}

/// Creates a topic.
///
/// # Errors
///
/// The server's.
pub async fn create_topic_with(
    channel: &Channel,
    name: &str,
    config: TopicConfig,
) -> Result<Topic> {
    let request =
        CreateTopicRequest { name: name.into(), config: Some(config), if_not_exists: false };
    let answer = raw::admin(channel).create_topic(request).await?;
    answer.into_inner().topic.context("an answer without a topic")
}

/// Describes a topic.
///
/// # Errors
///
/// The server's; if there is none.
pub async fn topic(channel: &Channel, name: &str) -> Result<Topic> {
    let request = GetTopicRequest { name: name.into() };
    let answer = raw::admin(channel).get_topic(request).await?;
    answer.into_inner().topic.context("an answer without a topic")
}

/// Deletes a topic.
///
/// # Errors
///
/// The server's.
pub async fn delete_topic(channel: &Channel, name: &str) -> Result<()> {
    let request = DeleteTopicRequest { name: name.into() };
    raw::admin(channel).delete_topic(request).await?;
    Ok(())
}

/// Creates a subscription of kind `exclusive` that starts at the first message.
///
/// # Errors
///
/// The server's.
pub async fn create_subscription(channel: &Channel, name: &str, topics: &[&str]) -> Result<()> {
    let request = CreateSubscriptionRequest {
        name: name.into(),
        topics: topics.iter().copied().map(Into::into).collect(),
        kind: SubscriptionKind::Exclusive.into(),
        start: earliest(),
        if_not_exists: false,
        on_failure: None,
        ack_timeout: None,
        expires_after: None,
        filter: String::new(),
    };
    raw::admin(channel).create_subscription(request).await?;
    Ok(())
}

/// Describes a subscription.
///
/// # Errors
///
/// The server's; if there is none.
pub async fn subscription(channel: &Channel, name: &str) -> Result<Subscription> {
    let request = GetSubscriptionRequest { name: name.into() };
    let answer = raw::admin(channel).get_subscription(request).await?;
    let subscription = answer.into_inner().subscription;
    subscription.context("an answer without a subscription")
}

/// The receipts of a message: of one subscription, or of all if the name is empty.
///
/// # Errors
///
/// The server's.
pub async fn receipts(
    channel: &Channel,
    topic: &Topic,
    sequence: u64,
    subscription: &str,
) -> Result<Vec<Receipt>> {
    let request = GetReceiptsRequest {
        topic: topic.name.clone(),
        epoch: topic.epoch,
        sequence,
        subscription: subscription.into(),
    };
    let answer = raw::admin(channel).get_receipts(request).await?;
    Ok(answer.into_inner().receipts)
}
