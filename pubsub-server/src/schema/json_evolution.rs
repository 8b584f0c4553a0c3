//! Whether every payload that a JSON Schema accepts is accepted by the next one, too.
//!
//! In general nobody can tell. This follows the two schemas side by side and knows what most
//! keywords mean for each other; what it does not know is a problem that is [`super::Verdict::Undecided`].
//! There is one deliberate leniency, without which no ordinary schema could grow: where the old
//! schema names properties, one that it neither names nor forbids is taken as not used so far.

use std::cmp::Ordering;
use std::sync::LazyLock;

use serde_json::{Map, Value};

use super::Problem;
use super::json::parse;
use crate::limits;

type Members = Map<String, Value>;

static ANYTHING: Value = Value::Bool(true);
static NO_MEMBERS: LazyLock<Members> = LazyLock::new(Map::new);

/// Comparisons of two subschemas before the check gives up.
const MAX_STEPS: u32 = 20_000;
/// References that lead to references.
const MAX_HOPS: u32 = 32;

/// The drafts in which keywords mean what this check takes them to mean.
const DRAFTS: [&str; 4] = ["2020-12", "2019-09", "draft-07", "draft-06"];

/// Keywords that accept and refuse nothing.
const ANNOTATIONS: [&str; 14] = [
    "$schema",
    "$id",
    "$anchor",
    "$comment",
    "$defs",
    "$vocabulary",
    "definitions",
    "title",
    "description",
    "default",
    "examples",
    "deprecated",
    "readOnly",
    "writeOnly",
];

/// Keywords of which it is only known that they mean the same where they are the same.
const OPAQUE: [(&str, Option<&str>); 10] = [
    ("pattern", Some("string")),
    ("not", None),
    ("oneOf", None),
    ("dependentRequired", Some("object")),
    ("dependentSchemas", Some("object")),
    ("dependencies", Some("object")),
    ("contentEncoding", Some("string")),
    ("contentMediaType", Some("string")),
    ("$dynamicRef", None),
    ("$recursiveRef", None),
];

/// Bounds: the keyword, whether it is a lower one, and the type that it is about.
const BOUNDS: [(&str, bool, &str); 6] = [
    ("minLength", true, "string"),
    ("maxLength", false, "string"),
    ("minItems", true, "array"),
    ("maxItems", false, "array"),
    ("minProperties", true, "object"),
    ("maxProperties", false, "object"),
];

/// What may keep payloads of the old schema from being valid by the new one.
pub(super) fn problems(old: &[u8], new: &[u8]) -> Vec<Problem> {
    let (Ok(old), Ok(new)) = (parse(old), parse(new)) else {
        return vec![Problem::undecided("", "schema", "one of the schemas is not readable")];
    };
    if old == new {
        return Vec::new();
    }
    if let Some(problem) = dialect(&old, &new) {
        return vec![problem];
    }
    let mut evolution = Evolution {
        roots: [&old, &new],
        modern: draft(&old).is_none_or(|draft| draft.contains("2020-12")),
        steps: MAX_STEPS,
        active: Vec::new(),
        problems: Vec::new(),
    };
    evolution.compare(&old, &new, "");
    evolution.problems
}

fn draft(schema: &Value) -> Option<&str> {
    schema.get("$schema").and_then(Value::as_str)
}

/// Why nothing at all can be said.
fn dialect(old: &Value, new: &Value) -> Option<Problem> {
    if draft(old) != draft(new) {
        return Some(Problem::undecided("/$schema", "$schema", "it is another draft than before"));
    }
    let known = |draft: &str| DRAFTS.iter().any(|known| draft.contains(known));
    if draft(new).is_some_and(|draft| !known(draft)) {
        return Some(Problem::undecided("/$schema", "$schema", "schemas of it are not compared"));
    }
    if [old, new].into_iter().any(|root| has_inner_id(root, true)) {
        let detail = "subschemas with identifiers of their own are not compared";
        return Some(Problem::undecided("", "$id", detail));
    }
    None
}

