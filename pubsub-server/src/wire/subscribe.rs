//! Subscribe streams, and their unary twins.

use std::collections::BTreeMap;
use std::time::Duration;

use pubsub_proto::v1::subscribe_request::Frame as Request;
use pubsub_proto::v1::subscribe_response::Frame as Response;
use pubsub_proto::v1::subscriber_service_server::SubscriberService;
use pubsub_proto::v1::{
    self, AckConfirm, AcknowledgeRequest, AcknowledgeResponse, NackRequest, NackResponse,
    PullRequest, PullResponse, SubscribeHello, SubscribeRequest, SubscribeResponse,
    SubscriberHeartbeat, TopicHead, TopicJoined, TopicLeft,
};
use pubsub_proto::{Encoded, PROTOCOL_VERSION};
use tokio::time::Instant;
use tonic::{Status, Streaming};

use super::convert;
use super::splice::{self, Splicing};
use super::status::{self, invalid, protocol, status};
use super::stream::{End, Frames, dead_after, drain, first_frame, heartbeat_interval, unreadable};
use super::{Context, turned};
use crate::broker::delivery::Nack;
use crate::broker::session::{Attach, Command, Credit, Deliver, Event, Pull, Told, Welcome};
use crate::broker::{BrokerError, Consume, Stream};
use crate::limits;
use crate::names::ConsumerId;
use crate::record::ConsumerRecord;

/// The subscriber service.
#[derive(Debug)]
pub(crate) struct Service(pub(super) Context);

#[tonic::async_trait]
impl SubscriberService for Service {
    type SubscribeStream = Splicing;

    async fn subscribe(
        &self,
        request: tonic::Request<Streaming<SubscribeRequest>>,
    ) -> Result<tonic::Response<Self::SubscribeStream>, Status> {
        let (frames, outbound) = Frames::new();
        let context = self.0.clone();
        let inbound = request.into_inner();
        // The response has to be under way before the hello is read: clients may wait for it.
        self.0.streams.spawn(serve(context, inbound, frames));
        Ok(splice::response(outbound))
    }

    async fn pull(
        &self,
        request: tonic::Request<PullRequest>,
    ) -> Result<tonic::Response<PullResponse>, Status> {
        let request = request.into_inner();
        let name = convert::parse_subscription(&request.subscription)?;
        let pull = parse_pull(&request)?;
        let pulled = self.0.broker.pull(&name, pull).await.map_err(|error| status(&error))?;
        let messages = pulled.leased.into_iter().map(convert::pulled).collect();
        let gaps = pulled.missing.into_iter().map(convert::pulled_gap).collect();
        Ok(tonic::Response::new(PullResponse { messages, gaps }))
    }

    async fn acknowledge(
        &self,
        request: tonic::Request<AcknowledgeRequest>,
    ) -> Result<tonic::Response<AcknowledgeResponse>, Status> {
        let request = request.into_inner();
        let name = convert::parse_subscription(&request.subscription)?;
        check_count(request.ids.len())?;
        let acked = convert::parse_ids(&request.ids)?;
        self.0.broker.acknowledge(&name, acked).await.map_err(|error| status(&error))?;
        Ok(tonic::Response::new(AcknowledgeResponse {}))
    }

    async fn nack(
        &self,
        request: tonic::Request<NackRequest>,
    ) -> Result<tonic::Response<NackResponse>, Status> {
        let request = request.into_inner();
        let name = convert::parse_subscription(&request.subscription)?;
        check_count(request.lease_tokens.len())?;
        let tokens = request.lease_tokens.iter();
        let leases = tokens.map(|token| convert::parse_lease(token)).collect::<Result<_, _>>()?;
        let delay = convert::parse_duration("delay", request.delay)?;
        let (reason, for_good) = (convert::short_reason(&request.reason), request.for_good);
        let nack = Nack { delay, reason, for_good, ..Nack::default() };
        self.0.broker.release(&name, leases, nack).await.map_err(|error| status(&error))?;
        Ok(tonic::Response::new(NackResponse {}))
    }
}

