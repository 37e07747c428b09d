//! Which clients may see why a function does not start. The output of a function is confidential.

use std::net::IpAddr;
use std::sync::Arc;

use http::HeaderMap;

use gateway_http::allowed_hosts::is_local_request;
use gateway_http::credentials::Credentials;

/// How requests of operators are recognized.
#[derive(Clone)]
pub enum Operators {
    /// Not at all: no request counts as an operator's.
    Unknown,
    /// Requests from this machine, if the API is open to this machine only.
    Local,
    /// Requests with the credentials of the API.
    Credentials(Arc<Credentials>),
}

impl Operators {
    /// Returns whether a request with these headers, from `peer`, is an operator's.
    pub fn include(&self, headers: &HeaderMap, peer: IpAddr) -> bool {
        match self {
            Self::Unknown => false,
            Self::Local => peer.is_loopback() && is_local_request(headers),
            Self::Credentials(credentials) => credentials.verify(headers),
        }
    }
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, HeaderValue};

    use super::*;

    #[test]
    fn without_credentials_only_local_requests_are_an_operators() {
        let check = |headers: &[(&'static str, &'static str)], peer: &str| {
            let headers = headers.iter().map(|(name, value)| {
                (HeaderName::from_static(name), HeaderValue::from_static(value))
            });
            Operators::Local.include(&headers.collect(), peer.parse().unwrap())
        };
        let host = ("host", "localhost:8080");
        assert!(check(&[host], "127.0.0.1") && check(&[host], "::1"));
        assert!(!check(&[host], "10.0.0.1"));
        assert!(!check(&[], "127.0.0.1"));
        assert!(!check(&[("host", "rebind.evil")], "127.0.0.1"));
        assert!(!check(&[host, ("origin", "https://evil.example")], "127.0.0.1"));
        assert!(!check(&[host, ("x-forwarded-for", "10.0.0.1")], "127.0.0.1"));
        assert!(!Operators::Unknown.include(&HeaderMap::new(), "127.0.0.1".parse().unwrap()));
    }
}
