//! What is told to whoever watches: each event, what was missed, and that nobody waits for anybody
//! who listens.

use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, bail, ensure};
use futures_util::FutureExt as _;
use pubsub_client::{
    Client, CreateSubscription, DeadLetters, Drain, EventFilter, EventStream, FailurePolicy,
    Message, Nack, Presence, Reason, ServerEvent, Start, Subscriber, SubscriptionKind,
    SubscriptionPosition, TopicConfig, WaitCause,
};
use pubsub_proto::v1::{
    UpdateTopicRequest, WatchEventsRequest, WatchEventsResponse, server_event::Event,
    watch_events_response::Frame,
};
use pubsub_tests::{
    admin,
    files::SmallDisk,
    lab::scenario,
    proxy::Cut,
    raw::{self, SubscribeStream},
    wait,
};
use tokio::task::JoinSet;
use tonic::{Streaming, transport::Endpoint};

use crate::app::{self, SOON};

const WITHIN: Duration = Duration::from_secs(150);
const STOP: Duration = Duration::from_secs(8);
const TOPIC: &str = "jobs";
const WORK: &str = "work";
const DEAD: &str = "jobs-dead";

async fn watch(client: &Client, filter: EventFilter) -> Result<EventStream> {
    Ok(wait::soon("the events", SOON, client.admin().events(filter)).await??)
}

/// The next event, in words.
async fn next(events: &mut EventStream) -> Result<String> {
    let event = wait::soon("an event", 2 * SOON, events.next()).await?;
    Ok(words(&event.context("the events have ended")??.event))
}

async fn expect(events: &mut EventStream, wanted: &[&str]) -> Result<()> {
    for wanted in wanted {
        let event = next(events).await.with_context(|| format!("waiting for {wanted:?}"))?;
        ensure!(event == *wanted, "{event:?} instead of {wanted:?}");
    }
    Ok(())
}

/// What has come already, in words.
fn rest(events: &mut EventStream) -> Vec<String> {
    let mut all = Vec::new();
    while let Some(Some(Ok(event))) = events.next().now_or_never() {
        all.push(words(&event.event));
    }
    all
}

fn words(event: &ServerEvent) -> String {
    match event {
        ServerEvent::TopicCreated { topic, .. } => format!("created {topic}"),
        ServerEvent::TopicUpdated { topic, .. } => format!("updated {topic}"),
        ServerEvent::TopicDeleted { topic, .. } => format!("deleted {topic}"),
        ServerEvent::TopicPurged { topic, before, purged, .. } => {
            format!("purged {topic} before {before}: {purged}")
        }
        ServerEvent::SubscriptionCreated { subscription, .. } => {
            format!("created s {subscription}")
        }
        ServerEvent::SubscriptionDeleted { subscription, .. } => {
            format!("deleted s {subscription}")
        }
        ServerEvent::SubscriptionExpired { subscription, .. } => {
            format!("expired s {subscription}")
        }
        ServerEvent::Consumer { subscription, consumer, presence } => match presence {
            Presence::Standby { active } => format!("{subscription}/{consumer} after {active}"),
            other => format!("{subscription}/{consumer} {other:?}"),
        },
        ServerEvent::Gap { subscription, topic, first, last, reason, .. } => {
            format!("{subscription} misses {first} to {last} of {topic}: {reason:?}")
        }
        ServerEvent::DeadLettered {
            subscription, topic, count, first, dead_letter_topic, ..
        } => format!("{subscription}: {count} from {first} of {topic} to {dead_letter_topic}"),
        ServerEvent::Skipped { subscription, topic, count, first, .. } => {
            format!("{subscription} skips {count} from {first} of {topic}")
        }
        ServerEvent::DeadLettersRedriven { subscription, topic, count, left } => {
            format!("{subscription} redrives {count} of {topic}, {left} left")
        }
        ServerEvent::DeadLettersPurged { subscription, topic, count, left } => {
            format!("{subscription} purges {count} of {topic}, {left} left")
        }
        ServerEvent::Stalled { subscription, topic, head_of_line, .. } => {
            let (sequence, cause) = (head_of_line.sequence, head_of_line.cause.as_str());
            format!("{subscription} stalls at {sequence} of {topic}: {cause}")
        }
        ServerEvent::StallEnded { subscription, topic, sequence, .. } => {
            format!("{subscription} goes on after {sequence} of {topic}")
        }
        ServerEvent::Reconnected { restarted, .. } => {
            format!("reconnected, restarted: {restarted}")
        }
        other => format!("{other:?}"),
    }
}

