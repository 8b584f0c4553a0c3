//! What is acknowledged survives power cuts, and what is not is stored once at most.
//!
//! Each life of a store opens it on what the last cut left, compares it with a model, settles what
//! the model does not know by retrying it, and works until the power goes again: in a commit, in
//! the opening, or in the move of older messages to a sealed file.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::thread;

use futures_util::FutureExt;

use super::open::Opening;
use super::queue::Request;
use super::simulation::{OPENING, SimDisk};
use super::{Committer, Redb, blobs, sealed};
use crate::env::SharedEnv;
use crate::record::{CursorRecord, Epoch, NewMessage};
use crate::storage::testing::{
    ALL, Random, TestEnv, anonymous, from, keyed, message, publisher, subscription, topic,
};
use crate::storage::{
    Append, AppendOutcome, Atomic, Change, CommitError, Fate, OpenPublisher, Run, Storage,
    StorageError, Ticket, Urgency, ticket,
};

/// Cuts in a usual run of the tests. `PUBSUB_POWER_CUTS` asks for another number.
const CUTS: u64 = 10_000;
/// Cuts of one store, before a new one is begun: a small one is quick.
const CUTS_PER_STORE: u64 = 10;
const TOPICS: [u64; 2] = [11, 12];
/// One that takes a message with each move of the floor.
const GRAVES: u64 = 13;
const SUBSCRIPTION: u64 = 5;

#[test]
fn acknowledged_writes_survive_power_cuts() {
    let number = |name: &str, default: u64| {
        std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
    };
    let stores = number("PUBSUB_POWER_CUTS", CUTS).div_ceil(CUTS_PER_STORE);
    let first = number("PUBSUB_SEED", 1);
    let half = stores.div_ceil(2);
    let run = |seeds: std::ops::Range<u64>| seeds.map(live_and_die).sum::<Tally>();
    let tally = thread::scope(|scope| {
        let other = scope.spawn(move || run(first + half..first + stores));
        [run(first..first + half), other.join().expect("the seed is above")].into_iter().sum()
    });
    let Tally { cuts, acked, unknown, found, sealed, half_sealed, blobs, moving, round } = tally;
    println!(
        "{cuts} cuts, {acked} messages acknowledged, {unknown} outcomes unknown of which {found} \
         had been stored, {sealed} sealed files, {half_sealed} cuts while sealing, {blobs} with \
         blob files, {moving} with a move of the log begun, {round} with a log that has gone round"
    );
    // A run without trouble says nothing.
    assert!(acked > cuts && unknown > cuts / 10 && found > 0 && found < unknown);
    assert!(sealed > stores / 10 && half_sealed > cuts / 1000 && blobs > cuts / 10);
    assert!(moving > cuts / 10 && round > cuts / 1000);
}

/// What happened.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    cuts: u64,
    acked: u64,
    unknown: u64,
    /// Of the unknown ones, those that had been stored.
    found: u64,
    sealed: u64,
    half_sealed: u64,
    /// Cuts with messages in blob files.
    blobs: u64,
    /// Cuts while the log was being moved, and with a log that has gone round.
    moving: u64,
    round: u64,
}

impl std::iter::Sum for Tally {
    fn sum<I: Iterator<Item = Self>>(tallies: I) -> Self {
        tallies.fold(Self::default(), |sum, tally| Self {
            cuts: sum.cuts + tally.cuts,
            acked: sum.acked + tally.acked,
            unknown: sum.unknown + tally.unknown,
            found: sum.found + tally.found,
            sealed: sum.sealed + tally.sealed,
            half_sealed: sum.half_sealed + tally.half_sealed,
            blobs: sum.blobs + tally.blobs,
            moving: sum.moving + tally.moving,
            round: sum.round + tally.round,
        })
    }
}

/// Says which seed to repeat.
struct Seed(u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("repeat with PUBSUB_SEED={} PUBSUB_POWER_CUTS={CUTS_PER_STORE}", self.0);
        }
    }
}

