//! A model-based test: random operations on a queue, compared with a list of the expected calls.

use std::collections::BTreeMap;

use super::*;

const LIMITS: Limits = Limits { max_pending: 100_000, ..super::LIMITS };

struct ModelTest {
    directory: TempDir,
    queue: Embedded,
    rng: fastrand::Rng,
    /// Expected calls with their states.
    expected: BTreeMap<String, CallState>,
    dead: Vec<String>,
}

impl ModelTest {
    fn begin(seed: u64) -> Self {
        let directory = TempDir::new().unwrap();
        let queue = Embedded::open(directory.path(), LIMITS).unwrap();
        Self {
            directory,
            queue,
            rng: fastrand::Rng::with_seed(seed),
            expected: BTreeMap::new(),
            dead: Vec::new(),
        }
    }

    async fn publish(&mut self) {
        let count = 1 + self.rng.usize(..80);
        let mut calls = Vec::new();
        for _ in 0..count {
            let chosen_id = self.rng.usize(..10) == 0;
            let id = match chosen_id {
                true => format!("chosen-{}", self.queue.shared.next_number()),
                false => self.queue.new_call_id(&echo()),
            };
            let mut call = call(&id);
            call.options.chosen_id = chosen_id;
            if self.rng.usize(..10) == 0 {
                call.body = vec![b'x'; 20_000 + self.rng.usize(..50_000)].into();
            }
            calls.push(call);
        }
        // Calls published later may have lower numbers.
        if self.rng.usize(..2) == 0 {
            calls.reverse();
        }
        let ids: Vec<_> = calls.iter().map(|call| call.id.clone()).collect();
        let published = calls.into_iter().map(|call| self.queue.publish(call, None));
        for published in futures_util::future::try_join_all(published).await.unwrap() {
            assert!(!published.duplicate);
        }
        self.expected.extend(ids.into_iter().map(|id| (id, CallState::Queued)));
    }

    async fn work(&mut self) {
        let waiting = self.queue.shared.state().schedule.pending();
        let mut taken = Vec::new();
        for _ in 0..self.rng.usize(..60).min(waiting) {
            taken.push(self.queue.receive(1000).await.unwrap());
        }
        for delivery in taken {
            let id = delivery.call.id.clone();
            let (settlement, state) = match self.rng.usize(..8) {
                0 => {
                    let retry = Settlement::Retry { at: 0, status: Some(503), reason: None };
                    (retry, CallState::Retrying)
                }
                1 => {
                    self.dead.push(id.clone());
                    (dead(), CallState::Failed)
                }
                // The call is requeued.
                2 => continue,
                _ => (succeeded(), CallState::Succeeded),
            };
            settle(delivery, settlement).await;
            self.expected.insert(id, state);
        }
    }

    async fn change(&mut self) {
        let position = self.rng.usize(..self.expected.len().max(1));
        let Some((id, state)) =
            self.expected.iter().nth(position).map(|(id, state)| (id.clone(), *state))
        else {
            return;
        };
        let dead = self.dead.iter().position(|dead| *dead == id);
        if dead.is_some() && self.rng.usize(..2) == 0 {
            assert_eq!(self.queue.redrive(&id).await.unwrap(), ChangeOutcome::Applied);
            self.expected.insert(id, CallState::Queued);
        } else {
            let expect = match (state.is_final(), dead) {
                (true, None) => ChangeOutcome::WrongState(state),
                _ => ChangeOutcome::Applied,
            };
            assert_eq!(self.queue.cancel(&id).await.unwrap(), expect, "{id} {state:?}");
            if expect == ChangeOutcome::Applied {
                self.expected.insert(id, CallState::Cancelled);
            }
        }
        dead.map(|dead| self.dead.swap_remove(dead));
    }

    async fn purge(&mut self) {
        const STATES: [CallState; 4] =
            [CallState::Cancelled, CallState::Retrying, CallState::Queued, CallState::Succeeded];
        let state = STATES[self.rng.usize(..STATES.len())];
        let filter = Filter { state: Some(state), ..Filter::default() };
        let gone: Vec<_> = self.expected.extract_if(.., |_, kept| *kept == state).collect();
        assert_eq!(self.queue.purge(&filter).await.unwrap(), gone.len() as u64, "{state:?}");
        for (id, _) in gone.iter().take(5) {
            assert_eq!(self.queue.status(id).await.unwrap(), None, "{id}");
        }
    }

    fn reopen(&mut self) {
        *self.queue.shared.store.write().unwrap() = None;
        self.queue = Embedded::open(self.directory.path(), LIMITS).unwrap();
    }

    /// All calls that match `filter`, read in pages of `limit`, newest first.
    async fn newest_first(&self, filter: &Filter, limit: usize) -> Vec<CallRecord> {
        let filter = Filter { order: Order::NewestFirst, ..filter.clone() };
        let mut all: Vec<CallRecord> = Vec::new();
        loop {
            let after = all.last().map(|status| status.id.as_str());
            let page = self.queue.list(&filter, after, limit).await.unwrap().calls;
            assert!(page.len() <= limit);
            if page.is_empty() {
                return all;
            }
            all.extend(page);
        }
    }

    async fn check(&self) {
        for (id, state) in &self.expected {
            let status = self.queue.status(id).await.unwrap();
            assert_eq!(status.map(|status| status.state), Some(*state), "{id}");
            let response = self.queue.result(id).await.unwrap();
            assert_eq!(response.is_some(), *state == CallState::Succeeded, "{id} {state:?}");
        }
        let listed = self.queue.list(&Filter::default(), None, usize::MAX / 2).await.unwrap().calls;
        let mut newest_first = self.newest_first(&Filter::default(), 97).await;
        newest_first.reverse();
        assert!(newest_first == listed, "{} and {}", newest_first.len(), listed.len());
        let is_over = |status: &CallRecord| status.state == CallState::Succeeded;
        let mut over = self.newest_first(&filter_of(CallState::Succeeded), 7).await;
        over.reverse();
        assert!(over.iter().eq(listed.iter().filter(|status| is_over(status))));
        let mut listed: Vec<_> =
            listed.into_iter().map(|record| (record.id, record.state)).collect();
        listed.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        let expected: Vec<_> = self.expected.clone().into_iter().collect();
        assert!(listed == expected, "{} listed, {} expected", listed.len(), expected.len());
        let counts = self.queue.depths().await.unwrap().pop().map(|(_, counts)| counts);
        let counts = counts.unwrap_or_default();
        let waiting = expected.iter().filter(|(_, state)| !state.is_final()).count() as u64;
        assert_eq!((counts.pending, counts.dead_letters), (waiting, self.dead.len() as u64));
    }
}

fn filter_of(state: CallState) -> Filter {
    Filter { state: Some(state), ..Filter::default() }
}

#[tokio::test]
async fn random_operations_match_the_model() {
    for seed in 0..5 {
        let mut test = ModelTest::begin(seed);
        for _ in 0..60 {
            match test.rng.usize(..12) {
                0..4 => test.publish().await,
                4..8 => test.work().await,
                8..10 => test.change().await,
                10 => test.purge().await,
                _ => test.reopen(),
            }
        }
        test.check().await;
        test.reopen();
        test.check().await;
    }
}
