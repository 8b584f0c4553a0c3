//! Making the positions of a subscription durable, and confirming what they stand for.

use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::error::BrokerError;
use super::session::{Event, SessionId};
use super::subscription::{Keeper, Subscription};
use crate::record::Epoch;
use crate::storage::{CatalogSubscription, Change, CommitError, Committed, Ticket, Urgency};

/// Whoever waits for something to be durable.
pub(super) type Waiter = oneshot::Sender<Result<(), BrokerError>>;

/// How long to wait after a failed commit.
const SAVE_RETRY: Duration = Duration::from_millis(500);

/// A commit of positions under way.
pub(super) struct Save {
    ticket: Ticket<()>,
    urgency: Urgency,
    floors: Vec<(Epoch, u64)>,
    confirms: Vec<(SessionId, u64)>,
    waiters: Vec<Waiter>,
}

impl Subscription {
    /// Starts a commit of what has changed, unless one is under way: the next one takes
    /// everything that comes meanwhile.
    pub(super) fn start_save(&mut self) {
        if self.save.is_some() || self.retry_save.is_some_and(|at| at > Instant::now()) {
            return;
        }
        self.retry_save = None;
        let confirms: Vec<_> = (self.sessions())
            .filter(|session| session.acks_taken > session.acks_confirmed)
            .filter_map(|session| Some((session.id, session.acks_taken?)))
            .collect();
        let (changes, floors) = self.collect_changes();
        let waiters = std::mem::take(&mut self.waiters);
        let urgency = if std::mem::take(&mut self.hurried) { Urgency::Now } else { Urgency::Soon };
        if changes.is_empty() {
            self.confirm(&confirms);
            answer(waiters, Ok(()));
            self.leave_departed();
            return;
        }
        let ticket = self.storage.apply(changes, urgency);
        self.save = Some(Save { ticket, urgency, floors, confirms, waiters });
    }

    /// Answers when everything that has changed so far is durable.
    pub(super) fn wait(&mut self, waiter: Waiter) {
        self.waiters.push(waiter);
        self.hurry();
    }

    /// Someone waits for what has changed so far: neither its commit nor the one under way waits for
    /// company.
    pub(super) fn hurry(&mut self) {
        self.hurried = true;
        self.hurry_save();
    }

    fn hurry_save(&mut self) {
        if let Some(save) = &mut self.save
            && save.urgency == Urgency::Soon
        {
            save.urgency = Urgency::Now;
            // Nothing by itself; what waits goes with it.
            drop(self.storage.apply(Vec::new(), Urgency::Now));
        }
    }

    pub(super) fn collect_changes(&mut self) -> (Vec<Change>, Vec<(Epoch, u64)>) {
        let mut changes = Vec::new();
        let mut floors = Vec::new();
        let kept = self.keeper == Keeper::Server;
        if std::mem::take(&mut self.record_changed) && kept {
            self.record.used_at = self.now().wall;
            self.record.consumers = self.seats.values().map(|seat| seat.consumer.clone()).collect();
            changes.push(Change::PutSubscription(self.record.clone()));
        }
        for (epoch, topic) in &mut self.topics {
            if topic.delivery.cursor_mut().take_dirty() && kept {
                let cursor = topic.delivery.cursor().record().clone();
                floors.push((*epoch, cursor.floor));
                let subscription = self.record.epoch;
                changes.push(Change::PutCursor { subscription, topic: *epoch, cursor });
            }
        }
        if let Some(letters) = &mut self.letters
            && letters.cursor.take_dirty()
        {
            let (subscription, topic) = (self.record.epoch, letters.epoch());
            let cursor = letters.cursor.record().clone();
            floors.push((topic, cursor.floor));
            changes.push(Change::PutCursor { subscription, topic, cursor });
        }
        (changes, floors)
    }

    pub(super) fn on_saved(&mut self, result: Result<Committed<()>, CommitError>) {
        let Some(save) = self.save.take() else { return };
        match result {
            Ok(_committed) => {
                self.show_floors(save.floors);
                self.confirm(&save.confirms);
                answer(save.waiters, Ok(()));
                self.leave_departed();
            }
            Err(error) => {
                self.save_again();
                // The sessions reconnect and carry over what was not confirmed.
                for session in self.sessions() {
                    session.tell(Event::Ended(error.clone().into()));
                }
                answer(save.waiters, Err(error.into()));
            }
        }
    }

    fn show_floors(&self, floors: Vec<(Epoch, u64)>) {
        for (epoch, floor) in floors {
            let letters = self.letters.as_ref().filter(|letters| letters.epoch() == epoch);
            let shown = self.topics.get(&epoch).map(|topic| &topic.floor);
            if let Some(shown) = shown.or(letters.map(|letters| &letters.floor)) {
                shown.store(floor, Ordering::Release);
            }
        }
    }

