//! A subscription with its consumers, their connections and the disk, around the delivery that is
//! tested: takes the steps, and compares the delivery with what is true after each.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::model_consumer::Consumer;
use super::model_steps::{CONSUMERS, Draft, How, Policy, Setup, Step, Way};
use super::model_truth::{Fact, Kept, Set, Taker, Truth, numbers, ranges};
use super::{Cursor, Delivery, Holder, Key, Moment, Nack, Rewound, Terms, starting_at};
use crate::names::SubscriptionName;
use crate::record::{CursorRecord, Sequences, StoredMessage, SubscriptionKind, Timestamp};

/// What consumers have room for: messages and bytes.
const CREDIT: [(u64, u64); CONSUMERS] = [(4, 10), (2, 6), (6, 30), (1, 8)];
/// Messages of one read.
const FRAME: u64 = 3;
/// Messages that are let go at once.
const BURIAL: usize = 2;
const BODY: [u8; 32] = [0; 32];

pub(super) struct World {
    setup: Setup,
    delivery: Delivery,
    truth: Truth,
    now: Instant,
    consumers: [Consumer; CONSUMERS],
    /// Those that may hold something since before a restart.
    awaited: BTreeSet<Holder>,
    seats: u64,
    /// What is on disk of the position.
    saved: (CursorRecord, Vec<Kept>),
    /// What has had an effect.
    pub(super) took: BTreeSet<&'static str>,
}

impl World {
    pub(super) fn new(setup: Setup) -> Self {
        let max = setup.policy.max_attempts();
        let truth = Truth::new(setup.kind, max, setup.start);
        let record = starting_at(setup.start + 1);
        let cursor = Cursor::new(record.clone(), setup.start, max);
        let saved = (record, truth.facts.iter().map(|fact| fact.kept.clone()).collect());
        let mut world = Self {
            setup,
            delivery: Delivery::new(setup.kind, cursor),
            truth,
            now: Instant::now(),
            consumers: Default::default(),
            awaited: BTreeSet::new(),
            seats: 0,
            saved,
            took: BTreeSet::new(),
        };
        world.launch(0);
        world.took.clear();
        world
    }

    pub(super) fn step(&mut self, step: &Step) {
        match step {
            Step::Publish(drafts) => drafts.iter().for_each(|draft| self.publish(*draft)),
            Step::Pump(frames) => drop(self.pump(*frames)),
            Step::LookAhead(count) => (0..*count).for_each(|_| self.look_ahead()),
            Step::Start(who, which) => self.start(*who, *which),
            Step::Ack(who, which) => self.ack(*who, *which),
            Step::AckLate(who, which) => self.ack_late(*who, *which),
            Step::AckAny(which) => self.ack_any(*which),
            Step::Nack(who, which, how) => self.nack(*who, *which, *how),
            Step::Expire { seconds, unheard } => self.expire(*seconds, *unheard),
            Step::Wait(seconds) => self.wait(Duration::from_secs(*seconds)),
            Step::WakeUp(which) => self.wake_up(*which),
            Step::Cut(who, way) => self.cut(*who, *way),
            Step::Lose(who) => self.lose_session(*who),
            Step::Reconnect { who, deaf } => {
                let is = |c: &Consumer| c.runs && !c.is_connected() && !c.stands_by;
                if let Some(who) = self.one_that(is, *who) {
                    self.connect(who, *deaf);
                }
            }
            Step::Launch(who) => self.launch(*who),
            Step::Kill(who) => self.kill(*who),
            Step::Goodbye(who) => self.goodbye(*who),
            Step::GiveUp(who) => self.give_up(*who),
            Step::Save => self.save(),
            Step::Restart => self.restart(),
            Step::Seek(to) => self.seek(*to),
            Step::Trim(count) => self.trim(*count),
            Step::Know(who) => self.know(*who),
            Step::Bury => self.bury(true),
            Step::BuryInVain => self.bury(false),
        }
        self.check();
    }

    fn took(&mut self, what: &'static str, effect: bool) {
        if effect {
            self.took.insert(what);
        }
    }

    fn one_that(&self, is: impl Fn(&Consumer) -> bool, nth: usize) -> Option<usize> {
        one_of((0..CONSUMERS).filter(|who| is(&self.consumers[*who])).collect(), nth)
    }

    fn moment(&self) -> Moment {
        Moment { at: self.now, wall: Timestamp(1) }
    }

    fn generation(&self) -> u64 {
        self.delivery.cursor().record().generation
    }

