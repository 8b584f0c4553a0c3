//! Publishers, across whatever happens to their connections.

use std::time::Duration;

use pubsub_client::{
    Cause, Client, ConnectionState, EnqueueError, Message, Outcome, PublishErrorKind, Reason,
    Start, TopicConfig,
};

use crate::harness::{World, next, number, receive, silence, soon};

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test]
async fn a_published_message_has_an_id_and_arrives() {
    let world = World::new().await;
    let publisher = world.client.publisher("t").open().await.unwrap();
    let message = Message::new("1").with_attribute("a", "b").with_ordering_key("k");
    let receipt = soon(publisher.publish(message)).await.unwrap();
    assert_eq!((receipt.id.sequence, receipt.duplicate), (1, false));

    let mut subscriber = world.subscription("s").open().await.unwrap();
    let delivery = next(&mut subscriber).await;
    assert_eq!(delivery.id, receipt.id);
    assert_eq!(delivery.attributes["a"], "b");
    assert_eq!(delivery.ordering_key.as_deref(), Some("k"));
    assert_eq!(delivery.attempt, 1);
    assert_eq!(delivery.publish_time, receipt.publish_time);
    soon(delivery.ack_confirmed()).await.unwrap();
}

#[tokio::test]
async fn tickets_resolve_in_order_with_the_ids_of_the_log() {
    let world = World::new().await;
    let publisher = world.client.publisher("t").open().await.unwrap();
    let mut tickets = Vec::new();
    for number in 0..2000_u64 {
        tickets.push(publisher.enqueue(number.to_string()).await.unwrap());
    }
    soon(publisher.flush()).await.unwrap();
    for (sequence, ticket) in (1..).zip(tickets) {
        assert_eq!(ticket.await.unwrap().id.sequence, sequence);
    }
}

