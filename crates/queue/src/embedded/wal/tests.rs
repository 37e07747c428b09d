use std::collections::BTreeSet;
use std::path::PathBuf;

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use tempfile::TempDir;

use super::*;

const TABLE: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("t");
/// A log that is soon full.
const TEST_WAL_BYTES: u64 = 1 << 20;

/// The files of a queue.
struct Disk(TempDir);

impl Disk {
    /// With a closed file that has one table.
    fn new() -> Self {
        let disk = Self(TempDir::new().unwrap());
        add(&disk.open().unwrap(), 0, 100);
        disk
    }

    /// With the files that a failure leaves.
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
        let journaled = WalBackend::open_with(&self.path(), TEST_WAL_BYTES, &Arc::new(reserve));
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
fn lost_pages_are_restored_from_the_log() {
    let disk = Disk::new();
    let database = disk.open().unwrap();
    let before = disk.file();
    (1..12).for_each(|number| add(&database, number, 3000));
    let failed = Disk::with(&before, &disk.journal());
    assert_eq!(failed.numbers().unwrap(), (0..12).collect::<Vec<_>>());
    // The second time, the pages must already be in the file.
    assert_eq!(failed.numbers().unwrap(), (0..12).collect::<Vec<_>>());
}

#[test]
fn an_incomplete_record_is_ignored() {
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
fn a_full_log_starts_a_new_epoch() {
    let disk = Disk::new();
    let database = disk.open().unwrap();
    let (mut number, mut rounds) = (0, 0);
    let mut journal = disk.journal();
    while rounds < 5 {
        number += 1;
        // Some commits exceed a record.
        add(&database, number, if number % 7 == 0 { 700_000 } else { 60_000 });
        let now = disk.journal();
        if number > 2 && now[..8] != journal[..8] {
            rounds += 1;
            // The first blocks of the new epoch are not on the disk yet, others are. The file was synced before.
            for missing in [1, 2, 3] {
                let mut torn = now.clone();
                torn[..missing * BLOCK_BYTES].copy_from_slice(&journal[..missing * BLOCK_BYTES]);
                let empty = vec![0; BLOCK_BYTES];
                torn[..BLOCK_BYTES].copy_from_slice(&empty);
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
fn pages_of_a_killed_process_are_synced_before_new_commits() {
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
fn a_log_of_another_file_is_ignored() {
    let disk = Disk::new();
    let database = disk.open().unwrap();
    (1..20).for_each(|number| add(&database, number, 3000));
    let (file, journal) = (disk.file(), disk.journal());
    // A program without a log has changed the file.
    let changed = Disk::with(&file, &journal);
    let old = Database::builder().create(changed.path()).unwrap();
    (1..20).for_each(|number| remove(&old, number));
    add(&old, 100, 10);
    drop(old);
    assert_eq!(changed.numbers().unwrap(), [0, 100]);
    // The file was removed, and a new one created.
    let removed = Disk::with(&[], &journal);
    add(&removed.open().unwrap(), 7, 10);
    assert_eq!(removed.numbers().unwrap(), [7]);
}

#[test]
fn a_file_is_opened_by_one_process_only() {
    let disk = Disk::new();
    let _open = disk.open().unwrap();
    let error = disk.open().unwrap_err();
    assert!(error.contains("q.redb is in use by another process"), "{error}");
}

#[test]
fn a_closed_file_needs_no_log() {
    let disk = Disk::new();
    std::fs::remove_file(disk.journal_path()).unwrap();
    assert_eq!(disk.numbers().unwrap(), [0]);
}

#[test]
fn a_power_failure_loses_no_commit() {
    let mut random = fastrand::Rng::with_seed(11);
    let mut random_below = |limit| random.usize(..limit);
    for _ in 0..2 {
        let disk = Disk::new();
        let database = disk.open().unwrap();
        let mut known = BTreeSet::from([0]);
        // All states that a block of the file may have had since the last sync.
        let mut versions = vec![disk.file()];
        for number in 1..40 {
            let (previous, before, earlier) = (known.clone(), disk.journal(), disk.file());
            if random_below(4) == 0 && !known.is_empty() {
                let gone = known.iter().nth(random_below(known.len())).copied().unwrap();
                remove(&database, gone);
                known.remove(&gone);
            } else {
                add(
                    &database,
                    number,
                    if random_below(9) == 0 { 900_000 } else { random_below(20_000) },
                );
                known.insert(number);
            }
            let (file, after) = (disk.file(), disk.journal());
            let synced = before[..8] != after[..8] || after[..8] == [0; 8];
            versions.push(file.clone());
            if synced {
                versions = vec![file.clone()];
            }
            // The log is either complete or torn.
            let mut torn = before.clone();
            if synced {
                torn[..BLOCK_BYTES].fill(0);
            }
            for block in 0..torn.len() / BLOCK_BYTES {
                let bytes = block * BLOCK_BYTES..(block + 1) * BLOCK_BYTES;
                if random_below(2) == 0 {
                    torn[bytes.clone()].copy_from_slice(&after[bytes]);
                }
            }
            for (journal, is_torn) in [(&after, false), (&torn, true)] {
                let mut main = file.clone();
                for block in 0..main.len() / BLOCK_BYTES {
                    let bytes = block * BLOCK_BYTES..(block + 1) * BLOCK_BYTES;
                    let version = &versions[random_below(versions.len())];
                    let old =
                        version.get(bytes.clone()).map_or(vec![0; BLOCK_BYTES], <[u8]>::to_vec);
                    main[bytes].copy_from_slice(&old);
                }
                if is_torn {
                    // The header is written after the record.
                    main[..BLOCK_BYTES].copy_from_slice(&earlier[..BLOCK_BYTES]);
                }
                let found: BTreeSet<u64> =
                    Disk::with(&main, journal).numbers().unwrap().into_iter().collect();
                assert!(found == known || is_torn && found == previous, "{found:?}, {known:?}");
            }
        }
    }
}
