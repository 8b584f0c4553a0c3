//! Subscribers, across whatever happens to their connections.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pubsub_client::{
    AckError, Cause, ConnectionState, CreateSubscription, Delivery, Drain, Event, GapReason, Nack,
    Reason, ReceiptState, Start, SubscribeError, TopicConfig,
};
use tokio::time::timeout;

use crate::harness::{World, next, number, receive, silence, soon};

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test]
async fn what_is_held_or_acked_is_not_shown_again_after_cuts_and_restarts() {
    let mut world = World::new().await;
    world.publish(1..=20).await;
    let mut subscriber = world.subscription("s").open().await.unwrap();
    let held = next(&mut subscriber).await;
    assert_eq!(receive(&mut subscriber, 4).await, [2, 3, 4, 5]);
    world.proxy.cut();
    assert_eq!(receive(&mut subscriber, 5).await, [6, 7, 8, 9, 10]);
    world.stop_server().await;
    let other = next(&mut subscriber).await;
    assert_eq!(number(&other), 11);
    other.ack();
    world.start_server().await;
    assert_eq!(receive(&mut subscriber, 9).await, (12..=20).collect::<Vec<_>>());
    soon(held.ack_confirmed()).await.unwrap();
    silence(&mut subscriber).await;
    let report = soon(subscriber.stopper().stop(Drain::Finish, 5 * SECOND)).await;
    assert!(report.is_clean(), "{report:?}");
    let info = world.client.admin().subscription("s").await.unwrap();
    assert_eq!((info.positions[0].floor, info.positions[0].backlog), (20, 0));
    assert_eq!(info.active_consumers, []);
}

#[tokio::test]
async fn a_busy_stream_survives_many_cuts() {
    const COUNT: u64 = 2000;
    let world = World::new().await;
    let mut subscriber = world.subscription("s").max_outstanding_messages(64).open().await.unwrap();
    let publishing = async {
        let publisher = world.client.publisher("t").open().await.unwrap();
        for number in 1..=COUNT {
            drop(publisher.enqueue(number.to_string()).await.unwrap());
            if number % 100 == 0 {
                tokio::time::sleep(Duration::from_millis(10)).await;
                world.proxy.cut();
            }
        }
        soon(publisher.flush()).await.unwrap();
    };
    let receiving = receive(&mut subscriber, usize::try_from(COUNT).unwrap());
    let ((), received) = tokio::join!(publishing, receiving);
    assert_eq!(received, (1..=COUNT).collect::<Vec<_>>());
    silence(&mut subscriber).await;
}

#[tokio::test]
async fn many_are_handed_out_and_acked_together() {
    let world = World::new().await;
    world.publish(1..=20).await;
    let mut subscriber = world.subscription("s").open().await.unwrap();
    let mut other = world.subscription("other").open().await.unwrap();
    let mut reader = world.client.reader(["t"]).start(Start::Earliest).open().await.unwrap();
    let mut events = Vec::new();
    assert_eq!(subscriber.next_many(&mut events, 0).await.unwrap().unwrap(), 0);
    while events.len() < 12 {
        let (before, limit) = (events.len(), 5.min(12 - events.len()));
        let added = soon(subscriber.next_many(&mut events, limit)).await.unwrap().unwrap();
        assert!((1..=limit).contains(&added), "{added} of {limit}");
        assert_eq!(events.len(), before + added);
    }
    let mut held: Vec<_> = events.drain(..).filter_map(Event::into_message).collect();
    assert_eq!(held.iter().map(number).collect::<Vec<_>>(), (1..=12).collect::<Vec<_>>());
    let kept = held.split_off(10);
    // Of several subscribers, in turns, and of one that has nothing to ack.
    let mut acked = Vec::new();
    for delivery in held {
        acked.extend([delivery, next(&mut other).await, next(&mut reader).await]);
    }
    Delivery::ack_all(acked);
    world.proxy.cut();
    while events.len() < 8 {
        soon(subscriber.next_many(&mut events, 100)).await.unwrap().unwrap();
    }
    let rest: Vec<_> = events.drain(..).filter_map(Event::into_message).collect();
    assert_eq!(rest.iter().map(number).collect::<Vec<_>>(), (13..=20).collect::<Vec<_>>());
    let waiting = timeout(SECOND / 5, subscriber.next_many(&mut events, 100)).await;
    assert!(waiting.is_err() && events.is_empty(), "there is nothing more");
    Delivery::ack_all(kept.into_iter().chain(rest));
    for (subscriber, floor) in [(subscriber, 20), (other, 10)] {
        let report = soon(subscriber.stopper().stop(Drain::Finish, 5 * SECOND)).await;
        assert!(report.is_clean(), "{report:?}");
        let name = if floor == 20 { "s" } else { "other" };
        let info = world.client.admin().subscription(name).await.unwrap();
        assert_eq!(info.positions[0].floor, floor, "{name}");
    }
}

