//! A client of the provider's REST API, the types it speaks, and a provider of our own.

pub mod process;
pub mod signals;
pub mod types;

use std::error::Error as StdError;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::auth::Credentials;
use crate::auth::tries::{Tries, is_refusal};
use crate::error::Error;
use crate::function::Function;
use crate::provider::types::{FunctionSummary, ScaleRequest, Usage};
use crate::proxy::body::RequestBody;
use crate::proxy::client::{Client, Origin};
use crate::proxy::upstream_body::{BodyFailure, UpstreamBody};
use crate::watch::Watch;

/// What a caller would like (RFC 7240).
const PREFER: HeaderName = HeaderName::from_static("prefer");
/// The largest answer that is read whole: some 10 000 functions with long labels.
const MAX_ANSWER: usize = 32 << 20;

/// The provider, as its own client sees it.
#[derive(Clone)]
pub struct Provider {
    pub client: Arc<Client>,
    pub origin: Origin,
    pub credentials: Option<Arc<Credentials>>,
    /// For a whole question and answer.
    pub timeout: Duration,
}

impl Provider {
    /// `GET /system/namespaces`
    pub async fn namespaces(&self) -> Result<Vec<String>, Error> {
        self.list("/system/namespaces").await
    }

    /// `GET /system/functions`, of one namespace if `namespace` is not empty.
    pub async fn functions(&self, namespace: &str) -> Result<Vec<FunctionSummary>, Error> {
        if namespace.is_empty() {
            return self.list("/system/functions").await;
        }
        self.list(&format!("/system/functions?namespace={namespace}")).await
    }

    /// `GET /system/function/NAME`
    ///
    /// # Errors
    /// `NoSuchFunction` when the provider does not know it.
    pub async fn status(&self, function: &Function) -> Result<FunctionSummary, Error> {
        self.summary(function, false, Duration::ZERO).await
    }

    /// `GET /system/function/NAME`, whose answer the provider may hold back until the function can be called, for at
    /// most `hold` (`Prefer: wait`, RFC 7240). One that does not know of this answers at once.
    ///
    /// # Errors
    /// `NoSuchFunction` when the provider does not know it.
    pub async fn status_held(
        &self,
        function: &Function,
        hold: Duration,
    ) -> Result<FunctionSummary, Error> {
        self.summary(function, false, hold).await
    }

    /// What all replicas of a function use together, if the provider tells.
    ///
    /// # Errors
    /// `NoSuchFunction` when the provider does not know it.
    pub async fn usage(&self, function: &Function) -> Result<Option<Usage>, Error> {
        Ok(self.summary(function, true, Duration::ZERO).await?.usage)
    }

    async fn summary(
        &self,
        function: &Function,
        usage: bool,
        hold: Duration,
    ) -> Result<FunctionSummary, Error> {
        let target = format!("/system/function/{}{}&usage={usage}", function.name, query(function));
        let mut headers = HeaderMap::new();
        if !hold.is_zero() {
            headers.insert(PREFER, wait(hold));
        }
        let (status, body) = self.call(Method::GET, &target, headers, Bytes::new()).await?;
        match status {
            StatusCode::NOT_FOUND => Err(Error::NoSuchFunction(function.clone())),
            status if status.is_success() => parse(&body),
            status => Err(refused(status)),
        }
    }

    /// `POST /system/scale-function/NAME`
    pub async fn scale(&self, function: &Function, replicas: u64) -> Result<(), Error> {
        let target = format!("/system/scale-function/{}{}", function.name, query(function));
        let body = json(&ScaleRequest { service_name: function.name.clone(), replicas });
        match self.call(Method::POST, &target, HeaderMap::new(), body).await? {
            (status, _) if status.is_success() => Ok(()),
            (status, _) => Err(refused(status)),
        }
    }

    /// A list; `null`, which is how Go writes one that nothing was ever put into, is an empty one.
    async fn list<T: DeserializeOwned>(&self, target: &str) -> Result<Vec<T>, Error> {
        match self.call(Method::GET, target, HeaderMap::new(), Bytes::new()).await? {
            (status, body) if status.is_success() => {
                parse::<Option<Vec<T>>>(&body).map(Option::unwrap_or_default)
            }
            (status, _) => Err(refused(status)),
        }
    }

