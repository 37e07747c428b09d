//! Call ids that contain a hash of the function. No I/O.
//!
//! A subject contains the function and the call id. The server finds a full subject quickly, but scans all subjects if
//! only the id is known. So the last 32 bits of a generated id encode the function, masked with a hash of the other
//! bits. Without knowledge of the function, the id looks like a random UUID, and ids cannot be guessed.
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use uuid::Uuid;

use crate::call::UnixMillis;
use gateway_base::function::Function;

/// Tag that follows the 16 bits of the function; ids chosen by clients rarely have it by chance.
const TAG_SINGLE: u16 = 0x6a73;
/// Tag of calls that were published in a batch.
const TAG_BATCHED: u16 = 0x6a74;

/// Maximum number of calls that a batch key can encode.
pub(in crate::jetstream) const MAX_KEY_CALLS: usize = 1 << 6;

/// Common prefix of the ids of all calls in a batch, 48 bits: 30 bits of the time in milliseconds, 12 bits of the node,
/// and 6 bits of the number of calls minus one. 42 other bits of each id are random, so an id does not reveal those of
/// other calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(in crate::jetstream) struct BatchKey([u8; 6]);

/// Generates batch keys; a key is not repeated for some days.
pub(in crate::jetstream) struct BatchKeys {
    node: AtomicU64,
    last: AtomicU64,
}

impl BatchKeys {
    pub(in crate::jetstream) fn new() -> Self {
        let keys = Self { node: AtomicU64::new(0), last: AtomicU64::new(0) };
        keys.change_node();
        keys
    }

    /// Picks another node number, since another process uses the same.
    pub(in crate::jetstream) fn change_node(&self) {
        self.node.store(Uuid::new_v4().as_u64_pair().1 % (1 << 12), Relaxed);
    }

    /// Returns a new key for `count` calls, at most [`MAX_KEY_CALLS`].
    pub(in crate::jetstream) fn next(&self, count: usize, now: UnixMillis) -> BatchKey {
        let after = |last: u64| Some(now.max(last + 1));
        let last = self.last.fetch_update(Relaxed, Relaxed, after).unwrap_or_default();
        let count = count.clamp(1, MAX_KEY_CALLS) as u64 - 1;
        BatchKey::from_bits(now.max(last + 1) << 18 | self.node.load(Relaxed) << 6 | count)
    }
}

impl BatchKey {
    fn from_bits(bits: u64) -> Self {
        let [_, _, key @ ..] = bits.to_be_bytes();
        Self(key)
    }

    fn bits(self) -> u64 {
        let [a, b, c, d, e, f] = self.0;
        u64::from_be_bytes([0, 0, a, b, c, d, e, f])
    }

    /// Returns the number of calls in the batch.
    pub(in crate::jetstream) fn count(self) -> usize {
        self.bits() as usize % MAX_KEY_CALLS + 1
    }

    /// Returns an id for a call of the batch.
    pub(in crate::jetstream) fn new_call_id(self, function: &Function) -> String {
        let mut bytes = *Uuid::new_v4().as_bytes();
        bytes[..6].copy_from_slice(&self.0);
        encode_id(bytes, function, TAG_BATCHED)
    }

    /// Returns the key in `id`, if the call was published in a batch.
    pub(in crate::jetstream) fn from_id(id: &str) -> Option<Self> {
        let uuid = Uuid::try_parse(id).ok()?;
        let key = uuid.as_bytes().first_chunk().copied()?;
        (decode_tag(&uuid)? as u16 == TAG_BATCHED).then_some(Self(key))
    }

    /// Formats the key as one token of a subject. It differs from the token of any id.
    pub(in crate::jetstream) fn token(self) -> String {
        format!("+{:012x}", self.bits())
    }

    /// Parses a token.
    pub(in crate::jetstream) fn from_token(token: &str) -> Option<Self> {
        let digits = token.strip_prefix('+').filter(|digits| digits.len() == 12)?;
        let key = u64::from_str_radix(digits, 16).ok().map(Self::from_bits)?;
        // Rejects other spellings of the same number.
        (key.token() == token).then_some(key)
    }
}

/// Returns a new id for a call of `function` that has its own message.
pub(in crate::jetstream) fn new_call_id(function: &Function) -> String {
    encode_id(*Uuid::new_v4().as_bytes(), function, TAG_SINGLE)
}

