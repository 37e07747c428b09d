//! What a forked process learns of its request: environment variables, as a classic watchdog sets them. No I/O.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use axum::http::header::{COOKIE, HOST, TRANSFER_ENCODING};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName};

/// A header that is not passed on: its variable is, but for case, the one that tells HTTP clients which proxy to use.
const PROXY: HeaderName = HeaderName::from_static("proxy");

/// Whether a header becomes a variable. Of the characters that a name may have, only the hyphen has a place in a
/// variable's name, as `_`. A header with any other could pose as one that the gateway or a proxy before it vouches
/// for: `X_Real_Ip` and `X.Real.Ip` as `X-Real-Ip`, whether or not that comes along.
fn is_plain(name: &HeaderName) -> bool {
    name.as_str().bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

/// The variables of a request whose path behind the function's name is `path`.
///
/// Those that describe the request itself come last, so that a header such as `Method` cannot pose as one.
pub(super) fn variables(
    parts: &Parts,
    path: &str,
    length: Option<u64>,
) -> Vec<(OsString, OsString)> {
    let mut variables: Vec<_> = parts
        .headers
        .keys()
        .filter(|name| **name != PROXY && is_plain(name))
        .map(|name| (variable(name.as_str()).into(), joined(&parts.headers, name)))
        .collect();
    let mut set =
        |name: &str, value: &[u8]| variables.push((name.into(), OsString::from_vec(value.into())));
    set("Http_Method", parts.method.as_str().as_bytes());
    set("Http_Path", path.as_bytes());
    set("Http_Query", parts.uri.query().unwrap_or_default().as_bytes());
    if let Some(host) = parts.headers.get(HOST) {
        set("Http_Host", host.as_bytes());
    }
    // -1 is how Go's net/http says that a length is not known; functions compare with it.
    let length = length.map_or_else(|| "-1".to_owned(), |length| length.to_string());
    set("Http_ContentLength", length.as_bytes());
    set("Http_Content_Length", length.as_bytes());
    if let Some(encoding) = parts.headers.get(TRANSFER_ENCODING) {
        set("Http_Transfer_Encoding", encoding.as_bytes());
    }
    variables
}

/// `x-call-id` → `Http_X_Call_Id`.
fn variable(header: &str) -> String {
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

/// All values of a header in one: with commas, which RFC 9110 (5.3) declares to mean the same as repeating it, but
/// for cookies, whose values may hold commas.
fn joined(headers: &HeaderMap, name: &HeaderName) -> OsString {
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
        assert_eq!(variable(header), expect);
    }

    #[test]
    fn headers_are_named_in_canonical_case() {
        check("x-call-id", "Http_X_Call_Id");
        check("content-type", "Http_Content_Type");
        check("ETAG", "Http_Etag");
        check("x-2fa", "Http_X_2fa");
        check("x--y", "Http_X__Y");
    }

    #[test]
    fn a_header_poses_as_no_other_whether_or_not_that_one_comes_along() {
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
            let told: Vec<_> = variables
                .iter()
                .filter(|(name, _)| name.to_str().unwrap().to_ascii_lowercase().contains("real"))
                .map(|(_, value)| value.to_str().unwrap())
                .collect();
            assert_eq!(told, plain.into_iter().collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_request_is_told_whole_and_a_header_cannot_pose_as_another_part_of_it() {
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
