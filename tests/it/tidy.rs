//! Reads the sources and enforces what the compiler cannot: layers that point one way, short
//! files, and no work left without an owner.

use std::{
    fs,
    ops::Range,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};

/// The longest file, in lines that are not tests.
const MAX_LINES: usize = 600;

/// Files under a path do not name certain things.
struct Layer {
    /// A file or a folder; a file may be named without its ending.
    path: &'static str,
    /// Whole words or paths, as in the code; comments, texts and tests do not count.
    never: &'static [&'static str],
    why: &'static str,
}

const LAYERS: &[Layer] = &[
    Layer {
        path: "pubsub-server/src/wire",
        never: &["redb", "nats", "storage::memory", "storage::redb"],
        why: "the wire knows the broker, and no engine",
    },
    Layer {
        path: "pubsub-server/src/broker",
        never: &["tonic", "prost", "prost_types", "hyper", "pubsub_proto", "redb", "wire"],
        why: "the domain is deaf to the wire and to the engine",
    },
    Layer {
        path: "pubsub-server/src/storage",
        never: &["broker", "wire", "tonic", "hyper", "pubsub_proto"],
        why: "an engine knows its database and the storage contract",
    },
    Layer {
        path: "pubsub-server/src/schema",
        never: &["async", "tokio", "tonic", "std::fs", "std::net"],
        why: "schemas are checked without I/O and without a clock",
    },
    Layer {
        path: "pubsub-server/src/filter",
        never: &["async", "tokio", "tonic", "prost", "std::fs", "std::time"],
        why: "a filter is a function of attributes, without I/O and without a clock",
    },
    Layer {
        path: "pubsub-client/src/subscriber/resume",
        never: &["async", "tokio", "tonic"],
        why: "resume is a state machine without I/O and without a clock",
    },
    Layer {
        path: "pubsub-client/src/subscriber/dedup",
        never: &["async", "tokio", "tonic"],
        why: "dedup is a state machine without I/O and without a clock",
    },
    Layer {
        path: "pubsub-client/src/inbox/processed",
        never: &["async", "tokio", "tonic", "redb"],
        why: "what was processed is a set without I/O and without a clock",
    },
    Layer {
        path: "pubsub-client/src/outbox/books",
        never: &["async", "tokio", "tonic", "redb"],
        why: "the books of an outbox are kept without I/O and without a clock",
    },
];

/// Modules of the server that import nothing of ours but each other.
const LEAVES: [&str; 7] = ["body", "names", "record", "limits", "env", "schema", "filter"];

/// A source file, and its code without comments, texts and tests.
struct Source {
    path: String,
    text: String,
    code: String,
}

impl Source {
    fn read(root: &Path, file: &Path) -> Result<Self> {
        let text = fs::read_to_string(file)?;
        let path = file.strip_prefix(root)?.to_string_lossy().into_owned();
        let is_test = path.ends_with("tests.rs") || path.contains("/tests/");
        let code = match text.find("#[cfg(test)]\nmod ") {
            _ if is_test => String::new(),
            Some(tests) => strip(&text[..tests]),
            None => strip(&text),
        };
        Ok(Self { path, text, code })
    }

    /// The modules in files of their own that are only there in tests, without their endings.
    fn test_modules(&self) -> Vec<String> {
        let folder = match self.path.rsplit_once('/') {
            Some((folder, "mod.rs" | "lib.rs" | "main.rs")) => folder,
            _ => self.path.trim_end_matches(".rs"),
        };
        let mut lines = self.text.lines().map(str::trim).peekable();
        let mut modules = Vec::new();
        while let Some(line) = lines.next() {
            let next = lines.peek().and_then(|next| next.strip_suffix(';'));
            let name = next.and_then(|next| next.rsplit_once("mod ").map(|(_, name)| name));
            if let Some(name) = name.filter(|_| line == "#[cfg(test)]") {
                modules.push(format!("{folder}/{name}"));
            }
        }
        modules
    }

    fn is_under(&self, path: &str) -> bool {
        self.path.strip_prefix(path).is_some_and(|rest| rest.starts_with(['/', '.']))
    }

    /// The line of the first place where the code names a thing.
    fn names(&self, thing: &str) -> Option<usize> {
        let place = word(&self.code, thing)?;
        Some(1 + self.code[..place.start].matches('\n').count())
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the package lies in the workspace")
        .into()
}

/// All sources of the workspace.
fn sources() -> Result<Vec<Source>> {
    let root = root();
    let mut folders = vec![root.clone()];
    let mut sources = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if path.is_dir() {
                if name != "target" && !name.starts_with('.') {
                    folders.push(path);
                }
            } else if name.ends_with(".rs") {
                sources.push(Source::read(&root, &path)?);
            }
        }
    }
    ensure!(!sources.is_empty(), "there are no sources");
    let tests: Vec<_> = sources.iter().flat_map(Source::test_modules).collect();
    for source in &mut sources {
        if tests.iter().any(|test| source.is_under(test)) {
            source.code.clear();
        }
    }
    Ok(sources)
}

/// Finds a whole word, or a path of whole words. One that ends with `::` is the beginning of a
/// path.
fn word(code: &str, word: &str) -> Option<Range<usize>> {
    let is_part = |character: char| character.is_alphanumeric() || character == '_';
    code.match_indices(word)
        .find(|(start, _)| {
            let before = code[..*start].chars().next_back();
            let after = code[start + word.len()..].chars().next();
            let goes_on = word.ends_with(is_part) && after.is_some_and(is_part);
            !before.is_some_and(is_part) && !goes_on
        })
        .map(|(start, _)| start..start + word.len())
}

