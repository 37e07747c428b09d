//! Wakes that a connection's task gives itself while it is polled.
//!
//! A request's body goes through a channel of hyper's whose ends both live in the connection's task. Each end wakes
//! the other: the reader when it wants a piece, and again when it has taken one, be it the last. Through the runtime
//! each of these wakes is one more turn of the task, where a small request needs two. [`OwnWakes`] keeps every wake
//! that a poll gives its own task to that poll: it is repeated at once. Of a wake that has nothing to say not even
//! that is needed: [`Mark::forget_since`].

use std::cell::Cell;
use std::ptr;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};

thread_local! {
    /// Which `Echo` belongs to the task that this thread polls; null between polls.
    static POLLED: Cell<*const ()> = const { Cell::new(ptr::null()) };
    /// Whether it has been woken from inside that poll.
    static HEARD: Cell<bool> = const { Cell::new(false) };
}

/// Wakes the task, unless this thread is polling it: then it is noted.
struct Echo {
    task: Waker,
}

impl Wake for Echo {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if ptr::eq(POLLED.get(), Arc::as_ptr(self).cast()) {
            HEARD.set(true);
        } else {
            self.task.wake_by_ref();
        }
    }
}

/// What a task keeps from one poll to the next to hear its own wakes.
#[derive(Debug, Default)]
pub struct OwnWakes(Option<Wakers>);

#[derive(Debug)]
struct Wakers {
    task: Waker,
    /// An `Echo` around it.
    echo: Waker,
}

impl Wakers {
    fn new(task: &Waker) -> Self {
        let echo = Waker::from(Arc::new(Echo { task: task.clone() }));
        Self { task: task.clone(), echo }
    }
}

impl OwnWakes {
    /// Polls, and does it once more if `poll` has woken its own task. If that wakes it again, other tasks have their
    /// turn first.
    pub fn poll<T>(
        &mut self,
        cx: &Context<'_>,
        mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        let task = cx.waker();
        let kept = self.0.take().filter(|kept| kept.task.will_wake(task));
        let echo = &self.0.insert(kept.unwrap_or_else(|| Wakers::new(task))).echo;
        let _during = During::enter(echo);
        let cx = &mut Context::from_waker(echo);
        let mut polled = poll(cx);
        if polled.is_pending() && HEARD.take() {
            polled = poll(cx);
            if polled.is_pending() && HEARD.get() {
                task.wake_by_ref();
            }
        }
        polled
    }
}

/// Lasts as long as a poll. A guard, since a poll may panic: what is heard after it must reach the task.
struct During {
    outer: (*const (), bool),
}

impl During {
    fn enter(echo: &Waker) -> Self {
        Self { outer: (POLLED.replace(echo.data()), HEARD.replace(false)) }
    }
}

impl Drop for During {
    fn drop(&mut self) {
        POLLED.set(self.outer.0);
        HEARD.set(self.outer.1);
    }
}

/// What has been heard up to a moment in a poll.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    heard: bool,
}

impl Mark {
    pub fn now() -> Self {
        Self { heard: HEARD.get() }
    }

