//! What topics take: the requests and the types of both sides.

use bytes::Bytes;
use pubsub_proto::v1;
use tonic::Status;

use super::convert;
use super::status::{invalid, status};
use crate::broker::{Broker, PayloadFate};
use crate::limits;
use crate::schema::{
    Compatibility, PayloadRules, Problem, Schema, SchemaRecord, Verdict, Violation,
};

pub(super) async fn set(
    broker: &Broker,
    request: v1::SetSchemaRequest,
) -> Result<v1::SetSchemaResponse, Status> {
    let topic = convert::parse_topic(&request.topic)?;
    let compatibility = parse_compatibility(request.compatibility)?;
    let rules = parse_rules(request.content_type, request.schema)?;
    let set = broker.set_schema(topic, rules, compatibility).await;
    let (record, created) = set.map_err(|error| status(&error))?;
    Ok(v1::SetSchemaResponse { revision: Some(revision(&record, true)), created })
}

pub(super) fn get(
    broker: &Broker,
    request: &v1::GetSchemaRequest,
) -> Result<v1::GetSchemaResponse, Status> {
    let topic = convert::parse_topic(&request.topic)?;
    let number = (request.revision > 0).then_some(request.revision);
    let record = broker.schema(&topic, number).map_err(|error| status(&error))?;
    let revision = record.map(|record| revision(&record, true));
    Ok(v1::GetSchemaResponse { revision })
}

pub(super) fn list(
    broker: &Broker,
    request: &v1::ListSchemasRequest,
) -> Result<v1::ListSchemasResponse, Status> {
    let topic = convert::parse_topic(&request.topic)?;
    let records = broker.schemas(&topic).map_err(|error| status(&error))?;
    let revisions = records.iter().map(|record| revision(record, false)).collect();
    Ok(v1::ListSchemasResponse { revisions })
}

pub(super) async fn check(
    broker: &Broker,
    request: v1::CheckSchemaRequest,
) -> Result<v1::CheckSchemaResponse, Status> {
    let v1::CheckSchemaRequest { topic, content_type, schema, payloads } = request;
    let topic = convert::parse_topic(&topic)?;
    let (count, limit) = (payloads.len(), limits::MAX_BATCH_MESSAGES);
    let (bytes, bytes_limit) =
        (payloads.iter().map(Bytes::len).sum::<usize>(), limits::MAX_COMMIT_BYTES);
    if count > limit || bytes > bytes_limit {
        let text =
            format!("payloads: {count} with {bytes} bytes; {limit} with {bytes_limit} are allowed");
        return Err(invalid(text));
    }
    let compares = schema.is_some() || !content_type.is_empty();
    let rules = compares.then(|| parse_rules(content_type, schema)).transpose()?;
    let check = broker.check_schema(&topic, rules, payloads).await;
    let check = check.map_err(|error| status(&error))?;
    Ok(v1::CheckSchemaResponse {
        current_revision: check.current,
        matching_revision: check.matching,
        problems: check.problems.into_iter().map(problem).collect(),
        publisher_problems: check.publisher_problems.into_iter().map(problem).collect(),
        payloads: check.payloads.into_iter().map(payload).collect(),
    })
}

fn parse_compatibility(compatibility: i32) -> Result<Compatibility, Status> {
    match v1::SchemaCompatibility::try_from(compatibility) {
        Ok(v1::SchemaCompatibility::Unspecified | v1::SchemaCompatibility::Backward) => {
            Ok(Compatibility::Backward)
        }
        Ok(v1::SchemaCompatibility::None) => Ok(Compatibility::None),
        Err(_) => {
            Err(invalid(format!("compatibility {compatibility} is not known to this server")))
        }
    }
}

fn parse_rules(
    mut content_type: String,
    schema: Option<v1::Schema>,
) -> Result<PayloadRules, Status> {
    let limit = limits::MAX_KEY_BYTES;
    if content_type.len() > limit {
        let size = content_type.len();
        return Err(invalid(format!("content_type has {size} bytes; {limit} are allowed")));
    }
    let schema = schema.map(parse_schema).transpose()?;
    if let Some(schema) = &schema
        && content_type.is_empty()
    {
        content_type = schema.content_type().to_owned();
    }
    Ok(PayloadRules { content_type, schema })
}

fn parse_schema(schema: v1::Schema) -> Result<Schema, Status> {
    let kind = schema.kind();
    let v1::Schema { definition, message_name: message, .. } = schema;
    match kind {
        v1::SchemaKind::Json if !message.is_empty() => {
            Err(invalid("schema.message_name is for schemas of kind PROTOBUF"))
        }
        v1::SchemaKind::Json => Ok(Schema::Json { text: definition.into() }),
        v1::SchemaKind::Protobuf => {
            Ok(Schema::Protobuf { descriptors: definition.into(), message })
        }
        v1::SchemaKind::Unspecified => Err(invalid("schema.kind is missing, or not known")),
    }
}

fn revision(record: &SchemaRecord, whole: bool) -> v1::SchemaRevision {
    let SchemaRecord { revision, rules, compatibility, created_at } = record;
    let compatibility = match compatibility {
        Compatibility::Backward => v1::SchemaCompatibility::Backward,
        Compatibility::None => v1::SchemaCompatibility::None,
    };
    v1::SchemaRevision {
        revision: *revision,
        content_type: rules.content_type.clone(),
        schema: rules.schema.as_ref().map(|schema| wire(schema, whole)),
        compatibility: compatibility.into(),
        create_time: convert::timestamp(*created_at),
    }
}

fn wire(schema: &Schema, whole: bool) -> v1::Schema {
    let (kind, definition, message_name) = match schema {
        Schema::Json { text } => (v1::SchemaKind::Json, text, ""),
        Schema::Protobuf { descriptors, message } => {
            (v1::SchemaKind::Protobuf, descriptors, message.as_str())
        }
    };
    let definition = if whole { Bytes::copy_from_slice(definition) } else { Bytes::new() };
    v1::Schema { kind: kind.into(), definition, message_name: message_name.to_owned() }
}

fn problem(problem: Problem) -> v1::SchemaProblem {
    let Problem { path, keyword, verdict, detail } = problem;
    let undecided = verdict == Verdict::Undecided;
    v1::SchemaProblem { path, keyword: keyword.to_owned(), undecided, detail }
}

fn payload(fate: PayloadFate) -> v1::PayloadCheck {
    let Err(violation) = fate else {
        return v1::PayloadCheck { valid: true, ..v1::PayloadCheck::default() };
    };
    let (field, detail) = match violation {
        Violation::Payload { field, detail } => (field, detail),
        violation @ Violation::ContentType { .. } => (String::new(), violation.to_string()),
    };
    v1::PayloadCheck { valid: false, field, detail }
}
