//! How those who work through a backlog share the CPUs with those who have little to do.
//!
//! A kernel lets a thread that is busy run on for a few milliseconds before another one gets its
//! turn, however little that one wants: on Linux often until the next tick, which comes every 4 ms
//! in many builds. A message on its way needs several turns on each side. Where replays keep all
//! CPUs busy, whoever works at one therefore offers its CPU between two large frames, if the second
//! is there already: to wait for it is to give way.
//!
//! Where nobody waits that costs no more than a system call. Linux takes the rest of the turn from
//! whoever offers it: beside programs that compute without a pause a replay would come to a fourth
//! of its speed. That is noticed by the time it takes to come back, and nothing is offered for a
//! while.

use std::mem;
use std::time::{Duration, Instant};

use crate::v1::Deliver;

/// Messages of a frame that is taken for one of a backlog: half of what a server puts into one.
const MANY: usize = 256;
/// And bytes, of two messages or more: one can be large by itself.
const LARGE: usize = 128 * 1024;
/// Those who keep the CPU for so long after it was offered have more to do than a message needs.
const LONG: Duration = Duration::from_millis(3);
/// They are offered it again after so many times as long.
const PAUSE: u32 = 30;
/// No more counts: the process was stopped, or has used up what its container may use.
const LONGEST: Duration = Duration::from_millis(10);

impl Deliver {
    /// Whether it is one of many, as far as its size tells.
    pub fn is_bulk(&self) -> bool {
        let count = self.count();
        count >= MANY || count > 1 && prost::Message::encoded_len(self) >= LARGE
    }
}

/// When to offer the CPU to others.
#[derive(Debug, Default)]
pub struct Courtesy {
    /// Whether the last frame was one of a backlog, and the next one was not waited for.
    at_work: bool,
    /// Not before then.
    again: Option<Instant>,
}

impl Courtesy {
    /// The next frame is not there yet.
    pub fn waits(&mut self) {
        self.at_work = false;
    }

    /// A frame is there. Before it, the CPU of this thread is offered to those who wait for it, if
    /// it and the one before are of a backlog; but not for a while after somebody has kept it for
    /// long.
    pub fn before(&mut self, is_bulk: bool, clock: impl Fn() -> Instant) {
        self.offer(is_bulk, clock, std::thread::yield_now);
    }

    fn offer(&mut self, is_bulk: bool, clock: impl Fn() -> Instant, give: impl FnOnce()) {
        let goes_on = mem::replace(&mut self.at_work, is_bulk);
        if !goes_on || !is_bulk {
            return;
        }
        let start = clock();
        if self.again.is_some_and(|again| start < again) {
            return;
        }
        give();
        let end = clock();
        let took = end.saturating_duration_since(start);
        self.again = (took >= LONG).then(|| end + took.min(LONGEST) * PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::Encoded;

    #[test]
    #[expect(clippy::disallowed_methods, reason = "a beginning; time passes when it is told to")]
    fn who_keeps_the_cpu_for_long_is_not_offered_it_for_a_while() {
        let now = Cell::new(Instant::now());
        let pass = |time: Duration| now.set(now.get() + time);
        let mut courtesy = Courtesy { at_work: true, again: None };
        let mut offered = |taken: Duration| {
            let mut was = false;
            courtesy.offer(
                true,
                || now.get(),
                || {
                    was = true;
                    pass(taken);
                },
            );
            was
        };
        let short = LONG - Duration::from_micros(1);
        assert!((0..10).all(|_| offered(short)), "a message's worth of work costs next to nothing");
        assert!(offered(LONG));
        assert!(!offered(short));
        pass(LONG * PAUSE - Duration::from_micros(1));
        assert!(!offered(short));
        pass(Duration::from_micros(1));
        assert!(offered(short));
        assert!(offered(short), "one that takes it for a moment is welcome again");
        assert!(offered(Duration::from_secs(3600)));
        pass(LONGEST * PAUSE);
        assert!(offered(short), "an hour was no turn of anybody");
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "a time; none passes")]
    fn the_cpu_is_offered_between_frames_of_a_backlog_that_is_there() {
        let now = Instant::now();
        let mut courtesy = Courtesy::default();
        let offered = |courtesy: &mut Courtesy, is_bulk| {
            let mut was = false;
            courtesy.offer(is_bulk, || now, || was = true);
            was
        };
        assert!(!offered(&mut courtesy, true));
        assert!(offered(&mut courtesy, true));
        assert!(offered(&mut courtesy, true));
        assert!(!offered(&mut courtesy, false));
        assert!(!offered(&mut courtesy, true));
        courtesy.waits();
        assert!(!offered(&mut courtesy, true));
        assert!(offered(&mut courtesy, true));
    }

    #[test]
    fn a_frame_of_many_or_of_large_messages_is_bulk() {
        let frame = |count: usize, bytes: usize| {
            let mut frame = Deliver::default();
            for sequence in (1..).take(count) {
                frame.push(sequence, None, 1, Encoded::Alone(&vec![7; bytes]));
            }
            frame
        };
        assert!(!frame(MANY - 1, 100).is_bulk());
        assert!(frame(MANY, 100).is_bulk());
        assert!(!frame(7, LARGE / 8).is_bulk());
        assert!(frame(8, LARGE / 8).is_bulk());
        assert!(!frame(1, LARGE).is_bulk());
    }
}
