//! `pubsub subscription`.

use std::time::Duration;

use pubsub_client::{ActiveConsumer, Client, SubscriptionInfo, SubscriptionPosition};
use serde_json::json;

use crate::args::{CreateSubscription, Seek, Subscription};
use crate::failure::{Exit, Failure};
use crate::format;
use crate::output::Output;

pub(crate) async fn run(
    command: Subscription,
    client: &Client,
    output: &mut Output,
) -> Result<Exit, Failure> {
    match command {
        Subscription::Create(args) => create(args, client, output).await?,
        Subscription::List => list(client, output).await?,
        Subscription::Describe { name } => {
            show(&client.admin().subscription(name).await?, output)?;
        }
        Subscription::Delete { name } => {
            client.admin().delete_subscription(&name).await?;
            if output.is_json() {
                output.json(&json!({ "type": "deleted", "subscription": name }))?;
            } else {
                output.line(&format!("deleted subscription {name}"))?;
            }
        }
        Subscription::Update(args) => {
            let mut change = pubsub_client::UpdateSubscription::new().with_start(args.from.start());
            change.add_topics = args.add;
            change.remove_topics = args.remove;
            show(&client.admin().update_subscription(args.name, change).await?, output)?;
        }
        Subscription::Seek(args) => seek(args, client, output).await?,
    }
    Ok(Exit::Ok)
}

async fn create(
    args: CreateSubscription,
    client: &Client,
    output: &mut Output,
) -> Result<(), Failure> {
    let mut settings = pubsub_client::CreateSubscription::to(args.topics)
        .with_start(args.from.start())
        .with_kind(args.kind.kind());
    settings.on_failure = args.failures.policy()?;
    settings.ack_timeout = args.failures.ack_timeout;
    settings.expires_after = args.expires_after;
    settings.filter = args.filter;
    let settings = if args.if_not_exists { settings.if_not_exists() } else { settings };
    let (subscription, created) = client.admin().create_subscription(args.name, settings).await?;
    if output.is_json() {
        let mut value = format::subscription(&subscription);
        value["created"] = created.into();
        output.json(&value)?;
    } else {
        let done = if created { "created subscription" } else { "exists already: subscription" };
        output.line(&format!(
            "{done} {} to {}",
            subscription.name,
            subscription.topics.join(", ")
        ))?;
    }
    Ok(())
}

async fn list(client: &Client, output: &mut Output) -> Result<(), Failure> {
    let admin = client.admin();
    let mut rows = Vec::new();
    let mut after = None;
    loop {
        let page = admin.subscriptions(after).await?;
        for subscription in page.items {
            if output.is_json() {
                output.json(&format::subscription(&subscription))?;
                continue;
            }
            rows.push([
                subscription.name.clone(),
                format::kind(subscription.kind).to_owned(),
                subscription.topics.join(","),
                subscription.positions.iter().map(|at| at.backlog).sum::<u64>().to_string(),
                age(subscription.positions.iter().filter_map(|at| at.oldest_unacked_age).max()),
                consumers(&subscription),
            ]);
        }
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    if output.is_json() {
        return Ok(());
    }
    if rows.is_empty() {
        eprintln!(
            "pubsub: there is no subscription yet; create one with \
             `pubsub subscription create NAME TOPIC`"
        );
        return Ok(());
    }
    output.table(["SUBSCRIPTION", "KIND", "TOPICS", "BACKLOG", "OLDEST", "CONSUMERS"], &rows)?;
    Ok(())
}

fn consumers(subscription: &SubscriptionInfo) -> String {
    let one = |consumer: &ActiveConsumer| match consumer.connected {
        true => consumer.id.clone(),
        false => format!("{} (lost, awaited)", consumer.id),
    };
    let all: Vec<_> = subscription.active_consumers.iter().map(one).collect();
    if all.is_empty() { "-".to_owned() } else { all.join(", ") }
}

async fn seek(args: Seek, client: &Client, output: &mut Output) -> Result<(), Failure> {
    let admin = client.admin();
    let subscription = match (args.to, args.snapshot) {
        (_, Some(snapshot)) => admin.seek_to_snapshot(args.name, snapshot).await?,
        (Some(to), None) => admin.seek(args.name, args.topic.as_deref(), to.start()).await?,
        (None, None) => return Err(Failure::usage("say where to, with --to or --snapshot")),
    };
    show(&subscription, output)
}

fn dead_letters(subscription: &SubscriptionInfo) -> String {
    match subscription.dead_letters {
        0 => "-".to_owned(),
        count => format!("{count} wait; see `pubsub dlq list {}`", subscription.name),
    }
}

fn age(age: Option<Duration>) -> String {
    age.map_or_else(|| "-".to_owned(), format::duration)
}

/// What holds the topic up, or else what its first message waits for.
fn why(at: &SubscriptionPosition) -> String {
    let first = at.head_of_line.as_ref().map(|head| head.text.clone());
    at.waits_for.clone().or(first).unwrap_or_default()
}

fn show(subscription: &SubscriptionInfo, output: &mut Output) -> Result<(), Failure> {
    let standby = match subscription.standby_consumers.as_slice() {
        [] => "-".to_owned(),
        names => names.join(", "),
    };
    output.fields(
        &format::subscription(subscription),
        &[
            ("name", subscription.name.clone()),
            ("epoch", format!("{:x}", subscription.epoch)),
            ("kind", format::kind(subscription.kind).to_owned()),
            ("topics", subscription.topics.join(", ")),
            ("filter", subscription.filter.clone().unwrap_or_else(|| "-".to_owned())),
            ("created", format::time(subscription.create_time)),
            ("on failure", format::policy(&subscription.on_failure)),
            ("ack timeout", subscription.ack_timeout.map_or("-".to_owned(), format::duration)),
            ("expires after", subscription.expires_after.map_or("-".to_owned(), format::duration)),
            ("dead letters", dead_letters(subscription)),
            ("consumers", consumers(subscription)),
            ("standing by", standby),
        ],
    )?;
    if output.is_json() || subscription.positions.is_empty() {
        return Ok(());
    }
    let rows: Vec<_> = subscription
        .positions
        .iter()
        .map(|at| {
            [
                at.topic.clone(),
                at.floor.to_string(),
                at.head.to_string(),
                at.backlog.to_string(),
                at.outstanding.to_string(),
                at.redelivered.to_string(),
                at.oldest_unacked.map_or_else(|| "-".to_owned(), |first| first.to_string()),
                age(at.oldest_unacked_age),
                why(at),
            ]
        })
        .collect();
    output.line("")?;
    let headings = [
        "TOPIC",
        "FLOOR",
        "LAST",
        "BACKLOG",
        "OUT",
        "FAILED",
        "OLDEST UNACKED",
        "AGE",
        "WAITS FOR",
    ];
    output.table(headings, &rows)?;
    Ok(())
}
