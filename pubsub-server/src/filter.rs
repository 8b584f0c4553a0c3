//! Filters on the attributes of messages: text in a small language, as users of Google Pub/Sub know
//! it. docs/protocol.md has the grammar.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use winnow::combinator::{alt, cut_err, delimited, eof, preceded, repeat, terminated};
use winnow::error::{AddContext, ErrMode, ParserError};
use winnow::stream::{Offset as _, Stream};
use winnow::token::{none_of, one_of, take_while};
use winnow::{ModalResult, Parser};

use crate::limits;

/// Which messages are meant, by their attributes. Two filters are the same if they say the same,
/// however it is written.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Filter {
    text: Arc<str>,
    expression: Arc<Expression>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Expression {
    /// There is an attribute of this name.
    Has(String),
    /// There is one, with this value.
    Is(String, String),
    /// There is one whose value begins like this.
    HasPrefix(String, String),
    Not(Box<Expression>),
    All(Vec<Expression>),
    Any(Vec<Expression>),
}

/// A text is no filter; it says where and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidFilter {
    /// It has too many bytes.
    #[error("the filter has {bytes} bytes; {limit} are allowed", limit = limits::MAX_FILTER_BYTES)]
    TooLong {
        /// So many.
        bytes: usize,
    },
    /// It breaks the grammar.
    #[error("the filter is not valid at column {column}: expected {expected}, found {found}")]
    Syntax {
        /// Where, in characters from 1.
        column: usize,
        /// What could be there.
        expected: String,
        /// What is there.
        found: String,
    },
}

impl Filter {
    /// Parses a filter.
    pub fn parse(text: &str) -> Result<Self, InvalidFilter> {
        let bytes = text.len();
        if bytes > limits::MAX_FILTER_BYTES {
            return Err(InvalidFilter::TooLong { bytes });
        }
        match expression(&mut &*text, 0) {
            Ok(expression) => Ok(Self { text: text.into(), expression: Arc::new(expression) }),
            Err(ErrMode::Backtrack(failure) | ErrMode::Cut(failure)) => Err(failure.tell(text)),
            // Nothing here asks for more than there is.
            Err(ErrMode::Incomplete(_)) => Err(Failure::at(0).tell(text)),
        }
    }

    /// Whether a message with these attributes is meant.
    pub fn matches(&self, attributes: &HashMap<String, String>) -> bool {
        self.expression.matches(attributes)
    }

    /// The text it was parsed from.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl PartialEq for Filter {
    fn eq(&self, other: &Self) -> bool {
        self.expression == other.expression
    }
}

impl Eq for Filter {}

impl fmt::Display for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl TryFrom<String> for Filter {
    type Error = InvalidFilter;

    fn try_from(text: String) -> Result<Self, InvalidFilter> {
        Self::parse(&text)
    }
}

impl From<Filter> for String {
    fn from(filter: Filter) -> String {
        filter.text.as_ref().to_owned()
    }
}

impl Expression {
    fn matches(&self, attributes: &HashMap<String, String>) -> bool {
        match self {
            Self::Has(name) => attributes.contains_key(name),
            Self::Is(name, value) => attributes.get(name) == Some(value),
            Self::HasPrefix(name, prefix) => {
                attributes.get(name).is_some_and(|value| value.starts_with(prefix))
            }
            Self::Not(expression) => !expression.matches(attributes),
            Self::All(expressions) => expressions.iter().all(|each| each.matches(attributes)),
            Self::Any(expressions) => expressions.iter().any(|each| each.matches(attributes)),
        }
    }
}

/// What could have been where parsing got no further.
#[derive(Debug)]
struct Failure {
    /// The bytes from there to the end.
    left: usize,
    expected: Vec<&'static str>,
}

impl Failure {
    fn at(left: usize) -> Self {
        Self { left, expected: Vec::new() }
    }

