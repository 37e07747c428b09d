//! The queue on a NATS server with JetStream.
//!
//! A call is one message from its publish to its end: the message says how often the call was made and when it is due,
//! and a retry replaces it in one step. So there is no moment at which a call could be lost; at worst it is made twice.
//! Calls that come at the same time are one message together, until they end or have to go on by themselves.
//! What is stored beside it (claims, final states, answers, keys) is written before the message goes, never after.

mod begun;
mod bundle;
mod consumers;
mod dead;
mod fill;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod gather;
mod idle;
mod ids;
mod lease;
mod lines;
mod mend;
mod message;
mod options;
mod pace;
mod parts;
mod publish;
mod pull;
mod roll;
mod server;
mod state;
mod streams;
mod subject;
mod survey;
mod taken;
mod together;
mod tries;
mod unpack;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use tokio::sync::{Notify, OnceCell, Semaphore};

pub(super) use self::lease::Lease;
pub use self::options::{Auth, Options};
pub use self::subject::token;

use crate::function::Function;
use crate::queue::call::QueuedCall;
use crate::queue::jetstream::begun::Begun;
use crate::queue::jetstream::consumers::Consumers;
use crate::queue::jetstream::fill::Fill;
use crate::queue::jetstream::gather::Gather;
use crate::queue::jetstream::idle::IDLE;
use crate::queue::jetstream::ids::Keys;
use crate::queue::jetstream::lines::Lines;
use crate::queue::jetstream::pull::Arrived;
use crate::queue::jetstream::roll::Roll;
use crate::queue::jetstream::server::{Fault, Server};
use crate::queue::jetstream::subject::Names;
use crate::queue::jetstream::taken::Taken;
use crate::queue::jetstream::tries::Tries;
use crate::queue::reply_batch::ReplyChannel;
use crate::queue::status::{CallRecord, Settlement, StoredResponse};
use crate::queue::tasks::Tasks;
use crate::queue::{
    CallPage, ChangeOutcome, Delivery, Error, Filter, MemoryPermit, Published, QueueDepth,
};

/// A publish is answered within this time, one of a large body within the other.
const PUBLISH: Duration = Duration::from_millis(1900);
const PUBLISH_LARGE: Duration = Duration::from_secs(60);
/// The same for a question.
const QUESTION: Duration = Duration::from_millis(1900);
/// Between looks for bodies that no call has.
const TIDY: Duration = Duration::from_secs(3600);
/// How long the tasks may take to end.
const STOP: Duration = Duration::from_secs(2);

/// The queue. Cheap to clone.
#[derive(Clone)]
pub struct JetStream {
    shared: Arc<Shared>,
    /// Where the thread that publishes much gets its answers.
    desk: Option<ReplyChannel>,
}

struct Shared {
    options: Options,
    names: Names,
    server: Server,
    lines: Mutex<Lines<Arrived>>,
    begun: Mutex<Begun>,
    roll: Roll,
    /// Where calls come that were asked for.
    inbox: OnceCell<String>,
    consumers: Mutex<Consumers>,
    gather: Gather,
    keys: Keys,
    fill: Fill,
    taken: Mutex<Taken>,
    /// How often bodies that are not there were looked for.
    looks: Tries,
    /// How often calls have made their worker panic.
    panics: Tries,
    /// How the calls of a large queue were counted last.
    counted: Mutex<Option<survey::Counted>>,
    /// One who has but a call's id has the server look at every subject: one after the other.
    searching: Semaphore,
    /// When functions of other gateways were looked for, and over which connection.
    looked: Mutex<Option<(Instant, u64)>>,
    tidied: Mutex<Instant>,
    tidied_to: Mutex<Option<parts::Body>>,
    /// Somebody may find a call now.
    ready: Notify,
    tasks: Tasks,
}

