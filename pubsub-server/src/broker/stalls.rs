//! What a subscription tells whoever watches, and what it remembers of that, so that it tells of a
//! stall or a gap once.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use super::events::What;
use super::session::GapReason;
use super::subscription::{Keeper, Subscription};
use super::waiting::WaitCause;
use crate::limits;
use crate::names::TopicName;
use crate::record::Epoch;

/// How often stalls are looked for, while somebody watches.
pub(super) const INTERVAL: Duration = Duration::from_secs(5);

/// What was seen and told. No more than one entry for each topic.
#[derive(Debug, Default)]
pub(super) struct Noted {
    looked_at: Option<Instant>,
    heads: BTreeMap<Epoch, Seen>,
    /// The last message of the gaps that were told.
    gaps: BTreeMap<Epoch, u64>,
}

/// The first message of a topic that is not done.
#[derive(Debug)]
struct Seen {
    topic: TopicName,
    sequence: u64,
    since: Instant,
    told: bool,
}

impl Noted {
    /// There is no such topic any more.
    pub(super) fn forget(&mut self, topic: Epoch) {
        self.gaps.remove(&topic);
    }
}

impl Subscription {
    /// Tells what has happened to a subscription; readers are nobody's business.
    pub(super) fn tell_all(&self, what: What) {
        if self.keeper == Keeper::Server {
            self.events.tell(what);
        }
    }

    /// Tells of each first message that has been the same one for too long, once, and when that is
    /// over.
    pub(super) fn look_for_stalls(&mut self) {
        let now = Instant::now();
        // If nobody has watched meanwhile, nothing is known of that time.
        let recent = self.noted.looked_at.is_some_and(|at| now < at + 3 * INTERVAL);
        let mut before = std::mem::take(&mut self.noted.heads);
        if !recent {
            before.clear();
        }
        self.noted.looked_at = Some(now);
        let mut heads = BTreeMap::new();
        for (epoch, topic) in &self.topics {
            let Some(sequence) = topic.delivery.cursor().oldest_unsettled() else { continue };
            let same = before.get(epoch).is_some_and(|seen| seen.sequence == sequence);
            let known = if same { before.remove(epoch) } else { None };
            let fresh = || Seen { topic: topic.name.clone(), sequence, since: now, told: false };
            let mut seen = known.unwrap_or_else(fresh);
            let waiting = now.duration_since(seen.since);
            if !seen.told
                && waiting >= limits::STALLED
                && let Some(head) = self.head_of_line(topic, now)
                && head.cause != WaitCause::Delayed
            {
                seen.told = true;
                self.tell_all(What::Stalled {
                    subscription: self.record.name.clone(),
                    topic: topic.name.clone(),
                    epoch: *epoch,
                    head,
                    waiting,
                });
            }
            heads.insert(*epoch, seen);
        }
        // What is left is the first one no more.
        for (epoch, seen) in before.into_iter().filter(|(_, seen)| seen.told) {
            self.tell_all(What::StallEnded {
                subscription: self.record.name.clone(),
                topic: seen.topic,
                epoch,
                sequence: seen.sequence,
                waited: now.duration_since(seen.since),
            });
        }
        self.noted.heads = heads;
    }

    /// Tells of messages that failed and were let go.
    pub(super) fn tell_let_go(&self, epoch: Epoch, sequences: &[u64], into: Option<&TopicName>) {
        let (Some(topic), Some(first)) = (self.topics.get(&epoch), sequences.iter().min()) else {
            return;
        };
        self.tell_all(What::LetGo {
            subscription: self.record.name.clone(),
            topic: topic.name.clone(),
            epoch,
            count: sequences.len() as u64,
            first: *first,
            into: into.cloned(),
        });
    }

