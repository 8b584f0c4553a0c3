//! The frame of every scenario: a runtime, a seed, a directory, a deadline, and a report.

use std::{
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use tempfile::TempDir;
use tokio::runtime::Builder;

use crate::{
    binary,
    process::{Log, Server},
    proxy::Proxy,
    seed::{self, Rng, SEED_VARIABLE},
    wait,
};

/// Runs a scenario on a runtime of its own.
///
/// # Panics
///
/// If the scenario fails or takes longer than `within`: with its seed and the servers' logs. If the
/// server does not build.
pub fn scenario(within: Duration, body: impl AsyncFnOnce(&mut Lab) -> Result<()>) {
    let seed = seed::from_environment();
    let runtime = Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("the runtime starts");
    // The first scenario builds it, which is none of its time.
    binary::server().expect("the server builds");
    let mut lab = Lab::new(seed).expect("there is a temporary directory");
    let logs = Log::default();
    lab.log = logs.clone();
    let outcome = runtime
        .block_on(async { wait::soon("the end of the scenario", within, body(&mut lab)).await })
        .and_then(|outcome| outcome);
    if let Err(error) = outcome {
        panic!("{error:#}\n\nrun it again with {SEED_VARIABLE}={seed}\nserver log:\n{logs}");
    }
}

/// What a scenario works with.
#[derive(Debug)]
pub struct Lab {
    /// The source of all random choices.
    pub rng: Rng,
    directory: TempDir,
    log: Log,
}

impl Lab {
    fn new(seed: u64) -> Result<Self> {
        Ok(Self {
            rng: Rng::new(seed),
            directory: tempfile::Builder::new().prefix("pubsub-it-").tempdir()?,
            log: Log::default(),
        })
    }

    /// A path in the scenario's own directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Where all the scenario's servers log.
    pub fn log(&self) -> Log {
        self.log.clone()
    }

    /// Starts a server on an empty directory.
    ///
    /// # Errors
    ///
    /// If it does not start.
    pub async fn server(&self) -> Result<Server> {
        self.server_on(&self.path("data")).await
    }

    /// Starts a server on this directory.
    ///
    /// # Errors
    ///
    /// If it does not start.
    pub async fn server_on(&self, data: &Path) -> Result<Server> {
        Server::start(data, self.log()).await
    }

    /// Starts a server behind a proxy.
    ///
    /// # Errors
    ///
    /// If it does not start.
    pub async fn rig(&self) -> Result<Rig> {
        let server = self.server().await?;
        let proxy = Proxy::start(server.address()).await?;
        Ok(Rig { server, proxy })
    }
}

/// A server behind a proxy. Clients know the proxy's address only.
#[derive(Debug)]
pub struct Rig {
    /// The server.
    pub server: Server,
    /// What stands between it and its clients.
    pub proxy: Proxy,
}

impl Rig {
    /// Where clients connect.
    pub fn url(&self) -> String {
        self.proxy.url()
    }

    /// Kills the server and starts it again on the same data.
    ///
    /// # Errors
    ///
    /// If it does not start.
    pub async fn crash(&mut self) -> Result<()> {
        self.server.kill().await?;
        self.revive().await
    }

    /// Starts the server again on the same data, after it was killed or has stopped. It gets
    /// another port, of which its clients know nothing.
    ///
    /// # Errors
    ///
    /// If it does not start.
    pub async fn revive(&mut self) -> Result<()> {
        self.revive_to_fail("").await
    }

    /// Starts the server again as [`Rig::revive`] does, to be killed at this failpoint.
    ///
    /// # Errors
    ///
    /// If it does not start.
    pub async fn revive_to_fail(&mut self, failpoint: &str) -> Result<()> {
        let (data, log) = (self.server.data().to_owned(), self.server.log().clone());
        let started = Server::start_to_fail(&data, failpoint, log).await;
        self.server = started.context("starting again")?;
        self.proxy.retarget(self.server.address());
        Ok(())
    }

    /// Waits until the server was killed at its failpoint.
    ///
    /// # Errors
    ///
    /// If it goes on for longer than this, or ends by itself.
    pub async fn fails(&mut self, within: Duration) -> Result<()> {
        let status = self.server.exited(within).await.context("it never came to its failpoint")?;
        ensure!(status.signal() == Some(Signal::KILL.as_raw()), "{status}");
        Ok(())
    }
}
