//! Recognizes requests of web pages of other origins: a browser that runs on this machine, or that has stored the
//! credentials, sends requests on behalf of any page. No I/O.

mod internal;

use http::header::{FORWARDED, HOST, ORIGIN};
use http::{HeaderMap, HeaderName};

pub use crate::allowed_hosts::internal::InternalHosts;
use crate::names::{
    RESERVED_HEADER_PREFIX, X_CALLBACK_URL, X_FORWARDED_FOR, X_FORWARDED_HOST, X_GATEWAY_CALLBACK,
};

const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// Host names under which the API may be called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AllowedHosts {
    /// Any name.
    Any,
    /// Names of this machine only. Required if the API has no credentials: otherwise a page whose name resolves to this
    /// machine (DNS rebinding) would have the same origin.
    Local,
}

/// Checks that a request to the API was sent by a tool or a page of the same origin, to an allowed name.
///
/// # Errors
/// The reason of the rejection, for the client.
pub fn check_origin(headers: &HeaderMap, allowed: AllowedHosts) -> Result<(), &'static str> {
    check(headers, allowed).map_err(Rejection::reason)
}

/// Returns whether a page sent the request. Tools send neither header; browsers send `none` for requests of the user.
pub fn is_from_page(headers: &HeaderMap) -> bool {
    headers.contains_key(ORIGIN) || headers.get(SEC_FETCH_SITE).is_some_and(|site| site != "none")
}

/// The same check for a request that enqueues a call. Any page may send one, but not with headers that make the gateway
/// do more than call the function.
///
/// # Errors
/// The reason of the rejection, for the client.
pub fn check_async_request(headers: &HeaderMap, allowed: AllowedHosts) -> Result<(), &'static str> {
    let is_restricted = |name: &HeaderName| {
        *name == X_CALLBACK_URL || name.as_str().starts_with(RESERVED_HEADER_PREFIX)
    };
    if !headers.keys().any(is_restricted) {
        return Ok(());
    }
    check(headers, allowed).map_err(|rejection| match rejection {
        Rejection::CrossOriginPage => {
            "a web page of another origin cannot send the headers x-callback-url and x-gateway-*"
        }
        Rejection::Host => rejection.reason(),
    })
}

/// Why a request is rejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rejection {
    /// It was sent to a name that is not this machine's.
    Host,
    /// A page of another origin sent it.
    CrossOriginPage,
}

impl Rejection {
    fn reason(self) -> &'static str {
        match self {
            Self::Host => "the API is open to this machine only: call it as localhost or 127.0.0.1",
            Self::CrossOriginPage => "the request was sent by a web page of another origin",
        }
    }
}

/// Returns whether a request with these headers may come from the operator of this machine, if the API is open to this
/// machine only: sent by a tool or the gateway's own page, and not forwarded by a proxy.
pub fn is_local_request(headers: &HeaderMap) -> bool {
    let forwarding_headers = [X_FORWARDED_HOST, X_FORWARDED_FOR, FORWARDED, X_GATEWAY_CALLBACK];
    headers.contains_key(HOST)
        && check(headers, AllowedHosts::Local).is_ok()
        && !forwarding_headers.iter().any(|name| headers.contains_key(name))
}

fn check(headers: &HeaderMap, allowed: AllowedHosts) -> Result<(), Rejection> {
    let text = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    if allowed == AllowedHosts::Local && !text(HOST).is_none_or(is_local) {
        return Err(Rejection::Host);
    }
    match text(SEC_FETCH_SITE) {
        Some("same-origin" | "none") => return Ok(()),
        Some(_) => return Err(Rejection::CrossOriginPage),
        None => {}
    }
    // Tools send no `Origin`.
    let Some(origin) = headers.get(ORIGIN) else { return Ok(()) };
    let host = origin.to_str().ok().and_then(|origin| origin.split_once("://")).map(|(_, h)| h);
    let own_hosts = [text(HOST), text(X_FORWARDED_HOST)];
    if host.is_some() && own_hosts.contains(&host) {
        Ok(())
    } else {
        Err(Rejection::CrossOriginPage)
    }
}

/// Returns whether `host`, with or without a port, is a name of this machine.
fn is_local(host: &str) -> bool {
    let name = without_port(host);
    let address = name.trim_start_matches('[').trim_end_matches(']').parse::<std::net::IpAddr>();
    name.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback())
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[track_caller]
    fn check_headers(
        allowed: AllowedHosts,
        headers: &[(&'static str, &'static str)],
        expect: bool,
    ) {
        let map = headers
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)));
        assert_eq!(check(&map.collect(), allowed).is_ok(), expect, "{headers:?}");
    }

    #[test]
    fn tools_and_the_own_page_are_accepted_and_other_pages_are_not() {
        check_headers(AllowedHosts::Any, &[("host", "faas.example")], true);
        check_headers(AllowedHosts::Any, &[("host", "a:8080"), ("origin", "http://a:8080")], true);
        check_headers(AllowedHosts::Any, &[("host", "a"), ("sec-fetch-site", "same-origin")], true);
        check_headers(AllowedHosts::Any, &[("host", "a"), ("sec-fetch-site", "none")], true);
        check_headers(
            AllowedHosts::Any,
            &[("host", "a"), ("x-forwarded-host", "public"), ("origin", "https://public")],
            true,
        );
        check_headers(
            AllowedHosts::Any,
            &[("host", "a"), ("origin", "https://evil.example")],
            false,
        );
        check_headers(AllowedHosts::Any, &[("host", "a"), ("origin", "null")], false);
        check_headers(AllowedHosts::Any, &[("host", "a"), ("sec-fetch-site", "cross-site")], false);
        check_headers(AllowedHosts::Any, &[("host", "a"), ("sec-fetch-site", "same-site")], false);
    }

    #[test]
    fn without_credentials_only_names_of_this_machine_are_accepted() {
        for host in
            ["localhost", "LOCALHOST:8080", "127.0.0.1:8080", "127.1.2.3", "[::1]:8080", "[::1]"]
        {
            check_headers(AllowedHosts::Local, &[("host", host)], true);
        }
        for host in ["rebind.evil", "localhost.evil:8080", "10.0.0.1", "127.0.0.1.evil"] {
            check_headers(
                AllowedHosts::Local,
                &[("host", host), ("sec-fetch-site", "same-origin")],
                false,
            );
        }
        check_headers(AllowedHosts::Local, &[], true);
    }
}
