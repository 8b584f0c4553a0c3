//! The client against a server that follows a script: what no correct server does, and what
//! stands between.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pubsub_client::{
    Cause, Client, ConnectionState, Drain, EnqueueError, Event, Nack, Outcome, PublishErrorKind,
    Reason, ReceivedMessage, RetryPolicy, StateWatch, SubscribeError, SubscriptionKind,
};
use pubsub_proto::v1::publish_stream_request::Frame as PublishFrame;
use pubsub_proto::v1::publish_stream_response::Frame as PublishAnswer;
use pubsub_proto::v1::publisher_service_server::{PublisherService, PublisherServiceServer};
use pubsub_proto::v1::subscribe_request::Frame as SubscribeFrame;
use pubsub_proto::v1::subscribe_response::Frame as SubscribeAnswer;
use pubsub_proto::v1::subscriber_service_server::{SubscriberService, SubscriberServiceServer};
use pubsub_proto::v1::{self as pb, SubscribeHello};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::harness::{next, silence, soon};

/// What the server does with the n-th stream, from 0. Nothing: it leaves the call unanswered.
type Script<T> = fn(usize) -> Option<Vec<Result<T, Status>>>;

struct Scripted {
    subscribe: Script<SubscribeAnswer>,
    publish: Script<PublishAnswer>,
    hellos: Mutex<Vec<SubscribeHello>>,
    /// The last batch of acks that came.
    acks: watch::Sender<pb::AckBatch>,
    publishers: Mutex<usize>,
}

type Frames<R> = ReceiverStream<Result<R, Status>>;

/// Plays the frames, then keeps the stream open.
fn play<A, R: Send + 'static>(
    frames: Vec<Result<A, Status>>,
    wrap: fn(A) -> R,
) -> (Response<Frames<R>>, mpsc::Sender<Result<R, Status>>) {
    let (sender, receiver) = mpsc::channel(frames.len() + 64);
    for frame in frames {
        sender.try_send(frame.map(wrap)).unwrap();
    }
    (Response::new(ReceiverStream::new(receiver)), sender)
}

#[tonic::async_trait]
impl SubscriberService for Scripted {
    type SubscribeStream = ReceiverStream<Result<pb::SubscribeResponse, Status>>;

    async fn subscribe(
        &self,
        request: Request<Streaming<pb::SubscribeRequest>>,
    ) -> Result<Response<Self::SubscribeStream>, Status> {
        let mut inbound = request.into_inner();
        let first = inbound.message().await?.unwrap();
        let Some(SubscribeFrame::Hello(hello)) = first.frame else { panic!("no hello") };
        let stream = {
            let mut hellos = self.hellos.lock().unwrap();
            hellos.push(hello);
            hellos.len() - 1
        };
        let Some(frames) = (self.subscribe)(stream) else { return std::future::pending().await };
        let (response, sender) = play(frames, |frame| pb::SubscribeResponse { frame: Some(frame) });
        let acks = self.acks.clone();
        tokio::spawn(async move {
            while let Some(Ok(request)) = inbound.next().await {
                if let Some(SubscribeFrame::Acks(batch)) = request.frame {
                    acks.send_replace(batch);
                }
            }
            drop(sender);
        });
        Ok(response)
    }

    async fn pull(
        &self,
        _: Request<pb::PullRequest>,
    ) -> Result<Response<pb::PullResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn acknowledge(
        &self,
        _: Request<pb::AcknowledgeRequest>,
    ) -> Result<Response<pb::AcknowledgeResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn nack(
        &self,
        _: Request<pb::NackRequest>,
    ) -> Result<Response<pb::NackResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

#[tonic::async_trait]
impl PublisherService for Scripted {
    type PublishStreamStream = ReceiverStream<Result<pb::PublishStreamResponse, Status>>;

