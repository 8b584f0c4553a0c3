//! Messages that fail: how often they are tried, what becomes of them, and that nothing else of it
//! suffers.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context as _, Result, ensure};
use pubsub_client::{
    Client, CreateSubscription, DeadLetter, DeadLetters, Delivery, FailurePolicy, Message, Nack,
    Reason, ReceiptState, Start, Subscriber, SubscriptionKind, TopicConfig, WaitCause,
};
use pubsub_proto::v1::{
    AckBatch, Consumer, SequenceRange, SubscribeHello, TopicAcks, subscribe_request,
    subscribe_response::Frame,
};
use pubsub_tests::{
    lab::scenario,
    raw::{self, SubscribeStream},
    wait,
};
use tokio::task::JoinSet;
use tonic::transport::Channel;

use crate::app::{self, SOON};

const WITHIN: Duration = Duration::from_secs(150);
const TOPIC: &str = "jobs";
const WORK: &str = "work";
const DEAD: &str = "jobs-dead";

/// The topics, and a subscription that lets messages go after two attempts.
async fn prepare(client: &Client, kind: SubscriptionKind) -> Result<()> {
    let policy = FailurePolicy::dead_letter(DEAD).after(2);
    prepare_with(client, kind, policy, TopicConfig::new()).await
}

async fn prepare_with(
    client: &Client,
    kind: SubscriptionKind,
    policy: FailurePolicy,
    dead: TopicConfig,
) -> Result<()> {
    let admin = client.admin();
    admin.create_topic(TOPIC, TopicConfig::new()).await?;
    admin.create_topic(DEAD, dead).await?;
    let settings = CreateSubscription::to([TOPIC]).with_kind(kind).with_on_failure(policy);
    admin.create_subscription(WORK, settings).await?;
    Ok(())
}

async fn worker(client: &Client) -> Result<Subscriber> {
    let opening = client.subscriber(WORK).consumer_id("worker").max_outstanding_messages(50);
    Ok(wait::soon("a worker", SOON, opening.open()).await??)
}

/// A message whose payload says that it cannot be processed.
fn is_poisoned(delivery: &Delivery) -> bool {
    delivery.payload.starts_with(b"poison")
}

/// Acks what is good and nacks the rest, until so many are acked.
async fn process(subscriber: &mut Subscriber, good: usize) -> Result<Vec<u64>> {
    let mut acked = Vec::new();
    while acked.len() < good {
        let delivery = app::next(subscriber).await?;
        if is_poisoned(&delivery) {
            delivery.nack(Nack::now().because("it is poison"));
        } else {
            acked.push(delivery.id.sequence);
            delivery.ack();
        }
    }
    Ok(acked)
}

/// Waits until so many dead letters are there, and gives them.
async fn dead_letters(client: &Client, count: usize) -> Result<Vec<DeadLetter>> {
    let admin = client.admin();
    wait::until_ok("the dead letters", SOON, async || {
        let info = admin.subscription(WORK).await?;
        ensure!(info.dead_letters == count as u64, "{info:?}");
        Ok(())
    })
    .await?;
    let mut letters = Vec::new();
    let mut page = admin.dead_letters(WORK, None).await?;
    loop {
        letters.append(&mut page.items);
        let Some(next) = page.next else { break };
        page = admin.dead_letters(WORK, Some(next)).await?;
    }
    ensure!(letters.len() == count, "{} letters of {count}", letters.len());
    Ok(letters)
}

fn origins(letters: &[DeadLetter]) -> Vec<u64> {
    letters.iter().map(|letter| letter.origin.sequence).collect()
}