#[tokio::test]
async fn after_a_nack_the_message_and_its_successors_come_again_in_order() {
    let world = World::new().await;
    world.publish(1..=5).await;
    let mut subscriber = world.subscription("s").open().await.unwrap();
    let first = next(&mut subscriber).await;
    let second = next(&mut subscriber).await;
    let third = next(&mut subscriber).await;
    second.nack(Nack::after(SECOND).because("a test"));
    first.ack();
    // The rest waits for the nacked message.
    silence(&mut subscriber).await;
    // An older delivery's ack counts.
    third.ack();
    let again = next(&mut subscriber).await;
    assert_eq!((number(&again), again.attempt), (2, 2));
    again.ack();
    assert_eq!(receive(&mut subscriber, 2).await, [4, 5]);
    silence(&mut subscriber).await;
}

#[tokio::test]
async fn a_message_that_is_held_for_too_long_comes_again_and_its_older_delivery_can_ack() {
    let world = World::new().await;
    world.publish(1..=2).await;
    let mut patient = world.subscription("patient").max_processing(Duration::MAX);
    patient = patient.max_outstanding_messages(1);
    let mut patient = patient.open().await.unwrap();
    let kept = next(&mut patient).await;
    let mut subscriber = world.subscription("s").max_processing(SECOND / 2).open().await.unwrap();
    let shown_at = std::time::Instant::now();
    let first = next(&mut subscriber).await;
    assert_eq!(receive(&mut subscriber, 1).await, [2]);
    let again = next(&mut subscriber).await;
    assert!(shown_at.elapsed() >= 3 * SECOND / 2, "after the limit and the server's backoff");
    assert_eq!((number(&again), again.attempt), (1, 2));
    soon(first.ack_confirmed()).await.unwrap();
    // It has nothing to say any more.
    again.nack(Nack::now());
    silence(&mut subscriber).await;
    let info = world.client.admin().subscription("s").await.unwrap();
    assert_eq!((info.positions[0].floor, info.positions[0].backlog), (2, 0));
    silence(&mut patient).await;
    kept.ack();
    let second = next(&mut patient).await;
    assert_eq!((number(&second), second.attempt), (2, 1));
}

#[tokio::test]
async fn a_message_that_is_given_up_waits_for_its_handler() {
    let world = World::new().await;
    world.publish(1..=2).await;
    let subscriber = world.subscription("s").max_processing(SECOND / 2).open().await.unwrap();
    let stopper = subscriber.stopper();
    let seen = Arc::new(Mutex::new((0, Vec::new())));
    let handler = {
        let seen = Arc::clone(&seen);
        move |message: pubsub_client::ReceivedMessage| {
            let seen = Arc::clone(&seen);
            async move {
                let sequence = message.id.sequence;
                {
                    let mut seen = seen.lock().unwrap();
                    seen.0 += 1;
                    assert_eq!(seen.0, 1, "two at once");
                    seen.1.push((sequence, message.attempt));
                }
                // Long enough for the first to be given up, and to be there again.
                tokio::time::sleep(if sequence == 1 { 4 * SECOND } else { SECOND / 10 }).await;
                seen.lock().unwrap().0 -= 1;
                if message.attempt == 1 && sequence == 1 { Err("too late") } else { Ok(()) }
            }
        }
    };
    let running = tokio::task::spawn(subscriber.run(4, handler));
    soon(async {
        while seen.lock().unwrap().1.len() < 3 {
            tokio::time::sleep(SECOND / 50).await;
        }
    })
    .await;
    assert!(soon(stopper.stop(Drain::Finish, 5 * SECOND)).await.is_clean());
    soon(running).await.unwrap().unwrap();
    assert_eq!(seen.lock().unwrap().1, [(1, 1), (1, 2), (2, 1)]);
}