impl JetStream {
    /// Begins to connect. The server may be away: then the queue comes to life when the server does.
    ///
    /// # Errors
    /// When the options cannot be: a file that is not there, an address that is none.
    pub async fn open(options: Options) -> anyhow::Result<Self> {
        if options.in_memory {
            tracing::warn!(
                "Queued calls are kept in the memory of NATS: they are lost when its servers end"
            );
        }
        let server = Server::open(&options).await?;
        let shared = Shared {
            names: Names::new(&options.queue),
            options,
            server,
            lines: Mutex::new(Lines::new()),
            begun: Mutex::default(),
            roll: Roll::new(),
            inbox: OnceCell::new(),
            consumers: Mutex::default(),
            gather: Gather::new(),
            keys: Keys::new(),
            fill: Fill::new(),
            taken: Mutex::default(),
            looks: Tries::default(),
            panics: Tries::default(),
            counted: Mutex::default(),
            searching: Semaphore::new(1),
            looked: Mutex::default(),
            tidied: Mutex::new(Instant::now()),
            tidied_to: Mutex::default(),
            ready: Notify::new(),
            tasks: Tasks::new(),
        };
        let shared = Arc::new(shared);
        Gather::start(&shared);
        Ok(Self { shared, desk: None })
    }

    /// This queue, for one who publishes much on the current thread and its runtime.
    pub(super) fn for_thread(&self) -> Self {
        Self { shared: Arc::clone(&self.shared), desk: Some(ReplyChannel::open()) }
    }

    /// An id by which a call of `function` is found quickly.
    pub(super) fn new_call_id(function: &Function) -> String {
        ids::fresh(function)
    }

    /// Ends all that goes on by itself: leases are not extended any more, and what was fetched ahead goes back. What
    /// was dropped before is given back.
    pub async fn stop(&self) {
        self.shared.tasks.stop();
        let ahead = self.shared.lines().clear();
        let begun = self.shared.begun().clear();
        drop(begun);
        let back = async {
            begun::go_back(&self.shared, ahead).await;
            self.shared.tasks.wait().await;
            self.shared.roll.leave(&self.shared).await;
            // What was not sent by now is found out by the server itself.
            let _ = self.shared.server.client.flush().await;
        };
        let _ = tokio::time::timeout(STOP, back).await;
    }

    pub(super) fn reconnects(&self) -> u64 {
        self.shared.server.reconnects()
    }

    /// Finds out whether the queue can be used.
    pub(super) async fn probe(&self) {
        if let Ok(shared) = self.shared.ready().await
            && let Err(error) = shared.server.look(&shared.names).await
        {
            tracing::debug!(%error, "The queue's server does not do what it is asked");
        }
    }

    pub(super) fn is_reachable(&self) -> bool {
        self.shared.server.is_of_use()
    }

