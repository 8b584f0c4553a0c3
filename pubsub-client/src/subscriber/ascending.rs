//! A map whose keys mostly come in ascending order and go in the same order. Pure: no I/O, no clock.

use std::collections::VecDeque;
use std::ops::RangeInclusive;

/// Places without a value that are left standing beside as many as there are values.
const SLACK: usize = 32;

/// A map by sequence: a queue in which what comes last and what goes first cost next to nothing, and
/// everything else what a search costs.
#[derive(Debug)]
pub(super) struct Ascending<T> {
    /// Ascending. What goes from the middle leaves its place behind; the ends have values.
    places: VecDeque<(u64, Option<T>)>,
    len: usize,
}

impl<T> Ascending<T> {
    pub(super) fn new() -> Self {
        Self { places: VecDeque::new(), len: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn get(&self, key: u64) -> Option<&T> {
        self.places.get(self.find(key).ok()?)?.1.as_ref()
    }

    pub(super) fn contains(&self, key: u64) -> bool {
        self.get(key).is_some()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, &T)> {
        self.places.iter().filter_map(|(key, value)| Some((*key, value.as_ref()?)))
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = u64> {
        self.iter().map(|(key, _)| key)
    }

    pub(super) fn first(&self) -> Option<(u64, &T)> {
        self.iter().next()
    }

    /// The keys within a range.
    pub(super) fn keys_in(&self, range: RangeInclusive<u64>) -> impl Iterator<Item = u64> {
        let (from, to) = self.within(&range);
        let places = self.places.range(from..to);
        places.filter_map(|(key, value)| value.as_ref().map(|_| *key))
    }

    pub(super) fn insert(&mut self, key: u64, value: T) -> Option<T> {
        let before = match self.find(key) {
            Ok(place) => self.places.get_mut(place).and_then(|(_, old)| old.replace(value)),
            Err(place) if place == self.places.len() => {
                self.places.push_back((key, Some(value)));
                None
            }
            Err(place) => {
                self.places.insert(place, (key, Some(value)));
                None
            }
        };
        self.len += usize::from(before.is_none());
        before
    }

    pub(super) fn remove(&mut self, key: u64) -> Option<T> {
        let place = self.find(key).ok()?;
        let value = self.places.get_mut(place)?.1.take()?;
        self.len -= 1;
        self.tidy();
        Some(value)
    }

    pub(super) fn retain(&mut self, mut stays: impl FnMut(u64, &T) -> bool) {
        self.places.retain(|(key, value)| value.as_ref().is_some_and(|value| stays(*key, value)));
        self.len = self.places.len();
    }

    pub(super) fn clear(&mut self) {
        self.places.clear();
        self.len = 0;
    }

    /// Where a key is, or where it would be.
    fn find(&self, key: u64) -> Result<usize, usize> {
        let (Some((first, _)), Some((last, _))) = (self.places.front(), self.places.back()) else {
            return Err(0);
        };
        if key > *last {
            return Err(self.places.len());
        }
        let Some(distance) = key.checked_sub(*first) else { return Err(0) };
        // Where no key is missing it is just there, and never behind it.
        let place = usize::try_from(distance).unwrap_or(usize::MAX).min(self.places.len() - 1);
        match self.places.get(place) {
            Some((there, _)) if *there == key => Ok(place),
            _ => self.places.binary_search_by_key(&key, |(key, _)| *key),
        }
    }

    /// The places of a range of keys.
    fn within(&self, range: &RangeInclusive<u64>) -> (usize, usize) {
        let from = self.find(*range.start()).unwrap_or_else(|place| place);
        let to = self.find(*range.end()).map_or_else(|place| place, |place| place + 1);
        (from, to.max(from))
    }

    fn tidy(&mut self) {
        while self.places.front().is_some_and(|(_, value)| value.is_none()) {
            self.places.pop_front();
        }
        while self.places.back().is_some_and(|(_, value)| value.is_none()) {
            self.places.pop_back();
        }
        if self.places.len() > 2 * self.len + SLACK {
            self.places.retain(|(_, value)| value.is_some());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_goes_from_the_middle_makes_room() {
        let mut map = Ascending::new();
        (0..100).for_each(|key| assert_eq!(map.insert(key, key), None));
        (1..99).for_each(|key| assert_eq!(map.remove(key), Some(key)));
        assert!(map.iter().eq([(0, &0), (99, &99)]) && map.len() == 2);
        assert!(map.places.len() <= 4 + SLACK);
    }

    proptest! {
        #[test]
        fn it_is_a_map(
            steps in prop::collection::vec((0..10_u32, 1..60_u64, 0..8_u64), 1..400),
            shift in 0..100_u64,
        ) {
            let (mut map, mut model) = (Ascending::new(), BTreeMap::new());
            for (number, (step, key, more)) in steps.into_iter().enumerate() {
                // Most keys are new and the last ones.
                let last = model.last_key_value().map_or(shift, |(key, _)| *key);
                match step {
                    0..4 => {
                        let key = last + 1 + more / 6;
                        prop_assert_eq!(map.insert(key, number), model.insert(key, number));
                    }
                    4 => prop_assert_eq!(map.insert(key, number), model.insert(key, number)),
                    5..7 => {
                        let first = model.first_key_value().map_or(key, |(key, _)| *key);
                        prop_assert_eq!(map.remove(first), model.remove(&first));
                    }
                    7 => prop_assert_eq!(map.remove(key), model.remove(&key)),
                    8 => prop_assert_eq!(map.remove(last), model.remove(&last)),
                    _ => {
                        map.retain(|other, _| other % 7 != more);
                        model.retain(|other, _| other % 7 != more);
                    }
                }
                let range = key..=key + more;
                prop_assert!(map.keys_in(range.clone()).eq(model.range(range).map(|(k, _)| *k)));
                prop_assert!(map.iter().eq(model.iter().map(|(key, value)| (*key, value))));
                prop_assert_eq!((map.len(), map.get(key)), (model.len(), model.get(&key)));
                prop_assert!(map.places.len() <= 2 * map.len() + SLACK);
            }
        }
    }
}
