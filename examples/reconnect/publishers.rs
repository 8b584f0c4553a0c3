//! One publisher for each topic, at a steady pace: faults or not, so much is published.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use pubsub_client::{Client, Message, PublishTicket, Publisher, StateWatch};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{interval, timeout};

use crate::tally::Tally;
use crate::{MESSAGES, TOPICS};

const PACE: Duration = Duration::from_millis(20);
/// Messages of one topic for each beat: 1,350 in a second in all.
const AT_ONCE: u64 = 9;

/// The publishers at work.
#[derive(Debug)]
pub(crate) struct Publishers {
    states: Vec<StateWatch>,
    tasks: JoinSet<Result<(usize, Vec<Stored>)>>,
}

/// What the publisher was told of a message.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stored {
    pub(crate) sequence: u64,
    pub(crate) duplicate: bool,
}

/// What was published to each topic, in the order of the calls.
pub(crate) type Published = [Vec<Stored>; TOPICS.len()];

impl Publishers {
    pub(crate) async fn start(client: &Client, tally: &Arc<Tally>) -> Result<Self> {
        let (mut states, mut tasks) = (Vec::new(), JoinSet::new());
        for (number, topic) in TOPICS.into_iter().enumerate() {
            let publisher = client.publisher(topic).open().await?;
            states.push(publisher.state());
            let tally = Arc::clone(tally);
            tasks.spawn(async move {
                let result = publish(publisher, &tally).await;
                tally.told(topic, result).map(|receipts| (number, receipts))
            });
        }
        Ok(Self { states, tasks })
    }

    pub(crate) fn states(&self) -> &[StateWatch] {
        &self.states
    }

    /// Waits until everything is published and answered.
    pub(crate) async fn finish(self, within: Duration) -> Result<Published> {
        timeout(within, self.join()).await.context("publishes are left without an answer")?
    }

    async fn join(mut self) -> Result<Published> {
        let mut published = Published::default();
        while let Some(task) = self.tasks.join_next().await {
            let (number, receipts) = task??;
            published[number] = receipts;
        }
        Ok(published)
    }
}

async fn publish(publisher: Publisher, tally: &Tally) -> Result<Vec<Stored>> {
    let share = MESSAGES / TOPICS.len() as u64;
    let (tickets, queue) = mpsc::channel(10_000);
    let enqueue = async {
        let mut beat = interval(PACE);
        for number in 0..share {
            if number % AT_ONCE == 0 {
                beat.tick().await;
            }
            let ticket = publisher.enqueue(message(number)).await.context("enqueue")?;
            tally.enqueued.add();
            tally.changed();
            tickets.send(ticket).await.context("the receipts are not collected")?;
        }
        drop(tickets);
        Ok(())
    };
    let (_, receipts) = tokio::try_join!(enqueue, collect(queue, tally))?;
    Ok(receipts)
}

async fn collect(mut queue: mpsc::Receiver<PublishTicket>, tally: &Tally) -> Result<Vec<Stored>> {
    let mut receipts = Vec::new();
    while let Some(ticket) = queue.recv().await {
        let receipt = ticket.await.context("a publish failed")?;
        receipts.push(Stored { sequence: receipt.id.sequence, duplicate: receipt.duplicate });
        tally.answered.add();
        tally.changed();
    }
    Ok(receipts)
}

/// A message that says which one it is: the number of the call, and some weight.
fn message(number: u64) -> Message {
    Message::new(format!("{number:>128}"))
}

/// The number of the call that published this payload.
pub(crate) fn number(payload: &[u8]) -> Result<u64> {
    Ok(std::str::from_utf8(payload)?.trim_start().parse()?)
}
