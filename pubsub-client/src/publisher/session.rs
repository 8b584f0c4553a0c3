//! The task of a publisher: connects, replays, sends; and connects again.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::FutureExt as _;
use pubsub_proto::BatchWriter;
use pubsub_proto::v1 as pb;
use pubsub_proto::v1::publish_run::Outcome as RunOutcome;
use pubsub_proto::v1::publish_stream_request::Frame as Request;
use pubsub_proto::v1::publish_stream_response::Frame;
use pubsub_proto::v1::publisher_service_client::PublisherServiceClient;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};

use super::OnRecreated;
use super::core::Core;
use super::entry::Entry;
use super::fates::{Fate, Stored};
use super::window::{Cut, Then, Verdict, Welcome};
use crate::error::{Cause, Outcome, PublishErrorKind, Reason, ServerError};
use crate::limits;
use crate::liveness::{Liveness, after};
use crate::message::{duration, time, wire_duration};
use crate::reconnect::{Hopeless, Reconnect};
use crate::state::ConnectionState;
use crate::transport::Link;

/// Contradictions in a row, without a result between, before the publisher gives up: one can be
/// the end of a stream that was cut; two are a bug.
const MAX_PROTOCOL_ERRORS: u32 = 2;
/// How long a server may have messages without answering any, however well it answers pings: its
/// disk hangs. A new connection shows that, since its welcome needs a commit.
const PATIENCE: Duration = Duration::from_secs(30);

/// How one connection ended.
#[derive(Debug)]
enum End {
    /// To be opened again at once, as a publisher that starts over.
    Again,
    /// As the server wished, before a restart.
    Advised { reason: String, after: Duration },
    /// By failure.
    Lost(Cause),
    /// For good.
    Failed(PublishErrorKind),
}

impl From<Cause> for End {
    fn from(cause: Cause) -> Self {
        Self::Lost(cause)
    }
}

fn broken(detail: impl Into<String>) -> End {
    End::Lost(Cause::Protocol(detail.into()))
}

/// Runs until the publisher is closed or has failed.
pub(super) fn run(core: Arc<Core>) -> impl Future<Output = ()> {
    // Not within the future: a runtime that ends can drop that before it has run at all.
    let task = Task(core);
    async move {
        let core = &task.0;
        let failure = tokio::select! {
            failure = keep_connected(core) => failure,
            () = core.keep_time() => return core.end(PublishErrorKind::Closed, None),
        };
        tracing::error!(topic = core.topic(), %failure, "the publisher has failed");
        let cause = cause(&failure);
        core.end(failure, Some(cause));
    }
}

/// The handles can outlive the task. Nobody would tell them anything any more.
struct Task(Arc<Core>);

impl Drop for Task {
    fn drop(&mut self) {
        // Changes nothing where the task has come to its end.
        self.0.end(PublishErrorKind::TaskGone, Some(Cause::TaskGone));
    }
}

#[expect(clippy::wildcard_enum_match_arm, reason = "the others are told by their text")]
fn cause(failure: &PublishErrorKind) -> Cause {
    match failure {
        PublishErrorKind::Session(error) => Cause::Server(error.clone()),
        PublishErrorKind::Foreign(answer) => Cause::Foreign(answer.clone()),
        PublishErrorKind::Protocol(detail) => Cause::Protocol(detail.clone()),
        other => Cause::Protocol(other.to_string()),
    }
}

impl From<Hopeless> for PublishErrorKind {
    fn from(hopeless: Hopeless) -> Self {
        match hopeless {
            Hopeless::Protocol(detail) => Self::Protocol(detail),
            Hopeless::Foreign(answer) => Self::Foreign(answer),
        }
    }
}

async fn keep_connected(core: &Core) -> PublishErrorKind {
    let policy = core.client.retry;
    let env = Arc::clone(&core.client.env);
    let mut reconnect = Reconnect::new(policy, env, MAX_PROTOCOL_ERRORS);
    loop {
        // A panic is a bug, and still no reason to lose messages: the window is kept, and the
        // next connection replays it.
        let connected = AssertUnwindSafe(connect(core, &mut reconnect)).catch_unwind().await;
        let end = connected.unwrap_or(End::Lost(Cause::Panicked));
        let delay = match judge(core, end) {
            End::Again => Duration::ZERO,
            End::Advised { reason, after } => reconnect.advised(&reason, after, &core.state),
            End::Failed(kind) => return kind,
            End::Lost(cause) => match reconnect.lost(cause, &core.state) {
                Ok(delay) => delay,
                Err(hopeless) => return hopeless.into(),
            },
        };
        sleep(delay).await;
    }
}

