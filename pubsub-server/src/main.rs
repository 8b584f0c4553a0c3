//! The `pubsub-server` command: flags and environment, logs, signals.

use std::io::{IsTerminal as _, Write as _};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use pubsub_server::{Config, Server};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// A durable publish/subscribe server: what it acknowledges is on disk.
///
/// It prints one line on standard output once it serves, "listening on ADDRESS", and logs to
/// standard error: for people on a terminal, as JSON otherwise.
///
/// SIGTERM and Ctrl-C stop it in order: clients are told, what is in flight is finished and
/// committed, within 5 seconds. A kill at any moment loses nothing that was acknowledged.
#[derive(Debug, Parser)]
#[command(version, after_help = EXAMPLES)]
struct Flags {
    /// The address to listen on; port 0 takes a free one
    #[arg(long, env = "PUBSUB_LISTEN", value_name = "ADDRESS", default_value = "127.0.0.1:7670")]
    listen: SocketAddr,

    /// The directory for messages and positions; created if it does not exist
    #[arg(long, env = "PUBSUB_DATA", value_name = "DIRECTORY", default_value = "./pubsub-data")]
    data: PathBuf,

    /// An address to serve metrics on, as text for Prometheus at /metrics; none if it is not set
    #[arg(long, env = "PUBSUB_METRICS", value_name = "ADDRESS")]
    metrics: Option<SocketAddr>,

    /// What to log: a level, or levels by module, for example "info,pubsub_server=debug"
    #[arg(long, env = "PUBSUB_LOG", value_name = "FILTER", default_value = "info")]
    log: String,
}

const EXAMPLES: &str = "\
Examples:
  pubsub-server                                   serve on 127.0.0.1:7670 from ./pubsub-data
  pubsub-server --listen 127.0.0.1:0 --data /srv/pubsub
  pubsub-server --metrics 127.0.0.1:9670          and metrics at http://127.0.0.1:9670/metrics
  PUBSUB_LOG=debug pubsub-server

Then, in another terminal:
  pubsub topic create orders
  pubsub publish orders 'hello'";

fn main() -> ExitCode {
    let flags = Flags::parse();
    match run(flags) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pubsub-server: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(flags: Flags) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&flags.log)
        .map_err(|error| anyhow::anyhow!("--log {:?}: {error}", flags.log))?;
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if std::io::stderr().is_terminal() {
        logs.init()
    } else {
        logs.json().init()
    }
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(serve(flags))
}

async fn serve(flags: Flags) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let config = Config::at(&flags.data).listen(flags.listen);
    let server = Server::start(Config { metrics: flags.metrics, ..config }).await?;
    let mut out = std::io::stdout();
    writeln!(out, "listening on {}", server.address())?;
    out.flush()?;
    tracing::info!(address = %server.address(), data = %flags.data.display(), "serving");
    tokio::select! {
        _ = terminate.recv() => tracing::info!("SIGTERM: stopping"),
        _ = interrupt.recv() => tracing::info!("interrupted: stopping"),
        cause = server.failed() => {
            // Nothing is retried in place: what is on disk is only known after a restart.
            anyhow::bail!("the storage has failed, and a restart is needed: {cause}");
        }
    }
    server.stop().await?;
    tracing::info!("stopped");
    Ok(())
}
