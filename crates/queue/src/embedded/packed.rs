//! Packed batches: calls that are written together are stored as one value. The cost of a commit is the number of pages
//! that it writes; calls stored one by one would need a page for each few of them. No I/O.

use bytes::{BufMut, Bytes};

use crate::embedded::schedule::CallSeq;

/// All numbers in a batch are less than this above the first one, which is its key. This bounds the number of batches
/// that may contain a given number.
pub(super) const MAX_KEY_SPAN: CallSeq = 128;
/// Maximum length of a packed entry.
pub(super) const MAX_PACKED_ENTRY_BYTES: usize = 16 << 10;
const MAX_BATCH_BYTES: usize = 60 << 10;

/// Length of an index entry: number (8 bytes), end of the entry (4 bytes), checksum (4 bytes).
const INDEX_ENTRY_BYTES: usize = 8 + 4 + 4;
/// Length of an index entry in version 1, which has no checksums.
const V1_INDEX_ENTRY_BYTES: usize = 8 + 4;
/// Bit in the count of entries that says that entries have checksums. Batches of version 1 never have it set.
const CHECKSUM_FLAG: u16 = 1 << 15;

/// A packed batch: count of entries, index, entries.
#[derive(Clone, Copy)]
pub(super) struct PackedBatch<'a> {
    index: &'a [u8],
    /// Length of one index entry.
    index_entry_length: usize,
    entries: &'a [u8],
}

impl<'a> PackedBatch<'a> {
    /// Parses a batch. Returns an empty one if `bytes` are invalid.
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        let read = || {
            let (count, rest) = bytes.split_first_chunk::<2>()?;
            let count = u16::from_be_bytes(*count);
            let index_entry_length =
                if count & CHECKSUM_FLAG == 0 { V1_INDEX_ENTRY_BYTES } else { INDEX_ENTRY_BYTES };
            let (index, entries) =
                rest.split_at_checked(usize::from(count & !CHECKSUM_FLAG) * index_entry_length)?;
            Some(Self { index, index_entry_length, entries })
        };
        read().unwrap_or(Self { index: &[], index_entry_length: INDEX_ENTRY_BYTES, entries: &[] })
    }

    fn len(&self) -> usize {
        self.index.len() / self.index_entry_length
    }

    fn index_entry(&self, index: usize) -> Option<&'a [u8]> {
        let start = index.checked_mul(self.index_entry_length)?;
        self.index.get(start..start.checked_add(self.index_entry_length)?)
    }

    fn number(&self, index: usize) -> Option<CallSeq> {
        let number = self.index_entry(index)?.first_chunk::<8>()?;
        Some(CallSeq::from_be_bytes(*number))
    }

    fn end(&self, index: usize) -> Option<usize> {
        let end = self.index_entry(index)?.get(8..12)?.first_chunk::<4>()?;
        Some(u32::from_be_bytes(*end) as usize)
    }

    /// The numbers of the entries, in ascending order.
    pub(super) fn numbers(self) -> impl Iterator<Item = CallSeq> {
        (0..self.len()).filter_map(move |index| self.number(index))
    }

    /// The position of the entry with `number`.
    pub(super) fn find(&self, number: CallSeq) -> Option<usize> {
        let (mut low, mut high) = (0, self.len());
        while low < high {
            let middle = low + (high - low) / 2;
            match self.number(middle)?.cmp(&number) {
                std::cmp::Ordering::Equal => return Some(middle),
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        None
    }

    /// The entry at `index`, without a check of its checksum.
    pub(super) fn unchecked(&self, index: usize) -> Option<&'a [u8]> {
        let start = index.checked_sub(1).map_or(Some(0), |before| self.end(before))?;
        self.entries.get(start..self.end(index)?)
    }

    /// The entry at `index`, or `None` if it is missing or damaged.
    pub(super) fn entry(&self, index: usize) -> Option<&'a [u8]> {
        let entry = self.unchecked(index)?;
        let Some(sum) = self.index_entry(index)?.get(12..).and_then(<[u8]>::first_chunk) else {
            return Some(entry);
        };
        (checksum(self.number(index)?, entry).to_be_bytes() == *sum).then_some(entry)
    }

    /// The entry with `number`, or `None` if it is missing or damaged.
    pub(super) fn get(&self, number: CallSeq) -> Option<&'a [u8]> {
        self.entry(self.find(number)?)
    }

    pub(super) fn entries(self) -> impl Iterator<Item = (CallSeq, &'a [u8])> {
        self.all().filter_map(|(number, entry)| Some((number, entry?)))
    }

    /// All entries, with `None` for damaged ones.
    pub(super) fn all(self) -> impl Iterator<Item = (CallSeq, Option<&'a [u8]>)> {
        self.numbers().enumerate().map(move |(index, number)| (number, self.entry(index)))
    }
}

