//! Every bound of the server and why it has that number.

use std::time::Duration;

/// Names of topics, subscriptions and consumers, in bytes: what a log line and a table key carry
/// without a thought.
pub const MAX_NAME_BYTES: usize = 128;
/// Topics of one server.
pub const MAX_TOPICS: usize = 20_000;
/// Subscriptions of one server.
pub const MAX_SUBSCRIPTIONS: usize = 10_000;
/// Snapshots of one server.
pub const MAX_SNAPSHOTS: usize = 1_000;
/// Names and patterns of one subscription, and topics of one session.
pub const MAX_PATTERNS: usize = 1_000;
/// Deleted topics that one subscription has not been told of; at this number no more of its
/// topics can be deleted.
pub const MAX_DEPARTED: usize = 1_000;
/// Consumers that stand by for one subscription.
pub const MAX_STANDBY: usize = 64;
/// Consumers that share one subscription: each is looked at for each frame.
pub const MAX_CONSUMERS: usize = 256;

/// The default for the largest message of a topic, as encoded.
pub const DEFAULT_MESSAGE_BYTES: u64 = 1024 * 1024;
/// The largest message that a topic can be set to allow.
pub const MAX_MESSAGE_BYTES: u64 = 16 * 1024 * 1024;
/// Attributes of a message.
pub const MAX_ATTRIBUTES: usize = 64;
/// Bytes of all attribute names and values of a message.
pub const MAX_ATTRIBUTE_BYTES: usize = 8 * 1024;
/// Ordering keys, idempotency keys and content types, in bytes.
pub const MAX_KEY_BYTES: usize = 128;
/// Recipients of a message.
pub const MAX_RECIPIENTS: usize = 64;
/// Bytes of the text of a filter: it is looked at for each message, and people write it.
pub const MAX_FILTER_BYTES: usize = 1024;
/// Parentheses and NOT within each other in a filter: parsing recurses as deep.
pub const MAX_FILTER_DEPTH: usize = 16;
/// Characters of a filter that an error quotes.
pub const MAX_FILTER_TOKEN_CHARS: usize = 20;
/// Messages of one batch or unary publish.
pub const MAX_BATCH_MESSAGES: usize = 512;

/// Messages of one batch that is stored whole or not at all.
pub const MAX_ATOMIC_MESSAGES: usize = 1_000;
/// Bytes of one batch that is stored whole or not at all: what one commit is meant to hold.
pub const MAX_ATOMIC_BYTES: usize = MAX_COMMIT_BYTES;

/// Bytes of one schema: large ones that people write have a tenth of it.
pub const MAX_SCHEMA_BYTES: usize = 256 * 1024;
/// Revisions of the schema of one topic. All are kept, so that each message can be read by its own.
pub const MAX_SCHEMA_REVISIONS: u32 = 100;
/// Bytes of all schemas of one server: they are kept in memory, and read at the start.
pub const MAX_SCHEMAS_BYTES: usize = 64 * 1024 * 1024;
/// Patterns of one JSON Schema: each takes up to half a megabyte when it is compiled.
pub const MAX_SCHEMA_PATTERNS: usize = 64;
/// Problems that are told of a new schema.
pub const MAX_SCHEMA_PROBLEMS: usize = 50;
/// Bytes of payloads that are checked with a schema on the spot, in a third of a millisecond or so:
/// 1 KiB of JSON takes 20 to 50 µs, most of it parsing. More are checked beside the runtime.
pub const MAX_INLINE_CHECK_BYTES: usize = 8 * 1024;
/// Bytes of the text of a refusal: a publisher's row may hold one for each unanswered message.
pub const MAX_REFUSAL_BYTES: usize = 200;
/// Bytes of the path of a field in a refusal, and of what is said about it.
pub const MAX_REFUSAL_FIELD_BYTES: usize = 120;

