//! `pubsub publish`: many messages are on their way at once, and their fates are told in order.

use std::io::{self, ErrorKind, IsTerminal as _};
use std::time::Duration;

use pubsub_client::{
    Client, EnqueueError, Message, Outcome, PublishError, PublishReceipt, PublishTicket, Publisher,
    TopicConfig,
};
use serde_json::json;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader, Stdin};
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::args::Publish;
use crate::batch;
use crate::failure::{Exit, Failure};
use crate::format;
use crate::interrupt::Interrupt;
use crate::output::Output;
use crate::values;
use crate::watch::Announcer;

/// Messages whose fate is not told yet; the publisher's own window bounds their bytes.
const IN_FLIGHT: usize = 20_000;
/// The longest line: no topic takes a longer message.
const MAX_LINE: u64 = 16 * 1024 * 1024;
/// How long to wait for what is on its way when interrupted.
const LAST_CALL: Duration = Duration::from_secs(5);
/// How many failures are told one by one.
const TOLD: u64 = 10;

pub(crate) async fn run(
    args: Publish,
    client: &Client,
    output: &mut Output,
) -> Result<Exit, Failure> {
    let whole = args.batch || args.expect_head.is_some();
    if args.idempotency_key.is_some() && args.messages.len() != 1 && !whole {
        let text = "--idempotency-key is the identity of one message, given as an argument, or of a \
                    --batch";
        return Err(Failure::usage(text));
    }
    if args.create {
        client.admin().ensure_topic(&args.topic, TopicConfig::new()).await?;
    }
    let mut interrupt = Interrupt::new().map_err(|error| Failure::failed(error.to_string()))?;
    let mut announcer = Announcer::default();
    let limit = args.timeout.unwrap_or(Duration::MAX);
    let opening = timeout(limit, client.publisher(&args.topic).open());
    let publisher = tokio::select! {
        opened = announcer.until(client.state(), opening) => match opened {
            Ok(opened) => opened?,
            Err(_) => return Err(not_taken_in(limit)),
        },
        () = interrupt.asked() => return Ok(Exit::Interrupted),
    };
    let _announcing = announcer.go_on(publisher.state());
    if whole {
        return batch::run(&args, &publisher, interrupt, output).await;
    }
    let (fates, queue) = mpsc::channel(IN_FLIGHT);
    let source = Source::new(args.messages.clone());
    let feed = feed(source, Template(&args), publisher, interrupt, fates);
    let tell = Teller { output, quiet: args.quiet, done: 0, failed: 0, first: None }.run(queue);
    let (fed, told) = tokio::join!(feed, tell);
    // What the server said about a message explains more than the end of the input does.
    match (&fed, told) {
        (_, Ok(())) => fed,
        (Ok(Exit::Interrupted), Err(failure)) => Err(failure.interrupted()),
        (_, Err(failure)) => Err(failure),
    }
}

fn not_taken_in(limit: Duration) -> Failure {
    let text = format!("the server did not take the publisher in within {limit:?}");
    Failure::new(Exit::Unreachable, text).with_fix("Nothing was sent, so publishing again is safe.")
}

/// Where messages come from.
pub(crate) enum Source {
    Arguments(std::vec::IntoIter<String>),
    Lines(BufReader<Stdin>),
}

impl Source {
    pub(crate) fn new(messages: Vec<String>) -> Self {
        if !messages.is_empty() {
            return Self::Arguments(messages.into_iter());
        }
        if io::stdin().is_terminal() {
            eprintln!("pubsub: each line is a message; Ctrl-D ends");
        }
        Self::Lines(BufReader::new(tokio::io::stdin()))
    }

    pub(crate) async fn next(&mut self) -> Result<Option<Vec<u8>>, Failure> {
        match self {
            Self::Arguments(messages) => Ok(messages.next().map(String::into_bytes)),
            Self::Lines(stdin) => next_line(stdin).await,
        }
    }
}

async fn next_line(stdin: &mut BufReader<Stdin>) -> Result<Option<Vec<u8>>, Failure> {
    let mut line = Vec::new();
    let read = stdin.take(MAX_LINE + 1).read_until(b'\n', &mut line).await;
    let read =
        read.map_err(|error| Failure::failed(format!("standard input cannot be read: {error}")))?;
    if read == 0 {
        return Ok(None);
    }
    if line.last() == Some(&b'\n') {
        line.pop();
    } else if read as u64 > MAX_LINE {
        let text = "a line of standard input is longer than 16 MiB, the largest message";
        return Err(Failure::new(Exit::Limit, text));
    }
    Ok(Some(line))
}

/// What all messages of one command have in common.
pub(crate) struct Template<'a>(pub(crate) &'a Publish);