fn live_and_die(seed: u64) -> Tally {
    let seed = Seed(seed);
    let random = Random(seed.0 << 32);
    let env: SharedEnv = TestEnv::new(seed.0 << 32);
    let mut world = World {
        random,
        disk: SimDisk::new(),
        model: Model::default(),
        bodies: 0,
        life: 0,
        tally: Tally::default(),
    };
    for life in 0..CUTS_PER_STORE {
        world.life = life;
        let operations = 1 + world.random.below(250);
        world.disk.cut_after(operations);
        match open(&world.disk, Arc::clone(&env), seed.0) {
            Ok(engine) => {
                // Nothing is expected of a life but to end.
                let _ = world.live(&engine);
                let Committer::Inline(writer) = &engine.committer else { unreachable!() };
                let round = writer.lock().unwrap().as_ref().unwrap().log.has_gone_round();
                world.tally.round += u64::from(round);
                world.tally.moving += u64::from(engine.shared.tail.is_moving());
            }
            Err(error) => assert!(world.disk.is_cut(), "the store cannot be opened: {error}"),
        }
        world.cut();
    }
    // Whatever happened, in the end all is settled.
    world.life += 1;
    let engine = open(&world.disk, env, seed.0).expect("the power is back");
    world.settle(&engine).expect("the power stays");
    world.compare(&engine);
    world.tally
}

/// Moves the log as often as can be, or as elsewhere.
fn open(disk: &SimDisk, env: SharedEnv, seed: u64) -> Result<Redb, StorageError> {
    let log_commits = if seed.is_multiple_of(2) { 1 } else { OPENING.log_commits };
    Redb::open_on(Arc::new(disk.clone()), env, Opening { log_commits, ..OPENING })
}

/// The power went, or the engine has given up because of it.
#[derive(Debug)]
struct Dark;

struct World {
    random: Random,
    disk: SimDisk,
    model: Model,
    /// How many bodies were made: no two are the same.
    bodies: u64,
    life: u64,
    tally: Tally,
}

/// What the store must hold.
#[derive(Default)]
struct Model {
    created: bool,
    topics: BTreeMap<u64, TopicModel>,
    /// The floor that was acknowledged, and the one that was asked for.
    floor: (u64, u64),
}

#[derive(Default)]
struct TopicModel {
    log: BTreeMap<u64, Vec<u8>>,
    keys: HashMap<u8, u64>,
    /// Where trims that were acknowledged, and those that were asked for, have come to.
    first: (u64, u64),
    /// The last sequence of the publisher that has an answer.
    answered: u64,
    /// Messages of the publisher without an answer, and those with a key.
    open: Vec<NewMessage>,
    /// Those of the publisher are stored all together or not at all.
    atomic: Option<Atomic>,
    open_keys: Vec<(u8, NewMessage)>,
}

impl World {
    fn cut(&mut self) {
        let names = self.disk.names();
        self.tally.half_sealed += u64::from(
            names.iter().any(|name| name.starts_with("sealed") && name.ends_with(".tmp")),
        );
        let files = names.iter().filter(|name| sealed::number(name).is_some()).count() as u64;
        self.tally.sealed = self.tally.sealed.max(files);
        let blobs = names.iter().any(|name| blobs::number(name).is_some());
        self.tally.blobs += u64::from(blobs);
        self.disk = self.disk.after_cut(&mut self.random);
        self.tally.cuts += 1;
    }

    fn live(&mut self, engine: &Redb) -> Result<(), Dark> {
        self.settle(engine)?;
        self.compare(engine);
        for _ in 0..30 {
            match self.random.below(10) {
                0..=2 => self.publish(engine)?,
                3 => self.publish_atomic(engine)?,
                4..=5 => self.publish_keyed(engine)?,
                6..=7 => self.publish_together(engine)?,
                8 => self.save_floor(engine)?,
                _ => self.trim(engine)?,
            }
        }
        // It goes now, with nothing under way.
        Ok(())
    }

    /// Creates what is missing, and retries what has no answer.
    fn settle(&mut self, engine: &Redb) -> Result<(), Dark> {
        if self.disk.is_cut() {
            return Err(Dark);
        }
        if !self.model.created {
            let known: Vec<_> =
                engine.catalog().now_or_never().unwrap().unwrap().topics.into_iter().collect();
            if known.is_empty() {
                let all = TOPICS.into_iter().chain([GRAVES]);
                let mut changes: Vec<_> = all
                    .map(|epoch| Change::CreateTopic(topic(&format!("t{epoch}"), epoch)))
                    .collect();
                changes.push(Change::PutSubscription(subscription("s", SUBSCRIPTION)));
                self.done(engine.apply(changes, Urgency::Now))?;
            }
            assert!(known.is_empty() || known.len() == TOPICS.len() + 1, "half a change is stored");
            self.model.created = true;
            for epoch in TOPICS {
                self.model
                    .topics
                    .insert(epoch, TopicModel { first: (1, 1), ..TopicModel::default() });
            }
        }
        for epoch in TOPICS {
            self.contained(engine, epoch);
            self.open_stream(engine, epoch)?;
            self.retry(engine, epoch)?;
        }
        Ok(())
    }