#[test]
fn a_dead_letter_says_where_it_comes_from_and_is_received_by_whoever_listens() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let client = app::client(&server.url())?;
        prepare(&client, SubscriptionKind::Shared).await?;
        let mut triage = app::subscribe(&client, "triage", DEAD).await?;
        let mut subscriber = worker(&client).await?;
        let publisher = app::publisher(&client, TOPIC).await?;
        let poison = Message::new("poison")
            .with_attribute("color", "green")
            .with_ordering_key("k")
            .with_recipient(WORK);
        let id = publisher.publish(poison).await?.id;
        publisher.publish("good").await?;
        ensure!(process(&mut subscriber, 1).await? == [2]);
        // The one that is good may have come first.
        let mut failing = JoinSet::new();
        failing.spawn(async move { process(&mut subscriber, 1).await });
        let [letter] = dead_letters(&client, 1).await?.try_into().ok().context("one letter")?;
        ensure!(letter.origin == id, "{letter:?}");
        ensure!((letter.attempts, &*letter.reason) == (2, "it is poison"), "{letter:?}");
        ensure!(letter.first_failure_time <= letter.last_failure_time, "{letter:?}");
        let copy = app::next(&mut triage).await?;
        ensure!(copy.id == letter.id, "{copy:?}");
        ensure!(&*copy.payload == b"poison" && copy.ordering_key.as_deref() == Some("k"));
        let attribute = |name: &str| copy.attributes.get(name).map(String::as_str);
        ensure!(attribute("color") == Some("green"), "{copy:?}");
        ensure!(attribute("dead-letter-subscription") == Some(WORK), "{copy:?}");
        ensure!(attribute("dead-letter-topic") == Some(TOPIC), "{copy:?}");
        ensure!(attribute("dead-letter-sequence") == Some("1"), "{copy:?}");
        ensure!(attribute("dead-letter-reason") == Some("it is poison"), "{copy:?}");
        copy.ack_confirmed().await?;
        let receipts = client.admin().receipts(TOPIC, None, 1, Some(WORK)).await?;
        let by = ReceiptState::Released { by: "dead letter".to_owned() };
        ensure!(receipts.first().map(|receipt| &receipt.state) == Some(&by), "{receipts:?}");
        failing.shutdown().await;
        app::shutdown(client).await
    });
}

#[test]
fn what_comes_after_a_poisoned_message_waits_until_it_is_moved() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let client = app::client(&server.url())?;
        prepare(&client, SubscriptionKind::Exclusive).await?;
        let mut subscriber = worker(&client).await?;
        let publisher = app::publisher(&client, TOPIC).await?;
        for number in 1..=9 {
            let text = if number % 3 == 0 { "poison" } else { "good" };
            publisher.publish(text).await?;
        }
        let mut seen = Vec::new();
        while seen.last() != Some(&8) {
            let delivery = app::next(&mut subscriber).await?;
            seen.push(delivery.id.sequence);
            if is_poisoned(&delivery) {
                delivery.nack(Nack::now());
            } else {
                delivery.ack();
            }
        }
        ensure!(seen == [1, 2, 3, 3, 4, 5, 6, 6, 7, 8], "{seen:?}");
        // The last one needs one attempt, when it says so itself.
        app::next(&mut subscriber).await?.nack(Nack::for_good().because("hopeless"));
        let letters = dead_letters(&client, 3).await?;
        ensure!(origins(&letters) == [3, 6, 9], "{letters:?}");
        let attempts: Vec<u32> = letters.iter().map(|letter| letter.attempts).collect();
        ensure!(attempts == [2, 2, 1], "{letters:?}");
        app::shutdown(client).await
    });
}

#[test]
fn each_poisoned_message_is_moved_once_whenever_the_server_is_killed() {
    const MESSAGES: u64 = 600;
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        let client = app::client(&rig.url())?;
        prepare(&client, SubscriptionKind::Shared).await?;
        let mut subscriber = worker(&client).await?;
        let publisher = app::publisher(&client, TOPIC).await?;
        for number in 0..MESSAGES {
            let text = if number % 3 == 0 { format!("poison {number}") } else { "good".into() };
            drop(publisher.enqueue(text).await?);
        }
        let mut working = JoinSet::new();
        working.spawn(async move { process(&mut subscriber, usize::MAX).await });
        for _ in 0..6 {
            tokio::time::sleep(Duration::from_millis(lab.rng.below(700))).await;
            rig.crash().await?;
        }
        let admin = client.admin();
        wait::until_ok("the end of the backlog", 3 * SOON, async || {
            let info = admin.subscription(WORK).await?;
            ensure!(info.positions.first().is_some_and(|at| at.backlog == 0), "{info:?}");
            Ok(())
        })
        .await?;
        working.shutdown().await;
        let poisoned: Vec<u64> = (0..MESSAGES).filter(|n| n % 3 == 0).map(|n| n + 1).collect();
        let letters = dead_letters(&client, poisoned.len()).await?;
        let mut moved = origins(&letters);
        moved.sort_unstable();
        ensure!(moved == poisoned, "{moved:?}");
        let head = client.admin().topic(DEAD).await?.head;
        ensure!(head == poisoned.len() as u64, "{head} copies of {}", poisoned.len());
        app::shutdown(client).await
    });
}

