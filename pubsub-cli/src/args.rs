//! What can be said on the command line, and its help.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use clap::{Args as ClapArgs, Parser, Subcommand, ValueHint};
use clap_complete::Shell;

use crate::bench::Bench;
use crate::dlq::Dlq;
use crate::failures::Failures;
use crate::snapshot::Snapshot;
use crate::values::{self, Bytes, Full, Kind, Where};

/// Publish, subscribe and administer a pubsub server.
#[derive(Debug, Parser)]
#[command(name = "pubsub", version, arg_required_else_help = true, after_help = EXIT_CODES,
    after_long_help = LONG_HELP)]
pub(crate) struct Args {
    /// The address of the server
    #[arg(long, global = true, env = "PUBSUB_SERVER", value_name = "URL",
        default_value = "http://127.0.0.1:7670", value_hint = ValueHint::Url)]
    pub(crate) server: String,

    /// Write JSON: one object on one line for each thing; errors too, on standard error
    #[arg(long, global = true)]
    pub(crate) json: bool,

    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXIT_CODES: &str = "Exit codes, and how to begin: pubsub --help";

const LONG_HELP: &str = "\
Begin:
  pubsub-server &                                    a server, in ./pubsub-data
  pubsub topic create orders
  pubsub publish orders 'hello'
  pubsub subscribe orders --from earliest            Ctrl-C ends it
  pubsub subscribe orders --subscription billing     remembers what it has received
  pubsub receipts orders 1                           who has received message 1?

Exit codes:
  0    done
  1    failed
  2    usage: an argument is wrong
  3    there is no such topic, subscription or message
  4    conflict: it exists already, or with other settings or content
  5    the server cannot be reached
  6    the outcome is unknown: it may or may not have happened
  7    a limit is reached: message size, topic, disk or server
  130  interrupted before all was done";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create, list, describe and delete topics
    #[command(subcommand, visible_alias = "topics")]
    Topic(Topic),
    /// Set, show and check what a topic takes: a media type and a schema
    #[command(subcommand, visible_alias = "schemas")]
    Schema(Schema),
    /// Create, list, describe, delete and move subscriptions
    #[command(subcommand, visible_aliases = ["subscriptions", "sub"])]
    Subscription(Subscription),
    /// Keep the position of a subscription, to go back to it
    #[command(subcommand, visible_alias = "snapshots")]
    Snapshot(Snapshot),
    /// List, show, redrive and purge dead letters: what a subscription could not process
    #[command(subcommand, visible_alias = "dead-letters")]
    Dlq(Dlq),
    /// Publish messages, from arguments or standard input
    Publish(Publish),
    /// Print messages as they come
    Subscribe(Subscribe),
    /// Tell which subscriptions have received a message
    #[command(after_help = "\
Examples:
  pubsub receipts orders 17
  pubsub receipts orders 17 --subscription billing --json")]
    Receipts(Receipts),
    /// Look into the local file of an outbox, and decide about what was set aside
    #[command(subcommand)]
    Outbox(Outbox),
    /// Follow what happens at the server, until Ctrl-C
    Events(crate::events::Events),
    /// Describe the server; fails unless it serves reads and writes
    Status,
    /// Measure what the server does for one client
    #[command(subcommand)]
    Bench(Bench),
    /// Write a script for the shell that completes commands
    #[command(after_help = "\
