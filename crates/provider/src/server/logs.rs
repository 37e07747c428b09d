//! `/system/logs`: streams log lines as NDJSON.

use axum::body::Body;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::StreamExt;
use jiff::Timestamp;
use serde::Deserialize;

use crate::backend::{Backend, LogQuery};
use crate::error::ApiError;
use crate::server::requests::{Query, parse_function};
use crate::types::LogLine;
use gateway_base::duration;

/// The unparsed query parameters.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct RawLogQuery {
    name: String,
    namespace: String,
    tail: String,
    since: String,
    follow: String,
    instance: String,
}

pub(super) async fn read<B: Backend>(
    State(backend): State<B>,
    Query(query): Query<RawLogQuery>,
) -> Result<Response, ApiError> {
    if query.name.is_empty() {
        return Err(ApiError::Invalid("name is missing".to_owned()));
    }
    let function = parse_function(&query.name, &query.namespace, backend.default_namespace())?;
    let query = query.parse(Timestamp::now()).map_err(ApiError::Invalid)?;
    let lines = backend.logs(&function, query).await?;
    let body =
        Body::from_stream(lines.map(|line| Ok::<_, std::convert::Infallible>(ndjson(&line))));
    Ok(([(CONTENT_TYPE, "application/x-ndjson")], body).into_response())
}

fn ndjson(line: &LogLine) -> Bytes {
    let mut bytes = BytesMut::new().writer();
    // Cannot fail: all fields are strings.
    let _ = serde_json::to_writer(&mut bytes, line);
    let mut bytes = bytes.into_inner();
    bytes.put_u8(b'\n');
    bytes.freeze()
}

impl RawLogQuery {
    /// Parses the parameters relative to the time `now`.
    ///
    /// # Errors
    /// Description of the first invalid parameter.
    fn parse(self, now: Timestamp) -> Result<LogQuery, String> {
        let wrong = |name: &str, value: &str, expected: &str| {
            format!("{name}: {value:?} is not {expected}")
        };
        let tail = match self.tail.trim() {
            "" => None,
            text => {
                let tail: i64 = text.parse().map_err(|_| wrong("tail", text, "a whole number"))?;
                // A negative number, the default of clients, means all lines.
                usize::try_from(tail).ok()
            }
        };
        let since = match self.since.trim() {
            "" => None,
            text => {
                let expected = "a time (RFC 3339), or a duration back from now such as 10m";
                Some(parse_since(text, now).ok_or_else(|| wrong("since", text, expected))?)
            }
        };
        let follow = match self.follow.trim().to_ascii_lowercase().as_str() {
            "" | "0" | "f" | "false" => false,
            "1" | "t" | "true" => true,
            text => return Err(wrong("follow", text, "true or false")),
        };
        let instance = Some(self.instance).filter(|instance| !instance.is_empty());
        Ok(LogQuery { tail, since, instance, follow })
    }
}

fn parse_since(text: &str, now: Timestamp) -> Option<Timestamp> {
    match duration::parse(text) {
        Some(ago) => now.checked_sub(ago).ok(),
        None => text.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn parse(since: &str, tail: &str, follow: &str) -> Result<LogQuery, String> {
        let text = |text: &str| text.to_owned();
        let raw = RawLogQuery {
            since: text(since),
            tail: text(tail),
            follow: text(follow),
            ..Default::default()
        };
        raw.parse(at(1_700_000_000))
    }

    #[test]
    fn parameters_are_parsed_in_the_formats_of_clients() {
        assert_eq!(parse("", "", "").unwrap(), LogQuery::default());
        assert_eq!(parse("", "-1", "0").unwrap(), LogQuery::default());
        assert_eq!(parse("", "0", "").unwrap().tail, Some(0));
        assert!(parse("", "", "true").unwrap().follow && parse("", "", "1").unwrap().follow);
        assert_eq!(parse("100s", "", "").unwrap().since, Some(at(1_699_999_900)));
        assert_eq!(parse("2023-11-14T22:13:20Z", "", "").unwrap().since, Some(at(1_700_000_000)));
        assert_eq!(
            parse("2023-11-14T23:13:20+01:00", "", "").unwrap().since,
            Some(at(1_700_000_000))
        );
        for (since, tail, follow) in [("noon", "", ""), ("", "many", ""), ("", "", "maybe")] {
            assert!(parse(since, tail, follow).unwrap_err().contains("is not"));
        }
    }
}
