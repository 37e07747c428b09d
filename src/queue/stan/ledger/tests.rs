use super::*;

fn key(sequence: u64) -> Key {
    Key { channel: Channel::CALLS, sequence, timestamp: 1 }
}

fn later(sequence: u64) -> Key {
    Key { channel: Channel::later(0), ..key(sequence) }
}

fn function(name: &str) -> Function {
    Function { name: name.to_owned(), namespace: "fn".to_owned() }
}

fn far(sequence: u64) -> Key {
    Key { channel: Channel::later(UnixMillis::MAX), ..key(sequence) }
}

type Messages = Ledger<&'static str>;

fn ledger() -> Messages {
    let mut ledger = Ledger::new();
    ledger.make_room(Room { places: 4, later: 2, later_bytes: 100 });
    ledger
}

/// Has a new call wait, each of a function of its own.
fn comes(it: &mut Messages, key: Key, at: UnixMillis) {
    comes_of(it, &key.sequence.to_string(), key, at);
}

fn comes_of(it: &mut Messages, name: &str, key: Key, at: UnixMillis) {
    assert_eq!(it.arrives(key, false, 10, "a"), Arrival::New);
    it.waits(key, function(name), at, "x");
}

#[test]
fn what_is_here_does_not_come_twice() {
    let mut it = ledger();
    assert_eq!(it.arrives(key(1), false, 10, "a"), Arrival::New);
    assert_eq!(it.has(key(1)), None);
    it.waits(key(1), function("echo"), 5, "one");
    assert_eq!(
        (it.arrives(key(1), true, 10, "b"), it.has(key(1))),
        (Arrival::Nothing, Some(false))
    );
    assert_eq!(it.next(5), Next::Now(key(1), "one"));
    assert_eq!(it.arrives(key(1), true, 10, "c"), Arrival::Nothing);
    // It is told where it came last.
    assert_eq!(it.done(key(1)).as_deref(), Some("c"));
    assert_eq!((it.arrives(key(1), true, 10, "d"), it.has(key(1))), (Arrival::Done, Some(true)));
    assert_eq!(it.done(key(1)).as_deref(), Some("d"));
    it.forget(key(1));
    assert_eq!(it.has(key(1)), Some(true));
    assert_eq!(it.next(9), Next::Nothing);
}

#[test]
fn a_server_that_counts_from_one_again_sends_other_messages() {
    let mut it = ledger();
    it.arrives(key(1), false, 10, "a");
    it.done(key(1));
    assert_eq!(it.arrives(Key { timestamp: 2, ..key(1) }, false, 10, "a"), Arrival::New);
    assert_eq!(it.arrives(later(1), false, 10, "a"), Arrival::New);
}

#[test]
fn what_is_let_go_of_comes_again() {
    let mut it = ledger();
    assert_eq!(it.arrives(key(1), true, 10, "a"), Arrival::SentBefore);
    it.forget(key(1));
    assert_eq!(it.arrives(key(1), true, 10, "a"), Arrival::SentBefore);
}

#[test]
fn what_stays_takes_no_place_of_its_function_and_does_not_come_again() {
    let mut it = ledger();
    comes_of(&mut it, "echo", key(1), 5);
    assert_eq!(it.next(5), Next::Now(key(1), "x"));
    it.keep(key(1));
    assert!(it.running.is_empty());
    assert_eq!(
        (it.arrives(key(1), true, 10, "b"), it.has(key(1))),
        (Arrival::Nothing, Some(false))
    );
}

#[test]
fn each_waits_for_its_time_and_then_in_turn() {
    let mut it = ledger();
    for (number, at) in [(1, 30), (2, 10), (3, 10)] {
        comes(&mut it, later(number), at);
    }
    assert_eq!(it.next(9), Next::NotBefore(10));
    assert_eq!(it.next(10), Next::Now(later(2), "x"));
    assert_eq!(it.next(31), Next::Now(later(3), "x"));
    assert_eq!(it.next(31), Next::Now(later(1), "x"));
}

#[test]
fn there_is_room_for_so_many() {
    let mut it = ledger();
    for number in 1..=8 {
        assert_eq!(it.arrives(key(number), false, 10, "a"), Arrival::New);
    }
    assert_eq!(it.arrives(key(9), false, 10, "a"), Arrival::Nothing);
    assert_eq!(it.arrives(later(9), false, 10, "a"), Arrival::New);
    it.done(key(1));
    assert_eq!(it.arrives(key(9), false, 10, "a"), Arrival::New);
}

