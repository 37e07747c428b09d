//! Unpacked values with a checksum. Values of older gateways have none and are returned as they are. No I/O.

use bytes::BufMut;

/// The first byte of a value with a checksum. In the earlier format, a call begins with its version, which is 1, and a
/// result with the high byte of a small length, which is 0.
const CHECKSUM_MARKER: u8 = 0xc1;
/// Marker and checksum.
const HEADER_BYTES: usize = 1 + 4;

/// The checksum does not match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ChecksumMismatch;

/// Length of `stored` with its header.
pub(super) fn length(stored: &[u8]) -> usize {
    HEADER_BYTES + stored.len()
}

/// Writes `stored` with its header to `place`, which must have the length [`length`] returns.
pub(super) fn seal_into(stored: &[u8], mut place: &mut [u8]) {
    place.put_u8(CHECKSUM_MARKER);
    place.put_u32(crc32fast::hash(stored));
    place.put_slice(stored);
}

/// Returns the value in `bytes`.
///
/// # Errors
///
/// When the checksum does not match.
pub(super) fn open(bytes: &[u8]) -> Result<&[u8], ChecksumMismatch> {
    let Some((sum, stored)) = split(bytes) else { return Ok(bytes) };
    if crc32fast::hash(stored) == sum { Ok(stored) } else { Err(ChecksumMismatch) }
}

/// Returns the value in `bytes` without a check, for reading the head of a large body.
pub(super) fn peek(bytes: &[u8]) -> &[u8] {
    split(bytes).map_or(bytes, |(_, stored)| stored)
}

fn split(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let rest = bytes.strip_prefix(&[CHECKSUM_MARKER])?;
    let (sum, stored) = rest.split_first_chunk::<4>()?;
    Some((u32::from_be_bytes(*sum), stored))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changed_values_are_detected() {
        let mut sealed = vec![0; length(b"\x01call")];
        seal_into(b"\x01call", &mut sealed);
        assert_eq!(open(&sealed), Ok(&b"\x01call"[..]));
        for position in 1..sealed.len() {
            let mut changed = sealed.clone();
            changed[position] ^= 1;
            assert_eq!(open(&changed), Err(ChecksumMismatch), "{position}");
        }
        assert_eq!(peek(&sealed), b"\x01call");
    }

    #[test]
    fn values_without_checksum_are_returned_as_they_are() {
        for stored in [&b"\x01\0\0\0\x02{}body"[..], b"\0\0\0\x02{}", b""] {
            assert_eq!((open(stored), peek(stored)), (Ok(stored), stored));
        }
    }
}
