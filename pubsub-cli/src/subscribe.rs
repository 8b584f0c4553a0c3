//! `pubsub subscribe`.

use std::time::Duration;

use futures_util::FutureExt as _;
use pubsub_client::{
    Client, DataLoss, Delivery, Drain, Event, Gap, Reason, Subscriber, SubscriberBuilder,
    SubscriptionKind,
};
use tokio::time::sleep;

use crate::args::Subscribe;
use crate::failure::{Exit, Failure};
use crate::format;
use crate::interrupt::Interrupt;
use crate::output::Output;
use crate::values::Kind;
use crate::watch::Announcer;

/// Messages that are held unacked at most.
const OUTSTANDING: u32 = 1_000;
/// How long acks may take to be confirmed at the end.
const LAST_CALL: Duration = Duration::from_secs(5);
/// How often to look whether everything is printed.
const LOOK: Duration = Duration::from_millis(100);

pub(crate) async fn run(
    args: Subscribe,
    client: &Client,
    output: &mut Output,
) -> Result<Exit, Failure> {
    if args.failures.is_any() && args.subscription.is_none() {
        let text = "a reader has no failures; name a subscription with --subscription NAME";
        return Err(Failure::usage(text));
    }
    let policy = args.failures.policy()?;
    let kind = kind(&args, client).await?;
    let mut interrupt = Interrupt::new().map_err(|error| Failure::failed(error.to_string()))?;
    let mut announcer = Announcer::default();
    let builder = builder(&args, kind, client);
    let builder = policy.into_iter().fold(builder, SubscriberBuilder::on_failure);
    let timeout = args.failures.ack_timeout;
    let builder = timeout.into_iter().fold(builder, SubscriberBuilder::ack_timeout);
    let builder = args.filter.iter().fold(builder, SubscriberBuilder::filter);
    let subscriber = tokio::select! {
        opened = announcer.until(client.state(), builder.open()) => opened?,
        () = interrupt.asked() => return Ok(Exit::Interrupted),
    };
    let _announcing = announcer.go_on(subscriber.state());
    let stopper = subscriber.stopper();
    let mut printer = Printer {
        output,
        raw: args.raw,
        then: match args.subscription {
            None => Then::Forget,
            Some(_) if args.no_ack => Then::Hold,
            Some(_) => Then::Ack,
        },
        printed: 0,
        written: Vec::new(),
        held: Vec::new(),
    };
    let printed = print(&args, subscriber, interrupt, &mut printer).await;
    // What was written is acked; what was not, or is only looked at, goes back at once.
    let settled = printer.settle();
    drop(printer);
    let report = stopper.stop(Drain::Release, LAST_CALL).await;
    if report.unconfirmed > 0 && !args.no_ack {
        eprintln!(
            "pubsub: {} acks are not confirmed; these messages may come again",
            report.unconfirmed
        );
    }
    let exit = printed?;
    settled?;
    Ok(exit)
}

fn builder(args: &Subscribe, kind: Option<SubscriptionKind>, client: &Client) -> SubscriberBuilder {
    let builder = match &args.subscription {
        Some(name) => client.subscriber(name).topics(&args.topics),
        None => client.reader(&args.topics),
    };
    let builder = match &args.consumer {
        Some(name) => builder.consumer_id(name),
        None => builder,
    };
    let builder = match kind {
        Some(kind) => builder.kind(kind),
        None => builder,
    };
    // Without topics an existing subscription is meant: there is nothing to create it from.
    let builder = if args.topics.is_empty() { builder.must_exist() } else { builder };
    let count = args.count.and_then(|count| u32::try_from(count).ok()).unwrap_or(OUTSTANDING);
    builder
        .start(args.from.map(|from| from.start()).unwrap_or_default())
        .max_outstanding_messages(count.min(OUTSTANDING))
}

/// The kind that was asked for, or that the subscription has: the subscriber is to know it before
/// it attaches, since the name that it makes up for this consumer depends on it.
async fn kind(args: &Subscribe, client: &Client) -> Result<Option<SubscriptionKind>, Failure> {
    let Some(name) = &args.subscription else { return Ok(None) };
    let asked = args.kind.map(Kind::kind);
    match client.admin().subscription(name).await {
        Ok(existing) => {
            // It counts only when a subscription is created, which surprises whoever asks for it.
            if args.from.is_some() {
                eprintln!(
                    "pubsub: subscription {name} exists and goes on where it was; to move it: \
                     pubsub subscription seek {name} --to WHERE"
                );
            }
            Ok(Some(asked.unwrap_or(existing.kind)))
        }
        Err(error) if error.reason() == Some(Reason::SubscriptionNotFound) => Ok(asked),
        Err(error) => Err(error.into()),
    }
}

