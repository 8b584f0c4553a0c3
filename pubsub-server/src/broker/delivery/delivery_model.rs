//! Delivery against a model as simple as can be, in all kinds and with all failure policies: what
//! can happen to a subscription happens to it, in random order, and after each step what the
//! delivery says is compared with what is true.
//!
//! `model_steps` is what can happen, `model_truth` what is true and what may be delivered,
//! `model_consumer` the other end of the connections, and `model_world` moves them all. The long
//! form, with 10,000 cases or more, says how often each thing has happened, and fails if one is
//! missing.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;

use proptest::prelude::*;
use proptest::test_runner::{TestError, TestRunner};

use super::model_steps::{Step, setup, steps};
use super::model_world::World;
use crate::record::SubscriptionKind;

/// Cases from which on everything has to happen often enough.
const LONG: u32 = 10_000;

/// How often what has happened.
#[derive(Debug, Default)]
struct Tally {
    cases: u64,
    steps: u64,
    took: BTreeMap<&'static str, u64>,
}

#[test]
fn every_message_is_shown_in_order_until_it_is_acked() {
    run(SubscriptionKind::Exclusive);
}

#[test]
fn every_message_goes_to_one_consumer_until_it_is_acked() {
    run(SubscriptionKind::Shared);
}

#[test]
fn the_messages_of_a_key_come_in_order_to_one_consumer_at_a_time() {
    run(SubscriptionKind::KeyOrdered);
}

fn run(kind: SubscriptionKind) {
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    let long = config.cases >= LONG;
    let tally = RefCell::new(Tally::default());
    let mut runner = TestRunner::new(config);
    let result = runner.run(&(setup(kind), steps()), |(setup, steps)| {
        let mut world = World::new(setup);
        steps.iter().for_each(|step| world.step(step));
        let took = std::mem::take(&mut world.took);
        world.finish();
        tally.borrow_mut().add(&steps, took);
        Ok(())
    });
    match result {
        Ok(()) => {}
        Err(TestError::Fail(why, (setup, steps))) => {
            let steps = steps.iter().map(|step| format!("    {step:?}\n")).collect::<String>();
            panic!("{why}\n  {setup:?}\n{steps}");
        }
        Err(error) => panic!("{error}"),
    }
    if long {
        tally.borrow().judge(kind);
    }
}

impl Tally {
    fn add(&mut self, steps: &[Step], took: impl IntoIterator<Item = &'static str>) {
        self.cases += 1;
        self.steps += steps.len() as u64;
        took.into_iter().for_each(|what| *self.took.entry(what).or_default() += 1);
    }

    /// Prints in how many percent of the cases each thing happened. Each has to, now and then.
    fn judge(&self, kind: SubscriptionKind) {
        let each = self.steps / self.cases;
        let mut table = format!("{kind:?}: {} cases of {each} steps on average\n", self.cases);
        let mut missing = Vec::new();
        for what in expected(kind) {
            let percent = 100.0 * self.count(what) as f64 / self.cases as f64;
            table += &format!("{percent:7.2} %  {what}\n");
            if percent < 1.0 {
                missing.push(what);
            }
        }
        // Past the test harness, which would keep it to itself.
        std::io::stderr().write_all(table.as_bytes()).unwrap();
        assert!(missing.is_empty(), "in less than 1 % of the cases: {missing:?}");
        assert!(each >= 50, "{each} steps are too few");
        let known: BTreeSet<_> = expected(kind).collect();
        let unknown: Vec<_> = self.took.keys().filter(|what| !known.contains(*what)).collect();
        assert!(unknown.is_empty(), "not expected: {unknown:?}");
    }

    fn count(&self, what: &str) -> u64 {
        self.took.get(what).copied().unwrap_or(0)
    }
}

/// What has to happen.
fn expected(kind: SubscriptionKind) -> impl Iterator<Item = &'static str> {
    let more: &[&str] = match kind {
        SubscriptionKind::Exclusive => &EXCLUSIVE,
        SubscriptionKind::Shared => &COMPETING,
        SubscriptionKind::KeyOrdered => &KEY_ORDERED,
    };
    EVERYWHERE.iter().chain(more).copied()
}

const EVERYWHERE: [&str; 59] = [
    "publish",
    "publish for others",
    "publish with a key",
    "deliver",
    "deliver in vain",
    "what is for others is passed before its turn",
    "credit is used up",
    "a large message goes alone",
    "report what is started",
    "ack",
    "ack of what is started",
    "ack by an older handle",
    "ack of what is with nobody",
    "ack that does not arrive",
    "nack",
    "nack with a delay",
    "nack with the backoff",
    "nack, uncounted",
    "nack for good",
    "nack of what was counted already",
    "nack that does not arrive",
    "a failed message comes again",
    "a message has to wait for a moment",
    "a time to wait is over",
    "ack timeout",
    "ack timeout of the last attempt",
    "ack timeout that is not heard of",
    "what failed too often is condemned",
    "what is condemned is let go",
    "letting go is put off",
    "connection cut",
    "disconnect",
    "reconnect",
    "a welcome that does not arrive",
    "a claim of what is held",
    "a claim without what was sent",
    "a claim with acks that did not arrive",
    "a claim with nacks that did not arrive",
    "a claim with nacks that had arrived",
    "a claim from before a seek",
    "some of a claim is dropped",
    "join",
    "goodbye",
    "goodbye with messages",
    "superseded by a new process",
    "superseded with something in a handler",
    "consumer lost",
    "consumer lost with something in a handler",
    "come back without a place",
    "a suspect comes again",
    "a suspect waits for another one",
    "a suspect waits no longer for another one",
    "restart",
    "restart that has lost acks",
    "seek back",
    "seek forward",
    "retention passes the floor",
    "a gap is told",
    "a gap is known",
];
const EXCLUSIVE: [&str; 4] = [
    "a message waits for credit",
    "a nack takes others back",
    "stand by",
    "a consumer that stood by takes over",
];
const COMPETING: [&str; 3] =
    ["reconnect after a restart", "consumer lost after a restart", "messages are withheld"];
const KEY_ORDERED: [&str; 4] = [
    "a nack takes others back",
    "reconnect after a restart",
    "consumer lost after a restart",
    "messages are withheld",
];
