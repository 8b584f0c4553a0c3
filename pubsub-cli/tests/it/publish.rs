//! `pubsub publish`.

use anyhow::Result;

use crate::harness::{Lab, json};

const READ: &str = "subscribe orders --from earliest --until-caught-up";

#[test]
fn arguments_are_published_in_order() -> Result<()> {
    let lab = Lab::with_orders(&[])?;
    let ids = lab.run("publish orders one two three")?.succeeds()?;
    let sequences: Vec<_> = ids.lines().filter_map(|id| id.rsplit('/').next()).collect();
    assert_eq!(sequences, ["1", "2", "3"]);
    assert_eq!(lab.run(READ)?.succeeds()?, "orders 1 one\norders 2 two\norders 3 three\n");
    Ok(())
}

#[test]
fn each_line_of_standard_input_is_a_message() -> Result<()> {
    let lab = Lab::with_orders(&[])?;
    let lines: String = (0..20_000).map(|number| format!("line {number}\n")).collect();
    let ids = lab.run_with_input("publish orders", lines.as_bytes())?.succeeds()?;
    assert_eq!(ids.lines().count(), 20_000);
    assert_eq!(lab.run(&format!("{READ} --raw"))?.succeeds()?, lines);
    Ok(())
}

#[test]
fn empty_lines_and_a_missing_line_end_are_messages_too() -> Result<()> {
    let lab = Lab::with_orders(&[])?;
    lab.run_with_input("publish orders --quiet", b"a\n\nb")?.succeeds()?;
    assert_eq!(lab.run(&format!("{READ} --raw"))?.succeeds()?, "a\n\nb\n");
    Ok(())
}

#[test]
fn everything_that_a_message_can_carry_arrives() -> Result<()> {
    let lab = Lab::with_orders(&[])?;
    lab.run("subscription create billing orders")?.succeeds()?;
    lab.run(
        "publish orders {} --key customer-7 --idempotency-key order-7 --attr region=eu --attr a=b=c \
         --content-type application/json --to billing --timeout 10s",
    )?
    .succeeds()?;
    let read = lab.run("subscribe --subscription billing --count 1 --json")?.succeeds()?;
    let message = &json(&read)?[0];
    assert_eq!(message["payload"], "{}");
    assert_eq!(message["ordering_key"], "customer-7");
    assert_eq!(message["idempotency_key"], "order-7");
    assert_eq!(message["attributes"]["region"], "eu");
    assert_eq!(message["attributes"]["a"], "b=c");
    assert_eq!(message["content_type"], "application/json");
    assert_eq!(message["recipients"][0], "billing");
    Ok(())
}

#[test]
fn payloads_that_are_no_text_come_in_base64() -> Result<()> {
    let lab = Lab::with_orders(&[])?;
    lab.run_with_input("publish orders", &[0xff, 0x00, b'\n'])?.succeeds()?;
    let message = &json(&lab.run(&format!("{READ} --json"))?.succeeds()?)?[0];
    assert_eq!(message["payload_base64"], "/wA=");
    assert!(message.get("payload").is_none());
    Ok(())
}

#[test]
fn a_missing_topic_is_created_only_when_asked() -> Result<()> {
    let lab = Lab::new()?;
    let error = lab.run("publish orders a")?.fails(3)?;
    assert!(error.contains("orders") && error.contains("--create"), "{error}");
    lab.run("publish orders a --create")?.succeeds()?;
    lab.run("publish orders b --create")?.succeeds()?;
    assert_eq!(lab.run(READ)?.succeeds()?, "orders 1 a\norders 2 b\n");
    Ok(())
}

#[test]
fn an_idempotency_key_makes_a_second_run_a_duplicate() -> Result<()> {
    let lab = Lab::with_orders(&[])?;
    let publish = |message: &str| lab.run(&format!("publish orders {message} --idempotency-key k"));
    let first = publish("a")?.succeeds()?;
    assert_eq!(publish("a")?.succeeds()?, format!("{} duplicate\n", first.trim_end()));
    let other = publish("b")?.fails(4)?;
    assert!(other.contains("other content"), "{other}");
    assert_eq!(lab.run(READ)?.succeeds()?, "orders 1 a\n");
    Ok(())
}

