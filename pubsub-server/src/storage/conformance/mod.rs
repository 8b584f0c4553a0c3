//! What every engine does, by name.

use std::sync::Arc;
use std::time::Duration;

use super::memory::Memory;
use super::redb::{Options, Redb, simulation};
use super::testing::{
    ALL, TestEnv, anonymous, bodies, from, keyed, message, places, publisher, sequences,
    subscription, topic,
};
use super::{AppendRefusal, Change, CommitError, ReadError, ReadLimit, Run, Storage, Urgency};
use crate::names::SubscriptionName;
use crate::record::{CursorRecord, Departed, Epoch, Failure, NewMessage, Timestamp, Verdict};
use crate::schema::{Compatibility, PayloadRules, SchemaRecord};

use self::atomic::*;
use self::identity::*;

mod atomic;
mod identity;

/// An engine under test.
struct Lab {
    env: Arc<TestEnv>,
    storage: Arc<dyn Storage>,
    restart: Box<dyn FnMut() -> Arc<dyn Storage>>,
}

const T: u64 = 7;

impl Lab {
    async fn new(env: Arc<TestEnv>, mut restart: Box<dyn FnMut() -> Arc<dyn Storage>>) -> Self {
        let lab = Self { env, storage: restart(), restart };
        lab.storage.done(vec![Change::CreateTopic(topic("t", T))]).await;
        lab
    }

    async fn memory() -> Self {
        let env = TestEnv::new(1);
        let mut engine = Memory::new(Arc::clone(&env) as _);
        let restart = move || {
            engine = engine.reopen();
            Arc::new(engine.reopen()) as Arc<dyn Storage>
        };
        Self::new(env, Box::new(restart)).await
    }

    async fn redb(inline: bool) -> Self {
        let env = TestEnv::new(1);
        let directory = tempfile::tempdir().unwrap();
        let shared: crate::env::SharedEnv = env.clone();
        let restart = move || {
            let options = Options::new(directory.path(), Arc::clone(&shared));
            let engine = Redb::open(Options { inline, ..options });
            Arc::new(engine.unwrap()) as Arc<dyn Storage>
        };
        Self::new(env, Box::new(restart)).await
    }

    /// The redb engine on a simulated disk with sealed files of a few rows.
    async fn simulated() -> Self {
        let env = TestEnv::new(1);
        let mut open = simulation::opener();
        let shared: crate::env::SharedEnv = env.clone();
        let restart = move || open(Arc::clone(&shared));
        Self::new(env, Box::new(restart)).await
    }

    async fn reopen(&mut self) {
        self.storage.close().await.unwrap();
        self.storage = (self.restart)();
    }

    async fn store(&self, messages: Vec<NewMessage>) -> Vec<Run> {
        self.storage.decided(anonymous(T, messages)).await.unwrap()
    }

    async fn read(&self, from: u64) -> Result<Vec<crate::record::StoredMessage>, ReadError> {
        self.storage.read(Epoch(T), from, ALL).await
    }

    fn head(&self) -> u64 {
        *self.storage.head(Epoch(T)).unwrap().borrow()
    }
}

fn batch(bodies: &[&str]) -> Vec<NewMessage> {
    bodies.iter().map(|body| message(*body)).collect()
}

async fn messages_are_read_in_the_order_of_calls(lab: &mut Lab) {
    let tickets: Vec<_> = (0..50u8)
        .map(|i| lab.storage.append(anonymous(T, vec![message([i]), message([i, i])])))
        .collect();
    for (ticket, i) in tickets.into_iter().zip(0..) {
        let runs = ticket.await.unwrap().into_inner().unwrap();
        assert_eq!(places(&runs), [(1, 2 * i + 1, false), (2, 2 * i + 2, false)]);
    }
    let messages = lab.read(1).await.unwrap();
    assert_eq!(sequences(&messages), (1..=100).collect::<Vec<_>>());
    assert_eq!(messages[98].body.as_ref(), [49]);
    assert_eq!(messages[99].body.as_ref(), [49, 49]);
}

