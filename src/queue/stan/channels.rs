//! The channels of a queue. No I/O.
//!
//! A server sends what a channel has in the order in which it came, and no more than it was asked for. So calls whose time
//! has not come are in several channels, by how far off it is: one that is made in a second does not wait behind those of
//! next week.

use crate::queue::call::UnixMillis;

/// For which channel the time of a call is near enough; for the last, all others.
const HORIZONS: [(&str, UnixMillis); 4] = [
    ("later", NEAR),
    ("later.1m", 60_000),
    ("later.1h", 3_600_000),
    ("later.far", UnixMillis::MAX),
];
/// Nothing in the first of them is worth being moved.
pub(super) const NEAR: UnixMillis = 10_000;
/// How many channels have calls that are to be made.
pub(super) const COUNT: usize = 1 + HORIZONS.len();

/// One of the channels that have calls that are to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Channel(u8);

impl Channel {
    /// What gateways take in, those in Go included.
    pub(super) const CALLS: Self = Self(0);

    /// All of them.
    pub(super) fn all() -> [Self; COUNT] {
        let mut number = 0;
        [(); COUNT].map(|()| {
            number += 1;
            Self(number - 1)
        })
    }

    /// Where a call belongs whose time comes in `wait`.
    pub(super) fn later(wait: UnixMillis) -> Self {
        let [_, later @ ..] = Self::all();
        let mut channels = later.into_iter().zip(HORIZONS);
        let near = channels.find(|(_, (_, horizon))| wait <= *horizon);
        near.map_or(Self::CALLS, |(channel, _)| channel)
    }

    /// The one with that number.
    pub(super) fn numbered(number: u32) -> Option<Self> {
        u8::try_from(number).ok().filter(|number| usize::from(*number) < COUNT).map(Self)
    }

    pub(super) fn number(self) -> usize {
        self.0.into()
    }

    /// It has calls whose time has not come.
    pub(super) fn is_later(self) -> bool {
        self != Self::CALLS
    }

    /// Its name, in the queue called `queue`.
    pub(super) fn name(self, queue: &str) -> String {
        match self.number().checked_sub(1).and_then(|at| HORIZONS.get(at)) {
            Some((name, _)) => format!("{queue}.{name}"),
            None => queue.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_waits_among_those_that_wait_for_about_as_long() {
        for (wait, expect) in [
            (0, "q.later"),
            (10_000, "q.later"),
            (10_001, "q.later.1m"),
            (60_001, "q.later.1h"),
            (3_600_001, "q.later.far"),
            (UnixMillis::MAX, "q.later.far"),
        ] {
            assert_eq!(Channel::later(wait).name("q"), expect, "{wait}");
        }
    }

    #[test]
    fn each_has_a_number_and_a_name_of_its_own() {
        let names = Channel::all().map(|it| it.name("q"));
        assert_eq!(names, ["q", "q.later", "q.later.1m", "q.later.1h", "q.later.far"]);
        for channel in Channel::all() {
            let number = u32::try_from(channel.number()).unwrap();
            assert_eq!(Channel::numbered(number), Some(channel));
        }
        assert_eq!(Channel::numbered(5), None);
        assert_eq!(Channel::numbered(256), None);
    }
}
