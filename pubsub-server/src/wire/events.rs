//! Streams of events: a task for each watcher, which nobody else waits for.

use std::time::Duration;

use pubsub_proto::v1::server_event::Event;
use pubsub_proto::v1::watch_events_response::Frame;
use pubsub_proto::v1::{
    ConsumerEvent, ConsumerStandby, DeadLettersSettled, DiskFull, DiskHasRoom, EventsMissed,
    HeadOfLine, MessagesDeadLettered, MessagesSkipped, ServerEvent, StallEnded, SubscriptionEvent,
    SubscriptionGap, SubscriptionStalled, TopicEvent, TopicPurged, WaitCause, WatchEventsRequest,
    WatchEventsResponse, WatchHeartbeat, WatchStarted,
};
use tokio::time::{Instant, sleep_until};
use tonic::Status;

use super::status::status;
use super::stream::{End, Frames, Outbound, heartbeat_interval};
use super::{Context, convert, turned};
use crate::broker::BrokerError;
use crate::broker::events::{
    self, EventFilter, Noticed, Presence, SubscriptionFate, TopicFate, Watcher, What,
};
use crate::broker::waiting;
use crate::names::{SubscriptionName, TopicName};
use crate::record::Epoch;

/// Starts a stream of events.
pub(super) fn watch(
    context: &Context,
    request: &WatchEventsRequest,
) -> Result<Outbound<WatchEventsResponse>, Status> {
    let filter = EventFilter {
        subscription: match request.subscription.as_str() {
            "" => None,
            name => Some(convert::parse_subscription(name)?),
        },
        topic: match request.topic.as_str() {
            "" => None,
            name => Some(convert::parse_topic(name)?),
        },
    };
    let heartbeat = heartbeat_interval(request.heartbeat_interval)?;
    if *context.draining.borrow() {
        return Err(stopping());
    }
    // Before the first frame: what happens once that is there is not missed in silence.
    let watcher = context.broker.watch(filter).map_err(|error| status(&error))?;
    let (frames, outbound) = Frames::new();
    context.streams.spawn(serve(context.clone(), watcher, heartbeat, frames));
    Ok(outbound)
}

fn stopping() -> Status {
    status(&BrokerError::Unavailable("the server is stopping"))
}

async fn serve(
    context: Context,
    mut watcher: Watcher,
    heartbeat: Duration,
    frames: Frames<WatchEventsResponse>,
) {
    let mut draining = context.draining.clone();
    let end = tokio::select! {
        // First: a stream that has much to tell ends with the others all the same.
        biased;
        () = turned(&mut draining) => End::from(stopping()),
        () = frames.closed() => End::Gone,
        end = tell(&context, &mut watcher, heartbeat, &frames) => end,
    };
    frames.end_now(end);
}

/// Tells until the peer is gone. What it does not read waits in this task, one frame of it; what
/// happens meanwhile waits in the buffer that all watchers share, or is counted.
async fn tell(
    context: &Context,
    watcher: &mut Watcher,
    heartbeat: Duration,
    frames: &Frames<WatchEventsResponse>,
) -> End {
    let boot_id = convert::uuid(context.broker.boot_id());
    let heartbeat_interval = convert::duration(heartbeat);
    let mut next = Frame::Started(WatchStarted { boot_id, heartbeat_interval });
    loop {
        if let Err(end) = frames.put(WatchEventsResponse { frame: Some(next) }).await {
            return end;
        }
        let silent = sleep_until(Instant::now() + heartbeat);
        next = tokio::select! {
            noticed = watcher.next() => match noticed {
                Some(Noticed::Event(event)) => Frame::Event(server_event(&event)),
                Some(Noticed::Missed(count)) => Frame::Missed(EventsMissed { count }),
                None => return stopping().into(),
            },
            () = silent => Frame::Heartbeat(WatchHeartbeat {}),
        };
    }
}

fn server_event(event: &events::ServerEvent) -> ServerEvent {
    ServerEvent { time: convert::timestamp(event.at), event: Some(what(&event.what)) }
}