    fn open_stream(&mut self, engine: &Redb, epoch: u64) -> Result<(), Dark> {
        let model = &self.model.topics[&epoch];
        let (answered, open) = (model.answered, model.open.len() as u64);
        let atomic = model.atomic.is_some();
        let request = OpenPublisher {
            topic: Epoch(epoch),
            publisher: self.publisher(),
            resolved_below: answered + 1,
        };
        let outcome = self.done(engine.open_publisher(request))?;
        let decided = outcome.expect("nobody else publishes").unwrap_or(0);
        let possible = answered..=answered + open;
        assert!(possible.contains(&decided), "{decided} decided of {possible:?}");
        let whole = decided == answered || decided == answered + open;
        assert!(!atomic || whole, "half of a batch is decided");
        Ok(())
    }

    fn retry(&mut self, engine: &Redb, epoch: u64) -> Result<(), Dark> {
        let model = &self.model.topics[&epoch];
        if !model.open.is_empty() {
            let messages = model.open.clone();
            let append = from(self.publisher(), epoch, model.answered + 1, messages);
            let append = Append { atomic: model.atomic, ..append };
            let outcome = self.done(engine.append(append))?;
            self.answer(epoch, &outcome);
        }
        for (key, message) in self.model.topics[&epoch].open_keys.clone() {
            let outcome = self.done(engine.append(anonymous(epoch, vec![message])))?;
            self.answer_key(epoch, key, &outcome);
        }
        Ok(())
    }

    fn publisher(&self) -> crate::storage::PublisherRef {
        publisher(1, 1, self.life + 1)
    }

    fn topic(&mut self) -> u64 {
        TOPICS[self.random.index(TOPICS.len())]
    }

    fn body(&mut self) -> Vec<u8> {
        self.bodies += 1;
        let length = match self.random.below(20) {
            0 => 5_000,
            1..=4 => 400,
            _ => 60,
        };
        let mut body = self.bodies.to_le_bytes().to_vec();
        body.resize(8 + self.random.index(length), u8::try_from(self.bodies % 251).unwrap());
        body
    }

    fn messages(&mut self) -> Vec<NewMessage> {
        (0..=self.random.below(4)).map(|_| message(self.body())).collect()
    }

    /// The next messages of the publisher, noted as under way.
    fn next(&mut self, epoch: u64) -> Append {
        let messages = self.messages();
        let publisher = self.publisher();
        let model = self.model.topics.get_mut(&epoch).unwrap();
        let first = model.answered + 1 + model.open.len() as u64;
        model.open.extend(messages.iter().cloned());
        let resolved_below = model.answered + 1;
        Append { resolved_below, ..from(publisher, epoch, first, messages) }
    }

    fn publish(&mut self, engine: &Redb) -> Result<(), Dark> {
        let epoch = self.topic();
        let append = self.next(epoch);
        let outcome = self.done(engine.append(append))?;
        self.answer(epoch, &outcome);
        Ok(())
    }

    /// Messages that are stored all together, after exactly what is there, or not at all.
    fn publish_atomic(&mut self, engine: &Redb) -> Result<(), Dark> {
        let epoch = self.topic();
        let expected_head = Some(*engine.head(Epoch(epoch)).unwrap().borrow());
        let atomic = Some(Atomic { expected_head, key: None });
        let append = Append { atomic, ..self.next(epoch) };
        self.model.topics.get_mut(&epoch).unwrap().atomic = atomic;
        let outcome = self.done(engine.append(append))?;
        self.answer(epoch, &outcome);
        Ok(())
    }

    fn publish_keyed(&mut self, engine: &Redb) -> Result<(), Dark> {
        let epoch = self.topic();
        let key = u8::try_from(self.random.below(250)).unwrap();
        let message = keyed(key, vec![key; 20]);
        let model = self.model.topics.get_mut(&epoch).unwrap();
        model.open_keys.push((key, message.clone()));
        let outcome = self.done(engine.append(anonymous(epoch, vec![message])))?;
        self.answer_key(epoch, key, &outcome);
        Ok(())
    }

