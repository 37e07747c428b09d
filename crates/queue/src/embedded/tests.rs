mod log;
mod model;

use bytes::Bytes;
use http::HeaderMap;
use tempfile::TempDir;

use super::*;
use crate::call::CallOptions;
use crate::embedded::settle_write::SettleWrite;
use crate::embedded::state::Claim;
use crate::embedded::store::Watermark;
use crate::embedded::write_txn::WriteTxn;
use crate::status::{CallRecord, CallState, Settlement, StoredResponse};
use crate::{ChangeOutcome, Filter, Order};

const LIMITS: Limits = Limits { max_pending: 5, result_ttl: 3_600_000, idempotency_ttl: 3_600_000 };
const CONCURRENCY: usize = 10;

fn open(directory: &TempDir) -> Embedded {
    Embedded::open(directory.path(), LIMITS).unwrap()
}

fn echo() -> Function {
    Function { name: "echo".to_owned(), namespace: "fn".to_owned() }
}

fn call(id: &str) -> QueuedCall {
    QueuedCall {
        id: id.to_owned(),
        function: echo(),
        target: String::new(),
        headers: HeaderMap::new(),
        body: Bytes::from_static(b"body"),
        options: CallOptions { submitted_at: now(), chosen_id: true, ..CallOptions::default() },
    }
}

fn claim_of(delivery: &Delivery) -> Claim {
    let crate::Lease::Embedded(lease) = &delivery.lease else { panic!("not embedded") };
    lease.claim
}

async fn settle(delivery: Delivery, settlement: Settlement) {
    delivery.settle(&settlement).await.unwrap();
}

fn succeeded() -> Settlement {
    let response = StoredResponse {
        status: 200,
        headers: vec![("x-a".to_owned(), "1".to_owned())],
        body: Bytes::from_static(b"answer"),
        truncated: false,
    };
    let (status, response) = (Some(200), Some(response));
    Settlement::Finished {
        state: CallState::Succeeded,
        status,
        reason: None,
        response,
        executed: true,
    }
}

fn dead() -> Settlement {
    Settlement::DeadLetter { status: Some(500), reason: Some("gave up".to_owned()), response: None }
}

async fn state(queue: &Embedded, id: &str) -> Option<CallState> {
    queue.status(id).await.unwrap().map(|status| status.state)
}

#[tokio::test]
async fn a_call_goes_through_its_states() {
    let directory = TempDir::new().unwrap();
    let queue = open(&directory);
    let published = queue.publish(call("a"), None).await.unwrap();
    assert_eq!(published, Published { id: "a".to_owned(), duplicate: false });
    assert_eq!(state(&queue, "a").await, Some(CallState::Queued));
    let delivery = queue.receive(CONCURRENCY).await.unwrap();
    assert_eq!((&delivery.call, delivery.attempts), (&call_at("a", &delivery), 0));
    assert_eq!(state(&queue, "a").await, Some(CallState::Running));
    assert_eq!(queue.cancel("a").await.unwrap(), ChangeOutcome::WrongState(CallState::Running));
    settle(delivery, succeeded()).await;
    let status = queue.status("a").await.unwrap().unwrap();
    assert_eq!(
        (status.state, status.attempts, status.status),
        (CallState::Succeeded, 1, Some(200))
    );
    assert_eq!(queue.result("a").await.unwrap().unwrap().body, "answer");
    assert_eq!(queue.status("b").await.unwrap(), None);
}

/// `call(id)` with the submission time of `delivery`.
fn call_at(id: &str, delivery: &Delivery) -> QueuedCall {
    QueuedCall { options: delivery.call.options.clone(), ..call(id) }
}

#[tokio::test]
async fn files_are_readable_by_their_owner_only() {
    use std::os::unix::fs::PermissionsExt;
    let directory = TempDir::new().unwrap();
    let kept = directory.path().join("state");
    let _queue = Embedded::open(&kept, LIMITS).unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&kept), 0o700);
    for entry in std::fs::read_dir(&kept).unwrap() {
        assert_eq!(mode(&entry.unwrap().path()), 0o600);
    }
}

