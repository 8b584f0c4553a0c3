//! The messages of a publisher whose fate is open, and how it goes on after a disconnect. Pure:
//! no I/O, and the time is an argument.
//!
//! A message gets its sequence when it is first sent, never before: so a message that is given up
//! unsent leaves no gap. A message that was sent stays until its result is known. After a
//! reconnect all of these are sent again, in order, before anything new; the server knows them by
//! their sequences.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use crate::error::PublishErrorKind;
use crate::liveness::after;

/// A message in the window. `T` is whatever goes with it.
#[derive(Debug)]
struct Slot<T> {
    item: T,
    bytes: usize,
    /// When it was queued; once it was sent, when that was for the first time.
    since: Instant,
    /// How many messages, from this one on, go in one batch of their own. 0: this one goes with
    /// any, or is one of those after the first.
    together: usize,
}

/// How a batch is cut.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cut {
    /// Messages that may be unanswered.
    pub(super) in_flight: usize,
    /// Bytes that may be unanswered; one message always may.
    pub(super) in_flight_bytes: usize,
    /// Messages of one batch.
    pub(super) messages: usize,
    /// Bytes of one batch, beside one message of any size.
    pub(super) bytes: usize,
    /// How long a message waits for company.
    pub(super) linger: Duration,
    /// Whether messages that were never sent may go now.
    pub(super) allow_new: bool,
}

/// What goes next: one message, or several that go together.
#[derive(Clone, Copy, Debug)]
struct Next {
    messages: usize,
    bytes: usize,
    alone: bool,
}

/// What the hello says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Hello {
    pub(super) epoch: u32,
    pub(super) resolved_below: u64,
    pub(super) next: u64,
    pub(super) boot: Bytes,
    pub(super) topic_epoch: u64,
    pub(super) attach: u64,
}

/// What the welcome says.
#[derive(Clone, Debug)]
pub(super) struct Welcome {
    pub(super) boot: Bytes,
    pub(super) topic_epoch: u64,
    /// The last sequence that is decided, if any is.
    pub(super) last: Option<u64>,
    /// For how long the server remembers.
    pub(super) horizon: Duration,
}

/// What follows from a welcome.
#[derive(Debug)]
pub(super) struct Verdict<T> {
    /// The fate of these will never be known.
    pub(super) lost: Vec<(T, PublishErrorKind)>,
    pub(super) then: Then,
}

#[derive(Debug)]
pub(super) enum Then {
    /// Send.
    Go,
    /// Open another stream, as a publisher that starts over.
    Again,
    /// Give up.
    Fail(PublishErrorKind),
}

#[derive(Debug)]
pub(super) struct Window<T> {
    /// Counts how often this publisher started over from sequence 1.
    epoch: u32,
    /// The sequence of the next message that was never sent.
    next: u64,
    /// Bounded by the places that the items take.
    slots: VecDeque<Slot<T>>,
    /// How many of them, the oldest, were sent.
    sent: usize,
    /// How many of those have gone out on the present stream, and their bytes.
    on_stream: usize,
    bytes_on_stream: usize,
    boot: Bytes,
    topic_epoch: u64,
    /// The number of connections so far.
    attaches: u64,
    /// Whether a recreated topic is published to like any other.
    accept_recreated: bool,
}

impl<T> Window<T> {
    pub(super) fn new(accept_recreated: bool) -> Self {
        Self {
            epoch: 0,
            next: 1,
            slots: VecDeque::new(),
            sent: 0,
            on_stream: 0,
            bytes_on_stream: 0,
            boot: Bytes::new(),
            topic_epoch: 0,
            attaches: 0,
            accept_recreated,
        }
    }

    pub(super) fn push(&mut self, item: T, bytes: usize, now: Instant) {
        self.slots.push_back(Slot { item, bytes, since: now, together: 0 });
    }

    /// Messages, with their bytes, that go in one batch of their own, each time they are sent.
    pub(super) fn push_together(&mut self, items: Vec<(T, usize)>, now: Instant) {
        let first = self.slots.len();
        let count = items.len();
        items.into_iter().for_each(|(item, bytes)| self.push(item, bytes, now));
        if let Some(slot) = self.slots.get_mut(first) {
            slot.together = count;
        }
    }

