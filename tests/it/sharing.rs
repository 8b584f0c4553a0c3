//! Several consumers on one subscription: a work queue, and messages in order of their keys.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use pubsub_client::{
    Client, Delivery, Drain, Event as Item, Message, Nack, Start, Subscriber, SubscriptionKind,
};
use pubsub_proto::v1::{
    self, CreateSubscriptionRequest, NackRequest, PullRequest, SubscribeHello,
    subscribe_response::Frame,
};
use pubsub_tests::{
    admin,
    lab::scenario,
    proxy::Cut,
    raw::{self, SubscribeStream},
    seed::Rng,
    wait,
};
use tokio::{sync::watch, task::JoinSet, time::Instant};
use tonic::transport::Channel;

use crate::app::{self, SOON};

const WITHIN: Duration = Duration::from_secs(150);
const TOPIC: &str = "jobs";
const WORK: &str = "work";

async fn worker(client: &Client, kind: SubscriptionKind, name: &str) -> Result<Subscriber> {
    let builder = client.subscriber(WORK).topic(TOPIC).kind(kind).start(Start::Earliest);
    let opening = builder.consumer_id(name).max_outstanding_messages(50).open();
    Ok(wait::soon("a worker", SOON, opening).await??)
}

/// What the handlers of all workers have seen.
#[derive(Debug, Default)]
struct Seen {
    /// By message: how often it was shown.
    shown: BTreeMap<u64, u32>,
    acked: BTreeSet<u64>,
    by_worker: BTreeMap<String, u32>,
    /// By key: the messages of it.
    keys: BTreeMap<String, BTreeSet<u64>>,
    wrong: Vec<String>,
}

impl Seen {
    fn show(&mut self, worker: &str, delivery: &Delivery) {
        let sequence = delivery.id.sequence;
        *self.shown.entry(sequence).or_default() += 1;
        *self.by_worker.entry(worker.to_owned()).or_default() += 1;
        if self.acked.contains(&sequence) {
            self.wrong.push(format!("{sequence} is shown again though it is acked"));
        }
        let Some(key) = &delivery.ordering_key else { return };
        let known = self.keys.entry(key.clone()).or_default();
        known.insert(sequence);
        if let Some(earlier) = known.range(..sequence).find(|s| !self.acked.contains(s)) {
            self.wrong.push(format!("{sequence} of {key} is shown before {earlier} is acked"));
        }
    }
}

/// Works until it is told to stop, and fails now and then.
struct Worker {
    name: String,
    subscriber: Subscriber,
    seen: Arc<Mutex<Seen>>,
    rng: Rng,
    /// One delivery of so many fails, or none.
    failing: u64,
}

async fn work(worker: Worker, mut stop: watch::Receiver<bool>) -> Result<()> {
    let Worker { name, mut subscriber, seen, mut rng, failing } = worker;
    let stopper = subscriber.stopper();
    loop {
        let event = tokio::select! {
            event = subscriber.next() => event,
            _ = stop.wait_for(|stop| *stop) => break,
        };
        let delivery = match event.context("the stream has ended")?? {
            Item::Message(delivery) => delivery,
            other => bail!("a message was expected, not {other:?}"),
        };
        let mut seen = seen.lock().expect("nobody panics with it");
        seen.show(&name, &delivery);
        if failing > 0 && rng.one_in(failing) {
            delivery.nack(Nack::after(Duration::from_millis(rng.below(50))));
        } else {
            seen.acked.insert(delivery.id.sequence);
            delivery.ack();
        }
    }
    ensure!(stopper.stop(Drain::Release, SOON).await.is_clean(), "{name} leaves something behind");
    Ok(())
}

async fn all_done(channel: &Channel) -> Result<()> {
    wait::until_ok("all jobs", 3 * SOON, async || {
        let subscription = admin::subscription(channel, WORK).await?;
        let position = subscription.positions.first().context("no position")?;
        ensure!(position.floor == position.head && position.head > 0, "{position:?}");
        Ok(())
    })
    .await
}