    /// Removes bodies whose calls are over or never came to be: what a process or a server leaves that is killed. To be
    /// called every hour or so; a body that is younger than `age` stays. So do consumers that were used within `idle`.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn tidy(&self, age: Duration, idle: Duration) -> Result<u64, Error> {
        let shared = self.shared.ready().await?;
        shared.tidy_records(age).await?;
        let removed = shared.tidy(age).await?;
        shared.tidy_consumers(idle).await?;
        Ok(removed)
    }

    /// Counts calls and tidies up when it is time. To be called every second or so.
    pub async fn sweep_expired(&self) {
        if let Err(error) = self.shared.count_again().await {
            tracing::debug!(%error, "The calls cannot be counted");
        }
        {
            let mut tidied = self.shared.tidied.lock().unwrap_or_else(PoisonError::into_inner);
            if tidied.elapsed() < TIDY && self.shared.tidied_to().is_none() {
                return;
            }
            *tidied = Instant::now();
        }
        match self.tidy(TIDY, IDLE).await {
            Ok(0) => {}
            Ok(removed) => tracing::info!(removed, "Bodies removed that no call has any more"),
            Err(error) => tracing::debug!(%error, "The queue cannot be tidied up"),
        }
    }

    /// Takes `call` in; its body has `room` until that is done, whoever still waits for it.
    pub(super) async fn publish(
        &self,
        call: QueuedCall,
        room: Option<MemoryPermit>,
    ) -> Result<Published, Error> {
        match &self.desk {
            Some(desk) => {
                let deadline = self.shared.deadline(&call);
                within(deadline, self.shared.gather.publish(call, room, desk.clone())).await
            }
            None => Box::pin(self.shared.publish_in_time(&call)).await,
        }
    }

    pub(super) async fn receive(&self, places: usize) -> Result<Delivery, Error> {
        begun::take(&self.shared, places).await
    }

    pub(super) async fn settle(&self, lease: &Lease, settlement: &Settlement) -> Result<(), Error> {
        lease.settle(settlement).await
    }

    pub(super) async fn status(&self, id: &str) -> Result<Option<CallRecord>, Error> {
        within(QUESTION, async { Ok(self.shared.ready().await?.status(id).await?) }).await
    }

    pub(super) async fn result(&self, id: &str) -> Result<Option<StoredResponse>, Error> {
        within(QUESTION, async { Ok(self.shared.ready().await?.answer(id).await?) }).await
    }

    pub(super) async fn cancel(&self, id: &str) -> Result<ChangeOutcome, Error> {
        Ok(self.shared.ready().await?.cancel(id).await?)
    }

    pub(super) async fn redrive(&self, id: &str) -> Result<ChangeOutcome, Error> {
        Ok(self.shared.ready().await?.revive(id).await?)
    }

    pub(super) async fn list(
        &self,
        filter: &Filter,
        after: Option<&str>,
        limit: usize,
    ) -> Result<CallPage, Error> {
        Ok(self.shared.ready().await?.list(filter, after, limit).await?)
    }

    pub(super) async fn purge(&self, filter: &Filter) -> Result<u64, Error> {
        Ok(self.shared.ready().await?.purge_all(filter).await?)
    }

    pub(super) async fn depths(&self) -> Result<Vec<(Function, QueueDepth)>, Error> {
        Ok(self.shared.ready().await?.counts().await?)
    }
}

impl Shared {
    fn lines(&self) -> MutexGuard<'_, Lines<Arrived>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begun(&self) -> MutexGuard<'_, Begun> {
        self.begun.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn consumers(&self) -> MutexGuard<'_, Consumers> {
        self.consumers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This, once the server is there with all that belongs to the queue.
    async fn ready(&self) -> Result<&Self, Fault> {
        match self.server.connected() {
            Some(connection) if self.server.is_prepared(connection) => Ok(self),
            // On the heap, here and elsewhere: what is rare makes no room for itself in each call's future, which is
            // moved about.
            _ => Box::pin(self.prepare()).await,
        }
    }

    /// Takes a call in, or says after a while that the server is away.
    async fn publish_in_time(&self, call: &QueuedCall) -> Result<Published, Error> {
        within(self.deadline(call), self.publish(call)).await
    }

    fn deadline(&self, call: &QueuedCall) -> Duration {
        if self.server.fits(0, call.body.len()) { PUBLISH } else { PUBLISH_LARGE }
    }

    async fn prepare(&self) -> Result<&Self, Fault> {
        let connection = self.server.connection().await?;
        if !self.server.is_prepared(connection) {
            // Several may do this at a time: all that is missing is made once.
            let last = streams::prepare(&self.server, &self.names, &self.options).await?;
            self.server.prepared(connection, last);
            self.consumers().forget(connection);
        }
        Ok(self)
    }
}

fn within<T>(
    deadline: Duration,
    task: impl Future<Output = Result<T, Error>>,
) -> impl Future<Output = Result<T, Error>> {
    // Not `async`: the future of one would be twice as large.
    tokio::time::timeout(deadline, task).map(|done| done.unwrap_or(Err(Error::Unreachable)))
}
