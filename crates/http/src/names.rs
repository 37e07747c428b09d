//! Header names and path prefixes that more than one part of the project uses. Names that only one file uses stay there.

use http::HeaderName;

/// Declares constants for the headers of a table.
macro_rules! headers {
    ($($(#[$doc:meta])* $name:ident = $text:literal;)*) => {
        $($(#[$doc])* pub const $name: HeaderName = HeaderName::from_static($text);)*
    };
}

headers! {
    /// Id of a call.
    X_CALL_ID = "x-call-id";
    /// Start of a call, as Unix time in nanoseconds.
    X_START_TIME = "x-start-time";
    X_SERVED_BY = "x-served-by";
    /// Duration of an invocation in seconds.
    X_DURATION_SECONDS = "x-duration-seconds";
    X_FORWARDED_FOR = "x-forwarded-for";
    X_FORWARDED_HOST = "x-forwarded-host";

    /// URL that receives the response of a queued call.
    X_CALLBACK_URL = "x-callback-url";
    /// Time for which a queued call is not executed.
    X_DELAY_SECONDS = "x-delay-seconds";
    /// Time after which a queued call is not executed any more.
    X_EXPIRES_SECONDS = "x-expires-seconds";
    /// Maximum number of attempts of a queued call.
    X_MAX_ATTEMPTS = "x-max-attempts";
    /// Key that identifies repeated submissions of the same queued call.
    IDEMPOTENCY_KEY = "idempotency-key";
    /// Status that the function returned to a queued call.
    X_FUNCTION_STATUS = "x-function-status";
    /// The stored body of a response is incomplete.
    X_TRUNCATED = "x-truncated";

    /// Marks a callback. The API rejects requests that have this header, whatever its value.
    X_GATEWAY_CALLBACK = "x-gateway-callback";
    /// Number of callbacks in a row that have led to a request.
    X_GATEWAY_CALLBACKS = "x-gateway-callbacks";
    /// Machine-readable reason of an error response of a provider or gateway.
    X_GATEWAY_REASON = "x-gateway-reason";
    /// Marks an error response that was created by the provider, not by the function.
    X_OPENFAAS_INTERNAL = "x-openfaas-internal";
}

/// Prefix of headers that only providers and gateways may set.
pub const RESERVED_HEADER_PREFIX: &str = "x-gateway-";

/// Path prefix of synchronous calls.
pub const FUNCTION_PREFIX: &str = "/function/";
/// Path prefix of queued calls.
pub const ASYNC_FUNCTION_PREFIX: &str = "/async-function/";
/// Path prefix of the API.
pub const SYSTEM_PREFIX: &str = "/system/";
