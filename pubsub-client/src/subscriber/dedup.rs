//! Which messages of a topic are done with. Pure: no I/O, no clock.

use std::ops::RangeInclusive;

use rangemap::RangeInclusiveSet;

/// How many separate runs are remembered. Acks in order make one run; each hole adds one. When
/// there are more, the oldest is forgotten: its messages would be shown again if the server
/// delivered them again, which it has no reason to.
const MAX_RUNS: usize = 16_384;

/// The messages that the server has confirmed as received: all up to a floor, and some above it.
///
/// The server does not deliver them again. This set is the second line: whatever is in it is
/// never shown again, even if a server does.
#[derive(Debug, Default)]
pub(super) struct Dedup {
    floor: u64,
    above: RangeInclusiveSet<u64>,
}

impl Dedup {
    pub(super) fn new(floor: u64) -> Self {
        Self { floor, above: RangeInclusiveSet::new() }
    }

    /// All messages up to here are done with.
    pub(super) fn floor(&self) -> u64 {
        self.floor
    }

    pub(super) fn contains(&self, sequence: u64) -> bool {
        sequence <= self.floor || !self.above.is_empty() && self.above.contains(&sequence)
    }

    /// How many messages up to this one are not done with.
    pub(super) fn open_up_to(&self, last: u64) -> u64 {
        let done: u64 = self.above.iter().map(|range| range.end() - range.start() + 1).sum();
        last.saturating_sub(self.floor).saturating_sub(done)
    }

    /// What is done with, as ranges.
    pub(super) fn ranges(&self) -> impl Iterator<Item = RangeInclusive<u64>> {
        let low = (self.floor > 0).then_some(1..=self.floor);
        low.into_iter().chain(self.above.iter().cloned())
    }

    pub(super) fn insert(&mut self, range: RangeInclusive<u64>) {
        self.above.insert(range);
        self.raise_floor(self.floor);
        if self.above.len() > MAX_RUNS
            && let Some(oldest) = self.above.first().cloned()
        {
            self.above.remove(oldest);
        }
    }

    /// The server says that all messages up to here are done with.
    pub(super) fn raise_floor(&mut self, floor: u64) {
        self.floor = self.floor.max(floor);
        // Sequences are from 1, so that everything from 0 up to the floor can go.
        self.above.remove(0..=self.floor);
        let next = self.floor.saturating_add(1);
        if let Some(run) = self.above.get(&next).cloned() {
            self.floor = *run.end();
            self.above.remove(run);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_the_set_of_what_was_inserted(
            ranges in prop::collection::vec((1_u64..200, 0_u64..10), 0..60),
            floors in prop::collection::vec(0_u64..50, 0..4),
        ) {
            let mut dedup = Dedup::new(3);
            let mut model: BTreeSet<u64> = (1..=3).collect();
            for (first, more) in ranges {
                dedup.insert(first..=first + more);
                model.extend(first..=first + more);
            }
            for floor in floors {
                dedup.raise_floor(floor);
                model.extend(1..=floor);
            }
            for sequence in 1..250 {
                prop_assert_eq!(dedup.contains(sequence), model.contains(&sequence));
            }
            let floor = (1..).find(|sequence| !model.contains(sequence)).unwrap() - 1;
            prop_assert_eq!(dedup.floor(), floor);
        }
    }

    #[test]
    fn it_is_bounded() {
        let mut dedup = Dedup::default();
        for hole in 0..50_000 {
            dedup.insert(2 * hole + 2..=2 * hole + 2);
        }
        assert_eq!(dedup.above.len(), MAX_RUNS);
        assert!(dedup.contains(100_000));
        assert!(!dedup.contains(2));
    }
}
