//! Older messages move to sealed files: a server that is killed meanwhile, and the bound of the
//! hot file that all of this is for.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt as _,
    path::Path,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use pubsub_client::{Message, PublishTicket, Publisher};
use pubsub_tests::{admin, auditor, files, lab::scenario, process::Server, raw, seed::Rng, wait};
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep},
};
use tonic::transport::Channel;

use crate::app::{self, SOON};

const WITHIN: Duration = Duration::from_secs(180);
const STOP: Duration = Duration::from_secs(8);
const MIB: u64 = 1 << 20;

/// A large topic, whose messages get sealed files of their own, and small ones, which share
/// theirs: few of these have what makes a blob file when all of them have filled the hot file.
const TOPICS: u64 = 200;
const LARGE: u64 = 0;

/// The bytes of a payload: of the large topic one at a time, and too few to go to a blob file. redb
/// allocates powers of two, and these just fit into one with all that is stored beside them: so
/// bytes of messages are about bytes on disk.
fn size(topic: u64) -> u64 {
    if topic == LARGE { 60 << 10 } else { 500 << 10 }
}

fn name(topic: u64) -> String {
    format!("topic-{topic}")
}

fn index(number: u64) -> usize {
    usize::try_from(number).expect("it is small")
}

/// What is published: bytes that depend on the seed, the topic and the sequence alone.
#[derive(Clone)]
struct Payloads {
    seed: u64,
    pool: Bytes,
}

impl Payloads {
    fn new(rng: &mut Rng) -> Self {
        Self { seed: rng.next_u64(), pool: rng.bytes(1 << 20).into() }
    }

    /// A piece of the pool that no other message is likely to have: quick to make again.
    fn of(&self, topic: u64, sequence: u64) -> Bytes {
        let mut rng = Rng::new(self.seed ^ (topic << 32) ^ sequence);
        let length = rng.between(size(topic) * 9 / 10, size(topic));
        let from = rng.below(self.pool.len() as u64 - length);
        let piece = &self.pool[index(from)..index(from + length)];
        [&topic.to_be_bytes()[..], &sequence.to_be_bytes()[..], piece].concat().into()
    }
}

/// Publishes to all topics, as fast as the server takes it.
struct Writer {
    payloads: Payloads,
    rng: Rng,
    publishers: Vec<Publisher>,
    /// The last sequence of each topic.
    heads: Vec<u64>,
    tickets: Vec<(u64, PublishTicket)>,
    bytes: u64,
}

impl Writer {
    async fn new(server: &Server, payloads: Payloads, rng: Rng) -> Result<Self> {
        let channel = raw::connect(&server.url()).await?;
        let client = app::client(&server.url())?;
        let mut publishers = Vec::new();
        for topic in 0..TOPICS {
            admin::create_topic(&channel, &name(topic)).await?;
            let window = if topic == LARGE { 1 } else { 1_000 };
            let publisher = client.publisher(name(topic)).window_messages(window);
            publishers.push(wait::soon("the publisher", SOON, publisher.open()).await??);
        }
        let heads = vec![0; publishers.len()];
        Ok(Self { payloads, rng, publishers, heads, tickets: Vec::new(), bytes: 0 })
    }

    async fn publish(&mut self) -> Result<()> {
        let topic = if self.rng.one_in(2) { LARGE } else { self.rng.below(TOPICS) };
        let head = &mut self.heads[index(topic)];
        *head += 1;
        let payload = self.payloads.of(topic, *head);
        self.bytes += payload.len() as u64;
        let enqueueing = self.publishers[index(topic)].enqueue(Message::new(payload));
        let ticket = wait::soon("the window", SOON, enqueueing).await??;
        self.tickets.push((*head, ticket));
        Ok(())
    }

    async fn publish_until(mut self, mut stop: watch::Receiver<bool>) -> Result<Vec<u64>> {
        while !*stop.borrow_and_update() {
            self.publish().await?;
        }
        self.finish().await
    }

    /// Waits until everything is acknowledged. Each topic has one publisher: however often a
    /// message was sent, its sequence is its number.
    async fn finish(self) -> Result<Vec<u64>> {
        for (number, ticket) in self.tickets {
            let id = wait::soon("a receipt", SOON, ticket).await??.id;
            ensure!(id.sequence == number, "{id} is the publisher's message {number}");
        }
        eprintln!("{} MiB are acknowledged", self.bytes / MIB);
        Ok(self.heads)
    }
}

/// Reads everything back, byte for byte: two topics at a time, since some are large.
async fn verify(url: &str, payloads: &Payloads, heads: &[u64]) -> Result<()> {
    let mut readers = JoinSet::new();
    for half in 0..2 {
        let topics = (0..).zip(heads.to_vec()).skip(half).step_by(2);
        let (url, payloads) = (url.to_owned(), payloads.clone());
        readers.spawn(async move {
            let channel = raw::connect(&url).await?;
            for (topic, head) in topics {
                verify_topic(&channel, &payloads, topic, head).await?;
            }
            Ok(())
        });
    }
    readers.join_all().await.into_iter().collect()
}

