//! Filters on attributes: what is left out is never shown, holds nothing up, and is known to be left
//! out; and dead letters by filter.

use std::{collections::BTreeMap, iter::repeat_n, time::Duration};

use anyhow::{Context as _, Result, ensure};
use pubsub_client::{
    Client, CreateSubscription, DeadLetters, Delivery, FailurePolicy, Message, Nack, Publisher,
    Reason, ReceiptState, Start, Subscriber, SubscriptionKind, TopicConfig,
};
use pubsub_proto::v1::{PullRequest, PulledMessage, RedriveDeadLettersRequest};
use pubsub_tests::{admin, lab::scenario, raw, wait};
use tonic::transport::Channel;

use crate::app::{self, SOON};

const WITHIN: Duration = Duration::from_secs(120);
const TOPIC: &str = "orders";
const GREEN: &str = "attributes.color = \"green\"";
const KINDS: [SubscriptionKind; 3] =
    [SubscriptionKind::Exclusive, SubscriptionKind::Shared, SubscriptionKind::KeyOrdered];

fn to_all() -> CreateSubscription {
    CreateSubscription::to([TOPIC]).with_start(Start::Earliest)
}

/// A message of each of these colours; none has no attribute.
async fn publish(publisher: &Publisher, colors: impl IntoIterator<Item = &str>) -> Result<()> {
    let mut tickets = Vec::new();
    for (number, color) in colors.into_iter().enumerate() {
        let message = Message::new(color.to_owned()).with_ordering_key(format!("k{}", number % 4));
        let message = match color {
            "none" => message.with_attribute("size", "large"),
            color => message.with_attribute("color", color),
        };
        tickets.push(wait::soon("the window", SOON, publisher.enqueue(message)).await??);
    }
    for ticket in tickets {
        wait::soon("a receipt", SOON, ticket).await??;
    }
    Ok(())
}

/// Colours of which every third is green, from the first on.
fn mixed(count: usize) -> impl Iterator<Item = &'static str> {
    ["green", "red", "none"].into_iter().cycle().take(count)
}

/// The payloads, which name the colours.
fn colors(deliveries: &[Delivery]) -> Vec<&str> {
    deliveries.iter().map(|one| str::from_utf8(&one.payload).unwrap_or("?")).collect()
}

/// Waits until the position is at the head, with no backlog.
async fn nothing_left(channel: &Channel, name: &str, head: u64) -> Result<()> {
    wait::until_ok("the floor at the head", SOON, async || {
        let position = admin::subscription(channel, name).await?.positions.remove(0);
        ensure!(position.floor == head && position.backlog == 0, "{position:?}");
        Ok(())
    })
    .await
}

#[test]
fn what_is_filtered_out_is_never_shown_and_holds_nothing_up() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let channel = raw::connect(&server.url()).await?;
        let client = app::client(&server.url())?;
        client.admin().create_topic(TOPIC, TopicConfig::new()).await?;
        let publisher = app::publisher(&client, TOPIC).await?;
        // Some are there before, and some come live.
        publish(&publisher, mixed(60)).await?;
        let mut subscribers = Vec::new();
        for (number, kind) in KINDS.into_iter().enumerate() {
            let opening = client.subscriber(format!("s{number}")).topic(TOPIC).kind(kind);
            let opening = opening.start(Start::Earliest).filter(GREEN).max_outstanding_messages(7);
            subscribers.push(wait::soon("a subscriber", SOON, opening.open()).await??);
        }
        publish(&publisher, mixed(60)).await?;
        for (number, subscriber) in subscribers.iter_mut().enumerate() {
            let mut seen = Vec::new();
            for _ in 0..40 {
                let delivery = app::next(subscriber).await?;
                ensure!(colors(std::slice::from_ref(&delivery)) == ["green"], "{delivery:?}");
                seen.push(delivery.id.sequence);
                delivery.ack();
            }
            seen.sort_unstable();
            let green: Vec<u64> = (1..=120).filter(|sequence| sequence % 3 == 1).collect();
            ensure!(seen == green, "{seen:?}");
            wait::soon("caught up", SOON, subscriber.caught_up()).await?;
            nothing_left(&channel, &format!("s{number}"), 120).await?;
        }
        app::shutdown(client).await
    });
}