    fn tell(self, text: &str) -> InvalidFilter {
        let (before, rest) = text.split_at(text.len() - self.left);
        let expected = match self.expected.split_last() {
            None => "something else".to_owned(),
            Some((last, [])) => (*last).to_owned(),
            Some((last, others)) => format!("{} or {last}", others.join(", ")),
        };
        let word = rest.split_whitespace().next().unwrap_or_default();
        let most = limits::MAX_FILTER_TOKEN_CHARS;
        let found = match word.chars().take(most).collect::<String>() {
            word if word.is_empty() => "the end".to_owned(),
            word => format!("`{word}`"),
        };
        InvalidFilter::Syntax { column: before.chars().count() + 1, expected, found }
    }
}

impl<'a> ParserError<&'a str> for Failure {
    type Inner = Self;

    fn from_input(input: &&'a str) -> Self {
        Self::at(input.len())
    }

    /// Who got further knows better what is wrong.
    fn or(mut self, other: Self) -> Self {
        if self.left != other.left {
            return if self.left < other.left { self } else { other };
        }
        self.expected.extend(other.expected);
        self
    }

    fn into_inner(self) -> Result<Self, Self> {
        Ok(self)
    }
}

impl<'a> AddContext<&'a str> for Failure {
    /// Names what is expected, if it did not even begin.
    fn add_context(
        self,
        input: &&'a str,
        start: &<&'a str as Stream>::Checkpoint,
        what: &'static str,
    ) -> Self {
        let left = input.len() + input.offset_from(start);
        if self.left == left { Self { left, expected: vec![what] } } else { self }
    }
}

type Parsed<T> = ModalResult<T, Failure>;

/// What comes after a term.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Link {
    And,
    Or,
    End,
}

/// Terms that are joined, up to the end of the text, or to the parenthesis that ends them.
fn expression(input: &mut &str, depth: usize) -> Parsed<Expression> {
    let mut terms = vec![term(input, depth)?];
    let mut joined = Link::End;
    loop {
        space(input)?;
        let left = input.len();
        match link(input, depth)? {
            Link::End => break,
            link @ (Link::And | Link::Or) if joined != Link::End && link != joined => {
                let expected = vec!["parentheses (neither AND nor OR goes first)"];
                return Err(ErrMode::Cut(Failure { left, expected }));
            }
            link @ (Link::And | Link::Or) => joined = link,
        }
        terms.push(term(input, depth)?);
    }
    Ok(match joined {
        Link::And => Expression::All(terms),
        Link::Or => Expression::Any(terms),
        Link::End => terms.remove(0),
    })
}

fn link(input: &mut &str, depth: usize) -> Parsed<Link> {
    let and = keyword("AND").context("AND").value(Link::And);
    let or = keyword("OR").context("OR").value(Link::Or);
    if depth == 0 {
        alt((and, or, eof.context("the end").value(Link::End))).parse_next(input)
    } else {
        alt((and, or, ')'.context("`)`").value(Link::End))).parse_next(input)
    }
}

fn term(input: &mut &str, depth: usize) -> Parsed<Expression> {
    space(input)?;
    if depth > limits::MAX_FILTER_DEPTH {
        let expected = vec!["fewer parentheses and NOT within each other"];
        return Err(ErrMode::Cut(Failure { left: input.len(), expected }));
    }
    let deeper = depth + 1;
    let not = preceded(keyword("NOT").context("NOT"), |input: &mut &str| term(input, deeper));
    let group = preceded('('.context("`(`"), |input: &mut &str| expression(input, deeper));
    let not = not.map(|expression| Expression::Not(Box::new(expression)));
    alt((attribute, has_prefix, not, group)).parse_next(input)
}

/// `attributes:name`, or `attributes.name` compared with a text.
fn attribute(input: &mut &str) -> Parsed<Expression> {
    keyword("attributes").context("attributes").parse_next(input)?;
    let has = preceded(sign(":", "`:`"), name).map(Expression::Has);
    alt((has, comparison)).parse_next(input)
}