/// Opens a consumer that may have to stand by, which opening waits for.
fn stand_by(client: &Client, name: &str) -> JoinSet<Result<Subscriber>> {
    let opening = client.subscriber(WORK).consumer_id(name);
    let mut task = JoinSet::new();
    task.spawn(async move { Ok(opening.open().await?) });
    task
}

async fn opened(mut opening: JoinSet<Result<Subscriber>>) -> Result<Subscriber> {
    wait::soon("a consumer", SOON, opening.join_next()).await?.context("no task")??
}

#[test]
fn what_happens_is_told_in_order_to_whoever_asked_for_it() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let client = app::client(&server.url())?;
        let admin = client.admin();
        let mut all = watch(&client, EventFilter::all()).await?;
        let mut of_work = watch(&client, EventFilter::all().of_subscription(WORK)).await?;
        let mut of_dead = watch(&client, EventFilter::all().of_topic(DEAD)).await?;

        admin.create_topic(TOPIC, TopicConfig::new()).await?;
        admin.ensure_topic(TOPIC, TopicConfig::new()).await?;
        admin.create_topic(DEAD, TopicConfig::new()).await?;
        admin.update_topic(TOPIC, TopicConfig::new().with_max_bytes(1 << 30)).await?;
        let policy = FailurePolicy::dead_letter(DEAD).after(1);
        let settings = CreateSubscription::to([TOPIC]).with_on_failure(policy);
        admin.create_subscription(WORK, settings).await?;
        expect(&mut all, &["created jobs", "created jobs-dead", "updated jobs", "created s work"])
            .await?;

        let mut one = opened(stand_by(&client, "one")).await?;
        expect(&mut all, &["work/one Attached"]).await?;
        let other = app::client(&server.url())?;
        let two = stand_by(&other, "two");
        expect(&mut all, &["work/two after one"]).await?;

        let publisher = app::publisher(&client, TOPIC).await?;
        publisher.publish("poison").await?;
        app::next(&mut one).await?.nack(Nack::for_good());
        expect(&mut all, &["work: 1 from 1 of jobs to jobs-dead"]).await?;
        admin.redrive(WORK, DeadLetters::Oldest(10)).await?;
        expect(&mut all, &["work redrives 1 of jobs-dead, 0 left"]).await?;
        app::next(&mut one).await?.nack(Nack::for_good());
        expect(&mut all, &["work: 1 from 2 of jobs to jobs-dead"]).await?;
        admin.purge_dead_letters(WORK, DeadLetters::Oldest(10)).await?;
        expect(&mut all, &["work purges 1 of jobs-dead, 0 left"]).await?;

        one.stopper().stop(Drain::Finish, SOON).await;
        expect(&mut all, &["work/one Left", "work/two Attached"]).await?;
        let mut two = opened(two).await?;
        // Another process that goes by the same name.
        let third = app::client(&server.url())?;
        let again = opened(stand_by(&third, "two")).await?;
        expect(&mut all, &["work/two Superseded", "work/two Attached"]).await?;
        let error = app::failure(&mut two).await?;
        ensure!(format!("{error:?}").contains("Superseded"), "{error:?}");

        admin.delete_subscription(WORK).await?;
        expect(&mut all, &["deleted s work"]).await?;
        drop(again);
        // The other streams have the same to tell, and may be behind.
        for count in 1..=12 {
            let event = next(&mut of_work).await.with_context(|| format!("event {count}"))?;
            ensure!(event.contains(WORK), "{event}");
        }
        ensure!(rest(&mut of_work).is_empty());
        let wanted = [
            "created jobs-dead",
            "work: 1 from 1 of jobs to jobs-dead",
            "work redrives 1 of jobs-dead, 0 left",
            "work: 1 from 2 of jobs to jobs-dead",
            "work purges 1 of jobs-dead, 0 left",
        ];
        expect(&mut of_dead, &wanted).await?;
        ensure!(rest(&mut of_dead).is_empty());
        Ok(())
    });
}

