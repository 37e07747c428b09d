//! The queue on a NATS server: what it shares with the one in a file, and what it does when the server or one of its
//! clients fails.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use gateway::function::Function;
use gateway::queue::call::{Call, Millis, Options as CallOptions};
use gateway::queue::embedded::Limits;
use gateway::queue::jetstream::{Auth, JetStream, Options};
use gateway::queue::status::{Answer, Settlement, State};
use gateway::queue::{Changed, Delivery, Error, Filter, Order, Published, Queue};
use http::HeaderMap;

use crate::support::gateway::Gateway as Process;
use crate::support::nats::Nats;
use crate::support::provider::Provider;
use crate::support::{eventually, within};

pub(crate) const LIMITS: Limits = Limits { pending: 50, result_ttl: 3_600_000, key_ttl: 3_600_000 };
pub(crate) const PLACES: usize = 10;
/// As short as it can be without a busy machine losing a lease that it means to keep.
pub(crate) const LEASE: Duration = Duration::from_secs(2);
/// A call is refused in less than 2 s while the server is away; on a busy machine, in less than this.
const REFUSED_WITHIN: Duration = Duration::from_secs(10);

pub(crate) fn options(nats: &Nats) -> Options {
    Options {
        servers: vec![nats.url()],
        auth: Auth::Nobody,
        tls: false,
        root_ca: None,
        name: "gateway-test".to_owned(),
        queue: "faas-request".to_owned(),
        replicas: 1,
        in_memory: false,
        lease: LEASE,
        limits: LIMITS,
    }
}

/// One gateway's view of the queue.
pub(crate) struct Gateway {
    jetstream: JetStream,
    pub(crate) queue: Queue,
}

impl Gateway {
    pub(crate) async fn open(options: Options) -> Self {
        let jetstream = JetStream::open(options).await.unwrap();
        Self { queue: Queue::JetStream(jetstream.clone()), jetstream }
    }

    /// One whose server answers.
    pub(crate) async fn on(nats: &Nats) -> Self {
        Self::answered(options(nats)).await
    }

    /// The same, where the server gives no call to another before the end of the test.
    pub(crate) async fn leasing_long(nats: &Nats) -> Self {
        Self::answered(Options { lease: Duration::from_secs(600), ..options(nats) }).await
    }

    async fn answered(options: Options) -> Self {
        let gateway = Self::open(options).await;
        eventually("the server answers", async || gateway.queue.status("x").await.is_ok()).await;
        gateway
    }

    pub(crate) async fn publish(&self, call: Call) -> Published {
        within("publish", self.queue.publish(call)).await.unwrap()
    }

    pub(crate) async fn take(&self) -> Delivery {
        within("take", self.queue.take(PLACES)).await.unwrap()
    }

    pub(crate) async fn settle(&self, delivery: Delivery, settlement: Settlement) {
        within("settle", self.queue.settle(&delivery, &settlement)).await.unwrap();
    }

    pub(crate) async fn state(&self, id: &str) -> Option<State> {
        self.queue.status(id).await.unwrap().map(|status| status.state)
    }

    /// Nothing is there to take for some time.
    pub(crate) async fn takes_nothing(&self, time: Duration) -> bool {
        tokio::time::timeout(time, self.queue.take(PLACES)).await.is_err()
    }

    pub(crate) async fn tidy(&self, age: Duration, idle: Duration) -> Result<u64, Error> {
        self.jetstream.tidy(age, idle).await
    }

    pub(crate) async fn unfinished(&self) -> u64 {
        let counts = self.queue.counts().await.unwrap();
        counts.iter().map(|(_, it)| it.pending + it.running + it.delayed).sum()
    }

    /// Nothing is left to be made: the server removes a call's message a moment after its end.
    pub(crate) async fn is_empty(&self) {
        eventually("nothing is left", async || self.unfinished().await == 0).await;
    }

    /// A killed server may forget removals. Whoever takes next sees that these calls are over, and lets go of them.
    pub(crate) async fn lets_go(&self) {
        tokio::select! {
            taken = self.queue.take(PLACES) => panic!("made once more: {taken:?}"),
            () = self.is_empty() => {}
        }
    }

    /// As when the process is killed: what it has taken is neither settled nor given back.
    pub(crate) async fn dies(self, taken: Vec<Delivery>) {
        self.jetstream.stop().await;
        taken.into_iter().for_each(std::mem::forget);
    }
}

pub(crate) fn now() -> Millis {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis().try_into().unwrap()
}

pub(crate) fn call_of(function: &str, id: &str) -> Call {
    Call {
        id: id.to_owned(),
        function: Function { name: function.to_owned(), namespace: "fn".to_owned() },
        target: "/p?x=1".to_owned(),
        headers: HeaderMap::from_iter([(
            http::header::ACCEPT,
            http::HeaderValue::from_bytes(b"a\xff").unwrap(),
        )]),
        body: Bytes::from_static(b"body"),
        options: CallOptions { submitted_at: now(), ..CallOptions::default() },
    }
}

pub(crate) fn call(id: &str) -> Call {
    call_of("echo", id)
}

pub(crate) fn succeeded() -> Settlement {
    let answer = Answer {
        status: 200,
        headers: vec![("x-a".to_owned(), "1".to_owned())],
        body: Bytes::from_static(b"answer"),
        truncated: false,
    };
    let (status, answer) = (Some(200), Some(answer));
    Settlement::Finished { state: State::Succeeded, status, reason: None, answer, made: true }
}

