//! `pubsub schema`.

use anyhow::Result;

use crate::harness::{Lab, json};

const ORDER: &str =
    r#"{"type": "object", "required": ["id"], "properties": {"id": {"type": "integer"}}}"#;

/// A lab with a topic `orders`, and the path of a file with this text.
fn lab(schema: &str) -> Result<(Lab, tempfile::NamedTempFile, String)> {
    let (file, path) = file(schema)?;
    Ok((Lab::with_orders(&[])?, file, path))
}

fn file(text: &str) -> Result<(tempfile::NamedTempFile, String)> {
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), text)?;
    let path = file.path().to_string_lossy().into_owned();
    Ok((file, path))
}

#[test]
fn what_a_topic_takes_is_set_and_shown() -> Result<()> {
    let (lab, _file, path) = lab(ORDER)?;
    let none = lab.run("schema show orders")?.succeeds()?;
    assert_eq!(none, "topic orders takes everything; no schema was ever set\n");
    let set = format!("schema set orders --json-schema {path}");
    assert_eq!(lab.run(&set)?.succeeds()?, "set revision 1 of topic orders\n");
    assert_eq!(lab.run(&set)?.succeeds()?, "set already: revision 1 of topic orders\n");
    let shown = lab.run("schema show orders")?.succeeds()?;
    assert!(
        shown.contains("application/json") && shown.ends_with(&format!("\n{ORDER}\n")),
        "{shown}"
    );
    let shown = lab.run("schema show orders --json")?.succeeds()?;
    let shown = &json(&shown)?[0];
    assert_eq!((&shown["revision"], &shown["kind"]), (&1.into(), &"json".into()));
    assert_eq!(shown["json_schema"]["required"][0], "id");
    lab.run("schema set orders --anything")?.succeeds()?;
    let all = lab.run("schema show orders --all")?.succeeds()?;
    assert_eq!(all.lines().count(), 3, "{all}");
    lab.run("schema set orders")?.fails(2)?;
    Ok(())
}

#[test]
fn a_schema_that_breaks_what_was_promised_is_a_conflict() -> Result<()> {
    let (lab, _file, path) = lab(ORDER)?;
    lab.run(&format!("schema set orders --json-schema {path}"))?.succeeds()?;
    let (_next, next) = file(&ORDER.replace("\"id\"]", "\"id\", \"total\"]"))?;
    let stderr = lab.run(&format!("schema set orders --json-schema {next}"))?.fails(4)?;
    assert!(stderr.contains("/required") && stderr.contains("--compatibility none"), "{stderr}");
    let checked = lab.run(&format!("schema check orders --json-schema {next}"))?;
    assert_eq!(checked.code, Some(4));
    let check = format!("schema check orders --json-schema {next} --json");
    let checked = json(&lab.run(&check)?.stdout)?;
    assert_eq!(checked[0]["problems"][0]["keyword"], "required");
    let set = format!("schema set orders --json-schema {next} --compatibility none");
    assert_eq!(lab.run(&set)?.succeeds()?, "set revision 2 of topic orders\n");
    Ok(())
}

#[test]
fn payloads_are_checked_without_being_published() -> Result<()> {
    let (lab, _file, path) = lab(ORDER)?;
    lab.run(&format!("schema set orders --json-schema {path}"))?.succeeds()?;
    let lines: String = (1..=1000).map(|id| format!("{{\"id\": {id}}}\n")).collect();
    let told = lab.run_with_input("schema check orders", lines.as_bytes())?.succeeds()?;
    assert!(told.lines().count() == 1000 && told.ends_with("line 1000: valid\n"), "{told}");
    let told = lab.run_with_input("schema check orders", b"{\"id\": 1}\n{\"id\": \"1\"}\n")?;
    assert_eq!((told.code, told.stdout.lines().count()), (Some(1), 2));
    assert!(told.stdout.contains("line 2: /id: "), "{}", told.stdout);
    let (_payload, payload) = file("{}")?;
    let told = lab.run(&format!("schema check orders {payload} --json"))?;
    assert_eq!(json(&told.stdout)?[0]["valid"], false);
    let read = lab.run("subscribe orders --from earliest --until-caught-up")?.succeeds()?;
    assert_eq!(read, "");
    Ok(())
}

#[test]
fn a_payload_that_is_not_taken_is_a_conflict_with_its_field() -> Result<()> {
    let (lab, _file, path) = lab(ORDER)?;
    lab.run(&format!("schema set orders --json-schema {path}"))?.succeeds()?;
    let stderr = lab.run_with_input("publish orders", b"{\"id\": true}")?.fails(4)?;
    assert!(stderr.contains("topic orders, schema revision 1: /id: "), "{stderr}");
    lab.run_with_input("publish orders", b"{\"id\": 1}")?.succeeds()?;
    let read = lab.run("subscribe orders --from earliest --until-caught-up --json")?.succeeds()?;
    let message = &json(&read)?[0];
    assert_eq!(message["schema_revision"], 1);
    assert_eq!(message["content_type"], "application/json");
    Ok(())
}
