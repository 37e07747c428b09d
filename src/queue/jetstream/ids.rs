//! Ids that hint at their call's function. No I/O.
//!
//! A subject names function and call, and the server finds a subject quickly when all of it is known, but looks at each
//! there is when only the id is. So the last 32 bits of an id that is made here are the function's, mixed with the
//! others: whoever does not know the function sees a random UUID, and none can be guessed.

use uuid::Uuid;

use crate::function::Function;

/// What follows the function's 16 bits: an id that somebody has chosen hardly ever has it.
const MADE_HERE: u16 = 0x6a73;

/// An id for a call of `function`.
pub(super) fn fresh(function: &Function) -> String {
    let mut bytes = *Uuid::new_v4().as_bytes();
    let said = (u32::from(short(function)) << 16 | u32::from(MADE_HERE)) ^ mixed(&bytes);
    bytes[12..].copy_from_slice(&said.to_be_bytes());
    Uuid::from_bytes(bytes).to_string()
}

/// Whether `id` says that its call may be of `function`; `None` if it says nothing, for it was not made here.
pub(super) fn may_be_of(id: &str) -> Option<impl Fn(&Function) -> bool + use<>> {
    let uuid = Uuid::try_parse(id).ok()?;
    let bytes = uuid.as_bytes();
    let (_, said) = bytes.split_last_chunk::<4>()?;
    let said = u32::from_be_bytes(*said) ^ mixed(bytes);
    let [high, low] = [said >> 16, said & 0xffff].map(|half| half as u16);
    (low == MADE_HERE).then_some(move |function: &Function| short(function) == high)
}

/// A function in 16 bits.
fn short(function: &Function) -> u16 {
    let hash =
        fnv([function.namespace.as_bytes(), b"/", function.name.as_bytes()].concat().as_slice());
    (hash >> 48) as u16
}

/// The random part of an id, in 32 bits.
fn mixed(bytes: &[u8; 16]) -> u32 {
    (fnv(&bytes[..12]) >> 32) as u32
}

/// FNV-1a, and then mixed once more, as its high bits depend little on the last bytes. Every gateway must make the same.
fn fnv(bytes: &[u8]) -> u64 {
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    (hash ^ hash >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function(name: &str) -> Function {
        Function { name: name.to_owned(), namespace: "fn".to_owned() }
    }

    #[test]
    fn an_id_is_a_uuid_that_knows_its_function() {
        let (echo, other) = (function("echo"), function("other"));
        let ids: std::collections::HashSet<String> = (0..1000).map(|_| fresh(&echo)).collect();
        assert_eq!(ids.len(), 1000);
        for id in ids {
            assert_eq!(Uuid::parse_str(&id).unwrap().get_version_num(), 4);
            let of = may_be_of(&id).unwrap();
            assert!(of(&echo) && !of(&other));
        }
    }

    #[test]
    fn one_that_was_not_made_here_says_nothing() {
        let chosen = (0..1000).filter(|_| may_be_of(&Uuid::new_v4().to_string()).is_some());
        assert!(chosen.count() < 5);
        for id in ["", "a", "b0a1"] {
            assert!(may_be_of(id).is_none());
        }
    }

    #[test]
    fn all_bits_of_a_short_name_count() {
        let short: std::collections::HashSet<u16> =
            (0..1000).map(|number| short(&function(&format!("f{number}")))).collect();
        assert!(short.len() > 950, "{}", short.len());
    }
}
