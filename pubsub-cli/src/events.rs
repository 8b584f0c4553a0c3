//! `pubsub events`.

use clap::Args as ClapArgs;
use pubsub_client::{Client, EventFilter, Presence, ServerEvent, TimedEvent};
use serde_json::{Value, json};

use crate::failure::{Exit, Failure};
use crate::format;
use crate::interrupt::Interrupt;
use crate::output::Output;
use crate::watch::Announcer;

#[derive(Debug, ClapArgs)]
#[command(after_help = "\
Examples:
  pubsub events
  pubsub events --subscription billing --json
  pubsub events --topic orders")]
pub(crate) struct Events {
    /// Only what names this subscription
    #[arg(long, value_name = "NAME")]
    subscription: Option<String>,
    /// Only what names this topic; with --subscription, what names both
    #[arg(long, value_name = "NAME")]
    topic: Option<String>,
}

pub(crate) async fn run(
    args: Events,
    client: &Client,
    output: &mut Output,
) -> Result<Exit, Failure> {
    let mut interrupt = Interrupt::new().map_err(|error| Failure::failed(error.to_string()))?;
    let mut filter = EventFilter::all();
    (filter.subscription, filter.topic) = (args.subscription, args.topic);
    let admin = client.admin();
    let mut events = tokio::select! {
        opened = admin.events(filter) => opened?,
        () = interrupt.asked() => return Ok(Exit::Ok),
    };
    eprintln!("pubsub: following what happens from now on; Ctrl-C ends it");
    let _announcing = Announcer::default().go_on(events.state());
    loop {
        let event = tokio::select! {
            event = events.next() => event,
            // It has no end of its own: it is done whenever it is told so.
            () = interrupt.asked() => return Ok(Exit::Ok),
        };
        let Some(event) = event else { return Ok(Exit::Ok) };
        let event = event?;
        if output.is_json() {
            output.json(&value(&event))?;
        } else {
            output.line(&format!("{} {}", format::time(event.time), text(&event.event)))?;
        }
        // Whoever follows wants to see it now.
        output.flush()?;
    }
}

/// The event in one line.
fn text(event: &ServerEvent) -> String {
    match event {
        ServerEvent::TopicCreated { topic, .. } => format!("topic {topic} was created"),
        ServerEvent::TopicUpdated { topic, .. } => format!("topic {topic} has other settings"),
        ServerEvent::TopicDeleted { topic, .. } => format!("topic {topic} was deleted"),
        ServerEvent::TopicPurged { topic, before, purged, .. } => {
            format!("topic {topic} was purged before {before}: {purged} messages are gone")
        }
        ServerEvent::SubscriptionCreated { subscription, .. } => {
            format!("subscription {subscription} was created")
        }
        ServerEvent::SubscriptionDeleted { subscription, .. } => {
            format!("subscription {subscription} was deleted")
        }
        ServerEvent::SubscriptionExpired { subscription, .. } => {
            format!("subscription {subscription} was deleted, since nobody used it")
        }
        ServerEvent::Consumer { subscription, consumer, presence } => {
            format!("consumer {consumer} of {subscription} {}", done(presence))
        }
        ServerEvent::DiskFull => "the disk is full; publishes are refused".to_owned(),
        ServerEvent::DiskHasRoom => "the disk has room again".to_owned(),
        ServerEvent::Missed { count } => {
            format!("{count} events were missed: this is not fast enough")
        }
        ServerEvent::Reconnected { away, restarted, cause } => {
            let restarted = if *restarted { ", to a server that was restarted" } else { "" };
            let away = away.as_secs_f32();
            format!(
                "connected again after {away:.1} s{restarted}; what happened is missed ({cause})"
            )
        }
        ServerEvent::Gap { .. }
        | ServerEvent::DeadLettered { .. }
        | ServerEvent::Skipped { .. }
        | ServerEvent::DeadLettersRedriven { .. }
        | ServerEvent::DeadLettersPurged { .. }
        | ServerEvent::Stalled { .. }
        | ServerEvent::StallEnded { .. }
        | _ => of_messages(event),
    }
}

fn done(presence: &Presence) -> String {
    match presence {
        Presence::Attached => "is active".to_owned(),
        Presence::Standby { active } => format!("stands by for {active}"),
        Presence::Superseded => "was taken over by a new process of its name".to_owned(),
        Presence::Disconnected => "has lost its connection".to_owned(),
        Presence::Left => "has left".to_owned(),
        Presence::Lost => "is given up".to_owned(),
        _ => "has changed".to_owned(),
    }
}

#[expect(clippy::wildcard_enum_match_arm, reason = "its caller has the others")]
fn of_messages(event: &ServerEvent) -> String {
    match event {
        ServerEvent::Gap { subscription, topic, first, last, reason, .. } => {
            let reason = format::gap_reason(*reason);
            format!(
                "{subscription} will not receive messages {first} to {last} of {topic}: {reason}"
            )
        }
        ServerEvent::DeadLettered {
            subscription, topic, count, first, dead_letter_topic, ..
        } => format!(
            "{subscription} could not process {count} messages of {topic} from {first} on; they \
             are in {dead_letter_topic}"
        ),
        ServerEvent::Skipped { subscription, topic, count, first, .. } => {
            format!("{subscription} has skipped {count} messages of {topic} from {first} on")
        }
        ServerEvent::DeadLettersRedriven { subscription, count, left, .. } => {
            format!("{count} dead letters of {subscription} were redriven; {left} are left")
        }
        ServerEvent::DeadLettersPurged { subscription, count, left, .. } => {
            format!("{count} dead letters of {subscription} were purged; {left} are left")
        }
        ServerEvent::Stalled { subscription, topic, head_of_line, waiting, .. } => format!(
            "{subscription} does not go on: message {} of {topic} is the first one since {}: {}",
            head_of_line.sequence,
            format::duration(*waiting),
            head_of_line.text,
        ),
        ServerEvent::StallEnded { subscription, topic, sequence, waited, .. } => format!(
            "{subscription} goes on after message {sequence} of {topic}, which waited for {}",
            format::duration(*waited),
        ),
        _ => "something that this version does not know".to_owned(),
    }
}