#[test]
fn jobs_are_shared_and_each_is_shown_once_through_kills_and_cuts() {
    const JOBS: u64 = 3000;
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        admin::create_topic(&raw::connect(&rig.server.url()).await?, TOPIC).await?;
        let seen = Arc::new(Mutex::new(Seen::default()));
        let (stop, stopped) = watch::channel(false);
        let mut workers = JoinSet::new();
        let client = app::client(&rig.url())?;
        for name in ["a", "b", "c"] {
            let subscriber = worker(&client, SubscriptionKind::Shared, name).await?;
            let (seen, rng) = (Arc::clone(&seen), lab.rng.fork());
            let worker = Worker { name: name.into(), subscriber, seen, rng, failing: 0 };
            workers.spawn(work(worker, stopped.clone()));
        }
        let publisher = app::publisher(&client, TOPIC).await?;
        for part in 0..3 {
            app::publish_numbers(&publisher, part * JOBS / 3..(part + 1) * JOBS / 3).await?;
            match part {
                0 => rig.crash().await?,
                1 => drop(rig.proxy.cut_all(Cut::Reset)),
                _ => {}
            }
        }
        let channel = raw::connect(&rig.server.url()).await?;
        all_done(&channel).await?;
        stop.send(true)?;
        for worker in workers.join_all().await {
            worker?;
        }
        let seen = seen.lock().expect("nobody panics with it");
        ensure!(seen.wrong.is_empty(), "{:?}", seen.wrong);
        ensure!(seen.shown.len() as u64 == JOBS, "{} jobs of {JOBS}", seen.shown.len());
        let twice: Vec<_> = seen.shown.iter().filter(|(_, times)| **times > 1).collect();
        ensure!(twice.is_empty(), "shown more than once: {twice:?}");
        let fair = seen.by_worker.values().all(|count| u64::from(*count) > JOBS / 10);
        ensure!(fair && seen.by_worker.len() == 3, "{:?}", seen.by_worker);
        Ok(())
    });
}

#[test]
fn keys_stay_in_order_across_nacks_restarts_and_workers_that_come_and_go() {
    const KEYS: u64 = 40;
    const EACH: u64 = 30;
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        admin::create_topic(&raw::connect(&rig.server.url()).await?, TOPIC).await?;
        let seen = Arc::new(Mutex::new(Seen::default()));
        let client = app::client(&rig.url())?;
        let mut workers = JoinSet::new();
        let mut stops = Vec::new();
        for number in 0..3 {
            let name = format!("w{number}");
            let subscriber = worker(&client, SubscriptionKind::KeyOrdered, &name).await?;
            let (stop, stopped) = watch::channel(false);
            let (seen, rng) = (Arc::clone(&seen), lab.rng.fork());
            workers.spawn(work(Worker { name, subscriber, seen, rng, failing: 20 }, stopped));
            stops.push(stop);
        }
        let publisher = app::publisher(&client, TOPIC).await?;
        for round in 0..EACH {
            let mut tickets = Vec::new();
            for key in 0..KEYS {
                // Some without a key between them.
                let message = Message::new(format!("{key} {round}"));
                let keyed = message.clone().with_ordering_key(format!("key-{key}"));
                for message in [keyed, message].into_iter().take(1 + usize::from(key == 0)) {
                    tickets.push(publisher.enqueue(message).await?);
                }
            }
            for ticket in tickets {
                wait::soon("a receipt", SOON, ticket).await??;
            }
            match round {
                8 => rig.crash().await?,
                14 => drop(rig.proxy.cut_all(Cut::Finish)),
                4 | 11 | 20 => {
                    // One leaves, and another one comes.
                    stops.remove(0).send(true)?;
                    let name = format!("late{round}");
                    let subscriber = worker(&client, SubscriptionKind::KeyOrdered, &name).await?;
                    let (stop, stopped) = watch::channel(false);
                    let (seen, rng) = (Arc::clone(&seen), lab.rng.fork());
                    let worker = Worker { name, subscriber, seen, rng, failing: 20 };
                    workers.spawn(work(worker, stopped));
                    stops.push(stop);
                }
                _ => {}
            }
        }
        let channel = raw::connect(&rig.server.url()).await?;
        all_done(&channel).await?;
        for stop in stops {
            stop.send(true)?;
        }
        for worker in workers.join_all().await {
            worker?;
        }
        let seen = seen.lock().expect("nobody panics with it");
        ensure!(seen.wrong.is_empty(), "{:?}", seen.wrong);
        ensure!(seen.acked.len() as u64 == (KEYS + 1) * EACH, "{} are acked", seen.acked.len());
        ensure!(seen.keys.len() as u64 == KEYS, "{} keys", seen.keys.len());
        let failed = seen.shown.values().filter(|times| **times > 1).count();
        ensure!(failed > 20, "the run is void: {failed} failed");
        ensure!(seen.by_worker.len() == 6, "{:?}", seen.by_worker);
        Ok(())
    });
}

