//! Several consumers of one subscription, and messages that are handed back.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use pubsub_client::{
    AckError, ConnectionState, Delivery, Drain, Event as Item, GapReason, Message, Nack, Reason,
    Start, Subscriber,
};
use pubsub_proto::v1::{PullRequest, ReceiptState, SequenceRange};
use pubsub_tests::{admin, lab::scenario, raw, wait};
use tokio::{runtime::Builder, time::Instant};

use crate::app::{self, SOON};

const WITHIN: Duration = Duration::from_secs(120);
const TOPIC: &str = "orders";

#[test]
fn a_second_consumer_takes_over_when_the_first_stops() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let channel = raw::connect(&server.url()).await?;
        admin::create_topic(&channel, TOPIC).await?;
        let client = app::client(&server.url())?;
        app::publish_numbers(&app::publisher(&client, TOPIC).await?, 1..=4).await?;
        let open = |name: &str| {
            let builder = client.subscriber("billing").topic(TOPIC).start(Start::Earliest);
            builder.consumer_id(name).open()
        };
        let mut first = open("first").await?;
        let mut second = open("second").await?;
        let standby = |state: &ConnectionState| match state {
            ConnectionState::Standby { active } => active == "first",
            _ => false,
        };
        app::state(second.state(), "standing by", SOON, standby).await?;
        let mut shown = app::next_many(&mut first, 3).await?;
        ensure!(app::sequences(&shown) == [1, 2, 3]);
        app::confirm(vec![shown.remove(0)]).await?;

        let stopper = first.stopper();
        wait::soon("the stop", SOON, stopper.stop(Drain::Release, SOON)).await?;
        drop(shown);
        let shown = app::next_many(&mut second, 3).await?;
        ensure!(app::sequences(&shown) == [2, 3, 4], "{shown:?}");
        // A release at a stop is no failure.
        ensure!(shown.iter().all(|delivery| delivery.attempt == 1), "{shown:?}");
        app::state(second.state(), "connected", SOON, ConnectionState::is_connected).await?;
        app::confirm(shown).await
    });
}

#[test]
fn a_second_consumer_takes_over_from_a_crashed_one_after_its_grace() {
    const GRACE: Duration = Duration::from_secs(30);
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        admin::create_topic(&raw::connect(&server.url()).await?, TOPIC).await?;
        let client = app::client(&server.url())?;
        app::publish_numbers(&app::publisher(&client, TOPIC).await?, 1..=3).await?;

        // A runtime of its own stands for a process: when it ends, nothing says goodbye.
        let url = server.url();
        let (crash, crashed) = tokio::sync::oneshot::channel();
        let (seen, first_seen) = tokio::sync::oneshot::channel();
        let process = std::thread::spawn(move || {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            let held = runtime.block_on(async {
                let client = app::client(&url)?;
                let builder = client.subscriber("billing").topic(TOPIC).start(Start::Earliest);
                let mut first = builder.consumer_id("first").open().await?;
                let mut shown = app::next_many(&mut first, 3).await?;
                app::confirm(vec![shown.remove(0)]).await?;
                let _ = seen.send(());
                let _ = crashed.await;
                Ok::<_, anyhow::Error>((client, first, shown))
            });
            runtime.shutdown_background();
            drop(held);
            Ok::<_, anyhow::Error>(())
        });
        wait::soon("the first consumer", SOON, first_seen).await??;
        let builder = client.subscriber("billing").topic(TOPIC);
        let mut second = builder.consumer_id("second").open().await?;
        let lost = Instant::now();
        ensure!(crash.send(()).is_ok(), "the first consumer failed");

        let waiting = GRACE + SOON;
        let item = wait::soon("the take-over", waiting, second.next()).await?;
        let delivery = item.context("the end")??.into_message().context("no message")?;
        ensure!(delivery.id.sequence == 2, "{delivery:?}");
        ensure!(lost.elapsed() > GRACE / 2, "after {:?} already", lost.elapsed());
        delivery.ack();
        app::next(&mut second).await?.ack();
        process.join().map_err(|_| anyhow::anyhow!("the first consumer panicked"))?
    });
}

