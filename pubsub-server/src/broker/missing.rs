//! What will never be received. A consumer is told of it in its place in the stream, and again
//! after every attach until one has said that it knows; only then does the position pass it.
//!
//! A topic that is deleted stays with its subscriptions that long: its messages are gone, but
//! that they are is news, and what a consumer holds of them can be acked.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::watch;

use super::session::{Event, GapReason, Missing, Session};
use super::subscription::{Keeper, Subscription, Topic, TopicStart};
use crate::record::{Departed, Epoch, Sequences};

/// All of a topic.
const GONE: u64 = u64::MAX;

impl TopicStart {
    /// Of a topic that was deleted before the server started.
    pub(super) fn departed(departed: Departed) -> Self {
        let Departed { name, epoch, head, cursor } = departed;
        let head = watch::Sender::new(head).subscribe();
        let (floor, purged) = (Arc::default(), Arc::default());
        Self { name, epoch, cursor, head, floor, purged, gone: true }
    }
}

impl Subscription {
    pub(super) fn on_topic_deleted(&mut self, epoch: Epoch) {
        let Some(topic) = self.topics.get_mut(&epoch) else {
            return;
        };
        topic.gone = true;
        topic.damaged = None;
        // The storage has kept the position as it was saved last.
        topic.delivery.cursor_mut().mark_dirty();
        self.departed.fetch_add(1, Ordering::Relaxed);
        if self.active().next().is_some() {
            self.tell_missing(epoch, GONE, GapReason::TopicDeleted);
        }
    }

    /// Tells what is missing of the topics that are gone, as far as it is not told yet.
    pub(super) fn tell_departed(&mut self) {
        if self.departed.load(Ordering::Relaxed) == 0 {
            return;
        }
        let gone = self.topics.iter().filter(|(_, topic)| topic.gone);
        for epoch in gone.map(|(epoch, _)| *epoch).collect::<Vec<_>>() {
            self.tell_missing(epoch, GONE, GapReason::TopicDeleted);
        }
    }

    /// What one of several consumers had of a topic that is gone is news to the others.
    pub(super) fn tell_the_others(&mut self) {
        if self.is_competing() && self.active().next().is_some() {
            self.tell_departed();
        }
    }

    /// Tells the consumer that the messages below `first` are gone.
    pub(super) fn tell_missing(&mut self, epoch: Epoch, first: u64, reason: GapReason) {
        let Some(topic) = self.topics.get_mut(&epoch) else {
            return;
        };
        topic.lost = Some(reason);
        topic.ahead.clear();
        let Some((first, last)) = topic.delivery.lose_below(first) else {
            return;
        };
        let (number, name) = (topic.number, topic.name.clone());
        self.tell_gap(epoch, (first, last), reason);
        let mut told = false;
        for session in self.active() {
            session.tell(Event::Gap(number, first, last, reason));
            told = true;
        }
        if !told {
            self.leases.missing.push(Missing { topic: name, epoch, first, last, reason });
        }
    }

    /// Tells one of several consumers, which has just come, what the others were told before.
    pub(super) fn tell_lost(&self, session: &mut Session) {
        for topic in self.topics.values() {
            if let (Some((first, last)), Some(reason)) = (topic.delivery.lost(), topic.lost) {
                session.tell(Event::Gap(topic.number, first, last, reason));
            }
        }
    }

    /// A pull was told. It has no way to say that it knows, so telling is enough.
    pub(super) fn miss(&mut self, missed: Vec<(Epoch, RangeInclusive<u64>)>) {
        for (epoch, range) in missed {
            if let Some(topic) = self.topics.get_mut(&epoch) {
                topic.delivery.miss(&Sequences::from_iter([range]));
            }
        }
    }

    /// Ends with deleted topics of which everything is told, acked and saved.
    pub(super) fn leave_departed(&mut self) {
        if self.departed.load(Ordering::Relaxed) == 0 {
            return;
        }
        // Nothing is kept for a reader: it is told, and that is all.
        let reader = self.keeper == Keeper::Client;
        let is_over = |topic: &Topic| {
            let cursor = topic.delivery.cursor();
            let known = cursor.oldest_unsettled().is_none();
            topic.gone && (reader || known && !cursor.is_dirty())
        };
        let over = self.topics.iter().filter(|(_, topic)| is_over(topic));
        for epoch in over.map(|(epoch, _)| *epoch).collect::<Vec<_>>() {
            self.departed.fetch_sub(1, Ordering::Relaxed);
            self.leave(epoch);
        }
    }
}
