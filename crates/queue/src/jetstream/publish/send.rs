//! Sends a single call or a batch, and delivers the results.
use futures_util::future::join_all;

use crate::call::QueuedCall;
use crate::jetstream::publish::capacity::CapacityPermit;
use crate::jetstream::publish::function_batch::PendingPublish;
use crate::jetstream::wire::batch;
use crate::jetstream::wire::message::batch_headers;
use crate::jetstream::wire::subjects::CALLS;
use crate::jetstream::{PUBLISH_TIMEOUT, Shared, with_timeout};
use crate::reply_batch::ReplyBatch;
use crate::{Error, Published, now};
use gateway_base::function::Function;
use gateway_http::names::X_CALL_ID;

/// Maximum number of batch keys that are tried when another process generates the same ones.
const MAX_KEY_ATTEMPTS: usize = 5;

pub(super) async fn send_single(shared: &Shared, pending: PendingPublish) {
    // A call whose caller is gone is dropped: its acceptance was never reported.
    if !pending.reply.is_closed() {
        pending.reply.send(shared.publish_with_timeout(&pending.call).await);
    }
}

/// Publishes calls of `function` and delivers the results.
pub(super) async fn send_batch(shared: &Shared, function: Function, pending: Vec<PendingPublish>) {
    let (calls, replies): (Vec<_>, Vec<_>) =
        pending.into_iter().map(|publish| (publish.call, (publish.reply, publish.permit))).unzip();
    let published = match &calls[..] {
        [call] => vec![shared.publish_with_timeout(call).await],
        _ => match with_timeout(PUBLISH_TIMEOUT, shared.reserve_when_ready(calls.len())).await {
            Ok(_permit) => {
                let count = calls.len();
                match with_timeout(PUBLISH_TIMEOUT, shared.publish_batch(&function, calls)).await {
                    Ok(ids) => ids.into_iter().map(published).collect(),
                    Err(error) => vec![Err(error); count],
                }
            }
            // There may be capacity for some of them.
            Err(Error::Full) => {
                join_all(calls.iter().map(|call| shared.publish_with_timeout(call))).await
            }
            Err(error) => vec![Err(error); calls.len()],
        },
    };
    let mut batch = ReplyBatch::default();
    replies.into_iter().zip(published).for_each(|((reply, _), result)| batch.push(reply, result));
    batch.send();
}

fn published(id: String) -> Result<Published, Error> {
    Ok(Published { id, duplicate: false })
}

impl Shared {
    /// Reserves capacity once the server is available.
    async fn reserve_when_ready(&self, calls: usize) -> Result<CapacityPermit<'_>, Error> {
        self.ready().await?.reserve(calls).await
    }

    /// Publishes several calls of `function` as one batch, under new ids. If the future is dropped, either all of them
    /// are stored or none.
    async fn publish_batch(
        &self,
        function: &Function,
        mut calls: Vec<QueuedCall>,
    ) -> Result<Vec<String>, Error> {
        // The consumer must exist first: without it no worker would pull the calls.
        self.ensure_consumer(function).await?;
        for attempt in 1.. {
            let key = self.batch_keys.next(calls.len(), now());
            calls =
                calls.into_iter().map(|call| with_id(call, key.new_call_id(function))).collect();
            let subject = self.subjects.batch(CALLS, function, key);
            let stored = self.api.publish(subject, batch_headers(), batch::encode(&calls), Some(0));
            match stored.await {
                Ok(_) => break,
                Err(error) if error.is_conflict() && attempt < MAX_KEY_ATTEMPTS => {
                    self.batch_keys.change_node();
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(calls.into_iter().map(|call| call.id).collect())
    }
}

/// Returns the call with a new id, also in the header that tells its function the id.
fn with_id(mut call: QueuedCall, id: String) -> QueuedCall {
    if let Some(header) = call.headers.get_mut(&X_CALL_ID)
        && let Ok(id) = http::HeaderValue::from_str(&id)
    {
        *header = id;
    }
    call.with_new_id(id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jetstream::publish::function_batch::tests::pending;

    #[test]
    fn a_function_receives_the_new_id_of_a_batched_call() {
        let (PendingPublish { call, .. }, _) = pending(0);
        let call = with_id(call, "second".to_owned());
        assert_eq!(
            (call.id.as_str(), &call.headers[X_CALL_ID]),
            ("second", &"second".parse().unwrap())
        );
    }
}
