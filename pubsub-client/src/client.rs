//! The client: what all publishers and subscribers of one server have in common.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::Mutex as AsyncMutex;
use tokio_util::task::TaskTracker;
use tonic::transport::Channel;

use crate::admin::Admin;
use crate::env::{Env, SharedEnv, System};
use crate::error::{AdminError, ConnectError, Unresolved};
use crate::limits;
use crate::publisher::{self, PublisherBuilder};
use crate::retry::RetryPolicy;
use crate::state::{ConnectionState, StateBoard, StateCell, StateWatch};
use crate::subscriber::{self, Drain, StopReport, Stopper, SubscriberBuilder};
use crate::transport::Dialer;

/// What a server's log calls this client.
pub(crate) const VERSION: &str = concat!("pubsub-client/", env!("CARGO_PKG_VERSION"));

/// A client of one server. Cheap to clone.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use pubsub_client::{Client, TopicConfig};
///
/// let server = pubsub_server::Server::start(pubsub_server::Config::in_memory()).await?;
/// let client = Client::connect(server.url()).await?;
/// client.admin().create_topic("orders", TopicConfig::new()).await?;
///
/// let publisher = client.publisher("orders").open().await?;
/// let receipt = publisher.publish("an order").await?;
/// assert_eq!(receipt.id.sequence, 1);
///
/// let report = client.shutdown(std::time::Duration::from_secs(5)).await;
/// assert!(report.is_clean());
/// # Ok(())
/// # }
/// ```
///
/// Every publisher and every subscriber has a connection of its own, so that none can stall
/// another; administration shares one. All reconnect by themselves.
///
/// Dropping the client ends nothing; [`shutdown`](Self::shutdown) does.
#[derive(Clone, Debug)]
pub struct Client {
    shared: Arc<Shared>,
}

impl Client {
    /// Connects to the server at `url`, such as `http://localhost:7670`, with all defaults.
    ///
    /// # Errors
    ///
    /// Fails at once if the address is wrong, or no server or something else answers there. Once a
    /// client exists, it outlives any absence of the server; to start without the server, use
    /// [`ClientBuilder::connect_lazy`].
    pub async fn connect(url: impl Into<String>) -> Result<Self, ConnectError> {
        Self::builder(url).connect().await
    }

    /// A client with other settings.
    pub fn builder(url: impl Into<String>) -> ClientBuilder {
        ClientBuilder {
            url: url.into(),
            connect_timeout: limits::CONNECT_TIMEOUT,
            handshake_timeout: limits::HANDSHAKE_TIMEOUT,
            request_timeout: limits::REQUEST_TIMEOUT,
            heartbeat: limits::HEARTBEAT,
            retry: RetryPolicy::default(),
            env: Arc::new(System),
        }
    }

    /// Publishes to a topic. Each publisher is one ordered sequence of messages.
    pub fn publisher(&self, topic: impl Into<String>) -> PublisherBuilder {
        PublisherBuilder::new(Arc::clone(&self.shared), topic.into())
    }

    /// Consumes a subscription, creating it if need be.
    pub fn subscriber(&self, subscription: impl Into<String>) -> SubscriberBuilder {
        SubscriberBuilder::new(Arc::clone(&self.shared), subscription.into())
    }

    /// Reads topics without a subscription: the position is kept by this process only, across
    /// disconnects, and the server keeps nothing.
    pub fn reader(&self, topics: impl IntoIterator<Item = impl Into<String>>) -> SubscriberBuilder {
        SubscriberBuilder::new(Arc::clone(&self.shared), String::new()).topics(topics)
    }

    /// Administers topics and subscriptions.
    pub fn admin(&self) -> Admin {
        Admin::new(Arc::clone(&self.shared))
    }

    /// The state of the worst of its publishers and subscribers.
    pub fn state(&self) -> StateWatch {
        self.shared.board.watch()
    }

    /// The address of the server.
    pub fn url(&self) -> &str {
        self.shared.dialer.url()
    }

    #[cfg(feature = "outbox")]
    pub(crate) fn env(&self) -> &SharedEnv {
        &self.shared.env
    }

