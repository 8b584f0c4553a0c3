//! Processing that does not repeat, by consumers that are killed.

use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    io::Write as _,
    path::Path,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use pubsub_client::{FileInbox, ReceivedMessage};
use pubsub_tests::{
    admin,
    lab::{Rig, scenario},
    proxy::{Direction, Mode},
    raw, wait,
};
use redb::{Database, ReadableDatabase as _, ReadableTable as _, TableDefinition};

use crate::{
    app::{self, SOON},
    child::{self, Program},
};

const WITHIN: Duration = Duration::from_secs(120);
const TOPIC: &str = "orders";
const SUBSCRIPTION: &str = "billing";

/// How often each message took effect, and which ones did, in the database of an application.
const EFFECTS: TableDefinition<'_, u64, u64> = TableDefinition::new("effects");
const INBOX: TableDefinition<'_, &str, ()> = TableDefinition::new("inbox");

/// Processes with an inbox file; an effect is a line in another file.
#[test]
#[ignore = "a program that scenarios start and kill"]
fn a_program_that_remembers() {
    child::run(async {
        let inbox = child::variable("INBOX_FILE");
        let inbox = wait::until_ok("the file", SOON, async || Ok(FileInbox::open(&inbox).await?));
        let inbox = inbox.await?;
        let client = app::client(&child::variable("INBOX_URL"))?;
        let subscriber = app::subscribe(&client, SUBSCRIPTION, TOPIC).await?;
        let path = child::variable("INBOX_EFFECTS");
        let effects = Arc::new(OpenOptions::new().create(true).append(true).open(path)?);
        let handler = move |message: ReceivedMessage| {
            let effects = Arc::clone(&effects);
            async move {
                let sequence = message.id.sequence;
                (&*effects).write_all(format!("{sequence}\n").as_bytes())?;
                eprintln!("handled {sequence}");
                Ok::<_, std::io::Error>(())
            }
        };
        Ok(subscriber.run_once(inbox, 4, handler).await?)
    });
}

/// Processes with the inbox in the transaction of the effect.
#[test]
#[ignore = "a program that scenarios start and kill"]
fn a_program_with_a_database() {
    child::run(async {
        let path = child::variable("INBOX_EFFECTS");
        let database = async || Ok(Database::create(&path)?);
        let database = Arc::new(wait::until_ok("the database", SOON, database).await?);
        let client = app::client(&child::variable("INBOX_URL"))?;
        let subscriber = app::subscribe(&client, SUBSCRIPTION, TOPIC).await?;
        let handler = move |message| {
            let database = Arc::clone(&database);
            async move {
                apply(&database, &message).map_err(|error| format!("{error:#}"))?;
                eprintln!("handled {}", message.id.sequence);
                Ok::<_, String>(())
            }
        };
        Ok(subscriber.run(4, handler).await?)
    });
}

fn apply(database: &Database, message: &ReceivedMessage) -> Result<()> {
    let transaction = database.begin_write()?;
    let new = transaction.open_table(INBOX)?.insert(&*message.id.to_string(), ())?.is_none();
    if new {
        let mut effects = transaction.open_table(EFFECTS)?;
        let times = effects.get(message.id.sequence)?.map_or(0, |times| times.value());
        effects.insert(message.id.sequence, times + 1)?;
    }
    Ok(transaction.commit()?)
}

fn start(test: &str, url: &str, inbox: &Path, effects: &Path) -> Result<Program> {
    let variables = [
        ("INBOX_URL", url),
        ("INBOX_FILE", inbox.to_str().context("a path that is text")?),
        ("INBOX_EFFECTS", effects.to_str().context("a path that is text")?),
    ];
    Program::start(test, &variables)
}

/// A topic with these messages, and a subscription from the first of them on.
async fn publish(rig: &Rig, count: u64) -> Result<()> {
    let channel = raw::connect(&rig.server.url()).await?;
    admin::create_topic(&channel, TOPIC).await?;
    admin::create_subscription(&channel, SUBSCRIPTION, &[TOPIC]).await?;
    let client = app::client(&rig.server.url())?;
    let publisher = app::publisher(&client, TOPIC).await?;
    app::publish_numbers(&publisher, 1..=count).await?;
    drop(publisher);
    app::shutdown(client).await
}