#[tokio::test]
async fn unsettled_calls_survive_a_restart() {
    let directory = TempDir::new().unwrap();
    let queue = open(&directory);
    for id in ["done", "retried", "dead", "running", "waiting"] {
        queue.publish(call(id), None).await.unwrap();
    }
    settle(queue.receive(CONCURRENCY).await.unwrap(), succeeded()).await;
    let retry = Settlement::Retry { at: now(), status: Some(503), reason: None };
    settle(queue.receive(CONCURRENCY).await.unwrap(), retry).await;
    settle(queue.receive(CONCURRENCY).await.unwrap(), dead()).await;
    let running = queue.receive(CONCURRENCY).await.unwrap();
    // The lease is leaked, as when the process is killed.
    std::mem::forget(running);
    close(queue);
    let queue = open(&directory);
    assert_eq!(state(&queue, "done").await, Some(CallState::Succeeded));
    assert_eq!(state(&queue, "dead").await, Some(CallState::Failed));
    let mut again = Vec::new();
    for _ in 0..3 {
        let delivery = queue.receive(CONCURRENCY).await.unwrap();
        again.push((delivery.call.id.clone(), delivery.attempts));
        settle(delivery, succeeded()).await;
    }
    again.sort_unstable();
    let expect = [("retried", 1), ("running", 0), ("waiting", 0)];
    assert_eq!(again, expect.map(|(id, attempts)| (id.to_owned(), attempts)));
    assert_eq!(queue.shared.state().schedule.pending(), 0);
}

/// Closes the file, even if a lease still refers to the queue.
fn close(queue: Embedded) {
    let shared = Arc::clone(&queue.shared);
    drop(queue);
    *shared.store.write().unwrap() = None;
}

#[tokio::test]
async fn duplicate_ids_and_keys_are_enqueued_once() {
    let directory = TempDir::new().unwrap();
    let queue = open(&directory);
    let keyed = |id| {
        let mut call = call(id);
        call.options.idempotency_key = Some("k".to_owned());
        call
    };
    assert!(!queue.publish(keyed("a"), None).await.unwrap().duplicate);
    let again = Published { id: "a".to_owned(), duplicate: true };
    assert_eq!(queue.publish(keyed("b"), None).await.unwrap(), again);
    assert_eq!(queue.publish(call("a"), None).await.unwrap(), again);
    assert_eq!(queue.shared.state().schedule.pending(), 1);
}

#[tokio::test]
async fn a_full_queue_rejects_calls() {
    let directory = TempDir::new().unwrap();
    let queue = open(&directory);
    for number in 0..LIMITS.max_pending {
        queue.publish(call(&number.to_string()), None).await.unwrap();
    }
    assert_eq!(queue.publish(call("more"), None).await, Err(Error::Full));
    assert_eq!(queue.cancel("0").await.unwrap(), ChangeOutcome::Applied);
    assert!(queue.publish(call("more"), None).await.is_ok());
    assert_eq!(state(&queue, "0").await, Some(CallState::Cancelled));
    assert_eq!(queue.receive(CONCURRENCY).await.unwrap().call.id, "1");
}

#[tokio::test]
async fn a_dead_letter_is_kept_until_it_is_redriven() {
    let directory = TempDir::new().unwrap();
    let queue = open(&directory);
    queue.publish(call("a"), None).await.unwrap();
    settle(queue.receive(CONCURRENCY).await.unwrap(), dead()).await;
    let counts = queue.depths().await.unwrap();
    assert_eq!((counts[0].0.to_string(), counts[0].1.dead_letters), ("echo.fn".to_owned(), 1));
    let filter = Filter { dead_letter: Some(true), ..Filter::default() };
    let listed = queue.list(&filter, None, 10).await.unwrap().calls;
    assert_eq!(listed.iter().map(|status| &*status.id).collect::<Vec<_>>(), ["a"]);
    assert_eq!(queue.redrive("a").await.unwrap(), ChangeOutcome::Applied);
    let delivery = queue.receive(CONCURRENCY).await.unwrap();
    assert_eq!((delivery.call.id.as_str(), delivery.attempts), ("a", 0));
    assert_eq!(queue.redrive("a").await.unwrap(), ChangeOutcome::WrongState(CallState::Running));
    settle(delivery, dead()).await;
    assert_eq!(queue.purge(&filter).await.unwrap(), 1);
    assert_eq!(queue.status("a").await.unwrap(), None);
    assert_eq!(queue.depths().await.unwrap(), []);
}

#[tokio::test]
async fn a_dropped_delivery_is_delivered_again() {
    let directory = TempDir::new().unwrap();
    let queue = open(&directory);
    queue.publish(call("a"), None).await.unwrap();
    drop(queue.receive(CONCURRENCY).await.unwrap());
    assert_eq!(state(&queue, "a").await, Some(CallState::Queued));
    assert_eq!(queue.receive(CONCURRENCY).await.unwrap().call.id, "a");
}