/// Messages of one unary call.
const MAX_UNARY: usize = 1000;

fn check_count(count: usize) -> Result<(), Status> {
    if (1..=MAX_UNARY).contains(&count) {
        return Ok(());
    }
    Err(invalid(format!("{count} messages in one call; 1 to {MAX_UNARY} are allowed")))
}

fn parse_pull(request: &PullRequest) -> Result<Pull, Status> {
    const LEASE: std::ops::RangeInclusive<Duration> =
        Duration::from_secs(1)..=Duration::from_secs(600);
    const MAX_WAIT: Duration = Duration::from_secs(60);
    let max_messages = match request.max_messages {
        0 => 100,
        count => usize::try_from(count).unwrap_or(usize::MAX),
    };
    check_count(max_messages)?;
    let consumer = match request.consumer_id.as_str() {
        "" => "pull",
        id => id,
    };
    let consumer = ConsumerId::parse(consumer).map_err(|error| invalid(error.to_string()))?;
    let wait = convert::parse_duration("wait", request.wait)?.unwrap_or_default();
    let lease = convert::parse_duration("lease", request.lease)?;
    if lease.is_some_and(|lease| !LEASE.contains(&lease)) {
        return Err(invalid("lease must be 1 s to 10 min"));
    }
    Ok(Pull { consumer, max_messages, wait: wait.min(MAX_WAIT), lease })
}

async fn serve(
    context: Context,
    mut inbound: Streaming<SubscribeRequest>,
    frames: Frames<SubscribeResponse>,
) {
    let end = match open(&context, &mut inbound).await {
        Ok((stream, heartbeat)) => run(context, inbound, &frames, stream, heartbeat).await,
        Err(end) => end,
    };
    frames.end(end).await;
}

async fn open(
    context: &Context,
    inbound: &mut Streaming<SubscribeRequest>,
) -> Result<(Stream, Duration), End> {
    let first = first_frame(context, inbound).await?;
    let SubscribeRequest { frame: Some(Request::Hello(hello)) } = first else {
        return Err(protocol("the first frame must be a hello").into());
    };
    let consume = parse_hello(hello)?;
    let heartbeat = consume.attach.heartbeat;
    Ok((context.broker.consume(consume).await?, heartbeat))
}

fn parse_hello(hello: SubscribeHello) -> Result<Consume, Status> {
    if hello.protocol != PROTOCOL_VERSION {
        return Err(status::unsupported(hello.protocol));
    }
    let consumer = hello.consumer.ok_or_else(|| invalid("consumer is missing"))?;
    let id = ConsumerId::parse(&consumer.id).map_err(|error| invalid(error.to_string()))?;
    let instance = convert::parse_uuid("consumer.instance", &consumer.instance)?;
    if consumer.attach == 0 {
        return Err(invalid("consumer.attach counts from 1"));
    }
    let subscription = match hello.subscription.as_str() {
        "" => None,
        name => Some(convert::parse_subscription(name)?),
    };
    let mut positions = Vec::with_capacity(hello.positions.len());
    for position in &hello.positions {
        let epoch = convert::parse_epoch(position.epoch);
        let epoch = epoch.ok_or_else(|| invalid("positions: epoch is missing"))?;
        let topic = convert::parse_topic(&position.topic)?;
        positions.push((topic, epoch, convert::parse_claim(position)?, position.last_received));
    }
    let messages = hello.max_outstanding_messages.clamp(1, limits::MAX_OUTSTANDING_MESSAGES);
    let bytes = hello.max_outstanding_bytes.clamp(1, limits::MAX_OUTSTANDING_BYTES);
    Ok(Consume {
        subscription,
        topics: convert::parse_patterns(&hello.topics)?,
        kind: convert::parse_kind(hello.kind)?,
        on_failure: convert::parse_policy(hello.on_failure)?,
        ack_timeout: convert::parse_duration("ack_timeout", hello.ack_timeout)?,
        filter: convert::parse_filter(&hello.filter)?,
        start: convert::parse_start(hello.start)?,
        must_exist: hello.must_exist,
        known_boot: convert::parse_optional_uuid("boot_id", &hello.boot_id)?,
        positions,
        attach: Attach {
            consumer: ConsumerRecord { id, instance, attach: consumer.attach },
            known_epoch: convert::parse_epoch(hello.subscription_epoch),
            claims: BTreeMap::new(),
            credit: Credit { messages: u64::from(messages), bytes },
            heartbeat: heartbeat_interval(hello.heartbeat_interval)?,
        },
    })
}

