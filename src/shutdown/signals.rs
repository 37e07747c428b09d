//! The signals that a role reacts to.

use std::fs::{self, File};
use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// SIGTERM, SIGINT and SIGHUP. From its creation on they no longer end the process by themselves.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    /// `None` if SIGHUP was ignored when the process started, as `nohup` has it: then it stays ignored.
    hangup: Option<Signal>,
    /// Whether the process had a controlling terminal when it started.
    had_terminal: bool,
}

/// What SIGHUP means to a process with a controlling terminal. Without one it always means to read files again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnHangup {
    /// The end: the process belongs to the terminal.
    Stop,
    /// The end if the terminal is gone; else to read files again.
    StopWithoutTerminal,
}

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A graceful stop, and by which signal.
    Stop(&'static str),
    /// To read files again.
    Reload,
}

impl Signals {
    pub fn listen() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: match ignores_hangup() {
                true => None,
                false => Some(signal(SignalKind::hangup())?),
            },
            had_terminal: has_terminal(),
        })
    }

    /// Waits for the next signal, and says what it asks for.
    pub async fn event(&mut self, on_hangup: OnHangup) -> Event {
        let had_terminal = self.had_terminal;
        let hangup = async {
            match &mut self.hangup {
                Some(hangup) => hangup.recv().await,
                None => std::future::pending().await,
            };
            meaning(on_hangup, had_terminal, has_terminal)
        };
        // All branches are cancel-safe: a signal that is not returned stays pending.
        tokio::select! {
            _ = self.terminate.recv() => Event::Stop("SIGTERM"),
            _ = self.interrupt.recv() => Event::Stop("SIGINT"),
            event = hangup => event,
        }
    }

    /// Waits for a signal that ends the process at once while it stops. SIGHUP does not: a terminal that is closed sends
    /// it more than once.
    pub async fn next(&mut self) -> &'static str {
        // Both branches are cancel-safe.
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

fn meaning(on_hangup: OnHangup, had_terminal: bool, has_terminal: impl FnOnce() -> bool) -> Event {
    match on_hangup {
        OnHangup::Stop if had_terminal => Event::Stop("SIGHUP"),
        OnHangup::StopWithoutTerminal if had_terminal && !has_terminal() => Event::Stop("SIGHUP"),
        OnHangup::Stop | OnHangup::StopWithoutTerminal => Event::Reload,
    }
}

fn has_terminal() -> bool {
    File::open("/dev/tty").is_ok()
}

fn ignores_hangup() -> bool {
    fs::read_to_string("/proc/self/status").is_ok_and(|status| hangup_is_ignored_in(&status))
}

/// Reads the mask of ignored signals, in which SIGHUP is the lowest bit.
fn hangup_is_ignored_in(status: &str) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hangup_means_the_end_only_with_a_terminal() {
        let (stop, reload) = (Event::Stop("SIGHUP"), Event::Reload);
        for (on_hangup, had, has, expect) in [
            (OnHangup::Stop, true, true, stop),
            (OnHangup::Stop, true, false, stop),
            (OnHangup::Stop, false, false, reload),
            (OnHangup::StopWithoutTerminal, true, true, reload),
            (OnHangup::StopWithoutTerminal, true, false, stop),
            (OnHangup::StopWithoutTerminal, false, false, reload),
        ] {
            assert_eq!(meaning(on_hangup, had, || has), expect, "{on_hangup:?} {had} {has}");
        }
    }

    #[test]
    fn an_ignored_hangup_is_told_from_the_mask() {
        assert!(hangup_is_ignored_in("Name:\tx\nSigIgn:\t0000000000001001\nSigCgt:\t0\n"));
        assert!(!hangup_is_ignored_in("SigIgn:\t0000000000001000\nSigCgt:\t1\n"));
        assert!(!hangup_is_ignored_in(""));
    }
}