fn value(event: &TimedEvent) -> Value {
    let mut value = fields(&event.event);
    value["time"] = format::time(event.time).into();
    value["text"] = text(&event.event).into();
    value
}

fn fields(event: &ServerEvent) -> Value {
    match event {
        ServerEvent::TopicCreated { topic, epoch } => of_topic("topic_created", topic, *epoch),
        ServerEvent::TopicUpdated { topic, epoch } => of_topic("topic_updated", topic, *epoch),
        ServerEvent::TopicDeleted { topic, epoch } => of_topic("topic_deleted", topic, *epoch),
        ServerEvent::TopicPurged { topic, epoch, before, purged } => {
            let mut value = of_topic("topic_purged", topic, *epoch);
            (value["before"], value["purged"]) = ((*before).into(), (*purged).into());
            value
        }
        ServerEvent::SubscriptionCreated { subscription, epoch } => {
            of_subscription("subscription_created", subscription, *epoch)
        }
        ServerEvent::SubscriptionDeleted { subscription, epoch } => {
            of_subscription("subscription_deleted", subscription, *epoch)
        }
        ServerEvent::SubscriptionExpired { subscription, epoch } => {
            of_subscription("subscription_expired", subscription, *epoch)
        }
        ServerEvent::Consumer { subscription, consumer, presence } => {
            let kind = match presence {
                Presence::Attached => "consumer_attached",
                Presence::Standby { .. } => "consumer_standby",
                Presence::Superseded => "consumer_superseded",
                Presence::Disconnected => "consumer_disconnected",
                Presence::Left => "consumer_left",
                Presence::Lost => "consumer_lost",
                _ => "consumer_unknown",
            };
            json!({ "type": kind, "subscription": subscription, "consumer": consumer })
        }
        ServerEvent::DiskFull => json!({ "type": "disk_full" }),
        ServerEvent::DiskHasRoom => json!({ "type": "disk_has_room" }),
        ServerEvent::Missed { count } => json!({ "type": "missed", "count": count }),
        ServerEvent::Reconnected { away, restarted, cause } => json!({
            "type": "reconnected",
            "away_seconds": away.as_secs_f64(),
            "restarted": restarted,
            "cause": cause.to_string(),
        }),
        ServerEvent::Gap { .. }
        | ServerEvent::DeadLettered { .. }
        | ServerEvent::Skipped { .. }
        | ServerEvent::DeadLettersRedriven { .. }
        | ServerEvent::DeadLettersPurged { .. }
        | ServerEvent::Stalled { .. }
        | ServerEvent::StallEnded { .. }
        | _ => fields_of_messages(event),
    }
}

fn of_topic(kind: &str, topic: &str, epoch: u64) -> Value {
    json!({ "type": kind, "topic": topic, "epoch": format::epoch(epoch) })
}

fn of_subscription(kind: &str, subscription: &str, epoch: u64) -> Value {
    json!({ "type": kind, "subscription": subscription, "epoch": format::epoch(epoch) })
}

#[expect(clippy::wildcard_enum_match_arm, reason = "its caller has the others")]
fn fields_of_messages(event: &ServerEvent) -> Value {
    let named = |kind: &str, subscription: &str, topic: &str| json!({ "type": kind, "subscription": subscription, "topic": topic });
    let mut value;
    match event {
        ServerEvent::Gap { subscription, topic, first, last, reason, .. } => {
            value = named("gap", subscription, topic);
            (value["first"], value["last"]) = ((*first).into(), (*last).into());
            value["reason"] = format::gap_reason(*reason).into();
        }
        ServerEvent::DeadLettered {
            subscription, topic, count, first, dead_letter_topic, ..
        } => {
            value = named("dead_lettered", subscription, topic);
            (value["count"], value["first"]) = ((*count).into(), (*first).into());
            value["dead_letter_topic"] = dead_letter_topic.as_str().into();
        }
        ServerEvent::Skipped { subscription, topic, count, first, .. } => {
            value = named("skipped", subscription, topic);
            (value["count"], value["first"]) = ((*count).into(), (*first).into());
        }
        ServerEvent::DeadLettersRedriven { subscription, topic, count, left } => {
            value = named("dead_letters_redriven", subscription, topic);
            (value["count"], value["left"]) = ((*count).into(), (*left).into());
        }
        ServerEvent::DeadLettersPurged { subscription, topic, count, left } => {
            value = named("dead_letters_purged", subscription, topic);
            (value["count"], value["left"]) = ((*count).into(), (*left).into());
        }
        ServerEvent::Stalled { subscription, topic, head_of_line, waiting, .. } => {
            value = named("stalled", subscription, topic);
            value["head_of_line"] = format::head_of_line(head_of_line);
            value["waiting_seconds"] = waiting.as_secs_f64().into();
        }
        ServerEvent::StallEnded { subscription, topic, sequence, waited, .. } => {
            value = named("stall_ended", subscription, topic);
            value["sequence"] = (*sequence).into();
            value["waited_seconds"] = waited.as_secs_f64().into();
        }
        _ => value = json!({ "type": "unknown" }),
    }
    value
}