Examples:
  pubsub completions bash > /etc/bash_completion.d/pubsub
  pubsub completions fish > ~/.config/fish/completions/pubsub.fish")]
    Completions {
        /// The shell
        shell: Shell,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Topic {
    /// Create a topic
    #[command(after_help = "\
Examples:
  pubsub topic create orders
  pubsub topic create logs --retention 1day --max-bytes 512MiB
  pubsub topic create orders --if-not-exists")]
    Create(CreateTopic),
    /// List topics
    List,
    /// Describe a topic
    Describe {
        /// Its name
        name: String,
    },
    /// Change settings of a topic; what is not said stays as it is
    #[command(after_help = "\
Examples:
  pubsub topic update logs --retention 2days
  pubsub topic update ticks --when-full drop-oldest --max-bytes 64MiB")]
    Update {
        /// Its name
        name: String,
        #[command(flatten)]
        settings: TopicSettings,
    },
    /// Remove the oldest messages, whoever has not received them; subscribers are told
    #[command(after_help = "\
Examples:
  pubsub topic purge orders --before 4711    4711 is the first one that stays
  pubsub topic purge orders --all")]
    Purge {
        /// Its name
        name: String,
        /// The first message that stays
        #[arg(long, value_name = "SEQUENCE", required_unless_present = "all",
            value_parser = clap::value_parser!(u64).range(1..))]
        before: Option<u64>,
        /// Remove all messages
        #[arg(long, conflicts_with = "before")]
        all: bool,
    },
    /// Delete a topic and all its messages
    Delete {
        /// Its name
        name: String,
    },
}