fn has_inner_id(value: &Value, is_root: bool) -> bool {
    match value {
        Value::Object(members) => {
            let own = !is_root && members.get("$id").is_some_and(Value::is_string);
            own || members.values().any(|member| has_inner_id(member, false))
        }
        Value::Array(items) => items.iter().any(|item| has_inner_id(item, false)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => false,
    }
}

struct Evolution<'a> {
    /// The old schema and the new one.
    roots: [&'a Value; 2],
    /// Whether tuples are `prefixItems`, and not arrays in `items`.
    modern: bool,
    steps: u32,
    /// The pairs that are being compared: one that is met again within itself holds if all else
    /// does, since payloads are finite.
    active: Vec<(*const Value, *const Value)>,
    problems: Vec<Problem>,
}

impl<'a> Evolution<'a> {
    /// Notes what keeps values of `old` from being valid by `new`, which is found at `at`.
    fn compare(&mut self, old: &'a Value, new: &'a Value, at: &str) {
        if self.steps == 0 || self.problems.len() > limits::MAX_SCHEMA_PROBLEMS {
            self.undecided(at, "schema", "the schemas are too large to be compared");
            return;
        }
        self.steps -= 1;
        if self.is_same(old, new) {
            return;
        }
        let (old, new) = match (self.target(0, old), self.target(1, new)) {
            (Ok(old), Ok(new)) => (old, new),
            (Err(detail), _) | (_, Err(detail)) => return self.undecided(at, "$ref", detail),
        };
        let pair = (std::ptr::from_ref(old), std::ptr::from_ref(new));
        if self.active.contains(&pair) {
            return;
        }
        self.active.push(pair);
        match (old, new) {
            (Value::Bool(false), _) | (_, Value::Bool(true)) => {}
            (_, Value::Bool(false)) => self.breaks(at, "false", "nothing is valid here any more"),
            (Value::Object(old_members), Value::Object(members)) => {
                self.keywords(old, old_members, members, at);
            }
            (_, Value::Object(members)) => self.keywords(old, &NO_MEMBERS, members, at),
            _ => self.undecided(at, "schema", "it is no schema"),
        }
        self.active.pop();
    }

    /// Whether values of `old` are valid by `new`, without a word about why not.
    fn holds(&mut self, old: &'a Value, new: &'a Value) -> bool {
        let problems = std::mem::take(&mut self.problems);
        self.compare(old, new, "");
        std::mem::replace(&mut self.problems, problems).is_empty()
    }

    /// Whether these are the same, and mean the same.
    fn is_same(&self, old: &Value, new: &Value) -> bool {
        old == new && !refers(old)
    }

    /// What a schema that is nothing but a reference refers to.
    fn target(&self, side: usize, mut schema: &'a Value) -> Result<&'a Value, &'static str> {
        for _ in 0..MAX_HOPS {
            let Some(Value::String(reference)) = schema.get("$ref") else {
                return Ok(schema);
            };
            let alone = |members: &Members| {
                let mut names = members.keys().map(String::as_str);
                names.all(|name| name == "$ref" || ANNOTATIONS.contains(&name))
            };
            if !schema.as_object().is_some_and(alone) {
                return Err("a reference beside other keywords is not compared");
            }
            let pointer = reference.strip_prefix('#').filter(|pointer| !pointer.contains('%'));
            let target = pointer.and_then(|pointer| self.roots[side].pointer(pointer));
            schema = target.ok_or("only references such as #/$defs/NAME are followed")?;
        }
        Err("references lead to references without end")
    }

    fn keywords(&mut self, old_schema: &'a Value, old: &'a Members, new: &'a Members, at: &str) {
        let types = types(old);
        let about = |kind: &str| types.as_ref().is_none_or(|types| types.contains(&kind));
        self.values(types.as_deref(), old, new, at);
        if about("number") || about("integer") {
            self.numbers(old, new, at);
        }
        for (keyword, lower, kind) in BOUNDS {
            if about(kind) {
                self.bound(old, new, at, (keyword, lower));
            }
        }
        for (keyword, kind) in OPAQUE {
            if kind.is_none_or(about) {
                self.opaque(old, new, at, keyword);
            }
        }
        for keyword in ["unevaluatedProperties", "unevaluatedItems"] {
            if new.contains_key(keyword) {
                self.undecided(at, keyword, "it depends on everything beside it");
            }
        }
        if about("object") {
            self.object(old, new, at);
        }
        if about("array") {
            self.array(old, new, at);
        }
        self.combined(old_schema, old, new, at);
    }

    /// `type`, `enum` and `const`.
    fn values(&mut self, types: Option<&[&str]>, old: &Members, new: &Members, at: &str) {
        if let Some(allowed) = new.get("type").map(named_types) {
            let is_allowed = |kind: &&str| {
                allowed.contains(kind) || (*kind == "integer" && allowed.contains(&"number"))
            };
            match types {
                None => self.breaks(at, "type", "any type was valid before"),
                Some(types) => {
                    for kind in types.iter().filter(|kind| !is_allowed(kind)) {
                        self.breaks(at, "type", format!("{kind} is not valid any more"));
                    }
                }
            }
        }
        for keyword in ["enum", "const"] {
            let Some(allowed) = listed(new, keyword) else { continue };
            let before = listed(old, "const").or_else(|| listed(old, "enum"));
            match before {
                None => self.breaks(at, keyword, "other values were valid before"),
                Some(before) => {
                    let gone = before.iter().filter(|value| !allowed.contains(value)).count();
                    if gone > 0 {
                        let detail = format!("{gone} of {} values are gone", before.len());
                        self.breaks(at, keyword, detail);
                    }
                }
            }
        }
    }

    fn numbers(&mut self, old: &Members, new: &Members, at: &str) {
        let sides = [
            ("minimum", "exclusiveMinimum", Ordering::Greater),
            ("maximum", "exclusiveMaximum", Ordering::Less),
        ];
        for (inclusive, exclusive, stricter) in sides {
            let strict = |before: &Value, bound: &Value| order(before, bound) == Some(stricter);
            let as_strict = |before: &Value, bound: &Value| {
                strict(before, bound) || order(before, bound) == Some(Ordering::Equal)
            };
            let (old_inclusive, old_exclusive) = (old.get(inclusive), old.get(exclusive));
            if let Some(bound) = new.get(inclusive) {
                let mut before = [old_inclusive, old_exclusive].into_iter().flatten();
                if !before.any(|before| as_strict(before, bound)) {
                    self.breaks(at, inclusive, "it is tighter than before");
                }
            }
            if let Some(bound) = new.get(exclusive) {
                let kept = old_exclusive.is_some_and(|before| as_strict(before, bound))
                    || old_inclusive.is_some_and(|before| strict(before, bound));
                if !kept {
                    self.breaks(at, exclusive, "it is tighter than before");
                }
            }
        }
        let Some(unit) = new.get("multipleOf") else { return };
        match old.get("multipleOf") {
            Some(before) if before == unit => {}
            Some(before) => match (before.as_u64(), unit.as_u64()) {
                (Some(before), Some(unit)) if unit > 0 && before.is_multiple_of(unit) => {}
                (Some(_), Some(_)) => self.breaks(at, "multipleOf", "it is another unit"),
                _ => self.undecided(at, "multipleOf", "fractions are not compared"),
            },
            None => self.breaks(at, "multipleOf", "it was not required before"),
        }
    }

    fn bound(
        &mut self,
        old: &Members,
        new: &Members,
        at: &str,
        (keyword, lower): (&'static str, bool),
    ) {
        let number = |members: &Members| members.get(keyword).and_then(Value::as_f64);
        let kept = match (number(old), number(new), lower) {
            (_, None, _) => !new.contains_key(keyword),
            (before, Some(bound), true) => before.unwrap_or(0.0) >= bound,
            (before, Some(bound), false) => before.is_some_and(|before| before <= bound),
        };
        if !kept {
            self.breaks(at, keyword, "it is tighter than before");
        }
    }

    fn opaque(&mut self, old: &Members, new: &Members, at: &str, keyword: &'static str) {
        let Some(value) = new.get(keyword) else { return };
        match old.get(keyword) {
            None => self.breaks(at, keyword, "it was not there before"),
            Some(before) if self.is_same(before, value) => {}
            Some(_) => {
                self.undecided(at, keyword, "whether it is stricter than before is not known")
            }
        }
    }

    fn object(&mut self, old: &'a Members, new: &'a Members, at: &str) {
        let names = |members: &'a Members| {
            let required = members.get("required").and_then(Value::as_array);
            required.into_iter().flatten().filter_map(Value::as_str).collect::<Vec<_>>()
        };
        let before = names(old);
        for name in names(new).into_iter().filter(|name| !before.contains(name)) {
            let detail = format!("{name:?} was not required before");
            self.breaks(&format!("{at}/required"), "required", detail);
        }
        if let Some(form) = new.get("propertyNames") {
            let before = old.get("propertyNames").unwrap_or(&ANYTHING);
            self.compare(before, form, &format!("{at}/propertyNames"));
        }
        self.properties(old, new, at);
    }

    fn properties(&mut self, old: &'a Members, new: &'a Members, at: &str) {
        let patterns = |members: &'a Members| {
            members.get("patternProperties").and_then(Value::as_object).unwrap_or(&NO_MEMBERS)
        };
        let (before, after) = (patterns(old), patterns(new));
        let same = before.len() == after.len()
            && after.iter().all(|(name, form)| {
                before.get(name).is_some_and(|before| self.is_same(before, form))
            });
        if !same {
            let detail = "which properties they are about is not known";
            return self.undecided(at, "patternProperties", detail);
        }
        let named = |members: &'a Members| {
            members.get("properties").and_then(Value::as_object).unwrap_or(&NO_MEMBERS)
        };
        let others =
            |members: &'a Members| members.get("additionalProperties").unwrap_or(&ANYTHING);
        let (old_named, new_named) = (named(old), named(new));
        let grows = old.contains_key("properties");
        for (name, form) in new_named {
            let place = format!("{at}/properties/{}", escaped(name));
            match old_named.get(name) {
                Some(before) => self.compare(before, form, &place),
                // The leniency: it is taken as not used so far.
                None if grows && is_open(others(old)) && before.is_empty() => {}
                None if before.is_empty() => self.compare(others(old), form, &place),
                None => self.compare(&ANYTHING, form, &place),
            }
        }
        let rest = format!("{at}/additionalProperties");
        for (name, before) in old_named.iter().filter(|(name, _)| !new_named.contains_key(*name)) {
            if !self.holds(before, others(new)) {
                let detail = format!("{name:?} is not valid any more");
                self.breaks(&rest, "additionalProperties", detail);
            }
        }
        if is_open(others(old)) && others(new) == &Value::Bool(false) {
            self.breaks(&rest, "additionalProperties", "other properties were valid before");
        } else {
            self.compare(others(old), others(new), &rest);
        }
    }

    fn array(&mut self, old: &'a Members, new: &'a Members, at: &str) {
        let is_unique = |members: &Members| members.get("uniqueItems") == Some(&Value::Bool(true));
        if is_unique(new) && !is_unique(old) {
            self.breaks(at, "uniqueItems", "it was not required before");
        }
        if let Some(form) = new.get("contains") {
            let counts = ["minContains", "maxContains"];
            let same = old.get("contains").is_some_and(|before| self.is_same(before, form))
                && counts.iter().all(|count| old.get(*count) == new.get(*count));
            match old.contains_key("contains") {
                _ if same => {}
                true => self.undecided(at, "contains", "it is not the same as before"),
                false => self.breaks(at, "contains", "it was not there before"),
            }
        }
        let ((old_first, old_rest), (new_first, new_rest)) =
            (tuple(old, self.modern), tuple(new, self.modern));
        for index in 0..old_first.len().max(new_first.len()) {
            let before = old_first.get(index).unwrap_or(old_rest);
            let form = new_first.get(index).unwrap_or(new_rest);
            self.compare(before, form, &format!("{at}/items/{index}"));
        }
        self.compare(old_rest, new_rest, &format!("{at}/items"));
    }

    /// `allOf`, `anyOf` and `if`.
    fn combined(&mut self, old_schema: &'a Value, old: &'a Members, new: &'a Members, at: &str) {
        let list = |members: &'a Members, keyword| {
            members.get(keyword).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
        };
        for (index, form) in list(new, "allOf").iter().enumerate() {
            let implied = list(old, "allOf").iter().any(|before| self.holds(before, form));
            if !implied && !self.holds(old_schema, form) {
                let before = list(old, "allOf").get(index).unwrap_or(old_schema);
                self.compare(before, form, &format!("{at}/allOf/{index}"));
            }
        }
        let forms = list(new, "anyOf");
        let one = std::slice::from_ref(old_schema);
        let before = [list(old, "anyOf"), list(old, "oneOf"), one];
        // Whatever an old value was valid by, one of the new forms has to take.
        let taken = |before: &'a [Value]| {
            let mut each = before.iter();
            each.all(|before| forms.iter().any(|form| self.holds(before, form)))
        };
        let mut before = before.into_iter().filter(|before| !before.is_empty());
        if !forms.is_empty() && !before.any(taken) {
            self.undecided(at, "anyOf", "not all of what was valid is found in one of it");
        }
        self.conditional(old_schema, old, new, at);
    }

    fn conditional(&mut self, old_schema: &'a Value, old: &'a Members, new: &'a Members, at: &str) {
        let Some(condition) = new.get("if") else { return };
        let same = old.get("if").is_some_and(|before| self.is_same(before, condition));
        for keyword in ["then", "else"] {
            let branch = |members: &'a Members| members.get(keyword).unwrap_or(&ANYTHING);
            let (before, form) = (branch(old), branch(new));
            if !(same && self.holds(before, form) || self.holds(old_schema, form)) {
                self.undecided(at, keyword, "whether it is stricter than before is not known");
            }
        }
    }

    fn breaks(&mut self, at: &str, keyword: &'static str, detail: impl Into<String>) {
        self.problems.push(Problem::breaks(at, keyword, detail));
    }

    fn undecided(&mut self, at: &str, keyword: &'static str, detail: impl Into<String>) {
        let problem = Problem::undecided(at, keyword, detail);
        // What ends the comparison would be told of everything that is left.
        if self.problems.last() != Some(&problem) {
            self.problems.push(problem);
        }
    }
}

