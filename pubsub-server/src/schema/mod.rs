//! What a topic takes: media types and schemas, how payloads are checked with them, and whether a
//! new one keeps what the present one promised. Bytes in, a typed error out: no I/O, no clock.

use serde::{Deserialize, Serialize};

use crate::limits;
use crate::record::Timestamp;

mod json;
mod json_evolution;
#[cfg(test)]
mod json_tests;
mod protobuf;
mod protobuf_evolution;
#[cfg(test)]
mod protobuf_tests;

/// What a topic takes from one revision on, as stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SchemaRecord {
    /// Counts the revisions of the topic, from 1.
    pub revision: u32,
    /// What is taken.
    pub rules: PayloadRules,
    /// What it kept of the revision before.
    pub compatibility: Compatibility,
    /// When it was set.
    pub created_at: Timestamp,
}

/// Which payloads are taken.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PayloadRules {
    /// Their media type; empty for any.
    pub content_type: String,
    /// What they look like.
    pub schema: Option<Schema>,
}

/// A schema as its author wrote it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Schema {
    /// JSON Schema.
    Json {
        /// Its text.
        text: Vec<u8>,
    },
    /// A message type of Protocol Buffers.
    Protobuf {
        /// An encoded `FileDescriptorSet` with all imports.
        descriptors: Vec<u8>,
        /// The full name of the type.
        message: String,
    },
}

/// What a new revision has to keep of the present one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Compatibility {
    /// What was written by the present one can be read by the new one.
    Backward,
    /// Nothing.
    None,
}

/// A schema that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the schema is not usable: {0}")]
pub struct InvalidSchema(String);

/// Why a payload is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Its media type is not that of the topic.
    #[error("the content type is {found:?} and not {expected:?}")]
    ContentType {
        /// That of the topic.
        expected: String,
        /// Its own.
        found: String,
    },
    /// It does not look as the schema says. The text has nothing of the payload but names.
    #[error("{}: {detail}", if field.is_empty() { "the payload" } else { field.as_str() })]
    Payload {
        /// Where: a JSON pointer or the path of a protobuf field; empty for all of it.
        field: String,
        /// What about it.
        detail: String,
    },
}

/// Something about a new schema that is in the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where: a JSON pointer into the new schema, or the path of a protobuf field.
    pub path: String,
    /// The keyword or property.
    pub keyword: &'static str,
    /// Whether it breaks something, or nobody can tell.
    pub verdict: Verdict,
    /// For people.
    pub detail: String,
}

/// How bad a [`Problem`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Some old payloads are not valid any more.
    Breaks,
    /// The check cannot tell.
    Undecided,
}

/// Rules that are ready to be checked.
#[derive(Debug)]
pub struct Checker {
    content_type: String,
    schema: Option<Compiled>,
}

#[derive(Debug)]
enum Compiled {
    Json(json::Json),
    Protobuf(protobuf::Protobuf),
}

impl Schema {
    /// Bytes of the definition.
    pub fn len(&self) -> usize {
        match self {
            Self::Json { text } => text.len(),
            Self::Protobuf { descriptors, .. } => descriptors.len(),
        }
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The media type of payloads, unless the author names another one.
    pub fn content_type(&self) -> &'static str {
        match self {
            Self::Json { .. } => "application/json",
            Self::Protobuf { .. } => "application/protobuf",
        }
    }

    fn compile(&self) -> Result<Compiled, InvalidSchema> {
        if self.len() > limits::MAX_SCHEMA_BYTES {
            let (size, limit) = (self.len(), limits::MAX_SCHEMA_BYTES);
            return Err(InvalidSchema(format!("it has {size} bytes; {limit} are allowed")));
        }
        Ok(match self {
            Self::Json { text } => Compiled::Json(json::Json::compile(text)?),
            Self::Protobuf { descriptors, message } => {
                Compiled::Protobuf(protobuf::Protobuf::compile(descriptors, message)?)
            }
        })
    }

    fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Json { text }, Self::Json { text: other }) => json::is_same(text, other),
            (
                Self::Protobuf { descriptors, message },
                Self::Protobuf { descriptors: others, message: other },
            ) => message == other && protobuf::is_same(descriptors, others),
            (Self::Json { .. }, Self::Protobuf { .. })
            | (Self::Protobuf { .. }, Self::Json { .. }) => false,
        }
    }
}

impl PayloadRules {
    /// Bytes of the definition.
    pub fn len(&self) -> usize {
        self.schema.as_ref().map_or(0, Schema::len)
    }

    /// Whether everything is taken.
    pub fn is_empty(&self) -> bool {
        self.content_type.is_empty() && self.schema.is_none()
    }

    /// Whether these are the same rules, however they are written down.
    pub fn is(&self, other: &Self) -> bool {
        let schemas = match (&self.schema, &other.schema) {
            (Some(one), Some(other)) => one.is(other),
            (None, None) => true,
            (Some(_), None) | (None, Some(_)) => false,
        };
        schemas && is_same_type(&self.content_type, &other.content_type)
    }

    /// Makes them ready for use. This can take long: milliseconds for a large schema.
    ///
    /// # Errors
    ///
    /// If the schema is malformed, too large, or refers to something outside of itself.
    pub fn compile(&self) -> Result<Checker, InvalidSchema> {
        let schema = self.schema.as_ref().map(Schema::compile).transpose()?;
        Ok(Checker { content_type: self.content_type.clone(), schema })
    }

