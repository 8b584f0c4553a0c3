//! Administration: topics, subscriptions, receipts, the server.

use std::sync::atomic::Ordering;

use pubsub_proto::v1::admin_service_server::AdminService;
use pubsub_proto::v1::{
    self, CheckSchemaRequest, CheckSchemaResponse, CreateSnapshotRequest, CreateSnapshotResponse,
    CreateSubscriptionRequest, CreateSubscriptionResponse, CreateTopicRequest, CreateTopicResponse,
    DeleteSnapshotRequest, DeleteSnapshotResponse, DeleteSubscriptionRequest,
    DeleteSubscriptionResponse, DeleteTopicRequest, DeleteTopicResponse, GetReceiptsRequest,
    GetReceiptsResponse, GetSchemaRequest, GetSchemaResponse, GetServerRequest, GetServerResponse,
    GetSubscriptionRequest, GetSubscriptionResponse, GetTopicRequest, GetTopicResponse,
    ListDeadLettersRequest, ListDeadLettersResponse, ListSchemasRequest, ListSchemasResponse,
    ListSnapshotsRequest, ListSnapshotsResponse, ListSubscriptionsRequest,
    ListSubscriptionsResponse, ListTopicsRequest, ListTopicsResponse, PurgeDeadLettersRequest,
    PurgeDeadLettersResponse, PurgeTopicRequest, PurgeTopicResponse, RedriveDeadLettersRequest,
    RedriveDeadLettersResponse, SeekSubscriptionRequest, SeekSubscriptionResponse,
    SetSchemaRequest, SetSchemaResponse, UpdateTopicRequest, UpdateTopicResponse,
    WatchEventsRequest, WatchEventsResponse,
};
use tonic::{Request, Response, Status};

use super::status::{invalid, status};
use super::stream::Outbound;
use super::{Context, convert, describe, events, schema};
use crate::broker::{BrokerError, NewSubscription, Relisten};
use crate::record::TopicConfig;
use crate::storage::Health;

/// The admin service.
#[derive(Debug)]
pub(crate) struct Service(pub(super) Context);

/// Entries of one page.
const MAX_PAGE: u32 = 1000;
const DEFAULT_PAGE: u32 = 100;

fn page(size: u32) -> usize {
    let size = if size == 0 { DEFAULT_PAGE } else { size.min(MAX_PAGE) };
    usize::try_from(size).unwrap_or(usize::MAX)
}

/// The token of the next page is the last name of this one, if this one is full.
fn next_page<T>(entries: &[T], limit: usize, name: impl Fn(&T) -> String) -> String {
    entries.last().filter(|_| entries.len() == limit).map(name).unwrap_or_default()
}

fn refuse(error: BrokerError) -> Status {
    status(&error)
}

#[tonic::async_trait]
impl AdminService for Service {
    type WatchEventsStream = Outbound<WatchEventsResponse>;

    async fn create_topic(
        &self,
        request: Request<CreateTopicRequest>,
    ) -> Result<Response<CreateTopicResponse>, Status> {
        let request = request.into_inner();
        let name = convert::parse_topic(&request.name)?;
        let config = describe::parse_config(request.config)?(TopicConfig::default());
        let create = self.0.broker.create_topic(name, config, request.if_not_exists);
        let (info, created) = create.await.map_err(refuse)?;
        Ok(Response::new(CreateTopicResponse { topic: Some(describe::topic(info)), created }))
    }

    async fn get_topic(
        &self,
        request: Request<GetTopicRequest>,
    ) -> Result<Response<GetTopicResponse>, Status> {
        let name = convert::parse_topic(&request.into_inner().name)?;
        let info = self.0.broker.get_topic(&name).map_err(refuse)?;
        Ok(Response::new(GetTopicResponse { topic: Some(describe::topic(info)) }))
    }

    async fn list_topics(
        &self,
        request: Request<ListTopicsRequest>,
    ) -> Result<Response<ListTopicsResponse>, Status> {
        let request = request.into_inner();
        let after = match request.page_token.as_str() {
            "" => None,
            token => Some(convert::parse_topic(token)?),
        };
        let limit = page(request.page_size);
        let topics = self.0.broker.list_topics(after.as_ref(), limit);
        let next_page_token = next_page(&topics, limit, |info| info.record.name.to_string());
        let topics = topics.into_iter().map(describe::topic).collect();
        Ok(Response::new(ListTopicsResponse { topics, next_page_token }))
    }

