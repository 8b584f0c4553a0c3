//! The log: what an engine promises, and the engines.
//!
//! An engine is done when it passes the `conformance` suite.
//!
//! # The contract
//!
//! **Order.** [`Storage::append`], [`Storage::open_publisher`] and [`Storage::apply`] are accepted
//! in the order in which they are called and take effect in that order, whoever waits for their
//! tickets. Each is atomic by itself: all of it is stored, or nothing. An engine commits as many
//! of them together as it likes.
//!
//! **Durability.** A ticket resolves to [`Committed`] once everything it stands for survives a
//! power cut. Only an engine can make a `Committed`. A ticket that resolves to
//! [`CommitError::Unknown`] says that the engine can't tell: the write may be found after a
//! restart, or not. After that the engine commits nothing more (see [`Health`]).
//!
//! **Visibility.** Readers and heads see only what is committed. The head of a topic is raised
//! after the commit and before the tickets of that commit resolve. Sequences start at 1, are
//! dense, are assigned inside the commit from the stored head, and never go back.
//!
//! **Identity.** Publisher sequences and idempotency keys are checked and stored in the commit
//! that stores the message, after what precedes it in the same commit: of two publishes with one
//! identity the second is answered with the id of the first, and not before that one is durable.
//!
//! - A message whose publisher sequence is the next one is stored; a lower one is answered as the
//!   first time; a higher one refuses the append as [`AppendRefusal::OutOfOrder`]. An append that
//!   begins with known sequences and continues with new ones is both.
//! - A message that is refused for good ([`Item::Refuse`], or [`RefusalReason::KeyReused`] found
//!   here) takes its sequence, so that a replay gets the same answer and leaves no gap.
//! - A message that would be refused only because it is new ([`Item::RefuseNew`]) is answered with
//!   its id if it is stored under its key, with the same content.
//! - Of an append that is [`Atomic`] all messages have one fate. Whether it is stored already, by its
//!   publisher sequences or by its key, is looked at first; then whether a message of it is refused;
//!   then the expected head. What refuses it for good takes all its sequences.
//! - An append that is refused as a whole ([`AppendRefusal`]) takes no sequence and changes
//!   nothing.
//! - An idempotency key is remembered for the topic's window since its first use, counted by a
//!   clock that neither goes back nor leaps; a duplicate does not prolong it. It outlives its
//!   message, and a restart.
//!
//! **Integrity.** A reader gets the bytes that were stored or a [`ReadError::DataLoss`], never
//! other bytes and never a silent end: sequences are read without gaps.
//!
//! **Time.** `published_at` is taken inside the commit and never decreases along a topic.

use std::fmt;
use std::future::Future;
use std::ops::Deref;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_util::future::BoxFuture;
use tokio::sync::{oneshot, watch};

use crate::record::{
    CursorRecord, Departed, Epoch, IdempotencyKey, NewMessage, StoredMessage, SubscriptionRecord,
    Timestamp, TopicRecord, Uuid,
};
use crate::schema::SchemaRecord;

mod admission;
mod clock;
#[cfg(test)]
mod conformance;
pub mod memory;
pub mod redb;
#[cfg(test)]
pub(crate) mod testing;

