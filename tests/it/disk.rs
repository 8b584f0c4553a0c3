//! What the disk does to a server: it is shared, full, damaged, or older than it was.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use pubsub_client::{Event as Item, Start};
use pubsub_proto::v1::{
    AcknowledgeRequest, CreateSubscriptionRequest, Message, MessageId, PublishRequest,
    PublisherHello, PullRequest, StartPosition, SubscribeHello, start_position::Position,
};
use pubsub_tests::{
    admin,
    auditor::{self, Damaged},
    checker::Value,
    files::{self, SmallDisk},
    lab::{Lab, scenario},
    process::Server,
    raw::{self, PublishStream, SubscribeStream},
    wait,
};
use tonic::transport::Channel;

use crate::{app, sealing};

const WITHIN: Duration = Duration::from_secs(120);
const SOON: Duration = Duration::from_secs(20);
const STOP: Duration = Duration::from_secs(8);
const TOPIC: &str = "orders";
const SUBSCRIPTION: &str = "billing";

fn values(count: u32) -> impl Iterator<Item = Value> {
    (1..=count).map(|counter| Value { publisher: 1, counter })
}

async fn publish(channel: &Channel, messages: Vec<Message>) -> Result<()> {
    let request = PublishRequest { topic: TOPIC.into(), messages, atomic: None };
    let answer = raw::publisher(channel).publish(request).await?;
    ensure!(!answer.into_inner().results.is_empty(), "an answer without fates");
    Ok(())
}

/// A server with some messages, stopped in an orderly way.
async fn stopped_with(lab: &Lab, data: &Path, count: u32) -> Result<()> {
    let mut server = lab.server_on(data).await?;
    let channel = raw::connect(&server.url()).await?;
    admin::create_topic(&channel, TOPIC).await?;
    // In large commits, so that most of the file is in use and not what earlier ones left.
    let messages: Vec<_> = values(count).map(|value| raw::message(value.payload())).collect();
    for batch in messages.chunks(500) {
        publish(&channel, batch.to_vec()).await?;
    }
    server.begin_stop()?;
    server.exited(STOP).await?;
    Ok(())
}

#[test]
fn a_second_server_on_the_same_directory_is_refused() {
    scenario(WITHIN, async |lab| {
        let mut first = lab.server().await?;
        let channel = raw::connect(&first.url()).await?;
        admin::create_topic(&channel, TOPIC).await?;
        let Err(refused) = lab.server().await else {
            bail!("two servers run on one directory");
        };
        let pid = first.pid()?.to_string();
        let text = format!("{refused:#}");
        ensure!(text.contains(&pid), "it does not say that {pid} holds it: {text}");
        publish(&channel, vec![raw::message("still serving")]).await?;

        // What a killed server held is free at once.
        first.kill().await?;
        let second = lab.server().await?;
        let channel = raw::connect(&second.url()).await?;
        ensure!(auditor::read(&channel, TOPIC).await?.messages.len() == 1);
        Ok(())
    });
}

#[test]
fn a_flipped_bit_gives_a_typed_error_and_never_a_wrong_byte() {
    const MESSAGES: u32 = 3000;
    const FLIPS: u32 = 60;
    scenario(WITHIN, async |lab| {
        let (stopped, killed) = (lab.path("stopped"), lab.path("killed"));
        stopped_with(lab, &stopped, MESSAGES).await?;
        files::copy(&stopped, &killed)?;
        lab.server_on(&killed).await?.kill().await?;
        let mut outcomes = [0; 3];
        for flip in 0..FLIPS {
            let data = lab.path(&format!("flip-{flip}"));
            let original = if flip % 2 == 0 { &stopped } else { &killed };
            files::copy(original, &data)?;
            let stores = files::ending(&data, ".redb")?;
            let store = &stores[usize::try_from(lab.rng.below(stores.len() as u64))?];
            let place = files::flip_a_bit(store, &mut lab.rng)?;
            let outcome = read_damaged(lab, &data, MESSAGES).await.context(place)?;
            outcomes[outcome as usize] += 1;
        }
        let [refused, typed, harmless] = outcomes;
        eprintln!("{refused} refused at start, {typed} typed errors, {harmless} harmless");
        ensure!(refused + typed > FLIPS / 10, "the run is void: no flip did anything");
        Ok(())
    });
}

