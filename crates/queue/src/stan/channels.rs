//! The channels of a queue. No I/O.
//!
//! The server delivers a channel's messages in order, up to the requested number. So delayed calls are spread over
//! several channels by their remaining delay: a call that is due in a second does not wait behind those that are due
//! next week.

use crate::call::UnixMillis;

/// Name suffixes of the delayed channels and their maximum remaining delay in milliseconds.
const HORIZONS: [(&str, UnixMillis); 4] = [
    ("later", NEAR_MILLIS),
    ("later.1m", 60_000),
    ("later.1h", 3_600_000),
    ("later.far", UnixMillis::MAX),
];
/// Calls that are due within this time are not moved to another channel.
pub(super) const NEAR_MILLIS: UnixMillis = 10_000;
/// Number of channels with calls to execute.
pub(super) const CHANNEL_COUNT: usize = 1 + HORIZONS.len();

/// A channel with calls to execute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Channel(u8);

impl Channel {
    /// The main channel, to which gateways publish, including those in Go.
    pub(super) const CALLS: Self = Self(0);

    /// Returns all channels.
    pub(super) fn all() -> [Self; CHANNEL_COUNT] {
        let mut number = 0;
        [(); CHANNEL_COUNT].map(|()| {
            number += 1;
            Self(number - 1)
        })
    }

    /// Returns the channel for a call that is due in `wait`.
    pub(super) fn for_delay(wait: UnixMillis) -> Self {
        let [_, delayed @ ..] = Self::all();
        let mut channels = delayed.into_iter().zip(HORIZONS);
        let near = channels.find(|(_, (_, horizon))| wait <= *horizon);
        near.map_or(Self::CALLS, |(channel, _)| channel)
    }

    /// Returns the channel with this number, if there is one.
    pub(super) fn from_number(number: u32) -> Option<Self> {
        u8::try_from(number).ok().filter(|number| usize::from(*number) < CHANNEL_COUNT).map(Self)
    }

    pub(super) fn number(self) -> usize {
        self.0.into()
    }

    /// Returns whether it holds delayed calls.
    pub(super) fn is_delayed(self) -> bool {
        self != Self::CALLS
    }

    /// Returns its name in the queue `queue`.
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
    fn a_call_goes_to_the_channel_of_its_remaining_delay() {
        for (wait, expect) in [
            (0, "q.later"),
            (10_000, "q.later"),
            (10_001, "q.later.1m"),
            (60_001, "q.later.1h"),
            (3_600_001, "q.later.far"),
            (UnixMillis::MAX, "q.later.far"),
        ] {
            assert_eq!(Channel::for_delay(wait).name("q"), expect, "{wait}");
        }
    }

    #[test]
    fn each_channel_has_its_own_number_and_name() {
        let names = Channel::all().map(|channel| channel.name("q"));
        assert_eq!(names, ["q", "q.later", "q.later.1m", "q.later.1h", "q.later.far"]);
        for channel in Channel::all() {
            let number = u32::try_from(channel.number()).unwrap();
            assert_eq!(Channel::from_number(number), Some(channel));
        }
        assert_eq!(Channel::from_number(5), None);
        assert_eq!(Channel::from_number(256), None);
    }
}