#[test]
fn gaps_and_skips_are_told_once_to_whoever_watches() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let client = app::client(&server.url())?;
        let admin = client.admin();
        admin.create_topic(TOPIC, TopicConfig::new()).await?;
        admin.create_subscription(WORK, CreateSubscription::to([TOPIC])).await?;
        let publisher = app::publisher(&client, TOPIC).await?;
        app::publish_numbers(&publisher, 0..5).await?;
        let mut events = watch(&client, EventFilter::all()).await?;
        admin.purge_topic(TOPIC, Some(4)).await?;
        expect(&mut events, &["purged jobs before 4: 3"]).await?;
        // The consumer does not say that it knows of the gap, and is told again; whoever watches is
        // not.
        let channel = raw::connect(&server.url()).await?;
        let gap = "work misses 1 to 3 of jobs: Purged";
        for wanted in [&["work/c Attached", gap][..], &["work/c Attached"]] {
            let hello = raw::consumer_hello(WORK, "c", &[]);
            let mut stream = SubscribeStream::open(&channel, hello).await?;
            wait::soon("the gap", SOON, told_of_a_gap(&mut stream)).await??;
            expect(&mut events, wanted).await?;
            drop(stream);
            expect(&mut events, &["work/c Disconnected"]).await?;
        }

        let another = CreateSubscription::to([TOPIC])
            .with_start(Start::Earliest)
            .with_on_failure(FailurePolicy::skip().after(1));
        admin.create_subscription("other", another).await?;
        let mut subscriber = client.subscriber("other").consumer_id("c").open().await?;
        expect(&mut events, &["created s other", "other/c Attached"]).await?;
        app::next(&mut subscriber).await?.nack(Nack::now());
        expect(&mut events, &["other skips 1 from 4 of jobs"]).await?;
        admin.delete_topic(TOPIC).await?;
        // It holds the last one, which can be acked still.
        let mut more = vec![next(&mut events).await?];
        more.extend(rest(&mut events));
        ensure!(more.contains(&"deleted jobs".to_owned()), "{more:?}");
        Ok(())
    });
}

async fn told_of_a_gap(stream: &mut SubscribeStream) -> Result<()> {
    use pubsub_proto::v1::subscribe_response::Frame;
    loop {
        if let Frame::Gap(_) = stream.next().await? {
            return Ok(());
        }
    }
}

#[test]
fn a_stall_is_told_once_and_when_it_ends_and_a_lost_consumer_after_its_grace() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let client = app::client(&server.url())?;
        let admin = client.admin();
        admin.create_topic(TOPIC, TopicConfig::new()).await?;
        admin.create_topic("quiet", TopicConfig::new()).await?;
        admin.create_subscription("stuck", CreateSubscription::to([TOPIC])).await?;
        admin.create_subscription(WORK, CreateSubscription::to(["quiet"])).await?;
        let unused = CreateSubscription::to(["quiet"]).with_expiry(Duration::from_secs(10));
        admin.create_subscription("unused", unused).await?;
        let mut events = watch(&client, EventFilter::all()).await?;
        app::publish_numbers(&app::publisher(&client, TOPIC).await?, 0..2).await?;
        let channel = raw::connect(&server.url()).await?;
        drop(SubscribeStream::welcomed(&channel, raw::consumer_hello(WORK, "c", &[])).await?);
        expect(&mut events, &["work/c Attached", "work/c Disconnected"]).await?;

        let mut seen = Vec::new();
        while seen.len() < 3 {
            seen.push(next(&mut events).await?);
        }
        seen.sort();
        let wanted = ["expired s unused", "stuck stalls at 1 of jobs: no_consumer", "work/c Lost"];
        ensure!(seen == wanted, "{seen:?}");
        // While it goes on, it is no news.
        let silent = tokio::time::timeout(Duration::from_secs(12), next(&mut events)).await;
        ensure!(silent.is_err(), "{silent:?}");
        let mut subscriber = client.subscriber("stuck").consumer_id("c").open().await?;
        app::next(&mut subscriber).await?.ack_confirmed().await?;
        expect(&mut events, &["stuck/c Attached", "stuck goes on after 1 of jobs"]).await?;
        Ok(())
    });
}

