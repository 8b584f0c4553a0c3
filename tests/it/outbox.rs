//! Publishing by way of a local file, by processes that are killed.

use std::{
    collections::BTreeMap,
    ops::RangeInclusive,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, bail, ensure};
use pubsub_client::{
    Client, Drain, Env, FileError, MemoryInbox, Message, Outbox, OutboxError, OutboxFile,
    OutboxState, Reason, RetryPolicy,
};
use pubsub_proto::v1::TopicConfig;
use pubsub_tests::{
    admin, auditor, files,
    lab::scenario,
    process::Server,
    proxy::{Direction, Mode},
    raw, wait,
};
use tokio::{sync::mpsc, task::JoinSet};
use tonic::transport::Channel;

use crate::{
    app::{self, SOON},
    child::{self, Program},
    lifetimes,
};

const WITHIN: Duration = Duration::from_secs(120);
const TOPIC: &str = "orders";
const PUBLISHER: &str = "outbox::a_program_that_publishes";
const DAY: Duration = Duration::from_secs(24 * 3600);

/// Enqueues numbers in order, says so for each, and waits until they are published.
#[test]
#[ignore = "a program that scenarios start and kill"]
fn a_program_that_publishes() {
    child::run(async {
        let client = app::client(&child::variable("OUTBOX_URL"))?;
        let outbox = client.outbox(child::variable("OUTBOX_FILE")).open().await?;
        let first: u64 = child::variable("OUTBOX_FIRST").parse()?;
        let count: u64 = child::variable("OUTBOX_COUNT").parse()?;
        for number in first..first + count {
            outbox.enqueue(TOPIC, number.to_string()).await?;
            eprintln!("enqueued {number}");
        }
        eprintln!("enqueued all");
        outbox.flush().await?;
        eprintln!("published all");
        Ok(outbox.close(SOON).await.map(drop)?)
    });
}

fn start(url: &str, file: &Path, numbers: (u64, u64), more: &[(&str, &str)]) -> Result<Program> {
    let (first, count) = (numbers.0.to_string(), numbers.1.to_string());
    let mut variables = vec![
        ("OUTBOX_URL", url),
        ("OUTBOX_FILE", file.to_str().context("a path that is text")?),
        ("OUTBOX_FIRST", &first),
        ("OUTBOX_COUNT", &count),
    ];
    variables.extend(more);
    Program::start(PUBLISHER, &variables)
}

/// Opens the file here. The kernel may take a moment to know that a killed process is gone.
async fn open(client: &Client, file: &Path) -> Result<Outbox> {
    wait::until_ok("the file", SOON, async || Ok(client.outbox(file).open().await?)).await
}

async fn flush(outbox: &Outbox) -> Result<Result<(), OutboxError>> {
    wait::soon("the flush", SOON, outbox.flush()).await
}

async fn state(outbox: &Outbox, like: impl FnMut(&OutboxState) -> bool) -> Result<OutboxState> {
    let mut watch = outbox.state();
    let now = watch.clone();
    let state = wait::soon("the state", SOON, watch.wait_for(like)).await;
    state.with_context(|| format!("it is {:#?}", now.get()))?.context("the outbox is closed")
}

/// The numbers that are stored, in order.
async fn stored(channel: &Channel) -> Result<Vec<u64>> {
    let audit = auditor::read(channel, TOPIC).await?;
    let payloads = audit.messages.into_iter().filter_map(|received| received.message);
    payloads.map(|message| Ok(std::str::from_utf8(&message.payload)?.parse()?)).collect()
}

async fn head(channel: &Channel) -> Result<u64> {
    Ok(admin::topic(channel, TOPIC).await?.head)
}

