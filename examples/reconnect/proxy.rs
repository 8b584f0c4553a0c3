//! A proxy between the client and the server that can cut connections and swallow answers.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::Result;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// The proxy. Dropping it cuts everything.
#[derive(Debug)]
pub(crate) struct Proxy {
    address: SocketAddr,
    control: watch::Sender<Control>,
    _accepting: JoinSet<()>,
}

#[derive(Clone, Copy, Debug)]
struct Control {
    server: SocketAddr,
    /// Counts the cuts; a connection of an earlier count ends.
    cuts: u64,
    /// The server's answers are held back.
    muted: bool,
}

impl Proxy {
    pub(crate) async fn start(server: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let (control, watch) = watch::channel(Control { server, cuts: 0, muted: false });
        let mut accepting = JoinSet::new();
        accepting.spawn(accept(listener, watch));
        Ok(Self { address, control, _accepting: accepting })
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Where new connections go.
    pub(crate) fn lead_to(&self, server: SocketAddr) {
        self.control.send_modify(|control| control.server = server);
    }

    /// Holds the server's answers back, or not any more: what it commits meanwhile, nobody learns.
    pub(crate) fn mute(&self, muted: bool) {
        self.control.send_modify(|control| control.muted = muted);
    }

    /// Cuts all connections; what was held back is lost with them.
    pub(crate) fn cut(&self) {
        self.control.send_modify(|control| {
            control.cuts += 1;
            control.muted = false;
        });
    }
}

async fn accept(listener: TcpListener, control: watch::Receiver<Control>) {
    let mut connections = JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        connections.spawn(relay(client, control.clone()));
        while connections.try_join_next().is_some() {}
    }
}

async fn relay(client: TcpStream, mut control: watch::Receiver<Control>) {
    let now = *control.borrow_and_update();
    // Without a server the client is hung up on, as by a load balancer.
    let Ok(server) = TcpStream::connect(now.server).await else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (mut from_client, to_client) = client.into_split();
    let (from_server, mut to_server) = server.into_split();
    tokio::select! {
        _ = copy(&mut from_client, &mut to_server) => {}
        () = answers(from_server, to_client, control.clone()) => {}
        _ = control.wait_for(|control| control.cuts != now.cuts) => {}
    }
}

async fn answers(
    mut server: OwnedReadHalf,
    mut client: OwnedWriteHalf,
    mut control: watch::Receiver<Control>,
) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(read) = server.read(&mut buffer).await
        && read > 0
        && control.wait_for(|control| !control.muted).await.is_ok()
        && client.write_all(&buffer[..read]).await.is_ok()
    {}
}
