//! Messages of Protocol Buffers: the bytes are walked along the descriptor, so that what is wrong
//! has the path of its field, and no message is built.

use bytes::Bytes;
use prost::Message as _;
use prost_reflect::{
    Cardinality, DescriptorPool, FieldDescriptor, Kind, MessageDescriptor, prost_types,
};

use super::{InvalidSchema, Violation, shortened};
use crate::limits;

/// A message type that is ready for use.
#[derive(Debug)]
pub(super) struct Protobuf {
    message: MessageDescriptor,
}

/// Messages within messages: what decoders of most languages take.
const MAX_DEPTH: usize = 100;

impl Protobuf {
    pub(super) fn compile(descriptors: &[u8], message: &str) -> Result<Self, InvalidSchema> {
        Ok(Self { message: descriptor(descriptors, message)? })
    }

    pub(super) fn check(&self, payload: &[u8]) -> Result<(), Violation> {
        fields(&self.message, &mut &payload[..], None, 0)
            .map_err(|wrong| Violation::payload(wrong.path(), wrong.detail))
    }
}

/// The message type of this name in an encoded `FileDescriptorSet`.
pub(super) fn descriptor(
    descriptors: &[u8],
    message: &str,
) -> Result<MessageDescriptor, InvalidSchema> {
    let pool = DescriptorPool::decode(Bytes::copy_from_slice(descriptors)).map_err(|error| {
        let text = format!(
            "it is no FileDescriptorSet with all of its imports (`protoc --include_imports \
             --descriptor_set_out` and `buf build` make one): {error}"
        );
        InvalidSchema(shortened(text, limits::MAX_REFUSAL_BYTES))
    })?;
    pool.get_message_by_name(message)
        .ok_or_else(|| InvalidSchema(format!("it has no message type {message:?}")))
}

/// Whether two sets are the same but for comments.
pub(super) fn is_same(one: &[u8], other: &[u8]) -> bool {
    let parse = |bytes: &[u8]| {
        let mut set = prost_types::FileDescriptorSet::decode(bytes).ok()?;
        set.file.iter_mut().for_each(|file| file.source_code_info = None);
        set.file.sort_by(|one, other| one.name.cmp(&other.name));
        Some(set)
    };
    one == other || parse(one).is_some_and(|one| Some(one) == parse(other))
}

/// What is wrong, and the way there, from the inside out.
struct Wrong {
    path: Vec<String>,
    detail: String,
}

impl Wrong {
    fn below(mut self, field: &FieldDescriptor, index: usize) -> Self {
        self.path.push(match field.cardinality() {
            Cardinality::Repeated => format!("{}[{index}]", field.name()),
            Cardinality::Optional | Cardinality::Required => field.name().to_owned(),
        });
        self
    }

    fn path(&self) -> String {
        self.path.iter().rev().map(String::as_str).collect::<Vec<_>>().join(".")
    }
}

impl<T: Into<String>> From<T> for Wrong {
    fn from(detail: T) -> Self {
        Self { path: Vec::new(), detail: detail.into() }
    }
}

/// The kinds of a field on the wire.
const VARINT: u8 = 0;
const FIXED64: u8 = 1;
const BYTES: u8 = 2;
const GROUP: u8 = 3;
const END_GROUP: u8 = 4;
const FIXED32: u8 = 5;

/// The fields of a message up to its end, or those of a group up to its end tag.
fn fields(
    message: &MessageDescriptor,
    bytes: &mut &[u8],
    group: Option<u32>,
    depth: usize,
) -> Result<(), Wrong> {
    if depth > MAX_DEPTH {
        return Err(format!("more than {MAX_DEPTH} messages within each other").into());
    }
    let mut seen = Seen::default();
    while group.is_some() || !bytes.is_empty() {
        let (number, wire) = tag(bytes)?;
        if wire == END_GROUP {
            if group == Some(number) {
                break;
            }
            return Err("a group ends that did not begin".into());
        }
        let Some(field) = message.get_field(number) else {
            // Of a newer version of the message, or an extension.
            skip(number, wire, bytes, 0)?;
            continue;
        };
        let index = seen.count(number);
        value(&field, wire, bytes, depth).map_err(|wrong| wrong.below(&field, index))?;
    }
    let missing = |field: &FieldDescriptor| field.is_required() && !seen.has(field.number());
    match message.fields().find(missing) {
        None => Ok(()),
        Some(field) => Err(Wrong::from("it is required and missing").below(&field, 0)),
    }
}

fn value(field: &FieldDescriptor, wire: u8, bytes: &mut &[u8], depth: usize) -> Result<(), Wrong> {
    let expected = wire_of(field);
    let kind = field.kind();
    if wire == BYTES && expected != BYTES && field.cardinality() == Cardinality::Repeated {
        let mut packed = delimited(bytes)?;
        while !packed.is_empty() {
            skip(0, expected, &mut packed, 0)?;
        }
        return Ok(());
    }
    if wire != expected {
        return Err(format!("it is no {}", name(&kind)).into());
    }
    match kind {
        Kind::Message(message) if field.is_group() => {
            fields(&message, bytes, Some(field.number()), depth + 1)
        }
        Kind::Message(message) => fields(&message, &mut delimited(bytes)?, None, depth + 1),
        Kind::String => match str::from_utf8(delimited(bytes)?) {
            Ok(_) => Ok(()),
            Err(_) => Err("it is no UTF-8".into()),
        },
        Kind::Double
        | Kind::Float
        | Kind::Int32
        | Kind::Int64
        | Kind::Uint32
        | Kind::Uint64
        | Kind::Sint32
        | Kind::Sint64
        | Kind::Fixed32
        | Kind::Fixed64
        | Kind::Sfixed32
        | Kind::Sfixed64
        | Kind::Bool
        | Kind::Bytes
        | Kind::Enum(_) => Ok(skip(field.number(), wire, bytes, 0)?),
    }
}