#[derive(Clone, Copy)]
enum Damage {
    RefusedAtStart,
    TypedError,
    Harmless,
}

/// Reads everything from a damaged store. Whatever is shown has to be right.
async fn read_damaged(lab: &Lab, data: &Path, count: u32) -> Result<Damage> {
    let server = match lab.server_on(data).await {
        Ok(server) => server,
        Err(refused) => {
            let text = format!("{refused:#}");
            ensure!(text.contains("damaged") && !text.contains("panicked"), "{text}");
            return Ok(Damage::RefusedAtStart);
        }
    };
    let channel = raw::connect(&server.url()).await?;
    let audit = match auditor::read(&channel, TOPIC).await {
        Ok(audit) => audit,
        Err(error) => {
            let reason = error.downcast_ref().and_then(raw::reason);
            let typed = error.is::<Damaged>() || reason.as_deref() == Some("DATA_LOSS");
            ensure!(typed, "not DATA_LOSS but: {error:?}");
            return Ok(Damage::TypedError);
        }
    };
    let messages = audit.messages.into_iter().map(|stored| stored.message.unwrap_or_default());
    let read: Vec<_> = messages.map(|message| Value::of(&message.payload)).collect();
    let expected: Vec<_> = values(count).map(Some).collect();
    ensure!(read == expected, "wrong or missing messages are shown: {read:?}");
    Ok(Damage::Harmless)
}

/// More messages than the hot file keeps, or than it ever had.
#[derive(Clone, Copy)]
struct Backlog {
    messages: u64,
    size: usize,
    /// How many are published at a time.
    batch: u64,
    /// How the names of the files begin that they are in.
    files: &'static str,
}

impl Backlog {
    fn payload(self, number: u64) -> Vec<u8> {
        let byte = u8::try_from(number % 251).expect("it is small");
        vec![byte; self.size]
    }

    async fn publish(self, channel: &Channel) -> Result<()> {
        for first in (1..=self.messages).step_by(usize::try_from(self.batch)?) {
            let batch = first..first + self.batch;
            let batch = batch.map(|number| raw::message(self.payload(number)));
            publish(channel, batch.collect()).await?;
        }
        Ok(())
    }

    /// The last of the files.
    fn file(self, data: &Path) -> Result<PathBuf> {
        let mut all = files::ending(data, "")?;
        all.retain(|file| file.file_name().is_some_and(|name| self.is_in(&name.to_string_lossy())));
        all.pop().context("there is no such file")
    }

    fn is_in(self, name: &str) -> bool {
        name.starts_with(self.files) && !name.ends_with(".tmp")
    }
}

#[test]
fn a_backlog_in_sealed_files_is_read_whole_and_a_flipped_bit_in_it_is_typed() {
    a_backlog_is_read_whole(Backlog { messages: 5_000, size: 60_000, batch: 1, files: "sealed-" });
}

#[test]
fn a_backlog_in_blob_files_is_read_whole_and_a_flipped_bit_in_it_is_typed() {
    a_backlog_is_read_whole(Backlog { messages: 320, size: 512 << 10, batch: 16, files: "blob-" });
}

fn a_backlog_is_read_whole(backlog: Backlog) {
    scenario(WITHIN, async |lab| {
        let mut server = lab.server().await?;
        let channel = raw::connect(&server.url()).await?;
        admin::create_topic(&channel, TOPIC).await?;
        admin::create_topic(&channel, "other").await?;
        backlog.publish(&channel).await?;
        let data = server.data().to_owned();
        wait::until_ok("a file", SOON, async || backlog.file(&data)).await?;
        // So that what it holds is in no other file any more.
        sealing::all_sealed(&data).await?;
        server.kill().await?;
        server.start_again().await?;
        let channel = raw::connect(&server.url()).await?;
        let audit = auditor::read(&channel, TOPIC).await?;
        let count = audit.messages.len() as u64;
        ensure!(count == backlog.messages, "{count} messages");
        for stored in audit.messages {
            let payload = backlog.payload(stored.sequence);
            let right = stored.message.is_some_and(|one| one.payload == payload);
            ensure!(right, "{} has wrong bytes", stored.sequence);
        }

        server.kill().await?;
        let place = files::flip_a_bit(&backlog.file(&data)?, &mut lab.rng)?;
        let Ok(()) = server.start_again().await else {
            // It is the check at the start that has found it.
            return Ok(());
        };
        let channel = raw::connect(&server.url()).await?;
        let error = auditor::read(&channel, TOPIC).await.err().context("it reads well")?;
        let Damaged { sequence } = error.downcast().context(place)?;
        it_is_told_in_the_stream_and_a_seek_ends_it(&server.url(), sequence).await?;
        a_pull_is_told(&channel, sequence).await
    });
}

