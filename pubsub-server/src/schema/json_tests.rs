//! JSON Schema: what is refused, where payloads break it, and that what the comparison of two
//! schemas lets pass never makes a valid payload invalid.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::{Checker, PayloadRules, Schema, Verdict, Violation};

fn rules(schema: &Value) -> PayloadRules {
    let schema = Some(Schema::Json { text: schema.to_string().into_bytes() });
    PayloadRules { content_type: "application/json".to_owned(), schema }
}

fn checker(schema: &Value) -> Checker {
    rules(schema).compile().unwrap()
}

fn order() -> Value {
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "required": ["id"],
        "properties": {
            "id": {"type": "integer", "minimum": 1},
            "items": {"type": "array", "items": {"$ref": "#/$defs/item"}},
        },
        "$defs": {"item": {"type": "object", "properties": {"price": {"type": "number"}}}},
    })
}

/// The path and the text of a violation.
fn violation(checker: &Checker, payload: &str) -> (String, String) {
    match checker.check("", payload.as_bytes()) {
        Err(Violation::Payload { field, detail }) => (field, detail),
        other => panic!("{payload}: {other:?}"),
    }
}

#[test]
fn a_violation_names_the_field_and_nothing_of_the_payload() {
    let checker = checker(&order());
    assert_eq!(checker.check("", br#"{"id": 1, "items": [{"price": 1.5}], "more": 0}"#), Ok(()));
    let (field, detail) = violation(&checker, r#"{"id": 1, "items": [{}, {"price": "secret"}]}"#);
    assert_eq!(field, "/items/1/price");
    assert!(detail.contains("number") && !detail.contains("secret"), "{detail}");
    let (field, detail) = violation(&checker, "{}");
    assert!(field.is_empty() && detail.contains("\"id\""), "{detail}");
    let (field, detail) = violation(&checker, "{\"id\": 1");
    assert!(field.is_empty() && detail.starts_with("not JSON: EOF"), "{detail}");
    let deep = "[".repeat(200) + &"]".repeat(200);
    assert!(violation(&checker, &deep).1.contains("recursion limit"));
}

#[test]
fn a_schema_reaches_for_nothing_outside_of_itself() {
    for reference in [
        "https://example.com/schema.json",
        "http://127.0.0.1:1/schema.json",
        "file:///etc/passwd",
        "other.json",
        "#/$defs/absent",
    ] {
        let schema = json!({"properties": {"a": {"$ref": reference}}});
        let error = rules(&schema).compile().unwrap_err().to_string();
        assert!(error.starts_with("the schema is not usable"), "{reference}: {error}");
    }
}

#[test]
fn a_schema_is_bounded_and_well_formed() {
    let error = |text: String| {
        let schema = Some(Schema::Json { text: text.into_bytes() });
        PayloadRules { schema, ..PayloadRules::default() }.compile().unwrap_err().to_string()
    };
    assert!(error("{".to_owned()).contains("not JSON"));
    assert!(error("3".to_owned()).contains("neither"));
    assert!(error(json!({"type": "strong"}).to_string()).contains("/type"));
    assert!(error(json!({"title": "x".repeat(300_000)}).to_string()).contains("262144"));
    let deep = "{\"not\":".repeat(200) + "true" + &"}".repeat(200);
    assert!(error(deep).contains("recursion limit"));
    let patterns: Vec<_> = (0..65).map(|i| json!({"pattern": format!("{i}")})).collect();
    assert!(error(json!({ "anyOf": patterns }).to_string()).contains("64 are allowed"));
    // It would take more memory, or more time, than a message is worth.
    for pattern in [r"(\w{100}){100}", r"^(a+)+\1$"] {
        let text = error(json!({ "pattern": pattern }).to_string());
        assert!(text.contains("pattern") || text.contains("regex"), "{text}");
    }
}

/// The paths, keywords and verdicts of what keeps one schema from following another.
fn problems(old: &Value, new: &Value) -> Vec<String> {
    let each = rules(old).problems_with(&rules(new)).into_iter().map(|problem| {
        let mark = if problem.verdict == Verdict::Undecided { "?" } else { "" };
        format!(
            "{}{}{mark}",
            problem.path,
            if problem.path.is_empty() { problem.keyword } else { "" }
        ) + &if problem.path.is_empty() { String::new() } else { format!(" {}", problem.keyword) }
    });
    each.collect()
}

#[test]
fn a_schema_can_grow() {
    let old = order();
    let mut new = old.clone();
    new["properties"]["note"] = json!({"type": "string", "maxLength": 100});
    new["properties"]["id"]["minimum"] = json!(0);
    new["$defs"]["item"]["properties"]["price"]["type"] = json!(["number", "null"]);
    new["title"] = json!("An order");
    new["required"] = json!([]);
    assert_eq!(problems(&old, &new), [""; 0]);
}

#[test]
fn what_was_valid_stays_valid_or_the_place_is_named() {
    let a = |form: Value| json!({"properties": {"a": form}});
    let cases = [
        (json!({}), json!({"required": ["a"]}), "/required required"),
        (a(json!({"type": "number"})), a(json!({"type": "integer"})), "/properties/a type"),
        (
            a(json!({"type": ["string", "null"]})),
            a(json!({"type": "string"})),
            "/properties/a type",
        ),
        (a(json!({"enum": [1, 2]})), a(json!({"enum": [1]})), "/properties/a enum"),
        (a(json!({"type": "string"})), a(json!({"const": "x"})), "/properties/a const"),
        (a(json!({"minimum": 1})), a(json!({"minimum": 2})), "/properties/a minimum"),
        (
            a(json!({"minimum": 1})),
            a(json!({"exclusiveMinimum": 1})),
            "/properties/a exclusiveMinimum",
        ),
        (a(json!({})), a(json!({"maximum": 9})), "/properties/a maximum"),
        (a(json!({"maxLength": 9})), a(json!({"maxLength": 8})), "/properties/a maxLength"),
        (a(json!({"multipleOf": 4})), a(json!({"multipleOf": 3})), "/properties/a multipleOf"),
        (a(json!({"multipleOf": 0.4})), a(json!({"multipleOf": 0.2})), "/properties/a? multipleOf"),
        (
            json!({}),
            json!({"additionalProperties": false}),
            "/additionalProperties additionalProperties",
        ),
        (
            json!({"properties": {"a": true}, "additionalProperties": false}),
            json!({"additionalProperties": false}),
            "/additionalProperties additionalProperties",
        ),
        (a(json!({"pattern": "a"})), a(json!({"pattern": "b"})), "/properties/a? pattern"),
        (
            a(json!({"not": {"type": "null"}})),
            a(json!({"not": {"type": "array"}})),
            "/properties/a? not",
        ),
        (a(json!({})), a(json!({"uniqueItems": true})), "/properties/a uniqueItems"),
        (
            a(json!({"items": {"type": "string"}})),
            a(json!({"items": {"type": "number"}})),
            "/properties/a/items type",
        ),
        (
            a(json!({"oneOf": [{"type": "string"}]})),
            a(json!({"oneOf": [{"type": "string"}, {"type": "null"}]})),
            "/properties/a? oneOf",
        ),
        (
            a(json!({"anyOf": [{"type": "string"}, {"type": "null"}]})),
            a(json!({"anyOf": [{"type": "string"}]})),
            "/properties/a? anyOf",
        ),
        (
            json!({"$ref": "#/$defs/n", "$defs": {"n": {"properties": {"n": {"$ref": "#"}}}}}),
            json!({"$ref": "#/$defs/n", "$defs": {"n": {"properties": {"n": {"type": "null"}}}}}),
            "/properties/n type",
        ),
        (a(json!({})), a(json!({"$anchor": "x", "$ref": "#x"})), "/properties/a? $ref"),
        (
            json!({"$schema": "http://json-schema.org/draft-07/schema#"}),
            json!({"$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object"}),
            "/$schema? $schema",
        ),
    ];
    for (old, new, expected) in cases {
        assert_eq!(problems(&old, &new), [expected], "{old} -> {new}");
    }
}

#[test]
fn recursive_schemas_are_compared_to_their_end() {
    let tree = |value: Value| {
        json!({
            "$ref": "#/$defs/tree",
            "$defs": {"tree": {"properties": {
                "value": value, "children": {"items": {"$ref": "#/$defs/tree"}},
            }}},
        })
    };
    let (narrow, wide) = (tree(json!({"type": "integer"})), tree(json!({"type": "number"})));
    assert_eq!(problems(&narrow, &wide), [""; 0]);
    assert_eq!(problems(&wide, &narrow), ["/properties/value type"]);
}

/// Numbers that a seed repeats.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % sides
    }

    fn pick<'v, T>(&mut self, of: &'v [T]) -> &'v T {
        &of[usize::try_from(self.roll(of.len() as u64)).unwrap()]
    }

    fn value(&mut self, depth: u64) -> Value {
        match self.roll(if depth == 0 { 6 } else { 10 }) {
            0 => Value::Null,
            1 => json!(self.roll(2) == 0),
            2 | 3 => json!(self.roll(7)),
            4 => json!(self.roll(14) as f64 / 2.0),
            5 => json!("xyz"[..usize::try_from(self.roll(4)).unwrap()]),
            6 | 7 => (0..self.roll(4)).map(|_| self.value(depth - 1)).collect(),
            _ => {
                let names =
                    ["a", "b"].into_iter().filter(|_| self.roll(2) == 0).collect::<Vec<_>>();
                let members =
                    names.into_iter().map(|name| (name.to_owned(), self.value(depth - 1)));
                Value::Object(members.collect())
            }
        }
    }

    fn schema(&mut self, depth: u64) -> Value {
        let mut schema = serde_json::Map::new();
        for _ in 0..=self.roll(2) {
            let (keyword, value) = self.keyword(depth);
            schema.insert(keyword.to_owned(), value);
        }
        // A property that an open schema does not name is taken as not used: the one thing that
        // the comparison does not promise. So all of them are named.
        if schema.get("additionalProperties") != Some(&Value::Bool(false)) {
            let named = schema.entry("properties").or_insert_with(|| json!({}));
            for name in ["a", "b"] {
                if named.get(name).is_none() {
                    named[name] = json!(true);
                }
            }
        }
        Value::Object(schema)
    }

    fn keyword(&mut self, depth: u64) -> (&'static str, Value) {
        let types = ["null", "boolean", "integer", "number", "string", "array", "object"];
        if depth == 0 || self.roll(3) == 0 {
            return match self.roll(12) {
                0..=2 => ("type", json!(self.pick(&types))),
                3 => {
                    let kind = self.roll(6);
                    ("type", json!([types[usize::try_from(kind).unwrap()], "object"]))
                }
                4 => ("minimum", json!(self.roll(6))),
                5 => ("exclusiveMaximum", json!(self.roll(12) as f64 / 2.0)),
                6 => ("maxLength", json!(self.roll(4))),
                7 => ("enum", (0..3).map(|_| self.value(1)).collect()),
                8 => ("const", self.value(1)),
                9 => ("multipleOf", json!(1 + self.roll(4))),
                10 => ("minItems", json!(self.roll(3))),
                _ => ("uniqueItems", json!(self.roll(2) == 0)),
            };
        }
        let depth = depth - 1;
        match self.roll(14) {
            0 => ("properties", json!({"a": self.schema(depth)})),
            1 => ("properties", json!({"a": self.schema(depth), "b": self.schema(depth)})),
            2 => ("required", json!([self.pick(&["a", "b"])])),
            3 => ("additionalProperties", json!(false)),
            4 => ("additionalProperties", self.schema(depth)),
            5 => ("items", self.schema(depth)),
            6 => ("prefixItems", json!([self.schema(depth)])),
            7 => ("contains", self.schema(depth)),
            8 => ("anyOf", json!([self.schema(depth), self.schema(depth)])),
            9 => ("oneOf", json!([self.schema(depth), self.schema(depth)])),
            10 => ("allOf", json!([self.schema(depth), self.schema(depth)])),
            11 => ("not", self.schema(depth)),
            12 => ("$ref", json!(self.pick(&["#/$defs/x", "#/$defs/y"]))),
            _ => ("patternProperties", json!({"^a": self.schema(depth)})),
        }
    }

    fn root(&mut self) -> Value {
        let mut root = self.schema(2);
        root["$defs"] = json!({"x": self.schema(1), "y": self.schema(1)});
        root["if"] = self.schema(0);
        root["then"] = self.schema(0);
        root
    }

    /// Changes a schema in some places, more often to a wider one.
    fn edit(&mut self, schema: &mut Value) {
        let Value::Object(members) = schema else { return };
        let names: Vec<String> = members.keys().cloned().collect();
        for name in names {
            match (self.roll(12), &mut members[&name]) {
                (0, _) => drop(members.remove(&name)),
                (1, form @ Value::Object(_)) if name != "properties" && name != "$defs" => {
                    *form = self.schema(1);
                }
                (1 | 2, Value::Number(number)) => {
                    let number = number.as_f64().unwrap() + self.roll(3) as f64 - 1.0;
                    if number > 0.0 && name != "multipleOf" {
                        // Lengths are whole numbers, and those without a fraction are.
                        let text = number.to_string();
                        members[&name] = serde_json::from_str(&text).unwrap();
                    }
                }
                (1, Value::String(kind)) if kind == "integer" => members[&name] = json!("number"),
                (_, Value::Object(_)) => self.edit(&mut members[&name]),
                (_, Value::Array(items)) => items.iter_mut().for_each(|item| self.edit(item)),
                _ => {}
            }
        }
        // What was removed must not make a named property an unnamed one.
        if members.contains_key("properties") || self.roll(40) > 0 {
            return;
        }
        let (keyword, value) = self.keyword(1);
        members.insert(keyword.to_owned(), value);
    }
}

