use std::time::{Duration, Instant};

use super::*;

use crate::jetstream::consume::pull_scheduler::PullScheduler;
use gateway_base::function::Function;

const TIME: Duration = Duration::from_secs(6);

fn function(name: &str) -> Function {
    Function { name: name.to_owned(), namespace: "fn".to_owned() }
}

fn scheduler() -> PullScheduler<u32> {
    let mut scheduler = PullScheduler::new();
    assert!(scheduler.add(&function("a")) && scheduler.add(&function("b")));
    assert!(!scheduler.add(&function("a")));
    scheduler
}

fn select_all(scheduler: &mut PullScheduler<u32>, concurrency: usize, now: Instant) -> Vec<u32> {
    std::iter::from_fn(|| scheduler.select(concurrency, now)).map(|(_, call)| call).collect()
}

fn start_one(scheduler: &mut PullScheduler<u32>, index: usize, concurrency: usize) -> bool {
    let may = scheduler.has_slot(index, concurrency);
    if may {
        scheduler.occupy_slot(index);
    }
    may
}

/// Executes all calls of the first function that have a slot; returns their number.
fn start_all(scheduler: &mut PullScheduler<u32>, concurrency: usize, now: Instant) -> usize {
    let selected = select_all(scheduler, concurrency, now).len();
    assert!((0..selected).all(|_| start_one(scheduler, 0, concurrency)));
    selected
}

fn planned(
    scheduler: &mut PullScheduler<u32>,
    concurrency: usize,
    now: Instant,
) -> Vec<(usize, usize)> {
    scheduler
        .plan_pulls(concurrency, now)
        .into_iter()
        .map(|wanted| (wanted.function_index, wanted.max_messages))
        .collect()
}

#[test]
fn functions_take_turns() {
    let (mut scheduler, now) = (scheduler(), Instant::now());
    for call in 1..=3 {
        scheduler.push(0, call, now);
    }
    scheduler.push(1, 4, now);
    assert_eq!(select_all(&mut scheduler, 8, now), [1, 4, 2, 3]);
}

#[test]
fn one_function_never_occupies_all_slots() {
    let (mut scheduler, now) = (scheduler(), Instant::now());
    for call in 0..100 {
        scheduler.push(0, call, now);
    }
    let started = start_all(&mut scheduler, 8, now);
    assert!((4..8).contains(&started), "{started}");
    // Only the other function is pulled.
    assert_eq!(planned(&mut scheduler, 8, now), [(1, 1)]);
    scheduler.push(1, 100, now);
    assert_eq!(scheduler.select(8, now), Some((1, 100)));
    assert!(start_one(&mut scheduler, 1, 8));
    scheduler.release_slot(0);
    assert_eq!(scheduler.select(8, now), None);
}

#[test]
fn prefetched_calls_occupy_no_slot() {
    let (mut scheduler, start) = (scheduler(), Instant::now());
    let ms = Duration::from_millis;
    // Ten calls arrive every 10 ms.
    for step in 0..30 {
        scheduler.on_message(0, 10, start + ms(step * 10));
    }
    let now = start + ms(300);
    for call in 0..100 {
        scheduler.push(0, call, now);
    }
    let share = (0..).take_while(|running| may_start(*running, *running, 8)).count();
    assert_eq!(scheduler.runnable(8), 0);
    let selected = select_all(&mut scheduler, 8, now).len();
    assert!((20..64).contains(&(selected - share)), "{selected}");
    assert_eq!(scheduler.runnable(8), share);
    assert_eq!((0..selected).filter(|_| start_one(&mut scheduler, 0, 8)).count(), share);
    assert_eq!(scheduler.runnable(8), 0);
    // A slot is free for another function, and its call is selected.
    scheduler.push(1, 100, now);
    assert_eq!(scheduler.select(8, now), Some((1, 100)));
    assert_eq!(scheduler.runnable(8), 1);
    assert!(start_one(&mut scheduler, 1, 8));
    // A finished call frees a slot; a deselected call never had one.
    scheduler.release_slot(0);
    scheduler.release_slot(1);
    scheduler.deselect(0);
    assert!(start_one(&mut scheduler, 0, 8) && !start_one(&mut scheduler, 0, 8));
    assert!(!scheduler.should_write_outcomes(3) && scheduler.should_write_outcomes(4));
}

#[test]
fn one_of_few_slots_stays_free() {
    for concurrency in 2..6 {
        let (mut scheduler, now) = (scheduler(), Instant::now());
        (0..10).for_each(|call| scheduler.push(0, call, now));
        let started = start_all(&mut scheduler, concurrency, now);
        assert!((concurrency / 2..concurrency).contains(&started), "{started} of {concurrency}");
    }
}

#[test]
fn a_single_slot_is_used() {
    let (mut scheduler, now) = (scheduler(), Instant::now());
    assert_eq!(planned(&mut scheduler, 1, now), [(0, 1), (1, 1)]);
    assert_eq!(planned(&mut scheduler, 1, now), []);
    scheduler.push(0, 1, now);
    assert_eq!(scheduler.select(1, now), Some((0, 1)));
    assert!(
        start_one(&mut scheduler, 0, 1)
            && scheduler.should_write_outcomes(1)
            && !scheduler.should_write_outcomes(0)
    );
    scheduler.release_slot(0);
    assert!(scheduler.should_write_outcomes(0));
}

#[test]
fn one_call_is_pulled_until_calls_arrive_and_then_as_many_as_can_run() {
    let (mut scheduler, now) = (scheduler(), Instant::now());
    assert_eq!(planned(&mut scheduler, 40, now), [(0, 1), (1, 1)]);
    scheduler.on_message(0, 1, now);
    let more = planned(&mut scheduler, 40, now);
    assert!(matches!(more[..], [(0, 20..=39)]), "{more:?}");
    // The pull is pending until all messages have arrived, it has ended, or it has expired.
    let max = more[0].1;
    (1..max).for_each(|_| scheduler.on_message(0, 1, now));
    assert_eq!(planned(&mut scheduler, 40, now), []);
    scheduler.on_message(0, 1, now);
    assert_eq!(planned(&mut scheduler, 40, now).len(), 1);
    let number = scheduler.functions[0].pull.as_ref().unwrap().number;
    scheduler.pull_completed(0, number - 1);
    assert_eq!(planned(&mut scheduler, 40, now), []);
    scheduler.pull_completed(0, number);
    assert_eq!(planned(&mut scheduler, 40, now).len(), 1);
    assert_eq!(planned(&mut scheduler, 40, now + TIME).len(), 2);
    scheduler.reset_pulls();
    assert_eq!(planned(&mut scheduler, 40, now + TIME).len(), 2);
    scheduler.on_consumer_created(&function("b"));
    assert_eq!(planned(&mut scheduler, 40, now + TIME), [(1, 1)]);
    scheduler.retire(0);
    assert_eq!(planned(&mut scheduler, 40, now + TIME * 2), [(1, 1)]);
    assert!(scheduler.add(&function("a")) && !scheduler.add(&function("a")));
    assert_eq!(planned(&mut scheduler, 40, now + TIME * 2), [(0, 1)]);
}

#[test]
fn buffered_calls_can_be_removed() {
    let (mut scheduler, now) = (scheduler(), Instant::now());
    scheduler.push(0, 1, now);
    scheduler.push(0, 2, now + TIME);
    assert_eq!(scheduler.remove_older(now + TIME), [1]);
    assert!(!scheduler.is_empty());
    assert_eq!(scheduler.drain(), [2]);
    assert!(scheduler.is_empty());
}