async fn run(
    context: Context,
    mut inbound: Streaming<SubscribeRequest>,
    frames: &Frames<SubscribeResponse>,
    mut stream: Stream,
    heartbeat: Duration,
) -> End {
    let (mut draining, mut stopping) = (context.draining.clone(), context.stopping.clone());
    let dead_after = dead_after(heartbeat);
    let mut dead_at = Instant::now() + dead_after;
    // The first thing a client is told is its place.
    let (mut placed, mut drained) = (false, false);
    loop {
        let step = tokio::select! {
            biased;
            // Acks first: they make room.
            frame = inbound.message() => match frame {
                Ok(Some(frame)) => {
                    dead_at = Instant::now() + dead_after;
                    on_frame(&stream, frame).await
                }
                Ok(None) => return End::Gone,
                Err(error) => return unreadable(&error),
            },
            event = stream.events.recv() => match event {
                Some(event) => {
                    placed |= matches!(event, Event::Welcome(_) | Event::Standby(_));
                    on_event(&context, event, heartbeat, frames).await
                }
                None => return BrokerError::Unavailable("the server is stopping").into(),
            },
            () = tokio::time::sleep_until(dead_at) => return End::Gone,
            () = turned(&mut draining), if placed && !drained => {
                drained = true;
                send(frames, Response::Drain(drain())).await
            }
            () = turned(&mut stopping) => {
                return BrokerError::Unavailable("the server is stopping").into();
            }
        };
        if let Err(end) = step {
            return end;
        }
    }
}

async fn on_frame(stream: &Stream, frame: SubscribeRequest) -> Result<(), End> {
    let id = stream.id;
    let (command, last) = match frame.frame {
        Some(Request::Acks(acks)) => {
            (Command::Acks(id, Box::new(convert::parse_acks(acks)?)), false)
        }
        Some(Request::Ping(ping)) => (Command::Ping(id, ping.nonce), false),
        Some(Request::Goodbye(_)) => (Command::Goodbye(id), true),
        Some(Request::Hello(_)) => return Err(protocol("a second hello").into()),
        None => return Err(protocol("an empty frame").into()),
    };
    let sent = stream.commands.send(command).await;
    // The events say why the subscription's task has ended, if it has.
    if last && sent.is_ok() { Err(End::Gone) } else { Ok(()) }
}