    /// Whether consumers are to say what is in their handlers.
    fn wants_started(&self) -> bool {
        self.setup.ack_timeout || self.setup.policy.max_attempts().is_some()
    }

    /// The place for which the server hears what a consumer says.
    fn heard(&self, who: usize) -> Option<Holder> {
        let Consumer { seat, session, to_server, generation, .. } = &self.consumers[who];
        seat.filter(|_| *session && *to_server && *generation == self.generation())
    }

    fn is_sent(&self, who: usize) -> bool {
        self.consumers[who].session && self.consumers[who].to_server
    }

    // The log.

    fn publish(&mut self, draft: Draft) {
        self.truth.publish(draft);
        self.delivery.cursor_mut().on_head(self.truth.head());
        self.took(if draft.for_others { "publish for others" } else { "publish" }, true);
        self.took("publish with a key", draft.key > 0);
    }

    fn message(&self, sequence: u64) -> StoredMessage {
        let fact = self.truth.at(sequence);
        let recipients = if fact.ours { Vec::new() } else { vec![name("other")] };
        let body = Bytes::from_static(&BODY[..usize::try_from(fact.bytes).unwrap()]);
        StoredMessage { sequence, published_at: Timestamp(0), recipients, body: body.into() }
    }

    fn trim(&mut self, count: u64) {
        let first = (self.truth.first + count).min(self.truth.head() + 1);
        self.took("retention passes the floor", first > self.truth.floor() + 1);
        self.truth.first = self.truth.first.max(first);
    }

    // What is delivered.

    fn takers(&self) -> Vec<Taker> {
        let taker = |(consumer, (messages, bytes)): (&Consumer, &(u64, u64))| {
            let holder = consumer.seat.filter(|_| consumer.session)?;
            let out = self.delivery.out(holder);
            let messages = messages.saturating_sub(out.messages);
            let bytes = bytes.saturating_sub(out.bytes);
            Some(Taker { holder, messages, bytes, alone: out.messages == 0 })
        };
        self.consumers.iter().zip(&CREDIT).filter_map(taker).collect()
    }

    /// Delivers at most so many frames. Says whether that was all.
    fn pump(&mut self, frames: usize) -> bool {
        for _ in 0..frames {
            if !self.frame() {
                self.check_idle();
                return true;
            }
        }
        false
    }

    /// Reads a few messages, if the delivery wants some, and delivers them.
    fn frame(&mut self) -> bool {
        let takers = self.takers();
        let (now, window) = (self.now, self.window());
        let (wanted, most) = match &mut self.delivery {
            Delivery::Exclusive(delivery) => {
                let Some(taker) = takers.first() else { return false };
                let messages = taker.messages.max(u64::from(taker.alone));
                let bytes = taker.bytes.max(u64::from(taker.alone));
                if messages == 0 || bytes == 0 {
                    return false;
                }
                (delivery.wants(window, now), (messages, bytes))
            }
            Delivery::Competing(delivery) => {
                let can = |owner, bytes| pick(&takers, owner, bytes).is_some();
                (delivery.wants(now, can), (FRAME, u64::MAX))
            }
        };
        let Some((from, count)) = wanted else { return false };
        assert!(count > 0 && from + count - 1 <= self.truth.head(), "beyond the head");
        if from < self.truth.first {
            self.tell_missing();
            return true;
        }
        let (messages, bytes) = most;
        let last = from + count.min(messages).min(FRAME) - 1;
        match self.setup.kind {
            SubscriptionKind::Exclusive => self.send(from..=last, bytes, takers[0]),
            SubscriptionKind::Shared | SubscriptionKind::KeyOrdered => {
                self.route(from..=last, takers);
                true
            }
        }
    }

    fn look_ahead(&mut self) {
        let n = self.delivery.cursor().after_done(self.delivery.looked_at() + 1);
        if (self.truth.first..=self.truth.head()).contains(&n) && !self.truth.at(n).ours {
            assert!(self.delivery.pass_over(n), "{n} is next");
            self.truth.read(n);
            self.took("what is for others is passed before its turn", true);
        }
    }

    fn window(&self) -> u64 {
        let active = self.consumers.iter().position(|c| c.session && c.seat.is_some());
        active.map_or(0, |who| CREDIT[who].0)
    }

