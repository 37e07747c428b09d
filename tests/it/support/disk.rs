//! Disks of a chosen size, each mounted in its own mount namespace.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use crate::support::report_skipped;

/// A small disk. It exists in the namespace of a process that ends when this is dropped.
pub(crate) struct Disk {
    holder: Child,
    directory: TempDir,
}

impl Disk {
    /// A tmpfs of `mib` MiB; `None`, with a message, where nothing can be mounted.
    pub(crate) fn tmpfs(mib: u32) -> Option<Self> {
        Self::mount(&format!("mount -t tmpfs -o size={mib}m gateway-test \"$1/disk\""))
    }

    /// An ext4 of `mib` MiB in an image; `None`, with a message, where none can be created or mounted.
    pub(crate) fn ext4(mib: u32) -> Option<Self> {
        Self::mount(&format!(
            "truncate -s {mib}M \"$1/image\" && mkfs.ext4 -q -m 0 \"$1/image\" \
             && mount -o loop \"$1/image\" \"$1/disk\""
        ))
    }

    /// An ext4 in a sparse image on its own tmpfs; see [`Self::fill_backing_store`]. `None`, with a message, where none
    /// can be created or mounted.
    pub(crate) fn ext4_on_tmpfs() -> Option<Self> {
        // With these options, every inode is in a block that mkfs writes.
        Self::mount(
            "mkdir \"$1/under\" && mount -t tmpfs -o size=128m gateway-test \"$1/under\" \
             && truncate -s 96M \"$1/under/image\" \
             && mkfs.ext4 -q -m 0 -b 4096 -N 32 -O ^has_journal -E nodiscard,lazy_itable_init=0 \
                \"$1/under/image\" \
             && mount -o loop \"$1/under/image\" \"$1/disk\"",
        )
    }

    /// Fills the tmpfs below the disk. From now on, only blocks that were written before can be written. Writes to
    /// others seem to succeed until the file is synced, as on a failing disk.
    pub(crate) fn fill_backing_store(&self) {
        let mut other = File::create(self.local_root().join("under/other")).unwrap();
        let zeros = vec![0; 4 << 10];
        while other.write_all(&zeros).is_ok() {}
    }

    /// Writes a file to the disk.
    pub(crate) fn write(&self, name: &str, bytes: &[u8]) {
        let mut file = File::create(self.local_path().join(name)).unwrap();
        file.write_all(bytes).unwrap();
        // Syncs the metadata as well.
        rustix::fs::syncfs(&file).unwrap();
    }

    fn mount(mount: &str) -> Option<Self> {
        let directory = TempDir::new().unwrap();
        std::fs::create_dir(directory.path().join("disk")).unwrap();
        let script = format!("{mount} && echo mounted && exec cat");
        let mut holder = Command::new("unshare")
            .args(["-m", "sh", "-c", &script, "sh"])
            .arg(directory.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(holder.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let disk = Self { holder, directory };
        if line.trim() != "mounted" {
            report_skipped("no disk can be mounted on this machine");
            return None;
        }
        Some(disk)
    }

    pub(crate) fn namespace_pid(&self) -> u32 {
        self.holder.id()
    }

    /// Mount point, for a process in the disk's namespace.
    pub(crate) fn path(&self) -> PathBuf {
        self.directory.path().join("disk")
    }

    /// Mount point, as a path of this process.
    fn local_path(&self) -> PathBuf {
        self.local_root().join("disk")
    }

    /// Directory of the mount point, as a path of this process.
    fn local_root(&self) -> PathBuf {
        let path = self.directory.path().strip_prefix("/").unwrap();
        Path::new(&format!("/proc/{}/root", self.holder.id())).join(path)
    }

    /// Writes a file of another program until the disk is full, or the file has `most` bytes.
    pub(crate) fn fill(&self, most: u64) {
        let other = self.local_path().join("other");
        let mut other = OpenOptions::new().create(true).append(true).open(other).unwrap();
        let mut left = most;
        for size in [64 << 10, 4 << 10, 512] {
            let zeros = vec![0; size];
            while left > 0 && other.write_all(&zeros).is_ok() {
                left = left.saturating_sub(size as u64);
            }
        }
    }

    /// Removes the file of the other program.
    pub(crate) fn clear(&self) {
        self.remove("other");
    }

    /// Removes a file.
    pub(crate) fn remove(&self, name: &str) {
        std::fs::remove_file(self.local_path().join(name)).unwrap();
    }

    /// Deallocates the blocks of a file and keeps its length, as a copy with holes does.
    pub(crate) fn make_sparse(&self, name: &str) {
        let path = self.local_path().join(name);
        let file = OpenOptions::new().write(true).open(path).unwrap();
        let length = file.metadata().unwrap().len();
        file.set_len(0).unwrap();
        file.set_len(length).unwrap();
        file.sync_all().unwrap();
    }

    /// Opens a file on the disk.
    pub(crate) fn open(&self, name: &str) -> File {
        File::open(self.local_path().join(name)).unwrap()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}