fn what(what: &What) -> Event {
    match what {
        What::Topic(name, epoch, fate) => of_topic(name, *epoch, *fate),
        What::Purged { topic, epoch, before, purged } => Event::TopicPurged(TopicPurged {
            topic: topic.to_string(),
            epoch: epoch.0,
            before: *before,
            purged: *purged,
        }),
        What::Subscription(name, epoch, fate) => of_subscription(name, *epoch, *fate),
        What::Consumer(subscription, consumer, presence) => {
            let (subscription, consumer) = (subscription.to_string(), consumer.to_string());
            of_consumer(subscription, consumer, presence)
        }
        What::Gap { subscription, topic, epoch, first, last, reason } => {
            Event::Gap(SubscriptionGap {
                subscription: subscription.to_string(),
                topic: topic.to_string(),
                epoch: epoch.0,
                first: *first,
                last: *last,
                reason: convert::gap_reason(*reason).into(),
            })
        }
        What::LetGo { subscription, topic, epoch, count, first, into } => {
            let (subscription, topic) = (subscription.to_string(), topic.to_string());
            let (epoch, count, first) = (epoch.0, *count, *first);
            match into {
                Some(into) => Event::DeadLettered(MessagesDeadLettered {
                    subscription,
                    topic,
                    epoch,
                    count,
                    first,
                    dead_letter_topic: into.to_string(),
                }),
                None => {
                    Event::Skipped(MessagesSkipped { subscription, topic, epoch, count, first })
                }
            }
        }
        What::Settled { subscription, topic, redriven, count, left } => {
            let (subscription, topic) = (subscription.to_string(), topic.to_string());
            let settled = DeadLettersSettled { subscription, topic, count: *count, left: *left };
            if *redriven {
                Event::DeadLettersRedriven(settled)
            } else {
                Event::DeadLettersPurged(settled)
            }
        }
        What::Stalled { subscription, topic, epoch, head, waiting } => {
            Event::Stalled(SubscriptionStalled {
                subscription: subscription.to_string(),
                topic: topic.to_string(),
                epoch: epoch.0,
                head_of_line: Some(head_of_line(head.clone())),
                waiting: convert::duration(*waiting),
            })
        }
        What::StallEnded { subscription, topic, epoch, sequence, waited } => {
            Event::StallEnded(StallEnded {
                subscription: subscription.to_string(),
                topic: topic.to_string(),
                epoch: epoch.0,
                sequence: *sequence,
                waited: convert::duration(*waited),
            })
        }
        What::DiskFull => Event::DiskFull(DiskFull {}),
        What::DiskHasRoom => Event::DiskHasRoom(DiskHasRoom {}),
    }
}

fn of_topic(name: &TopicName, epoch: Epoch, fate: TopicFate) -> Event {
    let event = TopicEvent { topic: name.to_string(), epoch: epoch.0 };
    match fate {
        TopicFate::Created => Event::TopicCreated(event),
        TopicFate::Updated => Event::TopicUpdated(event),
        TopicFate::Deleted => Event::TopicDeleted(event),
    }
}

fn of_subscription(name: &SubscriptionName, epoch: Epoch, fate: SubscriptionFate) -> Event {
    let event = SubscriptionEvent { subscription: name.to_string(), epoch: epoch.0 };
    match fate {
        SubscriptionFate::Created => Event::SubscriptionCreated(event),
        SubscriptionFate::Deleted => Event::SubscriptionDeleted(event),
        SubscriptionFate::Expired => Event::SubscriptionExpired(event),
    }
}

fn of_consumer(subscription: String, consumer: String, presence: &Presence) -> Event {
    let of = |event: fn(ConsumerEvent) -> Event| {
        event(ConsumerEvent { subscription: subscription.clone(), consumer: consumer.clone() })
    };
    match presence {
        Presence::Standby(active) => Event::ConsumerStandby(ConsumerStandby {
            subscription: subscription.clone(),
            consumer: consumer.clone(),
            active: active.to_string(),
        }),
        Presence::Attached => of(Event::ConsumerAttached),
        Presence::Superseded => of(Event::ConsumerSuperseded),
        Presence::Disconnected => of(Event::ConsumerDisconnected),
        Presence::Left => of(Event::ConsumerLeft),
        Presence::Lost => of(Event::ConsumerLost),
    }
}

pub(super) fn head_of_line(head: waiting::HeadOfLine) -> HeadOfLine {
    let cause = match head.cause {
        waiting::WaitCause::WithConsumer => WaitCause::WithConsumer,
        waiting::WaitCause::NoConsumer => WaitCause::NoConsumer,
        waiting::WaitCause::NoCredit => WaitCause::NoCredit,
        waiting::WaitCause::Backoff => WaitCause::Backoff,
        waiting::WaitCause::Delayed => WaitCause::Delayed,
        waiting::WaitCause::Suspect => WaitCause::Suspect,
        waiting::WaitCause::AwaitedConsumer => WaitCause::AwaitedConsumer,
        waiting::WaitCause::TooManyUnacked => WaitCause::TooManyUnacked,
        waiting::WaitCause::DeadLetter => WaitCause::DeadLetter,
        waiting::WaitCause::Damaged => WaitCause::Damaged,
        waiting::WaitCause::TopicDeleted => WaitCause::TopicDeleted,
    };
    HeadOfLine { sequence: head.sequence, cause: cause.into(), text: head.text }
}