async fn a_message_keeps_its_recipients_and_bytes(lab: &mut Lab) {
    let recipients = vec![
        SubscriptionName::parse("a").unwrap(),
        SubscriptionName::parse(&"b".repeat(128)).unwrap(),
    ];
    let sent = NewMessage { recipients: recipients.clone(), ..message("x") };
    lab.store(vec![message(""), sent]).await;
    lab.reopen().await;
    let messages = lab.read(1).await.unwrap();
    assert_eq!(bodies(&messages), [b"".as_slice(), b"x"]);
    assert_eq!(messages[0].recipients, []);
    assert_eq!(messages[1].recipients, recipients);
}

async fn heads_rise_before_tickets_resolve(lab: &mut Lab) {
    let mut head = lab.storage.head(Epoch(T)).unwrap();
    assert_eq!(*head.borrow_and_update(), 0);
    for i in 1..=20 {
        lab.store(batch(&["a"])).await;
        assert!(head.has_changed().unwrap());
        assert_eq!(*head.borrow_and_update(), i);
        assert_eq!(lab.read(i).await.unwrap().len(), 1, "what a head promises is there");
    }
    assert!(lab.storage.head(Epoch(99)).is_none());
}

async fn a_change_that_can_wait_is_committed_soon(lab: &mut Lab) {
    let change = Change::PutSubscription(subscription("s", 3));
    let ticket = lab.storage.apply(vec![change], Urgency::Soon);
    tokio::time::timeout(Duration::from_secs(5), ticket).await.unwrap().unwrap().into_inner();
    assert_eq!(lab.storage.catalog().await.unwrap().subscriptions.len(), 1);
}

async fn a_read_keeps_its_limits(lab: &mut Lab) {
    for i in 0..4u8 {
        lab.store((0..5).map(|_| message(vec![i; 100])).collect()).await;
    }
    let read = async |from, messages, bytes| {
        let limit = ReadLimit { messages, bytes };
        sequences(&lab.storage.read(Epoch(T), from, limit).await.unwrap())
    };
    assert_eq!(read(1, 7, usize::MAX).await, (1..=7).collect::<Vec<_>>());
    assert_eq!(read(3, usize::MAX, 350).await, [3, 4, 5]);
    assert_eq!(read(5, usize::MAX, 100).await, [5]);
    assert_eq!(read(5, usize::MAX, 1).await, [5], "one message always fits");
    assert_eq!(read(19, 100, usize::MAX).await, [19, 20]);
    assert_eq!(read(21, 100, usize::MAX).await, [0; 0], "beyond the head");
    assert_eq!(read(u64::MAX, 100, usize::MAX).await, [0; 0]);
}

async fn large_messages_and_batches_are_whole(lab: &mut Lab) {
    let sizes = [0, 1, 63_900, 64_000, 64_100, 3_000_000, 10, 30_000, 30_000, 30_000];
    let messages = sizes.iter().zip(0u8..).map(|(size, i)| message(vec![i; *size])).collect();
    lab.store(messages).await;
    lab.store((0..5000).map(|_| message("small")).collect()).await;
    lab.reopen().await;
    let messages = lab.read(1).await.unwrap();
    assert_eq!(sequences(&messages), (1..=5010).collect::<Vec<_>>());
    for (message, (size, i)) in messages.iter().zip(sizes.iter().zip(0u8..)) {
        assert!(message.body.len() == *size && message.body.iter().all(|byte| *byte == i));
    }
    assert!(messages[10..].iter().all(|message| message.body.as_ref() == b"small"));
}

