//! What a server that was killed has got wrong about a function's calls.
//!
//! It stores messages at once, but not that one was removed, nor what its consumer knows. So a consumer may wait for
//! word about messages that are not there any more: each of them it tries to give to somebody before anything new, and
//! comes to the next only when it is asked again. And messages may be back whose calls are over, and that the consumer
//! does not give to anybody, for it takes them to be over as well.

use std::collections::HashSet;

use async_nats::jetstream::AckKind;
use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};

use crate::function::Function;
use crate::queue::jetstream::Shared;
use crate::queue::jetstream::server::Fault;
use crate::queue::jetstream::state::Waiting;
use crate::queue::jetstream::subject::{CALLS, consumer};
use crate::queue::jetstream::together::Bundled;

/// So many messages are looked at that somebody was given before: calls that run, and calls that are put off.
const MOST: usize = 10_000;
/// So many numbers are looked at, the latest, for messages that are not there.
const NUMBERS: u64 = 100_000;
/// So many questions are on their way at a time.
const TOGETHER: usize = 32;

impl Shared {
    /// Sees once, for each start of the server, that it knows which calls of `function` are over.
    pub(super) async fn mend(&self, function: &Function) -> Result<(), Fault> {
        let server = self.server.client.server_info().server_id;
        if self.consumers().is_mended(function, &server) {
            return Ok(());
        }
        Box::pin(self.mend_now(function)).await?;
        self.consumers().mended(function, server);
        Ok(())
    }

    async fn mend_now(&self, function: &Function) -> Result<(), Fault> {
        let (server, names) = (&self.server, &self.names);
        let known = server.consumer(&names.calls, &consumer(function)).await?;
        let (mut there, mut over, mut left_over) = (HashSet::new(), Vec::new(), 0);
        let (of_function, mut next) = (names.of(CALLS, Some(function)), 1);
        while there.len() < MOST
            && let Some(found) = server.next(&names.calls, &of_function, next).await?
            && found.sequence <= known.delivered
        {
            there.insert(found.sequence);
            next = found.sequence + 1;
            match Bundled::new(found.clone()) {
                Some(bundled) if self.is_left_over(&bundled).await? => {
                    server.delete(&names.calls, bundled.which.sequence).await?;
                    left_over += 1;
                }
                Some(_) => {}
                None => over.extend(Waiting::new(found)),
            }
        }
        let over = stream::iter(over).map(|waiting| async move {
            let (sequence, id) = (waiting.sequence, &waiting.named.id);
            if self.is_over(function, id, sequence).await? {
                server.delete(&names.calls, sequence).await?;
                return Ok(1);
            }
            Ok(0)
        });
        let over: Vec<usize> = over.buffer_unordered(TOGETHER).try_collect().await?;
        let over = over.into_iter().sum::<usize>() + left_over;
        // Those below `floor` the consumer knows to be over.
        let waited_for = there.iter().filter(|number| **number > known.floor).count() as u64;
        let lost = known.given.saturating_sub(waited_for);
        if lost > 0 {
            let first = (known.floor + 1).max(known.delivered.saturating_sub(NUMBERS));
            let numbers = (first..=known.delivered).filter(|number| !there.contains(number));
            self.tell_over(function, numbers).await?;
        }
        if lost > 0 || over > 0 {
            tracing::info!(%function, over, lost, "The queue's server was reminded of calls that are over");
        }
        Ok(())
    }

    /// Says that those of the messages that are not there are over. The server would remove one that is there, even if
    /// it is another function's.
    async fn tell_over(
        &self,
        function: &Function,
        numbers: impl Iterator<Item = u64>,
    ) -> Result<(), Fault> {
        let (server, names) = (&self.server, &self.names);
        let before = format!("$JS.ACK.{}.{}.1", names.calls, consumer(function));
        let missing = stream::iter(numbers).map(|number| async move {
            let found = server.at(&names.calls, number).await?;
            Ok::<_, Fault>(found.is_none().then_some(number))
        });
        let mut missing = std::pin::pin!(missing.buffer_unordered(TOGETHER));
        while let Some(number) = missing.try_next().await? {
            let Some(number) = number else { continue };
            // How often, under which number and when it was given to somebody is of no concern here.
            let subject = format!("{before}.{number}.0.0.0");
            let said = server.client.publish(subject, Bytes::from(AckKind::Ack)).await;
            said.map_err(|_| Fault::Away)?;
        }
        Ok(())
    }
}