/// A durable log of topics with the identities of publishes and the positions of subscriptions.
pub trait Storage: fmt::Debug + Send + Sync + 'static {
    /// This start of the engine, random. It is in the ledger.
    fn boot_id(&self) -> Uuid;

    /// Whether this start or an earlier one had this id. The ledger holds the last
    /// [`crate::limits::MAX_BOOTS`]. An id that is not in it belongs to a history that this store
    /// has not seen: it was restored from an older copy, or is another one.
    fn knows_boot(&self, id: Uuid) -> bool;

    /// All topics and subscriptions, to be read once at the start.
    fn catalog(&self) -> BoxFuture<'_, Result<Catalog, StorageError>>;

    /// Stores messages in a topic.
    fn append(&self, append: Append) -> Ticket<AppendOutcome>;

    /// Opens a publisher's stream. Appends of its earlier streams that were accepted before take
    /// effect and count into the answer; those accepted later are [`AppendRefusal::Fenced`], and so
    /// is a stream that is not higher than all before it, also before a restart.
    fn open_publisher(&self, open: OpenPublisher) -> Ticket<OpenOutcome>;

    /// Changes topics, subscriptions and positions, and stores messages with them, all or nothing.
    /// Fails with [`CommitError::DiskFull`] or [`CommitError::NoTopic`] if a message cannot be
    /// stored.
    fn apply(&self, changes: Vec<Change>, urgency: Urgency) -> Ticket<()>;

    /// The committed head of a topic, 0 while it is empty. `None` if there is no such topic; the
    /// sender is dropped when the topic is deleted, and has shown its last head by then.
    fn head(&self, topic: Epoch) -> Option<watch::Receiver<u64>>;

    /// Reads messages from a sequence on, up to the committed head or the limit; at least one
    /// if there is one, however large. Empty exactly if `from` lies beyond the head.
    fn read(
        &self,
        topic: Epoch,
        from: u64,
        limit: ReadLimit,
    ) -> BoxFuture<'_, Result<Vec<StoredMessage>, ReadError>>;

    /// The first sequence stored at or after a time; head + 1 if there is none.
    fn find(&self, topic: Epoch, time: Timestamp) -> BoxFuture<'_, Result<u64, ReadError>>;

    /// What a topic holds.
    fn stats(&self, topic: Epoch) -> Option<TopicStats>;

    /// Whether the engine takes writes.
    fn health(&self) -> watch::Receiver<Health>;

    /// What the engine can do.
    fn capabilities(&self) -> Capabilities;

    /// Commits what was accepted and closes. Everything after is refused.
    fn close(&self) -> BoxFuture<'_, Result<(), StorageError>>;
}

/// Messages for one topic. Either all are decided, in order, or the append is refused whole.
#[derive(Clone, Debug)]
pub struct Append {
    /// The topic's incarnation.
    pub topic: Epoch,
    /// Whose messages they are; `None` for publishes outside of a publisher session.
    pub publisher: Option<PublisherRef>,
    /// The publisher's sequence of the first item, from 1; any number without a publisher.
    pub first_sequence: u64,
    /// Results below this sequence are not needed any more.
    pub resolved_below: u64,
    /// The messages, with dense sequences. None at all say that the stream is still in use, so that
    /// its publisher is not forgotten.
    pub items: Vec<Item>,
    /// Whether they are stored all together or not at all.
    pub atomic: Option<Atomic>,
    /// Dropped when the messages are committed or refused, whoever waits for the ticket.
    pub room: Option<Room>,
}

/// The messages of an append are stored all together, with dense sequences, or are refused for
/// good all together. They have no keys of their own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Atomic {
    /// What the head of the topic has to be, unless the messages are stored already.
    pub expected_head: Option<u64>,
    /// The application's identity for all of it.
    pub key: Option<IdempotencyKey>,
}

/// What messages take up between their arrival and their commit.
pub type Room = Arc<dyn fmt::Debug + Send + Sync>;

/// One message of an append.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// To be stored.
    Store(NewMessage),
    /// Refused for good before it came here. It takes its sequence.
    Refuse(Refusal),
    /// Refused for good, unless it is stored under this key already: what is taken may have been
    /// more once.
    RefuseNew(IdempotencyKey, Refusal),
}

/// A message is refused for good.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Refusal {
    /// Why.
    pub reason: RefusalReason,
    /// For people; at most [`crate::limits::MAX_REFUSAL_BYTES`].
    pub detail: String,
    /// For programs.
    pub facts: Vec<Fact>,
}

/// A detail of a refusal.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Fact {
    /// The most that is allowed.
    Limit(u64),
    /// The message that has the key.
    Sequence(u64),
    /// The revision of the schema that was checked with.
    SchemaRevision(u32),
    /// The field that breaks it.
    Field(String),
    /// What was expected instead.
    Expected(String),
    /// The head of the topic.
    Head(u64),
    /// Which message of an atomic append it is about, from 0.
    Index(u32),
}