/// What the server's reason for ending a stream means.
#[expect(clippy::wildcard_enum_match_arm, reason = "everything unlisted is tried again")]
fn judge(core: &Core, end: End) -> End {
    let End::Lost(Cause::Server(error)) = end else { return end };
    match error.reason() {
        // The topic that it is to go on with may be created yet.
        Reason::TopicNotFound
            if core.settings.on_recreated == OnRecreated::Continue && core.is_welcomed() =>
        {
            End::Lost(Cause::Server(error))
        }
        // Whoever opens a publisher must learn that there are too many; one that has its place
        // gets it again.
        Reason::LimitReached if !core.is_welcomed() => {
            End::Failed(PublishErrorKind::Session(error))
        }
        Reason::InvalidArgument | Reason::UnsupportedProtocol | Reason::TopicNotFound => {
            End::Failed(PublishErrorKind::Session(error))
        }
        Reason::Fenced => End::Failed(PublishErrorKind::Fenced),
        Reason::TopicRecreated => {
            let verdict = core.lock().window.recreated();
            started_over(core, verdict, error)
        }
        Reason::Diverged => {
            let verdict = core.lock().window.diverged();
            started_over(core, verdict, error)
        }
        Reason::ResultExpired => {
            let verdict = core.lock().window.forgotten();
            started_over(core, verdict, error)
        }
        Reason::OutOfOrder | Reason::ProtocolViolation => broken(error.to_string()),
        _ => End::Lost(Cause::Server(error)),
    }
}

fn started_over(core: &Core, verdict: Verdict<Entry>, error: ServerError) -> End {
    match core.settle(verdict) {
        Then::Fail(kind) => End::Failed(kind),
        // Not at once: a server that says so each time must not be asked in a hot loop.
        Then::Go | Then::Again => End::Lost(Cause::Server(error)),
    }
}

/// One connection, from the hello to its end.
async fn connect(core: &Core, reconnect: &mut Reconnect) -> End {
    let hello_at = Instant::now();
    let call = |channel, requests| async move {
        PublisherServiceClient::new(channel)
            .max_decoding_message_size(pubsub_proto::MAX_FRAME_BYTES)
            .max_encoding_message_size(pubsub_proto::MAX_FRAME_BYTES)
            .publish_stream(requests)
            .await
    };
    let (link, first) = match core.client.dialer.open(hello(core), call).await {
        Ok(opened) => opened,
        Err(cause) => return End::Lost(cause),
    };
    let Some(Frame::Welcome(welcome)) = first.frame else {
        return broken("the first frame is no welcome");
    };
    reconnect.connected();
    match welcomed(core, welcome, hello_at) {
        Ok((live, cut, patience)) => {
            core.state.set(ConnectionState::Connected);
            core.set_welcomed();
            Session::new(core, reconnect, live, cut, patience).run(link).await
        }
        Err(end) => end,
    }
}

fn request(frame: Request) -> pb::PublishStreamRequest {
    pb::PublishStreamRequest { frame: Some(frame) }
}

fn hello(core: &Core) -> pb::PublishStreamRequest {
    let hello = core.lock().hello();
    request(Request::Hello(pb::PublisherHello {
        protocol: pubsub_proto::PROTOCOL_VERSION,
        topic: core.topic().to_owned(),
        producer_id: core.producer.to_vec().into(),
        producer_epoch: hello.epoch,
        resolved_below: hello.resolved_below,
        next_sequence: hello.next,
        client: crate::client::VERSION.to_owned(),
        heartbeat_interval: wire_duration(core.settings.heartbeat),
        boot_id: hello.boot,
        topic_epoch: hello.topic_epoch,
        attach: hello.attach,
    }))
}

