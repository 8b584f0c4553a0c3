//! What outlives a process, a store, and a thousand connections.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use pubsub_client::{Message, Outcome, PublishErrorKind, Publisher, Reason, RetryPolicy};
use pubsub_tests::{
    admin, auditor, files,
    lab::{Lab, Rig, scenario},
    proxy::{Cut, Direction, Mode},
    raw,
    usage::Usage,
    wait,
};
use tokio::runtime::Handle;

use crate::app::{self, SOON};

const WITHIN: Duration = Duration::from_secs(150);
const TOPIC: &str = "orders";

#[test]
fn a_key_reused_after_a_restart_of_the_application_is_stored_once() {
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        admin::create_topic(&raw::connect(&rig.url()).await?, TOPIC).await?;
        let order = || Message::new("order").with_idempotency_key("order-4711");
        let first =
            app::publisher(&app::client(&rig.url())?, TOPIC).await?.publish(order()).await?;
        ensure!(!first.duplicate, "{first:?}");
        for crash in [false, true] {
            if crash {
                rig.crash().await?;
            }
            // A new client knows nothing of the first one.
            let publisher = app::publisher(&app::client(&rig.url())?, TOPIC).await?;
            let again = publisher.publish(order()).await?;
            ensure!(again.duplicate && again.id == first.id, "{again:?}");
            let other = publisher.publish(Message::new("x").with_idempotency_key("order-4711"));
            let conflict = other.await.err().context("a key with other content is accepted")?;
            let reason = conflict.reason();
            ensure!(reason == Some(Reason::IdempotencyKeyReused), "{conflict}");
            ensure!(conflict.outcome() == Outcome::NotPersisted, "{conflict}");
        }
        let audit = auditor::read(&raw::connect(&rig.url()).await?, TOPIC).await?;
        ensure!(audit.messages.len() == 1, "{} messages", audit.messages.len());
        Ok(())
    });
}

#[test]
fn a_refused_message_harms_neither_its_neighbours_nor_its_publisher() {
    scenario(WITHIN, async |lab| {
        let rig = lab.rig().await?;
        let direct = raw::connect(&rig.server.url()).await?;
        admin::create_topic(&direct, TOPIC).await?;
        let client = app::client(&rig.url())?;
        let publisher = app::publisher(&client, TOPIC).await?;
        publisher.publish(Message::new("1").with_idempotency_key("k")).await?;
        // The middle one is refused, and the answers are lost.
        rig.proxy.set(Direction::Down, Mode::Discard);
        let before = publisher.enqueue(Message::new("2")).await?;
        let refused = publisher.enqueue(Message::new("x").with_idempotency_key("k")).await?;
        let after = publisher.enqueue(Message::new("3")).await?;
        wait::until_ok("the commit", SOON, async || {
            let head = admin::topic(&direct, TOPIC).await?.head;
            ensure!(head == 3, "the head is {head}");
            Ok(())
        })
        .await?;
        rig.proxy.cut_all(Cut::Reset);
        rig.proxy.set(Direction::Down, Mode::Pass);

        let before = wait::soon("a receipt", SOON, before).await??;
        let after = wait::soon("a receipt", SOON, after).await??;
        ensure!((before.id.sequence, after.id.sequence) == (2, 3), "{before:?} {after:?}");
        let refused = wait::soon("an answer", SOON, refused).await?;
        let refused = refused.err().context("a key with other content is accepted")?;
        ensure!(refused.reason() == Some(Reason::IdempotencyKeyReused), "{refused}");
        app::publish_numbers(&publisher, [4]).await?;
        Ok(())
    });
}

