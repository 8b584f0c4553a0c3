//! The server binary, built once per test run so that no run uses a stale one.

use std::{
    env,
    path::PathBuf,
    process::{Command, Stdio},
    sync::OnceLock,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use serde_json::Value;

/// Uses this server instead of building one.
pub const SERVER_VARIABLE: &str = "PUBSUB_SERVER_BIN";

/// The path of the server binary of this workspace, in the profile of the tests.
///
/// # Errors
///
/// If it does not build.
pub fn server() -> Result<PathBuf> {
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    BUILT
        .get_or_init(|| build().map_err(|error| format!("{error:#}")))
        .clone()
        .map_err(|text| anyhow!(text))
}

fn build() -> Result<PathBuf> {
    if let Some(path) = env::var_os(SERVER_VARIABLE) {
        return Ok(path.into());
    }
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .args(["build", "-p", "pubsub-server", "--bin", "pubsub-server"])
        .args(["--features", "failpoints"])
        .args(["--message-format", "json-render-diagnostics"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stderr(Stdio::inherit());
    if !cfg!(debug_assertions) {
        cargo.arg("--release");
    }
    let output = cargo.output().context("cargo does not start")?;
    ensure!(output.status.success(), "the server does not build");
    // Cargo itself says where the binary is: it knows the target directory and the target.
    String::from_utf8(output.stdout)?
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["target"]["name"] == "pubsub-server")
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .context("cargo names no executable")
}