fn encode_id(mut bytes: [u8; 16], function: &Function, tag: u16) -> String {
    let encoded = (u32::from(function_hash(function)) << 16 | u32::from(tag)) ^ mask(&bytes);
    bytes[12..].copy_from_slice(&encoded.to_be_bytes());
    Uuid::from_bytes(bytes).to_string()
}

/// Returns a filter for the functions that the call `id` may belong to, or `None` if the id was chosen by a client.
pub(in crate::jetstream) fn function_filter(
    id: &str,
) -> Option<impl Fn(&Function) -> bool + use<>> {
    let encoded = decode_tag(&Uuid::try_parse(id).ok()?)?;
    let [high, low] = [encoded >> 16, encoded & 0xffff].map(|half| half as u16);
    let tag = [TAG_SINGLE, TAG_BATCHED].contains(&low);
    tag.then_some(move |function: &Function| function_hash(function) == high)
}

/// Decodes the last 32 bits of an id: function hash and tag.
fn decode_tag(uuid: &Uuid) -> Option<u32> {
    let bytes = uuid.as_bytes();
    let (_, encoded) = bytes.split_last_chunk::<4>()?;
    Some(u32::from_be_bytes(*encoded) ^ mask(bytes))
}

/// Hashes a function to 16 bits.
fn function_hash(function: &Function) -> u16 {
    let hash =
        fnv([function.namespace.as_bytes(), b"/", function.name.as_bytes()].concat().as_slice());
    (hash >> 48) as u16
}

/// Hashes the other bits of an id to 32 bits.
fn mask(bytes: &[u8; 16]) -> u32 {
    (fnv(&bytes[..12]) >> 32) as u32
}

/// FNV-1a with an additional mixing step, since its high bits depend little on the last bytes. All gateways must use
/// the same hash.
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
    fn an_id_is_a_uuid_that_encodes_its_function() {
        let (echo, other) = (function("echo"), function("other"));
        let ids: std::collections::HashSet<String> =
            (0..1000).map(|_| new_call_id(&echo)).collect();
        assert_eq!(ids.len(), 1000);
        for id in ids {
            assert_eq!(Uuid::parse_str(&id).unwrap().get_version_num(), 4);
            let of = function_filter(&id).unwrap();
            assert!(of(&echo) && !of(&other));
        }
    }

    #[test]
    fn ids_of_one_batch_share_only_its_key() {
        let echo = function("echo");
        for count in [1, 2, 33, 64] {
            let key = BatchKeys::new().next(count, 1_764_323_501_123);
            assert_eq!((key.count(), BatchKey::from_token(&key.token())), (count, Some(key)));
            let ids = [key.new_call_id(&echo), key.new_call_id(&echo)];
            for id in &ids {
                assert_eq!(Uuid::parse_str(id).unwrap().get_version_num(), 4);
                assert!(function_filter(id).unwrap()(&echo));
                assert_eq!(BatchKey::from_id(id), Some(key));
            }
            assert_ne!(ids[0][14..], ids[1][14..]);
        }
        assert_eq!(BatchKey::from_id(&new_call_id(&echo)), None);
        for text in ["+1", "0123456789ab", "++12345678901", "+0123456789AB"] {
            assert_eq!(BatchKey::from_token(text), None, "{text}");
        }
    }

    #[test]
    fn batch_keys_are_unique() {
        let keys = BatchKeys::new();
        let tag: std::collections::HashSet<_> =
            [5, 5, 4, 6, 6].map(|now| keys.next(32, now)).into_iter().collect();
        assert_eq!(tag.len(), 5);
    }

    #[test]
    fn a_chosen_id_encodes_no_function() {
        let chosen = (0..1000).filter(|_| function_filter(&Uuid::new_v4().to_string()).is_some());
        assert!(chosen.count() < 5);
        for id in ["", "a", "b0a1"] {
            assert!(function_filter(id).is_none());
        }
    }

    #[test]
    fn short_names_have_different_hashes() {
        let short: std::collections::HashSet<u16> =
            (0..1000).map(|number| function_hash(&function(&format!("f{number}")))).collect();
        assert!(short.len() > 950, "{}", short.len());
    }
}
