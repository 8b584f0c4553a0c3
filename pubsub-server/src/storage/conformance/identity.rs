//! Publisher sequences and idempotency keys: one identity is stored once.

use std::time::Duration;

use super::super::testing::{
    anonymous, bodies, from, keyed, message, publisher, topic, topic_with_window,
};
use super::super::{
    Append, AppendRefusal, Change, Fact, Fate, Item, OpenPublisher, Refusal, RefusalReason, Run,
};
use super::{Lab, T, batch, places};
use crate::limits;
use crate::record::{Epoch, NewMessage};

pub(super) async fn a_replay_is_answered_as_the_first_time(lab: &mut Lab) {
    let me = publisher(1, 1, 1);
    assert_eq!(lab.storage.opened(T, me).await, Ok(None));
    let first = from(me, T, 1, batch(&["a", "b", "c"]));
    let runs = lab.storage.decided(first.clone()).await.unwrap();
    assert_eq!(places(&runs), [(1, 1, false), (2, 2, false), (3, 3, false)]);
    let runs = lab.storage.decided(first.clone()).await.unwrap();
    assert_eq!(places(&runs), [(1, 1, true), (2, 2, true), (3, 3, true)]);
    lab.reopen().await;
    let again = publisher(1, 1, 2);
    assert_eq!(lab.storage.opened(T, again).await, Ok(Some(3)));
    let runs = lab.storage.decided(from(again, T, 2, batch(&["b", "c", "d"]))).await.unwrap();
    assert_eq!(places(&runs), [(2, 2, true), (3, 3, true), (4, 4, false)]);
    assert_eq!(bodies(&lab.read(1).await.unwrap()), [b"a", b"b", b"c", b"d"]);
}

/// With an engine that does all its work where it is called, so that days pass at once.
pub(super) async fn only_a_publisher_that_is_in_use_is_remembered(lab: &mut Lab) {
    const DAY: Duration = Duration::from_secs(24 * 3600);
    let (used, left) = (publisher(1, 1, 1), publisher(2, 1, 1));
    for each in [used, left] {
        assert_eq!(lab.storage.opened(T, each).await, Ok(None));
        let append = from(each, T, 1, batch(&["a", "b"]));
        lab.storage.decided(Append { resolved_below: 3, ..append }).await.unwrap();
    }
    for day in 1..10 {
        tokio::time::advance(DAY).await;
        assert_eq!(lab.storage.decided(from(used, T, 0, vec![])).await, Ok(vec![]));
        // Each opens a stream and leaves: an engine that forgets only then does.
        assert_eq!(lab.storage.opened(T, publisher(3, 1, day)).await, Ok(None));
    }
    lab.storage.decided(from(used, T, 3, batch(&["c"]))).await.unwrap();
    assert_eq!(
        lab.storage.decided(from(left, T, 3, batch(&["c"]))).await,
        Err(AppendRefusal::Fenced)
    );
    assert_eq!(lab.storage.opened(T, publisher(2, 1, 2)).await, Ok(None));
}

pub(super) async fn of_two_publishes_in_one_commit_the_second_is_a_duplicate(lab: &mut Lab) {
    let me = publisher(1, 1, 1);
    lab.storage.opened(T, me).await.unwrap();
    let append = from(me, T, 1, vec![keyed(1, "a")]);
    let both = [lab.storage.append(append.clone()), lab.storage.append(append)];
    let other = lab.storage.append(anonymous(T, vec![keyed(1, "a"), keyed(1, "a")]));
    let [first, second] = both;
    assert_eq!(places(&first.await.unwrap().into_inner().unwrap()), [(1, 1, false)]);
    assert_eq!(places(&second.await.unwrap().into_inner().unwrap()), [(1, 1, true)]);
    let other = places(&other.await.unwrap().into_inner().unwrap());
    assert_eq!(other, [(1, 1, true), (2, 1, true)]);
    assert_eq!(lab.head(), 1);
}

pub(super) async fn a_gap_is_refused_and_takes_nothing(lab: &mut Lab) {
    let me = publisher(1, 1, 1);
    lab.storage.opened(T, me).await.unwrap();
    let gap = lab.storage.decided(from(me, T, 2, batch(&["b"]))).await;
    assert_eq!(gap, Err(AppendRefusal::OutOfOrder { expected: 1 }));
    let runs = lab.storage.decided(from(me, T, 1, batch(&["a"]))).await.unwrap();
    assert_eq!(places(&runs), [(1, 1, false)]);
}