    fn send(&mut self, run: RangeInclusive<u64>, room: u64, taker: Taker) -> bool {
        let first = self.truth.at(*run.start()).bytes;
        if first > room && !taker.alone {
            self.took("a message waits for credit", true);
            return false;
        }
        let mut bytes = 0;
        for sequence in run {
            let message = self.message(sequence);
            let is_first = bytes == 0;
            bytes += message.body.len() as u64;
            if bytes > room && !is_first {
                break;
            }
            let Delivery::Exclusive(delivery) = &mut self.delivery else { unreachable!() };
            let offered = delivery.offer(&message, message.is_for(&name("me")), None);
            self.has_read(sequence, offered.map(|attempt| (taker.holder, attempt)));
        }
        true
    }

    fn route(&mut self, run: RangeInclusive<u64>, mut takers: Vec<Taker>) {
        for sequence in run {
            let message = self.message(sequence);
            let key = self.truth.at(sequence).key.map(|key| Key::from(key.to_string()));
            let Delivery::Competing(delivery) = &mut self.delivery else { unreachable!() };
            let choose = |owner, bytes| pick(&takers, owner, bytes);
            let routed = delivery.route(
                &message,
                Terms { key, due: None },
                message.is_for(&name("me")),
                choose,
            );
            self.has_read(sequence, routed);
            takers = self.takers();
        }
    }

    /// A message was read, and may go to someone.
    fn has_read(&mut self, n: u64, goes: Option<(Holder, u32)>) {
        self.truth.read(n);
        let Some((holder, attempt)) = goes else { return };
        let who = self.who(holder).expect("someone who is there");
        let (messages, bytes) = CREDIT[who];
        let out = self.delivery.out(holder);
        assert!(
            out.messages == 1 || out.messages <= messages && out.bytes <= bytes,
            "{out:?} is more than the credit"
        );
        self.took("a large message goes alone", out.bytes > bytes);
        self.took("credit is used up", out.messages == messages);
        let Kept { failures, suspect, .. } = self.truth.at(n).kept;
        self.took("a failed message comes again", failures > 0);
        self.took("a suspect comes again", suspect);
        let another = |fact: &Fact| fact.kept.suspect && fact.holder.is_some();
        let another = suspect && self.truth.facts.iter().any(another);
        self.took("a suspect waits no longer for another one", another);
        self.truth.deliver(holder, n, attempt, self.now);
        let consumer = &mut self.consumers[who];
        assert!(consumer.session, "delivered to one that is not there");
        let arrives = consumer.to_client;
        if arrives {
            consumer.receive(n, attempt, &self.truth);
        }
        self.took(if arrives { "deliver" } else { "deliver in vain" }, true);
    }

    fn who(&self, holder: Holder) -> Option<usize> {
        self.consumers.iter().position(|consumer| consumer.seat == Some(holder))
    }

    /// The log has ended before what was to be read.
    fn tell_missing(&mut self) {
        let told = self.delivery.lose_below(self.truth.first);
        let (lost, news) = self.truth.lose();
        assert!(told == lost || told.is_none() && !news, "{told:?} is told, not {lost:?}");
        if let Some((first, last)) = told {
            for consumer in self.consumers.iter_mut().filter(|c| c.session && c.seat.is_some()) {
                if consumer.to_client {
                    consumer.hear_gap(first, last);
                }
            }
            self.took("a gap is told", true);
        }
    }

    fn know(&mut self, who: usize) {
        let Some(who) = self.one_that(|c| !c.gaps.is_empty() && !c.stands_by, who) else { return };
        let (heard, sent) = (self.heard(who), self.is_sent(who));
        let gaps = std::mem::take(&mut self.consumers[who].gaps);
        self.consumers[who].missed.extend(gaps.iter().map(|n| (*n, sent)));
        if heard.is_some() {
            self.delivery.miss(&ranges(&gaps));
            self.truth.miss(&gaps);
            self.took("a gap is known", true);
        }
    }

    // What consumers say.

    fn start(&mut self, who: usize, which: usize) {
        let ready = |c: &Consumer| {
            let new = |n: &u64| !c.hands[n].shown;
            c.audible(&self.truth).into_iter().filter(new).collect::<Vec<_>>()
        };
        let Some(who) = self.one_that(|c| !ready(c).is_empty(), who) else { return };
        let Some(n) = one_of(ready(&self.consumers[who]), which) else { return };
        self.consumers[who].hands.get_mut(&n).unwrap().shown = true;
        if let Some(holder) = self.heard(who).filter(|_| self.wants_started()) {
            self.delivery.start(holder, &ranges(&Set::from([n])), self.now);
            self.truth.start(holder, n, self.now);
            self.took("report what is started", self.truth.at(n).started.is_some());
        }
    }