fn comparison(input: &mut &str) -> Parsed<Expression> {
    let name = preceded(sign(".", "`.`"), name).parse_next(input)?;
    let equal = alt((sign("=", "`=`").value(true), sign("!=", "`!=`").value(false)));
    let (equal, value) = (equal, spaced(quoted)).parse_next(input)?;
    let is = Expression::Is(name, value);
    Ok(if equal { is } else { Expression::Not(Box::new(is)) })
}

/// `hasPrefix(attributes.name, "prefix")`.
fn has_prefix(input: &mut &str) -> Parsed<Expression> {
    keyword("hasPrefix").context("hasPrefix").parse_next(input)?;
    let attributes = (sign("(", "`(`"), spaced(keyword("attributes").context("attributes")));
    let name = preceded((attributes, sign(".", "`.`")), name).parse_next(input)?;
    let prefix = delimited(sign(",", "`,`"), spaced(quoted), sign(")", "`)`"));
    prefix.map(|prefix| Expression::HasPrefix(name.clone(), prefix)).parse_next(input)
}

fn name(input: &mut &str) -> Parsed<String> {
    let plain = take_while(1.., is_plain).context("a name");
    spaced(alt((plain.map(str::to_owned), quoted))).parse_next(input)
}

/// A text in double quotes, in which a backslash takes a quote or a backslash as it is.
fn quoted(input: &mut &str) -> Parsed<String> {
    '"'.context("a text in double quotes").parse_next(input)?;
    let escaped = one_of(['"', '\\']).context("`\"` or `\\` after a backslash");
    let character = alt((none_of(['"', '\\']), preceded('\\', cut_err(escaped))));
    let push = |mut text: String, character| {
        text.push(character);
        text
    };
    let text = repeat(0.., character).fold(String::new, push);
    terminated(text, cut_err('"'.context("`\"` at the end of the text"))).parse_next(input)
}

/// A word of the language, and not only the beginning of one.
fn keyword<'a>(word: &'static str) -> impl Parser<&'a str, (), ErrMode<Failure>> {
    take_while(1.., is_plain).verify(move |found: &str| found == word).void()
}

fn sign<'a>(sign: &'static str, what: &'static str) -> impl Parser<&'a str, (), ErrMode<Failure>> {
    spaced(sign.context(what).void())
}

fn spaced<'a, T>(
    parser: impl Parser<&'a str, T, ErrMode<Failure>>,
) -> impl Parser<&'a str, T, ErrMode<Failure>> {
    preceded(space, parser)
}

fn space(input: &mut &str) -> Parsed<()> {
    take_while(0.., char::is_whitespace).void().parse_next(input)
}