async fn a_trim_removes_what_is_below(lab: &mut Lab) {
    for _ in 0..10 {
        lab.store(batch(&["a", "b", "c"])).await;
    }
    let trim = |below| vec![Change::Trim { topic: Epoch(T), below }];
    lab.storage.done(trim(8)).await;
    assert_eq!(lab.read(7).await, Err(ReadError::Trimmed { first: 8 }));
    assert_eq!(sequences(&lab.read(8).await.unwrap()), (8..=30).collect::<Vec<_>>());
    lab.storage.done(trim(3)).await;
    assert_eq!(lab.storage.stats(Epoch(T)).unwrap().first, 8, "a trim never goes back");
    lab.storage.done(trim(1000)).await;
    assert_eq!(lab.storage.stats(Epoch(T)).unwrap().first, 31);
    assert_eq!(lab.read(31).await.unwrap(), []);
    assert_eq!(lab.head(), 30);
    lab.reopen().await;
    assert_eq!(lab.read(30).await, Err(ReadError::Trimmed { first: 31 }));
    assert_eq!(places(&lab.store(batch(&["d"])).await), [(1, 31, false)]);
    assert_eq!(bodies(&lab.read(31).await.unwrap()), [b"d"]);
    // The bytes come back, sooner or later.
    let deadline = tokio::time::timeout(Duration::from_secs(10), async {
        while lab.storage.stats(Epoch(T)).unwrap().bytes > 1 {
            tokio::time::sleep(Duration::from_millis(10)).await;
            lab.storage.done(trim(31)).await;
        }
    });
    deadline.await.unwrap();
}

async fn a_deleted_topic_is_gone_with_everything(lab: &mut Lab) {
    let me = publisher(1, 1, 1);
    lab.storage.opened(T, me).await.unwrap();
    lab.storage.decided(from(me, T, 1, vec![keyed(1, "a")])).await.unwrap();
    let mut head = lab.storage.head(Epoch(T)).unwrap();
    head.mark_unchanged();
    let cursor = CursorRecord { floor: 1, ..CursorRecord::default() };
    let (subscription_epoch, topic_epoch) = (Epoch(3), Epoch(T));
    let put = Change::PutCursor { subscription: subscription_epoch, topic: topic_epoch, cursor };
    let subscription = Change::PutSubscription(subscription("s", 3));
    lab.storage.done(vec![subscription, put.clone()]).await;
    lab.storage.done(vec![Change::DeleteTopic(Epoch(T))]).await;
    assert!(head.changed().await.is_err(), "the sender is dropped");
    lab.storage.done(vec![put]).await;
    let late = lab.storage.decided(from(me, T, 2, batch(&["b"]))).await;
    assert_eq!(late, Err(AppendRefusal::NoTopic));
    assert_eq!(lab.storage.opened(T, me).await, Err(AppendRefusal::NoTopic));
    assert_eq!(lab.read(1).await, Err(ReadError::NoTopic));
    assert!(lab.storage.stats(Epoch(T)).is_none());
    for _ in 0..2 {
        let catalog = lab.storage.catalog().await.unwrap();
        assert_eq!(catalog.topics, []);
        let subscription = &catalog.subscriptions[0];
        assert_eq!((&*subscription.cursors, &*subscription.departed), (&[][..], &[][..]));
        lab.reopen().await;
    }
    lab.storage.done(vec![Change::CreateTopic(topic("t", 8))]).await;
    let runs = lab.storage.decided(anonymous(8, vec![keyed(1, "other")])).await.unwrap();
    assert_eq!(places(&runs), [(1, 1, false)], "a new epoch starts over");
}

