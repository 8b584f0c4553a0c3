//! Applications at work, each in a process of its own, while a scenario breaks things around
//! them. All they do and see is recorded, and judged in the end.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use pubsub_client::{
    Delivery, Drain, Event as Item, Message, Outcome, PublishTicket, Publisher, StateWatch,
    Subscriber,
};
use pubsub_tests::{
    auditor,
    checker::{self, Event, Expectation, Gate, Log, Process, Recorder, Value},
    raw,
    seed::Rng,
    wait,
};
use tokio::{
    runtime::{Builder, Runtime},
    sync::{mpsc, oneshot, watch},
    task::{JoinHandle, JoinSet},
    time::sleep,
};

use crate::app::{self, SOON, id};

/// How many messages a consumer holds unacked at most.
const MOST_HELD: usize = 50;

/// How many publishes of one publisher are unanswered at most.
const IN_FLIGHT: usize = 30;

/// Publishers and consumers at work.
pub(crate) struct Load {
    pub(crate) recorder: Recorder,
    url: String,
    topic: Arc<str>,
    publishers: Vec<Worker>,
    consumers: Vec<(Arc<str>, Worker)>,
    stop_publishing: watch::Sender<bool>,
    stop_consuming: watch::Sender<bool>,
    /// Publishers and consumers so far, also those that have crashed.
    started: u32,
}

impl Load {
    /// Nobody yet, on a topic that exists. `url` is what the applications know of the server.
    pub(crate) fn new(url: String, topic: &str) -> Self {
        Self {
            recorder: Recorder::default(),
            url,
            topic: topic.into(),
            publishers: Vec::new(),
            consumers: Vec::new(),
            stop_publishing: watch::Sender::new(false),
            stop_consuming: watch::Sender::new(false),
            started: 0,
        }
    }

    /// Adds a publisher that publishes until the end.
    pub(crate) async fn publisher(&mut self, rng: Rng) -> Result<()> {
        self.started += 1;
        let (number, url, topic) = (self.started, self.url.clone(), self.topic.clone());
        let (recorder, stop) = (self.recorder.clone(), self.stop_publishing.subscribe());
        let worker = Worker::start(async move |opened| {
            let publisher = app::publisher(&app::client(&url)?, &topic).await?;
            let _ = opened.send(publisher.state());
            Publishing { publisher, topic, number, recorder, stop, rng }.run().await
        });
        self.publishers.push(worker.await?);
        Ok(())
    }

    /// Adds a subscription, with a consumer that acks everything in the end.
    pub(crate) async fn consumer(&mut self, subscription: &str, rng: Rng) -> Result<()> {
        self.started += 1;
        let process = Process::new(subscription, self.started);
        let (name, url, topic) =
            (process.subscription.clone(), self.url.clone(), self.topic.clone());
        let (recorder, stop) = (self.recorder.clone(), self.stop_consuming.subscribe());
        let worker = Worker::start(async move |opened| {
            let client = app::client(&url)?;
            let subscriber = app::subscribe(&client, &process.subscription, &topic).await?;
            let _ = opened.send(subscriber.state());
            let (held, confirming) = (VecDeque::new(), JoinSet::new());
            Consuming { subscriber, process, recorder, stop, rng, held, confirming }.run().await
        });
        self.consumers.push((name, worker.await?));
        Ok(())
    }

    /// Kills a publisher's process, and starts another.
    pub(crate) async fn crash_publisher(&mut self, rng: &mut Rng) -> Result<()> {
        let index = usize::try_from(rng.below(self.publishers.len() as u64))?;
        self.fault("publisher crash");
        drop(self.publishers.swap_remove(index));
        self.publisher(rng.fork()).await
    }

    /// Kills a consumer's process, and starts it again.
    pub(crate) async fn crash_consumer(&mut self, rng: &mut Rng) -> Result<()> {
        let index = usize::try_from(rng.below(self.consumers.len() as u64))?;
        self.fault("consumer crash");
        let (subscription, worker) = self.consumers.swap_remove(index);
        drop(worker);
        self.consumer(&subscription, rng.fork()).await
    }

    /// Notes that something was just broken.
    pub(crate) fn fault(&self, what: &str) {
        self.recorder.record(Event::Fault(what.into()));
    }

