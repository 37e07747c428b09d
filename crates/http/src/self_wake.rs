//! Coalesces the wake-ups that the task of a connection sends to itself while it is polled.
//!
//! A request body passes through a channel of hyper whose two ends both live in the task of the connection. Each end
//! wakes the other: the reader when it wants a frame, and again when it has received one, even the last one. Each of
//! these wake-ups would make the runtime poll the task once more, where a small request needs two polls in all.
//! [`SelfWakeCoalescer`] keeps wake-ups that a poll sends to its own task from the runtime, and repeats the poll itself
//! once. [`WakeCheckpoint::discard_later`] discards a wake-up that announces nothing.

use std::cell::Cell;
use std::ptr;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};

thread_local! {
    /// Address of the `CoalescingWaker` of the task that this thread polls; null between polls.
    static CURRENT_POLL: Cell<*const ()> = const { Cell::new(ptr::null()) };
    /// That task has been woken from inside the poll.
    static WOKEN_DURING_POLL: Cell<bool> = const { Cell::new(false) };
}

/// Wakes the task, or sets a flag while this thread polls the task.
struct CoalescingWaker {
    task: Waker,
}

impl Wake for CoalescingWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if ptr::eq(CURRENT_POLL.get(), Arc::as_ptr(self).cast()) {
            WOKEN_DURING_POLL.set(true);
        } else {
            self.task.wake_by_ref();
        }
    }
}

/// Polls a future and coalesces its self-wakes. Keeps its waker from one poll to the next.
#[derive(Debug, Default)]
pub struct SelfWakeCoalescer(Option<TaskWakers>);

#[derive(Debug)]
struct TaskWakers {
    task: Waker,
    /// A `CoalescingWaker` for `task`.
    coalescing: Waker,
}

impl TaskWakers {
    fn new(task: &Waker) -> Self {
        let coalescing = Waker::from(Arc::new(CoalescingWaker { task: task.clone() }));
        Self { task: task.clone(), coalescing }
    }
}

impl SelfWakeCoalescer {
    /// Polls, and polls once more if the first poll has woken its own task. If the second poll wakes the task as well,
    /// the runtime polls it later, after other tasks.
    pub fn poll<T>(
        &mut self,
        cx: &Context<'_>,
        mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        let task = cx.waker();
        let previous = self.0.take().filter(|previous| previous.task.will_wake(task));
        let waker = &self.0.insert(previous.unwrap_or_else(|| TaskWakers::new(task))).coalescing;
        let _scope = PollScope::enter(waker);
        let cx = &mut Context::from_waker(waker);
        let mut polled = poll(cx);
        if polled.is_pending() && WOKEN_DURING_POLL.take() {
            polled = poll(cx);
            if polled.is_pending() && WOKEN_DURING_POLL.get() {
                task.wake_by_ref();
            }
        }
        polled
    }
}

/// Marks the current poll, and restores the outer one on drop. A guard, because wake-ups after a poll that panics must
/// reach the task.
struct PollScope {
    outer: (*const (), bool),
}

impl PollScope {
    fn enter(waker: &Waker) -> Self {
        Self { outer: (CURRENT_POLL.replace(waker.data()), WOKEN_DURING_POLL.replace(false)) }
    }
}

impl Drop for PollScope {
    fn drop(&mut self) {
        CURRENT_POLL.set(self.outer.0);
        WOKEN_DURING_POLL.set(self.outer.1);
    }
}

/// Whether the task had been woken at some point of the current poll.
#[derive(Clone, Copy, Debug)]
pub struct WakeCheckpoint {
    woken: bool,
}

impl WakeCheckpoint {
    /// A checkpoint at this point of the current poll.
    pub fn now() -> Self {
        Self { woken: WOKEN_DURING_POLL.get() }
    }

