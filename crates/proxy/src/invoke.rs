//! Invocation of a function: prepare, forward, record. One [`Invoker`] per proxy thread.

mod client_request;
pub mod dispatcher;
pub mod operators;

use std::sync::Arc;
use std::time::Instant;

use http::{HeaderMap, HeaderValue, Request, Response};
use hyper::body::{Body, Incoming};

use crate::activator::unavailable::Hop;
use crate::error::Error;
use crate::invoke::client_request::ClientRequest;
use crate::invoke::dispatcher::{Dispatcher, UpstreamTarget};
use crate::invoke::operators::Operators;
use crate::metrics::calls::{InFlightRecorder, Outcome};
use crate::response_body::{BodySource, InFlight, TrackedBody};
use crate::routing::RouteMatch;
use crate::trace::RequestSpan;
use gateway_base::base_url::BaseUrl;
use gateway_base::function::Function;
use gateway_http::call_id::RequestIds;
use gateway_http::client::body::{ClientBody, RequestBody};
use gateway_http::client::tunnel::Tunnel;
use gateway_http::client::{self, Client, Origin, RequestContext, UpstreamResponse};
use gateway_http::limit::{ConcurrencyLimit, PermitCache};
use gateway_http::server::Timeouts;
use gateway_http::server::client_connection::ClientConnection;
use gateway_provider::Provider;

/// Where functions listen when they are called directly.
const DIRECT_PORT: u16 = 8080;

/// Dependencies of a proxy thread.
pub struct Invoker {
    pub client: Arc<Client>,
    pub dispatcher: Dispatcher,
    pub limit: Arc<ConcurrencyLimit>,
    pub permit_cache: Arc<PermitCache>,
    pub timeouts: Timeouts,
    /// How requests are sent to functions.
    pub route: Route,
    /// Confirms that functions called directly exist.
    pub provider: Provider,
    /// Which clients may see why a function does not start.
    pub operators: Operators,
}

/// How requests are routed to functions.
pub enum Route {
    /// To the provider, with the path of the client's request.
    Provider(Origin),
    /// To the function itself, at `http://NAME.SUFFIX:8080`, with the path after the name.
    Direct { suffix: String, default_namespace: Arc<str> },
}

/// Naming of functions that are called directly.
#[derive(Clone, Copy)]
struct DirectNaming<'a> {
    suffix: &'a str,
    default_namespace: &'a str,
}

/// An invocation that is ready to be executed.
pub struct PreparedInvocation {
    state: ForwardState,
    ids: RequestIds,
    in_flight: InFlight,
    /// The client is an operator. Checked only for functions that are not ready; false for others.
    from_operator: bool,
}

impl PreparedInvocation {
    /// Returns the id of the call.
    pub fn call_id(&self) -> &HeaderValue {
        &self.ids.call_id
    }
}

/// How the request is forwarded.
enum ForwardState {
    Provider(client::OutgoingRequest),
    /// Directly to the function, whose origin is not resolved yet, with the path that it receives. `None` once the request has been taken.
    Direct(Option<Box<Request<RequestBody>>>),
    /// The request is not forwarded: it could not be prepared. `None` once the error has been taken.
    Failed(Option<Error>),
}

impl Invoker {
    /// Prepares the invocation of the function in the path of `request`.
    ///
    /// All work that does not wait is done here, and `request` is dropped at the end. So an invocation that waits for its
    /// response holds little memory: a thousand of them fit into the processor's cache.
    ///
    /// # Errors
    /// The response, if the path names no function or the concurrency limit is reached.
    pub fn prepare(
        &self,
        connection: &ClientConnection,
        request: Request<Incoming>,
        route: RouteMatch,
        began: Instant,
    ) -> Result<PreparedInvocation, Box<Response<TrackedBody>>> {
        let Some(mut recorder) =
            self.dispatcher.shard.begin(route.name(request.uri().path()), began)
        else {
            return Err(self.reject(connection, &Error::NoSuchPath, request.headers()));
        };
        let Some(permit) = self.limit.try_acquire(&self.permit_cache) else {
            recorder.set_status(Error::Overloaded.status());
            recorder.finish(Outcome::Complete, Instant::now());
            return Err(self.reject(connection, &Error::Overloaded, request.headers()));
        };
        let ids = RequestIds::from_headers(request.headers());
        let from_operator = self.dispatcher.activator.is_some()
            && !recorder.is_ready()
            && self.operators.include(request.headers(), connection.address.ip());
        let request = request.map(|body| client_body(body, connection));
        let state = match &self.route {
            Route::Provider(origin) => {
                let context = self.request_context(connection, began);
                let prepared = client::prepare(origin, request, Some(&ids), context);
                prepared.map_or_else(
                    |error| ForwardState::Failed(Some(error.into())),
                    ForwardState::Provider,
                )
            }
            Route::Direct { .. } => {
                let mut request = Box::new(request);
                *request.uri_mut() = route.function_target(request.uri());
                ForwardState::Direct(Some(request))
            }
        };
        Ok(PreparedInvocation {
            state,
            ids,
            in_flight: InFlight { recorder, permit },
            from_operator,
        })
    }

