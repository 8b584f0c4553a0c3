//! What scenarios do with the SDK, each step with a deadline.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use pubsub_client::{
    Client, ConnectionState, Delivery, Event as Item, Message, MessageId, Publisher, RetryPolicy,
    Start, StateWatch, SubscribeError, Subscriber,
};
use pubsub_tests::{admin, checker::Id, wait};
use tokio::task::JoinSet;
use tonic::transport::Channel;

/// How long anything may take that has to happen.
pub(crate) const SOON: Duration = Duration::from_secs(20);

/// A client that notices silence within seconds and does not wait long between attempts. It does
/// not insist on a server at its beginning.
pub(crate) fn client(url: &str) -> Result<Client> {
    let retry = RetryPolicy::new(Duration::from_millis(10), Duration::from_millis(250));
    Ok(Client::builder(url).fast().retry(retry).connect_lazy()?)
}

/// Opens a publisher.
pub(crate) async fn publisher(client: &Client, topic: &str) -> Result<Publisher> {
    Ok(wait::soon("the publisher", SOON, client.publisher(topic).open()).await??)
}

/// Ends all that a client does.
pub(crate) async fn shutdown(client: Client) -> Result<()> {
    let report = wait::soon("the shutdown", SOON, client.shutdown(SOON)).await?;
    ensure!(report.is_clean(), "{report:?}");
    Ok(())
}

/// Opens a subscription that begins at the first message.
pub(crate) async fn subscribe(client: &Client, name: &str, topic: &str) -> Result<Subscriber> {
    let opening = client.subscriber(name).topic(topic).start(Start::Earliest).open();
    Ok(wait::soon("the subscription", SOON, opening).await??)
}

/// The next message; events that are none, and errors, are failures.
pub(crate) async fn next(subscriber: &mut Subscriber) -> Result<Delivery> {
    let item = wait::soon("a message", SOON, subscriber.next()).await?;
    match item.context("the stream has ended")?? {
        Item::Message(delivery) => Ok(delivery),
        other => bail!("a message was expected, not {other:?}"),
    }
}

/// The next messages.
pub(crate) async fn next_many(subscriber: &mut Subscriber, count: usize) -> Result<Vec<Delivery>> {
    let mut deliveries = Vec::new();
    while deliveries.len() < count {
        deliveries.push(next(subscriber).await?);
    }
    Ok(deliveries)
}

/// The terminal error of a subscriber; messages before it are passed over.
pub(crate) async fn failure(subscriber: &mut Subscriber) -> Result<SubscribeError> {
    let end = async {
        loop {
            match subscriber.next().await {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Ok(error),
                None => bail!("the stream has ended without an error"),
            }
        }
    };
    wait::soon("an error", SOON, end).await?
}

/// Waits for a state of a connection.
pub(crate) async fn state(
    mut watch: StateWatch,
    what: &str,
    within: Duration,
    like: impl Fn(&ConnectionState) -> bool,
) -> Result<ConnectionState> {
    let now = watch.clone();
    let waiting = watch.wait_for(|state| like(state));
    let state = wait::soon(what, within, waiting).await;
    let state = state.with_context(|| format!("it is {:?}", now.get()))?;
    state.with_context(|| format!("it never was {what}"))
}

/// Publishes numbered payloads one after the other, and gives their ids.
pub(crate) async fn publish_numbers(
    publisher: &Publisher,
    numbers: impl IntoIterator<Item = u64>,
) -> Result<Vec<MessageId>> {
    let mut tickets = Vec::new();
    for number in numbers {
        let enqueueing = publisher.enqueue(Message::new(number.to_string()));
        tickets.push(wait::soon("the window", SOON, enqueueing).await??);
    }
    let mut ids = Vec::new();
    for ticket in tickets {
        ids.push(wait::soon("a receipt", SOON, ticket).await??.id);
    }
    Ok(ids)
}

/// The sequences of deliveries.
pub(crate) fn sequences(deliveries: &[Delivery]) -> Vec<u64> {
    deliveries.iter().map(|delivery| delivery.id.sequence).collect()
}

/// Acks all of them and waits until that is on disk.
pub(crate) async fn confirm(deliveries: Vec<Delivery>) -> Result<()> {
    let mut acks = JoinSet::new();
    for delivery in deliveries {
        acks.spawn(delivery.ack_confirmed());
    }
    for ack in wait::soon("the confirmations", SOON, acks.join_all()).await? {
        ack?;
    }
    Ok(())
}

/// The checker's name of a message.
pub(crate) fn id(id: &MessageId) -> Id {
    Id { topic: id.topic.clone(), epoch: id.epoch, sequence: id.sequence }
}

/// Waits until the server has the acks of everything.
pub(crate) async fn all_acked(channel: &Channel, name: &str) -> Result<()> {
    wait::until_ok("all acks at the server", SOON, async || {
        let subscription = admin::subscription(channel, name).await?;
        for position in &subscription.positions {
            ensure!(position.floor == position.head, "{position:?}");
        }
        Ok(())
    })
    .await
}
