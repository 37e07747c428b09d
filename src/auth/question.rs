//! What `auth_proxy_url` is told of the request that it decides on. No I/O.

use http::header::{CONNECTION, CONTENT_LENGTH, HOST, UPGRADE};
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue};

use crate::proxy::headers::end_to_end;

const X_FORWARDED_METHOD: HeaderName = HeaderName::from_static("x-forwarded-method");
const X_FORWARDED_URI: HeaderName = HeaderName::from_static("x-forwarded-uri");
const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");

/// The headers of the question: the client's, and which method, path, query and host it asked for.
pub(super) fn headers(request: &Parts) -> HeaderMap {
    let mut own = request.headers.clone();
    // What `Connection` names goes now, or it could name what is added here.
    end_to_end(&mut own);
    let mut headers = HeaderMap::with_capacity(own.len() + 3);
    for (name, value) in &own {
        let concerns_body = [CONNECTION, UPGRADE, CONTENT_LENGTH].contains(name);
        if !concerns_body && !is_ours(name) {
            headers.append(name, value.clone());
        }
    }
    let uri = request.uri.path_and_query().map_or("/", |uri| uri.as_str());
    let said = [(X_FORWARDED_METHOD, request.method.as_str()), (X_FORWARDED_URI, uri)];
    for (name, value) in said {
        if let Ok(value) = HeaderValue::from_bytes(value.as_bytes()) {
            headers.insert(name, value);
        }
    }
    if let Some(host) = request.headers.get(HOST) {
        headers.insert(X_FORWARDED_HOST, host.clone());
    }
    headers
}

/// Whether `name` is one of those that are said here, or is read as one by a server that makes variables of headers: to
/// many `_` is the same as `-`.
fn is_ours(name: &HeaderName) -> bool {
    let plain = name.as_str().replace(['_', '.'], "-");
    [X_FORWARDED_METHOD, X_FORWARDED_URI, X_FORWARDED_HOST]
        .iter()
        .any(|ours| ours.as_str() == plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(request: http::request::Builder) -> HeaderMap {
        headers(&request.body(()).unwrap().into_parts().0)
    }

    #[test]
    fn the_request_is_described_and_its_client_cannot_describe_it() {
        let headers = asked(
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
        let mut said: Vec<_> =
            headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
        said.sort_unstable();
        let expect = [
            ("cookie", "a=b"),
            ("host", "faas.example:8080"),
            ("x-forwarded-host", "faas.example:8080"),
            ("x-forwarded-method", "DELETE"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-uri", "/system/functions?x=%2F"),
        ];
        assert_eq!(said, expect);
    }

    #[test]
    fn the_description_cannot_be_taken_away() {
        let headers = asked(
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
