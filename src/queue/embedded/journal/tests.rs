use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use tempfile::TempDir;

use super::*;

const TABLE: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("t");

struct Disk(TempDir);

impl Disk {
    fn new() -> Self {
        let disk = Self(TempDir::new().unwrap());
        let database = disk.open();
        let made = database.begin_write().unwrap();
        made.open_table(TABLE).unwrap();
        made.commit().unwrap();
        drop(database);
        disk
    }

    fn path(&self) -> std::path::PathBuf {
        self.0.path().join("q.redb")
    }

    fn journal(&self) -> std::path::PathBuf {
        self.0.path().join("q.journal")
    }

    fn open(&self) -> Database {
        Database::builder().create_with_backend(Journaled::open(&self.path()).unwrap()).unwrap()
    }

    /// The file as it was before `work`, and the journal as it is after it: what a power failure may leave.
    fn fails_after<T>(&self, work: impl FnOnce(&Database) -> T) {
        let database = self.open();
        let before = std::fs::read(self.path()).unwrap();
        let goes_on = work(&database);
        let journal = std::fs::read(self.journal()).unwrap();
        drop(goes_on);
        drop(database);
        std::fs::write(self.path(), before).unwrap();
        std::fs::write(self.journal(), journal).unwrap();
    }

    fn numbers(&self) -> Vec<u64> {
        let database = self.open();
        let read = database.begin_read().unwrap();
        let table = read.open_table(TABLE).unwrap();
        table.iter().unwrap().map(|entry| entry.unwrap().0.value()).collect()
    }
}

fn add(database: &Database, number: u64, length: usize) {
    let change = database.begin_write().unwrap();
    change.open_table(TABLE).unwrap().insert(number, &*vec![7; length]).unwrap();
    change.commit().unwrap();
}

#[test]
fn what_the_file_has_lost_is_in_the_journal() {
    let disk = Disk::new();
    disk.fails_after(|database| (0..40).for_each(|number| add(database, number, 3000)));
    assert_eq!(disk.numbers(), (0..40).collect::<Vec<_>>());
    // And again: what was looked after once is there for good.
    disk.fails_after(|database| add(database, 40, 1));
    assert_eq!(disk.numbers(), (0..41).collect::<Vec<_>>());
}

#[test]
fn a_record_that_is_not_whole_never_was() {
    let disk = Disk::new();
    let mut first = Vec::new();
    disk.fails_after(|database| {
        add(database, 1, 10);
        first = std::fs::read(disk.journal()).unwrap();
        add(database, 2, 10);
    });
    let mut journal = std::fs::read(disk.journal()).unwrap();
    let last = journal.iter().zip(&first).rposition(|(now, before)| now != before).unwrap();
    journal[last] ^= 1;
    std::fs::write(disk.journal(), journal).unwrap();
    assert_eq!(disk.numbers(), [1]);
}

#[test]
fn a_journal_that_was_full_begins_anew() {
    let disk = Disk::new();
    let database = disk.open();
    // More than a round of it, and a commit that is too large for any.
    for number in 0..40 {
        add(&database, number, 1 << 20);
    }
    add(&database, 40, 2 * LARGEST);
    let before = std::fs::read(disk.path()).unwrap();
    add(&database, 41, 10);
    let journal = std::fs::read(disk.journal()).unwrap();
    drop(database);
    std::fs::write(disk.path(), before).unwrap();
    std::fs::write(disk.journal(), journal).unwrap();
    assert_eq!(disk.numbers(), (0..42).collect::<Vec<_>>());
}

#[test]
fn a_process_that_is_killed_in_a_commit_leaves_the_one_before() {
    let disk = Disk::new();
    disk.fails_after(|database| {
        (0..10).for_each(|number| add(database, number, 100));
        let change = database.begin_write().unwrap();
        change.open_table(TABLE).unwrap().insert(99, &[1; 100][..]).unwrap();
        change
    });
    assert_eq!(disk.numbers(), (0..10).collect::<Vec<_>>());
}

#[test]
fn one_process_has_the_journal() {
    let disk = Disk::new();
    let _open = disk.open();
    let error = Journaled::open(&disk.path()).unwrap_err();
    assert!(error.to_string().contains("q.journal is in use by another process"), "{error}");
}

#[test]
fn a_file_that_was_closed_needs_no_journal() {
    let disk = Disk::new();
    add(&disk.open(), 1, 10);
    std::fs::remove_file(disk.journal()).unwrap();
    assert_eq!(disk.numbers(), [1]);
}
