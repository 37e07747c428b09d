//! What is asked of the queue: states of calls, lists, counts. Nothing here changes anything.

use std::collections::HashMap;

use crate::function::Function;
use crate::queue::embedded::schedule::Number;
use crate::queue::embedded::store::{self, Shelf, View};
use crate::queue::embedded::{SCAN, Shared};
use crate::queue::status::CallRecord;
use crate::queue::{Error, Filter, Order, QueueDepth};

/// The number after which a list goes on, if there is one.
pub(super) fn following(order: Order, number: Number) -> Option<Number> {
    match order {
        Order::OldestFirst => number.checked_add(1),
        Order::NewestFirst => number.checked_sub(1),
    }
}

impl Shared {
    pub(super) fn status(&self, id: &str) -> Result<Option<CallRecord>, Error> {
        self.view(|view| {
            let Some(number) = view.number(id)? else { return Ok(None) };
            self.status_of(view, number)
        })
    }

    fn status_of(&self, view: &View, number: Number) -> store::Result<Option<CallRecord>> {
        let began = self.waiting().running.get(&number).and_then(|run| run.began);
        let noted = match view.progress(number)? {
            Some(noted) => Some(noted),
            None if began.is_some() => view.queued(number)?,
            None => None,
        };
        if let Some(noted) = noted {
            return Ok(Some(match began {
                Some(began) => began.of(noted),
                None => noted,
            }));
        }
        if let Some((finished, _)) = view.finished(number)? {
            return Ok(Some(finished));
        }
        view.queued(number)
    }

    /// At most `limit` of the calls that `filter` means, in its order, beginning at the number `first`.
    pub(super) fn find(
        &self,
        filter: &Filter,
        first: Option<Number>,
        limit: usize,
    ) -> Result<Vec<(Number, CallRecord)>, Error> {
        let label = filter.function.as_ref().map(Function::to_string);
        let means = |status: &CallRecord| {
            filter.state.is_none_or(|state| state == status.state)
                && filter.dead_letter.is_none_or(|dead| dead == status.dead_letter)
                && label.as_ref().is_none_or(|label| *label == status.function)
        };
        let shelves = Shelf::with(filter);
        self.view(|view| {
            let (mut found, mut next) = (Vec::new(), first);
            while let Some(first) = next.filter(|_| found.len() < limit) {
                let numbers = match filter.order {
                    Order::OldestFirst => view.numbers_from(shelves, first, SCAN)?,
                    Order::NewestFirst => view.numbers_down_from(shelves, first, SCAN)?,
                };
                next = numbers.last().and_then(|last| following(filter.order, *last));
                for number in numbers {
                    if let Some(status) = self.status_of(view, number)?
                        && means(&status)
                        && found.len() < limit
                    {
                        found.push((number, status));
                    }
                }
            }
            Ok(found)
        })
    }

    pub(super) fn depths(&self) -> Result<Vec<(Function, QueueDepth)>, Error> {
        let waiting = self.waiting();
        let mut counts: HashMap<String, (QueueDepth, Option<Number>)> = HashMap::new();
        for (label, ready, delayed, running, oldest) in waiting.schedule.counts() {
            let (pending, delayed, running) = (ready as u64, delayed as u64, running as u64);
            let known = QueueDepth { pending, delayed, running, ..QueueDepth::default() };
            counts.insert(label.to_owned(), (known, oldest));
        }
        for (label, dead) in &waiting.dead {
            counts.entry(label.clone()).or_default().0.dead_letters = *dead;
        }
        drop(waiting);
        let mut all = Vec::new();
        for (label, (mut counts, oldest)) in counts {
            if let Some(number) = oldest {
                let call = self.view(|view| view.queued(number))?;
                counts.oldest = call.map(|call| call.submitted_at);
            }
            let function = Function::parse(&label, "");
            all.extend(function.filter(|_| counts != QueueDepth::default()).map(|f| (f, counts)));
        }
        all.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        Ok(all)
    }
}