#[test]
fn a_superseded_consumer_is_told_and_stays_away() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        admin::create_topic(&raw::connect(&server.url()).await?, TOPIC).await?;
        let client = app::client(&server.url())?;
        app::publish_numbers(&app::publisher(&client, TOPIC).await?, 1..=2).await?;
        let mut older = app::subscribe(&client, "billing", TOPIC).await?;
        let held = app::next_many(&mut older, 2).await?;

        // The same consumer starts again, as after a deployment.
        let mut newer = app::subscribe(&client, "billing", TOPIC).await?;
        let error = app::failure(&mut older).await?;
        ensure!(error.reason() == Some(Reason::Superseded), "{error}");
        ensure!(!error.is_retryable(), "{error} must not be tried again");
        app::state(older.state(), "closed", SOON, ConnectionState::is_closed).await?;
        let shown = app::next_many(&mut newer, 2).await?;
        ensure!(app::sequences(&shown) == [1, 2]);
        drop(held);
        app::confirm(shown).await
    });
}

#[test]
fn a_nack_shows_everything_from_there_on_again_in_order() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let channel = raw::connect(&server.url()).await?;
        admin::create_topic(&channel, TOPIC).await?;
        let client = app::client(&server.url())?;
        let publisher = app::publisher(&client, TOPIC).await?;
        app::publish_numbers(&publisher, 1..=5).await?;
        let mut subscriber = app::subscribe(&client, "billing", TOPIC).await?;
        let mut shown = app::next_many(&mut subscriber, 3).await?;
        let (third, second) = (shown.pop().context("3")?, shown.pop().context("2")?);
        let first = shown.pop().context("1")?;
        first.nack(Nack::now().because("not yet"));
        // An old handle can still ack: its message is not shown again.
        second.ack_confirmed().await?;

        let again = app::next_many(&mut subscriber, 4).await?;
        ensure!(app::sequences(&again) == [1, 3, 4, 5], "{again:?}");
        ensure!(again[0].attempt == 2, "{:?}", again[0]);
        ensure!(again[1..].iter().all(|one| one.attempt == 1), "{again:?}");
        // So can one whose message was shown again meanwhile.
        third.ack_confirmed().await?;
        app::confirm(again).await?;
        app::all_acked(&channel, "billing").await?;
        app::publish_numbers(&publisher, [6]).await?;
        let next = app::next(&mut subscriber).await?;
        ensure!(next.id.sequence == 6, "{next:?}");
        next.ack();
        Ok(())
    });
}

#[test]
fn a_nack_with_a_delay_holds_the_topic_back_and_survives_a_cut() {
    const DELAY: Duration = Duration::from_secs(2);
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        admin::create_topic(&raw::connect(&rig.url()).await?, TOPIC).await?;
        let client = app::client(&rig.url())?;
        app::publish_numbers(&app::publisher(&client, TOPIC).await?, 1..=2).await?;
        let mut subscriber = app::subscribe(&client, "billing", TOPIC).await?;
        let first = app::next(&mut subscriber).await?;
        let nacked = Instant::now();
        first.nack(Nack::after(DELAY));
        rig.crash().await?;
        let again = app::next_many(&mut subscriber, 2).await?;
        ensure!(app::sequences(&again) == [1, 2], "{again:?}");
        let waited = nacked.elapsed();
        ensure!(waited >= DELAY, "it came after {waited:?} already");
        app::confirm(again).await
    });
}

