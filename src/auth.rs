//! Access to the API: credentials from mounted files, verified on incoming requests and added to requests to the
//! provider; or an external authorization service.

mod pairs;
mod question;
pub mod tries;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::header::{AUTHORIZATION, CONTENT_TYPE, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderValue};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::auth::pairs::{Pair, Pairs};
use crate::error::Error;
use crate::provider::collect_response;
use crate::proxy::body::RequestBody;
use crate::proxy::{Errand, forward};
use crate::serve::caller::Caller;
use crate::system::{Api, read};

/// Interval at which the files are read.
const REREAD_EVERY: Duration = Duration::from_secs(2);
/// A change is applied if the files have the same content after this time. A read during an update may return half of a
/// password, or the user name with the old password.
const REREAD_AFTER_CHANGE: Duration = Duration::from_millis(200);
/// Maximum bytes of a body that is sent to the authorization service.
const MAX_PASSED_BODY: usize = 1 << 20;

/// Why credentials are unavailable.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    #[error("basic_auth: cannot read {0}")]
    Unreadable(PathBuf, #[source] std::io::Error),
    #[error("basic_auth: {0} is empty, or has characters that are not allowed in a header")]
    Unusable(PathBuf),
    #[error("the system has no random numbers to generate the provider's credentials")]
    NoRandomness,
}

/// User and password from `basic-auth-user` and `basic-auth-password`, and the pairs that they replaced.
pub struct Credentials {
    /// `None` if the credentials were generated.
    directory: Option<PathBuf>,
    pairs: ArcSwap<Pairs>,
}

impl Credentials {
    /// Reads the files in `directory`.
    ///
    /// # Errors
    /// A file cannot be read, or is empty or invalid. The process should not start.
    pub fn read(directory: &Path) -> Result<Arc<Self>, CredentialsError> {
        let pairs = ArcSwap::from_pointee(Pairs::new(read_pair(directory)?));
        Ok(Arc::new(Self { directory: Some(directory.to_owned()), pairs }))
    }

    /// Generates random credentials. They are valid for the lifetime of the process.
    ///
    /// # Errors
    /// The system has no random numbers.
    pub fn generated() -> Result<Arc<Self>, CredentialsError> {
        let mut password = [0; 32];
        let random = ring::rand::SystemRandom::new();
        ring::rand::SecureRandom::fill(&random, &mut password)
            .map_err(|_| CredentialsError::NoRandomness)?;
        let pair = Pair::new("gateway", &STANDARD.encode(password));
        let pair = pair.ok_or(CredentialsError::NoRandomness)?;
        Ok(Arc::new(Self { directory: None, pairs: ArcSwap::from_pointee(Pairs::new(pair)) }))
    }

    /// Returns whether `headers` have the current credentials. Constant time for wrong ones of the same length.
    pub fn admit(&self, headers: &HeaderMap) -> bool {
        let Some(given) = headers.get(AUTHORIZATION).and_then(basic) else { return false };
        self.pairs.load().admit(&given)
    }

    /// Like [`verify`](Self::verify), but also accepts credentials replaced a short time ago: gateways load a change at
    /// a different time than their provider.
    pub fn admit_recent(&self, headers: &HeaderMap) -> bool {
        let Some(given) = headers.get(AUTHORIZATION).and_then(basic) else { return false };
        self.pairs.load().admit_recent(&given, Instant::now())
    }

    /// Makes the next request to the provider use the current credentials first, even if it has accepted replaced ones.
    pub fn prefer_current(&self) {
        self.update(|pairs| pairs.accepted(pairs.current()));
    }

    /// Returns whether the provider accepted only replaced credentials when it was last queried.
    pub fn are_ahead_of_provider(&self) -> bool {
        self.pairs.load().is_behind()
    }

    fn note_accepted(&self, pair: &Arc<Pair>) {
        self.update(|pairs| pairs.accepted(pair));
    }

    /// Applies `change` atomically.
    fn update(&self, change: impl Fn(&Pairs) -> Option<Pairs>) {
        // Most requests change nothing, and must not write to shared memory.
        if change(&self.pairs.load()).is_some() {
            self.pairs.rcu(|pairs| change(pairs).map_or_else(|| Arc::clone(pairs), Arc::new));
        }
    }