    /// Tells of a gap. A consumer may have to be told again; whoever watches does not.
    pub(super) fn tell_gap(&mut self, epoch: Epoch, (first, last): (u64, u64), reason: GapReason) {
        let Some(topic) = self.topics.get(&epoch) else { return };
        let told = self.noted.gaps.get(&epoch).copied().unwrap_or(0);
        let first = first.max(told + 1);
        if first > last {
            return;
        }
        self.noted.gaps.insert(epoch, last);
        // What is done between them was received, or is for others.
        let done = &topic.delivery.cursor().record().done;
        let missed = done.gaps(&(first..=last)).map(|gap| gap.end() - gap.start() + 1).sum();
        if self.keeper == Keeper::Server {
            self.events.count_missed(reason, missed);
        }
        let topic = topic.name.clone();
        let subscription = self.record.name.clone();
        self.tell_all(What::Gap { subscription, topic, epoch, first, last, reason });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::Bytes;

    use super::super::Broker;
    use super::super::events::{EventFilter, Noticed, Watcher};
    use super::super::publisher::Batch;
    use super::super::subscriptions::{NewSubscription, Start};
    use super::*;
    use crate::env::System;
    use crate::names::{SubscriptionName, TopicPattern};
    use crate::record::{NewMessage, Sequences, TopicConfig};
    use crate::storage::Item;
    use crate::storage::memory::Memory;

    const SECOND: Duration = Duration::from_secs(1);

    fn topic() -> TopicName {
        TopicName::parse("t").unwrap()
    }

    fn subscription() -> SubscriptionName {
        SubscriptionName::parse("s").unwrap()
    }

    /// A subscription that has two messages before it, and no consumer.
    async fn stuck() -> (Broker, Epoch) {
        let env = Arc::new(System);
        let memory = Arc::new(Memory::new(Arc::clone(&env) as _));
        let broker = Broker::start(memory, env).await.unwrap();
        let (info, _) = broker.create_topic(topic(), TopicConfig::default(), false).await.unwrap();
        let new = NewSubscription {
            filter: None,
            name: subscription(),
            topics: vec![TopicPattern::parse("t").unwrap()],
            kind: None,
            on_failure: None,
            ack_timeout: None,
            expires_after: None,
            start: Start::Earliest,
        };
        broker.create_subscription(new, false).await.unwrap();
        for _ in 0..2 {
            let body = Bytes::from_static(b"\x0a\x01x");
            let message = NewMessage { body, recipients: Vec::new(), key: None };
            let items = vec![Item::Store(message)];
            let batch = Batch { first_sequence: 1, resolved_below: 0, items, atomic: None };
            broker.publish(&topic(), batch).await.unwrap();
        }
        (broker, info.record.epoch)
    }

    /// What is told within this time, as sequences of stalls that begin, or end with a minus.
    #[expect(clippy::wildcard_enum_match_arm, reason = "nothing else happens")]
    async fn told(watcher: &mut Watcher, within: Duration) -> Vec<i64> {
        let end = Instant::now() + within;
        let mut stalls = Vec::new();
        while let Ok(Some(noticed)) = tokio::time::timeout_at(end, watcher.next()).await {
            let Noticed::Event(event) = noticed else { panic!("{noticed:?}") };
            match &event.what {
                What::Stalled { head, waiting, .. } => {
                    assert!(*waiting >= limits::STALLED, "{waiting:?}");
                    stalls.push(head.sequence.cast_signed());
                }
                What::StallEnded { sequence, .. } => stalls.push(-sequence.cast_signed()),
                other => panic!("{other:?}"),
            }
        }
        stalls
    }

    async fn ack(broker: &Broker, epoch: Epoch, sequence: u64) {
        let acked = [((topic(), epoch), Sequences::from_iter([sequence..=sequence]))];
        broker.acknowledge(&subscription(), acked.into()).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_stall_is_told_once_for_each_message_and_when_it_ends() {
        let (broker, epoch) = stuck().await;
        let mut watcher = broker.watch(EventFilter::default()).unwrap();
        assert_eq!(told(&mut watcher, 29 * SECOND).await, [] as [i64; 0]);
        assert_eq!(told(&mut watcher, 300 * SECOND).await, [1]);
        ack(&broker, epoch, 1).await;
        assert_eq!(told(&mut watcher, 20 * SECOND).await, [-1]);
        assert_eq!(told(&mut watcher, 60 * SECOND).await, [2]);
        ack(&broker, epoch, 2).await;
        assert_eq!(told(&mut watcher, 300 * SECOND).await, [-2]);
    }

    #[tokio::test(start_paused = true)]
    async fn who_comes_later_hears_of_a_stall_that_goes_on_if_nobody_watched_meanwhile() {
        let (broker, epoch) = stuck().await;
        let mut watcher = broker.watch(EventFilter::default()).unwrap();
        assert_eq!(told(&mut watcher, 60 * SECOND).await, [1]);
        drop(watcher);
        tokio::time::sleep(60 * SECOND).await;
        let mut watcher = broker.watch(EventFilter::default()).unwrap();
        assert_eq!(told(&mut watcher, 60 * SECOND).await, [1]);
        drop(watcher);
        // The end of it was missed, and is not told with a time that nobody has seen.
        ack(&broker, epoch, 1).await;
        tokio::time::sleep(60 * SECOND).await;
        let mut watcher = broker.watch(EventFilter::default()).unwrap();
        assert_eq!(told(&mut watcher, 60 * SECOND).await, [2]);
    }
}
