//! A hand-made history for every anomaly, and clean ones that look suspicious.

use super::*;

const TOPIC: &str = "t";

fn value(publisher: u32, counter: u32) -> Value {
    Value { publisher, counter }
}

fn id(sequence: u64) -> Id {
    Id::new(TOPIC, 1, sequence)
}

/// Builds a history line by line.
#[derive(Default)]
struct Story(Vec<Event>);

impl Story {
    fn invoked(mut self, value: Value) -> Self {
        self.0.push(Event::Invoked(value, TOPIC.into()));
        self
    }

    fn stored(mut self, value: Value, sequence: u64) -> Self {
        self.0.push(Event::Stored(value, id(sequence)));
        self
    }

    fn published(self, value: Value, sequence: u64) -> Self {
        self.invoked(value).stored(value, sequence)
    }

    fn refused(mut self, value: Value) -> Self {
        self.0.push(Event::Refused(value));
        self
    }

    fn unknown(mut self, value: Value) -> Self {
        self.0.push(Event::Unknown(value));
        self
    }

    fn shown(mut self, process: u32, sequence: u64, value: Value) -> Self {
        let process = Process::new("s", process);
        self.0.push(Event::Delivered(process, id(sequence), Some(value)));
        self
    }

    fn acked(mut self, process: u32, sequence: u64) -> Self {
        self.0.push(Event::Acked(Process::new("s", process), id(sequence)));
        self
    }

    fn confirmed(mut self, process: u32, sequence: u64) -> Self {
        self = self.acked(process, sequence);
        self.0.push(Event::AckConfirmed(Process::new("s", process), id(sequence)));
        self
    }

    fn nacked(mut self, process: u32, sequence: u64) -> Self {
        self.0.push(Event::Nacked(Process::new("s", process), id(sequence)));
        self
    }

    fn gap(mut self, process: u32, first: u64, last: u64) -> Self {
        self.0.push(Event::Gap(Process::new("s", process), id(first), last));
        self
    }

    fn fault(mut self) -> Self {
        self.0.push(Event::Fault("kill".into()));
        self
    }

    fn anomalies(&self, stored: &[Value]) -> Vec<Anomaly> {
        self.anomalies_in(&Log::of(TOPIC, stored.iter().copied()))
    }

    fn anomalies_in(&self, log: &Log) -> Vec<Anomaly> {
        let expectation = Expectation { complete: false, ..Expectation::everything("s") };
        check(&self.0, std::slice::from_ref(log), &[expectation])
    }
}

/// Three messages of one publisher, all confirmed.
fn three() -> (Story, [Value; 3]) {
    let values = [value(1, 1), value(1, 2), value(1, 3)];
    let story = values
        .iter()
        .zip(1..)
        .fold(Story::default(), |story, (value, sequence)| story.published(*value, sequence));
    (story, values)
}

#[test]
fn a_clean_history_has_no_anomalies() {
    let (story, values) = three();
    let [a, b, c] = values;
    let story = story
        .shown(1, 1, a)
        .confirmed(1, 1)
        .shown(1, 2, b)
        .fault()
        .acked(1, 2)
        .shown(2, 2, b)
        .confirmed(2, 2)
        .shown(2, 3, c);
    assert_eq!(story.anomalies(&values), []);
}

#[test]
fn an_unknown_publish_may_be_stored_or_not() {
    let (story, [a, b, c]) = three();
    let maybe = value(2, 1);
    let story = story.invoked(maybe).fault().unknown(maybe);
    assert_eq!(story.anomalies(&[a, b, c]), []);
    assert_eq!(story.anomalies(&[a, b, c, maybe]), []);
}

#[test]
fn a_confirmed_publish_that_is_not_stored_is_lost() {
    let (story, [a, b, c]) = three();
    let lost = Anomaly::Lost { value: c, id: id(3) };
    assert_eq!(story.anomalies(&[a, b]), [lost]);
}

#[test]
fn another_value_in_place_of_a_confirmed_one_is_a_loss_too() {
    let (story, [a, b, c]) = three();
    let other = value(2, 1);
    let anomalies = story.invoked(other).anomalies(&[a, b, other]);
    let lost = Anomaly::Lost { value: c, id: id(3) };
    assert!(anomalies.contains(&lost));
    assert!(anomalies.contains(&Anomaly::SeveralValues { id: id(3), values: vec![c, other] }));
}

