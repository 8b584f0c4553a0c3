//! `pubsub subscribe`.

use anyhow::Result;

use crate::harness::{Lab, json};

#[test]
fn a_reader_leaves_nothing_behind() -> Result<()> {
    let lab = Lab::with_orders(&["a", "b"])?;
    for _ in 0..2 {
        let read = lab.run("subscribe orders --from earliest --until-caught-up")?;
        assert_eq!(read.succeeds()?, "orders 1 a\norders 2 b\n");
    }
    assert_eq!(lab.run("subscription list --json")?.succeeds()?, "");
    Ok(())
}

#[test]
fn readers_start_where_they_are_told() -> Result<()> {
    let lab = Lab::with_orders(&["a", "b", "c"])?;
    let read = |from: &str| lab.run(&format!("subscribe orders --until-caught-up --from {from}"));
    assert_eq!(read("2")?.succeeds()?, "orders 2 b\norders 3 c\n");
    assert_eq!(read("10m")?.succeeds()?.lines().count(), 3);
    assert_eq!(read("2020-01-01T00:00:00Z")?.succeeds()?.lines().count(), 3);
    assert_eq!(read("latest")?.succeeds()?, "");
    lab.run("subscribe nowhere --until-caught-up")?.fails(3)?;
    Ok(())
}

#[test]
fn several_topics_and_patterns_come_in_one_stream() -> Result<()> {
    let lab = Lab::with_orders(&["a"])?;
    lab.run("publish sensors.1 b --create")?.succeeds()?;
    lab.run("publish sensors.2 c --create")?.succeeds()?;
    let args = ["subscribe", "orders", "sensors.*", "--from", "earliest", "--until-caught-up"];
    let stdout = lab.run_args(&args)?.succeeds()?;
    let mut lines: Vec<_> = stdout.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["orders 1 a", "sensors.1 1 b", "sensors.2 1 c"]);
    Ok(())
}

#[test]
fn a_subscription_goes_on_where_it_was() -> Result<()> {
    let lab = Lab::with_orders(&["a", "b", "c"])?;
    let first = lab.run("subscribe orders --subscription billing --from earliest --count 2")?;
    assert_eq!(first.succeeds()?, "orders 1 a\norders 2 b\n");
    let second = lab.run("subscribe --subscription billing --count 1")?;
    assert_eq!(second.succeeds()?, "orders 3 c\n");
    let third = lab.run("subscribe --subscription billing --until-caught-up")?;
    assert_eq!(third.succeeds()?, "");
    lab.run("subscribe --subscription nobody")?.fails(3)?;
    lab.run("subscribe orders elsewhere --subscription billing")?.fails(4)?;
    Ok(())
}

#[test]
fn without_acks_everything_comes_again() -> Result<()> {
    let lab = Lab::with_orders(&["a", "b"])?;
    lab.run("subscription create billing orders --from earliest")?.succeeds()?;
    for _ in 0..2 {
        let look = lab.run("subscribe --subscription billing --no-ack --count 2")?;
        assert_eq!(look.succeeds()?, "orders 1 a\norders 2 b\n");
    }
    Ok(())
}

#[test]
fn a_look_at_more_than_can_be_held_ends() -> Result<()> {
    let lab = Lab::with_orders(&[])?;
    let input: String = (0..1001).map(|n| format!("{n}\n")).collect();
    lab.run_with_input("publish orders", input.as_bytes())?.succeeds()?;
    lab.run("subscription create billing orders --from earliest")?.succeeds()?;
    let look = lab.run("subscribe --subscription billing --no-ack --until-caught-up")?;
    assert_eq!(look.stdout.lines().count(), 1000);
    let error = look.fails(7)?;
    assert!(error.contains("a reader"), "{error}");
    Ok(())
}

#[test]
fn a_start_that_does_not_count_is_told() -> Result<()> {
    let lab = Lab::with_orders(&["a"])?;
    lab.run("subscription create billing orders")?.succeeds()?;
    let ran =
        lab.run("subscribe orders --subscription billing --from earliest --until-caught-up")?;
    assert!(ran.stderr.contains("subscription seek"), "{ran:?}");
    assert_eq!(ran.succeeds()?, "");
    Ok(())
}

#[test]
fn ctrl_c_stops_in_order_and_what_was_printed_is_acked() -> Result<()> {
    let lab = Lab::with_orders(&["a", "b"])?;
    lab.run("subscription create billing orders --from earliest")?.succeeds()?;
    let mut running = lab.start("subscribe --subscription billing")?;
    assert_eq!(running.line()?, "orders 1 a");
    assert_eq!(running.line()?, "orders 2 b");
    let ran = running.interrupt()?;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let described = lab.run("subscription describe billing --json")?.succeeds()?;
    assert_eq!(json(&described)?[0]["positions"][0]["backlog"], 0);
    Ok(())
}