/// What a name can consist of without quotes.
fn is_plain(character: char) -> bool {
    character.is_ascii_alphanumeric() || matches!(character, '_' | '-')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Writes a filter down, in one of several ways.
    fn print(expression: &Expression) -> String {
        let quote = |text: &str| format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""));
        let name = |name: &String| match name.chars().all(is_plain) && !name.is_empty() {
            true => name.clone(),
            false => quote(name),
        };
        let join = |all: &[Expression], word: &str| {
            let each = |expression: &Expression| {
                let compound = matches!(expression, Expression::All(_) | Expression::Any(_));
                if compound { format!("({})", print(expression)) } else { print(expression) }
            };
            all.iter().map(each).collect::<Vec<_>>().join(word)
        };
        match expression {
            Expression::Has(has) => format!("attributes:{}", name(has)),
            Expression::Is(is, value) => format!("attributes.{}={}", name(is), quote(value)),
            Expression::HasPrefix(has, prefix) => {
                format!("hasPrefix( attributes . {} ,{})", name(has), quote(prefix))
            }
            Expression::Not(not) => {
                if let Expression::Is(is, value) = &**not
                    && value.len() % 2 == 0
                {
                    return format!("attributes.{} != {}", name(is), quote(value));
                }
                format!("NOT {}", join(std::slice::from_ref(&**not), ""))
            }
            Expression::All(all) => join(all, " AND "),
            Expression::Any(any) => join(any, "\tOR\n"),
        }
    }

    fn text() -> impl Strategy<Value = String> {
        prop_oneof![
            prop::sample::select(vec!["", "a", "b", "ab", "AND", "dead-letter-reason", "0", "_"])
                .prop_map(str::to_owned),
            "[ab\"\\\\ .:)ä]{0,3}",
        ]
    }

    fn expressions() -> impl Strategy<Value = Expression> {
        let leaf = prop_oneof![
            text().prop_map(Expression::Has),
            (text(), text()).prop_map(|(name, value)| Expression::Is(name, value)),
            (text(), text()).prop_map(|(name, value)| Expression::HasPrefix(name, value)),
        ];
        leaf.prop_recursive(4, 12, 3, |inner| {
            prop_oneof![
                inner.clone().prop_map(|not| Expression::Not(Box::new(not))),
                prop::collection::vec(inner.clone(), 2..4).prop_map(Expression::All),
                prop::collection::vec(inner, 2..4).prop_map(Expression::Any),
            ]
        })
    }

    fn attributes() -> impl Strategy<Value = HashMap<String, String>> {
        prop::collection::hash_map(text(), text(), 0..4)
    }

    /// All that an expression says, spelled out from the attributes' side.
    fn model(expression: &Expression, attributes: &HashMap<String, String>) -> bool {
        let any = |name: &str, holds: &dyn Fn(&str) -> bool| {
            attributes.iter().filter(|(own, value)| *own == name && holds(value)).count() > 0
        };
        match expression {
            Expression::Has(name) => any(name, &|_| true),
            Expression::Is(name, expected) => any(name, &|value| value == expected),
            Expression::HasPrefix(name, prefix) => any(name, &|value| {
                value.bytes().zip(prefix.bytes()).all(|(a, b)| a == b)
                    && value.len() >= prefix.len()
            }),
            Expression::Not(not) => usize::from(model(not, attributes)) == 0,
            Expression::All(all) => all.iter().filter(|each| !model(each, attributes)).count() == 0,
            Expression::Any(any) => any.iter().filter(|each| model(each, attributes)).count() > 0,
        }
    }

    proptest! {
        #[test]
        fn what_is_printed_is_parsed_as_it_was(expression in expressions()) {
            let text = print(&expression);
            prop_assume!(text.len() <= limits::MAX_FILTER_BYTES);
            let parsed = Filter::parse(&text);
            prop_assert_eq!(parsed.map(|filter| filter.expression), Ok(Arc::new(expression)), "{}", text);
        }

        #[test]
        fn a_filter_means_what_the_model_says(
            expression in expressions(),
            attributes in attributes(),
        ) {
            prop_assert_eq!(expression.matches(&attributes), model(&expression, &attributes));
        }

        #[test]
        fn no_text_panics(text in ".{0,80}") {
            let _ = Filter::parse(&text);
        }

        #[test]
        fn no_sequence_of_words_panics(
            words in prop::collection::vec(
                prop::sample::select(vec![
                    "attributes", "hasPrefix", "AND", "OR", "NOT", "(", ")", ".", ":", "=", "!=",
                    ",", "a", "\"b\"", "\"", "\\", " ", "ä", "-",
                ]),
                0..40,
            ),
        ) {
            let text = words.concat();
            if let Err(InvalidFilter::Syntax { column, .. }) = Filter::parse(&text) {
                prop_assert!((1..=text.chars().count() + 1).contains(&column));
            }
        }
    }

    #[track_caller]
    fn check(text: &str, attributes: &[(&str, &str)]) -> bool {
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        Filter::parse(text).unwrap().matches(&attributes.iter().map(owned).collect())
    }

    #[test]
    fn filters_mean_what_they_say() {
        let eu = [("region", "eu-west"), ("odd/name", "x \"y\"")];
        for matches in [
            "attributes:region",
            "attributes.region = \"eu-west\"",
            "attributes.region!=\"us\"",
            "attributes.absent != \"us\"",
            "NOT attributes:absent",
            "NOT NOT attributes:region",
            "hasPrefix(attributes.region, \"eu-\")",
            "attributes.\"odd/name\" = \"x \\\"y\\\"\"",
            " ( attributes:region )\nAND(NOT attributes:absent OR attributes:other)",
            "NOT attributes:absent AND attributes:region",
        ] {
            assert!(check(matches, &eu), "{matches}");
        }
        for fails in [
            "attributes:Region",
            "attributes.region = \"EU-west\"",
            "attributes.absent = \"\"",
            "NOT attributes:region AND attributes:region",
            "NOT (attributes:absent OR attributes:region)",
            "hasPrefix(attributes.absent, \"\")",
        ] {
            assert!(!check(fails, &eu), "{fails}");
        }
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        let check = |text: &str, expected: &str| {
            let error = Filter::parse(text).map(|filter| filter.text).unwrap_err().to_string();
            let error = error.replace("the filter is not valid at column ", "");
            assert_eq!(error, expected, "{text}");
        };
        let start = "attributes, hasPrefix, NOT or `(`";
        check("", &format!("1: expected {start}, found the end"));
        check("type = \"a\"", &format!("1: expected {start}, found `type`"));
        check("attributes", "11: expected `:` or `.`, found the end");
        check("attributes.a ~ \"x\"", "14: expected `=` or `!=`, found `~`");
        check("attributes.a = x", "16: expected a text in double quotes, found `x`");
        check("attributes.a = 'x'", "16: expected a text in double quotes, found `'x'`");
        check("attributes.ä:b", "12: expected a name or a text in double quotes, found `ä:b`");
        check("attributes:a and attributes:b", "14: expected AND, OR or the end, found `and`");
        check("(attributes:a", "14: expected AND, OR or `)`, found the end");
        check("attributes:a)", "13: expected AND, OR or the end, found `)`");
        check("attributes:a AND", &format!("17: expected {start}, found the end"));
        check(
            "attributes.\"ä\" = \"\\n\"",
            "20: expected `\"` or `\\` after a backslash, found `n\"`",
        );
        check("attributes.a = \"x", "18: expected `\"` at the end of the text, found the end");
        check("hasPrefix(attributes.a)", "23: expected `,`, found `)`");
        let mixed = "attributes:a AND attributes:b OR attributes:c";
        check(mixed, "31: expected parentheses (neither AND nor OR goes first), found `OR`");
    }

    #[test]
    fn filters_are_bounded() {
        let nested = |depth: usize| format!("{}attributes:a", "NOT ".repeat(depth));
        assert!(Filter::parse(&nested(limits::MAX_FILTER_DEPTH)).is_ok());
        for deep in [
            nested(limits::MAX_FILTER_DEPTH + 1),
            "(".repeat(limits::MAX_FILTER_BYTES),
            "NOT ".repeat(limits::MAX_FILTER_BYTES / 4),
        ] {
            let error = Filter::parse(&deep).unwrap_err().to_string();
            assert!(error.contains("expected fewer parentheses"), "{error}");
        }
        let long = format!("attributes:{}", "a".repeat(limits::MAX_FILTER_BYTES));
        assert_eq!(Filter::parse(&long), Err(InvalidFilter::TooLong { bytes: long.len() }));
    }

    #[test]
    fn the_same_said_in_other_words_is_the_same() {
        let parse = |text| Filter::parse(text).unwrap();
        assert_eq!(parse("attributes.a=\"x\""), parse("  (attributes . \"a\" = \"x\")"));
        assert_ne!(parse("attributes.a=\"x\""), parse("attributes.a = \"y\""));
    }
}