/// Whether it is more than what is written in it.
fn refers(value: &Value) -> bool {
    match value {
        Value::Object(members) => {
            ["$ref", "$dynamicRef", "$recursiveRef"].iter().any(|name| members.contains_key(*name))
                || members.values().any(refers)
        }
        Value::Array(items) => items.iter().any(refers),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => false,
    }
}

fn named_types(value: &Value) -> Vec<&str> {
    match value {
        Value::String(name) => vec![name],
        Value::Array(names) => names.iter().filter_map(Value::as_str).collect(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_) => Vec::new(),
    }
}

/// The types that values can have, if that is known.
fn types(schema: &Members) -> Option<Vec<&str>> {
    let of_value = |value: &Value| match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        // 1.0 is an integer, too.
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    let listed = || listed(schema, "const").or_else(|| listed(schema, "enum"));
    let values = || listed().map(|values| values.iter().map(of_value).collect());
    schema.get("type").map(named_types).or_else(values)
}

/// The values that an `enum` or a `const` allows.
fn listed<'v>(schema: &'v Members, keyword: &str) -> Option<&'v [Value]> {
    let value = schema.get(keyword)?;
    match (keyword, value) {
        ("enum", Value::Array(values)) => Some(values),
        ("enum", _) => None,
        _ => Some(std::slice::from_ref(value)),
    }
}

