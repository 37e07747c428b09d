//! A queued call in the JSON format of the Go gateway and the Go worker, byte for byte. No I/O.

use std::collections::BTreeMap;
use std::io;

use bytes::Bytes;
use serde::Serialize;
use serde::de::{Deserialize, Deserializer, MapAccess};
use serde_json::ser::{CharEscape, CompactFormatter, Formatter, Serializer};
use serde_json::{Map, Value};

use crate::stan::callback::CallbackUrl;
use crate::stan::members::{self, Members, set_unless_null};

/// The members, in the order in which they are written. Empty ones are omitted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Payload {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) header: Option<BTreeMap<String, Vec<String>>>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) host: String,
    /// Base64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) body: Option<String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) method: String,
    /// The path after the function's name.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) path: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) query_string: String,
    pub(super) function: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) callback_url: Option<CallbackUrl>,
    /// Members that this gateway does not know.
    #[serde(flatten)]
    pub(super) unknown_members: Map<String, Value>,
}

impl Members for Payload {
    fn read_member<'de, A: MapAccess<'de>>(
        &mut self,
        name: &str,
        written: &str,
        map: &mut A,
    ) -> Result<(), A::Error> {
        match name {
            "header" => self.header = map.next_value()?,
            "host" => set_unless_null(&mut self.host, map)?,
            "body" => self.body = map.next_value()?,
            "method" => set_unless_null(&mut self.method, map)?,
            "path" => set_unless_null(&mut self.path, map)?,
            "querystring" => set_unless_null(&mut self.query_string, map)?,
            "function" => set_unless_null(&mut self.function, map)?,
            "callbackurl" => self.callback_url = map.next_value()?,
            _ => drop(self.unknown_members.insert(written.to_owned(), map.next_value()?)),
        }
        Ok(())
    }
}

impl<'de> Deserialize<'de> for Payload {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        members::read(deserializer)
    }
}

impl Payload {
    pub(super) fn to_json(&self) -> Bytes {
        let mut json = Vec::new();
        // Serializing these types to a vector does not fail.
        let _ = self.serialize(&mut Serializer::with_formatter(
            &mut json,
            GoJsonFormatter(CompactFormatter),
        ));
        json.into()
    }

    pub(super) fn from_json(json: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(json)
    }
}

/// Returns a header name in Go's canonical spelling.
pub(super) fn canonical_header_name(name: &str) -> String {
    let mut starts = true;
    let spell = |character: char| {
        let spelt =
            if starts { character.to_ascii_uppercase() } else { character.to_ascii_lowercase() };
        starts = character == '-';
        spelt
    };
    name.chars().map(spell).collect()
}

/// Formats JSON as Go does, which also escapes characters that are special in HTML and JavaScript.
struct GoJsonFormatter(CompactFormatter);

impl Formatter for GoJsonFormatter {
    fn write_string_fragment<W>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()>
    where
        W: ?Sized + io::Write,
    {
        let escaped = |c: char| matches!(c, '<' | '>' | '&' | '\u{2028}' | '\u{2029}');
        let mut rest = fragment;
        while let Some(at) = rest.find(escaped) {
            let (plain, behind) = rest.split_at(at);
            let character = behind.chars().next().unwrap_or_default();
            write!(writer, "{plain}\\u{:04x}", u32::from(character))?;
            rest = &behind[character.len_utf8()..];
        }
        writer.write_all(rest.as_bytes())
    }

    fn write_char_escape<W>(&mut self, writer: &mut W, escape: CharEscape) -> io::Result<()>
    where
        W: ?Sized + io::Write,
    {
        self.0.write_char_escape(writer, escape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_escaped_as_in_go() {
        let payload = Payload {
            function: "echo".to_owned(),
            query_string: "a=<1>&b=\"\\\u{2028}é\u{7f}\n\u{1}".to_owned(),
            ..Payload::default()
        };
        let expect = r#"{"QueryString":"a=\u003c1\u003e\u0026b=\"\\\u2028é"#.to_owned()
            + "\u{7f}"
            + r#"\n\u0001","Function":"echo"}"#;
        assert_eq!(payload.to_json(), expect);
        assert_eq!(Payload::from_json(expect.as_bytes()).unwrap(), payload);
    }

    #[test]
    fn a_header_name_is_spelled_as_in_go() {
        for (name, expect) in [
            ("x-call-id", "X-Call-Id"),
            ("etag", "Etag"),
            ("x-a_b.c-1d", "X-A_b.c-1d"),
            ("WWW-AUTHENTICATE", "Www-Authenticate"),
            ("-", "-"),
        ] {
            assert_eq!(canonical_header_name(name), expect);
        }
    }

    #[test]
    fn member_names_are_case_insensitive() {
        let json = br#"{"HEADER":{"X-a":["1"]},"host":"h","bODY":"eA==","method":"GET","PATH":"/p","querystring":"a=1","function":"f","CallbackURL":{"scheme":"http","HOST":"h","rawquery":"x"}}"#;
        let payload = Payload::from_json(json).unwrap();
        let expect = r#"{"Header":{"X-a":["1"]},"Host":"h","Body":"eA==","Method":"GET","Path":"/p","QueryString":"a=1","Function":"f","CallbackUrl":{"Scheme":"http","Opaque":"","User":null,"Host":"h","Path":"","Fragment":"","RawQuery":"x","RawPath":"","RawFragment":"","ForceQuery":false,"OmitHost":false}}"#;
        assert_eq!(payload.to_json(), expect);
        // The last duplicate wins.
        let json = br#"{"Path":"/a","path":"/b","Function":"f","FUNCTION":"g"}"#;
        let payload = Payload::from_json(json).unwrap();
        assert_eq!((payload.path.as_str(), payload.function.as_str()), ("/b", "g"));
    }

    #[test]
    fn members_may_be_missing_null_or_unknown() {
        let json = br#"{"Header":null,"Body":null,"Annotations":{"a":"b"},"CallbackUrl":null,"Function":"f"}"#;
        let mut expect = Payload { function: "f".to_owned(), ..Payload::default() };
        expect.unknown_members.insert("Annotations".to_owned(), serde_json::json!({ "a": "b" }));
        assert_eq!(Payload::from_json(json).unwrap(), expect);
        // Unknown members are preserved.
        assert_eq!(expect.to_json(), r#"{"Function":"f","Annotations":{"a":"b"}}"#);
        let json = br#"{"Host":null,"Function":"f","Function":null}"#;
        let expect = Payload { function: "f".to_owned(), ..Payload::default() };
        assert_eq!(Payload::from_json(json).unwrap(), expect);
        assert!(Payload::from_json(b"1").is_err());
        assert!(Payload::from_json(br#"{"Function":1}"#).is_err());
    }
}
