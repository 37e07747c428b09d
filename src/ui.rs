//! The web page under `/ui/`, carried inside the binary.

use axum::response::{IntoResponse, Response};
use http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, LOCATION};
use http::{HeaderName, StatusCode};

const NOSNIFF: (HeaderName, &str) = (http::header::X_CONTENT_TYPE_OPTIONS, "nosniff");
/// Nothing from elsewhere; `blob:` shows images that a function answers.
const POLICY: &str =
    "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'";

/// `/` leads to the page.
pub async fn redirect() -> Response {
    let headers = [(LOCATION, "/ui/"), (CONTENT_TYPE, "text/plain; charset=utf-8")];
    (StatusCode::TEMPORARY_REDIRECT, headers, "See /ui/\n").into_response()
}

pub async fn page() -> Response {
    asset("text/html; charset=utf-8", include_str!("ui/index.html"))
}

pub async fn script() -> Response {
    asset("text/javascript; charset=utf-8", include_str!("ui/app.js"))
}

pub async fn queue_script() -> Response {
    asset("text/javascript; charset=utf-8", include_str!("ui/queue.js"))
}

pub async fn style() -> Response {
    asset("text/css; charset=utf-8", include_str!("ui/style.css"))
}

fn asset(kind: &'static str, text: &'static str) -> Response {
    // A new version of the binary must not meet an old page.
    let headers = [
        (CONTENT_TYPE, kind),
        (CACHE_CONTROL, "no-cache"),
        (CONTENT_SECURITY_POLICY, POLICY),
        NOSNIFF,
    ];
    (headers, text).into_response()
}