    async fn delete_topic(
        &self,
        request: Request<DeleteTopicRequest>,
    ) -> Result<Response<DeleteTopicResponse>, Status> {
        let name = convert::parse_topic(&request.into_inner().name)?;
        self.0.broker.delete_topic(name).await.map_err(refuse)?;
        Ok(Response::new(DeleteTopicResponse {}))
    }

    async fn update_topic(
        &self,
        request: Request<UpdateTopicRequest>,
    ) -> Result<Response<UpdateTopicResponse>, Status> {
        let request = request.into_inner();
        let name = convert::parse_topic(&request.name)?;
        let change = describe::parse_config(request.config)?;
        let info = self.0.broker.update_topic(name, change).await.map_err(refuse)?;
        Ok(Response::new(UpdateTopicResponse { topic: Some(describe::topic(info)) }))
    }

    async fn purge_topic(
        &self,
        request: Request<PurgeTopicRequest>,
    ) -> Result<Response<PurgeTopicResponse>, Status> {
        let request = request.into_inner();
        let name = convert::parse_topic(&request.name)?;
        let below = (request.before != 0).then_some(request.before);
        let (info, purged) = self.0.broker.purge(name, below).await.map_err(refuse)?;
        Ok(Response::new(PurgeTopicResponse { topic: Some(describe::topic(info)), purged }))
    }

    async fn set_schema(
        &self,
        request: Request<SetSchemaRequest>,
    ) -> Result<Response<SetSchemaResponse>, Status> {
        schema::set(&self.0.broker, request.into_inner()).await.map(Response::new)
    }

    async fn get_schema(
        &self,
        request: Request<GetSchemaRequest>,
    ) -> Result<Response<GetSchemaResponse>, Status> {
        schema::get(&self.0.broker, &request.into_inner()).map(Response::new)
    }

    async fn list_schemas(
        &self,
        request: Request<ListSchemasRequest>,
    ) -> Result<Response<ListSchemasResponse>, Status> {
        schema::list(&self.0.broker, &request.into_inner()).map(Response::new)
    }

    async fn check_schema(
        &self,
        request: Request<CheckSchemaRequest>,
    ) -> Result<Response<CheckSchemaResponse>, Status> {
        schema::check(&self.0.broker, request.into_inner()).await.map(Response::new)
    }

    async fn create_subscription(
        &self,
        request: Request<CreateSubscriptionRequest>,
    ) -> Result<Response<CreateSubscriptionResponse>, Status> {
        let request = request.into_inner();
        let new = NewSubscription {
            name: convert::parse_subscription(&request.name)?,
            topics: convert::parse_patterns(&request.topics)?,
            kind: convert::parse_kind(request.kind)?,
            on_failure: convert::parse_policy(request.on_failure)?,
            ack_timeout: convert::parse_duration("ack_timeout", request.ack_timeout)?,
            expires_after: convert::parse_duration("expires_after", request.expires_after)?,
            filter: convert::parse_filter(&request.filter)?,
            start: convert::parse_start(request.start)?,
        };
        let create = self.0.broker.create_subscription(new, request.if_not_exists);
        let (description, created) = create.await.map_err(refuse)?;
        let subscription = Some(describe::subscription(description));
        Ok(Response::new(CreateSubscriptionResponse { subscription, created }))
    }

    async fn get_subscription(
        &self,
        request: Request<GetSubscriptionRequest>,
    ) -> Result<Response<GetSubscriptionResponse>, Status> {
        let name = convert::parse_subscription(&request.into_inner().name)?;
        let description = self.0.broker.describe(&name).await.map_err(refuse)?;
        let subscription = Some(describe::subscription(description));
        Ok(Response::new(GetSubscriptionResponse { subscription }))
    }