    /// Several publishes in one commit, one of them twice.
    fn publish_together(&mut self, engine: &Redb) -> Result<(), Dark> {
        let Committer::Inline(writer) = &engine.committer else { unreachable!() };
        let epochs = [TOPICS[0], TOPICS[1], self.topic()];
        let appends = epochs.map(|epoch| (epoch, self.next(epoch)));
        let again = appends[2].1.clone();
        let mut requests = Vec::new();
        let mut tickets = Vec::new();
        for append in appends.iter().map(|(_, append)| append.clone()).chain([again]) {
            let (promise, ticket) = ticket();
            requests.push(Request::Append(append, promise));
            tickets.push(ticket);
        }
        writer.lock().unwrap().as_mut().unwrap().commit(requests);
        let mut outcomes = Vec::new();
        for ticket in tickets {
            outcomes.push(self.done(ticket)?);
        }
        let ids = |outcome: &AppendOutcome| {
            let places = places(outcome.as_ref().unwrap()).into_iter();
            places.map(|(sequence, id, _)| (sequence, id)).collect::<Vec<_>>()
        };
        assert_eq!(ids(&outcomes[2]), ids(&outcomes[3]), "a duplicate has another id");
        for ((epoch, _), outcome) in appends.iter().zip(&outcomes) {
            self.answer(*epoch, outcome);
        }
        Ok(())
    }

    fn save_floor(&mut self, engine: &Redb) -> Result<(), Dark> {
        let floor = self.model.floor.1 + 1;
        self.model.floor.1 = floor;
        let change = Change::PutCursor {
            subscription: Epoch(SUBSCRIPTION),
            topic: Epoch(TOPICS[0]),
            cursor: CursorRecord { floor, ..CursorRecord::default() },
        };
        // As a dead letter is moved: both, or nothing.
        let buried = Change::Store { topic: Epoch(GRAVES), message: message(floor.to_le_bytes()) };
        let order = if self.random.below(2) == 0 { [change, buried] } else { [buried, change] };
        self.done(engine.apply(order.into(), Urgency::Soon))?;
        self.model.floor.0 = floor;
        Ok(())
    }

    fn trim(&mut self, engine: &Redb) -> Result<(), Dark> {
        let epoch = self.topic();
        let head = *engine.head(Epoch(epoch)).unwrap().borrow();
        let first = self.model.topics[&epoch].first.1;
        let below = first + self.random.below((head + 1).saturating_sub(first) / 2 + 1);
        self.model.topics.get_mut(&epoch).unwrap().first.1 = below;
        self.done(engine.apply(vec![Change::Trim { topic: Epoch(epoch), below }], Urgency::Now))?;
        self.model.topics.get_mut(&epoch).unwrap().first.0 = below;
        Ok(())
    }

    /// Waits for a ticket; without an answer the power must be gone.
    fn done<T: Unpin>(&mut self, ticket: Ticket<T>) -> Result<T, Dark> {
        match ticket.now_or_never().expect("an inline engine answers at once") {
            Ok(committed) => Ok(committed.into_inner()),
            Err(error) => {
                assert!(self.disk.is_cut(), "a commit failed: {error}");
                self.tally.unknown += u64::from(error == CommitError::Unknown);
                Err(Dark)
            }
        }
    }

    /// Notes the answer to the first messages of the publisher that had none.
    fn answer(&mut self, epoch: u64, outcome: &AppendOutcome) {
        let runs = outcome.as_ref().expect("a publish is not refused");
        let model = self.model.topics.get_mut(&epoch).unwrap();
        model.atomic = None;
        for (sequence, id, duplicate) in places(runs) {
            if sequence <= model.answered {
                continue;
            }
            assert_eq!(sequence, model.answered + 1, "sequences are answered in order");
            let message = model.open.remove(0);
            model.answered = sequence;
            self.tally.acked += 1;
            self.tally.found += u64::from(duplicate);
            let other = model.log.insert(id, message.body.to_vec());
            assert!(other.is_none(), "two messages have the id {id}");
        }
    }

