use std::sync::atomic::AtomicUsize;
use std::sync::mpsc as channel;
use std::thread::{self, ThreadId};
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::*;

fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn wait_until(condition: impl Fn() -> bool) {
    for _ in 0..10_000 {
        if condition() {
            return;
        }
        thread::sleep(Duration::from_millis(1));
    }
    panic!("it never comes to rest");
}

/// Spawns a task, and waits until it has nothing more to do.
fn spawn(runtime: &Runtime, future: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
    let _context = runtime.enter();
    let task = Task::new(future);
    let shared = Arc::clone(&task.0);
    let handle = runtime.spawn(task);
    wait_until(|| shared.state.load(Ordering::SeqCst) == QUIET);
    handle
}

/// A task that waits for a signal, and what says which thread ran it then.
fn waiting(runtime: &Runtime) -> (oneshot::Sender<()>, channel::Receiver<ThreadId>) {
    let (signal, signalled) = oneshot::channel();
    let (ran, running) = channel::channel();
    spawn(runtime, async move {
        signalled.await.unwrap();
        ran.send(thread::current().id()).unwrap();
    });
    (signal, running)
}

fn always(_: &Handle) -> bool {
    true
}

const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn a_step_is_taken_by_the_thread_that_woke_the_task() {
    let runtime = runtime();
    let (signal, running) = waiting(&runtime);
    let steps = Steps::collect();
    signal.send(()).unwrap();
    assert!(running.try_recv().is_err(), "it has run before its time");
    steps.take_while(always);
    assert_eq!(running.try_recv().unwrap(), thread::current().id());
}

#[test]
fn what_is_collected_and_not_taken_runs_in_the_runtime() {
    let runtime = runtime();
    let (signal, running) = waiting(&runtime);
    let steps = Steps::collect();
    signal.send(()).unwrap();
    drop(steps);
    assert_ne!(running.recv_timeout(PATIENCE).unwrap(), thread::current().id());
}

#[test]
fn who_collects_nothing_wakes_the_runtime() {
    let runtime = runtime();
    let (signal, running) = waiting(&runtime);
    signal.send(()).unwrap();
    assert_ne!(running.recv_timeout(PATIENCE).unwrap(), thread::current().id());
}

#[test]
fn a_busy_runtime_takes_its_steps_itself() {
    let runtime = runtime();
    let (signal, running) = waiting(&runtime);
    let (busy, until) = (channel::channel(), channel::channel::<()>());
    runtime.spawn(async move {
        busy.0.send(()).unwrap();
        let _ = until.1.recv();
    });
    busy.1.recv_timeout(PATIENCE).unwrap();
    let steps = Steps::collect();
    signal.send(()).unwrap();
    steps.take();
    assert_ne!(running.recv_timeout(PATIENCE).unwrap(), thread::current().id());
    drop(until.0);
    wait_until(|| is_idle(runtime.handle()));
}

#[test]
fn tasks_that_are_woken_by_a_step_follow_until_there_are_too_many() {
    let runtime = runtime();
    let (ran, running) = channel::channel();
    let (first, mut signalled) = oneshot::channel();
    for _ in 0..STEPS + 3 {
        let (ran, (signal, next)) = (ran.clone(), oneshot::channel());
        spawn(&runtime, async move {
            signalled.await.unwrap();
            ran.send(thread::current().id()).unwrap();
            let _ = signal.send(());
        });
        signalled = next;
    }
    let steps = Steps::collect();
    first.send(()).unwrap();
    steps.take_while(always);
    for number in 0..STEPS + 3 {
        let here = running.recv_timeout(PATIENCE).unwrap() == thread::current().id();
        assert_eq!(here, number < STEPS, "{number}");
    }
}

#[test]
fn who_collects_enough_wakes_the_runtime() {
    let runtime = runtime();
    let tasks: Vec<_> = (0..=STEPS).map(|_| waiting(&runtime)).collect();
    let steps = Steps::collect();
    let running: Vec<_> = tasks
        .into_iter()
        .map(|(signal, running)| {
            signal.send(()).unwrap();
            running
        })
        .collect();
    assert_ne!(running[STEPS].recv_timeout(PATIENCE).unwrap(), thread::current().id());
    assert!(running[..STEPS].iter().all(|running| running.try_recv().is_err()));
    drop(steps);
    for running in &running[..STEPS] {
        running.recv_timeout(PATIENCE).unwrap();
    }
}

/// Counts how often it is woken.
#[derive(Default)]
struct Counter(AtomicUsize);

