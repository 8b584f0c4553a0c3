//! What becomes of messages that have failed as often as they may: they are skipped, or moved to
//! a dead-letter topic. `redriving` has what becomes of dead letters.
//!
//! A move is one commit that stores the copy and lets the original go, and so is the way back. The
//! subscription keeps a position in its dead-letter topic, of which everything is done that was
//! redriven or purged, or is somebody else's; what is not is kept there, whatever its age.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::Owed;
use super::delivery::Cursor;
use super::error::BrokerError;
use super::subscription::Subscription;
use crate::envelope::Origin;
use crate::failpoint;
use crate::limits;
use crate::names::{SubscriptionName, TopicName};
use crate::record::{
    CursorRecord, Epoch, Failure, FailurePolicy, NewMessage, Release, Sequences, StoredMessage,
};
use crate::storage::{Change, ReadError, ReadLimit, Storage};

/// How long to wait after a move that was not possible.
const RETRY: Duration = Duration::from_secs(1);

/// The dead letters of one subscription.
#[derive(Debug)]
pub(super) struct DeadLetters {
    pub(super) topic: Arc<super::Topic>,
    pub(super) cursor: Cursor,
    /// The durable floor, for retention.
    pub(super) floor: Arc<AtomicU64>,
    /// All up to here was looked at: what is not done is this subscription's.
    looked_at: u64,
    /// When to try again what was not possible.
    pub(super) retry: Option<Instant>,
    /// Why it was not possible, for people.
    pub(super) waits_for: Option<String>,
}

/// Which dead letters.
#[derive(Clone, Debug)]
pub enum Letters {
    /// The oldest, up to so many.
    Oldest(usize),
    /// These.
    These(Sequences),
}

/// Dead letters in order.
#[derive(Debug)]
pub struct LetterPage {
    /// The dead-letter topic.
    pub topic: TopicName,
    /// Its incarnation.
    pub epoch: Epoch,
    /// The copies.
    pub letters: Vec<StoredMessage>,
    /// Whether there are more.
    pub more: bool,
}

/// What a call has done with dead letters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settled {
    /// So many were redriven or purged.
    pub settled: u64,
    /// So many could not be redriven: the subscription listens to no topic of the name that they
    /// come from.
    pub homeless: u64,
    /// So many dead letters are left.
    pub left: u64,
}

impl DeadLetters {
    pub(super) fn new(
        topic: Arc<super::Topic>,
        subscription: &SubscriptionName,
        cursor: CursorRecord,
    ) -> Self {
        let floor = topic.keep_for(Owed::DeadLetters(subscription.clone()), cursor.floor);
        let looked_at = cursor.floor;
        let head = (*topic.head.borrow()).max(looked_at);
        let cursor = Cursor::new(cursor, head, None);
        Self { topic, cursor, floor, looked_at, retry: None, waits_for: None }
    }

    pub(super) fn epoch(&self) -> Epoch {
        self.topic.record.epoch
    }

    pub(super) fn head(&self) -> watch::Receiver<u64> {
        self.topic.head.clone()
    }

    /// How many wait to be redriven or purged. For a moment too many, after a restart.
    pub(super) fn waiting(&self) -> u64 {
        self.cursor.backlog()
    }

    /// The first one from here on.
    pub(super) fn next(&self, from: u64) -> Option<u64> {
        let next = self.cursor.after_done(from);
        (next <= self.looked_at).then_some(next)
    }

    /// Looks at what was not looked at yet, one frame of it. Says whether there is more.
    pub(super) async fn look(&mut self, storage: &dyn Storage, me: &SubscriptionName) -> bool {
        self.cursor.on_head(*self.topic.head.borrow());
        let head = self.cursor.head();
        if self.looked_at >= head || self.retry.is_some_and(|at| at > Instant::now()) {
            return false;
        }
        let from = self.cursor.after_done(self.looked_at + 1);
        self.looked_at = from - 1;
        if from > head {
            return false;
        }
        match self.read(storage, from).await {
            Ok(messages) => {
                for message in messages {
                    let origin = Origin::of(&message.body);
                    if origin.is_none_or(|origin| origin.subscription != me.as_str()) {
                        self.cursor.settle(message.sequence, message.sequence);
                    }
                    self.looked_at = message.sequence;
                }
                self.looked_at < head
            }
            Err(ReadError::Trimmed { first }) => {
                self.cursor.settle(from, first - 1);
                self.looked_at = first - 1;
                self.looked_at < head
            }
            Err(error) => {
                self.postpone(&error.to_string());
                false
            }
        }
    }