pub(super) async fn a_newer_stream_or_epoch_fences_the_older(lab: &mut Lab) {
    let (old, new) = (publisher(1, 1, 1), publisher(1, 1, 2));
    assert_eq!(
        lab.storage.decided(from(old, T, 1, batch(&["a"]))).await,
        Err(AppendRefusal::Fenced),
        "a stream has to be opened"
    );
    lab.storage.opened(T, old).await.unwrap();
    lab.storage.decided(from(old, T, 1, batch(&["a"]))).await.unwrap();
    assert_eq!(lab.storage.opened(T, new).await, Ok(Some(1)));
    let late = lab.storage.decided(from(old, T, 2, batch(&["late"]))).await;
    assert_eq!(late, Err(AppendRefusal::Fenced));
    let runs = lab.storage.decided(from(new, T, 2, batch(&["b"]))).await.unwrap();
    assert_eq!(places(&runs), [(2, 2, false)], "a fenced append takes no sequence");
    for late in [old, new] {
        assert_eq!(lab.storage.opened(T, late).await, Err(AppendRefusal::Fenced));
    }
    let newest = publisher(1, 2, 1);
    assert_eq!(lab.storage.opened(T, newest).await, Ok(None));
    let late = lab.storage.decided(from(new, T, 3, batch(&["late"]))).await;
    assert_eq!(late, Err(AppendRefusal::Fenced));
    assert_eq!(lab.storage.opened(T, new).await, Err(AppendRefusal::Fenced));
    let runs = lab.storage.decided(from(newest, T, 1, batch(&["c"]))).await.unwrap();
    assert_eq!(places(&runs), [(1, 3, false)]);
    lab.reopen().await;
    let late = lab.storage.decided(from(newest, T, 2, batch(&["d"]))).await;
    assert_eq!(late, Err(AppendRefusal::Fenced), "a restart ends all streams");
    assert_eq!(lab.storage.opened(T, new).await, Err(AppendRefusal::Fenced));
}

pub(super) async fn a_refused_message_takes_its_sequence(lab: &mut Lab) {
    let me = publisher(1, 1, 1);
    lab.storage.opened(T, me).await.unwrap();
    let refusal = Refusal::new(RefusalReason::TooLarge, "2 MiB");
    let mut append = from(me, T, 1, batch(&["a", "b"]));
    append.items.insert(1, Item::Refuse(refusal.clone()));
    let runs = lab.storage.decided(append.clone()).await.unwrap();
    assert_eq!(places(&runs), [(1, 1, false), (3, 2, false)]);
    lab.reopen().await;
    let again = publisher(1, 1, 2);
    lab.storage.opened(T, again).await.unwrap();
    let append = Append { publisher: Some(again), ..append };
    let runs = lab.storage.decided(append).await.unwrap();
    assert_eq!(places(&runs), [(1, 1, true), (3, 2, true)]);
    assert_eq!(runs[1], Run { first_sequence: 2, count: 1, fate: Fate::Refused(refusal) });
}

pub(super) async fn a_refusal_of_what_is_new_does_not_concern_what_is_stored(lab: &mut Lab) {
    let refusal = Refusal::new(RefusalReason::Schema, "3").with(Fact::SchemaRevision(3));
    let refuse = |message: NewMessage| Item::RefuseNew(message.key.unwrap(), refusal.clone());
    lab.store(vec![keyed(1, "a")]).await;
    lab.reopen().await;
    let me = publisher(1, 1, 1);
    lab.storage.opened(T, me).await.unwrap();
    let items = vec![refuse(keyed(1, "a")), refuse(keyed(1, "b")), refuse(keyed(2, "c"))];
    let append = Append { items, ..from(me, T, 1, Vec::new()) };
    let runs = lab.storage.decided(append).await.unwrap();
    assert_eq!(places(&runs), [(1, 1, true)]);
    let refused = Run { first_sequence: 2, count: 2, fate: Fate::Refused(refusal) };
    assert_eq!(runs[1..], [refused]);
    let free = lab.store(vec![keyed(2, "c")]).await;
    assert_eq!(places(&free), [(1, 2, false)], "the key of what was refused was not used");
}

pub(super) async fn results_are_kept_until_they_are_resolved(lab: &mut Lab) {
    let me = publisher(1, 1, 1);
    lab.storage.opened(T, me).await.unwrap();
    lab.storage.decided(from(me, T, 1, batch(&["a", "b", "c"]))).await.unwrap();
    let next = from(me, T, 4, batch(&["d"]));
    lab.storage.decided(Append { resolved_below: 3, ..next }).await.unwrap();
    let old = lab.storage.decided(from(me, T, 2, batch(&["b", "c"]))).await;
    assert_eq!(old, Err(AppendRefusal::ResultExpired { sequence: 2 }));
    let kept = lab.storage.decided(from(me, T, 3, batch(&["c", "d"]))).await.unwrap();
    assert_eq!(places(&kept), [(3, 3, true), (4, 4, true)]);
    let me = publisher(1, 1, 2);
    let open = OpenPublisher { topic: Epoch(T), publisher: me, resolved_below: 5 };
    assert_eq!(lab.storage.open_publisher(open).await.unwrap().into_inner(), Ok(Some(4)));
    let old = lab.storage.decided(from(me, T, 4, batch(&["d"]))).await;
    assert_eq!(old, Err(AppendRefusal::ResultExpired { sequence: 4 }));
}