async fn print(
    args: &Subscribe,
    mut subscriber: Subscriber,
    mut interrupt: Interrupt,
    printer: &mut Printer<'_>,
) -> Result<Exit, Failure> {
    let state = subscriber.state();
    // Without an end of its own, it is done whenever it is told so.
    let endless = args.count.is_none() && !args.until_caught_up;
    let interrupted = if endless { Exit::Ok } else { Exit::Interrupted };
    while args.count.is_none_or(|count| printer.printed < count) {
        if interrupt.is_asked() {
            return Ok(interrupted);
        }
        let event = match subscriber.next().now_or_never() {
            Some(event) => event,
            None => {
                // Before waiting: who reads the output may wait for it too.
                printer.settle()?;
                if args.until_caught_up
                    && state.get().is_connected()
                    && subscriber.position().caught_up
                {
                    break;
                }
                tokio::select! {
                    event = subscriber.next() => event,
                    () = interrupt.asked() => return Ok(interrupted),
                    () = sleep(LOOK), if args.until_caught_up => continue,
                }
            }
        };
        match event {
            None => break,
            Some(Err(error)) => return Err(error.into()),
            Some(Ok(Event::Message(delivery))) => {
                printer.message(delivery)?;
                if args.until_caught_up && printer.holds_all_it_may() {
                    let cause = format!("{OUTSTANDING} messages are held unacked; there are more");
                    let fix = "read on with acks, or look at all of them with a reader: pubsub \
                               subscribe TOPIC --from earliest";
                    return Err(Failure::new(Exit::Limit, cause).with_fix(fix));
                }
            }
            Some(Ok(Event::Gap(gap))) => printer.gap(&gap)?,
            Some(Ok(Event::DataLoss(loss))) => {
                printer.data_loss(&loss)?;
                if args.until_caught_up {
                    return Err(Failure::failed(format!("{} cannot be read whole", loss.id.topic)));
                }
            }
            Some(Ok(_)) => {}
        }
    }
    Ok(Exit::Ok)
}

/// Prints messages, and acks them when they are written.
struct Printer<'a> {
    output: &'a mut Output,
    raw: bool,
    then: Then,
    printed: u64,
    /// To be acked when they have left the buffer. Bounded by what may be outstanding.
    written: Vec<Delivery>,
    /// Not to be acked: dropped, they would come again at once. Bounded likewise.
    held: Vec<Delivery>,
}

/// What happens to a message that is printed.
#[derive(Clone, Copy, Debug)]
enum Then {
    /// A reader has nothing to ack.
    Forget,
    Ack,
    Hold,
}

impl Printer<'_> {
    fn message(&mut self, delivery: Delivery) -> Result<(), Failure> {
        if self.output.is_json() {
            self.output.json(&format::message(&delivery))?;
        } else if self.raw {
            self.output.raw("", &delivery.payload)?;
        } else {
            let start = format!("{} {} ", delivery.id.topic, delivery.id.sequence);
            self.output.raw(&start, &delivery.payload)?;
        }
        self.printed += 1;
        match self.then {
            Then::Forget => drop(delivery),
            Then::Ack => self.written.push(delivery),
            Then::Hold => self.hold(delivery),
        }
        Ok(())
    }

    fn holds_all_it_may(&self) -> bool {
        self.held.len() >= OUTSTANDING as usize
    }

    fn hold(&mut self, delivery: Delivery) {
        self.held.push(delivery);
        if self.holds_all_it_may() {
            eprintln!("pubsub: {OUTSTANDING} messages are held unacked; no more will come");
        }
    }

    fn gap(&mut self, gap: &Gap) -> Result<(), Failure> {
        if self.output.is_json() {
            return Ok(self.output.json(&format::gap(gap))?);
        }
        eprintln!(
            "pubsub: {}: messages {} to {} will never come: {}",
            gap.topic,
            gap.range.start(),
            gap.range.end(),
            format::gap_reason(gap.reason)
        );
        Ok(())
    }

    fn data_loss(&mut self, loss: &DataLoss) -> Result<(), Failure> {
        if self.output.is_json() {
            return Ok(self.output.json(&format::data_loss(loss))?);
        }
        let DataLoss { id, .. } = loss;
        let (topic, sequence) = (&id.topic, id.sequence);
        eprintln!(
            "pubsub: {topic}: message {sequence} is damaged on the server, and nothing comes from \
             there on; to go on after it: pubsub subscription seek NAME --topic {topic} --to {}",
            sequence + 1
        );
        Ok(())
    }

    fn settle(&mut self) -> Result<(), Failure> {
        self.output.flush()?;
        for delivery in self.written.drain(..) {
            delivery.ack();
        }
        Ok(())
    }
}
