//! Invocation of a function: prepare, forward, record. One [`Invoker`] per proxy thread.

mod careful;
pub mod operators;

use std::sync::Arc;
use std::time::Instant;

use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Request, Response, Uri};
use hyper::body::{Body, Incoming};

use crate::answer::{Answer, Content, InFlight};
use crate::call_id::RequestIds;
use crate::config::Timeouts;
use crate::config::base_url::BaseUrl;
use crate::error::Error;
use crate::function::Function;
use crate::invoke::careful::{Target, through};
use crate::invoke::operators::Operators;
use crate::limit::{ConcurrencyLimit, PermitCache};
use crate::metrics::calls::{Call, End, Shard};
use crate::provider::Provider;
use crate::proxy::body::{CallerBody, RequestBody};
use crate::proxy::client::{Client, Origin};
use crate::proxy::tunnel::Tunnel;
use crate::proxy::{self, Errand, Forwarded};
use crate::scaling::Scaling;
use crate::scaling::fault::{self, Fault};
use crate::serve::caller::Caller;
use crate::trace::Trip;

/// Where functions listen when they are called directly.
const DIRECT_PORT: u16 = 8080;

/// Dependencies of a proxy thread.
pub struct Invoker {
    pub client: Arc<Client>,
    pub calls: Arc<Shard>,
    pub limit: Arc<ConcurrencyLimit>,
    pub share: Arc<PermitCache>,
    pub timeouts: Timeouts,
    /// How requests are sent to functions.
    pub route: Route,
    /// Confirms that functions called directly exist.
    pub provider: Provider,
    /// Cold starts, if enabled.
    pub scaling: Option<Arc<Scaling>>,
    /// Which clients may see why a function does not start.
    pub operators: Operators,
}

/// How requests are sent to functions.
pub enum Route {
    /// To the provider, with the path of the client's request.
    Provider(Origin),
    /// To the function itself, at `http://NAME.SUFFIX:8080`, with the path after the name.
    Direct { suffix: String, default_namespace: Arc<str> },
}

/// Naming of functions that are called directly.
#[derive(Clone, Copy)]
struct Naming<'a> {
    suffix: &'a str,
    default_namespace: &'a str,
}

/// An invocation that is ready to be executed.
pub struct Prepared {
    way: Way,
    stamps: RequestIds,
    in_flight: InFlight,
    /// The client is an operator. Checked only for functions that are not ready; false for others.
    operator: bool,
}

impl Prepared {
    pub fn call_id(&self) -> &HeaderValue {
        &self.stamps.call_id
    }
}

/// How the request is forwarded.
enum Way {
    Provider(proxy::Prepared),
    /// Directly to the function, whose origin is not resolved yet. `None` once the request has been taken.
    Direct(Option<Box<Request<RequestBody>>>),
    /// Not at all. `None` once the error has been taken.
    Failed(Option<Error>),
}

impl Invoker {
    /// Prepares the invocation of the function in the path of `request`.
    ///
    /// All work that needs no waiting is done here, and `request` is dropped at the end. So an invocation that waits
    /// for its response holds little memory, and a thousand of them fit into the processor's cache.
    ///
    /// # Errors
    /// The response, if the path names no function or the concurrency limit is reached.
    pub fn prepare(
        &self,
        caller: &Caller,
        request: Request<Incoming>,
        began: Instant,
    ) -> Result<Prepared, Box<Response<Answer>>> {
        let Some(mut call) = self.calls.begin(segment(request.uri().path()), began) else {
            return Err(self.refuse(caller, &Error::NoSuchPath, request.headers()));
        };
        let Some(place) = self.limit.try_acquire(&self.share) else {
            call.answered(Error::Overloaded.status());
            call.ended(End::Whole, Instant::now());
            return Err(self.refuse(caller, &Error::Overloaded, request.headers()));
        };
        let stamps = RequestIds::from_headers(request.headers());
        let operator = self.scaling.is_some()
            && !call.is_warm()
            && self.operators.include(request.headers(), caller.address.ip());
        let request = request.map(|body| caller_body(body, caller));
        let way = match &self.route {
            Route::Provider(origin) => {
                let errand = self.errand(caller, began);
                let prepared = proxy::prepare(origin, request, Some(&stamps), errand);
                prepared.map_or_else(|error| Way::Failed(Some(error.into())), Way::Provider)
            }
            Route::Direct { .. } => Way::Direct(Some(Box::new(request))),
        };
        Ok(Prepared { way, stamps, in_flight: InFlight { call, place }, operator })
    }