pub(crate) fn dead() -> Settlement {
    Settlement::Dead { status: Some(500), reason: Some("gave up".to_owned()), answer: None }
}

pub(crate) fn retry(at: Millis) -> Settlement {
    Settlement::Retry { at, status: Some(503), reason: Some("busy".to_owned()) }
}

#[tokio::test]
async fn a_call_goes_through_its_states() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    let published = it.publish(call("a")).await;
    assert_eq!(published, Published { id: "a".to_owned(), repeated: false });
    assert_eq!(it.state("a").await, Some(State::Queued));
    let delivery = it.take().await;
    let taken = Call { options: delivery.call.options.clone(), ..call("a") };
    assert_eq!((&delivery.call, delivery.attempts), (&taken, 0));
    assert_eq!(it.state("a").await, Some(State::Running));
    assert_eq!(it.queue.cancel("a").await, Ok(Changed::No(State::Running)));
    let counts = it.queue.counts().await.unwrap();
    assert_eq!((counts[0].1.running, counts[0].1.pending), (1, 0));
    it.settle(delivery, succeeded()).await;
    let status = it.queue.status("a").await.unwrap().unwrap();
    assert_eq!((status.state, status.attempts, status.status), (State::Succeeded, 1, Some(200)));
    let answer = it.queue.answer("a").await.unwrap().unwrap();
    assert_eq!((answer.status, &answer.body[..], answer.headers.len()), (200, &b"answer"[..], 1));
    assert_eq!(it.queue.status("b").await, Ok(None));
    assert_eq!(it.queue.cancel("a").await, Ok(Changed::No(State::Succeeded)));
    assert_eq!(it.queue.cancel("b").await, Ok(Changed::Unknown));
    it.is_empty().await;
}

#[tokio::test]
async fn what_was_not_settled_is_there_after_a_restart() {
    let mut nats = Nats::start();
    let it = Gateway::on(&nats).await;
    for id in ["done", "retried", "dead", "running", "waiting"] {
        it.publish(call(id)).await;
    }
    it.settle(it.take().await, succeeded()).await;
    it.settle(it.take().await, retry(now())).await;
    it.settle(it.take().await, dead()).await;
    let running = it.take().await;
    it.dies(vec![running]).await;
    nats.kill();
    nats.restart();
    let it = Gateway::on(&nats).await;
    assert_eq!(it.state("done").await, Some(State::Succeeded));
    assert_eq!(it.state("dead").await, Some(State::Failed));
    assert_eq!(it.state("retried").await, Some(State::Retrying));
    let mut again = BTreeMap::new();
    for _ in 0..3 {
        let delivery = it.take().await;
        again.insert(delivery.call.id.clone(), delivery.attempts);
        it.settle(delivery, succeeded()).await;
    }
    let expect = [("retried", 1), ("running", 0), ("waiting", 0)];
    assert_eq!(again, expect.map(|(id, attempts)| (id.to_owned(), attempts)).into());
    it.lets_go().await;
}

#[tokio::test]
async fn the_same_id_and_the_same_key_are_queued_once() {
    let mut nats = Nats::start();
    let it = Gateway::on(&nats).await;
    let keyed = |id| {
        let mut call = call(id);
        call.options.idempotency_key = Some("a key.*>\r\nä".to_owned());
        call
    };
    assert!(!it.publish(keyed("a")).await.repeated);
    let again = Published { id: "a".to_owned(), repeated: true };
    assert_eq!(it.publish(keyed("b")).await, again);
    assert_eq!(it.publish(call("a")).await, again);
    assert_eq!(it.unfinished().await, 1);
    // It is known when the call is over, and when the server has forgotten what it had seen.
    it.settle(it.take().await, succeeded()).await;
    assert_eq!(it.publish(keyed("c")).await, again);
    nats.kill();
    nats.restart();
    eventually("the server answers", async || it.queue.status("x").await.is_ok()).await;
    assert_eq!(it.publish(keyed("d")).await, again);
    let mut chosen = call("a");
    chosen.options.chosen_id = true;
    assert_eq!(it.publish(chosen).await, again);
    it.is_empty().await;
}

#[tokio::test]
async fn two_who_publish_the_same_key_at_once_make_one_call() {
    let nats = Nats::start();
    let (one, two) = (Gateway::on(&nats).await, Gateway::on(&nats).await);
    for round in 0..5 {
        let keyed = |id: &str| {
            let mut call = call(&format!("{id}{round}"));
            call.options.idempotency_key = Some(format!("key {round}"));
            call
        };
        let (a, b) = tokio::join!(one.publish(keyed("a")), two.publish(keyed("b")));
        assert_eq!((a.id == b.id, a.repeated != b.repeated), (true, true), "{a:?} {b:?}");
    }
    assert_eq!(one.unfinished().await, 5);
}

#[tokio::test]
async fn a_full_queue_says_so() {
    let nats = Nats::start();
    let limits = Limits { pending: 5, ..LIMITS };
    let it = Gateway::open(Options { limits, ..options(&nats) }).await;
    eventually("the server answers", async || it.queue.status("x").await.is_ok()).await;
    for number in 0..limits.pending {
        it.publish(call(&number.to_string())).await;
    }
    assert_eq!(it.queue.publish(call("more")).await, Err(Error::Full));
    assert_eq!(it.queue.cancel("0").await, Ok(Changed::Yes));
    it.publish(call("more")).await;
    assert_eq!(it.state("0").await, Some(State::Cancelled));
    let first = it.take().await;
    assert_eq!(first.call.id, "1");
    // To try again is no new call.
    it.settle(first, retry(now())).await;
    assert_eq!(it.state("1").await, Some(State::Retrying));
}

