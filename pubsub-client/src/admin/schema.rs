//! What topics take: schemas and their revisions.

use std::time::SystemTime;

use bytes::Bytes;
use pubsub_proto::v1 as pb;

use super::{Admin, call};
use crate::error::AdminError;
use crate::message::{non_empty, time};

/// In which language a schema is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SchemaKind {
    /// JSON Schema.
    Json,
    /// A message type of Protocol Buffers.
    Protobuf,
}

/// A schema of payloads.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Schema {
    /// Its language.
    pub kind: SchemaKind,
    /// The text of a JSON Schema, or an encoded `FileDescriptorSet`. At most 256 KiB.
    pub definition: Bytes,
    /// The full name of a protobuf message type.
    pub message_name: Option<String>,
}

impl Schema {
    /// A JSON Schema of draft 4 to 2020-12, as text. It must not refer to other documents, and
    /// `format` is only an annotation.
    ///
    /// ```
    /// let schema = pubsub_client::Schema::json(r#"{"type": "object", "required": ["id"]}"#);
    /// assert_eq!(schema.kind, pubsub_client::SchemaKind::Json);
    /// ```
    pub fn json(text: impl Into<Bytes>) -> Self {
        Self { kind: SchemaKind::Json, definition: text.into(), message_name: None }
    }

    /// A protobuf message type, such as `shop.v1.Order`, in an encoded
    /// `google.protobuf.FileDescriptorSet` with all imports: what
    /// `protoc --include_imports --descriptor_set_out` and `buf build` write.
    pub fn protobuf(descriptors: impl Into<Bytes>, message_name: impl Into<String>) -> Self {
        let message_name = Some(message_name.into());
        Self { kind: SchemaKind::Protobuf, definition: descriptors.into(), message_name }
    }
}

/// Which payloads a topic takes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PayloadRules {
    /// Their media type. Without it: that of the schema, `application/json` or
    /// `application/protobuf`; any, if there is no schema either.
    pub content_type: Option<String>,
    /// Their schema.
    pub schema: Option<Schema>,
}

impl PayloadRules {
    /// Everything is taken.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the [media type](Self::content_type).
    #[must_use]
    pub fn with_content_type(mut self, content_type: impl Into<String>) -> Self {
        self.content_type = Some(content_type.into());
        self
    }

    /// Sets the schema.
    #[must_use]
    pub fn with_schema(mut self, schema: Schema) -> Self {
        self.schema = Some(schema);
        self
    }
}

impl From<Schema> for PayloadRules {
    fn from(schema: Schema) -> Self {
        Self::new().with_schema(schema)
    }
}

/// What a new revision has to keep of the present one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Compatibility {
    /// What was written by the present revision can be read by the new one: consumers upgrade
    /// first. What cannot be decided is refused.
    #[default]
    Backward,
    /// Nothing.
    None,
}

/// What a topic takes from one revision on.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SchemaRevision {
    /// Counts the revisions of the topic, from 1.
    pub revision: u32,
    /// What is taken.
    pub rules: PayloadRules,
    /// What it kept of the revision before.
    pub compatibility: Compatibility,
    /// When it was set.
    pub create_time: SystemTime,
}

/// Something about a new schema that is in the way.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SchemaProblem {
    /// Where: a JSON pointer into the new schema, or the path of a protobuf field.
    pub path: String,
    /// What about it: a keyword of JSON Schema, or a property of a protobuf field.
    pub keyword: String,
    /// Whether nobody can tell if this breaks anything. Otherwise it does.
    pub undecided: bool,
    /// For people.
    pub detail: String,
}

impl std::fmt::Display for SchemaProblem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { path, keyword, undecided, detail } = self;
        let place = if path.is_empty() { "the whole" } else { path };
        let undecided = if *undecided { " (cannot be decided)" } else { "" };
        write!(f, "{place}: {keyword}: {detail}{undecided}")
    }
}

/// How a schema, or payloads, would fare.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SchemaCheck {
    /// The present revision, if the topic has one.
    pub current_revision: Option<u32>,
    /// The last revision with the same rules.
    pub matching_revision: Option<u32>,
    /// Why the rules could not become the next revision with [`Compatibility::Backward`].
    pub problems: Vec<SchemaProblem>,
    /// Why payloads that are valid by the rules could be refused by the present revision.
    pub publisher_problems: Vec<SchemaProblem>,
    /// For each payload, where and how it breaks the rules.
    pub payloads: Vec<Result<(), InvalidPayload>>,
}

/// A payload that a schema does not take.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {detail}", if field.is_empty() { "the payload" } else { field.as_str() })]
#[non_exhaustive]
pub struct InvalidPayload {
    /// Where: a JSON pointer, or the path of a protobuf field. Empty: as a whole.
    pub field: String,
    /// For people.
    pub detail: String,
}

