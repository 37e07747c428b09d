//! A request that is tried at several upstreams until a connection succeeds.

use std::sync::Arc;

use http::{Request, Response};

use crate::client::body::RequestBody;
use crate::client::http1::request_writer::RequestWriter;
use crate::client::upstream_body::UpstreamBody;
use crate::client::{Client, Error, Origin};
use crate::deadlines::ExchangeDeadlines;

/// A request whose headers are not changed any more.
pub struct FailoverRequest(RequestWriter);

impl FailoverRequest {
    /// Serializes the head of `request`.
    pub fn new(request: Request<RequestBody>) -> Self {
        let (head, body) = request.into_parts();
        Self(RequestWriter::new(&head, body))
    }

    /// Sends the request to `origin`, and returns when the head of the response has been received. `deadlines` applies
    /// to the whole exchange.
    ///
    /// # Errors
    /// When there is no response. After an error for which `is_connect` returns true, no upstream has received any of
    /// the request, and it can be sent to another origin.
    pub async fn send(
        &mut self,
        client: &Arc<Client>,
        origin: &Origin,
        deadlines: &Arc<ExchangeDeadlines>,
    ) -> Result<Response<UpstreamBody>, Error> {
        client.send_request(origin, &mut self.0, deadlines).await
    }
}
