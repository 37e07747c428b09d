//! The URL tables of the public and the internal port, and the service of a proxy thread. The tables are the API
//! reference.

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod host;
mod request;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::middleware::{from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, options, post};
use http::header::UPGRADE;
use http::{Method, Request, StatusCode, Version};
use hyper::body::{Body, Incoming};
use hyper::service::{Service, service_fn};
use tower::ServiceExt;

use crate::answer::{Answer, Content, early};
use crate::error::Error;
use crate::function::has_dot_segment;
use crate::health::Health;
use crate::invoke::{self, Invoker};
use crate::metrics::Metrics;
use crate::proxy::body::CallerBody;
use crate::queued::{operate, other_method};
use crate::routes::request::{Early, check, close_after, fit_http_1_0};
use crate::same_origin::InternalNames;
use crate::serve::caller::Caller;
use crate::shutdown::Stages;
use crate::system::{self, Api};
use crate::trace::{Observer, Trip};
use crate::watch::BodyState;
use crate::{alerts, auth, health, logs, metrics, queued, same_origin, ui};

/// Router of the public port. Requests to functions and calls to enqueue are matched before, in
/// [`GatewayService::classify`].
pub fn api(api: Arc<Api>) -> Router {
    let system = Router::new()
        .route(
            "/system/functions",
            get(system::list).post(system::change).put(system::change).delete(system::change),
        )
        .route("/system/function/{name}", get(system::pass_named))
        .route("/system/scale-function/{name}", post(system::scale))
        .route(
            "/system/secrets",
            get(system::pass).post(system::pass).put(system::pass).delete(system::pass),
        )
        .route("/system/namespaces", get(system::pass))
        // The name is in the body.
        .route(
            "/system/namespace/",
            get(system::pass).post(system::pass).put(system::pass).delete(system::pass),
        )
        .route(
            "/system/namespace/{name}",
            get(system::pass_named)
                .post(system::pass_named)
                .put(system::pass_named)
                .delete(system::pass_named),
        )
        .route("/system/info", get(system::info))
        .route("/system/telemetry", get(system::pass))
        .route("/system/logs", get(logs::logs))
        .route("/system/alert", post(alerts::alert))
        .route("/system/queues", get(operate::queues))
        .route("/system/queues/purge", post(operate::purge))
        .route("/system/calls", get(operate::calls))
        .route("/system/calls/{id}", delete(operate::cancel))
        .route("/system/calls/{id}/retry", post(operate::retry))
        .route_layer(from_fn_with_state(Arc::clone(&api), auth::guard))
        .route_layer(from_fn_with_state(api.names, same_origin::guard))
        .route_layer(from_fn_with_state(Arc::clone(&api.metrics), metrics::count_request));
    let page = Router::new()
        .route("/ui/", get(ui::page))
        .route("/ui/{file}", get(ui::file))
        .route_layer(from_fn_with_state(Arc::clone(&api), auth::guard));
    let calls = get(queued::status).delete(queued::cancel).options(queued::preflight);
    let behind = get(queued::result).options(queued::preflight);
    let queued = Router::new()
        .route(
            "/async-function/{name}",
            calls.fallback(|| other_method("POST, GET, HEAD, DELETE, OPTIONS")),
        )
        .route(
            "/async-function/{name}/",
            options(queued::preflight).fallback(|| other_method("POST, OPTIONS")),
        )
        .route(
            "/async-function/{name}/{*rest}",
            behind.fallback(|| other_method("POST, GET, HEAD, OPTIONS")),
        )
        .route_layer(from_fn(queued::allow_pages))
        .route_layer(from_fn_with_state(Arc::clone(&api.metrics), metrics::count_request));
    let open = Router::new()
        .route("/", get(ui::redirect))
        .route("/ui", get(ui::redirect))
        .route("/healthz", get(health::provider))
        .route("/_/healthz", get(health::live))
        .route("/_/ready", get(health::ready));
    Router::new()
        .merge(system)
        .merge(page)
        .merge(queued)
        .merge(open)
        .fallback(|| async { Error::NoSuchPath })
        .method_not_allowed_fallback(method_not_allowed)
        .with_state(api)
}