    /// Has the next request go out with credentials that the provider accepts, for one that cannot be sent twice.
    ///
    /// # Errors
    /// When the provider does not answer.
    pub async fn try_credentials(&self) -> Result<(), Error> {
        self.call(Method::GET, "/system/info", HeaderMap::new(), Bytes::new()).await.map(|_| ())
    }

    /// Asks with each of the known credentials until one is accepted.
    async fn call(
        &self,
        method: Method,
        target: &str,
        mut headers: HeaderMap,
        body: Bytes,
    ) -> Result<(StatusCode, Bytes), Error> {
        if !body.is_empty() {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        }
        let until = Instant::now() + self.timeout;
        let mut tries = Tries::of(self.credentials.as_ref());
        loop {
            if let Some(authorization) = tries.header() {
                headers.insert(AUTHORIZATION, authorization);
            }
            let (headers, body) = (headers.clone(), body.clone());
            let question = question(method.clone(), &self.origin, target, headers, body)?;
            let left = until.saturating_duration_since(Instant::now());
            let (status, body) = ask(&self.client, &self.origin, question, left).await?;
            if !tries.again(status) {
                return Ok((status, body));
            }
        }
    }
}

/// Asks `origin`, and reads the whole answer, in at most `timeout`.
pub async fn ask(
    client: &Arc<Client>,
    origin: &Origin,
    question: Request<RequestBody>,
    timeout: Duration,
) -> Result<(StatusCode, Bytes), Error> {
    let watch = Arc::new(Watch::new());
    watch.call_until(Instant::now() + timeout);
    let answered = async {
        let (status, _, body) = collect(client.send(origin, question, &watch).await?).await?;
        Ok((status, body))
    };
    match tokio::time::timeout(timeout, answered).await {
        Ok(answered) => answered,
        Err(_) => Err(Error::Upstream(crate::proxy::client::Error::Timeout)),
    }
}

/// A request of the gateway's own.
pub fn question(
    method: Method,
    origin: &Origin,
    target: &str,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Request<RequestBody>, Error> {
    let mut request = Request::new(RequestBody::Full(Some(body).filter(|body| !body.is_empty())));
    *request.method_mut() = method;
    *request.headers_mut() = headers;
    request.headers_mut().insert(HOST, origin.host.clone());
    request.headers_mut().insert(http::header::USER_AGENT, crate::call_id::USER_AGENT_VALUE);
    let uri = target.parse().map_err(|_| Error::BadRequest(format!("no such path: {target}")))?;
    *request.uri_mut() = origin.target(&uri).map_err(crate::proxy::client::Error::Target)?;
    Ok(request)
}

/// Reads an answer whole, up to a limit.
pub async fn collect(
    answer: Response<UpstreamBody>,
) -> Result<(StatusCode, HeaderMap, Bytes), Error> {
    let (parts, body) = answer.into_parts();
    match Limited::new(body, MAX_ANSWER).collect().await {
        Ok(collected) => Ok((parts.status, parts.headers, collected.to_bytes())),
        Err(error) => Err(match error.downcast::<BodyFailure>() {
            Ok(failure) => Error::Answer(*failure),
            Err(error) => {
                debug_assert!(error.is::<LengthLimitError>());
                Error::Provider(format!("the provider's answer exceeds {MAX_ANSWER} bytes"))
            }
        }),
    }
}

/// Parses what the provider said.
pub fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(body).map_err(|error| {
        tracing::debug!(error = &error as &dyn StdError, "The provider's JSON is not as expected");
        Error::Provider("the provider's answer is not the JSON that was expected".to_owned())
    })
}

fn refused(status: StatusCode) -> Error {
    if is_refusal(status) {
        return Error::CredentialsRefused(status);
    }
    Error::Provider(format!("the provider answered {status}"))
}

fn query(function: &Function) -> String {
    format!("?namespace={}", function.namespace)
}

/// How long an answer may be held back.
fn wait(hold: Duration) -> HeaderValue {
    HeaderValue::from_str(&format!("wait={}", hold.as_secs()))
        .unwrap_or_else(|_| HeaderValue::from_static("wait=0"))
}

fn json(value: &impl Serialize) -> Bytes {
    // The types serialized here have no map with keys that are no strings.
    serde_json::to_vec(value).unwrap_or_default().into()
}