    pub(super) async fn read(
        &self,
        storage: &dyn Storage,
        from: u64,
    ) -> Result<Vec<StoredMessage>, ReadError> {
        let limit = ReadLimit { messages: limits::MAX_FRAME_MESSAGES, bytes: limits::FRAME_BYTES };
        storage.read(self.epoch(), from, limit).await
    }

    /// Those that are meant, as far as one call goes.
    pub(super) async fn choose(
        &mut self,
        storage: &dyn Storage,
        which: &Letters,
    ) -> Result<Vec<StoredMessage>, ReadError> {
        let (most, meant) = match which {
            Letters::Oldest(most) => (*most, None),
            Letters::These(these) => (usize::MAX, Some(these)),
        };
        let most = most.min(limits::MAX_DEAD_LETTERS);
        let mut chosen = Vec::new();
        let mut bytes = 0;
        let mut from = meant.map_or(1, |these| these.first().map_or(u64::MAX, |r| *r.start()));
        while let Some(next) = self.next(from) {
            let messages = match self.read(storage, next).await {
                // They are gone, and nobody's business any more.
                Err(ReadError::Trimmed { first }) => {
                    self.cursor.settle(next, first - 1);
                    from = first;
                    continue;
                }
                read => read?,
            };
            for message in messages {
                from = message.sequence + 1;
                let is_one = self.next(message.sequence) == Some(message.sequence);
                if !is_one || meant.is_some_and(|these| !these.contains(&message.sequence)) {
                    continue;
                }
                bytes += message.body.len();
                if chosen.len() >= most || bytes > limits::MAX_COMMIT_BYTES && !chosen.is_empty() {
                    return Ok(chosen);
                }
                chosen.push(message);
            }
            if meant.is_some_and(|these| these.last().is_none_or(|last| *last.end() < from)) {
                break;
            }
        }
        Ok(chosen)
    }

    fn postpone(&mut self, cause: &str) {
        if self.waits_for.as_deref() != Some(cause) {
            tracing::warn!(topic = %self.topic.record.name, cause, "dead letters have to wait");
        }
        self.waits_for = Some(cause.to_owned());
        self.retry = Some(Instant::now() + RETRY);
    }
}

impl Subscription {
    /// Lets go what has failed as often as it may, a batch of it, and looks at what came to the
    /// dead-letter topic. Says whether there is more to do at once.
    pub(super) async fn bury(&mut self) -> bool {
        let mut more = false;
        if let Some(letters) = &mut self.letters {
            if letters.retry.is_some_and(|at| at <= Instant::now()) {
                letters.retry = None;
            }
            more = letters.look(&*self.storage, &self.record.name).await;
        }
        let Some((epoch, condemned)) = self.condemned() else {
            return more;
        };
        match self.record.on_failure {
            FailurePolicy::Block => more,
            FailurePolicy::Skip { .. } => {
                self.let_go(epoch, &condemned, Release::Skip);
                self.tell_let_go(epoch, &condemned, None);
                true
            }
            FailurePolicy::DeadLetter { .. } => self.move_away(epoch, condemned).await || more,
        }
    }

    /// Messages of one topic that have failed too often.
    fn condemned(&mut self) -> Option<(Epoch, Vec<u64>)> {
        let now = Instant::now();
        self.topics.iter_mut().find_map(|(epoch, topic)| {
            let condemned = topic.delivery.cursor().condemned();
            let batch: Vec<u64> = condemned.iter().take(limits::BURIAL_MESSAGES).copied().collect();
            (!batch.is_empty() && topic.is_readable(now)).then_some((*epoch, batch))
        })
    }