#[test]
fn who_watches_and_never_reads_stalls_nobody_and_learns_how_much_it_missed() {
    const UPDATES: u64 = 4_000;
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let channel = raw::connect(&server.url()).await?;
        let name = "t".repeat(128);
        admin::create_topic(&channel, &name).await?;
        // As little as possible waits on the way.
        let endpoint = Endpoint::from_shared(server.url())?.initial_stream_window_size(1024);
        let lazy = endpoint.connect().await?;
        let mut unread = raw_watch(&lazy).await?;
        let client = app::client(&server.url())?;
        let mut events = watch(&client, EventFilter::all()).await?;
        let mut updating = JoinSet::new();
        for _ in 0..8 {
            let (channel, name) = (channel.clone(), name.clone());
            updating.spawn(async move {
                for _ in 0..UPDATES / 8 {
                    let request = UpdateTopicRequest { name: name.clone(), config: None };
                    raw::admin(&channel).update_topic(request).await?;
                }
                anyhow::Ok(())
            });
        }
        // Who reads has them all, beside the one who does not.
        for number in 0..UPDATES {
            let event = next(&mut events).await?;
            ensure!(event == format!("updated {name}"), "{event} after {number}");
        }
        for updated in updating.join_all().await {
            updated?;
        }
        raw::admin(&channel).update_topic(UpdateTopicRequest { name, config: None }).await?;
        let (mut told, mut missed, mut gaps) = (0, 0, 0);
        while told + missed < UPDATES + 1 {
            match wait::soon("a frame", SOON, unread.message()).await??.and_then(|f| f.frame) {
                Some(Frame::Event(event)) => {
                    ensure!(matches!(event.event, Some(Event::TopicUpdated(_))), "{event:?}");
                    told += 1;
                }
                Some(Frame::Missed(more)) => {
                    missed += more.count;
                    gaps += 1;
                }
                Some(Frame::Heartbeat(_)) => {}
                other => bail!("{other:?}"),
            }
        }
        ensure!(told + missed == UPDATES + 1, "{told} told and {missed} missed of {UPDATES} + 1");
        ensure!(missed > 500 && gaps == 1, "{missed} missed in {gaps} gaps: the run is void");
        Ok(())
    });
}

async fn raw_watch(channel: &tonic::transport::Channel) -> Result<Streaming<WatchEventsResponse>> {
    let request = WatchEventsRequest::default();
    let mut stream = raw::admin(channel).watch_events(request).await?.into_inner();
    let first = wait::soon("the first frame", SOON, stream.message()).await??;
    let first = first.and_then(|first| first.frame);
    ensure!(matches!(first, Some(Frame::Started(_))), "{first:?}");
    Ok(stream)
}

#[test]
fn a_lost_connection_and_a_restart_are_told_to_whoever_watches() {
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        let client = app::client(&rig.url())?;
        let mut events = watch(&client, EventFilter::all()).await?;
        rig.proxy.cut_all(Cut::Reset);
        expect(&mut events, &["reconnected, restarted: false"]).await?;
        ensure!(events.state().get().is_connected());
        client.admin().create_topic("one", TopicConfig::new()).await?;
        expect(&mut events, &["created one"]).await?;
        rig.crash().await?;
        // What happens while nobody is there is missed, and that is what is said.
        let direct = app::client(&rig.server.url())?;
        direct.admin().create_topic("two", TopicConfig::new()).await?;
        expect(&mut events, &["reconnected, restarted: true"]).await?;
        client.admin().create_topic("three", TopicConfig::new()).await?;
        expect(&mut events, &["created three"]).await?;
        // A server that hangs is noticed.
        rig.server.freeze()?;
        let frozen = app::state(events.state(), "reconnecting", SOON, |s| s.is_reconnecting());
        let polled = async { tokio::time::timeout(SOON, events.next()).await };
        let (reconnecting, _) = tokio::select! {
            reconnecting = frozen => (reconnecting, ()),
            event = polled => bail!("{event:?} from a server that is frozen"),
        };
        reconnecting?;
        rig.server.thaw()?;
        expect(&mut events, &["reconnected, restarted: false"]).await?;
        // And one that stops is not kept from it, also by who does not read.
        let channel = raw::connect(&rig.server.url()).await?;
        let mut idle = raw_watch(&channel).await?;
        rig.server.begin_stop()?;
        rig.server.exited(STOP).await?;
        let last = idle.message().await;
        let status = last.err().context("the stream has ended without a word")?;
        ensure!(raw::reason(&status).as_deref() == Some("UNAVAILABLE"), "{status:?}");
        Ok(())
    });
}