/// A consumer is told in its stream, which lives on, and goes on behind the damage.
async fn it_is_told_in_the_stream_and_a_seek_ends_it(url: &str, sequence: u64) -> Result<()> {
    let client = app::client(url)?;
    let mut next = sequence.saturating_sub(3).max(1);
    let subscriber = client.subscriber(SUBSCRIPTION).topic(TOPIC).start(Start::Sequence(next));
    let mut subscriber = wait::soon("the subscription", SOON, subscriber.open()).await??;
    let loss = loop {
        match wait::soon("news", SOON, subscriber.next()).await?.context("it ended")?? {
            Item::Message(delivery) => {
                ensure!(delivery.id.sequence == next, "{} came, not {next}", delivery.id);
                next += 1;
                delivery.ack();
            }
            Item::DataLoss(loss) => break loss,
            other => bail!("neither message nor damage: {other:?}"),
        }
    };
    ensure!(loss.id.sequence == sequence && next == sequence, "{loss:?} after {next}");
    client.admin().seek(SUBSCRIPTION, None, Start::Latest).await?;
    let publisher = app::publisher(&client, TOPIC).await?;
    let ids = app::publish_numbers(&publisher, [1]).await?;
    let delivery = app::next(&mut subscriber).await?;
    ensure!(delivery.id == ids[0], "{} came, not {}", delivery.id, ids[0]);
    delivery.ack();
    app::shutdown(client).await
}

/// Nothing to pull is one thing, and something that cannot be read another.
async fn a_pull_is_told(channel: &Channel, sequence: u64) -> Result<()> {
    let start = Some(StartPosition { position: Some(Position::Sequence(sequence)) });
    let request = CreateSubscriptionRequest {
        name: "pulling".into(),
        topics: vec![TOPIC.into()],
        start,
        ..CreateSubscriptionRequest::default()
    };
    raw::admin(channel).create_subscription(request).await?;
    let pull = PullRequest { subscription: "pulling".into(), ..PullRequest::default() };
    let refusal = raw::refusal(raw::subscriber(channel).pull(pull).await)?;
    ensure!(refusal == "DATA_LOSS", "{refusal}");
    Ok(())
}

#[test]
fn a_full_disk_refuses_publishes_and_keeps_reads_and_acks_working() {
    const BEFORE: u32 = 50;
    scenario(WITHIN, async |lab| {
        let Some(disk) = SmallDisk::mount(&lab.path("disk"), 192)? else {
            return Ok(());
        };
        let mut server = lab.server_on(&disk.path().join("data")).await?;
        let channel = raw::connect(&server.url()).await?;
        admin::create_topic(&channel, TOPIC).await?;
        admin::create_subscription(&channel, SUBSCRIPTION, &[TOPIC]).await?;
        for value in values(BEFORE) {
            publish(&channel, vec![raw::message(value.payload())]).await?;
        }
        for (round, left) in [(0, 2048), (1, 0)] {
            disk.fill(left)?;
            refused_as_full(&channel).await?;
            ack_one(&channel).await.with_context(|| format!("acking with {left} KiB left"))?;
            auditor::read(&channel, TOPIC).await.context("reading while full")?;
            disk.free()?;
            wait::until_ok("recovery without help", SOON, async || {
                publish(&channel, vec![raw::message(format!("after {round}"))]).await
            })
            .await?;
        }
        server.kill().await?;
        server.start_again().await?;
        let channel = raw::connect(&server.url()).await?;
        let audit = auditor::read(&channel, TOPIC).await?;
        ensure!(audit.messages.len() >= usize::try_from(BEFORE)? + 2, "messages are lost");
        let floor = admin::subscription(&channel, SUBSCRIPTION).await?.positions[0].floor;
        ensure!(floor == 2, "the acks are lost: the floor is {floor}");
        drop(server);
        Ok(())
    });
}

