//! Sets of sequences that mostly come one after the other. Pure: no I/O, no clock.

use std::ops::RangeInclusive;

use rangemap::RangeInclusiveSet;

/// A set of sequences. The run that grows is kept apart, so that the next one is only counted.
#[derive(Debug, Default)]
pub(super) struct Runs {
    /// Has nothing of `last`.
    others: RangeInclusiveSet<u64>,
    /// None of them is above this.
    others_end: u64,
    last: Option<(u64, u64)>,
}

impl Runs {
    pub(super) fn insert(&mut self, sequence: u64) {
        if self.contains(sequence) {
            return;
        }
        match &mut self.last {
            Some((_, end)) if end.checked_add(1) == Some(sequence) => *end = sequence,
            Some(_) | None => {
                self.all();
                self.last = Some((sequence, sequence));
            }
        }
    }

    pub(super) fn contains(&self, sequence: u64) -> bool {
        self.last.is_some_and(|(first, last)| (first..=last).contains(&sequence))
            || sequence <= self.others_end && self.others.contains(&sequence)
    }

    pub(super) fn remove(&mut self, range: RangeInclusive<u64>) {
        self.all();
        self.others.remove(range);
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    pub(super) fn is_empty(&self) -> bool {
        self.last.is_none() && self.others.is_empty()
    }

    /// How many there are.
    pub(super) fn count(&self) -> u64 {
        let last = self.last.map_or(0, |(first, last)| last - first + 1);
        self.others.iter().map(|range| range.end() - range.start() + 1).sum::<u64>() + last
    }

    /// All of them, as ranges.
    pub(super) fn all(&mut self) -> &RangeInclusiveSet<u64> {
        if let Some((first, last)) = self.last.take() {
            self.others_end = self.others_end.max(last);
            self.others.insert(first..=last);
        }
        &self.others
    }

    /// All of them, and none is left.
    pub(super) fn take(&mut self) -> Vec<RangeInclusive<u64>> {
        self.all();
        std::mem::take(&mut self.others).into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_a_set(steps in prop::collection::vec((0..8_u32, 1..40_u64, 0..5_u64), 1..80)) {
            let (mut runs, mut model) = (Runs::default(), BTreeSet::new());
            let mut next = 1;
            for (step, sequence, more) in steps {
                match step {
                    0..5 => {
                        runs.insert(next);
                        model.insert(next);
                        next += 1;
                    }
                    5 => {
                        next = sequence;
                    }
                    6 => {
                        runs.remove(sequence..=sequence + more);
                        model.retain(|other| !(sequence..=sequence + more).contains(other));
                    }
                    _ => {
                        prop_assert!(runs.all().iter().cloned().flatten().eq(model.iter().copied()));
                    }
                }
                prop_assert_eq!(runs.count(), model.len() as u64);
                prop_assert_eq!(runs.is_empty(), model.is_empty());
                prop_assert!((1..60).all(|n| runs.contains(n) == model.contains(&n)));
            }
            prop_assert!(runs.take().into_iter().flatten().eq(model));
            prop_assert!(runs.is_empty());
        }
    }
}
