//! A callback's URL as Go takes it apart. No I/O.

use serde::Serialize;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess};
use serde_json::{Map, Value};

use crate::queue::stan::members::{self, Members, set};

/// The parts, in the order in which they are written.
///
/// User and password have no place in it: Go writes that there are some, and not which.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct CallbackUrl {
    scheme: String,
    opaque: String,
    user: Option<Map<String, Value>>,
    host: String,
    /// Decoded.
    path: String,
    fragment: String,
    raw_query: String,
    /// As it was written, unless that is what the decoded one is written as.
    raw_path: String,
    raw_fragment: String,
    /// There is a `?`, and nothing behind it.
    force_query: bool,
    omit_host: bool,
}

impl Members for CallbackUrl {
    fn read<'de, A: MapAccess<'de>>(
        &mut self,
        name: &str,
        _: &str,
        map: &mut A,
    ) -> Result<(), A::Error> {
        match name {
            "scheme" => set(&mut self.scheme, map),
            "opaque" => set(&mut self.opaque, map),
            "user" => map.next_value().map(|user| self.user = user),
            "host" => set(&mut self.host, map),
            "path" => set(&mut self.path, map),
            "fragment" => set(&mut self.fragment, map),
            "rawquery" => set(&mut self.raw_query, map),
            "rawpath" => set(&mut self.raw_path, map),
            "rawfragment" => set(&mut self.raw_fragment, map),
            "forcequery" => set(&mut self.force_query, map),
            "omithost" => set(&mut self.omit_host, map),
            _ => map.next_value::<IgnoredAny>().map(drop),
        }
    }
}

impl<'de> Deserialize<'de> for CallbackUrl {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        members::read(deserializer)
    }
}

impl CallbackUrl {
    /// Takes an absolute URL apart; `None` if it is none.
    pub(super) fn of(url: &str) -> Option<Self> {
        let (scheme, rest) = url.split_once("://")?;
        let (rest, fragment) = rest.split_once('#').unwrap_or((rest, ""));
        let (rest, query) = match rest.split_once('?') {
            Some((rest, query)) => (rest, Some(query)),
            None => (rest, None),
        };
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let (user, host) = match authority.rsplit_once('@') {
            Some((_, host)) => (Some(Map::new()), host),
            None => (None, authority),
        };
        let (path, raw_path) = both(path, is_plain_in_path);
        let (fragment, raw_fragment) = both(fragment, is_plain_in_fragment);
        Some(Self {
            scheme: scheme.to_ascii_lowercase(),
            user,
            host: host.to_owned(),
            path,
            fragment,
            raw_query: query.unwrap_or_default().to_owned(),
            raw_path,
            raw_fragment,
            force_query: query == Some(""),
            ..Self::default()
        })
    }

    /// The URL. `written` is how its caller wrote it, which alone has user and password.
    pub(super) fn url(&self, written: Option<&str>) -> String {
        if self.user.is_some()
            && let Some(written) = written
            && Self::of(written).as_ref() == Some(self)
        {
            return written.to_owned();
        }
        let path = match self.raw_path.as_str() {
            "" => escaped(&self.path, is_plain_in_path),
            raw => raw.to_owned(),
        };
        let fragment = match self.raw_fragment.as_str() {
            "" => escaped(&self.fragment, is_plain_in_fragment),
            raw => raw.to_owned(),
        };
        let mark = if self.raw_query.is_empty() && !self.force_query { "" } else { "?" };
        let hash = if fragment.is_empty() { "" } else { "#" };
        let Self { scheme, host, raw_query, .. } = self;
        format!("{scheme}://{host}{path}{mark}{raw_query}{hash}{fragment}")
    }
}

/// `text` decoded, and as it is unless that is what the decoded one is written as.
fn both(text: &str, is_plain: fn(u8) -> bool) -> (String, String) {
    match decoded(text) {
        Some(decoded) if escaped(&decoded, is_plain) == text => (decoded, String::new()),
        Some(decoded) => (decoded, text.to_owned()),
        None => (text.to_owned(), String::new()),
    }
}

/// `None` if an escape is none, or what it stands for is no text.
fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, behind)) = rest.split_first() {
        rest = behind;
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digits = behind.get(..2).filter(|digits| digits.iter().all(u8::is_ascii_hexdigit))?;
        bytes.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?);
        rest = &behind[2..];
    }
    String::from_utf8(bytes).ok()
}

/// `text` with all escaped that `is_plain` does not take.
pub(super) fn escaped(text: &str, is_plain: fn(u8) -> bool) -> String {
    use std::fmt::Write as _;
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        match is_plain(byte) {
            true => escaped.push(char::from(byte)),
            // A string takes all.
            false => drop(write!(escaped, "%{byte:02X}")),
        }
    }
    escaped
}

fn is_plain_in_path(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-_.~$&+,/:;=@".contains(&byte)
}

fn is_plain_in_fragment(byte: u8) -> bool {
    is_plain_in_path(byte) || b"?!()*".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(url: &str) -> String {
        serde_json::to_string(&CallbackUrl::of(url).unwrap()).unwrap()
    }

    #[test]
    fn a_url_is_taken_apart_as_go_does() {
        let recorded = r#"{"Scheme":"http","Opaque":"","User":{},"Host":"127.0.0.1:8081","Path":"/function/callback","Fragment":"frag","RawQuery":"x=1","RawPath":"","RawFragment":"","ForceQuery":false,"OmitHost":false}"#;
        assert_eq!(json("http://user:pw@127.0.0.1:8081/function/callback?x=1#frag"), recorded);
        let bare = r#"{"Scheme":"https","Opaque":"","User":null,"Host":"h","Path":"","Fragment":"","RawQuery":"","RawPath":"","RawFragment":"","ForceQuery":true,"OmitHost":false}"#;
        assert_eq!(json("HTTPS://h?"), bare);
    }

    #[test]
    fn what_decoding_would_lose_is_kept_beside_it() {
        for (url, path, raw) in [
            ("http://h/a%20b", "/a b", ""),
            ("http://h/a%2Fb", "/a/b", "/a%2Fb"),
            ("http://h/a!b", "/a!b", "/a!b"),
            ("http://h/%c3%a9", "/é", "/%c3%a9"),
            ("http://h/%zz", "/%zz", ""),
            ("http://h/100%", "/100%", ""),
        ] {
            let taken = CallbackUrl::of(url).unwrap();
            assert_eq!((taken.path.as_str(), taken.raw_path.as_str()), (path, raw), "{url}");
        }
    }

    #[test]
    fn it_is_put_together_again() {
        for url in [
            "http://h",
            "http://h:1/a%2Fb?c=%20&d",
            "https://[::1]:2/a%20b?",
            "http://h/!?a?b",
            "http://user:pw@h/x?y",
            "http://h/#a?!%20b",
        ] {
            assert_eq!(CallbackUrl::of(url).unwrap().url(Some(url)), url);
        }
        let taken = CallbackUrl::of("http://user:pw@h/x#f").unwrap();
        assert_eq!(taken.url(Some("http://user:pw@h/x#f")), "http://user:pw@h/x#f");
        // Credentials go nowhere but where they were meant to.
        assert_eq!(taken.url(Some("http://user:pw@elsewhere/x#f")), "http://h/x#f");
        assert_eq!(taken.url(None), "http://h/x#f");
        assert_eq!(CallbackUrl::of("h/x"), None);
    }
}
