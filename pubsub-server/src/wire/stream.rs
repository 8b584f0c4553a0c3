//! What publisher streams and subscribe streams have in common: how they begin, live and end.

use std::time::Duration;

use pubsub_proto::v1::Drain;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::status::{invalid, protocol, status};
use super::{Context, convert};
use crate::broker::BrokerError;
use crate::limits;

/// Frames that may wait for their connection; the messages in them are bounded elsewhere.
const FRAME_QUEUE: usize = 8;

/// How long a peer may leave frames unread before its stream is given up.
const WRITE_STALL: Duration = Duration::from_secs(30);

/// The first frame has to come within this time.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

/// The server's end of a stream of frames. Its answers are bounded: a peer that does not read is
/// given up.
#[derive(Debug)]
pub(super) struct Frames<T>(mpsc::Sender<Result<T, Status>>);

/// The frames on their way to the peer.
pub(super) type Outbound<T> = ReceiverStream<Result<T, Status>>;

impl<T> Frames<T> {
    pub(super) fn new() -> (Self, Outbound<T>) {
        let (sender, receiver) = mpsc::channel(FRAME_QUEUE);
        (Self(sender), ReceiverStream::new(receiver))
    }

    /// Sends a frame; an error means that the peer is gone.
    pub(super) async fn send(&self, frame: T) -> Result<(), End> {
        self.0.send_timeout(Ok(frame), WRITE_STALL).await.map_err(|_| End::Gone)
    }

    /// Sends a frame as soon as there is room, however long that takes. Cancel-safe.
    pub(super) async fn put(&self, frame: T) -> Result<(), End> {
        self.0.send(Ok(frame)).await.map_err(|_| End::Gone)
    }

    /// Resolves when the peer is gone.
    pub(super) async fn closed(&self) {
        self.0.closed().await;
    }

    /// Ends the stream, and says why if the peer reads.
    pub(super) fn end_now(self, end: End) {
        if let End::Refused(status) = end {
            let _ = self.0.try_send(Err(*status));
        }
    }

    /// Ends the stream, and says why.
    pub(super) async fn end(self, end: End) {
        if let End::Refused(status) = end {
            // If it fails the peer is gone.
            let _ = self.0.send_timeout(Err(*status), WRITE_STALL).await;
        }
    }
}

/// How a stream ends.
#[derive(Debug)]
pub(super) enum End {
    /// The peer has closed it, or is gone.
    Gone,
    /// The server ends it.
    Refused(Box<Status>),
}

impl From<Status> for End {
    fn from(status: Status) -> Self {
        Self::Refused(Box::new(status))
    }
}

impl From<BrokerError> for End {
    fn from(error: BrokerError) -> Self {
        status(&error).into()
    }
}

/// The first frame. New streams are refused when the server is about to stop.
pub(super) async fn first_frame<T>(
    context: &Context,
    inbound: &mut Streaming<T>,
) -> Result<T, End> {
    let first = timeout(HELLO_TIMEOUT, inbound.message()).await;
    let first = match first.map_err(|_| protocol("no hello came"))? {
        Ok(Some(first)) => first,
        Ok(None) => return Err(End::Gone),
        Err(error) => return Err(unreadable(&error)),
    };
    if *context.draining.borrow() {
        return Err(BrokerError::Unavailable("the server is stopping").into());
    }
    Ok(first)
}

/// The end of a stream whose next frame cannot be read. If the cause is that the peer is gone
/// nobody hears of it.
pub(super) fn unreadable(error: &Status) -> End {
    invalid(format!("a frame cannot be read: {}", error.message())).into()
}

/// The interval of heartbeats: what the client asks for, within limits.
pub(super) fn heartbeat_interval(asked: Option<prost_types::Duration>) -> Result<Duration, Status> {
    let asked = convert::parse_duration("heartbeat_interval", asked)?;
    Ok(asked.unwrap_or(limits::HEARTBEAT).clamp(limits::MIN_HEARTBEAT, limits::MAX_HEARTBEAT))
}

/// How long a peer may be silent.
pub(super) fn dead_after(heartbeat: Duration) -> Duration {
    heartbeat.mul_f64(limits::DEAD_AFTER_HEARTBEATS)
}

/// The announcement of a restart.
pub(super) fn drain() -> Drain {
    Drain {
        deadline: convert::duration(limits::DRAIN_DEADLINE),
        reconnect_after: convert::duration(Duration::from_millis(500)),
        reason: "the server is restarting".to_owned(),
    }
}
