//! An application as scenarios run it: it publishes and consumes by the SDK, and records all it
//! does and sees.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use pubsub_client::{
    Client, ConnectionState, Delivery, Event as Item, Message, MessageId, Outcome, PublishTicket,
    Publisher, RetryPolicy, Start, StateWatch, SubscribeError, Subscriber,
};
use pubsub_tests::{
    admin, auditor,
    checker::{self, Event, Expectation, Gate, Id, Log, Process, Recorder, Value},
    raw,
    seed::Rng,
    wait,
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::sleep,
};

/// How long anything may take that has to happen.
pub(crate) const SOON: Duration = Duration::from_secs(20);

/// How many messages a consumer holds unacked at most.
const MOST_HELD: usize = 50;

/// How many publishes of one publisher are unanswered at most.
const IN_FLIGHT: usize = 30;

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
    let waiting = watch.wait_for(|state| like(state));
    let state = wait::soon(what, within, waiting).await?;
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

/// Publishers and consumers at work, while a scenario breaks things around them.
pub(crate) struct Load {
    pub(crate) recorder: Recorder,
    topic: Arc<str>,
    subscriptions: Vec<Arc<str>>,
    stop: watch::Sender<bool>,
    publishing: JoinSet<Result<()>>,
    consuming: JoinSet<Result<()>>,
    consumers: watch::Sender<bool>,
    states: Vec<StateWatch>,
    processes: u32,
    publishers: u32,
}

impl Load {
    /// Nothing yet, on a topic that exists.
    pub(crate) fn new(topic: &str) -> Self {
        Self {
            recorder: Recorder::default(),
            topic: topic.into(),
            subscriptions: Vec::new(),
            stop: watch::Sender::new(false),
            publishing: JoinSet::new(),
            consuming: JoinSet::new(),
            consumers: watch::Sender::new(false),
            states: Vec::new(),
            processes: 0,
            publishers: 0,
        }
    }

    /// Adds a publisher that publishes until the end.
    pub(crate) async fn publisher(&mut self, url: &str, rng: Rng) -> Result<()> {
        let publisher = publisher(&client(url)?, &self.topic).await?;
        self.publishers += 1;
        self.states.push(publisher.state());
        let work = Publishing {
            publisher,
            topic: self.topic.clone(),
            number: self.publishers,
            recorder: self.recorder.clone(),
            stop: self.stop.subscribe(),
            rng,
        };
        self.publishing.spawn(work.run());
        Ok(())
    }

    /// Adds a subscription, with a consumer that acks everything in the end.
    pub(crate) async fn consumer(&mut self, url: &str, subscription: &str, rng: Rng) -> Result<()> {
        let client = client(url)?;
        let subscriber = subscribe(&client, subscription, &self.topic).await?;
        self.processes += 1;
        self.states.push(subscriber.state());
        let work = Consuming {
            subscriber,
            process: Process::new(subscription, self.processes),
            recorder: self.recorder.clone(),
            stop: self.consumers.subscribe(),
            rng,
            held: VecDeque::new(),
            confirming: JoinSet::new(),
        };
        self.subscriptions.push(subscription.into());
        self.consuming.spawn(work.run(client));
        Ok(())
    }

    /// Notes that something was just broken.
    pub(crate) fn fault(&self, what: &str) {
        self.recorder.record(Event::Fault(what.into()));
    }

    /// Waits until so many more publishes are confirmed, and messages shown.
    pub(crate) async fn progress(&mut self, stored: usize, delivered: usize) -> Result<()> {
        let goal = self.recorder.stored() + stored;
        let shown = self.recorder.delivered() + delivered;
        let recorder = self.recorder.clone();
        let what = format!("{goal} publishes and {shown} deliveries");
        wait::until(what, SOON, || recorder.stored() >= goal && recorder.delivered() >= shown)
            .await
            .with_context(|| self.first_failure())
    }

    /// What explains that nothing goes on.
    fn first_failure(&mut self) -> String {
        let publishing = self.publishing.try_join_next();
        match publishing.or_else(|| self.consuming.try_join_next()) {
            Some(Ok(Err(error))) => format!("the application failed: {error:#}"),
            Some(Err(panic)) => format!("the application panicked: {panic}"),
            Some(Ok(Ok(()))) | None => format!(
                "the application makes no progress after {} publishes and {} deliveries: {:#?}",
                self.recorder.stored(),
                self.recorder.delivered(),
                self.states.iter().map(StateWatch::get).collect::<Vec<_>>()
            ),
        }
    }

    /// Ends the load when everything has arrived, and judges all that happened. `url` is a
    /// server that works.
    pub(crate) async fn finish(mut self, url: &str, gate: Gate) -> Result<Gate> {
        self.stop.send_replace(true);
        let publishing = std::mem::take(&mut self.publishing);
        join("the publishers' end", publishing).await?;

        let channel = raw::connect(url).await?;
        let log = Log::from(&auditor::read(&channel, &self.topic).await?);
        let everything = log.entries.len() * self.subscriptions.len();
        let recorder = self.recorder.clone();
        let arrived = wait::until("everything to arrive", SOON, || shown(&recorder) >= everything);
        let arrived = arrived.await.with_context(|| self.first_failure());
        self.consumers.send_replace(true);
        let consuming = std::mem::take(&mut self.consuming);
        let ended = match arrived {
            Ok(()) => join("the consumers' end", consuming).await,
            Err(error) => Err(error),
        };
        // What the checker finds explains more than that something did not arrive.
        let subscriptions = self.subscriptions.iter();
        let expected: Vec<_> = subscriptions.map(|name| Expectation::everything(name)).collect();
        let found = checker::judge(&self.recorder.history(), &[log], &expected, gate)?;
        ended?;
        for subscription in &self.subscriptions {
            all_acked(&channel, subscription).await?;
        }
        eprintln!("{found:?}");
        Ok(found)
    }
}

