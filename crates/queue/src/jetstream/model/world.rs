//! The server, the clock, and the tasks of all processes. One random generator decides what happens next.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use crate::jetstream::model::server::{
    CallId, Delivered, Fault, LEASE, Payload, Server, Stored, Subject,
};
use crate::jetstream::wire::ids::BatchKey;
use crate::status::CallState;

/// Time limit of a request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(1);

/// What is known about a call, beside what is stored.
#[derive(Clone, Debug, Default)]
pub(super) struct Call {
    /// The batch in which it was published.
    pub(super) batch: Option<(BatchKey, u8)>,
    /// The publisher was told that it is stored.
    pub(super) published: bool,
    /// A client was told that it is cancelled.
    pub(super) cancelled: bool,
    /// A worker was told that this final state is stored.
    pub(super) settled: Option<CallState>,
    /// A live process has lost the lease of its message: from then on, it may be executed twice.
    pub(super) lease_lost: bool,
    /// It was executed again after its end, as a call of a batch may be.
    pub(super) repeated: bool,
}

struct Task {
    /// The process that runs the task; `None` for a client.
    process: Option<usize>,
    future: Pin<Box<dyn Future<Output = ()>>>,
}

/// A running execution.
struct Execution {
    call: CallId,
    process: usize,
}

pub(super) struct World {
    pub(super) server: RefCell<Server>,
    pub(super) rng: RefCell<fastrand::Rng>,
    pub(super) calls: RefCell<Vec<Call>>,
    now: Cell<Instant>,
    tasks: RefCell<Vec<Task>>,
    executions: RefCell<BTreeMap<u64, Execution>>,
    last_execution: Cell<u64>,
    /// Processes that do not run until this time.
    stalled: RefCell<BTreeMap<usize, Instant>>,
    /// Requests fail and processes give up deliveries.
    pub(super) chaos: Cell<bool>,
    /// Keys of batches whose change was announced, by process.
    pub(super) dirty: RefCell<BTreeMap<usize, BTreeSet<BatchKey>>>,
    violations: RefCell<Vec<String>>,
    history: Option<RefCell<Vec<String>>>,
    start: Instant,
}

impl World {
    pub(super) fn new(seed: u64, with_history: bool) -> Rc<Self> {
        let start = Instant::now();
        Rc::new(Self {
            server: RefCell::default(),
            rng: RefCell::new(fastrand::Rng::with_seed(seed)),
            calls: RefCell::default(),
            now: Cell::new(start),
            tasks: RefCell::default(),
            executions: RefCell::default(),
            last_execution: Cell::new(0),
            stalled: RefCell::default(),
            chaos: Cell::new(true),
            dirty: RefCell::default(),
            violations: RefCell::default(),
            history: with_history.then(RefCell::default),
            start,
        })
    }

    pub(super) fn now(&self) -> Instant {
        self.now.get()
    }

    pub(super) fn advance(&self, time: Duration) {
        self.now.set(self.now() + time);
    }

    /// Returns a random number below `limit`.
    pub(super) fn random(&self, limit: usize) -> usize {
        self.rng.borrow_mut().usize(..limit)
    }

    /// Returns `true` once in `times` calls, while things go wrong.
    pub(super) fn mishap(&self, times: usize) -> bool {
        self.chaos.get() && self.random(times) == 0
    }

    pub(super) fn log(&self, event: impl FnOnce() -> String) {
        if let Some(history) = &self.history {
            let at = self.now() - self.start;
            history.borrow_mut().push(format!("{:8.3} {}", at.as_secs_f64(), event()));
        }
    }

    pub(super) fn violation(&self, text: String) {
        self.log(|| format!("VIOLATION: {text}"));
        self.violations.borrow_mut().push(text);
    }

    pub(super) fn first_violation(&self) -> Option<String> {
        self.violations.borrow().first().cloned()
    }

    pub(super) fn history(&self) -> String {
        self.history.as_ref().map_or_else(String::new, |history| history.borrow().join("\n"))
    }

    pub(super) fn spawn(&self, process: Option<usize>, future: impl Future<Output = ()> + 'static) {
        self.tasks.borrow_mut().push(Task { process, future: Box::pin(future) });
    }

    /// Ends a process: its tasks stop where they are.
    pub(super) fn crash(&self, process: usize) {
        self.log(|| format!("process {process} crashes"));
        self.tasks.borrow_mut().retain(|task| task.process != Some(process));
        self.executions.borrow_mut().retain(|_, execution| execution.process != process);
        self.dirty.borrow_mut().remove(&process);
        self.server.borrow_mut().forget_holder(process);
    }

    /// Suspends a process.
    pub(super) fn stall(&self, process: usize, time: Duration) {
        self.log(|| format!("process {process} is suspended for {time:?}"));
        self.stalled.borrow_mut().insert(process, self.now() + time);
    }

    pub(super) fn task_count(&self) -> usize {
        self.tasks.borrow().len()
    }

    /// Runs a task to its next request.
    pub(super) fn poll_task(&self, index: usize) {
        let mut task = self.tasks.borrow_mut().swap_remove(index);
        let stalled = task.process.and_then(|process| self.stalled.borrow().get(&process).copied());
        let is_stalled = stalled.is_some_and(|until| until > self.now());
        let mut context = Context::from_waker(Waker::noop());
        if is_stalled || task.future.as_mut().poll(&mut context).is_pending() {
            self.tasks.borrow_mut().push(task);
        }
    }

    /// Runs each task once, and advances the clock.
    pub(super) fn poll_all(&self) {
        let mut tasks = std::mem::take(&mut *self.tasks.borrow_mut());
        let mut context = Context::from_waker(Waker::noop());
        tasks.retain_mut(|task| task.future.as_mut().poll(&mut context).is_pending());
        self.tasks.borrow_mut().splice(..0, tasks);
        self.advance(Duration::from_millis(100));
    }

