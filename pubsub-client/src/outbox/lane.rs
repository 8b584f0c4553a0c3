//! Publishes the messages of one topic, in order, until the outbox stops.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{Either, Ready, pending, poll_immediate, ready};
use tokio::time::sleep;

use super::clock;
use super::core::Core;
use super::failpoint;
use super::rows::{Request, Stored, Why};
use super::state::Waiting;
use crate::error::{Cause, Outcome, PublishError, PublishErrorKind, Reason};
use crate::limits;
use crate::message::Message;
use crate::publisher::{PublishReceipt, PublishTicket, Publisher};
use crate::retry::Backoff;
use crate::state::ConnectionState;

/// How one publisher of a lane ended.
#[derive(Debug)]
enum End {
    /// With the outbox.
    Stopped,
    /// With the client, which was shut down.
    ShutDown,
    /// Another one goes on with whatever is in the file.
    Again,
}

/// What the answer to a message means for it.
#[derive(Debug)]
enum Fate {
    Published,
    /// It will never be published as it is.
    Refused(Why),
    /// To be sent again under the same key, if that is remembered still.
    Again(String),
    /// The client was shut down.
    ShutDown,
}

/// Runs until the outbox stops or has failed.
pub(super) async fn run(core: Arc<Core>, topic: Arc<str>) {
    let mut backoff = Backoff::new(core.client.retry(), Arc::clone(core.client.env()));
    while core.has_work(&topic).await {
        let end = match open(&core, &topic).await {
            Ok(publisher) => Lane::new(&core, &topic, publisher, &mut backoff).run().await,
            Err(end) => end,
        };
        match end {
            End::Stopped => return,
            End::ShutDown => return core.ledger.close(),
            End::Again => tokio::select! {
                () = sleep(backoff.next_delay(None)) => {}
                () = core.stop.cancelled() => return,
            },
        }
    }
}

impl Core {
    /// Waits until a topic has messages; says that it has not if the outbox stops before.
    async fn has_work(&self, topic: &str) -> bool {
        tokio::select! {
            () = self.ledger.wait_until(|inner| inner.books.has_after(topic, 0)) => true,
            () = self.stop.cancelled() => false,
        }
    }

    fn trouble(&self, topic: &str, waiting: Waiting) {
        self.ledger.set_error(clock::time(self.clock.now()), &format!("topic {topic}: {waiting}"));
        self.ledger.set_waiting(topic, Some(waiting));
    }
}

/// Opens a publisher, and waits until the server has taken it in.
async fn open(core: &Core, topic: &Arc<str>) -> Result<Publisher, End> {
    // Where a publisher would go on with later messages although earlier ones are lost, this one
    // fails, so that another one can send them again in order.
    let publisher = core.client.publisher(&**topic).stop_at_loss();
    let publisher = publisher.window_bytes(limits::outbox::WINDOW_BYTES).open_lazy();
    let refused = {
        let mut ready = pin!(publisher.ready());
        let mut state = publisher.state();
        loop {
            tokio::select! {
                result = &mut ready => break result,
                Some(state) = state.changed() => {
                    core.ledger.set_waiting(topic, waiting(&state));
                }
                () = core.stop.cancelled() => {
                    abandon(&publisher).await;
                    return Err(End::Stopped);
                }
            }
        }
    };
    let Err(error) = refused else {
        core.ledger.set_waiting(topic, None);
        return Ok(publisher);
    };
    let detail: Arc<str> = error.to_string().into();
    let reason = error.reason();
    core.trouble(topic, Waiting { reason, detail: Arc::clone(&detail) });
    if matches!(error.kind(), PublishErrorKind::Closed) {
        return Err(End::ShutDown);
    }
    // The name of the topic breaks a rule, and always will.
    if reason == Some(Reason::InvalidArgument) {
        let why = Why { reason, detail: detail.to_string() };
        return Err(park_all(core, topic, why).await);
    }
    Err(End::Again)
}

/// Sets aside what waits for a topic that can never be.
async fn park_all(core: &Core, topic: &Arc<str>, why: Why) -> End {
    let Ok(stored) = core.read(topic, 0).await else { return End::Stopped };
    let parked = stored.into_iter().map(|stored| (stored.item, why.clone())).collect();
    let (topic, now) = (Arc::clone(topic), core.clock.now());
    match core.commit(Request::Settle { topic, now, published: Vec::new(), parked }).await {
        Ok(()) => End::Again,
        Err(_) => End::Stopped,
    }
}

/// Ends a publisher at once. What it did not send, it does not send any more.
async fn abandon(publisher: &Publisher) {
    // What is unresolved is in the file.
    let _ = publisher.clone().close(Duration::ZERO).await;
}

