//! Parks calls that block others: a call that cannot run now is moved to the end of a channel of delayed calls.

use std::sync::Arc;
use std::time::Duration;

use crate::call::UnixMillis;
use crate::now;
use crate::stan::channels::Channel;
use crate::stan::inflight::MessageKey;
use crate::stan::message::{self, Progress};
use crate::stan::nats::NatsError;
use crate::stan::pending::ReceivedCall;
use crate::stan::{Shared, dedup};

/// Interval of checks for calls that have waited long, and delay after a failed attempt to park one.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);
/// Minimum, growth factor and maximum of the delay between calls of a delayed channel that are published to that
/// channel again.
const MIN_PARK_INTERVAL: Duration = Duration::from_millis(10);
const PARK_INTERVAL_FACTOR: f64 = 1.005;
const MAX_PARK_INTERVAL: Duration = Duration::from_secs(1);

/// Parks blocking calls of `channel` until the queue stops. Each channel has its own task, because of the delays. The
/// end of a session does not interrupt a publish: the call would be stored twice.
pub(super) async fn run_parking(shared: &Shared, channel: Channel) {
    let stopping = &shared.tasks.stopping;
    let mut interval = MIN_PARK_INTERVAL;
    while !stopping.is_cancelled() {
        let congested = shared.congested[channel.number()].notified();
        let quiet = tokio::select! {
            () = stopping.cancelled() => return,
            found = tokio::time::timeout(CHECK_INTERVAL, congested) => found.is_err(),
        };
        let mut sent_back = false;
        while !stopping.is_cancelled() && park_one(shared, channel).await {
            // A call that returns to its own channel fills the server's disk, so the rate decreases.
            if channel.is_delayed() {
                tokio::time::sleep(interval).await;
                interval = interval.mul_f64(PARK_INTERVAL_FACTOR).min(MAX_PARK_INTERVAL);
                sent_back = true;
            }
        }
        if quiet && !sent_back {
            interval = MIN_PARK_INTERVAL;
        }
    }
}

/// Parks one call. Returns whether there may be another.
async fn park_one(shared: &Shared, channel: Channel) -> bool {
    let parked = shared.inflight().park(channel, now());
    let Some((key, at, mut received)) = parked else { return false };
    match store_as_delayed(shared, key, at, &mut received).await {
        Ok(()) => true,
        Err(_) => {
            shared.enqueue(key, at, received);
            let _ = tokio::time::timeout(CHECK_INTERVAL, shared.tasks.stopping.cancelled()).await;
            false
        }
    }
}

/// Moves a call of the main channel that is due at `at` to a delayed channel. If the server does not store it, it
/// waits in memory.
pub(super) fn move_to_delayed(
    shared: &Arc<Shared>,
    key: MessageKey,
    at: UnixMillis,
    mut received: ReceivedCall,
) {
    shared.inflight().mark_moving(key);
    let moving = Arc::clone(shared);
    // The end of a session does not interrupt this: the call would be stored twice.
    shared.tasks.spawn_to_completion(async move {
        if store_as_delayed(&moving, key, at, &mut received).await.is_err() {
            moving.enqueue(key, at, received);
        }
    });
}

/// Publishes a call to the delayed channel for the time `at`, unless a duplicate was published.
async fn store_as_delayed(
    shared: &Shared,
    key: MessageKey,
    at: UnixMillis,
    received: &mut ReceivedCall,
) -> Result<(), NatsError> {
    let ReceivedCall { call, progress } = received;
    let to = shared.channel(Channel::for_delay(at.saturating_sub(now())));
    let stored = async {
        let step = dedup::next_step(shared, call, progress);
        if dedup::claim(shared, key, step).await? {
            // The call may be stored even without confirmation. Then this message and that one are duplicates.
            progress.moves = progress.moves.saturating_add(1);
            let moved = Progress { not_before: Some(at), ..progress.clone() };
            shared.worker.publish_in_background(to, message::encode(call, &moved)).await?;
            // If the acknowledgement is lost, this message is not executed when it is due.
            shared.dedup.mark_finished(step);
        }
        Ok(())
    };
    let stored = stored.await;
    match &stored {
        Ok(()) => shared.acknowledge(key).await,
        Err(error) => tracing::debug!(
            call_id = call.id, function = %call.function, channel = to, error = %error,
            "A blocking call could not be parked"
        ),
    }
    stored
}