    fn ack(&mut self, who: usize, which: usize) {
        let Some(who) = self.one_that(|c| !c.audible(&self.truth).is_empty(), who) else { return };
        let Some(n) = one_of(self.consumers[who].audible(&self.truth), which) else { return };
        let started = self.truth.at(n).started.is_some();
        self.say_ack(who, n);
        self.took("ack", self.heard(who).is_some());
        self.took("ack of what is started", self.heard(who).is_some() && started);
        self.took("ack that does not arrive", !self.is_sent(who));
    }

    fn ack_late(&mut self, who: usize, which: usize) {
        let late = |c: &Consumer| {
            let late = c.seen.iter().filter(|n| !(c.hands.contains_key(n) || c.acked.contains(n)));
            late.copied().collect::<Vec<_>>()
        };
        let Some(who) = self.one_that(|c| !c.stands_by && !late(c).is_empty(), who) else { return };
        let Some(n) = one_of(late(&self.consumers[who]), which) else { return };
        self.took("ack by an older handle", self.heard(who).is_some());
        self.say_ack(who, n);
    }

    fn say_ack(&mut self, who: usize, n: u64) {
        let sent = self.is_sent(who);
        self.consumers[who].ack(n, sent);
        if self.heard(who).is_some() {
            self.server_acks(&Set::from([n]));
        }
    }

    fn server_acks(&mut self, acked: &Set) {
        self.delivery.ack(&ranges(acked));
        self.truth.ack(acked);
    }

    fn ack_any(&mut self, which: usize) {
        // What is beyond the head is nothing.
        let n = self.truth.any(which);
        let undelivered = n <= self.truth.head() && self.truth.at(n).is_open();
        self.took("ack of what is with nobody", undelivered);
        self.server_acks(&Set::from([n]));
    }

    fn nack(&mut self, who: usize, which: usize, how: How) {
        let Some(who) = self.one_that(|c| !c.audible(&self.truth).is_empty(), who) else { return };
        let Some(n) = one_of(self.consumers[who].audible(&self.truth), which) else { return };
        let attempt = self.consumers[who].hands[&n].attempt;
        let nack = Nack { sequence: n, attempt, ..Nack::default() };
        let seconds = |seconds| Some(Duration::from_secs(seconds));
        let (nack, name) = match how {
            How::Now => (Nack { delay: seconds(0), ..nack }, "nack"),
            How::Later(later) => (Nack { delay: seconds(later), ..nack }, "nack with a delay"),
            How::Backoff => (nack, "nack with the backoff"),
            How::Uncounted => (Nack { attempt: 0, delay: seconds(0), ..nack }, "nack, uncounted"),
            How::ForGood => (Nack { for_good: true, ..nack }, "nack for good"),
        };
        let sent = self.is_sent(who);
        self.consumers[who].nack(nack.clone(), sent, &self.truth);
        self.took("nack that does not arrive", !sent);
        let Some(holder) = self.heard(who) else { return };
        let before = self.truth.at(n).kept.clone();
        let rewound = self.delivery.nack(holder, std::slice::from_ref(&nack), self.moment());
        let expected = self.truth.nack(holder, &nack, false, self.now);
        let after = self.truth.at(n).kept.clone();
        self.took(name, expected.is_some());
        self.took("what failed too often is condemned", after.condemned && !before.condemned);
        let counted = nack.attempt == 0 || after.failures > before.failures;
        self.took("nack of what was counted already", expected.is_some() && !counted);
        let others = expected.iter().flatten().any(|other| *other != n);
        self.took("a nack takes others back", others);
        if !self.setup.is_exclusive() {
            let named = rewound.as_ref().map(|rewound| numbers(&rewound.taken_back));
            assert_eq!(named, expected.filter(|all| !all.is_empty()), "what is taken back");
        } else {
            assert_eq!(rewound.as_ref().map(|r| r.from), expected.map(|_| n), "what is rewound");
        }
        if let Some(rewound) = rewound {
            self.tell_rewound(holder, &rewound);
        }
    }

    fn tell_rewound(&mut self, holder: Holder, rewound: &Rewound) {
        let Some(who) = self.who(holder) else { return };
        let back = match self.setup.kind {
            SubscriptionKind::Exclusive => (rewound.from..=self.truth.head()).collect(),
            SubscriptionKind::Shared | SubscriptionKind::KeyOrdered => numbers(&rewound.taken_back),
        };
        if self.consumers[who].session && self.consumers[who].to_client {
            self.consumers[who].take_back(&back);
        }
    }