fn checksum(number: CallSeq, entry: &[u8]) -> u32 {
    let mut sum = crc32fast::Hasher::new();
    sum.update(&number.to_be_bytes());
    sum.update(entry);
    sum.finalize()
}

/// Packs `entries`, which must be in ascending order, into batches. Returns them with their keys.
pub(super) fn pack<'a>(
    entries: impl IntoIterator<Item = (CallSeq, &'a [u8])>,
) -> Vec<(CallSeq, Vec<u8>)> {
    let (mut batches, mut batch) = (Vec::new(), Vec::<(CallSeq, &[u8])>::new());
    let mut length = 0;
    for (number, entry) in entries {
        let first = batch.first().map_or(number, |(first, _)| *first);
        if number - first >= MAX_KEY_SPAN
            || (length + entry.len() > MAX_BATCH_BYTES && !batch.is_empty())
        {
            batches.push((first, encode_batch(&batch)));
            batch.clear();
            length = 0;
        }
        length += entry.len();
        batch.push((number, entry));
    }
    if let Some((first, _)) = batch.first() {
        batches.push((*first, encode_batch(&batch)));
    }
    batches
}

fn encode_batch(batch: &[(CallSeq, &[u8])]) -> Vec<u8> {
    let length = batch.iter().map(|(_, entry)| INDEX_ENTRY_BYTES + entry.len()).sum::<usize>();
    let mut bytes = Vec::with_capacity(2 + length);
    // A batch has at most `MAX_KEY_SPAN` entries, and none exceeds `MAX_BATCH_BYTES`, so the conversions cannot fail.
    bytes.put_u16(u16::try_from(batch.len()).unwrap_or(u16::MAX) | CHECKSUM_FLAG);
    let mut end = 0;
    for (number, entry) in batch {
        end += entry.len();
        bytes.put_u64(*number);
        bytes.put_u32(u32::try_from(end).unwrap_or(u32::MAX));
        bytes.put_u32(checksum(*number, entry));
    }
    batch.iter().for_each(|(_, entry)| bytes.put_slice(entry));
    bytes
}

/// Bitmap of the finished entries of a batch.
#[derive(Clone, Debug, Default)]
pub(super) struct Bitmap(Vec<u8>);

impl Bitmap {
    pub(super) fn new(bytes: &[u8]) -> Self {
        Self(bytes.to_vec())
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }

    pub(super) fn has(&self, index: usize) -> bool {
        self.0.get(index / 8).is_some_and(|byte| byte & (1 << (index % 8)) != 0)
    }

    pub(super) fn set(&mut self, index: usize) {
        if self.0.len() <= index / 8 {
            self.0.resize(index / 8 + 1, 0);
        }
        self.0[index / 8] |= 1 << (index % 8);
    }

    pub(super) fn count(&self) -> usize {
        self.0.iter().map(|byte| byte.count_ones() as usize).sum()
    }
}

/// The batches that were read last. The next call is mostly in one of them.
#[derive(Default)]
pub(super) struct BatchCache(std::collections::VecDeque<Bytes>);

const MAX_CACHED_BATCHES: usize = 8;

