//! The common loop: a handler for each message.

use std::collections::BTreeSet;
use std::fmt;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use futures_util::FutureExt as _;
use tokio::task::JoinSet;

use super::order::Lane;
use super::{Acker, DataLoss, Event, Nack, Subscriber};
use crate::error::SubscribeError;
use crate::message::ReceivedMessage;

/// The topic and the lane of a message that a handler has.
type Busy = (Arc<str>, Lane);

impl Subscriber {
    /// Runs the handler for each message, up to `concurrency` at once, until the subscriber is
    /// [stopped](Self::stopper).
    ///
    /// What runs at once depends on the [kind](crate::SubscriptionKind) of the subscription. In
    /// `Exclusive`, and in a reader, at most one message of each topic is in a handler, so that
    /// each topic is processed in its order: concurrency is over topics. In `KeyOrdered` it is at
    /// most one message of each ordering key of a topic, and any number of those without a key. In
    /// `Shared` there is no such limit.
    ///
    /// A message is acked when its handler returns `Ok`. When it returns an error or panics, the
    /// message is nacked with the error as the reason, and comes again after the server's backoff:
    /// before anything later of its topic or key, where these have an order.
    ///
    /// A handler that takes longer than
    /// [`max_processing`](crate::SubscriberBuilder::max_processing) holds its topic or key up until
    /// it returns; its message has then been given up, and comes again unless the handler returns
    /// `Ok`. Where several consumers are active, another may have it, and what follows of its key,
    /// before that.
    ///
    /// Gaps are logged as warnings and damage on the server as an error; to act on them, use
    /// [`next`](Self::next).
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let server = pubsub_server::Server::start(pubsub_server::Config::in_memory()).await?;
    /// # let client = pubsub_client::Client::connect(server.url()).await?;
    /// # client.admin().create_topic("orders", Default::default()).await?;
    /// # client.publisher("orders").open().await?.publish("an order").await?;
    /// # use pubsub_client::{Drain, Start};
    /// let subscriber = client.subscriber("billing").topic("orders").start(Start::Earliest);
    /// let subscriber = subscriber.open().await?;
    /// let stopper = subscriber.stopper();
    /// subscriber
    ///     .run(8, |message| {
    ///         let stopper = stopper.clone();
    ///         async move {
    ///             println!("{}", message.id);
    ///             # drop(tokio::task::spawn(async move {
    ///             #     stopper.stop(Drain::Finish, std::time::Duration::from_secs(5)).await
    ///             # }));
    ///             Ok::<(), String>(())
    ///         }
    ///     })
    ///     .await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// The session has ended for good, as [`SubscribeError`] tells. Handlers that run are waited
    /// for.
    pub async fn run<H, F, E>(
        mut self,
        concurrency: usize,
        handler: H,
    ) -> Result<(), SubscribeError>
    where
        H: Fn(ReceivedMessage) -> F,
        F: Future<Output = Result<(), E>> + Send + 'static,
        E: fmt::Display + Send + 'static,
    {
        let mut handlers = JoinSet::new();
        let mut busy = BTreeSet::new();
        let result = loop {
            // A handler that finishes frees its lane, so that there may be a next message.
            let event = tokio::select! {
                event = self.next_of(&busy), if handlers.len() < concurrency.max(1) => event,
                Some(handled) = handlers.join_next() => {
                    let freed: Option<Busy> = handled.expect("settling catches panics");
                    freed.map(|lane| busy.remove(&lane));
                    continue;
                }
            };
            match event {
                None => break Ok(()),
                Some(Err(error)) => break Err(error),
                Some(Ok(Event::Gap(gap))) => tracing::warn!(?gap, "messages will never come"),
                Some(Ok(Event::DataLoss(DataLoss { id }))) => {
                    tracing::error!(%id, "the server cannot read its topic from here on");
                }
                Some(Ok(Event::Message(delivery))) => {
                    let lane = self.core.lane(&delivery);
                    let lane = lane.map(|lane| (Arc::clone(&delivery.id.topic), lane));
                    let (message, acker) = delivery.split();
                    // It may panic before it has made its future.
                    let Ok(handler) = catch_unwind(AssertUnwindSafe(|| handler(message))) else {
                        acker.nack(panicked());
                        continue;
                    };
                    busy.extend(lane.clone());
                    handlers.spawn(async move {
                        settle(handler, acker).await;
                        lane
                    });
                }
            }
        };
        while handlers.join_next().await.is_some() {}
        result
    }

    async fn next_of(&mut self, busy: &BTreeSet<Busy>) -> Option<Result<Event, SubscribeError>> {
        let is_free =
            |topic: &Arc<str>, lane: &Lane| !busy.contains(&(Arc::clone(topic), lane.clone()));
        std::future::poll_fn(|context| self.core.poll(context, is_free)).await
    }
}

/// Acks or nacks, as the handler ends.
async fn settle<F, E>(handler: F, acker: Acker)
where
    F: Future<Output = Result<(), E>>,
    E: fmt::Display,
{
    // Its error is the handler's, too, and may panic when it is made into text.
    let handled = async { handler.await.map_err(|error| error.to_string()) };
    match AssertUnwindSafe(handled).catch_unwind().await {
        Ok(Ok(())) => acker.ack(),
        Ok(Err(reason)) => acker.nack(Nack::backoff().because(reason)),
        Err(_) => acker.nack(panicked()),
    }
}

fn panicked() -> Nack {
    Nack::backoff().because("the handler panicked")
}