#[test]
fn what_was_trimmed_is_not_lost() {
    let (story, values) = three();
    let mut log = Log::of(TOPIC, values);
    log.entries.remove(&1);
    log.first = 2;
    assert_eq!(story.anomalies_in(&log), []);
}

#[test]
fn what_nobody_published_is_a_phantom() {
    let (story, [a, b, c]) = three();
    let (never, refused) = (value(9, 9), value(9, 10));
    let story = story.invoked(refused).refused(refused);
    let phantom = |sequence, value| Anomaly::Phantom { id: id(sequence), value };
    assert_eq!(
        story.anomalies(&[a, b, c, never, refused]),
        [phantom(4, Some(never)), phantom(5, Some(refused))]
    );
    let mut log = Log::of(TOPIC, [a, b, c, never]);
    log.entries.get_mut(&4).unwrap().value = None;
    assert_eq!(story.anomalies_in(&log), [phantom(4, None)]);
}

#[test]
fn one_identity_stored_twice_has_several_ids() {
    let (story, [a, b, c]) = three();
    let twice = Anomaly::SeveralIds { value: c, ids: vec![id(3), id(4)] };
    assert_eq!(story.anomalies(&[a, b, c, c]), [twice]);
}

#[test]
fn a_retry_answered_with_another_id_has_several_ids() {
    let (story, [a, b, c]) = three();
    let story = story.published(b, 3);
    let anomalies = story.anomalies(&[a, b, c]);
    assert!(anomalies.contains(&Anomaly::SeveralIds { value: b, ids: vec![id(2), id(3)] }));
}

#[test]
fn a_delivery_under_another_id_has_several_ids() {
    let (story, [a, b, c]) = three();
    let story = story.shown(1, 1, b);
    let anomalies = story.anomalies(&[a, b, c]);
    assert!(anomalies.contains(&Anomaly::SeveralValues { id: id(1), values: vec![a, b] }));
}

#[test]
fn messages_of_one_publisher_out_of_order_are_reordered() {
    let (a, b) = (value(1, 1), value(1, 2));
    let story = Story::default().invoked(a).invoked(b);
    let reordered = Anomaly::Reordered { first: a, second: b, id: id(1) };
    assert_eq!(story.anomalies(&[b, a]), [reordered]);
}

#[test]
fn a_publish_that_began_after_a_confirmation_comes_after_it() {
    let (early, late) = (value(1, 1), value(2, 1));
    let story = Story::default().published(early, 2).published(late, 1);
    let anomaly = Anomaly::BackInTime { value: late, id: id(1), confirmed: id(2) };
    assert_eq!(story.anomalies(&[late, early]), [anomaly]);
}

#[test]
fn a_hole_in_what_a_process_is_shown_is_a_skip() {
    let (story, values) = three();
    let [a, _, c] = values;
    let story = story.shown(1, 1, a).shown(1, 3, c);
    let skipped = Anomaly::Skipped { process: Process::new("s", 1), missing: id(2), shown: id(3) };
    assert_eq!(story.anomalies(&values), [skipped]);
}

#[test]
fn a_new_process_that_does_not_begin_at_the_first_unacked_message_skips() {
    let (story, values) = three();
    let [a, b, c] = values;
    let story = story.shown(1, 1, a).confirmed(1, 1).shown(1, 2, b).fault();
    let story = story.shown(2, 3, c);
    let skipped = Anomaly::Skipped { process: Process::new("s", 2), missing: id(2), shown: id(3) };
    assert_eq!(story.anomalies(&values), [skipped]);
}

#[test]
fn a_gap_that_was_told_is_not_a_skip() {
    let (story, values) = three();
    let [a, _, c] = values;
    let story = story.shown(1, 1, a).gap(1, 2, 2).shown(1, 3, c);
    assert_eq!(story.anomalies(&values), []);
}

#[test]
fn a_message_for_others_is_not_a_skip() {
    let (story, values) = three();
    let [a, _, c] = values;
    let mut log = Log::of(TOPIC, values);
    log.entries.get_mut(&2).unwrap().recipients = vec!["other".into()];
    assert_eq!(story.shown(1, 1, a).shown(1, 3, c).anomalies_in(&log), []);
}