#[tokio::test]
async fn a_dropped_delivery_comes_again_without_counting_as_a_failure() {
    let world = World::new().await;
    world.publish(1..=2).await;
    let mut subscriber = world.subscription("s").open().await.unwrap();
    drop(next(&mut subscriber).await);
    let again = next(&mut subscriber).await;
    assert_eq!((number(&again), again.attempt), (1, 1));
    again.ack();
    assert_eq!(receive(&mut subscriber, 1).await, [2]);
}

#[tokio::test]
async fn a_nack_survives_a_cut() {
    let world = World::new().await;
    world.publish(1..=4).await;
    let mut subscriber = world.subscription("s").open().await.unwrap();
    let first = next(&mut subscriber).await;
    let second = next(&mut subscriber).await;
    assert_eq!(number(&second), 2);
    world.proxy.set_target(None);
    first.nack(Nack::now());
    tokio::time::sleep(SECOND / 10).await;
    world.proxy.set_target(world.server.as_ref().map(|server| server.address()));
    assert_eq!(receive(&mut subscriber, 4).await, [1, 2, 3, 4]);
    drop(second);
    silence(&mut subscriber).await;
}

#[tokio::test]
async fn a_second_consumer_stands_by_and_takes_over() {
    let world = World::new().await;
    world.publish(1..=3).await;
    let mut active = world.subscription("s").consumer_id("a").open().await.unwrap();
    let mut standby = world.subscription("s").consumer_id("b").open().await.unwrap();
    assert_eq!(receive(&mut active, 1).await, [1]);
    let state = standby.state().get();
    assert!(matches!(state, ConnectionState::Standby { ref active } if active == "a"), "{state:?}");
    silence(&mut standby).await;
    let unfinished = next(&mut active).await;
    let report = soon(active.stopper().stop(Drain::Release, 5 * SECOND)).await;
    assert_eq!((report.unfinished, report.unconfirmed), (1, 0));
    assert!(soon(active.next()).await.is_none());
    assert_eq!(receive(&mut standby, 2).await, [2, 3]);
    assert_eq!(soon(unfinished.ack_confirmed()).await, Err(AckError::Closed));
    assert!(standby.state().get().is_connected());
}

#[tokio::test]
async fn a_newer_consumer_of_the_same_name_takes_over_at_once() {
    let world = World::new().await;
    world.publish(1..=2).await;
    let mut older = world.subscription("s").open().await.unwrap();
    assert_eq!(receive(&mut older, 1).await, [1]);
    tokio::time::sleep(SECOND / 5).await;
    let other = world.other_client().await;
    let mut newer = other.subscriber("s").open().await.unwrap();
    let error = loop {
        match soon(older.next()).await {
            Some(Err(error)) => break error,
            Some(Ok(event)) => drop(event),
            None => panic!("no error came"),
        }
    };
    assert_eq!(error.reason(), Some(Reason::Superseded));
    assert!(soon(older.next()).await.is_none());
    assert_eq!(receive(&mut newer, 1).await, [2]);
}

