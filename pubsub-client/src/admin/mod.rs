//! Topics, subscriptions, receipts and the state of the server.

mod call;
mod convert;
mod event_convert;
mod events;
mod lag;
mod schema;
mod types;

use std::sync::Arc;

use pubsub_proto::v1 as pb;

pub use self::events::{EventFilter, EventStream, Presence, ServerEvent, TimedEvent};
pub use self::lag::{HeadOfLine, WaitCause};
pub use self::schema::{
    Compatibility, InvalidPayload, PayloadRules, Schema, SchemaCheck, SchemaKind, SchemaProblem,
    SchemaRevision,
};
pub use self::types::{
    ActiveConsumer, CreateSubscription, DeadLetter, DeadLetters, Page, Purged, Receipt,
    ReceiptState, Redriven, ServerInfo, SnapshotInfo, SubscriptionInfo, SubscriptionPosition,
    TopicConfig, TopicInfo, UpdateSubscription, WhenFull,
};
use crate::client::Shared;
use crate::error::AdminError;
use crate::message::wire_duration;
use crate::subscriber::{Start, start_to_wire};

/// Administers a server; made by [`Client::admin`](crate::Client::admin). Cheap to clone.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let server = pubsub_server::Server::start(pubsub_server::Config::in_memory()).await?;
/// # let client = pubsub_client::Client::connect(server.url()).await?;
/// use std::time::Duration;
/// use pubsub_client::{CreateSubscription, ReceiptState, TopicConfig};
///
/// let admin = client.admin();
/// let config = TopicConfig::new().with_retention(Duration::from_secs(24 * 3600));
/// admin.create_topic("orders", config).await?;
/// admin.create_subscription("billing", CreateSubscription::to(["orders"])).await?;
///
/// let receipt = client.publisher("orders").open().await?.publish("an order").await?;
/// let id = receipt.id;
/// let receipts = admin.receipts(&*id.topic, Some(id.epoch), id.sequence, None).await?;
/// assert_eq!(receipts[0].state, ReceiptState::Pending);
/// # Ok(())
/// # }
/// ```
///
/// Each call either succeeds or fails within the client's
/// [request timeout](crate::ClientBuilder::request_timeout); nothing is retried for longer than
/// that. [`AdminError::outcome`] says whether a call that failed may have taken effect.
#[derive(Clone, Debug)]
pub struct Admin {
    client: Arc<Shared>,
}

impl Admin {
    pub(crate) fn new(client: Arc<Shared>) -> Self {
        Self { client }
    }

    /// Creates a topic. Subscriptions whose patterns match it have it from then on.
    ///
    /// # Errors
    ///
    /// The name or the settings are not valid, or a topic of this name exists
    /// ([`Reason::TopicExists`](crate::Reason::TopicExists)).
    pub async fn create_topic(
        &self,
        name: impl Into<String>,
        config: TopicConfig,
    ) -> Result<TopicInfo, AdminError> {
        Ok(self.new_topic(name.into(), config, false).await?.0)
    }

    /// Creates a topic unless one of this name exists, whatever its settings. Says whether it
    /// did.
    ///
    /// # Errors
    ///
    /// The name or the settings are not valid.
    pub async fn ensure_topic(
        &self,
        name: impl Into<String>,
        config: TopicConfig,
    ) -> Result<(TopicInfo, bool), AdminError> {
        self.new_topic(name.into(), config, true).await
    }

    async fn new_topic(
        &self,
        name: String,
        config: TopicConfig,
        if_not_exists: bool,
    ) -> Result<(TopicInfo, bool), AdminError> {
        let config = Some(convert::topic_config(&config));
        let request = pb::CreateTopicRequest { name, config, if_not_exists };
        let again = if if_not_exists { call::Again::Always } else { call::Again::IfUnsent };
        let response = self
            .call(again, request, |mut client, request| async move {
                client.create_topic(request).await
            })
            .await?;
        Ok((convert::topic(response.topic)?, response.created))
    }

