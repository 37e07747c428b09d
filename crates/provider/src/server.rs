//! The provider's REST API, over any `Backend`. It includes neither a listener nor authentication.

mod functions;
mod logs;
mod namespaces;
mod requests;
mod router;
mod secrets;

pub use self::router::router;