    /// Executes the invocation and returns the response of the function, or an error response. After a change of
    /// protocols (101), `span` is moved into the tunnel and ends with it.
    pub async fn carry(
        &self,
        caller: &Caller,
        prepared: Prepared,
        trip: &mut Option<Box<Trip>>,
    ) -> Response<Answer> {
        let Prepared { mut way, stamps, mut in_flight, operator } = prepared;
        let (mut answer, tunnel) =
            match self.forward(caller, &mut in_flight.call, &stamps, &mut way).await {
                Ok(Forwarded { answer, tunnel, .. }) => (answer.map(Content::Upstream), tunnel),
                Err(error) => (text(&error, Some(&stamps.call_id), operator), None),
            };
        in_flight.call.answered(answer.status());
        stamps.apply_to_response(answer.headers_mut());
        if let Some(tunnel) = tunnel {
            let mut trip = trip.take();
            if let Some(trip) = &mut trip {
                trip.answered(&answer);
            }
            caller.spawn(keep_open(tunnel, in_flight, trip));
            return answer.map(|content| self.answer(caller, content, None));
        }
        answer.map(|content| self.answer(caller, content, Some(in_flight)))
    }

    async fn forward(
        &self,
        caller: &Caller,
        call: &mut Call,
        stamps: &RequestIds,
        way: &mut Way,
    ) -> Result<Forwarded, Error> {
        let mut with_care = true;
        let mut forwarded = match (&mut *way, &self.route) {
            (Way::Provider(prepared), Route::Provider(origin)) => match &self.scaling {
                Some(scaling) if !call.is_warm() => {
                    // Boxed, so that the rare case does not enlarge the future of every invocation.
                    Box::pin(self.carefully(scaling, caller, call, through(origin), prepared, None))
                        .await?
                }
                _ => {
                    with_care = false;
                    let errand = self.errand(caller, call.began);
                    proxy::send(&self.client, origin, prepared, errand).await?
                }
            },
            (Way::Direct(request), Route::Direct { suffix, default_namespace }) => {
                let Some(request) = request.take() else {
                    unreachable!("a direct request is sent once")
                };
                let naming = Naming { suffix, default_namespace };
                Box::pin(self.forward_directly(caller, call, stamps, naming, *request)).await?
            }
            (Way::Failed(error), _) => return Err(error.take().unwrap_or(Error::NoSuchPath)),
            (Way::Provider(_) | Way::Direct(_), _) => unreachable!("there is one route"),
        };
        if !with_care
            && let Some(scaling) = &self.scaling
            && Fault::of(forwarded.ending, fault::Way::Through).is_some()
            && let (Way::Provider(prepared), Route::Provider(origin)) = (way, &self.route)
        {
            let sent = Some(Ok(forwarded));
            let target = through(origin);
            forwarded =
                Box::pin(self.carefully(scaling, caller, call, target, prepared, sent)).await?;
        }
        if caller.watch.body_outstanding() && forwarded.tunnel.is_none() {
            caller.while_blocked(forwarded.answer.body_mut().share_link());
        }
        if call.is_stranger() && forwarded.ending.vouches() {
            call.vouched_for(&self.calls);
        }
        Ok(forwarded)
    }

    async fn forward_directly(
        &self,
        caller: &Caller,
        call: &mut Call,
        stamps: &RequestIds,
        naming: Naming<'_>,
        mut request: Request<RequestBody>,
    ) -> Result<Forwarded, Error> {
        *request.uri_mut() = behind_name(request.uri());
        let errand = self.errand(caller, call.began);
        let Some(scaling) = &self.scaling else {
            let origin = self.direct(call, naming).await?;
            let mut prepared = proxy::prepare(&origin, request, Some(stamps), errand)?;
            return Ok(proxy::send(&self.client, &origin, &mut prepared, errand).await?);
        };
        let origin = direct_origin(call.function(), naming)?;
        let mut prepared = proxy::prepare(&origin, request, Some(stamps), errand)?;
        let mut sent = None;
        if call.is_warm() {
            sent = Some(proxy::send(&self.client, &origin, &mut prepared, errand).await);
        }
        let target = Target { origin: &origin, way: fault::Way::Direct };
        self.carefully(scaling, caller, call, target, &mut prepared, sent).await
    }