#[derive(Debug, ClapArgs)]
pub(crate) struct CreateTopic {
    /// Its name: up to 128 letters, digits, ".", "_" and "-"
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) settings: TopicSettings,
    /// Let it be if it exists already, whatever its settings
    #[arg(long)]
    pub(crate) if_not_exists: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct TopicSettings {
    /// How long to keep messages after every subscription has received them [default: 7days]
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub(crate) retention: Option<Duration>,
    /// How long to keep messages that a subscription has not received; then it is told of a gap.
    /// At least 10s; 0s for ever [default: 0s]
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub(crate) max_age_unacked: Option<Duration>,
    /// How much the topic may hold [default: 10GiB]
    #[arg(long, value_name = "SIZE")]
    pub(crate) max_bytes: Option<Bytes>,
    /// What happens then, if someone is owed all of it [default: reject]
    #[arg(long, value_name = "WHAT")]
    pub(crate) when_full: Option<Full>,
    /// How large one message may be, up to 16MiB [default: 1MiB]
    #[arg(long, value_name = "SIZE")]
    pub(crate) max_message_bytes: Option<Bytes>,
    /// How long to remember idempotency keys, up to 7days [default: 7days]
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub(crate) idempotency_window: Option<Duration>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Schema {
    /// Set what a topic takes from now on: the next revision, unless it is the present one
    #[command(after_help = "\
Examples:
  pubsub schema set orders --json-schema order.schema.json
  pubsub schema set orders --protobuf order.binpb --message shop.v1.Order
  pubsub schema set logs --content-type text/plain
  pubsub schema set orders --anything --compatibility none

A descriptor set comes from `buf build -o order.binpb`, or from `protoc --include_imports
--descriptor_set_out=order.binpb order.proto`.")]
    Set(SetSchema),
    /// Show what a topic takes: the present revision, another one, or all
    Show {
        /// The topic
        topic: String,
        /// Show this revision
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        revision: Option<u32>,
        /// List all revisions
        #[arg(long, conflicts_with = "revision")]
        all: bool,
    },
    /// Check payloads, or whether a schema may come next; nothing is stored
    #[command(after_help = "\
Payloads are checked with the schema that is given, or with the topic's present one.

Examples:
  pubsub schema check orders order-1.json order-2.json    a payload in each file
  pubsub schema check orders < orders.jsonl               a payload on each line
  pubsub schema check orders --json-schema next.json      may it be set?
  pubsub schema check orders --json-schema next.json - < orders.jsonl")]
    Check(CheckSchema),
}

#[derive(Debug, ClapArgs)]
pub(crate) struct SetSchema {
    /// The topic
    pub(crate) topic: String,
    #[command(flatten)]
    pub(crate) rules: Rules,
    /// Take everything
    #[arg(long, conflicts_with_all = ["json_schema", "protobuf", "content_type"])]
    pub(crate) anything: bool,
    /// What the present revision promised, and the new one has to keep
    #[arg(long, value_name = "WHAT", default_value = "backward")]
    pub(crate) compatibility: values::Keep,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct CheckSchema {
    /// The topic
    pub(crate) topic: String,
    /// Files with one payload each; "-" for standard input, each line of which is one
    #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) payloads: Vec<String>,
    #[command(flatten)]
    pub(crate) rules: Rules,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Rules {
    /// A file with a JSON Schema
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) json_schema: Option<String>,
    /// A file with an encoded protobuf FileDescriptorSet, with all imports
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath,
        conflicts_with = "json_schema", requires = "message")]
    pub(crate) protobuf: Option<String>,
    /// The full name of the protobuf message type
    #[arg(long, value_name = "NAME", requires = "protobuf")]
    pub(crate) message: Option<String>,
    /// The media type of all payloads [default: application/json or application/protobuf]
    #[arg(long, value_name = "TYPE")]
    pub(crate) content_type: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Subscription {
    /// Create a subscription without consuming: from now on its messages are kept
    #[command(after_help = "\
Examples:
  pubsub subscription create billing orders
  pubsub subscription create audit 'orders.*' payments --from earliest
  pubsub subscription create work jobs --kind shared
  pubsub subscription create work jobs --kind shared --dead-letter jobs-dead --max-attempts 3
  pubsub subscription create eu orders --filter 'attributes.region = \"eu\"'")]
    Create(CreateSubscription),
    /// List subscriptions
    List,
    /// Describe a subscription: its consumers, positions and backlog
    Describe {
        /// Its name
        name: String,
    },
    /// Add and remove topics; live consumers follow at once
    #[command(after_help = "\
Examples:
  pubsub subscription update audit --add 'invoices.*' --from earliest
  pubsub subscription update audit --remove payments")]
    Update(UpdateSubscription),
    /// Delete a subscription; its messages and receipts for it are forgotten
    Delete {
        /// Its name
        name: String,
    },
    /// Move a subscription to another position; live consumers follow at once
    #[command(after_help = "\
Examples:
  pubsub subscription seek billing --to earliest     everything again
  pubsub subscription seek billing --to latest       skip what waits
  pubsub subscription seek billing --to 10m          what came in the last 10 minutes
  pubsub subscription seek billing --to 4711 --topic orders
  pubsub subscription seek billing --snapshot before-release    as it was then")]
    Seek(Seek),
}

#[derive(Debug, ClapArgs)]
pub(crate) struct CreateSubscription {
    /// Its name, by the rules of topic names
    pub(crate) name: String,
    /// Topics, and patterns in which "*" stands for any characters
    #[arg(required = true, value_name = "TOPIC")]
    pub(crate) topics: Vec<String>,
    #[arg(help = values::from_help!("Where it starts"), long, value_name = "WHERE", default_value = "latest")]
    pub(crate) from: Where,
    /// How it spreads its messages over consumers
    #[arg(long, value_name = "KIND", default_value = "exclusive")]
    pub(crate) kind: Kind,
    /// Which messages it is shown, by their attributes [default: all]
    #[arg(long, value_name = "FILTER")]
    pub(crate) filter: Option<String>,
    #[command(flatten)]
    pub(crate) failures: Failures,
    /// Delete it after so long without a consumer, 10s or more [default: never]
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub(crate) expires_after: Option<Duration>,
    /// Let it be if it exists already with the same settings
    #[arg(long)]
    pub(crate) if_not_exists: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct UpdateSubscription {
    /// Its name
    pub(crate) name: String,
    /// A topic or pattern to listen to; may be given several times
    #[arg(long, value_name = "TOPIC", required_unless_present = "remove")]
    pub(crate) add: Vec<String>,
    /// A topic or pattern to listen to no more; its position is forgotten
    #[arg(long, value_name = "TOPIC")]
    pub(crate) remove: Vec<String>,
    #[arg(help = values::from_help!("Where it starts in what it did not listen to"), long, value_name = "WHERE", default_value = "latest")]
    pub(crate) from: Where,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Seek {
    /// Its name
    pub(crate) name: String,
    #[arg(help = values::from_help!("Where to move it"), long, value_name = "WHERE",
        required_unless_present = "snapshot", conflicts_with = "snapshot")]
    pub(crate) to: Option<Where>,
    /// The topic to move in [default: all of the subscription]
    #[arg(long, value_name = "TOPIC", conflicts_with = "snapshot")]
    pub(crate) topic: Option<String>,
    /// The snapshot to go back to, of this subscription or of another one
    #[arg(long, value_name = "NAME")]
    pub(crate) snapshot: Option<String>,
}

#[derive(Debug, ClapArgs)]
#[command(after_help = "\
Prints the id of each message, topic/epoch/sequence, once it is on the server's disk.

Examples:
  pubsub publish orders 'hello'
  pubsub publish orders 'hello' --create
  pubsub publish reminders 'call back' --delay 2h
  pubsub publish orders '{\"id\": 7}' --content-type application/json --attr region=eu
  pubsub publish orders 'paid' --idempotency-key order-7-paid    safe to run twice
  pubsub publish orders --batch < order-7.jsonl                  all of it or nothing
  pubsub publish account-7 'paid out' --expect-head 41           only if nothing came after 41
  tail -f app.log | pubsub publish logs --quiet")]
pub(crate) struct Publish {
    /// The topic
    pub(crate) topic: String,
    /// The messages; without any, each line of standard input is one
    #[arg(value_name = "MESSAGE")]
    pub(crate) messages: Vec<String>,
    /// The ordering key: messages of one key keep their order
    #[arg(long, value_name = "KEY")]
    pub(crate) key: Option<String>,
    /// Store all messages together or not at all: up to 1000 with 4 MiB
    #[arg(long)]
    pub(crate) batch: bool,
    /// Store them, as a batch, only if this is the last message of the topic; 0 if it has none
    #[arg(long, value_name = "SEQUENCE")]
    pub(crate) expect_head: Option<u64>,
    /// Your own identity of the one message, or of the batch: published again under it, it is
    /// stored once
    #[arg(long, value_name = "KEY")]
    pub(crate) idempotency_key: Option<String>,
    /// An attribute; may be given several times
    #[arg(long = "attr", value_name = "NAME=VALUE", value_parser = values::attribute)]
    pub(crate) attributes: Vec<(String, String)>,
    /// The media type of the payload
    #[arg(long, value_name = "TYPE")]
    pub(crate) content_type: Option<String>,
    /// The only subscriptions to receive it; may be given several times, or with commas
    #[arg(long, value_name = "SUBSCRIPTION", value_delimiter = ',')]
    pub(crate) to: Vec<String>,
    /// Show it to subscriptions after this delay only; what comes after it goes on
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub(crate) delay: Option<Duration>,
    /// Show it to subscriptions from this time on only, such as 2026-01-31T12:00:00Z
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_rfc3339_weak,
        conflicts_with = "delay")]
    pub(crate) not_before: Option<SystemTime>,
    /// Create the topic if it does not exist
    #[arg(long)]
    pub(crate) create: bool,
    /// How long each message may take; while the server is away it waits [default: no limit]
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    pub(crate) timeout: Option<Duration>,
    /// Print errors only
    #[arg(long, short)]
    pub(crate) quiet: bool,
}