#[test]
fn a_filter_that_is_no_name_is_refused() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let client = app::client(&server.url())?;
        let refused = client.admin().events(EventFilter::all().of_topic("no name")).await;
        let error = refused.err().context("it is taken")?;
        ensure!(error.reason() == Some(Reason::InvalidArgument), "{error:?}");
        Ok(())
    });
}

#[test]
fn a_full_disk_and_room_again_are_told() {
    scenario(WITHIN, async |lab| {
        let Some(disk) = SmallDisk::mount(&lab.path("disk"), 192)? else {
            return Ok(());
        };
        let server = lab.server_on(&disk.path().join("data")).await?;
        let client = app::client(&server.url())?;
        client.admin().create_topic(TOPIC, TopicConfig::new()).await?;
        // What concerns the server concerns everybody.
        let filter = EventFilter::all().of_topic("another");
        let mut events = watch(&client, filter).await?;
        disk.fill(2048)?;
        let publisher = app::publisher(&client, TOPIC).await?;
        let ticket = publisher.enqueue(vec![1; 64 << 10]).await?;
        expect(&mut events, &["DiskFull"]).await?;
        disk.free()?;
        expect(&mut events, &["DiskHasRoom"]).await?;
        wait::soon("the publish", SOON, ticket).await??;
        Ok(())
    });
}

#[expect(clippy::disallowed_methods, reason = "what the server says is compared with it")]
fn now() -> SystemTime {
    SystemTime::now()
}

async fn position(client: &Client, name: &str) -> Result<SubscriptionPosition> {
    let mut info = client.admin().subscription(name).await?;
    info.positions.pop().context("no position")
}

/// Waits until the first message that is not acked is this one and waits for that.
async fn head(client: &Client, sequence: u64, cause: WaitCause) -> Result<SubscriptionPosition> {
    wait::until_ok("the head of the line", SOON, async || {
        let at = position(client, WORK).await?;
        let head = at.head_of_line.as_ref().context("nothing waits")?;
        ensure!((head.sequence, head.cause) == (sequence, cause), "{at:?}");
        ensure!(at.oldest_unacked == Some(sequence), "{at:?}");
        Ok(at)
    })
    .await
}

