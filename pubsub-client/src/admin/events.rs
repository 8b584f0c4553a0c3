//! What happens at the server, as it happens.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::stream::BoxStream;
use futures_util::{Stream, StreamExt as _};
use pubsub_proto::MAX_FRAME_BYTES;
use pubsub_proto::v1 as pb;
use pubsub_proto::v1::admin_service_client::AdminServiceClient;
use tokio::time::{Instant, sleep, timeout};

use super::lag::HeadOfLine;
use super::{Admin, event_convert};
use crate::client::Shared;
use crate::error::{AdminError, Cause, TransportError};
use crate::liveness;
use crate::message::{duration, wire_duration};
use crate::reconnect::{Hopeless, Reconnect};
use crate::state::{ConnectionState, StateCell, StateWatch};
use crate::subscriber::GapReason;
use crate::transport::{Link, Responses};

/// Streams that contradict themselves, in a row, before it counts as a bug.
const MAX_PROTOCOL_ERRORS: u32 = 10;

/// Which events are wanted: all of them, unless it is said.
///
/// What concerns the whole server, as a full disk, always comes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct EventFilter {
    /// Only what names this subscription.
    pub subscription: Option<String>,
    /// Only what names this topic, also as the dead-letter topic.
    pub topic: Option<String>,
}

impl EventFilter {
    /// All events.
    pub fn all() -> Self {
        Self::default()
    }

    /// Wants only what names this subscription.
    #[must_use]
    pub fn of_subscription(mut self, name: impl Into<String>) -> Self {
        self.subscription = Some(name.into());
        self
    }

    /// Wants only what names this topic; with a subscription, what names both.
    #[must_use]
    pub fn of_topic(mut self, name: impl Into<String>) -> Self {
        self.topic = Some(name.into());
        self
    }
}

/// An event, and when it happened.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct TimedEvent {
    /// When, by the server's clock; by the local one for [`ServerEvent::Missed`] and
    /// [`ServerEvent::Reconnected`].
    pub time: SystemTime,
    /// What.
    pub event: ServerEvent,
}

/// Something that has happened at the server.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum ServerEvent {
    /// A topic was created.
    TopicCreated {
        /// The topic.
        topic: String,
        /// Its incarnation.
        epoch: u64,
    },
    /// The settings of a topic were changed.
    TopicUpdated {
        /// The topic.
        topic: String,
        /// Its incarnation.
        epoch: u64,
    },
    /// A topic was deleted with its messages.
    TopicDeleted {
        /// The topic.
        topic: String,
        /// Its incarnation.
        epoch: u64,
    },
    /// Messages of a topic were removed by an operator.
    TopicPurged {
        /// The topic.
        topic: String,
        /// Its incarnation.
        epoch: u64,
        /// The first message that stays.
        before: u64,
        /// How many were removed.
        purged: u64,
    },
    /// A subscription was created.
    SubscriptionCreated {
        /// The subscription.
        subscription: String,
        /// Its incarnation.
        epoch: u64,
    },
    /// A subscription was deleted.
    SubscriptionDeleted {
        /// The subscription.
        subscription: String,
        /// Its incarnation.
        epoch: u64,
    },
    /// A subscription was deleted because nobody had used it for as long as it says.
    SubscriptionExpired {
        /// The subscription.
        subscription: String,
        /// Its incarnation.
        epoch: u64,
    },
    /// What has become of a consumer.
    Consumer {
        /// Its subscription.
        subscription: String,
        /// Its name.
        consumer: String,
        /// What.
        presence: Presence,
    },
    /// A subscription will never receive some messages.
    Gap {
        /// The subscription.
        subscription: String,
        /// The topic.
        topic: String,
        /// Its incarnation.
        epoch: u64,
        /// The first of them.
        first: u64,
        /// The last of them; between them there may be some that were received.
        last: u64,
        /// Why.
        reason: GapReason,
    },
    /// Messages that failed too often were moved to a dead-letter topic.
    DeadLettered {
        /// The subscription that could not process them.
        subscription: String,
        /// Where they come from.
        topic: String,
        /// The incarnation of that topic.
        epoch: u64,
        /// How many.
        count: u64,
        /// The first of them.
        first: u64,
        /// Where they are now.
        dead_letter_topic: String,
    },
    /// Messages that failed too often were let go.
    Skipped {
        /// The subscription that could not process them.
        subscription: String,
        /// The topic.
        topic: String,
        /// Its incarnation.
        epoch: u64,
        /// How many.
        count: u64,
        /// The first of them.
        first: u64,
    },
    /// Dead letters were sent back to where they came from.
    DeadLettersRedriven {
        /// The subscription that could not process them.
        subscription: String,
        /// The dead-letter topic.
        topic: String,
        /// How many.
        count: u64,
        /// How many are left.
        left: u64,
    },
    /// Dead letters were let go.
    DeadLettersPurged {
        /// The subscription that could not process them.
        subscription: String,
        /// The dead-letter topic.
        topic: String,
        /// How many.
        count: u64,
        /// How many are left.
        left: u64,
    },
    /// The first message of a subscription that is not acked has been the same one for 30 s. Told
    /// once of each message.
    Stalled {
        /// The subscription.
        subscription: String,
        /// The topic.
        topic: String,
        /// Its incarnation.
        epoch: u64,
        /// The message, and why it waits.
        head_of_line: HeadOfLine,
        /// For how long it was seen to be the first one.
        waiting: Duration,
    },
    /// The message of a stall that was told is acked or let go, or the position was moved.
    StallEnded {
        /// The subscription.
        subscription: String,
        /// The topic.
        topic: String,
        /// Its incarnation.
        epoch: u64,
        /// The message that was the first one.
        sequence: u64,
        /// For how long it was seen to be that.
        waited: Duration,
    },
    /// The disk is full, or nearly: publishes are refused.
    DiskFull,
    /// There is room on the disk again.
    DiskHasRoom,
    /// Events were dropped by the server, since the stream was not read fast enough.
    Missed {
        /// How many, whether or not they are among those that are wanted.
        count: u64,
    },
    /// The connection was lost and is there again. What happened meanwhile is not told.
    Reconnected {
        /// For how long there was none.
        away: Duration,
        /// Whether the server was started anew meanwhile.
        restarted: bool,
        /// Why the connection was lost.
        cause: Arc<Cause>,
    },
}

