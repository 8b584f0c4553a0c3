//! Programs that scenarios start and kill: this test binary, started again to run one ignored test.

use std::{env, process::Stdio};

use anyhow::{Context as _, Result};
use pubsub_tests::wait;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader, Lines},
    process::{Child, ChildStderr, Command},
};

use crate::app::SOON;

/// A program that runs. Dropping it kills it.
pub(crate) struct Program {
    child: Child,
    lines: Lines<BufReader<ChildStderr>>,
}

impl Program {
    /// Starts a program, which is the ignored test of this path, with these environment variables.
    pub(crate) fn start(test: &str, variables: &[(&str, &str)]) -> Result<Self> {
        let mut child = Command::new(env::current_exe()?)
            .args(["--exact", test, "--ignored", "--nocapture", "--test-threads=1"])
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let lines = BufReader::new(child.stderr.take().context("stderr is piped")?).lines();
        Ok(Self { child, lines })
    }

    /// Waits until it says this on a line of standard error.
    pub(crate) async fn says(&mut self, text: &str) -> Result<()> {
        let says = async {
            while let Some(line) = self.lines.next_line().await? {
                if line == text {
                    return Ok(());
                }
                eprintln!("    {line}");
            }
            anyhow::bail!("it has ended")
        };
        wait::soon(text, SOON, says).await?.with_context(|| format!("it never said {text:?}"))
    }

    /// Kills it, and gives what it has said since.
    pub(crate) async fn kill(mut self) -> Result<Vec<String>> {
        self.child.kill().await.context("SIGKILL")?;
        self.rest().await
    }

    /// Kills it once it has said this many lines, however fast it is; gives all that it has said.
    pub(crate) async fn kill_after(mut self, lines: u64) -> Result<Vec<String>> {
        let mut said = Vec::new();
        let says = async {
            for _ in 0..lines {
                said.push(self.lines.next_line().await?.context("it has ended")?);
            }
            anyhow::Ok(())
        };
        wait::soon("its lines", SOON, says).await??;
        said.extend(self.kill().await?);
        Ok(said)
    }

    async fn rest(&mut self) -> Result<Vec<String>> {
        let mut said = Vec::new();
        while let Some(line) = self.lines.next_line().await? {
            said.push(line);
        }
        Ok(said)
    }
}

/// What a program was started with; a scenario has set it.
pub(crate) fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| panic!("{name} is set by whoever starts this program"))
}

/// The runtime of a program.
pub(crate) fn run(body: impl Future<Output = Result<()>>) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(4)
        .enable_all()
        .build()
        .expect("the runtime starts");
    if let Err(error) = runtime.block_on(body) {
        panic!("{error:#}");
    }
}
