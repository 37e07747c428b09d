//! Members of JSON objects as Go reads them: their names match without regard to case, the last one of a name counts, and
//! `null` leaves text as it is. No I/O.

use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

/// What is read member by member.
pub(super) trait Members: Default {
    /// Reads the value of the member with that name, which is in lower case as `name` and as it was written as `written`.
    fn read<'de, A: MapAccess<'de>>(
        &mut self,
        name: &str,
        written: &str,
        map: &mut A,
    ) -> Result<(), A::Error>;
}

/// Reads an object.
pub(super) fn read<'de, M: Members, D: Deserializer<'de>>(deserializer: D) -> Result<M, D::Error> {
    deserializer.deserialize_map(Object(PhantomData))
}

/// Reads a value into `member`, which stays as it is if there is none.
pub(super) fn set<'de, A: MapAccess<'de>, T: Deserialize<'de>>(
    member: &mut T,
    map: &mut A,
) -> Result<(), A::Error> {
    if let Some(value) = map.next_value()? {
        *member = value;
    }
    Ok(())
}

struct Object<M>(PhantomData<M>);

impl<'de, M: Members> Visitor<'de> for Object<M> {
    type Value = M;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<M, A::Error> {
        let mut members = M::default();
        while let Some(written) = map.next_key::<String>()? {
            members.read(&folded(&written), &written, &mut map)?;
        }
        Ok(members)
    }
}

/// The same for names that Go takes for the same. The Kelvin sign is a `k` as well, and the long s an `s`.
fn folded(name: &str) -> String {
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
            assert_eq!(folded(name), "querystring", "{name}");
        }
        assert_eq!(folded("Callbac\u{212a}Url"), "callbackurl");
        assert_ne!(folded("Query_String"), "querystring");
    }
}