#[test]
fn the_lag_of_a_subscription_is_what_it_is_known_to_be() {
    const MESSAGES: u64 = 20;
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        let client = app::client(&rig.url())?;
        client.admin().create_topic(TOPIC, TopicConfig::new()).await?;
        let settings = CreateSubscription::to([TOPIC]).with_kind(SubscriptionKind::Exclusive);
        client.admin().create_subscription(WORK, settings).await?;
        ensure!(position(&client, WORK).await?.head_of_line.is_none());
        ensure!(position(&client, WORK).await?.oldest_unacked_age.is_none());

        let publisher = app::publisher(&client, TOPIC).await?;
        let first = publisher.publish(Message::new("first")).await?;
        app::publish_numbers(&publisher, 1..MESSAGES).await?;
        let at = head(&client, 1, WaitCause::NoConsumer).await?;
        ensure!((at.backlog, at.outstanding, at.redelivered) == (MESSAGES, 0, 0), "{at:?}");

        let opening = client.subscriber(WORK).consumer_id("c").max_outstanding_messages(5);
        let mut subscriber = opening.open().await?;
        let mut held = app::next_many(&mut subscriber, 3).await?;
        let at = head(&client, 1, WaitCause::WithConsumer).await?;
        ensure!((at.backlog, at.outstanding) == (MESSAGES, 5), "{at:?}");
        let text = at.head_of_line.map(|head| head.text).unwrap_or_default();
        ensure!(text.contains("consumer c "), "{text}");
        let known = subscriber.position().topics.pop().context("no position")?;
        ensure!((known.in_hand, known.buffered, known.behind) == (3, 2, MESSAGES), "{known:?}");

        // The second is acked: a hole, which is no backlog. The first fails.
        held.remove(1).ack_confirmed().await?;
        held.remove(0).nack(Nack::after(Duration::from_secs(50)));
        let at = head(&client, 1, WaitCause::Backoff).await?;
        ensure!((at.backlog, at.redelivered) == (MESSAGES - 1, 1), "{at:?}");

        // By the server's clock, which is this machine's.
        let before = now();
        let lag = subscriber.lag().await?;
        let after = now();
        let [topic] = &*lag.topics else { bail!("{lag:?}") };
        let age = topic.oldest_unacked_age.context("no age")?;
        let at_least = before.duration_since(first.publish_time)?;
        let at_most = after.duration_since(first.publish_time)?;
        let slack = Duration::from_millis(2);
        ensure!(
            age + slack >= at_least && age <= at_most + slack,
            "{at_least:?} {age:?} {at_most:?}"
        );
        ensure!(lag.backlog() == MESSAGES - 1 && topic.redelivered == 1, "{lag:?}");
        ensure!(lag.oldest_unacked_age() == Some(age), "{lag:?}");

        // What has failed is known after a restart, too; by the consumer, if it was not on disk.
        rig.crash().await?;
        wait::until_ok("the failure", SOON, async || {
            let at = position(&client, WORK).await?;
            ensure!(at.redelivered == 1 && at.backlog == MESSAGES - 1, "{at:?}");
            Ok(())
        })
        .await?;
        // As soon as it is done it counts no more.
        client.admin().seek(WORK, None, Start::Sequence(3)).await?;
        let at = position(&client, WORK).await?;
        ensure!((at.redelivered, at.backlog) == (0, MESSAGES - 2), "{at:?}");
        Ok(())
    });
}

#[test]
fn a_message_says_that_its_consumer_is_awaited_or_its_topic_is_gone() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let client = app::client(&server.url())?;
        client.admin().create_topic(TOPIC, TopicConfig::new()).await?;
        client.admin().create_subscription(WORK, CreateSubscription::to([TOPIC])).await?;
        app::publish_numbers(&app::publisher(&client, TOPIC).await?, 0..3).await?;
        let channel = raw::connect(&server.url()).await?;
        let hello = raw::consumer_hello(WORK, "c", &[]);
        let (stream, _) = SubscribeStream::welcomed(&channel, hello).await?;
        head(&client, 1, WaitCause::WithConsumer).await?;
        drop(stream);
        let at = head(&client, 1, WaitCause::AwaitedConsumer).await?;
        ensure!(at.outstanding == 3, "{at:?}");
        let text = at.head_of_line.map(|head| head.text).unwrap_or_default();
        ensure!(text.contains("consumer c ") && text.contains("not connected"), "{text}");
        let idle = CreateSubscription::to([TOPIC]).with_start(Start::Earliest);
        client.admin().create_subscription("idle", idle).await?;
        client.admin().delete_topic(TOPIC).await?;
        let at = position(&client, "idle").await?;
        let head = at.head_of_line.as_ref().context("nothing waits")?;
        ensure!((head.sequence, head.cause) == (1, WaitCause::TopicDeleted), "{at:?}");
        ensure!((at.backlog, at.oldest_unacked_age) == (3, None), "{at:?}");
        Ok(())
    });
}

#[test]
fn a_reader_knows_its_lag_by_itself() {
    scenario(WITHIN, async |lab| {
        let server = lab.server().await?;
        let client = app::client(&server.url())?;
        client.admin().create_topic(TOPIC, TopicConfig::new()).await?;
        app::publish_numbers(&app::publisher(&client, TOPIC).await?, 0..10).await?;
        let mut reader = client.reader([TOPIC]).start(Start::Earliest).open().await?;
        app::next_many(&mut reader, 4).await?;
        let lag = reader.lag().await?;
        let [topic] = &*lag.topics else { bail!("{lag:?}") };
        ensure!((lag.backlog(), topic.oldest_unacked_age) == (6, None), "{lag:?}");
        app::next_many(&mut reader, 6).await?;
        ensure!(reader.lag().await?.backlog() == 0);
        Ok(())
    });
}
