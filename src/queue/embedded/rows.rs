//! Rows: what was written together is kept together, in one piece. What a commit costs is the pages that it writes here
//! and there; calls that are kept one by one make it write one for each handful of them. No I/O.

use bytes::{BufMut, Bytes};

use crate::queue::embedded::schedule::Number;

/// All numbers in a row are less than so much above its first, which is its key: so few rows can have a number.
pub(super) const SPAN: Number = 128;
/// The longest that is kept in a row with others, and the longest row.
pub(super) const SHORT: usize = 16 << 10;
const LONGEST: usize = 60 << 10;

/// What a number, the end of its entry and its checksum take at the row's beginning.
const PLACE: usize = 8 + 4 + 4;
/// The same in a row of the former format, which has no checksums.
const FORMER_PLACE: usize = 8 + 4;
/// In the count of entries: they have checksums. A row of the former format never has this bit set.
const CHECKED: u16 = 1 << 15;

/// A row: how many entries it has, their numbers, ends and checksums, the entries.
#[derive(Clone, Copy)]
pub(super) struct Row<'a> {
    places: &'a [u8],
    /// The length of a place.
    width: usize,
    entries: &'a [u8],
}

impl<'a> Row<'a> {
    /// The row that `bytes` are; an empty one if they are none.
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        let read = || {
            let (count, rest) = bytes.split_first_chunk::<2>()?;
            let count = u16::from_be_bytes(*count);
            let width = if count & CHECKED == 0 { FORMER_PLACE } else { PLACE };
            let (places, entries) = rest.split_at_checked(usize::from(count & !CHECKED) * width)?;
            Some(Self { places, width, entries })
        };
        read().unwrap_or(Self { places: &[], width: PLACE, entries: &[] })
    }

    fn len(&self) -> usize {
        self.places.len() / self.width
    }

    fn place(&self, index: usize) -> Option<&'a [u8]> {
        let start = index.checked_mul(self.width)?;
        self.places.get(start..start.checked_add(self.width)?)
    }

    fn number(&self, index: usize) -> Option<Number> {
        let number = self.place(index)?.first_chunk::<8>()?;
        Some(Number::from_be_bytes(*number))
    }

    fn end(&self, index: usize) -> Option<usize> {
        let end = self.place(index)?.get(8..12)?.first_chunk::<4>()?;
        Some(u32::from_be_bytes(*end) as usize)
    }

    /// The numbers in it, in order.
    pub(super) fn numbers(self) -> impl Iterator<Item = Number> {
        (0..self.len()).filter_map(move |index| self.number(index))
    }

    /// Which of its entries has `number`.
    pub(super) fn find(&self, number: Number) -> Option<usize> {
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

    /// The entry at `index`, whether its checksum fits or not.
    pub(super) fn unchecked(&self, index: usize) -> Option<&'a [u8]> {
        let start = index.checked_sub(1).map_or(Some(0), |before| self.end(before))?;
        self.entries.get(start..self.end(index)?)
    }

    /// The entry at `index`; `None` if it is damaged.
    pub(super) fn entry(&self, index: usize) -> Option<&'a [u8]> {
        let entry = self.unchecked(index)?;
        let Some(sum) = self.place(index)?.get(12..).and_then(<[u8]>::first_chunk) else {
            return Some(entry);
        };
        (checksum(self.number(index)?, entry).to_be_bytes() == *sum).then_some(entry)
    }

    /// The entry with `number`.
    pub(super) fn get(&self, number: Number) -> Option<&'a [u8]> {
        self.entry(self.find(number)?)
    }

    pub(super) fn entries(self) -> impl Iterator<Item = (Number, &'a [u8])> {
        self.all().filter_map(|(number, entry)| Some((number, entry?)))
    }

    /// All entries; `None` for those that are damaged.
    pub(super) fn all(self) -> impl Iterator<Item = (Number, Option<&'a [u8]>)> {
        self.numbers().enumerate().map(move |(index, number)| (number, self.entry(index)))
    }
}

fn checksum(number: Number, entry: &[u8]) -> u32 {
    let mut sum = crc32fast::Hasher::new();
    sum.update(&number.to_be_bytes());
    sum.update(entry);
    sum.finalize()
}

/// `entries`, which are in order, as rows with their keys.
pub(super) fn rows<'a>(
    entries: impl IntoIterator<Item = (Number, &'a [u8])>,
) -> Vec<(Number, Vec<u8>)> {
    let (mut rows, mut together) = (Vec::new(), Vec::<(Number, &[u8])>::new());
    let mut length = 0;
    for (number, entry) in entries {
        let first = together.first().map_or(number, |(first, _)| *first);
        if number - first >= SPAN || (length + entry.len() > LONGEST && !together.is_empty()) {
            rows.push((first, row(&together)));
            together.clear();
            length = 0;
        }
        length += entry.len();
        together.push((number, entry));
    }
    if let Some((first, _)) = together.first() {
        rows.push((*first, row(&together)));
    }
    rows
}

