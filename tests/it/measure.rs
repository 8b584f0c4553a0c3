//! Figures of large amounts. They say what a promise costs and how far it goes, and are looked at by
//! people: CONTRIBUTING.md has the command.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use pubsub_client::{
    Client, CreateSubscription, Message, Publisher, Start, Subscriber, SubscriptionKind,
    TopicConfig,
};
use pubsub_tests::{lab::scenario, wait};
use tokio::{task::JoinSet, time::Instant};

use crate::app::{self, SOON};

const WITHIN: Duration = Duration::from_secs(900);
const MIB: u64 = 1 << 20;
const LARGE: &str = "large";
const SMALL: &str = "small";
const WORK: &str = "work";

/// What a data directory takes up on disk, in MiB, and how many files it has.
fn taken_up(data: &Path) -> Result<(u64, usize)> {
    let (mut blocks, mut files) = (0, 0);
    for entry in fs::read_dir(data)? {
        // A file may go meanwhile.
        if let Ok(metadata) = entry?.metadata() {
            blocks += metadata.blocks();
            files += 1;
        }
    }
    Ok((blocks * 512 / MIB, files))
}

/// How long each of many things took.
#[derive(Default)]
struct Times(Vec<Duration>);

impl Times {
    /// The median, the 99th of a hundred, and the longest.
    fn show(mut self, what: &str) {
        self.0.sort_unstable();
        let at = |part: usize| self.0.get(self.0.len() * part / 100).copied().unwrap_or_default();
        let (p50, p99) = (at(50), at(99));
        let longest = self.0.last().copied().unwrap_or_default();
        eprintln!("{what}: {} times, p50 {p50:?}, p99 {p99:?}, longest {longest:?}", self.0.len());
    }
}

/// Something that goes on beside until it is stopped.
struct Beside<T> {
    stop: Arc<AtomicBool>,
    task: JoinSet<Result<T>>,
}

impl<T: Send + 'static> Beside<T> {
    fn start<F: Future<Output = Result<T>> + Send + 'static>(
        work: impl FnOnce(Arc<AtomicBool>) -> F,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut task = JoinSet::new();
        task.spawn(work(Arc::clone(&stop)));
        Self { stop, task }
    }

    async fn end(mut self) -> Result<T> {
        self.stop.store(true, Ordering::Relaxed);
        self.task.join_next().await.context("it is gone")??
    }
}

/// Publishes one message after the other, each when the last one is on disk.
fn probe(publisher: Publisher) -> Beside<Times> {
    Beside::start(|stop| async move {
        let mut times = Times::default();
        while !stop.load(Ordering::Relaxed) {
            let begun = Instant::now();
            publisher.publish("a probe").await?;
            times.0.push(begun.elapsed());
        }
        Ok(times)
    })
}

/// Publishes many messages of the same bytes.
async fn fill(client: &Client, topic: &str, count: u64, payload: &Bytes) -> Result<()> {
    let publisher = app::publisher(client, topic).await?;
    for _ in 0..count {
        drop(publisher.enqueue(Message::new(payload.clone())).await?);
    }
    wait::soon("the receipts", WITHIN, publisher.flush()).await??;
    Ok(())
}

async fn drain(subscriber: &mut Subscriber, count: u64) -> Result<()> {
    for _ in 1..count {
        app::next(subscriber).await?.ack();
    }
    app::next(subscriber).await?.ack_confirmed().await?;
    Ok(())
}

