//! Keeps web pages of others away from the API: a browser on the machine, or one that has the credentials, sends what
//! any page asks it to.

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::header::{HOST, ORIGIN};
use http::{HeaderMap, HeaderName};

use crate::error::Error;

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

/// Lets a request pass unless a page of another origin has made it. Functions may be called by any page.
pub async fn guard(State(names): State<Names>, request: Request, next: Next) -> Response {
    if !request.uri().path().starts_with("/system/") {
        return next.run(request).await;
    }
    match check(request.headers(), names) {
        Ok(()) => next.run(request).await,
        Err(reason) => Error::Forbidden(reason).into_response(),
    }
}

fn check(headers: &HeaderMap, names: Names) -> Result<(), &'static str> {
    let text = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    if names == Names::Local && !text(HOST).is_none_or(is_local) {
        return Err("the API is open to this machine alone: call it as localhost or 127.0.0.1");
    }
    const FOREIGN: &str = "the request was made by a web page of another origin";
    match text(SEC_FETCH_SITE) {
        Some("same-origin" | "none") => return Ok(()),
        Some(_) => return Err(FOREIGN),
        None => {}
    }
    // Tools send no Origin.
    let Some(origin) = headers.get(ORIGIN) else { return Ok(()) };
    let host = origin.to_str().ok().and_then(|origin| origin.split_once("://")).map(|(_, h)| h);
    let ours = [text(HOST), text(X_FORWARDED_HOST)];
    if host.is_some() && ours.contains(&host) { Ok(()) } else { Err(FOREIGN) }
}

/// Whether `host`, with or without a port, names this machine.
fn is_local(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let address = name.trim_start_matches('[').trim_end_matches(']').parse::<std::net::IpAddr>();
    name.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback())
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