/// Router of the internal (metrics) port.
pub fn internal(metrics: Arc<Metrics>, names: InternalNames) -> Router {
    Router::new()
        .route("/metrics", get(scrape))
        .route_layer(from_fn_with_state(Arc::new(names), same_origin::guard_internal))
        .route("/healthz", get(|| async { "OK" }))
        // For probes: this port responds when the public one has reached its connection limit.
        .route("/_/healthz", get(health::live))
        .fallback(|| async { Error::NoSuchPath })
        .method_not_allowed_fallback(method_not_allowed)
        .with_state(metrics)
}

/// Router of a worker's port.
pub fn worker(metrics: Arc<Metrics>, names: InternalNames, health: Arc<Health>) -> Router {
    internal(metrics, names).route("/_/ready", get(|| async move { health.answer() }))
}

async fn scrape(State(metrics): State<Arc<Metrics>>) -> Response {
    const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";
    match metrics.render() {
        Ok(text) => ([(http::header::CONTENT_TYPE, TEXT)], text).into_response(),
        Err(error) => {
            Error::Provider(format!("cannot render the metrics: {error}")).into_response()
        }
    }
}

/// The router adds `Allow`.
async fn method_not_allowed() -> (StatusCode, &'static str) {
    (StatusCode::METHOD_NOT_ALLOWED, "method not allowed\n")
}

/// HTTP service of the public port. One per proxy thread.
pub struct Door {
    pub invoker: Invoker,
    pub api: Arc<Api>,
    /// The router made by [`api`].
    pub router: Router,
    pub stages: Stages,
    /// Access log and traces, if enabled.
    pub observer: Option<Arc<Observer>>,
}

/// A classified request, before its response.
pub struct Entered {
    errand: Errand,
    /// The client uses HTTP/1.0.
    is_1_0: bool,
    trip: Option<Box<Trip>>,
}

/// What handles a request.
enum Errand {
    Call(invoke::Prepared),
    /// Enqueue a call; the route under which it is counted.
    Queue(Box<Request<Incoming>>, &'static str),
    /// A request to the API, whose head has been checked.
    Api(Box<Request<Incoming>>),
    Refused(Box<http::Response<Answer>>),
}

impl Door {
    /// Checks and classifies a request. Does not wait.
    pub fn enter(&self, caller: &Caller, mut request: Request<Incoming>) -> Entered {
        let began = caller.watch.call_begins();
        let is_1_0 = request.version() < Version::HTTP_11;
        let observer = self.observer.as_ref();
        let mut trip = observer.and_then(|it| it.begin(caller.address, &mut request, began));
        let errand = self.look_at(caller, request, began);
        if let (Errand::Call(prepared), Some(trip)) = (&errand, &mut trip) {
            trip.calls(prepared.call_id());
        }
        Entered { errand, is_1_0, trip }
    }

    fn look_at(&self, caller: &Caller, mut request: Request<Incoming>, began: Instant) -> Errand {
        if !request.body().is_end_stream() {
            caller.watch.body_announced();
            caller.watch.body_until(began + self.invoker.timeouts.read);
        }
        let checked = check(&mut request).and_then(|()| check_path(request.uri().path()));
        let is_call = request.uri().path().starts_with("/function/");
        match checked {
            Err(Early::Refused(error)) if is_call => {
                Errand::Refused(self.invoker.refuse(caller, &error, request.headers()))
            }
            Err(early) => Errand::Refused(Box::new(self.wrap(caller, early.into_response()))),
            Ok(()) if is_call => self
                .invoker
                .prepare(caller, request, began)
                .map_or_else(Errand::Refused, Errand::Call),
            Ok(()) => match queued::route(request.method(), request.uri().path()) {
                Some(route) => Errand::Queue(Box::new(request), route),
                None => Errand::Api(Box::new(request)),
            },
        }
    }