#[tokio::test]
async fn cuts_and_restarts_lose_nothing_duplicate_nothing_and_keep_the_order() {
    const COUNT: u64 = 3000;
    let mut world = World::new().await;
    let publisher = world.client.publisher("t").window_messages(200).open().await.unwrap();
    let publishing = tokio::task::spawn({
        let publisher = publisher.clone();
        async move {
            let mut tickets = Vec::new();
            for number in 1..=COUNT {
                tickets.push(publisher.enqueue(number.to_string()).await.unwrap());
                if number % 50 == 0 {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
            for (sequence, ticket) in (1..).zip(tickets) {
                assert_eq!(ticket.await.unwrap().id.sequence, sequence);
            }
        }
    });
    for round in 0..8 {
        tokio::time::sleep(Duration::from_millis(40)).await;
        if round == 4 {
            world.stop_server().await;
            world.start_server().await;
        } else {
            world.proxy.cut();
        }
    }
    soon(publishing).await.unwrap();
    let mut subscriber = world.subscription("s").open().await.unwrap();
    let received = receive(&mut subscriber, usize::try_from(COUNT).unwrap()).await;
    assert_eq!(received, (1..=COUNT).collect::<Vec<_>>());
    silence(&mut subscriber).await;
}

#[tokio::test]
async fn nothing_fails_while_the_server_is_away_but_what_has_a_deadline() {
    let mut world = World::new().await;
    let publisher = world.client.publisher("t").open().await.unwrap();
    world.stop_server().await;
    let mut state = publisher.state();
    soon(state.wait_for(ConnectionState::is_reconnecting)).await.unwrap();
    let patient = publisher.enqueue("patient").await.unwrap();
    let hasty = Message::new("hasty").with_deadline(SECOND / 10).with_idempotency_key("k");
    let hasty = soon(publisher.publish(hasty)).await.unwrap_err();
    assert!(matches!(hasty.kind(), PublishErrorKind::DeadlineElapsed));
    assert_eq!(hasty.outcome(), Outcome::NotPersisted);
    assert_eq!(hasty.idempotency_key(), Some("k"));
    world.start_server().await;
    assert_eq!(soon(patient).await.unwrap().id.sequence, 1);
    soon(state.wait_for(ConnectionState::is_connected)).await.unwrap();
}

#[tokio::test]
async fn an_idempotency_key_outlives_the_publisher() {
    let world = World::new().await;
    let keyed = |payload: &str| Message::new(payload.to_owned()).with_idempotency_key("k");
    let first = world.client.publisher("t").open().await.unwrap();
    let receipt = soon(first.publish(keyed("a"))).await.unwrap();
    let second = world.client.publisher("t").open().await.unwrap();
    let again = soon(second.publish(keyed("a"))).await.unwrap();
    assert_eq!((&again.id, again.duplicate), (&receipt.id, true));
    let other = soon(second.publish(keyed("b"))).await.unwrap_err();
    assert_eq!(other.reason(), Some(Reason::IdempotencyKeyReused));
    assert_eq!(other.outcome(), Outcome::NotPersisted);
    assert_eq!(soon(second.publish("c")).await.unwrap().id.sequence, 2);
}

#[tokio::test]
async fn a_missing_topic_is_an_error_at_once() {
    let world = World::new().await;
    let error = soon(world.client.publisher("missing").open()).await.unwrap_err();
    assert_eq!(error.reason(), Some(Reason::TopicNotFound));
    let lazy = world.client.publisher("missing").open_lazy();
    let error = soon(lazy.publish("x")).await.unwrap_err();
    assert_eq!(error.reason(), Some(Reason::TopicNotFound));
    assert_eq!(error.outcome(), Outcome::NotPersisted);
    assert!(lazy.state().get().is_closed());
}

#[tokio::test]
async fn the_window_is_a_limit_and_a_larger_message_is_admitted_alone() {
    let mut world = World::new().await;
    let publisher = world.client.publisher("t").window_bytes(1000).open().await.unwrap();
    world.stop_server().await;
    let small = publisher.enqueue(vec![0; 500]).await.unwrap();
    let full = publisher.try_enqueue(vec![0; 600]).unwrap_err();
    assert!(matches!(full, EnqueueError::Full { .. }), "{full}");
    assert_eq!(full.into_message().unwrap().payload.len(), 600);
    let mut reserving = Box::pin(publisher.reserve(5000));
    assert!(tokio::time::timeout(SECOND / 10, &mut reserving).await.is_err());
    world.start_server().await;
    let permit = soon(reserving).await.unwrap();
    soon(small).await.unwrap();
    let alone = permit.enqueue(vec![0; 4000]).unwrap();
    soon(alone).await.unwrap();
    let too_large = publisher.try_enqueue(vec![0; 2_000_000]).unwrap_err();
    assert!(matches!(too_large, EnqueueError::TooLarge { .. }), "{too_large}");
}

#[tokio::test]
async fn closing_reports_what_is_unresolved_and_dropping_flushes() {
    let mut world = World::new().await;
    let dropped = world.client.publisher("t").open().await.unwrap();
    let ticket = dropped.enqueue("dropped").await.unwrap();
    drop(dropped);
    assert_eq!(soon(ticket).await.unwrap().id.sequence, 1);

    let publisher = world.client.publisher("t").open().await.unwrap();
    let clone = publisher.clone();
    world.stop_server().await;
    let ticket = publisher.enqueue("left").await.unwrap();
    let error = soon(publisher.close(SECOND / 5)).await.unwrap_err();
    assert_eq!(error.outcome(), Outcome::NotPersisted);
    assert_eq!(error.unresolved()[0].message.payload, "left");
    assert!(matches!(ticket.await.unwrap_err().kind(), PublishErrorKind::Closed));
    let closed = soon(clone.enqueue("late")).await.unwrap_err();
    assert!(matches!(closed, EnqueueError::Closed { .. }));
    assert_eq!(closed.into_message().unwrap().payload, "late");
}

#[tokio::test]
async fn shutdown_flushes_and_reports() {
    let mut world = World::new().await;
    let publisher = world.client.publisher("t").open().await.unwrap();
    let ticket = publisher.enqueue("flushed").await.unwrap();
    let report = soon(world.client.clone().shutdown(5 * SECOND)).await;
    assert!(report.is_clean(), "{report:?}");
    soon(ticket).await.unwrap();

    let other = world.other_client().await;
    let publisher = other.publisher("t").open().await.unwrap();
    world.stop_server().await;
    drop(publisher.enqueue("left").await.unwrap());
    let report = soon(other.shutdown(SECOND / 5)).await;
    assert_eq!(report.unpublished.len(), 1);
    assert_eq!(report.unpublished[0].0, "t");
}

#[tokio::test]
async fn a_recreated_topic_fails_the_publisher_unless_it_may_go_on() {
    let world = World::new().await;
    let admin = world.client.admin();
    let strict = world.client.publisher("t").open().await.unwrap();
    let lenient = world.client.publisher("t");
    let lenient = lenient.on_recreated(pubsub_client::OnRecreated::Continue).open().await.unwrap();
    soon(strict.publish("1")).await.unwrap();
    soon(lenient.publish("2")).await.unwrap();
    admin.delete_topic("t").await.unwrap();
    admin.create_topic("t", TopicConfig::new()).await.unwrap();
    world.proxy.cut();
    let error = soon(strict.publish("3")).await.unwrap_err();
    assert!(matches!(error.kind(), PublishErrorKind::TopicRecreated), "{error}");
    let receipt = soon(lenient.publish("4")).await.unwrap();
    assert_eq!(receipt.id.sequence, 1);
    let mut reader = world.client.reader(["t"]).start(Start::Earliest).open().await.unwrap();
    assert_eq!(number(&next(&mut reader).await), 4);
}

#[tokio::test]
async fn a_full_topic_blocks_visibly_until_there_is_room() {
    let world = World::new().await;
    let admin = world.client.admin();
    admin.create_topic("small", TopicConfig::new().with_max_bytes(10_000)).await.unwrap();
    let mut subscriber = world.client.subscriber("s").topic("small").open().await.unwrap();
    let publisher = world.client.publisher("small").batch_messages(1).open().await.unwrap();
    let mut tickets = Vec::new();
    for _ in 0..20 {
        tickets.push(publisher.enqueue(vec![0; 1000]).await.unwrap());
    }
    let mut state = publisher.state();
    let blocked = |state: &ConnectionState| matches!(state, ConnectionState::Blocked { .. });
    let Some(ConnectionState::Blocked { reason, .. }) = soon(state.wait_for(blocked)).await else {
        panic!("not blocked")
    };
    assert_eq!(reason, Reason::TopicFull);
    let refused = publisher.try_enqueue("x").unwrap_err();
    assert!(matches!(refused, EnqueueError::Blocked { reason: Reason::TopicFull, .. }));
    // Longer than any heartbeat: being blocked is not being dead.
    tokio::time::sleep(4 * SECOND).await;
    assert!(blocked(&state.get()), "{:?}", state.get());
    for _ in 0..20 {
        next(&mut subscriber).await.ack();
    }
    for (sequence, ticket) in (1..).zip(tickets) {
        assert_eq!(soon(ticket).await.unwrap().id.sequence, sequence);
    }
    soon(state.wait_for(ConnectionState::is_connected)).await.unwrap();
}

#[tokio::test]
async fn after_another_history_what_was_sent_is_unknown_and_the_rest_goes_on() {
    let mut world = World::new().await;
    let publisher = world.client.publisher("t").open().await.unwrap();
    soon(publisher.publish("1")).await.unwrap();
    world.proxy.freeze(true);
    let sent = publisher.enqueue(Message::new("2").with_idempotency_key("two")).await.unwrap();
    tokio::time::sleep(SECOND / 5).await;
    world.proxy.set_target(None);
    world.proxy.freeze(false);
    soon(publisher.state().wait_for(ConnectionState::is_reconnecting)).await.unwrap();
    let unsent = publisher.enqueue("3").await.unwrap();
    world.replace_server().await;
    let error = soon(sent).await.unwrap_err();
    assert!(matches!(error.kind(), PublishErrorKind::Diverged), "{error}");
    assert_eq!((error.outcome(), error.idempotency_key()), (Outcome::Unknown, Some("two")));
    assert_eq!(soon(unsent).await.unwrap().id.sequence, 1);
}

#[tokio::test]
async fn flush_tells_the_failures_that_nobody_has_seen_once() {
    let world = World::new().await;
    let publisher = world.client.publisher("t").open().await.unwrap();
    let refused = || Message::new("x").with_recipient("nobody");
    drop(publisher.enqueue(refused()).await.unwrap());
    // When its answer has come, so has that of the one before it.
    soon(publisher.publish("1")).await.unwrap();
    drop(publisher.enqueue(refused()).await.unwrap());
    let error = soon(publisher.flush()).await.unwrap_err();
    assert_eq!((error.failed(), error.outcome()), (2, Outcome::NotPersisted));
    assert_eq!(error.first().reason(), Some(Reason::UnknownRecipient));
    let held = publisher.enqueue(refused()).await.unwrap();
    soon(publisher.flush()).await.unwrap();
    assert_eq!(held.await.unwrap_err().reason(), Some(Reason::UnknownRecipient));
}

#[tokio::test]
async fn a_cancelled_flush_leaves_its_failures_to_the_next() {
    let mut world = World::new().await;
    let publisher = world.client.publisher("t").open().await.unwrap();
    world.stop_server().await;
    drop(publisher.enqueue(Message::new("x").with_deadline(SECOND / 10)).await.unwrap());
    drop(publisher.enqueue("1").await.unwrap());
    assert!(tokio::time::timeout(SECOND / 2, publisher.flush()).await.is_err());
    world.start_server().await;
    let (first, second) = tokio::join!(soon(publisher.flush()), soon(publisher.flush()));
    for error in [first.unwrap_err(), second.unwrap_err()] {
        assert_eq!(error.failed(), 1);
        assert!(matches!(error.first().kind(), PublishErrorKind::DeadlineElapsed), "{error}");
    }
    soon(publisher.flush()).await.unwrap();
}

#[tokio::test]
async fn flushing_a_publisher_that_has_ended_is_an_error() {
    let world = World::new().await;
    let publisher = world.client.publisher("missing").open_lazy();
    for _ in 0..3 {
        drop(publisher.enqueue("x").await.unwrap());
    }
    soon(publisher.state().wait_for(ConnectionState::is_closed)).await.unwrap();
    let error = soon(publisher.flush()).await.unwrap_err();
    assert_eq!((error.failed(), error.first().reason()), (3, Some(Reason::TopicNotFound)));
    let error = soon(publisher.flush()).await.unwrap_err();
    assert_eq!((error.failed(), error.first().reason()), (0, Some(Reason::TopicNotFound)));
}

#[tokio::test]
async fn a_deadline_limits_the_wait_for_room() {
    let world = World::new().await;
    let publisher = world.client.publisher("t").window_messages(1).open().await.unwrap();
    world.proxy.freeze(true);
    let sent = publisher.enqueue("1").await.unwrap();
    let hasty = Message::new("2").with_deadline(SECOND / 10).with_idempotency_key("k");
    let error = soon(publisher.enqueue(hasty.clone())).await.unwrap_err();
    assert!(matches!(error, EnqueueError::DeadlineElapsed { .. }), "{error}");
    assert_eq!(error.into_message(), Some(hasty.clone()));
    let error = soon(publisher.publish(hasty)).await.unwrap_err();
    assert!(matches!(error.kind(), PublishErrorKind::DeadlineElapsed), "{error}");
    assert_eq!((error.outcome(), error.idempotency_key()), (Outcome::NotPersisted, Some("k")));
    world.proxy.freeze(false);
    soon(sent).await.unwrap();
}

#[test]
fn a_publisher_ends_with_its_runtime() {
    let runtime = || tokio::runtime::Runtime::new().unwrap();
    let client = Client::builder("http://127.0.0.1:9").connect_lazy().unwrap();
    let first = runtime();
    let publisher = first.block_on(async { client.publisher("t").open_lazy() });
    let ticket = first.block_on(publisher.enqueue("1")).unwrap();
    drop(first);
    runtime().block_on(async {
        let error = soon(ticket).await.unwrap_err();
        assert!(matches!(error.kind(), PublishErrorKind::TaskGone), "{error}");
        assert!(publisher.state().get().is_closed());
        let error = soon(publisher.publish("2")).await.unwrap_err();
        assert!(matches!(error.kind(), PublishErrorKind::TaskGone), "{error}");
    });
}

#[tokio::test]
async fn durations_without_end_are_no_limits() {
    let world = World::new().await;
    let publisher = world.client.publisher("t").linger(Duration::MAX).open().await.unwrap();
    let message = Message::new("1").with_deadline(Duration::MAX);
    let ticket = publisher.enqueue(message).await.unwrap();
    soon(publisher.close(Duration::MAX)).await.unwrap();
    assert_eq!(soon(ticket).await.unwrap().id.sequence, 1);
}

#[tokio::test]
async fn a_publisher_that_may_go_on_waits_for_its_topic_to_come_back() {
    let world = World::new().await;
    let admin = world.client.admin();
    let publisher = world.client.publisher("t");
    let publisher =
        publisher.on_recreated(pubsub_client::OnRecreated::Continue).open().await.unwrap();
    soon(publisher.publish("1")).await.unwrap();
    admin.delete_topic("t").await.unwrap();
    let late = publisher.enqueue("2").await.unwrap();
    let missing = |state: &ConnectionState| {
        let ConnectionState::Reconnecting { cause, .. } = state else { return false };
        matches!(&**cause, Cause::Server(error) if error.reason() == Reason::TopicNotFound)
    };
    soon(publisher.state().wait_for(missing)).await.unwrap();
    admin.create_topic("t", TopicConfig::new()).await.unwrap();
    // It was on its way to the topic that is gone.
    let error = soon(late).await.unwrap_err();
    assert!(matches!(error.kind(), PublishErrorKind::TopicRecreated), "{error}");
    assert_eq!(soon(publisher.publish("3")).await.unwrap().id.sequence, 1);
}

#[tokio::test]
async fn closing_does_not_wait_for_messages_whose_fate_is_told() {
    let world = World::new().await;
    let publisher = world.client.publisher("t").open().await.unwrap();
    world.proxy.freeze(true);
    let message = Message::new("1").with_deadline(SECOND / 10);
    let error = soon(publisher.publish(message)).await.unwrap_err();
    assert_eq!(error.outcome(), Outcome::Unknown);
    soon(publisher.close(60 * SECOND)).await.unwrap();
}

#[tokio::test]
async fn everyone_who_closes_learns_what_is_left() {
    let mut world = World::new().await;
    let publisher = world.client.publisher("t").open().await.unwrap();
    world.stop_server().await;
    drop(publisher.enqueue("left").await.unwrap());
    let (closed, report) = tokio::join!(
        publisher.clone().close(SECOND / 5),
        world.client.clone().shutdown(SECOND / 5),
    );
    assert_eq!(closed.unwrap_err().unresolved().len(), 1);
    assert_eq!(report.unpublished.len(), 1);
}