#[tokio::test]
async fn a_dead_call_is_kept_until_it_is_revived() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    it.publish(call("a")).await;
    it.settle(it.take().await, dead()).await;
    let counts = it.queue.counts().await.unwrap();
    assert_eq!((counts[0].0.to_string(), counts[0].1.dead), ("echo.fn".to_owned(), 1));
    let filter = Filter { dead: Some(true), ..Filter::default() };
    assert_eq!(it.queue.list(&filter, None, 10).await.unwrap().calls[0].id, "a");
    assert_eq!(it.queue.revive("a").await, Ok(Changed::Yes));
    let delivery = it.take().await;
    assert_eq!((delivery.call.id.as_str(), delivery.attempts), ("a", 0));
    assert_eq!(it.queue.revive("a").await, Ok(Changed::No(State::Running)));
    it.settle(delivery, dead()).await;
    assert_eq!(it.queue.purge(&filter).await, Ok(1));
    assert_eq!(it.queue.status("a").await, Ok(None));
    assert_eq!(it.queue.counts().await, Ok(vec![]));
    assert_eq!(it.queue.revive("a").await, Ok(Changed::Unknown));
}

#[tokio::test]
async fn a_dead_call_that_succeeds_in_the_end_is_dead_no_more() {
    let directory = tempfile::TempDir::new().unwrap();
    let path = directory.path().join("nats.conf");
    // One who tries a dead call again, and comes no further than that.
    let deny = r#"{ publish: { deny: "$JS.API.STREAM.MSG.DELETE.gateway-faas-request-dead" } }"#;
    let halting = format!("{{ user: halting, password: p, permissions: {deny} }}");
    let users = format!("users = [ {halting}, {{ user: other, password: p }} ]");
    std::fs::write(&path, format!("authorization {{ {users} }}")).unwrap();
    let nats = Nats::start_with(&["-c", path.to_str().unwrap()]);
    let open = async |user: &str| {
        let auth = Auth::Password { user: user.to_owned(), password: "p".to_owned() };
        Gateway::open(Options { auth, ..options(&nats) }).await
    };
    let (halting, it) = (open("halting").await, open("other").await);
    for it in [&halting, &it] {
        eventually("the server answers", async || it.queue.status("x").await.is_ok()).await;
    }
    it.publish(call("a")).await;
    it.settle(it.take().await, dead()).await;
    assert_eq!(halting.queue.revive("a").await, Ok(Changed::Yes));
    // It is not made twice by one who saw it dead.
    assert_eq!(it.queue.revive("a").await, Ok(Changed::No(State::Queued)));
    it.settle(it.take().await, retry(now())).await;
    it.settle(it.take().await, succeeded()).await;
    it.is_empty().await;
    let dead = it.queue.counts().await.unwrap().iter().map(|(_, it)| it.dead).sum::<u64>();
    assert_eq!((it.state("a").await, dead), (Some(State::Succeeded), 0));
}

#[tokio::test]
async fn a_dead_call_is_dropped_or_tried_again_but_not_half_of_each() {
    let nats = Nats::start();
    let (one, two) = (Gateway::on(&nats).await, Gateway::on(&nats).await);
    let body = Bytes::from(vec![7; 1_100_000]);
    for round in 0..8 {
        let id = round.to_string();
        one.publish(Call { body: body.clone(), ..call(&id) }).await;
        one.settle(one.take().await, dead()).await;
        let (dropped, revived) = tokio::join!(two.queue.cancel(&id), one.queue.revive(&id));
        let (dropped, revived) = (dropped.unwrap(), revived.unwrap());
        if revived == Changed::Yes && dropped != Changed::Yes {
            let delivery = one.take().await;
            assert!(delivery.call.body == body);
            one.settle(delivery, succeeded()).await;
        }
        let expect = if dropped == Changed::Yes { State::Cancelled } else { State::Succeeded };
        assert_eq!(one.state(&id).await, Some(expect), "{round}: {dropped:?} {revived:?}");
        one.is_empty().await;
    }
}

#[tokio::test]
async fn a_delivery_that_is_dropped_is_taken_again() {
    let nats = Nats::start();
    // It is given back: the server would not find it out in time.
    let it = Gateway::leasing_long(&nats).await;
    it.publish(call("a")).await;
    drop(it.take().await);
    eventually("it waits again", async || it.state("a").await == Some(State::Queued)).await;
    let delivery = it.take().await;
    assert_eq!((delivery.call.id.as_str(), delivery.attempts), ("a", 0));
    drop(delivery);
    assert_eq!(it.take().await.call.id, "a");
}

#[tokio::test]
async fn what_has_been_kept_for_long_enough_is_forgotten() {
    let nats = Nats::start();
    let limits = Limits { result_ttl: 0, key_ttl: 0, ..LIMITS };
    let it = Gateway::open(Options { limits, ..options(&nats) }).await;
    eventually("the server answers", async || it.queue.status("x").await.is_ok()).await;
    let keyed = |id: &str| {
        let mut call = call(id);
        call.options.idempotency_key = Some("k".to_owned());
        call
    };
    it.publish(keyed("a")).await;
    it.settle(it.take().await, succeeded()).await;
    eventually("it is forgotten", async || it.queue.status("a").await == Ok(None)).await;
    assert_eq!(it.queue.answer("a").await, Ok(None));
    eventually("the key is forgotten", async || !it.publish(keyed("b")).await.repeated).await;
}

