//! W3C Trace Context. No I/O.

use std::fmt::Write;

use http::{HeaderMap, HeaderName, HeaderValue};
use uuid::Uuid;

pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
pub const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// Trace id, parent span id and sampling decision of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    pub trace: u128,
    /// Id of the parent span; 0 if there is none.
    pub span: u64,
    pub sampled: bool,
}

impl Context {
    /// Reads the context from `headers`; `None` if there is none, or it is invalid.
    pub fn extract(headers: &HeaderMap) -> Option<Self> {
        let mut values = headers.get_all(&TRACEPARENT).iter();
        let text = values.next()?.to_str().ok()?;
        // With two headers it is unknown which one is right.
        if values.next().is_some() {
            return None;
        }
        Self::parse(text)
    }

    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.trim().split('-');
        let (version, trace, span, flags) =
            (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let version = hex(version, 2)?;
        // Version 0 has exactly four parts; later versions may have more; 255 is invalid.
        if version == 0xff || (version == 0 && parts.next().is_some()) {
            return None;
        }
        let (trace, span) = (hex(trace, 32)?, u64::try_from(hex(span, 16)?).ok()?);
        let sampled = hex(flags, 2)? & 1 == 1;
        (trace != 0 && span != 0).then_some(Self { trace, span, sampled })
    }

    /// Starts a new trace, which is sampled with the probability `sampling`, from 0 to 1.
    pub fn new_root(sampling: f64) -> Self {
        Self::from_call_id(Uuid::new_v4(), sampling)
    }

    /// Starts the trace with the id of a call.
    pub fn from_call_id(id: Uuid, sampling: f64) -> Self {
        /// Number of low bits of a UUID that are random.
        const RANDOM_BITS: u32 = 56;
        let trace = id.as_u128().max(1);
        let random = trace & ((1 << RANDOM_BITS) - 1);
        Self { trace, span: 0, sampled: (random as f64) < sampling * (1_u64 << RANDOM_BITS) as f64 }
    }

    /// Returns the context for children of `span`.
    #[must_use]
    pub fn child(self, span: u64) -> Self {
        Self { span, ..self }
    }

    /// Writes the context to `headers`. `continued`: the request had a context; otherwise its `tracestate` is removed.
    pub fn inject(self, headers: &mut HeaderMap, continued: bool) {
        let mut text = String::with_capacity(55);
        let flags = u8::from(self.sampled);
        // Writing to a string does not fail.
        let _ = write!(text, "00-{:032x}-{:016x}-{flags:02x}", self.trace, self.span);
        if let Ok(value) = HeaderValue::try_from(text) {
            headers.insert(TRACEPARENT, value);
        }
        if !continued {
            headers.remove(TRACESTATE);
        }
    }
}

/// Returns a random span id, not 0.
pub fn new_span_id() -> u64 {
    let (high, low) = Uuid::new_v4().as_u64_pair();
    // The fixed bits of each half are combined with random bits of the other.
    (high ^ low.rotate_left(32)).max(1)
}

/// Parses exactly `digits` hexadecimal digits in lower case.
fn hex(text: &str, digits: usize) -> Option<u128> {
    let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if text.len() != digits || !text.bytes().all(is_digit) {
        return None;
    }
    u128::from_str_radix(text, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn an_injected_context_can_be_extracted() {
        let mut headers = HeaderMap::new();
        let context = Context::new_root(1.0).child(new_span_id());
        context.inject(&mut headers, false);
        assert_eq!(Context::extract(&headers), Some(context));
        let context = Context::parse(GOOD).unwrap();
        assert_eq!((context.span, context.sampled), (0x00f0_67aa_0ba9_02b7, true));
        context.inject(&mut headers, true);
        assert_eq!(headers[TRACEPARENT], GOOD);
    }

    #[test]
    fn traces_are_sampled_by_ratio() {
        let sampled = |sampling| (0..1000).filter(|_| Context::new_root(sampling).sampled).count();
        assert_eq!((sampled(0.0), sampled(1.0)), (0, 1000));
        assert!((100..900).contains(&sampled(0.5)));
    }

    #[test]
    fn an_invalid_context_is_ignored() {
        for text in [
            "",
            "00",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-01",
            "00-+bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        ] {
            assert_eq!(Context::parse(text), None, "{text}");
        }
        assert!(Context::parse(&GOOD.replacen("00", "01", 1).replace("-01", "-01-more")).is_some());
        let value = HeaderValue::from_static(GOOD);
        let twice = HeaderMap::from_iter([(TRACEPARENT, value.clone()), (TRACEPARENT, value)]);
        assert_eq!(Context::extract(&twice), None);
    }

    #[test]
    fn a_tracestate_without_a_trace_is_not_forwarded() {
        let mut headers = HeaderMap::new();
        headers.insert(TRACESTATE, HeaderValue::from_static("a=b"));
        Context::new_root(0.0).child(1).inject(&mut headers, true);
        assert!(headers.contains_key(TRACESTATE));
        Context::new_root(0.0).child(1).inject(&mut headers, false);
        assert!(!headers.contains_key(TRACESTATE));
    }
}