    /// What a failed commit may not have saved is to be saved before anything is confirmed.
    fn save_again(&mut self) {
        self.retry_save = Some(Instant::now() + SAVE_RETRY);
        self.record_changed = true;
        for topic in self.topics.values_mut() {
            topic.delivery.cursor_mut().mark_dirty();
        }
        if let Some(letters) = &mut self.letters {
            letters.cursor.mark_dirty();
        }
    }

    pub(super) fn confirm(&mut self, confirms: &[(SessionId, u64)]) {
        for (id, number) in confirms {
            if let Some(session) = self.sessions().find(|session| session.id == *id) {
                session.acks_confirmed = session.acks_confirmed.max(Some(*number));
                session.tell(Event::Confirm(*number));
            }
        }
    }

    /// Waits until everything that has changed so far is durable.
    pub(super) async fn settle_saves(&mut self) -> Result<(), CommitError> {
        if self.save.is_some() {
            self.hurry_save();
            let result = saved(&mut self.save).await;
            let failed = result.as_ref().err().cloned();
            self.on_saved(result);
            failed.map_or(Ok(()), Err)?;
        }
        self.retry_save = None;
        let (changes, floors) = self.collect_changes();
        if !changes.is_empty() {
            let urgency = Urgency::Now;
            let ticket = self.storage.apply(changes, urgency);
            let (confirms, waiters) = (Vec::new(), Vec::new());
            self.save = Some(Save { ticket, urgency, floors, confirms, waiters });
            let result = saved(&mut self.save).await;
            let failed = result.as_ref().err().cloned();
            self.on_saved(result);
            failed.map_or(Ok(()), Err)?;
        }
        Ok(())
    }

    /// Commits changes with everything that has changed so far.
    pub(super) async fn commit_with(&mut self, more: Vec<Change>) -> Result<(), CommitError> {
        if self.save.is_some() {
            self.hurry_save();
            let result = saved(&mut self.save).await;
            let failed = result.as_ref().err().cloned();
            self.on_saved(result);
            failed.map_or(Ok(()), Err)?;
        }
        #[cfg(pubsub_break = "letter_in_its_own_commit")]
        let more = {
            self.storage.apply(more, Urgency::Now).await?.into_inner();
            Vec::new()
        };
        let (mut changes, floors) = self.collect_changes();
        let sought = changes.clone();
        changes.extend(more);
        match self.storage.apply(changes, Urgency::Now).await {
            Ok(_committed) => {
                self.show_floors(floors);
                Ok(())
            }
            Err(CommitError::Unknown) if self.has_happened(&sought).await => {
                self.show_floors(floors);
                Ok(())
            }
            Err(error) => {
                self.save_again();
                Err(error)
            }
        }
    }

    /// Whether a commit whose outcome is unknown has happened, which shows in what it says of this
    /// subscription. What cannot be looked up is not known to have.
    async fn has_happened(&mut self, sought: &[Change]) -> bool {
        let Some(Some(stored)) = self.stored().await else { return false };
        let is_stored = |change: &Change| match change {
            Change::PutSubscription(record) => *record == stored.record,
            Change::PutCursor { topic, cursor, .. } => {
                stored.cursors.iter().any(|(epoch, stored)| epoch == topic && stored == cursor)
            }
            Change::CreateTopic(_)
            | Change::PutTopic(_)
            | Change::DeleteTopic(_)
            | Change::PutSchema(..)
            | Change::DeleteSubscription(_)
            | Change::DeleteCursor { .. }
            | Change::Store { .. }
            | Change::Trim { .. } => true,
        };
        !sought.is_empty() && sought.iter().all(is_stored)
    }

    /// What is stored of this subscription, as far as that can be looked up.
    pub(super) async fn stored(&mut self) -> Option<Option<CatalogSubscription>> {
        let catalog = self.storage.catalog().await.ok()?;
        let mut all = catalog.subscriptions.into_iter();
        Some(all.find(|stored| stored.record.epoch == self.record.epoch))
    }

    /// Saves what is left, at the end.
    pub(super) async fn finish(&mut self) {
        let result = self.settle_saves().await;
        if let Err(error) = &result {
            tracing::debug!(subscription = %self.record.name, %error, "positions not saved");
        }
        answer(std::mem::take(&mut self.waiters), result.map_err(BrokerError::from));
    }
}

pub(super) fn answer(waiters: Vec<Waiter>, result: Result<(), BrokerError>) {
    for waiter in waiters {
        let _ = waiter.send(result.clone());
    }
}

/// The result of a commit under way.
pub(super) async fn saved(save: &mut Option<Save>) -> Result<Committed<()>, CommitError> {
    match save {
        Some(save) => (&mut save.ticket).await,
        None => std::future::pending().await,
    }
}
