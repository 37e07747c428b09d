//! Callbacks to functions of the gateway itself, `http://gateway:8080/function/next`: executed as calls of a client
//! without credentials, and without a connection.
//!
//! A connection would come from this machine, from which more may be allowed than to the client that chose the URL.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode};

use crate::call_id::RequestIds;
use crate::error::Error;
use crate::function::{Function, has_dot_segment};
use crate::limit::{ConcurrencyLimit, PermitCache};
use crate::metrics::registry::FunctionRegistry;
use crate::provider::Provider;
use crate::queue::call::{CallOptions, QueuedCall};
use crate::queue::now;
use crate::queued::{Intake, must_exist, passed_on};
use crate::worker::attempt::Caller;
use crate::worker::callback::target::Target;
use crate::worker::policies::Policies;

/// What executes such callbacks.
pub struct Local {
    pub caller: Arc<Caller>,
    pub policies: Arc<Policies>,
    pub intake: Arc<Intake>,
    /// Says whether the function of a call to be queued exists.
    pub provider: Provider,
    pub known: Arc<FunctionRegistry>,
    pub default_namespace: Arc<str>,
    /// The gateway's limit on calls in flight, where it is in this process.
    pub limit: Option<(Arc<ConcurrencyLimit>, Arc<PermitCache>)>,
}

/// What a callback wants of its own gateway.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Wish<'a> {
    /// The call is queued, and not executed at once.
    queued: bool,
    /// What stands behind `/function/` or `/async-function/`.
    rest: &'a str,
}

impl<'a> Wish<'a> {
    /// `None` when `target` is not the path of a call.
    pub(super) fn of(target: &'a Target) -> Option<Self> {
        let whole = target.uri.path_and_query()?.as_str();
        if target.origin.url.tls || has_dot_segment(target.uri.path()) {
            return None;
        }
        let called = whole.strip_prefix("/function/").map(|rest| Self { queued: false, rest });
        let queued = || whole.strip_prefix("/async-function/");
        called.or_else(|| queued().map(|rest| Self { queued: true, rest }))
    }

    fn function(&self, default_namespace: &str) -> Option<(Function, &'a str)> {
        let (name, target) =
            self.rest.split_at(self.rest.find(['/', '?']).unwrap_or(self.rest.len()));
        Some((Function::parse(name, default_namespace)?, target))
    }
}

impl Local {
    /// Executes a callback with `headers` and `body`. The status that its client would get.
    ///
    /// `id` is the id of the call that is queued: the same one for each attempt, so that it is queued once.
    pub(super) async fn execute(
        &self,
        wish: &Wish<'_>,
        headers: &HeaderMap,
        body: Bytes,
        id: &mut Option<String>,
    ) -> StatusCode {
        let Some((function, target)) = wish.function(&self.default_namespace) else {
            return StatusCode::NOT_FOUND;
        };
        let call = |id: HeaderValue| {
            let ids = RequestIds { call_id: id, ..RequestIds::from_headers(headers) };
            let peer = HeaderValue::from_static("127.0.0.1");
            QueuedCall {
                id: ids.call_id.to_str().unwrap_or_default().to_owned(),
                headers: passed_on(headers, &peer, &ids),
                function: function.clone(),
                target: target.to_owned(),
                body,
                options: CallOptions { submitted_at: now(), ..CallOptions::default() },
            }
        };
        if wish.queued {
            // Not the id of the call that is called back for, which has not ended yet.
            let id = id.get_or_insert_with(|| self.intake.queue.new_call_id(&function));
            let Ok(id) = HeaderValue::try_from(id.as_str()) else { return StatusCode::BAD_REQUEST };
            let queued = self.queue(call(id)).await;
            queued.map_or_else(|error| error.status(), |()| StatusCode::ACCEPTED)
        } else {
            self.call(call(RequestIds::from_headers(headers).call_id)).await
        }
    }

    async fn call(&self, call: QueuedCall) -> StatusCode {
        let permit = self.limit.as_ref().map(|(limit, share)| limit.try_acquire(share));
        if matches!(permit, Some(None)) {
            return Error::Overloaded.status();
        }
        let attempt = self.caller.make(&call, 0, None, &self.policies).await;
        drop(permit);
        // Out of reach.
        let status = attempt.status.and_then(|status| StatusCode::from_u16(status).ok());
        status.unwrap_or(StatusCode::SERVICE_UNAVAILABLE)
    }

    async fn queue(&self, mut call: QueuedCall) -> Result<(), Error> {
        let limit = self.intake.limit();
        if call.body.len() > limit {
            return Err(Error::TooLarge(limit));
        }
        must_exist(&self.known, &self.provider, &self.intake, &call.function, &call.id).await?;
        call.options.digest = Some(call.digest());
        let began = Instant::now();
        if !self.intake.queue.publish(call).await?.duplicate {
            self.intake.metrics.submitted(began.elapsed());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_paths_of_calls_are_wishes() {
        let wish = |url: &str| {
            let target = Target::parse(url).unwrap();
            let wish = Wish::of(&target)?;
            let named = wish.function("fn").map(|(name, rest)| format!("{name} {rest}"));
            Some((wish.queued, named.unwrap_or_default()))
        };
        let some = |queued, named: &str| Some((queued, named.to_owned()));
        assert_eq!(wish("http://g/function/a"), some(false, "a.fn "));
        assert_eq!(wish("http://g/function/a.b/c%2Fd//?e=/f"), some(false, "a.b /c%2Fd//?e=/f"));
        assert_eq!(wish("http://g/async-function/a?b"), some(true, "a.fn ?b"));
        assert_eq!(wish("http://g/function/"), some(false, ""));
        assert_eq!(wish("http://g/function/a%2F"), some(false, ""));
        for url in [
            "https://g/function/a",
            "http://g/",
            "http://g",
            "http://g/function",
            "http://g//function/a",
            "http://g/FUNCTION/a",
            "http://g/system/functions",
            "http://g/function/../system/functions",
            "http://g/function/a/%2e%2E/b",
            "http://g/function/a/..%2f..%5Cb",
        ] {
            assert_eq!(wish(url), None, "{url}");
        }
    }
}