#[tokio::test]
async fn a_list_is_in_order_and_goes_on_where_it_ended() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    for (number, id) in ["a", "b", "c", "d", "e"].into_iter().enumerate() {
        let mut call = call(id);
        call.options.submitted_at = number as Millis;
        it.publish(call).await;
    }
    it.publish(call_of("other", "f")).await;
    let ids = async |filter: &Filter, after, limit| {
        let found = it.queue.list(filter, after, limit).await.unwrap();
        found.calls.into_iter().map(|status| status.id).collect::<Vec<_>>().concat()
    };
    let all = Filter::default();
    assert_eq!(ids(&all, None, 10).await, "abcdef");
    assert_eq!(
        (ids(&all, None, 2).await, ids(&all, Some("b"), 2).await),
        ("ab".into(), "cd".into())
    );
    assert_eq!(ids(&all, Some("none"), 2).await, "");
    let newest = Filter { order: Order::NewestFirst, ..all.clone() };
    assert_eq!(ids(&newest, None, 2).await, "fe");
    assert_eq!(ids(&newest, Some("e"), 3).await, "dcb");
    assert_eq!(ids(&newest, Some("a"), 3).await, "");
    let other = Filter { function: Some(call_of("other", "").function), ..all.clone() };
    assert_eq!(ids(&other, None, 10).await, "f");
    assert_eq!(it.queue.cancel("b").await, Ok(Changed::Yes));
    let cancelled = Filter { state: Some(State::Cancelled), ..all.clone() };
    assert_eq!(
        (ids(&cancelled, None, 9).await, ids(&all, None, 9).await),
        ("b".into(), "abcdef".into())
    );
    let running = it.take().await;
    assert_eq!(it.queue.purge(&all).await, Ok(5));
    assert_eq!(ids(&all, None, 9).await, running.call.id);
}

#[tokio::test]
async fn a_delayed_call_waits_for_its_time_and_loses_no_attempt() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    let mut later = call("later");
    let due = now() + 3000;
    later.options.not_before = Some(due);
    it.publish(later).await;
    it.publish(call("now")).await;
    let first = it.take().await;
    assert_eq!(first.call.id, "now");
    it.settle(first, succeeded()).await;
    let counts = it.queue.counts().await.unwrap();
    assert_eq!((counts[0].1.delayed, counts[0].1.pending), (1, 0));
    let second = it.take().await;
    assert!(now() >= due);
    assert_eq!((second.call.id.as_str(), second.attempts), ("later", 0));
    // The same for one that is tried again.
    let due = now() + 1000;
    it.settle(second, retry(due)).await;
    assert_eq!(it.state("later").await, Some(State::Retrying));
    let third = it.take().await;
    assert!(now() >= due);
    assert_eq!((third.call.id.as_str(), third.attempts), ("later", 1));
    it.settle(third, succeeded()).await;
    assert_eq!(it.queue.status("later").await.unwrap().unwrap().attempts, 2);
}

#[tokio::test]
async fn a_server_that_is_killed_in_mid_work_loses_nothing() {
    const CALLS: usize = 40;
    let mut nats = Nats::start();
    let it = Gateway::on(&nats).await;
    for number in 0..CALLS {
        it.publish(call(&number.to_string())).await;
    }
    let work = async {
        let mut made = BTreeMap::new();
        while made.len() < CALLS {
            let delivery = it.take().await;
            *made.entry(delivery.call.id.clone()).or_insert(0) += 1;
            // One that cannot be settled comes again.
            let _ = it.queue.settle(&delivery, &succeeded()).await;
        }
        made
    };
    let trouble = async {
        eventually("some are made", async || {
            it.queue.status("5").await.is_ok_and(|s| s.is_some_and(|s| s.state.is_final()))
        })
        .await;
        nats.kill();
        let start = Instant::now();
        assert_eq!(it.queue.publish(call("away")).await, Err(Error::Away));
        assert!(start.elapsed() < REFUSED_WITHIN, "{:?}", start.elapsed());
        assert_eq!(it.queue.status("5").await, Err(Error::Away));
        assert!(!it.queue.is_reachable());
        nats.restart();
    };
    let (made, ()) = tokio::join!(work, trouble);
    assert!(made.values().sum::<usize>() <= CALLS + 2, "{made:?}");
    for number in 0..CALLS {
        assert_eq!(it.state(&number.to_string()).await, Some(State::Succeeded), "{number}");
    }
    assert!(it.queue.is_reachable());
    it.lets_go().await;
}

#[tokio::test]
async fn a_call_that_runs_for_long_is_delivered_once() {
    let nats = Nats::start();
    let lease = Duration::from_secs(1);
    let (it, other) = (
        Gateway::open(Options { lease, ..options(&nats) }).await,
        Gateway::open(Options { lease, ..options(&nats) }).await,
    );
    eventually("the server answers", async || it.queue.status("x").await.is_ok()).await;
    it.publish(call("slow")).await;
    let delivery = it.take().await;
    assert!(other.takes_nothing(lease * 7 / 2).await);
    assert_eq!(it.state("slow").await, Some(State::Running));
    it.settle(delivery, succeeded()).await;
    assert!(other.takes_nothing(lease * 3 / 2).await);
    assert_eq!(it.queue.status("slow").await.unwrap().unwrap().attempts, 1);
}

