//! Ids with a call's number in them, hidden: a call is found by its id without a table in the order of random ids,
//! which would be half of what a queued call costs. No I/O.

use ring::hmac;
use uuid::Uuid;

use crate::queue::embedded::schedule::Number;

/// The bits of a number that fit an id.
const NUMBER: u64 = (1 << 48) - 1;

/// Makes ids and reads them. They are UUIDs of version 4, of which 74 bits are random; the other 48 are the number,
/// mixed with what the random ones and a secret give, so that nobody sees how many calls there are.
#[derive(Debug)]
pub(super) struct Ids {
    secret: [u8; 16],
    key: hmac::Key,
}

impl Ids {
    /// With a secret of their own.
    pub(super) fn fresh() -> Self {
        Self::with(Uuid::new_v4().into_bytes())
    }

    /// With a secret that is known.
    pub(super) fn from_secret(secret: &[u8]) -> Option<Self> {
        Some(Self::with(secret.try_into().ok()?))
    }

    fn with(secret: [u8; 16]) -> Self {
        // One that gives the same in every version to come.
        Self { secret, key: hmac::Key::new(hmac::HMAC_SHA256, &secret) }
    }

    pub(super) fn secret(&self) -> [u8; 16] {
        self.secret
    }

    /// An id for the call with this number.
    pub(super) fn make(&self, number: Number) -> String {
        let mut bytes = Uuid::new_v4().into_bytes();
        let hidden = (number ^ self.mask(&bytes)) & NUMBER;
        bytes[..6].copy_from_slice(&hidden.to_be_bytes()[2..]);
        Uuid::from_bytes(bytes).to_string()
    }

    /// Whether `id` looks as if it had a number in it.
    pub(super) fn looks_numbered(id: &str) -> bool {
        Uuid::try_parse(id).is_ok_and(|id| id.get_version_num() == 4)
    }

    /// The number that `id` has in it, if it was made here; any number if it was not.
    pub(super) fn number_in(&self, id: &str) -> Option<Number> {
        let id = Uuid::try_parse(id).ok().filter(|id| id.get_version_num() == 4)?;
        let bytes = id.as_bytes();
        let mut hidden = [0; 8];
        hidden[2..].copy_from_slice(&bytes[..6]);
        Some((Number::from_be_bytes(hidden) ^ self.mask(bytes)) & NUMBER)
    }

    fn mask(&self, bytes: &[u8; 16]) -> u64 {
        let tag = hmac::sign(&self.key, &bytes[6..]);
        let first = tag.as_ref().first_chunk().copied();
        u64::from_be_bytes(first.unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_found_in_its_id_and_the_id_tells_nothing_else() {
        let ids = Ids::fresh();
        for number in [0, 1, 2, 0x1234_5678_9abc] {
            let id = ids.make(number);
            assert_eq!((ids.number_in(&id), id.len()), (Some(number), 36));
            assert_eq!(Uuid::parse_str(&id).unwrap().get_version_num(), 4);
            assert_ne!(id[..13], ids.make(number)[..13]);
        }
        assert_eq!(ids.number_in("mine"), None);
        assert!(Ids::looks_numbered(&ids.make(3)) && !Ids::looks_numbered("mine"));
    }

    #[test]
    fn ids_of_before_a_restart_are_read() {
        let ids = Ids::fresh();
        let again = Ids::from_secret(&ids.secret()).unwrap();
        assert_eq!(again.number_in(&ids.make(7)), Some(7));
    }
}
