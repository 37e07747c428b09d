//! The destination of a callback. No I/O.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::uri::{Authority, Scheme};
use http::{HeaderValue, Uri};

use gateway_base::base_url::BaseUrl;
use gateway_http::client::Origin;

/// Why a callback URL is rejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallbackUrlError {
    #[error("the callback's URL is not an absolute http(s) URL")]
    Url,
    #[error("the callback's address is not allowed")]
    NotAllowed,
}

/// A parsed callback URL. Its display forms show neither credentials nor path, which may hold a token.
pub struct CallbackTarget {
    pub(super) origin: Origin,
    /// Path and query.
    pub(super) uri: Uri,
    /// Credentials from the URL.
    pub(super) authorization: Option<HeaderValue>,
}

impl CallbackTarget {
    /// Parses an absolute http(s) URL; a fragment is dropped. The address is checked later, when a connection is
    /// opened.
    ///
    /// # Errors
    /// When it is not such a URL.
    pub fn parse(url: &str) -> Result<Self, CallbackUrlError> {
        let (rest, fragment) = url.split_once('#').unwrap_or((url, ""));
        // A lone `%` is common in queries, and Go accepts it, too.
        let path = rest.split_once('?').map_or(rest, |(path, _)| path);
        if percent_decode(path).is_none() || percent_decode(fragment).is_none() {
            return Err(CallbackUrlError::Url);
        }
        let uri: Uri = url.trim().parse().map_err(|_| CallbackUrlError::Url)?;
        let tls = match uri.scheme() {
            Some(scheme) if *scheme == Scheme::HTTPS => true,
            Some(scheme) if *scheme == Scheme::HTTP => false,
            _ => return Err(CallbackUrlError::Url),
        };
        let authority = uri.authority().ok_or(CallbackUrlError::Url)?.as_str();
        let (user, host_port) = match authority.rsplit_once('@') {
            Some((user, host_port)) => (Some(user), host_port),
            None => (None, authority),
        };
        let authority: Authority = host_port.parse().map_err(|_| CallbackUrlError::Url)?;
        let port_suffix = host_port.strip_prefix(authority.host()).unwrap_or_default();
        if authority.host().is_empty() || !is_port(port_suffix) {
            return Err(CallbackUrlError::Url);
        }
        let base = BaseUrl { tls, authority, path: String::new() };
        // The URL parser accepts `[]` as a host.
        if base.host().is_empty() {
            return Err(CallbackUrlError::Url);
        }
        let path = uri.path_and_query().cloned().ok_or(CallbackUrlError::Url)?;
        let authorization = user.map(basic).transpose()?;
        Ok(Self { origin: Origin::new(base), uri: Uri::from(path), authorization })
    }
}

/// For logs: scheme, host and port only.
impl fmt::Display for CallbackTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.origin.url.fmt(f)
    }
}

impl fmt::Debug for CallbackTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Target({self})")
    }
}

/// Returns whether `text` is empty, `:`, or `:` and a valid port.
fn is_port(text: &str) -> bool {
    match text.strip_prefix(':') {
        Some(port) => port.is_empty() || port.parse::<u16>().is_ok_and(|port| port > 0),
        None => text.is_empty(),
    }
}

/// Converts `user:password` from a URL to an `Authorization` header.
fn basic(user: &str) -> Result<HeaderValue, CallbackUrlError> {
    let mut plain = percent_decode(user).ok_or(CallbackUrlError::Url)?;
    if !user.contains(':') {
        plain.push(b':');
    }
    let text = format!("Basic {}", STANDARD.encode(plain));
    let mut header = HeaderValue::from_maybe_shared(bytes::Bytes::from(text))
        .map_err(|_| CallbackUrlError::Url)?;
    header.set_sensitive(true);
    Ok(header)
}

/// Decodes percent-encoding; `None` if it is invalid.
fn percent_decode(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((byte, tail)) = rest.split_first() {
        rest = tail;
        if *byte != b'%' {
            out.push(*byte);
            continue;
        }
        let (digits, tail) = rest.split_first_chunk::<2>()?;
        let digit = |byte: u8| (byte as char).to_digit(16);
        out.push(u8::try_from(digit(digits[0])? << 4 | digit(digits[1])?).ok()?);
        rest = tail;
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(url: &str) -> Result<CallbackTarget, CallbackUrlError> {
        CallbackTarget::parse(url)
    }

    #[test]
    fn a_url_is_parsed() {
        for (url, host_port, path) in [
            ("http://hooks/a?b=c&d", "http://hooks", "/a?b=c&d"),
            ("HTTPS://hooks:8443", "https://hooks:8443", "/"),
            ("http://[fd00::1]:81/x/", "http://[fd00::1]:81", "/x/"),
            (" http://hooks/a#part ", "http://hooks", "/a"),
            ("http://hooks:/a", "http://hooks:", "/a"),
            ("http://hooks?q", "http://hooks", "/?q"),
            ("http://hooks/a%2Fb?c=50%&d=%zz", "http://hooks", "/a%2Fb?c=50%&d=%zz"),
        ] {
            let target = parse(url).unwrap();
            assert_eq!(target.to_string(), host_port, "{url:?}");
            assert_eq!(target.uri.to_string(), path, "{url:?}");
            assert_eq!(target.authorization, None, "{url:?}");
        }
    }

    #[test]
    fn credentials_become_a_header_and_are_not_displayed() {
        for (url, expect) in [
            ("http://me:s%3Acret@hooks/token", "Basic bWU6czpjcmV0"),
            ("http://me@hooks/token", "Basic bWU6"),
        ] {
            let target = parse(url).unwrap();
            assert_eq!(target.authorization.as_ref().unwrap(), expect);
            assert_eq!(target.origin.host, "hooks");
            let shown = format!("{target} {target:?} {:?}", target.authorization);
            assert_eq!(shown, "http://hooks Target(http://hooks) Some(Sensitive)");
        }
    }

    #[test]
    fn an_invalid_url_is_rejected() {
        for url in [
            "",
            "hooks",
            "/path",
            "hooks:80",
            "ftp://hooks/",
            "http://",
            "http:///a",
            "http://:80/",
            "http://[]:80/",
            "http://hooks:99999/",
            "http://hooks:0/",
            "http://hooks:x/",
            "http://u:%zz@hooks/",
            "http://u@/",
            "http://hooks/%zz",
            "http://hooks/a%2",
            "http://hooks/%?q",
            "http://hooks/a#%g0",
            "http://a b/",
            "mailto:a@b",
            "http://hooks/a\r\nX: y",
            "*",
        ] {
            assert_eq!(parse(url).unwrap_err(), CallbackUrlError::Url, "{url:?}");
        }
    }
}
