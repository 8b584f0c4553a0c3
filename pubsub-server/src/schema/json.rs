//! JSON Schema, by the `jsonschema` crate, kept from reaching out and from taking long.

use jsonschema::{PatternOptions, Validator};
use serde_json::Value;

use super::{InvalidSchema, Violation, shortened};
use crate::limits;

/// A schema that is ready for use.
#[derive(Debug)]
pub(super) struct Json {
    validator: Validator,
}

/// The compiled size of one pattern: enough for any that a person writes.
const MAX_PATTERN_BYTES: usize = 512 * 1024;

impl Json {
    pub(super) fn compile(text: &[u8]) -> Result<Self, InvalidSchema> {
        let schema = parse(text)?;
        let patterns = patterns(&schema);
        if patterns > limits::MAX_SCHEMA_PATTERNS {
            let limit = limits::MAX_SCHEMA_PATTERNS;
            return Err(InvalidSchema(format!("it has {patterns} patterns; {limit} are allowed")));
        }
        // References to other documents are refused, and nothing is fetched. The patterns are of
        // the engine that takes linear time: no message can make them take longer.
        let options = jsonschema::options()
            .offline()
            .should_validate_formats(false)
            .with_pattern_options(PatternOptions::regex().size_limit(MAX_PATTERN_BYTES));
        let validator = options.build(&schema).map_err(|error| {
            let place = error.instance_path().to_string();
            let text = format!("{place}{}{error}", if place.is_empty() { "" } else { ": " });
            InvalidSchema(shortened(text, limits::MAX_REFUSAL_BYTES))
        })?;
        Ok(Self { validator })
    }

    pub(super) fn check(&self, payload: &[u8]) -> Result<(), Violation> {
        let payload: Value = serde_json::from_slice(payload)
            .map_err(|error| Violation::payload(String::new(), format!("not JSON: {error}")))?;
        self.validator.validate(&payload).map_err(|error| {
            // Masked: what is refused may be kept for long, and payloads are nobody's business.
            Violation::payload(error.instance_path().to_string(), error.masked().to_string())
        })
    }
}

/// A schema as a value; `serde_json` bounds its depth.
pub(super) fn parse(text: &[u8]) -> Result<Value, InvalidSchema> {
    match serde_json::from_slice(text) {
        Ok(schema @ (Value::Object(_) | Value::Bool(_))) => Ok(schema),
        Ok(_) => Err(InvalidSchema("it is neither an object nor a boolean".to_owned())),
        Err(error) => Err(InvalidSchema(format!("it is not JSON: {error}"))),
    }
}

/// Whether two texts are the same value.
pub(super) fn is_same(one: &[u8], other: &[u8]) -> bool {
    one == other || parse(one).is_ok_and(|one| parse(other).is_ok_and(|other| one == other))
}

fn patterns(schema: &Value) -> usize {
    match schema {
        Value::Object(members) => {
            let own = |(name, value): (&String, &Value)| match (name.as_str(), value) {
                ("pattern", Value::String(_)) => 1,
                ("patternProperties", Value::Object(members)) => members.len(),
                _ => 0,
            };
            members.iter().map(|member| own(member) + patterns(member.1)).sum()
        }
        Value::Array(items) => items.iter().map(patterns).sum(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => 0,
    }
}
