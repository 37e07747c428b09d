//! What is told of a piece of work, and how OTLP writes it as JSON. No I/O.

use std::borrow::Cow;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

/// The part that a span plays, by OTLP's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Server = 2,
    Client = 3,
    Producer = 4,
    Consumer = 5,
}

/// A piece of work that has ended.
#[derive(Clone, Debug)]
pub struct Span {
    pub trace: u128,
    pub id: u64,
    /// 0: none.
    pub parent: u64,
    pub kind: Kind,
    /// One of few: what differs from one to the next is told by attributes.
    pub name: Cow<'static, str>,
    pub began: SystemTime,
    pub took: Duration,
    pub attributes: Vec<(&'static str, Attribute)>,
    /// Why it failed, if it did.
    pub failure: Option<String>,
}

/// What an attribute says.
#[derive(Clone, Debug)]
pub enum Attribute {
    Text(String),
    Number(i64),
}

/// The longest text that is told: callers choose much of it.
const LONGEST: usize = 256;

impl From<&str> for Attribute {
    fn from(text: &str) -> Self {
        Self::Text(cut(text, LONGEST).to_owned())
    }
}

/// The start of `text`, at most `most` bytes.
pub fn cut(text: &str, most: usize) -> &str {
    &text[..text.floor_char_boundary(most)]
}

impl From<i64> for Attribute {
    fn from(number: i64) -> Self {
        Self::Number(number)
    }
}

impl From<u16> for Attribute {
    fn from(number: u16) -> Self {
        Self::Number(number.into())
    }
}

impl From<u32> for Attribute {
    fn from(number: u32) -> Self {
        Self::Number(number.into())
    }
}

/// The body of a request to `/v1/traces` that tells of `spans`, all of them of `service`.
pub fn export(service: &str, spans: &[Span]) -> Vec<u8> {
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

fn attribute(key: &str, value: &Attribute) -> Value {
    let value = match value {
        Attribute::Text(text) => json!({"stringValue": text}),
        // JSON has no whole numbers of 64 bits, so they go as text.
        Attribute::Number(number) => json!({"intValue": number.to_string()}),
    };
    json!({"key": key, "value": value})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_callers_choose_is_cut() {
        let Attribute::Text(text) = "ä".repeat(1000).as_str().into() else { panic!("no text") };
        assert_eq!(text, "ä".repeat(128));
        assert_eq!(cut("short", 256), "short");
    }

    #[test]
    fn a_span_is_written_as_otlp_wants_it() {
        let span = Span {
            trace: 0xab,
            id: 0xc,
            parent: 0,
            kind: Kind::Server,
            name: "GET /function/{name}".into(),
            began: UNIX_EPOCH + Duration::from_nanos(1_000_000_000_000_000_001),
            took: Duration::from_nanos(2),
            attributes: vec![("http.response.status_code", 502_u16.into()), ("a", "b".into())],
            failure: Some("502".to_owned()),
        };
        let child = Span { parent: 0xc, failure: None, ..span.clone() };
        let written: Value = serde_json::from_slice(&export("gateway", &[span, child])).unwrap();
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
