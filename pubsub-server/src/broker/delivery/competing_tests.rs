//! Competing consumers, case by case. `delivery_model` has the rest.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::{Claim, Competing, Cursor, Holder, Key, Moment, Nack, Order, Terms};
use crate::limits;
use crate::record::{CursorRecord, Sequences, StoredMessage, Timestamp};

/// A topic of the log: four keys, and every fifth message has none.
fn key(sequence: u64) -> Option<Key> {
    (!sequence.is_multiple_of(5)).then(|| Key::from(format!("k{}", sequence * sequence % 4)))
}

fn message(sequence: u64) -> StoredMessage {
    let body = Bytes::from_static(b"body");
    StoredMessage {
        sequence,
        published_at: Timestamp(0),
        recipients: Vec::new(),
        body: body.into(),
    }
}

fn set(sequences: impl IntoIterator<Item = u64>) -> Sequences {
    sequences.into_iter().map(|sequence| sequence..=sequence).collect()
}

fn holder(number: u64) -> Holder {
    Holder::Seat(number)
}

fn one(_: Option<Holder>, _: u64) -> Option<Holder> {
    Some(holder(1))
}

fn at(now: Instant) -> Moment {
    Moment { at: now, wall: Timestamp(1) }
}

fn nack(sequence: u64, seconds: u64) -> Nack {
    Nack { sequence, attempt: 1, delay: Some(Duration::from_secs(seconds)), ..Nack::default() }
}

/// A topic of which one consumer was sent the first messages.
fn sent(order: Order, head: u64, messages: u64) -> Competing {
    let mut delivery = Competing::new(Cursor::new(CursorRecord::default(), head, None), order);
    for sequence in 1..=messages {
        delivery.route(&message(sequence), Terms { key: key(sequence), due: None }, true, one);
    }
    delivery
}

#[test]
fn what_may_be_of_the_same_key_is_taken_back_too() {
    let now = Instant::now();
    let mut delivery = Competing::new(Cursor::new(CursorRecord::default(), 10, None), Order::Key);
    let claim = Claim { held: set([1, 9]), ..Claim::default() };
    delivery.withhold();
    delivery.attach(holder(1), &claim, true, at(now));
    delivery.withhold_no_more();
    // The key of 9 is not known yet.
    for sequence in 1..=2 {
        delivery.route(&message(sequence), Terms { key: key(sequence), due: None }, true, one);
    }
    assert_eq!(key(1), key(9));
    let rewound = delivery.nack(holder(1), &[nack(1, 0)], at(now)).unwrap();
    assert_eq!(rewound.taken_back, set([1, 9]));
    assert!(!delivery.holds(9, holder(1)));
}

#[test]
fn what_was_not_looked_at_is_claimed_after_a_restart_or_not_at_all() {
    let now = Instant::now();
    let claim = Claim { held: set([1, 9]), ..Claim::default() };
    for (order, dropped) in [(Order::Key, set([1, 9])), (Order::None, Sequences::new())] {
        let mut delivery = Competing::new(Cursor::new(CursorRecord::default(), 10, None), order);
        // From a place that was lost: one of its keys may be another's by the time it is looked at.
        assert_eq!(delivery.attach(holder(1), &claim, true, at(now)), dropped, "{order:?}");
    }
    let mut delivery = Competing::new(Cursor::new(CursorRecord::default(), 10, None), Order::Key);
    delivery.withhold();
    assert_eq!(delivery.attach(holder(1), &claim, true, at(now)), Sequences::new());
}

#[test]
fn what_was_taken_back_with_one_that_is_refused_is_refused_too() {
    let now = Instant::now();
    let mut delivery = Competing::new(Cursor::new(CursorRecord::default(), 10, None), Order::Key);
    let claim = Claim { held: set([3, 9]), ..Claim::default() };
    delivery.withhold();
    assert_eq!(delivery.attach(holder(1), &claim, true, at(now)), Sequences::new());
    for sequence in 1..=3 {
        delivery.route(&message(sequence), Terms { key: key(sequence), due: None }, true, one);
    }
    assert!(key(1) == key(3) && key(3) == key(9));
    let rewound = delivery.nack(holder(1), &[nack(3, 0)], at(now)).unwrap();
    assert_eq!(rewound.taken_back, set([3, 9]));
    // It has not heard of it. 3 waits behind 1 and goes to whoever gets that, and 9, of which the
    // key is not known yet, must not stay behind.
    assert_eq!(delivery.attach(holder(1), &claim, true, at(now)), set([3, 9]));
}

