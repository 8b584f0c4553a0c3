//! Appends that are stored whole or not at all.

use super::super::testing::{anonymous, bodies, from, keyed, message, publisher};
use super::super::{Append, AppendRefusal, Atomic, Fact, Fate, Item, Refusal, RefusalReason, Run};
use super::{Lab, T, batch, places};
use crate::record::NewMessage;

fn expecting(head: u64) -> Option<Atomic> {
    Some(Atomic { expected_head: Some(head), key: None })
}

fn atomic(append: Append) -> Append {
    Append { atomic: Some(Atomic::default()), ..append }
}

/// The one refusal of all messages of an answer.
fn refusal(runs: &[Run], count: u32) -> &Refusal {
    match runs {
        [Run { count: all, fate: Fate::Refused(refusal), .. }] if *all == count => refusal,
        runs => panic!("{runs:?}"),
    }
}

async fn stored(lab: &Lab) -> Vec<String> {
    let messages = lab.read(1).await.unwrap();
    bodies(&messages).iter().map(|body| String::from_utf8_lossy(body).into_owned()).collect()
}

pub(super) async fn an_atomic_append_is_stored_whole_or_refused_whole(lab: &mut Lab) {
    let me = publisher(1, 1, 1);
    lab.storage.opened(T, me).await.unwrap();
    let mut bad = atomic(from(me, T, 1, batch(&["a", "b", "c"])));
    bad.items[1] = Item::Refuse(Refusal::new(RefusalReason::TooLarge, "2 MiB"));
    let expected = Refusal {
        reason: RefusalReason::TooLarge,
        detail: "message 2 of the batch: 2 MiB".to_owned(),
        facts: vec![Fact::Index(1)],
    };
    let runs = lab.storage.decided(bad.clone()).await.unwrap();
    assert_eq!((refusal(&runs, 3), lab.head()), (&expected, 0));
    let good = atomic(from(me, T, 4, batch(&["d", "e"])));
    let runs = lab.storage.decided(good.clone()).await.unwrap();
    assert_eq!(places(&runs), [(4, 1, false), (5, 2, false)]);
    lab.reopen().await;
    let me = publisher(1, 1, 2);
    assert_eq!(lab.storage.opened(T, me).await, Ok(Some(5)));
    let again = |append: Append| Append { publisher: Some(me), ..append };
    let runs = lab.storage.decided(again(bad)).await.unwrap();
    assert_eq!(refusal(&runs, 3), &expected);
    let runs = lab.storage.decided(again(good)).await.unwrap();
    assert_eq!(places(&runs), [(4, 1, true), (5, 2, true)]);
    assert_eq!(stored(lab).await, ["d", "e"]);
}

fn with_key(messages: Vec<NewMessage>, content: &str, expected_head: Option<u64>) -> Append {
    let key = keyed(9, content).key;
    Append { atomic: Some(Atomic { expected_head, key }), ..anonymous(T, messages) }
}

pub(super) async fn an_atomic_append_is_stored_once_under_its_key(lab: &mut Lab) {
    lab.store(batch(&["first"])).await;
    let publish = || with_key(batch(&["a", "b"]), "a, b", Some(1));
    // Both in one commit, if the engine likes.
    let tickets = [lab.storage.append(publish()), lab.storage.append(publish())];
    let mut duplicate = false;
    for ticket in tickets {
        let runs = ticket.await.unwrap().into_inner().unwrap();
        assert_eq!(places(&runs), [(1, 2, duplicate), (2, 3, duplicate)]);
        duplicate = true;
    }
    lab.store(batch(&["last"])).await;
    lab.reopen().await;
    let runs = lab.storage.decided(publish()).await.unwrap();
    assert_eq!(places(&runs), [(1, 2, true), (2, 3, true)]);
    let other = with_key(batch(&["a", "x", "c"]), "a, x, c", None);
    let runs = lab.storage.decided(other).await.unwrap();
    assert_eq!(refusal(&runs, 3).reason, RefusalReason::KeyReused);
    let one = lab.store(vec![keyed(9, "alone")]).await;
    assert_eq!(refusal(&one, 1).reason, RefusalReason::KeyReused);
    assert_eq!(stored(lab).await, ["first", "a", "b", "last"]);
}

pub(super) async fn an_expected_head_holds_at_the_commit(lab: &mut Lab) {
    let racers = ["a", "b", "c"].map(|body| {
        let append = Append { atomic: expecting(0), ..anonymous(T, batch(&[body, body])) };
        lab.storage.append(append)
    });
    let mut fates = Vec::new();
    for racer in racers {
        fates.push(racer.await.unwrap().into_inner().unwrap());
    }
    assert_eq!(places(&fates[0]), [(1, 1, false), (2, 2, false)]);
    for fate in &fates[1..] {
        let refusal = refusal(fate, 2);
        assert_eq!(refusal.reason, RefusalReason::HeadMismatch);
        assert_eq!(refusal.facts, [Fact::Head(2)]);
    }
    let next = Append { atomic: expecting(2), ..anonymous(T, batch(&["d"])) };
    assert_eq!(places(&lab.storage.decided(next).await.unwrap()), [(1, 3, false)]);
    assert_eq!(stored(lab).await, ["a", "a", "d"]);
}

pub(super) async fn a_retry_of_what_is_stored_does_not_meet_the_head_that_it_moved(lab: &mut Lab) {
    let me = publisher(1, 1, 1);
    lab.storage.opened(T, me).await.unwrap();
    let won = Append { atomic: expecting(0), ..from(me, T, 1, batch(&["a", "b"])) };
    let runs = lab.storage.decided(won.clone()).await.unwrap();
    assert_eq!(places(&runs), [(1, 1, false), (2, 2, false)]);
    let lost = Append { atomic: expecting(3), ..from(me, T, 3, batch(&["c"])) };
    let runs = lab.storage.decided(lost.clone()).await.unwrap();
    assert_eq!(refusal(&runs, 1).facts, [Fact::Head(2)]);
    // By now the head is what was expected, and what was decided stays decided.
    lab.store(batch(&["d"])).await;
    for stream in 2..4 {
        let me = publisher(1, 1, stream);
        assert_eq!(lab.storage.opened(T, me).await, Ok(Some(3)));
        let again = |append: &Append| Append { publisher: Some(me), ..append.clone() };
        let runs = lab.storage.decided(again(&won)).await.unwrap();
        assert_eq!(places(&runs), [(1, 1, true), (2, 2, true)]);
        let runs = lab.storage.decided(again(&lost)).await.unwrap();
        assert_eq!(refusal(&runs, 1).facts, [Fact::Head(2)]);
        lab.reopen().await;
    }
    assert_eq!(stored(lab).await, ["a", "b", "d"]);
}

pub(super) async fn half_an_atomic_append_is_none(lab: &mut Lab) {
    let me = publisher(1, 1, 1);
    lab.storage.opened(T, me).await.unwrap();
    lab.storage.decided(from(me, T, 1, batch(&["a", "b"]))).await.unwrap();
    let half = lab.storage.decided(atomic(from(me, T, 2, batch(&["b", "c"])))).await;
    assert_eq!(half, Err(AppendRefusal::OutOfOrder { expected: 3 }));
    let whole = lab.storage.decided(atomic(from(me, T, 3, vec![message("c")]))).await.unwrap();
    assert_eq!(places(&whole), [(3, 3, false)]);
}