/// Why a topic waits in this state of its publisher.
fn waiting(state: &ConnectionState) -> Option<Waiting> {
    match state {
        ConnectionState::Blocked { reason, detail } => {
            Some(Waiting { reason: Some(*reason), detail: detail.as_str().into() })
        }
        ConnectionState::Reconnecting { cause, .. }
        | ConnectionState::Closed { cause: Some(cause) } => {
            let reason = match &**cause {
                Cause::Server(error) => Some(error.reason()),
                Cause::Silence(_)
                | Cause::HandshakeTimeout(_)
                | Cause::Transport(_)
                | Cause::Foreign(_)
                | Cause::Drain(_)
                | Cause::Protocol(_)
                | Cause::Panicked
                | Cause::TaskGone => None,
            };
            Some(Waiting { reason, detail: cause.to_string().into() })
        }
        ConnectionState::Connecting
        | ConnectionState::Connected
        | ConnectionState::Standby { .. }
        | ConnectionState::Draining
        | ConnectionState::Closed { cause: None } => None,
    }
}

#[expect(clippy::wildcard_enum_match_arm, reason = "everything unlisted is tried again")]
fn fate(result: Result<PublishReceipt, PublishError>) -> Fate {
    let Err(error) = result else { return Fate::Published };
    let detail = error.to_string();
    match error.kind() {
        PublishErrorKind::Refused(refused) if error.outcome() == Outcome::NotPersisted => {
            Fate::Refused(Why { reason: Some(refused.reason()), detail: refused.message().into() })
        }
        PublishErrorKind::TooLarge { .. } => {
            Fate::Refused(Why { reason: Some(Reason::MessageTooLarge), detail })
        }
        PublishErrorKind::Closed => Fate::ShutDown,
        _ => Fate::Again(detail),
    }
}

/// How long after it was first sent a message may still be sent again, if the server remembers
/// keys for so long: it has to arrive before that is over.
fn resend_window(remembered: Duration) -> Duration {
    remembered - (remembered / 10).min(limits::outbox::RESEND_MARGIN)
}

/// A message on its way.
#[derive(Debug)]
struct InFlight {
    item: u64,
    bytes: u64,
    /// The error of a message that the publisher did not take is its answer, too.
    answer: Either<PublishTicket, Ready<Result<PublishReceipt, PublishError>>>,
}

/// One publisher, and what it does.
struct Lane<'a> {
    core: &'a Core,
    topic: &'a Arc<str>,
    publisher: Publisher,
    backoff: &'a mut Backoff,
    /// Everything up to this item was handed to the publisher.
    handed: u64,
    // Bounded by the limits of what is in flight, and one chunk.
    in_flight: VecDeque<InFlight>,
    bytes: u64,
}

impl<'a> Lane<'a> {
    fn new(
        core: &'a Core,
        topic: &'a Arc<str>,
        publisher: Publisher,
        backoff: &'a mut Backoff,
    ) -> Self {
        let in_flight = VecDeque::new();
        Self { core, topic, publisher, backoff, handed: 0, in_flight, bytes: 0 }
    }

    async fn run(mut self) -> End {
        let end = self.publish().await;
        abandon(&self.publisher).await;
        // All fates are told by now. What was answered need not be sent again.
        let _ = self.settle().await;
        end
    }

    async fn publish(&mut self) -> End {
        let mut changes = self.core.ledger.subscribe();
        let mut state = self.publisher.state();
        loop {
            match self.advance(state.get().is_connected()).await {
                Ok(true) => continue,
                Ok(false) => {}
                Err(end) => return end,
            }
            tokio::select! {
                () = answered(&mut self.in_flight) => {}
                _ = changes.changed() => {}
                changed = state.changed() => match changed {
                    Some(ConnectionState::Closed { cause: None }) => return End::ShutDown,
                    Some(state) => self.show(&state),
                    None => return End::Again,
                },
                () = self.core.stop.cancelled() => return End::Stopped,
            }
        }
    }

    /// Does what can be done now; says whether there may be more.
    async fn advance(&mut self, connected: bool) -> Result<bool, End> {
        self.settle().await?;
        let room = self.in_flight.len() < limits::outbox::IN_FLIGHT_MESSAGES
            && self.bytes < limits::outbox::IN_FLIGHT_BYTES;
        // Nothing goes to a publisher that cannot send it now: it would count as sent.
        let more = connected && self.core.ledger.lock().books.has_after(self.topic, self.handed);
        if room && more { self.feed().await } else { Ok(false) }
    }

    fn show(&self, state: &ConnectionState) {
        match waiting(state) {
            Some(waiting) if state.is_closed() => self.core.trouble(self.topic, waiting),
            waiting => self.core.ledger.set_waiting(self.topic, waiting),
        }
    }

