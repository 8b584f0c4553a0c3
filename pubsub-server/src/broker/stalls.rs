//! What a subscription remembers of what it has told, so that it tells it once: stalls and gaps.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use super::events::What;
use super::session::GapReason;
use super::subscription::{Keeper, Subscription};
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

impl Subscription {
    /// Tells what has happened to a subscription; readers are nobody's business.
    pub(super) fn tell_all(&self, what: impl FnOnce() -> What) {
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
            {
                seen.told = true;
                self.tell_all(|| What::Stalled {
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
            self.tell_all(|| What::StallEnded {
                subscription: self.record.name.clone(),
                topic: seen.topic,
                epoch,
                sequence: seen.sequence,
                waited: now.duration_since(seen.since),
            });
        }
        self.noted.heads = heads;
        let topics = &self.topics;
        self.noted.gaps.retain(|epoch, _| topics.contains_key(epoch));
    }

    /// Tells of a gap. A consumer may have to be told again; whoever watches does not.
    pub(super) fn tell_gap(&mut self, epoch: Epoch, (first, last): (u64, u64), reason: GapReason) {
        let Some(topic) = self.topics.get(&epoch).map(|topic| topic.name.clone()) else { return };
        let known = self.noted.gaps.get(&epoch).is_some_and(|told| *told >= last);
        if known || !self.events.is_watched() {
            return;
        }
        self.noted.gaps.insert(epoch, last);
        let subscription = self.record.name.clone();
        self.tell_all(|| What::Gap { subscription, topic, epoch, first, last, reason });
    }
}
