//! The set of what was processed, as runs of sequences. Pure: no I/O, no clock.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use crate::limits;
#[cfg(feature = "inbox")]
use crate::local::FileError;
use crate::message::ReceivedMessage;
use crate::subscriber::Position;

/// What was processed cannot be remembered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InboxError {
    /// There are too many separate runs of processed messages. Dense sequences make one run, each
    /// hole adds one; what lies below the acked floor of a subscription is forgotten.
    #[error(
        "the inbox holds {limit} runs of processed messages, its limit: a message near the acked \
         floor of a subscription fails for long; process it, or dead-letter it"
    )]
    Full {
        /// How many it may hold.
        limit: usize,
    },
    /// Its file cannot be used.
    #[cfg(feature = "inbox")]
    #[error(transparent)]
    File(#[from] FileError),
}

/// Whose messages: the subscription, the topic and its epoch.
pub(super) type Scope = (Arc<str>, Arc<str>, u64);

/// Consecutive messages, all of them processed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) last: u64,
    /// The latest publish time among them, in milliseconds.
    pub(super) latest: u64,
}

/// What became of a run, for whoever keeps a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Put { first: u64, run: Run },
    Remove { first: u64 },
}

/// The messages that were processed.
#[derive(Debug, Default)]
pub(super) struct Processed {
    // Bounded by `limits::INBOX_RUNS`.
    topics: BTreeMap<Scope, BTreeMap<u64, Run>>,
    runs: usize,
}

pub(super) fn scope(subscription: &str, message: &ReceivedMessage) -> Scope {
    (subscription.into(), Arc::clone(&message.id.topic), message.id.epoch)
}