#[tokio::test]
async fn stopping_waits_for_what_is_in_the_applications_hands() {
    let world = World::new().await;
    world.publish(1..=3).await;
    let mut subscriber = world.subscription("s").open().await.unwrap();
    let delivery = next(&mut subscriber).await;
    let stopper = subscriber.stopper();
    let stopping =
        tokio::task::spawn(async move { stopper.stop(Drain::Finish, 10 * SECOND).await });
    tokio::task::yield_now().await;
    assert!(soon(subscriber.next()).await.is_none());
    tokio::time::sleep(SECOND / 10).await;
    assert!(!stopping.is_finished());
    delivery.ack();
    assert!(soon(stopping).await.unwrap().is_clean());
    let mut subscriber = world.subscription("s").open().await.unwrap();
    assert_eq!(receive(&mut subscriber, 2).await, [2, 3]);
}

#[tokio::test]
async fn a_handler_runs_for_one_message_of_a_topic_at_a_time() {
    let world = World::new().await;
    world.client.admin().create_topic("u", TopicConfig::new()).await.unwrap();
    let other = world.client.publisher("u").open().await.unwrap();
    for number in 1..=10 {
        drop(other.enqueue(number.to_string()).await.unwrap());
    }
    world.publish(1..=10).await;
    let subscriber = world.client.subscriber("s").topics(["t", "u"]).start(Start::Earliest);
    let subscriber = subscriber.open().await.unwrap();
    let stopper = subscriber.stopper();
    let seen = Arc::new(Mutex::new((BTreeSet::new(), Vec::new(), 0)));
    let handler = {
        let seen = Arc::clone(&seen);
        move |message: pubsub_client::ReceivedMessage| {
            let seen = Arc::clone(&seen);
            async move {
                let topic = message.id.topic.clone();
                {
                    let mut seen = seen.lock().unwrap();
                    assert!(seen.0.insert(topic.clone()), "two of {topic}");
                    seen.2 = seen.2.max(seen.0.len());
                }
                tokio::time::sleep(SECOND / 100).await;
                let mut seen = seen.lock().unwrap();
                seen.0.remove(&topic);
                seen.1.push((topic, message.id.sequence));
                if message.id.sequence == 4 && message.attempt == 1 {
                    return Err("the first time");
                }
                Ok(())
            }
        }
    };
    let running = tokio::task::spawn(subscriber.run(4, handler));
    soon(async {
        while seen.lock().unwrap().1.len() < 22 {
            tokio::time::sleep(SECOND / 50).await;
        }
    })
    .await;
    assert!(soon(stopper.stop(Drain::Finish, 5 * SECOND)).await.is_clean());
    soon(running).await.unwrap().unwrap();
    let (_, order, at_once) = std::mem::take(&mut *seen.lock().unwrap());
    assert_eq!(at_once, 2, "both topics at once");
    for name in ["t", "u"] {
        let of = order.iter().filter(|(topic, _)| &**topic == name);
        let sequences: Vec<u64> = of.map(|(_, sequence)| *sequence).collect();
        assert_eq!(sequences, [1, 2, 3, 4, 4, 5, 6, 7, 8, 9, 10]);
    }
}

#[tokio::test]
async fn a_reader_keeps_its_own_position() {
    let world = World::new().await;
    world.publish(1..=10).await;
    let mut reader = world.client.reader(["t"]).start(Start::Sequence(3)).open().await.unwrap();
    assert_eq!(receive(&mut reader, 3).await, [3, 4, 5]);
    world.proxy.cut();
    tokio::time::sleep(SECOND / 5).await;
    drop(next(&mut reader).await);
    assert_eq!(receive(&mut reader, 4).await, [7, 8, 9, 10]);
    soon(reader.caught_up()).await;
    assert!(world.client.admin().subscriptions(None).await.unwrap().items.is_empty());

    let mut latest = world.client.reader(["t"]).open().await.unwrap();
    world.proxy.set_target(None);
    tokio::time::sleep(SECOND / 10).await;
    world.proxy.set_target(world.server.as_ref().map(|server| server.address()));
    world.publish(11..=12).await;
    assert_eq!(receive(&mut latest, 2).await, [11, 12]);
    assert_eq!(receive(&mut reader, 2).await, [11, 12]);
}