    async fn list_subscriptions(
        &self,
        request: Request<ListSubscriptionsRequest>,
    ) -> Result<Response<ListSubscriptionsResponse>, Status> {
        let request = request.into_inner();
        let after = match request.page_token.as_str() {
            "" => None,
            token => Some(convert::parse_subscription(token)?),
        };
        let limit = page(request.page_size);
        let entries = self.0.broker.list_subscriptions(after.as_ref(), limit).await;
        let next_page_token = next_page(&entries, limit, |entry| entry.record.name.to_string());
        let subscriptions = entries.into_iter().map(describe::subscription).collect();
        Ok(Response::new(ListSubscriptionsResponse { subscriptions, next_page_token }))
    }

    async fn delete_subscription(
        &self,
        request: Request<DeleteSubscriptionRequest>,
    ) -> Result<Response<DeleteSubscriptionResponse>, Status> {
        let name = convert::parse_subscription(&request.into_inner().name)?;
        self.0.broker.delete_subscription(name).await.map_err(refuse)?;
        Ok(Response::new(DeleteSubscriptionResponse {}))
    }

    async fn seek_subscription(
        &self,
        request: Request<SeekSubscriptionRequest>,
    ) -> Result<Response<SeekSubscriptionResponse>, Status> {
        let request = request.into_inner();
        let name = convert::parse_subscription(&request.name)?;
        if !request.snapshot.is_empty() {
            if request.to.is_some() || !request.topic.is_empty() {
                return Err(invalid("a snapshot says where to in which topics by itself"));
            }
            let snapshot = convert::parse_snapshot(&request.snapshot)?;
            let description = self.0.broker.seek_to_snapshot(&name, &snapshot).await;
            let subscription = Some(describe::subscription(description.map_err(refuse)?));
            return Ok(Response::new(SeekSubscriptionResponse { subscription }));
        }
        let topic = match request.topic.as_str() {
            "" => None,
            topic => Some(convert::parse_topic(topic)?),
        };
        if request.to.is_none() {
            return Err(invalid("to is missing"));
        }
        let to = convert::parse_start(request.to)?;
        let description = self.0.broker.seek(&name, topic.as_ref(), to).await.map_err(refuse)?;
        let subscription = Some(describe::subscription(description));
        Ok(Response::new(SeekSubscriptionResponse { subscription }))
    }

    async fn update_subscription(
        &self,
        request: Request<v1::UpdateSubscriptionRequest>,
    ) -> Result<Response<v1::UpdateSubscriptionResponse>, Status> {
        let request = request.into_inner();
        let name = convert::parse_subscription(&request.name)?;
        let change = Relisten {
            add: convert::parse_patterns(&request.add_topics)?,
            remove: convert::parse_patterns(&request.remove_topics)?,
            start: convert::parse_start(request.start)?,
        };
        let description = self.0.broker.relisten(name, change).await.map_err(refuse)?;
        let subscription = Some(describe::subscription(description));
        Ok(Response::new(v1::UpdateSubscriptionResponse { subscription }))
    }

    async fn create_snapshot(
        &self,
        request: Request<CreateSnapshotRequest>,
    ) -> Result<Response<CreateSnapshotResponse>, Status> {
        let request = request.into_inner();
        let name = convert::parse_snapshot(&request.name)?;
        let subscription = convert::parse_subscription(&request.subscription)?;
        let made = self.0.broker.create_snapshot(name, subscription).await.map_err(refuse)?;
        let snapshot = Some(describe::snapshot(&made));
        Ok(Response::new(CreateSnapshotResponse { snapshot }))
    }

    async fn list_snapshots(
        &self,
        request: Request<ListSnapshotsRequest>,
    ) -> Result<Response<ListSnapshotsResponse>, Status> {
        let request = request.into_inner();
        let after = match request.page_token.as_str() {
            "" => None,
            token => Some(convert::parse_snapshot(token)?),
        };
        let limit = page(request.page_size);
        let entries = self.0.broker.list_snapshots(after.as_ref(), limit);
        let next_page_token = next_page(&entries, limit, |entry| entry.name.to_string());
        let snapshots = entries.iter().map(|entry| describe::snapshot(entry)).collect();
        Ok(Response::new(ListSnapshotsResponse { snapshots, next_page_token }))
    }

    async fn delete_snapshot(
        &self,
        request: Request<DeleteSnapshotRequest>,
    ) -> Result<Response<DeleteSnapshotResponse>, Status> {
        let name = convert::parse_snapshot(&request.into_inner().name)?;
        self.0.broker.delete_snapshot(name).await.map_err(refuse)?;
        Ok(Response::new(DeleteSnapshotResponse {}))
    }

