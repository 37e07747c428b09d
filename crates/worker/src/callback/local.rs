//! Callbacks to functions of the gateway itself, such as `http://gateway:8080/function/next`. They are executed
//! without a connection, with the rights of a client without credentials.
//!
//! A connection would come from this machine, which may have more rights than the client that chose the URL.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode};

use crate::callback::target::CallbackTarget;
use crate::function_client::FunctionClient;
use crate::retry_policies::RetryPolicies;
use gateway_base::function::{Function, has_dot_segment};
use gateway_http::call_id::RequestIds;
use gateway_http::limit::{ConcurrencyLimit, PermitCache};
use gateway_provider::Provider;
use gateway_proxy::error::Error;
use gateway_proxy::functions::exists::check_function_exists;
use gateway_proxy::functions::registry::FunctionRegistry;
use gateway_proxy::routing::{Destination, RouteMatch};
use gateway_queue::call::{CallOptions, QueuedCall};
use gateway_queue::ingress::{QueueIngress, function_headers};
use gateway_queue::{JobQueue as _, now};

/// Executes such callbacks.
pub struct LocalExecutor {
    pub function_client: Arc<FunctionClient>,
    pub retry_policies: Arc<RetryPolicies>,
    pub ingress: Arc<QueueIngress>,
    /// Confirms that the function of a call to enqueue exists.
    pub provider: Provider,
    pub registry: Arc<FunctionRegistry>,
    pub default_namespace: Arc<str>,
    /// The gateway's limit on invocations in flight, if the gateway is in this process.
    pub limit: Option<(Arc<ConcurrencyLimit>, Arc<PermitCache>)>,
}

/// A callback to the gateway itself, parsed.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct LocalCall<'a> {
    /// The call is enqueued instead of executed immediately.
    queued: bool,
    /// Name of the function, and possibly its namespace.
    name: &'a str,
    /// The path and query after the name.
    target: &'a str,
}

impl<'a> LocalCall<'a> {
    /// Parses `target`; `None` if its path is not that of an invocation.
    pub(super) fn parse(target: &'a CallbackTarget) -> Option<Self> {
        let whole = target.uri.path_and_query()?.as_str();
        if target.origin.url.tls || has_dot_segment(target.uri.path()) {
            return None;
        }
        let route = RouteMatch::of(whole);
        let queued = match route.destination {
            Destination::Function => false,
            Destination::Queue => true,
            Destination::Api => return None,
        };
        Some(Self { queued, name: route.name(whole), target: route.rest(whole) })
    }
}

impl LocalExecutor {
    /// Executes a callback with `headers` and `body`. Returns the status that a client would receive.
    ///
    /// `id` keeps the id of the enqueued call between attempts, so that it is enqueued once.
    pub(super) async fn execute(
        &self,
        local_call: &LocalCall<'_>,
        headers: &HeaderMap,
        body: Bytes,
        id: &mut Option<String>,
    ) -> StatusCode {
        let LocalCall { queued, name, target } = *local_call;
        let Some(function) = Function::parse(name, &self.default_namespace) else {
            return StatusCode::NOT_FOUND;
        };
        let call = |id: HeaderValue| {
            let ids = RequestIds { call_id: id, ..RequestIds::from_headers(headers) };
            let peer = HeaderValue::from_static("127.0.0.1");
            QueuedCall {
                id: ids.call_id.to_str().unwrap_or_default().to_owned(),
                headers: function_headers(headers, &peer, &ids),
                function: function.clone(),
                target: target.to_owned(),
                body,
                options: CallOptions { submitted_at: now(), ..CallOptions::default() },
            }
        };
        if queued {
            // Not the id of the call that this callback reports, which has not finished yet.
            let id = id.get_or_insert_with(|| self.ingress.queue.new_call_id(&function));
            let Ok(id) = HeaderValue::try_from(id.as_str()) else { return StatusCode::BAD_REQUEST };
            let queued = self.enqueue(call(id)).await;
            queued.map_or_else(|error| error.status(), |()| StatusCode::ACCEPTED)
        } else {
            self.call_function(call(RequestIds::from_headers(headers).call_id)).await
        }
    }

    async fn call_function(&self, call: QueuedCall) -> StatusCode {
        let permit = self.limit.as_ref().map(|(limit, cache)| limit.try_acquire(cache));
        if matches!(permit, Some(None)) {
            return Error::Overloaded.status();
        }
        let attempt = self.function_client.execute(&call, 0, None, &self.retry_policies).await;
        drop(permit);
        // The function was unreachable.
        let status = attempt.status.and_then(|status| StatusCode::from_u16(status).ok());
        status.unwrap_or(StatusCode::SERVICE_UNAVAILABLE)
    }

    async fn enqueue(&self, mut call: QueuedCall) -> Result<(), Error> {
        let limit = self.ingress.body_limit();
        if call.body.len() > limit {
            return Err(Error::TooLarge(limit));
        }
        check_function_exists(
            &self.registry,
            &self.provider,
            &self.ingress,
            &call.function,
            &call.id,
        )
        .await?;
        call.options.digest = Some(call.digest());
        let started = Instant::now();
        if !self.ingress.queue.publish(call, None).await?.duplicate {
            self.ingress.metrics.submitted(started.elapsed());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_paths_of_invocations_are_local_calls() {
        let local_call = |url: &str| {
            let target = CallbackTarget::parse(url).unwrap();
            let local_call = LocalCall::parse(&target)?;
            let function = Function::parse(local_call.name, "fn");
            let named = function.map(|function| format!("{function} {}", local_call.target));
            Some((local_call.queued, named.unwrap_or_default()))
        };
        let some = |queued, named: &str| Some((queued, named.to_owned()));
        assert_eq!(local_call("http://g/function/a"), some(false, "a.fn "));
        assert_eq!(
            local_call("http://g/function/a.b/c%2Fd//?e=/f"),
            some(false, "a.b /c%2Fd//?e=/f")
        );
        assert_eq!(local_call("http://g/async-function/a?b"), some(true, "a.fn ?b"));
        assert_eq!(local_call("http://g/function/"), some(false, ""));
        assert_eq!(local_call("http://g/function/a%2F"), some(false, ""));
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
            assert_eq!(local_call(url), None, "{url}");
        }
    }
}