#[test]
fn a_dead_letter_is_redriven_once_however_often_that_is_asked() {
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        let client = app::client(&rig.url())?;
        prepare(&client, SubscriptionKind::Shared).await?;
        let admin = client.admin();
        let mut other = app::subscribe(&client, "other", TOPIC).await?;
        let mut subscriber = worker(&client).await?;
        let publisher = app::publisher(&client, TOPIC).await?;
        for number in 0..20 {
            publisher.publish(format!("poison {number}")).await?;
        }
        for _ in 0..20 {
            let delivery = app::next(&mut subscriber).await?;
            delivery.nack(Nack::for_good());
        }
        let letters = dead_letters(&client, 20).await?;
        let named: Vec<u64> = letters.iter().take(3).map(|letter| letter.id.sequence).collect();
        // Asked three times, and by whoever does not hear the answer: the server is killed.
        for _ in 0..3 {
            let asked = admin.redrive(WORK, DeadLetters::Sequences(named.clone()));
            let killed = async {
                tokio::time::sleep(Duration::from_millis(lab.rng.below(5))).await;
                rig.crash().await
            };
            let (_, killed) = tokio::join!(asked, killed);
            killed?;
        }
        let redriven = admin.redrive(WORK, DeadLetters::Sequences(named)).await?;
        ensure!(redriven.left == 17, "{redriven:?}");
        let redriven = admin.redrive(WORK, DeadLetters::Oldest(1000)).await?;
        ensure!((redriven.redriven, redriven.left) == (17, 0), "{redriven:?}");
        ensure!(admin.topic(TOPIC).await?.head == 40);
        let mut again = BTreeMap::<String, u32>::new();
        for _ in 0..20 {
            let delivery = app::next(&mut subscriber).await?;
            ensure!(delivery.attempt == 1 && delivery.id.sequence > 20, "{delivery:?}");
            *again.entry(String::from_utf8(delivery.payload.to_vec())?).or_default() += 1;
            // One fails again, and is a new dead letter that can be redriven, too.
            if &*delivery.payload == b"poison 7" {
                delivery.nack(Nack::for_good());
            } else {
                delivery.ack();
            }
        }
        ensure!(again.len() == 20, "{again:?}");
        let letters = dead_letters(&client, 1).await?;
        ensure!(letters[0].id.sequence == 21, "{letters:?}");
        let redriven = admin.redrive(WORK, DeadLetters::Oldest(10)).await?;
        ensure!((redriven.redriven, redriven.left) == (1, 0), "{redriven:?}");
        app::next(&mut subscriber).await?.ack_confirmed().await?;
        // The others who listen have had theirs, and get nothing of this.
        for sequence in 1..=20 {
            let delivery = app::next(&mut other).await?;
            ensure!(delivery.id.sequence == sequence, "{delivery:?}");
            delivery.ack();
        }
        publisher.publish("the end").await?;
        let end = app::next(&mut other).await?;
        ensure!(end.id.sequence == 42, "{end:?}");
        end.ack();
        app::next(&mut subscriber).await?.ack();
        app::shutdown(client).await
    });
}