    /// The oldest sequence without a result; the next new one if there is none.
    pub(super) fn first(&self) -> u64 {
        self.next - self.sent as u64
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Whether anything that was sent on this stream has no result yet.
    pub(super) fn is_waiting(&self) -> bool {
        self.on_stream > 0
    }

    /// A new stream is being opened: what its hello says.
    pub(super) fn hello(&mut self) -> Hello {
        self.attaches += 1;
        self.on_stream = 0;
        self.bytes_on_stream = 0;
        // Deliberate bugs, for tests of tests.
        if cfg!(pubsub_break = "retry_mints_new_identity") && self.sent > 0 {
            self.epoch += 1;
            self.next = 1;
            self.sent = 0;
        }
        if cfg!(pubsub_break = "replay_out_of_order") {
            self.slots.make_contiguous()[..self.sent].reverse();
        }
        Hello {
            epoch: self.epoch,
            resolved_below: self.first(),
            next: self.next,
            boot: self.boot.clone(),
            topic_epoch: self.topic_epoch,
            attach: self.attaches,
        }
    }

    /// The server took the hello in.
    pub(super) fn welcome(&mut self, welcome: Welcome, now: Instant) -> Verdict<T> {
        if self.topic_epoch != 0 && self.topic_epoch != welcome.topic_epoch {
            return self.recreated();
        }
        let first = self.first();
        match welcome.last {
            Some(last) if last >= self.next => {
                return Verdict { lost: Vec::new(), then: Then::Fail(PublishErrorKind::Fenced) };
            }
            Some(last) if last + 1 < first => {
                let kind = PublishErrorKind::ServerRegressed { expected: first - 1, found: last };
                return Verdict { lost: Vec::new(), then: Then::Fail(kind) };
            }
            None if first > 1 => return self.start_over(PublishErrorKind::ProducerStateLost),
            Some(_) | None => {}
        }
        self.boot = welcome.boot;
        self.topic_epoch = welcome.topic_epoch;
        self.give_up_older(welcome.horizon, welcome.last.unwrap_or(0), now)
    }

    /// What was sent longer ago than the server remembers must not be sent again: it could be
    /// stored twice.
    fn give_up_older(&mut self, horizon: Duration, last: u64, now: Instant) -> Verdict<T> {
        let is_old = |slot: &&Slot<T>| now.duration_since(slot.since) >= horizon;
        let old = self.slots.iter().take(self.sent).take_while(is_old).count();
        if old == 0 {
            return Verdict { lost: Vec::new(), then: Then::Go };
        }
        if last + 1 < self.first() + old as u64 {
            // Without these the next sequence would be a gap.
            return self.start_over(PublishErrorKind::HorizonElapsed);
        }
        self.sent -= old;
        let lost = self.slots.drain(..old);
        let lost = lost.map(|slot| (slot.item, PublishErrorKind::HorizonElapsed)).collect();
        Verdict { lost, then: Then::Go }
    }

    /// The topic is another one than before, under the same name.
    pub(super) fn recreated(&mut self) -> Verdict<T> {
        if !self.accept_recreated {
            let then = Then::Fail(PublishErrorKind::TopicRecreated);
            return Verdict { lost: Vec::new(), then };
        }
        self.topic_epoch = 0;
        self.start_over(PublishErrorKind::TopicRecreated)
    }

    /// The server's data is not what it was.
    pub(super) fn diverged(&mut self) -> Verdict<T> {
        self.boot = Bytes::new();
        self.topic_epoch = 0;
        self.start_over(PublishErrorKind::Diverged)
    }

    /// The server does not know any more what became of messages that were sent.
    pub(super) fn forgotten(&mut self) -> Verdict<T> {
        self.start_over(PublishErrorKind::HorizonElapsed)
    }

    fn start_over(&mut self, why: PublishErrorKind) -> Verdict<T> {
        self.epoch = self.epoch.saturating_add(1);
        self.next = 1;
        self.on_stream = 0;
        self.bytes_on_stream = 0;
        let sent = self.slots.drain(..std::mem::take(&mut self.sent));
        let lost = sent.map(|slot| (slot.item, why.clone())).collect();
        Verdict { lost, then: Then::Again }
    }

    /// The sequence of the next message that is sent on this stream.
    pub(super) fn next_to_send(&self) -> u64 {
        self.first() + self.on_stream as u64
    }

    /// Sends the next messages, if there are any. `visit` sees each of them, and its bytes.
    pub(super) fn next_batch(
        &mut self,
        cut: &Cut,
        now: Instant,
        mut visit: impl FnMut(&T, usize),
    ) -> bool {
        if self.lingers_until(cut, now).is_some() {
            return false;
        }
        let (mut count, mut bytes) = (0, 0);
        while let Some(next) = self.peek(cut.allow_new) {
            let fits = count < cut.messages && bytes + next.bytes <= cut.bytes && !next.alone;
            if !(self.is_allowed(cut, next) && (fits || count == 0)) {
                break;
            }
            for _ in 0..next.messages {
                self.advance(now, &mut visit);
            }
            count += next.messages;
            bytes += next.bytes;
            if next.alone {
                break;
            }
        }
        count > 0
    }

    /// The next message for the present stream, or those that go with it: first those sent
    /// before, then new ones.
    fn peek(&self, allow_new: bool) -> Option<Next> {
        if self.on_stream == self.sent && !allow_new {
            return None;
        }
        let Slot { bytes, together, .. } = *self.slots.get(self.on_stream)?;
        if together == 0 {
            return Some(Next { messages: 1, bytes, alone: false });
        }
        let all = self.slots.range(self.on_stream..).take(together);
        let bytes = all.map(|slot| slot.bytes).sum();
        Some(Next { messages: together, bytes, alone: true })
    }

    /// Whether these may be unanswered, too. If nothing is, they may in any case.
    fn is_allowed(&self, cut: &Cut, next: Next) -> bool {
        let messages = self.on_stream + next.messages <= cut.in_flight;
        let bytes = self.bytes_on_stream + next.bytes <= cut.in_flight_bytes;
        messages && bytes || self.on_stream == 0
    }

    fn advance(&mut self, now: Instant, visit: &mut impl FnMut(&T, usize)) {
        let Some(slot) = self.slots.get_mut(self.on_stream) else { return };
        if self.on_stream == self.sent {
            slot.since = now;
            self.next += 1;
            self.sent += 1;
        }
        self.on_stream += 1;
        self.bytes_on_stream += slot.bytes;
        visit(&slot.item, slot.bytes);
    }

    /// Whether there is something to send now.
    pub(super) fn has_work(&self, cut: &Cut, now: Instant) -> bool {
        let Some(next) = self.peek(cut.allow_new) else { return false };
        self.is_allowed(cut, next) && self.lingers_until(cut, now).is_none()
    }

    /// Until when new messages wait for company, if they do.
    pub(super) fn lingers_until(&self, cut: &Cut, now: Instant) -> Option<Instant> {
        if cut.linger.is_zero() || self.on_stream < self.sent || !cut.allow_new {
            return None;
        }
        let front = self.slots.get(self.sent).filter(|front| front.together == 0)?;
        let until = after(front.since, cut.linger);
        let sizes = self.slots.range(self.sent..).take(cut.messages).map(|slot| slot.bytes);
        let unsent = self.slots.len() - self.sent;
        let full = unsent >= cut.messages || sizes.sum::<usize>() >= cut.bytes;
        (!full && now < until).then_some(until)
    }

    /// The results of consecutive messages: hands them out, oldest first. `Err` if these are not
    /// the ones whose results are due.
    pub(super) fn results(
        &mut self,
        first: u64,
        count: u32,
    ) -> Result<impl Iterator<Item = T> + use<'_, T>, String> {
        let due = self.first();
        let count = count as usize;
        if first != due || count == 0 || count > self.on_stream {
            let sent = self.on_stream;
            return Err(format!(
                "results of {count} messages from {first} came, {sent} from {due} are due"
            ));
        }
        self.on_stream -= count;
        self.sent -= count;
        let bytes = self.slots.iter().take(count).map(|slot| slot.bytes).sum::<usize>();
        self.bytes_on_stream -= bytes;
        Ok(self.slots.drain(..count).map(|slot| slot.item))
    }