/// How often the fields of one message have come.
#[derive(Default)]
struct Seen(Vec<(u32, usize)>);

impl Seen {
    /// How often it has come before.
    fn count(&mut self, number: u32) -> usize {
        // The last one first: repeated fields come one after another.
        match self.0.iter_mut().rfind(|(seen, _)| *seen == number) {
            Some((_, count)) => {
                *count += 1;
                *count
            }
            None => {
                self.0.push((number, 0));
                0
            }
        }
    }

    fn has(&self, number: u32) -> bool {
        self.0.iter().any(|(seen, _)| *seen == number)
    }
}

fn wire_of(field: &FieldDescriptor) -> u8 {
    match field.kind() {
        Kind::Double | Kind::Fixed64 | Kind::Sfixed64 => FIXED64,
        Kind::Float | Kind::Fixed32 | Kind::Sfixed32 => FIXED32,
        Kind::Int32
        | Kind::Int64
        | Kind::Uint32
        | Kind::Uint64
        | Kind::Sint32
        | Kind::Sint64
        | Kind::Bool
        | Kind::Enum(_) => VARINT,
        Kind::Message(_) if field.is_group() => GROUP,
        Kind::Message(_) | Kind::String | Kind::Bytes => BYTES,
    }
}

/// The name of a type in a `.proto` file.
pub(super) fn name(kind: &Kind) -> String {
    match kind {
        Kind::Double => "double".to_owned(),
        Kind::Float => "float".to_owned(),
        Kind::Int32 => "int32".to_owned(),
        Kind::Int64 => "int64".to_owned(),
        Kind::Uint32 => "uint32".to_owned(),
        Kind::Uint64 => "uint64".to_owned(),
        Kind::Sint32 => "sint32".to_owned(),
        Kind::Sint64 => "sint64".to_owned(),
        Kind::Fixed32 => "fixed32".to_owned(),
        Kind::Fixed64 => "fixed64".to_owned(),
        Kind::Sfixed32 => "sfixed32".to_owned(),
        Kind::Sfixed64 => "sfixed64".to_owned(),
        Kind::Bool => "bool".to_owned(),
        Kind::String => "string".to_owned(),
        Kind::Bytes => "bytes".to_owned(),
        Kind::Message(message) => format!("message {}", message.full_name()),
        Kind::Enum(an_enum) => format!("enum {}", an_enum.full_name()),
    }
}

const ENDS: &str = "the message ends in the middle";

fn varint(bytes: &mut &[u8]) -> Result<u64, String> {
    let mut value = 0;
    for (index, byte) in bytes.iter().enumerate().take(10) {
        value |= u64::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            if index == 9 && *byte > 1 {
                break;
            }
            *bytes = &bytes[index + 1..];
            return Ok(value);
        }
    }
    Err(if bytes.len() < 10 { ENDS } else { "a number is too large" }.to_owned())
}

fn tag(bytes: &mut &[u8]) -> Result<(u32, u8), String> {
    let tag = varint(bytes)?;
    let number = u32::try_from(tag >> 3).ok().filter(|number| (1..=0x1fff_ffff).contains(number));
    let wire = u8::try_from(tag & 7).unwrap_or(u8::MAX);
    number.map(|number| (number, wire)).ok_or_else(|| "a tag that cannot be".to_owned())
}

fn take<'b>(bytes: &mut &'b [u8], length: usize) -> Result<&'b [u8], String> {
    let (taken, rest) = bytes.split_at_checked(length).ok_or(ENDS)?;
    *bytes = rest;
    Ok(taken)
}

fn delimited<'b>(bytes: &mut &'b [u8]) -> Result<&'b [u8], String> {
    let length = varint(bytes)?;
    take(bytes, usize::try_from(length).unwrap_or(usize::MAX))
}

/// Passes over a value.
fn skip(number: u32, wire: u8, bytes: &mut &[u8], depth: usize) -> Result<(), String> {
    match wire {
        VARINT => varint(bytes).map(drop),
        FIXED64 => take(bytes, 8).map(drop),
        FIXED32 => take(bytes, 4).map(drop),
        BYTES => delimited(bytes).map(drop),
        GROUP if depth < MAX_DEPTH => loop {
            let (inner, wire) = tag(bytes)?;
            match wire {
                END_GROUP if inner == number => return Ok(()),
                END_GROUP => return Err("a group ends that did not begin".to_owned()),
                _ => skip(inner, wire, bytes, depth + 1)?,
            }
        },
        GROUP => Err(format!("more than {MAX_DEPTH} groups within each other")),
        _ => Err("a kind of value that cannot be".to_owned()),
    }
}