#[test]
fn dead_letters_whose_topic_is_gone_do_not_stand_before_the_others() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let client = app::client(&server.url())?;
        let admin = client.admin();
        for topic in ["jobs-old", TOPIC, DEAD] {
            admin.create_topic(topic, TopicConfig::new()).await?;
        }
        let settings = CreateSubscription::to(["jobs-old", TOPIC])
            .with_kind(SubscriptionKind::Shared)
            .with_on_failure(FailurePolicy::dead_letter(DEAD).after(1));
        admin.create_subscription(WORK, settings).await?;
        let mut subscriber = worker(&client).await?;
        // Those of one topic are dead letters before those of the other.
        for (topic, dead) in [("jobs-old", 3), (TOPIC, 6)] {
            let publisher = app::publisher(&client, topic).await?;
            for _ in 0..3 {
                publisher.publish("poison").await?;
                app::next(&mut subscriber).await?.nack(Nack::for_good());
            }
            dead_letters(&client, dead).await?;
        }
        admin.delete_topic("jobs-old").await?;
        let redriven = admin.redrive(WORK, DeadLetters::Oldest(1)).await?;
        ensure!((redriven.redriven, redriven.homeless) == (1, 3), "{redriven:?}");
        let redriven = admin.redrive(WORK, DeadLetters::Oldest(100)).await?;
        ensure!((redriven.redriven, redriven.homeless, redriven.left) == (2, 3, 3), "{redriven:?}");
        let redriven = admin.redrive(WORK, DeadLetters::Oldest(100)).await?;
        ensure!((redriven.redriven, redriven.homeless, redriven.left) == (0, 3, 3), "{redriven:?}");
        let named = admin.redrive(WORK, DeadLetters::Sequences(vec![1, 2])).await?;
        ensure!((named.redriven, named.homeless, named.left) == (0, 2, 3), "{named:?}");
        app::shutdown(client).await
    });
}

#[test]
fn a_full_dead_letter_topic_makes_what_failed_wait_and_says_so() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let client = app::client(&server.url())?;
        let admin = client.admin();
        let policy = FailurePolicy::dead_letter(DEAD).after(1);
        let dead = TopicConfig::new().with_max_bytes(1).with_retention(Duration::ZERO);
        prepare_with(&client, SubscriptionKind::Exclusive, policy, dead).await?;
        let mut subscriber = worker(&client).await?;
        let publisher = app::publisher(&client, TOPIC).await?;
        for text in ["poison 1", "poison 2", "good"] {
            publisher.publish(text).await?;
        }
        for _ in 0..2 {
            app::next(&mut subscriber).await?.nack(Nack::now());
        }
        dead_letters(&client, 1).await?;
        wait::until_ok("the cause", SOON, async || {
            let info = admin.subscription(WORK).await?;
            let position = info.positions.first().context("no position")?;
            let cause = position.waits_for.as_deref().unwrap_or_default();
            ensure!(cause.contains("dead letters of subscription work wait"), "{position:?}");
            ensure!((position.floor, position.backlog) == (1, 2), "{position:?}");
            let head = position.head_of_line.as_ref().context("nothing waits")?;
            ensure!((head.sequence, head.cause) == (2, WaitCause::DeadLetter), "{position:?}");
            ensure!(head.text == cause, "{position:?}");
            Ok(())
        })
        .await?;
        let silent = tokio::time::timeout(Duration::from_secs(2), subscriber.next()).await;
        ensure!(silent.is_err(), "what comes after it is shown: {silent:?}");
        // Room is made by letting the dead letters go.
        let purged = admin.purge_dead_letters(WORK, DeadLetters::Oldest(10)).await?;
        ensure!((purged.purged, purged.left) == (1, 0), "{purged:?}");
        let good = app::next(&mut subscriber).await?;
        ensure!(good.id.sequence == 3, "{good:?}");
        good.ack_confirmed().await?;
        let letters = dead_letters(&client, 1).await?;
        ensure!(origins(&letters) == [2], "{letters:?}");
        app::shutdown(client).await
    });
}