#[test]
fn however_far_away_they_are_no_more_are_out_than_the_credit() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let client = app::client(&server.url())?;
        let admin = client.admin();
        admin.create_topic(TOPIC, TopicConfig::new()).await?;
        let publisher = app::publisher(&client, TOPIC).await?;
        publish(&publisher, repeat_n("red", 5000)).await?;
        publish(&publisher, repeat_n("green", 20)).await?;
        admin.create_subscription("green", to_all().with_filter(GREEN)).await?;
        let opening = client.subscriber("green").max_outstanding_messages(2);
        let mut subscriber = wait::soon("a subscriber", SOON, opening.open()).await??;
        let outstanding = async || -> Result<u64> {
            let info = admin.subscription("green").await?;
            Ok(info.positions.first().context("no position")?.outstanding)
        };
        let first = app::next_many(&mut subscriber, 2).await?;
        ensure!(app::sequences(&first) == [5001, 5002], "{first:?}");
        ensure!(outstanding().await? == 2, "more than the credit is out");
        app::confirm(first).await?;
        for sequence in 5003..=5020 {
            let delivery = app::next(&mut subscriber).await?;
            ensure!(delivery.id.sequence == sequence, "{delivery:?}");
            ensure!(outstanding().await? <= 2, "more than the credit is out");
            delivery.ack_confirmed().await?;
        }
        app::shutdown(client).await
    });
}

#[test]
fn a_topic_of_which_nothing_matches_is_passed_also_after_a_restart() {
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        let channel = raw::connect(&rig.server.url()).await?;
        let client = app::client(&rig.url())?;
        client.admin().create_topic(TOPIC, TopicConfig::new()).await?;
        let publisher = app::publisher(&client, TOPIC).await?;
        publish(&publisher, repeat_n("red", 1500)).await?;
        for kind in KINDS {
            let name = format!("{kind:?}");
            let settings = to_all().with_kind(kind).with_filter(GREEN);
            client.admin().create_subscription(&name, settings).await?;
            let opening = client.subscriber(&name).must_exist().open();
            let subscriber = wait::soon("a subscriber", SOON, opening).await??;
            wait::soon("caught up", SOON, subscriber.caught_up()).await?;
            nothing_left(&channel, &name, 1500).await?;
            drop(subscriber);
        }
        // Nobody consumes any more: what is told now was on disk.
        app::shutdown(client).await?;
        rig.crash().await?;
        let channel = raw::connect(&rig.server.url()).await?;
        for kind in KINDS {
            let subscription = admin::subscription(&channel, &format!("{kind:?}")).await?;
            ensure!(subscription.filter == GREEN, "{subscription:?}");
            let position = &subscription.positions[0];
            ensure!((position.floor, position.backlog) == (1500, 0), "{position:?}");
        }
        Ok(())
    });
}

#[test]
fn a_filter_survives_crashes_and_so_does_who_consumes_by_it() {
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        let client = app::client(&rig.url())?;
        client.admin().create_topic(TOPIC, TopicConfig::new()).await?;
        let publisher = app::publisher(&client, TOPIC).await?;
        let filter = format!("NOT ({GREEN} OR attributes:size)");
        let opening = client.subscriber("red").topic(TOPIC).start(Start::Earliest).filter(&filter);
        let mut subscriber = wait::soon("a subscriber", SOON, opening.open()).await??;
        let reader = client.reader([TOPIC]).start(Start::Earliest).filter(&filter);
        let mut reader = wait::soon("a reader", SOON, reader.open()).await??;
        for round in 0..3_u64 {
            publish(&publisher, mixed(30)).await?;
            let expected: Vec<u64> =
                (round * 30 + 1..=round * 30 + 30).filter(|s| s % 3 == 2).collect();
            for one in [&mut subscriber, &mut reader] {
                let shown = app::next_many(one, 10).await?;
                ensure!(app::sequences(&shown) == expected, "{shown:?}");
                ensure!(colors(&shown) == ["red"; 10], "{shown:?}");
                shown.into_iter().for_each(Delivery::ack);
            }
            rig.crash().await?;
        }
        let info = client.admin().subscription("red").await?;
        ensure!(info.filter.as_deref() == Some(&*filter), "{info:?}");
        wait::soon("caught up", SOON, reader.caught_up()).await?;
        let channel = raw::connect(&rig.server.url()).await?;
        nothing_left(&channel, "red", 90).await?;
        app::shutdown(client).await
    });
}