    async fn list_dead_letters(
        &self,
        request: Request<ListDeadLettersRequest>,
    ) -> Result<Response<ListDeadLettersResponse>, Status> {
        let request = request.into_inner();
        let name = convert::parse_subscription(&request.subscription)?;
        let after = match request.page_token.as_str() {
            "" => 0,
            token => token.parse().map_err(|_| invalid("page_token is not one of this server"))?,
        };
        let (filter, most) = (convert::parse_filter(&request.filter)?, page(request.page_size));
        let page = self.0.broker.dead_letters(&name, filter.as_ref(), after, most);
        let page = page.await.map_err(refuse)?;
        let last = page.letters.last().filter(|_| page.more);
        let next_page_token = last.map(|last| last.sequence.to_string()).unwrap_or_default();
        let dead_letters = describe::dead_letters(&page)?;
        Ok(Response::new(ListDeadLettersResponse { dead_letters, next_page_token }))
    }

    async fn redrive_dead_letters(
        &self,
        request: Request<RedriveDeadLettersRequest>,
    ) -> Result<Response<RedriveDeadLettersResponse>, Status> {
        let request = request.into_inner();
        let name = convert::parse_subscription(&request.subscription)?;
        let which = describe::parse_letters(&request.sequences, request.max_messages)?;
        let filter = convert::parse_filter(&request.filter)?;
        let settled = self.0.broker.redrive(&name, which, filter.as_ref()).await.map_err(refuse)?;
        let (redriven, homeless, left) = (settled.settled, settled.homeless, settled.left);
        Ok(Response::new(RedriveDeadLettersResponse { redriven, homeless, left }))
    }

    async fn purge_dead_letters(
        &self,
        request: Request<PurgeDeadLettersRequest>,
    ) -> Result<Response<PurgeDeadLettersResponse>, Status> {
        let request = request.into_inner();
        let name = convert::parse_subscription(&request.subscription)?;
        let which = describe::parse_letters(&request.sequences, request.max_messages)?;
        let filter = convert::parse_filter(&request.filter)?;
        let settled = self.0.broker.purge_dead_letters(&name, which, filter.as_ref()).await;
        let settled = settled.map_err(refuse)?;
        let (purged, left) = (settled.settled, settled.left);
        Ok(Response::new(PurgeDeadLettersResponse { purged, left }))
    }

    async fn get_receipts(
        &self,
        request: Request<GetReceiptsRequest>,
    ) -> Result<Response<GetReceiptsResponse>, Status> {
        let request = request.into_inner();
        let topic = convert::parse_topic(&request.topic)?;
        let subscription = match request.subscription.as_str() {
            "" => None,
            name => Some(convert::parse_subscription(name)?),
        };
        let epoch = convert::parse_epoch(request.epoch);
        let broker = &self.0.broker;
        let answers = broker.receipts(&topic, epoch, request.sequence, subscription.as_ref());
        let receipts = answers.await.map_err(refuse)?.into_iter().map(describe::receipt).collect();
        Ok(Response::new(GetReceiptsResponse { receipts }))
    }

    async fn watch_events(
        &self,
        request: Request<WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        events::watch(&self.0, &request.into_inner()).map(Response::new)
    }

    async fn get_server(
        &self,
        _: Request<GetServerRequest>,
    ) -> Result<Response<GetServerResponse>, Status> {
        let broker = &self.0.broker;
        let (topics, subscriptions) = broker.counts();
        let state = match &*broker.health().borrow() {
            _ if *self.0.draining.borrow() => "DRAINING".to_owned(),
            Health::Ok => "SERVING".to_owned(),
            Health::DiskFull => "REFUSING_WRITES: the disk is full".to_owned(),
            Health::Failed(cause) => format!("REFUSING_WRITES: {cause}"),
        };
        Ok(Response::new(GetServerResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            boot_id: convert::uuid(broker.boot_id()),
            start_time: convert::timestamp(self.0.started),
            storage: broker.engine().to_owned(),
            topics: topics as u64,
            subscriptions: subscriptions as u64,
            connections: self.0.connections.load(Ordering::Relaxed),
            state,
        }))
    }
}
