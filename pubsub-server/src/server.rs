//! A running server: it owns the accept loop and the order of shutdown.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hyper::server::conn::http2;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::task::TaskTracker;
use tonic::service::Routes;

use crate::broker::Broker;
use crate::config::{Config, StorageConfig};
use crate::limits;
use crate::metrics;
use crate::steps::Task;
use crate::storage::memory::Memory;
use crate::storage::redb::{Options, Redb};
use crate::storage::{Health, Storage, StorageError};
use crate::wire::{self, Context, splice};

/// A running server.
///
/// Dropping it cuts all connections and ends it without goodbye, as a crash would;
/// [`Server::stop`] ends it in order.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    broker: Broker,
    storage: Arc<dyn Storage>,
    draining: watch::Sender<bool>,
    stopping: watch::Sender<bool>,
    streams: TaskTracker,
    reporter: tonic_health::server::HealthReporter,
    /// The accept loop, which owns the connections.
    accepting: JoinSet<()>,
}

/// Why a server does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The data directory cannot be used.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The address cannot be used.
    #[error("cannot listen on {address}: {error}; is another server running there?")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the operating system says.
        error: io::Error,
    },
    /// The descriptors for reflection are not valid.
    #[error("reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

impl Server {
    /// Opens the storage and starts to serve.
    ///
    /// # Errors
    ///
    /// If the data directory or the address cannot be used.
    pub async fn start(config: Config) -> Result<Self, StartError> {
        let started = config.env.now();
        let storage = open(&config).await?;
        let (listener, address) = listen(config.listen).await?;
        let metrics = match config.metrics {
            Some(address) => Some(listen(address).await?),
            None => None,
        };
        let broker = Broker::start(Arc::clone(&storage), Arc::clone(&config.env)).await?;
        let (draining, drain_signal) = watch::channel(false);
        let (stopping, stop_signal) = watch::channel(false);
        let streams = TaskTracker::new();
        let connections = Arc::new(AtomicU64::new(0));
        let context = Context {
            broker: broker.clone(),
            streams: streams.clone(),
            draining: drain_signal,
            stopping: stop_signal.clone(),
            connections: Arc::clone(&connections),
            started,
        };
        let (routes, reporter) = wire::routes(context).await?;
        let mut accepting = JoinSet::new();
        if let Some((listener, address)) = metrics {
            tracing::info!(%address, "metrics are at http://{address}/metrics");
            accepting.spawn(metrics::serve(listener, broker.clone(), stop_signal.clone()));
        }
        accepting.spawn(accept(listener, routes, connections, stop_signal));
        Ok(Self { address, broker, storage, draining, stopping, streams, reporter, accepting })
    }

    /// The address it listens on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The URL that clients connect to.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Resolves when the storage has failed: nothing can be committed any more, and the process
    /// has to end.
    pub async fn failed(&self) -> String {
        let mut health = self.broker.health();
        loop {
            if let Health::Failed(cause) = &*health.borrow_and_update() {
                return cause.clone();
            }
            if health.changed().await.is_err() {
                return "the storage is gone".to_owned();
            }
        }
    }

    /// Stops in order: tells the clients to go elsewhere or come back, finishes what is in
    /// flight, and commits what is left. Takes a few seconds at most.
    ///
    /// # Errors
    ///
    /// If the storage cannot be closed cleanly.
    pub async fn stop(mut self) -> Result<(), StorageError> {
        wire::set_not_serving(&self.reporter).await;
        self.draining.send_replace(true);
        self.streams.close();
        // Whoever is still there after the deadline is told to reconnect.
        let _ = timeout(limits::DRAIN_DEADLINE, self.streams.wait()).await;
        self.stopping.send_replace(true);
        let _ = timeout(LAST_WORDS, self.streams.wait()).await;
        let all = async { while self.accepting.join_next().await.is_some() {} };
        let _ = timeout(LAST_WORDS, all).await;
        self.accepting.shutdown().await;
        let _ = timeout(LAST_WORDS, self.broker.close()).await;
        self.storage.close().await
    }
}

/// How long streams and connections may take to say their last words.
const LAST_WORDS: Duration = Duration::from_millis(500);

async fn listen(address: SocketAddr) -> Result<(TcpListener, SocketAddr), StartError> {
    let bound = async {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        Ok((listener, address))
    };
    bound.await.map_err(|error| StartError::Listen { address, error })
}

