//! Administration over connections that fail.

use std::time::Duration;

use pubsub_client::{AdminError, Client, Outcome, TopicConfig};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpListener;

use crate::harness::soon;

#[tokio::test]
async fn an_outcome_that_the_first_attempt_left_open_stays_open() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    // Takes one request, and is gone without an answer.
    let server = async move {
        let (mut connection, _) = listener.accept().await.unwrap();
        let mut request = [0; 16];
        connection.read_exact(&mut request).await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    let client = Client::builder(address.to_string()).connect_lazy().unwrap();
    let admin = client.admin();
    let ensured = admin.ensure_topic("t", TopicConfig::new());
    let (result, ()) = soon(async { tokio::join!(ensured, server) }).await;
    let error = result.unwrap_err();
    assert!(matches!(error, AdminError::Unreachable { .. }), "{error}");
    assert_eq!(error.outcome(), Outcome::Unknown);
}
