//! The web page under `/ui/`, embedded in the binary.

use axum::extract::Path;
use axum::response::{IntoResponse, Response};
use http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, LOCATION};
use http::{HeaderName, StatusCode};

use gateway_proxy::error::Error;

const NOSNIFF: (HeaderName, &str) = (http::header::X_CONTENT_TYPE_OPTIONS, "nosniff");
/// No external resources. `blob:` allows images in responses of functions.
const PAGE_SECURITY_POLICY: &str =
    "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'";

macro_rules! files {
    ($($name:literal)*) => { &[$(($name, include_str!(concat!("ui/", $name)))),*] };
}

/// Files that `index.html` loads.
const FILES: &[(&str, &str)] = files! {
    "address.js" "app.js" "body.js" "call.js" "dom.js" "form.js" "list.js" "poll.js" "queue.js" "style.css"
};

/// Redirects `/` to the page.
pub async fn redirect() -> Response {
    let headers = [(LOCATION, "/ui/"), (CONTENT_TYPE, "text/plain; charset=utf-8")];
    (StatusCode::TEMPORARY_REDIRECT, headers, "See /ui/\n").into_response()
}

/// Serves the page itself.
pub async fn page() -> Response {
    asset("text/html; charset=utf-8", include_str!("ui/index.html"))
}

/// Serves a file of the page.
pub async fn file(Path(name): Path<String>) -> Response {
    match FILES.iter().find(|(file, _)| *file == name) {
        Some((name, text)) if name.ends_with(".css") => asset("text/css; charset=utf-8", text),
        Some((_, text)) => asset("text/javascript; charset=utf-8", text),
        None => Error::NoSuchPath.into_response(),
    }
}

fn asset(kind: &'static str, text: &'static str) -> Response {
    // After an upgrade, the browser must not use an old page.
    let headers = [
        (CONTENT_TYPE, kind),
        (CACHE_CONTROL, "no-cache"),
        (CONTENT_SECURITY_POLICY, PAGE_SECURITY_POLICY),
        NOSNIFF,
    ];
    (headers, text).into_response()
}
