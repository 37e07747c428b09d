//! Client of the provider's REST API, its JSON types, and the process provider.

use std::error::Error as StdError;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::types::{FunctionSummary, ScaleRequest, Usage};
use gateway_base::function::Function;
use gateway_http::client::body::RequestBody;
use gateway_http::client::upstream_body::{ResponseBodyError, UpstreamBody};
use gateway_http::client::{self, Client, Origin};
use gateway_http::credentials::Credentials;
use gateway_http::credentials::attempts::{CredentialAttempts, is_refusal};
use gateway_http::deadlines::ExchangeDeadlines;

/// The header of a client's preferences (RFC 7240).
const PREFER: HeaderName = HeaderName::from_static("prefer");
/// Maximum size of a response body that is read into memory: about 10 000 functions with long labels.
const MAX_RESPONSE_BYTES: usize = 32 << 20;

/// Why a request to the provider fails. The text contains no address and no secret.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("function {0} not found")]
    NoSuchFunction(Function),
    #[error("no such path: {0}")]
    InvalidPath(String),
    /// The provider responded 401 or 403 to all known credentials.
    #[error("the provider rejects the gateway's credentials: {0}")]
    CredentialsRefused(StatusCode),
    /// The provider responded, but not with the expected status or body.
    #[error("{0}")]
    Response(String),
    #[error(transparent)]
    Upstream(#[from] client::Error),
    #[error(transparent)]
    ResponseBody(#[from] ResponseBodyError),
}

/// Client of one provider.
#[derive(Clone)]
pub struct Provider {
    pub client: Arc<Client>,
    pub origin: Origin,
    pub credentials: Option<Arc<Credentials>>,
    /// Limit for one request including its response.
    pub timeout: Duration,
}

impl Provider {
    /// `GET /system/namespaces`
    ///
    /// # Errors
    /// The request failed, or the response is an error or not the expected JSON.
    pub async fn namespaces(&self) -> Result<Vec<String>, Error> {
        self.get_list("/system/namespaces").await
    }

    /// `GET /system/functions`; an empty `namespace` means the provider's default.
    ///
    /// # Errors
    /// The request failed, or the response is an error or not the expected JSON.
    pub async fn functions(&self, namespace: &str) -> Result<Vec<FunctionSummary>, Error> {
        if namespace.is_empty() {
            return self.get_list("/system/functions").await;
        }
        self.get_list(&format!("/system/functions?namespace={namespace}")).await
    }

    /// `GET /system/function/NAME`
    ///
    /// # Errors
    /// `NoSuchFunction` if the provider responds 404; other errors as in `functions`.
    pub async fn status(&self, function: &Function) -> Result<FunctionSummary, Error> {
        self.summary(function, false, Duration::ZERO).await
    }

    /// `GET /system/function/NAME` with `Prefer: wait` (RFC 7240): the provider may delay the response until the
    /// function is ready, for at most `max_wait`. A provider without support for this responds immediately.
    ///
    /// # Errors
    /// `NoSuchFunction` if the provider responds 404; other errors as in `functions`.
    pub async fn status_wait_ready(
        &self,
        function: &Function,
        max_wait: Duration,
    ) -> Result<FunctionSummary, Error> {
        self.summary(function, false, max_wait).await
    }

    /// Returns the resource usage of all replicas of a function, or `None` if the provider does not report it.
    ///
    /// # Errors
    /// `NoSuchFunction` if the provider responds 404; other errors as in `functions`.
    pub async fn usage(&self, function: &Function) -> Result<Option<Usage>, Error> {
        Ok(self.summary(function, true, Duration::ZERO).await?.usage)
    }

    async fn summary(
        &self,
        function: &Function,
        with_usage: bool,
        max_wait: Duration,
    ) -> Result<FunctionSummary, Error> {
        let target = format!(
            "/system/function/{}{}&usage={with_usage}",
            function.name,
            namespace_query(function)
        );
        let mut headers = HeaderMap::new();
        if !max_wait.is_zero() {
            headers.insert(PREFER, prefer_wait(max_wait));
        }
        let (status, body) = self.send(Method::GET, &target, headers, Bytes::new()).await?;
        match status {
            StatusCode::NOT_FOUND => Err(Error::NoSuchFunction(function.clone())),
            status if status.is_success() => parse_json(&body),
            status => Err(unexpected_status(status)),
        }
    }

    /// `POST /system/scale-function/NAME`
    ///
    /// # Errors
    /// The request failed, or the provider rejected it.
    pub async fn scale(&self, function: &Function, replicas: u64) -> Result<(), Error> {
        let target =
            format!("/system/scale-function/{}{}", function.name, namespace_query(function));
        let body = to_json(&ScaleRequest { service_name: function.name.clone(), replicas });
        match self.send(Method::POST, &target, HeaderMap::new(), body).await? {
            (status, _) if status.is_success() => Ok(()),
            (status, _) => Err(unexpected_status(status)),
        }
    }

    /// Requests a JSON array. `null`, which Go writes for a nil slice, is an empty one.
    async fn get_list<T: DeserializeOwned>(&self, target: &str) -> Result<Vec<T>, Error> {
        match self.send(Method::GET, target, HeaderMap::new(), Bytes::new()).await? {
            (status, body) if status.is_success() => {
                parse_json::<Option<Vec<T>>>(&body).map(Option::unwrap_or_default)
            }
            (status, _) => Err(unexpected_status(status)),
        }
    }

    /// Finds the credentials that the provider accepts, for a following request that cannot be sent twice.
    ///
    /// # Errors
    /// The provider did not respond.
    pub async fn try_credentials(&self) -> Result<(), Error> {
        self.send(Method::GET, "/system/info", HeaderMap::new(), Bytes::new()).await.map(|_| ())
    }

    /// Sends a request with each of the credentials in turn until the provider accepts one.
    async fn send(
        &self,
        method: Method,
        target: &str,
        mut headers: HeaderMap,
        body: Bytes,
    ) -> Result<(StatusCode, Bytes), Error> {
        if !body.is_empty() {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        }
        let deadline = Instant::now() + self.timeout;
        let mut attempts = CredentialAttempts::new(self.credentials.as_ref());
        loop {
            if let Some(authorization) = attempts.header() {
                headers.insert(AUTHORIZATION, authorization);
            }
            let (headers, body) = (headers.clone(), body.clone());
            let request = build_request(method.clone(), &self.origin, target, headers, body)?;
            let remaining = deadline.saturating_duration_since(Instant::now());
            let (status, body) =
                send_and_collect(&self.client, &self.origin, request, remaining).await?;
            if !attempts.advance(status) {
                return Ok((status, body));
            }
        }
    }
}

/// Sends `request` to `origin` and reads the whole response, within `timeout`.
///
/// # Errors
/// The request failed or timed out, or the response is too large.
pub async fn send_and_collect(
    client: &Arc<Client>,
    origin: &Origin,
    request: Request<RequestBody>,
    timeout: Duration,
) -> Result<(StatusCode, Bytes), Error> {
    let deadlines = Arc::new(ExchangeDeadlines::new());
    deadlines.set_deadline(Instant::now() + timeout);
    let exchange = async {
        let (status, _, body) =
            collect_response(client.send(origin, request, &deadlines).await?).await?;
        Ok((status, body))
    };
    match tokio::time::timeout(timeout, exchange).await {
        Ok(exchange) => exchange,
        Err(_) => Err(Error::Upstream(client::Error::Timeout)),
    }
}

/// Builds a request of the gateway itself, with the URL and `Host` of `origin`.
///
/// # Errors
/// `target` is not a valid path and query.
pub fn build_request(
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
    request.headers_mut().insert(http::header::USER_AGENT, gateway_http::call_id::USER_AGENT_VALUE);
    let uri = target.parse().map_err(|_| Error::InvalidPath(target.to_owned()))?;
    *request.uri_mut() = origin.target(&uri).map_err(client::Error::InvalidTarget)?;
    Ok(request)
}

/// Reads the whole response body, up to `MAX_RESPONSE_BYTES`.
///
/// # Errors
/// The response was aborted, or its body is too large.
pub async fn collect_response(
    response: Response<UpstreamBody>,
) -> Result<(StatusCode, HeaderMap, Bytes), Error> {
    let (parts, body) = response.into_parts();
    match Limited::new(body, MAX_RESPONSE_BYTES).collect().await {
        Ok(collected) => Ok((parts.status, parts.headers, collected.to_bytes())),
        Err(error) => Err(match error.downcast::<ResponseBodyError>() {
            Ok(failure) => Error::ResponseBody(*failure),
            Err(error) => {
                debug_assert!(error.is::<LengthLimitError>());
                Error::Response(format!(
                    "the provider's response exceeds {MAX_RESPONSE_BYTES} bytes"
                ))
            }
        }),
    }
}

/// Parses a response body of the provider.
///
/// # Errors
/// `Error::Response` if the body is not the expected JSON; the cause is logged at level debug.
pub fn parse_json<T: DeserializeOwned>(body: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(body).map_err(|error| {
        tracing::debug!(
            error = &error as &dyn StdError,
            "The provider's response is not the expected JSON"
        );
        Error::Response("the provider's response is not the expected JSON".to_owned())
    })
}

fn unexpected_status(status: StatusCode) -> Error {
    if is_refusal(status) {
        return Error::CredentialsRefused(status);
    }
    Error::Response(format!("the provider responded {status}"))
}

fn namespace_query(function: &Function) -> String {
    format!("?namespace={}", function.namespace)
}

/// Builds the value of `Prefer`, in whole seconds.
fn prefer_wait(max_wait: Duration) -> HeaderValue {
    HeaderValue::from_str(&format!("wait={}", max_wait.as_secs()))
        .unwrap_or_else(|_| HeaderValue::from_static("wait=0"))
}

fn to_json(value: &impl Serialize) -> Bytes {
    // Cannot fail: the types serialized here have no maps with non-string keys.
    serde_json::to_vec(value).unwrap_or_default().into()
}
