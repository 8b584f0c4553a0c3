//! The fates of messages, between the session that tells them and the tickets that ask.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::SystemTime;

use super::ticket::{PublishReceipt, PublishTicket};
use crate::error::PublishError;
use crate::message::MessageId;

/// How many messages share an allocation and a lock: as many as there are bits in a `u64`.
const FATES: usize = 64;

/// Those of a few messages that follow each other.
#[derive(Debug)]
pub(super) struct Fates {
    topic: Arc<str>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Whose fates are known, one bit for each.
    told: u64,
    /// Those that are stored, as they were told.
    stored: Vec<Run>,
    /// Those that have failed, until they are asked for.
    failed: Vec<(usize, Box<PublishError>)>,
    /// Whose tickets were dropped while their fates were open, one bit for each.
    dropped: u64,
    /// Who waits for which.
    waiting: Vec<(usize, Waker)>,
}

/// Messages that follow each other, and are stored so.
#[derive(Debug)]
struct Run {
    first: usize,
    count: usize,
    stored: Stored,
}

/// What became of messages that follow each other.
#[derive(Debug)]
pub(super) enum Fate {
    /// They are stored so.
    Stored(Stored),
    /// This one has failed, and the others have, too.
    Failed(Box<PublishError>),
}

/// Where a message is stored; the following ones follow.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stored {
    pub(super) epoch: u64,
    pub(super) sequence: u64,
    pub(super) duplicate: bool,
    pub(super) publish_time: SystemTime,
}

/// Tells the fate of one message.
#[derive(Debug)]
pub(super) struct Teller {
    pub(super) fates: Arc<Fates>,
    pub(super) index: usize,
}

/// Makes tickets, in the order of the messages.
#[derive(Debug)]
pub(super) struct Tickets {
    fates: Arc<Fates>,
    used: usize,
}

impl Tickets {
    pub(super) fn new(topic: Arc<str>) -> Self {
        Self { fates: Fates::new(topic), used: 0 }
    }

    pub(super) fn make(&mut self) -> (Teller, PublishTicket) {
        if self.used == FATES {
            *self = Self::new(Arc::clone(&self.fates.topic));
        }
        let index = self.used;
        self.used += 1;
        let teller = Teller { fates: Arc::clone(&self.fates), index };
        (teller, PublishTicket::new(Arc::clone(&self.fates), index))
    }
}

impl Fates {
    fn new(topic: Arc<str>) -> Arc<Self> {
        Arc::new(Self { topic, state: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// So many messages, from this one on, are stored.
    pub(super) fn stored(&self, first: usize, count: usize, stored: Stored) {
        let mut state = self.lock();
        state.stored.push(Run { first, count, stored });
        let bits = u64::MAX >> (FATES - count.clamp(1, FATES)) << first;
        Self::tell(state, bits);
    }

    /// This one has failed. Answers the error if nobody hears it, since the ticket was dropped before.
    pub(super) fn failed(&self, index: usize, error: Box<PublishError>) -> Option<PublishError> {
        let mut state = self.lock();
        if state.dropped & 1 << index != 0 {
            return Some(*error);
        }
        state.failed.push((index, error));
        Self::tell(state, 1 << index);
        None
    }

    /// Wakes those who wait for the fates that are known now.
    fn tell(mut state: MutexGuard<'_, State>, bits: u64) {
        state.told |= bits;
        if state.waiting.is_empty() {
            return;
        }
        let is_told = |(index, _): &mut (usize, Waker)| bits & 1 << *index != 0;
        let told: Vec<_> = state.waiting.extract_if(.., is_told).collect();
        drop(state);
        told.into_iter().for_each(|(_, waker)| waker.wake());
    }

    pub(super) fn poll(
        &self,
        index: usize,
        context: &Context<'_>,
    ) -> Poll<Result<PublishReceipt, PublishError>> {
        let mut state = self.lock();
        if state.told & 1 << index == 0 {
            let known = state.waiting.iter_mut().find(|(waiting, _)| *waiting == index);
            match known {
                Some((_, waker)) => waker.clone_from(context.waker()),
                None => state.waiting.push((index, context.waker().clone())),
            }
            return Poll::Pending;
        }
        if let Some(at) = state.failed.iter().position(|(failed, _)| *failed == index) {
            return Poll::Ready(Err(*state.failed.swap_remove(at).1));
        }
        let is_in = |run: &&Run| (run.first..run.first + run.count).contains(&index);
        let run = state.stored.iter().find(is_in).expect("what is told is stored or has failed");
        let Stored { epoch, sequence, duplicate, publish_time } = run.stored;
        let sequence = sequence.saturating_add((index - run.first) as u64);
        drop(state);
        let id = MessageId { topic: Arc::clone(&self.topic), epoch, sequence };
        Poll::Ready(Ok(PublishReceipt { id, duplicate, publish_time }))
    }

    /// Nobody asks for this one any more.
    pub(super) fn give_up(&self, index: usize) {
        let mut state = self.lock();
        state.dropped |= 1 << index;
        state.waiting.retain(|(waiting, _)| *waiting != index);
    }
}
