//! Requests that change functions. They are proxied unchanged. Readiness recorded before a function is deployed,
//! updated, deleted or scaled is outdated afterwards, and the next call must not rely on it.

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use axum::body::Body;
use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use serde::Deserialize;

use crate::state::ApiState;
use crate::system::stream_response;
use gateway_base::sync::lock_unpoisoned;
use gateway_http::server::client_connection::ClientConnection;
use gateway_proxy::functions::registry::FunctionRegistry;

/// Maximum bytes of a body that are captured: far more than a deployment needs.
const MAX_CAPTURED_BYTES: usize = 64 << 10;

/// Proxies a request that deploys, updates or deletes the function named in its body.
pub async fn change(
    State(api): State<Arc<ApiState>>,
    Extension(connection): Extension<ClientConnection>,
    request: Request,
) -> Response {
    let captured = Arc::default();
    let _changed = InvalidateOnDrop {
        registry: &api.metrics.function_registry,
        function: ChangedFunction::InBody(Arc::clone(&captured)),
    };
    let request = request.map(|inner| Body::new(CapturingBody { inner, captured }));
    api.send(&connection, &api.provider.origin, request).await.map(stream_response).into_response()
}

/// Invalidates the readiness of a function when dropped: when the provider has responded, or the request was cancelled.
pub(super) struct InvalidateOnDrop<'a> {
    registry: &'a FunctionRegistry,
    function: ChangedFunction,
}

enum ChangedFunction {
    Named(String),
    /// The function is named in this body. Rank 2: the registry of functions is locked under it, when all is captured.
    InBody(Arc<Mutex<CapturedBody>>),
}

/// The first bytes of a body.
#[derive(Default)]
struct CapturedBody {
    bytes: Vec<u8>,
    truncated: bool,
}

/// The field of a request body that names the function.
#[derive(Deserialize)]
struct FunctionReference {
    #[serde(alias = "functionName")]
    service: String,
}

impl<'a> InvalidateOnDrop<'a> {
    pub(super) fn named(api: &'a ApiState, name: String) -> Self {
        Self { registry: &api.metrics.function_registry, function: ChangedFunction::Named(name) }
    }
}

impl Drop for InvalidateOnDrop<'_> {
    fn drop(&mut self) {
        match &self.function {
            ChangedFunction::Named(name) => self.registry.invalidate(Some(name)),
            ChangedFunction::InBody(captured) => {
                let captured = lock_unpoisoned(captured);
                match serde_json::from_slice::<FunctionReference>(&captured.bytes) {
                    Ok(named) => self.registry.invalidate(Some(&named.service)),
                    // The truncated body may name any function.
                    Err(_) if captured.truncated => self.registry.invalidate(None),
                    // The provider cannot parse the body either.
                    Err(_) => {}
                }
            }
        }
    }
}

/// A body whose first bytes are captured while it is forwarded.
struct CapturingBody {
    inner: Body,
    /// The same as in [`ChangedFunction::InBody`].
    captured: Arc<Mutex<CapturedBody>>,
}

impl http_body::Body for CapturingBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.inner).poll_frame(cx);
        if let Poll::Ready(Some(Ok(frame))) = &polled
            && let Some(data) = frame.data_ref()
        {
            lock_unpoisoned(&self.captured).capture(data);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl CapturedBody {
    fn capture(&mut self, data: &[u8]) {
        let free = MAX_CAPTURED_BYTES - self.bytes.len();
        self.truncated |= data.len() > free;
        self.bytes.extend_from_slice(&data[..data.len().min(free)]);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Instant;

    use super::*;
    use gateway_base::function::Function;
    use gateway_provider::types::FunctionSummary;

    /// Returns whether `echo` and `other` are invalidated by a request with `body`.
    fn changes(body: &[u8]) -> (bool, bool) {
        let registry = FunctionRegistry::default();
        let functions = ["echo", "other"].map(|name| Function::parse(name, "fn").unwrap());
        let summary = FunctionSummary { available_replicas: 1, ..FunctionSummary::default() };
        let listed: BTreeMap<_, _> = functions.iter().map(|f| (f.clone(), &summary)).collect();
        registry.apply_listing(&listed, Instant::now());
        let handles = functions.map(|function| registry.handle(&function));
        let captured = Arc::<Mutex<CapturedBody>>::default();
        body.chunks(1000).for_each(|piece| captured.lock().unwrap().capture(piece));
        drop(InvalidateOnDrop { registry: &registry, function: ChangedFunction::InBody(captured) });
        (!handles[0].is_ready(), !handles[1].is_ready())
    }

    #[test]
    fn the_function_named_in_the_body_is_invalidated() {
        assert_eq!(changes(br#"{"service":"echo","namespace":"dev","image":"i"}"#), (true, false));
        assert_eq!(changes(br#"{"functionName":"other"}"#), (false, true));
        assert_eq!(changes(b"{}"), (false, false));
        assert_eq!(changes(b"nonsense"), (false, false));
    }

    #[test]
    fn a_truncated_body_invalidates_all_functions() {
        let long = format!(r#"{{"image":"{}","service":"echo"}}"#, "x".repeat(MAX_CAPTURED_BYTES));
        assert_eq!(changes(long.as_bytes()), (true, true));
    }
}