#[test]
fn a_message_reaches_its_recipients_only() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let channel = raw::connect(&server.url()).await?;
        let topic = admin::create_topic(&channel, TOPIC).await?;
        for subscription in ["billing", "shipping"] {
            admin::create_subscription(&channel, subscription, &[TOPIC]).await?;
        }
        let client = app::client(&server.url())?;
        let publisher = app::publisher(&client, TOPIC).await?;
        publisher.publish(Message::new("1")).await?;
        publisher.publish(Message::new("2").with_recipient("billing")).await?;
        publisher.publish(Message::new("3").with_recipient("shipping")).await?;
        let both = Message::new("4").with_recipient("billing").with_recipient("shipping");
        publisher.publish(both).await?;
        let unknown = publisher.publish(Message::new("5").with_recipient("nobody")).await;
        let refused = unknown.err().context("an unknown recipient is accepted")?;
        ensure!(refused.reason() == Some(Reason::UnknownRecipient), "{refused}");

        for (subscription, expected) in [("billing", [1, 2, 4]), ("shipping", [1, 3, 4])] {
            let mut subscriber = client.subscriber(subscription).must_exist().open().await?;
            let shown = app::next_many(&mut subscriber, 3).await?;
            ensure!(app::sequences(&shown) == expected, "{subscription}: {shown:?}");
            app::confirm(shown).await?;
            app::all_acked(&channel, subscription).await?;
        }
        let states = async |sequence| -> Result<_> {
            let receipts = admin::receipts(&channel, &topic, sequence, "").await?;
            let mut states: Vec<_> =
                receipts.iter().map(|one| (one.subscription.clone(), one.state())).collect();
            states.sort();
            Ok(states.into_iter().map(|(_, state)| state).collect::<Vec<_>>())
        };
        let (received, not) = (ReceiptState::Received, ReceiptState::NotAddressed);
        ensure!(states(1).await? == [received, received]);
        ensure!(states(2).await? == [received, not]);
        ensure!(states(3).await? == [not, received]);
        Ok(())
    });
}

#[test]
fn a_message_for_other_recipients_is_no_backlog_once_it_was_passed() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let channel = raw::connect(&server.url()).await?;
        admin::create_topic(&channel, TOPIC).await?;
        for subscription in ["billing", "shipping"] {
            admin::create_subscription(&channel, subscription, &[TOPIC]).await?;
        }
        let client = app::client(&server.url())?;
        let publisher = app::publisher(&client, TOPIC).await?;
        publisher.publish(Message::new("1")).await?;
        publisher.publish(Message::new("2").with_recipient("shipping")).await?;
        let mut billing = app::subscribe(&client, "billing", TOPIC).await?;
        let held = app::next(&mut billing).await?;
        wait::until_ok("a backlog of the first message alone", SOON, async || {
            let backlog = admin::subscription(&channel, "billing").await?.positions[0].backlog;
            ensure!(backlog == 1, "the backlog is {backlog}");
            Ok(())
        })
        .await?;
        // It is told, too, that there is nothing more to come.
        wait::soon("caught up", SOON, billing.caught_up()).await?;
        app::confirm(vec![held]).await
    });
}

#[test]
fn a_pattern_picks_up_a_new_topic_from_its_first_message() {
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        let channel = raw::connect(&rig.server.url()).await?;
        admin::create_topic(&channel, "orders-eu").await?;
        let client = app::client(&rig.url())?;
        let mut subscriber =
            client.subscriber("billing").topic("orders-*").start(Start::Latest).open().await?;
        for (index, topic) in ["orders-us", "orders-asia"].into_iter().enumerate() {
            admin::create_topic(&channel_of(&rig).await?, topic).await?;
            app::publish_numbers(&app::publisher(&client, topic).await?, 1..=3).await?;
            let shown = app::next_many(&mut subscriber, 3).await?;
            ensure!(app::sequences(&shown) == [1, 2, 3], "{shown:?}");
            ensure!(shown.iter().all(|one| &*one.id.topic == topic), "{shown:?}");
            app::confirm(shown).await?;
            if index == 0 {
                rig.crash().await?;
            }
        }
        Ok(())
    });
}

async fn channel_of(rig: &pubsub_tests::lab::Rig) -> Result<tonic::transport::Channel> {
    raw::connect(&rig.server.url()).await
}

