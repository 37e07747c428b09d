//! Final states and responses.
use async_nats::HeaderMap;
use bytes::Bytes;

use crate::jetstream::Shared;
use crate::jetstream::decide::location::is_final;
use crate::jetstream::error::NatsError;
use crate::jetstream::location::DeadLetter;
use crate::jetstream::wire::final_record::{
    FinalRecord, final_headers, parse_final_record, response_headers,
};
use crate::jetstream::wire::subjects::{DEAD_LETTERS, FINAL_RECORDS, RESPONSES};
use crate::jetstream::wire::tokens::encode_token;
use crate::now;
use crate::status::{CallRecord, CallState, StoredResponse};
use gateway_base::function::Function;

impl Shared {
    /// Returns whether a final state is still visible.
    pub(super) fn is_retained(&self, status: &CallRecord) -> bool {
        let kept = self.options.limits.result_ttl;
        status.finished_at.is_none_or(|at| at.saturating_add(kept) > now())
    }

    /// Returns whether the call with the message `sequence` has a final state.
    pub(super) async fn is_finished(
        &self,
        function: &Function,
        id: &str,
        sequence: u64,
    ) -> Result<bool, NatsError> {
        let (api, subjects) = (&self.api, &self.subjects);
        let (dead, final_record) =
            (subjects.call(DEAD_LETTERS, function, id), subjects.call(FINAL_RECORDS, function, id));
        let (dead, final_record) = tokio::try_join!(
            api.get_last(&subjects.dead_letters, &dead),
            api.get_last(&subjects.results, &final_record)
        )?;
        let dead = dead.and_then(DeadLetter::new).map(|dead| dead.previous_seq);
        let final_record =
            final_record.and_then(|final_record| parse_final_record(&final_record.headers));
        Ok(is_final(sequence, dead, final_record.map(|final_record| final_record.sequence)))
    }

    /// Stores a final state.
    pub(super) async fn store_final_record(
        &self,
        function: &Function,
        status: CallRecord,
        sequence: u64,
    ) -> Result<(), NatsError> {
        self.store_final_record_over(function, status, sequence, None).await
    }

    /// Stores a final state. With `last`, only if the previous one has that sequence.
    pub(super) async fn store_final_record_over(
        &self,
        function: &Function,
        status: CallRecord,
        sequence: u64,
        last: Option<u64>,
    ) -> Result<(), NatsError> {
        let subject = self.subjects.call(FINAL_RECORDS, function, &status.id);
        let headers = final_headers(&FinalRecord { sequence, status, response: None });
        self.api.publish(subject, headers, Bytes::new(), last).await.map(drop)
    }

    /// Stores a response, in several messages if it is large.
    pub(in crate::jetstream) async fn store_response(
        &self,
        id: &str,
        response: Option<&StoredResponse>,
    ) -> Result<(), NatsError> {
        let Some(response) = response else { return Ok(()) };
        let size = self.api.client.max_payload() / 2;
        let count = response.body.len().div_ceil(size.max(1)).max(1);
        // The first chunk is written last: it marks the response as complete.
        for chunk in (0..count).rev() {
            let range =
                response.body.len().min(chunk * size)..response.body.len().min((chunk + 1) * size);
            let headers =
                if chunk == 0 { response_headers(response, count) } else { HeaderMap::new() };
            let subject = self.subjects.chunk(RESPONSES, &encode_token(id), chunk);
            self.api.publish(subject, headers, response.body.slice(range), None).await?;
        }
        Ok(())
    }

    /// Returns the sequence of a response that is stored beside the final state.
    pub(super) async fn response_sequence(&self, id: &str) -> Result<Option<u64>, NatsError> {
        let first = self.subjects.chunk(RESPONSES, &encode_token(id), 0);
        Ok(self.api.get_last(&self.subjects.results, &first).await?.map(|found| found.sequence))
    }

    /// Removes a response up to this sequence, but no later one.
    pub(super) async fn remove_response(
        &self,
        id: &str,
        response: Option<u64>,
    ) -> Result<(), NatsError> {
        // A purge makes the server scan every subject.
        let Some(response) = response else { return Ok(()) };
        let parts = self.subjects.chunk(RESPONSES, &encode_token(id), "*");
        self.api.purge(&self.subjects.results, &parts, response).await
    }
}

pub(super) fn cancelled(status: CallRecord) -> CallRecord {
    CallRecord {
        state: CallState::Cancelled,
        finished_at: Some(now()),
        next_attempt_at: None,
        dead_letter: false,
        ..status
    }
}
