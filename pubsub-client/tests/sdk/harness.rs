//! A server, a proxy in front of it whose connections can be cut, and a client behind it.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pubsub_client::{
    Client, Delivery, Event, RetryPolicy, Start, Subscriber, SubscriberBuilder, TopicConfig,
};
use pubsub_server::{Config, Server};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

/// Forwards connections to a server, until they are cut.
pub(crate) struct Proxy {
    address: SocketAddr,
    target: Arc<Mutex<Option<SocketAddr>>>,
    cuts: watch::Sender<u64>,
    frozen: watch::Sender<bool>,
    _tasks: JoinSet<()>,
}

impl Proxy {
    async fn start(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let target = Arc::new(Mutex::new(Some(target)));
        let cuts = watch::Sender::new(0);
        let mut tasks = JoinSet::new();
        let frozen = watch::Sender::new(false);
        tasks.spawn(forward(listener, Arc::clone(&target), cuts.clone(), frozen.clone()));
        Self { address, target, cuts, frozen, _tasks: tasks }
    }

    /// Cuts all connections. New ones are possible at once.
    pub(crate) fn cut(&self) {
        self.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// Keeps all connections open, and forwards nothing.
    pub(crate) fn freeze(&self, frozen: bool) {
        self.frozen.send_replace(frozen);
        if !frozen {
            self.cut();
        }
    }

    /// Cuts all connections and lets no new ones through, until there is a target again.
    pub(crate) fn set_target(&self, target: Option<SocketAddr>) {
        *self.target.lock().unwrap() = target;
        self.cut();
    }
}

async fn forward(
    listener: TcpListener,
    target: Arc<Mutex<Option<SocketAddr>>>,
    cuts: watch::Sender<u64>,
    frozen: watch::Sender<bool>,
) {
    let mut connections = JoinSet::new();
    while let Ok((mut inbound, _)) = listener.accept().await {
        let target = *target.lock().unwrap();
        let mut cuts = cuts.subscribe();
        let mut frozen = frozen.subscribe();
        connections.spawn(async move {
            let Some(target) = target else { return };
            let Ok(mut outbound) = TcpStream::connect(target).await else { return };
            tokio::select! {
                _ = copy_bidirectional(&mut inbound, &mut outbound) => {}
                _ = cuts.changed() => {}
                () = async { drop(frozen.wait_for(|frozen| *frozen).await) } => {
                    // Neither end learns anything.
                    let _ = cuts.changed().await;
                }
            }
        });
    }
}

pub(crate) struct World {
    pub(crate) server: Option<Server>,
    pub(crate) proxy: Proxy,
    pub(crate) client: Client,
    directory: tempfile::TempDir,
}

impl World {
    /// A server with a topic `t`.
    pub(crate) async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let server = Server::start(Config::at(directory.path())).await.unwrap();
        let proxy = Proxy::start(server.address()).await;
        let client = connect(&proxy).await;
        client.admin().create_topic("t", TopicConfig::new()).await.unwrap();
        Self { server: Some(server), proxy, client, directory }
    }

    /// Another client, as another process would have.
    pub(crate) async fn other_client(&self) -> Client {
        connect(&self.proxy).await
    }

    pub(crate) fn subscription(&self, name: &str) -> SubscriberBuilder {
        self.client.subscriber(name).topic("t").start(Start::Earliest)
    }

    pub(crate) async fn publish(&self, range: std::ops::RangeInclusive<u64>) {
        let publisher = self.client.publisher("t").open().await.unwrap();
        for number in range {
            drop(publisher.enqueue(number.to_string()).await.unwrap());
        }
        publisher.close(Duration::from_secs(10)).await.unwrap();
    }

    pub(crate) async fn stop_server(&mut self) {
        self.proxy.set_target(None);
        self.server.take().unwrap().stop().await.unwrap();
    }

    /// Stops the server in order, with its connections alive.
    pub(crate) async fn drain_server(&mut self) {
        self.server.take().unwrap().stop().await.unwrap();
        self.proxy.set_target(None);
    }

    /// Another server, with another history, takes the place of this one.
    pub(crate) async fn replace_server(&mut self) {
        self.stop_server().await;
        self.directory = tempfile::tempdir().unwrap();
        let server = Server::start(Config::at(self.directory.path())).await.unwrap();
        let client = Client::connect(server.url()).await.unwrap();
        client.admin().create_topic("t", TopicConfig::new()).await.unwrap();
        self.proxy.set_target(Some(server.address()));
        self.server = Some(server);
    }

    pub(crate) async fn start_server(&mut self) {
        let server = Server::start(Config::at(self.directory.path())).await.unwrap();
        self.proxy.set_target(Some(server.address()));
        self.server = Some(server);
    }
}

async fn connect(proxy: &Proxy) -> Client {
    let policy = RetryPolicy::new(Duration::from_millis(10), Duration::from_millis(100));
    let client = Client::builder(proxy.address.to_string()).retry(policy).fast();
    client.connect().await.unwrap()
}

/// Nothing in these tests takes longer than this.
pub(crate) async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(20), future).await.expect("it takes too long")
}

pub(crate) async fn next(subscriber: &mut Subscriber) -> Delivery {
    match soon(subscriber.next()).await {
        Some(Ok(Event::Message(delivery))) => delivery,
        other => panic!("{other:?} came instead of a message"),
    }
}

pub(crate) fn number(delivery: &Delivery) -> u64 {
    std::str::from_utf8(&delivery.payload).unwrap().parse().unwrap()
}

/// Receives and acks messages, and says which.
pub(crate) async fn receive(subscriber: &mut Subscriber, count: usize) -> Vec<u64> {
    let mut numbers = Vec::with_capacity(count);
    for _ in 0..count {
        let delivery = next(subscriber).await;
        numbers.push(number(&delivery));
        delivery.ack();
    }
    numbers
}

/// Nothing comes for a while.
pub(crate) async fn silence(subscriber: &mut Subscriber) {
    let event = timeout(Duration::from_millis(300), subscriber.next()).await;
    assert!(event.is_err(), "{event:?} came");
}
