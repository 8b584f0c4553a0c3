//! Servers that are killed at each step of a change that is one commit: a move of dead letters, a
//! redrive, a seek, a purge. What it changes is changed altogether or not at all.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context as _, Result, ensure};
use pubsub_client::{
    Client, CreateSubscription, DeadLetters, FailurePolicy, Nack, Start, Subscriber,
    SubscriptionKind, TopicConfig,
};
use pubsub_tests::{
    auditor,
    lab::{Rig, scenario},
    raw, wait,
};
use tokio::{sync::mpsc, task::JoinSet};

use crate::app::{self, SOON};

const WITHIN: Duration = Duration::from_secs(240);
const TOPIC: &str = "jobs";
const OTHER: &str = "other-jobs";
const WORK: &str = "work";
const DEAD: &str = "jobs-dead";

/// The steps of a change, and whether it is on disk when the server is killed there: before it is
/// asked for, before its commit, after it, and when everyone in the server knows.
fn steps(before: &str, after: &str) -> [(String, bool); 4] {
    [
        (before.to_owned(), false),
        (format!("{before},committing"), false),
        (format!("{before},committed"), true),
        (after.to_owned(), true),
    ]
}

async fn prepare(client: &Client, kind: SubscriptionKind) -> Result<()> {
    let admin = client.admin();
    admin.create_topic(TOPIC, TopicConfig::new()).await?;
    admin.create_topic(DEAD, TopicConfig::new()).await?;
    let policy = FailurePolicy::dead_letter(DEAD).after(2);
    let settings = CreateSubscription::to([TOPIC]).with_kind(kind).with_on_failure(policy);
    admin.create_subscription(WORK, settings).await?;
    Ok(())
}

async fn remove(client: &Client) -> Result<()> {
    let admin = client.admin();
    admin.delete_subscription(WORK).await?;
    admin.delete_topic(TOPIC).await?;
    admin.delete_topic(DEAD).await?;
    Ok(())
}

async fn worker(client: &Client) -> Result<Subscriber> {
    let opening = client.subscriber(WORK).consumer_id("worker");
    Ok(wait::soon("a worker", SOON, opening.open()).await??)
}

/// Acks what is good and nacks the rest, and says what was good.
async fn process(mut subscriber: Subscriber, seen: mpsc::Sender<u64>) {
    while let Ok(delivery) = app::next(&mut subscriber).await {
        if delivery.payload.starts_with(b"poison") {
            delivery.nack(Nack::now());
        } else if seen.send(delivery.id.sequence).await.is_ok() {
            delivery.ack();
        }
    }
}

async fn backlog(client: &Client) -> Result<u64> {
    let info = client.admin().subscription(WORK).await?;
    Ok(info.positions.iter().map(|position| position.backlog).sum())
}

/// Where the dead letters come from, in order.
async fn origins(client: &Client) -> Result<Vec<u64>> {
    let page = client.admin().dead_letters(WORK, None).await?;
    ensure!(page.next.is_none(), "there are more than a page of dead letters");
    Ok(page.items.iter().map(|letter| letter.origin.sequence).collect())
}

/// Ends all that a client does. What it has handed back to subscriptions that are deleted by now may
/// never be confirmed.
async fn end(client: Client) -> Result<()> {
    wait::soon("the shutdown", SOON, client.shutdown(SOON)).await.map(drop)
}

/// Stops the server in order, and starts it again to be killed at a failpoint.
async fn arm(rig: &mut Rig, failpoint: &str) -> Result<()> {
    rig.server.begin_stop()?;
    rig.server.exited(SOON).await?;
    rig.revive_to_fail(failpoint).await
}

