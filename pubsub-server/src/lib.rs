//! The pubsub server as a library, for tests and for applications that embed it.
//!
//! ```
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use pubsub_server::{Config, Server};
//!
//! let server = Server::start(Config::in_memory()).await?;
//! println!("clients connect to {}", server.url());
//! server.stop().await?;
//! # Ok(())
//! # }
//! ```
//!
//! To read the sources start at [`server`], which puts the parts together, and follow a message:
//! `wire` parses it, [`broker`] checks limits and hands it to the [`storage`], whose commit
//! decides its fate; a subscription's task in [`broker`] reads it from there, and `wire` sends it.

pub mod body;
pub mod broker;
pub mod config;
pub mod env;
mod envelope;
mod failpoint;
pub mod filter;
pub mod limits;
mod metrics;
pub mod names;
pub mod record;
pub mod schema;
pub mod server;
mod steps;
pub mod storage;
mod wire;

pub use config::{Config, StorageConfig};
pub use server::{Server, StartError};
