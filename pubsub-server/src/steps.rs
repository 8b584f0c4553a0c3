//! Tasks of a runtime that another thread can take a step of.
//!
//! The answer to a publish takes three tasks: of the stream, of the response and of the connection. To
//! have them run, the committer has to wake a thread of the runtime; on a machine that is otherwise
//! idle that takes longer than the three of them. If nothing else waits to be committed, and the runtime
//! has nothing to do, the committer takes their steps itself: [`Steps`] collects the tasks that it wakes
//! and runs them.
//!
//! They remain tasks of the runtime, which owns them, and runs them whenever somebody else wakes them.

use std::any::Any;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::Future;
use std::marker::PhantomData;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use futures_util::task::AtomicWaker;
use tokio::runtime::Handle;

/// A future that a runtime owns, and other threads may take a step of.
///
/// If it is woken while it is polled, it is polled again at once. A response wakes itself with each frame
/// that it sends, most often for nothing; a runtime would put it at the end of its queue, and wake another
/// thread to look there.
#[derive(Debug)]
pub(crate) struct Task(Arc<Shared>);

impl Task {
    /// To be spawned on the runtime that it is called in.
    pub(crate) fn new(future: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(Arc::new(Shared {
            state: AtomicU8::new(WOKEN),
            work: Mutex::new(Work::Open(Box::pin(future))),
            owner: AtomicWaker::new(),
            runtime: Handle::current(),
        }))
    }
}

impl Future for Task {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        // Before it looks, so that nothing that comes afterwards is missed.
        self.0.owner.register(cx.waker());
        self.0.step();
        if self.0.state.load(Ordering::Acquire) & ENDED == 0 {
            return Poll::Pending;
        }
        if let Work::Panicked(cause) = mem::replace(&mut *self.0.work(), Work::Ended) {
            resume_unwind(cause);
        }
        Poll::Ready(())
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        // The future holds wakers of this task, which would keep it. A thread that just takes a step is
        // waited for.
        let work = mem::replace(&mut *self.0.work(), Work::Ended);
        drop(work);
    }
}

#[derive(Debug)]
struct Shared {
    state: AtomicU8,
    /// Whoever polls holds the lock, and never waits for it.
    work: Mutex<Work>,
    /// Wakes the task in its runtime.
    owner: AtomicWaker,
    runtime: Handle,
}

enum Work {
    Open(Pin<Box<dyn Future<Output = ()> + Send>>),
    Ended,
    /// While another thread polled it.
    Panicked(Box<dyn Any + Send>),
}

impl std::fmt::Debug for Work {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Open(_) => "Open",
            Self::Ended => "Ended",
            Self::Panicked(_) => "Panicked",
        })
    }
}

/// Nobody has anything to do.
const QUIET: u8 = 0;
/// It was woken: somebody is about to poll it.
const WOKEN: u8 = 1;
/// Somebody polls it; and looks afterwards whether it was woken meanwhile.
const POLLED: u8 = 2;
const ENDED: u8 = 4;

/// How often it is polled before others have their turn.
const POLLS: usize = 4;

impl Shared {
    fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Polls the future, if it was woken and nobody else is at it.
    fn step(self: &Arc<Self>) {
        if !self.turns(WOKEN, POLLED) {
            return;
        }
        let waker = Waker::from(Arc::clone(self));
        for _ in 0..POLLS {
            if self.poll(&mut Context::from_waker(&waker)).is_ready() {
                self.state.store(ENDED, Ordering::Release);
                return;
            }
            if self.turns(POLLED, QUIET) {
                return;
            }
            self.state.swap(POLLED, Ordering::AcqRel);
        }
        self.state.store(WOKEN, Ordering::Release);
        self.owner.wake();
    }

    fn turns(&self, from: u8, to: u8) -> bool {
        self.state.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    fn poll(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut work = self.work();
        if let Work::Open(future) = &mut *work
            && future.as_mut().poll(cx).is_pending()
        {
            return Poll::Pending;
        }
        *work = Work::Ended;
        Poll::Ready(())
    }

    /// Takes a step on a thread that is none of the runtime's.
    fn step_elsewhere(self: &Arc<Self>) {
        // With the runtime's clock, and its budget: a peer that always has more to say would keep this
        // thread otherwise.
        let step = async { self.step() };
        if let Err(cause) = catch_unwind(AssertUnwindSafe(|| self.runtime.block_on(step))) {
            let work = mem::replace(&mut *self.work(), Work::Panicked(cause));
            let _ = catch_unwind(AssertUnwindSafe(|| drop(work)));
            self.state.store(ENDED, Ordering::Release);
        }
        if self.state.load(Ordering::Acquire) & ENDED != 0 {
            self.owner.wake();
        }
    }
}

impl Wake for Shared {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // Otherwise somebody knows already, or will see it.
        if self.state.fetch_or(WOKEN, Ordering::AcqRel) == QUIET && !collect(self) {
            self.owner.wake();
        }
    }
}

thread_local! {
    /// What was woken, if this thread collects that.
    static COLLECTED: RefCell<Option<VecDeque<Arc<Shared>>>> = const { RefCell::new(None) };
}

/// How many steps are taken in one go: those of two answers, and some. The rest is for the runtime.
const STEPS: usize = 8;

/// Keeps a task for this thread, if that collects them.
fn collect(task: &Arc<Shared>) -> bool {
    let kept = COLLECTED.try_with(|collected| match &mut *collected.borrow_mut() {
        Some(tasks) if tasks.len() < STEPS => {
            tasks.push_back(Arc::clone(task));
            true
        }
        Some(_) | None => false,
    });
    kept.unwrap_or(false)
}

/// Collects the tasks that this thread wakes, until it is dropped: then their runtime is told of them.
#[derive(Debug)]
pub(crate) struct Steps(PhantomData<Rc<()>>);

impl Steps {
    pub(crate) fn collect() -> Self {
        COLLECTED.set(Some(VecDeque::new()));
        Self(PhantomData)
    }

    /// Takes a step of each, and of those that are woken by that, as long as their runtime is idle.
    pub(crate) fn take(self) {
        self.take_while(is_idle);
    }

    fn take_while(self, idle: impl Fn(&Handle) -> bool) {
        for _ in 0..STEPS {
            let next = COLLECTED.with_borrow_mut(|collected| collected.as_mut()?.pop_front());
            let Some(task) = next else { return };
            if !idle(&task.runtime) {
                return task.owner.wake();
            }
            task.step_elsewhere();
        }
    }
}

impl Drop for Steps {
    fn drop(&mut self) {
        for task in COLLECTED.take().into_iter().flatten() {
            task.owner.wake();
        }
    }
}

/// Whether no thread of a runtime is awake. One that is would have to wait for the CPU of a machine that
/// is busy, and so would this thread in the middle of its steps, with all that is to be committed next.
fn is_idle(runtime: &Handle) -> bool {
    let metrics = runtime.metrics();
    // The count is odd while a worker is parked.
    (0..metrics.num_workers()).all(|worker| metrics.worker_park_unpark_count(worker) % 2 == 1)
}

#[cfg(test)]
#[path = "steps_tests.rs"]
mod tests;
