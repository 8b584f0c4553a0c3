use std::io::ErrorKind;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::timeout,
};

use super::*;
use crate::wait;

const SOON: Duration = Duration::from_secs(5);
const SILENCE: Duration = Duration::from_millis(50);

/// A server that sends everything back, and a proxy in front of it.
struct Echo {
    proxy: Proxy,
    _serving: JoinSet<()>,
}

impl Echo {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = Proxy::start(listener.local_addr().unwrap()).await.unwrap();
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                connections.spawn(async move {
                    let (mut read, mut write) = stream.split();
                    let _ = tokio::io::copy(&mut read, &mut write).await;
                });
            }
        });
        Self { proxy, _serving: serving }
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.proxy.address()).await.unwrap()
    }
}

async fn echoes(stream: &mut TcpStream, bytes: &[u8]) {
    stream.write_all(bytes).await.unwrap();
    let mut back = vec![0; bytes.len()];
    timeout(SOON, stream.read_exact(&mut back)).await.unwrap().unwrap();
    assert_eq!(back, bytes);
}

async fn is_silent(stream: &mut TcpStream) -> bool {
    timeout(SILENCE, stream.read(&mut [0; 1])).await.is_err()
}

#[tokio::test]
async fn bytes_go_through_and_are_counted() {
    let echo = Echo::start().await;
    let mut stream = echo.connect().await;
    echoes(&mut stream, &[7; 100_000]).await;
    assert_eq!(echo.proxy.bytes(Direction::Up), 100_000);
    assert_eq!(echo.proxy.bytes(Direction::Down), 100_000);
    assert_eq!((echo.proxy.connections(), echo.proxy.open()), (1, 1));
}

#[tokio::test]
async fn a_cut_after_a_byte_lets_exactly_these_bytes_through_once() {
    let echo = Echo::start().await;
    echo.proxy.arm(Direction::Down, At::Byte(10), Cut::Finish);
    let mut stream = echo.connect().await;
    stream.write_all(&[1; 25]).await.unwrap();
    let mut got = Vec::new();
    timeout(SOON, stream.read_to_end(&mut got)).await.unwrap().unwrap();
    assert_eq!(got, [1; 10]);
    assert_eq!(echo.proxy.cuts(), 1);
    echoes(&mut echo.connect().await, &[2; 25]).await;
    assert!(!echo.proxy.disarm());
}

#[tokio::test]
async fn a_reset_is_seen_as_a_reset() {
    let echo = Echo::start().await;
    let mut stream = echo.connect().await;
    echoes(&mut stream, b"hello").await;
    assert_eq!(echo.proxy.cut_all(Cut::Reset), 1);
    let error = timeout(SOON, stream.read(&mut [0; 1])).await.unwrap();
    assert_eq!(error.unwrap_err().kind(), ErrorKind::ConnectionReset);
    wait::until("no open connection", SOON, || echo.proxy.open() == 0).await.unwrap();
    echoes(&mut echo.connect().await, b"again").await;
}

#[tokio::test]
async fn a_blackhole_is_silent_and_goes_on_afterwards() {
    let echo = Echo::start().await;
    let mut stream = echo.connect().await;
    echoes(&mut stream, b"before").await;
    echo.proxy.set_both(Mode::Blackhole);
    stream.write_all(b"x").await.unwrap();
    assert!(is_silent(&mut stream).await);
    echo.proxy.set_both(Mode::Pass);
    let mut back = [0; 1];
    timeout(SOON, stream.read_exact(&mut back)).await.unwrap().unwrap();
    assert_eq!(&back, b"x");
}

#[tokio::test]
async fn discarded_answers_are_lost_and_requests_are_not() {
    let echo = Echo::start().await;
    let mut stream = echo.connect().await;
    echo.proxy.set(Direction::Down, Mode::Discard);
    stream.write_all(b"lost").await.unwrap();
    wait::until("the answer", SOON, || echo.proxy.bytes(Direction::Down) == 4).await.unwrap();
    assert!(is_silent(&mut stream).await);
    echo.proxy.set(Direction::Down, Mode::Pass);
    echoes(&mut stream, b"kept").await;
}

#[tokio::test]
async fn slow_bytes_arrive_whole() {
    let echo = Echo::start().await;
    let mut stream = echo.connect().await;
    echo.proxy.set_both(Mode::Trickle);
    echoes(&mut stream, b"one by one").await;
    echo.proxy.set_both(Mode::Delay(Duration::from_millis(20)));
    echoes(&mut stream, b"late").await;
}

#[tokio::test]
async fn a_refusing_proxy_resets_new_connections() {
    let echo = Echo::start().await;
    let mut before = echo.connect().await;
    echoes(&mut before, b"before").await;
    echo.proxy.refuse(true);
    let mut refused = echo.connect().await;
    let error = timeout(SOON, refused.read(&mut [0; 1])).await.unwrap();
    assert_eq!(error.unwrap_err().kind(), ErrorKind::ConnectionReset);
    echoes(&mut before, b"live").await;
}
