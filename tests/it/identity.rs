//! One identity is stored once and always answered alike: on the wire, without the SDK.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use pubsub_proto::v1::{
    ErrorReason, Message, PublishRequest, PublishRun, PublisherHello, Stored, TopicConfig,
    publish_result, publish_run::Outcome,
};
use pubsub_tests::{
    admin,
    auditor::{self, Audit},
    lab::scenario,
    proxy::{Cut, Direction, Mode},
    raw::{self, PublishStream},
    wait,
};
use tokio::task::JoinSet;
use tonic::transport::Channel;

const WITHIN: Duration = Duration::from_secs(60);
const SOON: Duration = Duration::from_secs(10);
const TOPIC: &str = "orders";
const PRODUCER: [u8; 16] = [7; 16];

/// A message with an idempotency key.
fn keyed(key: &str, payload: &str) -> Message {
    Message { idempotency_key: key.into(), ..raw::message(payload.to_owned()) }
}

fn numbered(numbers: impl IntoIterator<Item = u64>) -> Vec<Message> {
    let messages = numbers.into_iter();
    messages.map(|number| raw::message(number.to_string())).collect()
}

fn payloads(audit: &Audit) -> Vec<String> {
    let messages = audit.messages.iter().filter_map(|stored| stored.message.as_ref());
    messages.map(|message| String::from_utf8_lossy(&message.payload).into_owned()).collect()
}

async fn publish_one(channel: &Channel, message: Message) -> Result<Stored> {
    let request = PublishRequest { topic: TOPIC.into(), messages: vec![message], atomic: None };
    let answer = raw::publisher(channel).publish(request).await?.into_inner();
    match answer.results.into_iter().next().and_then(|fate| fate.outcome) {
        Some(publish_result::Outcome::Stored(stored)) => Ok(stored),
        other => bail!("it is not stored: {other:?}"),
    }
}

async fn refusal_of(channel: &Channel, message: Message) -> Result<String> {
    let request = PublishRequest { topic: TOPIC.into(), messages: vec![message], atomic: None };
    raw::publish_refusal(raw::publisher(channel).publish(request).await)
}

/// Takes results until this many messages have a fate, one entry for each.
async fn fates(stream: &mut PublishStream, count: usize) -> Result<Vec<Fate>> {
    let mut fates = Vec::new();
    while fates.len() < count {
        for run in stream.results().await? {
            fates.extend(spread(&run)?);
        }
    }
    ensure!(fates.len() == count, "too many fates: {fates:?}");
    Ok(fates)
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Fate {
    Stored { sequence: u64, duplicate: bool },
    Refused(ErrorReason),
}

impl Fate {
    fn sequence(&self) -> Option<u64> {
        match self {
            Self::Stored { sequence, .. } => Some(*sequence),
            Self::Refused(_) => None,
        }
    }
}

fn spread(run: &PublishRun) -> Result<Vec<Fate>> {
    let count = u64::from(run.count);
    Ok(match run.outcome.as_ref().context("a run without outcome")? {
        Outcome::Stored(stored) => (0..count)
            .map(|index| Fate::Stored {
                sequence: stored.sequence + index,
                duplicate: stored.duplicate,
            })
            .collect(),
        Outcome::Refused(refused) => (0..count).map(|_| Fate::Refused(refused.reason())).collect(),
    })
}

#[test]
fn the_same_key_on_many_connections_at_once_is_stored_once() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        admin::create_topic(&raw::connect(&server.url()).await?, TOPIC).await?;
        for round in 0..10 {
            let mut racers = JoinSet::new();
            for _ in 0..8 {
                let url = server.url();
                racers.spawn(async move {
                    let channel = raw::connect(&url).await?;
                    publish_one(&channel, keyed(&format!("key-{round}"), "same")).await
                });
            }
            let answers: Vec<_> = racers.join_all().await.into_iter().collect::<Result<_>>()?;
            let id = answers[0].sequence;
            ensure!(answers.iter().all(|answer| answer.sequence == id), "{answers:?}");
            let first = answers.iter().filter(|answer| !answer.duplicate).count();
            ensure!(first == 1, "{first} of the racers were the first");
        }
        let audit = auditor::read(&raw::connect(&server.url()).await?, TOPIC).await?;
        ensure!(audit.messages.len() == 10, "{} messages", audit.messages.len());
        Ok(())
    });
}