/// Blanks out comments and texts; lines stay where they are.
fn strip(source: &str) -> String {
    let mut code = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(first) = rest.chars().next() {
        let length = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |end| end + 2)
        } else if let Some(raw) = rest.strip_prefix("r#\"") {
            raw.find("\"#").map_or(rest.len(), |end| end + 5)
        } else if first == '"' {
            text_length(rest)
        } else {
            // A quote as a character must not look like the beginning of a text.
            let length = match first {
                '\'' if rest.starts_with("'\"'") => 3,
                '\'' if rest.starts_with("'\\\"'") => 4,
                _ => first.len_utf8(),
            };
            code.push_str(&rest[..length]);
            rest = &rest[length..];
            continue;
        };
        code.extend(rest[..length].chars().filter(|character| *character == '\n'));
        rest = &rest[length..];
    }
    code
}

fn text_length(text: &str) -> usize {
    let mut escaped = false;
    for (index, character) in text.char_indices().skip(1) {
        match character {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return index + 1,
            _ => {}
        }
    }
    text.len()
}

fn none(violations: &[String]) -> Result<()> {
    ensure!(violations.is_empty(), "\n{}", violations.join("\n"));
    Ok(())
}

#[test]
fn layers_point_one_way() -> Result<()> {
    let sources = sources()?;
    let mut violations = Vec::new();
    for layer in LAYERS {
        let files: Vec<_> = sources.iter().filter(|source| source.is_under(layer.path)).collect();
        ensure!(!files.is_empty(), "there is no {}", layer.path);
        for file in files {
            for thing in layer.never {
                if let Some(line) = file.names(thing) {
                    let (path, why) = (&file.path, layer.why);
                    violations.push(format!("{path}:{line} names {thing}: {why}"));
                }
            }
        }
    }
    none(&violations)
}

#[test]
fn leaves_import_nothing_of_ours_but_each_other() -> Result<()> {
    let sources = sources()?;
    let mut violations = Vec::new();
    for leaf in LEAVES {
        let path = format!("pubsub-server/src/{leaf}");
        let files: Vec<_> = sources.iter().filter(|source| source.is_under(&path)).collect();
        ensure!(!files.is_empty(), "there is no {path}");
        for file in files {
            let path = &file.path;
            if let Some(line) = file.names("pubsub_proto") {
                violations.push(format!("{path}:{line} names the protocol"));
            }
            let imports = file.code.match_indices("crate::");
            for imported in imports.map(|(place, found)| &file.code[place + found.len()..]) {
                let is_leaf = |leaf: &&str| word(imported, leaf).is_some_and(|at| at.start == 0);
                if !LEAVES.iter().any(is_leaf) {
                    let name = imported.lines().next().unwrap_or_default();
                    violations.push(format!("{path} imports {name}"));
                }
            }
        }
    }
    none(&violations)
}

#[test]
fn only_the_client_s_retry_names_backoff() -> Result<()> {
    let mut violations = Vec::new();
    for source in sources()? {
        if source.path == "pubsub-client/src/retry.rs" {
            ensure!(source.names("backoff").is_some(), "retry does not use backoff");
        } else if let Some(line) = source.names("backoff::") {
            violations.push(format!("{}:{line} names backoff", source.path));
        }
    }
    none(&violations)
}

#[test]
fn client_and_server_share_only_the_protocol() -> Result<()> {
    for package in ["pubsub-client", "pubsub-server"] {
        let manifest = fs::read_to_string(root().join(package).join("Cargo.toml"))?;
        let (_, rest) = manifest
            .split_once("\n[dependencies]\n")
            .with_context(|| format!("{package} has no dependencies"))?;
        let section = rest.split("\n[").next().unwrap_or_default();
        for line in section.lines().filter(|line| line.starts_with("pubsub-")) {
            ensure!(line.starts_with("pubsub-proto"), "{package} depends on {line}");
        }
    }
    Ok(())
}

#[test]
fn files_are_short() -> Result<()> {
    let mut violations = Vec::new();
    for source in sources()? {
        let lines = source.code.lines().count();
        if lines > MAX_LINES {
            violations.push(format!("{} has {lines} lines", source.path));
        }
    }
    none(&violations)
}

#[test]
fn work_left_to_do_has_an_owner() -> Result<()> {
    // Put together here, so that this file does not find itself.
    let marks = [["TO", "DO"].concat(), ["FIX", "ME"].concat()];
    let mut violations = Vec::new();
    for source in sources()? {
        for (number, line) in source.text.lines().enumerate() {
            for mark in &marks {
                let place = word(line, mark);
                if place.is_some_and(|place| !line[place.end..].starts_with('(')) {
                    violations.push(format!("{}:{}: {}", source.path, number + 1, line.trim()));
                }
            }
        }
    }
    none(&violations)
}

#[test]
fn only_code_counts() {
    let source = "a // redb\n/* redb\n */ b \"redb \\\" redb\" '\"' c r#\"redb\"# redb_x xredb";
    let code = strip(source);
    assert_eq!(word(&code, "redb"), None, "{code}");
    assert_eq!(code.lines().count(), source.lines().count());
    assert!(word("use redb::Database;", "redb").is_some());
    assert!(word("use redb::Database;", "redb::").is_some());
    assert_eq!(word("redb.open()", "redb::"), None);
}