impl Refusal {
    /// A refusal without details for programs.
    pub fn new(reason: RefusalReason, detail: impl Into<String>) -> Self {
        Self { reason, detail: detail.into(), facts: Vec::new() }
    }

    /// Adds a detail for programs.
    #[must_use]
    pub fn with(mut self, fact: Fact) -> Self {
        self.facts.push(fact);
        self
    }
}

/// Why a message is refused for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum RefusalReason {
    /// A field breaks a rule.
    Invalid,
    /// Larger than the topic allows.
    TooLarge,
    /// A recipient is no subscription of the topic.
    UnknownRecipient,
    /// The idempotency key was used before with other content.
    KeyReused,
    /// The payload is not valid by the topic's schema.
    Schema,
    /// The content type is not the topic's.
    ContentType,
    /// The head of the topic is not the expected one.
    HeadMismatch,
}

/// One stream of a publisher.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PublisherRef {
    /// The publisher.
    pub id: Uuid,
    /// How often it started over from sequence 1.
    pub epoch: u32,
    /// The stream, counted by the publisher. Of two streams of one publisher and epoch the higher
    /// one fences the other, in whatever order they arrive.
    pub stream: u64,
}

/// Opens a publisher's stream on a topic.
#[derive(Clone, Copy, Debug)]
pub struct OpenPublisher {
    /// The topic's incarnation.
    pub topic: Epoch,
    /// The publisher and its new stream.
    pub publisher: PublisherRef,
    /// Results below this sequence are not needed any more.
    pub resolved_below: u64,
}

/// The answer to [`Storage::append`].
pub type AppendOutcome = Result<Vec<Run>, AppendRefusal>;

/// The answer to [`Storage::open_publisher`]: the last sequence of this publisher and epoch that
/// is decided, `None` if none is.
pub type OpenOutcome = Result<Option<u64>, AppendRefusal>;

/// The common fate of messages with dense sequences.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// The publisher's sequence of the first one.
    pub first_sequence: u64,
    /// How many, at least 1.
    pub count: u32,
    /// What happened.
    pub fate: Fate,
}

/// What happened to a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is stored.
    Stored {
        /// Where; in a [`Run`] the following ones follow.
        sequence: u64,
        /// Whether an earlier publish with the same identity had stored it.
        duplicate: bool,
        /// When.
        at: Timestamp,
    },
    /// It is refused.
    Refused(Refusal),
}

/// An append is refused as a whole: nothing is stored and no sequence is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AppendRefusal {
    /// There is no topic of this epoch.
    #[error("the topic was deleted")]
    NoTopic,
    /// A newer stream or epoch of the same publisher was opened.
    #[error("a newer stream of this publisher has taken over")]
    Fenced,
    /// A sequence was skipped.
    #[error("expected sequence {expected}")]
    OutOfOrder {
        /// The next one.
        expected: u64,
    },
    /// The result of this old sequence is not kept any more.
    #[error("the result of sequence {sequence} is not kept any more")]
    ResultExpired {
        /// The first one of the append that is not kept.
        sequence: u64,
    },
    /// [`crate::limits::MAX_PUBLISHERS`] is reached.
    #[error("the server remembers as many publishers as it may")]
    TooManyPublishers,
    /// [`crate::limits::MAX_IDEMPOTENCY_KEYS`] is reached.
    #[error("the server remembers as many idempotency keys as it may")]
    TooManyKeys,
    /// The disk is full, or fuller than allowed, and not all of the messages are stored already.
    #[error("the disk is full")]
    DiskFull,
    /// What is stored of this topic or publisher failed its checksum: whether the messages are new
    /// cannot be told.
    #[error("what is stored of this topic or publisher is damaged")]
    Damaged,
}

