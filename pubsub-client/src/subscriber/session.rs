//! The task of a subscriber: attaches, and attaches again.

use std::mem;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use pubsub_proto::v1::subscribe_request::Frame as Request;
use pubsub_proto::v1::subscribe_response::Frame;
use pubsub_proto::{Courtesy, v1 as pb};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::convert;
use super::core::{Core, Gate};
use super::resume::{Broken, Settled};
use super::topic::Missing;
use crate::error::{Cause, Reason, SubscribeError};
use crate::frames;
use crate::limits;
use crate::liveness::{Liveness, Unconfirmed, after};
use crate::message::duration;
use crate::reconnect::{Hopeless, Reconnect};
use crate::state::ConnectionState;
use crate::transport::{Link, Responses};

type Requests = mpsc::Sender<pb::SubscribeRequest>;

/// Streams that contradict themselves, in a row and without anything delivered between, before
/// the subscriber gives up: by then it is no lost frame but a bug.
const MAX_PROTOCOL_ERRORS: u32 = 10;
/// How long a server may take to see a goodbye.
const GOODBYE: Duration = Duration::from_secs(1);

/// How one connection ended.
#[derive(Debug)]
enum End {
    /// As the application wished.
    Stopped,
    /// As the server wished, before a restart.
    Advised { reason: String, after: Duration },
    /// By failure.
    Lost(Cause),
}

impl From<Cause> for End {
    fn from(cause: Cause) -> Self {
        Self::Lost(cause)
    }
}

impl From<Broken> for End {
    fn from(Broken(detail): Broken) -> Self {
        Self::Lost(Cause::Protocol(detail))
    }
}

impl From<Hopeless> for SubscribeError {
    fn from(hopeless: Hopeless) -> Self {
        match hopeless {
            Hopeless::Protocol(detail) => Self::Protocol(detail),
            Hopeless::Foreign(answer) => Self::Foreign(answer),
        }
    }
}

/// Runs until the subscriber is stopped or refused, or gives up.
pub(super) fn run(core: Arc<Core>) -> impl Future<Output = ()> + Send {
    // There before the first poll, which may never come.
    let guard = Guard(core);
    async move {
        let core = &guard.0;
        let error = tokio::select! {
            error = keep_attached(core) => error,
            () = core.stop_overdue() => None,
        };
        core.end(error);
    }
}

/// Handles can outlive the session's task: its runtime ends, or the task panics. Then they must
/// not wait for it.
struct Guard(Arc<Core>);

impl Drop for Guard {
    fn drop(&mut self) {
        if !self.0.has_ended() {
            self.0.end(Some(SubscribeError::TaskGone));
        }
    }
}

async fn keep_attached(core: &Core) -> Option<SubscribeError> {
    let policy = core.client.retry;
    let env = Arc::clone(&core.client.env);
    let mut reconnect = Reconnect::new(policy, env, MAX_PROTOCOL_ERRORS);
    loop {
        // A panic is a bug, and still no reason to lose messages: the state is kept, and the
        // next connection puts it right.
        let attached = AssertUnwindSafe(attach(core, &mut reconnect)).catch_unwind().await;
        let delay = match attached.unwrap_or(End::Lost(Cause::Panicked)) {
            End::Stopped => return None,
            End::Advised { reason, after } => reconnect.advised(&reason, after, &core.state),
            End::Lost(cause) => {
                if let Some(error) = terminal(core, &cause) {
                    return Some(error);
                }
                match reconnect.lost(cause, &core.state) {
                    Ok(delay) => delay,
                    Err(hopeless) => return Some(hopeless.into()),
                }
            }
        };
        tokio::select! {
            () = sleep(delay) => {}
            // Nothing is left that a connection would be needed for.
            () = left_alone(core) => return None,
        }
    }
}

async fn left_alone(core: &Core) {
    while !core.may_leave(Instant::now()) {
        core.wake.notified().await;
    }
}

/// What ends the subscriber. Everything else is tried again.
#[expect(clippy::wildcard_enum_match_arm, reason = "new reasons are tried again, too")]
fn terminal(core: &Core, cause: &Cause) -> Option<SubscribeError> {
    let Cause::Server(error) = cause else { return None };
    match error.reason() {
        Reason::InvalidArgument
        | Reason::UnsupportedProtocol
        | Reason::TopicNotFound
        | Reason::SubscriptionNotFound
        | Reason::SubscriptionMismatch
        | Reason::SubscriptionDeleted
        | Reason::BeyondHead
        | Reason::Superseded => Some(SubscribeError::Refused(error.clone())),
        // Later it is waited for: who was taken in once will be again.
        Reason::LimitReached if !core.lock().welcomed => {
            Some(SubscribeError::Refused(error.clone()))
        }
        // The position is the application's, and means nothing in another history.
        Reason::Diverged if core.settings.is_reader() => {
            Some(SubscribeError::Refused(error.clone()))
        }
        Reason::Diverged => {
            tracing::warn!(
                what = convert::describe(&core.settings),
                "the server's data is not what it was; going on from what it knows"
            );
            let mut inner = core.lock();
            inner.boot.clear();
            inner.epoch = 0;
            inner.gate = Gate::Closed;
            let settled = inner.resume.forget();
            core.arrived(&mut inner, settled);
            None
        }
        _ => None,
    }
}