#[tokio::test]
async fn expired_results_and_keys_are_removed() {
    let directory = TempDir::new().unwrap();
    let limits = Limits { result_ttl: 0, idempotency_ttl: 0, ..LIMITS };
    let queue = Embedded::open(directory.path(), limits).unwrap();
    let mut first = call("a");
    first.options.idempotency_key = Some("k".to_owned());
    queue.publish(first, None).await.unwrap();
    settle(queue.receive(CONCURRENCY).await.unwrap(), succeeded()).await;
    tokio::time::sleep(Duration::from_millis(5)).await;
    queue.sweep_expired().await;
    let mut second = call("b");
    second.options.idempotency_key = Some("k".to_owned());
    assert!(!queue.publish(second, None).await.unwrap().duplicate);
    assert_eq!(queue.status("a").await.unwrap(), None);
}

#[tokio::test]
async fn a_call_is_found_by_its_generated_id() {
    let directory = TempDir::new().unwrap();
    let queue = open(&directory);
    let mut made = call(&queue.new_call_id(&echo()));
    made.options.chosen_id = false;
    queue.publish(made.clone(), None).await.unwrap();
    assert_eq!(state(&queue, &made.id).await, Some(CallState::Queued));
    // An id with the same number but other random bits belongs to no call.
    let mut guessed = made.id.clone();
    guessed.replace_range(35.., if guessed.ends_with('0') { "1" } else { "0" });
    assert_eq!(state(&queue, &guessed).await, None);
    // A client that chooses the id gets the existing call.
    assert!(queue.publish(call(&made.id), None).await.unwrap().duplicate);
    settle(queue.receive(CONCURRENCY).await.unwrap(), succeeded()).await;
    assert_eq!(state(&queue, &made.id).await, Some(CallState::Succeeded));
}

#[tokio::test]
async fn a_call_published_and_cancelled_concurrently_is_counted_correctly() {
    let directory = TempDir::new().unwrap();
    let queue = open(&directory);
    for _ in 0..50 {
        // Both may be in one commit.
        let (published, cancelled) =
            tokio::join!(queue.publish(call("a"), None), queue.cancel("a"));
        published.unwrap();
        let cancelled_now = cancelled.unwrap() == ChangeOutcome::Applied;
        if !cancelled_now {
            assert_eq!(queue.shared.state().schedule.pending(), 1);
            assert_eq!(queue.cancel("a").await.unwrap(), ChangeOutcome::Applied);
        }
        assert_eq!(queue.shared.state().schedule.pending(), 0);
        let filter = Filter { state: Some(CallState::Cancelled), ..Filter::default() };
        assert_eq!(queue.purge(&filter).await.unwrap(), 1);
    }
}

#[tokio::test]
async fn a_selected_call_cannot_be_cancelled() {
    let directory = TempDir::new().unwrap();
    let queue = open(&directory);
    queue.publish(call("a"), None).await.unwrap();
    let (claim, stored) = queue.shared.state().select(now(), CONCURRENCY).unwrap();
    let lease = Lease::new(queue.clone(), claim);
    assert_eq!(queue.cancel("a").await.unwrap(), ChangeOutcome::WrongState(CallState::Running));
    drop(queue.deliver(lease, stored).unwrap().unwrap());
    assert_eq!(queue.cancel("a").await.unwrap(), ChangeOutcome::Applied);
    assert_eq!(queue.depths().await.unwrap(), []);
}

#[tokio::test]
async fn an_old_lease_does_not_requeue_a_running_call() {
    let directory = TempDir::new().unwrap();
    let queue = open(&directory);
    queue.publish(call("a"), None).await.unwrap();
    let first = queue.receive(CONCURRENCY).await.unwrap();
    let retry = Settlement::Retry { at: now(), status: Some(503), reason: None };
    first.settle(&retry).await.unwrap();
    let second = queue.receive(CONCURRENCY).await.unwrap();
    assert_eq!(first.settle(&retry).await, Err(Error::Gone));
    drop(first);
    assert_eq!(state(&queue, "a").await, Some(CallState::Running));
    settle(second, succeeded()).await;
    assert_eq!(state(&queue, "a").await, Some(CallState::Succeeded));
}

#[tokio::test]
async fn a_late_settlement_does_not_affect_another_execution() {
    let directory = TempDir::new().unwrap();
    let queue = open(&directory);
    queue.publish(call("a"), None).await.unwrap();
    let first = queue.receive(CONCURRENCY).await.unwrap();
    let claim = claim_of(&first);
    // The worker was interrupted while its settlement was on its way.
    drop(first);
    let second = queue.receive(CONCURRENCY).await.unwrap();
    let retry = Settlement::Retry { at: now(), status: Some(503), reason: None };
    let status = CallRecord::queued(&second.call).settled(&retry, now());
    let settled = SettleWrite::new(&status, &retry);
    queue.shared.state().apply_settlement(claim, &settled, false);
    assert_eq!(state(&queue, "a").await, Some(CallState::Running));
    settle(second, succeeded()).await;
    assert_eq!(queue.depths().await.unwrap(), []);
}

