//! A server in this process, and the command as a child process.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, Output, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use pubsub_server::{Config, Server};
use rustix::process::{Pid, Signal, kill_process};
use tokio::runtime::Runtime;

/// No command in these tests takes longer than this.
const LIMIT: Duration = Duration::from_secs(60);

/// Kills a command that takes too long: a test should fail, and not wait for ever. Dropping it
/// spares the command.
struct Watchdog {
    _alive: mpsc::Sender<()>,
}

impl Watchdog {
    fn of(child: &Child) -> Result<Self> {
        let pid = Pid::from_raw(i32::try_from(child.id())?).context("pid 0")?;
        let (alive, ended) = mpsc::channel::<()>();
        thread::spawn(move || {
            if ended.recv_timeout(LIMIT) == Err(RecvTimeoutError::Timeout) {
                // It may have ended by itself just now.
                let _ = kill_process(pid, Signal::KILL);
            }
        });
        Ok(Self { _alive: alive })
    }
}

/// A server, and the command that talks to it.
pub(crate) struct Lab {
    runtime: Runtime,
    server: Option<Server>,
    directory: tempfile::TempDir,
    url: String,
}

impl Lab {
    pub(crate) fn new() -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let runtime = Runtime::new()?;
        let server = runtime.block_on(Server::start(Config::at(directory.path())))?;
        let url = server.url();
        Ok(Self { runtime, server: Some(server), directory, url })
    }

    /// A lab with a topic `orders` that holds these messages.
    pub(crate) fn with_orders(messages: &[&str]) -> Result<Self> {
        let lab = Self::new()?;
        lab.run("topic create orders")?.succeeds()?;
        if !messages.is_empty() {
            let mut args = vec!["publish", "orders"];
            args.extend(messages);
            lab.run_args(&args)?.succeeds()?;
        }
        Ok(lab)
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Restarts the server on the same address.
    pub(crate) fn restart(&mut self) -> Result<()> {
        let server = self.server.take().context("no server")?;
        let address = server.address();
        let config = Config::at(self.directory.path()).listen(address);
        self.server = Some(self.runtime.block_on(async {
            server.stop().await?;
            Ok::<_, anyhow::Error>(Server::start(config).await?)
        })?);
        Ok(())
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pubsub"));
        command.args(args).env("PUBSUB_SERVER", &self.url).stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs a command, given as a line of words.
    pub(crate) fn run(&self, line: &str) -> Result<Ran> {
        self.run_args(&line.split_whitespace().collect::<Vec<_>>())
    }

    /// Runs a command again and again until its output is as it should be, and gives that.
    pub(crate) fn eventually(&self, line: &str, like: impl Fn(&str) -> bool) -> Result<String> {
        for _ in 0..100 {
            let output = self.run(line)?.succeeds()?;
            if like(&output) {
                return Ok(output);
            }
            thread::sleep(Duration::from_millis(200));
        }
        anyhow::bail!("`{line}` never says what it should")
    }

    pub(crate) fn run_args(&self, args: &[&str]) -> Result<Ran> {
        wait(self.command(args).spawn()?)
    }

    /// Runs a command with this as its standard input.
    pub(crate) fn run_with_input(&self, line: &str, input: &[u8]) -> Result<Ran> {
        let args: Vec<_> = line.split_whitespace().collect();
        let mut child = self.command(&args).stdin(Stdio::piped()).spawn()?;
        let mut stdin = child.stdin.take().context("no stdin")?;
        thread::scope(|scope| {
            // Beside the reading of the output, or both could wait for ever.
            scope.spawn(move || stdin.write_all(input));
            wait(child)
        })
    }

    /// Starts a command that goes on until it is told to end.
    pub(crate) fn start(&self, line: &str) -> Result<Running> {
        let args: Vec<_> = line.split_whitespace().collect();
        let mut child = self.command(&args).stdin(Stdio::piped()).spawn()?;
        let watchdog = Watchdog::of(&child)?;
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().context("no stdout")?);
        let stderr = BufReader::new(child.stderr.take().context("no stderr")?);
        Ok(Running { child, stdin, stdout, stderr, _watchdog: watchdog })
    }

    /// The address of a proxy to the server that lets one connection through, and no second one:
    /// a command can say hello, but open no session.
    pub(crate) fn behind_one_connection(&self) -> Result<String> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let server = self.server.as_ref().context("no server")?.address();
        thread::spawn(move || {
            let (client, _) = listener.accept()?;
            let server = TcpStream::connect(server)?;
            let (mut up, mut down) = (client.try_clone()?, server.try_clone()?);
            thread::spawn(move || std::io::copy(&mut up, &mut { server }));
            thread::spawn(move || std::io::copy(&mut down, &mut { client }));
            for connection in listener.incoming() {
                drop(connection?);
            }
            Ok::<_, std::io::Error>(())
        });
        Ok(format!("http://{address}"))
    }
}