    fn expire(&mut self, seconds: u64, unheard: bool) {
        let Some(since) = self.now.checked_sub(Duration::from_secs(seconds)) else { return };
        if !self.setup.ack_timeout {
            return;
        }
        let condemned = self.delivery.cursor().condemned().len();
        let rewound = self.delivery.expire(since, "too long", self.moment());
        let expected = self.truth.expire(since, self.now);
        self.took("ack timeout", !expected.is_empty());
        let more = self.delivery.cursor().condemned().len() > condemned;
        self.took("ack timeout of the last attempt", more);
        let holders: Vec<_> = expected.keys().copied().collect();
        for holder in holders.iter().filter(|_| unheard) {
            let who = self.who(*holder).expect("someone who has a place");
            self.consumers[who].to_client = false;
            self.took("ack timeout that is not heard of", true);
        }
        for (number, (holder, rewound)) in rewound.iter().enumerate() {
            let holder = holder.unwrap_or_else(|| holders[0]);
            let back = &expected[&holder];
            if self.setup.is_exclusive() {
                assert_eq!(Some(&rewound.from), back.first(), "what is rewound");
            } else {
                assert_eq!(numbers(&rewound.taken_back), *back, "what is taken back");
            }
            assert_eq!(holder, holders[number]);
            self.tell_rewound(holder, rewound);
        }
        assert_eq!(rewound.len(), holders.len(), "whose handlers took too long");
    }

    // Time, connections and processes.

    fn wait(&mut self, time: Duration) {
        let held_back = self.truth.moments(self.now);
        self.now += time;
        self.took("a time to wait is over", held_back.iter().any(|at| *at <= self.now));
    }

    fn wake_up(&mut self, which: usize) {
        let Some(at) = one_of(self.truth.moments(self.now), which) else { return };
        self.wait(at - self.now);
        self.pump(1);
    }

    fn cut(&mut self, who: usize, way: Way) {
        let Some(who) = self.one_that(Consumer::is_connected, who) else { return };
        let consumer = &mut self.consumers[who];
        let (to_server, to_client) = match way {
            Way::ToServer => (false, true),
            Way::ToClient => (true, false),
            Way::Both => (false, false),
        };
        (consumer.to_server, consumer.to_client) = (to_server, to_client);
        self.took("connection cut", true);
    }

    fn lose_session(&mut self, who: usize) {
        let Some(who) = self.one_that(|c| c.session, who) else { return };
        self.drop_session(who);
        self.took("disconnect", true);
    }

    fn drop_session(&mut self, who: usize) {
        let consumer = &mut self.consumers[who];
        (consumer.session, consumer.to_server, consumer.to_client) = (false, false, false);
    }

    fn launch(&mut self, who: usize) {
        let had = self.consumers[who].clone();
        let generation = self.generation();
        self.consumers[who].launch(generation);
        self.drop_session(who);
        if let Some(holder) = had.seat {
            let started = self.truth.crash(holder, self.now);
            self.delivery.crash(holder, self.moment());
            self.took("superseded by a new process", true);
            self.took("superseded with something in a handler", started > 0);
            self.sit_down(who, holder, false, false);
        } else {
            self.took("join", true);
            self.connect(who, false);
        }
    }

    /// A consumer opens a connection. `deaf`: it loses it before the welcome.
    fn connect(&mut self, who: usize, deaf: bool) {
        self.drop_session(who);
        let taken = self.setup.is_exclusive() && self.consumers.iter().any(|c| c.seat.is_some());
        if let Some(holder) = self.consumers[who].seat {
            self.took("reconnect", true);
            self.took("reconnect after a restart", self.awaited.contains(&holder));
            self.sit_down(who, holder, true, deaf);
        } else if taken {
            self.took("stand by", true);
            self.stand_by(who);
        } else {
            self.seats += 1;
            let holder = Holder::Seat(self.seats);
            self.consumers[who].seat = Some(holder);
            self.took("come back without a place", !self.consumers[who].hands.is_empty());
            self.sit_down(who, holder, false, deaf);
        }
    }

    /// What it has received counts.
    fn stand_by(&mut self, who: usize) {
        let claim = self.consumers[who].claim(&self.truth, false);
        if claim.cursor_generation == self.generation() {
            self.server_acks(&numbers(&claim.acked));
            self.delivery.miss(&claim.missed);
            self.truth.miss(&numbers(&claim.missed));
        }
        self.consumers[who].stands_by = true;
    }