    /// Waits until so many more publishes are confirmed, and messages shown.
    pub(crate) async fn progress(&self, stored: usize, delivered: usize) -> Result<()> {
        let goal = self.recorder.stored() + stored;
        let shown = self.recorder.delivered() + delivered;
        let what = format!("{goal} publishes and {shown} deliveries");
        let reached = || self.recorder.stored() >= goal && self.recorder.delivered() >= shown;
        wait::until(what, SOON, reached).await.with_context(|| self.describe())
    }

    /// What explains that nothing goes on.
    fn describe(&self) -> String {
        let (stored, delivered) = (self.recorder.stored(), self.recorder.delivered());
        let consumers = self.consumers.iter().map(|(_, worker)| worker);
        let workers: Vec<_> =
            self.publishers.iter().chain(consumers).map(Worker::describe).collect();
        format!("{stored} publishes, {delivered} deliveries, {workers:#?}")
    }

    /// Ends the load when everything has arrived, and judges all that happened. `url` is a
    /// server that works.
    pub(crate) async fn finish(mut self, url: &str, gate: Gate) -> Result<Gate> {
        self.stop_publishing.send_replace(true);
        for publisher in std::mem::take(&mut self.publishers) {
            publisher.end().await.context("a publisher")?;
        }
        let channel = raw::connect(url).await?;
        let log = Log::from(&auditor::read(&channel, &self.topic).await?);
        let everything = log.entries.len() * self.consumers.len();
        let arrived = || shown(&self.recorder) >= everything;
        let arrived = wait::until("everything to arrive", SOON, arrived).await;
        let mut ended = arrived.with_context(|| self.describe());

        self.stop_consuming.send_replace(true);
        let mut expected = Vec::new();
        for (subscription, consumer) in std::mem::take(&mut self.consumers) {
            expected.push(Expectation::everything(&subscription));
            if ended.is_ok() {
                ended = consumer.end().await.with_context(|| subscription.to_string());
            }
        }
        // What the checker finds explains more than that something did not arrive.
        let history = self.recorder.history();
        let found = checker::judge(&history, &[log], &expected, gate);
        let found = match (found, ended) {
            (Ok(found), Ok(())) => found,
            (Ok(_), Err(error)) | (Err(error), Ok(())) => return Err(error),
            (Err(report), Err(error)) => return Err(report.context(format!("{error:#}"))),
        };
        // Whatever breaks meanwhile: an application is told the id of all that it publishes.
        let lost = |event: &&Event| matches!(event, Event::Unknown(_) | Event::Refused(_));
        if let Some(event) = history.iter().find(lost) {
            bail!("a publish ended without an id: {event}");
        }
        for expectation in &expected {
            app::all_acked(&channel, &expectation.subscription).await?;
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

/// A process of an application: a runtime of its own. Dropping it is a crash: nothing in it says
/// goodbye.
struct Worker {
    _process: Isolated,
    task: JoinHandle<Result<()>>,
    state: StateWatch,
}

impl Worker {
    /// Starts work, and waits until it has told the state of its connection.
    async fn start<W>(work: impl FnOnce(oneshot::Sender<StateWatch>) -> W) -> Result<Self>
    where
        W: Future<Output = Result<()>> + Send + 'static,
    {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let (opened, opening) = oneshot::channel();
        let mut task = runtime.spawn(work(opened));
        let process = Isolated(Some(runtime));
        match wait::soon("the start of an application", SOON, opening).await? {
            Ok(state) => Ok(Self { _process: process, task, state }),
            Err(_) => match (&mut task).await? {
                Ok(()) => bail!("an application ended before it began"),
                Err(error) => Err(error),
            },
        }
    }

    /// Waits for the end of the work.
    async fn end(mut self) -> Result<()> {
        wait::soon("the end of an application", SOON, &mut self.task).await??
    }

    fn describe(&self) -> String {
        format!("finished: {}, {:?}", self.task.is_finished(), self.state.get())
    }
}

/// A runtime that can be dropped within another one.
struct Isolated(Option<Runtime>);

impl Drop for Isolated {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
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
    async fn run(mut self) -> Result<()> {
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
        let report = self.subscriber.stopper().stop(Drain::Finish, SOON).await;
        ensure!(report.is_clean(), "{report:?}");
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