    /// Forgets a wake that came since then: it has nothing to say.
    pub fn forget_since(self) {
        HEARD.set(self.heard);
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

    /// Polls `own` with a future that wakes itself in its first `wakes` polls. How often it was polled.
    fn polls(own: &mut OwnWakes, waker: &Waker, wakes: usize) -> usize {
        let mut polls = 0;
        let polled = own.poll(&Context::from_waker(waker), |cx| {
            polls += 1;
            if polls <= wakes {
                cx.waker().wake_by_ref();
            }
            Poll::<()>::Pending
        });
        assert!(polled.is_pending());
        polls
    }

    /// The waker that a future polled by `own` sees.
    fn seen(own: &mut OwnWakes, waker: &Waker) -> Waker {
        let seen = own.poll(&Context::from_waker(waker), |cx| Poll::Ready(cx.waker().clone()));
        let Poll::Ready(seen) = seen else { unreachable!("it is ready") };
        seen
    }

    #[test]
    fn a_future_that_wakes_itself_is_polled_again_at_once_and_then_in_turn() {
        let (task, waker) = task();
        let mut own = OwnWakes::default();
        for (wakes, expect) in [(0, (1, 0)), (1, (2, 0)), (2, (2, 1))] {
            let before = task.woken();
            let polls = polls(&mut own, &waker, wakes);
            assert_eq!((polls, task.woken() - before), expect, "{wakes}");
        }
    }

    #[test]
    fn a_wake_from_outside_reaches_the_task() {
        let (task, waker) = task();
        let mut own = OwnWakes::default();
        let seen = seen(&mut own, &waker);
        seen.wake_by_ref();
        assert_eq!(task.woken(), 1);
        // From another thread also in the middle of a poll: it may be too late for this one to see what it is about.
        let _ = own.poll(&Context::from_waker(&waker), |cx| {
            let waker = cx.waker().clone();
            std::thread::spawn(move || waker.wake()).join().unwrap();
            Poll::<()>::Pending
        });
        assert_eq!(task.woken(), 2);
    }

    #[test]
    fn a_poll_that_wakes_another_task_does_wake_it() {
        let ((one, one_waker), (other, other_waker)) = (task(), task());
        let (mut own, mut others) = (OwnWakes::default(), OwnWakes::default());
        let of_other = seen(&mut others, &other_waker);
        let _ = own.poll(&Context::from_waker(&one_waker), |_| {
            of_other.wake_by_ref();
            Poll::<()>::Pending
        });
        assert_eq!((one.woken(), other.woken()), (0, 1));
    }

    #[test]
    fn a_poll_inside_another_leaves_it_what_it_has_heard() {
        let (one, one_waker) = task();
        let (_, other_waker) = task();
        let (mut own, mut others) = (OwnWakes::default(), OwnWakes::default());
        let mut polls_of_one = 0;
        let _ = own.poll(&Context::from_waker(&one_waker), |cx| {
            polls_of_one += 1;
            if polls_of_one == 1 {
                cx.waker().wake_by_ref();
                assert_eq!(polls(&mut others, &other_waker, 1), 2);
                assert!(HEARD.get());
            }
            Poll::<()>::Pending
        });
        assert_eq!((polls_of_one, one.woken()), (2, 0));
    }

    #[test]
    fn a_wake_that_is_forgotten_causes_nothing_and_one_before_it_stays() {
        let (task, waker) = task();
        for (early, expect) in [(false, 1), (true, 2)] {
            let mut polls = 0;
            let _ = OwnWakes::default().poll(&Context::from_waker(&waker), |cx| {
                polls += 1;
                if polls == 1 {
                    if early {
                        cx.waker().wake_by_ref();
                    }
                    let before = Mark::now();
                    cx.waker().wake_by_ref();
                    before.forget_since();
                }
                Poll::<()>::Pending
            });
            assert_eq!((polls, task.woken()), (expect, 0), "{early}");
        }
    }

    #[test]
    fn a_future_that_moves_to_another_task_wakes_that_one() {
        let ((one, one_waker), (other, other_waker)) = (task(), task());
        let mut own = OwnWakes::default();
        seen(&mut own, &one_waker);
        seen(&mut own, &other_waker).wake();
        assert_eq!((one.woken(), other.woken()), (0, 1));
    }

    #[test]
    fn a_poll_that_panics_is_over() {
        let (task, waker) = task();
        let mut own = OwnWakes::default();
        let seen = seen(&mut own, &waker);
        let panics = AssertUnwindSafe(|| {
            own.poll(&Context::from_waker(&waker), |_| -> Poll<()> { panic!("on purpose") })
        });
        assert!(catch_unwind(panics).is_err());
        seen.wake();
        assert_eq!(task.woken(), 1);
    }
}