/// A change to topics, subscriptions and positions.
#[derive(Clone, Debug)]
pub enum Change {
    /// Adds a topic. Its name and epoch are new.
    CreateTopic(TopicRecord),
    /// Replaces the settings of a topic; nothing happens if it is gone.
    PutTopic(TopicRecord),
    /// Removes a topic with its messages, publishers, keys and all cursors in it. The space may
    /// come back later. A cursor behind the head becomes a [`Departed`], until its floor gets
    /// there or its subscription is gone.
    DeleteTopic(Epoch),
    /// Adds a revision of what a topic takes; nothing happens if the topic is gone. It goes with
    /// its topic.
    PutSchema(Epoch, Arc<SchemaRecord>),
    /// Adds a subscription or replaces its record.
    PutSubscription(SubscriptionRecord),
    /// Removes a subscription with its cursors.
    DeleteSubscription(Epoch),
    /// Adds or replaces the position of a subscription in a topic, or in one that has departed;
    /// nothing happens if either of them is gone.
    PutCursor {
        /// The subscription.
        subscription: Epoch,
        /// The topic.
        topic: Epoch,
        /// The position.
        cursor: CursorRecord,
    },
    /// Removes the position of a subscription in a topic: it does not listen there any more.
    DeleteCursor {
        /// The subscription.
        subscription: Epoch,
        /// The topic.
        topic: Epoch,
    },
    /// Stores a message, behind what was accepted before. It has no identity: what makes it
    /// happen once is the rest of the changes.
    Store {
        /// The topic.
        topic: Epoch,
        /// The message, without a key.
        message: NewMessage,
    },
    /// Removes the messages below a sequence, at most up to the head. The space may come back
    /// later.
    Trim {
        /// The topic.
        topic: Epoch,
        /// The first one that stays.
        below: u64,
    },
}

/// Whether a commit can wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgency {
    /// No.
    Now,
    /// For company, up to [`crate::limits::ACK_LINGER`].
    Soon,
}

/// Everything there is at the start.
#[derive(Clone, Debug, Default)]
pub struct Catalog {
    /// The topics.
    pub topics: Vec<TopicRecord>,
    /// The revisions of what each topic takes, in order.
    pub schemas: Vec<(Epoch, Arc<SchemaRecord>)>,
    /// The subscriptions.
    pub subscriptions: Vec<CatalogSubscription>,
}

/// A subscription at the start.
#[derive(Clone, Debug)]
pub struct CatalogSubscription {
    /// Its record.
    pub record: SubscriptionRecord,
    /// Its positions by topic.
    pub cursors: Vec<(Epoch, CursorRecord)>,
    /// What it was not told of.
    pub departed: Vec<Departed>,
}

/// How much to read.
#[derive(Clone, Copy, Debug)]
pub struct ReadLimit {
    /// Messages.
    pub messages: usize,
    /// Bytes of bodies.
    pub bytes: usize,
}

/// What a topic holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TopicStats {
    /// The first message that is stored; head + 1 if there is none.
    pub first: u64,
    /// The last message, 0 if there never was one.
    pub head: u64,
    /// Bytes of the messages that are stored, and of those that are trimmed and take up space
    /// still: from `stored_from` on.
    pub bytes: u64,
    /// The first message that takes up space; not after `first`.
    pub stored_from: u64,
}

impl TopicStats {
    /// About how many bytes it will be when what is trimmed is gone.
    pub fn live_bytes(&self) -> u64 {
        let count = |from: u64| u128::from((self.head + 1).saturating_sub(from));
        let (live, all) = (count(self.first), count(self.stored_from).max(1));
        u64::try_from(u128::from(self.bytes) * live / all).unwrap_or(u64::MAX)
    }
}

/// Whether an engine takes writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// Yes.
    Ok,
    /// No new messages, for now: the disk is full, or fuller than allowed. Reads and positions go
    /// on.
    DiskFull,
    /// Never again: a commit failed, and what is on disk is only known after a restart. The
    /// process has to end.
    Failed(String),
}

/// What an engine can do.
#[derive(Clone, Copy, Debug)]
pub struct Capabilities {
    /// The name of the engine.
    pub name: &'static str,
    /// Whether what is committed survives the end of the process.
    pub durable: bool,
}