#[tokio::test]
async fn a_call_that_comes_again_to_one_who_makes_it_is_made_once() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    it.publish(call("a")).await;
    let delivery = it.take().await;
    // As if nothing had been heard of it for too long.
    let strange = async_nats::connect(nats.url()).await.unwrap();
    let given_back = "$JS.ACK.gateway-faas-request-calls.fn,echo.1.1.1.0.0";
    strange.publish(given_back, "-NAK".into()).await.unwrap();
    strange.flush().await.unwrap();
    assert!(it.takes_nothing(LEASE * 3 / 2).await);
    it.settle(delivery, succeeded()).await;
    it.is_empty().await;
    let status = it.queue.status("a").await.unwrap().unwrap();
    assert_eq!((status.state, status.attempts), (State::Succeeded, 1));
}

#[tokio::test]
async fn a_final_state_is_there_for_as_long_as_its_message_may_come_again() {
    let nats = Nats::start();
    let limits = Limits { result_ttl: 0, key_ttl: 0, ..LIMITS };
    let it = Gateway::open(Options { limits, ..options(&nats) }).await;
    eventually("the server answers", async || it.queue.status("x").await.is_ok()).await;
    it.publish(call("a")).await;
    it.settle(it.take().await, succeeded()).await;
    assert_eq!(it.state("a").await, None);
    let notes = stream(&nats, "gateway-faas-request-notes").await;
    let cached = notes.cached_info();
    assert!(cached.config.max_age > LEASE * 2 && cached.state.messages == 1, "{cached:?}");
}

#[tokio::test]
async fn a_call_of_one_who_died_is_taken_by_another() {
    let nats = Nats::start();
    let (it, other) = (Gateway::on(&nats).await, Gateway::on(&nats).await);
    it.publish(call("a")).await;
    let taken = it.take().await;
    it.dies(vec![taken]).await;
    let delivery = other.take().await;
    assert_eq!((delivery.call.id.as_str(), delivery.attempts), ("a", 0));
    other.settle(delivery, succeeded()).await;
    assert_eq!(other.state("a").await, Some(State::Succeeded));
}

#[tokio::test]
async fn two_takers_share_the_work() {
    const CALLS: usize = 30;
    let nats = Nats::start();
    let (one, two) = (Gateway::on(&nats).await, Gateway::on(&nats).await);
    for number in 0..CALLS {
        one.publish(call(&number.to_string())).await;
    }
    let made = std::sync::Mutex::new(Vec::new());
    let work = async |it: &Gateway| {
        let mut mine = 0;
        while made.lock().unwrap().len() < CALLS {
            let taken = tokio::time::timeout(Duration::from_millis(500), it.queue.take(PLACES));
            let Ok(delivery) = taken.await else { continue };
            let delivery = delivery.unwrap();
            // So that the other has a chance.
            tokio::time::sleep(Duration::from_millis(20)).await;
            made.lock().unwrap().push(delivery.call.id.clone());
            it.settle(delivery, succeeded()).await;
            mine += 1;
        }
        mine
    };
    let both = async { tokio::join!(work(&one), work(&two)) };
    let (first, second) = within("all are made", both).await;
    assert!(first > 0 && second > 0, "{first} and {second}");
    let mut made = made.into_inner().unwrap();
    made.sort_unstable();
    made.dedup();
    assert_eq!((made.len(), first + second), (CALLS, CALLS));
}

#[tokio::test]
async fn a_body_larger_than_a_message_passes() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    let body: Bytes = (0..3_500_000u32).map(|n| (n % 251) as u8).collect::<Vec<_>>().into();
    let large = |id: &str| Call { body: body.clone(), ..call(id) };
    it.publish(large("a")).await;
    let delivery = it.take().await;
    assert!(delivery.call.body == body);
    it.settle(delivery, retry(now())).await;
    let delivery = it.take().await;
    assert_eq!((delivery.call.body == body, delivery.attempts), (true, 1));
    it.settle(delivery, dead()).await;
    assert_eq!(it.queue.revive("a").await, Ok(Changed::Yes));
    let delivery = it.take().await;
    assert!(delivery.call.body == body);
    let answer = Answer { status: 200, headers: Vec::new(), body: body.clone(), truncated: false };
    let (status, answer) = (Some(200), Some(answer));
    let done =
        Settlement::Finished { state: State::Succeeded, status, reason: None, answer, made: true };
    it.settle(delivery, done).await;
    assert!(it.queue.answer("a").await.unwrap().unwrap().body == body);
    it.publish(large("b")).await;
    assert!(it.publish(large("b")).await.repeated);
    assert_eq!(it.queue.cancel("b").await, Ok(Changed::Yes));
    // Nothing is left of bodies whose calls are over.
    let stored = stream(&nats, "gateway-faas-request-bodies").await;
    assert_eq!(stored.cached_info().state.messages, 0);
}

/// A stream of the queue, as the server has it.
pub(crate) async fn stream(nats: &Nats, name: &str) -> async_nats::jetstream::stream::Stream {
    let client = async_nats::connect(nats.url()).await.unwrap();
    async_nats::jetstream::new(client).get_stream(name).await.unwrap()
}