async fn on_event(
    context: &Context,
    event: Event,
    heartbeat: Duration,
    frames: &Frames<SubscribeResponse>,
) -> Result<(), End> {
    let frame = match event {
        Event::Welcome(welcome) => Response::Welcome(self::welcome(context, welcome, heartbeat)),
        Event::Standby(consumer) => {
            Response::Standby(v1::Standby { active_consumer: consumer.to_string() })
        }
        Event::Deliver(deliver) => Response::Deliver(self::deliver(deliver)),
        Event::Confirm(number) => Response::Confirm(AckConfirm { number }),
        Event::Heartbeat(beat) => {
            let head = |told: Told| {
                let Told { topic, head, passed, floor } = told;
                TopicHead { topic, head, passed, floor }
            };
            Response::Heartbeat(SubscriberHeartbeat {
                echoed_nonce: beat.nonce,
                last_delivery: beat.last_delivery,
                heads: beat.heads.into_iter().map(head).collect(),
            })
        }
        Event::Rewind(topic, rewound) => Response::Rewind(v1::Rewind {
            topic,
            from: rewound.from,
            generation: rewound.generation,
            taken_back: convert::ranges(&rewound.taken_back),
        }),
        Event::Gap(topic, first, last, reason) => Response::Gap(v1::Gap {
            topic,
            range: Some(v1::SequenceRange { first, last }),
            reason: convert::gap_reason(reason).into(),
        }),
        Event::DataLoss(topic, sequence) => Response::DataLoss(v1::DataLoss { topic, sequence }),
        Event::Joined(topic) => {
            Response::Joined(TopicJoined { topic: Some(convert::session_topic(topic)) })
        }
        Event::Left(topic) => Response::Left(TopicLeft { topic }),
        Event::Repositioned(topic) => {
            Response::Repositioned(v1::Repositioned { topic: Some(convert::session_topic(topic)) })
        }
        Event::Ended(error) => return Err(error.into()),
    };
    send(frames, frame).await
}

fn welcome(context: &Context, welcome: Welcome, heartbeat: Duration) -> v1::SubscribeWelcome {
    v1::SubscribeWelcome {
        boot_id: convert::uuid(context.broker.boot_id()),
        subscription_epoch: welcome.epoch.map_or(0, |epoch| epoch.0),
        heartbeat_interval: convert::duration(heartbeat),
        grace: convert::duration(limits::GRACE),
        topics: welcome.topics.into_iter().map(convert::session_topic).collect(),
        kind: convert::kind(welcome.kind).into(),
        report_started: welcome.wants_started,
    }
}

fn deliver(deliver: Deliver) -> v1::Deliver {
    let Deliver { topic, first_delivery, generation, messages } = deliver;
    let mut frame = v1::Deliver { topic, first_delivery, generation, runs: Vec::new() };
    for (message, attempt) in messages {
        let time = convert::timestamp(message.published_at);
        let body = match message.body.field() {
            Some((row, field)) => Encoded::InRow(row, field),
            None => Encoded::Alone(&message.body),
        };
        frame.push(message.sequence, time, attempt, body);
    }
    frame
}

async fn send(frames: &Frames<SubscribeResponse>, frame: Response) -> Result<(), End> {
    frames.send(SubscribeResponse { frame: Some(frame) }).await
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use prost::Message as _;

    use super::*;
    use crate::body::{Body, put_field};
    use crate::record::{StoredMessage, Timestamp};

    #[test]
    fn what_is_in_a_row_and_what_is_not_is_delivered_alike() {
        let bodies = [&b"one"[..], b"", b"three"];
        let mut row = Vec::new();
        let fields = bodies.map(|body| {
            put_field(body, &mut row);
            row.len()
        });
        let row = Bytes::from(row);
        let begins = [0, fields[0], fields[1]];
        let in_row = begins.map(|field| Body::in_row(&row, field).unwrap());
        let alone = bodies.map(|body| Body::from(Bytes::from_static(body)));
        let frames = [in_row, alone].map(|bodies| {
            let message = |(sequence, body)| {
                let published_at = Timestamp(1500);
                (StoredMessage { sequence, published_at, recipients: Vec::new(), body }, 1)
            };
            let messages = (7..).zip(bodies).map(message).collect();
            deliver(Deliver { topic: 1, first_delivery: 4, generation: 2, messages })
        });
        assert_eq!(frames[0].encode_to_vec(), frames[1].encode_to_vec());
        let decoded = v1::Deliver::decode(&*frames[0].encode_to_vec()).unwrap();
        let received = decoded.received().map(|one| (one.sequence, one.message.unwrap()));
        assert!(received.eq((7..).zip(bodies.map(Bytes::from_static))));
    }
}