fn row(together: &[(Number, &[u8])]) -> Vec<u8> {
    let length = together.iter().map(|(_, entry)| PLACE + entry.len()).sum::<usize>();
    let mut bytes = Vec::with_capacity(2 + length);
    // At most `SPAN` numbers are in one, and none is longer than `LONGEST`.
    bytes.put_u16(u16::try_from(together.len()).unwrap_or(u16::MAX) | CHECKED);
    let mut end = 0;
    for (number, entry) in together {
        end += entry.len();
        bytes.put_u64(*number);
        bytes.put_u32(u32::try_from(end).unwrap_or(u32::MAX));
        bytes.put_u32(checksum(*number, entry));
    }
    together.iter().for_each(|(_, entry)| bytes.put_slice(entry));
    bytes
}

/// Which entries of a row are over.
#[derive(Clone, Debug, Default)]
pub(super) struct Marks(Vec<u8>);

impl Marks {
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

/// Rows that were read last: what is taken next is mostly in one of them.
#[derive(Default)]
pub(super) struct Recent(std::collections::VecDeque<Bytes>);

/// So many rows are kept at hand.
const RECENT: usize = 8;

impl Recent {
    /// The entry with `number`, if it is at hand.
    pub(super) fn get(&self, number: Number) -> Option<Bytes> {
        self.0.iter().rev().find_map(|row| Some(row.slice_ref(Row::new(row).get(number)?)))
    }

    pub(super) fn add(&mut self, row: Bytes) {
        if self.0.len() >= RECENT {
            self.0.pop_front();
        }
        self.0.push_back(row);
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_a_row_is_found_by_its_number() {
        let entries = [(3, &b"three"[..]), (5, b""), (130, b"last")];
        let rows = rows(entries);
        assert_eq!(rows.len(), 1);
        let (key, bytes) = &rows[0];
        let row = Row::new(bytes);
        assert_eq!((*key, row.numbers().count()), (3, 3));
        assert_eq!(row.entries().collect::<Vec<_>>(), entries);
        for (index, (number, entry)) in entries.into_iter().enumerate() {
            assert_eq!((row.find(number), row.get(number)), (Some(index), Some(entry)));
        }
        assert_eq!((row.get(4), row.get(2), row.entry(3)), (None, None, None));
    }

    #[test]
    fn a_row_is_neither_wide_nor_long() {
        let long = vec![0; SHORT];
        let entries = (0..4).map(|it| (it, &long[..])).chain([(SPAN + 3, &b"a"[..])]);
        let keys: Vec<_> = rows(entries).into_iter().map(|(key, _)| key).collect();
        assert_eq!(keys, [0, 3, SPAN + 3]);
        assert_eq!(rows([]).len(), 0);
    }

    #[test]
    fn what_is_no_row_is_an_empty_one() {
        for bytes in [&b""[..], b"\0", b"\0\x01", b"\xff\xff123456789012"] {
            assert_eq!(Row::new(bytes).numbers().count(), 0, "{bytes:?}");
        }
        // One whose ends lie: its entries are not there.
        let mut lies = rows([(1, &b"one"[..])]).remove(0).1;
        lies[13] = 200;
        assert_eq!(Row::new(&lies).get(1), None);
    }

    #[test]
    fn an_entry_that_was_changed_is_told_from_the_others() {
        let whole = rows([(1, &b"one"[..]), (2, b"two")]).remove(0).1;
        for position in 2..whole.len() {
            let mut changed = whole.clone();
            changed[position] ^= 1;
            let good = Row::new(&changed).entries().count();
            assert!(good < 2, "{position}");
            // What is behind the places belongs to one entry alone.
            assert!(position < 2 + 2 * PLACE || good == 1, "{position}");
        }
    }

    #[test]
    fn a_row_of_the_former_format_is_read() {
        let mut row = vec![0, 2];
        for (number, end) in [(5_u64, 3_u32), (7, 5)] {
            row.put_u64(number);
            row.put_u32(end);
        }
        row.put_slice(b"oneto");
        let row = Row::new(&row);
        assert_eq!(row.entries().collect::<Vec<_>>(), [(5, &b"one"[..]), (7, b"to")]);
        assert_eq!((row.get(7), row.get(6)), (Some(&b"to"[..]), None));
    }

    #[test]
    fn marks_are_kept() {
        let mut marks = Marks::default();
        [0, 9, 127].into_iter().for_each(|index| marks.set(index));
        let marks = Marks::new(marks.bytes());
        assert_eq!(marks.count(), 3);
        assert!(marks.has(9) && !marks.has(10) && !marks.has(10_000));
    }

    #[test]
    fn the_rows_read_last_are_at_hand() {
        let mut recent = Recent::default();
        for number in 0..20 {
            recent.add(rows([(number, &b"it"[..])]).remove(0).1.into());
        }
        assert_eq!((recent.get(19), recent.get(0)), (Some(Bytes::from_static(b"it")), None));
    }
}
