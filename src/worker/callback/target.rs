//! Where one callback goes. No I/O.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::uri::{Authority, Scheme};
use http::{HeaderValue, Uri};

use crate::config::base_url::BaseUrl;
use crate::proxy::client::Origin;

/// Why a URL is none to call back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    #[error("the callback's URL is not an absolute http(s) URL")]
    Url,
    #[error("the callback's address is not allowed")]
    NotAllowed,
}

/// A callback's URL, taken apart. Shows neither its credentials nor its path, which may hold a token.
pub struct Target {
    pub(super) origin: Origin,
    /// Path and query.
    pub(super) uri: Uri,
    /// The credentials that stood in the URL.
    pub(super) authorization: Option<HeaderValue>,
}

impl Target {
    /// Takes an absolute http(s) URL apart; a fragment is dropped. Where it leads is judged when it is connected to.
    ///
    /// # Errors
    /// When it is not one.
    pub fn parse(url: &str) -> Result<Self, Invalid> {
        let (rest, fragment) = url.split_once('#').unwrap_or((url, ""));
        // In the query a lone `%` is common, and Go takes it, too.
        let path = rest.split_once('?').map_or(rest, |(path, _)| path);
        if decoded(path).is_none() || decoded(fragment).is_none() {
            return Err(Invalid::Url);
        }
        let uri: Uri = url.trim().parse().map_err(|_| Invalid::Url)?;
        let tls = match uri.scheme() {
            Some(scheme) if *scheme == Scheme::HTTPS => true,
            Some(scheme) if *scheme == Scheme::HTTP => false,
            _ => return Err(Invalid::Url),
        };
        let authority = uri.authority().ok_or(Invalid::Url)?.as_str();
        let (user, place) = match authority.rsplit_once('@') {
            Some((user, place)) => (Some(user), place),
            None => (None, authority),
        };
        let authority: Authority = place.parse().map_err(|_| Invalid::Url)?;
        let behind_host = place.strip_prefix(authority.host()).unwrap_or_default();
        if authority.host().is_empty() || !is_port(behind_host) {
            return Err(Invalid::Url);
        }
        let base = BaseUrl { tls, authority, path: String::new() };
        // `[]` is a host to the URL's parser.
        if base.host().is_empty() {
            return Err(Invalid::Url);
        }
        let path = uri.path_and_query().cloned().ok_or(Invalid::Url)?;
        let authorization = user.map(basic).transpose()?;
        Ok(Self { origin: Origin::new(base), uri: Uri::from(path), authorization })
    }
}

/// For logs: who is called, and no more.
impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.origin.url.fmt(f)
    }
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Target({self})")
    }
}

/// Nothing, `:`, or a port that is one.
fn is_port(text: &str) -> bool {
    match text.strip_prefix(':') {
        Some(port) => port.is_empty() || port.parse::<u16>().is_ok_and(|port| port > 0),
        None => text.is_empty(),
    }
}

/// `user:password`, as it stands in a URL, as a header.
fn basic(user: &str) -> Result<HeaderValue, Invalid> {
    let mut plain = decoded(user).ok_or(Invalid::Url)?;
    if !user.contains(':') {
        plain.push(b':');
    }
    let text = format!("Basic {}", STANDARD.encode(plain));
    let mut header =
        HeaderValue::from_maybe_shared(bytes::Bytes::from(text)).map_err(|_| Invalid::Url)?;
    header.set_sensitive(true);
    Ok(header)
}

/// Undoes percent-encoding; `None` if it is broken.
fn decoded(text: &str) -> Option<Vec<u8>> {
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

    fn parse(url: &str) -> Result<Target, Invalid> {
        Target::parse(url)
    }

    #[test]
    fn a_url_is_taken_apart() {
        for (url, place, path) in [
            ("http://hooks/a?b=c&d", "http://hooks", "/a?b=c&d"),
            ("HTTPS://hooks:8443", "https://hooks:8443", "/"),
            ("http://[fd00::1]:81/x/", "http://[fd00::1]:81", "/x/"),
            (" http://hooks/a#part ", "http://hooks", "/a"),
            ("http://hooks:/a", "http://hooks:", "/a"),
            ("http://hooks?q", "http://hooks", "/?q"),
            ("http://hooks/a%2Fb?c=50%&d=%zz", "http://hooks", "/a%2Fb?c=50%&d=%zz"),
        ] {
            let target = parse(url).unwrap();
            assert_eq!(target.to_string(), place, "{url:?}");
            assert_eq!(target.uri.to_string(), path, "{url:?}");
            assert_eq!(target.authorization, None, "{url:?}");
        }
    }

    #[test]
    fn credentials_become_a_header_and_are_never_shown() {
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
    fn what_is_no_url_is_refused() {
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
            assert_eq!(parse(url).unwrap_err(), Invalid::Url, "{url:?}");
        }
    }
}
