//! A call of a function that may not be ready: it waits until it is, and is made again if it met nobody.

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

/// Why a call is not made where the provider would have to vouch for its function.
const UNKNOWN: &str = "the provider refuses the credentials of this gateway";

/// What came of sending a call.
type Sent = Result<Forwarded, client::Error>;

/// Where a call goes.
#[derive(Clone, Copy)]
pub(super) struct Target<'a> {
    pub(super) origin: &'a Origin,
    pub(super) way: Way,
}

/// The way through the provider.
pub(super) fn through(origin: &Origin) -> Target<'_> {
    Target { origin, way: Way::Through }
}

impl Target<'_> {
    /// A sign that the function could not be called.
    fn fault(&self, sent: &Sent) -> Option<Fault> {
        let ending = match sent {
            Ok(forwarded) => forwarded.ending,
            Err(error) => Ending::of_error(error),
        };
        Fault::of(ending, self.way)
    }
}

impl Invoker {
    /// Makes a call of a function that is not known to be ready, or has just shown that it is not: `sent` is what came
    /// of the call so far.
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
        // While there is no room, a body is passed on as it comes: it cannot be sent twice, which it rarely has to.
        let room = scaling.room_for(prepared.body_length());
        if room.is_some() {
            prepared.keep(KEPT);
        }
        if sent.is_none() {
            // From then on it is in flight, and its function not put to sleep for want of calls.
            let ready = passage.ready(|| call.vouched_for(&self.calls));
            self.wait(caller, prepared, ready).await?;
            // The provider has not answered for the name: it could lead to any host.
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
            // A request that has been sent as often as it may be cannot be taken back either.
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

    /// Waits for the function. Meanwhile no deadline of the call runs, and what comes of its body is taken in: else
    /// nobody would notice that its caller has left.
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