async fn verify_topic(channel: &Channel, payloads: &Payloads, topic: u64, head: u64) -> Result<()> {
    let audit = auditor::read(channel, &name(topic)).await?;
    let count = audit.messages.len() as u64;
    ensure!(count == head, "{count} messages of {head} in {}", name(topic));
    for stored in audit.messages {
        let message = stored.message.context("an empty delivery")?;
        let right = message.payload == payloads.of(topic, stored.sequence);
        ensure!(right, "{} of {} has wrong bytes", stored.sequence, name(topic));
    }
    Ok(())
}

/// The files of a data directory that sealing makes.
#[derive(Debug, PartialEq)]
struct Files {
    /// Those with their final name, and when they were last written: names are used again.
    sealed: BTreeMap<String, SystemTime>,
    /// Whether one is being written.
    unfinished: bool,
}

impl Files {
    fn of(data: &Path) -> Result<Self> {
        let mut files = Self { sealed: BTreeMap::new(), unfinished: false };
        for entry in fs::read_dir(data)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            files.unfinished |= name.starts_with("sealed-") && name.ends_with(".tmp");
            if !(name.starts_with("sealed-") && name.ends_with(".redb")) {
                continue;
            }
            // It may be gone by now.
            if let Ok(metadata) = entry.metadata() {
                files.sealed.insert(name, metadata.modified()?);
            }
        }
        Ok(files)
    }

    /// How many files the other has as well.
    fn in_common(&self, other: &Self) -> usize {
        self.sealed.iter().filter(|(name, at)| other.sealed.get(*name) == Some(at)).count()
    }
}

/// When a server is killed.
#[derive(Clone, Copy, Debug)]
enum Moment {
    /// A file was just begun.
    Begun,
    /// At random while it is written, synced and read again, or soon after.
    Writing,
    /// It was just given its name, and is not registered yet, as a rule.
    Renamed,
    /// At random while it is registered and its messages are removed from the hot file.
    Removing,
}

impl Moment {
    /// Waits for it. `missed`: how often it has come too early.
    async fn come(self, data: &Path, missed: u32, rng: &mut Rng) -> Result<()> {
        let before = Files::of(data)?;
        let seen = async {
            loop {
                let now = Files::of(data)?;
                let come = match self {
                    Self::Begun | Self::Writing => now.unfinished,
                    Self::Renamed | Self::Removing => now.in_common(&before) < now.sealed.len(),
                };
                if come {
                    return anyhow::Ok(());
                }
                sleep(Duration::from_millis(1)).await;
            }
        };
        wait::soon(format!("{self:?}"), SOON, seen).await??;
        let pause = match self {
            Self::Begun | Self::Renamed => 0,
            Self::Writing => rng.below(600),
            // A busy machine takes its time: longer each time that nothing was registered yet.
            Self::Removing => rng.below(300 << missed),
        };
        sleep(Duration::from_millis(pause)).await;
        Ok(())
    }
}

/// What the kills have met.
#[derive(Debug, Default)]
struct Hits {
    kills: usize,
    /// Files that were not complete.
    unfinished: usize,
    /// Complete files that were not registered: the next start has removed them.
    unregistered: usize,
    /// Files that were registered since the last kill.
    registered: usize,
    /// Kills that were to meet a registered file, and came too early.
    too_early: u32,
}

impl Hits {
    fn are_enough(&self) -> bool {
        self.unfinished >= 2 && self.unregistered >= 1 && self.registered >= 2
    }

    async fn kill(&mut self, server: &mut Server, moment: Moment, rng: &mut Rng) -> Result<()> {
        let data = server.data().to_owned();
        let before = Files::of(&data)?;
        moment.come(&data, self.too_early, rng).await?;
        server.kill().await?;
        let killed = Files::of(&data)?;
        server.start_again().await?;
        let kept = killed.in_common(&Files::of(&data)?);
        let unregistered = killed.sealed.len() - kept;
        let registered = kept - killed.in_common(&before);
        eprintln!(
            "{moment:?}: unfinished {}, unregistered {unregistered}, registered {registered}",
            killed.unfinished
        );
        self.kills += 1;
        self.unfinished += usize::from(killed.unfinished);
        self.unregistered += unregistered;
        self.registered += registered;
        let too_early = matches!(moment, Moment::Removing) && registered == 0;
        self.too_early = (self.too_early + u32::from(too_early)).min(5);
        Ok(())
    }
}