#[test]
fn a_topic_deleted_and_created_again_under_live_streams_is_told() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let channel = raw::connect(&server.url()).await?;
        let old = admin::create_topic(&channel, TOPIC).await?;
        let client = app::client(&server.url())?;
        let publisher = app::publisher(&client, TOPIC).await?;
        app::publish_numbers(&publisher, 1..=5).await?;
        let builder = client.subscriber("billing").topic(TOPIC).start(Start::Earliest);
        let mut subscriber = builder.max_outstanding_messages(2).open().await?;
        // As many as it takes: the others are still with the server.
        let held = app::next_many(&mut subscriber, 2).await?;

        admin::delete_topic(&channel, TOPIC).await?;
        let new = admin::create_topic(&channel, TOPIC).await?;
        ensure!(new.epoch != old.epoch, "the epoch is the same");
        // The old publisher does not write into the new topic as if nothing had happened.
        let answer = wait::soon("an answer", SOON, publisher.publish(Message::new("old"))).await?;
        let error = answer.err().context("a publish to the deleted topic is stored")?;
        eprintln!("the publisher is told: {error}");
        app::publish_numbers(&app::publisher(&client, TOPIC).await?, 1..=2).await?;

        match wait::soon("a gap", SOON, subscriber.next()).await?.context("the end")?? {
            Item::Gap(gap) => {
                let right = gap.epoch == old.epoch && gap.reason == GapReason::TopicDeleted;
                ensure!(right && gap.range == (3..=5), "{gap:?}");
            }
            other => bail!("a gap was expected, not {other:?}"),
        }
        // The held messages of the deleted topic take no room from the new one.
        let fresh = app::next_many(&mut subscriber, 2).await?;
        ensure!(fresh.iter().all(|one| one.id.epoch == new.epoch), "{fresh:?}");
        ensure!(app::sequences(&fresh) == [1, 2], "{fresh:?}");
        // What was received before the topic went can be acked still.
        app::confirm(held).await?;
        app::confirm(fresh).await?;
        app::all_acked(&channel, "billing").await
    });
}

#[test]
fn a_topic_deleted_while_its_consumer_is_away_is_told_to_the_next_one() {
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        let channel = channel_of(&rig).await?;
        let old = admin::create_topic(&channel, TOPIC).await?;
        admin::create_subscription(&channel, "pulled", &[TOPIC]).await?;
        let client = app::client(&rig.url())?;
        app::publish_numbers(&app::publisher(&client, TOPIC).await?, 1..=5).await?;
        let mut first = app::subscribe(&client, "billing", TOPIC).await?;
        let mut shown = app::next_many(&mut first, 3).await?;
        app::confirm(shown.drain(..2).collect()).await?;
        drop((shown, first));
        app::shutdown(client).await?;

        admin::delete_topic(&channel, TOPIC).await?;
        let new = admin::create_topic(&channel, TOPIC).await?;
        rig.crash().await?;
        // One that goes before it has looked has not been told.
        let client = app::client(&rig.url())?;
        app::publish_numbers(&app::publisher(&client, TOPIC).await?, 1..=2).await?;
        app::subscribe(&client, "billing", TOPIC).await?;
        app::shutdown(client).await?;
        rig.crash().await?;
        let mut channel = channel_of(&rig).await?;

        let client = app::client(&rig.url())?;
        let mut next = app::subscribe(&client, "billing", TOPIC).await?;
        match wait::soon("a gap", SOON, next.next()).await?.context("the end")?? {
            Item::Gap(gap) => {
                let right = gap.epoch == old.epoch && gap.reason == GapReason::TopicDeleted;
                ensure!(right && gap.range == (3..=5), "{gap:?}");
            }
            other => bail!("a gap was expected, not {other:?}"),
        }
        let fresh = app::next_many(&mut next, 2).await?;
        ensure!(fresh.iter().all(|one| one.id.epoch == new.epoch), "{fresh:?}");
        app::confirm(fresh).await?;
        // A pull is told once.
        let pull = PullRequest { subscription: "pulled".into(), ..PullRequest::default() };
        let pulled = raw::subscriber(&channel).pull(pull.clone()).await?.into_inner();
        let [gap] = pulled.gaps.as_slice() else { bail!("{:?}", pulled.gaps) };
        let right =
            gap.epoch == old.epoch && gap.range == Some(SequenceRange { first: 1, last: 5 });
        ensure!(right && pulled.messages.len() == 2, "{pulled:?}");
        let again = raw::subscriber(&channel).pull(pull).await?.into_inner();
        ensure!(again.gaps.is_empty(), "{again:?}");
        // Known now, and not told again.
        for crash in [true, false] {
            for name in ["billing", "pulled"] {
                wait::until_ok("the end of the deleted topic", SOON, async || {
                    let left = admin::subscription(&channel, name).await?.positions;
                    ensure!(left.len() == 1 && left[0].epoch == new.epoch, "{name}: {left:?}");
                    Ok(())
                })
                .await?;
            }
            if crash {
                rig.crash().await?;
                channel = channel_of(&rig).await?;
            }
        }
        Ok(())
    });
}

