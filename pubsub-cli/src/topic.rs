//! `pubsub topic`.

use pubsub_client::{Client, TopicConfig, TopicInfo};

use crate::args::{CreateTopic, Topic, TopicSettings};
use crate::failure::{Exit, Failure};
use crate::format;
use crate::output::Output;
use crate::values::Full;

pub(crate) async fn run(
    command: Topic,
    client: &Client,
    output: &mut Output,
) -> Result<Exit, Failure> {
    match command {
        Topic::Create(args) => create(args, client, output).await?,
        Topic::List => list(client, output).await?,
        Topic::Describe { name } => show(&client.admin().topic(name).await?, output)?,
        Topic::Update { name, settings } => {
            show(&client.admin().update_topic(name, config(settings)).await?, output)?;
        }
        Topic::Purge { name, before, .. } => {
            let purged = client.admin().purge_topic(&name, before).await?;
            if output.is_json() {
                let done = serde_json::json!({ "type": "purged", "topic": name, "purged": purged });
                output.json(&done)?;
            } else {
                output.line(&format!("purged {purged} messages of topic {name}"))?;
            }
        }
        Topic::Delete { name } => {
            client.admin().delete_topic(&name).await?;
            let done = serde_json::json!({ "type": "deleted", "topic": name });
            if output.is_json() {
                output.json(&done)?;
            } else {
                output.line(&format!("deleted topic {name}"))?;
            }
        }
    }
    Ok(Exit::Ok)
}

fn config(settings: TopicSettings) -> TopicConfig {
    let mut config = TopicConfig::new();
    config.retention = settings.retention;
    config.max_age_unacked = settings.max_age_unacked;
    config.max_bytes = settings.max_bytes.map(|bytes| bytes.0);
    config.when_full = settings.when_full.map(Full::when_full);
    config.max_message_bytes = settings.max_message_bytes.map(|bytes| bytes.0);
    config.idempotency_window = settings.idempotency_window;
    config
}

async fn create(args: CreateTopic, client: &Client, output: &mut Output) -> Result<(), Failure> {
    let config = config(args.settings);
    let admin = client.admin();
    let (topic, created) = if args.if_not_exists {
        admin.ensure_topic(args.name, config).await?
    } else {
        (admin.create_topic(args.name, config).await?, true)
    };
    if output.is_json() {
        let mut value = format::topic(&topic);
        value["created"] = created.into();
        output.json(&value)?;
    } else {
        let done = if created { "created topic" } else { "exists already: topic" };
        output.line(&format!("{done} {}", topic.name))?;
    }
    Ok(())
}

async fn list(client: &Client, output: &mut Output) -> Result<(), Failure> {
    let admin = client.admin();
    let mut rows = Vec::new();
    let mut after = None;
    loop {
        let page = admin.topics(after).await?;
        for topic in page.items {
            if output.is_json() {
                output.json(&format::topic(&topic))?;
                continue;
            }
            rows.push([
                topic.name,
                (topic.head + 1).saturating_sub(topic.first).to_string(),
                topic.head.to_string(),
                format::bytes(topic.stored_bytes),
                topic.subscriptions.len().to_string(),
            ]);
        }
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    if rows.is_empty() && !output.is_json() {
        eprintln!("pubsub: there is no topic yet; create one with `pubsub topic create NAME`");
        return Ok(());
    }
    if !output.is_json() {
        output.table(["TOPIC", "STORED", "LAST", "SIZE", "SUBSCRIPTIONS"], &rows)?;
    }
    Ok(())
}

fn show(topic: &TopicInfo, output: &mut Output) -> Result<(), Failure> {
    let none = || "-".to_owned();
    let stored = match topic.first {
        first if first > topic.head => none(),
        first => format!("{first} to {} ({})", topic.head, format::bytes(topic.stored_bytes)),
    };
    let subscriptions = match topic.subscriptions.as_slice() {
        [] => none(),
        names => names.join(", "),
    };
    let config = &topic.config;
    output.fields(
        &format::topic(topic),
        &[
            ("name", topic.name.clone()),
            ("epoch", format!("{:x}", topic.epoch)),
            ("created", format::time(topic.create_time)),
            ("messages", stored),
            ("subscriptions", subscriptions),
            ("retention", config.retention.map_or_else(none, format::duration)),
            ("max age unacked", config.max_age_unacked.map_or_else(none, format::duration)),
            ("when full", format::when_full(config.when_full).to_owned()),
            ("max bytes", config.max_bytes.map_or_else(none, format::bytes)),
            ("max message bytes", config.max_message_bytes.map_or_else(none, format::bytes)),
            ("idempotency window", config.idempotency_window.map_or_else(none, format::duration)),
        ],
    )?;
    Ok(())
}