#[derive(Debug, ClapArgs)]
#[command(after_help = "\
Without --subscription it is a reader: it keeps its position itself and leaves nothing behind
on the server. With one, the server keeps what is not acked, and the next run goes on there.

A line is: topic, sequence, payload. A lost connection is announced on standard error; nothing
is lost or printed twice by it. Ctrl-C stops in order, a second one at once.

Examples:
  pubsub subscribe orders                               what comes from now on
  pubsub subscribe orders 'sensors.*' --from earliest   several topics, from the beginning
  pubsub subscribe orders --from 10m                    and what came in the last 10 minutes
  pubsub subscribe orders --filter 'attributes.region = \"eu\"'
  pubsub subscribe orders --from earliest --until-caught-up --raw > orders.txt
  pubsub subscribe orders --subscription billing        goes on where it was
  pubsub subscribe --subscription billing --no-ack --count 5    look without taking
  pubsub subscribe jobs --subscription work --kind shared    one of several workers
  pubsub subscribe orders --json | jq .payload")]
pub(crate) struct Subscribe {
    /// Topics, and patterns in which "*" stands for any characters
    #[arg(value_name = "TOPIC", required_unless_present = "subscription")]
    pub(crate) topics: Vec<String>,
    /// Consume this durable subscription, and create it if it does not exist
    #[arg(long, short, value_name = "NAME")]
    pub(crate) subscription: Option<String>,
    #[arg(help = values::from_help!("Where a reader or a new subscription starts"), long, value_name = "WHERE")]
    pub(crate) from: Option<Where>,
    /// How a new subscription spreads its messages over consumers [default: exclusive]
    #[arg(long, value_name = "KIND", requires = "subscription")]
    pub(crate) kind: Option<Kind>,
    /// Which messages a reader or a new subscription is shown, by their attributes [default: all]
    #[arg(long, value_name = "FILTER")]
    pub(crate) filter: Option<String>,
    #[command(flatten)]
    pub(crate) failures: Failures,
    /// Stop after this many messages
    #[arg(long, short = 'n', value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) count: Option<u64>,
    /// Stop when everything that was published until now is printed
    #[arg(long)]
    pub(crate) until_caught_up: bool,
    /// Ack each message once it is written: the default
    #[arg(long, requires = "subscription", overrides_with = "no_ack")]
    ack: bool,
    /// Ack nothing: all of it comes again
    #[arg(long, requires = "subscription", overrides_with = "ack")]
    pub(crate) no_ack: bool,
    /// The name of this consumer; one that starts under the same name takes over from it. Of
    /// several with different names one is active, or all, as the kind of the subscription says
    #[arg(long, value_name = "NAME", requires = "subscription")]
    pub(crate) consumer: Option<String>,
    /// Print payloads only, one on each line
    #[arg(long, conflicts_with = "json")]
    pub(crate) raw: bool,
}