async fn open(config: &Config) -> Result<Arc<dyn Storage>, StorageError> {
    let env = Arc::clone(&config.env);
    match config.storage.clone() {
        StorageConfig::Memory => Ok(Arc::new(Memory::new(env))),
        StorageConfig::Redb(path) => {
            // Opening checks the files, which takes its time and blocks.
            let opened = tokio::task::spawn_blocking(move || Redb::open(Options::new(path, env)));
            let redb = opened.await.map_err(|_| StorageError::Closed)??;
            Ok(Arc::new(redb))
        }
    }
}

/// Accepts connections until the server stops. Holds at most [`limits::MAX_CONNECTIONS`]; the
/// next one waits in the system's queue until one leaves.
async fn accept(
    listener: TcpListener,
    routes: Routes,
    count: Arc<AtomicU64>,
    mut stopping: watch::Receiver<bool>,
) {
    let slots = Arc::new(Semaphore::new(limits::MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    let mut pause = MIN_PAUSE;
    loop {
        let slot = Arc::clone(&slots).acquire_owned().await.expect("it is never closed");
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = wire::turned(&mut stopping) => break,
        };
        match accepted {
            Ok((stream, _peer)) => {
                pause = MIN_PAUSE;
                let (routes, stopping, count) = (routes.clone(), stopping.clone(), count.clone());
                connections.spawn(Task::new(async move {
                    count.fetch_add(1, Ordering::Relaxed);
                    serve(stream, routes, stopping).await;
                    count.fetch_sub(1, Ordering::Relaxed);
                    drop(slot);
                }));
            }
            Err(error) => {
                // Most often there are no file descriptors left. Trying again at once would burn
                // the processor until a connection leaves.
                tracing::warn!(%error, "cannot accept connections");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(MAX_PAUSE);
            }
        }
        while connections.try_join_next().is_some() {}
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

const MIN_PAUSE: Duration = Duration::from_millis(10);
const MAX_PAUSE: Duration = Duration::from_millis(500);
const HANDSHAKE: Duration = Duration::from_secs(5);

async fn serve(stream: TcpStream, routes: Routes, mut stopping: watch::Receiver<bool>) {
    let _ = stream.set_nodelay(true);
    // Whoever connects and says nothing, or begins and goes no further, is sent away.
    if timeout(HANDSHAKE, preface(&stream)).await != Ok(true) {
        return;
    }
    let tasks = TaskTracker::new();
    let service = TowerToHyperService::new(splice::Service(routes));
    let connection = builder(tasks).serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let result = tokio::select! {
        result = &mut connection => result,
        () = wire::turned(&mut stopping) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "a connection ended");
    }
}

/// Whether the client has sent what every HTTP/2 connection begins with; hyper would wait for it
/// without an end, and looks at what it says.
async fn preface(stream: &TcpStream) -> bool {
    let mut bytes = [0; PREFACE_BYTES];
    loop {
        match stream.peek(&mut bytes).await {
            Ok(PREFACE_BYTES) => return true,
            Ok(0) | Err(_) => return false,
            Ok(_) => tokio::time::sleep(MIN_PAUSE).await,
        }
    }
}

const PREFACE_BYTES: usize = 24;

/// All limits explicitly: tonic's own server leaves two of them open that protect against floods
/// of resets.
fn builder(tasks: TaskTracker) -> http2::Builder<Executor> {
    const WINDOW: u32 = 1024 * 1024;
    let mut builder = http2::Builder::new(Executor(tasks));
    builder
        .timer(TokioTimer::new())
        .initial_stream_window_size(WINDOW)
        // Streams are bounded by themselves; a shared window would let one stall the others.
        .initial_connection_window_size((1 << 31) - 1)
        .max_frame_size(WINDOW)
        .max_concurrent_streams(limits::MAX_CONCURRENT_STREAMS)
        .max_pending_accept_reset_streams(Some(20))
        .max_local_error_reset_streams(Some(1024))
        .max_header_list_size(limits::MAX_HEADER_LIST_BYTES)
        .max_send_buf_size(limits::MAX_SEND_BUFFER_BYTES)
        .keep_alive_interval(Some(Duration::from_secs(20)))
        .keep_alive_timeout(Duration::from_secs(10));
    builder
}

/// Runs the tasks of one connection.
#[derive(Clone, Debug)]
struct Executor(TaskTracker);

impl<F> hyper::rt::Executor<F> for Executor
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, future: F) {
        self.0.spawn(Task::new(future));
    }
}
