//! Requests that change functions. They are passed on as they are; but what was known of the replicas of a function that
//! is deployed, updated, deleted or scaled says nothing any more, and the next call must not rely on it.

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

/// So much of a body is listened to: far more than a deployment needs.
const MOST_HEARD: usize = 64 << 10;

/// Passes on a request that deploys, updates or deletes the function that its body names.
pub async fn change(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Response {
    let heard = Arc::default();
    let _changed = Changed { known: &api.metrics.known, what: What::Heard(Arc::clone(&heard)) };
    let request = request.map(|inner| Body::new(Overheard { inner, heard }));
    api.send(&caller, &api.provider.origin, request).await.map(stream).into_response()
}

/// Tells of a change when it is dropped, which is when the provider has answered, or nobody waits for that any more.
pub(super) struct Changed<'a> {
    known: &'a Known,
    what: What,
}

enum What {
    Named(String),
    /// What has been heard of a body, which names it.
    Heard(Arc<Mutex<Heard>>),
}

/// The beginning of a body.
#[derive(Default)]
struct Heard {
    bytes: Vec<u8>,
    is_cut: bool,
}

/// The name of a function, in what deploys or deletes it.
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
            What::Heard(heard) => {
                let heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
                match serde_json::from_slice::<Named>(&heard.bytes) {
                    Ok(named) => self.known.changed(Some(&named.service)),
                    // It may be any of them.
                    Err(_) if heard.is_cut => self.known.changed(None),
                    // No provider understands it either.
                    Err(_) => {}
                }
            }
        }
    }
}

/// A body that is listened to as it passes.
struct Overheard {
    inner: Body,
    heard: Arc<Mutex<Heard>>,
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
            self.heard.lock().unwrap_or_else(PoisonError::into_inner).hear(data);
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
        self.is_cut |= data.len() > room;
        self.bytes.extend_from_slice(&data[..data.len().min(room)]);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::time::Instant;

    use super::*;
    use crate::function::Function;

    /// Whether a function `echo` counts as changed after a request with `body`, and one `other`.
    fn changes(body: &[u8]) -> (bool, bool) {
        let known = Known::default();
        let functions = ["echo", "other"].map(|name| Function::parse(name, "fn").unwrap());
        let listed: HashMap<_, _> = functions.iter().map(|f| (f.clone(), true)).collect();
        known.listed(&listed, Instant::now());
        let warm = functions.map(|function| known.warm(&function));
        let heard = Arc::<Mutex<Heard>>::default();
        body.chunks(1000).for_each(|piece| heard.lock().unwrap().hear(piece));
        drop(Changed { known: &known, what: What::Heard(heard) });
        (!warm[0].is_warm(), !warm[1].is_warm())
    }

    #[test]
    fn the_body_says_which_function_is_changed() {
        assert_eq!(changes(br#"{"service":"echo","namespace":"dev","image":"i"}"#), (true, false));
        assert_eq!(changes(br#"{"functionName":"other"}"#), (false, true));
        assert_eq!(changes(b"{}"), (false, false));
        assert_eq!(changes(b"nonsense"), (false, false));
    }

    #[test]
    fn a_body_that_is_too_long_to_be_heard_may_change_any() {
        let long = format!(r#"{{"image":"{}","service":"echo"}}"#, "x".repeat(MOST_HEARD));
        assert_eq!(changes(long.as_bytes()), (true, true));
    }
}
