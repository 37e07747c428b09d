//! Forwards a request to a function that may not be ready: waits for readiness, and retries requests that were not
//! delivered.

use std::sync::Arc;
use std::task::Poll;
use std::time::Instant;

use crate::error::Error;
use crate::invoke::Invoker;
use crate::metrics::calls::Call;
use crate::proxy::client::{self, Origin};
use crate::proxy::ending::Ending;
use crate::proxy::{self, Forwarded, Prepared};
use crate::scaling::fault::{Fault, Repeat, Way};
use crate::scaling::{KEPT, Scaling};
use crate::serve::caller::Caller;

/// Reason why a function is not called directly if the provider cannot confirm it.
const UNKNOWN: &str = "the provider rejects the gateway's credentials";

/// Result of sending a request.
type Sent = Result<Forwarded, client::Error>;

/// Where a request is sent.
#[derive(Clone, Copy)]
pub(super) struct Target<'a> {
    pub(super) origin: &'a Origin,
    pub(super) way: Way,
}

/// The provider as target.
pub(super) fn through(origin: &Origin) -> Target<'_> {
    Target { origin, way: Way::Through }
}

impl Target<'_> {
    /// Returns the sign of unavailability in `result`, if there is one.
    fn fault(&self, sent: &Sent) -> Option<Fault> {
        let ending = match sent {
            Ok(forwarded) => forwarded.ending,
            Err(error) => Ending::of_error(error),
        };
        Fault::of(ending, self.way)
    }
}

impl Invoker {
    /// Forwards a request to a function that is not ready, or that has just given a sign of unavailability. `result`:
    /// result of the first attempt, if the request was sent already.
    ///
    /// # Errors
    /// The function cannot be called, or the last attempt failed. The error is the response to the client.
    pub(super) async fn carefully(
        &self,
        scaling: &Arc<Scaling>,
        caller: &Caller,
        call: &mut Call,
        target: Target<'_>,
        prepared: &mut Prepared,
        mut sent: Option<Sent>,
    ) -> Result<Forwarded, Error> {
        let mut passage = scaling.passage(call.function());
        // Without a reservation the body is streamed and cannot be sent again, which is rarely necessary.
        let room = scaling.room_for(prepared.body_length());
        if room.is_some() {
            prepared.keep(KEPT);
        }
        if sent.is_none() {
            // Confirming counts the invocation as in flight, so the autoscaler does not scale its function to zero.
            let ready = passage.ready(|| call.vouched_for(&self.calls));
            self.wait(caller, prepared, ready).await?;
            // The provider has not confirmed the name, which could lead to any host.
            if target.way == Way::Direct && call.is_stranger() {
                return Err(Error::NotReady(call.function().clone(), UNKNOWN.to_owned()));
            }
        }
        let mut began = call.began;
        loop {
            let mut outcome = match sent.take() {
                Some(outcome) => outcome,
                None => {
                    began = Instant::now();
                    let errand = self.errand(caller, began);
                    proxy::send(&self.client, target.origin, prepared, errand).await
                }
            };
            let Some(fault) = target.fault(&outcome) else { return Ok(outcome?) };
            // A request that has reached its maximum number of attempts cannot be recovered either.
            let repeat = match &outcome {
                Ok(forwarded) if !Prepared::can_take_back(&forwarded.answer) => Repeat::Never,
                Ok(_) | Err(_) if prepared.is_idempotent() => Repeat::Always,
                Ok(_) | Err(_) => Repeat::Unseen,
            };
            let again = passage.again(fault, repeat, began);
            if !self.wait(caller, prepared, again).await? {
                return Ok(outcome?);
            }
            if let Ok(forwarded) = &mut outcome
                && !prepared.take_back(&mut forwarded.answer)
            {
                return Ok(outcome?);
            }
        }
    }

    /// Waits for the activator. Meanwhile the deadlines of the exchange are suspended, and the request body is read
    /// into its buffer: otherwise a disconnect of the client would not be noticed.
    async fn wait<T>(
        &self,
        caller: &Caller,
        prepared: &mut Prepared,
        ready: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let watch = &caller.watch;
        watch.call_goes_on();
        let has_body = watch.body_outstanding();
        if has_body {
            watch.body_goes_on();
        }
        let mut ready = std::pin::pin!(ready);
        let waited = std::future::poll_fn(|cx| {
            if let Poll::Ready(waited) = ready.as_mut().poll(cx) {
                return Poll::Ready(waited);
            }
            match prepared.poll_ahead(cx) {
                Poll::Ready(Err(error)) => Poll::Ready(Err(Error::Body(error))),
                Poll::Ready(Ok(())) | Poll::Pending => Poll::Pending,
            }
        })
        .await;
        let now = Instant::now();
        watch.call_until(now + self.timeouts.upstream);
        if has_body && watch.body_outstanding() {
            watch.body_until(now + self.timeouts.read);
        }
        waited
    }
}
