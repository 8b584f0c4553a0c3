//! Protobuf: where payloads break their type, and which changes of a type are told.

use proptest::prelude::*;
use prost::Message as _;
use prost_reflect::{DescriptorPool, DynamicMessage};

use super::{Checker, PayloadRules, Schema, Violation};

fn rules(source: &str) -> PayloadRules {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("order.proto"), source).unwrap();
    let set = protox::compile(["order.proto"], [directory.path()]).unwrap();
    let schema = Schema::Protobuf { descriptors: set.encode_to_vec(), message: "Order".to_owned() };
    PayloadRules { content_type: "application/protobuf".to_owned(), schema: Some(schema) }
}

fn proto3(messages: &str) -> PayloadRules {
    rules(&format!("syntax = \"proto3\";\n{messages}"))
}

const ORDER: &str = "
    message Order {
        uint64 id = 1;
        string note = 2;
        repeated Item items = 3;
        repeated sint32 codes = 4;
        map<string, Item> by_name = 5;
        oneof payment { string card = 6; bool cash = 7; }
        Order next = 8;
        fixed32 four = 9;
        double eight = 10;
    }
    message Item { string name = 1; float price = 2; Kind kind = 3; }
    enum Kind { KIND_UNSPECIFIED = 0; KIND_BOOK = 1; }
";

/// Tag and value of a length-delimited field.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut field = vec![number << 3 | 2, u8::try_from(bytes.len()).unwrap()];
    field.extend_from_slice(bytes);
    field
}

fn violation(checker: &Checker, payload: &[u8]) -> (String, String) {
    match checker.check("", payload) {
        Err(Violation::Payload { field, detail }) => (field, detail),
        other => panic!("{payload:?}: {other:?}"),
    }
}

#[test]
fn a_violation_names_the_path_of_its_field() {
    let checker = proto3(ORDER).compile().unwrap();
    let item = [field(1, b"tea"), vec![0x15, 0, 0, 0x80, 0x3f]].concat();
    let good = [
        vec![0x08, 7],
        field(2, "tee, für mich".as_bytes()),
        field(3, &item),
        field(3, b""),
        field(4, &[1, 2, 0x80, 1]),
        vec![0x20, 9],
        field(5, &[field(1, b"key"), field(2, &item)].concat()),
        field(8, &field(8, &[0x08, 1])),
        // Of a newer version.
        vec![0x98, 6, 1, 0x93, 6, 0x08, 1, 0x94, 6],
    ]
    .concat();
    assert_eq!(checker.check("", &good), Ok(()));
    assert_eq!(checker.check("", b""), Ok(()));
    let told = |payload: &[u8]| violation(&checker, payload);
    let is = |field: &str, detail: &str| (field.to_owned(), detail.to_owned());
    assert_eq!(told(&field(1, b"7")), is("id", "it is no uint64"));
    assert_eq!(told(&field(2, b"\xff")), is("note", "it is no UTF-8"));
    let second = [field(3, b""), field(3, &field(2, b"1"))].concat();
    assert_eq!(told(&second), is("items[1].price", "it is no float"));
    let nested = field(8, &field(8, &field(5, &field(2, &field(1, b"\xff")))));
    assert_eq!(told(&nested), is("next.next.by_name[0].value.name", "it is no UTF-8"));
    assert_eq!(told(&field(4, &[0x80])), is("codes[0]", "the message ends in the middle"));
    assert_eq!(told(b"{\"id\": 1}"), is("", "the message ends in the middle"));
    let long = [vec![0x08], vec![0xff; 10], vec![1]].concat();
    assert_eq!(told(&long), is("id", "a number is too large"));
    let mut deep = Vec::new();
    for _ in 0..102 {
        let mut outer = vec![0x42];
        prost::encoding::encode_varint(deep.len() as u64, &mut outer);
        outer.extend_from_slice(&deep);
        deep = outer;
    }
    assert!(told(&deep).1.contains("more than 100"));
}

#[test]
fn a_required_field_is_required() {
    let source = "syntax = \"proto2\"; message Order { required int32 id = 1; repeated group Line = 2 { required string text = 3; } }";
    let checker = rules(source).compile().unwrap();
    assert_eq!(checker.check("", &[0x08, 1, 0x13, 0x1a, 1, b'x', 0x14]), Ok(()));
    assert_eq!(violation(&checker, &[]).0, "id");
    assert_eq!(violation(&checker, &[0x08, 1, 0x13, 0x14]).0, "line[0].text");
    assert_eq!(violation(&checker, &[0x08, 1, 0x13]).0, "line[0]");
    assert_eq!(violation(&checker, &[0x14]).1, "a group ends that did not begin");
}

