//! `pubsub schema`.

use pubsub_client::{
    Client, Compatibility, InvalidPayload, PayloadRules, Schema as PayloadSchema, SchemaCheck,
    SchemaKind, SchemaProblem, SchemaRevision,
};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, BufReader};

use crate::args::{CheckSchema, Rules, Schema, SetSchema};
use crate::failure::{Exit, Failure};
use crate::format;
use crate::output::Output;

/// Payloads of one request.
const MAX_PAYLOADS: usize = 512;
/// Bytes of the payloads of one request, beside one of any size.
const MAX_BYTES: usize = 3 * 1024 * 1024;

pub(crate) async fn run(
    command: Schema,
    client: &Client,
    output: &mut Output,
) -> Result<Exit, Failure> {
    match command {
        Schema::Set(args) => set(args, client, output).await,
        Schema::Show { topic, revision, all: false } => {
            show(&topic, revision, client, output).await
        }
        Schema::Show { topic, all: true, .. } => list(&topic, client, output).await,
        Schema::Check(args) => check(args, client, output).await,
    }
}

fn read(file: &str) -> Result<Vec<u8>, Failure> {
    std::fs::read(file).map_err(|error| Failure::usage(format!("{file} cannot be read: {error}")))
}

/// The rules that the arguments name, if any.
fn rules(args: &Rules) -> Result<Option<PayloadRules>, Failure> {
    let schema = match (&args.json_schema, &args.protobuf, &args.message) {
        (Some(file), _, _) => Some(PayloadSchema::json(read(file)?)),
        (None, Some(file), Some(message)) => Some(PayloadSchema::protobuf(read(file)?, message)),
        (None, _, _) => None,
    };
    if schema.is_none() && args.content_type.is_none() {
        return Ok(None);
    }
    let mut rules = PayloadRules::new();
    rules.schema = schema;
    rules.content_type = args.content_type.clone();
    Ok(Some(rules))
}

async fn set(args: SetSchema, client: &Client, output: &mut Output) -> Result<Exit, Failure> {
    let rules = match (rules(&args.rules)?, args.anything) {
        (Some(rules), _) => rules,
        (None, true) => PayloadRules::new(),
        (None, false) => {
            let text = "name what the topic takes: --json-schema, --protobuf, --content-type or --anything";
            return Err(Failure::usage(text));
        }
    };
    let keep = args.compatibility.compatibility();
    let (revision, created) = client.admin().set_schema(&args.topic, rules, keep).await?;
    if output.is_json() {
        let mut value = revision_json(&args.topic, &revision);
        value["created"] = created.into();
        output.json(&value)?;
    } else {
        let done = if created { "set" } else { "set already:" };
        output.line(&format!("{done} revision {} of topic {}", revision.revision, args.topic))?;
    }
    Ok(Exit::Ok)
}

async fn show(
    topic: &str,
    number: Option<u32>,
    client: &Client,
    output: &mut Output,
) -> Result<Exit, Failure> {
    let Some(revision) = client.admin().schema(topic, number).await? else {
        if output.is_json() {
            output.json(&json!({ "topic": topic, "revision": null }))?;
        } else {
            output.line(&format!("topic {topic} takes everything; no schema was ever set"))?;
        }
        return Ok(Exit::Ok);
    };
    let (kind, definition) = match &revision.rules.schema {
        None => ("-".to_owned(), None),
        Some(schema) => (kind(schema), text(schema)),
    };
    output.fields(
        &revision_json(topic, &revision),
        &[
            ("topic", topic.to_owned()),
            ("revision", revision.revision.to_string()),
            ("set", format::time(revision.create_time)),
            ("compatibility", keeps(revision.compatibility).to_owned()),
            ("content type", revision.rules.content_type.clone().unwrap_or("-".to_owned())),
            ("schema", kind),
        ],
    )?;
    if let Some(definition) = definition.filter(|_| !output.is_json()) {
        output.line(&format!("\n{}", definition.trim_end()))?;
    }
    Ok(Exit::Ok)
}

async fn list(topic: &str, client: &Client, output: &mut Output) -> Result<Exit, Failure> {
    let revisions = client.admin().schemas(topic).await?;
    if output.is_json() {
        for revision in &revisions {
            output.json(&revision_json(topic, revision))?;
        }
        return Ok(Exit::Ok);
    }
    let row = |revision: &SchemaRevision| {
        let rules = &revision.rules;
        [
            revision.revision.to_string(),
            format::time(revision.create_time),
            keeps(revision.compatibility).to_owned(),
            rules.content_type.clone().unwrap_or("-".to_owned()),
            rules.schema.as_ref().map_or("-".to_owned(), kind),
        ]
    };
    let rows: Vec<_> = revisions.iter().map(row).collect();
    output.table(["REVISION", "SET", "COMPATIBILITY", "CONTENT TYPE", "SCHEMA"], &rows)?;
    Ok(Exit::Ok)
}

fn kind(schema: &PayloadSchema) -> String {
    match (schema.kind, &schema.message_name) {
        (SchemaKind::Protobuf, Some(name)) => format!("protobuf {name}"),
        (SchemaKind::Protobuf, None) => "protobuf".to_owned(),
        (SchemaKind::Json, _) => "JSON Schema".to_owned(),
        _ => "unknown".to_owned(),
    }
}

fn keeps(compatibility: Compatibility) -> &'static str {
    match compatibility {
        Compatibility::Backward => "backward",
        Compatibility::None => "none",
        _ => "unknown",
    }
}

fn text(schema: &PayloadSchema) -> Option<String> {
    let is_text = schema.kind == SchemaKind::Json && !schema.definition.is_empty();
    is_text.then(|| String::from_utf8_lossy(&schema.definition).into_owned())
}