    /// Discards wake-ups of the current poll after this checkpoint.
    pub fn discard_later(self) {
        WOKEN_DURING_POLL.set(self.woken);
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use super::*;

    /// Counts how often a task was woken.
    #[derive(Default)]
    struct Task(AtomicUsize);

    impl Wake for Task {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Relaxed);
        }
    }

    impl Task {
        fn woken(&self) -> usize {
            self.0.load(Relaxed)
        }
    }

    fn task() -> (Arc<Task>, Waker) {
        let task = Arc::<Task>::default();
        (Arc::clone(&task), Waker::from(task))
    }

    /// Polls a future that wakes itself in its first `wakes` polls, and returns how often it was polled.
    fn polls(coalescer: &mut SelfWakeCoalescer, waker: &Waker, wakes: usize) -> usize {
        let mut polls = 0;
        let polled = coalescer.poll(&Context::from_waker(waker), |cx| {
            polls += 1;
            if polls <= wakes {
                cx.waker().wake_by_ref();
            }
            Poll::<()>::Pending
        });
        assert!(polled.is_pending());
        polls
    }

    /// Returns the waker that a future polled by `coalescer` sees.
    fn seen(coalescer: &mut SelfWakeCoalescer, waker: &Waker) -> Waker {
        let seen =
            coalescer.poll(&Context::from_waker(waker), |cx| Poll::Ready(cx.waker().clone()));
        let Poll::Ready(seen) = seen else { unreachable!("the closure returns Ready") };
        seen
    }

    #[test]
    fn a_future_that_wakes_itself_is_polled_twice_before_other_tasks() {
        let (task, waker) = task();
        let mut coalescer = SelfWakeCoalescer::default();
        for (wakes, expect) in [(0, (1, 0)), (1, (2, 0)), (2, (2, 1))] {
            let before = task.woken();
            let polls = polls(&mut coalescer, &waker, wakes);
            assert_eq!((polls, task.woken() - before), expect, "{wakes}");
        }
    }

    #[test]
    fn a_wake_from_outside_reaches_the_task() {
        let (task, waker) = task();
        let mut coalescer = SelfWakeCoalescer::default();
        let seen = seen(&mut coalescer, &waker);
        seen.wake_by_ref();
        assert_eq!(task.woken(), 1);
        // The same from another thread during a poll: that poll may be too late to see the change.
        let _ = coalescer.poll(&Context::from_waker(&waker), |cx| {
            let waker = cx.waker().clone();
            std::thread::spawn(move || waker.wake()).join().unwrap();
            Poll::<()>::Pending
        });
        assert_eq!(task.woken(), 2);
    }

    #[test]
    fn a_wake_of_another_task_reaches_it() {
        let ((one, one_waker), (other, other_waker)) = (task(), task());
        let (mut coalescer, mut other_coalescer) =
            (SelfWakeCoalescer::default(), SelfWakeCoalescer::default());
        let of_other = seen(&mut other_coalescer, &other_waker);
        let _ = coalescer.poll(&Context::from_waker(&one_waker), |_| {
            of_other.wake_by_ref();
            Poll::<()>::Pending
        });
        assert_eq!((one.woken(), other.woken()), (0, 1));
    }

    #[test]
    fn a_nested_poll_keeps_the_wakes_of_the_outer_one() {
        let (one, one_waker) = task();
        let (_, other_waker) = task();
        let (mut coalescer, mut other_coalescer) =
            (SelfWakeCoalescer::default(), SelfWakeCoalescer::default());
        let mut polls_of_one = 0;
        let _ = coalescer.poll(&Context::from_waker(&one_waker), |cx| {
            polls_of_one += 1;
            if polls_of_one == 1 {
                cx.waker().wake_by_ref();
                assert_eq!(polls(&mut other_coalescer, &other_waker, 1), 2);
                assert!(WOKEN_DURING_POLL.get());
            }
            Poll::<()>::Pending
        });
        assert_eq!((polls_of_one, one.woken()), (2, 0));
    }

    #[test]
    fn a_discarded_wake_has_no_effect_and_earlier_ones_remain() {
        let (task, waker) = task();
        for (early, expect) in [(false, 1), (true, 2)] {
            let mut polls = 0;
            let _ = SelfWakeCoalescer::default().poll(&Context::from_waker(&waker), |cx| {
                polls += 1;
                if polls == 1 {
                    if early {
                        cx.waker().wake_by_ref();
                    }
                    let before = WakeCheckpoint::now();
                    cx.waker().wake_by_ref();
                    before.discard_later();
                }
                Poll::<()>::Pending
            });
            assert_eq!((polls, task.woken()), (expect, 0), "{early}");
        }
    }

    #[test]
    fn a_future_that_moves_to_another_task_wakes_the_new_task() {
        let ((one, one_waker), (other, other_waker)) = (task(), task());
        let mut coalescer = SelfWakeCoalescer::default();
        seen(&mut coalescer, &one_waker);
        seen(&mut coalescer, &other_waker).wake();
        assert_eq!((one.woken(), other.woken()), (0, 1));
    }

    #[test]
    fn a_poll_that_panics_is_finished() {
        let (task, waker) = task();
        let mut coalescer = SelfWakeCoalescer::default();
        let seen = seen(&mut coalescer, &waker);
        let panics = AssertUnwindSafe(|| {
            coalescer.poll(&Context::from_waker(&waker), |_| -> Poll<()> { panic!("on purpose") })
        });
        assert!(catch_unwind(panics).is_err());
        seen.wake();
        assert_eq!(task.woken(), 1);
    }
}