    /// Applies changes of the files until `stopping`. `reloads` triggers an immediate read.
    pub async fn follow(
        self: Arc<Self>,
        stopping: CancellationToken,
        mut reloads: watch::Receiver<u64>,
    ) {
        let Some(directory) = &self.directory else { return };
        let (mut was_readable, mut seen) = (true, None);
        loop {
            let pause = if seen.is_some() { REREAD_AFTER_CHANGE } else { REREAD_EVERY };
            // All branches are cancel-safe. A reload does not shorten the confirmation delay.
            tokio::select! {
                () = stopping.cancelled() => return,
                Ok(()) = reloads.changed(), if seen.is_none() => {}
                () = tokio::time::sleep(pause) => {}
            }
            self.update(|pairs| pairs.without_old(Instant::now()));
            match read_pair(directory) {
                Ok(pair) if pair == **self.pairs.load().current() => {
                    (was_readable, seen) = (true, None);
                }
                Ok(pair) if seen.as_ref() == Some(&pair) => {
                    (was_readable, seen) = (true, None);
                    self.change_to(pair);
                }
                Ok(pair) => seen = Some(pair),
                Err(error) => {
                    seen = None;
                    if std::mem::take(&mut was_readable) {
                        let error = &error as &dyn std::error::Error;
                        tracing::warn!(
                            error,
                            "Cannot read the credentials; the previous ones stay in use"
                        );
                    }
                }
            }
        }
    }

    fn change_to(&self, pair: Pair) {
        let (pair, now) = (Arc::new(pair), Instant::now());
        self.pairs.rcu(|pairs| Arc::new(pairs.changed_to(&pair, now)));
        tracing::info!("Credentials changed");
    }
}

fn read_pair(directory: &Path) -> Result<Pair, CredentialsError> {
    let read = |name: &str| {
        let path = directory.join(name);
        match std::fs::read_to_string(&path) {
            Ok(text) if text.trim().is_empty() => Err(CredentialsError::Unusable(path)),
            Ok(text) => Ok(text.trim().to_owned()),
            Err(error) => Err(CredentialsError::Unreadable(path, error)),
        }
    };
    Pair::new(&read("basic-auth-user")?, &read("basic-auth-password")?)
        .ok_or_else(|| CredentialsError::Unusable(directory.to_owned()))
}

/// Decodes a basic `Authorization` to `user:password`.
fn basic(value: &HeaderValue) -> Option<Vec<u8>> {
    let (scheme, encoded) = value.to_str().ok()?.trim().split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    STANDARD.decode(encoded.trim()).ok()
}

/// Middleware that authorizes requests to the API.
pub async fn guard(State(api): State<Arc<Api>>, request: Request, next: Next) -> Response {
    match admit(&api, request).await {
        Ok(Ok(request)) => next.run(request).await,
        Ok(Err(refusal)) => refusal,
        Err(error) => error.into_response(),
    }
}

/// Returns `request` if its client may use the API, otherwise the response to it. Without credentials every client may.
///
/// # Errors
/// The credentials are missing or wrong, or the authorization service does not respond.
pub async fn admit(api: &Api, request: Request) -> Result<Result<Request, Response>, Error> {
    if api.auth_proxy.is_some() {
        return ask_proxy(api, request).await;
    }
    match &api.credentials {
        Some(credentials) if !credentials.admit(request.headers()) => Err(Error::Unauthorized),
        _ => Ok(Ok(request)),
    }
}

/// Middleware of the process provider: `/system/*` requires the credentials, functions are open.
pub async fn guard_provider(
    State(credentials): State<Option<Arc<Credentials>>>,
    request: Request,
    next: Next,
) -> Response {
    match &credentials {
        Some(credentials)
            if request.uri().path().starts_with("/system/")
                && !credentials.admit_recent(request.headers()) =>
        {
            Error::Unauthorized.into_response()
        }
        _ => next.run(request).await,
    }
}

