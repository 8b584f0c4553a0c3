//! Following what happens, and how far subscriptions are behind.

use anyhow::Result;

use crate::harness::{Lab, Running, json};

/// Starts to follow, and waits until it does.
fn follow(lab: &Lab, line: &str) -> Result<Running> {
    let mut following = lab.start(line)?;
    let begun = following.error_line()?;
    assert!(begun.contains("Ctrl-C"), "{begun}");
    Ok(following)
}

#[test]
fn what_happens_is_printed_until_interrupted() -> Result<()> {
    let mut lab = Lab::with_orders(&[])?;
    let mut text = follow(&lab, "events")?;
    let mut of_billing = follow(&lab, "events --subscription billing --json")?;
    lab.run("topic create payments")?.succeeds()?;
    lab.run("subscription create billing orders")?.succeeds()?;
    lab.run("publish orders first")?.succeeds()?;
    lab.run("subscribe --subscription billing --consumer c --count 1")?.succeeds()?;

    let line = text.line()?;
    let (time, rest) = line.split_once(' ').unwrap_or_default();
    assert!(time.ends_with('Z') && time.len() == "2026-01-01T00:00:00.000Z".len(), "{line}");
    assert_eq!(rest, "topic payments was created");
    assert!(text.line()?.ends_with(" subscription billing was created"));
    assert!(text.line()?.ends_with(" consumer c of billing is active"));
    assert!(text.line()?.ends_with(" consumer c of billing has left"));

    let mut kinds = Vec::new();
    for _ in 0..3 {
        let event = json(&of_billing.line()?)?.remove(0);
        assert_eq!(event["subscription"], "billing", "{event}");
        assert!(event["time"].is_string() && event["text"].is_string(), "{event}");
        kinds.push(event["type"].as_str().unwrap_or_default().to_owned());
    }
    assert_eq!(kinds, ["subscription_created", "consumer_attached", "consumer_left"]);

    lab.restart()?;
    let event = json(&of_billing.line()?)?.remove(0);
    assert_eq!(event["type"], "reconnected", "{event}");
    assert_eq!(event["restarted"], true, "{event}");
    assert!(text.line()?.contains("connected again"));
    for following in [text, of_billing] {
        let ended = following.interrupt()?;
        assert_eq!(ended.code, Some(0), "{ended:?}");
    }
    lab.run("events --topic no/name")?.fails(2)?;
    Ok(())
}

#[test]
fn subscriptions_say_how_far_they_are_behind_and_why() -> Result<()> {
    let lab = Lab::with_orders(&["a", "b", "c"])?;
    lab.run("subscription create billing orders --from earliest")?.succeeds()?;
    let list = lab.run("subscription list")?.succeeds()?;
    assert!(list.contains("OLDEST") && list.contains("0s"), "{list}");
    let described = lab.run("subscription describe billing")?.succeeds()?;
    assert!(described.contains("there is no consumer"), "{described}");

    let mut holding = lab.start("subscribe --subscription billing --consumer c --no-ack")?;
    assert_eq!(holding.line()?, "orders 1 a");
    let described = lab.run("subscription describe billing --json")?.succeeds()?;
    let position = &json(&described)?[0]["positions"][0];
    assert_eq!(position["backlog"], 3, "{position}");
    assert_eq!(position["redelivered"], 0, "{position}");
    assert_eq!(position["head_of_line"]["sequence"], 1, "{position}");
    assert_eq!(position["head_of_line"]["cause"], "with_consumer", "{position}");
    assert!(position["oldest_unacked_age_seconds"].as_f64() > Some(0.0), "{position}");
    holding.interrupt()?;
    Ok(())
}
