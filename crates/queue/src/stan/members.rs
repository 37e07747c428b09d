//! Members of JSON objects as Go reads them: names are case-insensitive, the last duplicate wins, and `null` leaves a
//! text unchanged. No I/O.

use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

/// A type that is deserialized member by member.
pub(super) trait Members: Default {
    /// Reads the value of the member `name` (in lower case), which the JSON spells `written`.
    fn read_member<'de, A: MapAccess<'de>>(
        &mut self,
        name: &str,
        written: &str,
        map: &mut A,
    ) -> Result<(), A::Error>;
}

/// Deserializes an object.
pub(super) fn read<'de, M: Members, D: Deserializer<'de>>(deserializer: D) -> Result<M, D::Error> {
    deserializer.deserialize_map(MembersVisitor(PhantomData))
}

/// Reads a value into `member`, which `null` leaves unchanged.
pub(super) fn set_unless_null<'de, A: MapAccess<'de>, T: Deserialize<'de>>(
    member: &mut T,
    map: &mut A,
) -> Result<(), A::Error> {
    if let Some(value) = map.next_value()? {
        *member = value;
    }
    Ok(())
}

struct MembersVisitor<M>(PhantomData<M>);

impl<'de, M: Members> Visitor<'de> for MembersVisitor<M> {
    type Value = M;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<M, A::Error> {
        let mut members = M::default();
        while let Some(written) = map.next_key::<String>()? {
            members.read_member(&fold_name(&written), &written, &mut map)?;
        }
        Ok(members)
    }
}

/// Folds names that Go treats as equal to the same text. Unicode includes the Kelvin sign (`k`) and the long s (`s`).
fn fold_name(name: &str) -> String {
    match name.is_ascii() {
        true => name.to_ascii_lowercase(),
        false => name.to_uppercase().to_lowercase(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_folded_as_go_does() {
        for name in ["QueryString", "querystring", "QUERYSTRING", "query\u{17f}tring"] {
            assert_eq!(fold_name(name), "querystring", "{name}");
        }
        assert_eq!(fold_name("Callbac\u{212a}Url"), "callbackurl");
        assert_ne!(fold_name("Query_String"), "querystring");
    }
}