#[test]
fn consumers_cannot_claim_more_than_there_can_be() {
    let most = limits::MAX_UNSETTLED as u64;
    let mut delivery =
        Competing::new(Cursor::new(CursorRecord::default(), 2 * most, None), Order::None);
    let claim = Claim { held: Sequences::from_iter([1..=2 * most]), ..Claim::default() };
    let dropped = delivery.attach(holder(1), &claim, true, at(Instant::now()));
    assert_eq!(dropped, Sequences::from_iter([most + 1..=2 * most]));
    assert_eq!(delivery.held() as u64, most);
}

#[test]
fn what_is_handed_back_of_a_gap_is_part_of_it() {
    let now = Instant::now();
    let mut delivery = sent(Order::None, 10, 2);
    assert_eq!(delivery.lose_below(8), Some((3, 7)));
    assert_eq!(delivery.lose_below(8), None, "it is told");
    delivery.nack(holder(1), &[nack(2, 0)], at(now));
    assert_eq!(delivery.lose_below(8), Some((2, 7)));
    assert_eq!(delivery.wants(now, |_, _| true), Some((8, 3)));
    delivery.miss(&set(2..=7));
    assert_eq!(delivery.lost(), None);
}

#[test]
fn a_moment_that_has_passed_is_waited_for_no_more() {
    let now = Instant::now();
    let mut delivery = sent(Order::None, 1, 1);
    delivery.nack(holder(1), &[nack(1, 5)], at(now));
    assert_eq!(delivery.ready_at(now), Some(now + Duration::from_secs(5)));
    assert_eq!(delivery.ready_at(now + Duration::from_secs(5)), None);
}

#[test]
fn a_message_that_is_too_large_for_now_is_not_overtaken_by_smaller_ones() {
    let now = Instant::now();
    let mut delivery =
        Competing::new(Cursor::new(CursorRecord::default(), 100_000, None), Order::None);
    // Somebody has room for three bytes, and each message has four.
    let fits = |bytes| bytes <= 3;
    assert_eq!(delivery.wants(now, |_, bytes| fits(bytes)).map(|(from, _)| from), Some(1));
    let small = |_: Option<Holder>, bytes: u64| fits(bytes).then(|| holder(1));
    assert_eq!(delivery.route(&message(1), Terms::default(), true, small), None);
    assert_eq!(delivery.wants(now, |_, bytes| fits(bytes)), None);
    assert_eq!(delivery.wants(now, |_, _| true), Some((1, 1)));
    assert_eq!(delivery.route(&message(1), Terms::default(), true, one), Some((holder(1), 1)));
}

#[test]
fn a_message_whose_size_was_not_known_is_asked_for_once_if_it_is_too_large() {
    let now = Instant::now();
    let mut delivery = Competing::new(Cursor::new(CursorRecord::default(), 1, None), Order::None);
    let claim = Claim { nacked: vec![nack(1, 0)], ..Claim::default() };
    delivery.attach(holder(1), &claim, true, at(now));
    let fits = |bytes| bytes <= 3;
    assert_eq!(delivery.wants(now, |_, bytes| fits(bytes)), Some((1, 1)));
    let small = |_: Option<Holder>, bytes: u64| fits(bytes).then(|| holder(1));
    assert_eq!(delivery.route(&message(1), Terms::default(), true, small), None);
    assert_eq!(delivery.wants(now, |_, bytes| fits(bytes)), None);
}

/// Of one key, and in a handler.
fn started(order: Order) -> Competing {
    let mut delivery = sent(order, 3, 3);
    assert_eq!(key(1), key(3));
    delivery.start(holder(1), &set([1, 3]), Instant::now());
    delivery
}

#[test]
fn all_that_a_lost_consumer_had_of_a_key_in_its_handlers_has_failed() {
    let mut delivery = started(Order::Key);
    delivery.crash(holder(1), at(Instant::now()));
    assert_eq!([1, 2, 3].map(|sequence| delivery.cursor.failures(sequence)), [1, 0, 1]);
    assert_eq!(*delivery.cursor.suspects(), [1, 3].into());
}

#[test]
fn all_that_was_too_long_in_handlers_of_a_key_has_failed() {
    let mut delivery = started(Order::Key);
    let now = Instant::now();
    let rewound = delivery.expire(now, "too long", at(now));
    assert_eq!(rewound[&holder(1)].taken_back, set([1, 3]));
    assert_eq!([1, 2, 3].map(|sequence| delivery.cursor.failures(sequence)), [1, 0, 1]);
}

