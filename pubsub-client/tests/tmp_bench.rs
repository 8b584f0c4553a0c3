use pubsub_client::*;
use std::time::{Duration, Instant};
#[tokio::test(flavor = "multi_thread")]
async fn bench() {
    let server = pubsub_server::Server::start(pubsub_server::Config::in_memory()).await.unwrap();
    let client = Client::connect(server.url()).await.unwrap();
    client.admin().create_topic("t", TopicConfig::new()).await.unwrap();
    let mut sub = client.subscriber("s").topic("t").open().await.unwrap();
    let n = 200_000u64;
    let t = Instant::now();
    let p = client.publisher("t").open().await.unwrap();
    let h = tokio::spawn(async move {
        for _ in 0..n { drop(p.enqueue(vec![7u8; 256]).await.unwrap()); }
        p.flush().await.unwrap();
        println!("published {:?}", t.elapsed());
    });
    for _ in 0..n { sub.next().await.unwrap().unwrap().into_message().unwrap().ack(); }
    h.await.unwrap();
    println!("received {:?}", t.elapsed());
    let r = sub.stopper().stop(Drain::Finish, Duration::from_secs(10)).await;
    println!("{r:?}");
    let p = client.publisher("t").open().await.unwrap();
    let t = Instant::now();
    for _ in 0..1000 { p.publish("x").await.unwrap(); }
    println!("latency {:?}", t.elapsed() / 1000);
}