#[test]
fn the_same_key_with_other_content_is_a_typed_conflict() {
    scenario(WITHIN, async |lab| {
        let mut server = lab.server().await?;
        let channel = raw::connect(&server.url()).await?;
        admin::create_topic(&channel, TOPIC).await?;
        let first = publish_one(&channel, keyed("k", "one")).await?;
        let reason = refusal_of(&channel, keyed("k", "two")).await?;
        ensure!(reason == "IDEMPOTENCY_KEY_REUSED", "{reason}");

        server.kill().await?;
        server.start_again().await?;
        let channel = raw::connect(&server.url()).await?;
        let reason = refusal_of(&channel, keyed("k", "two")).await?;
        ensure!(reason == "IDEMPOTENCY_KEY_REUSED", "{reason}");
        let again = publish_one(&channel, keyed("k", "one")).await?;
        ensure!(again.duplicate && again.sequence == first.sequence, "{again:?}");
        let audit = auditor::read(&channel, TOPIC).await?;
        ensure!(payloads(&audit) == ["one"], "{:?}", payloads(&audit));
        Ok(())
    });
}

#[test]
fn a_key_twice_in_one_request_is_stored_once() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let channel = raw::connect(&server.url()).await?;
        admin::create_topic(&channel, TOPIC).await?;
        let request = PublishRequest {
            topic: TOPIC.into(),
            messages: vec![keyed("k", "one"), keyed("k", "one"), keyed("k", "two")],
            atomic: None,
        };
        let answer = raw::publisher(&channel).publish(request).await?.into_inner();
        let outcomes: Vec<_> = answer.results.iter().map(|fate| fate.outcome.as_ref()).collect();
        let [
            Some(publish_result::Outcome::Stored(first)),
            Some(publish_result::Outcome::Stored(second)),
            Some(publish_result::Outcome::Refused(third)),
        ] = outcomes[..]
        else {
            bail!("{outcomes:?}");
        };
        ensure!(!first.duplicate && second.duplicate, "{outcomes:?}");
        ensure!(first.sequence == second.sequence, "{outcomes:?}");
        ensure!(third.reason() == ErrorReason::IdempotencyKeyReused, "{outcomes:?}");
        Ok(())
    });
}

#[test]
fn frames_of_a_fenced_connection_are_not_stored() {
    scenario(WITHIN, async |lab| {
        let rig = lab.rig().await?;
        let direct = raw::connect(&rig.server.url()).await?;
        admin::create_topic(&direct, TOPIC).await?;
        let older = raw::connect(&rig.url()).await?;
        let hello = raw::publisher_hello(TOPIC, PRODUCER);
        let (mut older, _) = PublishStream::welcomed(&older, hello).await?;
        older.publish(1, numbered(1..=3)).await?;
        fates(&mut older, 3).await?;

        // The frames are on their way when the newer connection opens, and arrive after it.
        rig.proxy.set(Direction::Up, Mode::Blackhole);
        older.publish(4, numbered(4..=6)).await?;
        let (mut newer, welcome) = PublishStream::welcomed(&direct, continued(4)).await?;
        ensure!(welcome.last_sequence == Some(3), "{welcome:?}");
        rig.proxy.set(Direction::Up, Mode::Pass);
        let end = older.end().await?;
        ensure!(raw::reason(&end).as_deref() == Some("FENCED"), "{end:?}");

        newer.publish(4, numbered(4..=6)).await?;
        let answers = fates(&mut newer, 3).await?;
        let sequences: Vec<_> = answers.iter().filter_map(Fate::sequence).collect();
        ensure!(sequences == [4, 5, 6], "{answers:?}");
        let audit = auditor::read(&direct, TOPIC).await?;
        ensure!(payloads(&audit) == ["1", "2", "3", "4", "5", "6"], "{:?}", payloads(&audit));
        Ok(())
    });
}

/// The hello of the same publisher on another connection, whose results below `resolved` are
/// known.
fn continued(resolved: u64) -> PublisherHello {
    PublisherHello {
        resolved_below: resolved,
        next_sequence: resolved,
        ..raw::publisher_hello(TOPIC, PRODUCER)
    }
}

