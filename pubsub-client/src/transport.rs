//! Connections: how they are made, and a stream as a pair of ends. The only module that knows
//! how a [`Channel`] is configured.

use std::future::Future;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status, Streaming};

use crate::error::{Cause, ConnectError, TransportError, Verdict};

/// Frames that wait to be written. What matters is kept elsewhere until it is answered; this is
/// only transport, and short, so that frames are cut late and large.
const REQUEST_QUEUE: usize = 4;
/// Bytes that one stream may have on the way to us. The credit of a subscriber and the window of
/// a publisher are what really bounds memory.
const STREAM_WINDOW: u32 = 1024 * 1024;
/// The largest there is: a stalled stream must not stall the connection.
const CONNECTION_WINDOW: u32 = (1 << 31) - 1;
/// The largest HTTP/2 frame that we take: more than a server puts into one of its own, since each is
/// handled by itself.
const FRAME_BYTES: u32 = 1024 * 1024;
/// HTTP/2 pings: they find a dead network; a server that is stuck is found by our own heartbeat.
const PING_INTERVAL: Duration = Duration::from_secs(20);
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// Makes connections to one address.
#[derive(Clone, Debug)]
pub(crate) struct Dialer {
    url: String,
    endpoint: Endpoint,
    connect_timeout: Duration,
    handshake_timeout: Duration,
}

impl Dialer {
    pub(crate) fn new(
        url: &str,
        connect_timeout: Duration,
        handshake_timeout: Duration,
    ) -> Result<Self, ConnectError> {
        let full = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
        let invalid = |detail: String| ConnectError::InvalidUrl { url: url.to_owned(), detail };
        let endpoint = Endpoint::from_shared(full.clone())
            .map_err(|error| invalid(TransportError::chain(&error).to_string()))?;
        match (endpoint.uri().scheme_str(), endpoint.uri().host()) {
            (Some("http"), Some(host)) if !host.is_empty() => {}
            (Some("http"), _) => return Err(invalid("the host is missing".to_owned())),
            _ => return Err(invalid("expected http://host:port".to_owned())),
        }
        let endpoint = endpoint
            .connect_timeout(connect_timeout)
            .tcp_nodelay(true)
            .max_frame_size(FRAME_BYTES)
            .http2_keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_TIMEOUT)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW);
        Ok(Self { url: full, endpoint, connect_timeout, handshake_timeout })
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    pub(crate) fn handshake_timeout(&self) -> Duration {
        self.handshake_timeout
    }

    /// A new connection.
    pub(crate) async fn dial(&self) -> Result<Channel, TransportError> {
        match timeout(self.connect_timeout, self.endpoint.connect()).await {
            Ok(Ok(channel)) => Ok(channel),
            Ok(Err(error)) => Err(TransportError::chain(&error)),
            Err(_) => {
                let limit = self.connect_timeout;
                Err(TransportError::new(format!("no connection within {limit:?}")))
            }
        }
    }

    /// A stream on a connection of its own, and the first frame of the server.
    ///
    /// The hello is queued before the call is awaited, since a server may read it before it
    /// answers; and the answer has a timer of its own, since connecting succeeds against a
    /// server that is frozen.
    pub(crate) async fn open<Q, R, F>(
        &self,
        hello: Q,
        call: impl FnOnce(Channel, ReceiverStream<Q>) -> F,
    ) -> Result<(Link<Q, R>, R), Cause>
    where
        F: Future<Output = Result<Response<Streaming<R>>, Status>>,
    {
        let channel = self.dial().await.map_err(Cause::Transport)?;
        let (requests, queue) = mpsc::channel(REQUEST_QUEUE);
        let full = |_| Cause::Transport(TransportError::new("a new stream takes no hello"));
        requests.try_send(hello).map_err(full)?;
        let handshake = async {
            let responses = call(channel, ReceiverStream::new(queue)).await;
            let mut responses = Responses(responses.map_err(|s| Verdict::of(&s))?.into_inner());
            let first = responses.next().await?;
            Ok((Link { requests, responses }, first))
        };
        let limit = self.handshake_timeout;
        timeout(limit, handshake).await.map_err(|_| Cause::HandshakeTimeout(limit))?
    }
}

/// An open stream.
#[derive(Debug)]
pub(crate) struct Link<Q, R> {
    pub(crate) requests: mpsc::Sender<Q>,
    pub(crate) responses: Responses<R>,
}

/// The server's frames.
#[derive(Debug)]
pub(crate) struct Responses<R>(Streaming<R>);

impl<R> Responses<R> {
    /// The next frame. Cancel-safe. After an error the stream is of no use any more.
    pub(crate) async fn next(&mut self) -> Result<R, Cause> {
        match self.0.message().await {
            Ok(Some(frame)) => Ok(frame),
            // A stream that ends without a word is a lost connection: a server says why.
            Ok(None) => Err(Cause::Transport(TransportError::new("the server ended the stream"))),
            Err(status) => Err(Verdict::of(&status).into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_checked_early() {
        let dialer = |url| Dialer::new(url, Duration::from_secs(1), Duration::from_secs(1));
        assert_eq!(dialer("localhost:7070").unwrap().url(), "http://localhost:7070");
        assert_eq!(dialer("http://[::1]:1").unwrap().url(), "http://[::1]:1");
        for bad in ["", "http://", "https://localhost:1", "ftp://x", "http://a b"] {
            assert!(dialer(bad).is_err(), "{bad:?}");
        }
    }
}
