//! Ids that hint at their call's function. No I/O.
//!
//! A subject names function and call, and the server finds a subject quickly when all of it is known, but looks at each
//! there is when only the id is. So the last 32 bits of an id that is made here are the function's, mixed with the
//! others: whoever does not know the function sees a random UUID, and none can be guessed.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use uuid::Uuid;

use crate::function::Function;
use crate::queue::call::UnixMillis;

/// What follows the function's 16 bits: an id that somebody has chosen hardly ever has it.
const MADE_HERE: u16 = 0x6a73;
/// The same for a call that is stored in one message with others.
const MADE_TOGETHER: u16 = 0x6a74;

/// No more calls can be in one message.
pub(super) const MOST: usize = 1 << 6;

/// What the ids of calls in one message have in common, and hardly ever those of another: from the highest bit on 30 bits
/// of the time in milliseconds, 12 of who made it, and how many calls they are, less one. The other 42 bits of an id are
/// random, so that one who knows the id of a call knows none of the others'.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Key([u8; 6]);

/// Makes keys, no two of which are the same for some days.
pub(super) struct Keys {
    maker: AtomicU64,
    last: AtomicU64,
}

impl Keys {
    pub(super) fn new() -> Self {
        let keys = Self { maker: AtomicU64::new(0), last: AtomicU64::new(0) };
        keys.change();
        keys
    }

    /// Somebody else makes the same ones.
    pub(super) fn change(&self) {
        self.maker.store(Uuid::new_v4().as_u64_pair().1 % (1 << 12), Relaxed);
    }

    /// One for so many calls, at most [`MOST`].
    pub(super) fn next(&self, count: usize, now: UnixMillis) -> Key {
        let after = |last: u64| Some(now.max(last + 1));
        let last = self.last.fetch_update(Relaxed, Relaxed, after).unwrap_or_default();
        let count = count.clamp(1, MOST) as u64 - 1;
        Key::of_bits(now.max(last + 1) << 18 | self.maker.load(Relaxed) << 6 | count)
    }
}

impl Key {
    fn of_bits(bits: u64) -> Self {
        let [_, _, key @ ..] = bits.to_be_bytes();
        Self(key)
    }

    fn bits(self) -> u64 {
        let [a, b, c, d, e, f] = self.0;
        u64::from_be_bytes([0, 0, a, b, c, d, e, f])
    }

    /// How many calls they are.
    pub(super) fn count(self) -> usize {
        self.bits() as usize % MOST + 1
    }

    /// An id for one of the calls, which are of `function`.
    pub(super) fn id(self, function: &Function) -> String {
        let mut bytes = *Uuid::new_v4().as_bytes();
        bytes[..6].copy_from_slice(&self.0);
        finish(bytes, function, MADE_TOGETHER)
    }

    /// The key in an id, if its call is in one message with others.
    pub(super) fn of(id: &str) -> Option<Self> {
        let uuid = Uuid::try_parse(id).ok()?;
        let key = uuid.as_bytes().first_chunk().copied()?;
        (said(&uuid)? as u16 == MADE_TOGETHER).then_some(Self(key))
    }

    /// As one token of a subject. No id is written so.
    pub(super) fn token(self) -> String {
        format!("+{:012x}", self.bits())
    }

    /// The key that was written so.
    pub(super) fn of_token(token: &str) -> Option<Self> {
        let digits = token.strip_prefix('+').filter(|digits| digits.len() == 12)?;
        let key = u64::from_str_radix(digits, 16).ok().map(Self::of_bits)?;
        // The same number may be written in other ways.
        (key.token() == token).then_some(key)
    }
}

/// An id for a call of `function`.
pub(super) fn fresh(function: &Function) -> String {
    finish(*Uuid::new_v4().as_bytes(), function, MADE_HERE)
}

fn finish(mut bytes: [u8; 16], function: &Function, made: u16) -> String {
    let said = (u32::from(short(function)) << 16 | u32::from(made)) ^ mixed(&bytes);
    bytes[12..].copy_from_slice(&said.to_be_bytes());
    Uuid::from_bytes(bytes).to_string()
}

/// Whether `id` says that its call may be of `function`; `None` if it says nothing, for it was not made here.
pub(super) fn may_be_of(id: &str) -> Option<impl Fn(&Function) -> bool + use<>> {
    let said = said(&Uuid::try_parse(id).ok()?)?;
    let [high, low] = [said >> 16, said & 0xffff].map(|half| half as u16);
    let made = [MADE_HERE, MADE_TOGETHER].contains(&low);
    made.then_some(move |function: &Function| short(function) == high)
}

/// What the last bits of an id say.
fn said(uuid: &Uuid) -> Option<u32> {
    let bytes = uuid.as_bytes();
    let (_, said) = bytes.split_last_chunk::<4>()?;
    Some(u32::from_be_bytes(*said) ^ mixed(bytes))
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
    fn ids_of_one_message_have_its_key_and_nothing_else_in_common() {
        let echo = function("echo");
        for count in [1, 2, 33, 64] {
            let key = Keys::new().next(count, 1_764_323_501_123);
            assert_eq!((key.count(), Key::of_token(&key.token())), (count, Some(key)));
            let ids = [key.id(&echo), key.id(&echo)];
            for id in &ids {
                assert_eq!(Uuid::parse_str(id).unwrap().get_version_num(), 4);
                assert!(may_be_of(id).unwrap()(&echo));
                assert_eq!(Key::of(id), Some(key));
            }
            assert_ne!(ids[0][14..], ids[1][14..]);
        }
        assert_eq!(Key::of(&fresh(&echo)), None);
        for text in ["+1", "0123456789ab", "++12345678901", "+0123456789AB"] {
            assert_eq!(Key::of_token(text), None, "{text}");
        }
    }

    #[test]
    fn no_key_comes_twice() {
        let keys = Keys::new();
        let made: std::collections::HashSet<_> =
            [5, 5, 4, 6, 6].map(|now| keys.next(32, now)).into_iter().collect();
        assert_eq!(made.len(), 5);
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
