//! Topics, subscriptions, receipts, status, and how commands fail.

use anyhow::Result;

use crate::harness::{Lab, json};

#[test]
fn topics_are_created_listed_described_and_deleted() -> Result<()> {
    let lab = Lab::new()?;
    let created = lab.run("topic create orders --retention 1day --max-bytes 64MiB")?;
    assert_eq!(created.succeeds()?, "created topic orders\n");
    let again = lab.run("topic create orders")?.fails(4)?;
    assert!(again.contains("exists already") && again.contains("--if-not-exists"), "{again}");
    lab.run("topic create orders --if-not-exists")?.succeeds()?;
    lab.run("topic create payments")?.succeeds()?;

    let list = lab.run("topic list")?.succeeds()?;
    assert_eq!(list.lines().count(), 3, "{list}");
    let topics = json(&lab.run("topic list --json")?.succeeds()?)?;
    assert_eq!(topics.len(), 2);
    assert_eq!(topics[0]["name"], "orders");
    assert_eq!(topics[0]["max_bytes"], 64 << 20);
    assert_eq!(topics[0]["retention_seconds"], 86_400.0);

    let described = lab.run("topic describe orders")?.succeeds()?;
    assert!(described.contains("64 MiB"), "{described}");
    lab.run("topic delete orders")?.succeeds()?;
    lab.run("topic describe orders")?.fails(3)?;
    lab.run("topic delete orders")?.fails(3)?;
    Ok(())
}

#[test]
fn long_lists_come_whole() -> Result<()> {
    let lab = Lab::new()?;
    for number in 0..130 {
        lab.run(&format!("topic create t{number}"))?.succeeds()?;
    }
    assert_eq!(json(&lab.run("topic list --json")?.succeeds()?)?.len(), 130);
    Ok(())
}

#[test]
fn subscriptions_are_created_moved_and_deleted() -> Result<()> {
    let lab = Lab::with_orders(&["a", "b", "c"])?;
    lab.run("subscription create billing orders --from earliest")?.succeeds()?;
    lab.run("subscription create billing orders")?.fails(4)?;
    lab.run("subscription create ghost nowhere")?.fails(3)?;

    let backlog = |lab: &Lab| -> Result<serde_json::Value> {
        let described = lab.run("subscription describe billing --json")?.succeeds()?;
        Ok(json(&described)?[0]["positions"][0]["backlog"].clone())
    };
    assert_eq!(backlog(&lab)?, 3);
    lab.run("subscription seek billing --to latest")?.succeeds()?;
    assert_eq!(backlog(&lab)?, 0);
    lab.run("subscription seek billing --to 2 --topic orders")?.succeeds()?;
    assert_eq!(backlog(&lab)?, 2);
    lab.run("subscription seek billing --to 10m")?.succeeds()?;
    assert_eq!(backlog(&lab)?, 3);
    lab.run("subscription seek billing --to 99")?.fails(3)?;

    assert!(lab.run("subscription list")?.succeeds()?.contains("billing"));
    lab.run("subscription delete billing")?.succeeds()?;
    lab.run("subscription describe billing")?.fails(3)?;
    Ok(())
}

#[test]
fn snapshots_are_made_listed_gone_back_to_and_deleted() -> Result<()> {
    let lab = Lab::with_orders(&["a", "b", "c"])?;
    lab.run("subscription create billing orders --from earliest")?.succeeds()?;
    lab.run("subscribe --subscription billing --count 1")?.succeeds()?;
    let created = lab.run("snapshot create before billing")?.succeeds()?;
    assert_eq!(created, "created snapshot before of billing, with 2 messages unacked\n");
    lab.run("snapshot create before billing")?.fails(4)?;
    lab.run("snapshot create other nobody")?.fails(3)?;
    lab.run("subscribe --subscription billing --count 2")?.succeeds()?;
    let list = lab.run("snapshot list")?.succeeds()?;
    assert!(list.contains("before") && list.contains("billing"), "{list}");
    lab.run("subscription seek billing")?.fails(2)?;
    lab.run("subscription seek billing --snapshot before --to latest")?.fails(2)?;
    lab.run("subscription seek billing --snapshot after")?.fails(3)?;
    lab.run("subscription seek billing --snapshot before")?.succeeds()?;
    let again = lab.run("subscribe --subscription billing --raw --until-caught-up")?.succeeds()?;
    assert_eq!(again, "b\nc\n");
    lab.run("snapshot delete before")?.succeeds()?;
    lab.run("snapshot delete before")?.fails(3)?;
    assert_eq!(lab.run("snapshot list --json")?.succeeds()?, "");
    Ok(())
}