#[test]
fn one_refused_message_does_not_stop_the_others() -> Result<()> {
    let lab = Lab::new()?;
    lab.run("topic create orders --max-message-bytes 100")?.succeeds()?;
    let lines = format!("a\n{}\nb\n", "x".repeat(200));
    let ran = lab.run_with_input("publish orders --json", lines.as_bytes())?;
    let fates = json(&ran.stdout)?;
    ran.fails(7)?;
    let types: Vec<_> = fates.iter().map(|fate| fate["type"].as_str()).collect();
    assert_eq!(types, [Some("published"), Some("failed"), Some("published")]);
    assert_eq!(fates[1]["outcome"], "not_persisted");
    assert_eq!(lab.run(&format!("{READ} --raw"))?.succeeds()?, "a\nb\n");
    Ok(())
}

#[test]
fn an_unknown_recipient_is_refused() -> Result<()> {
    let lab = Lab::with_orders(&[])?;
    let error = lab.run("publish orders a --to nobody")?.fails(3)?;
    assert!(error.contains("nobody"), "{error}");
    Ok(())
}

#[test]
fn a_failure_counts_also_when_nobody_reads_the_receipts() -> Result<()> {
    let lab = Lab::new()?;
    lab.run("topic create orders --max-message-bytes 100")?.succeeds()?;
    let mut running = lab.start("publish orders")?;
    running.input(b"a\n")?;
    assert!(running.line()?.ends_with("/1"));
    running.stop_reading();
    running.input(format!("b\n{}\nc\n", "x".repeat(200)).as_bytes())?;
    running.end()?.fails(7)?;
    assert_eq!(lab.run(&format!("{READ} --raw"))?.succeeds()?, "a\nb\nc\n");
    Ok(())
}

#[test]
fn a_publisher_that_is_not_taken_in_says_so_and_can_be_left() -> Result<()> {
    let lab = Lab::with_orders(&[])?;
    let url = lab.behind_one_connection()?;
    let mut running = lab.start(&format!("publish orders a --server {url}"))?;
    assert!(running.error_line()?.contains("connection lost"));
    assert_eq!(running.interrupt()?.code, Some(130));
    let url = lab.behind_one_connection()?;
    let timeout = lab.run(&format!("publish orders a --timeout 1s --server {url}"))?.fails(5)?;
    assert!(timeout.contains("within 1s"), "{timeout}");
    assert_eq!(lab.run(READ)?.succeeds()?, "");
    Ok(())
}

#[test]
fn a_timeout_that_no_clock_can_tell_is_none() -> Result<()> {
    let lab = Lab::with_orders(&[])?;
    lab.run("publish orders a --timeout 500000000000years")?.succeeds()?;
    Ok(())
}

#[test]
fn a_batch_is_stored_whole_or_not_at_all() -> Result<()> {
    let lab = Lab::with_orders(&[])?;
    let ids = lab.run_with_input("publish orders --batch", b"one\ntwo\nthree")?.succeeds()?;
    assert_eq!(ids.lines().count(), 3);
    let stderr = lab.run("publish orders four --expect-head 2")?.fails(4)?;
    assert!(stderr.contains("is 3, and not 2"), "{stderr}");
    lab.run("publish orders four --expect-head 3 --quiet")?.succeeds()?;
    let keyed = "publish orders five six --batch --idempotency-key k --json";
    let first = json(&lab.run(keyed)?.succeeds()?)?;
    let again = json(&lab.run(keyed)?.succeeds()?)?;
    assert_eq!((&first[1]["id"], &again[1]["duplicate"]), (&again[1]["id"], &true.into()));
    let many: String = (0..1001).map(|number| format!("{number}\n")).collect();
    let stderr = lab.run_with_input("publish orders --batch", many.as_bytes())?.fails(7)?;
    assert!(stderr.contains("1001 messages") && stderr.contains("1000"), "{stderr}");
    let read = lab.run(&format!("{READ} --raw"))?.succeeds()?;
    assert_eq!(read, "one\ntwo\nthree\nfour\nfive\nsix\n");
    Ok(())
}