#[tokio::test]
async fn a_seek_moves_a_live_subscriber_and_makes_older_acks_stale() {
    let world = World::new().await;
    world.publish(1..=5).await;
    let mut subscriber = world.subscription("s").open().await.unwrap();
    assert_eq!(receive(&mut subscriber, 3).await, [1, 2, 3]);
    let fourth = next(&mut subscriber).await;
    world.client.admin().seek("s", Some("t"), Start::Sequence(2)).await.unwrap();
    let again = next(&mut subscriber).await;
    // The fifth may have been handed out before the seek arrived.
    let again = if number(&again) == 5 { next(&mut subscriber).await } else { again };
    assert_eq!(number(&again), 2);
    again.ack();
    assert_eq!(soon(fourth.ack_confirmed()).await, Err(AckError::Stale));
    assert_eq!(receive(&mut subscriber, 3).await, [3, 4, 5]);
}

#[tokio::test]
async fn a_deleted_topic_is_a_gap_and_a_recreated_one_starts_over() {
    let world = World::new().await;
    world.publish(1..=3).await;
    let mut subscriber = world.client.subscriber("s").topic("t*").start(Start::Earliest);
    subscriber = subscriber.max_outstanding_messages(1);
    let mut subscriber = subscriber.open().await.unwrap();
    let first = next(&mut subscriber).await;
    world.client.admin().delete_topic("t").await.unwrap();
    world.client.admin().create_topic("t", TopicConfig::new()).await.unwrap();
    world.publish(4..=4).await;
    let gap = match soon(subscriber.next()).await {
        Some(Ok(Event::Gap(gap))) => gap,
        other => panic!("{other:?}"),
    };
    assert_eq!((gap.range, gap.reason), (2..=3, GapReason::TopicDeleted));
    assert_eq!(number(&next(&mut subscriber).await), 4);
    // What was received before can be acked still.
    assert_eq!(soon(first.ack_confirmed()).await, Ok(()));
}

#[tokio::test]
async fn wrong_settings_and_deletion_are_terminal() {
    let world = World::new().await;
    let mut subscriber = world.subscription("s").open().await.unwrap();
    let admin = world.client.admin();
    admin.create_topic("u", TopicConfig::new()).await.unwrap();
    let other = world.client.subscriber("s").topic("u").consumer_id("x").open();
    let Err(SubscribeError::Refused(error)) = soon(other).await else { panic!("no mismatch") };
    assert_eq!(error.reason(), Reason::SubscriptionMismatch);
    assert_eq!(error.metadata("field"), Some("topics"));
    let missing = world.client.subscriber("missing").must_exist().topic("t").open();
    let error = soon(missing).await.unwrap_err();
    assert_eq!(error.reason(), Some(Reason::SubscriptionNotFound));
    admin.delete_subscription("s").await.unwrap();
    let Some(Err(error)) = soon(subscriber.next()).await else { panic!("no error") };
    assert_eq!(error.reason(), Some(Reason::SubscriptionDeleted));
    assert!(soon(subscriber.next()).await.is_none());
    assert!(subscriber.state().get().is_closed());
}

#[tokio::test]
async fn receipts_tell_who_has_received() {
    let world = World::new().await;
    let admin = world.client.admin();
    let settings = CreateSubscription::to(["t"]).with_start(Start::Earliest);
    admin.create_subscription("idle", settings).await.unwrap();
    world.publish(1..=2).await;
    let mut subscriber = world.subscription("s").open().await.unwrap();
    let delivery = next(&mut subscriber).await;
    let id = delivery.id.clone();
    soon(delivery.ack_confirmed()).await.unwrap();
    let receipts = admin.receipts("t", Some(id.epoch), id.sequence, None).await.unwrap();
    let states: Vec<_> =
        receipts.iter().map(|receipt| (receipt.subscription.as_str(), &receipt.state)).collect();
    assert_eq!(states, [("idle", &ReceiptState::Pending), ("s", &ReceiptState::Received)]);
}

