//! What can be set.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use crate::env::{SharedEnv, System};

/// The settings of a server.
#[derive(Clone, Debug)]
pub struct Config {
    /// The address to listen on; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Where messages are kept.
    pub storage: StorageConfig,
    /// The address to serve metrics on, if they are wanted.
    pub metrics: Option<SocketAddr>,
    /// Clock and randomness.
    pub env: SharedEnv,
}

/// Where messages are kept.
#[derive(Clone, Debug)]
pub enum StorageConfig {
    /// In memory: for tests, and gone with the server.
    Memory,
    /// In redb files in this directory, which is created if it does not exist.
    Redb(PathBuf),
}

impl Config {
    /// A server for tests and examples: on a free port of the loopback interface, in memory.
    pub fn in_memory() -> Self {
        Self::with(StorageConfig::Memory)
    }

    /// A server on a free port of the loopback interface that keeps its messages in a directory.
    pub fn at(directory: impl Into<PathBuf>) -> Self {
        Self::with(StorageConfig::Redb(directory.into()))
    }

    fn with(storage: StorageConfig) -> Self {
        let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        Self { listen, storage, metrics: None, env: Arc::new(System) }
    }

    /// Listens on this address instead.
    #[must_use]
    pub fn listen(self, listen: SocketAddr) -> Self {
        Self { listen, ..self }
    }

    /// Serves metrics on this address, as text for Prometheus at `/metrics`.
    #[must_use]
    pub fn metrics(self, metrics: SocketAddr) -> Self {
        Self { metrics: Some(metrics), ..self }
    }
}
