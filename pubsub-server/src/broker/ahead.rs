//! Looking ahead in what delivery has not come to, for subscriptions with a filter: what it leaves
//! out is no backlog, and where nothing is owed before it, it holds back neither the floor nor the
//! space of its topic, whether anybody consumes or not.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use super::subscription::{Keeper, Subscription, Topic};
use crate::limits;
use crate::record::Epoch;
use crate::storage::{ReadError, ReadLimit};

/// The pause after a look, so that nobody else waits for the disk.
const PACE: Duration = Duration::from_millis(10);
/// The pause after all was looked at, or could not be.
const PAUSE: Duration = Duration::from_secs(1);

/// What is known of the messages that delivery has not come to: runs of them, one after the other.
#[derive(Debug, Default)]
pub(super) struct Ahead(VecDeque<Run>);

/// Messages that were looked at together.
#[derive(Debug)]
struct Run {
    first: u64,
    last: u64,
    /// How many of them are left out.
    left_out: u64,
}

impl Ahead {
    /// Nothing is known any more.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// Delivery has met a message: from now on the position knows of it.
    pub(super) fn meet(&mut self, sequence: u64, left_out: bool) {
        let Some(run) = self.0.front_mut() else { return };
        if run.first <= sequence && sequence <= run.last {
            run.left_out = run.left_out.saturating_sub(u64::from(left_out));
            self.forget_to(sequence);
        }
    }

    /// Delivery has come to here, and what it has not met was done.
    fn forget_to(&mut self, looked_at: u64) {
        while self.0.front().is_some_and(|run| run.last <= looked_at) {
            self.0.pop_front();
        }
        if let Some(run) = self.0.front_mut() {
            run.first = run.first.max(looked_at + 1);
        }
    }

    /// The last message that was looked at, or that delivery has come to.
    fn end(&self, looked_at: u64) -> u64 {
        self.0.back().map_or(looked_at, |run| run.last.max(looked_at))
    }

    fn begin(&mut self, first: u64) {
        self.0.push_back(Run { first, last: first - 1, left_out: 0 });
    }

    fn note(&mut self, sequence: u64, left_out: bool) {
        if let Some(run) = self.0.back_mut() {
            run.last = sequence;
            run.left_out += u64::from(left_out);
        }
    }

    /// How many messages are left out of those that delivery has not come to.
    fn left_out(&self) -> u64 {
        self.0.iter().map(|run| run.left_out).sum()
    }
}

impl Subscription {
    /// Looks at a few messages that delivery has not come to. Says whether it did.
    pub(super) async fn look_ahead(&mut self) -> bool {
        if self.looks_ahead_at().is_none_or(|at| at > Instant::now()) {
            return false;
        }
        let Some((epoch, from)) = self.unseen() else { return false };
        let limit = ReadLimit { messages: limits::MAX_FRAME_MESSAGES, bytes: limits::FRAME_BYTES };
        let read = self.storage.read(epoch, from, limit).await;
        let Some(topic) = self.topics.get_mut(&epoch) else { return false };
        let messages = match read {
            Ok(messages) => messages,
            // Delivery tells of it, and looks at what is damaged, when it gets there.
            Err(ReadError::Trimmed { first }) => {
                topic.ahead.begin(from);
                topic.ahead.note(first - 1, false);
                return true;
            }
            Err(_) => Vec::new(),
        };
        let pause = if messages.is_empty() { PAUSE } else { PACE };
        let mut first = true;
        for message in &messages {
            let left_out = !self.record.wants(message);
            // Before the first that is wanted nothing has to be remembered.
            if topic.ahead.0.is_empty() && left_out && topic.delivery.pass_over(message.sequence) {
                continue;
            }
            if std::mem::take(&mut first) {
                topic.ahead.begin(message.sequence);
            }
            let done = topic.delivery.cursor().is_done(message.sequence);
            topic.ahead.note(message.sequence, left_out && !done);
        }
        let pause = if self.unseen().is_some() { pause } else { PAUSE };
        self.look_ahead_from = Instant::now() + pause;
        !messages.is_empty()
    }

    /// When to look ahead again, if there is something to be seen.
    pub(super) fn looks_ahead_at(&mut self) -> Option<Instant> {
        let looks = self.record.filter.is_some() && self.keeper == Keeper::Server;
        (looks && self.unseen().is_some()).then_some(self.look_ahead_from)
    }

    /// The first message of a topic that was not looked at.
    fn unseen(&mut self) -> Option<(Epoch, u64)> {
        let now = Instant::now();
        for topic in self.topics.values_mut() {
            topic.ahead.forget_to(topic.delivery.looked_at());
        }
        self.topics.iter_mut().find_map(|(epoch, topic)| Some((*epoch, topic.unseen(now)?)))
    }
}

impl Topic {
    fn unseen(&mut self, now: Instant) -> Option<u64> {
        let looked_at = self.delivery.looked_at();
        let from = self.delivery.cursor().after_done(self.ahead.end(looked_at) + 1);
        let seen = from > self.delivery.cursor().head();
        let full = self.ahead.0.len() >= limits::MAX_AHEAD_RUNS;
        (!seen && !full && self.is_readable(now)).then_some(from)
    }

    /// Messages that are neither done nor, as far as they were looked at, left out by a filter.
    pub(super) fn backlog(&self) -> u64 {
        self.delivery.cursor().backlog().saturating_sub(self.ahead.left_out())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What was looked at, one run after the other; odd messages are left out.
    fn looked(runs: &[(u64, u64)]) -> Ahead {
        let mut ahead = Ahead::default();
        for (first, last) in runs {
            ahead.begin(*first);
            (*first..=*last).for_each(|sequence| ahead.note(sequence, sequence % 2 == 1));
        }
        ahead
    }

    #[test]
    fn what_is_left_out_counts_until_delivery_gets_there() {
        let mut ahead = looked(&[(11, 20), (21, 30)]);
        assert_eq!((ahead.left_out(), ahead.end(10)), (10, 30));
        // It meets some of them, and goes past others that are done.
        ahead.meet(7, true);
        assert_eq!(ahead.left_out(), 10, "that was before");
        ahead.meet(11, true);
        ahead.meet(12, false);
        ahead.meet(15, true);
        ahead.meet(13, true);
        assert_eq!(ahead.left_out(), 8, "it has passed 13 before");
        ahead.forget_to(18);
        ahead.meet(19, true);
        ahead.meet(20, false);
        assert_eq!((ahead.left_out(), ahead.end(20)), (5, 30));
        // Its consumer goes, and it goes back.
        assert_eq!((ahead.left_out(), ahead.end(10)), (5, 30));
        ahead.forget_to(30);
        assert_eq!((ahead.left_out(), ahead.end(30)), (0, 30));
    }
}