fn sequence(pulled: &PulledMessage) -> u64 {
    pulled.message.as_ref().map_or(0, |message| message.sequence)
}

#[test]
fn a_pull_gets_what_matches_however_far_away_it_is() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let channel = raw::connect(&server.url()).await?;
        let client = app::client(&server.url())?;
        client.admin().create_topic(TOPIC, TopicConfig::new()).await?;
        let publisher = app::publisher(&client, TOPIC).await?;
        publish(&publisher, repeat_n("red", 20_000)).await?;
        publish(&publisher, repeat_n("green", 2)).await?;
        publish(&publisher, repeat_n("red", 10)).await?;
        for kind in KINDS {
            let name = format!("{kind:?}");
            let settings = to_all().with_kind(kind).with_filter(GREEN);
            client.admin().create_subscription(&name, settings).await?;
            let pull = PullRequest {
                subscription: name.clone(),
                consumer_id: "c".into(),
                max_messages: 1,
                ..PullRequest::default()
            };
            for expected in [Some(20_001), Some(20_002), None] {
                // None of them waits: an empty answer means that there is nothing.
                let answer = raw::subscriber(&channel).pull(pull.clone()).await?.into_inner();
                let got: Vec<u64> = answer.messages.iter().map(sequence).collect();
                ensure!(got == Vec::from_iter(expected), "{kind:?}: {got:?} and not {expected:?}");
            }
        }
        app::shutdown(client).await
    });
}

#[test]
fn a_receipt_of_what_is_filtered_out_says_so_before_and_after_it_was_passed() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let client = app::client(&server.url())?;
        let admin = client.admin();
        admin.create_topic(TOPIC, TopicConfig::new()).await?;
        admin.create_subscription("green", to_all().with_filter(GREEN)).await?;
        admin.create_subscription("all", to_all()).await?;
        let publisher = app::publisher(&client, TOPIC).await?;
        publish(&publisher, ["green", "red"]).await?;
        // Whoever is named gets it, whatever the filter says; and nobody else.
        publisher.publish(Message::new("3").with_recipient("green")).await?;
        let states = async |name: &str| -> Result<Vec<ReceiptState>> {
            let mut states = Vec::new();
            for sequence in 1..=3 {
                let mut receipts = admin.receipts(TOPIC, None, sequence, Some(name)).await?;
                states.push(receipts.pop().context("no receipt")?.state);
            }
            Ok(states)
        };
        let (pending, received, not) =
            (ReceiptState::Pending, ReceiptState::Received, ReceiptState::NotAddressed);
        let green = states("green").await?;
        ensure!(green == [pending.clone(), not.clone(), pending.clone()], "{green:?}");
        let all = states("all").await?;
        ensure!(all == [pending.clone(), pending, not.clone()], "{all:?}");
        let mut subscriber = client.subscriber("green").must_exist().open().await?;
        let shown = app::next_many(&mut subscriber, 2).await?;
        ensure!(app::sequences(&shown) == [1, 3], "{shown:?}");
        app::confirm(shown).await?;
        let green = states("green").await?;
        ensure!(green == [received.clone(), not, received], "{green:?}");
        app::shutdown(client).await
    });
}