    fn sit_down(&mut self, who: usize, holder: Holder, kept_place: bool, deaf: bool) {
        let wants_started = self.wants_started();
        let claim = self.consumers[who].claim(&self.truth, wants_started);
        let current = claim.cursor_generation == self.generation();
        self.took("a claim from before a seek", !current);
        let held = numbers(&claim.held);
        let in_vain = |n: &u64| self.truth.at(*n).holder == Some(holder) && !held.contains(n);
        let in_vain = self.truth.find(|n, _| in_vain(&n)).len();
        self.took("a claim without what was sent", current && in_vain > 0);
        self.took("a claim of what is held", current && !held.is_empty());
        let acks = claim.acked.iter().flat_map(Clone::clone).any(|n| !self.truth.at(n).kept.done);
        self.took("a claim with acks that did not arrive", current && acks);
        for nack in claim.nacked.iter().filter(|_| current) {
            let fact = self.truth.at(nack.sequence);
            let mine = fact.holder.is_none_or(|other| other == holder) && !fact.kept.done;
            let again = nack.attempt <= fact.kept.failures;
            self.took("a claim with nacks that did not arrive", mine && !again);
            self.took("a claim with nacks that had arrived", mine && again);
        }
        let dropped = self.delivery.attach(holder, &claim, kept_place, self.moment());
        let truly = self.truth.attach(holder, &claim, (current, kept_place), self.now);
        assert_eq!(numbers(&dropped), truly, "what is dropped");
        self.took("some of a claim is dropped", current && !truly.is_empty());
        self.save();
        let generation = self.generation();
        let consumer = &mut self.consumers[who];
        (consumer.session, consumer.stands_by) = (true, false);
        self.is_back(holder);
        if deaf {
            self.took("a welcome that does not arrive", true);
            return;
        }
        let consumer = &mut self.consumers[who];
        (consumer.to_server, consumer.to_client) = (true, true);
        consumer.welcome(generation, &truly);
        if let Some((first, last)) = self.delivery.lost() {
            self.consumers[who].hear_gap(first, last);
        }
    }

    fn is_back(&mut self, holder: Holder) {
        if self.awaited.remove(&holder) && self.awaited.is_empty() {
            self.delivery.withhold_no_more();
            self.truth.withheld = 0;
        }
    }

    fn goodbye(&mut self, who: usize) {
        let Some(who) = self.one_that(Consumer::is_connected, who) else { return };
        let holder = self.consumers[who].seat.expect("it has a session");
        let held = self.truth.find(|_, fact| fact.holder == Some(holder));
        self.took("goodbye", true);
        self.took("goodbye with messages", !held.is_empty());
        self.delivery.detach(holder);
        self.truth.detach(holder);
        self.consumers[who] = Consumer::default();
        self.has_left(holder);
    }

    fn kill(&mut self, who: usize) {
        let started = |c: &Consumer| {
            self.truth.facts.iter().any(|fact| fact.started.is_some() && fact.holder == c.seat)
        };
        let most_wanted = self.one_that(|c| c.session && started(c), who);
        let Some(who) = most_wanted.or(self.one_that(|c| c.session, who)) else { return };
        let seat = self.consumers[who].seat;
        self.consumers[who] = Consumer { seat, ..Consumer::default() };
        self.lose_place(who);
    }

    fn give_up(&mut self, who: usize) {
        let Some(who) = self.one_that(|c| c.seat.is_some() && !c.session, who) else { return };
        self.lose_place(who);
    }

    fn lose_place(&mut self, who: usize) {
        let holder = self.consumers[who].seat.take().expect("it has a seat");
        self.delivery.crash(holder, self.moment());
        let started = self.truth.crash(holder, self.now);
        self.took("consumer lost", true);
        self.took("consumer lost after a restart", self.awaited.contains(&holder));
        self.took("consumer lost with something in a handler", started > 0);
        self.has_left(holder);
    }

    fn has_left(&mut self, holder: Holder) {
        self.is_back(holder);
        let Some(next) = self.one_that(|c| c.stands_by, 0) else { return };
        self.took("a consumer that stood by takes over", true);
        self.consumers[next].stands_by = false;
        self.connect(next, false);
    }

    // The disk.

