//! Order by key while everything fails: handlers, deadlines, consumers.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use pubsub_client::{
    CreateSubscription, Delivery, FailurePolicy, Message, Nack, ReceivedMessage, SubscriptionKind,
    TopicConfig,
};
use pubsub_tests::{lab::scenario, seed::Rng, wait};
use tokio::runtime::Runtime;

use crate::app::{self, SOON};

const WITHIN: Duration = Duration::from_secs(240);
const TOPIC: &str = "accounts";
const DEAD: &str = "accounts-dead";
const BOOKING: &str = "booking";
const KEYS: u64 = 100;
const EACH: u64 = 20;
/// Far more than a message can fail that is none of the poisoned ones.
const ATTEMPTS: u32 = 12;
const ACK_TIMEOUT: Duration = Duration::from_secs(1);

fn is_poisoned(sequence: u64) -> bool {
    sequence.is_multiple_of(97)
}

/// What the handlers of all consumers have seen.
#[derive(Debug, Default)]
struct Seen {
    /// By key: the messages of it that were shown, and are neither acked nor at their last attempt.
    open: BTreeMap<String, BTreeSet<u64>>,
    nacked: u32,
    timed_out: u32,
    wrong: Vec<String>,
}

impl Seen {
    fn is_wrong(&self) -> bool {
        !self.wrong.is_empty()
    }

    fn show(&mut self, message: &ReceivedMessage) {
        let sequence = message.id.sequence;
        let key = message.ordering_key.clone().unwrap_or_default();
        let open = self.open.entry(key.clone()).or_default();
        if let Some(earlier) = open.range(..sequence).next() {
            self.wrong.push(format!("{sequence} of {key} is shown while {earlier} is not done"));
        }
        open.insert(sequence);
        if is_poisoned(sequence) && message.attempt >= ATTEMPTS {
            open.remove(&sequence);
        }
    }

    /// Handles a message, or leaves it until it is too late.
    fn handle(&mut self, delivery: Delivery, rng: &mut Rng) -> Option<Delivery> {
        self.show(&delivery);
        if is_poisoned(delivery.id.sequence) || rng.one_in(20) {
            self.nacked += 1;
            delivery.nack(Nack::now().because("it fails"));
        } else if rng.one_in(50) {
            self.timed_out += 1;
            return Some(delivery);
        } else {
            let key = delivery.ordering_key.clone().unwrap_or_default();
            self.open.entry(key).or_default().remove(&delivery.id.sequence);
            delivery.ack();
        }
        None
    }
}

type Shared = Arc<Mutex<Seen>>;

fn lock(seen: &Shared) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Handles messages until its process is killed.
async fn consume(url: String, name: String, seen: Shared, mut rng: Rng) -> Result<()> {
    let client = app::client(&url)?;
    let opening = client.subscriber(BOOKING).consumer_id(name).max_outstanding_messages(50);
    let mut subscriber = opening.open().await?;
    loop {
        let event = subscriber.next().await.context("the stream has ended")??;
        let delivery = event.into_message().context("not a message")?;
        let late = lock(&seen).handle(delivery, &mut rng);
        if late.is_some() {
            tokio::time::sleep(2 * ACK_TIMEOUT).await;
        }
    }
}

/// A consumer's process: a runtime that is there one moment, and gone the next.
fn start(url: &str, number: u64, seen: &Shared, rng: Rng) -> Result<Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let runtime = builder.worker_threads(1).enable_all().build()?;
    let consuming = consume(url.to_owned(), format!("c{number}"), Arc::clone(seen), rng);
    drop(runtime.handle().spawn(consuming));
    Ok(runtime)
}

/// Nothing of it goes on afterwards.
async fn kill(consumer: Runtime) -> Result<()> {
    Ok(tokio::task::spawn_blocking(|| consumer.shutdown_timeout(SOON)).await?)
}

#[test]
fn keys_stay_in_order_through_failures_timeouts_and_kills() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let client = app::client(&server.url())?;
        let admin = client.admin();
        for topic in [TOPIC, DEAD] {
            admin.create_topic(topic, TopicConfig::new()).await?;
        }
        let settings = CreateSubscription::to([TOPIC])
            .with_kind(SubscriptionKind::KeyOrdered)
            .with_on_failure(FailurePolicy::dead_letter(DEAD).after(ATTEMPTS))
            .with_ack_timeout(ACK_TIMEOUT);
        admin.create_subscription(BOOKING, settings).await?;
        let seen = Shared::default();
        let mut consumers = BTreeMap::new();
        for number in 0..3 {
            consumers.insert(number, start(&server.url(), number, &seen, lab.rng.fork())?);
        }
        let publisher = app::publisher(&client, TOPIC).await?;
        for round in 0..EACH {
            for key in 0..KEYS {
                let message = Message::new(format!("{key} {round}"));
                drop(publisher.enqueue(message.with_ordering_key(format!("k{key}"))).await?);
            }
            publisher.flush().await?;
            if round % 4 == 3 {
                tokio::time::sleep(Duration::from_millis(lab.rng.below(500))).await;
                let number = lab.rng.below(3);
                kill(consumers.remove(&number).context("a consumer is missing")?).await?;
                consumers.insert(number, start(&server.url(), number, &seen, lab.rng.fork())?);
            }
        }
        wait::until_ok("the end of the backlog", 8 * SOON, async || {
            let info = admin.subscription(BOOKING).await?;
            let all_done = info.positions.first().is_some_and(|at| at.backlog == 0);
            ensure!(all_done || lock(&seen).is_wrong(), "{info:?}");
            Ok(())
        })
        .await?;
        ensure!(!lock(&seen).is_wrong(), "{:?}", lock(&seen).wrong);
        for consumer in consumers.into_values() {
            kill(consumer).await?;
        }
        let mut dead = Vec::new();
        let mut page = admin.dead_letters(BOOKING, None).await?;
        loop {
            dead.extend(page.items.iter().map(|letter| letter.origin.sequence));
            let Some(next) = page.next else { break };
            page = admin.dead_letters(BOOKING, Some(next)).await?;
        }
        dead.sort_unstable();
        let poisoned: Vec<u64> = (1..=KEYS * EACH).filter(|n| is_poisoned(*n)).collect();
        ensure!(dead == poisoned, "{dead:?} are dead, and {poisoned:?} were poisoned");
        ensure!(admin.topic(DEAD).await?.head == poisoned.len() as u64);
        let seen = lock(&seen);
        let void = seen.nacked < 100 || seen.timed_out < 20;
        ensure!(!void, "the run is void: {} nacks, {} timeouts", seen.nacked, seen.timed_out);
        Ok(())
    });
}