#[test]
fn a_poisoned_job_stops_none_of_the_others() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let channel = raw::connect(&server.url()).await?;
        admin::create_topic(&channel, TOPIC).await?;
        let client = app::client(&server.url())?;
        let mut subscriber = worker(&client, SubscriptionKind::Shared, "one").await?;
        app::publish_numbers(&app::publisher(&client, TOPIC).await?, 0..500).await?;
        // Far more than may be outstanding, while the first one waits for longer than the test does.
        app::next(&mut subscriber).await?.nack(Nack::after(WITHIN));
        for delivery in app::next_many(&mut subscriber, 40).await? {
            ensure!(delivery.id.sequence != 1, "it comes too early");
            delivery.ack();
        }
        for _ in 40..499 {
            app::next(&mut subscriber).await?.ack();
        }
        wait::until_ok("all acks but one", SOON, async || {
            let subscription = admin::subscription(&channel, WORK).await?;
            let position = subscription.positions.first().context("no position")?;
            ensure!((position.floor, position.backlog) == (0, 1), "{position:?}");
            ensure!(position.waits_for.contains("1 messages wait"), "{position:?}");
            Ok(())
        })
        .await?;
        app::shutdown(client).await
    });
}

fn hello(name: &str) -> SubscribeHello {
    SubscribeHello {
        kind: v1::SubscriptionKind::Shared.into(),
        start: admin::earliest(),
        max_outstanding_messages: 10,
        ..raw::consumer_hello(WORK, name, &[TOPIC])
    }
}

#[test]
fn the_jobs_of_a_crashed_worker_go_to_the_others_after_its_grace() {
    const GRACE: Duration = Duration::from_secs(30);
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let channel = raw::connect(&server.url()).await?;
        admin::create_topic(&channel, TOPIC).await?;
        let client = app::client(&server.url())?;
        let (mut crashing, _) = SubscribeStream::welcomed(&channel, hello("crashing")).await?;
        let publisher = app::publisher(&client, TOPIC).await?;
        app::publish_numbers(&publisher, 0..10).await?;
        let mut taken = 0;
        while taken < 10 {
            if let Frame::Deliver(deliver) = crashing.next().await? {
                taken += deliver.count();
            }
        }
        let mut other = worker(&client, SubscriptionKind::Shared, "other").await?;
        drop(crashing);
        let lost = Instant::now();
        app::publish_numbers(&publisher, 10..20).await?;
        let fresh = app::next_many(&mut other, 10).await?;
        ensure!(app::sequences(&fresh) == (11..=20).collect::<Vec<_>>(), "{fresh:?}");
        app::confirm(fresh).await?;
        let next = wait::soon("the jobs of the other", 2 * GRACE, other.next()).await?;
        let early = lost.elapsed() < GRACE - Duration::from_secs(1);
        ensure!(!early, "after {:?}", lost.elapsed());
        let Some(Ok(Item::Message(first))) = next else { bail!("{next:?}") };
        let mut rest = app::next_many(&mut other, 9).await?;
        rest.push(first);
        let mut sequences = app::sequences(&rest);
        sequences.sort_unstable();
        ensure!(sequences == (1..=10).collect::<Vec<_>>(), "{sequences:?}");
        // A crash that is no failure of the message: it may never have been in a handler.
        ensure!(rest.iter().all(|one| one.attempt == 1), "{rest:?}");
        app::confirm(rest).await?;
        app::shutdown(client).await
    });
}