/// Decides how to go on with a server that has this memory of the publisher.
fn welcomed(
    core: &Core,
    welcome: pb::PublisherWelcome,
    hello_at: Instant,
) -> Result<(Liveness, Cut, Duration), End> {
    let now = Instant::now();
    let interval = duration(welcome.heartbeat_interval).filter(|interval| !interval.is_zero());
    let interval = interval.unwrap_or(core.settings.heartbeat);
    let live = Liveness::new(interval, hello_at, now);
    if welcome.max_message_bytes > 0 {
        core.set_max_message(welcome.max_message_bytes);
    }
    #[cfg(feature = "outbox")]
    core.set_idempotency_window(duration(welcome.idempotency_window).unwrap_or_default());
    let settings = &core.settings;
    // A limit of 0 would be one that nothing fits into: then there is none.
    let limit = |theirs: usize| if theirs == 0 { usize::MAX } else { theirs };
    let bytes = usize::try_from(welcome.max_in_flight_bytes).unwrap_or(usize::MAX);
    let cut = Cut {
        in_flight: limit(welcome.max_in_flight_messages as usize),
        in_flight_bytes: limit(bytes),
        messages: settings.batch_messages,
        bytes: settings.batch_bytes.min(limits::BATCH_BYTES),
        linger: settings.linger,
        allow_new: true,
    };
    let horizon = duration(welcome.session_horizon).unwrap_or(Duration::MAX);
    let welcome = Welcome {
        boot: welcome.boot_id,
        topic_epoch: welcome.topic_epoch,
        last: welcome.last_sequence,
        horizon,
    };
    let verdict = core.lock().window.welcome(welcome, now);
    match core.settle(verdict) {
        Then::Go => Ok((live, cut, PATIENCE.max(interval.mul_f64(2.5)))),
        Then::Again => Err(End::Again),
        Then::Fail(kind) => Err(End::Failed(kind)),
    }
}

/// One connection after its welcome.
#[derive(Debug)]
struct Session<'a> {
    core: &'a Core,
    reconnect: &'a mut Reconnect,
    live: Liveness,
    cut: Cut,
    patience: Duration,
    /// Since when messages are on the stream, or the last of their results.
    unanswered: Option<Instant>,
    blocked: bool,
    drain: Option<Draining>,
    /// Bytes of the last batch: the next one may be as large.
    batch_bytes: usize,
}

#[derive(Debug)]
struct Draining {
    deadline: Instant,
    reason: String,
    after: Duration,
}

impl<'a> Session<'a> {
    fn new(
        core: &'a Core,
        reconnect: &'a mut Reconnect,
        live: Liveness,
        cut: Cut,
        patience: Duration,
    ) -> Self {
        let (unanswered, blocked, drain, batch_bytes) = (None, false, None, 0);
        Self { core, reconnect, live, cut, patience, unanswered, blocked, drain, batch_bytes }
    }