#[test]
fn a_publisher_killed_at_any_point_of_the_hand_over_publishes_each_message_once() {
    const COUNT: u64 = 40;
    scenario(WITHIN, async |lab| {
        // Where it is killed, and whether the server has the messages by then.
        for (place, sent) in
            [("sending", false), ("sent", true), ("answered", true), ("removing", true)]
        {
            let server = lab.server_on(&lab.path(place)).await?;
            let channel = raw::connect(&server.url()).await?;
            admin::create_topic(&channel, TOPIC).await?;
            let file = lab.path(&format!("{place}.outbox"));
            // Without a server at first, so that all of them are handed over together.
            let nowhere = "http://127.0.0.1:9";
            let mut program = start(nowhere, &file, (0, COUNT), &[])?;
            program.says("enqueued all").await?;
            program.kill().await?;

            let fail = [("PUBSUB_FAILPOINT", place)];
            let mut program = start(&server.url(), &file, (0, 0), &fail)?;
            program.says(&format!("failpoint {place}")).await?;
            if sent {
                wait::until_ok("the messages at the server", SOON, async || {
                    ensure!(head(&channel).await? == COUNT);
                    Ok(())
                })
                .await?;
            } else {
                ensure!(head(&channel).await? == 0, "{place}: it was sent");
            }
            program.kill().await?;

            let left = async || Ok(OutboxFile::open(&file)?.topics()?);
            let left = wait::until_ok("the file", SOON, left).await?;
            ensure!(left[0].pending.messages == COUNT, "{place}: it has removed some: {left:?}");

            let client = app::client(&server.url())?;
            let outbox = open(&client, &file).await?;
            flush(&outbox).await??;
            let left = outbox.close(SOON).await?;
            ensure!(left.pending.messages + left.parked.messages == 0, "{place}: {left:?}");
            let all: Vec<_> = (0..COUNT).collect();
            ensure!(stored(&channel).await? == all, "{place}: {:?}", stored(&channel).await?);
            app::shutdown(client).await?;
        }
        Ok(())
    });
}

#[test]
fn publishers_and_servers_killed_at_random_lose_nothing_and_repeat_nothing() {
    const ROUNDS: u64 = 8;
    // More than it enqueues before it is killed.
    const COUNT: u64 = 1_000_000;
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        let direct = raw::connect(&rig.server.url()).await?;
        admin::create_topic(&direct, TOPIC).await?;
        let file = lab.path("outbox");
        let mut taken = Vec::new();
        for round in 0..ROUNDS {
            let program = start(&rig.url(), &file, (round * COUNT, COUNT), &[])?;
            let said = program.kill_after(lab.rng.between(1, 300)).await?;
            ensure!(!said.iter().any(|line| line == "enqueued all"), "it was not killed");
            let numbers = said.iter().filter_map(|line| line.strip_prefix("enqueued "));
            taken.extend(numbers.filter_map(|number| number.parse::<u64>().ok()));
            if lab.rng.one_in(2) {
                rig.crash().await?;
            }
        }
        let client = app::client(&rig.url())?;
        let outbox = open(&client, &file).await?;
        flush(&outbox).await??;
        outbox.close(SOON).await?;
        let stored = stored(&raw::connect(&rig.server.url()).await?).await?;
        ensure!(stored.is_sorted_by(|a, b| a < b), "out of order, or twice: {stored:?}");
        let lost: Vec<_> = taken.iter().filter(|n| stored.binary_search(n).is_err()).collect();
        ensure!(lost.is_empty(), "lost: {lost:?}");
        app::shutdown(client).await
    });
}

/// A clock that is ahead.
#[derive(Debug)]
struct Ahead(Duration);

impl Env for Ahead {
    fn fill(&self, bytes: &mut [u8]) {
        getrandom::fill(bytes).expect("the operating system has randomness");
    }

    #[expect(clippy::disallowed_methods, reason = "this is an injected clock")]
    fn now(&self) -> SystemTime {
        SystemTime::now() + self.0
    }
}

fn later(url: &str, by: Duration) -> Result<Client> {
    let retry = RetryPolicy::new(Duration::from_millis(10), Duration::from_millis(250));
    Ok(Client::builder(url).fast().retry(retry).env(Arc::new(Ahead(by))).connect_lazy()?)
}

/// Leaves messages in a file, of which at least the first is noted as sent.
async fn leave_some_sent(url: &str, file: &Path) -> Result<()> {
    let mut program = start(url, file, (0, 5), &[("PUBSUB_FAILPOINT", "sending")])?;
    program.says("failpoint sending").await?;
    program.kill().await.map(drop)
}