#[test]
fn a_restored_older_store_is_told_to_publishers_and_survived_by_subscribers() {
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        let copy = lab.path("copy");
        admin::create_topic(&raw::connect(&rig.url()).await?, TOPIC).await?;
        let client = app::client(&rig.url())?;
        let publisher = app::publisher(&client, TOPIC).await?;
        let mut subscriber = app::subscribe(&client, "billing", TOPIC).await?;
        app::publish_numbers(&publisher, 1..=3).await?;
        app::confirm(app::next_many(&mut subscriber, 3).await?).await?;
        stop(&mut rig).await?;
        files::copy(rig.server.data(), &copy)?;
        rig.revive().await?;

        // A boot that the copy does not know, and messages that it will number again.
        app::publish_numbers(&publisher, 4..=6).await?;
        app::confirm(app::next_many(&mut subscriber, 3).await?).await?;
        rig.proxy.set(Direction::Down, Mode::Discard);
        let sent = publisher.enqueue(Message::new("sent")).await?;
        let direct = raw::connect(&rig.server.url()).await?;
        wait::until_ok("the commit", SOON, async || {
            ensure!(admin::topic(&direct, TOPIC).await?.head == 7);
            Ok(())
        })
        .await?;
        rig.server.kill().await?;
        rig.proxy.set(Direction::Down, Mode::Pass);
        restore(lab, &mut rig, &copy).await?;

        let fate = wait::soon("the fate of what was sent", SOON, sent).await?;
        let Err(error) = fate else {
            bail!("it was sent to another store: {fate:?}");
        };
        ensure!(matches!(error.kind(), PublishErrorKind::Diverged), "{error}");
        ensure!(error.outcome() == Outcome::Unknown, "{error}");
        // Sequences 4 and 5 exist once more, with other content, and are shown.
        let fresh = app::publisher(&client, TOPIC).await?;
        app::publish_numbers(&fresh, [40, 50]).await?;
        let shown = app::next_many(&mut subscriber, 2).await?;
        ensure!(app::sequences(&shown) == [4, 5], "{shown:?}");
        ensure!(shown[0].payload == "40" && shown[1].payload == "50", "{shown:?}");
        app::confirm(shown).await
    });
}

pub(crate) async fn stop(rig: &mut Rig) -> Result<()> {
    rig.server.begin_stop()?;
    rig.server.exited(SOON).await?;
    Ok(())
}

/// Starts the copy ten times, as an operator who tries things out, and lets clients have the last.
pub(crate) async fn restore(lab: &Lab, rig: &mut Rig, copy: &std::path::Path) -> Result<()> {
    for _ in 0..10 {
        let mut server = lab.server_on(copy).await?;
        server.begin_stop()?;
        server.exited(SOON).await?;
    }
    rig.server = lab.server_on(copy).await?;
    rig.proxy.retarget(rig.server.address());
    Ok(())
}

/// What can grow from one connection to the next.
#[derive(Clone, Copy, Debug)]
struct Size {
    server: Usage,
    tasks: usize,
    connections: u64,
}

impl Size {
    fn of(rig: &Rig) -> Result<Self> {
        Ok(Self {
            server: rig.server.usage()?,
            tasks: Handle::current().metrics().num_alive_tasks(),
            connections: rig.proxy.open(),
        })
    }

    fn has_grown_since(&self, before: &Self) -> bool {
        // A few of each may be just beginning or ending, and an allocator keeps some memory.
        self.server.descriptors > before.server.descriptors + 8
            || self.server.threads > before.server.threads + 4
            || self.server.resident_kib > before.server.resident_kib + (24 << 10)
            || self.tasks > before.tasks + 12
            || self.connections > before.connections + 4
    }
}

#[test]
fn a_thousand_reconnects_leave_nothing_behind() {
    const WARM_UP: u64 = 100;
    const CYCLES: u64 = 1000;
    scenario(WITHIN, async |lab| {
        let rig = lab.rig().await?;
        admin::create_topic(&raw::connect(&rig.server.url()).await?, TOPIC).await?;
        let retry = RetryPolicy::new(Duration::from_millis(1), Duration::from_millis(20));
        let client =
            pubsub_client::Client::builder(rig.url()).fast().retry(retry).connect_lazy()?;
        let publisher = app::publisher(&client, TOPIC).await?;
        let mut subscriber = app::subscribe(&client, "billing", TOPIC).await?;
        let mut before = None;
        for cycle in 1..=WARM_UP + CYCLES {
            one_message(&publisher, &mut subscriber, cycle)
                .await
                .with_context(|| format!("cycle {cycle}"))?;
            let cut = if cycle % 2 == 0 { Cut::Reset } else { Cut::Finish };
            ensure!(rig.proxy.cut_all(cut) >= 2, "cycle {cycle}: not connected");
            if cycle == WARM_UP {
                before = Some(Size::of(&rig)?);
            }
        }
        one_message(&publisher, &mut subscriber, WARM_UP + CYCLES + 1).await?;
        let before = before.context("no warm-up")?;
        ensure!(rig.proxy.cuts() >= 2 * CYCLES, "the run is void");
        wait::until_ok("what it was before", SOON, async || {
            let after = Size::of(&rig)?;
            ensure!(!after.has_grown_since(&before), "{before:?} has grown to {after:?}");
            eprintln!("{before:?} and {after:?}");
            Ok(())
        })
        .await
    });
}

async fn one_message(
    publisher: &Publisher,
    subscriber: &mut pubsub_client::Subscriber,
    number: u64,
) -> Result<()> {
    app::publish_numbers(publisher, [number]).await?;
    let delivery = app::next(subscriber).await?;
    ensure!(delivery.id.sequence == number, "{} for {number}", delivery.id);
    app::confirm(vec![delivery]).await
}