    /// Describes a topic.
    ///
    /// # Errors
    ///
    /// There is no such topic ([`Reason::TopicNotFound`](crate::Reason::TopicNotFound)).
    pub async fn topic(&self, name: impl Into<String>) -> Result<TopicInfo, AdminError> {
        let request = pb::GetTopicRequest { name: name.into() };
        let response = self
            .call(call::Again::Always, request, |mut client, request| async move {
                client.get_topic(request).await
            })
            .await?;
        convert::topic(response.topic)
    }

    /// Lists topics by name, from the first page (`None`) or the one after another.
    ///
    /// # Errors
    ///
    /// The server cannot be reached.
    pub async fn topics(&self, after: Option<String>) -> Result<Page<TopicInfo>, AdminError> {
        let request = pb::ListTopicsRequest { page_size: 0, page_token: after.unwrap_or_default() };
        let response = self
            .call(call::Again::Always, request, |mut client, request| async move {
                client.list_topics(request).await
            })
            .await?;
        let items = response.topics.into_iter().map(|topic| convert::topic(Some(topic)));
        Ok(Page::new(items.collect::<Result<_, _>>()?, response.next_page_token))
    }

    /// Changes settings of a topic; what is not set stays as it is. Publishers that are connected
    /// learn of another limit when they connect again.
    ///
    /// # Errors
    ///
    /// There is no such topic, or a setting is not valid.
    pub async fn update_topic(
        &self,
        name: impl Into<String>,
        config: TopicConfig,
    ) -> Result<TopicInfo, AdminError> {
        let config = Some(convert::topic_config(&config));
        let request = pb::UpdateTopicRequest { name: name.into(), config };
        let response = self
            .call(call::Again::Always, request, |mut client, request| async move {
                client.update_topic(request).await
            })
            .await?;
        convert::topic(response.topic)
    }

    /// Removes the messages of a topic before this sequence, or all that there are, whoever has
    /// not received them: subscribers are told by a [`Gap`](crate::Gap). Says how many that were.
    ///
    /// # Errors
    ///
    /// There is no such topic, or the sequence lies beyond its head.
    pub async fn purge_topic(
        &self,
        name: impl Into<String>,
        before: Option<u64>,
    ) -> Result<u64, AdminError> {
        let before = before.map_or(0, |before| before.max(1));
        let request = pb::PurgeTopicRequest { name: name.into(), before };
        let response = self
            .call(call::Again::IfUnsent, request, |mut client, request| async move {
                client.purge_topic(request).await
            })
            .await?;
        Ok(response.purged)
    }

    /// Deletes a topic and all its messages. Subscribers are told by a gap.
    ///
    /// # Errors
    ///
    /// There is no such topic.
    pub async fn delete_topic(&self, name: impl Into<String>) -> Result<(), AdminError> {
        let request = pb::DeleteTopicRequest { name: name.into() };
        self.call(call::Again::IfUnsent, request, |mut client, request| async move {
            client.delete_topic(request).await
        })
        .await?;
        Ok(())
    }

    /// Creates a subscription without consuming from it: from now on its messages are kept. Says
    /// whether it was created, rather than found with the same settings.
    ///
    /// # Errors
    ///
    /// A name is not valid, there is no such topic, or a subscription of this name exists
    /// ([`Reason::SubscriptionExists`](crate::Reason::SubscriptionExists), or
    /// [`Reason::SubscriptionMismatch`](crate::Reason::SubscriptionMismatch) if an existing one
    /// was allowed).
    pub async fn create_subscription(
        &self,
        name: impl Into<String>,
        settings: CreateSubscription,
    ) -> Result<(SubscriptionInfo, bool), AdminError> {
        let request = convert::create_subscription(name.into(), settings);
        let again = if request.if_not_exists { call::Again::Always } else { call::Again::IfUnsent };
        let response = self
            .call(again, request, |mut client, request| async move {
                client.create_subscription(request).await
            })
            .await?;
        Ok((convert::subscription(response.subscription)?, response.created))
    }

