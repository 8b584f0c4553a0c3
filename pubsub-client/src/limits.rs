//! Every bound and default of the client, and why it has that number.

use std::time::Duration;

/// Messages of one batch: what the server takes.
pub(crate) const BATCH_MESSAGES: usize = 512;
/// Bytes of one batch, beside one message of any size: large enough to amortise a frame, small
/// enough not to sit in front of a heartbeat.
pub(crate) const BATCH_BYTES: usize = 256 * 1024;
/// Messages of one batch that is stored whole or not at all: what the server takes.
pub(crate) const ATOMIC_MESSAGES: usize = 1_000;
/// Bytes of these.
pub(crate) const ATOMIC_BYTES: usize = 4 * 1024 * 1024;
/// Messages of a publisher whose fate is open: twice what the server takes at a time, so that the next
/// batches are whole when there is room. It is the bytes that bound the memory.
pub(crate) const WINDOW_MESSAGES: usize = 20_000;
/// Bytes of these.
pub(crate) const WINDOW_BYTES: usize = 8 * 1024 * 1024;
/// The largest message that any topic can be set to allow.
pub(crate) const MAX_MESSAGE_BYTES: usize = 16 * 1024 * 1024;

/// Messages that a subscriber may hold unacked: as many as a server lets it, so that a replay of small
/// ones never waits for its acks to arrive. It is the bytes that bound the memory.
pub(crate) const OUTSTANDING_MESSAGES: u32 = 10_000;
/// Bytes of these.
pub(crate) const OUTSTANDING_BYTES: u64 = 32 * 1024 * 1024;
/// How many messages more than its credit a server may send before it counts as broken: what it
/// and we count can differ by what is on the way.
pub(crate) const CREDIT_SLACK: usize = 2_048;
/// How long an ack waits for company.
pub(crate) const ACK_LINGER: Duration = Duration::from_millis(10);
/// How many acks do not wait any longer; half of the credit does not, either.
pub(crate) const ACK_BATCH: usize = 1_024;
/// After how long a message comes again that was dropped without ack or nack: long enough that a
/// handler that always fails early is no hot loop.
pub(crate) const RELEASE_DELAY: Duration = Duration::from_secs(1);
/// The longest reason of a nack, in bytes: each hello carries all that are unconfirmed.
pub(crate) const NACK_REASON_BYTES: usize = 1024;
/// The longest delay of a nack that is sent: beyond what any server waits, and in the wire's range.
pub(crate) const NACK_DELAY: Duration = Duration::from_secs(24 * 60 * 60);
/// How long a message may be in the application's hands: far longer than honest work takes, since
/// giving one up too early shows it twice.
pub(crate) const MAX_PROCESSING: Duration = Duration::from_secs(60 * 60);

/// Separate runs of processed messages in an inbox: about 100 bytes each. A server leaves at most
/// 19,000 messages of a topic unacked, each of which can make one hole.
pub(crate) const INBOX_RUNS: usize = 100_000;
/// How often an inbox may forget what lies below the floor.
pub(crate) const FORGET_INTERVAL: Duration = Duration::from_secs(30);

/// How long a connection may take.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the server's answer to a hello may take.
pub(crate) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the answer to a unary call may take.
pub(crate) const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// The heartbeat interval that is asked for.
pub(crate) const HEARTBEAT: Duration = Duration::from_secs(10);
/// The heartbeat intervals that a server takes.
pub(crate) const MIN_HEARTBEAT: Duration = Duration::from_secs(1);
pub(crate) const MAX_HEARTBEAT: Duration = Duration::from_secs(60);
/// The longest that a server can keep the place of a lost session.
pub(crate) const MAX_GRACE: Duration = Duration::from_secs(10 * 60);
/// The longest that a server can make us wait for a reconnect, or for the end of a stream.
pub(crate) const MAX_ADVICE: Duration = Duration::from_secs(5 * 60);
/// The heartbeat interval of the fast profile.
pub(crate) const FAST_HEARTBEAT: Duration = Duration::from_secs(1);

/// Those of an outbox.
#[cfg(feature = "outbox")]
pub(crate) mod outbox {
    use std::time::Duration;

    /// Messages that an outbox may hold, by default.
    pub(crate) const MESSAGES: u64 = 100_000;
    /// Bytes of these, by default: all of the file is read when it is opened.
    pub(crate) const BYTES: u64 = 64 * 1024 * 1024;
    /// Topics that an outbox may publish to: each is a connection.
    pub(crate) const TOPICS: usize = 64;
    /// Messages that an outbox reads, and prepares in one commit.
    pub(crate) const CHUNK_MESSAGES: usize = 256;
    /// Bytes of these; one message always may.
    pub(crate) const CHUNK_BYTES: u64 = 256 * 1024;
    /// Messages of a topic that an outbox may have in flight: what a crash makes it send again.
    pub(crate) const IN_FLIGHT_MESSAGES: usize = 1_024;
    /// Bytes of these. With one more chunk, also of a single large message, they fit into the window
    /// of their publisher.
    pub(crate) const IN_FLIGHT_BYTES: u64 = 4 * 1024 * 1024;
    pub(crate) const WINDOW_BYTES: usize = 32 * 1024 * 1024;
    /// How long a message that is sent again by an outbox may be on its way: a connection is given
    /// up when nothing was heard for half as long, at the slowest heartbeat.
    pub(crate) const RESEND_MARGIN: Duration = Duration::from_secs(5 * 60);
}
