//! Whether every message that was written with one version of a message type can be read with the
//! next one: the rules that are known for the encoding, applied to descriptors.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

use prost_reflect::{Cardinality, EnumDescriptor, FieldDescriptor, Kind, MessageDescriptor};

use super::Problem;
use super::protobuf::{descriptor, name};
use crate::limits;

/// What may keep messages of the old type from being read by the new one. Each is named by its
/// file descriptors and its full name.
pub(super) fn problems(old: (&[u8], &str), new: (&[u8], &str)) -> Vec<Problem> {
    let (Ok(old), Ok(new)) = (descriptor(old.0, old.1), descriptor(new.0, new.1)) else {
        return vec![Problem::undecided("", "schema", "one of the schemas is not readable")];
    };
    let mut evolution = Evolution { known: HashSet::new(), problems: Vec::new() };
    evolution.message(&old, &new, "");
    evolution.problems
}

struct Evolution {
    /// The pairs of types that were compared, or are being compared.
    known: HashSet<(String, String)>,
    problems: Vec<Problem>,
}

impl Evolution {
    fn breaks(&mut self, at: &str, property: &'static str, detail: impl Into<String>) {
        self.problems.push(Problem::breaks(at, property, detail));
    }

    fn message(&mut self, old: &MessageDescriptor, new: &MessageDescriptor, at: &str) {
        let pair = (old.full_name().to_owned(), new.full_name().to_owned());
        if self.problems.len() > limits::MAX_SCHEMA_PROBLEMS || !self.known.insert(pair) {
            return;
        }
        for field in old.fields() {
            let place = below(at, field.name());
            match new.get_field(field.number()) {
                Some(next) => self.field(&field, &next, &place),
                None => self.gone(&field, new, &place),
            }
        }
        for field in new.fields().filter(|field| old.get_field(field.number()).is_none()) {
            let place = below(at, field.name());
            if field.is_required() {
                self.breaks(&place, "label", "a new field cannot be required");
            }
            if old.reserved_ranges().any(|range| range.contains(&field.number())) {
                let detail = format!("its number {} was reserved", field.number());
                self.breaks(&place, "number", detail);
            }
        }
        self.reserved(old, new, at);
        self.oneofs(old, new, at);
    }

    /// A field that has no successor.
    fn gone(&mut self, field: &FieldDescriptor, new: &MessageDescriptor, at: &str) {
        let number = field.number();
        if let Some(next) = new.get_field_by_name(field.name()) {
            let detail = format!("it had the number {number}, and has {}", next.number());
            self.breaks(at, "number", detail);
        } else if field.is_required() {
            self.breaks(at, "label", "a required field cannot be removed");
        } else if !new.reserved_ranges().any(|range| range.contains(&number)) {
            let detail = format!(
                "it is removed: reserve its number {number}, so that it is never used again"
            );
            self.breaks(at, "reserved", detail);
        }
    }

    fn field(&mut self, old: &FieldDescriptor, new: &FieldDescriptor, at: &str) {
        use Cardinality::{Optional, Repeated, Required};
        match (old.cardinality(), new.cardinality()) {
            (Optional | Repeated, Required) => {
                self.breaks(at, "label", "it is required, and was not before");
            }
            (Repeated, Optional) => {
                self.breaks(at, "label", "it was repeated: only the last of its values would stay");
            }
            (Optional | Required, Optional | Repeated)
            | (Repeated, Repeated)
            | (Required, Required) => {}
        }
        if old.is_map() != new.is_map() {
            return self.breaks(at, "type", "only one of the two is a map");
        }
        match (old.kind(), new.kind()) {
            (Kind::Message(old_type), Kind::Message(new_type))
                if old.is_group() == new.is_group() =>
            {
                self.message(&old_type, &new_type, at);
            }
            (Kind::Enum(old_type), Kind::Enum(new_type)) => self.values(&old_type, &new_type, at),
            (old_kind, new_kind) if is_readable(&old_kind, &new_kind) => {}
            (old_kind, new_kind) => {
                let (before, after) = (name(&old_kind), name(&new_kind));
                self.breaks(at, "type", format!("it was {before}, and is {after}"));
            }
        }
    }

    fn values(&mut self, old: &EnumDescriptor, new: &EnumDescriptor, at: &str) {
        for value in old.values() {
            let number = value.number();
            let is_reserved = new.reserved_ranges().any(|range| range.contains(&number));
            if new.get_value(number).is_none() && !is_reserved {
                let value = value.name();
                let detail = format!(
                    "{value} is gone: reserve its number {number}, so that it is never used again"
                );
                self.breaks(at, "enum", detail);
            }
        }
    }

    /// What is reserved stays reserved: only that keeps a number of long ago from being used again,
    /// since two revisions at a time are compared.
    fn reserved(&mut self, old: &MessageDescriptor, new: &MessageDescriptor, at: &str) {
        let kept: Vec<Range<u32>> = new.reserved_ranges().collect();
        for range in old.reserved_ranges() {
            if let Some(number) = uncovered(&range, &kept)
                && new.get_field(number).is_none()
            {
                self.breaks(at, "reserved", format!("{number} is not reserved any more"));
            }
        }
    }

    /// A message may hold several fields that were independent; of those of a `oneof` only the last.
    fn oneofs(&mut self, old: &MessageDescriptor, new: &MessageDescriptor, at: &str) {
        for oneof in new.oneofs().filter(|oneof| !oneof.is_synthetic()) {
            // Old fields in it, by the old oneof that they were in; alone if in none.
            let mut before: BTreeMap<String, u32> = BTreeMap::new();
            for field in oneof.fields() {
                let Some(field) = old.get_field(field.number()) else { continue };
                let group = field.containing_oneof().filter(|oneof| !oneof.is_synthetic());
                let group = group
                    .map_or_else(|| format!(" {}", field.number()), |one| one.name().to_owned());
                *before.entry(group).or_default() += 1;
            }
            if before.len() > 1 {
                let detail = "messages may have several of the fields that it puts together";
                self.breaks(&below(at, oneof.name()), "oneof", detail);
            }
        }
    }
}

fn below(at: &str, name: &str) -> String {
    if at.is_empty() { name.to_owned() } else { format!("{at}.{name}") }
}

/// Whether all values that are written as the one are read unchanged as the other.
fn is_readable(old: &Kind, new: &Kind) -> bool {
    let wider = matches!(
        (old, new),
        (Kind::Int32, Kind::Int64)
            | (Kind::Uint32, Kind::Uint64 | Kind::Int64)
            | (Kind::Sint32, Kind::Sint64)
            | (Kind::Bool, Kind::Int32 | Kind::Int64 | Kind::Uint32 | Kind::Uint64)
            | (Kind::Enum(_), Kind::Int32 | Kind::Int64)
            | (Kind::String, Kind::Bytes)
    );
    wider || std::mem::discriminant(old) == std::mem::discriminant(new) && !is_named(old)
}

fn is_named(kind: &Kind) -> bool {
    matches!(kind, Kind::Message(_) | Kind::Enum(_))
}

/// The first number of a range that no other range has.
fn uncovered(range: &Range<u32>, by: &[Range<u32>]) -> Option<u32> {
    let mut next = range.start;
    while next < range.end {
        match by.iter().find(|other| other.contains(&next)) {
            Some(other) => next = other.end,
            None => return Some(next),
        }
    }
    None
}