#[test]
fn what_was_sent_too_long_ago_is_set_aside_and_resent_on_request_only() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let channel = raw::connect(&server.url()).await?;
        admin::create_topic(&channel, TOPIC).await?;
        let file = lab.path("outbox");
        leave_some_sent(&server.url(), &file).await?;

        let client = later(&server.url(), 8 * DAY)?;
        let outbox = open(&client, &file).await?;
        let refused = flush(&outbox).await?;
        let Err(OutboxError::Parked { messages }) = refused else { bail!("{refused:?}") };
        let parked = outbox.parked(0, 100).await?;
        ensure!(parked.len() == messages && messages > 0, "{parked:?}");
        let mut aside = Vec::new();
        for parked in &parked {
            ensure!(parked.refused.is_none() && parked.first_sent.is_some(), "{parked:?}");
            ensure!(parked.detail.contains("resend"), "{parked:?}");
            aside.push(std::str::from_utf8(&parked.message.payload)?.parse::<u64>()?);
        }
        let before = stored(&channel).await?;
        ensure!(before.iter().all(|number| !aside.contains(number)), "{before:?} {aside:?}");

        let mut items = parked.iter().map(|parked| parked.item);
        let item = items.next().context("an item")?;
        outbox.resend(item).await?;
        let again = outbox.resend(item).await;
        ensure!(matches!(again, Err(OutboxError::NotParked { .. })), "{again:?}");
        for item in items {
            outbox.discard(item).await?;
        }
        flush(&outbox).await??;
        let mut all = before;
        all.extend(aside.first());
        ensure!(stored(&channel).await? == all);
        let left = outbox.close(SOON).await?;
        ensure!(left.parked.messages + left.pending.messages == 0, "{left:?}");
        app::shutdown(client).await
    });
}

#[test]
fn how_long_ago_is_too_long_is_up_to_the_topic() {
    const HOUR: Duration = Duration::from_secs(3600);
    scenario(WITHIN, async |lab| {
        for (window, later_by, too_long) in
            [(None, 6 * DAY, false), (Some(HOUR), 2 * HOUR, true), (Some(3 * HOUR), HOUR, false)]
        {
            let name = format!("{window:?}-{later_by:?}");
            let server = lab.server_on(&lab.path(&name)).await?;
            let channel = raw::connect(&server.url()).await?;
            let window = window.map(prost_types::Duration::try_from).transpose()?;
            let config = TopicConfig { idempotency_window: window, ..TopicConfig::default() };
            admin::create_topic_with(&channel, TOPIC, config).await?;
            let file = lab.path(&format!("{name}.outbox"));
            leave_some_sent(&server.url(), &file).await?;
            let client = later(&server.url(), later_by)?;
            let outbox = open(&client, &file).await?;
            let flushed = flush(&outbox).await?;
            let parked = matches!(flushed, Err(OutboxError::Parked { .. }));
            ensure!(parked == too_long, "{name}: {flushed:?}");
            outbox.close(SOON).await?;
            app::shutdown(client).await?;
        }
        Ok(())
    });
}

#[test]
fn what_was_never_sent_is_published_however_long_it_waited() {
    const COUNT: u64 = 20;
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let channel = raw::connect(&server.url()).await?;
        admin::create_topic(&channel, TOPIC).await?;
        let file = lab.path("outbox");
        let mut program = start("http://127.0.0.1:9", &file, (0, COUNT), &[])?;
        program.says("enqueued all").await?;
        program.kill().await?;
        let client = later(&server.url(), 30 * DAY)?;
        let outbox = open(&client, &file).await?;
        flush(&outbox).await??;
        ensure!(stored(&channel).await? == (0..COUNT).collect::<Vec<_>>());
        outbox.close(SOON).await?;
        app::shutdown(client).await
    });
}

