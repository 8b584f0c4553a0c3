//! The consumer: one subscription to all topics. Each message is held for a while, as by
//! handlers that take their time, and then acked.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use pubsub_client::{Acker, Drain, Event, ReceivedMessage, Stopper, Subscriber};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::publishers;
use crate::tally::Tally;
use crate::{MESSAGES, TOPICS};

/// A message as the application saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) sequence: u64,
    /// Which of the publisher's calls it comes from.
    pub(crate) number: u64,
}

/// What was shown, in the order of the showing.
#[derive(Debug, Default)]
pub(crate) struct Shown {
    pub(crate) topics: [Vec<Seen>; TOPICS.len()],
    /// The longest time between two messages.
    pub(crate) longest_silence: Duration,
}

/// The consumer at work.
#[derive(Debug)]
pub(crate) struct Consumer {
    tally: Arc<Tally>,
    stopper: Stopper,
    task: JoinSet<Result<Shown>>,
}

impl Consumer {
    pub(crate) fn start(subscriber: Subscriber, tally: &Arc<Tally>) -> Self {
        let stopper = subscriber.stopper();
        let mut task = JoinSet::new();
        let consumer_tally = Arc::clone(tally);
        task.spawn(async move {
            let result = consume(subscriber, &consumer_tally).await;
            consumer_tally.told("the subscriber", result)
        });
        Self { tally: Arc::clone(tally), stopper, task }
    }

    /// Waits until everything was shown and acked, then stops.
    pub(crate) async fn finish(mut self, within: Duration) -> Result<Shown> {
        // If this does not come true, the report says what is missing.
        self.tally.wait_for(within, |tally| tally.acked.get() >= MESSAGES).await;
        let report = self.stopper.stop(Drain::Finish, Duration::from_secs(10)).await;
        ensure!(report.is_clean(), "the subscriber did not end cleanly: {report:?}");
        self.task.join_next().await.context("the consumer is gone")??
    }
}

async fn consume(mut subscriber: Subscriber, tally: &Arc<Tally>) -> Result<Shown> {
    let mut shown = Shown::default();
    let mut handlers = JoinSet::new();
    let mut last = None;
    while let Some(event) = subscriber.next().await {
        let Event::Message(delivery) = event? else { anyhow::bail!("messages are missing") };
        let silence = last.replace(Instant::now()).map(|last: Instant| last.elapsed());
        shown.longest_silence = shown.longest_silence.max(silence.unwrap_or_default());
        let (message, acker) = delivery.split();
        shown.note(&message)?;
        tally.shown.add();
        tally.changed();
        handlers.spawn(handle(message, acker, Arc::clone(tally)));
        while handlers.try_join_next().is_some() {}
    }
    while handlers.join_next().await.is_some() {}
    Ok(shown)
}

/// Takes from 100 to 400 ms, so that messages are acked in another order than they came in.
async fn handle(message: ReceivedMessage, acker: Acker, tally: Arc<Tally>) {
    sleep(Duration::from_millis(100 + message.id.sequence * 7919 % 301)).await;
    acker.ack();
    tally.acked.add();
    tally.changed();
}

impl Shown {
    fn note(&mut self, message: &ReceivedMessage) -> Result<()> {
        let topic = TOPICS.iter().position(|topic| **topic == *message.id.topic);
        let topic = topic.with_context(|| format!("nobody asked for {}", message.id))?;
        let number = publishers::number(&message.payload)?;
        self.topics[topic].push(Seen { sequence: message.id.sequence, number });
        Ok(())
    }
}
