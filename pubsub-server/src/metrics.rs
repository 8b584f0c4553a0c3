//! Metrics for Prometheus, at an address of their own.

use std::convert::Infallible;
use std::fmt;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::header::{ALLOW, CONTENT_TYPE};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::broker::Broker;
use crate::broker::counting::{Census, Counts, TopicCensus};
use crate::broker::session::GapReason;
use crate::limits;
use crate::wire;

/// How long a scrape may take, from its connection to its end.
const WITHIN: Duration = Duration::from_secs(10);
/// The pause after a connection could not be accepted.
const PAUSE: Duration = Duration::from_millis(100);

/// Answers scrapes until the server stops.
pub(crate) async fn serve(
    listener: TcpListener,
    broker: Broker,
    mut stopping: watch::Receiver<bool>,
) {
    let mut scrapes = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = wire::turned(&mut stopping) => return,
        };
        while scrapes.try_join_next().is_some() {}
        match accepted {
            // Whoever is one too many is sent away.
            Ok((stream, _)) if scrapes.len() < limits::MAX_SCRAPES => {
                scrapes.spawn(timeout(WITHIN, answer(stream, broker.clone())));
            }
            Ok(_) => {}
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}

async fn answer(stream: TcpStream, broker: Broker) {
    let service = service_fn(async |request: Request<Incoming>| {
        Ok::<_, Infallible>(respond(request.method(), request.uri().path(), &broker))
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = connection.await {
        tracing::debug!(%error, "a scrape ended");
    }
}

fn respond(method: &Method, path: &str, broker: &Broker) -> Response<String> {
    let mut response = Response::new(String::new());
    if path != "/metrics" {
        *response.status_mut() = StatusCode::NOT_FOUND;
        "metrics are at /metrics\n".clone_into(response.body_mut());
    } else if method != Method::GET {
        *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
        response.headers_mut().insert(ALLOW, Method::GET.as_str().parse().expect("a method"));
    } else {
        let format = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        response.headers_mut().insert(CONTENT_TYPE, format.parse().expect("visible characters"));
        // Writing to a string never fails.
        let _ = write(response.body_mut(), &broker.census());
    }
    response
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfReason {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfTopic {
    topic: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfPosition {
    topic: String,
    subscription: String,
}

fn write(out: &mut String, census: &Census) -> fmt::Result {
    let mut registry = Registry::with_prefix("pubsub");
    events(&mut registry, &census.counts);
    topics(&mut registry, &census.topics);
    text::encode(out, &registry)
}

fn events(registry: &mut Registry, counts: &Counts) {
    let missed = Family::<OfReason, Counter>::default();
    for reason in GapReason::ALL {
        let messages = counts.missed.get(&reason).copied().unwrap_or(0);
        missed.get_or_create(&OfReason { reason: reason.name() }).inc_by(messages);
    }
    let help = "Messages that subscriptions will never receive, by what has removed them";
    registry.register("missed_messages", help, missed);
    for (name, help, count) in [
        ("dead_letters", "Messages that failed, moved to dead-letter topics", counts.dead_letters),
        ("skipped_messages", "Messages that failed and were skipped", counts.skipped),
        ("redriven_messages", "Dead letters that were sent back", counts.redriven),
        ("lost_consumers", "Consumers that were lost without a goodbye", counts.lost_consumers),
    ] {
        let counter = Counter::<u64>::default();
        counter.inc_by(count);
        registry.register(name, help, counter);
    }
}

fn topics(registry: &mut Registry, topics: &[TopicCensus]) {
    let messages = Family::<OfTopic, Gauge>::default();
    let bytes = Family::<OfTopic, Gauge>::default();
    let head = Family::<OfTopic, Counter>::default();
    let unacked = Family::<OfPosition, Gauge>::default();
    let number = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    for TopicCensus { name, stats, floors } in topics {
        let topic = name.to_string();
        for (subscription, floor) in floors {
            let of = OfPosition { topic: topic.clone(), subscription: subscription.to_string() };
            unacked.get_or_create(&of).set(number(stats.head.saturating_sub(*floor)));
        }
        let of = OfTopic { topic };
        messages.get_or_create(&of).set(number((stats.head + 1).saturating_sub(stats.first)));
        bytes.get_or_create(&of).set(number(stats.bytes));
        head.get_or_create(&of).inc_by(stats.head);
    }
    registry.register("topic_messages", "Messages that are stored", messages);
    registry.register_with_unit("topic_stored", "Bytes of these", Unit::Bytes, bytes);
    let help = "Messages that were ever stored: the sequence of the last one";
    registry.register("topic_published_messages", help, head);
    let help = "Messages from the first one on that the subscription has not acked";
    registry.register("subscription_behind_messages", help, unacked);
}