/// The forms of the first items of an array, and that of the others.
fn tuple(schema: &Members, modern: bool) -> (&[Value], &Value) {
    let list = |keyword| schema.get(keyword).and_then(Value::as_array).map(Vec::as_slice);
    let rest = |keyword| schema.get(keyword).unwrap_or(&ANYTHING);
    match (modern, list("items")) {
        (true, _) => (list("prefixItems").unwrap_or_default(), rest("items")),
        (false, Some(first)) => (first, rest("additionalItems")),
        (false, None) => (&[], rest("items")),
    }
}

/// Whether this takes everything.
fn is_open(schema: &Value) -> bool {
    match schema {
        Value::Bool(open) => *open,
        Value::Object(members) => members.is_empty(),
        Value::Null | Value::Number(_) | Value::String(_) | Value::Array(_) => false,
    }
}

/// The order of two numbers, where it is beyond doubt.
fn order(one: &Value, other: &Value) -> Option<Ordering> {
    let whole =
        |value: &Value| value.as_i64().map(i128::from).or_else(|| value.as_u64().map(i128::from));
    match (whole(one), whole(other)) {
        (Some(one), Some(other)) => Some(one.cmp(&other)),
        // A whole number is a fraction without loss up to here.
        (one_whole, other_whole) => {
            let exact = |whole: Option<i128>| whole.is_none_or(|whole| whole.abs() < 1 << 53);
            let exact = exact(one_whole) && exact(other_whole);
            one.as_f64().zip(other.as_f64()).filter(|_| exact)?.0.partial_cmp(&other.as_f64()?)
        }
    }
}

/// A name as a part of a JSON pointer.
fn escaped(name: &str) -> String {
    name.replace('~', "~0").replace('/', "~1")
}
