//! What the fuzzer checks of trace contexts.

use http::{HeaderMap, HeaderValue};

use crate::trace::context::{Context, TRACEPARENT};

/// A context that is read is written as one that is read in the same way.
pub(crate) fn trace_context(data: &[u8]) {
    let Ok(value) = HeaderValue::from_bytes(data) else { return };
    let mut headers = HeaderMap::from_iter([(TRACEPARENT, value)]);
    let Some(context) = Context::of(&headers) else { return };
    context.put_on(&mut headers, true);
    assert_eq!(Context::of(&headers), Some(context), "{data:?}");
}
