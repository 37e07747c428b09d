//! W3C Trace Context: which trace a request belongs to, and under which span. No I/O.

use std::fmt::Write;

use http::{HeaderMap, HeaderName, HeaderValue};
use uuid::Uuid;

pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
pub const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// Where a span belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    pub trace: u128,
    /// The span that whatever comes next is a child of; 0: none.
    pub span: u64,
    pub sampled: bool,
}

impl Context {
    /// What `headers` say; `None` if that is nothing, or cannot be read.
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        let mut values = headers.get_all(&TRACEPARENT).iter();
        let text = values.next()?.to_str().ok()?;
        // Two of them: neither is to be believed.
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
        // Version 0 has these four parts; later ones may have more, 255 is none.
        if version == 0xff || (version == 0 && parts.next().is_some()) {
            return None;
        }
        let (trace, span) = (hex(trace, 32)?, u64::try_from(hex(span, 16)?).ok()?);
        let sampled = hex(flags, 2)? & 1 == 1;
        (trace != 0 && span != 0).then_some(Self { trace, span, sampled })
    }

    /// A trace that begins here; of all such traces the part `sampling`, from 0 to 1, is to be told.
    pub fn fresh(sampling: f64) -> Self {
        Self::of_id(Uuid::new_v4(), sampling)
    }

    /// The trace that is called `id`.
    pub fn of_id(id: Uuid, sampling: f64) -> Self {
        /// So many of an id's last bits are drawn.
        const DRAWN: u32 = 56;
        let trace = id.as_u128().max(1);
        let drawn = trace & ((1 << DRAWN) - 1);
        Self { trace, span: 0, sampled: (drawn as f64) < sampling * (1_u64 << DRAWN) as f64 }
    }

    /// The same trace, under the span `span`.
    #[must_use]
    pub fn under(self, span: u64) -> Self {
        Self { span, ..self }
    }

    /// Says so in `headers`. A `tracestate` that came without a trace belongs to none.
    pub fn put_on(self, headers: &mut HeaderMap, continued: bool) {
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

/// A fresh span's id.
pub fn span_id() -> u64 {
    let (high, low) = Uuid::new_v4().as_u64_pair();
    // The fixed bits of either half meet drawn ones of the other.
    (high ^ low.rotate_left(32)).max(1)
}

/// `text` as a number, if it has just `digits` digits, all of them small.
fn hex(text: &str, digits: usize) -> Option<u128> {
    let good = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if text.len() != digits || !text.bytes().all(good) {
        return None;
    }
    u128::from_str_radix(text, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn what_is_written_can_be_read() {
        let mut headers = HeaderMap::new();
        let context = Context::fresh(1.0).under(span_id());
        context.put_on(&mut headers, false);
        assert_eq!(Context::of(&headers), Some(context));
        let context = Context::parse(GOOD).unwrap();
        assert_eq!((context.span, context.sampled), (0x00f0_67aa_0ba9_02b7, true));
        context.put_on(&mut headers, true);
        assert_eq!(headers[TRACEPARENT], GOOD);
    }

    #[test]
    fn a_part_of_all_traces_is_told() {
        let sampled = |sampling| (0..1000).filter(|_| Context::fresh(sampling).sampled).count();
        assert_eq!((sampled(0.0), sampled(1.0)), (0, 1000));
        assert!((100..900).contains(&sampled(0.5)));
    }

    #[test]
    fn what_cannot_be_read_is_nothing() {
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
        assert_eq!(Context::of(&twice), None);
    }

    #[test]
    fn a_state_without_a_trace_is_not_passed_on() {
        let mut headers = HeaderMap::new();
        headers.insert(TRACESTATE, HeaderValue::from_static("a=b"));
        Context::fresh(0.0).under(1).put_on(&mut headers, true);
        assert!(headers.contains_key(TRACESTATE));
        Context::fresh(0.0).under(1).put_on(&mut headers, false);
        assert!(!headers.contains_key(TRACESTATE));
    }
}