/// Publishes until the server says that the disk is full. What it takes until then is small.
async fn refused_as_full(channel: &Channel) -> Result<()> {
    wait::until_ok("a refusal", SOON, async || {
        let request = PublishRequest {
            topic: TOPIC.into(),
            messages: vec![raw::message(vec![1; 64 << 10])],
            atomic: None,
        };
        let answer = raw::publisher(channel).publish(request).await;
        let reason = raw::publish_refusal(answer)?;
        ensure!(reason == "DISK_FULL", "{reason} instead of DISK_FULL");
        Ok(())
    })
    .await
}

/// Acks the next message. A server that has just found out that its disk is full may not know
/// the outcome of an ack; the same ack succeeds soon after.
async fn ack_one(channel: &Channel) -> Result<()> {
    let mut subscriber = raw::subscriber(channel);
    let pull = PullRequest {
        subscription: SUBSCRIPTION.into(),
        max_messages: 1,
        ..PullRequest::default()
    };
    let pulled = subscriber.pull(pull).await?.into_inner();
    let ids: Vec<MessageId> = pulled.messages.into_iter().filter_map(|one| one.id).collect();
    ensure!(ids.len() == 1, "nothing to pull");
    wait::until_ok("an ack", SOON, async || {
        let request = AcknowledgeRequest { subscription: SUBSCRIPTION.into(), ids: ids.clone() };
        raw::subscriber(channel).acknowledge(request).await?;
        Ok(())
    })
    .await
}

#[test]
fn a_restored_older_store_is_noticed_however_often_it_was_restarted() {
    scenario(WITHIN, async |lab| {
        let (data, copy) = (lab.path("data"), lab.path("copy"));
        stopped_with(lab, &data, 5).await?;
        files::copy(&data, &copy)?;
        let server = lab.server_on(&data).await?;
        let channel = raw::connect(&server.url()).await?;
        let (publisher, welcome) =
            PublishStream::welcomed(&channel, raw::publisher_hello(TOPIC, [1; 16])).await?;
        let (reader, session) =
            SubscribeStream::welcomed(&channel, raw::consumer_hello("s", "worker", &[TOPIC]))
                .await?;
        drop((publisher, reader, server));

        for _ in 0..10 {
            let mut restored = lab.server_on(&copy).await?;
            restored.begin_stop()?;
            restored.exited(STOP).await?;
        }
        let restored = lab.server_on(&copy).await?;
        let channel = raw::connect(&restored.url()).await?;
        let hello = PublisherHello {
            boot_id: welcome.boot_id,
            topic_epoch: welcome.topic_epoch,
            ..raw::publisher_hello(TOPIC, [1; 16])
        };
        diverges(publisher_end(&channel, hello).await)?;
        let hello = SubscribeHello {
            boot_id: session.boot_id,
            ..raw::consumer_hello("s", "worker", &[TOPIC])
        };
        diverges(consumer_end(&channel, hello).await)
    });
}

fn diverges(reason: Result<String>) -> Result<()> {
    let reason = reason?;
    ensure!(reason == "DIVERGED", "{reason} instead of DIVERGED");
    Ok(())
}

async fn publisher_end(channel: &Channel, hello: PublisherHello) -> Result<String> {
    match PublishStream::open(channel, hello).await {
        Ok(mut stream) => raw::refusal::<()>(Err(stream.end().await?)),
        Err(status) => raw::refusal::<()>(Err(status)),
    }
}

async fn consumer_end(channel: &Channel, hello: SubscribeHello) -> Result<String> {
    match SubscribeStream::open(channel, hello).await {
        Ok(mut stream) => raw::refusal::<()>(Err(stream.end().await?)),
        Err(status) => raw::refusal::<()>(Err(status)),
    }
}

#[test]
fn a_data_directory_that_is_a_file_is_refused() {
    scenario(WITHIN, async |lab| {
        let path = lab.path("file");
        std::fs::write(&path, "not a directory")?;
        let refused = Server::start(&path, lab.log()).await;
        ensure!(refused.is_err(), "it serves from a file");
        ensure!(std::fs::read_to_string(&path)? == "not a directory");
        Ok(())
    });
}
