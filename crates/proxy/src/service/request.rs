//! Checks of every request before it is routed: framing, method, target and `Host` (RFC 9110 and 9112). What a
//! function, or a proxy in front of it, could read differently is rejected.

use axum::body::Body as RouterBody;
use axum::response::{IntoResponse, Response};
use http::header::{ALLOW, CONNECTION, HOST, MAX_FORWARDS, TRANSFER_ENCODING, UPGRADE};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri, Version};
use hyper::body::Body;

use crate::error::Error;
use crate::service::host::is_host;
use gateway_http::client::codings;

/// The methods of the gateway itself. Functions may define others.
const METHODS: &str = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS";
/// Response to a request that is not routed.
#[derive(Debug)]
pub(super) enum EarlyResponse {
    Error(Error),
    /// OPTIONS for the gateway itself: the allowed methods.
    AllowedMethods,
}

impl From<Error> for EarlyResponse {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

impl IntoResponse for EarlyResponse {
    fn into_response(self) -> Response {
        match self {
            Self::Error(error) => error.into_response(),
            Self::AllowedMethods => {
                (StatusCode::OK, [(ALLOW, METHODS)], RouterBody::empty()).into_response()
            }
        }
    }
}

/// Checks and normalizes `request`. `is_call`: it calls a function.
///
/// # Errors
/// The response, if the request is not to be routed.
pub(super) fn check<B: Body>(request: &mut Request<B>, is_call: bool) -> Result<(), EarlyResponse> {
    let body = request.body();
    // A body without a length has transfer codings. hyper has checked only the last line of them.
    if !body.is_end_stream() && body.size_hint().exact().is_none() {
        codings::is_chunked(request.headers().get_all(TRANSFER_ENCODING))
            .map_err(Error::TransferCoding)?;
    }
    if *request.method() == Method::CONNECT {
        return Err(Error::MethodNotAllowed(METHODS).into());
    }
    if request.version() < Version::HTTP_11 {
        // RFC 9110, 7.8.
        request.headers_mut().remove(UPGRADE);
    }
    if !has_valid_host(request.headers(), request.version()) {
        return bad_request("the Host header is missing, repeated or malformed");
    }
    if request.uri().authority().is_some() {
        apply_authority(request)?;
    }
    match *request.method() {
        Method::TRACE if is_call => Err(Error::MethodNotAllowed(METHODS).into()),
        Method::OPTIONS => check_options(request, is_call),
        _ if request.uri().path() == "*" => bad_request("the target * is for OPTIONS only"),
        _ => Ok(()),
    }
}

fn bad_request<T>(reason: &str) -> Result<T, EarlyResponse> {
    Err(Error::BadRequest(reason.to_owned()).into())
}

/// Converts a target in absolute form to origin form. Its authority replaces `Host` (RFC 9112, 3.2.2).
fn apply_authority<B>(request: &mut Request<B>) -> Result<(), EarlyResponse> {
    let uri = request.uri();
    let Some(authority) = uri.authority() else { return Ok(()) };
    if !matches!(uri.scheme_str(), Some("http" | "https")) {
        return bad_request("the target is neither a path nor a URL of http or https");
    }
    if authority.as_str().contains('@') {
        return bad_request("the URL in the target has user information");
    }
    let host = HeaderValue::from_str(authority.as_str());
    let Some(host) = host.ok().filter(|host| !host.is_empty() && is_host(host.as_bytes())) else {
        return bad_request("the host in the target is malformed");
    };
    *request.uri_mut() = Uri::from(origin_form(uri));
    request.headers_mut().insert(HOST, host);
    Ok(())
}

/// Returns the path and query of a URL. An empty path becomes `/`: otherwise the target would be written as an empty
/// string.
fn origin_form(url: &Uri) -> PathAndQuery {
    let root = || PathAndQuery::from_static("/");
    match (url.path(), url.query()) {
        ("" | "/", None) => root(),
        ("" | "/", Some(query)) => format!("/?{query}").parse().unwrap_or_else(|_| root()),
        _ => url.path_and_query().cloned().unwrap_or_else(root),
    }
}

/// Handles OPTIONS for the gateway itself, and `Max-Forwards` (RFC 9110, 7.6.2).
fn check_options<B>(request: &mut Request<B>, is_call: bool) -> Result<(), EarlyResponse> {
    if request.uri().path() == "*" {
        return Err(EarlyResponse::AllowedMethods);
    }
    if !is_call {
        return Ok(());
    }
    let mut values = request.headers().get_all(MAX_FORWARDS).iter();
    let left = match (values.next(), values.next()) {
        (None, _) => return Ok(()),
        (Some(value), None) => parse_forwards(value.as_bytes()),
        (Some(_), Some(_)) => None,
    };
    match left {
        None => bad_request("Max-Forwards is not a number"),
        Some(0) => Err(EarlyResponse::AllowedMethods),
        Some(left) => {
            request.headers_mut().insert(MAX_FORWARDS, HeaderValue::from(left - 1));
            Ok(())
        }
    }
}

/// Parses a number of any length; values above `u64::MAX` become `u64::MAX`.
fn parse_forwards(digits: &[u8]) -> Option<u64> {
    (!digits.is_empty() && digits.iter().all(u8::is_ascii_digit)).then(|| {
        digits.iter().fold(0_u64, |sum, digit| {
            sum.saturating_mul(10).saturating_add(u64::from(digit - b'0'))
        })
    })
}

fn has_valid_host(headers: &HeaderMap, version: Version) -> bool {
    let mut hosts = headers.get_all(HOST).iter();
    match (hosts.next(), hosts.next()) {
        (None, _) => version < Version::HTTP_11,
        (Some(host), None) => is_host(host.as_bytes()),
        (Some(_), Some(_)) => false,
    }
}

/// Adds `Connection: close`. Other connection options stay.
pub(super) fn set_connection_close(headers: &mut HeaderMap) {
    if !has_connection_close(headers) {
        headers.append(CONNECTION, HeaderValue::from_static("close"));
    }
}

fn has_connection_close(headers: &HeaderMap) -> bool {
    let values = headers.get_all(CONNECTION).iter();
    values
        .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
        .any(|option| option.trim_ascii().eq_ignore_ascii_case(b"close"))
}

/// Adapts a response to an HTTP/1.0 client, which does not know chunks: a body of unknown length ends with the
/// connection, so the response must not offer to keep it.
pub(super) fn adapt_to_http_1_0<B: Body>(response: &mut http::Response<B>) {
    if response.body().size_hint().exact().is_none() || has_connection_close(response.headers()) {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        // With version 1.1, hyper would add keep-alive if the client requested it.
        *response.version_mut() = Version::HTTP_10;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_has_exactly_one_valid_host() {
        let check = |hosts: &[&'static str], version| {
            let hosts = hosts.iter().map(|host| (HOST, HeaderValue::from_static(host)));
            let mut headers = HeaderMap::new();
            hosts.for_each(|(name, value)| {
                headers.append(name, value);
            });
            has_valid_host(&headers, version)
        };
        assert!(check(&["gateway.test:8080"], Version::HTTP_11));
        assert!(check(&["[::1]:8080"], Version::HTTP_11));
        assert!(check(&[], Version::HTTP_10));
        assert!(!check(&[], Version::HTTP_11));
        assert!(!check(&["a", "b"], Version::HTTP_11));
        assert!(!check(&["a b/c"], Version::HTTP_11));
    }

    #[test]
    fn max_forwards_of_any_length_is_parsed() {
        for (digits, expect) in [
            ("0", Some(0)),
            ("007", Some(7)),
            ("18446744073709551616", Some(u64::MAX)),
            ("", None),
            ("-1", None),
            ("+1", None),
            ("1 ", None),
        ] {
            assert_eq!(parse_forwards(digits.as_bytes()), expect, "{digits:?}");
        }
    }

    #[test]
    fn a_target_in_absolute_form_becomes_a_path_whatever_follows_the_authority() {
        for (url, expect) in [
            ("http://g", "/"),
            ("http://g/", "/"),
            ("http://g#part", "/"),
            ("http://g?q#part", "/?q"),
            ("http://g/?q", "/?q"),
            ("http://g/a?q#part", "/a?q"),
        ] {
            let mut request = Request::get(url).body(String::new()).unwrap();
            request.headers_mut().insert(HOST, HeaderValue::from_static("other"));
            check(&mut request, false).unwrap();
            assert_eq!(
                (request.uri().to_string().as_str(), request.uri().path()),
                (expect, expect.split('?').next().unwrap()),
                "{url}"
            );
            assert_eq!(request.headers()[HOST], "g");
        }
    }
}