    /// Describes a subscription: its consumers, positions and backlog.
    ///
    /// # Errors
    ///
    /// There is no such subscription
    /// ([`Reason::SubscriptionNotFound`](crate::Reason::SubscriptionNotFound)).
    pub async fn subscription(
        &self,
        name: impl Into<String>,
    ) -> Result<SubscriptionInfo, AdminError> {
        let request = pb::GetSubscriptionRequest { name: name.into() };
        let response = self
            .call(call::Again::Always, request, |mut client, request| async move {
                client.get_subscription(request).await
            })
            .await?;
        convert::subscription(response.subscription)
    }

    /// Lists subscriptions by name, from the first page (`None`) or the one after another.
    ///
    /// # Errors
    ///
    /// The server cannot be reached.
    pub async fn subscriptions(
        &self,
        after: Option<String>,
    ) -> Result<Page<SubscriptionInfo>, AdminError> {
        let request =
            pb::ListSubscriptionsRequest { page_size: 0, page_token: after.unwrap_or_default() };
        let response = self
            .call(call::Again::Always, request, |mut client, request| async move {
                client.list_subscriptions(request).await
            })
            .await?;
        let items = response.subscriptions.into_iter();
        let items = items.map(|subscription| convert::subscription(Some(subscription)));
        Ok(Page::new(items.collect::<Result<_, _>>()?, response.next_page_token))
    }

    /// Deletes a subscription. Its subscribers end with
    /// [`Reason::SubscriptionDeleted`](crate::Reason::SubscriptionDeleted).
    ///
    /// # Errors
    ///
    /// There is no such subscription.
    pub async fn delete_subscription(&self, name: impl Into<String>) -> Result<(), AdminError> {
        let request = pb::DeleteSubscriptionRequest { name: name.into() };
        self.call(call::Again::IfUnsent, request, |mut client, request| async move {
            client.delete_subscription(request).await
        })
        .await?;
        Ok(())
    }

    /// Adds and removes topics of a subscription. Its subscribers follow at once, and need not be
    /// opened anew; one that is opened later has to name the topics as they are by then, or none.
    ///
    /// What was delivered of a topic that is removed is still shown, and its acks mean nothing.
    ///
    /// # Errors
    ///
    /// There is no such subscription or topic, it does not listen to what is to be removed, or
    /// would listen to nothing ([`Reason::InvalidArgument`](crate::Reason::InvalidArgument)).
    pub async fn update_subscription(
        &self,
        name: impl Into<String>,
        change: UpdateSubscription,
    ) -> Result<SubscriptionInfo, AdminError> {
        let request = pb::UpdateSubscriptionRequest {
            name: name.into(),
            add_topics: change.add_topics,
            remove_topics: change.remove_topics,
            start: Some(start_to_wire(change.start)),
        };
        let response = self
            .call(call::Again::IfUnsent, request, |mut client, request| async move {
                client.update_subscription(request).await
            })
            .await?;
        convert::subscription(response.subscription)
    }

    /// Moves a subscription to another position, in one topic or in all. Its subscriber follows
    /// at once; acks of what it was delivered before are ignored.
    ///
    /// # Errors
    ///
    /// There is no such subscription or topic, or the position is beyond the topic's head
    /// ([`Reason::BeyondHead`](crate::Reason::BeyondHead)).
    pub async fn seek(
        &self,
        subscription: impl Into<String>,
        topic: Option<&str>,
        to: Start,
    ) -> Result<SubscriptionInfo, AdminError> {
        let request = pb::SeekSubscriptionRequest {
            name: subscription.into(),
            topic: topic.unwrap_or_default().to_owned(),
            to: Some(start_to_wire(to)),
            snapshot: String::new(),
        };
        self.seek_as(request).await
    }

    /// Moves a subscription to a [snapshot](Self::create_snapshot), of its own position or of that
    /// of another subscription, in the topics that both have: what was unacked then is shown, and
    /// what was acked then is not. Its subscriber follows at once.
    ///
    /// # Errors
    ///
    /// There is no such subscription or snapshot
    /// ([`Reason::SnapshotNotFound`](crate::Reason::SnapshotNotFound)), or they have no topic in
    /// common.
    pub async fn seek_to_snapshot(
        &self,
        subscription: impl Into<String>,
        snapshot: impl Into<String>,
    ) -> Result<SubscriptionInfo, AdminError> {
        let request = pb::SeekSubscriptionRequest {
            name: subscription.into(),
            snapshot: snapshot.into(),
            ..pb::SeekSubscriptionRequest::default()
        };
        self.seek_as(request).await
    }