#[test]
fn what_is_skipped_is_gone_and_known_to_be() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let client = app::client(&server.url())?;
        let policy = FailurePolicy::skip().after(3);
        prepare_with(&client, SubscriptionKind::KeyOrdered, policy, TopicConfig::new()).await?;
        let mut subscriber = worker(&client).await?;
        let publisher = app::publisher(&client, TOPIC).await?;
        for (text, key) in [("poison", "a"), ("good", "a"), ("good", "b")] {
            publisher.publish(Message::new(text).with_ordering_key(key)).await?;
        }
        let mut attempts = Vec::new();
        let mut acked = Vec::new();
        while acked.len() < 2 {
            let delivery = app::next(&mut subscriber).await?;
            if is_poisoned(&delivery) {
                attempts.push(delivery.attempt);
                delivery.nack(Nack::now());
            } else {
                ensure!(delivery.id.sequence != 2 || attempts == [1, 2, 3], "{attempts:?}");
                acked.push(delivery.id.sequence);
                delivery.ack_confirmed().await?;
            }
        }
        ensure!(attempts == [1, 2, 3], "{attempts:?}");
        let receipts = client.admin().receipts(TOPIC, None, 1, Some(WORK)).await?;
        let by = ReceiptState::Released { by: "skip".to_owned() };
        ensure!(receipts.first().map(|receipt| &receipt.state) == Some(&by), "{receipts:?}");
        app::shutdown(client).await
    });
}

#[test]
fn settings_of_failures_are_checked_and_do_not_change() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let client = app::client(&server.url())?;
        prepare(&client, SubscriptionKind::Shared).await?;
        let admin = client.admin();
        let in_use = admin.delete_topic(DEAD).await.err().context("it is deleted")?;
        ensure!(in_use.reason() == Some(Reason::TopicInUse), "{in_use}");
        let create = async |policy: FailurePolicy, topic: &str| {
            let settings = CreateSubscription::to([topic]).with_on_failure(policy);
            let refused = admin.create_subscription("other", settings).await.err();
            refused.context("it is created")
        };
        let own = create(FailurePolicy::dead_letter(DEAD), "jobs*").await?;
        ensure!(own.reason() == Some(Reason::InvalidArgument), "{own}");
        ensure!(own.to_string().contains("own topics"), "{own}");
        let unknown = create(FailurePolicy::dead_letter("nowhere"), TOPIC).await?;
        ensure!(unknown.reason() == Some(Reason::TopicNotFound), "{unknown}");
        for attempts in [0, 1001] {
            let refused = create(FailurePolicy::skip().after(attempts), TOPIC).await.err();
            ensure!(refused.is_some() == (attempts == 0), "0 is the default, {attempts} too many");
        }
        let other = client.subscriber(WORK).on_failure(FailurePolicy::skip()).open().await;
        let refused = other.err().context("it is opened")?;
        ensure!(refused.reason() == Some(Reason::SubscriptionMismatch), "{refused}");
        ensure!(refused.to_string().contains("dead letter to jobs-dead after 2"), "{refused}");
        let same = FailurePolicy::dead_letter(DEAD).after(2);
        let same = client.subscriber(WORK).on_failure(same).open().await?;
        drop(same);
        admin.delete_subscription(WORK).await?;
        admin.delete_subscription("other").await?;
        admin.delete_topic(DEAD).await?;
        app::shutdown(client).await
    });
}

#[test]
fn a_handler_that_takes_too_long_has_failed() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let client = app::client(&server.url())?;
        let admin = client.admin();
        admin.create_topic(TOPIC, TopicConfig::new()).await?;
        for kind in [SubscriptionKind::Exclusive, SubscriptionKind::Shared] {
            let name = format!("{kind:?}");
            let opening = client.subscriber(&name).topic(TOPIC).kind(kind).start(Start::Earliest);
            let opening = opening.consumer_id("c").ack_timeout(Duration::from_secs(1));
            let mut subscriber = opening.open().await?;
            let publisher = app::publisher(&client, TOPIC).await?;
            publisher.publish("one").await?;
            let first = app::next(&mut subscriber).await?;
            let second = app::next(&mut subscriber).await?;
            ensure!(first.id == second.id, "{first:?} {second:?}");
            ensure!((first.attempt, second.attempt) == (1, 2), "{first:?} {second:?}");
            // The older one can still say that it is done.
            first.ack_confirmed().await?;
            drop(second);
            let info = admin.subscription(&name).await?;
            ensure!(info.ack_timeout == Some(Duration::from_secs(1)), "{info:?}");
            ensure!(info.positions.first().is_some_and(|p| p.floor == p.head), "{info:?}");
            // What is in the buffer and not in a handler has all the time.
            admin.delete_subscription(&name).await?;
            admin.delete_topic(TOPIC).await?;
            admin.create_topic(TOPIC, TopicConfig::new()).await?;
        }
        app::shutdown(client).await
    });
}