    fn save(&mut self) {
        self.delivery.cursor_mut().take_dirty();
        let kept = self.truth.facts.iter().map(|fact| fact.kept.clone()).collect();
        self.saved = (self.delivery.cursor().record().clone(), kept);
        for consumer in self.consumers.iter_mut().filter(|c| c.session && c.to_client) {
            consumer.confirm();
        }
        // A hello of one that stands by is confirmed, too.
        for consumer in self.consumers.iter_mut().filter(|consumer| consumer.stands_by) {
            consumer.acks.retain(|_, sent| !*sent);
            consumer.missed.retain(|_, sent| !*sent);
        }
    }

    fn restart(&mut self) {
        let (record, kept) = self.saved.clone();
        let now: Vec<_> = self.truth.facts.iter().map(|fact| fact.kept.done).collect();
        let lost = now.iter().zip(&kept).any(|(now, saved)| *now && !saved.done);
        self.took("restart", true);
        self.took("restart that has lost acks", lost);
        let cursor = Cursor::new(record, self.truth.head(), self.setup.policy.max_attempts());
        self.delivery = Delivery::new(self.setup.kind, cursor);
        self.truth.restart(&kept);
        for who in 0..CONSUMERS {
            self.drop_session(who);
            self.consumers[who].stands_by = false;
        }
        let seats = self.consumers.iter().filter_map(|consumer| consumer.seat);
        self.awaited = seats.filter(|_| !self.setup.is_exclusive()).collect();
        if !self.awaited.is_empty() {
            self.delivery.withhold();
            self.truth.withheld = self.truth.head();
            self.took("messages are withheld", self.truth.head() > self.truth.floor());
        }
    }

    fn seek(&mut self, to: usize) {
        let (floor, to) = (self.truth.floor(), self.truth.any(to));
        self.took("seek back", to <= floor);
        self.took("seek forward", to > floor + 1);
        self.delivery.restore(to.max(1) - 1, &Sequences::new());
        self.truth.seek(to);
        self.truth.facts.iter_mut().for_each(|fact| fact.once_done &= fact.kept.done);
        let generation = self.generation();
        for consumer in self.consumers.iter_mut().filter(|c| c.session && c.to_client) {
            consumer.forget(generation);
        }
        self.save();
    }

    /// Lets go what has failed too often, or tries to in vain.
    fn bury(&mut self, goes: bool) {
        let condemned = self.delivery.cursor().condemned();
        let batch: Vec<u64> = condemned.iter().take(BURIAL).copied().collect();
        let Some(first) = batch.first().copied() else { return };
        let (how, move_away) = match self.setup.policy {
            Policy::Block => unreachable!("nothing is ever condemned"),
            Policy::Skip(_) => (self.setup.policy.release(), false),
            Policy::DeadLetter(_) => (self.setup.policy.release(), true),
        };
        if move_away && first < self.truth.first {
            // It has to be read.
            return self.tell_missing();
        }
        if !goes {
            let before = self.delivery.cursor().clone();
            batch.iter().for_each(|n| self.delivery.cursor_mut().release(*n, how));
            *self.delivery.cursor_mut() = before;
            self.delivery.cursor_mut().mark_dirty();
            self.took("letting go is put off", true);
            return;
        }
        for n in batch {
            self.delivery.cursor_mut().release(n, how);
            self.delivery.let_go(n);
            self.truth.release(n, how);
        }
        self.took("what is condemned is let go", true);
        if move_away {
            self.save();
        }
    }

    // What has to be so.

    fn check(&mut self) {
        let Self { delivery, truth, .. } = self;
        let cursor = delivery.cursor();
        assert_eq!(cursor.floor(), truth.floor(), "the floor");
        assert_eq!(cursor.head(), truth.head(), "the head");
        let left = truth.facts.iter().filter(|fact| !fact.kept.done).count();
        assert_eq!(cursor.backlog(), left as u64, "the backlog");
        assert_eq!(*cursor.condemned(), truth.find(|_, fact| fact.kept.condemned), "condemned");
        assert_eq!(*cursor.suspects(), truth.find(|_, fact| fact.kept.suspect), "suspects");
        let started = truth.facts.iter().filter_map(|fact| fact.started).min();
        assert_eq!(delivery.started_at(), started, "the first that is in a handler");
        for (n, fact) in (1..).zip(&truth.facts) {
            assert_eq!(cursor.receipt(n), truth.receipt(n), "the receipt of {n}");
            assert_eq!(cursor.failures(n), fact.kept.failures, "the failures of {n}");
            let sent = !fact.is_open() || n < truth.first;
            assert!(n > delivery.passed() || sent, "{n} was passed");
        }
        let held = truth.facts.iter().filter(|fact| fact.holder.is_some()).count();
        assert_eq!(delivery.held(), held, "messages held");
        for consumer in &self.consumers {
            let Some(holder) = consumer.seat else { continue };
            check_consumer(delivery, truth, consumer, holder);
        }
    }

