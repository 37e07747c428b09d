//! Reads information on processes from /proc. On a system without it, there is none.

use std::fs;

/// Some fields of `/proc/PID/stat`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stat {
    pub(super) pid: i32,
    /// The process has exited, and its parent has not waited for it.
    pub(super) is_zombie: bool,
    pub(super) parent: i32,
    pub(super) group: i32,
    /// CPU time in clock ticks, user and system.
    pub(super) ticks: u64,
    /// Start time in clock ticks since boot. Together with the id it identifies a process uniquely.
    pub(super) started: u64,
    /// Resident memory in pages.
    pub(super) pages: u64,
}

/// Returns the process with this id.
pub(super) fn stat(pid: i32) -> Option<Stat> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// Returns all visible processes.
pub(super) fn all() -> Vec<Stat> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(stat)
        .collect()
}

/// Returns the children of a process's first thread; `None` if the kernel does not list them.
pub(super) fn children(pid: i32) -> Option<Vec<i32>> {
    let listed = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    Some(listed.split_whitespace().filter_map(|pid| pid.parse().ok()).collect())
}

/// Returns a process's limit of realtime scheduling in microseconds; `None` if it is unlimited.
pub(super) fn realtime_limit(pid: i32) -> Option<u64> {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max realtime timeout"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Returns a variable of a process's initial environment; `None` if it is missing or cannot be read.
pub(super) fn environment_variable(pid: i32, name: &str) -> Option<String> {
    let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
    let value = environment
        .split(|byte| *byte == 0)
        .find_map(|variable| variable.strip_prefix(name.as_bytes())?.strip_prefix(b"="))?;
    String::from_utf8(value.to_vec()).ok()
}

/// Returns the id of the current boot of the machine.
pub(super) fn boot_id() -> Option<String> {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(id.trim().to_owned())
}

fn parse_stat(text: &str) -> Option<Stat> {
    // The second field is the program's name in parentheses; the name may contain spaces and parentheses.
    let (pid, rest) = text.split_once(" (")?;
    let (_name, rest) = rest.rsplit_once(") ")?;
    let fields: Vec<&str> = rest.split(' ').collect();
    // Field numbers of proc(5): `fields` starts with field 3.
    let field = |number: usize| fields.get(number - 3);
    let ticks: u64 = field(14)?.parse().ok()?;
    Some(Stat {
        pid: pid.parse().ok()?,
        is_zombie: matches!(*field(3)?, "Z" | "X"),
        parent: field(4)?.parse().ok()?,
        group: field(5)?.parse().ok()?,
        ticks: ticks + field(15)?.parse::<u64>().ok()?,
        started: field(22)?.parse().ok()?,
        pages: field(24)?.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_spaces_and_parentheses_does_not_shift_the_fields() {
        let text =
            "42 (a) (b c)) S 1 40 40 0 -1 4194304 83 0 0 0 7 5 0 0 20 0 1 0 1234 3096576 567 18 1";
        let expect = Stat {
            pid: 42,
            is_zombie: false,
            parent: 1,
            group: 40,
            ticks: 12,
            started: 1234,
            pages: 567,
        };
        assert_eq!(parse_stat(text), Some(expect));
        assert_eq!(parse_stat("42 (cut off"), None);
        assert_eq!(parse_stat("42 (short) S 1 2"), None);
    }

    #[test]
    fn this_process_is_found() {
        let pid = i32::try_from(std::process::id()).unwrap();
        assert_eq!(stat(pid).unwrap().pid, pid);
        assert!(all().iter().any(|stat| stat.pid == pid));
        assert!(boot_id().is_some());
    }
}