#[tokio::test]
async fn an_absent_server_shows_in_the_state() {
    let world = World::new().await;
    let subscriber = world.subscription("s").open().await.unwrap();
    let position = subscriber.position();
    assert!(position.caught_up);
    world.proxy.set_target(None);
    let state = soon(subscriber.state().wait_for(ConnectionState::is_reconnecting)).await;
    let Some(ConnectionState::Reconnecting { attempt, .. }) = state else { panic!("{state:?}") };
    assert!(attempt >= 1);
    assert!(world.client.state().get().is_reconnecting());
    world.proxy.set_target(world.server.as_ref().map(|server| server.address()));
    soon(subscriber.state().wait_for(ConnectionState::is_connected)).await.unwrap();
    soon(world.client.state().wait_for(ConnectionState::is_connected)).await.unwrap();
}

#[tokio::test]
async fn a_silent_server_is_noticed_and_what_it_kept_comes_through() {
    let world = World::new().await;
    let mut subscriber = world.subscription("s").open().await.unwrap();
    world.publish(1..=1).await;
    let held = next(&mut subscriber).await;
    let frozen_at = std::time::Instant::now();
    world.proxy.freeze(true);
    let ack = tokio::task::spawn(held.ack_confirmed());
    let mut state = subscriber.state();
    let state = soon(state.wait_for(ConnectionState::is_reconnecting)).await;
    let Some(ConnectionState::Reconnecting { cause, .. }) = state else { panic!("{state:?}") };
    assert!(matches!(*cause, Cause::Silence(_)), "{cause}");
    // By its heartbeats: the connection itself takes 30 s to notice.
    assert!(frozen_at.elapsed() < 15 * SECOND);
    world.proxy.freeze(false);
    assert_eq!(soon(ack).await.unwrap(), Ok(()));
    silence(&mut subscriber).await;
}

#[tokio::test]
async fn a_planned_restart_is_followed_and_shows_nothing_twice() {
    let mut world = World::new().await;
    world.publish(1..=6).await;
    let mut subscriber = world.subscription("s").open().await.unwrap();
    assert_eq!(receive(&mut subscriber, 3).await, [1, 2, 3]);
    let held = next(&mut subscriber).await;
    let mut state = subscriber.state();
    let ((), drained) = tokio::join!(
        world.drain_server(),
        state.wait_for(|state| matches!(
            state,
            ConnectionState::Reconnecting { cause, attempt: 0, .. }
                if matches!(**cause, Cause::Drain(_))
        )),
    );
    assert!(drained.is_some());
    world.start_server().await;
    assert_eq!(receive(&mut subscriber, 2).await, [5, 6]);
    soon(held.ack_confirmed()).await.unwrap();
    silence(&mut subscriber).await;
}

#[tokio::test]
async fn another_history_clears_what_a_subscriber_knows_and_ends_a_reader() {
    let mut world = World::new().await;
    world.publish(1..=3).await;
    let mut subscriber = world.subscription("s").open().await.unwrap();
    let mut reader = world.client.reader(["t"]).start(Start::Earliest).open().await.unwrap();
    assert_eq!(receive(&mut reader, 3).await, [1, 2, 3]);
    let held = next(&mut subscriber).await;
    world.replace_server().await;
    let error = soon(reader.next()).await.unwrap().unwrap_err();
    assert_eq!(error.reason(), Some(Reason::Diverged));
    assert_eq!(soon(held.ack_confirmed()).await, Err(AckError::Stale));
    world.publish(7..=8).await;
    let numbers = loop {
        // What was buffered may still be handed out until the new history shows.
        let delivery = next(&mut subscriber).await;
        if number(&delivery) == 7 {
            delivery.ack();
            break receive(&mut subscriber, 1).await;
        }
    };
    assert_eq!(numbers, [8]);
}

#[tokio::test]
async fn a_start_beyond_the_last_message_is_refused() {
    let world = World::new().await;
    world.publish(1..=3).await;
    let reader = world.client.reader(["t"]).start(Start::Sequence(999));
    let error = soon(reader.open()).await.unwrap_err();
    assert_eq!(error.reason(), Some(Reason::BeyondHead), "{error}");
}

