//! Order where it matters: three workers share the movements of many accounts, and those of one
//! account are handled one after the other, in order, also when one of them has to be tried again.
//!
//! ```text
//! cargo run --release --example ordered_by_key
//! ```

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use pubsub_client::{Client, Drain, Message, ReceivedMessage, SubscriptionKind, TopicConfig};
use pubsub_server::{Config, Server};
use tokio::task::JoinSet;

const ACCOUNTS: u64 = 50;
const MOVEMENTS: u64 = 40;

/// The number of the last movement of each account, and how many had to be tried again.
#[derive(Default)]
struct Book {
    accounts: BTreeMap<String, u64>,
    retried: u32,
}

#[tokio::main]
async fn main() -> Result<()> {
    let server = Server::start(Config::in_memory()).await?;
    let client = Client::connect(server.url()).await?;
    client.admin().create_topic("movements", TopicConfig::new()).await?;

    let book: Arc<Mutex<Book>> = Arc::default();
    let (mut workers, mut stoppers) = (JoinSet::new(), Vec::new());
    for _ in 0..3 {
        let subscriber = client.subscriber("accounting").topic("movements");
        let subscriber = subscriber.kind(SubscriptionKind::KeyOrdered).open().await?;
        stoppers.push(subscriber.stopper());
        let book = Arc::clone(&book);
        // Up to eight accounts at once in each worker.
        workers.spawn(subscriber.run(8, move |movement| enter(movement, Arc::clone(&book))));
    }

    let publisher = client.publisher("movements").open().await?;
    for number in 1..=MOVEMENTS {
        for account in 0..ACCOUNTS {
            let movement = Message::new(number.to_string());
            let movement = movement.with_ordering_key(format!("account-{account}"));
            drop(publisher.enqueue(movement).await?);
        }
    }
    publisher.flush().await?;

    let entered = |book: &Book| book.accounts.values().sum::<u64>();
    while entered(&book.lock().unwrap_or_else(PoisonError::into_inner)) < ACCOUNTS * MOVEMENTS {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    for stopper in stoppers {
        stopper.stop(Drain::Finish, Duration::from_secs(5)).await;
    }
    let retried = book.lock().unwrap_or_else(PoisonError::into_inner).retried;
    println!("{ACCOUNTS} accounts are in order; {retried} movements were tried again");
    server.stop().await?;
    Ok(())
}

async fn enter(movement: ReceivedMessage, book: Arc<Mutex<Book>>) -> Result<(), String> {
    let number: u64 =
        String::from_utf8_lossy(&movement.payload).parse().map_err(|_| "no number")?;
    let account = movement.ordering_key.clone().unwrap_or_default();
    let mut book = book.lock().unwrap_or_else(PoisonError::into_inner);
    let last = book.accounts.get(&account).copied().unwrap_or(0);
    assert_eq!(number, last + 1, "{account} comes in its order");
    if movement.id.sequence.is_multiple_of(200) && movement.attempt == 1 {
        book.retried += 1;
        return Err("not now".to_owned());
    }
    book.accounts.insert(account, number);
    Ok(())
}