/// Sends `request` to `auth_proxy_url` for authorization. Returns the request if it is authorized, otherwise the
/// response to it.
async fn ask_proxy(api: &Api, request: Request) -> Result<Result<Request, Response>, Error> {
    let Some(proxy) = &api.auth_proxy else { return Ok(Ok(request)) };
    let (parts, body) = request.into_parts();
    let caller = parts.extensions.get::<Caller>().cloned().ok_or(Error::NoSuchPath)?;
    let (asked, body) = if proxy.pass_body {
        let bytes = read(body, MAX_PASSED_BODY).await?;
        (RequestBody::Full(Some(bytes.clone()).filter(|b| !b.is_empty())), Body::from(bytes))
    } else {
        (RequestBody::empty(), body)
    };
    let mut question = http::Request::new(asked);
    *question.method_mut() = parts.method.clone();
    *question.uri_mut() = proxy.target.clone();
    *question.headers_mut() = question::headers(&parts);
    let errand = Errand {
        peer: &caller.forwarded_for,
        watch: &caller.watch,
        began: Instant::now(),
        timeout: api.timeouts.upstream,
        is_clients: false,
    };
    let answer = forward(&api.client, &proxy.origin, question, errand).await?.answer;
    if answer.status().is_success() {
        caller.watch.call_goes_on();
        return Ok(Ok(Request::from_parts(parts, body)));
    }
    let (status, headers, text) = collect_response(answer).await?;
    let mut refusal = (status, text).into_response();
    for name in [CONTENT_TYPE, WWW_AUTHENTICATE] {
        if let Some(value) = headers.get(&name) {
            refusal.headers_mut().insert(name, value.clone());
        }
    }
    if status.is_redirection()
        && let Some(location) = headers.get(http::header::LOCATION)
    {
        refusal.headers_mut().insert(http::header::LOCATION, location.clone());
    }
    Ok(Err(refusal))
}

/// Maps the error of reading a body of at most `limit` bytes.
pub fn too_large_or_broken(error: &(dyn std::error::Error + 'static), limit: usize) -> Error {
    if error.is::<http_body_util::LengthLimitError>() {
        return Error::TooLarge(limit);
    }
    use crate::proxy::body::BodyError;
    Error::Body(BodyError::among(error).unwrap_or(BodyError::Broken))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn credentials() -> Credentials {
        let pairs = Pairs::new(Pair::new("admin", "s3cret").unwrap());
        Credentials { directory: None, pairs: ArcSwap::from_pointee(pairs) }
    }

    #[track_caller]
    fn check(authorization: &str, expect: bool) {
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, HeaderValue::from_str(authorization).unwrap());
        assert_eq!(credentials().admit(&headers), expect, "{authorization:?}");
    }

    #[test]
    fn generated_credentials_are_distinct() {
        let [one, other] = [Credentials::generated().unwrap(), Credentials::generated().unwrap()];
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, one.pairs.load().current().header().clone());
        assert!(one.admit(&headers) && !other.admit(&headers));
        assert!(!format!("{headers:?}").contains("Basic"), "{headers:?}");
    }

    #[test]
    fn only_the_right_credentials_are_accepted() {
        let good = STANDARD.encode("admin:s3cret");
        check(&format!("Basic {good}"), true);
        check(&format!("basic  {good} "), true);
        check(&format!("Bearer {good}"), false);
        check(&format!("Basic {}", STANDARD.encode("admin:s3cre")), false);
        check(&format!("Basic {}", STANDARD.encode("admin:s3cret:")), false);
        check(&format!("Basic {}", STANDARD.encode("")), false);
        check("Basic !!!", false);
        check("Basic", false);
        check("", false);
        assert!(!credentials().admit(&HeaderMap::new()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_partially_written_password_is_not_applied() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(directory.path().join(name), text);
        write("basic-auth-user", "admin").unwrap();
        write("basic-auth-password", "old").unwrap();
        let credentials = Credentials::read(directory.path()).unwrap();
        let accepts = |password: &str| {
            let header = Pair::new("admin", password).unwrap().header().clone();
            credentials.admit(&HeaderMap::from_iter([(AUTHORIZATION, header)]))
        };
        let (_reload, reloads) = watch::channel(0);
        let stopping = CancellationToken::new();
        let following = Arc::clone(&credentials).follow(stopping.clone(), reloads);
        let changes = async {
            tokio::time::sleep(REREAD_EVERY / 2).await;
            write("basic-auth-password", "ne").unwrap();
            tokio::time::sleep(REREAD_EVERY / 2 + REREAD_AFTER_CHANGE / 2).await;
            // The incomplete password has been read by now.
            write("basic-auth-password", "new").unwrap();
            tokio::time::sleep(REREAD_AFTER_CHANGE).await;
            assert_eq!(["old", "ne", "new"].map(accepts), [true, false, false]);
            tokio::time::sleep(REREAD_AFTER_CHANGE).await;
            assert_eq!(["old", "ne", "new"].map(accepts), [false, false, true]);
            stopping.cancel();
        };
        tokio::join!(following, changes);
    }
}