    pub(super) async fn sleep(&self, time: Duration) {
        let until = self.now() + time;
        while self.now() < until {
            yield_now().await;
        }
    }

    /// Waits for a future, or drops it before that.
    pub(super) async fn drop_sometimes<T>(&self, future: impl Future<Output = T>) -> Option<T> {
        let mut future = std::pin::pin!(future);
        poll_fn(|context| match self.mishap(80) {
            true => Poll::Ready(None),
            false => future.as_mut().poll(context).map(Some),
        })
        .await
    }

    /// Sends a request. Its effect or its response may be lost.
    pub(super) async fn request<T>(
        &self,
        request: impl FnOnce(&mut Server, Instant) -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        let sent = self.now();
        yield_now().await;
        if self.mishap(60) {
            return Err(Fault::Unavailable);
        }
        let result = request(&mut self.server.borrow_mut(), self.now());
        if self.mishap(60) || self.now() - sent > REQUEST_TIMEOUT {
            return Err(Fault::Unavailable);
        }
        result
    }

    pub(super) async fn get(&self, subject: Subject) -> Result<Option<Stored>, Fault> {
        self.request(|server, now| Ok(server.get(subject, now).cloned())).await
    }

    pub(super) async fn publish(
        &self,
        subject: Subject,
        payload: Payload,
        expected: Option<u64>,
    ) -> Result<u64, Fault> {
        self.log(|| format!("write {subject:?} {payload:?} over {expected:?}"));
        let stored =
            self.request(|server, now| server.publish(subject, payload, expected, now)).await;
        self.log(|| format!("write {subject:?}: {stored:?}"));
        stored
    }

    pub(super) async fn delete(&self, subject: Subject, sequence: u64) -> Result<(), Fault> {
        self.log(|| format!("remove {subject:?} {sequence}"));
        self.request(|server, _| {
            server.delete(subject, sequence);
            Ok(())
        })
        .await
    }

    /// Sends an ack, which may be lost.
    pub(super) async fn ack(&self, sequence: u64, ack: Ack) {
        self.log(|| format!("{ack:?} of {sequence}"));
        yield_now().await;
        if self.mishap(30) {
            return;
        }
        let (mut server, now) = (self.server.borrow_mut(), self.now());
        match ack {
            Ack::Done => server.ack(sequence),
            Ack::Nak(delay) => server.nak(sequence, delay, now),
            Ack::Progress => server.in_progress(sequence, now),
        }
    }

    pub(super) fn deliver(&self, process: usize) -> Option<Delivered> {
        let (now, pick) = (self.now(), |waiting| self.random(waiting));
        let delivered = self.server.borrow_mut().deliver(now, process, pick);
        if let Some(Delivered { lease_lost: true, subject, payload, .. }) = &delivered {
            let mut calls = self.calls.borrow_mut();
            match (subject, payload) {
                (_, Payload::Batch(lost)) => {
                    lost.iter().for_each(|call| calls[*call].lease_lost = true);
                }
                (Subject::Call(call), _) => calls[*call].lease_lost = true,
                _ => {}
            }
        }
        if let Some(delivered) = &delivered {
            self.log(|| format!("delivered: {delivered:?}"));
        }
        delivered
    }

    /// Starts the execution of a call. Checks that it is permitted.
    pub(super) fn begin(&self, call: CallId, process: usize) -> ExecutionId {
        self.log(|| format!("process {process} executes call {call}"));
        let mut calls = self.calls.borrow_mut();
        let state = &mut calls[call];
        for execution in self.executions.borrow().values().filter(|other| other.call == call) {
            if !state.lease_lost {
                let other = execution.process;
                self.violation(format!("call {call} is executed by {other} and {process}"));
            }
        }
        // After a lost lease, a call can be executed in its batch and have a message of its own, which is cancelled.
        if state.cancelled && !(state.lease_lost && state.batch.is_some()) {
            self.violation(format!("call {call} is executed after its cancellation"));
        }
        if state.settled.is_some() && state.batch.is_some() {
            // The publish of its own message was repeated, since its response was lost.
            state.repeated = true;
        } else if state.settled.is_some() && !state.lease_lost {
            self.violation(format!("call {call} is executed after its end"));
        }
        let id = self.last_execution.get() + 1;
        self.last_execution.set(id);
        self.executions.borrow_mut().insert(id, Execution { call, process });
        ExecutionId(id)
    }

    pub(super) fn end(&self, ExecutionId(id): ExecutionId) {
        self.executions.borrow_mut().remove(&id);
    }

    /// Waits for half of the lease at most, mostly for less than a second.
    pub(super) fn execution_time(&self) -> Duration {
        let limit = if self.random(6) == 0 { LEASE * 2 } else { Duration::from_secs(1) };
        Duration::from_millis(self.random(limit.as_millis() as usize) as u64)
    }
}

pub(super) struct ExecutionId(u64);

#[derive(Clone, Copy, Debug)]
pub(super) enum Ack {
    Done,
    Nak(Duration),
    Progress,
}

pub(super) async fn yield_now() {
    let mut yielded = false;
    poll_fn(
        |_| {
            if std::mem::replace(&mut yielded, true) { Poll::Ready(()) } else { Poll::Pending }
        },
    )
    .await;
}

/// Waits until `ready` returns a value.
pub(super) async fn wait_for<T>(mut ready: impl FnMut() -> Option<T>) -> T {
    loop {
        if let Some(value) = ready() {
            return value;
        }
        yield_now().await;
    }
}
