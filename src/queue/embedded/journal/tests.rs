use std::collections::BTreeSet;
use std::path::PathBuf;

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use tempfile::TempDir;

use super::*;

const TABLE: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("t");
/// A journal that is soon full.
const SHORT: u64 = 1 << 20;

/// What is on a disk, or would be.
struct Disk(TempDir);

impl Disk {
    /// With a file that has a table, and was closed.
    fn new() -> Self {
        let disk = Self(TempDir::new().unwrap());
        add(&disk.open().unwrap(), 0, 100);
        disk
    }

    /// With what a failure leaves.
    fn with(file: &[u8], journal: &[u8]) -> Self {
        let disk = Self(TempDir::new().unwrap());
        std::fs::write(disk.path(), file).unwrap();
        std::fs::write(disk.journal_path(), journal).unwrap();
        disk
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("q.redb")
    }

    fn journal_path(&self) -> PathBuf {
        self.0.path().join("q.journal")
    }

    fn file(&self) -> Vec<u8> {
        std::fs::read(self.path()).unwrap()
    }

    fn journal(&self) -> Vec<u8> {
        std::fs::read(self.journal_path()).unwrap()
    }

    fn open(&self) -> Result<Database, String> {
        let reserve = Reserve::open(&self.0.path().join("q.reserve")).unwrap();
        let journaled = Journaled::open_with(&self.path(), SHORT, &Arc::new(reserve));
        let journaled = journaled.map_err(|error| error.to_string())?;
        let opened = Database::builder().create_with_backend(journaled);
        opened.map_err(|error| error.to_string())
    }

    fn numbers(&self) -> Result<Vec<u64>, String> {
        let database = self.open()?;
        let read = database.begin_read().map_err(|error| error.to_string())?;
        let table = read.open_table(TABLE).map_err(|error| error.to_string())?;
        let mut numbers = Vec::new();
        for entry in table.iter().map_err(|error| error.to_string())? {
            let (number, value) = entry.map_err(|error| error.to_string())?;
            assert!(value.value().iter().all(|byte| *byte == number.value() as u8));
            numbers.push(number.value());
        }
        Ok(numbers)
    }
}

fn add(database: &Database, number: u64, length: usize) {
    let change = database.begin_write().unwrap();
    change.open_table(TABLE).unwrap().insert(number, &*vec![number as u8; length]).unwrap();
    change.commit().unwrap();
}

fn remove(database: &Database, number: u64) {
    let change = database.begin_write().unwrap();
    change.open_table(TABLE).unwrap().remove(number).unwrap();
    change.commit().unwrap();
}

#[test]
fn what_the_file_has_lost_is_in_the_journal() {
    let disk = Disk::new();
    let database = disk.open().unwrap();
    let before = disk.file();
    (1..12).for_each(|number| add(&database, number, 3000));
    let failed = Disk::with(&before, &disk.journal());
    assert_eq!(failed.numbers().unwrap(), (0..12).collect::<Vec<_>>());
    // And again: what was looked after once is there for good.
    assert_eq!(failed.numbers().unwrap(), (0..12).collect::<Vec<_>>());
}

#[test]
fn a_record_that_is_not_whole_never_was() {
    let disk = Disk::new();
    let database = disk.open().unwrap();
    let before = disk.file();
    add(&database, 1, 10);
    let first = disk.journal();
    add(&database, 2, 10);
    let mut journal = disk.journal();
    let last = journal.iter().zip(&first).rposition(|(now, before)| now != before).unwrap();
    journal[last] ^= 1;
    assert_eq!(Disk::with(&before, &journal).numbers().unwrap(), [0, 1]);
}

#[test]
fn a_full_journal_begins_anew_and_its_last_round_is_over() {
    let disk = Disk::new();
    let database = disk.open().unwrap();
    let (mut number, mut rounds) = (0, 0);
    let mut journal = disk.journal();
    while rounds < 5 {
        number += 1;
        // Now and then more than fits.
        add(&database, number, if number % 7 == 0 { 700_000 } else { 60_000 });
        let now = disk.journal();
        if number > 2 && now[..8] != journal[..8] {
            rounds += 1;
            // The first blocks of the new round are not on the disk yet, others are; the file was synced before.
            for missing in [1, 2, 3] {
                let mut torn = now.clone();
                torn[..missing * BLOCK].copy_from_slice(&journal[..missing * BLOCK]);
                let empty = vec![0; BLOCK];
                torn[..BLOCK].copy_from_slice(&empty);
                let found = Disk::with(&disk.file(), &torn).numbers().unwrap();
                assert!(found.len() as u64 >= number, "{found:?} of {number}");
            }
        }
        journal = now;
    }
    let failed = Disk::with(&disk.file(), &disk.journal());
    assert_eq!(failed.numbers().unwrap(), (0..=number).collect::<Vec<_>>());
}