#[test]
fn a_refused_message_is_set_aside_with_its_reason_and_the_others_go_on() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let channel = raw::connect(&server.url()).await?;
        let config = TopicConfig { max_message_bytes: 1000, ..TopicConfig::default() };
        admin::create_topic_with(&channel, TOPIC, config).await?;
        let client = app::client(&server.url())?;
        let outbox = client.outbox(lab.path("outbox")).open().await?;
        outbox.enqueue(TOPIC, Message::new("1").with_idempotency_key("key")).await?;
        let conflict = Message::new("2").with_idempotency_key("key");
        let conflict = outbox.enqueue(TOPIC, conflict).await?.item;
        let large = outbox.enqueue(TOPIC, vec![b'3'; 2000]).await?.item;
        outbox.enqueue(TOPIC, "4").await?;
        let nameless = outbox.enqueue("not a topic!", "5").await?.item;

        let refused = flush(&outbox).await?;
        ensure!(matches!(refused, Err(OutboxError::Parked { messages: 3 })), "{refused:?}");
        ensure!(stored(&channel).await? == [1, 4]);
        let parked = outbox.parked(0, 10).await?;
        let reasons: BTreeMap<_, _> = parked.iter().map(|p| (p.item, p.refused)).collect();
        let expected = BTreeMap::from([
            (conflict, Some(Reason::IdempotencyKeyReused)),
            (large, Some(Reason::MessageTooLarge)),
            (nameless, Some(Reason::InvalidArgument)),
        ]);
        ensure!(reasons == expected, "{parked:#?}");
        ensure!(outbox.state().get().last_error.is_some());
        // It is there after the file was opened again, and refused again if it is resent.
        outbox.close(SOON).await?;
        let outbox = open(&client, &lab.path("outbox")).await?;
        let again = outbox.resend(large).await?;
        let refused = flush(&outbox).await?;
        ensure!(matches!(refused, Err(OutboxError::Parked { messages: 3 })), "{refused:?}");
        ensure!(outbox.parked(again, 1).await?[0].refused == Some(Reason::MessageTooLarge));
        outbox.close(SOON).await?;
        app::shutdown(client).await
    });
}

#[test]
fn a_topic_that_does_not_exist_waits_visibly_and_holds_up_no_other() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let channel = raw::connect(&server.url()).await?;
        admin::create_topic(&channel, "other").await?;
        let client = app::client(&server.url())?;
        let outbox = client.outbox(lab.path("outbox")).open().await?;
        for number in 0..10 {
            outbox.enqueue(TOPIC, number.to_string()).await?;
            outbox.enqueue("other", number.to_string()).await?;
        }
        let waits = |state: &OutboxState| {
            let mut topics = state.topics.iter();
            let topic = topics.find(|topic| &*topic.topic == TOPIC);
            let waiting = topic.and_then(|topic| topic.waiting.as_ref());
            waiting.is_some_and(|waiting| waiting.reason == Some(Reason::TopicNotFound))
        };
        let state = state(&outbox, |state| waits(state) && state.pending.messages == 10).await?;
        ensure!(state.parked.messages == 0, "{state:?}");
        ensure!(admin::topic(&channel, "other").await?.head == 10);
        admin::create_topic(&channel, TOPIC).await?;
        flush(&outbox).await??;
        ensure!(stored(&channel).await? == (0..10).collect::<Vec<_>>());
        ensure!(outbox.state().get().topics.iter().all(|topic| topic.waiting.is_none()));
        outbox.close(SOON).await?;
        app::shutdown(client).await
    });
}

#[test]
fn a_client_that_is_shut_down_closes_its_outbox_and_loses_nothing() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let channel = raw::connect(&server.url()).await?;
        admin::create_topic(&channel, TOPIC).await?;
        let client = app::client(&server.url())?;
        let outbox = client.outbox(lab.path("outbox")).open().await?;
        outbox.enqueue(TOPIC, "0").await?;
        flush(&outbox).await??;
        let mut watch = outbox.state();
        app::shutdown(client).await?;
        wait::soon("the end", SOON, async { while watch.changed().await.is_some() {} }).await?;
        let refused = outbox.enqueue(TOPIC, "1").await.map(drop);
        ensure!(matches!(refused, Err(OutboxError::Closed)), "{refused:?}");
        ensure!(flush(&outbox).await?.is_ok(), "nothing is left");
        drop(outbox);
        let client = app::client(&server.url())?;
        let outbox = open(&client, &lab.path("outbox")).await?;
        outbox.enqueue(TOPIC, "1").await?;
        flush(&outbox).await??;
        ensure!(stored(&channel).await? == [0, 1]);
        outbox.close(SOON).await?;
        app::shutdown(client).await
    });
}