#[tokio::test]
async fn a_subscriber_whose_runtime_is_gone_ends_and_says_so() {
    let world = World::new().await;
    world.publish(1..=1).await;
    let builder = world.subscription("s");
    let open = move || {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let mut subscriber = runtime.block_on(builder.open()).unwrap();
        let held = runtime.block_on(next(&mut subscriber));
        (subscriber, held)
    };
    let (mut subscriber, held) = tokio::task::spawn_blocking(open).await.unwrap();
    let mut state = subscriber.state();
    assert!(soon(state.wait_for(ConnectionState::is_closed)).await.is_some());
    assert!(soon(held.ack_confirmed()).await.is_err());
    assert!(matches!(soon(subscriber.next()).await, Some(Err(_))));
    assert!(soon(subscriber.next()).await.is_none());
}

#[tokio::test]
async fn a_stop_without_a_limit_is_possible() {
    let world = World::new().await;
    let subscriber = world.subscription("s").open().await.unwrap();
    let stop = subscriber.stopper();
    assert!(soon(stop.stop(Drain::Finish, Duration::MAX)).await.is_clean());
}

/// Panics when it is made into text.
struct Unspeakable;

impl std::fmt::Display for Unspeakable {
    fn fmt(&self, _: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        panic!("no words")
    }
}

#[tokio::test]
async fn a_handler_that_panics_anywhere_nacks_its_message() {
    let world = World::new().await;
    world.publish(1..=3).await;
    let subscriber = world.subscription("s").open().await.unwrap();
    let stopper = subscriber.stopper();
    let (done, mut handled) = tokio::sync::mpsc::channel(10);
    let handler = move |message: pubsub_client::ReceivedMessage| {
        let (sequence, attempt) = (message.id.sequence, message.attempt);
        assert!((sequence, attempt) != (1, 1), "before there is a future");
        let done = done.clone();
        async move {
            if (sequence, attempt) == (2, 1) {
                return Err(Unspeakable);
            }
            done.send((sequence, attempt)).await.unwrap();
            Ok(())
        }
    };
    let running = tokio::task::spawn(subscriber.run(1, handler));
    for expected in [(1, 2), (2, 2), (3, 1)] {
        assert_eq!(soon(handled.recv()).await, Some(expected));
    }
    assert!(soon(stopper.stop(Drain::Finish, 5 * SECOND)).await.is_clean());
    soon(running).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_seek_does_not_make_two_handlers_of_a_topic_run_at_once() {
    let world = World::new().await;
    world.publish(1..=2).await;
    let subscriber = world.subscription("s").open().await.unwrap();
    let stopper = subscriber.stopper();
    let (started, mut starts) = tokio::sync::mpsc::channel(10);
    let go_on = Arc::new(tokio::sync::Semaphore::new(0));
    let handler = {
        let go_on = Arc::clone(&go_on);
        move |message: pubsub_client::ReceivedMessage| {
            let (started, go_on) = (started.clone(), Arc::clone(&go_on));
            async move {
                started.send(message.id.sequence).await.unwrap();
                go_on.acquire().await.unwrap().forget();
                Ok::<(), String>(())
            }
        }
    };
    let running = tokio::task::spawn(subscriber.run(4, handler));
    assert_eq!(soon(starts.recv()).await, Some(1));
    world.client.admin().seek("s", Some("t"), Start::Earliest).await.unwrap();
    let at_once = timeout(SECOND / 2, starts.recv()).await;
    assert!(at_once.is_err(), "{at_once:?} runs, too");
    go_on.add_permits(10);
    assert_eq!(soon(starts.recv()).await, Some(1));
    assert_eq!(soon(starts.recv()).await, Some(2));
    assert!(soon(stopper.stop(Drain::Finish, 5 * SECOND)).await.is_clean());
    soon(running).await.unwrap().unwrap();
}