    async fn seek_as(
        &self,
        request: pb::SeekSubscriptionRequest,
    ) -> Result<SubscriptionInfo, AdminError> {
        let response = self
            .call(call::Again::IfUnsent, request, |mut client, request| async move {
                client.seek_subscription(request).await
            })
            .await?;
        convert::subscription(response.subscription)
    }

    /// Keeps the position of a subscription under a name: what it has acked, and what not. The
    /// messages that going back to it would show are kept as long as it is there, whatever the
    /// retention of their topics.
    ///
    /// # Errors
    ///
    /// There is no such subscription, or a snapshot of this name
    /// ([`Reason::SnapshotExists`](crate::Reason::SnapshotExists)).
    pub async fn create_snapshot(
        &self,
        name: impl Into<String>,
        subscription: impl Into<String>,
    ) -> Result<SnapshotInfo, AdminError> {
        let (name, subscription) = (name.into(), subscription.into());
        let request = pb::CreateSnapshotRequest { name, subscription };
        let response = self
            .call(call::Again::IfUnsent, request, |mut client, request| async move {
                client.create_snapshot(request).await
            })
            .await?;
        convert::snapshot(response.snapshot)
    }

    /// Lists snapshots by name, from the first page (`None`) or the one after another.
    ///
    /// # Errors
    ///
    /// The server cannot be reached.
    pub async fn snapshots(&self, after: Option<String>) -> Result<Page<SnapshotInfo>, AdminError> {
        let page_token = after.unwrap_or_default();
        let request = pb::ListSnapshotsRequest { page_size: 0, page_token };
        let response = self
            .call(call::Again::Always, request, |mut client, request| async move {
                client.list_snapshots(request).await
            })
            .await?;
        let items =
            response.snapshots.into_iter().map(|snapshot| convert::snapshot(Some(snapshot)));
        Ok(Page::new(items.collect::<Result<_, _>>()?, response.next_page_token))
    }

    /// Deletes a snapshot. The messages that were kept for it can go.
    ///
    /// # Errors
    ///
    /// There is no such snapshot.
    pub async fn delete_snapshot(&self, name: impl Into<String>) -> Result<(), AdminError> {
        let request = pb::DeleteSnapshotRequest { name: name.into() };
        self.call(call::Again::IfUnsent, request, |mut client, request| async move {
            client.delete_snapshot(request).await
        })
        .await?;
        Ok(())
    }

    /// Lists the dead letters of a subscription that wait to be redriven or purged, the oldest
    /// first, from the first page (`None`) or the one after another.
    ///
    /// # Errors
    ///
    /// There is no such subscription, or it has no dead-letter topic
    /// ([`Reason::InvalidArgument`](crate::Reason::InvalidArgument)).
    pub async fn dead_letters(
        &self,
        subscription: impl Into<String>,
        after: Option<String>,
    ) -> Result<Page<DeadLetter>, AdminError> {
        self.dead_letters_matching(subscription, "", after).await
    }

    /// As [`dead_letters`](Self::dead_letters), but only those whose attributes match, in the
    /// language of [`SubscriberBuilder::filter`](crate::SubscriberBuilder::filter).
    ///
    /// # Errors
    ///
    /// As there, and if the text is no filter.
    pub async fn dead_letters_matching(
        &self,
        subscription: impl Into<String>,
        filter: impl Into<String>,
        after: Option<String>,
    ) -> Result<Page<DeadLetter>, AdminError> {
        let request = pb::ListDeadLettersRequest {
            subscription: subscription.into(),
            page_size: 0,
            page_token: after.unwrap_or_default(),
            filter: filter.into(),
        };
        let response = self
            .call(call::Again::Always, request, |mut client, request| async move {
                client.list_dead_letters(request).await
            })
            .await?;
        let items = response.dead_letters.into_iter().map(convert::dead_letter);
        Ok(Page::new(items.collect::<Result<_, _>>()?, response.next_page_token))
    }