    /// Executes the invocation and returns the response of the function, or an error response. After a change of
    /// protocols (101), `span` is moved into the tunnel and ends with it.
    pub async fn execute(
        &self,
        connection: &ClientConnection,
        prepared: PreparedInvocation,
        span: &mut Option<Box<RequestSpan>>,
    ) -> Response<TrackedBody> {
        let PreparedInvocation { mut state, ids, mut in_flight, from_operator } = prepared;
        let (mut response, tunnel) =
            match self.forward(connection, &mut in_flight.recorder, &ids, &mut state).await {
                Ok(UpstreamResponse { response: upstream, tunnel, .. }) => {
                    (upstream.map(BodySource::Upstream), tunnel)
                }
                Err(error) => (error_response(&error, Some(&ids.call_id), from_operator), None),
            };
        in_flight.recorder.set_status(response.status());
        ids.apply_to_response(response.headers_mut());
        if let Some(tunnel) = tunnel {
            let mut span = span.take();
            if let Some(span) = &mut span {
                span.on_response(&response);
            }
            connection.spawn(run_tunnel(tunnel, in_flight, span));
            return response.map(|source| self.track_body(connection, source, None));
        }
        response.map(|source| self.track_body(connection, source, Some(in_flight)))
    }

    async fn forward(
        &self,
        connection: &ClientConnection,
        recorder: &mut InFlightRecorder,
        ids: &RequestIds,
        state: &mut ForwardState,
    ) -> Result<UpstreamResponse, Error> {
        let mut response = match (state, &self.route) {
            (ForwardState::Provider(prepared), Route::Provider(origin)) => {
                let target = UpstreamTarget { origin, hop: Hop::Provider };
                self.dispatch(connection, recorder, target, prepared).await?
            }
            (ForwardState::Direct(request), Route::Direct { suffix, default_namespace }) => {
                let Some(request) = request.take() else {
                    unreachable!("a direct request is sent once")
                };
                let naming = DirectNaming { suffix, default_namespace };
                Box::pin(self.forward_direct(connection, recorder, ids, naming, *request)).await?
            }
            (ForwardState::Failed(error), _) => {
                return Err(error.take().unwrap_or(Error::NoSuchPath));
            }
            (ForwardState::Provider(_) | ForwardState::Direct(_), _) => {
                unreachable!("there is one route")
            }
        };
        if connection.deadlines.exchange().has_outstanding_body() && response.tunnel.is_none() {
            connection.on_write_blocked(response.response.body_mut().background_writer());
        }
        Ok(response)
    }

    async fn dispatch(
        &self,
        connection: &ClientConnection,
        recorder: &mut InFlightRecorder,
        target: UpstreamTarget<'_>,
        prepared: &mut client::OutgoingRequest,
    ) -> Result<UpstreamResponse, Error> {
        let started_at = Some(recorder.began);
        let mut request = ClientRequest { invoker: self, connection, prepared, started_at };
        self.dispatcher.dispatch(recorder, target, &mut request, false).await
    }

    async fn forward_direct(
        &self,
        connection: &ClientConnection,
        recorder: &mut InFlightRecorder,
        ids: &RequestIds,
        naming: DirectNaming<'_>,
        request: Request<RequestBody>,
    ) -> Result<UpstreamResponse, Error> {
        let origin = match &self.dispatcher.activator {
            None => self.resolve_direct(recorder, naming).await?,
            // The activator confirms that the function exists.
            Some(_) => direct_origin(recorder.function(), naming)?,
        };
        let context = self.request_context(connection, recorder.began);
        let mut prepared = client::prepare(&origin, request, Some(ids), context)?;
        let target = UpstreamTarget { origin: &origin, hop: Hop::Function };
        self.dispatch(connection, recorder, target, &mut prepared).await
    }

