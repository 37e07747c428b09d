//! What is stored one by one, with a checksum. What an earlier gateway stored has none, and is read as it is. No I/O.

use bytes::BufMut;

/// The first byte of what has a checksum. A call of the former format begins with its version, which is 1, and a
/// result with the high byte of a short length, which is 0.
const SEALED: u8 = 0xc1;
/// The mark, and the checksum.
const HEAD: usize = 1 + 4;

/// The checksum does not fit to what is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Damaged;

/// How long `stored` is with its checksum.
pub(super) fn length(stored: &[u8]) -> usize {
    HEAD + stored.len()
}

/// Writes `stored` with its checksum to `place`, which is as long as both.
pub(super) fn seal_into(stored: &[u8], mut place: &mut [u8]) {
    place.put_u8(SEALED);
    place.put_u32(crc32fast::hash(stored));
    place.put_slice(stored);
}

/// What `bytes` hold, if their checksum fits.
pub(super) fn open(bytes: &[u8]) -> Result<&[u8], Damaged> {
    let Some((sum, stored)) = split(bytes) else { return Ok(bytes) };
    if crc32fast::hash(stored) == sum { Ok(stored) } else { Err(Damaged) }
}

/// What `bytes` hold, whether their checksum fits or not: a look at the head of a large body need not read all of it.
pub(super) fn peek(bytes: &[u8]) -> &[u8] {
    split(bytes).map_or(bytes, |(_, stored)| stored)
}

fn split(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let rest = bytes.strip_prefix(&[SEALED])?;
    let (sum, stored) = rest.split_first_chunk::<4>()?;
    Some((u32::from_be_bytes(*sum), stored))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_changed_is_told_from_what_was_not() {
        let mut sealed = vec![0; length(b"\x01call")];
        seal_into(b"\x01call", &mut sealed);
        assert_eq!(open(&sealed), Ok(&b"\x01call"[..]));
        for position in 1..sealed.len() {
            let mut changed = sealed.clone();
            changed[position] ^= 1;
            assert_eq!(open(&changed), Err(Damaged), "{position}");
        }
        assert_eq!(peek(&sealed), b"\x01call");
    }

    #[test]
    fn the_former_format_is_read_as_it_is() {
        for stored in [&b"\x01\0\0\0\x02{}body"[..], b"\0\0\0\x02{}", b""] {
            assert_eq!((open(stored), peek(stored)), (Ok(stored), stored));
        }
    }
}
