//! Fuzz target: trace contexts.

use http::{HeaderMap, HeaderValue};

use crate::trace::context::{Context, TRACEPARENT};

/// A context that is extracted and injected again stays the same.
pub(crate) fn trace_context(data: &[u8]) {
    let Ok(value) = HeaderValue::from_bytes(data) else { return };
    let mut headers = HeaderMap::from_iter([(TRACEPARENT, value)]);
    let Some(context) = Context::extract(&headers) else { return };
    context.inject(&mut headers, true);
    assert_eq!(Context::extract(&headers), Some(context), "{data:?}");
}
