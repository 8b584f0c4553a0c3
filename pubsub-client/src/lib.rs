//! The client of pubsub, a durable publish/subscribe server.
//!
//! Disconnects and server restarts are not errors here: publishers keep what is unanswered and
//! send it again, in order and without duplicates; subscribers go on with exactly the messages
//! that the application has not seen; acks that are on their way arrive. The
//! [state](ConnectionState) of each connection can be watched, and nothing waits without being
//! visible there.
//!
//! Start at [`Client`]. What is promised:
//!
//! - A [published](Publisher) message is on the server's disk, once, and in the order of the
//!   calls, whatever happens to the connection. Whether a publish that failed may be stored all
//!   the same is never a guess: [`PublishError::outcome`].
//! - A [subscription](Subscriber) has every message from its start on until it is acked, in the
//!   order of each topic; what a living process has been handed is not handed to it again, except
//!   after it was nacked.
//! - Across a crash of the consuming process a message can come again. To process it effectively
//!   once, keep its [`MessageId`] beside the effect, in the same transaction of the application's
//!   own database, and skip what is there already. [`Subscriber::run_once`] does nearly as much
//!   without such a database; [`ProcessedStore`] says what is missing.
//!
//! # Features
//!
//! - `json` (default): the [`Json`] codec.
//! - `prost`: the `Prost` codec.
//! - `inbox`: `FileInbox`, which remembers in a local file what was processed.
//! - `outbox`: `Outbox`, which publishes by way of a local file, across crashes of the publisher.

/// Compiles the program in the README.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;

mod admin;
mod client;
mod codec;
mod env;
mod error;
mod frames;
mod inbox;
mod limits;
mod liveness;
#[cfg(any(feature = "inbox", feature = "outbox"))]
mod local;
mod message;
#[cfg(feature = "outbox")]
mod outbox;
mod publisher;
mod reconnect;
mod retry;
mod state;
mod subscriber;
mod transport;

pub use admin::{
    ActiveConsumer, Admin, Compatibility, CreateSubscription, DeadLetter, DeadLetters, EventFilter,
    EventStream, HeadOfLine, InvalidPayload, Page, PayloadRules, Presence, Purged, Receipt,
    ReceiptState, Redriven, Schema, SchemaCheck, SchemaKind, SchemaProblem, SchemaRevision,
    ServerEvent, ServerInfo, SnapshotInfo, SubscriptionInfo, SubscriptionPosition, TimedEvent,
    TopicConfig, TopicInfo, UpdateSubscription, WaitCause, WhenFull,
};
pub use client::{Client, ClientBuilder, ShutdownReport};
#[cfg(feature = "json")]
pub use codec::Json;
#[cfg(feature = "prost")]
pub use codec::Prost;
pub use codec::{Codec, CodecError, Raw};
pub use env::Env;
pub use error::{
    AckError, AdminError, Cause, CloseError, ConnectError, EnqueueError, FlushError, ForeignAnswer,
    Outcome, PublishError, PublishErrorKind, Reason, SchemaViolation, ServerError, SubscribeError,
    TransportError, Unresolved,
};
#[cfg(feature = "inbox")]
pub use inbox::FileInbox;
pub use inbox::{InboxError, MemoryInbox, ProcessedStore};
#[cfg(any(feature = "inbox", feature = "outbox"))]
pub use local::FileError;
pub use message::{InvalidMessageId, Message, MessageId, ReceivedMessage};
#[cfg(feature = "outbox")]
pub use outbox::{
    Enqueued, Outbox, OutboxBuilder, OutboxError, OutboxFile, OutboxState, OutboxTopic,
    OutboxWatch, Parked, Usage, Waiting,
};
pub use publisher::{
    Batch, BatchTicket, OnRecreated, Permit, PublishReceipt, PublishTicket, Publisher,
    PublisherBuilder, TypedPublishError, TypedPublisher,
};
pub use retry::RetryPolicy;
pub use state::{ConnectionState, StateWatch};
pub use subscriber::{
    Acker, DataLoss, Delivery, Drain, Event, FailurePolicy, Gap, GapReason, Lag, Nack, Position,
    Start, StopReport, Stopper, Subscriber, SubscriberBuilder, SubscriptionKind, TopicLag,
    TopicPosition, TypedDelivery, TypedEvent, TypedSubscriber,
};
