//! The harness of the end-to-end tests: servers as child processes, a proxy that breaks
//! connections, a recorder of what happened, and checkers that judge it.
//!
//! The scenarios are in `it/`; nothing here knows one of them.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "a test looks for one frame or event and passes over all others, also future ones"
)]

pub mod admin;
pub mod auditor;
pub mod binary;
pub mod checker;
pub mod files;
pub mod garbage;
pub mod lab;
pub mod process;
pub mod proxy;
pub mod raw;
pub mod seed;
pub mod usage;
pub mod wait;
