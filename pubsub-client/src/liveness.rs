//! Whether the server is alive: pings, and what came back. Pure: the time is an argument.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use crate::limits;

/// How many intervals of silence mean death.
const DEAD_AFTER: f64 = 2.5;

/// So much later. Applications say "no limit" with [`Duration::MAX`], which no clock can add: what
/// is further away than anything lives counts as that far.
pub(crate) fn after(now: Instant, wait: Duration) -> Instant {
    const FAR: Duration = Duration::from_secs(30 * 365 * 24 * 60 * 60);
    now + wait.min(FAR)
}

/// How long a server may be silent that says something in each interval.
pub(crate) fn patience(interval: Duration) -> Duration {
    interval.mul_f64(DEAD_AFTER)
}

/// The signs of life on one stream.
#[derive(Debug)]
pub(crate) struct Liveness {
    interval: Duration,
    opened: Instant,
    /// How often a ping is sent; not less often than the interval.
    ping_every: Duration,
    last_frame: Instant,
    /// Until then we were busy, and neither heard nor said anything.
    deaf_until: Instant,
    next_ping: Instant,
    nonce: u64,
    // At most as many as fit into the time until the server counts as dead.
    unanswered: VecDeque<(u64, Instant)>,
    answered: Instant,
    /// Whether the server reads what we send.
    expects_answers: bool,
}

impl Liveness {
    /// A stream was opened: the welcome answers the hello, which was sent at that time.
    pub(crate) fn new(interval: Duration, hello: Instant, now: Instant) -> Self {
        Self {
            interval,
            opened: now,
            ping_every: interval,
            last_frame: now,
            deaf_until: now,
            next_ping: now + interval,
            nonce: 0,
            unanswered: VecDeque::new(),
            answered: hello,
            expects_answers: true,
        }
    }

    /// The server has decided on the interval, and for how long it keeps the place of a session
    /// that it does not hear: a place that has to be proven well within that time.
    pub(crate) fn set_interval(&mut self, interval: Duration, grace: Duration, now: Instant) {
        if !interval.is_zero() {
            self.interval = interval.clamp(limits::MIN_HEARTBEAT, limits::MAX_HEARTBEAT);
        }
        let proof = if grace.is_zero() { self.interval } else { grace / 3 };
        self.ping_every = self.interval.min(proof);
        self.next_ping = self.next_ping.min(now + self.ping_every);
    }

    /// A frame came, of any kind.
    pub(crate) fn frame(&mut self, now: Instant) {
        self.last_frame = now;
    }

    /// A frame that came at `since` has been handled. If that took long, what the server has said
    /// meanwhile still waits, and so do our pings: it is not the server that was silent.
    pub(crate) fn handled(&mut self, since: Instant, now: Instant) {
        if now >= since + self.interval / 2 {
            self.deaf_until = now;
        }
    }

    /// The server has seen all pings up to this one. Says whether the stream has proven itself by
    /// that: the ping was sent when it was at least an interval old.
    pub(crate) fn answer(&mut self, nonce: u64) -> bool {
        let mut proven = false;
        while let Some((number, sent)) = self.unanswered.front().copied()
            && number <= nonce
        {
            self.answered = sent;
            proven |= sent >= self.opened + self.interval;
            self.unanswered.pop_front();
        }
        proven
    }

    /// When the last ping that was answered had been sent: until then, at least, the server
    /// counted this session as alive.
    pub(crate) fn answered(&self) -> Instant {
        self.answered
    }

    pub(crate) fn ping_is_due(&self, now: Instant) -> bool {
        self.expects_answers && now >= self.next_ping
    }

    /// Says whether the server reads what we send. While it does not, only its own frames count.
    pub(crate) fn expect_answers(&mut self, expects: bool, now: Instant) {
        self.expects_answers = expects;
        self.unanswered.clear();
        self.next_ping = now + self.ping_every;
    }

    /// A ping is sent: its nonce.
    pub(crate) fn ping(&mut self, now: Instant) -> u64 {
        self.nonce += 1;
        self.unanswered.push_back((self.nonce, now));
        self.next_ping = now + self.ping_every;
        self.nonce
    }

    /// When the server counts as dead: too long after its last frame, or after the oldest ping
    /// that it left unanswered (or that it does not even take from us).
    fn dead_at(&self) -> Instant {
        let waiting = self.unanswered.front().map_or(self.next_ping, |(_, sent)| *sent);
        let oldest =
            if self.expects_answers { self.last_frame.min(waiting) } else { self.last_frame };
        oldest.max(self.deaf_until) + self.limit()
    }

    fn limit(&self) -> Duration {
        patience(self.interval)
    }

    /// For how long the server has given no sign of life, if that is too long.
    pub(crate) fn dead(&self, now: Instant) -> Option<Duration> {
        (now >= self.dead_at()).then(|| self.limit())
    }

    /// When to look again.
    pub(crate) fn wake_at(&self, now: Instant) -> Instant {
        // A ping that is due but cannot be sent waits for the stream, not for the clock.
        let pings = self.expects_answers && !self.ping_is_due(now);
        if pings { self.dead_at().min(self.next_ping) } else { self.dead_at() }
    }
}

/// For how long a batch may be unconfirmed on a stream that is alive: longer than any commit.
const UNCONFIRMED: Duration = Duration::from_secs(30);

/// The batches that were sent on one stream and are not confirmed. A server whose disk hangs still
/// answers pings.
#[derive(Debug, Default)]
pub(crate) struct Unconfirmed {
    // Bounded by what is sent until the oldest is too old.
    batches: VecDeque<(u64, Instant)>,
}

impl Unconfirmed {
    pub(crate) fn sent(&mut self, number: u64, now: Instant) {
        self.batches.push_back((number, now));
    }

