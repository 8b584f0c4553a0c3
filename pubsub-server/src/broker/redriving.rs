//! What becomes of dead letters: they are listed, and redriven or purged.

use std::collections::BTreeSet;

use super::dead_letters::{DeadLetters, LetterPage, Letters, Settled};
use super::error::BrokerError;
use super::events::What;
use super::subscription::Subscription;
use super::{Broker, Handle, session};
use crate::envelope::{self, Origin};
use crate::failpoint;
use crate::filter::Filter;
use crate::limits;
use crate::names::SubscriptionName;
use crate::record::{NewMessage, Sequences, StoredMessage};
use crate::storage::{Change, CommitError};

impl Subscription {
    /// Answers with dead letters.
    pub(super) async fn letters_after(
        &mut self,
        after: u64,
        most: usize,
    ) -> Result<LetterPage, BrokerError> {
        let rest = after.saturating_add(1)..=u64::MAX - 1;
        let rest = if rest.is_empty() { Sequences::new() } else { Sequences::from_iter([rest]) };
        let (letters, mut chosen) = self.chosen(&Letters::These(rest)).await?;
        chosen.truncate(most);
        let last = chosen.last().map_or(after, |letter| letter.sequence);
        let more = letters.next(last.saturating_add(1)).is_some();
        let topic = letters.topic.record.name.clone();
        Ok(LetterPage { topic, epoch: letters.epoch(), letters: chosen, more })
    }

    /// Sends dead letters back to where they come from, for this subscription only.
    pub(super) async fn redrive(&mut self, which: Letters) -> Result<Settled, BrokerError> {
        let (_, chosen) = self.chosen(&which).await?;
        let (mut stores, mut settled) = (Vec::new(), Vec::new());
        let mut homeless = 0;
        for letter in chosen {
            match self.back_home(&letter) {
                Some(store) => {
                    stores.push(store);
                    settled.push(letter.sequence);
                }
                None => homeless += 1,
            }
        }
        failpoint::pass("redriving");
        self.settle_letters(&settled, stores).await?;
        failpoint::pass("redriven");
        Ok(self.settled(settled.len(), homeless, true))
    }

    fn back_home(&self, letter: &StoredMessage) -> Option<Change> {
        let origin = Origin::of(&letter.body)?;
        let home =
            |topic: &super::subscription::Topic| topic.name.as_str() == origin.topic && !topic.gone;
        let (topic, _) = self.topics.iter().find(|(_, topic)| home(topic))?;
        let me = &self.record.name;
        let body = envelope::revived(&letter.body, me.as_str())?;
        let message = NewMessage { body, recipients: vec![me.clone()], key: None };
        Some(Change::Store { topic: *topic, message })
    }

    /// Lets dead letters go.
    pub(super) async fn purge_letters(&mut self, which: Letters) -> Result<Settled, BrokerError> {
        let (_, chosen) = self.chosen(&which).await?;
        let settled: Vec<u64> = chosen.iter().map(|letter| letter.sequence).collect();
        self.settle_letters(&settled, Vec::new()).await?;
        Ok(self.settled(settled.len(), 0, false))
    }

    /// What a call has done, which is told to whoever watches.
    fn settled(&self, settled: usize, homeless: u64, redriven: bool) -> Settled {
        let (count, left) = (settled as u64, self.letters.as_ref().map_or(0, DeadLetters::waiting));
        if let Some(letters) = self.letters.as_ref().filter(|_| count > 0) {
            let (subscription, topic) =
                (self.record.name.clone(), letters.topic.record.name.clone());
            self.tell_all(What::Settled { subscription, topic, redriven, count, left });
        }
        Settled { settled: count, homeless, left }
    }

    /// In one commit with what else is to be stored. If it fails, nothing of it has happened.
    async fn settle_letters(
        &mut self,
        settled: &[u64],
        stores: Vec<Change>,
    ) -> Result<(), CommitError> {
        let Some(letters) = &mut self.letters else { return Ok(()) };
        let before = letters.cursor.clone();
        settled.iter().for_each(|sequence| letters.cursor.settle(*sequence, *sequence));
        let committed = self.commit_with(stores).await;
        if committed.is_err()
            && let Some(letters) = &mut self.letters
        {
            letters.cursor = before;
            letters.cursor.mark_dirty();
        }
        committed
    }

    /// The dead letters that are meant, as far as one call goes.
    async fn chosen(
        &mut self,
        which: &Letters,
    ) -> Result<(&DeadLetters, Vec<StoredMessage>), BrokerError> {
        let me = &self.record.name;
        let Some(letters) = &mut self.letters else {
            let text = format!("subscription {me} has no dead-letter topic");
            return Err(BrokerError::Invalid(text));
        };
        letters.retry = None;
        while letters.look(&*self.storage, me).await {}
        let chosen = letters.choose(&*self.storage, which).await;
        let chosen =
            chosen.map_err(|error| BrokerError::read(&letters.topic.record.name, error))?;
        Ok((letters, chosen))
    }
}

/// What an administrator asks about dead letters.
#[derive(Debug)]
pub enum LetterCommand {
    /// List those after a sequence, so many at most.
    List(u64, usize, Reply<LetterPage>),
    /// Send them back.
    Redrive(Letters, Reply<Settled>),
    /// Let them go.
    Purge(Letters, Reply<Settled>),
}

type Reply<T> = tokio::sync::oneshot::Sender<Result<T, BrokerError>>;

impl Subscription {
    pub(super) async fn on_letters(&mut self, command: LetterCommand) {
        // Whoever asked may have stopped waiting.
        match command {
            LetterCommand::List(after, most, reply) => {
                let _ = reply.send(self.letters_after(after, most).await);
            }
            LetterCommand::Redrive(which, reply) => {
                let _ = reply.send(self.redrive(which).await);
            }
            LetterCommand::Purge(which, reply) => {
                let _ = reply.send(self.purge_letters(which).await);
            }
        }
    }
}