    /// Sends dead letters back to the topics that they come from, at their tails. They are
    /// received by the subscription that could not process them, and no other.
    ///
    /// Each dead letter is sent back once, however often that is asked: a call that failed can be
    /// made again. One that fails again becomes a new dead letter.
    ///
    /// # Errors
    ///
    /// There is no such subscription, it has no dead-letter topic, or a topic is full
    /// ([`Reason::TopicFull`](crate::Reason::TopicFull)).
    pub async fn redrive(
        &self,
        subscription: impl Into<String>,
        which: DeadLetters,
    ) -> Result<Redriven, AdminError> {
        let (sequences, max_messages, filter) = convert::dead_letters(which);
        let subscription = subscription.into();
        let request =
            pb::RedriveDeadLettersRequest { subscription, sequences, max_messages, filter };
        let response = self
            .call(call::Again::IfUnsent, request, |mut client, request| async move {
                client.redrive_dead_letters(request).await
            })
            .await?;
        let pb::RedriveDeadLettersResponse { redriven, homeless, left } = response;
        Ok(Redriven { redriven, homeless, left })
    }

    /// Lets dead letters go, for good. Their copies stay in the dead-letter topic as long as its
    /// retention says.
    ///
    /// # Errors
    ///
    /// There is no such subscription, or it has no dead-letter topic.
    pub async fn purge_dead_letters(
        &self,
        subscription: impl Into<String>,
        which: DeadLetters,
    ) -> Result<Purged, AdminError> {
        let (sequences, max_messages, filter) = convert::dead_letters(which);
        let subscription = subscription.into();
        let request = pb::PurgeDeadLettersRequest { subscription, sequences, max_messages, filter };
        let response = self
            .call(call::Again::IfUnsent, request, |mut client, request| async move {
                client.purge_dead_letters(request).await
            })
            .await?;
        let pb::PurgeDeadLettersResponse { purged, left } = response;
        Ok(Purged { purged, left })
    }

    /// Tells which subscriptions have received a message: all that listen to the topic, or one.
    ///
    /// `epoch` is that of the message's id; without it the topic's present epoch is meant.
    ///
    /// # Errors
    ///
    /// There is no such topic or subscription, or the topic has no such message yet.
    pub async fn receipts(
        &self,
        topic: impl Into<String>,
        epoch: Option<u64>,
        sequence: u64,
        subscription: Option<&str>,
    ) -> Result<Vec<Receipt>, AdminError> {
        let request = pb::GetReceiptsRequest {
            topic: topic.into(),
            epoch: epoch.unwrap_or(0),
            sequence,
            subscription: subscription.unwrap_or_default().to_owned(),
        };
        let response = self
            .call(call::Again::Always, request, |mut client, request| async move {
                client.get_receipts(request).await
            })
            .await?;
        response.receipts.into_iter().map(convert::receipt).collect()
    }

    /// Describes the server.
    ///
    /// # Errors
    ///
    /// The server cannot be reached.
    pub async fn server(&self) -> Result<ServerInfo, AdminError> {
        let request = pb::GetServerRequest {};
        let response = self
            .call(call::Again::Always, request, |mut client, request| async move {
                client.get_server(request).await
            })
            .await?;
        Ok(convert::server(response))
    }

    /// Checks that a pubsub server answers, within the time of a handshake.
    pub(crate) async fn probe(&self) -> Result<(), AdminError> {
        let limit = self.client.dialer.handshake_timeout();
        let request = pb::GetServerRequest {};
        self.call_once(limit, request, |mut client, request| async move {
            client.get_server(request).await
        })
        .await?;
        Ok(())
    }
}

/// Absent for a duration that the wire cannot carry: then the server's default holds.
fn optional(duration: Option<std::time::Duration>) -> Option<prost_types::Duration> {
    duration.and_then(wire_duration)
}
