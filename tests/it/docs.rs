//! The documents stay true: what they name exists, and what exists is in them.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use pubsub_proto::v1::ErrorReason;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("it is a package below the root").into()
}

fn read(path: &str) -> Result<String> {
    fs::read_to_string(root().join(path)).with_context(|| path.to_owned())
}

/// The text of all Rust files below a folder.
fn sources(folder: &Path, text: &mut String) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            sources(&path, text)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            text.push_str(&fs::read_to_string(&path)?);
        }
    }
    Ok(())
}

/// What stands between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

#[test]
fn every_promise_names_tests_that_exist() -> Result<()> {
    let mut code = String::new();
    for folder in ["tests/it", "pubsub-server/src", "pubsub-client/src"] {
        sources(&root().join(folder), &mut code)?;
    }
    let document = read("docs/guarantees.md")?;
    let numbered = (1..=13).map(|number| format!("P{number}"));
    for promise in numbered.chain(["Filters", "Outbox", "Inbox"].map(str::to_owned)) {
        let heading = format!("\n## {promise}\n");
        let (_, rest) = document.split_once(&heading).with_context(|| heading.clone())?;
        let section = rest.split("\n## ").next().unwrap_or(rest);
        let tests: Vec<_> = quoted(section)
            .filter(|quote| {
                ["it::", "storage::", "broker::", "schema::", "filter::", "client::"]
                    .iter()
                    .any(|p| quote.starts_with(p))
            })
            .filter_map(|path| path.rsplit("::").next())
            .filter(|name| !name.is_empty())
            .collect();
        ensure!(!tests.is_empty(), "{promise} names no test");
        for test in tests {
            ensure!(code.contains(&format!("fn {test}(")), "{promise}: there is no test {test}");
        }
    }
    Ok(())
}

#[test]
fn every_error_reason_is_documented_with_cause_and_fix() -> Result<()> {
    let document = read("docs/protocol.md")?;
    for number in 1.. {
        let Ok(reason) = ErrorReason::try_from(number) else { break };
        let name = reason.as_str_name().trim_start_matches("ERROR_REASON_");
        let row = document.lines().find(|line| line.starts_with(&format!("| `{name}` |")));
        let cells = row.with_context(|| format!("{name} is not documented"))?.split('|');
        ensure!(cells.filter(|cell| !cell.trim().is_empty()).count() == 3, "{name}: cells");
    }
    Ok(())
}

#[test]
fn every_dependency_is_justified() -> Result<()> {
    let manifest = read("Cargo.toml")?;
    let (_, rest) = manifest.split_once("[workspace.dependencies]").context("dependencies")?;
    let section = rest.split("\n[").next().unwrap_or(rest);
    let names = section.lines().filter_map(|line| line.split_once(" = ")).map(|(name, _)| name);
    let document = read("CONTRIBUTING.md")?;
    let justified: BTreeSet<&str> = quoted(&document).collect();
    for name in names.filter(|name| !name.starts_with("pubsub-")) {
        ensure!(justified.contains(name), "CONTRIBUTING.md does not say what {name} is for");
    }
    Ok(())
}

#[test]
fn links_between_documents_lead_somewhere() -> Result<()> {
    let documents = [
        "README.md",
        "ARCHITECTURE.md",
        "CONTRIBUTING.md",
        "docs/guarantees.md",
        "docs/protocol.md",
    ];
    for document in documents {
        let text = read(document)?;
        let folder = root().join(document).parent().context("a folder")?.to_owned();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let file = link.split('#').next().unwrap_or(link);
            let elsewhere = file.is_empty() || file.starts_with("http");
            ensure!(elsewhere || folder.join(file).exists(), "{document}: {link} is nowhere");
        }
    }
    Ok(())
}
