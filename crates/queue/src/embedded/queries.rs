//! Read-only queries: states of calls, lists, counts.

use std::collections::HashMap;

use crate::embedded::schedule::CallSeq;
use crate::embedded::store::{Snapshot, TableGroup};
use crate::embedded::tables;
use crate::embedded::{SCAN_BATCH_SIZE, Shared};
use crate::status::CallRecord;
use crate::{Error, Filter, Order, QueueDepth};
use gateway_base::function::Function;

/// Returns the number at which a list continues after `number`, if any.
pub(super) fn following(order: Order, number: CallSeq) -> Option<CallSeq> {
    match order {
        Order::OldestFirst => number.checked_add(1),
        Order::NewestFirst => number.checked_sub(1),
    }
}

impl Shared {
    pub(super) fn status(&self, id: &str) -> Result<Option<CallRecord>, Error> {
        self.read_snapshot(|snapshot| {
            let Some(number) = snapshot.number_of(id)? else { return Ok(None) };
            self.status_of(snapshot, number)
        })
    }

    fn status_of(
        &self,
        snapshot: &Snapshot,
        number: CallSeq,
    ) -> tables::Result<Option<CallRecord>> {
        let start = self.state().executions.get(&number).and_then(|run| run.start);
        let record = match snapshot.record(number)? {
            Some(record) => Some(record),
            None if start.is_some() => snapshot.pending_record(number)?,
            None => None,
        };
        if let Some(record) = record {
            return Ok(Some(match start {
                Some(start) => start.apply_to(record),
                None => record,
            }));
        }
        if let Some((finished, _)) = snapshot.finished(number)? {
            return Ok(Some(finished));
        }
        snapshot.pending_record(number)
    }

    /// Finds at most `limit` calls that match `filter`, in its order, starting at the number `first`.
    pub(super) fn find(
        &self,
        filter: &Filter,
        first: Option<CallSeq>,
        limit: usize,
    ) -> Result<Vec<(CallSeq, CallRecord)>, Error> {
        let label = filter.function.as_ref().map(Function::to_string);
        let matches = |status: &CallRecord| {
            filter.state.is_none_or(|state| state == status.state)
                && filter.dead_letter.is_none_or(|dead| dead == status.dead_letter)
                && label.as_ref().is_none_or(|label| *label == status.function)
        };
        let groups = TableGroup::for_filter(filter);
        self.read_snapshot(|snapshot| {
            let (mut found, mut next) = (Vec::new(), first);
            while let Some(first) = next.filter(|_| found.len() < limit) {
                let numbers = match filter.order {
                    Order::OldestFirst => snapshot.numbers_from(groups, first, SCAN_BATCH_SIZE)?,
                    Order::NewestFirst => {
                        snapshot.numbers_down_from(groups, first, SCAN_BATCH_SIZE)?
                    }
                };
                next = numbers.last().and_then(|last| following(filter.order, *last));
                for number in numbers {
                    if let Some(status) = self.status_of(snapshot, number)?
                        && matches(&status)
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
        let state = self.state();
        let mut counts: HashMap<String, (QueueDepth, Option<CallSeq>)> = HashMap::new();
        for (label, ready, delayed, running, oldest) in state.schedule.function_counts() {
            let (pending, delayed, running) = (ready as u64, delayed as u64, running as u64);
            let depth = QueueDepth { pending, delayed, running, ..QueueDepth::default() };
            counts.insert(label.to_owned(), (depth, oldest));
        }
        for (label, dead) in &state.dead_letters {
            counts.entry(label.clone()).or_default().0.dead_letters = *dead;
        }
        drop(state);
        let mut all = Vec::new();
        for (label, (mut counts, oldest)) in counts {
            if let Some(number) = oldest {
                let call = self.read_snapshot(|snapshot| snapshot.pending_record(number))?;
                counts.oldest = call.map(|call| call.submitted_at);
            }
            let function = Function::parse(&label, "");
            all.extend(function.filter(|_| counts != QueueDepth::default()).map(|f| (f, counts)));
        }
        all.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        Ok(all)
    }
}