/// One connection, from the hello to its end.
async fn attach(core: &Core, reconnect: &mut Reconnect) -> End {
    let hello_at = Instant::now();
    let call = |channel, requests| {
        frames::call(channel, "/pubsub.v1.SubscriberService/Subscribe", requests)
    };
    let opened = core.client.dialer.open(convert::hello(core), call).await;
    let (link, first) = match opened {
        Ok(opened) => opened,
        Err(cause) => return End::Lost(cause),
    };
    let live = Liveness::new(core.settings.heartbeat, hello_at, Instant::now());
    let mut session = Session {
        core,
        reconnect,
        live,
        unconfirmed: Unconfirmed::default(),
        courtesy: Courtesy::default(),
        grace: None,
        ack_due: None,
        drain: None,
    };
    match session.first(first) {
        Ok(()) => session.run(link).await,
        Err(end) => end,
    }
}

/// Waits for what may be there already, and tells if it is not.
async fn told<F: Future>(coming: F, wait: impl FnOnce()) -> F::Output {
    let mut coming = pin!(coming);
    if let Some(there) = coming.as_mut().now_or_never() {
        return there;
    }
    wait();
    coming.await
}

/// One connection after its hello was answered.
#[derive(Debug)]
struct Session<'a> {
    core: &'a Core,
    reconnect: &'a mut Reconnect,
    live: Liveness,
    unconfirmed: Unconfirmed,
    courtesy: Courtesy,
    /// How long the server keeps messages for a lost session; known when active.
    grace: Option<Duration>,
    ack_due: Option<Instant>,
    drain: Option<Draining>,
}

#[derive(Debug)]
struct Draining {
    deadline: Instant,
    reason: String,
    after: Duration,
}

