//! The server in a process of its own: this program, started again with another argument.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use pubsub_server::{Config, Server};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio::time::timeout;

/// The argument that makes this program a server; the directory follows.
const SERVE: &str = "--serve";
/// What stands before the address in the line that says that it serves.
const READY: &str = "listening on ";
const START_WITHIN: Duration = Duration::from_secs(20);

/// The running child, for the panic hook.
static RUNNING: AtomicI32 = AtomicI32::new(0);

pub(crate) fn directory_to_serve() -> Option<PathBuf> {
    let mut args = std::env::args_os().skip(1);
    if args.next()? == SERVE { args.next().map(PathBuf::from) } else { None }
}

/// Serves until it is killed, or until its parent is gone.
pub(crate) async fn serve(directory: &Path) -> ExitCode {
    let server = match Server::start(Config::at(directory)).await {
        Ok(server) => server,
        Err(error) => {
            eprintln!("the server does not start: {error}");
            return ExitCode::FAILURE;
        }
    };
    println!("{READY}{}", server.address());
    // The parent never writes: this ends when the parent does, however it ends.
    let _ = tokio::io::stdin().read(&mut [0]).await;
    std::process::exit(0)
}

/// A panic aborts in release builds, and then nothing is dropped.
pub(crate) fn clean_up_on_panic(directory: PathBuf) {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if let Some(pid) = Pid::from_raw(RUNNING.load(Ordering::SeqCst)) {
            let _ = kill_process(pid, Signal::KILL);
        }
        let _ = std::fs::remove_dir_all(&directory);
        default(panic);
    }));
}

/// A running server. Dropping it kills it.
#[derive(Debug)]
pub(crate) struct ServerProcess {
    child: Child,
    address: SocketAddr,
    directory: PathBuf,
}

impl ServerProcess {
    /// Starts a server on a directory and a free port, and waits until it serves.
    pub(crate) async fn start(directory: &Path) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg(SERVE)
            .arg(directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("the server process does not start")?;
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).unwrap_or(0);
        RUNNING.store(pid, Ordering::SeqCst);
        let mut lines = BufReader::new(child.stdout.take().context("no output")?).lines();
        let line = timeout(START_WITHIN, lines.next_line()).await.context("the server hangs")??;
        let Some(address) = line.as_deref().and_then(|line| line.strip_prefix(READY)) else {
            bail!("the server says {line:?}");
        };
        Ok(Self { child, address: address.parse()?, directory: directory.to_owned() })
    }

    /// Starts it again on the same directory, after it was killed.
    pub(crate) async fn start_again(&mut self) -> Result<()> {
        *self = Self::start(&self.directory.clone()).await?;
        Ok(())
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// SIGKILL: the process is gone, and whatever it had not written to disk.
    pub(crate) async fn kill(&mut self) -> Result<()> {
        self.child.kill().await.context("SIGKILL")
    }

    /// SIGSTOP: its connections stay open, and nothing answers.
    pub(crate) fn freeze(&self) -> Result<()> {
        self.signal(Signal::STOP)
    }

    /// SIGCONT.
    pub(crate) fn thaw(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let pid = self.child.id().context("the server is not running")?;
        let pid = Pid::from_raw(i32::try_from(pid)?).context("pid 0")?;
        Ok(kill_process(pid, signal)?)
    }
}
