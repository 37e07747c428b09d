//! Tests of the deadlines of a connection.

use std::time::Instant;

use super::*;

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn the_earliest_deadline_counts() {
    let deadlines = ConnectionDeadlines::new();
    assert_eq!(deadlines.next_deadline(), None);
    let start = deadlines.on_exchange_started();
    deadlines.exchange().set_deadline(start + 3 * SECOND);
    deadlines.exchange().set_body_deadline(start + 2 * SECOND);
    assert_eq!(deadlines.next_deadline(), Some(start + 2 * SECOND));
    deadlines.exchange().on_body_finished();
    assert_eq!(deadlines.next_deadline(), Some(start + 3 * SECOND));
}

#[test]
fn an_expired_exchange_is_flagged_first_and_its_connection_closed_later() {
    let deadlines = ConnectionDeadlines::new();
    let start = deadlines.on_exchange_started();
    deadlines.exchange().set_deadline(start + SECOND);
    assert_eq!(deadlines.fire_expired(start), None);
    assert_eq!(deadlines.fire_expired(start + SECOND), Some(Expired::Exchange));
    assert!(deadlines.exchange().is_expired() && !deadlines.exchange().body_expired());
    assert_eq!(deadlines.fire_expired(start + 2 * SECOND), None);
    assert_eq!(deadlines.fire_expired(start + 7 * SECOND), Some(Expired::Connection));
}

#[test]
fn an_idle_connection_and_a_slow_head_are_closed() {
    let deadlines = ConnectionDeadlines::new();
    let now = Instant::now();
    deadlines.on_exchange_finished(now, SECOND);
    assert_eq!(deadlines.fire_expired(now + 2 * SECOND), Some(Expired::Connection));
    deadlines.on_exchange_finished(now, 60 * SECOND);
    assert_eq!(deadlines.fire_expired(now + 3 * SECOND), Some(Expired::HibernateDelay));
    assert_eq!(deadlines.fire_expired(now + 4 * SECOND), None);
    assert_eq!(deadlines.fire_expired(now + 60 * SECOND), Some(Expired::Connection));
    deadlines.on_head_started(SECOND);
    assert_eq!(deadlines.state(), ConnectionState::ReadingHead);
    assert_eq!(deadlines.fire_expired(Instant::now() + 2 * SECOND), Some(Expired::Connection));
}

#[test]
fn a_connection_with_a_blocked_write_is_closed_unless_the_write_progresses() {
    let deadlines = ConnectionDeadlines::new();
    deadlines.on_write_blocked(SECOND);
    deadlines.on_write_progress(SECOND);
    assert_eq!(deadlines.fire_expired(Instant::now()), None);
    deadlines.on_write_blocked(SECOND);
    assert_eq!(deadlines.fire_expired(Instant::now() + 2 * SECOND), Some(Expired::Connection));
}

#[test]
fn a_connection_hibernates_only_when_its_request_is_complete() {
    let deadlines = ConnectionDeadlines::new();
    let start = deadlines.on_exchange_started();
    deadlines.exchange().on_body_started();
    deadlines.on_exchange_finished(start, 60 * SECOND);
    assert_eq!(deadlines.fire_expired(start + 3 * SECOND), None);
    deadlines.exchange().on_body_finished();
    deadlines.on_exchange_finished(start, 60 * SECOND);
    assert_eq!(deadlines.fire_expired(start + 3 * SECOND), Some(Expired::HibernateDelay));
    deadlines.on_exchange_started();
    deadlines.on_exchange_finished(start, 60 * SECOND);
    assert_eq!(deadlines.fire_expired(start + 3 * SECOND), Some(Expired::HibernateDelay));
}

#[test]
fn a_connection_with_a_blocked_write_is_not_idle() {
    let deadlines = ConnectionDeadlines::new();
    deadlines.on_exchange_started();
    deadlines.on_write_blocked(10 * SECOND);
    let ended = Instant::now();
    deadlines.on_exchange_finished(ended, 4 * SECOND);
    assert_eq!(deadlines.fire_expired(ended + 3 * SECOND), None, "hibernated with a pending write");
    assert_eq!(deadlines.fire_expired(ended + 5 * SECOND), None);
    deadlines.on_write_progress(SECOND);
    assert_eq!(deadlines.fire_expired(ended), None);
    assert_eq!(deadlines.fire_expired(ended + 5 * SECOND), Some(Expired::Connection));
}