/// How often each message took effect.
fn effects(file: &Path) -> Result<BTreeMap<u64, u64>> {
    let mut effects = BTreeMap::new();
    for line in fs::read_to_string(file)?.lines() {
        *effects.entry(line.parse()?).or_default() += 1;
    }
    Ok(effects)
}

#[test]
fn messages_that_come_again_after_a_crash_are_acked_without_their_handler() {
    const COUNT: u64 = 200;
    scenario(WITHIN, async |lab| {
        let rig = lab.rig().await?;
        publish(&rig, COUNT).await?;
        let (inbox, file) = (lab.path("inbox"), lab.path("effects"));
        let program = "inbox::a_program_that_remembers";
        let mut consumer = start(program, &rig.url(), &inbox, &file)?;
        consumer.says("handled 1").await?;
        // No ack arrives any more.
        rig.proxy.set(Direction::Up, Mode::Discard);
        consumer.says(&format!("handled {COUNT}")).await?;
        consumer.kill().await?;
        rig.proxy.set_both(Mode::Pass);
        let channel = raw::connect(&rig.server.url()).await?;
        let floor = admin::subscription(&channel, SUBSCRIPTION).await?.positions[0].floor;
        ensure!(floor < COUNT, "the acks of all have arrived: nothing comes again");

        let again = start(program, &rig.url(), &inbox, &file)?;
        app::all_acked(&channel, SUBSCRIPTION).await?;
        again.kill().await?;
        for (sequence, times) in effects(&file)? {
            // Each was recorded before the next one was handled; the last may not have been.
            ensure!(
                times == 1 || sequence == COUNT,
                "message {sequence} was handled {times} times"
            );
        }
        Ok(())
    });
}

#[test]
fn a_consumer_killed_at_random_repeats_at_most_what_it_was_at() {
    const COUNT: u64 = 600;
    const ROUNDS: u64 = 6;
    scenario(WITHIN, async |lab| {
        let rig = lab.rig().await?;
        publish(&rig, COUNT).await?;
        let (inbox, file) = (lab.path("inbox"), lab.path("effects"));
        let program = "inbox::a_program_that_remembers";
        for _ in 0..ROUNDS {
            let consumer = start(program, &rig.url(), &inbox, &file)?;
            consumer.kill_after(lab.rng.between(1, 99)).await?;
        }
        let channel = raw::connect(&rig.server.url()).await?;
        let last = start(program, &rig.url(), &inbox, &file)?;
        app::all_acked(&channel, SUBSCRIPTION).await?;
        last.kill().await?;
        let effects = effects(&file)?;
        ensure!(effects.keys().copied().eq(1..=COUNT), "not all took effect: {effects:?}");
        let repeated: u64 = effects.values().map(|times| times - 1).sum();
        ensure!(repeated <= ROUNDS, "{repeated} effects were repeated by {ROUNDS} kills");
        Ok(())
    });
}

#[test]
fn an_id_in_the_transaction_of_the_effect_makes_it_happen_once() {
    const COUNT: u64 = 600;
    const ROUNDS: u64 = 6;
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        publish(&rig, COUNT).await?;
        let (inbox, file) = (lab.path("unused"), lab.path("database"));
        let program = "inbox::a_program_with_a_database";
        for _ in 0..ROUNDS {
            let consumer = start(program, &rig.url(), &inbox, &file)?;
            consumer.kill_after(lab.rng.between(1, 99)).await?;
            if lab.rng.one_in(3) {
                rig.crash().await?;
            }
        }
        let channel = raw::connect(&rig.server.url()).await?;
        let last = start(program, &rig.url(), &inbox, &file)?;
        app::all_acked(&channel, SUBSCRIPTION).await?;
        last.kill().await?;
        let database = async || Ok(Database::open(&file)?);
        let database = wait::until_ok("the database", SOON, database).await?;
        let table = database.begin_read()?.open_table(EFFECTS)?;
        let mut effects = BTreeMap::new();
        for entry in table.iter()? {
            let (sequence, times) = entry?;
            effects.insert(sequence.value(), times.value());
        }
        let once: BTreeMap<_, _> = (1..=COUNT).map(|sequence| (sequence, 1)).collect();
        ensure!(effects == once, "{effects:?}");
        Ok(())
    });
}
