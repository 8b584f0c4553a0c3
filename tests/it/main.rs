//! End-to-end scenarios: real server processes, real sockets, injected faults.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "a scenario looks for one frame or event and passes over all others"
)]

mod acks;
mod app;
mod bad_input;
mod batches;
mod bounds;
mod chaos;
mod child;
mod consumers;
mod crash;
mod delays;
mod disk;
mod docs;
mod events;
mod failpoints;
mod failures;
mod filters;
mod identity;
mod inbox;
mod lifetimes;
mod link;
mod load;
mod measure;
mod metrics;
mod order;
mod outbox;
mod outcomes;
mod retention;
mod schemas;
mod sealing;
mod seeks;
mod sharing;
mod standby;
mod tidy;
mod topics;