#[tokio::test]
async fn a_call_settled_after_it_was_requeued_is_not_executed_again() {
    let directory = TempDir::new().unwrap();
    let queue = open(&directory);
    for id in ["a", "b", "c"] {
        queue.publish(call(id), None).await.unwrap();
    }
    let first = queue.receive(CONCURRENCY).await.unwrap();
    let status = CallRecord::queued(&first.call).settled(&succeeded(), now());
    let settled = SettleWrite::new(&status, &succeeded());
    let claim = claim_of(&first);
    // The worker was interrupted while its settlement was on its way.
    drop(first);
    queue.submit(|reply| WriteOp::Settle(claim, settled, reply)).await.unwrap();
    assert_eq!(state(&queue, "a").await, Some(CallState::Succeeded));
    assert_eq!(queue.shared.state().schedule.pending(), 2);
    // The same for a call that is executed again by then.
    let second = queue.receive(CONCURRENCY).await.unwrap();
    assert_eq!(second.call.id, "b");
    let (claim, again) = (claim_of(&second), second.call.clone());
    drop(second);
    let third = queue.receive(CONCURRENCY).await.unwrap();
    let status = CallRecord::queued(&again).settled(&succeeded(), now());
    let settled = SettleWrite::new(&status, &succeeded());
    queue.submit(|reply| WriteOp::Settle(claim, settled, reply)).await.unwrap();
    settle(third, succeeded()).await;
    assert_eq!(queue.purge(&Filter::default()).await.unwrap(), 3);
    for id in ["a", "b", "c"] {
        assert_eq!(state(&queue, id).await, None, "{id}");
    }
    assert_eq!(queue.list(&Filter::default(), None, 10).await.unwrap().calls, []);
}

#[tokio::test]
async fn the_key_of_a_purged_call_is_free() {
    let directory = TempDir::new().unwrap();
    let queue = open(&directory);
    let keyed = |id| {
        let mut call = call(id);
        call.options.idempotency_key = Some("k".to_owned());
        call
    };
    queue.publish(keyed("a"), None).await.unwrap();
    let filter = Filter { state: Some(CallState::Queued), ..Filter::default() };
    assert_eq!(queue.purge(&filter).await.unwrap(), 1);
    assert!(!queue.publish(keyed("b"), None).await.unwrap().duplicate);
    assert_eq!(queue.receive(CONCURRENCY).await.unwrap().call.id, "b");
}

#[tokio::test]
async fn all_expired_results_are_removed_in_one_sweep() {
    const CALLS: usize = 2500;
    let directory = TempDir::new().unwrap();
    let limits = Limits { max_pending: CALLS, result_ttl: 0, idempotency_ttl: 0 };
    let queue = Embedded::open(directory.path(), limits).unwrap();
    let ids: Vec<_> = (0..CALLS).map(|number| number.to_string()).collect();
    let published = ids.iter().map(|id| queue.publish(call(id), None));
    futures_util::future::try_join_all(published).await.unwrap();
    let cancelled = ids.iter().map(|id| queue.cancel(id));
    futures_util::future::try_join_all(cancelled).await.unwrap();
    let over = now();
    while now() == over {
        tokio::task::yield_now().await;
    }
    queue.sweep_expired().await;
    assert_eq!(queue.list(&Filter::default(), None, 10).await.unwrap().calls, []);
}