    /// What keeps all payloads that were valid by these rules from being valid by `new` ones, both
    /// of which can be used.
    pub fn problems_with(&self, new: &Self) -> Vec<Problem> {
        let mut problems = Vec::new();
        if !new.content_type.is_empty() && !is_same_type(&self.content_type, &new.content_type) {
            let detail = match self.content_type.as_str() {
                "" => "a content type was not required before".to_owned(),
                before => format!("the content type was {before:?}"),
            };
            problems.push(Problem::breaks("", "content_type", detail));
        }
        match (&self.schema, &new.schema) {
            (_, None) => {}
            (None, Some(_)) => {
                let detail = "payloads of any form were taken before".to_owned();
                problems.push(Problem::breaks("", "schema", detail));
            }
            (Some(Schema::Json { text }), Some(Schema::Json { text: new })) => {
                problems.extend(json_evolution::problems(text, new));
            }
            (
                Some(Schema::Protobuf { descriptors, message }),
                Some(Schema::Protobuf { descriptors: new, message: new_message }),
            ) => problems
                .extend(protobuf_evolution::problems((descriptors, message), (new, new_message))),
            (Some(Schema::Json { .. }), Some(Schema::Protobuf { .. }))
            | (Some(Schema::Protobuf { .. }), Some(Schema::Json { .. })) => {
                let detail = "the schema was in another language".to_owned();
                problems.push(Problem::breaks("", "kind", detail));
            }
        }
        problems.truncate(limits::MAX_SCHEMA_PROBLEMS);
        problems
    }
}

impl Problem {
    fn breaks(path: &str, keyword: &'static str, detail: impl Into<String>) -> Self {
        Self { path: path.to_owned(), keyword, verdict: Verdict::Breaks, detail: detail.into() }
    }

    fn undecided(path: &str, keyword: &'static str, detail: impl Into<String>) -> Self {
        let verdict = Verdict::Undecided;
        Self { path: path.to_owned(), keyword, verdict, detail: detail.into() }
    }
}

impl Checker {
    /// The media type that payloads without one have.
    pub fn content_type(&self) -> &str {
        &self.content_type
    }

    /// Checks a payload with the media type that its publisher gave, if any. It takes time in
    /// proportion to the size.
    ///
    /// # Errors
    ///
    /// If it is not taken.
    pub fn check(&self, content_type: &str, payload: &[u8]) -> Result<(), Violation> {
        let expected = &self.content_type;
        let given = !content_type.is_empty() && !expected.is_empty();
        if given && !is_same_type(content_type, expected) {
            let (expected, found) = (expected.clone(), content_type.to_owned());
            return Err(Violation::ContentType { expected, found });
        }
        match &self.schema {
            None => Ok(()),
            Some(Compiled::Json(schema)) => schema.check(payload),
            Some(Compiled::Protobuf(schema)) => schema.check(payload),
        }
    }
}

/// Whether two media types are the same but for their parameters.
fn is_same_type(one: &str, other: &str) -> bool {
    let essence = |media_type: &str| {
        media_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
    };
    essence(one) == essence(other)
}

/// At most so many bytes of a text, whole characters.
pub(crate) fn shortened(mut text: String, bytes: usize) -> String {
    if text.len() > bytes {
        let mut end = bytes.saturating_sub('…'.len_utf8());
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        text.push('…');
    }
    text
}

impl Violation {
    fn payload(field: String, detail: impl Into<String>) -> Self {
        Self::Payload {
            field: shortened(field, limits::MAX_REFUSAL_FIELD_BYTES),
            detail: shortened(detail.into(), limits::MAX_REFUSAL_FIELD_BYTES),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(content_type: &str, schema: Option<&str>) -> PayloadRules {
        let schema = schema.map(|text| Schema::Json { text: text.as_bytes().to_vec() });
        PayloadRules { content_type: content_type.to_owned(), schema }
    }

    #[test]
    fn media_types_compare_without_case_and_parameters() {
        let checker = rules("application/json", None).compile().unwrap();
        for same in ["application/json", "Application/JSON; charset=utf-8", ""] {
            assert_eq!(checker.check(same, b""), Ok(()), "{same}");
        }
        let expected = "application/json".to_owned();
        let violation = Violation::ContentType { expected, found: "text/plain".to_owned() };
        assert_eq!(checker.check("text/plain", b"{}"), Err(violation));
        assert_eq!(rules("", None).compile().unwrap().check("text/plain", b""), Ok(()));
    }

    #[test]
    fn rules_may_be_widened_and_not_narrowed() {
        let keywords = |old: &PayloadRules, new: &PayloadRules| {
            let problems = old.problems_with(new).into_iter();
            problems.map(|problem| problem.keyword).collect::<Vec<_>>()
        };
        let any = PayloadRules::default();
        let json = rules("application/json", None);
        let object = rules("application/json", Some(r#"{"type": "object"}"#));
        assert_eq!(keywords(&any, &json), ["content_type"]);
        assert_eq!(keywords(&json, &object), ["schema"]);
        assert_eq!(keywords(&object, &json), [""; 0]);
        assert_eq!(keywords(&object, &any), [""; 0]);
        assert_eq!(keywords(&json, &rules("text/plain", None)), ["content_type"]);
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        assert_eq!(shortened("ä".repeat(10), 10), "äää…");
        assert_eq!(shortened("ä".repeat(5), 10), "ä".repeat(5));
    }
}