    async fn publish(
        &self,
        _: Request<pb::PublishRequest>,
    ) -> Result<Response<pb::PublishResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn publish_stream(
        &self,
        request: Request<Streaming<pb::PublishStreamRequest>>,
    ) -> Result<Response<Self::PublishStreamStream>, Status> {
        let mut inbound = request.into_inner();
        let stream = {
            let mut publishers = self.publishers.lock().unwrap();
            *publishers += 1;
            *publishers - 1
        };
        let Some(mut frames) = (self.publish)(stream) else {
            return std::future::pending().await;
        };
        // The welcome first; the rest when there is something to answer.
        let rest = frames.split_off(1.min(frames.len()));
        let wrap = |frame| pb::PublishStreamResponse { frame: Some(frame) };
        let (response, sender) = play(frames, wrap);
        tokio::spawn(async move {
            let mut rest = Some(rest);
            while let Some(Ok(request)) = inbound.next().await {
                if let Some(PublishFrame::Batch(_)) = request.frame {
                    for frame in rest.take().into_iter().flatten() {
                        drop(sender.send(frame.map(wrap)).await);
                    }
                }
            }
        });
        Ok(response)
    }
}

struct World {
    client: Client,
    server: Arc<Scripted>,
    _tasks: JoinSet<()>,
}

async fn world(subscribe: Script<SubscribeAnswer>, publish: Script<PublishAnswer>) -> World {
    world_with(subscribe, publish, Duration::from_secs(10)).await
}

/// `patience`: how long the client waits for the answer to a hello.
async fn world_with(
    subscribe: Script<SubscribeAnswer>,
    publish: Script<PublishAnswer>,
    patience: Duration,
) -> World {
    let server = Arc::new(Scripted {
        subscribe,
        publish,
        hellos: Mutex::default(),
        acks: watch::Sender::default(),
        publishers: Mutex::default(),
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (publisher, subscriber) = (Arc::clone(&server), Arc::clone(&server));
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        tonic::transport::Server::builder()
            .add_service(PublisherServiceServer::from_arc(publisher))
            .add_service(SubscriberServiceServer::from_arc(subscriber))
            .serve_with_incoming(TcpListenerStream::new(listener))
            .await
            .unwrap();
    });
    let client = Client::builder(format!("http://{address}"))
        .retry(RetryPolicy::new(Duration::from_millis(20), Duration::from_millis(20)))
        .handshake_timeout(patience)
        .fast()
        .connect_lazy()
        .unwrap();
    World { client, server, _tasks: tasks }
}

fn nothing<T>(_: usize) -> Option<Vec<Result<T, Status>>> {
    None
}

fn welcome() -> SubscribeAnswer {
    let topic = pb::SessionTopic {
        number: 1,
        topic: "t".to_owned(),
        epoch: 7,
        head: 9,
        ..pb::SessionTopic::default()
    };
    SubscribeAnswer::Welcome(pb::SubscribeWelcome {
        boot_id: vec![1; 16].into(),
        subscription_epoch: 5,
        grace: Some(prost_types::Duration { seconds: 30, nanos: 0 }),
        topics: vec![topic],
        ..pb::SubscribeWelcome::default()
    })
}

fn deliver(first_delivery: u64, sequence: u64) -> SubscribeAnswer {
    let message = pb::ReceivedMessage { sequence, ..pb::ReceivedMessage::default() };
    let deliver = [message].into_iter().collect();
    SubscribeAnswer::Deliver(pb::Deliver { topic: 1, first_delivery, ..deliver })
}

/// A welcome to a subscription of this kind.
fn welcome_to(kind: pb::SubscriptionKind) -> SubscribeAnswer {
    let SubscribeAnswer::Welcome(welcome) = welcome() else { panic!() };
    SubscribeAnswer::Welcome(pb::SubscribeWelcome { kind: kind.into(), ..welcome })
}

/// Messages from 1 on with these ordering keys.
fn deliver_keys(keys: &[&str]) -> SubscribeAnswer {
    let message = |(sequence, key): (u64, &&str)| {
        let ordering_key = (*key).to_owned();
        let message = pb::Message { ordering_key, ..pb::Message::default() };
        let message = Some(message.encoded());
        pb::ReceivedMessage { sequence, message, ..pb::ReceivedMessage::default() }
    };
    let deliver = (1..).zip(keys).map(message).collect();
    SubscribeAnswer::Deliver(pb::Deliver { topic: 1, first_delivery: 1, ..deliver })
}

fn publisher_welcome(last_sequence: Option<u64>) -> PublishAnswer {
    PublishAnswer::Welcome(pb::PublisherWelcome {
        topic_epoch: 7,
        last_sequence,
        ..pb::PublisherWelcome::default()
    })
}

fn stored(first_sequence: u64, count: u32) -> PublishAnswer {
    let stored = pb::Stored { epoch: 7, sequence: 1, ..pb::Stored::default() };
    let outcome = Some(pb::publish_run::Outcome::Stored(stored));
    let run = pb::PublishRun { first_sequence, count, outcome };
    PublishAnswer::Results(pb::PublishResults { runs: vec![run] })
}

#[tokio::test]
async fn a_lost_delivery_makes_the_subscriber_attach_again_with_what_it_holds() {
    let script: Script<SubscribeAnswer> = |stream| {
        Some(match stream {
            0 => vec![Ok(welcome()), Ok(deliver(1, 1)), Ok(deliver(3, 3))],
            _ => vec![Ok(welcome()), Ok(deliver(1, 2))],
        })
    };
    let world = world(script, nothing).await;
    let mut subscriber = world.client.subscriber("s").topic("t").open().await.unwrap();
    let mut held = Vec::new();
    for sequence in 1..=2 {
        let Some(Ok(Event::Message(delivery))) = soon(subscriber.next()).await else {
            panic!("no message")
        };
        assert_eq!(delivery.id.sequence, sequence);
        held.push(delivery);
    }
    let hellos = world.server.hellos.lock().unwrap();
    assert_eq!(hellos.len(), 2);
    let consumer = |n: usize| hellos[n].consumer.clone().unwrap();
    assert_eq!((consumer(0).attach, consumer(1).attach), (1, 2));
    assert_eq!(consumer(0).instance, consumer(1).instance);
    assert_eq!((hellos[0].subscription_epoch, hellos[1].subscription_epoch), (0, 5));
    let position = &hellos[1].positions[0];
    assert_eq!(position.held, [pb::SequenceRange { first: 1, last: 1 }]);
    assert_eq!((position.epoch, position.last_received), (7, 1));
}

#[tokio::test]
async fn what_is_far_beyond_the_credit_is_not_taken() {
    let script: Script<SubscribeAnswer> = |stream| {
        Some(match stream {
            0 => vec![Ok(welcome()), Ok(deliver_keys(&["k"; 3_000]))],
            _ => vec![Ok(welcome()), Ok(deliver(1, 1))],
        })
    };
    let world = world(script, nothing).await;
    let builder = world.client.subscriber("s").topic("t").max_outstanding_messages(10);
    let mut subscriber = builder.open().await.unwrap();
    assert_eq!(next(&mut subscriber).await.id.sequence, 1);
    let hellos = world.server.hellos.lock().unwrap();
    let position = &hellos[1].positions[0];
    assert_eq!((position.held.as_slice(), position.last_received), (&[][..], 0));
}

#[tokio::test]
async fn a_batch_says_whether_someone_waits_for_its_confirmation() {
    let script: Script<SubscribeAnswer> = |_| {
        let messages = (1..=4).map(|sequence| Ok(deliver(sequence, sequence)));
        Some(std::iter::once(Ok(welcome())).chain(messages).collect())
    };
    let world = world(script, nothing).await;
    let mut subscriber = world.client.subscriber("s").topic("t").open().await.unwrap();
    let mut acks = world.server.acks.subscribe();
    for (sequence, awaited) in [(1, false), (2, true), (3, false)] {
        let delivery = next(&mut subscriber).await;
        assert_eq!(delivery.id.sequence, sequence);
        let waits = async {
            if awaited {
                delivery.ack_confirmed().await.unwrap();
            } else {
                delivery.ack();
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            () = waits => panic!("nothing was confirmed"),
            changed = soon(acks.changed()) => changed.unwrap(),
        }
        let batch = acks.borrow_and_update().clone();
        assert_eq!((batch.number, batch.awaited), (sequence, awaited));
    }
    // Whoever stops a subscriber waits for its acks.
    next(&mut subscriber).await.ack();
    soon(subscriber.stopper().stop(Drain::Finish, Duration::from_millis(100))).await;
    assert_eq!((acks.borrow().number, acks.borrow().awaited), (4, true));
}

/// A refusal by a server.
fn refusal(reason: &str) -> Status {
    let details = ErrorDetails::with_error_info(reason, pubsub_proto::ERROR_DOMAIN, HashMap::new());
    Status::with_error_details(Code::ResourceExhausted, "no", details)
}

#[tokio::test]
async fn a_limit_ends_a_subscriber_that_was_never_taken_in_and_no_other() {
    let world = world(|_| Some(vec![Err(refusal("LIMIT_REACHED"))]), nothing).await;
    let error = soon(world.client.subscriber("s").topic("t").open()).await.unwrap_err();
    assert_eq!(error.reason(), Some(Reason::LimitReached), "{error}");

    let script: Script<SubscribeAnswer> = |stream| {
        Some(match stream {
            0 => vec![Ok(welcome()), Err(Status::unknown("cut"))],
            1..4 => vec![Err(refusal("LIMIT_REACHED"))],
            _ => vec![Ok(welcome()), Ok(deliver(1, 1))],
        })
    };
    let world = self::world(script, nothing).await;
    let mut subscriber = soon(world.client.subscriber("s").topic("t").open()).await.unwrap();
    assert!(matches!(soon(subscriber.next()).await, Some(Ok(Event::Message(_)))));
}

#[tokio::test]
async fn the_welcome_says_the_kind_unless_the_application_asks_for_one() {
    use pb::SubscriptionKind as Kind;
    let shared =
        world(|_| Some(vec![Ok(welcome_to(Kind::Shared)), Ok(deliver_keys(&["", ""]))]), nothing)
            .await;
    let exclusive = world(
        |_| Some(vec![Ok(welcome_to(Kind::Exclusive)), Ok(deliver_keys(&["", ""]))]),
        nothing,
    )
    .await;
    for (world, goes_on) in [(&shared, true), (&exclusive, false)] {
        let mut subscriber = world.client.subscriber("s").topic("t").open().await.unwrap();
        next(&mut subscriber).await.nack(Nack::now());
        if goes_on {
            let second = next(&mut subscriber).await;
            assert_eq!(second.id.sequence, 2);
            second.ack();
        } else {
            silence(&mut subscriber).await;
        }
    }
    for (kind, sent) in [
        (SubscriptionKind::Exclusive, Kind::Exclusive),
        (SubscriptionKind::Shared, Kind::Shared),
        (SubscriptionKind::KeyOrdered, Kind::KeyOrdered),
    ] {
        drop(shared.client.subscriber("s").topic("t").kind(kind).open().await.unwrap());
        assert_eq!(shared.server.hellos.lock().unwrap().pop().unwrap().kind(), sent);
    }
    // A reader has none to ask for.
    let reader = shared.client.reader(["t"]).kind(SubscriptionKind::Shared);
    drop(reader.open().await.unwrap());
    let hellos = shared.server.hellos.lock().unwrap();
    assert!(hellos.iter().all(|hello| hello.kind() == Kind::Unspecified), "{hellos:?}");
}

/// Which handlers run at once, each for a message of topic `t`, and which come after they are done.
async fn at_once(script: Script<SubscribeAnswer>, first: usize) -> (Vec<u64>, Vec<u64>) {
    let world = world(script, nothing).await;
    let subscriber = world.client.subscriber("s").topic("t").open().await.unwrap();
    let stopper = subscriber.stopper();
    let (started, mut starts) = mpsc::channel(10);
    let go_on = Arc::new(tokio::sync::Semaphore::new(0));
    let handler = {
        let go_on = Arc::clone(&go_on);
        move |message: ReceivedMessage| {
            let (started, go_on) = (started.clone(), Arc::clone(&go_on));
            async move {
                started.send(message.id.sequence).await.unwrap();
                go_on.acquire().await.unwrap().forget();
                Ok::<(), String>(())
            }
        }
    };
    let running = tokio::task::spawn(subscriber.run(8, handler));
    let mut order = Vec::new();
    for _ in 0..first {
        order.push(soon(starts.recv()).await.unwrap());
    }
    let more = tokio::time::timeout(Duration::from_millis(200), starts.recv()).await;
    assert!(more.is_err(), "{more:?} runs, too");
    go_on.add_permits(10);
    let mut rest = Vec::new();
    for _ in first..6 {
        rest.push(soon(starts.recv()).await.unwrap());
    }
    // The server confirms nothing.
    soon(stopper.stop(Drain::Finish, Duration::from_millis(100))).await;
    soon(running).await.unwrap().unwrap();
    order.sort_unstable();
    (order, rest)
}

#[tokio::test]
async fn handlers_run_at_once_as_far_as_the_kind_allows() {
    const KEYS: [&str; 6] = ["a", "a", "b", "", "", "b"];
    use pb::SubscriptionKind as Kind;
    let exclusive: Script<SubscribeAnswer> =
        |_| Some(vec![Ok(welcome_to(Kind::Exclusive)), Ok(deliver_keys(&KEYS))]);
    assert_eq!(at_once(exclusive, 1).await, (vec![1], vec![2, 3, 4, 5, 6]));
    let shared: Script<SubscribeAnswer> =
        |_| Some(vec![Ok(welcome_to(Kind::Shared)), Ok(deliver_keys(&KEYS))]);
    assert_eq!(at_once(shared, 6).await, (vec![1, 2, 3, 4, 5, 6], vec![]));
    let key_ordered: Script<SubscribeAnswer> =
        |_| Some(vec![Ok(welcome_to(Kind::KeyOrdered)), Ok(deliver_keys(&KEYS))]);
    let (first, mut rest) = at_once(key_ordered, 4).await;
    rest.sort_unstable();
    assert_eq!((first, rest), (vec![1, 3, 4, 5], vec![2, 6]));
}

#[tokio::test]
async fn a_rewind_of_a_key_leaves_the_others_and_the_session_alone() {
    let script: Script<SubscribeAnswer> = |_| {
        let first = 2;
        let taken_back = vec![pb::SequenceRange { first, last: first }];
        let rewind = pb::Rewind { topic: 1, from: first, generation: 0, taken_back };
        Some(vec![
            Ok(welcome_to(pb::SubscriptionKind::KeyOrdered)),
            Ok(deliver_keys(&["a", "a", "b"])),
            Ok(SubscribeAnswer::Rewind(rewind)),
            Ok(SubscribeAnswer::Heartbeat(pb::SubscriberHeartbeat {
                last_delivery: 3,
                heads: vec![pb::TopicHead { topic: 1, head: 12, passed: 12, floor: 0 }],
                ..pb::SubscriberHeartbeat::default()
            })),
        ])
    };
    let world = world(script, nothing).await;
    let mut subscriber = world.client.subscriber("s").topic("t").open().await.unwrap();
    soon(async {
        // What came before the heartbeat has arrived.
        while subscriber.position().topics[0].head != 12 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    let shown: Vec<_> = [next(&mut subscriber).await, next(&mut subscriber).await].into();
    assert_eq!(shown.iter().map(|delivery| delivery.id.sequence).collect::<Vec<_>>(), [1, 3]);
    soon(subscriber.caught_up()).await;
    silence(&mut subscriber).await;
    assert_eq!(world.server.hellos.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn a_heartbeat_tells_how_far_others_have_come() {
    let script: Script<SubscribeAnswer> = |_| {
        Some(vec![
            Ok(welcome_to(pb::SubscriptionKind::Shared)),
            Ok(deliver(1, 5)),
            Ok(SubscribeAnswer::Heartbeat(pb::SubscriberHeartbeat {
                last_delivery: 1,
                heads: vec![pb::TopicHead { topic: 1, head: 9, passed: 9, floor: 6 }],
                ..pb::SubscriberHeartbeat::default()
            })),
        ])
    };
    let world = world(script, nothing).await;
    let mut subscriber = world.client.subscriber("s").topic("t").open().await.unwrap();
    soon(async {
        while subscriber.position().topics[0].acked_floor != 6 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    assert!(!subscriber.position().caught_up, "the fifth is here");
    // Someone has acked it meanwhile.
    let fifth = next(&mut subscriber).await;
    soon(subscriber.caught_up()).await;
    assert_eq!(soon(fifth.ack_confirmed()).await, Ok(()));
}

#[tokio::test]
async fn replicas_on_a_host_that_compete_have_names_of_their_own() {
    let world = world(|_| Some(vec![Ok(welcome())]), nothing).await;
    for (kind, differ) in [
        (SubscriptionKind::Exclusive, false),
        (SubscriptionKind::Shared, true),
        (SubscriptionKind::KeyOrdered, true),
    ] {
        let builder = world.client.subscriber("s").topic("t").kind(kind);
        let _open = [builder.clone().open().await.unwrap(), builder.open().await.unwrap()];
        let hellos = std::mem::take(&mut *world.server.hellos.lock().unwrap());
        let consumers: Vec<_> = hellos.into_iter().filter_map(|hello| hello.consumer).collect();
        assert_eq!(consumers.len(), 2);
        assert_eq!(consumers[0].id != consumers[1].id, differ, "{consumers:?}");
        for pb::Consumer { id, instance, .. } in &consumers {
            let suffix: String = instance[..4].iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(id.ends_with(&format!("/s/{suffix}")), differ, "{id}");
        }
    }
}

#[tokio::test]
async fn a_message_of_each_of_many_topics_is_not_too_much() {
    const TOPICS: u32 = 3_000;
    let script: Script<SubscribeAnswer> = |_| {
        let topic = |number: u32| pb::SessionTopic {
            number,
            topic: format!("t{number}"),
            epoch: 7,
            ..pb::SessionTopic::default()
        };
        let SubscribeAnswer::Welcome(mut welcome) = welcome() else { panic!() };
        welcome.topics = (1..=TOPICS).map(topic).collect();
        let message = |number: u32| {
            let SubscribeAnswer::Deliver(deliver) = deliver(number.into(), 1) else { panic!() };
            Ok(SubscribeAnswer::Deliver(pb::Deliver { topic: number, ..deliver }))
        };
        let welcome = Ok(SubscribeAnswer::Welcome(welcome));
        Some(std::iter::once(welcome).chain((1..=TOPICS).map(message)).collect())
    };
    let world = world(script, nothing).await;
    let builder = world.client.subscriber("s").topic("t*").max_outstanding_messages(1);
    let mut subscriber = soon(builder.open()).await.unwrap();
    soon(async {
        while subscriber.position().topics.iter().any(|topic| topic.head == 0) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    for _ in 0..TOPICS {
        assert!(matches!(soon(subscriber.next()).await, Some(Ok(Event::Message(_)))));
    }
    assert_eq!(world.server.hellos.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn a_status_of_a_proxy_is_no_word_of_the_server() {
    let script: Script<SubscribeAnswer> = |stream| {
        Some(match stream {
            0 => vec![Err(Status::not_found("the proxy says"))],
            1 => vec![Err(Status::permission_denied("the proxy says"))],
            2 => vec![],
            _ => vec![Ok(welcome()), Ok(deliver(1, 1))],
        })
    };
    let world = world(script, nothing).await;
    let mut subscriber = soon(world.client.subscriber("s").topic("t").open()).await.unwrap();
    let Some(Ok(Event::Message(delivery))) = soon(subscriber.next()).await else { panic!() };
    assert_eq!(delivery.id.sequence, 1);
}

/// Lets a minute pass whenever the session waits to try again, until it ends: says why.
async fn end_of(mut state: StateWatch) -> Arc<Cause> {
    for _ in 0..10 {
        let change = soon(state.changed()).await.unwrap();
        if let ConnectionState::Closed { cause } = change {
            return cause.unwrap();
        }
        tokio::time::pause();
        tokio::time::advance(Duration::from_secs(61)).await;
        tokio::time::resume();
    }
    panic!("it never ends");
}

#[tokio::test]
async fn a_subscriber_that_is_denied_by_something_else_ends_after_a_minute() {
    let world =
        world(|_| Some(vec![Err(Status::permission_denied("log in first"))]), nothing).await;
    let mut subscriber = world.client.subscriber("s").topic("t").open_lazy();
    let cause = end_of(subscriber.state()).await;
    assert!(matches!(*cause, Cause::Foreign(_)), "{cause}");
    assert!(world.server.hellos.lock().unwrap().len() > 1, "it was tried again");
    let Some(Err(error)) = soon(subscriber.next()).await else { panic!("no error") };
    assert!(matches!(error, SubscribeError::Foreign(_)), "{error}");
    let text = error.to_string();
    assert!(text.contains("PermissionDenied: log in first") && text.contains("proxy"), "{text}");
    assert!(soon(subscriber.next()).await.is_none());
}

#[tokio::test]
async fn a_publisher_that_is_denied_by_something_else_tells_what_was_ever_sent() {
    let script: Script<PublishAnswer> = |stream| {
        let denied = Err(Status::unauthenticated("log in first"));
        Some(if stream == 0 { vec![Ok(publisher_welcome(None)), denied] } else { vec![denied] })
    };
    let world = world(nothing, script).await;
    let publisher = world.client.publisher("t").open().await.unwrap();
    let sent = publisher.enqueue("1").await.unwrap();
    soon(publisher.state().wait_for(ConnectionState::is_reconnecting)).await.unwrap();
    let unsent = publisher.enqueue("2").await.unwrap();
    let cause = end_of(publisher.state()).await;
    assert!(matches!(*cause, Cause::Foreign(_)), "{cause}");
    for (ticket, outcome) in [(sent, Outcome::Unknown), (unsent, Outcome::NotPersisted)] {
        let error = soon(ticket).await.unwrap_err();
        assert!(matches!(error.kind(), PublishErrorKind::Foreign(_)), "{error}");
        assert_eq!((error.outcome(), error.is_retryable()), (outcome, false));
    }
    let Err(EnqueueError::Closed { cause: Some(kind), .. }) = publisher.enqueue("3").await else {
        panic!("it goes on")
    };
    assert!(matches!(*kind, PublishErrorKind::Foreign(_)), "{kind}");
}

#[tokio::test]
async fn connecting_to_something_else_fails_at_once_and_says_so() {
    // It has no service for administration.
    let world = world(nothing, nothing).await;
    let error = soon(Client::connect(world.client.url())).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains("Unimplemented") && text.contains("another service"), "{text}");
}

#[tokio::test]
async fn a_server_that_does_not_answer_is_left() {
    let world = world_with(nothing, nothing, Duration::from_millis(300)).await;
    let publisher = world.client.publisher("t").open_lazy();
    let state = soon(publisher.state().wait_for(ConnectionState::is_reconnecting)).await;
    let Some(ConnectionState::Reconnecting { cause, .. }) = state else { panic!("{state:?}") };
    assert!(matches!(*cause, Cause::HandshakeTimeout(_)), "{cause}");
    let error = Client::connect(world.client.url()).await.unwrap_err();
    assert!(error.is_retryable(), "{error}");
}

#[tokio::test]
async fn results_that_are_not_due_end_the_publisher_the_second_time() {
    let script: Script<PublishAnswer> =
        |_| Some(vec![Ok(publisher_welcome(None)), Ok(stored(2, 1))]);
    let world = world(nothing, script).await;
    let publisher = world.client.publisher("t").open().await.unwrap();
    let error = soon(publisher.publish("1")).await.unwrap_err();
    assert!(matches!(error.kind(), PublishErrorKind::Protocol(_)), "{error}");
    assert_eq!(error.outcome(), Outcome::Unknown);
    assert_eq!(*world.server.publishers.lock().unwrap(), 2);
    assert!(publisher.state().get().is_closed());
}

#[tokio::test]
async fn a_server_that_lost_what_it_acknowledged_ends_the_publisher_loudly() {
    let script: Script<PublishAnswer> = |stream| {
        Some(match stream {
            0 => vec![Ok(publisher_welcome(None)), Ok(stored(1, 1)), Err(Status::unknown("cut"))],
            _ => vec![Ok(publisher_welcome(Some(0)))],
        })
    };
    let world = world(nothing, script).await;
    let publisher = world.client.publisher("t").open().await.unwrap();
    soon(publisher.publish("1")).await.unwrap();
    soon(publisher.state().wait_for(ConnectionState::is_closed)).await.unwrap();
    let error = soon(publisher.publish("2")).await.unwrap_err();
    assert!(matches!(error.kind(), PublishErrorKind::ServerRegressed { .. }), "{error}");
}
