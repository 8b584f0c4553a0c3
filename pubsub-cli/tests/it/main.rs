//! The command as a user runs it: the built binary against a server.

mod admin;
mod bench;
mod events;
mod harness;
mod outbox;
mod publish;
mod schema;
mod subscribe;