pub(super) async fn the_oldest_results_of_a_window_are_given_up(lab: &mut Lab) {
    let me = publisher(1, 1, 1);
    lab.storage.opened(T, me).await.unwrap();
    let window = u64::from(limits::MAX_IN_FLIGHT_MESSAGES);
    let mut sequence = 1;
    while sequence <= window + 1 {
        let append = from(me, T, sequence, (0..500).map(|_| message("a")).collect());
        lab.storage.decided(append).await.unwrap();
        sequence += 500;
    }
    let old = lab.storage.decided(from(me, T, 1, batch(&["a"]))).await;
    assert_eq!(old, Err(AppendRefusal::ResultExpired { sequence: 1 }));
    let kept = lab.storage.decided(from(me, T, sequence - window, batch(&["a"]))).await.unwrap();
    assert_eq!(places(&kept), [(sequence - window, sequence - window, true)]);
}

pub(super) async fn a_key_is_stored_once_across_publishers_and_restarts(lab: &mut Lab) {
    let runs = lab.store(vec![message("x"), keyed(1, "a"), keyed(2, "b")]).await;
    assert_eq!(places(&runs), [(1, 1, false), (2, 2, false), (3, 3, false)]);
    lab.reopen().await;
    let me = publisher(1, 1, 1);
    lab.storage.opened(T, me).await.unwrap();
    let append = from(me, T, 1, vec![keyed(2, "b"), message("y"), keyed(1, "a")]);
    let runs = lab.storage.decided(append).await.unwrap();
    assert_eq!(places(&runs), [(1, 3, true), (2, 4, false), (3, 2, true)]);
    lab.storage.done(vec![Change::Trim { topic: Epoch(T), below: 5 }]).await;
    let runs = lab.store(vec![keyed(1, "a")]).await;
    assert_eq!(places(&runs), [(1, 2, true)], "a key outlives its message");
}

pub(super) async fn a_key_with_other_content_is_refused_for_good(lab: &mut Lab) {
    lab.store(vec![message("x"), keyed(1, "a")]).await;
    let me = publisher(1, 1, 1);
    lab.storage.opened(T, me).await.unwrap();
    let append = from(me, T, 1, vec![keyed(1, "other"), keyed(1, "a")]);
    for duplicate in [false, true] {
        let runs = lab.storage.decided(append.clone()).await.unwrap();
        let Fate::Refused(refusal) = &runs[0].fate else { panic!("{runs:?}") };
        assert_eq!(refusal.reason, RefusalReason::KeyReused);
        assert!(refusal.detail.contains("message 2") && refusal.detail.len() <= 200);
        assert_eq!(places(&runs[1..]), [(2, 2, true)], "{duplicate}");
    }
    assert_eq!(lab.head(), 2);
}

pub(super) async fn a_key_is_free_again_after_its_window_and_not_before(lab: &mut Lab) {
    let window = Duration::from_millis(200);
    lab.storage.done(vec![Change::CreateTopic(topic_with_window("w", 9, window))]).await;
    let publish = || lab.storage.decided(anonymous(9, vec![keyed(1, "a")]));
    publish().await.unwrap();
    // Ten years ahead and back: the time of day does not count.
    lab.env.advance(315_360_000_000);
    assert_eq!(places(&publish().await.unwrap()), [(1, 1, true)]);
    lab.env.set(5);
    tokio::time::sleep(window + Duration::from_millis(50)).await;
    assert_eq!(places(&publish().await.unwrap()), [(1, 2, false)]);
    let other = lab.storage.decided(anonymous(9, vec![keyed(1, "other")])).await.unwrap();
    assert!(matches!(other[0].fate, Fate::Refused(_)));
}

pub(super) async fn a_key_belongs_to_its_topic(lab: &mut Lab) {
    lab.storage.done(vec![Change::CreateTopic(topic("u", 8))]).await;
    lab.store(vec![keyed(1, "a")]).await;
    let runs = lab.storage.decided(anonymous(8, vec![keyed(1, "other")])).await.unwrap();
    assert_eq!(places(&runs), [(1, 1, false)]);
}