/// Something that is committed. Only an engine can make one.
#[derive(Debug)]
#[must_use]
pub struct Committed<T>(T);

impl<T> Committed<T> {
    /// What is committed.
    pub fn into_inner(self) -> T {
        self.0
    }
}

impl<T> Deref for Committed<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

/// Why a commit is not known to be durable.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommitError {
    /// Nothing was written: the engine is closed or has failed before.
    #[error("the storage takes no writes any more")]
    Refused,
    /// Nothing was written: as much as allowed is waiting already.
    #[error("too many commits are waiting")]
    Overloaded,
    /// The disk is full; nothing was written.
    #[error("the disk is full")]
    DiskFull,
    /// A message was to be stored in a topic that is not there, or is damaged; nothing was written.
    #[error("there is no such topic, or it is damaged")]
    NoTopic,
    /// The write may be durable, or not.
    #[error("the commit failed, and its outcome is not known")]
    Unknown,
}

/// Resolves when what it stands for is committed. Dropping it cancels nothing.
#[derive(Debug)]
#[must_use]
pub struct Ticket<T>(oneshot::Receiver<Result<T, CommitError>>);

/// The engine's end of a ticket.
#[derive(Debug)]
struct Promise<T> {
    sender: oneshot::Sender<Result<T, CommitError>>,
    room: Option<Room>,
}

/// A ticket with its engine's end.
fn ticket<T>() -> (Promise<T>, Ticket<T>) {
    let (sender, receiver) = oneshot::channel();
    (Promise { sender, room: None }, Ticket(receiver))
}

impl<T> Promise<T> {
    /// Keeps the room until the promise is kept, fails or is dropped.
    fn holding(self, room: Option<Room>) -> Self {
        Self { room, ..self }
    }

    /// To be called after the commit, and by engines only.
    fn keep(self, outcome: T) {
        self.settle(Ok(outcome));
    }

    fn fail(self, error: CommitError) {
        self.settle(Err(error));
    }

    fn settle(self, result: Result<T, CommitError>) {
        // Before the answer: whoever gets it may need the room.
        drop(self.room);
        // Whoever dropped the ticket does not need to know.
        let _ = self.sender.send(result);
    }
}

impl<T> Future for Ticket<T> {
    type Output = Result<Committed<T>, CommitError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx).map(|result| match result {
            Ok(result) => result.map(Committed),
            // A promise that is dropped was neither kept nor refused.
            Err(_) => Err(CommitError::Unknown),
        })
    }
}

/// Why messages cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// There is no topic of this epoch.
    #[error("the topic was deleted")]
    NoTopic,
    /// The sequence was trimmed.
    #[error("the first message that is stored is {first}")]
    Trimmed {
        /// The first one that can be read.
        first: u64,
    },
    /// Stored data failed its checksum or is missing.
    #[error("message {sequence} is damaged on disk")]
    DataLoss {
        /// The first sequence that cannot be read.
        sequence: u64,
    },
    /// The storage cannot be read at all.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// Why a storage cannot be opened or used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StorageError {
    /// Another process has it open.
    #[error("{path} is in use by {holder}; stop that server or choose another data directory")]
    InUse {
        /// The data directory.
        path: String,
        /// Who has it, as far as known.
        holder: String,
    },
    /// It was written by another version.
    #[error("{path} has format version {found}, and this server reads version {supported}")]
    Format {
        /// The file.
        path: String,
        /// Its version.
        found: u32,
        /// Ours.
        supported: u32,
    },
    /// It is damaged, or not ours.
    #[error("{path} is damaged: {detail}")]
    Corrupt {
        /// The file.
        path: String,
        /// What was found.
        detail: String,
    },
    /// The operating system failed.
    #[error("{path}: {detail}")]
    Io {
        /// The file.
        path: String,
        /// What it said.
        detail: String,
    },
    /// It was closed.
    #[error("the storage is closed")]
    Closed,
}