/// Messages of one publisher that may be unanswered: what its row has to remember.
pub const MAX_IN_FLIGHT_MESSAGES: u32 = 10_000;
/// Bytes of one publisher that may be unanswered, beside one message of any size.
pub const MAX_IN_FLIGHT_BYTES: u64 = 32 * 1024 * 1024;
/// Bytes of all messages between their arrival and their commit.
pub const MAX_UNCOMMITTED_BYTES: usize = 128 * 1024 * 1024;
/// What a message costs in memory beside its bytes, roughly.
pub const MESSAGE_OVERHEAD_BYTES: usize = 256;
/// Groups waiting for the committer.
pub const MAX_QUEUED_GROUPS: usize = 8_192;
/// Bytes of one commit: above this a commit's duration shows up in everybody's latency.
pub const MAX_COMMIT_BYTES: usize = 4 * 1024 * 1024;

/// Publisher sessions remembered: about 100 bytes each.
pub const MAX_PUBLISHERS: u64 = 200_000;
/// How long a publisher session is remembered after its last use.
pub const SESSION_HORIZON: Duration = Duration::from_secs(7 * 24 * 3600);
/// How often an open stream of a publisher counts as used if nothing else uses it: a small part of
/// the horizon, since each is a commit.
pub const SESSION_TOUCH: Duration = Duration::from_secs(24 * 3600);
/// Idempotency keys remembered: about 75 bytes each on disk, and 20 to 40 in memory. When it is reached
/// publishes with a key are refused; none is forgotten early.
pub const MAX_IDEMPOTENCY_KEYS: u64 = 4_000_000;
/// The longest idempotency window, and the default.
pub const IDEMPOTENCY_WINDOW: Duration = Duration::from_secs(7 * 24 * 3600);
/// The default retention of messages that everyone has received.
pub const RETENTION: Duration = Duration::from_secs(7 * 24 * 3600);
/// The shortest time after which unacked messages can be let go.
pub const MIN_AGE_UNACKED: Duration = Duration::from_secs(10);
/// The shortest time after which a subscription without consumers can be deleted.
pub const MIN_EXPIRY: Duration = Duration::from_secs(10);
/// The default for the bytes of one topic.
pub const DEFAULT_TOPIC_BYTES: u64 = 10 * 1024 * 1024 * 1024;

/// Bytes of the newest messages that are kept in memory, so that those who receive them as they come
/// need no disk: some seconds of a fast topic.
pub const RECENT_BYTES: usize = 24 * 1024 * 1024;
/// Bytes of messages that were read from disk last and are kept in memory: what subscriptions that
/// catch up are at, each with a part of a row and what was read ahead.
pub const READ_BYTES: usize = 8 * 1024 * 1024;
/// Bytes that are read from disk beyond what was asked for: a frame, so that not each one waits for
/// another thread.
pub const READ_AHEAD_BYTES: usize = FRAME_BYTES;

/// Messages that may be out with one session.
pub const MAX_OUTSTANDING_MESSAGES: u32 = 10_000;
/// Bytes that may be out with one session.
pub const MAX_OUTSTANDING_BYTES: u64 = 64 * 1024 * 1024;
/// Messages of one deliver frame.
pub const MAX_FRAME_MESSAGES: usize = 512;
/// Bytes of one deliver frame, beside one message of any size.
pub const FRAME_BYTES: usize = 256 * 1024;
/// Ranges of received messages kept for one subscription and topic; older ones are merged into
/// "trimmed".
pub const MAX_RECEIVED_RANGES: usize = 10_000;
/// Ranges beyond the floor that are done: a consumer that acks what it was sent never has as many.
pub const MAX_DONE_RANGES: usize = 24_000;
/// Messages of one topic that were delivered to competing consumers, or wait, and are not acked:
/// each may be a hole in what is done.
pub const MAX_UNSETTLED: usize = 19_000;
/// Scrapes of metrics at a time: more are sent away.
pub const MAX_SCRAPES: usize = 8;
/// How far beyond the floor an exclusive consumer with a filter is shown messages at least, however
/// little credit it has. Without a filter that is as far as its credit goes.
pub const FILTERED_WINDOW: u64 = 10_000;
/// Runs of up to 1,000 messages of one topic that a subscription with a filter has looked at before
/// their turn: how many of them are left out is known for so many, and the rest counts as backlog.
pub const MAX_AHEAD_RUNS: usize = 4_096;
/// Messages of one topic that one subscription has passed over since they are not due: each is
/// a hole in what is done. At this number the topic waits for one of them.
pub const MAX_DELAYED: usize = 10_000;
/// How far ahead a message can be due: what lies further is a mistake in units.
pub const MAX_DELAY: Duration = Duration::from_secs(366 * 24 * 3600);
/// Boots remembered in the ledger.
pub const MAX_BOOTS: usize = 10_000;