#[test]
fn receipts_tell_who_has_received_a_message() -> Result<()> {
    let lab = Lab::with_orders(&[])?;
    lab.run("subscription create billing orders")?.succeeds()?;
    lab.run("subscription create audit orders")?.succeeds()?;
    let ids = lab.run("publish orders first second --to billing")?.succeeds()?;
    lab.run("subscribe --subscription billing --count 1")?.succeeds()?;

    let receipts = json(&lab.run("receipts orders 1 --json")?.succeeds()?)?;
    let states: Vec<_> = receipts
        .iter()
        .map(|receipt| format!("{} {}", receipt["subscription"], receipt["state"]))
        .collect();
    assert_eq!(states, [r#""audit" "not_addressed""#, r#""billing" "received""#]);

    let second = ids.lines().last().unwrap_or_default();
    let receipts = lab.run(&format!("receipts orders {second} --subscription billing"))?;
    let receipts = receipts.succeeds()?;
    assert!(receipts.contains("pending") && !receipts.contains("audit"), "{receipts}");
    lab.run("receipts orders 3")?.fails(3)?;
    lab.run(&format!("receipts payments {second}"))?.fails(2)?;
    Ok(())
}

#[test]
fn status_describes_the_server() -> Result<()> {
    let lab = Lab::new()?;
    let status = &json(&lab.run("status --json")?.succeeds()?)?[0];
    assert_eq!(status["state"], "SERVING");
    assert_eq!(status["url"], lab.url());
    assert!(lab.run("status")?.succeeds()?.contains("SERVING"));
    Ok(())
}

#[test]
fn an_absent_server_is_named_with_the_way_to_start_one() -> Result<()> {
    let lab = Lab::new()?;
    let error = lab.run("topic list --server http://127.0.0.1:1")?.fails(5)?;
    assert!(error.contains("http://127.0.0.1:1") && error.contains("pubsub-server"), "{error}");
    let error = lab.run("topic list --json --server http://127.0.0.1:1")?.fails(5)?;
    assert_eq!(json(&error)?[0]["exit_code"], 5);
    lab.run("topic list --server gopher://nowhere")?.fails(2)?;
    Ok(())
}

#[test]
fn wrong_usage_fails_with_2() -> Result<()> {
    let lab = Lab::new()?;
    for line in [
        "frobnicate",
        "subscribe",
        "subscribe orders --from soon",
        "subscribe orders --count 0",
        "subscribe orders --no-ack",
        "publish orders a b --idempotency-key k",
        "topic create .hidden",
        "topic create big --max-bytes lots",
        "receipts orders none",
    ] {
        lab.run(line)?.fails(2)?;
    }
    Ok(())
}

#[test]
fn help_and_completions_need_no_server() -> Result<()> {
    let lab = Lab::new()?;
    let help = lab.run("--help --server http://127.0.0.1:1")?.succeeds()?;
    assert!(help.contains("Exit codes:") && help.contains("pubsub topic create"), "{help}");
    let help = lab.run("subscribe --help")?.succeeds()?;
    assert!(help.contains("how long ago, such as 10m"), "{help}");
    for shell in ["bash", "zsh", "fish"] {
        let script = lab.run(&format!("completions {shell} --server http://127.0.0.1:1"))?;
        assert!(script.succeeds()?.contains("receipts"));
    }
    Ok(())
}

#[test]
fn dead_letters_are_listed_shown_redriven_and_purged() -> Result<()> {
    let lab = Lab::with_orders(&[])?;
    let create = "subscription create work orders --kind shared --max-attempts 2";
    lab.run(create)?.fails(2)?;
    lab.run(&format!("{create} --dead-letter orders-dead"))?.fails(3)?;
    lab.run("topic create orders-dead")?.succeeds()?;
    lab.run(&format!("{create} --dead-letter orders-dead --ack-timeout 1s"))?.succeeds()?;
    lab.run("dlq list work")?.succeeds()?;
    lab.run("dlq list nobody")?.fails(3)?;
    lab.run("dlq redrive work")?.fails(2)?;
    lab.run_args(&["publish", "orders", "one", "two", "three", "--attr", "color=green"])?
        .succeeds()?;
    // Nobody acks them in time.
    let holding = lab.start("subscribe --subscription work --no-ack")?;
    let letters = lab.eventually("dlq list work --json", |text| text.lines().count() == 3)?;
    holding.interrupt()?;
    let letters = json(&letters)?;
    assert_eq!(letters[0]["reason"], "not acked within 1s");
    assert_eq!(letters[0]["attempts"], 2);
    let list = lab.run("dlq list work")?.succeeds()?;
    assert!(list.contains("ATTEMPTS") && list.lines().count() == 4, "{list}");
    let number = letters[1]["number"].to_string();
    let shown = lab.run(&format!("dlq show work {number}"))?.succeeds()?;
    assert!(shown.contains("color=green") && shown.contains("not acked within 1s"), "{shown}");
    lab.run("dlq show work 99")?.fails(3)?;
    let described = lab.run("subscription describe work")?.succeeds()?;
    assert!(described.contains("3 wait") && described.contains("after 2 attempts"), "{described}");
    lab.run("topic delete orders-dead")?.fails(4)?;

    let by = |what: &str, filter: &str| lab.run_args(&["dlq", what, "work", "--where", filter]);
    assert_eq!(by("list", "attributes.color = \"green\"")?.succeeds()?, list);
    assert_eq!(by("list", "attributes.color != \"green\"")?.succeeds()?, "");
    let late = "hasPrefix(attributes.dead-letter-reason, \"broken\")";
    let redriven = by("redrive", late)?.succeeds()?;
    assert_eq!(redriven, "redriven 0 dead letters; 3 are left\n");
    assert_eq!(by("purge", late)?.succeeds()?, "purged 0 dead letters; 3 are left\n");
    let refused = by("redrive", "attributes.color")?.fails(2)?;
    assert!(refused.contains("column 17: expected `=` or `!=`, found the end"), "{refused}");
    lab.run("dlq redrive work 1 --where x")?.fails(2)?;

    let redriven = lab.run(&format!("dlq redrive work {number}"))?.succeeds()?;
    assert_eq!(redriven, "redriven 1 dead letters; 2 are left\n");
    let again = lab.run(&format!("dlq redrive work {number} --json"))?.succeeds()?;
    assert_eq!(json(&again)?[0]["redriven"], 0);
    lab.run("subscribe --subscription work --count 1")?.succeeds()?;
    let redriven = by("redrive", "NOT attributes:colour")?.succeeds()?;
    assert_eq!(redriven, "redriven 2 dead letters; 0 are left\n");
    lab.run("subscribe --subscription work --count 2")?.succeeds()?;
    assert_eq!(lab.run("dlq purge work --all")?.succeeds()?, "purged 0 dead letters; 0 are left\n");
    Ok(())
}