impl Wake for Counter {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// Polls a task once, whose future wakes itself so often; how often that was polled, and the task woken.
fn poll_restless(wakes: usize) -> (usize, usize) {
    let runtime = runtime();
    let _context = runtime.enter();
    let polls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&polls);
    let mut task = Task::new(std::future::poll_fn(move |cx| {
        if counted.fetch_add(1, Ordering::SeqCst) < wakes {
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }));
    let woken = Arc::new(Counter::default());
    let waker = Waker::from(Arc::clone(&woken));
    assert!(Pin::new(&mut task).poll(&mut Context::from_waker(&waker)).is_pending());
    (polls.load(Ordering::SeqCst), woken.0.load(Ordering::SeqCst))
}

#[test]
fn a_task_that_wakes_itself_is_polled_again_at_once_but_not_for_ever() {
    assert_eq!(poll_restless(0), (1, 0));
    assert_eq!(poll_restless(2), (3, 0));
    assert_eq!(poll_restless(POLLS - 1), (POLLS, 0));
    assert_eq!(poll_restless(usize::MAX), (POLLS, 1));
}

#[test]
fn a_panic_in_a_step_is_one_of_the_task() {
    let runtime = runtime();
    let (signal, signalled) = oneshot::channel::<()>();
    let task = spawn(&runtime, async move {
        signalled.await.unwrap();
        panic!("as expected");
    });
    let steps = Steps::collect();
    signal.send(()).unwrap();
    steps.take_while(always);
    let ended = runtime.block_on(async { tokio::time::timeout(PATIENCE, task).await });
    let error = ended.expect("the task goes on").unwrap_err();
    assert_eq!(*error.into_panic().downcast::<&str>().unwrap(), "as expected");
}

#[test]
fn a_step_has_the_clock_of_the_runtime() {
    let runtime = runtime();
    let (signal, signalled) = oneshot::channel::<()>();
    let task = spawn(&runtime, async move {
        signalled.await.unwrap();
        tokio::time::sleep(Duration::from_millis(1)).await;
    });
    let steps = Steps::collect();
    signal.send(()).unwrap();
    steps.take_while(always);
    runtime.block_on(task).unwrap();
}

#[test]
fn a_task_that_always_has_more_to_do_goes_on_in_the_runtime() {
    let runtime = runtime();
    let (signal, signalled) = oneshot::channel::<()>();
    let (sender, mut receiver) = mpsc::channel(1);
    let (counted, here) = (Arc::new(AtomicUsize::new(0)), thread::current().id());
    let count = Arc::clone(&counted);
    let task = spawn(&runtime, async move {
        signalled.await.unwrap();
        for _ in 0..100_000 {
            sender.try_send(()).unwrap();
            receiver.recv().await.unwrap();
            count.fetch_add(usize::from(thread::current().id() == here), Ordering::SeqCst);
        }
    });
    let steps = Steps::collect();
    signal.send(()).unwrap();
    steps.take_while(always);
    let count = counted.load(Ordering::SeqCst);
    assert!((1..1000).contains(&count), "{count} rounds in one step");
    runtime.block_on(task).unwrap();
}

#[test]
fn a_task_that_is_aborted_drops_what_it_had_although_that_can_wake_it() {
    let runtime = runtime();
    let held = Arc::new(());
    let (kept, (signal, mut signalled)) = (Arc::clone(&held), mpsc::channel::<()>(1));
    let task = spawn(&runtime, async move {
        let _kept = kept;
        signalled.recv().await;
        std::future::pending().await
    });
    let steps = Steps::collect();
    signal.try_send(()).unwrap();
    task.abort();
    assert!(runtime.block_on(task).unwrap_err().is_cancelled());
    assert_eq!(Arc::strong_count(&held), 1);
    // Comes too late, and does no harm.
    steps.take_while(always);
}

#[test]
fn no_wake_is_lost_between_threads() {
    const EACH: usize = 20_000;
    let (runtime, begun) = (runtime(), Instant::now());
    let (sender, mut receiver) = mpsc::channel(4);
    let task = spawn(&runtime, async move {
        for _ in 0..3 * EACH {
            receiver.recv().await.unwrap();
        }
    });
    let plain = sender.clone();
    runtime.spawn(async move {
        for _ in 0..EACH {
            plain.send(()).await.unwrap();
        }
    });
    thread::scope(|scope| {
        for _ in 0..2 {
            let sender = sender.clone();
            scope.spawn(move || {
                for number in 0..EACH {
                    let steps = Steps::collect();
                    while sender.try_send(()).is_err() {
                        assert!(begun.elapsed() < PATIENCE, "a wake was lost");
                        thread::yield_now();
                    }
                    // Not only when the runtime is idle, which is seldom here.
                    if number % 3 > 0 {
                        steps.take_while(always);
                    }
                }
            });
        }
    });
    let ended = runtime.block_on(async { tokio::time::timeout(PATIENCE, task).await });
    ended.expect("a wake was lost").unwrap();
}
