//! The client against a real server in the same process, through a proxy that cuts connections.

mod harness;
mod publishing;
mod subscribing;