    /// Nothing more is delivered: nothing more can be, and the server wakes up when that changes.
    fn check_idle(&mut self) {
        let takers = self.takers();
        let last = self.delivery.cursor().floor() + self.window();
        let is_exclusive = self.setup.is_exclusive();
        let within = |n: &u64| !is_exclusive || *n <= last;
        let stuck = self.truth.next(&takers, self.now).filter(within);
        assert_eq!(stuck, None, "is not delivered");
        let waits = self.truth.waits_for_another_suspect(self.now);
        self.took("a suspect waits for another one", waits);
        let later = self.truth.moments(self.now);
        let next = |at: &Instant| self.truth.next(&takers, *at).filter(within);
        let Some(later) = later.into_iter().find(|at| next(at).is_some()) else { return };
        let (ready, tried) =
            (self.delivery.ready_at(self.now), self.delivery.tried_until(self.now));
        let wakes = ready.into_iter().chain(tried).min();
        assert!(wakes.is_some_and(|at| at <= later), "the server sleeps through {later:?}");
        self.took("a message has to wait for a moment", true);
    }

    /// In the end everyone is there, and everything is acked or let go.
    pub(super) fn finish(&mut self) {
        for who in 0..CONSUMERS {
            let Consumer { runs, stands_by, .. } = self.consumers[who];
            if runs && !stands_by && !self.consumers[who].is_connected() {
                self.connect(who, false);
            }
        }
        if self.consumers.iter().all(|consumer| !consumer.session) {
            self.launch(0);
        }
        let mut turns = 0;
        while self.truth.floor() < self.truth.head() {
            turns += 1;
            assert!(turns < 1_000, "nothing moves");
            assert!(self.pump(1_000), "there is no end to what is delivered");
            self.check();
            for who in 0..CONSUMERS {
                for n in self.consumers[who].audible(&self.truth) {
                    self.say_ack(who, n);
                }
                self.know(who);
            }
            self.save();
            self.bury(true);
            self.check();
            let wakes = self.delivery.ready_at(self.now).into_iter();
            let wakes = wakes.chain(self.delivery.tried_until(self.now)).min();
            self.now = wakes.unwrap_or(self.now);
        }
        assert_eq!(self.delivery.held(), 0);
        assert!(self.delivery.cursor().record().failures.is_empty(), "failures are left");
        if let Delivery::Competing(delivery) = &self.delivery {
            assert_eq!(delivery.waiting(), 0);
            assert!(delivery.lanes.is_empty(), "lanes are left");
        }
    }
}

fn check_consumer(delivery: &Delivery, truth: &Truth, consumer: &Consumer, holder: Holder) {
    let mut held = Set::new();
    let mut bytes = Some(0);
    for (n, fact) in (1..).zip(&truth.facts) {
        let has = fact.holder == Some(holder);
        assert_eq!(delivery.holds(n, holder), has, "whether {holder:?} holds {n}");
        if has {
            held.insert(n);
            bytes = bytes.filter(|_| !fact.claimed).map(|bytes| bytes + fact.bytes);
        }
    }
    let out = delivery.out(holder);
    assert_eq!(out.messages, held.len() as u64, "messages with {holder:?}");
    assert!(bytes.is_none_or(|bytes| out.bytes == bytes), "{bytes:?} bytes, not {out:?}");
    if consumer.is_connected() {
        let has: Set = consumer.hands.keys().copied().collect();
        let has: Set = has.into_iter().filter(|n| !truth.at(*n).kept.done).collect();
        assert_eq!(has, held, "what {holder:?} has, and what the server thinks it has");
    }
}

/// Who takes a message: who has least, or who has the others of its key.
fn pick(takers: &[Taker], owner: Option<Holder>, bytes: u64) -> Option<Holder> {
    let able = takers
        .iter()
        .filter(|taker| owner.is_none_or(|owner| owner == taker.holder) && taker.can_take(bytes));
    able.max_by_key(|taker| taker.messages).map(|taker| taker.holder)
}

fn one_of<T: Copy>(candidates: Vec<T>, nth: usize) -> Option<T> {
    let count = candidates.len().max(1);
    candidates.get(nth % count).copied()
}

fn name(name: &str) -> SubscriptionName {
    SubscriptionName::parse(name).unwrap()
}
