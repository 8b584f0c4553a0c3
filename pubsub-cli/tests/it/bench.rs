//! `pubsub bench`.

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::harness::{Lab, json};

/// What a measurement tells.
fn measured(lab: &Lab, line: &str) -> Result<Value> {
    let told = json(&lab.run(&format!("bench {line} --json"))?.succeeds()?)?;
    ensure!(told.len() == 1, "{told:?}");
    let told = told.into_iter().next().context("nothing")?;
    ensure!(told["messages_per_second"].as_f64().is_some_and(|rate| rate > 0.0), "{told}");
    Ok(told)
}

/// Whether nothing is left behind.
fn is_clean(lab: &Lab) -> Result<()> {
    let topics = lab.run("topic list --json")?.succeeds()?;
    let subscriptions = lab.run("subscription list --json")?.succeeds()?;
    ensure!(
        json(&topics)?.is_empty() && json(&subscriptions)?.is_empty(),
        "{topics}{subscriptions}"
    );
    Ok(())
}

#[test]
fn each_kind_of_work_is_measured_and_leaves_nothing_behind() -> Result<()> {
    let lab = Lab::new()?;
    let told = measured(&lab, "publish --count 2001 --publishers 2 --size 1KiB --keys")?;
    assert_eq!((&told["messages"], &told["message_bytes"]), (&2001.into(), &1024.into()));
    let stored = &told["stored_us"];
    let at = |at: &str| stored[at].as_f64().context("no percentile");
    ensure!(0.0 < at("p50")? && at("p50")? <= at("p99.9")? && at("p99.9")? <= at("max")?, "{told}");
    assert_eq!(measured(&lab, "publish --duration 300ms")?["work"], "publish");
    assert_eq!(measured(&lab, "latency --count 20")?["messages"], 20);
    let told = measured(&lab, "latency --rate 500 --duration 1s")?;
    ensure!(told["messages"] == 500 && told["received_us"]["p50"].is_f64(), "{told}");
    assert_eq!(measured(&lab, "replay --count 3000")?["messages"], 3000);
    assert_eq!(measured(&lab, "replay --count 3000 --no-ack")?["messages"], 3000);
    assert_eq!(measured(&lab, "fanout --subscribers 3 --count 500")?["messages"], 1500);
    is_clean(&lab)
}

#[test]
fn a_topic_that_is_given_is_used_and_kept() -> Result<()> {
    let lab = Lab::with_orders(&["one", "two"])?;
    measured(&lab, "publish --topic orders --count 10")?;
    assert_eq!(measured(&lab, "replay --topic orders")?["messages"], 12);
    let topic = json(&lab.run("topic describe orders --json")?.succeeds()?)?;
    assert_eq!(
        (&topic[0]["head"], &topic[0]["subscriptions"]),
        (&12.into(), &Value::Array(vec![]))
    );
    let error = lab.run("bench replay --topic nowhere")?.fails(3)?;
    ensure!(error.contains("nowhere"), "{error}");
    Ok(())
}

#[test]
fn an_interrupted_measurement_leaves_nothing_behind_either() -> Result<()> {
    let lab = Lab::new()?;
    let running = lab.start("bench latency --rate 100 --duration 1h")?;
    lab.eventually("subscription list", |list| list.contains("bench-"))?;
    // So that it is in the middle of it.
    thread::sleep(Duration::from_millis(300));
    running.interrupt()?.fails(130)?;
    is_clean(&lab)
}

#[test]
fn subscribing_counts_what_comes_from_now_on() -> Result<()> {
    let lab = Lab::with_orders(&["before"])?;
    let running = lab.start("bench subscribe orders --count 3 --json")?;
    thread::scope(|scope| {
        // Until it listens and has its three.
        let publishing = scope.spawn(|| -> Result<()> {
            for _ in 0..200 {
                lab.run("publish orders later")?.succeeds()?;
                thread::sleep(Duration::from_millis(10));
            }
            Ok(())
        });
        let told = running.end()?.succeeds()?;
        assert_eq!(json(&told)?[0]["messages"], 3);
        publishing.join().map_err(|_| anyhow::anyhow!("it panicked"))?
    })
}