/// Compares a schema with an edited one; `Some` if the second may follow the first: how many of
/// some payloads the first one takes, all of which the second takes.
fn followed(seed: u64) -> Option<usize> {
    let mut dice = Dice(seed);
    let old = dice.root();
    let mut new = old.clone();
    dice.edit(&mut new);
    let (old_rules, new_rules) = (rules(&old), rules(&new));
    let checkers = (old_rules.compile().ok()?, new_rules.compile().ok()?);
    if old == new || !old_rules.problems_with(&new_rules).is_empty() {
        return None;
    }
    let mut taken = 0;
    for _ in 0..60 {
        let payload = dice.value(3).to_string();
        if checkers.0.check("", payload.as_bytes()).is_ok() {
            let fate = checkers.1.check("", payload.as_bytes());
            assert_eq!(fate, Ok(()), "seed {seed}: {payload} by\n{old}\nand not by\n{new}");
            taken += 1;
        }
    }
    Some(taken)
}

proptest! {
    #[test]
    fn what_may_follow_takes_all_that_was_valid(seed: u64) {
        for step in 0..10 {
            let _ = followed(seed.wrapping_add(step));
        }
    }
}

#[test]
fn the_comparison_is_put_to_the_test() {
    let runs: Vec<_> = (0..2_000).filter_map(followed).collect();
    let payloads: usize = runs.iter().sum();
    assert!(runs.len() > 100 && payloads > 1_000, "{} of 2000, {payloads}", runs.len());
}