#[test]
fn a_server_killed_at_any_step_of_a_move_moves_each_poisoned_message_once() {
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        let client = app::client(&rig.url())?;
        for kind in
            [SubscriptionKind::Exclusive, SubscriptionKind::Shared, SubscriptionKind::KeyOrdered]
        {
            for (failpoint, _) in steps("moving", "moved") {
                prepare(&client, kind).await?;
                arm(&mut rig, &failpoint).await?;
                let publisher = app::publisher(&client, TOPIC).await?;
                for number in 1..=12 {
                    let text = if number % 3 == 0 { "poison" } else { "good" };
                    publisher.publish(text).await?;
                }
                let (seen, mut good) = mpsc::channel(100);
                let mut working = JoinSet::new();
                working.spawn(process(worker(&client).await?, seen));
                rig.fails(SOON).await.with_context(|| failpoint.clone())?;
                rig.revive().await?;
                wait::until_ok("the end of the backlog", SOON, async || {
                    ensure!(backlog(&client).await? == 0);
                    Ok(())
                })
                .await
                .with_context(|| failpoint.clone())?;
                working.shutdown().await;
                let mut moved = origins(&client).await?;
                moved.sort_unstable();
                ensure!(moved == [3, 6, 9, 12], "{kind:?} {failpoint}: {moved:?}");
                let copies = client.admin().topic(DEAD).await?.head;
                ensure!(copies == 4, "{kind:?} {failpoint}: {copies} copies");
                let mut processed = Vec::new();
                good.recv_many(&mut processed, 100).await;
                processed.sort_unstable();
                ensure!(
                    processed == [1, 2, 4, 5, 7, 8, 10, 11],
                    "{kind:?} {failpoint}: {processed:?}"
                );
                remove(&client).await?;
            }
        }
        end(client).await
    });
}

#[test]
fn a_server_killed_at_any_step_of_a_redrive_brings_each_dead_letter_back_once() {
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        let client = app::client(&rig.url())?;
        let admin = client.admin();
        for (failpoint, happened) in steps("redriving", "redriven") {
            prepare(&client, SubscriptionKind::Shared).await?;
            let mut subscriber = worker(&client).await?;
            app::publish_numbers(&app::publisher(&client, TOPIC).await?, 0..5).await?;
            for delivery in app::next_many(&mut subscriber, 5).await? {
                delivery.nack(Nack::for_good());
            }
            wait::until_ok("the dead letters", SOON, async || {
                ensure!(origins(&client).await?.len() == 5);
                Ok(())
            })
            .await?;
            arm(&mut rig, &failpoint).await?;
            let (asked, killed) =
                tokio::join!(admin.redrive(WORK, DeadLetters::Oldest(100)), rig.fails(SOON));
            killed.with_context(|| failpoint.clone())?;
            let told = asked.err().with_context(|| format!("{failpoint}: it is answered"))?;
            rig.revive().await?;
            let (left, head) = (origins(&client).await?.len(), admin.topic(TOPIC).await?.head);
            let expected = if happened { (0, 10) } else { (5, 5) };
            ensure!((left, head) == expected, "{failpoint}: {left} left, head {head}; {told}");
            let redriven = admin.redrive(WORK, DeadLetters::Oldest(100)).await?;
            ensure!(redriven.left == 0, "{failpoint}: {redriven:?}");
            let mut again = BTreeMap::<Vec<u8>, u32>::new();
            for delivery in app::next_many(&mut subscriber, 5).await? {
                ensure!(delivery.id.sequence > 5 && delivery.attempt == 1, "{delivery:?}");
                *again.entry(delivery.payload.to_vec()).or_default() += 1;
                delivery.ack_confirmed().await?;
            }
            ensure!(again.len() == 5, "{failpoint}: {again:?}");
            ensure!(admin.topic(TOPIC).await?.head == 10, "{failpoint}: more were stored");
            ensure!(backlog(&client).await? == 0);
            drop(subscriber);
            remove(&client).await?;
        }
        end(client).await
    });
}

