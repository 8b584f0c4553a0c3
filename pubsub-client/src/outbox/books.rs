//! What an outbox holds, and how much room is left. Pure: no I/O, no clock.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::rows::Contents;
use super::state::{Usage, Waiting};

/// Bounds of an outbox.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    pub(super) messages: u64,
    pub(super) bytes: u64,
    pub(super) topics: usize,
}

/// Why a message has no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoRoom {
    Full,
    /// There are this many topics.
    Topics(usize),
}

#[derive(Debug, Default)]
pub(super) struct Topic {
    /// Items and sizes.
    items: BTreeMap<u64, u64>,
    usage: Usage,
    /// Why nothing of it is published for now.
    pub(super) waiting: Option<Waiting>,
}

/// Bounded by [`Bounds`].
#[derive(Debug)]
pub(super) struct Books {
    bounds: Bounds,
    next: u64,
    topics: BTreeMap<Arc<str>, Topic>,
    /// Items and sizes.
    parked: BTreeMap<u64, u64>,
    pub(super) pending_usage: Usage,
    pub(super) parked_usage: Usage,
}

impl Books {
    /// What a file holds counts, whatever the bounds are now.
    pub(super) fn new(bounds: Bounds, contents: &Contents) -> Self {
        let mut books = Self {
            bounds,
            next: contents.next,
            topics: BTreeMap::new(),
            parked: BTreeMap::new(),
            pending_usage: Usage::default(),
            parked_usage: Usage::default(),
        };
        for (topic, items) in &contents.pending {
            items.iter().for_each(|(item, size)| books.pend(topic, *item, *size));
        }
        contents.parked.iter().for_each(|(item, size)| books.set_aside(*item, *size));
        books
    }

    pub(super) fn topics(&self) -> impl Iterator<Item = (&Arc<str>, &Topic)> {
        self.topics.iter()
    }

    pub(super) fn topic_mut(&mut self, topic: &str) -> Option<&mut Topic> {
        self.topics.get_mut(topic)
    }

    /// Takes the room for a message, and gives it its number and whether its topic is new.
    pub(super) fn admit(&mut self, topic: &Arc<str>, size: u64) -> Result<(u64, bool), NoRoom> {
        let (pending, parked) = (self.pending_usage, self.parked_usage);
        let messages = pending.messages + parked.messages;
        let bytes = pending.bytes + parked.bytes;
        // One message always has room, however large.
        let crowded = messages > 0 && bytes.saturating_add(size) > self.bounds.bytes;
        if messages >= self.bounds.messages || crowded {
            return Err(NoRoom::Full);
        }
        let new = self.join(topic).map_err(NoRoom::Topics)?;
        let item = self.number();
        self.pend(topic, item, size);
        Ok((item, new))
    }

    /// A topic is published to from now on: says whether it is new, or how many there may be.
    pub(super) fn join(&mut self, topic: &Arc<str>) -> Result<bool, usize> {
        if self.topics.contains_key(topic) {
            return Ok(false);
        }
        if self.topics.len() >= self.bounds.topics {
            return Err(self.bounds.topics);
        }
        self.topics.insert(Arc::clone(topic), Topic::default());
        Ok(true)
    }

    /// The number of the next item.
    pub(super) fn number(&mut self) -> u64 {
        self.next += 1;
        self.next - 1
    }

    pub(super) fn pend(&mut self, topic: &Arc<str>, item: u64, size: u64) {
        let books = self.topics.entry(Arc::clone(topic)).or_default();
        books.items.insert(item, size);
        books.usage.add(size);
        self.pending_usage.add(size);
    }

    /// It is published, or set aside: says how large it was.
    pub(super) fn settle(&mut self, topic: &str, item: u64) -> Option<u64> {
        let books = self.topics.get_mut(topic)?;
        let size = books.items.remove(&item)?;
        books.usage.remove(size);
        self.pending_usage.remove(size);
        Some(size)
    }

    pub(super) fn set_aside(&mut self, item: u64, size: u64) {
        self.parked.insert(item, size);
        self.parked_usage.add(size);
    }

    /// It is not aside any more: says how large it was.
    pub(super) fn take_back(&mut self, item: u64) -> Option<u64> {
        let size = self.parked.remove(&item)?;
        self.parked_usage.remove(size);
        Some(size)
    }

    /// How many of the items below this one are set aside.
    pub(super) fn parked_below(&self, item: u64) -> usize {
        self.parked.range(..item).count()
    }

