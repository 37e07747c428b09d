//! Environment variables with the request for a forked process, as the classic watchdog sets them. No I/O.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use axum::http::header::{COOKIE, HOST, TRANSFER_ENCODING};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName};

/// Not passed on: except for case, its variable is `HTTP_PROXY`, which configures HTTP clients.
const PROXY: HeaderName = HeaderName::from_static("proxy");

/// Returns whether a header is passed on as a variable. In a variable's name, `_` stands for the hyphen. Headers with
/// other special characters could impersonate one that a trusted proxy sets: `X_Real_Ip` and `X.Real.Ip` would become
/// the variable of `X-Real-Ip`.
fn is_unambiguous(name: &HeaderName) -> bool {
    name.as_str().bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

/// Returns the variables of a request. `path` is the path after the function's name.
///
/// Variables of the request line come last, so that a header such as `Method` cannot override them.
pub(super) fn variables(
    parts: &Parts,
    path: &str,
    length: Option<u64>,
) -> Vec<(OsString, OsString)> {
    let mut variables: Vec<_> = parts
        .headers
        .keys()
        .filter(|name| **name != PROXY && is_unambiguous(name))
        .map(|name| (variable_name(name.as_str()).into(), joined_values(&parts.headers, name)))
        .collect();
    let mut set =
        |name: &str, value: &[u8]| variables.push((name.into(), OsString::from_vec(value.into())));
    set("Http_Method", parts.method.as_str().as_bytes());
    set("Http_Path", path.as_bytes());
    set("Http_Query", parts.uri.query().unwrap_or_default().as_bytes());
    if let Some(host) = parts.headers.get(HOST) {
        set("Http_Host", host.as_bytes());
    }
    // -1 stands for an unknown length, as in Go's net/http; functions compare with it.
    let length = length.map_or_else(|| "-1".to_owned(), |length| length.to_string());
    set("Http_ContentLength", length.as_bytes());
    set("Http_Content_Length", length.as_bytes());
    if let Some(encoding) = parts.headers.get(TRANSFER_ENCODING) {
        set("Http_Transfer_Encoding", encoding.as_bytes());
    }
    variables
}

/// `x-call-id` → `Http_X_Call_Id`.
fn variable_name(header: &str) -> String {
    let mut name = String::with_capacity("Http_".len() + header.len());
    name.push_str("Http_");
    let mut first = true;
    for c in header.chars() {
        let plain = c.is_ascii_alphanumeric();
        name.push(match (plain, first) {
            (true, true) => c.to_ascii_uppercase(),
            (true, false) => c.to_ascii_lowercase(),
            (false, _) => '_',
        });
        first = !plain;
    }
    name
}

/// Joins all values of a header, by commas as in RFC 9110, 5.3. Cookies are joined by semicolons, since their values
/// may contain commas.
fn joined_values(headers: &HeaderMap, name: &HeaderName) -> OsString {
    let separator: &[u8] = if name == COOKIE { b"; " } else { b", " };
    let values: Vec<_> = headers.get_all(name).iter().map(|value| value.as_bytes()).collect();
    OsString::from_vec(values.join(separator))
}

#[cfg(test)]
mod tests {
    use axum::http::Request;

    use super::*;

    #[track_caller]
    fn check(header: &str, expect: &str) {
        assert_eq!(variable_name(header), expect);
    }

    #[test]
    fn variable_names_have_canonical_case() {
        check("x-call-id", "Http_X_Call_Id");
        check("content-type", "Http_Content_Type");
        check("ETAG", "Http_Etag");
        check("x-2fa", "Http_X_2fa");
        check("x--y", "Http_X__Y");
    }

    #[test]
    fn a_header_cannot_impersonate_another_one() {
        let odd = ["x_real_ip", "x.real.ip", "x-real_ip", "x~real~ip", "x!real'ip", "x|real`ip"];
        for plain in [Some("10.0.0.1"), None] {
            let mut request = Request::get("/");
            for name in odd {
                request = request.header(name, "FAKE");
            }
            if let Some(plain) = plain {
                request = request.header("x-real-ip", plain);
            }
            let (parts, ()) = request.body(()).unwrap().into_parts();
            let variables = variables(&parts, "/", None);
            let values: Vec<_> = variables
                .iter()
                .filter(|(name, _)| name.to_str().unwrap().to_ascii_lowercase().contains("real"))
                .map(|(_, value)| value.to_str().unwrap())
                .collect();
            assert_eq!(values, plain.into_iter().collect::<Vec<_>>());
        }
    }

    #[test]
    fn variables_describe_the_request_and_headers_cannot_override_its_other_parts() {
        let request = Request::post("/function/f/a%20b?q=1&r")
            .header("host", "example.org")
            .header("method", "FAKE")
            .header("accept", "a")
            .header("accept", "b;q=0.1")
            .header("cookie", "x=1")
            .header("cookie", "y=2,3")
            .header("Proxy", "http://elsewhere")
            .header("x-proxy", "kept")
            .body(())
            .unwrap();
        let (parts, ()) = request.into_parts();
        let variables = variables(&parts, "/a%20b", Some(3));
        let get = |name: &str| {
            let found = variables.iter().rev().find(|(n, _)| n.to_str() == Some(name));
            found.map(|(_, value)| value.to_str().unwrap())
        };
        assert_eq!(get("Http_Method"), Some("POST"));
        assert_eq!(get("Http_Path"), Some("/a%20b"));
        assert_eq!(get("Http_Query"), Some("q=1&r"));
        assert_eq!(get("Http_Host"), Some("example.org"));
        assert_eq!(get("Http_Accept"), Some("a, b;q=0.1"));
        assert_eq!(get("Http_Cookie"), Some("x=1; y=2,3"));
        assert_eq!(get("Http_ContentLength"), Some("3"));
        assert_eq!(get("Http_Content_Length"), Some("3"));
        assert_eq!(get("Http_Transfer_Encoding"), None);
        assert_eq!(get("Http_X_Proxy"), Some("kept"));
        let is_proxy = |name: &OsString| name.to_str().unwrap().eq_ignore_ascii_case("http_proxy");
        assert!(!variables.iter().any(|(name, _)| is_proxy(name)));
    }
}
