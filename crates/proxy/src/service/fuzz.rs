//! Fuzz target: request heads that hyper accepts.

use http::header::HOST;
use http::{Method, Request, Version};
use http_body_util::Empty;

use crate::routing::RouteMatch;
use crate::service::request::check;
use gateway_base::function::has_dot_segment;

/// A request that passes the check is read in the same way by every HTTP implementation.
pub(crate) fn request_head(data: &[u8]) {
    let Some(mut request) = parse(data) else { return };
    let is_call = RouteMatch::of(request.uri().path()).is_call();
    if check(&mut request, is_call).is_err() {
        return;
    }
    let hosts = request.headers().get_all(HOST).iter().count();
    assert!(hosts == 1 || hosts == 0 && request.version() < Version::HTTP_11, "{request:?}");
    assert_ne!(request.method(), Method::CONNECT);
    let uri = request.uri();
    assert!(uri.authority().is_none() && uri.path().starts_with('/'), "{request:?}");
    let _ = has_dot_segment(uri.path());
}

/// Parses the head as hyper does; `None` if hyper rejects it.
fn parse(data: &[u8]) -> Option<Request<Empty<&'static [u8]>>> {
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut head = httparse::Request::new(&mut headers);
    if !head.parse(data).ok()?.is_complete() {
        return None;
    }
    let version = if head.version? == 0 { Version::HTTP_10 } else { Version::HTTP_11 };
    let mut request = Request::builder().method(head.method?).uri(head.path?).version(version);
    for header in &*head.headers {
        request = request.header(header.name, header.value);
    }
    request.body(Empty::new()).ok()
}