#[test]
#[ignore = "a measurement"]
fn two_gigabytes_that_are_trimmed_leave_the_disk_and_hold_up_no_publish() {
    const COUNT: u64 = 2 * 1024 * MIB / 1024;
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let client = app::client(&server.url())?;
        let admin = client.admin();
        let kept = TopicConfig::new().with_max_bytes(4096 * MIB);
        admin.create_topic(LARGE, kept.with_retention(Duration::from_secs(3600))).await?;
        admin.create_topic(SMALL, TopicConfig::new()).await?;
        let from = CreateSubscription::to([LARGE]).with_start(Start::Earliest);
        admin.create_subscription(WORK, from).await?;
        let begun = Instant::now();
        fill(&client, LARGE, COUNT, &lab.rng.bytes(1024).into()).await?;
        eprintln!("{COUNT} messages of 1 KiB written in {:?}", begun.elapsed());
        let begun = Instant::now();
        let mut subscriber = client.subscriber(WORK).open().await?;
        drain(&mut subscriber, COUNT).await?;
        eprintln!("read and acked in {:?}", begun.elapsed());
        let (before, files) = taken_up(server.data())?;
        eprintln!("on disk before: {before} MiB in {files} files");

        let probing = probe(app::publisher(&client, SMALL).await?);
        tokio::time::sleep(Duration::from_secs(10)).await;
        probing.end().await?.show("a publish before the trim");

        let others = probe(app::publisher(&client, SMALL).await?);
        let same = probe(app::publisher(&client, LARGE).await?);
        let begun = Instant::now();
        admin.update_topic(LARGE, TopicConfig::new().with_retention(Duration::ZERO)).await?;
        wait::until_ok("the end of the trim", WITHIN, async || {
            let (now, _) = taken_up(server.data())?;
            ensure!(now < before / 2, "{now} MiB of {before} are left");
            Ok(())
        })
        .await?;
        eprintln!("half of it is gone after {:?}", begun.elapsed());
        let (mut last, mut since) = (before, Instant::now());
        while since.elapsed() < SOON {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let (now, _) = taken_up(server.data())?;
            if now < last {
                (last, since) = (now, Instant::now());
            }
        }
        eprintln!("nothing goes any more after {:?}", begun.elapsed() - since.elapsed());
        others.end().await?.show("a publish to another topic during the trim");
        same.end().await?.show("a publish to the topic during the trim");
        let (after, files) = taken_up(server.data())?;
        eprintln!("on disk after: {after} MiB in {files} files");
        ensure!(after < before / 4, "the space did not come back");
        app::shutdown(client).await
    });
}

/// Publishes a drop every few milliseconds and takes everything that comes; measures how long each
/// drop took from its publish to its delivery. Ends when so much has come in all.
async fn trickle(
    subscriber: &mut Subscriber,
    publisher: &Publisher,
    mut flood: u64,
    mut drops: u64,
) -> Result<Times> {
    let publisher = publisher.clone();
    let origin = Instant::now();
    let dripping = Beside::start(|stop| async move {
        let mut ticks = tokio::time::interval(Duration::from_millis(5));
        let mut count = 0_u64;
        while !stop.load(Ordering::Relaxed) {
            ticks.tick().await;
            let at = u64::try_from(origin.elapsed().as_micros())?;
            drop(publisher.enqueue(Message::new(at.to_string())).await?);
            count += 1;
        }
        Ok(count)
    });
    let mut times = Times::default();
    while flood > 0 || drops > 0 {
        let delivery = app::next(subscriber).await?;
        if &*delivery.id.topic == SMALL {
            let sent: u64 = std::str::from_utf8(&delivery.payload)?.parse()?;
            times.0.push(origin.elapsed().saturating_sub(Duration::from_micros(sent)));
            drops = drops.saturating_sub(1);
        } else {
            flood = flood.saturating_sub(1);
        }
        delivery.ack();
    }
    let rest = dripping.end().await? - times.0.len() as u64;
    if rest > 0 {
        drain(subscriber, rest).await?;
    }
    Ok(times)
}

#[test]
#[ignore = "a measurement"]
fn a_trickle_beside_a_million_messages() {
    const BACKLOG: u64 = 1_000_000;
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let client = app::client(&server.url())?;
        let admin = client.admin();
        admin.create_topic(LARGE, TopicConfig::new()).await?;
        admin.create_topic(SMALL, TopicConfig::new()).await?;
        let kinds =
            [SubscriptionKind::Exclusive, SubscriptionKind::Shared, SubscriptionKind::KeyOrdered];
        for kind in kinds {
            let settings = CreateSubscription::to([LARGE, SMALL]).with_kind(kind);
            admin.create_subscription(format!("{kind:?}"), settings).await?;
        }
        fill(&client, LARGE, BACKLOG, &lab.rng.bytes(100).into()).await?;
        let publisher = app::publisher(&client, SMALL).await?;
        for kind in kinds {
            let name = format!("{kind:?}");
            let opening = client.subscriber(&*name).consumer_id("c");
            let mut subscriber = opening.open().await.context("the subscriber")?;
            // What the others were sent of the trickle comes as one more backlog: not measured.
            let old = admin.topic(SMALL).await?.head;
            let begun = Instant::now();
            let beside = trickle(&mut subscriber, &publisher, BACKLOG, 0).await?;
            eprintln!("{name}: {BACKLOG} behind, and {old} drops; done in {:?}", begun.elapsed());
            beside.show("  a drop beside them");
            let alone = trickle(&mut subscriber, &publisher, 0, 500).await?;
            alone.show("  a drop alone");
            drop(subscriber);
            // The rest begins without old drops.
            for other in kinds {
                admin.seek(format!("{other:?}"), Some(SMALL), Start::Latest).await?;
            }
        }
        app::shutdown(client).await
    });
}
