//! The client against a real server in the same process, through a proxy that cuts connections.

#![expect(clippy::unwrap_used, reason = "these are tests")]
#![expect(clippy::disallowed_methods, reason = "these are tests")]

mod administering;
mod harness;
mod publishing;
mod scripted;
mod subscribing;
