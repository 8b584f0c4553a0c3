//! The window against a model of a server, and its decisions one by one.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use proptest::prelude::*;
use tokio::time::Instant;

use super::window::{Cut, Then, Verdict, Welcome, Window};
use crate::error::PublishErrorKind;

const HORIZON: Duration = Duration::from_secs(1000);

const CUT: Cut = Cut {
    in_flight: 5,
    in_flight_bytes: 1000,
    messages: 3,
    bytes: 1000,
    linger: Duration::ZERO,
    allow_new: true,
};

fn window(messages: u32) -> Window<u32> {
    let mut window = Window::new(false);
    for message in 0..messages {
        window.push(message, 1, Instant::now());
    }
    window
}

fn batch(window: &mut Window<u32>) -> Option<(u64, Vec<u32>)> {
    let mut messages = Vec::new();
    let first = window.next_to_send();
    let sent = window.next_batch(&CUT, Instant::now(), |message, _| messages.push(*message));
    sent.then_some((first, messages))
}

fn welcome(last: Option<u64>) -> Welcome {
    Welcome { boot: Bytes::from_static(b"boot"), topic_epoch: 7, last, horizon: HORIZON }
}

fn connect(window: &mut Window<u32>, last: Option<u64>) -> Verdict<u32> {
    window.hello();
    window.welcome(welcome(last), Instant::now())
}

fn answer(window: &mut Window<u32>, first: u64, count: u32) -> Vec<u32> {
    window.results(first, count).unwrap().collect()
}

#[test]
fn sequences_are_given_when_messages_are_sent_and_batches_are_cut() {
    let mut window = window(7);
    assert_eq!(window.hello().next, 1);
    assert!(matches!(connect(&mut window, None).then, Then::Go));
    assert_eq!(batch(&mut window), Some((1, vec![0, 1, 2])));
    assert_eq!(batch(&mut window), Some((4, vec![3, 4])), "five may be in flight");
    assert_eq!(batch(&mut window), None);
    assert_eq!(answer(&mut window, 1, 2), [0, 1]);
    assert_eq!(batch(&mut window), Some((6, vec![5, 6])));
    assert!(window.results(4, 1).is_err(), "3 is due");
    assert!(window.results(3, 6).is_err(), "5 are in flight");
}

#[test]
fn a_reconnect_replays_everything_without_an_answer_before_anything_new() {
    let mut window = window(4);
    connect(&mut window, None);
    batch(&mut window);
    answer(&mut window, 1, 1);
    let hello = window.hello();
    assert_eq!((hello.resolved_below, hello.next), (2, 4));
    assert!(matches!(connect(&mut window, Some(2)).then, Then::Go));
    assert_eq!(batch(&mut window), Some((2, vec![1, 2, 3])));
}

#[test]
fn a_message_larger_than_the_limit_goes_alone() {
    let mut window = Window::new(false);
    for bytes in [10, 5000, 10] {
        window.push(0, bytes, Instant::now());
    }
    connect(&mut window, None);
    assert_eq!(batch(&mut window).unwrap().1.len(), 1);
    assert_eq!(batch(&mut window), None, "it waits for the first");
    answer(&mut window, 1, 1);
    assert_eq!(batch(&mut window).unwrap(), (2, vec![0]));
    assert_eq!(batch(&mut window), None, "nothing goes beside it");
}

#[test]
fn messages_that_go_together_go_alone_and_whole_each_time() {
    let together = |window: &mut Window<u32>, messages: std::ops::Range<u32>, bytes| {
        let items = messages.map(|message| (message, bytes)).collect();
        window.push_together(items, Instant::now());
    };
    let mut window = window(1);
    // More than a usual batch holds.
    together(&mut window, 1..5, 1);
    window.push(5, 1, Instant::now());
    together(&mut window, 6..7, 1);
    connect(&mut window, None);
    assert_eq!(batch(&mut window), Some((1, vec![0])));
    assert_eq!(batch(&mut window), Some((2, vec![1, 2, 3, 4])));
    assert_eq!(batch(&mut window), None, "five may be in flight");
    connect(&mut window, Some(3));
    assert_eq!(batch(&mut window), Some((1, vec![0])));
    assert_eq!(batch(&mut window), Some((2, vec![1, 2, 3, 4])));
    answer(&mut window, 1, 5);
    assert_eq!(batch(&mut window), Some((6, vec![5])));
    assert_eq!(batch(&mut window), Some((7, vec![6])));
    answer(&mut window, 6, 2);
    // More than may be in flight, in messages and bytes: when nothing else is.
    together(&mut window, 7..15, 1000);
    assert_eq!(batch(&mut window), Some((8, (7..15).collect())));
}