#[test]
fn a_server_killed_while_it_seals_loses_nothing() {
    const KILLS: [Moment; 11] = [
        Moment::Begun,
        Moment::Renamed,
        Moment::Removing,
        Moment::Writing,
        Moment::Writing,
        Moment::Removing,
        Moment::Renamed,
        Moment::Writing,
        Moment::Begun,
        Moment::Removing,
        Moment::Renamed,
    ];
    scenario(WITHIN, async |lab| {
        let mut server = lab.server().await?;
        let payloads = Payloads::new(&mut lab.rng);
        let writer = Writer::new(&server, payloads.clone(), lab.rng.fork()).await?;
        let (stop, stopped) = watch::channel(false);
        let mut writing = JoinSet::from_iter([writer.publish_until(stopped)]);
        let mut hits = Hits::default();
        // A slow machine may need more of them to meet everything.
        for moment in KILLS.into_iter().chain(KILLS.into_iter().rev()) {
            if hits.kills >= KILLS.len() && hits.are_enough() {
                break;
            }
            tokio::select! {
                killed = hits.kill(&mut server, moment, &mut lab.rng) => killed?,
                failed = writing.join_next() => bail!("the writer has ended: {failed:?}"),
            }
        }
        stop.send(true)?;
        let heads = writing.join_next().await.context("the writer")???;

        all_sealed(server.data()).await?;
        server.begin_stop()?;
        ensure!(server.exited(STOP).await?.success());
        let before = Files::of(server.data())?;
        // What the kills have left was written over by the next file of that number.
        for name in ["sealed-00000000000000ff.redb", "sealed-00000000000000fe.redb.tmp"] {
            fs::write(server.data().join(name), "left over")?;
        }
        server.start_again().await?;
        let after = Files::of(server.data())?;
        ensure!(before == after && !after.unfinished, "{before:?} before the start, {after:?}");
        verify(&server.url(), &payloads, &heads).await?;
        nothing_is_left(&server).await?;
        eprintln!("{hits:?}");
        ensure!(hits.are_enough(), "the run is void: {hits:?}");
        Ok(())
    });
}

/// Waits until a server has nothing more to seal.
pub(crate) async fn all_sealed(data: &Path) -> Result<()> {
    const QUIET: Duration = Duration::from_secs(1);
    let quiet = async {
        let (mut last, mut since) = (Files::of(data)?, Instant::now());
        while since.elapsed() < QUIET {
            sleep(Duration::from_millis(10)).await;
            let now = Files::of(data)?;
            if now.unfinished || now != last {
                (last, since) = (now, Instant::now());
            }
        }
        Ok(())
    };
    wait::soon("the end of the sealing", SOON, quiet).await?
}

/// Deletes all topics. A file that is there all the same belongs to nothing.
async fn nothing_is_left(server: &Server) -> Result<()> {
    let channel = raw::connect(&server.url()).await?;
    for topic in 0..TOPICS {
        admin::delete_topic(&channel, &name(topic)).await?;
    }
    wait::until_ok("the end of the sealed files", SOON, async || {
        let left = Files::of(server.data())?;
        let blobs = files::ending(server.data(), ".log")?.len() - 1;
        ensure!(left.sealed.is_empty() && !left.unfinished, "{left:?}");
        ensure!(blobs == 0, "{blobs} blob files");
        Ok(())
    })
    .await
}

#[test]
fn the_hot_file_stays_within_its_bound() {
    /// More than a server that seals nothing could keep within the bound.
    const PUBLISHED: u64 = 1500 * MIB;
    /// Publishers are slowed down when the messages in the hot file are half as much again as the
    /// 256 MiB that it should have, to 64 MiB/s, and to half of that for each 32 MiB more: to
    /// 4 MiB/s at 512 MiB, which any disk can seal. Beside them there are the messages of a sealed
    /// file that are not removed yet, and a quarter for the trees and for free pages.
    const BOUND: u64 = (512 + 64) * MIB / 4 * 5;
    scenario(WITHIN, async |lab| {
        let mut server = lab.server().await?;
        let payloads = Payloads::new(&mut lab.rng);
        let mut writer = Writer::new(&server, payloads.clone(), lab.rng.fork()).await?;
        let hot = server.data().join("hot.redb");
        let mut most = 0;
        while writer.bytes < PUBLISHED {
            writer.publish().await?;
            // Its length is doubled when it is full, long before all of that is written.
            most = most.max(fs::metadata(&hot)?.blocks() * 512);
        }
        let heads = writer.finish().await?;
        server.kill().await?;
        let killed = Instant::now();
        server.start_again().await?;
        let took = killed.elapsed();
        eprintln!("the hot file had {} MiB at most, and a start took {took:?}", most / MIB);
        ensure!(most < BOUND, "the hot file has {} MiB of {}", most / MIB, BOUND / MIB);
        let channel = raw::connect(&server.url()).await?;
        for (topic, head) in (0..).zip(heads) {
            let found = admin::topic(&channel, &name(topic)).await?.head;
            ensure!(found == head, "the head of {} is {found}, not {head}", name(topic));
        }
        Ok(())
    });
}