#[tokio::test]
async fn a_slow_function_does_not_hold_up_another() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    for number in 0..30 {
        it.publish(call_of("slow", &format!("s{number}"))).await;
    }
    // It takes what one function may have, and none of it ends.
    let mut hanging = Vec::new();
    while let Ok(taken) = tokio::time::timeout(LEASE, it.queue.take(PLACES)).await {
        hanging.push(taken.unwrap());
    }
    assert!((PLACES / 2..PLACES).contains(&hanging.len()), "{}", hanging.len());
    for number in 0..20 {
        it.publish(call_of("quick", &format!("q{number}"))).await;
    }
    let start = Instant::now();
    for _ in 0..20 {
        let delivery = it.take().await;
        assert_eq!(delivery.call.function.name, "quick");
        it.settle(delivery, succeeded()).await;
    }
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_server_that_is_away_at_start_is_found_later() {
    let mut nats = Nats::away();
    let it = Gateway::open(options(&nats)).await;
    for _ in 0..2 {
        let start = Instant::now();
        assert_eq!(it.queue.publish(call("a")).await, Err(Error::Away));
        assert!(start.elapsed() < REFUSED_WITHIN, "{:?}", start.elapsed());
    }
    assert!(!it.queue.is_reachable());
    let taker = async { it.take().await };
    let later = async {
        nats.restart();
        eventually("it is published", async || it.queue.publish(call("a")).await.is_ok()).await;
    };
    let (delivery, ()) = tokio::join!(taker, later);
    assert_eq!(delivery.call.id, "a");
    assert!(it.queue.is_reachable());
}

#[tokio::test]
async fn a_stream_that_is_there_is_left_as_it_is() {
    let nats = Nats::start();
    drop(Gateway::on(&nats).await);
    let limits = Limits { pending: 7, ..LIMITS };
    let it = Gateway::open(Options { limits, ..options(&nats) }).await;
    eventually("the server answers", async || it.queue.status("x").await.is_ok()).await;
    let calls = stream(&nats, "gateway-faas-request-calls").await;
    assert_eq!(calls.cached_info().config.max_messages, 2 * 50 + 1024);
    // It is said, and the queue works.
    let gateway = Process::builder()
        .provider(&Provider::saying("done"))
        .var("queue", "jetstream")
        .var("faas_nats_address", "127.0.0.1")
        .var("faas_nats_port", nats.port())
        .var("max_pending_calls", "7")
        .start()
        .await;
    eventually("it is queued", async || gateway.queue("echo", &[], "").await.status() == 202).await;
    gateway.logs("A stream of the queue is not set up as it should be").await;
    let said = gateway.log().concat();
    assert!(said.contains("gateway-faas-request-calls") && said.contains("max_msgs"), "{said}");
}

#[tokio::test]
async fn what_an_operator_removes_is_made_again() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    it.publish(call("a")).await;
    let client = async_nats::jetstream::new(async_nats::connect(nats.url()).await.unwrap());
    client.delete_consumer_from_stream("fn,echo", "gateway-faas-request-calls").await.unwrap();
    // For one who has not known the function before, and for one who has.
    let other = Gateway::on(&nats).await;
    assert_eq!(other.take().await.call.id, "a");
    client.delete_stream("gateway-faas-request-calls").await.unwrap();
    client.delete_stream("gateway-faas-request-claims").await.unwrap();
    eventually("it is published", async || it.queue.publish(call("b")).await.is_ok()).await;
    assert_eq!(it.take().await.call.id, "b");
}

#[tokio::test]
async fn a_call_that_was_purged_can_be_queued_again() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    for _ in 0..2 {
        assert!(!it.publish(call("a")).await.repeated);
        assert_eq!(it.queue.purge(&Filter::default()).await, Ok(1));
    }
}

#[tokio::test]
async fn a_key_stands_for_no_call_that_was_purged() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    let keyed = |id: &str| {
        let mut call = call(id);
        call.options.idempotency_key = Some("k".to_owned());
        call
    };
    // One that waits, one that is over, and one that is dead.
    for (round, settlement) in [None, Some(succeeded()), Some(dead())].into_iter().enumerate() {
        let (first, second) = (format!("a{round}"), format!("b{round}"));
        assert!(!it.publish(keyed(&first)).await.repeated, "{first}");
        if let Some(settlement) = settlement {
            it.settle(it.take().await, settlement).await;
        }
        let known = Published { id: first, repeated: true };
        assert_eq!(it.publish(keyed(&second)).await, known);
        assert_eq!(it.queue.purge(&Filter::default()).await, Ok(1));
    }
    // Two who queue it again at once make one call.
    let (a, b) = tokio::join!(it.publish(keyed("c")), it.publish(keyed("d")));
    assert_eq!((a.id == b.id, a.repeated != b.repeated), (true, true), "{a:?} {b:?}");
    assert_eq!(it.unfinished().await, 1);
}

#[tokio::test]
async fn one_id_can_name_a_call_of_each_function() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    let chosen = |function: &str| {
        let mut call = call_of(function, "an id of theirs");
        call.options.chosen_id = true;
        call
    };
    for _ in 0..2 {
        let repeated = it.unfinished().await > 0;
        for function in ["echo", "other"] {
            assert_eq!(it.publish(chosen(function)).await.repeated, repeated, "{function}");
        }
    }
    assert_eq!(it.unfinished().await, 2);
}