    fn errand<'a>(&self, caller: &'a Caller, began: Instant) -> Errand<'a> {
        let timeout = self.timeouts.upstream;
        Errand {
            peer: &caller.forwarded_for,
            watch: &caller.watch,
            began,
            timeout,
            is_clients: true,
        }
    }

    /// Returns the origin of the function, after the provider has confirmed that it exists.
    async fn direct(&self, call: &mut Call, naming: Naming<'_>) -> Result<Origin, Error> {
        if call.is_stranger() {
            // Without this check, a name could lead to any host.
            self.provider.status(call.function()).await?;
            call.vouched_for(&self.calls);
        }
        direct_origin(call.function(), naming)
    }

    /// Returns the error response to a request that is not forwarded.
    pub fn refuse(
        &self,
        caller: &Caller,
        error: &Error,
        request: &HeaderMap,
    ) -> Box<Response<Answer>> {
        let stamps = RequestIds::from_headers(request);
        let mut answer = text(error, Some(&stamps.call_id), false);
        stamps.apply_to_response(answer.headers_mut());
        Box::new(answer.map(|content| self.answer(caller, content, None)))
    }

    fn answer(&self, caller: &Caller, content: Content, in_flight: Option<InFlight>) -> Answer {
        Answer::new(content, in_flight, Arc::clone(&caller.watch), self.timeouts.idle)
    }
}

/// Runs a tunnel after a change of protocols. The invocation is in flight until the tunnel ends.
async fn keep_open(tunnel: Tunnel, in_flight: InFlight, trip: Option<Box<Trip>>) {
    tunnel.run().await;
    if let Some(trip) = trip {
        trip.ended(End::Whole);
    }
    in_flight.call.ended(End::Whole, Instant::now());
}

fn text(error: &Error, call_id: Option<&HeaderValue>, operator: bool) -> Response<Content> {
    error.answer_to(call_id, operator).map(|text| Content::Full(Some(text.into())))
}

/// Returns the segment after `/function/`.
fn segment(path: &str) -> &str {
    let rest = path.strip_prefix("/function/").unwrap_or_default();
    rest.split_once('/').map_or(rest, |(segment, _)| segment)
}

/// Returns the path after the function's name, and the query: what a function called directly receives.
fn behind_name(uri: &Uri) -> Uri {
    let whole = uri.path_and_query().map_or("/", PathAndQuery::as_str);
    let rest = &whole["/function/".len() + segment(uri.path()).len()..];
    let rest = if rest.starts_with('/') { rest.to_owned() } else { format!("/{rest}") };
    // A suffix of a valid path is valid.
    rest.parse().unwrap_or_default()
}

fn caller_body(body: Incoming, caller: &Caller) -> RequestBody {
    if body.is_end_stream() {
        RequestBody::empty()
    } else {
        RequestBody::Caller(CallerBody::new(body, Arc::clone(&caller.watch)))
    }
}

/// Returns the origin `http://NAME.SUFFIX:8080`. If the suffix begins with the default namespace, that part is replaced
/// by the function's namespace.
fn direct_origin(function: &Function, naming: Naming<'_>) -> Result<Origin, Error> {
    let Naming { suffix, default_namespace } = naming;
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
    fn the_function_segment_ends_at_the_next_slash() {
        assert_eq!(segment("/function/echo"), "echo");
        assert_eq!(segment("/function/echo.dev/a/b"), "echo.dev");
        assert_eq!(segment("/function/"), "");
        assert_eq!(segment("/function//x"), "");
    }

    #[test]
    fn a_direct_call_receives_the_path_after_the_name() {
        let rest = |uri: &str| behind_name(&uri.parse().unwrap()).to_string();
        assert_eq!(rest("/function/echo"), "/");
        assert_eq!(rest("/function/echo?q=1"), "/?q=1");
        assert_eq!(rest("/function/echo/a%2Fb//c?q"), "/a%2Fb//c?q");
    }

    #[test]
    fn a_direct_function_is_called_in_its_own_namespace() {
        let host = |name: &str, suffix: &str| {
            let function = Function::parse(name, "fn").unwrap();
            let naming = Naming { suffix, default_namespace: "fn" };
            direct_origin(&function, naming).unwrap().url.to_string()
        };
        assert_eq!(host("echo", ""), "http://echo:8080");
        assert_eq!(host("echo", "fn.svc.cluster.local"), "http://echo.fn.svc.cluster.local:8080");
        assert_eq!(host("echo.dev", "fn.svc"), "http://echo.dev.svc:8080");
        assert_eq!(host("echo.dev", "fnord.svc"), "http://echo.fnord.svc:8080");
    }
}
