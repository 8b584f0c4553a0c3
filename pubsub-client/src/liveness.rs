//! Whether the server is alive: pings, and what came back. Pure: the time is an argument.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

/// How many intervals of silence mean death.
const DEAD_AFTER: f64 = 2.5;

/// So much later. Applications say "no limit" with [`Duration::MAX`], which no clock can add: what
/// is further away than anything lives counts as that far.
pub(crate) fn after(now: Instant, wait: Duration) -> Instant {
    const FAR: Duration = Duration::from_secs(30 * 365 * 24 * 60 * 60);
    now + wait.min(FAR)
}

/// The signs of life on one stream.
#[derive(Debug)]
pub(crate) struct Liveness {
    interval: Duration,
    /// How often a ping is sent; not less often than the interval.
    ping_every: Duration,
    last_frame: Instant,
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
            ping_every: interval,
            last_frame: now,
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
            self.interval = interval;
        }
        let proof = if grace.is_zero() { self.interval } else { grace / 3 };
        self.ping_every = self.interval.min(proof);
        self.next_ping = self.next_ping.min(now + self.ping_every);
    }

    /// A frame came, of any kind.
    pub(crate) fn frame(&mut self, now: Instant) {
        self.last_frame = now;
    }

    /// The server has seen all pings up to this one.
    pub(crate) fn answer(&mut self, nonce: u64) {
        while let Some((number, sent)) = self.unanswered.front().copied()
            && number <= nonce
        {
            self.answered = sent;
            self.unanswered.pop_front();
        }
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
        oldest + self.limit()
    }

    fn limit(&self) -> Duration {
        self.interval.mul_f64(DEAD_AFTER)
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
    fn a_ping_that_cannot_be_sent_counts_as_unanswered() {
        let (mut live, start) = start();
        live.frame(start + 34 * SECOND);
        assert!(live.ping_is_due(start + 34 * SECOND));
        assert!(live.dead(start + 35 * SECOND).is_some());
    }
}
