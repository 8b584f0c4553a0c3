//! A TCP proxy that breaks connections on demand.
//!
//! Faults are set per direction and take effect at once, also for live connections. A cut is
//! armed for one connection: the first that reaches the given point is cut, and later ones are
//! not, so that a client can recover.

mod frames;
mod pump;

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use anyhow::Result;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
};

pub use frames::FrameScanner;

/// A direction through the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the client to the server.
    Up,
    /// From the server to the client.
    Down,
}

/// What happens to the bytes of a direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// They go through.
    #[default]
    Pass,
    /// Nothing is read any more and nothing is closed: a half-open link.
    Blackhole,
    /// They are read and thrown away: the sender believes that they arrived.
    Discard,
    /// Each piece waits.
    Delay(Duration),
    /// One byte per segment.
    Trickle,
}

/// How a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// With a reset.
    Reset,
    /// With an orderly end of stream in both directions.
    Finish,
}

/// Where a connection is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// After so many bytes of the direction.
    Byte(u64),
    /// After so many whole HTTP/2 frames of the direction; the client's preface is none.
    Frame(u64),
}

/// A cut that waits for the first connection to reach its point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ArmedCut {
    direction: Direction,
    at: At,
    cut: Cut,
}

/// What the proxy has seen in one direction of one connection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    /// The bytes that went through.
    pub bytes: u64,
    /// The offsets at which the HTTP/2 frames among them end.
    pub frame_ends: Vec<u64>,
}

/// What the proxy has seen on one connection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// From the client.
    pub up: Flow,
    /// From the server.
    pub down: Flow,
}

impl Traffic {
    /// The flow of a direction.
    pub fn flow(&self, direction: Direction) -> &Flow {
        match direction {
            Direction::Up => &self.up,
            Direction::Down => &self.down,
        }
    }

    fn flow_mut(&mut self, direction: Direction) -> &mut Flow {
        match direction {
            Direction::Up => &mut self.up,
            Direction::Down => &mut self.down,
        }
    }
}

/// What can change while connections live.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Faults {
    up: Mode,
    down: Mode,
    target: SocketAddr,
    /// Raised to end all connections that began before.
    cut_all: u64,
    cut: Cut,
    /// Whether new connections are refused.
    refuse: bool,
}

impl Faults {
    fn mode(&self, direction: Direction) -> Mode {
        match direction {
            Direction::Up => self.up,
            Direction::Down => self.down,
        }
    }
}

#[derive(Debug, Default)]
pub(crate) struct State {
    armed: Option<ArmedCut>,
    cuts: u64,
    connections: Vec<Traffic>,
    open: u64,
}

/// The part that connections share with the handle.
#[derive(Debug)]
pub(crate) struct Shared {
    faults: watch::Sender<Faults>,
    state: Mutex<State>,
}

impl Shared {
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while holding the state")
    }
}

/// A proxy in front of one server. Dropping it ends all connections.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    _accepting: JoinSet<()>,
}

impl Proxy {
    /// Listens on a free port of the loopback interface and forwards to `target`.
    ///
    /// # Errors
    ///
    /// If it cannot listen.
    pub async fn start(target: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            faults: watch::Sender::new(Faults {
                up: Mode::Pass,
                down: Mode::Pass,
                target,
                cut_all: 0,
                cut: Cut::Reset,
                refuse: false,
            }),
            state: Mutex::default(),
        });
        let mut accepting = JoinSet::new();
        accepting.spawn(accept(listener, shared.clone()));
        Ok(Self { address, shared, _accepting: accepting })
    }

    /// Where clients connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where clients connect, as a URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Sends new connections to another server.
    pub fn retarget(&self, target: SocketAddr) {
        self.shared.faults.send_modify(|faults| faults.target = target);
    }

    /// Sets what happens to the bytes of a direction, on all connections.
    pub fn set(&self, direction: Direction, mode: Mode) {
        self.shared.faults.send_modify(|faults| match direction {
            Direction::Up => faults.up = mode,
            Direction::Down => faults.down = mode,
        });
    }

    /// Sets what happens to the bytes of both directions, on all connections.
    pub fn set_both(&self, mode: Mode) {
        self.set(Direction::Up, mode);
        self.set(Direction::Down, mode);
    }

    /// Accepts no new connections, or does again. Live ones go on.
    pub fn refuse(&self, refuse: bool) {
        self.shared.faults.send_modify(|faults| faults.refuse = refuse);
    }

    /// Ends all live connections now and gives their number.
    pub fn cut_all(&self, cut: Cut) -> u64 {
        let open = self.open();
        self.shared.state().cuts += open;
        self.shared.faults.send_modify(|faults| {
            faults.cut = cut;
            faults.cut_all += 1;
        });
        open
    }

    /// Cuts the first connection that reaches a point, counted from the connection's start.
    pub fn arm(&self, direction: Direction, at: At, cut: Cut) {
        self.shared.state().armed = Some(ArmedCut { direction, at, cut });
    }

    /// Forgets the cut that has not come about, and tells whether there was one.
    pub fn disarm(&self) -> bool {
        self.shared.state().armed.take().is_some()
    }

    /// How many connections were cut, by `arm` or `cut_all`.
    pub fn cuts(&self) -> u64 {
        self.shared.state().cuts
    }

    /// How many connections are open.
    pub fn open(&self) -> u64 {
        self.shared.state().open
    }

    /// How many connections there have been.
    pub fn connections(&self) -> usize {
        self.shared.state().connections.len()
    }

    /// What has been seen on each connection, in the order of their beginnings.
    pub fn traffic(&self) -> Vec<Traffic> {
        self.shared.state().connections.clone()
    }

    /// How many bytes have gone through in a direction, over all connections.
    pub fn bytes(&self, direction: Direction) -> u64 {
        let state = self.shared.state();
        let flows = state.connections.iter().map(|one| one.flow(direction));
        flows.map(|flow| flow.bytes).sum()
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        while connections.try_join_next().is_some() {}
        let faults = *shared.faults.borrow();
        if faults.refuse {
            // Without a linger time, dropping it sends a reset, as a closed port would.
            let _ = client.set_zero_linger();
            continue;
        }
        connections.spawn(serve(client, faults.target, shared.clone()));
    }
}

async fn serve(client: TcpStream, target: SocketAddr, shared: Arc<Shared>) {
    // Taken before the connection counts as open, so that a cut from now on includes it.
    let faults = shared.faults.subscribe();
    let Ok(server) = TcpStream::connect(target).await else {
        let _ = client.set_zero_linger();
        return;
    };
    let index = {
        let mut state = shared.state();
        state.connections.push(Traffic::default());
        state.open += 1;
        state.connections.len() - 1
    };
    pump::run(client, server, pump::Link::new(index, faults, &shared)).await;
    shared.state().open -= 1;
}

#[cfg(test)]
mod tests;
