//! Headers of the request to `auth_proxy_url`. No I/O.

use http::header::{CONNECTION, CONTENT_LENGTH, HOST, UPGRADE};
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue};

use gateway_http::headers::keep_end_to_end;
use gateway_http::names::X_FORWARDED_HOST;

const X_FORWARDED_METHOD: HeaderName = HeaderName::from_static("x-forwarded-method");
const X_FORWARDED_URI: HeaderName = HeaderName::from_static("x-forwarded-uri");

/// Returns the client's headers, and the method, path, query and host of its request.
pub(super) fn headers(request: &Parts) -> HeaderMap {
    let mut own = request.headers.clone();
    // Remove the headers that `Connection` lists first: it must not list the headers added below.
    keep_end_to_end(&mut own);
    let mut headers = HeaderMap::with_capacity(own.len() + 3);
    for (name, value) in &own {
        let concerns_body = [CONNECTION, UPGRADE, CONTENT_LENGTH].contains(name);
        if !concerns_body && !is_forwarded_header(name) {
            headers.append(name, value.clone());
        }
    }
    let uri = request.uri.path_and_query().map_or("/", |uri| uri.as_str());
    let added = [(X_FORWARDED_METHOD, request.method.as_str()), (X_FORWARDED_URI, uri)];
    for (name, value) in added {
        if let Ok(value) = HeaderValue::from_bytes(value.as_bytes()) {
            headers.insert(name, value);
        }
    }
    if let Some(host) = request.headers.get(HOST) {
        headers.insert(X_FORWARDED_HOST, host.clone());
    }
    headers
}

/// Returns whether `name` is one of the headers set here, or is read as one by a server that maps headers to variables:
/// for many servers `_` and `.` equal `-`.
fn is_forwarded_header(name: &HeaderName) -> bool {
    let plain = name.as_str().replace(['_', '.'], "-");
    [X_FORWARDED_METHOD, X_FORWARDED_URI, X_FORWARDED_HOST]
        .iter()
        .any(|forwarded| forwarded.as_str() == plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn auth_headers(request: http::request::Builder) -> HeaderMap {
        headers(&request.body(()).unwrap().into_parts().0)
    }

    #[test]
    fn the_client_cannot_set_the_headers_that_describe_its_request() {
        let headers = auth_headers(
            http::Request::delete("/system/functions?x=%2F")
                .header("host", "faas.example:8080")
                .header("cookie", "a=b")
                .header("content-length", "5")
                .header("x-forwarded-method", "GET")
                .header("x_forwarded_method", "GET")
                .header("x-forwarded_uri", "/healthz")
                .header("x.forwarded.uri", "/healthz")
                .header("x-forwarded-host", "elsewhere")
                .header("x-forwarded-proto", "https"),
        );
        let mut names: Vec<_> =
            headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
        names.sort_unstable();
        let expect = [
            ("cookie", "a=b"),
            ("host", "faas.example:8080"),
            ("x-forwarded-host", "faas.example:8080"),
            ("x-forwarded-method", "DELETE"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-uri", "/system/functions?x=%2F"),
        ];
        assert_eq!(names, expect);
    }

    #[test]
    fn the_client_cannot_remove_the_headers_that_describe_its_request() {
        let headers = auth_headers(
            http::Request::get("/ui/")
                .header("connection", "x-forwarded-uri, x-forwarded-method, upgrade")
                .header("upgrade", "websocket"),
        );
        assert_eq!(
            (&headers["x-forwarded-uri"], &headers["x-forwarded-method"]),
            (&"/ui/".parse().unwrap(), &"GET".parse().unwrap())
        );
        assert!(!headers.contains_key(CONNECTION) && !headers.contains_key(UPGRADE));
        assert!(!headers.contains_key(X_FORWARDED_HOST));
    }
}