async fn what_a_subscription_missed_of_a_deleted_topic_stays_known(lab: &mut Lab) {
    lab.store(batch(&["a", "b", "c"])).await;
    let at = |floor| CursorRecord { floor, ..CursorRecord::default() };
    let put = |subscription, floor| Change::PutCursor {
        subscription: Epoch(subscription),
        topic: Epoch(T),
        cursor: at(floor),
    };
    for (name, epoch, floor) in [("behind", 3, 1), ("through", 4, 3), ("gone", 5, 0)] {
        let subscription = Change::PutSubscription(subscription(name, epoch));
        lab.storage.done(vec![subscription, put(epoch, floor)]).await;
    }
    // In the same commit as a message: the head is that of the end.
    let mut head = lab.storage.head(Epoch(T)).unwrap();
    let last = lab.storage.append(anonymous(T, batch(&["d"])));
    let deleted = lab.storage.apply(vec![Change::DeleteTopic(Epoch(T))], Urgency::Now);
    last.await.unwrap().into_inner().unwrap();
    deleted.await.unwrap().into_inner();
    assert_eq!(*head.borrow_and_update(), 4);
    assert!(head.changed().await.is_err(), "the sender is dropped");
    lab.storage.done(vec![Change::DeleteSubscription(Epoch(5))]).await;
    let missed = async |lab: &Lab| {
        let catalog = lab.storage.catalog().await.unwrap();
        let one = |departed: Departed| {
            assert_eq!((departed.name.as_str(), departed.epoch), ("t", Epoch(T)));
            (departed.cursor.floor, departed.head)
        };
        let subscriptions = catalog.subscriptions.into_iter();
        let each = subscriptions.flat_map(|each| {
            let name = each.record.name;
            each.departed.into_iter().map(move |departed| (name.to_string(), one(departed)))
        });
        each.collect::<Vec<_>>()
    };
    let behind = |floor| ("behind".to_owned(), (floor, 4));
    for _ in 0..2 {
        assert_eq!(missed(lab).await, [behind(1), ("through".to_owned(), (3, 4))]);
        lab.reopen().await;
    }
    lab.storage.done(vec![put(3, 2), put(4, 4), put(5, 1)]).await;
    for _ in 0..2 {
        assert_eq!(missed(lab).await, [behind(2)]);
        lab.reopen().await;
    }
    lab.storage.done(vec![Change::DeleteSubscription(Epoch(3))]).await;
    assert_eq!(missed(lab).await, []);
    // A subscription that is made again under the same epoch would show what is left.
    lab.reopen().await;
    assert_eq!(missed(lab).await, []);
}

async fn a_message_is_stored_together_with_changes_or_not_at_all(lab: &mut Lab) {
    lab.storage.done(vec![Change::PutSubscription(subscription("s", 3))]).await;
    let put = |floor| Change::PutCursor {
        subscription: Epoch(3),
        topic: Epoch(T),
        cursor: CursorRecord { floor, ..CursorRecord::default() },
    };
    let store = |topic, body| Change::Store { topic: Epoch(topic), message: message(body) };
    let before = lab.storage.append(anonymous(T, batch(&["a"])));
    let stored = lab.storage.apply(vec![store(T, "b"), put(1), store(T, "c")], Urgency::Now);
    let after = lab.storage.append(anonymous(T, batch(&["d"])));
    before.await.unwrap().into_inner().unwrap();
    stored.await.unwrap().into_inner();
    assert!(lab.head() >= 3, "the head rises before the ticket resolves");
    assert_eq!(places(&after.await.unwrap().into_inner().unwrap()), [(1, 4, false)]);
    let changes = vec![put(2), store(T, "e"), store(99, "f")];
    let refused = lab.storage.apply(changes, Urgency::Now).await.unwrap_err();
    assert_eq!(refused, CommitError::NoTopic);
    for _ in 0..2 {
        let messages = lab.read(1).await.unwrap();
        assert_eq!(bodies(&messages), [b"a", b"b", b"c", b"d"]);
        let catalog = lab.storage.catalog().await.unwrap();
        assert_eq!(catalog.subscriptions[0].cursors[0].1.floor, 1);
        assert_eq!(lab.storage.stats(Epoch(T)).unwrap().bytes, 4);
        lab.reopen().await;
    }
}