    /// Moves messages to the dead-letter topic. Says whether it did.
    async fn move_away(&mut self, epoch: Epoch, condemned: Vec<u64>) -> bool {
        let Some(letters) = &self.letters else { return false };
        if letters.retry.is_some() {
            return false;
        }
        let (topic, into) = (Arc::clone(&letters.topic), letters.epoch());
        let copies = self.copies(epoch, condemned).await;
        let bytes = copies.iter().map(|(_, body)| body.len()).sum();
        if copies.is_empty() {
            return false;
        }
        let stores = copies.iter().map(|(_, body)| {
            let message = NewMessage { body: body.clone(), recipients: Vec::new(), key: None };
            Change::Store { topic: into, message }
        });
        let stores = stores.collect();
        let moved: Vec<u64> = copies.into_iter().map(|(sequence, _)| sequence).collect();
        let result = match topic.check_room(&*self.storage, bytes) {
            Ok(()) => self.commit_burial(epoch, &moved, stores).await,
            Err(full) => Err(full),
        };
        if let (Err(error), Some(letters)) = (&result, &mut self.letters) {
            letters.postpone(&format!("the dead-letter topic takes nothing: {error}"));
            return false;
        }
        self.let_go(epoch, &moved, Release::DeadLetter);
        self.tell_let_go(epoch, &moved, Some(&topic.record.name));
        if let Some(letters) = &mut self.letters {
            letters.waits_for = None;
        }
        let (subscription, messages) = (&self.record.name, moved.len());
        tracing::info!(%subscription, into = %topic.record.name, messages, "dead letters");
        true
    }

    /// The copies for the dead-letter topic of as many of these as fit into one commit.
    async fn copies(&mut self, epoch: Epoch, condemned: Vec<u64>) -> Vec<(u64, bytes::Bytes)> {
        let one = ReadLimit { messages: 1, bytes: 1 };
        let mut copies = Vec::new();
        let mut bytes = 0;
        for sequence in condemned {
            let Some(message) = self.read(epoch, sequence, one).await.into_iter().next() else {
                continue;
            };
            let Some(copy) = self.copy(epoch, &message) else {
                continue;
            };
            bytes += copy.len();
            copies.push((sequence, copy));
            if bytes >= limits::FRAME_BYTES {
                break;
            }
        }
        copies
    }

    fn copy(&self, epoch: Epoch, message: &StoredMessage) -> Option<bytes::Bytes> {
        let topic = self.topics.get(&epoch)?;
        let sequence = message.sequence;
        let failure = topic.delivery.cursor().record().failures.get(&sequence)?;
        let Failure { count, first_at, verdict, .. } = failure;
        let verdict = verdict.as_ref()?;
        let origin = Origin {
            topic: topic.name.to_string(),
            epoch,
            sequence,
            subscription: self.record.name.to_string(),
            attempts: *count,
            reason: verdict.reason.clone(),
            first_failure: *first_at,
            last_failure: verdict.at,
        };
        let copy = origin.dead_letter(&message.body);
        if copy.is_none() {
            tracing::error!(topic = %topic.name, sequence, "a stored message does not decode");
        }
        copy
    }

    /// Stores the copies and lets the originals go, in one commit. If it fails, nothing of it has
    /// happened.
    async fn commit_burial(
        &mut self,
        epoch: Epoch,
        moved: &[u64],
        stores: Vec<Change>,
    ) -> Result<(), BrokerError> {
        let Some(topic) = self.topics.get_mut(&epoch) else { return Ok(()) };
        let before = topic.delivery.cursor().clone();
        for sequence in moved {
            topic.delivery.cursor_mut().release(*sequence, Release::DeadLetter);
        }
        failpoint::pass("moving");
        let committed = self.commit_with(stores).await;
        failpoint::pass("moved");
        if committed.is_err()
            && let Some(topic) = self.topics.get_mut(&epoch)
        {
            *topic.delivery.cursor_mut() = before;
            topic.delivery.cursor_mut().mark_dirty();
        }
        committed.map_err(BrokerError::from)
    }

    fn let_go(&mut self, epoch: Epoch, sequences: &[u64], how: Release) {
        let Some(topic) = self.topics.get_mut(&epoch) else { return };
        for sequence in sequences {
            topic.delivery.cursor_mut().release(*sequence, how);
            topic.delivery.let_go(*sequence);
        }
        self.leases.forget_settled(&self.topics);
    }
}
