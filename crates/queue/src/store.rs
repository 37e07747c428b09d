//! What a queue stores about its calls: records and results, which clients query, and lists and counts for operators.

use futures_util::future::BoxFuture;

use crate::Error;
use crate::call::UnixMillis;
use crate::status::{CallRecord, CallState, StoredResponse};
use gateway_base::function::Function;

/// The stored calls of a queue, by id and as lists. Embedded and JetStream queues have one; NATS Streaming, which
/// cannot look up a message, has none.
///
/// No operation is on the path of a call, so the futures are boxed.
pub trait JobStore: Send + Sync {
    /// Returns the record of a call, or `None` if the id is unknown or no longer kept.
    ///
    /// # Errors
    ///
    /// When the backend fails.
    fn status<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<Option<CallRecord>, Error>>;

    /// Returns the stored response of a finished call, if one was kept.
    ///
    /// # Errors
    ///
    /// When the backend fails.
    fn result<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<Option<StoredResponse>, Error>>;

    /// Cancels a call that is not running. If the future is dropped, the call may be cancelled or not.
    ///
    /// # Errors
    ///
    /// When the backend fails. The caller may retry.
    fn cancel<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<ChangeOutcome, Error>>;

    /// Enqueues a dead letter again, with all its attempts. If the future is dropped, the call may be enqueued or not.
    ///
    /// # Errors
    ///
    /// When the backend fails. The caller may retry.
    fn redrive<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<ChangeOutcome, Error>>;

    /// Lists at most `limit` calls after the one with the id `after`, in the order of `filter`.
    ///
    /// # Errors
    ///
    /// When the backend fails.
    fn list<'a>(
        &'a self,
        filter: &'a Filter,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<CallPage, Error>>;

    /// Deletes the calls that match `filter` and do not run. Returns their number. If the future is dropped, some of
    /// them may have been deleted.
    ///
    /// # Errors
    ///
    /// When the backend fails. Some calls may have been deleted.
    fn purge<'a>(&'a self, filter: &'a Filter) -> BoxFuture<'a, Result<u64, Error>>;

    /// Counts the calls of each function by state.
    ///
    /// # Errors
    ///
    /// When the backend fails.
    fn depths(&self) -> BoxFuture<'_, Result<Vec<(Function, QueueDepth)>, Error>>;
}

/// One page of a list of calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallPage {
    pub calls: Vec<CallRecord>,
    /// `false` if the list was cut short: some calls may then appear on no page.
    pub complete: bool,
}

/// Result of a request to cancel a call or to redrive a dead letter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeOutcome {
    Applied,
    /// The call is in a state that does not allow the change.
    WrongState(CallState),
    NotFound,
}

/// Selects and orders calls.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    pub state: Option<CallState>,
    pub function: Option<Function>,
    pub dead_letter: Option<bool>,
    pub order: Order,
}

/// Order of a list of calls, by the time of submission.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    #[default]
    OldestFirst,
    NewestFirst,
}

/// Number of calls of one function, by state.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct QueueDepth {
    pub pending: u64,
    pub running: u64,
    pub delayed: u64,
    pub dead_letters: u64,
    /// Submission time of the oldest pending call.
    pub oldest: Option<UnixMillis>,
}