    #[cfg(feature = "outbox")]
    pub(crate) fn retry(&self) -> RetryPolicy {
        self.shared.retry
    }

    /// Ends all publishers and subscribers of this client and its clones, and waits for them, at
    /// most for `within`.
    ///
    /// Publishers take nothing more and flush; subscribers hand nothing out any more, wait for
    /// the deliveries that are held, and confirm their acks. The report says what was left.
    pub async fn shutdown(self, within: Duration) -> ShutdownReport {
        let (publishers, subscribers) = self.shared.sessions();
        let closing = publishers.iter().map(|core| async {
            let unresolved = core.close(within).await;
            (core.topic().to_owned(), unresolved)
        });
        let stopping = subscribers
            .into_iter()
            .map(|core| async move { Stopper::new(core).stop(Drain::Finish, within).await });
        let (closed, stopped) = tokio::join!(join_all(closing), join_all(stopping));
        let with_topic = |(topic, unresolved): (String, Vec<Unresolved>)| {
            unresolved.into_iter().map(move |left| (topic.clone(), left))
        };
        ShutdownReport {
            unpublished: closed.into_iter().flat_map(with_topic).collect(),
            unfinished: stopped.iter().map(|report: &StopReport| report.unfinished).sum(),
            unconfirmed: stopped.iter().map(|report| report.unconfirmed).sum(),
        }
    }
}

/// What was left when a client was shut down.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct ShutdownReport {
    /// Messages whose fate is not known, each with its topic.
    pub unpublished: Vec<(String, Unresolved)>,
    /// Deliveries that the application still held. They come again.
    pub unfinished: usize,
    /// Acks and nacks that were not confirmed.
    pub unconfirmed: u64,
}

impl ShutdownReport {
    /// Whether nothing was left.
    pub fn is_clean(&self) -> bool {
        self.unpublished.is_empty() && self.unfinished == 0 && self.unconfirmed == 0
    }
}

/// Makes a [`Client`].
#[derive(Clone, Debug)]
#[must_use = "nothing happens until it is connected"]
pub struct ClientBuilder {
    url: String,
    connect_timeout: Duration,
    handshake_timeout: Duration,
    request_timeout: Duration,
    heartbeat: Duration,
    retry: RetryPolicy,
    env: SharedEnv,
}

impl ClientBuilder {
    /// Sets how long making a connection may take: 5 s by default.
    pub fn connect_timeout(mut self, limit: Duration) -> Self {
        self.connect_timeout = limit;
        self
    }

    /// Sets how long the server may take to answer on a new connection: 5 s by default.
    pub fn handshake_timeout(mut self, limit: Duration) -> Self {
        self.handshake_timeout = limit;
        self
    }

    /// Sets how long the server may take to answer a request of [`Admin`]: 10 s by default.
    pub fn request_timeout(mut self, limit: Duration) -> Self {
        self.request_timeout = limit;
        self
    }

    /// Asks for a heartbeat interval, 1 s to 60 s: 10 s by default. After 2.5 intervals without
    /// a sign of life from the server a session reconnects.
    pub fn heartbeat(mut self, interval: Duration) -> Self {
        self.heartbeat = interval.clamp(limits::MIN_HEARTBEAT, limits::MAX_HEARTBEAT);
        self
    }

    /// Asks for a heartbeat interval of 1 s: a dead server is noticed after 2.5 s.
    pub fn fast(self) -> Self {
        self.heartbeat(limits::FAST_HEARTBEAT)
    }

    /// Sets how long to wait between attempts to reconnect: 100 ms to 5 s by default.
    pub fn retry(mut self, policy: RetryPolicy) -> Self {
        self.retry = policy;
        self
    }

    /// Replaces the source of randomness, for simulations.
    pub fn env(mut self, env: Arc<dyn Env>) -> Self {
        self.env = env;
        self
    }