#[test]
fn pulls_share_with_each_other_and_with_streams() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let channel = raw::connect(&server.url()).await?;
        admin::create_topic(&channel, TOPIC).await?;
        let request = CreateSubscriptionRequest {
            name: WORK.into(),
            topics: vec![TOPIC.into()],
            kind: v1::SubscriptionKind::Shared.into(),
            ..CreateSubscriptionRequest::default()
        };
        raw::admin(&channel).create_subscription(request).await?;
        let client = app::client(&server.url())?;
        app::publish_numbers(&app::publisher(&client, TOPIC).await?, 0..6).await?;
        let pull = |consumer: &str, max_messages| PullRequest {
            subscription: WORK.into(),
            consumer_id: consumer.into(),
            max_messages,
            ..PullRequest::default()
        };
        let mut caller = raw::subscriber(&channel);
        let sequences = |pulled: &[v1::PulledMessage]| {
            let ids = pulled.iter().filter_map(|one| one.id.as_ref());
            ids.map(|id| id.sequence).collect::<Vec<_>>()
        };
        let first = caller.pull(pull("one", 2)).await?.into_inner().messages;
        let second = caller.pull(pull("two", 2)).await?.into_inner().messages;
        ensure!((sequences(&first), sequences(&second)) == (vec![1, 2], vec![3, 4]));
        let mut streaming = worker(&client, SubscriptionKind::Shared, "three").await?;
        let rest = app::next_many(&mut streaming, 2).await?;
        ensure!(app::sequences(&rest) == [5, 6], "{rest:?}");
        // What one hands back is anybody's.
        let tokens = first.into_iter().map(|one| one.lease_token).collect();
        let delay = Some(prost_types::Duration::default());
        let nack = NackRequest {
            subscription: WORK.into(),
            lease_tokens: tokens,
            delay,
            ..NackRequest::default()
        };
        caller.nack(nack).await?;
        let back = app::next_many(&mut streaming, 2).await?;
        ensure!(app::sequences(&back) == [1, 2], "{back:?}");
        ensure!(back.iter().all(|one| one.attempt == 2), "{back:?}");
        app::confirm(rest).await?;
        app::confirm(back).await?;
        app::shutdown(client).await
    });
}

#[test]
fn a_subscription_is_opened_as_the_kind_that_it_is() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let channel = raw::connect(&server.url()).await?;
        admin::create_topic(&channel, TOPIC).await?;
        let (_one, welcome) = SubscribeStream::welcomed(&channel, hello("one")).await?;
        ensure!(welcome.kind() == v1::SubscriptionKind::Shared, "{welcome:?}");
        // Who does not say which kind gets the one it has.
        let unsaid = SubscribeHello { kind: 0, ..hello("two") };
        let (_two, welcome) = SubscribeStream::welcomed(&channel, unsaid).await?;
        ensure!(welcome.kind() == v1::SubscriptionKind::Shared, "{welcome:?}");
        let exclusive = v1::SubscriptionKind::Exclusive.into();
        let other = SubscribeHello { kind: exclusive, ..hello("three") };
        let refused = match SubscribeStream::open(&channel, other).await {
            Ok(mut stream) => stream.end().await?,
            Err(status) => status,
        };
        ensure!(raw::reason(&refused).as_deref() == Some("SUBSCRIPTION_MISMATCH"), "{refused:?}");
        let described = admin::subscription(&channel, WORK).await?;
        let names: Vec<_> = described.active_consumers.iter().map(|one| &one.id).collect();
        ensure!(names == ["one", "two"], "{described:?}");
        Ok(())
    });
}