impl Admin {
    /// Sets which payloads a topic takes from now on, and says whether that is a new revision:
    /// setting the present rules again changes nothing. Messages that are stored already are
    /// not looked at; each new one carries the revision that it was checked with.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let server = pubsub_server::Server::start(pubsub_server::Config::in_memory()).await?;
    /// # let client = pubsub_client::Client::connect(server.url()).await?;
    /// # client.admin().create_topic("orders", Default::default()).await?;
    /// use pubsub_client::{Compatibility, Schema};
    ///
    /// let schema = Schema::json(r#"{"type": "object", "required": ["id"]}"#);
    /// let admin = client.admin();
    /// let (set, _) = admin.set_schema("orders", schema, Compatibility::Backward).await?;
    /// assert_eq!(set.revision, 1);
    ///
    /// let publisher = client.publisher("orders").open().await?;
    /// let error = publisher.publish("{}").await.unwrap_err();
    /// assert_eq!(error.schema_violation().map(|violation| violation.revision), Some(1));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// There is no such topic; the schema cannot be used
    /// ([`Reason::InvalidArgument`](crate::Reason::InvalidArgument)); it breaks what the present
    /// revision promised, or may do so
    /// ([`Reason::SchemaIncompatible`](crate::Reason::SchemaIncompatible), with the metadata `path`
    /// and `keyword`); or the topic has 100 revisions.
    pub async fn set_schema(
        &self,
        topic: impl Into<String>,
        rules: impl Into<PayloadRules>,
        compatibility: Compatibility,
    ) -> Result<(SchemaRevision, bool), AdminError> {
        let PayloadRules { content_type, schema } = rules.into();
        let compatibility = match compatibility {
            Compatibility::Backward => pb::SchemaCompatibility::Backward,
            Compatibility::None => pb::SchemaCompatibility::None,
        };
        let request = pb::SetSchemaRequest {
            topic: topic.into(),
            content_type: content_type.unwrap_or_default(),
            schema: schema.map(to_wire),
            compatibility: compatibility.into(),
        };
        let response = self
            .call(call::Again::Always, request, |mut client, request| async move {
                client.set_schema(request).await
            })
            .await?;
        let malformed = || AdminError::Malformed("the schema revision is missing".to_owned());
        Ok((response.revision.map(revision).ok_or_else(malformed)?, response.created))
    }

    /// Describes what a topic takes: the present revision, or another one. Nothing, if the topic
    /// takes everything and always has.
    ///
    /// # Errors
    ///
    /// There is no such topic, or no such revision.
    pub async fn schema(
        &self,
        topic: impl Into<String>,
        number: Option<u32>,
    ) -> Result<Option<SchemaRevision>, AdminError> {
        let request =
            pb::GetSchemaRequest { topic: topic.into(), revision: number.unwrap_or_default() };
        let response = self
            .call(call::Again::Always, request, |mut client, request| async move {
                client.get_schema(request).await
            })
            .await?;
        Ok(response.revision.map(revision))
    }

    /// Lists all revisions of what a topic takes, oldest first, at most 100. The definitions of
    /// their schemas are left out.
    ///
    /// # Errors
    ///
    /// There is no such topic.
    pub async fn schemas(
        &self,
        topic: impl Into<String>,
    ) -> Result<Vec<SchemaRevision>, AdminError> {
        let request = pb::ListSchemasRequest { topic: topic.into() };
        let response = self
            .call(call::Again::Always, request, |mut client, request| async move {
                client.list_schemas(request).await
            })
            .await?;
        Ok(response.revisions.into_iter().map(revision).collect())
    }

    /// Tells how rules would fare as the next revision of a topic and for its publishers, and
    /// whether payloads are valid by them; without rules, by the present revision. Nothing is
    /// stored.
    ///
    /// # Errors
    ///
    /// There is no such topic, the schema cannot be used, or there are more than 512 payloads or
    /// 4 MiB.
    pub async fn check_schema(
        &self,
        topic: impl Into<String>,
        rules: Option<PayloadRules>,
        payloads: Vec<Bytes>,
    ) -> Result<SchemaCheck, AdminError> {
        let PayloadRules { content_type, schema } = rules.unwrap_or_default();
        let request = pb::CheckSchemaRequest {
            topic: topic.into(),
            content_type: content_type.unwrap_or_default(),
            schema: schema.map(to_wire),
            payloads,
        };
        let response = self
            .call(call::Again::Always, request, |mut client, request| async move {
                client.check_schema(request).await
            })
            .await?;
        let positive = |number: u32| (number > 0).then_some(number);
        Ok(SchemaCheck {
            current_revision: positive(response.current_revision),
            matching_revision: positive(response.matching_revision),
            problems: response.problems.into_iter().map(problem).collect(),
            publisher_problems: response.publisher_problems.into_iter().map(problem).collect(),
            payloads: response.payloads.into_iter().map(payload).collect(),
        })
    }
}

fn to_wire(schema: Schema) -> pb::Schema {
    let kind = match schema.kind {
        SchemaKind::Json => pb::SchemaKind::Json,
        SchemaKind::Protobuf => pb::SchemaKind::Protobuf,
    };
    let message_name = schema.message_name.unwrap_or_default();
    pb::Schema { kind: kind.into(), definition: schema.definition, message_name }
}

fn revision(revision: pb::SchemaRevision) -> SchemaRevision {
    let compatibility = match revision.compatibility() {
        pb::SchemaCompatibility::None => Compatibility::None,
        pb::SchemaCompatibility::Backward | pb::SchemaCompatibility::Unspecified => {
            Compatibility::Backward
        }
    };
    let schema = revision.schema.map(|schema| Schema {
        kind: match schema.kind() {
            pb::SchemaKind::Protobuf => SchemaKind::Protobuf,
            pb::SchemaKind::Json | pb::SchemaKind::Unspecified => SchemaKind::Json,
        },
        definition: schema.definition,
        message_name: non_empty(schema.message_name),
    });
    SchemaRevision {
        revision: revision.revision,
        rules: PayloadRules { content_type: non_empty(revision.content_type), schema },
        compatibility,
        create_time: time(revision.create_time),
    }
}

fn problem(problem: pb::SchemaProblem) -> SchemaProblem {
    let pb::SchemaProblem { path, keyword, undecided, detail } = problem;
    SchemaProblem { path, keyword, undecided, detail }
}

fn payload(check: pb::PayloadCheck) -> Result<(), InvalidPayload> {
    let pb::PayloadCheck { valid, field, detail } = check;
    if valid { Ok(()) } else { Err(InvalidPayload { field, detail }) }
}