async fn the_catalog_is_what_was_applied(lab: &mut Lab) {
    let mut cursor = CursorRecord { floor: 4, start: 2, generation: 9, ..CursorRecord::default() };
    cursor.done.insert(6..=8);
    cursor.received.insert(1..=8);
    let verdict = Some(Verdict { at: Timestamp(8), reason: "it does not parse".to_owned() });
    let failure = Failure { count: 2, first_at: Timestamp(7), suspect: true, verdict };
    cursor.failures.insert(5, failure);
    let put = |cursor: &CursorRecord| Change::PutCursor {
        subscription: Epoch(3),
        topic: Epoch(T),
        cursor: cursor.clone(),
    };
    let subscriptions = [subscription("s", 3), subscription("gone", 4)];
    let [kept, gone] = subscriptions.clone().map(Change::PutSubscription);
    lab.storage.done(vec![kept, gone, put(&CursorRecord::default())]).await;
    lab.storage.done(vec![put(&cursor), Change::DeleteSubscription(Epoch(4))]).await;
    for _ in 0..2 {
        let catalog = lab.storage.catalog().await.unwrap();
        assert_eq!(catalog.topics, [topic("t", T)]);
        let [found] = catalog.subscriptions.as_slice() else { panic!("{catalog:?}") };
        assert_eq!(found.record, subscriptions[0]);
        assert_eq!(found.cursors, [(Epoch(T), cursor.clone())]);
        lab.reopen().await;
    }
    let gone = Change::DeleteCursor { subscription: Epoch(3), topic: Epoch(T) };
    lab.storage.done(vec![gone]).await;
    for _ in 0..2 {
        assert_eq!(lab.storage.catalog().await.unwrap().subscriptions[0].cursors, []);
        lab.reopen().await;
    }
}

async fn the_schemas_of_a_topic_are_kept_as_long_as_it_is(lab: &mut Lab) {
    let revision = |revision| {
        let content_type = format!("text/v{revision}");
        Arc::new(SchemaRecord {
            revision,
            rules: PayloadRules { content_type, schema: None },
            compatibility: Compatibility::Backward,
            created_at: Timestamp(u64::from(revision)),
        })
    };
    let put = |epoch, number| Change::PutSchema(Epoch(epoch), revision(number));
    lab.storage.done(vec![Change::CreateTopic(topic("u", 8)), put(8, 1)]).await;
    for number in 1..=11 {
        lab.storage.done(vec![put(T, number), put(99, number)]).await;
    }
    let expected: Vec<_> = (1..=11).map(|number| (Epoch(T), revision(number))).collect();
    for _ in 0..2 {
        let schemas = lab.storage.catalog().await.unwrap().schemas;
        assert_eq!(schemas, [&*expected, &[(Epoch(8), revision(1))]].concat());
        lab.reopen().await;
    }
    lab.storage.done(vec![Change::DeleteTopic(Epoch(T))]).await;
    for _ in 0..2 {
        let schemas = lab.storage.catalog().await.unwrap().schemas;
        assert_eq!(schemas, [(Epoch(8), revision(1))]);
        lab.reopen().await;
    }
    // A topic that is made again under the same epoch would show what is left.
    lab.storage.done(vec![Change::CreateTopic(topic("t", T))]).await;
    assert_eq!(lab.storage.catalog().await.unwrap().schemas.len(), 1);
}

async fn published_at_never_decreases_and_is_searched(lab: &mut Lab) {
    for (wall, body) in [(50_000_000, "a"), (60_000_000, "b"), (40_000_000, "c")] {
        lab.env.set(wall);
        lab.store(batch(&[body, body])).await;
    }
    lab.reopen().await;
    lab.env.set(70_000_000);
    lab.store(batch(&["d"])).await;
    let times: Vec<_> =
        lab.read(1).await.unwrap().iter().map(|message| message.published_at.0).collect();
    let [a, b, d] = [50_000_000, 60_000_000, 70_000_000];
    assert_eq!(times, [a, a, b, b, b, b, d]);
    let find = async |time| lab.storage.find(Epoch(T), Timestamp(time)).await;
    for (time, sequence) in [(0, 1), (a, 1), (a + 1, 3), (b, 3), (b + 1, 7), (d, 7), (d + 1, 8)] {
        assert_eq!(find(time).await, Ok(sequence), "{time}");
    }
    lab.storage.done(vec![Change::Trim { topic: Epoch(T), below: 4 }]).await;
    assert_eq!(find(0).await, Ok(4));
    assert_eq!(lab.storage.find(Epoch(99), Timestamp(0)).await, Err(ReadError::NoTopic));
}