#[test]
fn a_message_shown_twice_to_one_process_is_repeated() {
    let (story, values) = three();
    let story = story.shown(1, 1, values[0]).fault().shown(1, 1, values[0]);
    let repeated = Anomaly::Repeated { process: Process::new("s", 1), id: id(1) };
    assert_eq!(story.anomalies(&values), [repeated]);
}

#[test]
fn a_message_shown_after_later_ones_goes_backwards() {
    let (story, values) = three();
    let [a, b, _] = values;
    let story = story.acked(1, 1).shown(1, 2, b).shown(1, 1, a);
    let backwards = Anomaly::Backwards { process: Process::new("s", 1), shown: id(1), after: 2 };
    assert_eq!(story.anomalies(&values), [backwards]);
}

#[test]
fn after_a_nack_everything_from_there_on_may_come_again_once() {
    let (story, values) = three();
    let [a, b, c] = values;
    let story = story
        .shown(1, 1, a)
        .shown(1, 2, b)
        .nacked(1, 1)
        .shown(1, 3, c)
        .shown(1, 1, a)
        .shown(1, 2, b)
        .shown(1, 3, c);
    assert_eq!(story.anomalies(&values), []);
    let repeated = Anomaly::Repeated { process: Process::new("s", 1), id: id(3) };
    assert_eq!(story.shown(1, 3, c).anomalies(&values), [repeated]);
}

#[test]
fn after_a_nack_the_order_is_kept() {
    let (story, values) = three();
    let [a, b, _] = values;
    let story = story.shown(1, 1, a).shown(1, 2, b).nacked(1, 1).shown(1, 2, b);
    let skipped = Anomaly::Skipped { process: Process::new("s", 1), missing: id(1), shown: id(2) };
    assert_eq!(story.anomalies(&values), [skipped]);
}

#[test]
fn a_confirmed_ack_ends_deliveries_to_all_processes() {
    let (story, values) = three();
    let story = story.shown(1, 1, values[0]).confirmed(1, 1).fault();
    let redelivered = Anomaly::RedeliveredAfterAck { process: Process::new("s", 2), id: id(1) };
    let story = story.shown(2, 1, values[0]);
    assert_eq!(story.anomalies(&values), [redelivered]);
}

#[test]
fn garbage_is_noticed() {
    let (mut story, values) = three();
    let process = Process::new("s", 1);
    story.0.push(Event::Delivered(process.clone(), id(1), None));
    let garbage = Anomaly::Garbage { process, id: id(1) };
    assert_eq!(story.anomalies(&values), [garbage]);
}

#[test]
fn what_was_never_shown_is_noticed_at_the_end() {
    let (story, values) = three();
    let story = story.shown(1, 1, values[0]).gap(1, 2, 2);
    let log = [Log::of(TOPIC, values)];
    let missing = Anomaly::NeverDelivered { subscription: "s".into(), id: id(3) };
    assert_eq!(check(&story.0, &log, &[Expectation::everything("s")]), [missing]);
}

#[test]
fn a_run_without_enough_faults_is_void() {
    let (story, values) = three();
    let log = [Log::of(TOPIC, values)];
    let gate = Gate { stored: 3, faults: 1, ..Gate::default() };
    let verdict = judge(&story.0, &log, &[], gate).unwrap_err();
    assert!(verdict.to_string().contains("void"), "{verdict}");
    assert!(judge(&story.fault().0, &log, &[], gate).is_ok());
}

#[test]
fn publishes_that_a_fault_finds_unanswered_are_in_doubt() {
    let (story, _) = three();
    let story = story.invoked(value(2, 1)).fault().stored(value(2, 1), 4);
    let found = Gate::of(&story.fault().0);
    assert_eq!((found.stored, found.faults, found.in_doubt), (4, 2, 1));
}

#[test]
fn a_report_shows_what_happened_to_the_message() {
    let (story, [a, b, _]) = three();
    let log = [Log::of(TOPIC, [a, b])];
    let report = judge(&story.0, &log, &[], Gate::default()).unwrap_err().to_string();
    for part in ["LOST: p1#3", "publish p1#3 to t", "stored p1#3 as t@1/3"] {
        assert!(report.contains(part), "{report}");
    }
}