#[tokio::test]
async fn one_who_is_not_let_in_is_told_so_and_one_who_is_works() {
    let nats = Nats::start_with(&["--user", "u", "--pass", "secret"]);
    let auth = |password: &str| {
        let (user, password) = ("u".to_owned(), password.to_owned());
        Options { auth: Auth::Password { user, password }, ..options(&nats) }
    };
    let it = Gateway::open(auth("secret")).await;
    eventually("the server answers", async || it.queue.status("x").await.is_ok()).await;
    let other = Gateway::open(auth("wrong")).await;
    assert_eq!(other.queue.publish(call("a")).await, Err(Error::Away));
    assert!(!format!("{:?}", auth("secret")).contains("secret"));

    let nats = Nats::start_with(&["--auth", "a-token"]);
    let auth = Auth::Token("a-token".to_owned());
    let it = Gateway::open(Options { auth, ..options(&nats) }).await;
    eventually("the token lets in", async || it.queue.status("x").await.is_ok()).await;
}

#[tokio::test]
async fn a_key_in_a_file_lets_in() {
    // Made for this test.
    const PUBLIC: &str = "UDFY7NKZWTGG7GME2SROYCQLCRBCXT5ZOMK6A4R6FIQLPRWET2IVJZBU";
    const SEED: &str = "SUAAEM52D7C277JUXNPB23SDVGJLKND55UTXOUID3PHJU2TX3ENV2HEAZU";
    let directory = tempfile::TempDir::new().unwrap();
    let (config, seed) = (directory.path().join("nats.conf"), directory.path().join("seed"));
    let users = format!("authorization {{ users = [ {{ nkey: {PUBLIC} }} ] }}");
    std::fs::write(&config, users).unwrap();
    std::fs::write(&seed, format!("{SEED}\n")).unwrap();
    let nats = Nats::start_with(&["-c", config.to_str().unwrap()]);
    let it = Gateway::open(Options { auth: Auth::NkeySeed(seed), ..options(&nats) }).await;
    eventually("the key lets in", async || it.queue.status("x").await.is_ok()).await;
    // What can never be is said at once.
    let none = directory.path().join("none");
    for options in [
        Options { auth: Auth::NkeySeed(none.clone()), ..options(&nats) },
        Options { auth: Auth::Credentials(none.clone()), ..options(&nats) },
        Options { root_ca: Some(none), ..options(&nats) },
        Options { servers: vec!["http://x y".to_owned()], ..options(&nats) },
    ] {
        assert!(JetStream::open(options).await.is_err());
    }
}

/// Keys, certificates and tokens that were made for these tests.
fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/support/nats").join(name)
}

#[tokio::test]
async fn a_credentials_file_lets_in() {
    let nats = Nats::start_with(&["-c", fixture("operator.conf").to_str().unwrap()]);
    let auth = Auth::Credentials(fixture("user.creds"));
    let it = Gateway::open(Options { auth, ..options(&nats) }).await;
    eventually("it lets in", async || it.queue.status("x").await.is_ok()).await;
    it.publish(call("a")).await;
    it.settle(it.take().await, succeeded()).await;
    let other = Gateway::open(options(&nats)).await;
    assert_eq!(other.queue.publish(call("b")).await, Err(Error::Away));
}

#[tokio::test]
async fn a_server_is_believed_by_its_certificate() {
    let [certificate, key] = ["server.pem", "server.key"].map(fixture);
    let (certificate, key) = (certificate.to_str().unwrap(), key.to_str().unwrap());
    let nats = Nats::start_with(&["--tls", "--tlscert", certificate, "--tlskey", key]);
    let servers = |nats: &Nats| vec![nats.url().replace("nats://", "tls://")];
    let over_tls = Options { tls: true, servers: servers(&nats), ..options(&nats) };
    let known = Options { root_ca: Some(fixture("ca.pem")), ..over_tls.clone() };
    let it = Gateway::open(known.clone()).await;
    eventually("it is believed", async || it.queue.status("x").await.is_ok()).await;
    it.publish(call("a")).await;
    it.settle(it.take().await, succeeded()).await;
    // Not by one who does not know who signed it, nor is one without any.
    let stranger = Gateway::open(over_tls).await;
    assert_eq!(stranger.queue.publish(call("b")).await, Err(Error::Away));
    let plain = Nats::start();
    let deceived = Gateway::open(Options { servers: servers(&plain), ..known }).await;
    assert_eq!(deceived.queue.publish(call("b")).await, Err(Error::Away));
}

#[tokio::test]
async fn what_was_accepted_is_made_however_often_the_server_is_killed() {
    const CALLS: usize = 60;
    let mut nats = Nats::start();
    let (it, worker) = (Gateway::on(&nats).await, Gateway::on(&nats).await);
    let publish = async {
        for number in 0..CALLS {
            let call = call_of(["a", "b"][number % 2], &number.to_string());
            eventually("it is accepted", async || it.queue.publish(call.clone()).await.is_ok())
                .await;
        }
    };
    let made = std::sync::Mutex::new(BTreeMap::new());
    let work = async {
        loop {
            // How long it takes is up to the server: it may be away several times meanwhile.
            let delivery = worker.queue.take(PLACES).await.unwrap();
            *made.lock().unwrap().entry(delivery.call.id.clone()).or_insert(0) += 1;
            let first = delivery.attempts == 0;
            let settlement = if first { retry(now() + 50) } else { succeeded() };
            // One that fails may have been done all the same: the state says so.
            let _ = worker.queue.settle(&delivery, &settlement).await;
        }
    };
    let trouble = async {
        for at in [10, 25, 45] {
            let id = at.to_string();
            eventually("some are accepted", async || {
                it.queue.status(&id).await.is_ok_and(|status| status.is_some())
            })
            .await;
            nats.kill();
            nats.restart();
        }
    };
    let all = async {
        tokio::join!(publish, trouble);
        for number in 0..CALLS {
            let id = number.to_string();
            eventually("it has succeeded", async || {
                let status = it.queue.status(&id).await;
                status.is_ok_and(|it| it.is_some_and(|it| it.state == State::Succeeded))
            })
            .await;
        }
    };
    tokio::select! {
        () = work => {}
        () = all => {}
    }
    let made = made.into_inner().unwrap();
    // Each is made twice, those apart that were under way when the server was killed.
    assert!(made.len() == CALLS && made.values().sum::<usize>() < CALLS * 3, "{made:?}");
}