    fn answer_key(&mut self, epoch: u64, key: u8, outcome: &AppendOutcome) {
        let [(_, id, _)] = places(outcome.as_ref().unwrap())[..] else { panic!("{outcome:?}") };
        let model = self.model.topics.get_mut(&epoch).unwrap();
        let first = model.keys.insert(key, id).unwrap_or(id);
        assert_eq!(first, id, "a key has two ids");
        model.open_keys.retain(|(open, _)| *open != key);
        model.log.insert(id, vec![key; 20]);
        self.tally.acked += 1;
    }

    /// What was acknowledged is there, and beyond it only what has no answer yet.
    fn contained(&self, engine: &Redb, epoch: u64) {
        if self.disk.is_cut() {
            return;
        }
        let model = &self.model.topics[&epoch];
        let stored = stored(engine, epoch, model);
        for (id, body) in model.log.range(first(engine, epoch)..) {
            assert_eq!(stored.get(id), Some(body), "message {id} of topic {epoch} is lost");
        }
        let of_batch = |body: &Vec<u8>| model.open.iter().any(|message| message.body == *body);
        let of_batch = stored.values().filter(|body| of_batch(body)).count();
        let whole = of_batch == 0 || of_batch == model.open.len();
        assert!(model.atomic.is_none() || whole, "half of a batch is stored");
        for (id, body) in stored.iter().filter(|(id, _)| !model.log.contains_key(id)) {
            let keyed = model.open_keys.iter().map(|(_, message)| message);
            let mut open = model.open.iter().chain(keyed);
            assert!(open.any(|message| message.body == *body), "nobody sent {id}: {body:?}");
        }
    }

    /// Exactly what was acknowledged is there.
    fn compare(&self, engine: &Redb) {
        if self.disk.is_cut() {
            return;
        }
        for (epoch, model) in &self.model.topics {
            assert!(model.open.is_empty() && model.open_keys.is_empty());
            let first = first(engine, *epoch);
            let expected: BTreeMap<_, _> =
                model.log.range(first..).map(|(id, body)| (*id, body.clone())).collect();
            assert_eq!(stored(engine, *epoch, model), expected);
        }
        let catalog = engine.catalog().now_or_never().unwrap().unwrap();
        let [subscription] = catalog.subscriptions.as_slice() else { panic!("{catalog:?}") };
        let floor = subscription.cursors.first().map_or(0, |(_, cursor)| cursor.floor);
        let (acked, asked) = self.model.floor;
        assert!((acked..=asked).contains(&floor), "{floor} is not in {acked}..={asked}");
        let buried = engine.read(Epoch(GRAVES), 1, ALL).now_or_never().unwrap().unwrap();
        let floors = buried.iter().map(|message| message.body.as_ref().try_into().unwrap());
        let floors: Vec<u64> = floors.map(u64::from_le_bytes).collect();
        assert!(floors.is_sorted_by(|a, b| a < b), "one of {floors:?} is stored twice");
        let last = floors.last().copied().unwrap_or(0);
        assert_eq!(last, floor, "a message is stored without its change, or the other way round");
    }
}

fn first(engine: &Redb, epoch: u64) -> u64 {
    engine.stats(Epoch(epoch)).expect("the topic is there").first
}

/// All messages of a topic.
fn stored(engine: &Redb, epoch: u64, model: &TopicModel) -> BTreeMap<u64, Vec<u8>> {
    let first = first(engine, epoch);
    let (acked, asked) = model.first;
    assert!((acked..=asked).contains(&first), "{first} is not in {acked}..={asked}");
    let head = *engine.head(Epoch(epoch)).unwrap().borrow();
    let messages = engine.read(Epoch(epoch), first, ALL).now_or_never().unwrap().unwrap();
    let stored: BTreeMap<_, _> =
        messages.into_iter().map(|message| (message.sequence, message.body.to_vec())).collect();
    assert_eq!(stored.len() as u64, head + 1 - first, "messages are missing");
    stored
}

/// The publisher's sequences of an answer, with their ids and whether they were known.
fn places(runs: &[Run]) -> Vec<(u64, u64, bool)> {
    let place = |run: &Run| {
        let Fate::Stored { sequence, duplicate, .. } = run.fate else { panic!("{run:?}") };
        let first = run.first_sequence;
        (0..u64::from(run.count)).map(move |i| (first + i, sequence + i, duplicate))
    };
    runs.iter().flat_map(place).collect()
}
