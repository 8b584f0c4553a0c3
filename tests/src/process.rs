//! A server as a child process: started, frozen, killed, and started again on the same data.

use std::{
    collections::VecDeque,
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncRead, BufReader},
    process::{Child, ChildStdout, Command},
    task::JoinSet,
};

use crate::{binary, usage::Usage, wait};

/// How long a server may take until it serves; a debug build on a busy machine is slow.
const START_WITHIN: Duration = Duration::from_secs(20);

/// How many lines of a server's log are kept for the report of a failure.
const LOG_LINES: usize = 200;

/// What stands before the address in the one line a server prints.
const READY: &str = "listening on ";

/// The end of a server's log, over all its restarts.
#[derive(Clone, Debug, Default)]
pub struct Log(Arc<Mutex<VecDeque<String>>>);

impl Log {
    fn lines(&self) -> MutexGuard<'_, VecDeque<String>> {
        self.0.lock().expect("nothing panics while holding the log")
    }

    fn push(&self, line: String) {
        let mut lines = self.lines();
        if lines.len() == LOG_LINES {
            lines.pop_front();
        }
        lines.push_back(line);
    }

    /// What follows a text, up to the next quote, in the last line that has it.
    pub fn after(&self, text: &str) -> Option<String> {
        let lines = self.lines();
        let (_, rest) = lines.iter().rev().find_map(|line| line.split_once(text))?;
        rest.split('"').next().map(str::to_owned)
    }

    /// Whether a line that is still kept has this text.
    pub fn contains(&self, text: &str) -> bool {
        self.lines().iter().any(|line| line.contains(text))
    }
}

impl fmt::Display for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.lines().iter().try_for_each(|line| writeln!(f, "    {line}"))
    }
}

/// A running server. Dropping it kills it.
#[derive(Debug)]
pub struct Server {
    data: PathBuf,
    log: Log,
    child: Child,
    address: SocketAddr,
    /// Reads the child's output; without a reader the child would block on a full pipe.
    _readers: JoinSet<()>,
}

impl Server {
    /// Starts a server on `data` and a free port, and waits until it serves.
    ///
    /// # Errors
    ///
    /// If it exits instead, with the end of its log.
    pub async fn start(data: &Path, log: Log) -> Result<Self> {
        Self::start_at(data, 0, log).await
    }

    /// Starts a server on `data` and this port.
    ///
    /// # Errors
    ///
    /// If it exits instead, with the end of its log.
    pub async fn start_at(data: &Path, port: u16, log: Log) -> Result<Self> {
        Self::serving(data, spawn(data, port, &[])?, log).await
    }

    /// Starts a server on `data` that is killed when it comes to this failpoint, one or several
    /// places divided by commas that it passes one after the other.
    ///
    /// # Errors
    ///
    /// If it exits before it serves, with the end of its log.
    pub async fn start_to_fail(data: &Path, failpoint: &str, log: Log) -> Result<Self> {
        Self::start_with(data, &[("PUBSUB_FAILPOINT", failpoint)], log).await
    }

    /// Starts a server on `data` with these environment variables.
    ///
    /// # Errors
    ///
    /// If it exits before it serves, with the end of its log.
    pub async fn start_with(data: &Path, variables: &[(&str, &str)], log: Log) -> Result<Self> {
        Self::serving(data, spawn(data, 0, variables)?, log).await
    }

    async fn serving(data: &Path, mut child: Child, log: Log) -> Result<Self> {
        let mut readers = JoinSet::new();
        let stderr = child.stderr.take().expect("stderr is piped");
        readers.spawn(keep(stderr, log.clone()));
        let stdout = child.stdout.take().expect("stdout is piped");
        let address = match wait::soon("the ready line", START_WITHIN, ready(stdout)).await? {
            Ok(address) => address,
            Err(error) => {
                let status = wait::soon("the exit", START_WITHIN, child.wait()).await??;
                readers.join_next().await;
                return Err(error.context(format!("{status}; its log:\n{log}")));
            }
        };
        Ok(Self { data: data.into(), log, child, address, _readers: readers })
    }

    /// Starts a server on `data` and kills it after this time, wherever it has come by then.
    ///
    /// # Errors
    ///
    /// If it cannot be started or killed.
    pub async fn start_and_kill(data: &Path, after: Duration, log: Log) -> Result<()> {
        let mut child = spawn(data, 0, &[])?;
        let stderr = child.stderr.take().expect("stderr is piped");
        tokio::select! {
            () = tokio::time::sleep(after) => {}
            () = keep(stderr, log) => {}
        }
        child.kill().await.context("SIGKILL")
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where it listens, as a URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Its data directory.
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// The end of its log.
    pub fn log(&self) -> &Log {
        &self.log
    }

    /// Its process id.
    ///
    /// # Errors
    ///
    /// If it is not running.
    pub fn pid(&self) -> Result<u32> {
        self.child.id().context("the server is not running")
    }

    /// What it uses now.
    ///
    /// # Errors
    ///
    /// If it is not running.
    pub fn usage(&self) -> Result<Usage> {
        Usage::of(self.pid()?)
    }

    /// Kills it at once, as a crash of the process would.
    ///
    /// # Errors
    ///
    /// If it cannot be killed.
    pub async fn kill(&mut self) -> Result<()> {
        self.child.kill().await.context("SIGKILL")
    }

    /// Freezes it: its connections stay open, and nothing answers.
    ///
    /// # Errors
    ///
    /// If it is not running.
    pub fn freeze(&self) -> Result<()> {
        self.signal(Signal::STOP)
    }

    /// Lets a frozen server go on.
    ///
    /// # Errors
    ///
    /// If it is not running.
    pub fn thaw(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    /// Asks it to stop, without waiting.
    ///
    /// # Errors
    ///
    /// If it is not running.
    pub fn begin_stop(&self) -> Result<()> {
        self.signal(Signal::TERM)
    }

    /// Waits until it has exited.
    ///
    /// # Errors
    ///
    /// If it has not exited within this time.
    pub async fn exited(&mut self, within: Duration) -> Result<ExitStatus> {
        Ok(wait::soon("the server's exit", within, self.child.wait()).await??)
    }

    /// Starts it again on the same data and the same port, after it was killed or has stopped.
    ///
    /// # Errors
    ///
    /// If it does not start.
    pub async fn start_again(&mut self) -> Result<()> {
        let (data, port) = (self.data.clone(), self.address.port());
        *self = Self::start_at(&data, port, self.log.clone()).await?;
        Ok(())
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.pid()?)?).context("pid 0")?;
        kill_process(pid, signal).with_context(|| format!("{signal:?}"))
    }
}

fn spawn(data: &Path, port: u16, variables: &[(&str, &str)]) -> Result<Child> {
    Command::new(binary::server()?)
        .envs(variables.iter().copied())
        .args(["--listen", &format!("127.0.0.1:{port}")])
        .arg("--data")
        .arg(data)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .context("the server does not start")
}

/// Reads the one line that a server prints once it serves.
async fn ready(stdout: ChildStdout) -> Result<SocketAddr> {
    let mut lines = BufReader::new(stdout).lines();
    let line =
        lines.next_line().await?.ok_or_else(|| anyhow!("the server exits before it serves"))?;
    line.strip_prefix(READY)
        .with_context(|| format!("the ready line is {line:?}"))?
        .parse()
        .with_context(|| format!("no address in {line:?}"))
}

async fn keep(stderr: impl AsyncRead + Unpin, log: Log) {
    let mut lines = BufReader::new(stderr).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        log.push(line);
    }
}