async fn every_boot_is_in_the_ledger(lab: &mut Lab) {
    let first = lab.storage.boot_id();
    lab.reopen().await;
    let second = lab.storage.boot_id();
    assert_ne!(first, second);
    lab.reopen().await;
    assert!(lab.storage.knows_boot(first) && lab.storage.knows_boot(second));
    assert!(!lab.storage.knows_boot(crate::record::Uuid([9; 16])));
}

async fn close_commits_what_was_accepted_and_refuses_the_rest(lab: &mut Lab) {
    let tickets: Vec<_> =
        (0..20).map(|_| lab.storage.append(anonymous(T, batch(&["a"])))).collect();
    lab.storage.close().await.unwrap();
    for ticket in tickets {
        ticket.await.unwrap().into_inner().unwrap();
    }
    let late = lab.storage.append(anonymous(T, batch(&["b"]))).await;
    assert_eq!(late.unwrap_err(), CommitError::Refused);
    let late = lab.storage.apply(vec![], Urgency::Now).await;
    assert_eq!(late.unwrap_err(), CommitError::Refused);
    lab.reopen().await;
    assert_eq!(lab.head(), 20);
}

#[tokio::test(start_paused = true)]
async fn only_a_publisher_that_is_in_use_is_remembered() {
    for mut lab in [Lab::memory().await, Lab::simulated().await] {
        identity::only_a_publisher_that_is_in_use_is_remembered(&mut lab).await;
    }
}

macro_rules! suite {
    ($($behaviour:ident)*) => {
        suite!(on_memory: Lab::memory(), $($behaviour)*);
        suite!(on_redb: Lab::redb(false), $($behaviour)*);
        suite!(on_redb_inline: Lab::redb(true), $($behaviour)*);
        suite!(on_a_simulated_disk: Lab::simulated(), $($behaviour)*);
    };
    ($engine:ident: $lab:expr, $($behaviour:ident)*) => {
        mod $engine {
            use super::*;
            $(#[tokio::test]
            async fn $behaviour() {
                super::$behaviour(&mut $lab.await).await;
            })*
        }
    };
}

suite! {
    messages_are_read_in_the_order_of_calls
    a_message_keeps_its_recipients_and_bytes
    a_replay_is_answered_as_the_first_time
    of_two_publishes_in_one_commit_the_second_is_a_duplicate
    a_gap_is_refused_and_takes_nothing
    a_newer_stream_or_epoch_fences_the_older
    a_refused_message_takes_its_sequence
    results_are_kept_until_they_are_resolved
    the_oldest_results_of_a_window_are_given_up
    a_key_is_stored_once_across_publishers_and_restarts
    a_key_with_other_content_is_refused_for_good
    a_key_is_free_again_after_its_window_and_not_before
    a_key_belongs_to_its_topic
    an_atomic_append_is_stored_whole_or_refused_whole
    an_atomic_append_is_stored_once_under_its_key
    an_expected_head_holds_at_the_commit
    a_retry_of_what_is_stored_does_not_meet_the_head_that_it_moved
    half_an_atomic_append_is_none
    heads_rise_before_tickets_resolve
    a_change_that_can_wait_is_committed_soon
    a_read_keeps_its_limits
    large_messages_and_batches_are_whole
    a_trim_removes_what_is_below
    a_deleted_topic_is_gone_with_everything
    what_a_subscription_missed_of_a_deleted_topic_stays_known
    a_message_is_stored_together_with_changes_or_not_at_all
    the_catalog_is_what_was_applied
    the_schemas_of_a_topic_are_kept_as_long_as_it_is
    a_refusal_of_what_is_new_does_not_concern_what_is_stored
    published_at_never_decreases_and_is_searched
    every_boot_is_in_the_ledger
    close_commits_what_was_accepted_and_refuses_the_rest
}