#[test]
fn ctrl_c_before_all_was_printed_is_told_by_the_exit_code() -> Result<()> {
    let lab = Lab::with_orders(&["a", "b"])?;
    let mut running = lab.start("subscribe orders --from earliest --count 3")?;
    assert_eq!(running.line()?, "orders 1 a");
    assert_eq!(running.line()?, "orders 2 b");
    let ran = running.interrupt()?;
    assert_eq!(ran.code, Some(130), "{ran:?}");
    Ok(())
}

#[test]
fn a_subscriber_that_is_not_taken_in_says_so_and_can_be_left() -> Result<()> {
    let lab = Lab::with_orders(&["a"])?;
    let url = lab.behind_one_connection()?;
    let mut running = lab.start(&format!("subscribe orders --server {url}"))?;
    assert!(running.error_line()?.contains("connection lost"));
    assert_eq!(running.interrupt()?.code, Some(130));
    Ok(())
}

#[test]
fn a_reader_of_the_output_that_leaves_is_no_error() -> Result<()> {
    let lab = Lab::with_orders(&["a"])?;
    let mut running = lab.start("subscribe orders --from earliest")?;
    assert_eq!(running.line()?, "orders 1 a");
    running.stop_reading();
    lab.run("publish orders b")?.succeeds()?;
    let ran = running.end()?;
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""));
    Ok(())
}

#[test]
fn a_restart_of_the_server_shows_on_standard_error_only() -> Result<()> {
    let mut lab = Lab::with_orders(&["a"])?;
    let mut running = lab.start("subscribe orders --subscription billing --from earliest")?;
    assert_eq!(running.line()?, "orders 1 a");
    lab.restart()?;
    lab.run("publish orders b")?.succeeds()?;
    assert_eq!(running.line()?, "orders 2 b");
    let ran = running.interrupt()?;
    assert!(ran.stderr.contains("reconnected after"), "{ran:?}");
    assert_eq!(ran.succeeds()?, "");
    Ok(())
}

#[test]
fn a_second_consumer_of_another_name_stands_by() -> Result<()> {
    let lab = Lab::with_orders(&["a", "b"])?;
    lab.run("subscription create billing orders --from earliest")?.succeeds()?;
    let mut first = lab.start("subscribe --subscription billing --consumer one")?;
    assert_eq!(first.line()?, "orders 1 a");
    assert_eq!(first.line()?, "orders 2 b");
    let mut second = lab.start("subscribe --subscription billing --consumer two --count 1")?;
    first.interrupt()?.succeeds()?;
    lab.run("publish orders c")?.succeeds()?;
    assert_eq!(second.line()?, "orders 3 c");
    second.end()?.succeeds()?;
    Ok(())
}

#[test]
fn a_consumer_that_is_superseded_says_why_it_ends() -> Result<()> {
    let lab = Lab::with_orders(&["a"])?;
    let mut first = lab.start("subscribe orders --subscription billing --from earliest")?;
    assert_eq!(first.line()?, "orders 1 a");
    lab.run("subscribe --subscription billing --until-caught-up")?.succeeds()?;
    let error = first.end()?.fails(4)?;
    assert!(error.contains("--consumer"), "{error}");
    Ok(())
}

#[test]
fn a_filter_prints_what_matches_only() -> Result<()> {
    let lab = Lab::with_orders(&["a", "b"])?;
    lab.run("publish orders c --attr region=eu")?.succeeds()?;
    lab.run("publish orders d --attr region=us")?.succeeds()?;
    let eu = "attributes.region = \"eu\"";
    let read = ["subscribe", "orders", "--from", "earliest", "--until-caught-up", "--filter"];
    let shown = |args: &[&str], filter| lab.run_args(&[args, &[filter]].concat());
    assert_eq!(shown(&read, eu)?.succeeds()?, "orders 3 c\n");
    assert_eq!(shown(&read, "NOT attributes:region")?.succeeds()?, "orders 1 a\norders 2 b\n");
    let refused = shown(&read, "region = eu")?.fails(2)?;
    assert!(refused.contains("at column 1: expected attributes"), "{refused}");

    let create = ["subscription", "create", "billing", "orders", "--from", "earliest", "--filter"];
    shown(&create, eu)?.succeeds()?;
    let described = lab.run("subscription describe billing")?.succeeds()?;
    assert!(described.contains(eu), "{described}");
    let described = json(&lab.run("subscription describe billing --json")?.succeeds()?)?;
    assert_eq!(described[0]["filter"], eu);
    let consume = ["subscribe", "--subscription", "billing", "--until-caught-up", "--filter"];
    assert_eq!(shown(&consume, eu)?.succeeds()?, "orders 3 c\n");
    shown(&consume, "attributes:region")?.fails(4)?;
    Ok(())
}