fn revision_json(topic: &str, revision: &SchemaRevision) -> Value {
    let schema = revision.rules.schema.as_ref();
    let definition = schema.and_then(text);
    let parsed = definition.and_then(|text| serde_json::from_str::<Value>(&text).ok());
    json!({
        "topic": topic,
        "revision": revision.revision,
        "create_time": format::time(revision.create_time),
        "compatibility": keeps(revision.compatibility),
        "content_type": revision.rules.content_type,
        "kind": schema.map(|schema| match schema.kind {
            SchemaKind::Json => "json",
            SchemaKind::Protobuf => "protobuf",
            _ => "unknown",
        }),
        "message_name": schema.and_then(|schema| schema.message_name.clone()),
        "json_schema": parsed,
        "descriptors_base64": schema
            .filter(|schema| schema.kind == SchemaKind::Protobuf && !schema.definition.is_empty())
            .map(|schema| format::base64(&schema.definition)),
    })
}

async fn check(args: CheckSchema, client: &Client, output: &mut Output) -> Result<Exit, Failure> {
    let rules = rules(&args.rules)?;
    let mut checker =
        Checker { topic: &args.topic, rules: rules.clone(), client, output, invalid: 0 };
    let mut exit = Exit::Ok;
    if rules.is_some() {
        let check = checker.ask(Vec::new()).await?;
        checker.tell_schema(&check)?;
        if !check.problems.is_empty() {
            exit = Exit::Conflict;
        }
    }
    let lines = args.payloads.is_empty() && rules.is_none();
    let files = args.payloads.iter().map(String::as_str);
    for file in files.chain(lines.then_some("-")) {
        match file {
            "-" => checker.lines().await?,
            file => checker.payloads(vec![(file.to_owned(), read(file)?)]).await?,
        }
    }
    Ok(if exit == Exit::Ok && checker.invalid > 0 { Exit::Failed } else { exit })
}

struct Checker<'a> {
    topic: &'a str,
    rules: Option<PayloadRules>,
    client: &'a Client,
    output: &'a mut Output,
    invalid: u64,
}

impl Checker<'_> {
    async fn ask(&self, payloads: Vec<Vec<u8>>) -> Result<SchemaCheck, Failure> {
        let payloads = payloads.into_iter().map(Into::into).collect();
        let rules = self.rules.clone();
        Ok(self.client.admin().check_schema(self.topic, rules, payloads).await?)
    }

    async fn lines(&mut self) -> Result<(), Failure> {
        let mut lines = BufReader::new(tokio::io::stdin()).split(b'\n');
        let failed = |error| Failure::failed(format!("standard input cannot be read: {error}"));
        let (mut waiting, mut bytes, mut number) = (Vec::new(), 0, 0_u64);
        while let Some(line) = lines.next_segment().await.map_err(failed)? {
            number += 1;
            if waiting.len() >= MAX_PAYLOADS || bytes + line.len() > MAX_BYTES {
                bytes = 0;
                self.payloads(std::mem::take(&mut waiting)).await?;
            }
            bytes += line.len();
            waiting.push((format!("line {number}"), line));
        }
        self.payloads(waiting).await
    }

    async fn payloads(&mut self, payloads: Vec<(String, Vec<u8>)>) -> Result<(), Failure> {
        if payloads.is_empty() {
            return Ok(());
        }
        let (names, payloads): (Vec<_>, Vec<_>) = payloads.into_iter().unzip();
        let check = self.ask(payloads).await?;
        for (name, fate) in names.iter().zip(&check.payloads) {
            self.tell_payload(name, fate)?;
        }
        Ok(())
    }

    fn tell_payload(
        &mut self,
        name: &str,
        fate: &Result<(), InvalidPayload>,
    ) -> Result<(), Failure> {
        self.invalid += u64::from(fate.is_err());
        if self.output.is_json() {
            let error = fate.as_ref().err();
            self.output.json(&json!({
                "type": "payload",
                "name": name,
                "valid": error.is_none(),
                "field": error.map(|error| error.field.clone()),
                "detail": error.map(|error| error.detail.clone()),
            }))?;
        } else if let Err(error) = fate {
            self.output.line(&format!("{name}: {error}"))?;
        } else {
            self.output.line(&format!("{name}: valid"))?;
        }
        Ok(())
    }

    fn tell_schema(&mut self, check: &SchemaCheck) -> Result<(), Failure> {
        if self.output.is_json() {
            self.output.json(&json!({
                "type": "schema",
                "topic": self.topic,
                "current_revision": check.current_revision,
                "matching_revision": check.matching_revision,
                "problems": problems(&check.problems),
                "publisher_problems": problems(&check.publisher_problems),
            }))?;
            return Ok(());
        }
        let line = match (check.current_revision, check.matching_revision) {
            (None, _) => "the topic has no schema yet".to_owned(),
            (Some(current), Some(same)) if same == current => {
                format!("it is revision {current}, the present one")
            }
            (Some(current), _) if check.problems.is_empty() => {
                format!("it can follow revision {current}")
            }
            (Some(current), _) => format!("it cannot follow revision {current}"),
        };
        self.output.line(&line)?;
        for problem in &check.problems {
            self.output.line(&format!("  {problem}"))?;
        }
        Ok(())
    }
}

fn problems(problems: &[SchemaProblem]) -> Vec<Value> {
    let problem = |problem: &SchemaProblem| {
        json!({
            "path": problem.path,
            "keyword": problem.keyword,
            "undecided": problem.undecided,
            "detail": problem.detail,
        })
    };
    problems.iter().map(problem).collect()
}