/// Waits for the end of a command.
fn wait(child: Child) -> Result<Ran> {
    let _watchdog = Watchdog::of(&child)?;
    Ok(child.wait_with_output()?.into())
}

/// A command that has ended.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Ran {
    /// Its standard output, if it succeeded.
    pub(crate) fn succeeds(self) -> Result<String> {
        anyhow::ensure!(self.code == Some(0), "{self:?}");
        Ok(self.stdout)
    }

    /// Its standard error, if it failed with this code.
    pub(crate) fn fails(self, code: i32) -> Result<String> {
        anyhow::ensure!(self.code == Some(code), "expected exit code {code}: {self:?}");
        Ok(self.stderr)
    }
}

/// A command that runs. Dropping it kills it.
pub(crate) struct Running {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
    stderr: BufReader<ChildStderr>,
    _watchdog: Watchdog,
}

impl Running {
    /// Gives it this on standard input.
    pub(crate) fn input(&mut self, input: &[u8]) -> Result<()> {
        Ok(self.stdin.as_mut().context("no stdin")?.write_all(input)?)
    }

    /// The next line of standard output.
    pub(crate) fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        let read = self.stdout.read_line(&mut line)?;
        anyhow::ensure!(read > 0, "it ended, or was killed since nothing came");
        Ok(line.trim_end().to_owned())
    }

    /// The next line of standard error.
    pub(crate) fn error_line(&mut self) -> Result<String> {
        let mut line = String::new();
        let read = self.stderr.read_line(&mut line)?;
        anyhow::ensure!(read > 0, "it ended, or was killed since nothing came");
        Ok(line.trim_end().to_owned())
    }

    /// Closes its standard output, as `head` does.
    pub(crate) fn stop_reading(&mut self) {
        let empty = Command::new("true").stdout(Stdio::piped()).spawn();
        if let Some(stdout) = empty.ok().and_then(|mut child| child.stdout.take()) {
            self.stdout = BufReader::new(stdout);
        }
    }

    /// Presses Ctrl-C and waits for the end.
    pub(crate) fn interrupt(self) -> Result<Ran> {
        let pid = Pid::from_raw(i32::try_from(self.child.id())?).context("pid 0")?;
        kill_process(pid, Signal::INT)?;
        self.end()
    }

    /// Waits for the end.
    pub(crate) fn end(mut self) -> Result<Ran> {
        drop(self.stdin.take());
        let status = self.child.wait()?;
        let (mut stdout, mut stderr) = (String::new(), String::new());
        self.stdout.read_to_string(&mut stdout)?;
        self.stderr.read_to_string(&mut stderr)?;
        Ok(Ran { code: status.code(), stdout, stderr })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The objects of JSON lines.
pub(crate) fn json(lines: &str) -> Result<Vec<serde_json::Value>> {
    Ok(lines.lines().map(serde_json::from_str).collect::<Result<_, _>>()?)
}