/// What has become of a consumer.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Presence {
    /// It is active, for the first time or again.
    Attached,
    /// It waits for another one to leave.
    Standby {
        /// The other one.
        active: String,
    },
    /// A new process of its name has taken over from the one before.
    Superseded,
    /// It has lost its connection, and its place is kept for 30 s.
    Disconnected,
    /// It has left as it said.
    Left,
    /// It was gone for its whole grace; what it had is shown to others.
    Lost,
}

/// What happens at the server, from [`Admin::events`] on, as a [`Stream`].
///
/// After a disconnect it connects again by itself, for as long as it is polled, and says so by
/// [`ServerEvent::Reconnected`]. It ends with an error if the server refuses it for good, or
/// something that is no pubsub server has answered for a minute.
///
/// Nothing goes on behind an application that does not poll: the server holds up to a thousand
/// events back, and then counts. [`ServerEvent::Missed`] tells how many.
pub struct EventStream {
    events: BoxStream<'static, Result<TimedEvent, AdminError>>,
    state: StateWatch,
}

impl std::fmt::Debug for EventStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EventStream").field("state", &self.state.get()).finish_non_exhaustive()
    }
}

impl EventStream {
    /// The next event. Cancel-safe. Nothing after an error.
    pub async fn next(&mut self) -> Option<Result<TimedEvent, AdminError>> {
        self.events.next().await
    }

    /// The state of its connection, as it was when the stream was polled last. That of the
    /// [client](crate::Client::state) takes it in.
    pub fn state(&self) -> StateWatch {
        self.state.clone()
    }
}

impl Stream for EventStream {
    type Item = Result<TimedEvent, AdminError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.events.poll_next_unpin(context)
    }
}

impl Admin {
    /// Follows what happens at the server: consumers that come and go, gaps, dead letters,
    /// subscriptions that stall, topics and subscriptions that are made and deleted, a full disk.
    ///
    /// Once this returns, what happens is yielded, or told to be missed. Nothing that was before is
    /// told: [`Admin::subscription`] says how things stand.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let server = pubsub_server::Server::start(pubsub_server::Config::in_memory()).await?;
    /// # let client = pubsub_client::Client::connect(server.url()).await?;
    /// use pubsub_client::{EventFilter, ServerEvent};
    ///
    /// let mut events = client.admin().events(EventFilter::all()).await?;
    /// client.admin().create_topic("orders", Default::default()).await?;
    /// while let Some(event) = events.next().await {
    ///     match event?.event {
    ///         ServerEvent::TopicCreated { topic, .. } => println!("{topic} is new"),
    ///         ServerEvent::Stalled { subscription, head_of_line, .. } => {
    ///             println!("{subscription} does not go on: {}", head_of_line.text);
    ///         }
    ///         ServerEvent::Missed { .. } | ServerEvent::Reconnected { .. } => {
    ///             println!("look at what there is");
    ///         }
    ///         _ => {}
    ///     }
    /// #   break;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// The server cannot be reached, a name is not valid, or too many watch already
    /// ([`Reason::LimitReached`](crate::Reason::LimitReached)).
    pub async fn events(&self, filter: EventFilter) -> Result<EventStream, AdminError> {
        let request = pb::WatchEventsRequest {
            subscription: filter.subscription.unwrap_or_default(),
            topic: filter.topic.unwrap_or_default(),
            heartbeat_interval: wire_duration(self.client.heartbeat),
        };
        let mut events = Events {
            client: Arc::clone(&self.client),
            request,
            state: self.client.new_state(),
            reconnect: Reconnect::new(
                self.client.retry,
                Arc::clone(&self.client.env),
                MAX_PROTOCOL_ERRORS,
            ),
            boot: Bytes::new(),
            stream: None,
            lost: None,
        };
        let state = events.state.watch();
        events.connect().await.map_err(first_failure)?;
        let events = futures_util::stream::unfold(Some(events), |events| async move {
            let mut events = events?;
            match events.next().await {
                Ok(event) => Some((Ok(event), Some(events))),
                Err(error) => Some((Err(error), None)),
            }
        });
        Ok(EventStream { events: events.boxed(), state })
    }
}

