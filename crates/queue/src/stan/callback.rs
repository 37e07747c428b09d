//! A callback URL in the structure of Go's `url.URL`. No I/O.

use serde::Serialize;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess};
use serde_json::{Map, Value};

use crate::stan::members::{self, Members, set_unless_null};

/// The members, in the order in which Go writes them.
///
/// User name and password are not included: Go writes only that they exist.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct CallbackUrl {
    scheme: String,
    opaque: String,
    user: Option<Map<String, Value>>,
    host: String,
    /// Percent-decoded.
    path: String,
    fragment: String,
    raw_query: String,
    /// The original text, if encoding the decoded one would give another.
    raw_path: String,
    raw_fragment: String,
    /// The URL ends with an empty query (`?`).
    force_query: bool,
    omit_host: bool,
}

impl Members for CallbackUrl {
    fn read_member<'de, A: MapAccess<'de>>(
        &mut self,
        name: &str,
        _: &str,
        map: &mut A,
    ) -> Result<(), A::Error> {
        match name {
            "scheme" => set_unless_null(&mut self.scheme, map),
            "opaque" => set_unless_null(&mut self.opaque, map),
            "user" => map.next_value().map(|user| self.user = user),
            "host" => set_unless_null(&mut self.host, map),
            "path" => set_unless_null(&mut self.path, map),
            "fragment" => set_unless_null(&mut self.fragment, map),
            "rawquery" => set_unless_null(&mut self.raw_query, map),
            "rawpath" => set_unless_null(&mut self.raw_path, map),
            "rawfragment" => set_unless_null(&mut self.raw_fragment, map),
            "forcequery" => set_unless_null(&mut self.force_query, map),
            "omithost" => set_unless_null(&mut self.omit_host, map),
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
    /// Parses an absolute URL; `None` if `url` is not one.
    pub(super) fn parse(url: &str) -> Option<Self> {
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
        let (path, raw_path) = decode_and_raw(path, is_plain_in_path);
        let (fragment, raw_fragment) = decode_and_raw(fragment, is_plain_in_fragment);
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

    /// Returns the URL. `written` is the client's original text, the only source of user name and password.
    pub(super) fn to_url(&self, written: Option<&str>) -> String {
        if self.user.is_some()
            && let Some(written) = written
            && Self::parse(written).as_ref() == Some(self)
        {
            return written.to_owned();
        }
        let path = match self.raw_path.as_str() {
            "" => percent_encode(&self.path, is_plain_in_path),
            raw => raw.to_owned(),
        };
        let fragment = match self.raw_fragment.as_str() {
            "" => percent_encode(&self.fragment, is_plain_in_fragment),
            raw => raw.to_owned(),
        };
        let mark = if self.raw_query.is_empty() && !self.force_query { "" } else { "?" };
        let hash = if fragment.is_empty() { "" } else { "#" };
        let Self { scheme, host, raw_query, .. } = self;
        format!("{scheme}://{host}{path}{mark}{raw_query}{hash}{fragment}")
    }
}

/// Returns `text` decoded, and the original if encoding the decoded text would not restore it.
fn decode_and_raw(text: &str, is_plain: fn(u8) -> bool) -> (String, String) {
    match percent_decode(text) {
        Some(decoded) if percent_encode(&decoded, is_plain) == text => (decoded, String::new()),
        Some(decoded) => (decoded, text.to_owned()),
        None => (text.to_owned(), String::new()),
    }
}

/// Decodes percent-encoding; `None` if an escape is invalid or the result is not UTF-8.
fn percent_decode(text: &str) -> Option<String> {
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

/// Percent-encodes all bytes of `text` that `is_plain` rejects.
pub(super) fn percent_encode(text: &str, is_plain: fn(u8) -> bool) -> String {
    use std::fmt::Write as _;
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match is_plain(byte) {
            true => encoded.push(char::from(byte)),
            // Writing to a string does not fail.
            false => drop(write!(encoded, "%{byte:02X}")),
        }
    }
    encoded
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
        serde_json::to_string(&CallbackUrl::parse(url).unwrap()).unwrap()
    }

    #[test]
    fn a_url_is_parsed_as_go_does() {
        let recorded = r#"{"Scheme":"http","Opaque":"","User":{},"Host":"127.0.0.1:8081","Path":"/function/callback","Fragment":"frag","RawQuery":"x=1","RawPath":"","RawFragment":"","ForceQuery":false,"OmitHost":false}"#;
        assert_eq!(json("http://user:pw@127.0.0.1:8081/function/callback?x=1#frag"), recorded);
        let bare = r#"{"Scheme":"https","Opaque":"","User":null,"Host":"h","Path":"","Fragment":"","RawQuery":"","RawPath":"","RawFragment":"","ForceQuery":true,"OmitHost":false}"#;
        assert_eq!(json("HTTPS://h?"), bare);
    }

    #[test]
    fn the_original_is_kept_if_decoding_loses_information() {
        for (url, path, raw) in [
            ("http://h/a%20b", "/a b", ""),
            ("http://h/a%2Fb", "/a/b", "/a%2Fb"),
            ("http://h/a!b", "/a!b", "/a!b"),
            ("http://h/%c3%a9", "/é", "/%c3%a9"),
            ("http://h/%zz", "/%zz", ""),
            ("http://h/100%", "/100%", ""),
        ] {
            let parsed = CallbackUrl::parse(url).unwrap();
            assert_eq!((parsed.path.as_str(), parsed.raw_path.as_str()), (path, raw), "{url}");
        }
    }

    #[test]
    fn a_parsed_url_is_restored() {
        for url in [
            "http://h",
            "http://h:1/a%2Fb?c=%20&d",
            "https://[::1]:2/a%20b?",
            "http://h/!?a?b",
            "http://user:pw@h/x?y",
            "http://h/#a?!%20b",
        ] {
            assert_eq!(CallbackUrl::parse(url).unwrap().to_url(Some(url)), url);
        }
        let parsed = CallbackUrl::parse("http://user:pw@h/x#f").unwrap();
        assert_eq!(parsed.to_url(Some("http://user:pw@h/x#f")), "http://user:pw@h/x#f");
        // Credentials are used only for the URL that they were given for.
        assert_eq!(parsed.to_url(Some("http://user:pw@elsewhere/x#f")), "http://h/x#f");
        assert_eq!(parsed.to_url(None), "http://h/x#f");
        assert_eq!(CallbackUrl::parse("h/x"), None);
    }
}