#[test]
fn new_messages_wait_for_company_and_replays_do_not() {
    let cut = Cut { linger: Duration::from_secs(1), ..CUT };
    let now = Instant::now();
    let mut window = window(1);
    connect(&mut window, None);
    assert!(!window.has_work(&cut, now));
    assert!(window.lingers_until(&cut, now).is_some());
    assert!(window.has_work(&cut, now + Duration::from_secs(2)));
    window.push(1, 1, now);
    window.push(2, 1, now);
    assert!(window.has_work(&cut, now), "the batch is full");
    batch(&mut window);
    window.push(3, 1, now);
    connect(&mut window, None);
    assert!(window.has_work(&cut, now));
}

#[test]
fn a_server_that_lost_what_it_had_answered_is_found_out() {
    let mut window = window(3);
    connect(&mut window, None);
    batch(&mut window);
    answer(&mut window, 1, 2);
    let verdict = connect(&mut window, Some(1));
    let Then::Fail(PublishErrorKind::ServerRegressed { expected, found }) = verdict.then else {
        panic!("{verdict:?}")
    };
    assert_eq!((expected, found), (2, 1));
}

#[test]
fn someone_else_under_our_identity_is_found_out() {
    let mut window = window(1);
    let verdict = connect(&mut window, Some(1));
    assert!(matches!(verdict.then, Then::Fail(PublishErrorKind::Fenced)), "{verdict:?}");
}

#[test]
fn a_forgotten_publisher_starts_over_and_what_was_sent_is_unknown() {
    let mut window = window(4);
    connect(&mut window, None);
    batch(&mut window);
    answer(&mut window, 1, 1);
    let verdict = connect(&mut window, None);
    assert!(matches!(verdict.then, Then::Again));
    let lost: Vec<u32> = verdict.lost.into_iter().map(|(message, _)| message).collect();
    assert_eq!(lost, [1, 2]);
    let hello = window.hello();
    assert_eq!((hello.epoch, hello.next, hello.resolved_below), (1, 1, 1));
    connect(&mut window, None);
    assert_eq!(batch(&mut window), Some((1, vec![3])));
}

#[test]
fn an_idle_publisher_that_was_forgotten_loses_nothing() {
    let mut window = window(1);
    connect(&mut window, None);
    batch(&mut window);
    answer(&mut window, 1, 1);
    let verdict = connect(&mut window, None);
    assert!(verdict.lost.is_empty() && matches!(verdict.then, Then::Again), "{verdict:?}");
}

#[test]
fn what_was_sent_too_long_ago_is_unknown_and_never_sent_again() {
    let late = Instant::now() + HORIZON * 2;
    let check = |last: Option<u64>| {
        let mut window = window(3);
        connect(&mut window, None);
        batch(&mut window);
        window.push(9, 1, late);
        window.hello();
        let verdict = window.welcome(welcome(last), late);
        let lost: Vec<u32> = verdict.lost.iter().map(|(message, _)| *message).collect();
        assert_eq!(lost, [0, 1, 2]);
        (verdict.then, batch(&mut window))
    };
    let (then, next) = check(Some(3));
    assert!(matches!(then, Then::Go));
    assert_eq!(next, Some((4, vec![9])));
    // The server does not have them: their sequences would be a gap.
    let (then, _) = check(Some(1));
    assert!(matches!(then, Then::Again));
}

#[test]
fn a_recreated_topic_fails_or_starts_over() {
    let check = |accept: bool| {
        let mut window = Window::new(accept);
        window.push(0, 1, Instant::now());
        connect(&mut window, None);
        batch(&mut window);
        let other = Welcome { topic_epoch: 8, ..welcome(None) };
        window.hello();
        window.welcome(other, Instant::now())
    };
    assert!(matches!(check(false).then, Then::Fail(PublishErrorKind::TopicRecreated)));
    let verdict = check(true);
    assert!(matches!(verdict.then, Then::Again));
    assert_eq!(verdict.lost.len(), 1);
}

