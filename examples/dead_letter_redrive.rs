//! Jobs that cannot be done are set aside after a few attempts, with the reason; when the cause is
//! mended they are sent back, to the subscription that could not do them and to no other.
//!
//! ```text
//! cargo run --release --example dead_letter_redrive
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use pubsub_client::{
    Client, CreateSubscription, DeadLetters, Drain, FailurePolicy, ReceivedMessage,
    SubscriptionKind, TopicConfig,
};
use pubsub_server::{Config, Server};
use tokio::task::JoinSet;
use tokio::time::sleep;

const MAILS: u32 = 20;

#[tokio::main]
async fn main() -> Result<()> {
    let server = Server::start(Config::in_memory()).await?;
    let client = Client::connect(server.url()).await?;
    let admin = client.admin();
    for topic in ["mails", "mails-dead"] {
        admin.create_topic(topic, TopicConfig::new()).await?;
    }
    let settings = CreateSubscription::to(["mails"])
        .with_kind(SubscriptionKind::Shared)
        .with_on_failure(FailurePolicy::dead_letter("mails-dead").after(2));
    admin.create_subscription("sender", settings).await?;

    let (mended, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
    let send = {
        let (mended, sent) = (Arc::clone(&mended), Arc::clone(&sent));
        move |mail: ReceivedMessage| send(mail, Arc::clone(&mended), Arc::clone(&sent))
    };
    let subscriber = client.subscriber("sender").open().await?;
    let (stopper, mut sender) = (subscriber.stopper(), JoinSet::new());
    sender.spawn(subscriber.run(8, send));

    let publisher = client.publisher("mails").open().await?;
    for number in 0..MAILS {
        publisher
            .publish(format!("user{number}@{}", if number % 4 == 0 { "b" } else { "a" }))
            .await?;
    }
    // Two attempts with a backoff of a second between them.
    while admin.subscription("sender").await?.dead_letters < u64::from(MAILS / 4) {
        sleep(Duration::from_millis(100)).await;
    }
    let letters = admin.dead_letters("sender", None).await?.items;
    println!("{} mails are sent, {} set aside:", sent.load(Ordering::Relaxed), letters.len());
    for letter in letters.iter().take(2) {
        println!("  {} after {} attempts: {}", letter.origin, letter.attempts, letter.reason);
    }

    mended.store(true, Ordering::Relaxed);
    let first = admin.redrive("sender", DeadLetters::Oldest(1000)).await?;
    let second = admin.redrive("sender", DeadLetters::Oldest(1000)).await?;
    println!("redriven: {}, and asked again: {}", first.redriven, second.redriven);
    while sent.load(Ordering::Relaxed) < MAILS {
        sleep(Duration::from_millis(50)).await;
    }
    stopper.stop(Drain::Finish, Duration::from_secs(5)).await;
    let left = admin.subscription("sender").await?.dead_letters;
    println!("{} mails are sent, {left} dead letters are left", sent.load(Ordering::Relaxed));
    ensure!(sent.load(Ordering::Relaxed) == MAILS && left == 0 && second.redriven == 0);
    Ok(server.stop().await?)
}

async fn send(
    mail: ReceivedMessage,
    mended: Arc<AtomicBool>,
    sent: Arc<AtomicU32>,
) -> Result<(), String> {
    if mail.payload.ends_with(b"@b") && !mended.load(Ordering::Relaxed) {
        return Err("host b does not answer".to_owned());
    }
    sent.fetch_add(1, Ordering::Relaxed);
    Ok(())
}