    /// All batches up to this one are confirmed.
    pub(crate) fn confirmed(&mut self, number: u64) {
        while self.batches.front().is_some_and(|(first, _)| *first <= number) {
            self.batches.pop_front();
        }
    }

    /// When the server counts as dead because of the oldest, and for how long it was silent then.
    pub(crate) fn dead_at(&self, live: &Liveness) -> Option<(Instant, Duration)> {
        let limit = live.limit().max(UNCONFIRMED);
        self.batches.front().map(|(_, sent)| ((*sent).max(live.deaf_until) + limit, limit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn start() -> (Liveness, Instant) {
        let now = Instant::now();
        (Liveness::new(10 * SECOND, now, now), now)
    }

    #[test]
    fn silence_kills_after_two_and_a_half_intervals() {
        let (mut live, start) = start();
        assert_eq!(live.wake_at(start), start + 10 * SECOND);
        live.ping(start + 10 * SECOND);
        live.ping(start + 20 * SECOND);
        assert_eq!(live.dead(start + 24 * SECOND), None);
        assert!(live.dead(start + 25 * SECOND).is_some());
    }

    #[test]
    fn frames_without_answers_to_pings_are_not_life() {
        let (mut live, start) = start();
        live.ping(start + 10 * SECOND);
        for second in 0..34 {
            live.frame(start + second * SECOND);
        }
        assert_eq!(live.dead(start + 34 * SECOND), None);
        assert!(live.dead(start + 35 * SECOND).is_some());
        live.answer(1);
        live.frame(start + 34 * SECOND);
        assert_eq!(live.dead(start + 35 * SECOND), None);
        assert_eq!(live.answered(), start + 10 * SECOND);
    }

    #[test]
    fn a_server_that_reads_nothing_is_alive_while_it_speaks() {
        let (mut live, start) = start();
        live.ping(start + 10 * SECOND);
        live.expect_answers(false, start + 10 * SECOND);
        live.frame(start + 100 * SECOND);
        assert!(!live.ping_is_due(start + 100 * SECOND));
        assert_eq!(live.dead(start + 124 * SECOND), None);
        assert!(live.dead(start + 125 * SECOND).is_some());
        live.expect_answers(true, start + 110 * SECOND);
        assert_eq!(live.wake_at(start + 110 * SECOND), start + 120 * SECOND);
    }

    #[test]
    fn pings_prove_the_place_well_within_the_grace() {
        let (mut live, start) = start();
        live.set_interval(60 * SECOND, 30 * SECOND, start);
        assert_eq!(live.wake_at(start), start + 10 * SECOND);
        live.ping(start + 10 * SECOND);
        assert_eq!(live.wake_at(start), start + 20 * SECOND);
        live.answer(1);
        live.frame(start + 20 * SECOND);
        assert_eq!(live.dead(start + 169 * SECOND), None);
    }

    #[test]
    fn for_ever_is_a_time_too() {
        let now = Instant::now();
        assert_eq!(after(now, SECOND), now + SECOND);
        assert!(after(now, Duration::MAX) > now + 1_000_000 * SECOND);
    }

    #[test]
    fn a_frame_that_takes_long_to_handle_is_no_silence() {
        let (mut live, start) = start();
        live.ping(start + 10 * SECOND);
        live.frame(start + 11 * SECOND);
        live.handled(start + 11 * SECOND, start + 60 * SECOND);
        assert_eq!(live.dead(start + 84 * SECOND), None);
        assert!(live.dead(start + 85 * SECOND).is_some());
        live.handled(start + 84 * SECOND, start + 84 * SECOND);
        assert!(live.dead(start + 85 * SECOND).is_some(), "each frame takes some time");
    }

    #[test]
    fn a_ping_proves_the_stream_once_that_is_an_interval_old() {
        let (mut live, start) = start();
        live.ping(start + 9 * SECOND);
        assert!(!live.answer(1));
        live.ping(start + 10 * SECOND);
        assert!(live.answer(2));
        assert!(!live.answer(2), "once");
    }

    #[test]
    fn an_odd_interval_is_brought_into_its_range() {
        let (mut live, start) = start();
        live.set_interval(Duration::MAX, Duration::MAX, start);
        assert!(live.dead(start + 150 * SECOND).is_some());
        live.set_interval(SECOND / 1000, SECOND, start);
        assert_eq!(live.dead(start + 2 * SECOND), None);
    }

    #[test]
    fn a_batch_may_be_unconfirmed_for_half_a_minute() {
        let (mut live, start) = start();
        let mut unconfirmed = Unconfirmed::default();
        assert_eq!(unconfirmed.dead_at(&live), None);
        unconfirmed.sent(1, start);
        unconfirmed.sent(2, start + SECOND);
        unconfirmed.sent(3, start + 2 * SECOND);
        let limit = 30 * SECOND;
        assert_eq!(unconfirmed.dead_at(&live), Some((start + limit, limit)));
        unconfirmed.confirmed(2);
        assert_eq!(unconfirmed.dead_at(&live), Some((start + 2 * SECOND + limit, limit)));
        live.set_interval(60 * SECOND, SECOND, start);
        let limit = 150 * SECOND;
        assert_eq!(unconfirmed.dead_at(&live), Some((start + 2 * SECOND + limit, limit)));
        unconfirmed.confirmed(3);
        assert_eq!(unconfirmed.dead_at(&live), None);
    }

    #[test]
    fn a_ping_that_cannot_be_sent_counts_as_unanswered() {
        let (mut live, start) = start();
        live.frame(start + 34 * SECOND);
        assert!(live.ping_is_due(start + 34 * SECOND));
        assert!(live.dead(start + 35 * SECOND).is_some());
    }
}