    async fn run(mut self, link: Link<pb::PublishStreamRequest, pb::PublishStreamResponse>) -> End {
        let Link { requests, mut responses } = link;
        loop {
            let (send, wake) = match self.due(Instant::now()) {
                Ok(due) => due,
                Err(end) => return end,
            };
            let step = tokio::select! {
                response = responses.next() => match response {
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
        if let Some(since) = self.unanswered.filter(|_| !self.blocked) {
            let end = after(since, self.patience);
            if now >= end {
                return Err(End::Lost(Cause::Silence(self.patience)));
            }
            wake = wake.min(end);
        }
        let mut queue = self.core.lock();
        if let Some(drain) = &self.drain {
            if !queue.window.is_waiting() || now >= drain.deadline {
                let (reason, after) = (drain.reason.clone(), drain.after);
                return Err(End::Advised { reason, after });
            }
            wake = wake.min(drain.deadline);
        }
        if queue.is_closing() {
            self.cut.linger = Duration::ZERO;
        }
        if let Some(until) = queue.window.lingers_until(&self.cut, now) {
            wake = wake.min(until);
        }
        let batch = !self.blocked && queue.window.has_work(&self.cut, now);
        let send = batch || self.live.ping_is_due(now);
        queue.set_idle(!send);
        Ok((send, wake))
    }

    fn send(&mut self, permit: mpsc::Permit<'_, pb::PublishStreamRequest>) {
        let now = Instant::now();
        if self.live.ping_is_due(now) {
            let nonce = self.live.ping(now);
            permit.send(request(Request::Ping(pb::Ping { nonce })));
            return;
        }
        let mut queue = self.core.lock();
        let mut batch = BatchWriter::new(queue.window.next_to_send(), self.batch_bytes);
        let mut atomic = None;
        let write = |entry: &Entry, bytes| {
            atomic = atomic.take().or_else(|| entry.atomic().cloned());
            entry.body().write(batch.message(bytes));
        };
        let sends = queue.window.next_batch(&self.cut, now, write);
        let resolved_below = queue.window.first();
        drop(queue);
        if sends {
            self.unanswered.get_or_insert(now);
            let batch = batch.finish(resolved_below, atomic.as_ref());
            self.batch_bytes = batch.len();
            permit.send(request(Request::Batch(batch)));
        }
    }

    fn frame(&mut self, response: pb::PublishStreamResponse) -> Result<(), End> {
        let now = Instant::now();
        self.live.frame(now);
        match response.frame {
            Some(Frame::Results(results)) => self.results(results, now),
            Some(Frame::Heartbeat(heartbeat)) => {
                self.live.answer(heartbeat.echoed_nonce);
                Ok(())
            }
            Some(Frame::Drain(drain)) => {
                self.drain(drain, now);
                Ok(())
            }
            Some(Frame::Blocked(blocked)) => {
                self.blocked(blocked, now);
                Ok(())
            }
            Some(Frame::Welcome(_)) => Err(broken("a second welcome came")),
            None => Err(broken("a frame of an unknown kind came")),
        }
    }

    fn results(&mut self, results: pb::PublishResults, now: Instant) -> Result<(), End> {
        for run in results.runs {
            let outcome = run.outcome.ok_or_else(|| broken("a result without an outcome came"))?;
            let fate = fate(&outcome);
            self.core.answered(run.first_sequence, run.count, fate).map_err(broken)?;
        }
        self.unanswered = self.core.lock().window.is_waiting().then_some(now);
        self.reconnect.progress();
        self.core.notify();
        Ok(())
    }

    fn blocked(&mut self, blocked: pb::PublisherBlocked, now: Instant) {
        let reason = pb::ErrorReason::try_from(blocked.reason).unwrap_or_default();
        self.blocked = reason != pb::ErrorReason::Unspecified;
        // A server that is blocked reads nothing from us, pings neither; it is still heard.
        self.live.expect_answers(!self.blocked, now);
        self.unanswered = self.unanswered.map(|_| now);
        self.core.state.set(if self.blocked {
            let reason = Reason::from_wire(blocked.reason);
            tracing::warn!(topic = self.core.topic(), %reason, detail = blocked.detail, "blocked");
            ConnectionState::Blocked { reason, detail: blocked.detail }
        } else {
            ConnectionState::Connected
        });
    }

    fn drain(&mut self, drain: pb::Drain, now: Instant) {
        if !self.reconnect.takes_advice(now) {
            return;
        }
        self.core.state.set(ConnectionState::Draining);
        self.cut.allow_new = false;
        self.drain = Some(Draining {
            deadline: after(now, duration(drain.deadline).unwrap_or_default()),
            reason: drain.reason,
            after: duration(drain.reconnect_after).unwrap_or_default(),
        });
    }
}

/// The fate of each message of a run.
fn fate(outcome: &RunOutcome) -> impl Fn(u64, &Entry) -> Fate {
    let publish_time = match outcome {
        RunOutcome::Stored(stored) => time(stored.publish_time),
        RunOutcome::Refused(_) => SystemTime::UNIX_EPOCH,
    };
    move |offset, entry| match outcome {
        RunOutcome::Stored(stored) => Fate::Stored(Stored {
            epoch: stored.epoch,
            sequence: stored.sequence.saturating_add(offset),
            duplicate: stored.duplicate,
            publish_time,
        }),
        RunOutcome::Refused(refused) => {
            let reason = Reason::from_wire(refused.reason);
            let expired = reason == Reason::ResultExpired;
            let outcome = if expired { Outcome::Unknown } else { Outcome::NotPersisted };
            let metadata = refused.metadata.clone();
            let error = ServerError::new(reason, refused.detail.clone()).with_metadata(metadata);
            Fate::Failed(entry.error(PublishErrorKind::Refused(error), outcome))
        }
    }
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