#[test]
fn a_newer_connection_that_races_the_older_one_stores_nothing_twice() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let channel = raw::connect(&server.url()).await?;
        admin::create_topic(&channel, TOPIC).await?;
        let mut next = 1;
        for _ in 0..30 {
            let older = raw::connect(&server.url()).await?;
            let (older, _) = PublishStream::welcomed(&older, continued(next)).await?;
            let count = lab.rng.between(1, 50);
            let window = next..next + count;
            for sequence in window.clone() {
                older.publish(sequence, numbered([sequence])).await?;
            }
            // Whatever of the window has arrived by now, the newer connection replays all.
            let hello = PublisherHello { next_sequence: window.end, ..continued(next) };
            let (mut newer, _) = PublishStream::welcomed(&channel, hello).await?;
            newer.publish(next, numbered(window.clone())).await?;
            let answers = fates(&mut newer, usize::try_from(count)?).await?;
            let sequences: Vec<_> = answers.iter().filter_map(Fate::sequence).collect();
            ensure!(sequences == window.clone().collect::<Vec<_>>(), "{answers:?}");
            next = window.end;
        }
        let audit = auditor::read(&channel, TOPIC).await?;
        let expected: Vec<_> = (1..next).map(|number| number.to_string()).collect();
        ensure!(payloads(&audit) == expected, "{:?}", payloads(&audit));
        Ok(())
    });
}

#[test]
fn a_hello_that_is_overtaken_by_a_newer_one_fences_nobody() {
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        let mut channel = raw::connect(&rig.server.url()).await?;
        admin::create_topic(&channel, TOPIC).await?;
        let overtaken = continued(1);
        let (mut newer, _) = PublishStream::welcomed(&channel, continued(1)).await?;
        newer.publish(1, numbered([1])).await?;
        fates(&mut newer, 1).await?;
        for crash in [false, true] {
            if crash {
                rig.crash().await?;
                channel = raw::connect(&rig.server.url()).await?;
            }
            let mut late = PublishStream::open(&channel, overtaken.clone()).await?;
            let end = late.end().await?;
            ensure!(raw::reason(&end).as_deref() == Some("FENCED"), "{end:?}");
            if !crash {
                newer.publish(2, numbered([2])).await?;
                let answer = fates(&mut newer, 1).await?;
                ensure!(answer == [Fate::Stored { sequence: 2, duplicate: false }], "{answer:?}");
            }
        }
        Ok(())
    });
}

#[test]
fn a_rejected_message_in_mid_window_gets_the_same_answer_after_a_cut() {
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        let config = TopicConfig { max_message_bytes: 1000, ..TopicConfig::default() };
        let direct = raw::connect(&rig.server.url()).await?;
        admin::create_topic_with(&direct, TOPIC, config).await?;
        let window = || {
            let mut window = numbered(1..=5);
            window[2].payload = vec![0; 2000].into();
            window
        };
        let channel = raw::connect(&rig.url()).await?;
        let hello = raw::publisher_hello(TOPIC, PRODUCER);
        let (lost, _) = PublishStream::welcomed(&channel, hello).await?;
        rig.proxy.set(Direction::Down, Mode::Discard);
        lost.publish(1, window()).await?;
        wait::until_ok("the commit", SOON, async || {
            let head = admin::topic(&direct, TOPIC).await?.head;
            ensure!(head == 4, "the head is {head}");
            Ok(())
        })
        .await?;
        rig.proxy.cut_all(Cut::Reset);
        rig.proxy.set(Direction::Down, Mode::Pass);

        for crash in [false, true] {
            if crash {
                rig.crash().await?;
            }
            let channel = raw::connect(&rig.url()).await?;
            let hello =
                PublisherHello { next_sequence: 6, ..raw::publisher_hello(TOPIC, PRODUCER) };
            let (mut stream, welcome) = PublishStream::welcomed(&channel, hello).await?;
            ensure!(welcome.last_sequence == Some(5), "{welcome:?}");
            stream.publish(1, window()).await?;
            let again = |sequence| Fate::Stored { sequence, duplicate: true };
            let refused = Fate::Refused(ErrorReason::MessageTooLarge);
            let expected = [again(1), again(2), refused, again(3), again(4)];
            let answers = fates(&mut stream, 5).await?;
            ensure!(answers == expected, "crash {crash}: {answers:?}");
        }
        Ok(())
    });
}

#[test]
fn a_skipped_publish_sequence_is_refused() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let channel = raw::connect(&server.url()).await?;
        admin::create_topic(&channel, TOPIC).await?;
        let hello = raw::publisher_hello(TOPIC, PRODUCER);
        let (mut stream, _) = PublishStream::welcomed(&channel, hello).await?;
        stream.publish(1, numbered([1])).await?;
        fates(&mut stream, 1).await?;
        stream.publish(3, numbered([3])).await?;
        let end = stream.end().await?;
        ensure!(raw::reason(&end).as_deref() == Some("OUT_OF_ORDER"), "{end:?}");
        ensure!(admin::topic(&channel, TOPIC).await?.head == 1);
        Ok(())
    });
}
