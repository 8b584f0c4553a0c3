//! One connection through the proxy: two directions, each with its faults.

use std::{future::pending, io};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    sync::watch,
    time::sleep,
};

use super::{At, Cut, Direction, Faults, Flow, FrameScanner, Mode, Shared};

const BUFFER_BYTES: usize = 64 * 1024;

/// A connection's view of the proxy.
pub(super) struct Link<'a> {
    index: usize,
    faults: watch::Receiver<Faults>,
    shared: &'a Shared,
    born: u64,
}

impl<'a> Link<'a> {
    pub(super) fn new(index: usize, faults: watch::Receiver<Faults>, shared: &'a Shared) -> Self {
        let born = faults.borrow().cut_all;
        Self { index, faults, shared, born }
    }

    async fn cut_all(&self) -> Cut {
        let mut faults = self.faults.clone();
        let cut = faults.wait_for(|faults| faults.cut_all > self.born).await;
        match cut.map(|faults| faults.cut) {
            Ok(cut) => cut,
            Err(_) => pending().await,
        }
    }
}

/// Why a direction has come to its end.
enum End {
    /// The sender has finished; the other direction goes on.
    Finished,
    /// The whole connection ends like this.
    Cut(Cut),
}

pub(super) async fn run(mut client: TcpStream, mut server: TcpStream, link: Link<'_>) {
    // A fault at byte k is a fault at byte k only if bytes are not held back.
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let cut = {
        let (client_read, client_write) = client.split();
        let (server_read, server_write) = server.split();
        let up = Pump::new(Direction::Up, &link).run(client_read, server_write);
        let down = Pump::new(Direction::Down, &link).run(server_read, client_write);
        let both = async {
            tokio::pin!(up, down);
            let other = tokio::select! {
                end = &mut up => match end {
                    End::Cut(cut) => return cut,
                    End::Finished => down.await,
                },
                end = &mut down => match end {
                    End::Cut(cut) => return cut,
                    End::Finished => up.await,
                },
            };
            match other {
                End::Cut(cut) => cut,
                End::Finished => Cut::Finish,
            }
        };
        tokio::select! {
            cut = both => cut,
            cut = link.cut_all() => cut,
        }
    };
    match cut {
        Cut::Reset => {
            // Dropped without a linger time, a socket sends a reset.
            let _ = (client.set_zero_linger(), server.set_zero_linger());
        }
        Cut::Finish => {
            let _ = (client.shutdown().await, server.shutdown().await);
        }
    }
}

/// One direction.
struct Pump<'a> {
    direction: Direction,
    link: &'a Link<'a>,
    faults: watch::Receiver<Faults>,
    scanner: FrameScanner,
}

impl<'a> Pump<'a> {
    fn new(direction: Direction, link: &'a Link<'a>) -> Self {
        Self { direction, link, faults: link.faults.clone(), scanner: FrameScanner::new(direction) }
    }

    async fn run(mut self, mut from: ReadHalf<'_>, mut to: WriteHalf<'_>) -> End {
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            if self.mode().await.is_none() {
                return End::Cut(Cut::Reset);
            }
            let read = tokio::select! {
                read = from.read(&mut buffer) => read,
                _ = self.faults.changed() => continue,
            };
            let length = match read {
                Ok(0) => {
                    let _ = to.shutdown().await;
                    return End::Finished;
                }
                Ok(length) => length,
                Err(_) => return End::Cut(Cut::Reset),
            };
            // What was sent after a fault was set is to meet it, although the read was under way.
            let Some(mode) = self.mode().await else {
                return End::Cut(Cut::Reset);
            };
            match self.forward(mode, &buffer[..length], &mut to).await {
                Ok(None) => {}
                Ok(Some(cut)) => return End::Cut(cut),
                Err(_) => return End::Cut(Cut::Reset),
            }
        }
    }

    /// How bytes are to go on, once they are; `None` if the proxy is gone.
    async fn mode(&mut self) -> Option<Mode> {
        let direction = self.direction;
        let passing = self.faults.wait_for(|faults| faults.mode(direction) != Mode::Blackhole);
        passing.await.ok().map(|faults| faults.mode(direction))
    }

    /// Passes bytes on up to the point of a cut.
    async fn forward(
        &mut self,
        mode: Mode,
        bytes: &[u8],
        to: &mut WriteHalf<'_>,
    ) -> io::Result<Option<Cut>> {
        let (bytes, cut) = self.admit(bytes);
        match mode {
            Mode::Pass | Mode::Blackhole => to.write_all(bytes).await?,
            Mode::Discard => {}
            Mode::Delay(time) => {
                sleep(time).await;
                to.write_all(bytes).await?;
            }
            Mode::Trickle => {
                for byte in bytes.chunks(1) {
                    to.write_all(byte).await?;
                }
            }
        }
        Ok(cut)
    }

    /// Counts bytes, and tells how many of them go through before an armed cut.
    fn admit<'b>(&mut self, bytes: &'b [u8]) -> (&'b [u8], Option<Cut>) {
        let mut state = self.link.shared.state();
        let state = &mut *state;
        let flow = state.connections[self.link.index].flow_mut(self.direction);
        let before = flow.bytes;
        flow.bytes += bytes.len() as u64;
        self.scanner.scan(bytes, |end| flow.frame_ends.push(end));

        let armed = state.armed.filter(|armed| armed.direction == self.direction);
        let Some(armed) = armed else {
            return (bytes, None);
        };
        // A connection that was past the point when the cut was armed is not meant.
        let Some(point) = reached(armed.at, flow).filter(|point| *point >= before) else {
            return (bytes, None);
        };
        flow.bytes = point;
        flow.frame_ends.retain(|end| *end <= point);
        state.armed = None;
        state.cuts += 1;
        let through = usize::try_from(point - before).expect("it lies within `bytes`");
        (&bytes[..through], Some(armed.cut))
    }
}

/// The offset of a point, if the flow has come that far.
fn reached(at: At, flow: &Flow) -> Option<u64> {
    match at {
        At::Byte(byte) => (byte <= flow.bytes).then_some(byte),
        At::Frame(0) => Some(0),
        At::Frame(frame) => {
            let index = usize::try_from(frame - 1).ok()?;
            flow.frame_ends.get(index).copied()
        }
    }
}