    fn request_context<'a>(
        &self,
        connection: &'a ClientConnection,
        began: Instant,
    ) -> RequestContext<'a> {
        let timeout = self.timeouts.upstream;
        RequestContext {
            client_address: &connection.forwarded_for,
            deadlines: connection.deadlines.exchange(),
            started_at: began,
            timeout,
            is_client_request: true,
        }
    }

    /// Returns the origin of the function, after the provider has confirmed that it exists.
    async fn resolve_direct(
        &self,
        recorder: &mut InFlightRecorder,
        naming: DirectNaming<'_>,
    ) -> Result<Origin, Error> {
        if recorder.is_unregistered() {
            // Without this check, a name could lead to any host.
            self.provider.status(recorder.function()).await?;
            recorder.confirm(&self.dispatcher.shard);
        }
        direct_origin(recorder.function(), naming)
    }

    /// Returns the error response to a request that is not forwarded.
    pub fn reject(
        &self,
        connection: &ClientConnection,
        error: &Error,
        request: &HeaderMap,
    ) -> Box<Response<TrackedBody>> {
        let ids = RequestIds::from_headers(request);
        let mut response = error_response(error, Some(&ids.call_id), false);
        ids.apply_to_response(response.headers_mut());
        Box::new(response.map(|source| self.track_body(connection, source, None)))
    }

    fn track_body(
        &self,
        connection: &ClientConnection,
        source: BodySource,
        in_flight: Option<InFlight>,
    ) -> TrackedBody {
        TrackedBody::new(source, in_flight, Arc::clone(&connection.deadlines), self.timeouts.idle)
    }
}

/// Runs a tunnel after a change of protocols. The invocation is in flight until the tunnel ends.
async fn run_tunnel(tunnel: Tunnel, in_flight: InFlight, span: Option<Box<RequestSpan>>) {
    tunnel.run().await;
    if let Some(span) = span {
        span.finish(Outcome::Complete);
    }
    in_flight.recorder.finish(Outcome::Complete, Instant::now());
}

fn error_response(
    error: &Error,
    call_id: Option<&HeaderValue>,
    from_operator: bool,
) -> Response<BodySource> {
    error.response_for(call_id, from_operator).map(|text| BodySource::Full(Some(text.into())))
}

fn client_body(body: Incoming, connection: &ClientConnection) -> RequestBody {
    if body.is_end_stream() {
        RequestBody::empty()
    } else {
        RequestBody::Client(ClientBody::new(body, Arc::clone(connection.deadlines.exchange())))
    }
}

/// Returns the origin `http://NAME.SUFFIX:8080`. If the suffix begins with the default namespace, that part is replaced
/// by the function's namespace.
fn direct_origin(function: &Function, naming: DirectNaming<'_>) -> Result<Origin, Error> {
    let DirectNaming { suffix, default_namespace } = naming;
    let host = match suffix.strip_prefix(default_namespace) {
        _ if suffix.is_empty() => function.name.clone(),
        Some(rest)
            if !default_namespace.is_empty() && (rest.is_empty() || rest.starts_with('.')) =>
        {
            format!("{}.{}{rest}", function.name, function.namespace)
        }
        _ => format!("{}.{suffix}", function.name),
    };
    BaseUrl::parse(&format!("http://{host}:{DIRECT_PORT}"))
        .map(Origin::new)
        .ok_or_else(|| Error::NoSuchFunction(function.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_direct_function_is_called_in_its_own_namespace() {
        let host = |name: &str, suffix: &str| {
            let function = Function::parse(name, "fn").unwrap();
            let naming = DirectNaming { suffix, default_namespace: "fn" };
            direct_origin(&function, naming).unwrap().url.to_string()
        };
        assert_eq!(host("echo", ""), "http://echo:8080");
        assert_eq!(host("echo", "fn.svc.cluster.local"), "http://echo.fn.svc.cluster.local:8080");
        assert_eq!(host("echo.dev", "fn.svc"), "http://echo.dev.svc:8080");
        assert_eq!(host("echo.dev", "fnord.svc"), "http://echo.fnord.svc:8080");
    }
}