impl BatchCache {
    /// The entry with `number`, if its batch is cached.
    pub(super) fn get(&self, number: CallSeq) -> Option<Bytes> {
        self.0
            .iter()
            .rev()
            .find_map(|batch| Some(batch.slice_ref(PackedBatch::new(batch).get(number)?)))
    }

    pub(super) fn add(&mut self, batch: Bytes) {
        if self.0.len() >= MAX_CACHED_BATCHES {
            self.0.pop_front();
        }
        self.0.push_back(batch);
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_of_a_batch_are_found_by_number() {
        let entries = [(3, &b"three"[..]), (5, b""), (130, b"last")];
        let batches = pack(entries);
        assert_eq!(batches.len(), 1);
        let (key, bytes) = &batches[0];
        let batch = PackedBatch::new(bytes);
        assert_eq!((*key, batch.numbers().count()), (3, 3));
        assert_eq!(batch.entries().collect::<Vec<_>>(), entries);
        for (index, (number, entry)) in entries.into_iter().enumerate() {
            assert_eq!((batch.find(number), batch.get(number)), (Some(index), Some(entry)));
        }
        assert_eq!((batch.get(4), batch.get(2), batch.entry(3)), (None, None, None));
    }

    #[test]
    fn batches_are_limited_in_span_and_length() {
        let long = vec![0; MAX_PACKED_ENTRY_BYTES];
        let entries = (0..4).map(|it| (it, &long[..])).chain([(MAX_KEY_SPAN + 3, &b"a"[..])]);
        let keys: Vec<_> = pack(entries).into_iter().map(|(key, _)| key).collect();
        assert_eq!(keys, [0, 3, MAX_KEY_SPAN + 3]);
        assert_eq!(pack([]).len(), 0);
    }

    #[test]
    fn invalid_bytes_are_an_empty_batch() {
        for bytes in [&b""[..], b"\0", b"\0\x01", b"\xff\xff123456789012"] {
            assert_eq!(PackedBatch::new(bytes).numbers().count(), 0, "{bytes:?}");
        }
        // The end of the entry is beyond the batch.
        let mut lies = pack([(1, &b"one"[..])]).remove(0).1;
        lies[13] = 200;
        assert_eq!(PackedBatch::new(&lies).get(1), None);
    }

    #[test]
    fn damaged_entries_are_detected() {
        let whole = pack([(1, &b"one"[..]), (2, b"two")]).remove(0).1;
        for position in 2..whole.len() {
            let mut changed = whole.clone();
            changed[position] ^= 1;
            let good = PackedBatch::new(&changed).entries().count();
            assert!(good < 2, "{position}");
            // Bytes after the index belong to one entry only.
            assert!(position < 2 + 2 * INDEX_ENTRY_BYTES || good == 1, "{position}");
        }
    }

    #[test]
    fn a_batch_of_version_1_is_read() {
        let mut batch = vec![0, 2];
        for (number, end) in [(5_u64, 3_u32), (7, 5)] {
            batch.put_u64(number);
            batch.put_u32(end);
        }
        batch.put_slice(b"oneto");
        let batch = PackedBatch::new(&batch);
        assert_eq!(batch.entries().collect::<Vec<_>>(), [(5, &b"one"[..]), (7, b"to")]);
        assert_eq!((batch.get(7), batch.get(6)), (Some(&b"to"[..]), None));
    }

    #[test]
    fn a_bitmap_keeps_its_bits() {
        let mut bitmap = Bitmap::default();
        [0, 9, 127].into_iter().for_each(|index| bitmap.set(index));
        let bitmap = Bitmap::new(bitmap.bytes());
        assert_eq!(bitmap.count(), 3);
        assert!(bitmap.has(9) && !bitmap.has(10) && !bitmap.has(10_000));
    }

    #[test]
    fn the_batches_read_last_are_cached() {
        let mut cache = BatchCache::default();
        for number in 0..20 {
            cache.add(pack([(number, &b"it"[..])]).remove(0).1.into());
        }
        assert_eq!((cache.get(19), cache.get(0)), (Some(Bytes::from_static(b"it")), None));
    }
}
