//! The address of a peer: scheme, authority and a path to put before every target. No I/O.

use std::fmt;

use http::uri::{Authority, Scheme, Uri};

/// What [`BaseUrl::parse`] takes, for messages.
pub const EXPECTED: &str = "an http(s) URL in ASCII, such as http://127.0.0.1:8081";

/// An ASCII `http://` or `https://` URL without credentials, query or fragment; a slash at its end counts for nothing.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BaseUrl {
    /// Whether the peer is spoken to over TLS.
    pub tls: bool,
    /// `host` or `host:port`, as it goes into `Host`.
    pub authority: Authority,
    /// The path in front of every target, without its last slash; mostly empty.
    pub path: String,
}

impl BaseUrl {
    /// `None` for anything but an absolute http(s) URL.
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
        // A target on the wire is ASCII (RFC 3986, 2): other characters have to be percent-encoded.
        if !uri.path().is_ascii() {
            return None;
        }
        let url = Self { tls, authority, path: uri.path().trim_end_matches('/').to_owned() };
        // `[]` is a host to the URL's parser.
        (!url.host().is_empty()).then_some(url)
    }

    /// The http URL of `port` at `host`, a name or an IP address.
    pub fn of_host(host: &str, port: u16) -> Option<Self> {
        let host = match host.parse::<std::net::Ipv6Addr>() {
            Ok(address) => format!("[{address}]"),
            Err(_) => host.to_owned(),
        };
        let url = Self::parse(&format!("http://{host}:{port}"))?;
        // Nothing but a host: no port of its own, no path.
        (url.authority.host() == host && url.path.is_empty()).then_some(url)
    }

    /// The host alone, brackets of an IPv6 address taken off.
    pub fn host(&self) -> &str {
        self.authority.host().trim_start_matches('[').trim_end_matches(']')
    }

    /// The port, or the scheme's own.
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
    fn a_host_is_nothing_more() {
        let url = |host: &str| BaseUrl::of_host(host, 80).map(|url| url.to_string());
        assert_eq!(url("gateway.openfaas").as_deref(), Some("http://gateway.openfaas:80"));
        assert_eq!(url("::1").as_deref(), Some("http://[::1]:80"));
        assert_eq!(url("[::1]").as_deref(), Some("http://[::1]:80"));
        for host in ["a/b", "a:1", "u@a", "", "http://a", "a b"] {
            assert_eq!(url(host), None, "{host}");
        }
    }

    #[test]
    fn absolute_http_urls_are_taken() {
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
            // Space to `trim`, but none that ends a URL.
            "http://a/\u{85}/",
        ] {
            check(text, None);
        }
    }
}
