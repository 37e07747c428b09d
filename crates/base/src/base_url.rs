//! URL of a peer: scheme, authority, and a prefix for all paths. No I/O.

use std::fmt;

use http::uri::{Authority, Scheme, Uri};

/// Format that [`BaseUrl::parse`] accepts, for messages.
pub const EXPECTED: &str = "an http(s) URL in ASCII, such as http://127.0.0.1:8081";

/// An ASCII `http://` or `https://` URL without credentials, query or fragment. A trailing slash is ignored.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BaseUrl {
    /// The scheme is https.
    pub tls: bool,
    /// `host` or `host:port`, for the header `Host`.
    pub authority: Authority,
    /// Prefix of all paths, without a trailing slash; usually empty.
    pub path: String,
}

impl BaseUrl {
    /// Returns `None` for anything but an absolute http(s) URL.
    pub fn parse(text: &str) -> Option<Self> {
        let uri: Uri = text.trim().parse().ok()?;
        let scheme = uri.scheme()?;
        let tls = *scheme == Scheme::HTTPS;
        if !tls && *scheme != Scheme::HTTP {
            return None;
        }
        let authority = uri.authority()?.clone();
        if authority.as_str().contains('@') || uri.query().is_some() {
            return None;
        }
        // A request target is ASCII (RFC 3986, 2): other characters must be percent-encoded.
        if !uri.path().is_ascii() {
            return None;
        }
        let url = Self { tls, authority, path: uri.path().trim_end_matches('/').to_owned() };
        // The URL parser accepts `[]` as a host.
        (!url.host().is_empty()).then_some(url)
    }

    /// Returns the http URL of `port` at `host`, a name or an IP address.
    pub fn of_host(host: &str, port: u16) -> Option<Self> {
        let host = match host.parse::<std::net::Ipv6Addr>() {
            Ok(address) => format!("[{address}]"),
            Err(_) => host.to_owned(),
        };
        let url = Self::parse(&format!("http://{host}:{port}"))?;
        // `host` must not contain a port or a path.
        (url.authority.host() == host && url.path.is_empty()).then_some(url)
    }

    /// Returns the host, an IPv6 address without its brackets.
    pub fn host(&self) -> &str {
        self.authority.host().trim_start_matches('[').trim_end_matches(']')
    }

    /// Returns the port, or the default port of the scheme.
    pub fn port(&self) -> u16 {
        self.authority.port_u16().unwrap_or(if self.tls { 443 } else { 80 })
    }
}

impl fmt::Display for BaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "https" } else { "http" };
        write!(f, "{scheme}://{}{}", self.authority, self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expect: Option<(&str, u16, &str)>) {
        let got = BaseUrl::parse(text);
        let got = got.as_ref().map(|url| (url.host(), url.port(), url.path.as_str()));
        assert_eq!(got, expect, "{text:?}");
    }

    #[test]
    fn a_host_has_no_port_or_path() {
        let url = |host: &str| BaseUrl::of_host(host, 80).map(|url| url.to_string());
        assert_eq!(url("gateway.openfaas").as_deref(), Some("http://gateway.openfaas:80"));
        assert_eq!(url("::1").as_deref(), Some("http://[::1]:80"));
        assert_eq!(url("[::1]").as_deref(), Some("http://[::1]:80"));
        for host in ["a/b", "a:1", "u@a", "", "http://a", "a b"] {
            assert_eq!(url(host), None, "{host}");
        }
    }

    #[test]
    fn absolute_http_urls_are_accepted() {
        check("http://127.0.0.1:8081/", Some(("127.0.0.1", 8081, "")));
        check("http://provider", Some(("provider", 80, "")));
        check("https://provider/base/", Some(("provider", 443, "/base")));
        check("http://[::1]:8081", Some(("::1", 8081, "")));
        check(" http://a:1 ", Some(("a", 1, "")));
    }

    #[test]
    fn anything_else_is_refused() {
        for text in [
            "",
            "provider:8080",
            "/path",
            "ftp://a",
            "http://",
            "http://[]:8",
            "http://a?b",
            "http://u:p@a",
            "http://a/gr\u{fc}n",
            // Whitespace for `trim`, but not for the URL parser.
            "http://a/\u{85}/",
        ] {
            check(text, None);
        }
    }
}