#[test]
fn a_set_has_to_be_complete() {
    let error = |descriptors: Vec<u8>, message: &str| {
        let schema = Some(Schema::Protobuf { descriptors, message: message.to_owned() });
        PayloadRules { schema, ..PayloadRules::default() }.compile().unwrap_err().to_string()
    };
    assert!(error(b"no set".to_vec(), "Order").contains("FileDescriptorSet"));
    let Some(Schema::Protobuf { descriptors, .. }) = proto3(ORDER).schema else { unreachable!() };
    assert!(error(descriptors, "Other").contains("no message type \"Other\""));
    let file = prost_types::FileDescriptorProto {
        name: Some("a.proto".to_owned()),
        dependency: vec!["b.proto".to_owned()],
        ..Default::default()
    };
    let set = prost_types::FileDescriptorSet { file: vec![file] };
    assert!(error(set.encode_to_vec(), "Order").contains("b.proto"));
}

#[test]
fn comments_make_no_other_schema() {
    let one = proto3(ORDER);
    assert!(one.is(&proto3(&format!("// A comment.\n{ORDER}"))));
    assert!(!one.is(&proto3(&ORDER.replace("uint64 id", "uint32 id"))));
}

fn problems(old: &str, new: &str) -> Vec<String> {
    let problems = proto3(old).problems_with(&proto3(new)).into_iter();
    problems.map(|problem| format!("{} {}", problem.path, problem.keyword)).collect()
}

#[test]
fn a_type_can_grow() {
    let new = "
        message Order {
            reserved 4;
            uint64 number = 1;
            bytes note = 2;
            repeated Line items = 3;
            map<string, Line> by_name = 5;
            oneof payment { string card = 6; bool cash = 7; string coupon = 11; }
            Order next = 8;
            oneof lone { fixed32 four = 9; string none = 12; }
            repeated double eight = 10;
        }
        message Line { string name = 1; float price = 2; int32 kind = 3; repeated string tags = 4; }
    ";
    assert_eq!(problems(ORDER, new), [""; 0]);
}

#[test]
fn what_cannot_be_read_any_more_is_named() {
    let order = |fields: &str| {
        format!("message Order {{ {fields} }} enum Kind {{ NONE = 0; BOOK = 1; }} enum Sort {{ NO = 0; }}
            message A {{ int32 a = 1; }} message B {{ string a = 1; }}")
    };
    let cases = [
        ("int64 a = 1;", "int32 a = 1;", "a type"),
        ("int32 a = 1;", "sint32 a = 1;", "a type"),
        ("int32 a = 1;", "uint64 a = 1;", "a type"),
        ("bytes a = 1;", "string a = 1;", "a type"),
        ("A a = 1;", "bytes a = 1;", "a type"),
        ("A a = 1;", "B a = 1;", "a.a type"),
        ("repeated A a = 1;", "map<string, string> a = 1;", "a type"),
        ("repeated int32 a = 1;", "int32 a = 1;", "a label"),
        ("int32 a = 1;", "", "a reserved"),
        ("int32 a = 1;", "int32 a = 2;", "a number"),
        ("reserved 5 to 9;", "int32 a = 7; reserved 5, 6, 8, 9;", "a number"),
        ("reserved 5 to 9;", "reserved 5 to 7, 9;", " reserved"),
        ("Kind a = 1;", "Sort a = 1;", "a enum"),
        ("int32 a = 1; int32 b = 2;", "oneof c { int32 a = 1; int32 b = 2; }", "c oneof"),
    ];
    for (old, new, expected) in cases {
        assert_eq!(problems(&order(old), &order(new)), [expected], "{old} -> {new}");
    }
    let proto2 =
        |fields: &str| rules(&format!("syntax = \"proto2\"; message Order {{ {fields} }}"));
    for (old, new) in [
        ("", "required int32 a = 1;"),
        ("optional int32 a = 1;", "required int32 a = 1;"),
        ("required int32 a = 1;", "reserved 1;"),
    ] {
        let problems = proto2(old).problems_with(&proto2(new));
        assert_eq!((problems.len(), problems[0].keyword), (1, "label"), "{old} -> {new}");
    }
    let relaxed = proto2("required int32 a = 1;").problems_with(&proto2("optional int32 a = 1;"));
    assert_eq!(relaxed, []);
}

proptest! {
    /// The walk and the decoder of another crate agree on what is a message.
    #[test]
    fn the_walk_agrees_with_a_decoder(
        bytes in prop::collection::vec(prop_oneof![
            3 => 0..0x58_u8, 2 => 0..4_u8, 1 => any::<u8>()
        ], 0..24),
    ) {
        let rules = ORDER_RULES.with(Clone::clone);
        let Some(Schema::Protobuf { descriptors, message }) = &rules.schema else { unreachable!() };
        let pool = DescriptorPool::decode(descriptors.as_slice()).unwrap();
        let message = pool.get_message_by_name(message).unwrap();
        let decoded = DynamicMessage::decode(message, bytes.as_slice()).map(drop);
        let checked = rules.compile().unwrap().check("", &bytes);
        prop_assert_eq!(checked.is_ok(), decoded.is_ok(), "{:?} and {:?}", checked, decoded);
    }
}

thread_local! {
    // The decoder takes any kind of value for a map.
    static ORDER_RULES: PayloadRules = proto3(&ORDER.replace("map<string, Item>", "repeated Item"));
}