/// None of them needs the server. The file must not be in use by another process.
#[derive(Debug, Subcommand)]
pub(crate) enum Outbox {
    /// Show what waits for each topic, and what was set aside and why
    #[command(after_help = "\
Examples:
  pubsub outbox inspect orders.outbox
  pubsub outbox inspect orders.outbox --json | jq 'select(.type == \"parked\")'")]
    Inspect {
        /// The file
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
    },
    /// Let messages that were set aside wait again, at the end of their topic
    ///
    /// They are sent when a process opens the file the next time, under the same idempotency keys.
    /// A message of unknown fate may be stored a second time by that: look first whether it is there.
    Resend {
        /// The file
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
        /// Their numbers, as `inspect` shows them
        #[arg(required = true, value_name = "ITEM")]
        items: Vec<u64>,
    },
    /// Forget messages that were set aside: they are not published
    Discard {
        /// The file
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
        /// Their numbers, as `inspect` shows them
        #[arg(required = true, value_name = "ITEM")]
        items: Vec<u64>,
    },
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Receipts {
    /// The topic
    pub(crate) topic: String,
    /// The sequence of the message in it, or the id of the message as `publish` prints it
    #[arg(value_name = "SEQUENCE")]
    pub(crate) message: values::MessageRef,
    /// Ask for this subscription only
    #[arg(long, value_name = "NAME")]
    pub(crate) subscription: Option<String>,
}