#[test]
fn a_restored_older_server_gets_what_was_unanswered_in_order_and_an_inbox_knows_it_as_new() {
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        let copy = lab.path("copy");
        admin::create_topic(&raw::connect(&rig.url()).await?, TOPIC).await?;
        let client = app::client(&rig.url())?;
        let (handled, mut seen) = mpsc::channel(100);
        let subscriber = app::subscribe(&client, "billing", TOPIC).await?;
        let stopper = subscriber.stopper();
        let mut tasks = JoinSet::new();
        tasks.spawn(subscriber.run_once(MemoryInbox::new(), 1, move |message| {
            let sent = handled.try_send(message.payload);
            async move { sent.map_err(|error| error.to_string()) }
        }));
        let outbox = client.outbox(lab.path("outbox")).open().await?;
        let enqueue = async |numbers: RangeInclusive<u64>| {
            for number in numbers {
                outbox.enqueue(TOPIC, number.to_string()).await?;
            }
            Ok::<_, OutboxError>(())
        };
        let mut process = async |numbers: RangeInclusive<u64>| {
            for number in numbers {
                let next = wait::soon("a message", SOON, seen.recv()).await?;
                let next = next.context("the subscriber has ended")?;
                ensure!(next == number.to_string(), "{next:?} comes instead of {number}");
            }
            Ok(())
        };
        enqueue(1..=3).await?;
        flush(&outbox).await??;
        process(1..=3).await?;
        app::all_acked(&raw::connect(&rig.server.url()).await?, "billing").await?;
        lifetimes::stop(&mut rig).await?;
        files::copy(rig.server.data(), &copy)?;
        rig.revive().await?;

        // What the copy does not know, and will give the ids of to others.
        enqueue(4..=6).await?;
        flush(&outbox).await??;
        process(4..=6).await?;
        rig.proxy.set(Direction::Down, Mode::Discard);
        enqueue(7..=20).await?;
        let direct = raw::connect(&rig.server.url()).await?;
        wait::until_ok("a message at the server", SOON, async || {
            ensure!(head(&direct).await? > 6);
            Ok(())
        })
        .await?;
        rig.server.kill().await?;
        rig.proxy.set(Direction::Down, Mode::Pass);
        lifetimes::restore(lab, &mut rig, &copy).await?;

        flush(&outbox).await??;
        let stored = stored(&raw::connect(&rig.server.url()).await?).await?;
        ensure!(stored == (1..=3).chain(7..=20).collect::<Vec<_>>(), "{stored:?}");
        process(7..=20).await?;
        outbox.close(SOON).await?;
        let report = wait::soon("the stop", SOON, stopper.stop(Drain::Finish, SOON)).await?;
        ensure!(report.is_clean(), "{report:?}");
        tasks.join_all().await.into_iter().collect::<Result<(), _>>()?;
        app::shutdown(client).await
    });
}

#[test]
fn an_outbox_is_bounded_and_belongs_to_one_process() {
    scenario(WITHIN, async |lab| {
        let file = lab.path("outbox");
        let nowhere = "http://127.0.0.1:9";
        let mut program = start(nowhere, &file, (0, 10), &[])?;
        program.says("enqueued all").await?;
        let client = app::client(nowhere)?;
        let error = client.outbox(&file).open().await.map(drop);
        ensure!(matches!(error, Err(OutboxError::File(FileError::InUse { .. }))), "{error:?}");
        program.kill().await?;

        let outbox = wait::until_ok("the file", SOON, async || {
            Ok(client.outbox(&file).max_messages(12).max_bytes(2_000).open().await?)
        })
        .await?;
        outbox.enqueue(TOPIC, "10").await?;
        let error = outbox.enqueue(TOPIC, vec![0; 4_000]).await.map(drop);
        ensure!(matches!(error, Err(OutboxError::Full { messages: 11, .. })), "{error:?}");
        outbox.enqueue(TOPIC, "11").await?;
        let Err(error) = outbox.enqueue(TOPIC, "12").await else { bail!("it is full") };
        ensure!(matches!(error, OutboxError::Full { messages: 12, .. }), "{error}");
        ensure!(error.into_message() == Some(Message::new("12")));
        let state =
            state(&outbox, |state| state.topics.iter().all(|topic| topic.waiting.is_some()))
                .await?;
        ensure!(state.pending.messages == 12, "{state:?}");

        // What it holds is published once there is a server.
        let left = outbox.close(Duration::ZERO).await?;
        ensure!(left.pending.messages == 12, "{left:?}");
        let server: Server = lab.server().await?;
        let channel = raw::connect(&server.url()).await?;
        admin::create_topic(&channel, TOPIC).await?;
        let client = app::client(&server.url())?;
        let outbox = open(&client, &file).await?;
        flush(&outbox).await??;
        ensure!(stored(&channel).await? == (0..12).collect::<Vec<_>>());
        outbox.close(SOON).await?;
        app::shutdown(client).await
    });
}