/// A consumer's next process.
async fn process_of(channel: &Channel, instance: u8) -> Result<SubscribeStream> {
    let consumer = Consumer { id: "c".into(), instance: vec![instance; 16].into(), attach: 1 };
    let hello = SubscribeHello {
        consumer: Some(consumer),
        max_outstanding_messages: 10,
        ..raw::consumer_hello(WORK, "c", &[])
    };
    let (stream, welcome) = SubscribeStream::welcomed(channel, hello).await?;
    ensure!(welcome.report_started, "{welcome:?}");
    Ok(stream)
}

/// What comes until nothing does for a moment, with attempts.
async fn delivered(stream: &mut SubscribeStream) -> Result<Vec<(u64, u32)>> {
    let mut all = Vec::new();
    loop {
        let next = tokio::time::timeout(Duration::from_millis(1500), stream.next()).await;
        let Ok(frame) = next else { return Ok(all) };
        if let Frame::Deliver(deliver) = frame? {
            all.extend(deliver.received().map(|one| (one.sequence, one.attempt)));
        }
    }
}

async fn tell(stream: &SubscribeStream, acks: TopicAcks) -> Result<()> {
    let batch =
        AckBatch { number: 1, topics: vec![TopicAcks { topic: 1, ..acks }], awaited: false };
    stream.send(subscribe_request::Frame::Acks(batch)).await
}

fn range(first: u64, last: u64) -> Vec<SequenceRange> {
    vec![SequenceRange { first, last }]
}

#[test]
fn what_kills_its_consumer_is_found_out_and_moved() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let channel = raw::connect(&server.url()).await?;
        let client = app::client(&server.url())?;
        prepare(&client, SubscriptionKind::Shared).await?;
        app::publish_numbers(&app::publisher(&client, TOPIC).await?, 0..6).await?;
        // Three are in handlers when the process dies; one of them has killed it.
        let mut first = process_of(&channel, 1).await?;
        ensure!(delivered(&mut first).await?.len() == 6);
        tell(&first, TopicAcks { started: range(1, 3), ..TopicAcks::default() }).await?;
        // The server has heard it when it answers.
        first.ping(1).await?;
        while !matches!(first.next().await?, Frame::Heartbeat(beat) if beat.echoed_nonce == 1) {}
        drop(first);
        // Those that were not are no suspects; those that were come one at a time.
        let mut second = process_of(&channel, 2).await?;
        let mut shown = delivered(&mut second).await?;
        shown.sort_unstable();
        ensure!(shown == [(1, 2), (4, 1), (5, 1), (6, 1)], "{shown:?}");
        tell(&second, TopicAcks { acked: range(1, 1), ..TopicAcks::default() }).await?;
        ensure!(delivered(&mut second).await? == [(2, 2)]);
        tell(&second, TopicAcks { started: range(2, 2), ..TopicAcks::default() }).await?;
        second.ping(2).await?;
        while !matches!(second.next().await?, Frame::Heartbeat(beat) if beat.echoed_nonce == 2) {}
        drop(second);
        // It was 2: its two attempts are over, and the innocent go on.
        let mut third = process_of(&channel, 3).await?;
        let mut shown = delivered(&mut third).await?;
        shown.sort_unstable();
        ensure!(shown == [(3, 2), (4, 1), (5, 1), (6, 1)], "{shown:?}");
        let letters = dead_letters(&client, 1).await?;
        ensure!(origins(&letters) == [2], "{letters:?}");
        ensure!(letters[0].reason.contains("consumer was lost"), "{letters:?}");
        app::shutdown(client).await
    });
}
