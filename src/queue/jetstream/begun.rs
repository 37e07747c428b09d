//! How calls that have come are handed out: begun first, some ahead of the places in which they are made.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{StreamExt, stream};

use crate::queue::jetstream::Shared;
use crate::queue::jetstream::lease::Lease;
use crate::queue::jetstream::lines::Lines;
use crate::queue::jetstream::pace::Pace;
use crate::queue::jetstream::pull::{Arrived, LOOK_AGAIN, ask, look_around};
use crate::queue::{Delivery, Error, LeaseHandle};

/// How long a call waits here for one who takes it.
pub(super) const HOLD: Duration = Duration::from_secs(1);
/// So many are given back at a time.
const TOGETHER: usize = 32;

/// Calls that have been begun, and are there to be taken.
#[derive(Default)]
pub(super) struct Begun {
    /// Since when they are there, and of which line they are.
    ready: VecDeque<(Instant, usize, Delivery)>,
    /// How many want one.
    takers: usize,
    /// How fast they are taken.
    pace: Pace,
}

impl Begun {
    /// How many more are worth beginning: what is wanted now, and in the next moments.
    fn room(&self, lines: &Lines<Arrived>, places: usize, now: Instant) -> usize {
        (self.takers + self.pace.ahead(now)).saturating_sub(lines.takeable(places))
    }

    /// The first for which there is a place.
    fn take(&mut self, lines: &mut Lines<Arrived>, places: usize) -> Option<Delivery> {
        let next = self.ready.iter().position(|(_, line, _)| lines.may_take(*line, places))?;
        let (_, line, delivery) = self.ready.remove(next)?;
        lines.take(line);
        if let LeaseHandle::JetStream(lease) = &delivery.handle {
            lease.placed();
        }
        self.pace.came(Instant::now());
        Some(delivery)
    }

    pub(super) fn clear(&mut self) -> Vec<Delivery> {
        self.ready.drain(..).map(|(.., delivery)| delivery).collect()
    }
}

/// One who wants a call.
struct Taker<'a>(&'a Shared);

impl<'a> Taker<'a> {
    fn new(shared: &'a Shared) -> Self {
        shared.begun().takers += 1;
        Self(shared)
    }
}

impl Drop for Taker<'_> {
    fn drop(&mut self) {
        self.0.begun().takers -= 1;
    }
}

/// The next call whose time has come.
pub(super) async fn take(shared: &Arc<Shared>, places: usize) -> Result<Delivery, Error> {
    let _taker = Taker::new(shared);
    loop {
        // Made before the look, so that nothing is missed between the two.
        let woken = shared.ready.notified();
        pump(shared, places);
        {
            let mut begun = shared.begun();
            let taken = begun.take(&mut shared.lines(), places);
            if let Some(delivery) = taken {
                drop(begun);
                // More may be there than one was told of.
                shared.ready.notify_one();
                return Ok(delivery);
            }
        }
        // Running out is no reason to fail: it is the time to look again.
        let _ = tokio::time::timeout(LOOK_AGAIN, woken).await;
    }
}

/// Begins the calls that can be made, and asks for more where there is room.
fn pump(shared: &Arc<Shared>, places: usize) {
    look_around(shared);
    let now = Instant::now();
    let (picked, wanted) = {
        let begun = shared.begun();
        let mut lines = shared.lines();
        // What has no place yet leaves as much room as there was.
        let pick = || (begun.room(&lines, places, now) > 0).then(|| lines.pick(places, now))?;
        let picked: Vec<_> = std::iter::from_fn(pick).collect();
        (picked, lines.ask(places, now))
    };
    for (line, arrived) in picked {
        shared.tasks.spawn(begin(Arc::clone(shared), Lease::new(shared, line, arrived)));
    }
    for wanted in wanted {
        shared.tasks.spawn(ask(Arc::clone(shared), wanted));
    }
}

async fn begin(shared: Arc<Shared>, lease: Lease) {
    let (line, arrived) = (lease.line, Arc::clone(&lease.arrived));
    match lease.begin().await {
        Ok(Some(delivery)) => shared.begun().ready.push_back((Instant::now(), line, delivery)),
        Ok(None) => {}
        Err(error) => {
            let call_id = &arrived.call.id;
            tracing::debug!(call_id, %error, "A call that came cannot be begun");
        }
    }
    shared.ready.notify_one();
}

/// Lets others have what has waited here for too long.
pub(super) async fn give_back(shared: &Arc<Shared>) {
    let Some(before) = Instant::now().checked_sub(HOLD.min(shared.options.lease / 3)) else {
        return;
    };
    let ahead = shared.lines().withdraw(before);
    go_back(shared, ahead).await;
    let mut old = Vec::new();
    {
        let mut begun = shared.begun();
        while begun.ready.front().is_some_and(|(at, ..)| *at < before) {
            old.extend(begun.ready.pop_front());
        }
    }
    drop(old);
}

/// Gives calls back that nobody here takes.
pub(super) async fn go_back(shared: &Arc<Shared>, calls: Vec<Arrived>) {
    let calls = stream::iter(calls);
    calls.for_each_concurrent(TOGETHER, async |arrived| arrived.not_now(shared, None).await).await;
}

/// Whether nothing waits here to be made.
pub(super) fn nothing_ahead(shared: &Shared) -> bool {
    shared.lines().is_empty() && shared.begun().ready.is_empty()
}