    /// Whether a topic has messages after this item.
    pub(super) fn has_after(&self, topic: &str, item: u64) -> bool {
        let books = self.topics.get(topic);
        books.is_some_and(|books| books.items.range(item.saturating_add(1)..).next().is_some())
    }

    /// Whether an item below this one waits.
    pub(super) fn has_pending_below(&self, item: u64) -> bool {
        let oldest = |topic: &Topic| topic.items.keys().next().copied();
        self.topics.values().filter_map(oldest).any(|oldest| oldest < item)
    }

    /// The number of the item that comes next.
    pub(super) fn next(&self) -> u64 {
        self.next
    }
}

impl Topic {
    pub(super) fn usage(&self) -> Usage {
        self.usage
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BOUNDS: Bounds = Bounds { messages: 20, bytes: 100, topics: 3 };

    fn topic(number: usize) -> Arc<str> {
        format!("t{number}").into()
    }

    #[derive(Clone, Debug)]
    enum Step {
        Admit(usize, u64),
        Publish(usize),
        Park(usize),
        Resend(usize),
        Discard(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0_usize..5, 1_u64..60).prop_map(|(topic, size)| Step::Admit(topic, size)),
            2 => any::<usize>().prop_map(Step::Publish),
            1 => any::<usize>().prop_map(Step::Park),
            1 => any::<usize>().prop_map(Step::Resend),
            1 => any::<usize>().prop_map(Step::Discard),
        ]
    }

    fn pick<T: Clone>(from: &[T], number: usize) -> Option<T> {
        (!from.is_empty()).then(|| from[number % from.len()].clone())
    }

    proptest! {
        #[test]
        fn they_count_what_there_is_and_keep_the_bounds(
            steps in prop::collection::vec(step(), 0..200),
        ) {
            let mut books = Books::new(BOUNDS, &Contents { next: 1, ..Contents::default() });
            let (mut pending, mut parked) = (Vec::<(usize, u64, u64)>::new(), Vec::new());
            for step in steps {
                match step {
                    Step::Admit(number, size) => match books.admit(&topic(number), size) {
                        Ok((item, _)) => pending.push((number, item, size)),
                        Err(NoRoom::Topics(_)) => prop_assert!(books.topics.len() == 3),
                        Err(NoRoom::Full) => {
                            let held = pending.iter().chain(&parked);
                            let bytes: u64 = held.map(|(_, _, size)| size).sum();
                            let count = pending.len() + parked.len();
                            prop_assert!(count == 20 || bytes + size > 100);
                        }
                    },
                    Step::Publish(n) => if let Some((number, item, size)) = pick(&pending, n) {
                        prop_assert_eq!(books.settle(&topic(number), item), Some(size));
                        pending.retain(|(_, other, _)| *other != item);
                    },
                    Step::Park(n) => if let Some((number, item, size)) = pick(&pending, n) {
                        prop_assert_eq!(books.settle(&topic(number), item), Some(size));
                        books.set_aside(item, size);
                        pending.retain(|(_, other, _)| *other != item);
                        parked.push((number, item, size));
                    },
                    Step::Resend(n) => if let Some((number, item, size)) = pick(&parked, n) {
                        prop_assert_eq!(books.take_back(item), Some(size));
                        let again = books.number();
                        books.pend(&topic(number), again, size);
                        parked.retain(|(_, other, _)| *other != item);
                        pending.push((number, again, size));
                    },
                    Step::Discard(n) => if let Some((_, item, size)) = pick(&parked, n) {
                        prop_assert_eq!(books.take_back(item), Some(size));
                        parked.retain(|(_, other, _)| *other != item);
                    },
                }
                let usage = |of: &[(usize, u64, u64)]| Usage {
                    messages: of.len() as u64,
                    bytes: of.iter().map(|(_, _, size)| size).sum(),
                };
                prop_assert_eq!(books.pending_usage, usage(&pending));
                prop_assert_eq!(books.parked_usage, usage(&parked));
                let both = books.pending_usage.bytes + books.parked_usage.bytes;
                prop_assert!(both <= 100 || pending.len() + parked.len() == 1);
                for below in [1, 5, books.next()] {
                    let waits = pending.iter().any(|(_, item, _)| *item < below);
                    prop_assert_eq!(books.has_pending_below(below), waits);
                }
            }
        }
    }
}