/// How long an ack that nothing else carries and nobody waits for may wait for company.
pub const ACK_LINGER: Duration = Duration::from_millis(10);
/// How long a lost session keeps its place.
pub const GRACE: Duration = Duration::from_secs(30);
/// The heartbeat interval unless the client asks for another.
pub const HEARTBEAT: Duration = Duration::from_secs(10);
/// The shortest heartbeat interval a client can ask for.
pub const MIN_HEARTBEAT: Duration = Duration::from_secs(1);
/// The longest heartbeat interval a client can ask for.
pub const MAX_HEARTBEAT: Duration = Duration::from_secs(60);
/// How long a peer may be silent, in heartbeats, before its stream is given up.
pub const DEAD_AFTER_HEARTBEATS: f64 = 2.5;
/// The first delay before a nacked message is shown again; it doubles.
pub const MIN_BACKOFF: Duration = Duration::from_secs(1);
/// The longest delay before a nacked message is shown again.
pub const MAX_BACKOFF: Duration = Duration::from_secs(60);
/// Attempts after which a failure policy can let a message go: more is no limit to anybody.
pub const MAX_ATTEMPTS: u32 = 1_000;
/// Attempts after which it does, if it is not said.
pub const DEFAULT_ATTEMPTS: u32 = 5;
/// Bytes of the reason that is kept of a last failure.
pub const MAX_REASON_BYTES: usize = 512;
/// How long a message that may have killed its consumer is watched before the next such one is
/// shown, if nothing becomes of it: what kills does so sooner.
pub const SUSPICION: Duration = Duration::from_secs(30);
/// Messages of one topic that have failed too often and wait to be moved, because the dead-letter
/// topic is full; at this number nothing more of their topic is delivered.
pub const MAX_CONDEMNED: usize = 1_000;
/// Dead letters that are moved in one commit.
pub const BURIAL_MESSAGES: usize = 64;
/// Dead letters that one call lists, redrives or purges.
pub const MAX_DEAD_LETTERS: usize = 1_000;
/// The shortest time that a subscription can allow a handler.
pub const MIN_ACK_TIMEOUT: Duration = Duration::from_secs(1);
/// The longest.
pub const MAX_ACK_TIMEOUT: Duration = Duration::from_secs(24 * 3600);
/// The lease of a pull unless it asks for another.
pub const PULL_LEASE: Duration = Duration::from_secs(60);

/// Events that wait for who watches them and is slow; older ones are counted as missed.
pub const EVENT_BUFFER: usize = 1_024;
/// Who may watch events at a time.
pub const MAX_WATCHERS: usize = 64;
/// How long a message may be the first one of its topic that is not acked until the subscription
/// counts as stalled: longer than handlers and backoffs take that end well.
pub const STALLED: Duration = Duration::from_secs(30);

/// Connections of one server.
pub const MAX_CONNECTIONS: usize = 10_000;
/// Streams of one connection.
pub const MAX_CONCURRENT_STREAMS: u32 = 128;
/// Bytes that hyper buffers for one stream that its peer does not read.
pub const MAX_SEND_BUFFER_BYTES: usize = 64 * 1024;
/// Bytes of the headers of one request.
pub const MAX_HEADER_LIST_BYTES: u32 = 16 * 1024;
/// How long the frames in flight may take when the server drains.
pub const DRAIN_DEADLINE: Duration = Duration::from_secs(3);