#[test]
fn a_consumer_that_did_not_hear_of_a_timeout_keeps_nothing_of_a_key_that_is_another_s() {
    let mut delivery = started(Order::Key);
    let now = Instant::now();
    delivery.expire(now, "too long", at(now));
    let later = now + limits::MAX_BACKOFF;
    assert_eq!(delivery.wants(later, |_, _| true), Some((1, 3)));
    let other = |_: Option<Holder>, _: u64| Some(holder(2));
    assert_eq!(
        delivery.route(&message(1), Terms { key: key(1), due: None }, true, other),
        Some((holder(2), 2))
    );
    let claim = Claim { held: set([1, 3]), started: set([1, 3]), ..Claim::default() };
    assert_eq!(delivery.attach(holder(1), &claim, true, at(later)), set([1, 3]));
}

#[test]
fn a_suspect_that_is_claimed_after_a_restart_is_tried_still() {
    let now = Instant::now();
    let mut before = started(Order::None);
    before.crash(holder(1), at(now));
    let cursor = Cursor::new(before.cursor.record().clone(), 3, None);
    let mut delivery = Competing::new(cursor, Order::None);
    let claim = Claim { held: set([1]), ..Claim::default() };
    delivery.attach(holder(1), &claim, true, at(now));
    delivery.wants(now, |_, _| true);
    for sequence in 1..=3 {
        delivery.route(&message(sequence), Terms::default(), true, one);
    }
    assert!(!delivery.holds(3, holder(1)), "3 may kill, too");
    assert_eq!(delivery.tried_until(), Some(now + limits::SUSPICION));
}

#[test]
fn nothing_more_is_delivered_while_too_many_messages_are_to_be_let_go() {
    let now = Instant::now();
    let most = limits::MAX_CONDEMNED as u64;
    let cursor = Cursor::new(CursorRecord::default(), most + 1, Some(1));
    let mut delivery = Competing::new(cursor, Order::None);
    for sequence in 1..=most {
        delivery.wants(now, |_, _| true);
        delivery.route(&message(sequence), Terms::default(), true, one);
        delivery.nack(holder(1), &[nack(sequence, 0)], at(now));
    }
    assert_eq!(delivery.wants(now, |_, _| true), None);
    delivery.cursor.release(1, crate::record::Release::Skip);
    delivery.let_go(1, 1);
    assert_eq!(delivery.wants(now, |_, _| true), Some((most + 1, 1)));
}

#[test]
fn a_delayed_message_is_in_nobody_s_way_and_comes_first_of_its_key_when_it_is_due() {
    let now = Instant::now();
    let due = now + Duration::from_secs(60);
    let mut delivery = Competing::new(Cursor::new(CursorRecord::default(), 4, None), Order::Key);
    let one = |_, _| Some(holder(1));
    let key = || Some(Key::from("k"));
    assert_eq!(delivery.wants(now, |_, _| true), Some((1, 4)));
    for (sequence, due) in [(1, Some(due)), (2, None), (3, Some(now + 2 * (due - now)))] {
        let shown = delivery.route(&message(sequence), Terms { key: key(), due }, true, one);
        assert_eq!(shown.is_some(), sequence == 2, "{sequence}");
    }
    assert_eq!((delivery.passed(), delivery.delayed()), (3, 2), "they are passed over");
    assert_eq!(delivery.due_at(), Some(due));
    delivery.ack(&set([2]));
    assert_eq!(delivery.wants(now, |_, _| true), Some((4, 1)));
    delivery.route(&message(4), Terms { key: key(), due: None }, true, one).unwrap();
    assert_eq!(delivery.wants(due, |_, _| true), Some((1, 1)));
    let first =
        delivery.route(&message(1), Terms { key: key(), due: None }, true, |owner, _| owner);
    assert_eq!(first, Some((holder(1), 1)), "it goes to who has the others of its key");
    assert_eq!(delivery.cursor.backlog(), 3);
    delivery.ack(&set([1, 3, 4]));
    assert_eq!((delivery.delayed(), delivery.cursor.floor(), delivery.due_at()), (0, 4, None));
}

#[test]
fn a_nack_takes_nothing_from_another_consumer() {
    let now = Instant::now();
    let mut delivery = Competing::new(Cursor::new(CursorRecord::default(), 3, None), Order::Key);
    let claim = Claim { held: set([3]), ..Claim::default() };
    delivery.withhold();
    delivery.attach(holder(2), &claim, true, at(now));
    delivery.withhold_no_more();
    for sequence in 1..=3 {
        delivery.route(
            &message(sequence),
            Terms { key: key(sequence), due: None },
            true,
            |_, _| Some(holder(1)),
        );
    }
    assert_eq!(key(1), key(3));
    let rewound = delivery.nack(holder(1), &[nack(1, 0)], at(now)).unwrap();
    assert_eq!(rewound.taken_back, set([1]));
    assert!(delivery.holds(3, holder(2)), "it was not told");
}