#[test]
fn there_is_room_for_so_many_bytes_of_calls_that_are_made_later() {
    let mut it = ledger();
    // A single one is let in, or it would never be made.
    assert_eq!(it.arrives(later(1), false, 101, "a"), Arrival::New);
    assert_eq!(it.arrives(later(2), false, 1, "a"), Arrival::Nothing);
    it.done(later(1));
    assert_eq!(it.arrives(later(2), false, 60, "a"), Arrival::New);
    assert_eq!(it.arrives(later(3), false, 41, "a"), Arrival::Nothing);
    assert_eq!(it.arrives(later(3), false, 40, "a"), Arrival::New);
    // Other channels have their own.
    assert_eq!(it.arrives(far(3), false, 40, "a"), Arrival::New);
    it.forget(later(2));
    it.forget(later(3));
    assert_eq!(it.arrives(later(4), false, 100, "a"), Arrival::New);
}

#[test]
fn what_waits_longest_makes_room_when_there_is_none() {
    let mut it = ledger();
    comes(&mut it, far(1), 30_000);
    assert_eq!(it.set_aside(far(0).channel, 5), None);
    comes(&mut it, far(2), 40_000);
    assert_eq!(it.set_aside(Channel::CALLS, 5), None);
    // What is near enough is not worth it.
    assert_eq!(it.set_aside(far(0).channel, 30_000), None);
    assert_eq!(it.set_aside(far(0).channel, 5), Some((far(2), 40_000, "x")));
    it.done(far(2));
    assert_eq!(it.set_aside(far(0).channel, 5), None);
    // A large one is as bad as many.
    assert_eq!(it.arrives(far(3), false, 51, "a"), Arrival::New);
    it.waits(far(3), function("large"), 50_000, "x");
    assert_eq!(it.set_aside(far(0).channel, 5), Some((far(3), 50_000, "x")));
}

#[test]
fn who_stops_keeps_what_runs_and_nothing_else() {
    let mut it = ledger();
    for number in 1..=3 {
        comes(&mut it, key(number), 5);
    }
    assert_eq!(it.arrives(key(4), true, 10, "a"), Arrival::SentBefore);
    assert_eq!(it.next(5), Next::Now(key(1), "x"));
    it.close();
    it.waits(key(4), function("late"), 5, "x");
    let has: Vec<_> = (1..=4).map(|number| it.has(key(number))).collect();
    assert_eq!(has, [Some(false), None, None, None]);
    assert_eq!(it.next(9), Next::Nothing);
    assert_eq!(it.arrives(key(5), false, 10, "a"), Arrival::Nothing);
    assert_eq!(it.done(key(1)).as_deref(), Some("a"));
    assert_eq!(it.arrives(key(1), true, 10, "b"), Arrival::Done);
    assert_eq!((it.open[0].messages, it.open[0].bytes, it.running.len()), (0, 0, 0));
}

#[test]
fn a_function_that_has_its_share_makes_room_for_others() {
    let mut it = ledger();
    for number in 1..=4 {
        comes_of(&mut it, "slow", key(number), 10);
    }
    let mut made = || match it.next(10) {
        Next::Now(key, _) => Some(key),
        Next::NotBefore(_) | Next::Nothing => None,
    };
    // Three quarters of the places.
    let taken = [made(), made(), made(), made()];
    assert_eq!(taken, [Some(key(1)), Some(key(2)), Some(key(3)), None]);
    // It may be quick: then it is not worth it.
    assert_eq!(it.set_aside(Channel::CALLS, 10 + LONG - 1), None);
    assert_eq!(it.set_aside(Channel::CALLS, 10 + LONG), Some((key(4), 10, "x")));
    it.done(key(4));
    assert_eq!(it.set_aside(Channel::CALLS, 10 + LONG), None);
    // The next that comes is set aside at once.
    comes_of(&mut it, "slow", key(5), 2000);
    assert_eq!(it.set_aside(Channel::CALLS, 2000), Some((key(5), 2000, "x")));
    it.done(key(5));
    comes_of(&mut it, "quick", key(6), 2001);
    assert_eq!(it.next(2001), Next::Now(key(6), "x"));
    // Once one of its calls has ended, it may have the place.
    comes_of(&mut it, "slow", key(7), 2002);
    assert_eq!(it.next(2002), Next::Nothing);
    it.done(key(1));
    it.done(key(6));
    assert_eq!(it.next(2002), Next::Now(key(7), "x"));
    it.forget(key(7));
    it.done(key(2));
    it.done(key(3));
    assert!(it.running.is_empty());
}

#[test]
fn no_more_is_remembered_than_there_is_room_for() {
    let mut it = ledger();
    for number in 0..REMEMBERED as u64 + 10 {
        it.arrives(key(number), false, 10, "a");
        it.done(key(number));
    }
    assert_eq!((it.entries.len(), it.has(key(9)), it.has(key(10))), (REMEMBERED, None, Some(true)));
}