    /// Executes the request and returns the response.
    pub async fn answer(
        &self,
        caller: &Caller,
        entered: Entered,
    ) -> Result<http::Response<Answer>, Infallible> {
        let Entered { errand, is_1_0, mut trip } = entered;
        let mut answer = match errand {
            Errand::Call(prepared) => self.invoker.carry(caller, prepared, &mut trip).await,
            // Boxed, so that the rare case does not enlarge the future of every invocation.
            Errand::Queue(request, route) => {
                self.wrap(caller, Box::pin(self.queue(caller, *request, route)).await)
            }
            Errand::Api(request) => self.wrap(caller, Box::pin(self.route(caller, *request)).await),
            Errand::Refused(answer) => *answer,
        };
        if caller.watch.body_state() != BodyState::Read
            && early::closes(&caller.watch, &mut answer).await
        {
            close_after(answer.headers_mut());
        }
        if let Some(interim) = caller.watch.interim() {
            // No await follows: interim responses that come later are no longer written.
            interim.final_response_ready();
        }
        if let Some(mut trip) = trip {
            trip.answered(&answer);
            answer.body_mut().watched_by(trip);
        }
        // In a 101, `Connection` names the new protocol.
        if self.stages.is_leaving() && answer.status() != StatusCode::SWITCHING_PROTOCOLS {
            close_after(answer.headers_mut());
        }
        if is_1_0 {
            fit_http_1_0(&mut answer);
        }
        Ok(answer)
    }

    async fn queue(
        &self,
        caller: &Caller,
        request: Request<Incoming>,
        route: &'static str,
    ) -> Response {
        let began = Instant::now();
        let answer = queued::submit(&self.api, caller, for_api(caller, request)).await;
        let metrics = &self.api.metrics;
        metrics.request_answered(&Method::POST, route, answer.status(), began.elapsed());
        answer
    }

    async fn route(&self, caller: &Caller, request: Request<Incoming>) -> Response {
        let mut request = for_api(caller, request);
        request.extensions_mut().insert(caller.clone());
        self.router.clone().oneshot(request).await.unwrap_or_else(|never| match never {})
    }

    fn wrap(&self, caller: &Caller, answer: Response) -> http::Response<Answer> {
        let (watch, idle) = (&caller.watch, self.invoker.timeouts.idle);
        answer.map(|body| Answer::new(Content::Api(body), None, Arc::clone(watch), idle))
    }
}

fn for_api(caller: &Caller, request: Request<Incoming>) -> Request<axum::body::Body> {
    let watch = Arc::clone(&caller.watch);
    let mut request = request.map(|body| axum::body::Body::new(CallerBody::new(body, watch)));
    // The API supports no change of protocols.
    request.headers_mut().remove(UPGRADE);
    request
}

/// Returns a service that handles all requests of a connection with `router` only.
pub fn plain(
    router: &Router,
    caller: Caller,
    idle: Duration,
) -> impl Service<Request<Incoming>, Response = http::Response<Answer>, Error = Infallible, Future: Send>
+ Send
+ use<> {
    let router = router.clone();
    service_fn(move |mut request: Request<Incoming>| {
        caller.watch.call_begins();
        let is_1_0 = request.version() < Version::HTTP_11;
        let checked = check(&mut request);
        let (router, watch) = (router.clone(), Arc::clone(&caller.watch));
        async move {
            let mut request = request
                .map(|body| axum::body::Body::new(CallerBody::new(body, Arc::clone(&watch))));
            if let Some(interim) = watch.interim().filter(|_| !is_1_0) {
                // For functions that the handlers call.
                request.extensions_mut().insert(Arc::clone(interim));
            }
            let mut answer = match checked {
                Ok(()) => router.oneshot(request).await.unwrap_or_else(|never| match never {}),
                Err(early) => early.into_response(),
            }
            .map(|body| Answer::new(Content::Api(body), None, Arc::clone(&watch), idle));
            if watch.body_state() != BodyState::Read && early::closes(&watch, &mut answer).await {
                close_after(answer.headers_mut());
            }
            if let Some(interim) = watch.interim() {
                // No await follows, as in [`GatewayService::respond`].
                interim.final_response_ready();
            }
            if is_1_0 {
                fit_http_1_0(&mut answer);
            }
            Ok(answer)
        }
    })
}

/// Rejects a path that could escape `/function/NAME`.
fn check_path(path: &str) -> Result<(), Early> {
    if has_dot_segment(path) {
        return Err(Error::BadRequest("the path has a dot segment".to_owned()).into());
    }
    Ok(())
}