fn millis(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// The run with this sequence in it.
fn find(runs: &BTreeMap<u64, Run>, sequence: u64) -> Option<(u64, Run)> {
    let (first, run) = runs.range(..=sequence).next_back()?;
    (run.last >= sequence).then_some((*first, *run))
}

impl Processed {
    /// A run from a copy.
    #[cfg(feature = "inbox")]
    pub(super) fn load(&mut self, scope: Scope, first: u64, run: Run) {
        let before = self.topics.entry(scope).or_default().insert(first, run);
        self.runs += usize::from(before.is_none());
    }

    /// Whether one more run has its place.
    pub(super) fn check_room(&self) -> Result<(), InboxError> {
        let limit = limits::INBOX_RUNS;
        if self.runs < limit { Ok(()) } else { Err(InboxError::Full { limit }) }
    }

    /// A message that is later than all of its run is another one than was processed: the server's
    /// data was restored from an older copy, and its sequences were given again.
    pub(super) fn contains(&self, subscription: &str, message: &ReceivedMessage) -> bool {
        let runs = self.topics.get(&scope(subscription, message));
        let run = runs.and_then(|runs| find(runs, message.id.sequence));
        run.is_some_and(|(_, run)| millis(message.publish_time) <= run.latest)
    }

    pub(super) fn insert(&mut self, subscription: &str, message: &ReceivedMessage) -> Vec<Change> {
        let (sequence, time) = (message.id.sequence, millis(message.publish_time));
        let runs = self.topics.entry(scope(subscription, message)).or_default();
        let mut changes = Vec::new();
        if let Some((first, run)) = find(runs, sequence) {
            if time <= run.latest {
                return changes;
            }
            // What was processed from here on is no more, and its sequences stand for others.
            let gone: Vec<u64> = runs.range(sequence..).map(|(first, _)| *first).collect();
            changes.extend(gone.into_iter().map(|first| Change::Remove { first }));
            if first < sequence {
                changes.push(Change::Put { first, run: Run { last: sequence - 1, ..run } });
            }
            self.runs -= apply(runs, &changes);
        }
        let before = sequence.checked_sub(1).and_then(|before| find(runs, before));
        let after = sequence.checked_add(1).and_then(|after| Some((after, *runs.get(&after)?)));
        let mut merged = Run { last: sequence, latest: time };
        let mut first = sequence;
        let mut merge = Vec::new();
        if let Some((next, run)) = after {
            merged = Run { last: run.last, latest: time.max(run.latest) };
            merge.push(Change::Remove { first: next });
        }
        if let Some((earlier, run)) = before {
            first = earlier;
            merged.latest = merged.latest.max(run.latest);
        }
        merge.push(Change::Put { first, run: merged });
        let had = runs.len();
        apply(runs, &merge);
        self.runs = self.runs + runs.len() - had;
        changes.extend(merge);
        changes
    }

    /// Forgets what may be: below the floor, and of incarnations that are gone.
    pub(super) fn forget(
        &mut self,
        subscription: &str,
        position: &Position,
    ) -> Vec<(Scope, Vec<Change>)> {
        let mut forgotten = Vec::new();
        for (scope, runs) in &mut self.topics {
            let (by, topic, epoch) = scope;
            let mut named = position.topics.iter().filter(|at| at.topic == *topic).peekable();
            if **by != *subscription || named.peek().is_none() {
                continue;
            }
            let floor = named.find(|at| at.epoch == *epoch).map_or(u64::MAX, |at| at.acked_floor);
            let changes = below(runs, floor);
            self.runs -= apply(runs, &changes);
            if !changes.is_empty() {
                forgotten.push((scope.clone(), changes));
            }
        }
        self.topics.retain(|_, runs| !runs.is_empty());
        forgotten
    }
}

/// What is to be done so that nothing up to the floor is left.
fn below(runs: &BTreeMap<u64, Run>, floor: u64) -> Vec<Change> {
    let mut changes = Vec::new();
    for (first, run) in runs.range(..=floor) {
        changes.push(Change::Remove { first: *first });
        if run.last > floor {
            changes.push(Change::Put { first: floor + 1, run: *run });
        }
    }
    changes
}

/// Says by how many runs there are fewer; for changes that do not add any.
fn apply(runs: &mut BTreeMap<u64, Run>, changes: &[Change]) -> usize {
    let before = runs.len();
    for change in changes {
        match *change {
            Change::Put { first, run } => runs.insert(first, run),
            Change::Remove { first } => runs.remove(&first),
        };
    }
    before.saturating_sub(runs.len())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::super::tests::message;
    use super::*;
    use crate::subscriber::TopicPosition;

    fn at(floor: u64, epoch: u64) -> Position {
        let topic = TopicPosition {
            topic: "t".into(),
            epoch,
            last_delivered: 0,
            acked_floor: floor,
            head: 0,
            caught_up: false,
            behind: 0,
            buffered: 0,
            in_hand: 0,
        };
        Position { topics: vec![topic], caught_up: false }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Insert(u64),
        Forget(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            8 => (1_u64..60).prop_map(Step::Insert),
            1 => (0_u64..60).prop_map(Step::Forget),
        ]
    }

    proptest! {
        #[test]
        fn it_is_the_set_of_what_was_processed_and_a_copy_follows(
            steps in prop::collection::vec(step(), 0..200),
        ) {
            let (mut processed, mut model) = (Processed::default(), BTreeSet::new());
            let mut copy = BTreeMap::new();
            for step in steps {
                let changes = match step {
                    Step::Insert(sequence) => {
                        model.insert(sequence);
                        processed.insert("s", &message(sequence, 1))
                    }
                    Step::Forget(floor) => {
                        model.retain(|sequence| *sequence > floor);
                        let forgotten = processed.forget("s", &at(floor, 7));
                        forgotten.into_iter().flat_map(|(_, changes)| changes).collect()
                    }
                };
                apply(&mut copy, &changes);
                for sequence in 1..62 {
                    let contains = processed.contains("s", &message(sequence, 1));
                    prop_assert_eq!(contains, model.contains(&sequence), "{}", sequence);
                }
                let runs = model.iter().filter(|first| !model.contains(&(**first - 1))).count();
                prop_assert_eq!(processed.runs, runs);
                prop_assert_eq!(copy.len(), runs);
                prop_assert_eq!(processed.topics.values().next().cloned().unwrap_or_default(), copy.clone());
            }
        }
    }

    #[test]
    fn subscriptions_topics_and_epochs_are_told_apart() {
        let mut processed = Processed::default();
        processed.insert("s", &message(1, 1));
        let mut other = message(1, 1);
        assert!(!processed.contains("other", &other));
        other.id.epoch = 8;
        assert!(!processed.contains("s", &other));
        other.id = message(1, 1).id;
        other.id.topic = "u".into();
        assert!(!processed.contains("s", &other));
    }

    #[test]
    fn sequences_that_a_restored_server_gives_again_stand_for_other_messages() {
        let mut processed = Processed::default();
        for sequence in (1..=20).chain(30..=40) {
            processed.insert("s", &message(sequence, sequence));
        }
        let again = |sequence| message(sequence, 100);
        assert!(processed.contains("s", &message(15, 15)));
        assert!(!processed.contains("s", &again(11)));
        processed.insert("s", &again(11));
        assert!(processed.contains("s", &again(11)) && processed.contains("s", &message(10, 10)));
        for sequence in 12..=40 {
            // Also of the same moment as the first.
            assert!(!processed.contains("s", &again(sequence)), "{sequence}");
        }
        assert_eq!(processed.runs, 1);
    }

    #[test]
    fn an_incarnation_that_is_gone_is_forgotten() {
        let mut processed = Processed::default();
        processed.insert("s", &message(5, 1));
        processed.forget("other", &at(9, 8));
        processed.forget("s", &Position::default());
        assert!(processed.contains("s", &message(5, 1)));
        processed.forget("s", &at(0, 8));
        assert!(!processed.contains("s", &message(5, 1)));
        assert!(processed.topics.is_empty());
    }

    #[test]
    fn it_is_bounded() {
        let mut processed = Processed::default();
        for hole in 0..limits::INBOX_RUNS as u64 {
            assert_eq!(processed.check_room(), Ok(()));
            processed.insert("s", &message(2 * hole + 2, 1));
        }
        assert!(matches!(processed.check_room(), Err(InboxError::Full { .. })));
        processed.forget("s", &at(9, 7));
        assert_eq!(processed.check_room(), Ok(()));
    }
}
