//! Keeps web pages of others away from the API: a browser on the machine, or one that has the credentials, sends what
//! any page asks it to.

mod internal;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::header::{FORWARDED, HOST, ORIGIN};
use http::{HeaderMap, HeaderName, Method};

use crate::chain::X_GATEWAY_CALLBACK;
use crate::error::Error;
use crate::queued::wishes::X_CALLBACK_URL;
pub use crate::same_origin::internal::{InternalNames, guard_internal};

const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");

/// By which names the API may be called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Names {
    /// Any that leads here.
    Any,
    /// Those of this machine itself. Without credentials, a page whose name was made to lead here (DNS rebinding) would
    /// be as good as one of ours.
    Local,
}

/// Lets a request pass unless a callback or a page of another origin has made it. Functions may be called by any.
pub async fn guard(State(names): State<Names>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    if !path.starts_with("/system/") {
        return next.run(request).await;
    }
    let headers = request.headers();
    let checked = match check(headers, names) {
        // A callback goes where a client wanted it to, and this client may not be allowed to use the API.
        _ if headers.contains_key(X_GATEWAY_CALLBACK) => Err("a callback cannot use the API"),
        Err(foreign) => Err(foreign.reason()),
        Ok(()) if is_from_page(headers) && !is_for_pages(request.method(), path) => Err(
            "a web page cannot change functions, as pages of functions have the same origin: use a tool",
        ),
        Ok(()) => Ok(()),
    };
    match checked {
        Ok(()) => next.run(request).await,
        Err(reason) => Error::Forbidden(reason).into_response(),
    }
}

/// The same for a request to queue a call: any page may send one, but not with a header that makes the gateway do more
/// than call the function.
///
/// # Errors
/// Why it is refused.
pub fn guard_queued(headers: &HeaderMap, names: Names) -> Result<(), &'static str> {
    let does_more =
        |name: &HeaderName| *name == X_CALLBACK_URL || name.as_str().starts_with("x-gateway-");
    if !headers.keys().any(does_more) {
        return Ok(());
    }
    check(headers, names).map_err(|foreign| match foreign {
        Foreign::Page => {
            "a web page of another origin cannot send the headers x-callback-url and x-gateway-*"
        }
        Foreign::Name => foreign.reason(),
    })
}

/// Whether a page may make such a request of the API: it may read, and do what the page under `/ui/` does. A page that a
/// function has answered with is of the same origin, and its content may come from another party.
fn is_for_pages(method: &Method, path: &str) -> bool {
    method.is_safe() || path.starts_with("/system/calls/")
}

/// Whether a page made the request: tools send neither header, and browsers say `none` when their user asks.
fn is_from_page(headers: &HeaderMap) -> bool {
    headers.contains_key(ORIGIN) || headers.get(SEC_FETCH_SITE).is_some_and(|site| site != "none")
}

/// Why a request is not one of this origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Foreign {
    /// It was sent to a name that is not this machine's own.
    Name,
    /// A page of another origin sent it.
    Page,
}

impl Foreign {
    fn reason(self) -> &'static str {
        match self {
            Self::Name => {
                "the API is open to this machine alone: call it as localhost or 127.0.0.1"
            }
            Self::Page => "the request was made by a web page of another origin",
        }
    }
}

/// Whether a request with these headers may be one of the machine's own operator, where the API is open to this machine
/// alone: made by a tool or our own page, and not passed on by a proxy.
pub fn is_of_this_machine(headers: &HeaderMap) -> bool {
    let forwarded_for = HeaderName::from_static("x-forwarded-for");
    let passed_on = [X_FORWARDED_HOST, forwarded_for, FORWARDED, X_GATEWAY_CALLBACK];
    headers.contains_key(HOST)
        && check(headers, Names::Local).is_ok()
        && !passed_on.iter().any(|name| headers.contains_key(name))
}

fn check(headers: &HeaderMap, names: Names) -> Result<(), Foreign> {
    let text = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    if names == Names::Local && !text(HOST).is_none_or(is_local) {
        return Err(Foreign::Name);
    }
    match text(SEC_FETCH_SITE) {
        Some("same-origin" | "none") => return Ok(()),
        Some(_) => return Err(Foreign::Page),
        None => {}
    }
    // Tools send no Origin.
    let Some(origin) = headers.get(ORIGIN) else { return Ok(()) };
    let host = origin.to_str().ok().and_then(|origin| origin.split_once("://")).map(|(_, h)| h);
    let ours = [text(HOST), text(X_FORWARDED_HOST)];
    if host.is_some() && ours.contains(&host) { Ok(()) } else { Err(Foreign::Page) }
}

/// Whether `host`, with or without a port, names this machine.
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
    fn passes(names: Names, headers: &[(&'static str, &'static str)], expect: bool) {
        let map = headers
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)));
        assert_eq!(check(&map.collect(), names).is_ok(), expect, "{headers:?}");
    }

    #[test]
    fn tools_and_our_own_page_pass_and_other_pages_do_not() {
        passes(Names::Any, &[("host", "faas.example")], true);
        passes(Names::Any, &[("host", "a:8080"), ("origin", "http://a:8080")], true);
        passes(Names::Any, &[("host", "a"), ("sec-fetch-site", "same-origin")], true);
        passes(Names::Any, &[("host", "a"), ("sec-fetch-site", "none")], true);
        passes(
            Names::Any,
            &[("host", "a"), ("x-forwarded-host", "public"), ("origin", "https://public")],
            true,
        );
        passes(Names::Any, &[("host", "a"), ("origin", "https://evil.example")], false);
        passes(Names::Any, &[("host", "a"), ("origin", "null")], false);
        passes(Names::Any, &[("host", "a"), ("sec-fetch-site", "cross-site")], false);
        passes(Names::Any, &[("host", "a"), ("sec-fetch-site", "same-site")], false);
    }

    #[test]
    fn without_credentials_a_name_from_elsewhere_does_not_lead_here() {
        for host in
            ["localhost", "LOCALHOST:8080", "127.0.0.1:8080", "127.1.2.3", "[::1]:8080", "[::1]"]
        {
            passes(Names::Local, &[("host", host)], true);
        }
        for host in ["rebind.evil", "localhost.evil:8080", "10.0.0.1", "127.0.0.1.evil"] {
            passes(Names::Local, &[("host", host), ("sec-fetch-site", "same-origin")], false);
        }
        passes(Names::Local, &[], true);
    }
}