    /// Connects, and checks that a pubsub server answers.
    ///
    /// # Errors
    ///
    /// Fails at once if the address is wrong, or no server or something else answers there.
    pub async fn connect(self) -> Result<Client, ConnectError> {
        let client = self.connect_lazy()?;
        client.admin().probe().await.map_err(|error| match error {
            AdminError::Refused(error) => ConnectError::Refused(error),
            AdminError::Unreachable { source, .. } => {
                ConnectError::Unreachable { url: client.url().to_owned(), source }
            }
            AdminError::Malformed(detail) => ConnectError::Unreachable {
                url: client.url().to_owned(),
                source: crate::error::TransportError::new(detail),
            },
        })?;
        Ok(client)
    }

    /// Makes a client without connecting: its publishers and subscribers keep trying until the
    /// server is there. They give up only if something that is no pubsub server, such as a proxy
    /// that wants credentials, has denied each attempt for a minute.
    ///
    /// # Errors
    ///
    /// The address is malformed.
    pub fn connect_lazy(self) -> Result<Client, ConnectError> {
        let dialer = Dialer::new(&self.url, self.connect_timeout, self.handshake_timeout)?;
        let shared = Arc::new(Shared {
            dialer,
            env: self.env,
            retry: self.retry,
            heartbeat: self.heartbeat,
            request_timeout: self.request_timeout,
            board: StateBoard::new(),
            sessions: Mutex::default(),
            next_session: AtomicU64::new(0),
            tasks: TaskTracker::new(),
            unary: AsyncMutex::new(None),
        });
        Ok(Client { shared })
    }
}

/// What a client's sessions share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) dialer: Dialer,
    pub(crate) env: SharedEnv,
    pub(crate) retry: RetryPolicy,
    pub(crate) heartbeat: Duration,
    pub(crate) request_timeout: Duration,
    pub(crate) board: Arc<StateBoard>,
    // Bounded by the live sessions: the dead are removed whenever one is added.
    sessions: Mutex<BTreeMap<u64, Session>>,
    next_session: AtomicU64,
    tasks: TaskTracker,
    /// The connection of unary calls; nothing until the first, and after trouble.
    pub(crate) unary: AsyncMutex<Option<Channel>>,
}

#[derive(Debug)]
enum Session {
    Publisher(Weak<publisher::Core>),
    Subscriber(Weak<subscriber::Core>),
}

impl Session {
    fn is_gone(&self) -> bool {
        match self {
            Self::Publisher(core) => core.strong_count() == 0,
            Self::Subscriber(core) => core.strong_count() == 0,
        }
    }
}

impl Shared {
    fn number(&self) -> u64 {
        self.next_session.fetch_add(1, Ordering::Relaxed)
    }

    /// The state of a new session, which the client's own state takes in.
    pub(crate) fn new_state(&self) -> StateCell {
        StateCell::new(self.number(), Arc::clone(&self.board))
    }

    pub(crate) fn set_reachable(&self) {
        self.board.set_idle(ConnectionState::Connected);
    }

    pub(crate) fn adopt_publisher(
        &self,
        core: &Arc<publisher::Core>,
        task: impl Future<Output = ()> + Send + 'static,
    ) {
        self.adopt(Session::Publisher(Arc::downgrade(core)), task);
    }

    pub(crate) fn adopt_subscriber(
        &self,
        core: &Arc<subscriber::Core>,
        task: impl Future<Output = ()> + Send + 'static,
    ) {
        self.adopt(Session::Subscriber(Arc::downgrade(core)), task);
    }

    fn adopt(&self, session: Session, task: impl Future<Output = ()> + Send + 'static) {
        let number = self.number();
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.retain(|_, session| !session.is_gone());
        sessions.insert(number, session);
        self.tasks.spawn(task);
    }

    fn sessions(&self) -> (Vec<Arc<publisher::Core>>, Vec<Arc<subscriber::Core>>) {
        let sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut publishers, mut subscribers) = (Vec::new(), Vec::new());
        for session in sessions.values() {
            match session {
                Session::Publisher(core) => publishers.extend(core.upgrade()),
                Session::Subscriber(core) => subscribers.extend(core.upgrade()),
            }
        }
        (publishers, subscribers)
    }
}