#[test]
fn after_a_divergence_nothing_of_the_old_history_is_claimed() {
    let mut window = window(4);
    connect(&mut window, None);
    batch(&mut window);
    let verdict = window.diverged();
    assert_eq!(verdict.lost.len(), 3);
    let hello = window.hello();
    assert_eq!((hello.epoch, hello.next, hello.boot.len(), hello.topic_epoch), (1, 1, 0, 0));
}

/// A server's memory of one publisher, and its log.
#[derive(Debug, Default)]
struct Server {
    epoch: u32,
    log: Vec<u32>,
    last: u64,
    /// Frames on their way, in both directions.
    batches: VecDeque<(u64, Vec<u32>)>,
    results: VecDeque<(u64, u32)>,
    /// Messages that go together.
    together: Vec<std::ops::Range<u32>>,
}

impl Server {
    /// The first of those that a message goes with; itself if it goes alone.
    fn leader(&self, message: u32) -> u32 {
        let group = self.together.iter().find(|group| group.contains(&message));
        group.map_or(message, |group| group.start)
    }

    fn take(&mut self) {
        let Some((first, messages)) = self.batches.pop_front() else { return };
        for group in &self.together {
            if messages.iter().any(|message| group.contains(message)) {
                assert_eq!(
                    messages,
                    group.clone().collect::<Vec<_>>(),
                    "a batch is torn, or not alone"
                );
            }
        }
        for (sequence, message) in (first..).zip(&messages) {
            assert!(sequence <= self.last + 1, "{sequence} leaves a gap after {}", self.last);
            if sequence == self.last + 1 {
                self.log.push(*message);
                self.last = sequence;
            }
        }
        let count = u32::try_from(messages.len()).unwrap();
        self.results.push_back((first, count));
    }
}

#[derive(Clone, Debug)]
enum Step {
    Enqueue,
    EnqueueTogether(u32),
    Send,
    Take,
    Answer,
    GiveUpUnsent,
    Cut,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn the_log_has_each_message_once_in_the_order_of_the_calls(
        steps in prop::collection::vec(prop_oneof![
            4 => Just(Step::Enqueue),
            2 => (1..9_u32).prop_map(Step::EnqueueTogether),
            4 => Just(Step::Send),
            3 => Just(Step::Take),
            3 => Just(Step::Answer),
            1 => Just(Step::GiveUpUnsent),
            1 => Just(Step::Cut),
        ], 1..200),
    ) {
        let (mut window, mut server) = (Window::new(false), Server::default());
        let (mut expected, mut answered) = (Vec::new(), Vec::new());
        let mut next = 0_u32;
        window.hello();
        window.welcome(welcome(None), Instant::now());
        let finish = [Step::Cut].into_iter().chain(
            [Step::Send, Step::Take, Step::Answer].into_iter().cycle().take(2000));
        for step in steps.into_iter().chain(finish) {
            match step {
                Step::Enqueue => {
                    window.push(next, 1, Instant::now());
                    expected.push(next);
                    next += 1;
                }
                Step::EnqueueTogether(count) => {
                    let group = next..next + count;
                    next = group.end;
                    let items = group.clone().map(|message| (message, 1)).collect();
                    window.push_together(items, Instant::now());
                    expected.extend(group.clone());
                    server.together.push(group);
                }
                Step::Send => server.batches.extend(batch(&mut window)),
                Step::Take => server.take(),
                Step::Answer => if let Some((first, count)) = server.results.pop_front() {
                    answered.extend(answer(&mut window, first, count));
                },
                Step::GiveUpUnsent => {
                    let oldest = next.saturating_sub(3);
                    let gone =
                        window.give_up_unsent(|message| server.leader(*message) >= oldest);
                    expected.retain(|message| !gone.contains(message));
                }
                Step::Cut => {
                    server.batches.clear();
                    server.results.clear();
                    let hello = window.hello();
                    prop_assert_eq!(hello.epoch, server.epoch);
                    let last = (server.last > 0).then_some(server.last);
                    let verdict = window.welcome(welcome(last), Instant::now());
                    prop_assert!(matches!(verdict.then, Then::Go), "{verdict:?}");
                }
            }
        }
        prop_assert_eq!(&server.log, &expected);
        prop_assert_eq!(&answered, &expected);
        prop_assert!(window.is_empty());
    }
}