    /// Hands the next messages to the publisher; says whether there were any.
    async fn feed(&mut self) -> Result<bool, End> {
        let stored = self.core.read(self.topic, self.handed).await.map_err(|_| End::Stopped)?;
        // It may be admitted, and not on disk yet.
        let Some(last) = stored.last().map(|stored| stored.item) else { return Ok(false) };
        let now = self.core.clock.now();
        let window = resend_window(self.publisher.idempotency_window());
        let (mut first, mut parked, mut send) = (Vec::new(), Vec::new(), Vec::new());
        for stored in stored {
            let age = |sent| Duration::from_millis(now.saturating_sub(sent));
            let left = stored.sent.map(|sent| window.saturating_sub(age(sent)));
            match left {
                Some(Duration::ZERO) => parked.push((stored.item, forgotten(window))),
                Some(_) => send.push((stored, left)),
                None => {
                    first.push(stored.item);
                    send.push((stored, None));
                }
            }
        }
        if !(first.is_empty() && parked.is_empty()) {
            self.tell(&parked);
            let topic = Arc::clone(self.topic);
            let request = Request::Prepare { topic, now, first, parked };
            self.core.commit(request).await.map_err(|_| End::Stopped)?;
        }
        failpoint::stop("sending").await;
        for (Stored { item, bytes, message, .. }, left) in send {
            // One that is sent again must not be on its way any more when its key is forgotten: at
            // its deadline the publisher is abandoned, and sends nothing again.
            let mut message = Message::from_wire(message, left);
            // A deliberate bug, for tests of tests.
            if cfg!(pubsub_break = "outbox_mints_new_keys") {
                message.idempotency_key = None;
            }
            // The window is larger than what is in flight: this does not wait.
            let answer = match self.publisher.enqueue(message).await {
                Ok(ticket) => Either::Left(ticket),
                Err(error) => Either::Right(ready(Err(error.into()))),
            };
            self.in_flight.push_back(InFlight { item, bytes, answer });
            self.bytes += bytes;
        }
        self.handed = last;
        failpoint::stop("sent").await;
        Ok(true)
    }

    /// Removes what was answered, as far as it was.
    async fn settle(&mut self) -> Result<(), End> {
        let (mut published, mut parked, mut end) = (Vec::new(), Vec::new(), Ok(()));
        while let Some(first) = self.in_flight.front_mut() {
            let Some(answer) = poll_immediate(&mut first.answer).await else { break };
            match fate(answer) {
                Fate::Published => published.push(first.item),
                Fate::Refused(why) => parked.push((first.item, why)),
                Fate::Again(detail) => {
                    if end.is_ok() {
                        let waiting = Waiting { reason: None, detail: detail.into() };
                        self.core.trouble(self.topic, waiting);
                    }
                    end = Err(End::Again);
                }
                Fate::ShutDown => end = Err(End::ShutDown),
            }
            self.bytes -= first.bytes;
            self.in_flight.pop_front();
        }
        if published.is_empty() && parked.is_empty() {
            return end;
        }
        failpoint::stop("answered").await;
        self.backoff.progress();
        self.tell(&parked);
        let (topic, now) = (Arc::clone(self.topic), self.core.clock.now());
        let settled = self.core.commit(Request::Settle { topic, now, published, parked }).await;
        settled.map_err(|_| End::Stopped)?;
        end
    }

    fn tell(&self, parked: &[(u64, Why)]) {
        for (item, Why { reason, detail }) in parked {
            tracing::warn!(topic = &**self.topic, item, ?reason, detail, "set aside");
        }
        if let Some((item, Why { detail, .. })) = parked.last() {
            let error = format!("message {item} was set aside: {detail}");
            self.core.ledger.set_error(clock::time(self.core.clock.now()), &error);
        }
    }
}

fn forgotten(window: Duration) -> Why {
    let detail = format!(
        "it was first sent more than {window:?} ago and never answered: the server may have \
         forgotten its key, and would store it twice; look whether it is there, then resend or \
         discard it"
    );
    Why { reason: None, detail }
}

/// Waits for the answer to the first message; for ever if there is none.
async fn answered(in_flight: &mut VecDeque<InFlight>) {
    let Some(first) = in_flight.front_mut() else { return pending().await };
    let answer = (&mut first.answer).await;
    // It is taken with the others.
    first.answer = Either::Right(ready(answer));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_that_is_sent_again_arrives_before_its_key_is_forgotten() {
        let days = |days: u64| Duration::from_secs(days * 24 * 3600);
        assert_eq!(resend_window(days(7)), days(7) - limits::outbox::RESEND_MARGIN);
        assert_eq!(resend_window(Duration::from_secs(10)), Duration::from_secs(9));
        assert_eq!(resend_window(Duration::ZERO), Duration::ZERO);
    }
}
