//! A request that goes to whichever of several upstreams is there.

use std::sync::Arc;

use http::{Request, Response};

use crate::proxy::body::RequestBody;
use crate::proxy::client::{Client, Error, Origin};
use crate::proxy::upload::Upload;
use crate::proxy::upstream_body::UpstreamBody;
use crate::watch::Watch;

/// A request whose headers are ready for the wire.
pub struct Outgoing(Upload);

impl Outgoing {
    pub fn new(request: Request<RequestBody>) -> Self {
        let (head, body) = request.into_parts();
        Self(Upload::new(&head, body))
    }

    /// Sends it to `origin`; returns as soon as the head of the answer is there. `watch` bounds all of it.
    ///
    /// # Errors
    /// Why there is no answer. After one that `is_connect`, nobody has seen anything of the request, and it can be sent
    /// to another origin.
    pub async fn send(
        &mut self,
        client: &Arc<Client>,
        origin: &Origin,
        watch: &Arc<Watch>,
    ) -> Result<Response<UpstreamBody>, Error> {
        client.carry(origin, &mut self.0, watch).await
    }
}