/// How many messages were shown, not counting any twice.
fn shown(recorder: &Recorder) -> usize {
    let mut shown = BTreeSet::new();
    for event in recorder.history() {
        if let Event::Delivered(process, id, _) = event {
            shown.insert((process.subscription, id));
        }
    }
    shown.len()
}

async fn join(what: &str, mut tasks: JoinSet<Result<()>>) -> Result<()> {
    let all = async {
        while let Some(end) = tasks.join_next().await {
            end??;
        }
        Ok(())
    };
    wait::soon(what, SOON, all).await?
}

/// Waits until the server has the acks of everything.
pub(crate) async fn all_acked(channel: &tonic::transport::Channel, name: &str) -> Result<()> {
    wait::until_ok("all acks at the server", SOON, async || {
        let subscription = admin::subscription(channel, name).await?;
        for position in &subscription.positions {
            ensure!(position.floor == position.head, "{position:?}");
        }
        Ok(())
    })
    .await
}

/// A publisher at work.
struct Publishing {
    publisher: Publisher,
    topic: Arc<str>,
    number: u32,
    recorder: Recorder,
    stop: watch::Receiver<bool>,
    rng: Rng,
}

impl Publishing {
    async fn run(mut self) -> Result<()> {
        let (tickets, mut unanswered) = mpsc::channel::<(Value, PublishTicket)>(IN_FLIGHT);
        let recorder = self.recorder.clone();
        let mut answers = JoinSet::new();
        answers.spawn(async move {
            while let Some((value, ticket)) = unanswered.recv().await {
                recorder.record(match ticket.await {
                    Ok(receipt) => Event::Stored(value, id(&receipt.id)),
                    Err(error) if error.outcome() == Outcome::Unknown => Event::Unknown(value),
                    Err(_) => Event::Refused(value),
                });
            }
        });
        let mut counter = 0;
        while !*self.stop.borrow() {
            for _ in 0..self.rng.between(1, 20) {
                counter += 1;
                let value = Value { publisher: self.number, counter };
                // Only one task publishes: a slot now means that the send below does not wait,
                // and no ticket is unobserved for long.
                let slot = tickets.reserve().await?;
                self.recorder.record(Event::Invoked(value, self.topic.clone()));
                let ticket = self.publisher.enqueue(Message::new(value.payload())).await?;
                slot.send((value, ticket));
            }
            // The pace of an application, not a wait for anything.
            sleep(Duration::from_millis(self.rng.between(1, 10))).await;
        }
        drop(tickets);
        answers.join_all().await;
        Ok(())
    }
}

/// A consumer at work: it acks most messages at once, some later, and waits for the
/// confirmation of some.
struct Consuming {
    subscriber: Subscriber,
    process: Process,
    recorder: Recorder,
    stop: watch::Receiver<bool>,
    rng: Rng,
    held: VecDeque<Delivery>,
    confirming: JoinSet<()>,
}

impl Consuming {
    async fn run(mut self, _client: Client) -> Result<()> {
        let mut stop = self.stop.clone();
        loop {
            let item = tokio::select! {
                item = self.subscriber.next() => item,
                _ = stop.wait_for(|stop| *stop) => break,
            };
            match item.context("the stream has ended")?? {
                Item::Message(delivery) => self.seen(delivery),
                Item::Gap(gap) => bail!("a gap: {gap:?}"),
                other => bail!("an unknown event: {other:?}"),
            }
        }
        for delivery in std::mem::take(&mut self.held) {
            self.ack(delivery);
        }
        self.confirming.join_all().await;
        Ok(())
    }

    fn seen(&mut self, delivery: Delivery) {
        let value = Value::of(&delivery.payload);
        let shown = Event::Delivered(self.process.clone(), id(&delivery.id), value);
        self.recorder.record(shown);
        if !self.rng.one_in(4) {
            self.ack(delivery);
            return;
        }
        self.held.push_back(delivery);
        // Not for ever: a consumer is shown nothing far beyond its oldest unacked message.
        if self.held.len() > MOST_HELD || self.rng.one_in(4) {
            let held = self.held.pop_front();
            held.into_iter().for_each(|held| self.ack(held));
        }
        if self.rng.one_in(2) {
            let held = self.held.pop_back();
            held.into_iter().for_each(|held| self.ack(held));
        }
    }

    fn ack(&mut self, delivery: Delivery) {
        let id = id(&delivery.id);
        let acked = Event::Acked(self.process.clone(), id.clone());
        self.recorder.record(acked);
        if !self.rng.one_in(3) {
            delivery.ack();
            return;
        }
        let (recorder, process) = (self.recorder.clone(), self.process.clone());
        self.confirming.spawn(async move {
            if delivery.ack_confirmed().await.is_ok() {
                recorder.record(Event::AckConfirmed(process, id));
            }
        });
    }
}
