use super::*;

fn key(sequence: u64) -> MessageKey {
    MessageKey { channel: Channel::CALLS, sequence, timestamp: 1 }
}

fn later(sequence: u64) -> MessageKey {
    MessageKey { channel: Channel::for_delay(0), ..key(sequence) }
}

fn function(name: &str) -> Function {
    Function { name: name.to_owned(), namespace: "fn".to_owned() }
}

fn far(sequence: u64) -> MessageKey {
    MessageKey { channel: Channel::for_delay(UnixMillis::MAX), ..key(sequence) }
}

type Messages = InflightTable<&'static str>;

fn new_table() -> Messages {
    let mut table = InflightTable::new();
    table.set_capacity(Capacity { concurrency: 4, max_delayed: 2, max_delayed_bytes: 100 });
    table
}

/// Adds a new pending call of its own function.
fn add(table: &mut Messages, key: MessageKey, at: UnixMillis) {
    add_of(table, &key.sequence.to_string(), key, at);
}

fn add_of(table: &mut Messages, name: &str, key: MessageKey, at: UnixMillis) {
    assert_eq!(table.on_message(key, false, 10, "a"), ArrivalAction::Accept);
    table.enqueue(key, function(name), at, "x");
}

#[test]
fn a_message_is_accepted_only_once() {
    let mut table = new_table();
    assert_eq!(table.on_message(key(1), false, 10, "a"), ArrivalAction::Accept);
    assert_eq!(table.is_finished(key(1)), None);
    table.enqueue(key(1), function("echo"), 5, "one");
    assert_eq!(
        (table.on_message(key(1), true, 10, "b"), table.is_finished(key(1))),
        (ArrivalAction::Ignore, Some(false))
    );
    assert_eq!(table.next(5), NextCall::Ready(key(1), "one"));
    assert_eq!(table.on_message(key(1), true, 10, "c"), ArrivalAction::Ignore);
    // It is acknowledged on the subject of its last delivery.
    assert_eq!(table.finish(key(1)).as_deref(), Some("c"));
    assert_eq!(
        (table.on_message(key(1), true, 10, "d"), table.is_finished(key(1))),
        (ArrivalAction::AckAgain, Some(true))
    );
    assert_eq!(table.finish(key(1)).as_deref(), Some("d"));
    table.release(key(1));
    assert_eq!(table.is_finished(key(1)), Some(true));
    assert_eq!(table.next(9), NextCall::Empty);
}

#[test]
fn the_same_sequence_with_another_timestamp_is_another_message() {
    let mut table = new_table();
    table.on_message(key(1), false, 10, "a");
    table.finish(key(1));
    assert_eq!(
        table.on_message(MessageKey { timestamp: 2, ..key(1) }, false, 10, "a"),
        ArrivalAction::Accept
    );
    assert_eq!(table.on_message(later(1), false, 10, "a"), ArrivalAction::Accept);
}

#[test]
fn a_released_message_is_accepted_again() {
    let mut table = new_table();
    assert_eq!(table.on_message(key(1), true, 10, "a"), ArrivalAction::CheckOwner);
    table.release(key(1));
    assert_eq!(table.on_message(key(1), true, 10, "a"), ArrivalAction::CheckOwner);
}

#[test]
fn a_stuck_message_uses_no_slot_and_is_not_accepted_again() {
    let mut table = new_table();
    add_of(&mut table, "echo", key(1), 5);
    assert_eq!(table.next(5), NextCall::Ready(key(1), "x"));
    table.mark_stuck(key(1));
    assert!(table.running.is_empty());
    assert_eq!(
        (table.on_message(key(1), true, 10, "b"), table.is_finished(key(1))),
        (ArrivalAction::Ignore, Some(false))
    );
}

#[test]
fn calls_are_returned_when_due_in_order() {
    let mut table = new_table();
    for (number, at) in [(1, 30), (2, 10), (3, 10)] {
        add(&mut table, later(number), at);
    }
    assert_eq!(table.next(9), NextCall::NotBefore(10));
    assert_eq!(table.next(10), NextCall::Ready(later(2), "x"));
    assert_eq!(table.next(31), NextCall::Ready(later(3), "x"));
    assert_eq!(table.next(31), NextCall::Ready(later(1), "x"));
}

#[test]
fn the_number_of_messages_is_limited() {
    let mut table = new_table();
    for number in 1..=8 {
        assert_eq!(table.on_message(key(number), false, 10, "a"), ArrivalAction::Accept);
    }
    assert_eq!(table.on_message(key(9), false, 10, "a"), ArrivalAction::Ignore);
    assert_eq!(table.on_message(later(9), false, 10, "a"), ArrivalAction::Accept);
    table.finish(key(1));
    assert_eq!(table.on_message(key(9), false, 10, "a"), ArrivalAction::Accept);
}

