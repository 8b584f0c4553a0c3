//! What the first message waits for that is not done. Pure.

use tokio::time::Instant;

use super::{Delivery, Holder};

/// What the first message waits for that is not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// A consumer has it; the only one there is if it is not said which.
    Held(Option<Holder>),
    /// It has failed, and is shown again then.
    Backoff(Instant),
    /// Its publisher has delayed it until then.
    Delayed(Instant),
    /// It may have killed its consumer, and another one that may have done so is tried until then.
    Suspect(Instant),
    /// Consumers may hold it that have not come back since the start.
    Awaited,
    /// So many are unacked that no more are looked at.
    Full {
        /// With consumers.
        unacked: usize,
        /// Handed back, or too large for anybody's credit.
        waiting: usize,
    },
    /// It has failed too often, and is to be let go.
    Condemned,
    /// Nothing but a consumer that takes it.
    Taker,
}

impl Delivery {
    /// The first message that is not done, and what it waits for.
    pub fn head_of_line(&self, now: Instant) -> Option<(u64, Wait)> {
        let first = self.cursor().oldest_unsettled()?;
        if self.cursor().condemned().contains(&first) {
            return Some((first, Wait::Condemned));
        }
        let wait = match self {
            Self::Exclusive(delivery) if delivery.holds(first) => Wait::Held(None),
            Self::Exclusive(delivery) => {
                let due = delivery.held_back_until(first).filter(|at| *at > now);
                let delayed = || delivery.delayed_until(first).map(Wait::Delayed);
                let suspect = || delivery.tried_until(now).map(Wait::Suspect);
                due.map(Wait::Backoff).or_else(delayed).or_else(suspect).unwrap_or(Wait::Taker)
            }
            Self::Competing(delivery) if delivery.is_full() => {
                Wait::Full { unacked: delivery.held(), waiting: delivery.waiting() }
            }
            Self::Competing(delivery) => {
                let holder = delivery.held.get(&first).map(|held| held.holder);
                let awaited = || delivery.is_withholding().then_some(Wait::Awaited);
                let at = delivery.waiting.get(&first).and_then(|waiting| waiting.at);
                let due = || at.filter(|at| *at > now).map(Wait::Backoff);
                let delayed = || delivery.due_at.at(first).map(Wait::Delayed);
                let suspected = || delivery.waits_for_another_suspect(first);
                let suspect = || delivery.tried_until().filter(|_| suspected()).map(Wait::Suspect);
                let held = holder.map(|holder| Wait::Held(Some(holder)));
                let wait = held.or_else(awaited).or_else(due).or_else(delayed).or_else(suspect);
                wait.unwrap_or(Wait::Taker)
            }
        };
        Some((first, wait))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;

    use super::super::{Cursor, Moment, Nack, Terms};
    use super::*;
    use crate::limits;
    use crate::record::{CursorRecord, Sequences, StoredMessage, SubscriptionKind, Timestamp};

    const SEAT: Holder = Holder::Seat(1);

    fn delivery(kind: SubscriptionKind, max_attempts: Option<u32>) -> Delivery {
        Delivery::new(kind, Cursor::new(CursorRecord::default(), 3, max_attempts))
    }

    fn moment(at: Instant) -> Moment {
        Moment { at, wall: Timestamp(1) }
    }

    /// Gives the next message to the consumer.
    fn give(delivery: &mut Delivery, now: Instant) {
        try_to_give(delivery, now, None).unwrap();
    }

    fn try_to_give(delivery: &mut Delivery, now: Instant, due: Option<Instant>) -> Option<u32> {
        let message = |sequence| StoredMessage {
            sequence,
            published_at: Timestamp(0),
            recipients: Vec::new(),
            body: Bytes::from_static(b"body").into(),
        };
        match delivery {
            Delivery::Exclusive(delivery) => {
                let (from, _) = delivery.wants(10, now).unwrap();
                delivery.offer(&message(from), true, due)
            }
            Delivery::Competing(delivery) => {
                let (from, _) = delivery.wants(now, |_, _| true).unwrap();
                let terms = Terms { key: None, due };
                let routed = delivery.route(&message(from), terms, true, |_, _| Some(SEAT));
                routed.map(|(_, attempt)| attempt)
            }
        }
    }

    #[test]
    fn the_first_message_says_what_it_waits_for() {
        let kinds = [SubscriptionKind::Exclusive, SubscriptionKind::Shared];
        for (kind, holder) in kinds.into_iter().zip([None, Some(SEAT)]) {
            let now = Instant::now();
            let mut delivery = delivery(kind, Some(2));
            assert_eq!(delivery.head_of_line(now), Some((1, Wait::Taker)));
            give(&mut delivery, now);
            assert_eq!(delivery.head_of_line(now), Some((1, Wait::Held(holder))));
            let nack = |attempt| {
                let delay = Some(Duration::from_secs(5));
                [Nack { sequence: 1, attempt, delay, ..Nack::default() }]
            };
            delivery.nack(SEAT, &nack(1), moment(now));
            let due = now + Duration::from_secs(5);
            assert_eq!(delivery.head_of_line(now), Some((1, Wait::Backoff(due))));
            assert_eq!(delivery.head_of_line(due), Some((1, Wait::Taker)));
            give(&mut delivery, due);
            delivery.nack(SEAT, &nack(2), moment(due));
            assert_eq!(delivery.head_of_line(due), Some((1, Wait::Condemned)));
            delivery.ack(&Sequences::from_iter([1..=3]));
            assert_eq!(delivery.head_of_line(due), None);
        }
    }

    #[test]
    fn a_delayed_message_says_so() {
        for kind in [SubscriptionKind::Exclusive, SubscriptionKind::Shared] {
            let now = Instant::now();
            let mut delivery = delivery(kind, None);
            let due = now + Duration::from_secs(60);
            assert_eq!(try_to_give(&mut delivery, now, Some(due)), None);
            assert_eq!(delivery.head_of_line(now), Some((1, Wait::Delayed(due))));
        }
    }

    #[test]
    fn after_a_restart_the_first_message_waits_for_who_may_hold_it() {
        let mut delivery = delivery(SubscriptionKind::Shared, None);
        delivery.withhold();
        assert_eq!(delivery.head_of_line(Instant::now()), Some((1, Wait::Awaited)));
        delivery.withhold_no_more();
        assert_eq!(delivery.head_of_line(Instant::now()), Some((1, Wait::Taker)));
    }

    #[test]
    fn one_of_two_suspects_waits_for_the_other() {
        let now = Instant::now();
        let mut delivery = delivery(SubscriptionKind::Shared, None);
        // The first one kills twice, and so it waits for longer than the second one.
        give(&mut delivery, now);
        delivery.start(SEAT, &Sequences::from_iter([1..=1]), now);
        delivery.crash(SEAT, moment(now));
        let later = now + limits::MAX_BACKOFF;
        give(&mut delivery, later);
        give(&mut delivery, later);
        delivery.start(SEAT, &Sequences::from_iter([1..=2]), later);
        delivery.crash(SEAT, moment(later));
        let second_due = later + limits::MIN_BACKOFF;
        give(&mut delivery, second_due);
        assert!(delivery.holds(2, SEAT));
        let first_due = later + 2 * limits::MIN_BACKOFF;
        let backoff = Wait::Backoff(first_due);
        assert_eq!(delivery.head_of_line(second_due), Some((1, backoff)));
        let tried = Wait::Suspect(second_due + limits::SUSPICION);
        assert_eq!(delivery.head_of_line(first_due), Some((1, tried)));
    }
}