impl Broker {
    /// The dead letters of a subscription after a sequence of the dead-letter topic, or those of
    /// them that a filter means.
    ///
    /// # Errors
    ///
    /// If there is no such subscription, or it has no dead-letter topic.
    pub async fn dead_letters(
        &self,
        name: &SubscriptionName,
        filter: Option<&Filter>,
        after: u64,
        most: usize,
    ) -> Result<LetterPage, BrokerError> {
        let handle = self.existing(name)?;
        match filter {
            Some(filter) => {
                handle.search((after, u64::MAX), most, |letter| means(filter, letter)).await
            }
            None => handle.letters(after, most).await,
        }
    }

    /// Sends dead letters back to the topics that they come from, to be received by their
    /// subscription alone: those that are meant, and a filter means too. A call takes up to
    /// [`limits::MAX_DEAD_LETTERS`].
    ///
    /// # Errors
    ///
    /// If there is no such subscription, it has no dead-letter topic, or a topic is full.
    pub async fn redrive(
        &self,
        name: &SubscriptionName,
        which: Letters,
        filter: Option<&Filter>,
    ) -> Result<Settled, BrokerError> {
        let handle = self.existing(name)?;
        let mut homes = BTreeSet::new();
        for topic in self.matching(&handle.record.topics) {
            topic.check_room(&*self.inner.storage, 1)?;
            homes.insert(topic.record.name.to_string());
        }
        let mut homeless = 0;
        let has_home = |letter: &StoredMessage| {
            let origin = Origin::of(&letter.body);
            let has_home = origin.is_some_and(|origin| homes.contains(&origin.topic));
            homeless += u64::from(!has_home);
            has_home
        };
        let which = match which {
            // Those without a home are passed over: they would stand before the others for ever.
            Letters::Oldest(_) => handle.narrowed(which, filter, has_home).await?,
            Letters::These(_) if filter.is_none() => which,
            Letters::These(_) => handle.narrowed(which, filter, |_| true).await?,
        };
        let redrive = |reply| letter_command(LetterCommand::Redrive(which, reply));
        let settled = handle.ask(redrive).await??;
        Ok(Settled { homeless: settled.homeless + homeless, ..settled })
    }

    /// Lets dead letters go, for good: those that are meant, and a filter means too. A call takes
    /// up to [`limits::MAX_DEAD_LETTERS`].
    ///
    /// # Errors
    ///
    /// If there is no such subscription, or it has no dead-letter topic.
    pub async fn purge_dead_letters(
        &self,
        name: &SubscriptionName,
        which: Letters,
        filter: Option<&Filter>,
    ) -> Result<Settled, BrokerError> {
        let handle = self.existing(name)?;
        let which = match filter {
            Some(_) => handle.narrowed(which, filter, |_| true).await?,
            None => which,
        };
        handle.ask(|reply| letter_command(LetterCommand::Purge(which, reply))).await?
    }
}

impl Handle {
    async fn letters(&self, after: u64, most: usize) -> Result<LetterPage, BrokerError> {
        self.ask(|reply| letter_command(LetterCommand::List(after, most, reply))).await?
    }

    /// Those of the dead letters that a filter means, too, and are wanted.
    async fn narrowed(
        &self,
        which: Letters,
        filter: Option<&Filter>,
        mut wanted: impl FnMut(&StoredMessage) -> bool,
    ) -> Result<Letters, BrokerError> {
        let mut wanted = |letter: &StoredMessage| {
            filter.is_none_or(|filter| means(filter, letter)) && wanted(letter)
        };
        let found = match which {
            Letters::Oldest(most) => self.search((0, u64::MAX), most, wanted).await?,
            Letters::These(these) => {
                let first = these.first().map_or(1, |range| *range.start());
                let last = these.last().map_or(0, |range| *range.end());
                let (within, most) = ((first - 1, last), limits::MAX_DEAD_LETTERS);
                let meant =
                    |letter: &StoredMessage| these.contains(&letter.sequence) && wanted(letter);
                self.search(within, most, meant).await?
            }
        };
        let one = |letter: &StoredMessage| letter.sequence..=letter.sequence;
        Ok(Letters::These(found.letters.iter().map(one).collect()))
    }

    /// Looks for dead letters after a sequence and up to another one. The subscription is asked
    /// for a page at a time, and goes on in between: there may be many that do not match.
    async fn search(
        &self,
        (mut after, last): (u64, u64),
        most: usize,
        mut wanted: impl FnMut(&StoredMessage) -> bool,
    ) -> Result<LetterPage, BrokerError> {
        let mut found = Vec::new();
        let mut bytes = 0;
        loop {
            let page = self.letters(after, limits::MAX_DEAD_LETTERS).await?;
            after = page.letters.last().map_or(u64::MAX, |letter| letter.sequence);
            for letter in page.letters {
                if letter.sequence > last || !wanted(&letter) {
                    continue;
                }
                bytes += letter.body.len();
                if found.len() >= most || bytes > limits::MAX_COMMIT_BYTES && !found.is_empty() {
                    return Ok(LetterPage { letters: found, more: true, ..page });
                }
                found.push(letter);
            }
            if !page.more || after >= last {
                return Ok(LetterPage { letters: found, more: false, ..page });
            }
        }
    }
}

fn means(filter: &Filter, letter: &StoredMessage) -> bool {
    filter.matches(&envelope::attributes(&letter.body))
}

fn letter_command(command: LetterCommand) -> session::Command {
    session::Command::Admin(super::subscription::AdminCommand::Letters(command))
}