#[test]
fn a_subscription_is_opened_with_the_filter_it_has_or_none() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let client = app::client(&server.url())?;
        let admin = client.admin();
        admin.create_topic(TOPIC, TopicConfig::new()).await?;
        admin.create_subscription("green", to_all().with_filter(GREEN)).await?;
        admin.create_subscription("all", to_all()).await?;
        let same = "(attributes.\"color\"=\"green\")";
        let found = admin.create_subscription("green", to_all().with_filter(same).if_not_exists());
        let (info, created) = found.await?;
        ensure!(!created && info.filter.as_deref() == Some(GREEN), "{info:?}");
        client.subscriber("green").filter(same).open().await?;
        client.subscriber("green").open().await?;
        for (name, filter) in [("green", "attributes.color = \"red\""), ("all", GREEN)] {
            let settings = to_all().with_filter(filter).if_not_exists();
            let refused = admin.create_subscription(name, settings).await.err();
            let refused = refused.context("another filter is taken")?;
            ensure!(refused.reason() == Some(Reason::SubscriptionMismatch), "{refused}");
            let refused = client.subscriber(name).filter(filter).open().await.err();
            let refused = refused.context("another filter is taken")?;
            ensure!(refused.reason() == Some(Reason::SubscriptionMismatch), "{refused}");
            ensure!(refused.to_string().contains("filter"), "{refused}");
        }
        app::shutdown(client).await
    });
}

#[test]
fn a_filter_that_is_none_is_refused_with_the_column() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let channel = raw::connect(&server.url()).await?;
        let client = app::client(&server.url())?;
        let admin = client.admin();
        admin.create_topic(TOPIC, TopicConfig::new()).await?;
        let bad = "attributes.color ~ \"green\"";
        let told = "column 18: expected `=` or `!=`, found `~`";
        let refused = admin.create_subscription("s", to_all().with_filter(bad)).await.err();
        let refused = refused.context("it is taken")?;
        ensure!(refused.reason() == Some(Reason::InvalidArgument), "{refused}");
        ensure!(refused.to_string().contains(told), "{refused}");
        let refused = client.reader([TOPIC]).filter(bad).open().await.err();
        let refused = refused.context("it is taken")?;
        ensure!(refused.reason() == Some(Reason::InvalidArgument), "{refused}");
        ensure!(refused.to_string().contains(told), "{refused}");
        let long = format!("attributes:{}", "a".repeat(1024));
        let refused = admin.create_subscription("s", to_all().with_filter(long)).await.err();
        let refused = refused.context("it is taken")?;
        ensure!(refused.to_string().contains("1035 bytes; 1024 are allowed"), "{refused}");
        let (subscription, filter) = ("s".to_owned(), bad.to_owned());
        let request = RedriveDeadLettersRequest {
            subscription,
            filter,
            ..RedriveDeadLettersRequest::default()
        };
        let refusal = raw::refusal(raw::admin(&channel).redrive_dead_letters(request).await)?;
        ensure!(refusal == "INVALID_ARGUMENT", "{refusal}");
        Ok(())
    });
}

/// A topic of dead letters, and a subscription of green messages that fails for good.
async fn failing(client: &Client) -> Result<Subscriber> {
    let admin = client.admin();
    admin.create_topic(TOPIC, TopicConfig::new()).await?;
    admin.create_topic("dead", TopicConfig::new()).await?;
    let settings = to_all().with_filter(GREEN).with_kind(SubscriptionKind::Shared);
    let settings = settings.with_on_failure(FailurePolicy::dead_letter("dead"));
    admin.create_subscription("work", settings).await?;
    let opening = client.subscriber("work").consumer_id("worker").open();
    Ok(wait::soon("a worker", SOON, opening).await??)
}

async fn letters(client: &Client, count: u64) -> Result<()> {
    wait::until_ok("the dead letters", SOON, async || {
        let info = client.admin().subscription("work").await?;
        ensure!(info.dead_letters == count, "{info:?}");
        Ok(())
    })
    .await
}

