//! Events, from the wire.

use std::time::SystemTime;

use pubsub_proto::v1 as pb;
use pubsub_proto::v1::server_event::Event;
use pubsub_proto::v1::watch_events_response::Frame;

use super::events::{Presence, ServerEvent, TimedEvent};
use super::lag;
use crate::message::{duration, time};
use crate::subscriber::gap_reason_from_wire;

/// What is to be yielded of a frame. What this version of the client does not know is passed over.
pub(super) fn event(frame: pb::WatchEventsResponse, now: SystemTime) -> Option<TimedEvent> {
    match frame.frame? {
        Frame::Event(pb::ServerEvent { time: at, event }) => {
            Some(TimedEvent { time: time(at), event: server_event(event?) })
        }
        Frame::Missed(pb::EventsMissed { count }) => {
            Some(TimedEvent { time: now, event: ServerEvent::Missed { count } })
        }
        Frame::Started(_) | Frame::Heartbeat(_) => None,
    }
}

fn server_event(event: Event) -> ServerEvent {
    match event {
        Event::TopicCreated(pb::TopicEvent { topic, epoch }) => {
            ServerEvent::TopicCreated { topic, epoch }
        }
        Event::TopicUpdated(pb::TopicEvent { topic, epoch }) => {
            ServerEvent::TopicUpdated { topic, epoch }
        }
        Event::TopicDeleted(pb::TopicEvent { topic, epoch }) => {
            ServerEvent::TopicDeleted { topic, epoch }
        }
        Event::TopicPurged(pb::TopicPurged { topic, epoch, before, purged }) => {
            ServerEvent::TopicPurged { topic, epoch, before, purged }
        }
        Event::SubscriptionCreated(pb::SubscriptionEvent { subscription, epoch }) => {
            ServerEvent::SubscriptionCreated { subscription, epoch }
        }
        Event::SubscriptionDeleted(pb::SubscriptionEvent { subscription, epoch }) => {
            ServerEvent::SubscriptionDeleted { subscription, epoch }
        }
        Event::SubscriptionExpired(pb::SubscriptionEvent { subscription, epoch }) => {
            ServerEvent::SubscriptionExpired { subscription, epoch }
        }
        Event::ConsumerAttached(event) => consumer(event, Presence::Attached),
        Event::ConsumerStandby(pb::ConsumerStandby { subscription, consumer, active }) => {
            ServerEvent::Consumer { subscription, consumer, presence: Presence::Standby { active } }
        }
        Event::ConsumerSuperseded(event) => consumer(event, Presence::Superseded),
        Event::ConsumerDisconnected(event) => consumer(event, Presence::Disconnected),
        Event::ConsumerLeft(event) => consumer(event, Presence::Left),
        Event::ConsumerLost(event) => consumer(event, Presence::Lost),
        Event::DiskFull(pb::DiskFull {}) => ServerEvent::DiskFull,
        Event::DiskHasRoom(pb::DiskHasRoom {}) => ServerEvent::DiskHasRoom,
        Event::Gap(event) => gap(event),
        Event::DeadLettered(event) => dead_lettered(event),
        Event::Skipped(event) => skipped(event),
        Event::DeadLettersRedriven(pb::DeadLettersSettled { subscription, topic, count, left }) => {
            ServerEvent::DeadLettersRedriven { subscription, topic, count, left }
        }
        Event::DeadLettersPurged(pb::DeadLettersSettled { subscription, topic, count, left }) => {
            ServerEvent::DeadLettersPurged { subscription, topic, count, left }
        }
        Event::Stalled(event) => stalled(event),
        Event::StallEnded(event) => stall_ended(event),
    }
}

fn gap(event: pb::SubscriptionGap) -> ServerEvent {
    let pb::SubscriptionGap { subscription, topic, epoch, first, last, reason } = event;
    let reason = gap_reason_from_wire(reason);
    ServerEvent::Gap { subscription, topic, epoch, first, last, reason }
}

fn dead_lettered(event: pb::MessagesDeadLettered) -> ServerEvent {
    let pb::MessagesDeadLettered { subscription, topic, epoch, count, first, dead_letter_topic } =
        event;
    ServerEvent::DeadLettered { subscription, topic, epoch, count, first, dead_letter_topic }
}

fn skipped(event: pb::MessagesSkipped) -> ServerEvent {
    let pb::MessagesSkipped { subscription, topic, epoch, count, first } = event;
    ServerEvent::Skipped { subscription, topic, epoch, count, first }
}

fn stalled(event: pb::SubscriptionStalled) -> ServerEvent {
    let pb::SubscriptionStalled { subscription, topic, epoch, head_of_line, waiting } = event;
    let head_of_line = lag::head_of_line(head_of_line.unwrap_or_default());
    let waiting = duration(waiting).unwrap_or_default();
    ServerEvent::Stalled { subscription, topic, epoch, head_of_line, waiting }
}

fn stall_ended(event: pb::StallEnded) -> ServerEvent {
    let pb::StallEnded { subscription, topic, epoch, sequence, waited } = event;
    let waited = duration(waited).unwrap_or_default();
    ServerEvent::StallEnded { subscription, topic, epoch, sequence, waited }
}

fn consumer(event: pb::ConsumerEvent, presence: Presence) -> ServerEvent {
    let pb::ConsumerEvent { subscription, consumer } = event;
    ServerEvent::Consumer { subscription, consumer, presence }
}
