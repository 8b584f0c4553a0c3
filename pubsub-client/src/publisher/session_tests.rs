//! What a session makes of its server, without one.

use tokio::time::Instant;

use super::*;
use crate::client::Client;
use crate::error::ServerError;
use crate::publisher::PublisherBuilder;

const SECOND: Duration = Duration::from_secs(1);

fn publisher(settings: impl Fn(PublisherBuilder) -> PublisherBuilder) -> Arc<Core> {
    let client = Client::builder("http://127.0.0.1:9").connect_lazy().unwrap();
    let builder = settings(client.publisher("t"));
    Core::new(builder.client, builder.settings)
}

fn reconnect(core: &Core) -> Reconnect {
    Reconnect::new(core.client.retry, Arc::clone(&core.client.env), MAX_PROTOCOL_ERRORS)
}

fn welcome(core: &Core, now: Instant) -> (Liveness, Cut, Duration) {
    core.lock().hello();
    let answer = pb::PublisherWelcome { topic_epoch: 7, ..pb::PublisherWelcome::default() };
    welcomed(core, answer, now).unwrap()
}

fn refused(core: &Core, reason: Reason) -> End {
    judge(core, End::Lost(Cause::Server(ServerError::new(reason, ""))))
}

#[test]
fn a_limit_ends_a_publisher_only_before_it_was_ever_taken_in() {
    let core = publisher(|builder| builder);
    let end = refused(&core, Reason::LimitReached);
    assert!(matches!(end, End::Failed(PublishErrorKind::Session(_))), "{end:?}");
    core.set_welcomed();
    let end = refused(&core, Reason::LimitReached);
    assert!(matches!(end, End::Lost(_)), "{end:?}");
}

#[test]
fn a_missing_topic_is_waited_for_only_where_it_was_there_and_may_come_back() {
    let lenient = publisher(|builder| builder.on_recreated(OnRecreated::Continue));
    let end = refused(&lenient, Reason::TopicNotFound);
    assert!(matches!(end, End::Failed(_)), "{end:?}");
    lenient.set_welcomed();
    let end = refused(&lenient, Reason::TopicNotFound);
    assert!(matches!(end, End::Lost(_)), "{end:?}");
    let strict = publisher(|builder| builder);
    strict.set_welcomed();
    let end = refused(&strict, Reason::TopicNotFound);
    assert!(matches!(end, End::Failed(_)), "{end:?}");
}

#[tokio::test]
async fn results_that_the_server_has_forgotten_are_unknown() {
    let core = publisher(|builder| builder);
    let permits = core.admit(1).await.unwrap();
    let ticket = core.push(core.check("1".into()).unwrap(), permits).unwrap();
    let (_, cut, _) = welcome(&core, Instant::now());
    core.lock().window.next_batch(&cut, Instant::now(), |_, _| {});
    let end = refused(&core, Reason::ResultExpired);
    assert!(matches!(end, End::Lost(_)), "{end:?}");
    let error = ticket.now_or_never().expect("its fate is told").unwrap_err();
    assert_eq!(error.outcome(), Outcome::Unknown);
    assert!(matches!(error.kind(), PublishErrorKind::HorizonElapsed), "{error}");
    assert_eq!(core.lock().window.hello().epoch, 1);
}

#[tokio::test]
async fn a_server_that_answers_pings_and_no_messages_is_left() {
    let core = publisher(|builder| builder);
    let permits = core.admit(1).await.unwrap();
    let ticket = core.push(core.check("1".into()).unwrap(), permits).unwrap();
    let start = Instant::now();
    let (live, cut, patience) = welcome(&core, start);
    let mut reconnect = reconnect(&core);
    let mut session = Session::new(&core, &mut reconnect, live, cut, patience);
    let (requests, _receiver) = mpsc::channel(1);
    session.send(requests.try_reserve().unwrap());

    let sent = Instant::now();
    session.live.frame(start + 29 * SECOND);
    session.live.expect_answers(true, start + 29 * SECOND);
    assert!(session.due(start + 29 * SECOND).is_ok());
    let end = session.due(sent + 30 * SECOND).unwrap_err();
    assert!(matches!(end, End::Lost(Cause::Silence(after)) if after == 30 * SECOND), "{end:?}");
    // While it says that it takes none, it owes no answers.
    session.blocked = true;
    assert!(session.due(sent + 30 * SECOND).is_ok());
    drop(ticket);
}

#[cfg(feature = "outbox")]
#[tokio::test]
async fn where_nothing_may_overtake_a_lost_message_the_publisher_ends_with_it() {
    for strict in [false, true] {
        let core = publisher(|builder| if strict { builder.stop_at_loss() } else { builder });
        let mut tickets = Vec::new();
        for payload in ["1", "2"] {
            let permits = core.admit(1).await.unwrap();
            tickets.push(core.push(core.check(payload.into()).unwrap(), permits).unwrap());
            if tickets.len() == 1 {
                let (_, cut, _) = welcome(&core, Instant::now());
                core.lock().window.next_batch(&cut, Instant::now(), |_, _| {});
            }
        }
        let end = refused(&core, Reason::ResultExpired);
        assert_eq!(matches!(end, End::Failed(PublishErrorKind::HorizonElapsed)), strict, "{end:?}");
        core.end(PublishErrorKind::HorizonElapsed, None);
        let mut outcomes = Vec::new();
        for ticket in tickets {
            outcomes.push(ticket.await.unwrap_err().outcome());
        }
        assert_eq!(outcomes, [Outcome::Unknown, Outcome::NotPersisted]);
    }
}

#[tokio::test]
async fn places_are_given_back_with_the_results_and_what_was_reserved_in_vain_at_once() {
    let core = publisher(|builder| builder.window_messages(2).window_bytes(100));
    let (_, cut, _) = welcome(&core, Instant::now());
    for first in [1, 3] {
        let reserved = core.admit(90).await.unwrap();
        assert!(core.try_admit(11).is_none());
        let _one = core.push(core.check(vec![0; 48].into()).unwrap(), reserved).unwrap();
        assert!(core.try_admit(51).is_none());
        let _two = core.push(core.check("2".into()).unwrap(), core.try_admit(50).unwrap()).unwrap();
        assert!(core.try_admit(1).is_none(), "two messages are all that it takes");
        core.lock().window.next_batch(&cut, Instant::now(), |_, _| {});
        let stored = RunOutcome::Stored(pb::Stored::default());
        core.answered(first, 2, fate(&stored)).unwrap();
    }
    drop(core.admit_together(2, 1000).await.unwrap());
    assert!(core.try_admit(1000).is_some());
}