impl Session<'_> {
    fn first(&mut self, response: pb::SubscribeResponse) -> Result<(), End> {
        match response.frame {
            Some(Frame::Welcome(_) | Frame::Standby(_)) => self.frame(response),
            Some(Frame::Drain(drain)) => {
                let after = advice(drain.reconnect_after);
                Err(End::Advised { reason: drain.reason, after })
            }
            _ => Err(Broken("the first frame is neither welcome nor standby".to_owned()).into()),
        }
    }

    async fn run(mut self, link: Link<pb::SubscribeRequest, pb::SubscribeResponse>) -> End {
        let Link { requests, mut responses } = link;
        loop {
            let now = Instant::now();
            if self.core.may_leave(now) {
                return self.leave(&requests, responses).await;
            }
            let (send, wake) = match self.due(now) {
                Ok(due) => due,
                Err(end) => return end,
            };
            let step = tokio::select! {
                response = told(responses.next(), || self.courtesy.waits()) => match response {
                    Ok(response) => self.frame(response),
                    Err(cause) => Err(cause.into()),
                },
                permit = requests.reserve(), if send => match permit {
                    Ok(permit) => {
                        self.send(permit);
                        Ok(())
                    }
                    // The stream is at its end; its responses say why.
                    Err(_) => match responses.next().await {
                        Ok(response) => self.frame(response),
                        Err(cause) => Err(cause.into()),
                    },
                },
                () = self.core.wake.notified() => Ok(()),
                () = sleep_until(wake) => Ok(()),
            };
            if let Err(end) = step {
                return end;
            }
        }
    }

    /// Whether there is something to send, and when to look again otherwise.
    fn due(&mut self, now: Instant) -> Result<(bool, Instant), End> {
        if let Some(silence) = self.live.dead(now) {
            return Err(End::Lost(Cause::Silence(silence)));
        }
        let mut wake = self.live.wake_at(now);
        if let Some((dead_at, silence)) = self.unconfirmed.dead_at(&self.live) {
            if now >= dead_at {
                return Err(End::Lost(Cause::Silence(silence)));
            }
            wake = wake.min(dead_at);
        }
        let inner = self.core.lock();
        let queued = if self.grace.is_some() { inner.resume.queued() } else { 0 };
        if let Some(drain) = &self.drain {
            let finished = queued == 0 && !inner.resume.is_unconfirmed();
            if finished || now >= drain.deadline {
                let (reason, after) = (drain.reason.clone(), drain.after);
                return Err(End::Advised { reason, after });
            }
            wake = wake.min(drain.deadline);
        }
        let mut send = self.live.ping_is_due(now);
        if queued > 0 {
            let due = *self.ack_due.get_or_insert(now + limits::ACK_LINGER);
            send |= queued >= self.core.ack_batch() || inner.urgent || now >= due;
            wake = if now >= due { wake } else { wake.min(due) };
        }
        if let Some(stop) = &inner.stop {
            wake = wake.min(stop.last_call);
            send |= queued > 0;
        }
        Ok((send, wake))
    }

    fn send(&mut self, permit: mpsc::Permit<'_, pb::SubscribeRequest>) {
        let now = Instant::now();
        if self.live.ping_is_due(now) {
            let nonce = self.live.ping(now);
            permit.send(convert::request(Request::Ping(pb::Ping { nonce })));
            // A message has no timer of its own: being late by a ping does not matter to it.
            self.core.give_up_overdue(now);
            return;
        }
        self.ack_due = None;
        let mut inner = self.core.lock();
        inner.urgent = false;
        let awaited = mem::take(&mut inner.awaited) || inner.stop.is_some();
        if let Some((number, topics)) = inner.resume.batch() {
            // A reader's are not confirmed.
            if !self.core.settings.is_reader() {
                self.unconfirmed.sent(number, now);
            }
            permit.send(convert::acks(number, topics, awaited));
        }
    }

    /// Says goodbye, and waits for the server to have heard it.
    async fn leave(
        &mut self,
        requests: &Requests,
        mut responses: Responses<pb::SubscribeResponse>,
    ) -> End {
        self.core.state.set(ConnectionState::Draining);
        let goodbye = async {
            let sent = requests.send(convert::request(Request::Goodbye(pb::Goodbye {}))).await;
            if sent.is_ok() {
                // Acks that are confirmed meanwhile still count.
                while let Ok(response) = responses.next().await {
                    if let Some(Frame::Confirm(_)) = response.frame
                        && self.frame(response).is_err()
                    {
                        break;
                    }
                }
            }
        };
        // Not heard: then the server notices by itself.
        let _ = timeout(GOODBYE, goodbye).await;
        End::Stopped
    }

    fn frame(&mut self, response: pb::SubscribeResponse) -> Result<(), End> {
        let now = Instant::now();
        self.live.frame(now);
        let result = self.handle(response);
        self.live.handled(now, Instant::now());
        result
    }

    fn handle(&mut self, response: pb::SubscribeResponse) -> Result<(), End> {
        let Some(frame) = response.frame else {
            return Err(Broken("a frame of an unknown kind came".to_owned()).into());
        };
        match frame {
            Frame::Welcome(welcome) => self.welcome(welcome),
            Frame::Standby(standby) => self.standby(standby),
            Frame::Deliver(deliver) => {
                self.courtesy.before(deliver.is_bulk(), || Instant::now().into_std());
                self.deliver(deliver)?;
            }
            Frame::Confirm(confirm) => {
                self.unconfirmed.confirmed(confirm.number);
                let settled = self.core.lock().resume.confirm(confirm.number);
                self.reconnect.progress();
                self.settle(settled);
            }
            Frame::Heartbeat(heartbeat) => self.heartbeat(heartbeat)?,
            Frame::Rewind(rewind) => {
                let pb::Rewind { topic, from, generation, taken_back } = rewind;
                let back = convert::ranges_from(taken_back);
                let mut inner = self.core.lock();
                inner.resume.rewind(topic, from, generation, &back)?;
                self.core.arrived(&mut inner, Settled::default());
            }
            Frame::Gap(gap) => {
                let range = gap.range.unwrap_or_default();
                let missing = Missing { range: range.first..=range.last, reason: gap.reason };
                let mut inner = self.core.lock();
                if inner.resume.gap(gap.topic, &missing)? {
                    self.core.arrived(&mut inner, Settled::default());
                }
            }
            Frame::DataLoss(loss) => {
                let mut inner = self.core.lock();
                inner.resume.data_loss(loss.topic, loss.sequence)?;
                self.core.arrived(&mut inner, Settled::default());
            }
            Frame::Joined(joined) => {
                let joined = convert::joined(joined.topic.unwrap_or_default());
                let settled = self.core.lock().resume.joined(joined);
                self.settle(settled);
            }
            Frame::Left(left) => {
                let settled = self.core.lock().resume.left(left.topic)?;
                self.settle(settled);
            }
            Frame::Repositioned(moved) => {
                let joined = convert::joined(moved.topic.unwrap_or_default());
                let settled = self.core.lock().resume.repositioned(joined);
                self.settle(settled);
            }
            Frame::Drain(drain) => self.drain(drain),
        }
        Ok(())
    }

    fn settle(&self, settled: Settled) {
        self.core.arrived(&mut self.core.lock(), settled);
    }

    fn welcome(&mut self, welcome: pb::SubscribeWelcome) {
        let grace = duration(welcome.grace).unwrap_or_default().min(limits::MAX_GRACE);
        let interval = duration(welcome.heartbeat_interval).unwrap_or_default();
        self.live.set_interval(interval, grace, Instant::now());
        self.grace = Some(grace);
        self.reconnect.connected();
        // Before anybody who waits for the welcome is woken, and looks.
        self.core.state.set(ConnectionState::Connected);
        {
            let order = convert::kind_from_wire(welcome.kind()).into();
            let mut inner = self.core.lock();
            inner.boot = welcome.boot_id;
            inner.epoch = welcome.subscription_epoch;
            let topics = welcome.topics.into_iter().map(convert::joined).collect();
            let settled = inner.resume.welcome(order, topics);
            inner.resume.report_started(welcome.report_started);
            inner.gate = self.gate();
            self.core.arrived(&mut inner, settled);
            self.core.welcomed(&mut inner, true);
        }
    }

    fn standby(&mut self, standby: pb::Standby) {
        self.reconnect.connected();
        // What is acked while it stands by waits for its turn, or for the next hello.
        self.unconfirmed = Unconfirmed::default();
        self.core.state.set(ConnectionState::Standby { active: standby.active_consumer });
        let mut inner = self.core.lock();
        inner.gate = Gate::Closed;
        self.core.welcomed(&mut inner, false);
    }

    /// Until when nobody else can have what is buffered here.
    fn gate(&self) -> Gate {
        match self.grace {
            _ if self.core.settings.is_reader() => Gate::Open,
            Some(grace) => Gate::Until(self.live.answered() + grace),
            None => Gate::Closed,
        }
    }

    fn deliver(&mut self, deliver: pb::Deliver) -> Result<(), End> {
        let (topic, first_delivery, generation) =
            (deliver.topic, deliver.first_delivery, deliver.generation);
        let (order, (_, topics)) = {
            let inner = self.core.lock();
            (inner.resume.order(), inner.resume.held())
        };
        // Before anything is made of it.
        self.check_credit(deliver.count(), topics)?;
        // Not under the lock, which the application wants for each message.
        let mut messages = Vec::with_capacity(deliver.count());
        for message in deliver.received() {
            let item = convert::item(order, message);
            messages.push(item.map_err(|error| Broken(format!("a message: {error}")))?);
        }
        let messages = messages.into_iter();
        let mut inner = self.core.lock();
        let shown = inner.resume.deliver(topic, first_delivery, generation, messages)?;
        let (held, topics) = inner.resume.held();
        self.check_credit(held, topics)?;
        if shown > 0 {
            self.reconnect.progress();
            self.core.arrived(&mut inner, Settled::default());
        }
        Ok(())
    }

    /// Whether a server that respects our credit can have sent so many messages.
    fn check_credit(&self, messages: usize, topics: usize) -> Result<(), Broken> {
        // A topic with nothing out gets a message beyond the credit.
        let most = self.core.settings.max_messages as usize + topics + limits::CREDIT_SLACK;
        if messages > most {
            return Err(Broken(format!("{messages} messages were sent without credit")));
        }
        Ok(())
    }

    fn heartbeat(&mut self, heartbeat: pb::SubscriberHeartbeat) -> Result<(), End> {
        let mut inner = self.core.lock();
        // First: a stream that loses messages makes no progress.
        inner.resume.check_deliveries(heartbeat.last_delivery)?;
        if self.live.answer(heartbeat.echoed_nonce) {
            self.reconnect.progress();
        }
        let moved = !heartbeat.heads.is_empty();
        for pb::TopicHead { topic, head, passed, floor } in heartbeat.heads {
            let (head, floor) = (convert::sequence(head), convert::sequence(floor));
            inner.resume.head(topic, head, passed, floor);
        }
        let gate = self.gate();
        let reopened = gate != inner.gate;
        inner.gate = gate;
        if reopened || moved {
            self.core.arrived(&mut inner, Settled::default());
        }
        Ok(())
    }

    fn drain(&mut self, drain: pb::Drain) {
        let now = Instant::now();
        if !self.reconnect.takes_advice(now) {
            return;
        }
        self.core.state.set(ConnectionState::Draining);
        self.drain = Some(Draining {
            deadline: after(now, advice(drain.deadline)),
            reason: drain.reason,
            after: advice(drain.reconnect_after),
        });
    }
}

/// How long a server asks us to wait, within reason.
fn advice(asked: Option<prost_types::Duration>) -> Duration {
    duration(asked).unwrap_or_default().min(limits::MAX_ADVICE)
}