#[tokio::test]
async fn calls_are_listed_by_state_and_in_pages() {
    let directory = TempDir::new().unwrap();
    let queue = open(&directory);
    for id in ["done", "dead", "retried", "running", "waiting"] {
        queue.publish(call(id), None).await.unwrap();
    }
    settle(queue.receive(CONCURRENCY).await.unwrap(), succeeded()).await;
    settle(queue.receive(CONCURRENCY).await.unwrap(), dead()).await;
    let retry = Settlement::Retry { at: now() + 60_000, status: Some(503), reason: None };
    settle(queue.receive(CONCURRENCY).await.unwrap(), retry).await;
    let _running = queue.receive(CONCURRENCY).await.unwrap();
    let find = async |state, dead, after: Option<&str>| -> Vec<String> {
        let filter = Filter { state, dead_letter: dead, ..Filter::default() };
        let found = queue.list(&filter, after, 10).await.unwrap().calls;
        found.into_iter().map(|status| status.id).collect()
    };
    let all = ["done", "dead", "retried", "running", "waiting"];
    assert_eq!(find(None, None, None).await, all);
    assert_eq!(find(None, None, Some("dead")).await, all[2..]);
    assert_eq!(find(None, Some(true), None).await, ["dead"]);
    for (state, id) in [
        (CallState::Succeeded, "done"),
        (CallState::Failed, "dead"),
        (CallState::Retrying, "retried"),
        (CallState::Running, "running"),
        (CallState::Queued, "waiting"),
    ] {
        assert_eq!(find(Some(state), None, None).await, [id], "{state:?}");
    }
    assert!(find(Some(CallState::Cancelled), None, None).await.is_empty());
}

#[tokio::test]
async fn a_failed_commit_that_is_in_the_file_takes_effect_after_reopening() {
    let directory = TempDir::new().unwrap();
    let queue = open(&directory);
    for id in ["dead", "gone", "running"] {
        queue.publish(call(id), None).await.unwrap();
    }
    settle(queue.receive(CONCURRENCY).await.unwrap(), dead()).await;
    let (shared, number) = (&queue.shared, queue.shared.next_number());
    // The commit is on the disk, although the client was told that it failed.
    let watermark = Watermark { changes: shared.change_count.load(Relaxed) + 1, next: number + 1 };
    let store = shared.store.write().unwrap().take().unwrap();
    let encoded = call("unheard").encode();
    let txn = |txn: &mut WriteTxn<'_>| {
        let (gone, _) = txn.find("gone")?.unwrap();
        txn.remove(gone, "gone")?;
        let (revived, _) = txn.find("dead")?.unwrap();
        txn.remove_record(revived)?;
        txn.add(number, "unheard", true, &encoded)
    };
    store.write(watermark, txn).unwrap();
    drop(store);
    assert!(queue.publish(call("unheard"), None).await.unwrap().duplicate);
    assert_eq!(shared.state().schedule.pending(), 3);
    let mut taken = Vec::new();
    for _ in 0..3 {
        let delivery = queue.receive(CONCURRENCY).await.unwrap();
        taken.push(delivery.call.id.clone());
        settle(delivery, succeeded()).await;
    }
    assert_eq!(taken, ["dead", "running", "unheard"]);
    assert_eq!(queue.depths().await.unwrap(), []);
    assert_eq!(shared.state().schedule.pending(), 0);
}

#[tokio::test]
async fn a_call_whose_worker_panicked_is_delayed() {
    let directory = TempDir::new().unwrap();
    let queue = open(&directory);
    for id in ["a", "b"] {
        queue.publish(call(id), None).await.unwrap();
        let delivery = queue.receive(CONCURRENCY).await.unwrap();
        let panics = move || {
            let _delivery = delivery;
            panic!("as a test wants it")
        };
        std::thread::spawn(panics).join().unwrap_err();
    }
    let counts = queue.depths().await.unwrap().remove(0).1;
    assert_eq!((counts.pending, counts.running, counts.delayed), (0, 0, 2));
    assert_eq!(queue.cancel("a").await.unwrap(), ChangeOutcome::Applied);
    assert_eq!(queue.depths().await.unwrap().remove(0).1.delayed, 1);
    let delivery = queue.receive(CONCURRENCY).await.unwrap();
    assert_eq!(delivery.call.id, "b");
    assert_eq!(queue.shared.state().schedule.pending(), 0);
}

#[tokio::test]
async fn the_expiry_of_a_purged_calls_key_does_not_remove_a_later_key() {
    let directory = TempDir::new().unwrap();
    let keyed = |id| {
        let mut call = call(id);
        call.options.idempotency_key = Some("k".to_owned());
        call
    };
    let queue = Embedded::open(directory.path(), Limits { idempotency_ttl: 0, ..LIMITS }).unwrap();
    queue.publish(keyed("a"), None).await.unwrap();
    queue.purge(&Filter::default()).await.unwrap();
    queue.close().await;
    let over = now();
    while now() == over {
        tokio::task::yield_now().await;
    }
    drop(queue);
    let queue = open(&directory);
    assert!(!queue.publish(keyed("b"), None).await.unwrap().duplicate);
    queue.sweep_expired().await;
    let again = Published { id: "b".to_owned(), duplicate: true };
    assert_eq!(queue.publish(keyed("c"), None).await.unwrap(), again);
}
