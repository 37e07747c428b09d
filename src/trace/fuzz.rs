//! Fuzz target: trace contexts.

use http::{HeaderMap, HeaderValue};

use crate::trace::context::{Context, TRACEPARENT};

/// A context that is extracted and injected again stays the same.
pub(crate) fn trace_context(data: &[u8]) {
    let Ok(value) = HeaderValue::from_bytes(data) else { return };
    let mut headers = HeaderMap::from_iter([(TRACEPARENT, value)]);
    let Some(context) = Context::of(&headers) else { return };
    context.put_on(&mut headers, true);
    assert_eq!(Context::of(&headers), Some(context), "{data:?}");
}