#[test]
fn what_a_killed_process_left_is_on_the_disk_before_it_is_built_upon() {
    let disk = Disk::new();
    let database = disk.open().unwrap();
    let (before, journal) = (disk.file(), disk.journal());
    let change = database.begin_write().unwrap();
    change.open_table(TABLE).unwrap().insert(1, &[1; 50_000][..]).unwrap();
    let killed = Disk::with(&disk.file(), &journal);
    drop(change);
    let database = killed.open().unwrap();
    add(&database, 2, 10);
    assert_eq!(Disk::with(&killed.file(), &killed.journal()).numbers().unwrap(), [0, 2]);
    assert_eq!(Disk::with(&before, &journal).numbers().unwrap(), [0]);
}

#[test]
fn a_journal_is_its_files_alone() {
    let disk = Disk::new();
    let database = disk.open().unwrap();
    (1..20).for_each(|number| add(&database, number, 3000));
    let (file, journal) = (disk.file(), disk.journal());
    // A program that knows no journal has changed the file.
    let changed = Disk::with(&file, &journal);
    let old = Database::builder().create(changed.path()).unwrap();
    (1..20).for_each(|number| remove(&old, number));
    add(&old, 100, 10);
    drop(old);
    assert_eq!(changed.numbers().unwrap(), [0, 100]);
    // The file was removed, and another begun.
    let removed = Disk::with(&[], &journal);
    add(&removed.open().unwrap(), 7, 10);
    assert_eq!(removed.numbers().unwrap(), [7]);
}

#[test]
fn one_process_has_the_file() {
    let disk = Disk::new();
    let _open = disk.open().unwrap();
    let error = disk.open().unwrap_err();
    assert!(error.contains("q.redb is in use by another process"), "{error}");
}

#[test]
fn a_file_that_was_closed_needs_no_journal() {
    let disk = Disk::new();
    std::fs::remove_file(disk.journal_path()).unwrap();
    assert_eq!(disk.numbers().unwrap(), [0]);
}

/// Numbers that look like chance, the same each time.
fn dice() -> impl FnMut(usize) -> usize {
    let mut seed = 11_u64;
    move |sides| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % sides
    }
}

#[test]
fn a_power_failure_loses_nothing_whatever_has_reached_the_disk() {
    let mut roll = dice();
    for _ in 0..2 {
        let disk = Disk::new();
        let database = disk.open().unwrap();
        let mut known = BTreeSet::from([0]);
        // All that a block of the file can be since the file was synced last.
        let mut versions = vec![disk.file()];
        for number in 1..40 {
            let (was, before, earlier) = (known.clone(), disk.journal(), disk.file());
            if roll(4) == 0 && !known.is_empty() {
                let gone = known.iter().nth(roll(known.len())).copied().unwrap();
                remove(&database, gone);
                known.remove(&gone);
            } else {
                add(&database, number, if roll(9) == 0 { 900_000 } else { roll(20_000) });
                known.insert(number);
            }
            let (file, after) = (disk.file(), disk.journal());
            let synced = before[..8] != after[..8] || after[..8] == [0; 8];
            versions.push(file.clone());
            if synced {
                versions = vec![file.clone()];
            }
            // Whole, or as far as the disk came with it.
            let mut torn = before.clone();
            if synced {
                torn[..BLOCK].fill(0);
            }
            for block in 0..torn.len() / BLOCK {
                let bytes = block * BLOCK..(block + 1) * BLOCK;
                if roll(2) == 0 {
                    torn[bytes.clone()].copy_from_slice(&after[bytes]);
                }
            }
            for (journal, is_torn) in [(&after, false), (&torn, true)] {
                let mut main = file.clone();
                for block in 0..main.len() / BLOCK {
                    let bytes = block * BLOCK..(block + 1) * BLOCK;
                    let version = &versions[roll(versions.len())];
                    let old = version.get(bytes.clone()).map_or(vec![0; BLOCK], <[u8]>::to_vec);
                    main[bytes].copy_from_slice(&old);
                }
                if is_torn {
                    // The header comes after the record.
                    main[..BLOCK].copy_from_slice(&earlier[..BLOCK]);
                }
                let found: BTreeSet<u64> =
                    Disk::with(&main, journal).numbers().unwrap().into_iter().collect();
                assert!(found == known || is_torn && found == was, "{found:?}, {known:?}");
            }
        }
    }
}