    /// Takes out what was never sent and is not wanted any more.
    pub(super) fn give_up_unsent(&mut self, unwanted: impl Fn(&T) -> bool) -> Vec<T> {
        if !self.slots.range(self.sent..).any(|slot| unwanted(&slot.item)) {
            return Vec::new();
        }
        let unsent = self.slots.split_off(self.sent);
        let (given_up, kept): (Vec<_>, Vec<_>) =
            unsent.into_iter().partition(|slot| unwanted(&slot.item));
        self.slots.extend(kept);
        given_up.into_iter().map(|slot| slot.item).collect()
    }

    pub(super) fn sent_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.slots.range_mut(..self.sent).map(|slot| &mut slot.item)
    }

    pub(super) fn unsent_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.slots.range_mut(self.sent..).map(|slot| &mut slot.item)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        self.slots.iter().map(|slot| &slot.item)
    }

    /// Everything, oldest first, and whether it was ever sent.
    pub(super) fn drain(&mut self) -> Vec<(T, bool)> {
        self.on_stream = 0;
        self.bytes_on_stream = 0;
        let sent = std::mem::take(&mut self.sent);
        let was_sent = |(index, slot): (usize, Slot<T>)| (slot.item, index < sent);
        self.slots.drain(..).enumerate().map(was_sent).collect()
    }
}
