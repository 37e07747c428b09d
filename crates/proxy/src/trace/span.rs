//! Ended spans, and their encoding as OTLP JSON. No I/O.

use std::borrow::Cow;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

/// Span kind, with the numbers of OTLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpanKind {
    Server = 2,
    Client = 3,
    Producer = 4,
    Consumer = 5,
}

/// An ended span.
#[derive(Clone, Debug)]
pub struct Span {
    pub trace: u128,
    pub id: u64,
    /// 0 if there is no parent.
    pub parent: u64,
    pub kind: SpanKind,
    /// Low cardinality: variable parts are attributes.
    pub name: Cow<'static, str>,
    pub began: SystemTime,
    pub took: Duration,
    pub attributes: Vec<(&'static str, AttributeValue)>,
    /// Error message, if the operation failed.
    pub failure: Option<String>,
}

/// Value of an attribute.
#[derive(Clone, Debug)]
pub enum AttributeValue {
    Text(String),
    Number(i64),
}

/// Maximum bytes of a text attribute: clients control much of it.
const MAX_TEXT_BYTES: usize = 256;

impl From<&str> for AttributeValue {
    fn from(text: &str) -> Self {
        Self::Text(truncate(text, MAX_TEXT_BYTES).to_owned())
    }
}

/// Returns the first `max` bytes of `text`, or fewer at a character boundary.
pub fn truncate(text: &str, max: usize) -> &str {
    &text[..text.floor_char_boundary(max)]
}

impl From<i64> for AttributeValue {
    fn from(number: i64) -> Self {
        Self::Number(number)
    }
}

impl From<u16> for AttributeValue {
    fn from(number: u16) -> Self {
        Self::Number(number.into())
    }
}

impl From<u32> for AttributeValue {
    fn from(number: u32) -> Self {
        Self::Number(number.into())
    }
}

/// Returns the body of a request to `/v1/traces` with `spans` of `service`.
pub fn export_request(service: &str, spans: &[Span]) -> Vec<u8> {
    let version = env!("CARGO_PKG_VERSION");
    let resource =
        [attribute("service.name", &service.into()), attribute("service.version", &version.into())];
    let scope = json!({"name": "gateway", "version": version});
    let spans: Vec<Value> = spans.iter().map(Span::json).collect();
    let body = json!({"resourceSpans": [{
        "resource": {"attributes": resource},
        "scopeSpans": [{"scope": scope, "spans": spans}],
    }]});
    body.to_string().into_bytes()
}

impl Span {
    fn json(&self) -> Value {
        let began = self.began.duration_since(UNIX_EPOCH).unwrap_or_default();
        let attributes: Vec<Value> =
            self.attributes.iter().map(|(key, value)| attribute(key, value)).collect();
        let mut span = json!({
            "traceId": format!("{:032x}", self.trace),
            "spanId": format!("{:016x}", self.id),
            "name": self.name,
            "kind": self.kind as u8,
            "startTimeUnixNano": began.as_nanos().to_string(),
            "endTimeUnixNano": (began + self.took).as_nanos().to_string(),
            "attributes": attributes,
        });
        if self.parent != 0 {
            span["parentSpanId"] = format!("{:016x}", self.parent).into();
        }
        if let Some(failure) = &self.failure {
            span["status"] = json!({"code": 2, "message": failure});
        }
        span
    }
}

fn attribute(key: &str, value: &AttributeValue) -> Value {
    let value = match value {
        AttributeValue::Text(text) => json!({"stringValue": text}),
        // OTLP JSON encodes 64-bit integers as strings.
        AttributeValue::Number(number) => json!({"intValue": number.to_string()}),
    };
    json!({"key": key, "value": value})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_text_is_truncated() {
        let AttributeValue::Text(text) = "ä".repeat(1000).as_str().into() else {
            panic!("no text")
        };
        assert_eq!(text, "ä".repeat(128));
        assert_eq!(truncate("short", 256), "short");
    }

    #[test]
    fn a_span_is_encoded_as_otlp_json() {
        let span = Span {
            trace: 0xab,
            id: 0xc,
            parent: 0,
            kind: SpanKind::Server,
            name: "GET /function/{name}".into(),
            began: UNIX_EPOCH + Duration::from_nanos(1_000_000_000_000_000_001),
            took: Duration::from_nanos(2),
            attributes: vec![("http.response.status_code", 502_u16.into()), ("a", "b".into())],
            failure: Some("502".to_owned()),
        };
        let child = Span { parent: 0xc, failure: None, ..span.clone() };
        let written: Value =
            serde_json::from_slice(&export_request("gateway", &[span, child])).unwrap();
        let resource = &written["resourceSpans"][0];
        assert_eq!(
            resource["resource"]["attributes"][0],
            json!({"key": "service.name", "value": {"stringValue": "gateway"}})
        );
        let spans = &resource["scopeSpans"][0]["spans"];
        assert_eq!(
            spans[0],
            json!({
                "traceId": "000000000000000000000000000000ab",
                "spanId": "000000000000000c",
                "name": "GET /function/{name}",
                "kind": 2,
                "startTimeUnixNano": "1000000000000000001",
                "endTimeUnixNano": "1000000000000000003",
                "attributes": [
                    {"key": "http.response.status_code", "value": {"intValue": "502"}},
                    {"key": "a", "value": {"stringValue": "b"}},
                ],
                "status": {"code": 2, "message": "502"},
            })
        );
        assert_eq!(spans[1]["parentSpanId"], "000000000000000c");
        assert!(spans[1].get("status").is_none());
    }
}