#[test]
fn dead_letters_are_listed_redriven_and_purged_by_filter() {
    const LETTERS: u64 = 1_050;
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let client = app::client(&server.url())?;
        let admin = client.admin();
        let mut worker = failing(&client).await?;
        let publisher = app::publisher(&client, TOPIC).await?;
        publish(&publisher, ["red", "none"]).await?;
        publish(&publisher, repeat_n("green", usize::try_from(LETTERS)?)).await?;
        // More than one page is broken; then a few have timed out.
        for number in 1..=LETTERS {
            let reason = if number > LETTERS - 3 { "timeout" } else { "broken" };
            app::next(&mut worker).await?.nack(Nack::for_good().because(reason));
        }
        letters(&client, LETTERS).await?;
        let timeouts = "attributes.dead-letter-reason = \"timeout\"";
        let page = admin.dead_letters_matching("work", timeouts, None).await?;
        ensure!(page.items.len() == 3 && page.next.is_none(), "{page:?}");
        ensure!(page.items.iter().all(|letter| letter.reason == "timeout"), "{page:?}");
        let page = admin.dead_letters_matching("work", "NOT attributes:color", None).await?;
        ensure!(page.items.is_empty() && page.next.is_none(), "{page:?}");
        let page = admin.dead_letters_matching("work", GREEN, None).await?;
        let next = page.next.context("there are more")?;
        let after = admin.dead_letters_matching("work", GREEN, Some(next)).await?;
        let last = page.items.last().map(|letter| letter.id.sequence);
        ensure!(after.items.first().map(|letter| letter.id.sequence - 1) == last, "{last:?}");

        let matching = |most| DeadLetters::Matching { filter: timeouts.to_owned(), most };
        let redriven = admin.redrive("work", matching(2)).await?;
        ensure!((redriven.redriven, redriven.left) == (2, LETTERS - 2), "{redriven:?}");
        let redriven = admin.redrive("work", matching(1000)).await?;
        ensure!((redriven.redriven, redriven.left) == (1, LETTERS - 3), "{redriven:?}");
        let redriven = admin.redrive("work", matching(1000)).await?;
        ensure!((redriven.redriven, redriven.left) == (0, LETTERS - 3), "{redriven:?}");
        let again = app::next_many(&mut worker, 3).await?;
        ensure!(app::sequences(&again) == [LETTERS + 3, LETTERS + 4, LETTERS + 5], "{again:?}");
        app::confirm(again).await?;
        let filter = "hasPrefix(attributes.dead-letter-reason, \"brok\")".to_owned();
        let purged = admin.purge_dead_letters("work", DeadLetters::Matching { filter, most: 7 });
        let purged = purged.await?;
        ensure!((purged.purged, purged.left) == (7, LETTERS - 10), "{purged:?}");
        app::shutdown(client).await
    });
}

#[test]
fn what_is_redriven_comes_back_whatever_the_filter_says() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let client = app::client(&server.url())?;
        let admin = client.admin();
        let mut worker = failing(&client).await?;
        admin.create_topic("dead-again", TopicConfig::new()).await?;
        // One that looks after dead letters, by what only dead letters have, and fails as well.
        let settings =
            CreateSubscription::to(["dead"]).with_filter("attributes:dead-letter-reason");
        let settings = settings.with_on_failure(FailurePolicy::dead_letter("dead-again"));
        admin.create_subscription("triage", settings).await?;
        let mut triage = client.subscriber("triage").open().await?;
        publish(&app::publisher(&client, TOPIC).await?, ["green"]).await?;
        app::next(&mut worker).await?.nack(Nack::for_good().because("broken"));
        app::next(&mut triage).await?.nack(Nack::for_good().because("hopeless"));
        let mut waiting = BTreeMap::new();
        for name in ["work", "triage"] {
            wait::until_ok("the dead letters", SOON, async || {
                let info = admin.subscription(name).await?;
                ensure!(info.dead_letters == 1, "{info:?}");
                Ok(())
            })
            .await?;
            waiting.insert(name, admin.redrive(name, DeadLetters::Oldest(1)).await?.redriven);
        }
        ensure!(waiting.values().all(|redriven| *redriven == 1), "{waiting:?}");
        let again = app::next(&mut worker).await?;
        ensure!(again.attributes.get("color").map(String::as_str) == Some("green"), "{again:?}");
        again.ack_confirmed().await?;
        let again = app::next(&mut triage).await?;
        ensure!(!again.attributes.contains_key("dead-letter-reason"), "{again:?}");
        again.ack_confirmed().await?;
        app::shutdown(client).await
    });
}

