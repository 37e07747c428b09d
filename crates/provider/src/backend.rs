//! Interface between the provider's REST server and the platform that runs the functions.

use std::fmt;
use std::pin::Pin;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::request::Parts;
use axum::response::Response;
use futures_util::Stream;
use jiff::Timestamp;

use crate::error::ApiError;
use crate::types::{FunctionDeployment, FunctionStatus, LogLine, Namespace};
use gateway_base::function::Function;

/// A platform that runs functions. The server parses requests, and calls one method for each.
///
/// A server may drop the future of any method when its client disconnects. A change that has begun is completed then.
pub trait Backend: Clone + Send + Sync + 'static {
    /// Describes the platform, for `GET /system/info`.
    fn info(&self) -> BackendInfo;

    /// Returns the namespace of requests that name none.
    fn default_namespace(&self) -> &str;

    /// Deploys a function, or replaces the function of the same name.
    ///
    /// # Errors
    /// `Invalid` with the reason if the function cannot run with this deployment. Nothing is changed then.
    fn deploy(&self, deployment: FunctionDeployment) -> impl Changes;

    /// Replaces an existing function.
    ///
    /// # Errors
    /// `NoSuchFunction`, and the errors of `deploy`.
    fn update(&self, deployment: FunctionDeployment) -> impl Changes;

    /// Removes a function. Its replicas finish their calls first.
    ///
    /// # Errors
    /// `NoSuchFunction`.
    fn delete(&self, function: Function) -> impl Changes;

    /// Sets the number of desired replicas of a function.
    ///
    /// # Errors
    /// `NoSuchFunction`, and `Invalid` if the platform cannot run this number.
    fn scale(&self, function: Function, replicas: u64) -> impl Changes;

    /// Returns the functions of a namespace, ordered by name. A namespace that does not exist has none.
    ///
    /// # Errors
    /// The platform does not respond.
    fn list(&self, namespace: &str) -> impl Returns<Vec<FunctionStatus>>;

    /// Returns the status of a function, with its resource usage if `usage` is set.
    ///
    /// # Errors
    /// `NoSuchFunction`.
    fn status(&self, function: &Function, usage: bool) -> impl Returns<FunctionStatus>;

    /// Watches a function until it has a ready replica, cannot start, or is scaled to zero, for at most `max_wait`.
    ///
    /// # Errors
    /// `NoSuchFunction`.
    fn watch(&self, function: &Function, max_wait: Duration) -> impl Returns<()>;

    /// Executes one call of a function. Failures are responses, too: they tell the gateway whether the function may
    /// have received the call.
    fn invoke(
        &self,
        function: Function,
        invocation: Invocation,
    ) -> impl Future<Output = Response> + Send;

    /// Returns the log lines of a function that `query` selects, oldest first, and then new ones if it follows.
    /// The stream ends when the function is deleted, or the backend stops.
    ///
    /// # Errors
    /// `NoSuchFunction`.
    fn logs(&self, function: &Function, query: LogQuery) -> impl Returns<LogStream>;

    /// Returns the names of the secrets in a namespace.
    ///
    /// # Errors
    /// `NotFound` without such a namespace.
    fn secrets(&self, namespace: &str) -> impl Returns<Vec<String>>;

    /// Stores a new secret.
    ///
    /// # Errors
    /// `Conflict` if it exists, `NotFound` without such a namespace, `Invalid` if the platform refuses the name.
    fn create_secret(&self, secret: SecretValue) -> impl Changes;

    /// Changes the value of a secret.
    ///
    /// # Errors
    /// `NotFound`.
    fn update_secret(&self, secret: SecretValue) -> impl Changes;

    /// Removes the secret `name`.
    ///
    /// # Errors
    /// `NotFound`.
    fn delete_secret(&self, namespace: String, name: String) -> impl Changes;

    /// Returns the names of all namespaces for functions, sorted.
    ///
    /// # Errors
    /// The platform does not respond.
    fn namespaces(&self) -> impl Returns<Vec<String>>;

    /// Returns a namespace.
    ///
    /// # Errors
    /// `NotFound`.
    fn namespace(&self, name: &str) -> impl Returns<Namespace>;

    /// Creates a namespace.
    ///
    /// # Errors
    /// `Conflict` if it exists.
    fn create_namespace(&self, namespace: Namespace) -> impl Changes;

    /// Replaces labels and annotations of a namespace.
    ///
    /// # Errors
    /// `NotFound`.
    fn update_namespace(&self, namespace: Namespace) -> impl Changes;

    /// Deletes a namespace.
    ///
    /// # Errors
    /// `NotFound`, and `Conflict` with the reason if it may not be deleted.
    fn delete_namespace(&self, name: String) -> impl Changes;
}

/// The future of a method that returns `T` or an error response.
pub trait Returns<T>: Future<Output = Result<T, ApiError>> + Send {}

impl<T, F: Future<Output = Result<T, ApiError>> + Send> Returns<T> for F {}

/// The future of a method that changes something.
pub trait Changes: Returns<()> {}

impl<F: Returns<()>> Changes for F {}

/// Names of a platform.
#[derive(Clone, Copy, Debug)]
pub struct BackendInfo {
    /// Name of this provider.
    pub provider: &'static str,
    /// What the functions run on.
    pub orchestration: &'static str,
}

/// A request for a function.
pub struct Invocation {
    pub head: Parts,
    pub body: Body,
    /// The path after the function's name; at least `/`.
    pub path: String,
    /// Time at which the head had arrived.
    pub started: Instant,
}

/// Log lines, as they are written.
pub type LogStream = Pin<Box<dyn Stream<Item = LogLine> + Send>>;

/// Selects log lines.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LogQuery {
    /// Maximum number of past lines, counted from the newest.
    pub tail: Option<usize>,
    /// Excludes older lines.
    pub since: Option<Timestamp>,
    /// Name of the only replica whose lines are wanted.
    pub instance: Option<String>,
    /// Includes future lines.
    pub follow: bool,
}

/// A secret with its decoded value. `Debug` does not print the value.
#[derive(Clone)]
pub struct SecretValue {
    pub namespace: String,
    pub name: String,
    pub value: Vec<u8>,
}

impl fmt::Debug for SecretValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SecretValue")
            .field("namespace", &self.namespace)
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}