impl Template<'_> {
    pub(crate) fn message(&self, payload: Vec<u8>) -> Message {
        let mut message = Message::new(payload);
        message.attributes = self.0.attributes.iter().cloned().collect();
        message.ordering_key = self.0.key.clone();
        message.content_type = self.0.content_type.clone();
        message.idempotency_key = self.0.idempotency_key.clone();
        message.recipients = self.0.to.clone();
        message.not_before = self.0.not_before.or(self.0.delay.map(|delay| values::now() + delay));
        message.deadline = self.0.timeout;
        message
    }
}

type Fate = Result<PublishTicket, EnqueueError>;

/// Enqueues all messages, as fast as the server takes them.
async fn feed(
    mut source: Source,
    template: Template<'_>,
    publisher: Publisher,
    mut interrupt: Interrupt,
    fates: mpsc::Sender<Fate>,
) -> Result<Exit, Failure> {
    loop {
        let enqueued = async {
            let Some(payload) = source.next().await? else {
                return Ok::<_, Failure>(None);
            };
            Ok(Some(publisher.enqueue(template.message(payload)).await))
        };
        let fate = tokio::select! {
            fate = enqueued => fate?,
            () = interrupt.asked() => break,
        };
        let Some(fate) = fate else { return finish(&publisher, interrupt, fates).await };
        let closed = matches!(fate, Err(EnqueueError::Closed { .. }));
        // The teller only stops when standard output fails.
        if fates.send(fate).await.is_err() || closed {
            return Ok(Exit::Failed);
        }
    }
    leave(publisher).await
}

/// Everything is read: waits for the fates of what is on its way.
async fn finish(
    publisher: &Publisher,
    mut interrupt: Interrupt,
    fates: mpsc::Sender<Fate>,
) -> Result<Exit, Failure> {
    drop(fates);
    tokio::select! {
        // The tickets tell what failed.
        _ = publisher.flush() => Ok(Exit::Ok),
        () = interrupt.asked() => leave(publisher.clone()).await,
    }
}

async fn leave(publisher: Publisher) -> Result<Exit, Failure> {
    // What is left then is told by its tickets.
    let _ = publisher.close(LAST_CALL).await;
    Ok(Exit::Interrupted)
}

/// Tells the fate of each message, in order.
struct Teller<'a> {
    output: &'a mut Output,
    quiet: bool,
    done: u64,
    failed: u64,
    /// The first failure, or the first whose outcome is unknown.
    first: Option<Failure>,
}

impl Teller<'_> {
    async fn run(mut self, mut queue: mpsc::Receiver<Fate>) -> Result<(), Failure> {
        while let Some(fate) = self.next(&mut queue).await? {
            let fate = match fate {
                Ok(ticket) => ticket.await,
                Err(error) => Err(error.into()),
            };
            self.done += 1;
            match fate {
                Ok(receipt) => self.published(&receipt)?,
                Err(error) => self.failed(error)?,
            }
        }
        if self.failed > TOLD && !self.output.is_json() {
            eprintln!("pubsub: {} of {} messages failed", self.failed, self.done);
        }
        self.first.map_or(Ok(()), Err)
    }

    async fn next(&mut self, queue: &mut mpsc::Receiver<Fate>) -> Result<Option<Fate>, Failure> {
        if let Ok(fate) = queue.try_recv() {
            return Ok(Some(fate));
        }
        // Before waiting: who reads the output may wait for it too.
        self.write(Output::flush)?;
        Ok(queue.recv().await)
    }

    fn published(&mut self, receipt: &PublishReceipt) -> Result<(), Failure> {
        self.write(|output| {
            if output.is_json() {
                return output.json(&format::published(receipt));
            }
            let duplicate = if receipt.duplicate { " duplicate" } else { "" };
            output.line(&format!("{}{duplicate}", receipt.id))
        })
    }

    fn failed(&mut self, error: PublishError) -> Result<(), Failure> {
        self.failed += 1;
        let (number, outcome) = (self.done, error.outcome());
        if self.output.is_json() {
            let value = json!({
                "type": "failed",
                "number": number,
                "message": error.to_string(),
                "reason": error.reason().map(|reason| reason.as_str()),
                "outcome": match outcome {
                    Outcome::NotPersisted => "not_persisted",
                    Outcome::Unknown => "unknown",
                },
                "idempotency_key": error.idempotency_key(),
            });
            self.write(|output| output.json(&value))?;
        } else if number > 1 && self.failed <= TOLD {
            eprintln!("pubsub: message {number}: {error}");
        }
        let failure = Failure::from(error);
        let known = |first: &Failure| first.exit() != Exit::Unknown;
        if self.first.is_none()
            || outcome == Outcome::Unknown && self.first.as_ref().is_some_and(known)
        {
            self.first = Some(failure);
        }
        Ok(())
    }

    /// When nobody reads the receipts any more, the messages still matter.
    fn write(&mut self, write: impl FnOnce(&mut Output) -> io::Result<()>) -> Result<(), Failure> {
        if self.quiet {
            return Ok(());
        }
        match write(self.output) {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                self.quiet = true;
                Ok(())
            }
            result => Ok(result?),
        }
    }
}
