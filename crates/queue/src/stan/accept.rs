//! Accepts received messages: decodes them, and moves those that are not due or cannot be decoded.

use std::sync::Arc;

use bytes::Bytes;

use crate::call::UnixMillis;
use crate::now;
use crate::stan::inflight::MessageKey;
use crate::stan::message::{self, DecodeError, Progress};
use crate::stan::pending::ReceivedCall;
use crate::stan::{Shared, parking};

/// Decodes a message and adds it to the pending calls.
pub(super) fn accept(shared: &Arc<Shared>, key: MessageKey, data: Bytes) {
    let options = &shared.options;
    // The message may lack the time of submission; the time of storage replaces it.
    let stored_at = UnixMillis::try_from(key.timestamp / 1_000_000).unwrap_or_default();
    let decoded = message::decode(&data, &options.default_namespace, new_call_id, stored_at);
    let (call, progress) = match decoded {
        Ok(decoded) => decoded,
        Err(error) => {
            // The end of the session does not interrupt this.
            let moving = Arc::clone(shared);
            return shared.tasks.spawn_to_completion(async move {
                dead_letter_undecodable(&moving, key, data, &error).await
            });
        }
    };
    if key.channel.is_delayed() {
        let at = progress.not_before.unwrap_or_default().max(1);
        return shared.enqueue(key, at, ReceivedCall { call, progress });
    }
    // A call in the main channel was not executed yet, whatever its headers say, which clients can write, too. Only a
    // redriven dead letter has a reason, and it counts as another call than before.
    let moves = progress.reason.as_ref().map_or(0, |_| progress.moves.saturating_add(1));
    let progress =
        Progress { moves, unknown_members: progress.unknown_members, ..Progress::default() };
    match call.options.not_before.filter(|at| *at > now()) {
        Some(at) => parking::move_to_delayed(shared, key, at, ReceivedCall { call, progress }),
        None => shared.enqueue(key, now(), ReceivedCall { call, progress }),
    }
}

fn new_call_id() -> String {
    uuid::Uuid::new_v4().to_string()
}

/// Moves a message that cannot be decoded to the dead-letter channel.
async fn dead_letter_undecodable(
    shared: &Shared,
    key: MessageKey,
    data: Bytes,
    error: &DecodeError,
) {
    let (id, sequence) = (message::call_id_in(&data), key.sequence);
    let kept = shared.worker.publish_in_background(&shared.dead_channel, data).await;
    match kept {
        Ok(()) => {
            let dead = &shared.dead_channel;
            tracing::error!(call_id = id, %error, sequence, "A message that cannot be decoded was moved to {dead}");
            shared.acknowledge(key).await;
        }
        Err(publish_error) => {
            tracing::error!(
                call_id = id, %error, sequence, %publish_error,
                "A message that cannot be decoded could not be moved to the dead letters"
            );
            shared.inflight().release(key);
        }
    }
}