#[test]
fn a_server_killed_at_any_step_of_a_seek_has_moved_in_all_topics_or_in_none() {
    const EACH: usize = 6;
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        let client = app::client(&rig.url())?;
        let admin = client.admin();
        for (failpoint, happened) in steps("seeking", "sought") {
            let mut publishers = Vec::new();
            for topic in [TOPIC, OTHER] {
                admin.create_topic(topic, TopicConfig::new()).await?;
                publishers.push(app::publisher(&client, topic).await?);
            }
            let opening = client.subscriber(WORK).topics([TOPIC, OTHER]).consumer_id("worker");
            let mut subscriber = opening.start(Start::Earliest).open().await?;
            for publisher in &publishers {
                app::publish_numbers(publisher, 0..EACH as u64).await?;
            }
            app::confirm(app::next_many(&mut subscriber, 2 * EACH).await?).await?;
            arm(&mut rig, &failpoint).await?;
            let (asked, killed) =
                tokio::join!(admin.seek(WORK, None, Start::Earliest), rig.fails(SOON));
            killed.with_context(|| failpoint.clone())?;
            ensure!(asked.is_err(), "{failpoint}: it is answered");
            rig.revive().await?;
            let backlog: Vec<u64> = admin
                .subscription(WORK)
                .await?
                .positions
                .iter()
                .map(|position| position.backlog)
                .collect();
            let expected = if happened { EACH as u64 } else { 0 };
            ensure!(backlog == [expected, expected], "{failpoint}: {backlog:?}");
            if !happened {
                admin.seek(WORK, None, Start::Earliest).await?;
            }
            // The one that was there all the time follows: all of it, once, in order.
            for publisher in &publishers {
                app::publish_numbers(publisher, [0]).await?;
            }
            let mut again = BTreeMap::<String, Vec<u64>>::new();
            let shown = app::next_many(&mut subscriber, 2 * EACH + 2).await?;
            for delivery in &shown {
                again.entry(delivery.id.topic.to_string()).or_default().push(delivery.id.sequence);
            }
            let all: Vec<u64> = (1..=EACH as u64 + 1).collect();
            ensure!(again.values().all(|seen| *seen == all), "{failpoint}: {again:?}");
            app::confirm(shown).await?;
            drop(subscriber);
            admin.delete_subscription(WORK).await?;
            admin.delete_topic(TOPIC).await?;
            admin.delete_topic(OTHER).await?;
        }
        app::shutdown(client).await
    });
}

#[test]
fn a_server_killed_at_any_step_of_a_purge_has_removed_all_that_was_meant_or_nothing() {
    const ALL: u64 = 20;
    const BELOW: u64 = 12;
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        let client = app::client(&rig.url())?;
        let admin = client.admin();
        let mut steps = steps("purging", "purged").to_vec();
        // Its rows are removed later, in transactions of their own.
        steps.push(("purging,collecting".to_owned(), true));
        steps.push(("purging,collected".to_owned(), true));
        for (failpoint, happened) in steps {
            admin.create_topic(TOPIC, TopicConfig::new()).await?;
            let from = CreateSubscription::to([TOPIC]).with_start(Start::Earliest);
            admin.create_subscription(WORK, from).await?;
            // One by one, so that there is more than one row.
            let publisher = app::publisher(&client, TOPIC).await?;
            for number in 0..ALL {
                publisher.publish(number.to_string()).await?;
            }
            let mut subscriber = worker(&client).await?;
            let acked = usize::try_from(BELOW)? - 1;
            app::confirm(app::next_many(&mut subscriber, acked).await?).await?;
            arm(&mut rig, &failpoint).await?;
            let (asked, killed) =
                tokio::join!(admin.purge_topic(TOPIC, Some(BELOW)), rig.fails(SOON));
            killed.with_context(|| failpoint.clone())?;
            rig.revive().await?;
            let first = admin.topic(TOPIC).await?.first;
            let expected = if happened { BELOW } else { 1 };
            ensure!(first == expected, "{failpoint}: it begins at {first}; {asked:?}");
            let channel = raw::connect(&rig.url()).await?;
            let kept = async || {
                let audit = auditor::read(&channel, TOPIC).await?;
                let kept = audit.messages.into_iter().filter_map(|one| one.message);
                let kept = kept.map(|message| Ok(String::from_utf8(message.payload.into())?));
                kept.collect::<Result<Vec<_>>>()
            };
            let numbers = |from: u64| (from..ALL).map(|n| n.to_string()).collect::<Vec<_>>();
            let found = kept().await?;
            ensure!(found == numbers(first - 1), "{failpoint}: {found:?}");
            admin.purge_topic(TOPIC, Some(BELOW)).await?;
            ensure!(kept().await? == numbers(BELOW - 1), "{failpoint}: {:?}", kept().await?);
            // Who had received them misses nothing.
            let rest = app::next_many(&mut subscriber, (ALL - BELOW + 1).try_into()?).await?;
            ensure!(app::sequences(&rest) == (BELOW..=ALL).collect::<Vec<_>>(), "{rest:?}");
            app::confirm(rest).await?;
            drop(subscriber);
            admin.delete_subscription(WORK).await?;
            admin.delete_topic(TOPIC).await?;
        }
        app::shutdown(client).await
    });
}