#[test]
fn a_snapshot_is_of_no_use_to_whom_its_filter_would_hide_something() {
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        let client = app::client(&rig.url())?;
        let admin = client.admin();
        admin.create_topic(TOPIC, TopicConfig::new()).await?;
        for name in ["green", "also-green"] {
            admin.create_subscription(name, to_all().with_filter(GREEN)).await?;
        }
        admin.create_subscription("all", to_all()).await?;
        publish(&app::publisher(&client, TOPIC).await?, mixed(9)).await?;
        let mut subscriber = client.subscriber("green").open().await?;
        app::confirm(app::next_many(&mut subscriber, 1).await?).await?;
        admin.create_snapshot("then", "green").await?;
        admin.create_snapshot("whole", "all").await?;
        app::confirm(app::next_many(&mut subscriber, 2).await?).await?;
        rig.crash().await?;
        let refused = admin.seek_to_snapshot("all", "then").await.err().context("it went")?;
        ensure!(refused.reason() == Some(Reason::InvalidArgument), "{refused}");
        ensure!(refused.to_string().contains("filter is not that of all"), "{refused}");
        admin.seek_to_snapshot("also-green", "then").await?;
        admin.seek_to_snapshot("green", "whole").await?;
        let mut other = client.subscriber("also-green").open().await?;
        let rest = app::next_many(&mut other, 2).await?;
        ensure!(app::sequences(&rest) == [4, 7], "{rest:?}");
        app::confirm(rest).await?;
        let again = app::next_many(&mut subscriber, 3).await?;
        ensure!(app::sequences(&again) == [1, 4, 7], "{again:?}");
        app::confirm(again).await?;
        app::shutdown(client).await
    });
}

#[test]
fn what_is_filtered_out_is_no_backlog_also_while_nobody_consumes() {
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        let client = app::client(&rig.url())?;
        let admin = client.admin();
        admin.create_topic(TOPIC, TopicConfig::new()).await?;
        for (number, kind) in KINDS.into_iter().enumerate() {
            let settings = to_all().with_filter(GREEN).with_kind(kind);
            admin.create_subscription(format!("s{number}"), settings).await?;
        }
        let publisher = app::publisher(&client, TOPIC).await?;
        publish(&publisher, repeat_n("red", 5)).await?;
        let stands = async |name: &str, floor: u64, backlog: u64| {
            wait::until_ok("the backlog", SOON, async || {
                let position = admin.subscription(name).await?.positions.remove(0);
                let found = (position.floor, position.backlog);
                ensure!(found == (floor, backlog), "{name} stands at {found:?}: {position:?}");
                Ok(())
            })
            .await
        };
        for number in 0..3 {
            stands(&format!("s{number}"), 5, 0).await?;
        }
        publish(&publisher, mixed(3000)).await?;
        for round in 0..2 {
            for number in 0..3 {
                stands(&format!("s{number}"), 5, 1000).await.with_context(|| format!("{round}"))?;
            }
            rig.crash().await?;
        }
        // Some of them are taken, and some of these acked, by a consumer that goes away.
        for number in 0..3 {
            let name = format!("s{number}");
            let opening = client.subscriber(&*name).max_outstanding_messages(70);
            let mut subscriber = wait::soon("a subscriber", SOON, opening.open()).await??;
            let mut taken = app::next_many(&mut subscriber, 70).await?;
            stands(&name, 5, 1000).await?;
            taken.sort_unstable_by_key(|delivery| delivery.id.sequence);
            let rest = taken.split_off(50);
            app::confirm(taken).await?;
            // The position is before the 51st.
            stands(&name, 5 + 3 * 50, 950).await?;
            drop((rest, subscriber));
            stands(&name, 5 + 3 * 50, 950).await?;
        }
        publish(&publisher, mixed(30)).await?;
        for number in 0..3 {
            stands(&format!("s{number}"), 5 + 3 * 50, 960).await?;
        }
        // What is gone cannot be looked at, and counts until a consumer knows that it is.
        admin.purge_topic(TOPIC, None).await?;
        rig.crash().await?;
        let mut gone = Vec::new();
        for number in 0..3 {
            let subscription = admin.subscription(format!("s{number}")).await?;
            gone.push(subscription.positions[0].backlog);
        }
        publish(&publisher, mixed(300)).await?;
        for (number, gone) in gone.into_iter().enumerate() {
            stands(&format!("s{number}"), 5 + 3 * 50, gone + 100).await?;
        }
        app::shutdown(client).await
    });
}