#[tokio::test]
async fn a_body_that_no_call_has_is_tidied_away() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    let large = |id: &str| Call { body: vec![7; 2_000_000].into(), ..call(id) };
    it.publish(large("kept")).await;
    it.publish(large("lost")).await;
    let calls = stream(&nats, "gateway-faas-request-calls").await;
    calls.purge().filter("faas.faas-request.*.*.lost").await.unwrap();
    // Another function's call may have the same id.
    it.publish(Call { body: vec![7; 2_000_000].into(), ..call_of("other", "kept") }).await;
    assert_eq!(it.tidy(LEASE * 1000, LEASE * 1000).await, Ok(0));
    assert_eq!(it.tidy(Duration::ZERO, LEASE * 1000).await, Ok(1));
    for _ in 0..2 {
        assert_eq!(it.take().await.call.body.len(), 2_000_000);
    }
}

/// One who may publish whatever it likes.
pub(crate) async fn stranger(nats: &Nats) -> async_nats::jetstream::Context {
    let options = async_nats::ConnectOptions::new().retry_on_initial_connect();
    async_nats::jetstream::new(options.connect(nats.url()).await.unwrap())
}

#[tokio::test]
async fn a_message_that_no_gateway_wrote_holds_up_nobody() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    it.publish(call("a")).await;
    let strange = stranger(&nats).await;
    let names = vec![r#"["h","1"]"#; 5_000];
    let meta = |headers: &str, target: &str| {
        let names = r#""id":"x","name":"echo","namespace":"fn""#;
        format!(r#"{{{names},"headers":[{headers}],"target":"{target}"}}"#)
    };
    // More headers than there is room for, a path to another place, and a body without end.
    let crowd = meta(&names.join(","), "");
    let (dots, large) = (meta("", "/%2e%2e/x"), meta("", ""));
    let parts = format!(r#"{{"name":"x","count":{}}}"#, usize::MAX);
    for (id, call, body) in [("x", &crowd, None), ("y", &dots, None), ("z", &large, Some(parts))] {
        let mut headers = async_nats::HeaderMap::new();
        headers.insert("Gateway-Version", "1");
        headers.insert("Gateway-Call", call.as_str());
        if let Some(body) = body {
            headers.insert("Gateway-Body", body.as_str());
        }
        let subject = format!("faas.faas-request.fn.echo.{id}");
        strange.publish_with_headers(subject, headers, "".into()).await.unwrap().await.unwrap();
    }
    it.publish(call("b")).await;
    for _ in 0..2 {
        let delivery = it.take().await;
        assert!(["a", "b"].contains(&delivery.call.id.as_str()), "{delivery:?}");
        it.settle(delivery, succeeded()).await;
    }
    assert!(it.takes_nothing(LEASE).await);
    assert!(
        it.queue.counts().await.is_ok() && it.queue.list(&Filter::default(), None, 9).await.is_ok()
    );
}

/// The stream of calls, of which nobody may remove any but by making it.
async fn undeletable_calls(nats: &Nats) {
    use async_nats::jetstream::stream::{Config, DiscardPolicy, RetentionPolicy};
    let calls = Config {
        name: "gateway-faas-request-calls".to_owned(),
        subjects: vec!["faas.faas-request.>".to_owned()],
        retention: RetentionPolicy::WorkQueue,
        discard: DiscardPolicy::New,
        max_messages: 50,
        max_messages_per_subject: 1,
        deny_delete: true,
        ..Config::default()
    };
    let made = async || stranger(nats).await.create_stream(calls.clone()).await.is_ok();
    eventually("the stream is made", made).await;
}

#[tokio::test]
async fn a_cancelled_call_is_not_made_though_its_message_cannot_be_removed() {
    let nats = Nats::start();
    undeletable_calls(&nats).await;
    let it = Gateway::on(&nats).await;
    it.publish(call("a")).await;
    it.publish(call("b")).await;
    assert_eq!(it.queue.cancel("a").await, Ok(Changed::Yes));
    assert_eq!(it.state("a").await, Some(State::Cancelled));
    // To purge a call is nothing but to remove it: that it is there is said.
    let queued = Filter { state: Some(State::Queued), ..Filter::default() };
    assert_eq!(it.queue.purge(&queued).await, Err(Error::Failed));
    let delivery = it.take().await;
    assert_eq!(delivery.call.id, "b");
    it.settle(delivery, succeeded()).await;
    // Whoever is given it has it go.
    let mut calls = stream(&nats, "gateway-faas-request-calls").await;
    tokio::select! {
        taken = it.queue.take(PLACES) => panic!("made though it was cancelled: {taken:?}"),
        () = eventually("it is gone", async || calls.info().await.unwrap().state.messages == 0) => {}
    }
    assert_eq!(it.state("a").await, Some(State::Cancelled));
}