#[test]
fn a_seek_moves_a_live_subscription_and_receipts_stay() {
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        let channel = raw::connect(&rig.server.url()).await?;
        let topic = admin::create_topic(&channel, TOPIC).await?;
        let client = app::client(&rig.url())?;
        app::publish_numbers(&app::publisher(&client, TOPIC).await?, 1..=10).await?;
        let mut subscriber = app::subscribe(&client, "billing", TOPIC).await?;
        let mut shown = app::next_many(&mut subscriber, 4).await?;
        let stale = shown.split_off(2);
        app::confirm(shown).await?;

        client.admin().seek("billing", None, Start::Sequence(8)).await?;
        let ahead = next_after_seek(&mut subscriber, 8).await?;
        ensure!(ahead.id.sequence == 8, "{ahead:?}");
        ahead.ack_confirmed().await?;
        // What was shown before the seek can not be acked after it: it may come again.
        for delivery in stale {
            let answer = wait::soon("an answer", SOON, delivery.ack_confirmed()).await?;
            ensure!(answer == Err(AckError::Stale), "{answer:?}");
        }
        rig.crash().await?;
        let channel = raw::connect(&rig.server.url()).await?;
        let state = async |sequence| -> Result<_> {
            let receipts = admin::receipts(&channel, &topic, sequence, "billing").await?;
            Ok(receipts.first().context("no receipt")?.state())
        };
        for (sequence, expected) in [
            (2, ReceiptState::Received),
            (3, ReceiptState::Released),
            (7, ReceiptState::Released),
            (8, ReceiptState::Received),
            (10, ReceiptState::Pending),
        ] {
            let found = state(sequence).await?;
            ensure!(found == expected, "{sequence}: {found:?} instead of {expected:?}");
        }
        client.admin().seek("billing", None, Start::Sequence(1)).await?;
        let back = next_after_seek(&mut subscriber, 1).await?;
        ensure!(back.id.sequence == 1, "{back:?}");
        // Shown again, and received all the same.
        ensure!(state(1).await? == ReceiptState::Received);
        back.ack();
        Ok(())
    });
}

/// The first message at a new position; what was on its way before the seek is passed over.
async fn next_after_seek(subscriber: &mut Subscriber, to: u64) -> Result<Delivery> {
    loop {
        let delivery = app::next(subscriber).await?;
        if delivery.id.sequence == to {
            return Ok(delivery);
        }
        // Dropped, it is released, which means nothing after the seek.
        drop(delivery);
    }
}

#[test]
fn a_reader_goes_on_where_it_was_after_a_crash_and_leaves_nothing_behind() {
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        let channel = raw::connect(&rig.server.url()).await?;
        admin::create_topic(&channel, TOPIC).await?;
        let client = app::client(&rig.url())?;
        let publisher = app::publisher(&client, TOPIC).await?;
        app::publish_numbers(&publisher, 1..=5000).await?;
        let mut reader = client.reader([TOPIC]).start(Start::Earliest).open().await?;
        let mut expected = 1;
        for end in [700, 2400, 5000] {
            while expected <= end {
                let delivery = app::next(&mut reader).await?;
                ensure!(delivery.id.sequence == expected, "{} for {expected}", delivery.id);
                expected += 1;
            }
            rig.crash().await?;
        }
        app::publish_numbers(&publisher, [5001]).await?;
        ensure!(app::next(&mut reader).await?.id.sequence == 5001);
        let left = client.admin().subscriptions(None).await?.items;
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    });
}