#[test]
fn the_size_of_delayed_calls_is_limited() {
    let mut table = new_table();
    // A single message that exceeds the limit is accepted, or it would never be executed.
    assert_eq!(table.on_message(later(1), false, 101, "a"), ArrivalAction::Accept);
    assert_eq!(table.on_message(later(2), false, 1, "a"), ArrivalAction::Ignore);
    table.finish(later(1));
    assert_eq!(table.on_message(later(2), false, 60, "a"), ArrivalAction::Accept);
    assert_eq!(table.on_message(later(3), false, 41, "a"), ArrivalAction::Ignore);
    assert_eq!(table.on_message(later(3), false, 40, "a"), ArrivalAction::Accept);
    // Other channels have their own limit.
    assert_eq!(table.on_message(far(3), false, 40, "a"), ArrivalAction::Accept);
    table.release(later(2));
    table.release(later(3));
    assert_eq!(table.on_message(later(4), false, 100, "a"), ArrivalAction::Accept);
}

#[test]
fn the_call_that_is_due_last_is_parked_when_the_channel_is_congested() {
    let mut table = new_table();
    add(&mut table, far(1), 30_000);
    assert_eq!(table.park(far(0).channel, 5), None);
    add(&mut table, far(2), 40_000);
    assert_eq!(table.park(Channel::CALLS, 5), None);
    // A call that is due soon is not parked.
    assert_eq!(table.park(far(0).channel, 30_000), None);
    assert_eq!(table.park(far(0).channel, 5), Some((far(2), 40_000, "x")));
    table.finish(far(2));
    assert_eq!(table.park(far(0).channel, 5), None);
    // One large message congests a channel like many small ones.
    assert_eq!(table.on_message(far(3), false, 51, "a"), ArrivalAction::Accept);
    table.enqueue(far(3), function("large"), 50_000, "x");
    assert_eq!(table.park(far(0).channel, 5), Some((far(3), 50_000, "x")));
}

#[test]
fn close_keeps_only_executing_messages() {
    let mut table = new_table();
    for number in 1..=3 {
        add(&mut table, key(number), 5);
    }
    assert_eq!(table.on_message(key(4), true, 10, "a"), ArrivalAction::CheckOwner);
    assert_eq!(table.next(5), NextCall::Ready(key(1), "x"));
    table.close();
    table.enqueue(key(4), function("late"), 5, "x");
    let has: Vec<_> = (1..=4).map(|number| table.is_finished(key(number))).collect();
    assert_eq!(has, [Some(false), None, None, None]);
    assert_eq!(table.next(9), NextCall::Empty);
    assert_eq!(table.on_message(key(5), false, 10, "a"), ArrivalAction::Ignore);
    assert_eq!(table.finish(key(1)).as_deref(), Some("a"));
    assert_eq!(table.on_message(key(1), true, 10, "b"), ArrivalAction::AckAgain);
    assert_eq!(
        (table.outstanding[0].messages, table.outstanding[0].bytes, table.running.len()),
        (0, 0, 0)
    );
}

#[test]
fn calls_beyond_their_functions_share_are_parked() {
    let mut table = new_table();
    for number in 1..=4 {
        add_of(&mut table, "slow", key(number), 10);
    }
    let mut start = || match table.next(10) {
        NextCall::Ready(key, _) => Some(key),
        NextCall::NotBefore(_) | NextCall::Empty => None,
    };
    // Three quarters of the slots.
    let started = [start(), start(), start(), start()];
    assert_eq!(started, [Some(key(1)), Some(key(2)), Some(key(3)), None]);
    // It may finish soon, so it is not parked yet.
    assert_eq!(table.park(Channel::CALLS, 10 + PARK_AFTER - 1), None);
    assert_eq!(table.park(Channel::CALLS, 10 + PARK_AFTER), Some((key(4), 10, "x")));
    table.finish(key(4));
    assert_eq!(table.park(Channel::CALLS, 10 + PARK_AFTER), None);
    // The next call is parked immediately.
    add_of(&mut table, "slow", key(5), 2000);
    assert_eq!(table.park(Channel::CALLS, 2000), Some((key(5), 2000, "x")));
    table.finish(key(5));
    add_of(&mut table, "quick", key(6), 2001);
    assert_eq!(table.next(2001), NextCall::Ready(key(6), "x"));
    // After one of its calls has finished, it gets the slot.
    add_of(&mut table, "slow", key(7), 2002);
    assert_eq!(table.next(2002), NextCall::Empty);
    table.finish(key(1));
    table.finish(key(6));
    assert_eq!(table.next(2002), NextCall::Ready(key(7), "x"));
    table.release(key(7));
    table.finish(key(2));
    table.finish(key(3));
    assert!(table.running.is_empty());
}

#[test]
fn the_number_of_remembered_messages_is_limited() {
    let mut table = new_table();
    for number in 0..MAX_FINISHED_KEYS as u64 + 10 {
        table.on_message(key(number), false, 10, "a");
        table.finish(key(number));
    }
    assert_eq!(
        (table.entries.len(), table.is_finished(key(9)), table.is_finished(key(10))),
        (MAX_FINISHED_KEYS, None, Some(true))
    );
}
