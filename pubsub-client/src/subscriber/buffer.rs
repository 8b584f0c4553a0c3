//! What has arrived of a topic and was not shown yet. Pure: no I/O, no clock.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

use super::ascending::Ascending;
use super::order::Lane;

/// A message that the server has delivered.
#[derive(Clone, Debug)]
pub(super) struct Item<M> {
    pub(super) attempt: u32,
    pub(super) bytes: u64,
    pub(super) lane: Option<Lane>,
    pub(super) message: M,
}

/// Messages by their sequences. It knows the first of each lane, so that what is next is found
/// without looking through a lane that has to wait.
#[derive(Debug)]
pub(super) struct Buffer<M> {
    items: Ascending<Item<M>>,
    /// How many are of the lane that a whole topic is. It needs no queue: where there is one, all of
    /// them are in it.
    in_order: usize,
    /// Those of the other lanes.
    lanes: BTreeMap<Lane, BTreeSet<u64>>,
    /// The messages that no other of these comes before.
    heads: BTreeSet<u64>,
}

impl<M> Buffer<M> {
    pub(super) fn new() -> Self {
        Self {
            items: Ascending::new(),
            in_order: 0,
            lanes: BTreeMap::new(),
            heads: BTreeSet::new(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.items.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    pub(super) fn contains(&self, sequence: u64) -> bool {
        self.items.contains(sequence)
    }

    pub(super) fn first(&self) -> Option<u64> {
        self.items.first().map(|(sequence, _)| sequence)
    }

    pub(super) fn sequences(&self) -> impl Iterator<Item = u64> {
        self.items.keys()
    }

    pub(super) fn bytes(&self) -> u64 {
        self.items.iter().map(|(_, item)| item.bytes).sum()
    }

    /// The first message of a lane that is open; all are that have no lane.
    pub(super) fn next(&self, is_open: impl Fn(Option<&Lane>) -> bool) -> Option<u64> {
        let lane = |sequence| self.items.get(sequence).and_then(|item| item.lane.as_ref());
        let in_order = self.first_in_order().filter(|_| is_open(Some(&Lane::Topic)));
        let other = self.heads.iter().copied().find(|sequence| is_open(lane(*sequence)));
        in_order.into_iter().chain(other).min()
    }

    fn first_in_order(&self) -> Option<u64> {
        if self.in_order == 0 {
            return None;
        }
        if self.in_order == self.items.len() {
            return self.first();
        }
        let mut items = self.items.iter();
        items.find(|(_, item)| item.lane == Some(Lane::Topic)).map(|(sequence, _)| sequence)
    }

    pub(super) fn insert(&mut self, sequence: u64, item: Item<M>) {
        self.remove(sequence);
        if item.lane == Some(Lane::Topic) {
            self.in_order += 1;
        } else if let Some(lane) = &item.lane {
            let queue = self.lanes.entry(lane.clone()).or_default();
            match queue.first() {
                Some(first) if *first < sequence => {}
                first => {
                    first.map(|first| self.heads.remove(first));
                    self.heads.insert(sequence);
                }
            }
            queue.insert(sequence);
        } else {
            self.heads.insert(sequence);
        }
        self.items.insert(sequence, item);
    }

    pub(super) fn remove(&mut self, sequence: u64) -> Option<Item<M>> {
        let item = self.items.remove(sequence)?;
        if item.lane == Some(Lane::Topic) {
            self.in_order -= 1;
            return Some(item);
        }
        self.heads.remove(&sequence);
        if let Some(lane) = &item.lane
            && let Some(queue) = self.lanes.get_mut(lane)
        {
            queue.remove(&sequence);
            self.heads.extend(queue.first());
            if queue.is_empty() {
                self.lanes.remove(lane);
            }
        }
        Some(item)
    }

    pub(super) fn remove_all(&mut self, range: RangeInclusive<u64>) {
        for sequence in self.items.keys_in(range).collect::<Vec<_>>() {
            self.remove(sequence);
        }
    }

    /// Removes what is in a lane from there on.
    pub(super) fn take_back(&mut self, lane: &Lane, from: u64) {
        let is_in = |sequence: &u64| {
            self.items.get(*sequence).is_some_and(|item| item.lane.as_ref() == Some(lane))
        };
        let gone: Vec<u64> = match self.lanes.get(lane) {
            Some(queue) => queue.range(from..).copied().collect(),
            None if self.in_order == 0 => Vec::new(),
            None => self.items.keys_in(from..=u64::MAX).filter(is_in).collect(),
        };
        for sequence in gone {
            self.remove(sequence);
        }
    }

    pub(super) fn clear(&mut self) {
        *self = Self::new();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::subscriber::order::Order;

    /// Those of a topic that has no order, of two keys, and of one that has.
    fn lane(number: usize) -> Option<Lane> {
        match number {
            0 => None,
            1 => Order::Key.lane("a"),
            2 => Order::Key.lane("b"),
            _ => Order::Topic.lane(""),
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Insert(u64, usize),
        Remove(u64),
        RemoveAll(u64, u64),
        TakeBack(usize, u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (1..40_u64, 0..4_usize).prop_map(|(sequence, key)| Step::Insert(sequence, key)),
            3 => (1..40_u64).prop_map(Step::Remove),
            1 => (1..40_u64, 0..5_u64).prop_map(|(first, more)| Step::RemoveAll(first, more)),
            1 => (0..4_usize, 1..40_u64).prop_map(|(key, from)| Step::TakeBack(key, from)),
        ]
    }

    proptest! {
        #[test]
        fn the_next_is_the_first_in_an_open_lane(steps in prop::collection::vec(step(), 1..60)) {
            let mut buffer = Buffer::new();
            let mut model = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Insert(sequence, key) => {
                        let item = Item { attempt: 1, bytes: 1, lane: lane(key), message: () };
                        buffer.insert(sequence, item);
                        model.insert(sequence, key);
                    }
                    Step::Remove(sequence) => {
                        let removed = buffer.remove(sequence).is_some();
                        prop_assert_eq!(removed, model.remove(&sequence).is_some());
                    }
                    Step::RemoveAll(first, more) => {
                        buffer.remove_all(first..=first + more);
                        model.retain(|sequence, _| !(first..=first + more).contains(sequence));
                    }
                    Step::TakeBack(key, from) => {
                        if let Some(lane) = lane(key) {
                            buffer.take_back(&lane, from);
                            model.retain(|sequence, other| *other != key || *sequence < from);
                        }
                    }
                }
                for open in 0..4 {
                    let is_open =
                        |of: Option<&Lane>| of.is_none_or(|of| Some(of) == lane(open).as_ref());
                    let first = model.iter().find(|(_, key)| [0, open].contains(key));
                    prop_assert_eq!(buffer.next(is_open), first.map(|(sequence, _)| *sequence));
                }
                prop_assert!(buffer.sequences().eq(model.keys().copied()));
                prop_assert_eq!((buffer.len(), buffer.bytes()), (model.len(), model.len() as u64));
            }
            buffer.remove_all(0..=u64::MAX);
            prop_assert!(buffer.is_empty() && buffer.lanes.is_empty() && buffer.heads.is_empty());
            prop_assert_eq!(buffer.in_order, 0);
        }
    }
}
