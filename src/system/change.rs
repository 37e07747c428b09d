//! Requests that change functions. They are proxied unchanged. Readiness recorded before a function is deployed,
//! updated, deleted or scaled is outdated afterwards, and the next call must not rely on it.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use axum::body::Body;
use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use serde::Deserialize;

use crate::metrics::known::Known;
use crate::serve::caller::Caller;
use crate::system::{Api, stream};

/// Maximum bytes of a body that are captured: far more than a deployment needs.
const MOST_HEARD: usize = 64 << 10;

/// Proxies a request that deploys, updates or deletes the function named in its body.
pub async fn change(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Response {
    let captured = Arc::default();
    let _changed = Changed { known: &api.metrics.known, what: What::Heard(Arc::clone(&captured)) };
    let request = request.map(|inner| Body::new(Overheard { inner, captured }));
    api.send(&caller, &api.provider.origin, request).await.map(stream).into_response()
}

/// Invalidates the readiness of a function when dropped: when the provider has responded, or the request was cancelled.
pub(super) struct Changed<'a> {
    known: &'a Known,
    what: What,
}

enum What {
    Named(String),
    /// The function is named in this body.
    Heard(Arc<Mutex<Heard>>),
}

/// The first bytes of a body.
#[derive(Default)]
struct Heard {
    bytes: Vec<u8>,
    is_cut: bool,
}

/// The field of a request body that names the function.
#[derive(Deserialize)]
struct Named {
    #[serde(alias = "functionName")]
    service: String,
}

impl<'a> Changed<'a> {
    pub(super) fn named(api: &'a Api, name: String) -> Self {
        Self { known: &api.metrics.known, what: What::Named(name) }
    }
}

impl Drop for Changed<'_> {
    fn drop(&mut self) {
        match &self.what {
            What::Named(name) => self.known.changed(Some(name)),
            What::Heard(captured) => {
                let captured = captured.lock().unwrap_or_else(PoisonError::into_inner);
                match serde_json::from_slice::<Named>(&captured.bytes) {
                    Ok(named) => self.known.changed(Some(&named.service)),
                    // The truncated body may name any function.
                    Err(_) if captured.is_cut => self.known.changed(None),
                    // The provider cannot parse the body either.
                    Err(_) => {}
                }
            }
        }
    }
}

/// A body whose first bytes are captured while it is forwarded.
struct Overheard {
    inner: Body,
    captured: Arc<Mutex<Heard>>,
}

impl http_body::Body for Overheard {
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
            self.captured.lock().unwrap_or_else(PoisonError::into_inner).hear(data);
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

impl Heard {
    fn hear(&mut self, data: &[u8]) {
        let room = MOST_HEARD - self.bytes.len();
        self.is_cut |= data.len() > free;
        self.bytes.extend_from_slice(&data[..data.len().min(free)]);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::time::Instant;

    use super::*;
    use crate::function::Function;

    /// Returns whether `echo` and `other` are invalidated by a request with `body`.
    fn changes(body: &[u8]) -> (bool, bool) {
        let known = Known::default();
        let functions = ["echo", "other"].map(|name| Function::parse(name, "fn").unwrap());
        let listed: HashMap<_, _> = functions.iter().map(|f| (f.clone(), true)).collect();
        known.listed(&listed, Instant::now());
        let warm = functions.map(|function| known.warm(&function));
        let captured = Arc::<Mutex<Heard>>::default();
        body.chunks(1000).for_each(|piece| captured.lock().unwrap().hear(piece));
        drop(Changed { known: &known, what: What::Heard(captured) });
        (!warm[0].is_warm(), !warm[1].is_warm())
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
        let long = format!(r#"{{"image":"{}","service":"echo"}}"#, "x".repeat(MOST_HEARD));
        assert_eq!(changes(long.as_bytes()), (true, true));
    }
}