/// The failure of the call itself, which is not repeated.
fn first_failure(cause: Cause) -> AdminError {
    match cause {
        Cause::Server(error) => AdminError::Refused(error),
        Cause::Transport(source) => AdminError::Unreachable { source, sent: true },
        Cause::Silence(_)
        | Cause::HandshakeTimeout(_)
        | Cause::Foreign(_)
        | Cause::Drain(_)
        | Cause::Protocol(_)
        | Cause::Panicked
        | Cause::TaskGone => {
            let source = TransportError::new(cause.to_string());
            AdminError::Unreachable { source, sent: true }
        }
    }
}

/// The connection behind a stream of events.
struct Events {
    client: Arc<Shared>,
    request: pb::WatchEventsRequest,
    state: StateCell,
    reconnect: Reconnect,
    /// The boot of the server that the last stream came from.
    boot: Bytes,
    stream: Option<Incoming>,
    /// When the connection was lost, and why.
    lost: Option<(Instant, Arc<Cause>)>,
}

struct Incoming {
    responses: Responses<pb::WatchEventsResponse>,
    /// Nothing for so long means that the server is gone.
    patience: Duration,
}

impl Events {
    async fn next(&mut self) -> Result<TimedEvent, AdminError> {
        loop {
            let Some(incoming) = &mut self.stream else {
                if let Some(back) = self.reconnect().await? {
                    return Ok(back);
                }
                continue;
            };
            let patience = incoming.patience;
            let frame = timeout(patience, incoming.responses.next()).await;
            match frame.unwrap_or(Err(Cause::Silence(patience))) {
                Ok(frame) => {
                    self.reconnect.progress();
                    if let Some(event) = event_convert::event(frame, self.client.env.now()) {
                        return Ok(event);
                    }
                }
                Err(cause) => self.lose(cause).await?,
            }
        }
    }

    /// Connects again. Says so, unless it does not succeed.
    async fn reconnect(&mut self) -> Result<Option<TimedEvent>, AdminError> {
        let before = self.boot.clone();
        if let Err(cause) = self.connect().await {
            self.lose(cause).await?;
            return Ok(None);
        }
        let lost = self.lost.take();
        #[cfg(pubsub_break = "events_resume_in_silence")]
        let lost = lost.filter(|_| false);
        Ok(lost.map(|(since, cause)| TimedEvent {
            time: self.client.env.now(),
            event: ServerEvent::Reconnected {
                away: since.elapsed(),
                restarted: self.boot != before,
                cause,
            },
        }))
    }

    async fn connect(&mut self) -> Result<(), Cause> {
        let request = self.request.clone();
        let dialer = &self.client.dialer;
        let opening = dialer.open(request, |channel, mut requests| async move {
            // The one that was queued just now.
            let request = requests.next().await.unwrap_or_default();
            let client =
                AdminServiceClient::new(channel).max_decoding_message_size(MAX_FRAME_BYTES);
            client.max_encoding_message_size(MAX_FRAME_BYTES).watch_events(request).await
        });
        let (Link { responses, .. }, first) = opening.await?;
        let Some(pb::watch_events_response::Frame::Started(started)) = first.frame else {
            return Err(Cause::Protocol("a stream of events began with another frame".to_owned()));
        };
        let interval = duration(started.heartbeat_interval).unwrap_or(self.client.heartbeat);
        self.boot = started.boot_id;
        self.stream = Some(Incoming { responses, patience: liveness::patience(interval) });
        self.reconnect.connected();
        self.state.set(ConnectionState::Connected);
        Ok(())
    }

    /// The connection is lost, or could not be made. Waits until it is to be tried again.
    async fn lose(&mut self, cause: Cause) -> Result<(), AdminError> {
        self.stream = None;
        if let Cause::Server(error) = &cause
            && !error.is_retryable()
        {
            let error = AdminError::Refused(error.clone());
            self.state.set(ConnectionState::Closed { cause: Some(Arc::new(cause)) });
            return Err(error);
        }
        self.lost.get_or_insert_with(|| (Instant::now(), Arc::new(cause.clone())));
        match self.reconnect.lost(cause.clone(), &self.state) {
            Ok(delay) => {
                sleep(delay).await;
                Ok(())
            }
            Err(hopeless) => {
                self.state.set(ConnectionState::Closed { cause: Some(Arc::new(cause)) });
                Err(match hopeless {
                    Hopeless::Protocol(detail) => AdminError::Malformed(detail),
                    Hopeless::Foreign(answer) => AdminError::Unreachable {
                        source: TransportError::new(answer.to_string()),
                        sent: false,
                    },
                })
            }
        }
    }
}
