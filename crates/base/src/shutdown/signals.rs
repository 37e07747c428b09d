//! The signals that a process handles.

use std::fs::{self, File};
use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Receiver of SIGTERM, SIGINT and SIGHUP. As long as it exists, these signals do not terminate the process by
/// default.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    /// `None` if SIGHUP was ignored when the process started (as under `nohup`): then it stays ignored.
    hangup: Option<Signal>,
    /// The process had a controlling terminal when it started.
    had_terminal: bool,
}

/// Meaning of SIGHUP for a process that has a controlling terminal. Without one, SIGHUP always means to reload files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnHangup {
    /// Stop: the process belongs to the terminal.
    Stop,
    /// Stop if the terminal is gone, otherwise reload files.
    StopWithoutTerminal,
}

/// The action that a signal requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A graceful shutdown, requested by the named signal.
    Stop(&'static str),
    /// Reload files.
    Reload,
}

impl Signals {
    /// Registers the signal handlers.
    ///
    /// # Errors
    /// When a handler cannot be registered. The process cannot be stopped gracefully then, so it should not start.
    pub fn listen() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: match is_hangup_ignored() {
                true => None,
                false => Some(signal(SignalKind::hangup())?),
            },
            had_terminal: has_terminal(),
        })
    }

    /// Waits for the next signal and returns the action that it requests.
    pub async fn next_event(&mut self, on_hangup: OnHangup) -> Event {
        let had_terminal = self.had_terminal;
        let hangup = async {
            match &mut self.hangup {
                Some(hangup) => hangup.recv().await,
                None => std::future::pending().await,
            };
            hangup_event(on_hangup, had_terminal, has_terminal)
        };
        // All branches are cancel-safe: a signal that is not returned here remains pending.
        tokio::select! {
            _ = self.terminate.recv() => Event::Stop("SIGTERM"),
            _ = self.interrupt.recv() => Event::Stop("SIGINT"),
            event = hangup => event,
        }
    }

    /// Waits for a signal that aborts a shutdown that is in progress. SIGHUP is not one: a closing terminal sends it
    /// more than once.
    pub async fn next_termination(&mut self) -> &'static str {
        // Both branches are cancel-safe.
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// Returns the action for SIGHUP.
fn hangup_event(
    on_hangup: OnHangup,
    had_terminal: bool,
    has_terminal: impl FnOnce() -> bool,
) -> Event {
    match on_hangup {
        OnHangup::Stop if had_terminal => Event::Stop("SIGHUP"),
        OnHangup::StopWithoutTerminal if had_terminal && !has_terminal() => Event::Stop("SIGHUP"),
        OnHangup::Stop | OnHangup::StopWithoutTerminal => Event::Reload,
    }
}

fn has_terminal() -> bool {
    File::open("/dev/tty").is_ok()
}

fn is_hangup_ignored() -> bool {
    fs::read_to_string("/proc/self/status").is_ok_and(|status| hangup_is_ignored_in(&status))
}

/// Parses the mask of ignored signals, whose lowest bit is SIGHUP.
fn hangup_is_ignored_in(status: &str) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hangup_stops_the_process_only_if_it_had_a_terminal() {
        let (stop, reload) = (Event::Stop("SIGHUP"), Event::Reload);
        for (on_hangup, had, has, expect) in [
            (OnHangup::Stop, true, true, stop),
            (OnHangup::Stop, true, false, stop),
            (OnHangup::Stop, false, false, reload),
            (OnHangup::StopWithoutTerminal, true, true, reload),
            (OnHangup::StopWithoutTerminal, true, false, stop),
            (OnHangup::StopWithoutTerminal, false, false, reload),
        ] {
            assert_eq!(hangup_event(on_hangup, had, || has), expect, "{on_hangup:?} {had} {has}");
        }
    }

    #[test]
    fn an_ignored_hangup_is_read_from_the_signal_mask() {
        assert!(hangup_is_ignored_in("Name:\tx\nSigIgn:\t0000000000001001\nSigCgt:\t0\n"));
        assert!(!hangup_is_ignored_in("SigIgn:\t0000000000001000\nSigCgt:\t1\n"));
        assert!(!hangup_is_ignored_in(""));
    }
}
