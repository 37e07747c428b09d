//! Room for others: what holds them up is stored at the end of a channel of calls that are made later.

use std::sync::Arc;
use std::time::Duration;

use crate::queue::call::UnixMillis;
use crate::queue::now;
use crate::queue::stan::channels::Channel;
use crate::queue::stan::ledger::Key;
use crate::queue::stan::message::{self, Progress};
use crate::queue::stan::nats::Fault;
use crate::queue::stan::take::Arrived;
use crate::queue::stan::{Shared, once};

/// Between looks at what has waited for long, and before one that cannot be stored is tried again.
const LOOK: Duration = Duration::from_millis(500);
/// Between calls that are sent back to where they are from: first, how that grows, and at last.
const SENDING_BACK: Duration = Duration::from_millis(10);
const SLOWER: f64 = 1.005;
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Sets aside what holds up others in `channel`, until the queue stops. Each channel has somebody who does so, since
/// there are pauses. No session's end cuts one short that is being stored: it would be there twice.
pub(super) async fn make_room(shared: &Shared, channel: Channel) {
    let stopping = &shared.tasks.stopping;
    let mut pause = SENDING_BACK;
    while !stopping.is_cancelled() {
        let crowded = shared.crowded[channel.number()].notified();
        let quiet = tokio::select! {
            () = stopping.cancelled() => return,
            found = tokio::time::timeout(LOOK, crowded) => found.is_err(),
        };
        let mut sent_back = false;
        while !stopping.is_cancelled() && set_aside(shared, channel).await {
            // What comes from there and goes there again fills the server's disk: less and less often, if it goes on.
            if channel.is_later() {
                tokio::time::sleep(pause).await;
                pause = pause.mul_f64(SLOWER).min(LONGEST_PAUSE);
                sent_back = true;
            }
        }
        if quiet && !sent_back {
            pause = SENDING_BACK;
        }
    }
}

/// Sets aside one; whether there may be another.
async fn set_aside(shared: &Shared, channel: Channel) -> bool {
    let aside = shared.ledger().set_aside(channel, now());
    let Some((key, at, mut arrived)) = aside else { return false };
    match store(shared, key, at, &mut arrived).await {
        Ok(()) => true,
        Err(_) => {
            shared.wait(key, at, arrived);
            let _ = tokio::time::timeout(LOOK, shared.tasks.stopping.cancelled()).await;
            false
        }
    }
}

/// Moves a call that is executed at the time `at`, and is where gateways queue, to a channel of such calls. It waits here if
/// the server does not store it there.
pub(super) fn move_to_later(shared: &Arc<Shared>, key: Key, at: UnixMillis, mut arrived: Arrived) {
    shared.ledger().leaves(key);
    let moving = Arc::clone(shared);
    // No session's end cuts it short: it would be there twice.
    shared.tasks.spawn_to_completion(async move {
        if store(&moving, key, at, &mut arrived).await.is_err() {
            moving.wait(key, at, arrived);
        }
    });
}

/// Stores a call at the end of the channel of those that are executed at about the time `at`, unless a duplicate was.
async fn store(
    shared: &Shared,
    key: Key,
    at: UnixMillis,
    arrived: &mut Arrived,
) -> Result<(), Fault> {
    let Arrived { call, progress } = arrived;
    let to = shared.channel(Channel::later(at.saturating_sub(now())));
    let stored = async {
        let step = once::step(shared, call, progress);
        if once::claim(shared, key, step).await? {
            // It may be stored though nobody confirms it. Then this message and that one are duplicates of each other.
            progress.moves = progress.moves.saturating_add(1);
            let moved = Progress { not_before: Some(at), ..progress.clone() };
            shared.worker.publish_patiently(to, message::encode(call, &moved)).await?;
            // If the acknowledgement is lost, the call is not executed here when its time has come.
            shared.once.is_over(step);
        }
        Ok(())
    };
    let stored = stored.await;
    match &stored {
        Ok(()) => shared.acknowledge(key).await,
        Err(fault) => tracing::debug!(
            call_id = call.id, function = %call.function, channel = to, error = %fault,
            "A call that holds up others stays where it is"
        ),
    }
    stored
}
