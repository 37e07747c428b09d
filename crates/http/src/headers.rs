//! Headers that are forwarded, removed and added. The only place that knows hop-by-hop headers. No I/O.

use bytes::{BufMut, BytesMut};
use http::header::{
    AUTHORIZATION, CACHE_CONTROL, CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE,
    CONTENT_TYPE, COOKIE, EXPECT, FORWARDED, HOST, LOCATION, MAX_FORWARDS, PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION, RANGE, SET_COOKIE, TE, TRAILER, TRANSFER_ENCODING, UPGRADE, USER_AGENT,
    WWW_AUTHENTICATE,
};
use http::{HeaderMap, HeaderName, HeaderValue};

use crate::call_id::{RequestIds, USER_AGENT_VALUE};
use crate::names::{X_CALL_ID, X_FORWARDED_FOR, X_FORWARDED_HOST, X_START_TIME};

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");

/// Headers that `Connection` cannot remove: the gateway sets or handles them itself.
static PROTECTED: [HeaderName; 5] = [AUTHORIZATION, HOST, TRAILER, X_CALL_ID, X_START_TIME];

/// Calls `put` for each header of a request to `host` on behalf of the client at `client_address`: the headers of the
/// client without those of its connection, and headers of the gateway (with `request_ids` for an invocation). `headers`
/// is not modified, because changes to a map cost more than one pass over it.
///
/// Returns the protocol that the client wants to change to, if any: an upgrade is the only hop-by-hop information that
/// is forwarded.
pub fn to_upstream(
    headers: &HeaderMap,
    host: &HeaderValue,
    client_address: &HeaderValue,
    request_ids: Option<&RequestIds>,
    mut put: impl FnMut(&HeaderName, &HeaderValue),
) -> Option<HeaderValue> {
    let named = connection_options(headers.get_all(CONNECTION));
    let (mut client_host, mut upgrade) = (None, None);
    let (mut has_forwarded_host, mut has_user_agent, mut has_forwarded_for) = (false, false, false);
    put(&HOST, host);
    for (name, value) in headers {
        match HeaderKind::of(name) {
            HeaderKind::Host => client_host = client_host.or(Some(value)),
            HeaderKind::Upgrade => upgrade = Some(value),
            // hyper sends 100-continue before it reads the body.
            HeaderKind::Connection
            | HeaderKind::TransferEncoding
            | HeaderKind::HopByHop
            | HeaderKind::Expect => {}
            HeaderKind::CallId if request_ids.is_some() => {}
            _ if is_connection_named(&named, name) => {}
            HeaderKind::ForwardedFor => has_forwarded_for = true,
            kind => {
                has_forwarded_host |= kind == HeaderKind::ForwardedHost;
                has_user_agent |= kind == HeaderKind::UserAgent;
                put(name, value);
            }
        }
    }
    if let Some(client_host) = client_host.filter(|_| !has_forwarded_host) {
        put(&X_FORWARDED_HOST, client_host);
    }
    if has_forwarded_for {
        put(
            &X_FORWARDED_FOR,
            &append_forwarded_for(headers.get_all(X_FORWARDED_FOR), client_address),
        );
    } else {
        put(&X_FORWARDED_FOR, client_address);
    }
    if !has_user_agent {
        put(&USER_AGENT, &USER_AGENT_VALUE);
    }
    if let Some(request_ids) = request_ids {
        put(&X_CALL_ID, &request_ids.call_id);
        put(&X_START_TIME, &request_ids.start_time);
    }
    let upgrade =
        upgrade.filter(|protocol| named.contains(&UPGRADE) && is_allowed_upgrade(protocol))?;
    put(&CONNECTION, &HeaderValue::from_static("upgrade"));
    put(&UPGRADE, upgrade);
    Some(upgrade.clone())
}

/// Keeps the end-to-end headers of a request and a request to change protocols, which is returned.
pub fn keep_end_to_end(headers: &mut HeaderMap) -> Option<HeaderValue> {
    let upgrade = remove_hop_by_hop(headers).filter(is_allowed_upgrade);
    // hyper sends 100-continue before it reads the body.
    headers.remove(EXPECT);
    if let Some(protocol) = &upgrade {
        set_upgrade(headers, protocol);
    }
    upgrade
}

/// Returns whether a change to `protocol` is allowed. After a change to another version of HTTP or to TLS, the client
/// could send any request to the upstream, past all checks of the gateway.
fn is_allowed_upgrade(protocol: &HeaderValue) -> bool {
    let starts_with = |name: &[u8], start: &str| {
        name.get(..start.len()).is_some_and(|n| n.eq_ignore_ascii_case(start.as_bytes()))
    };
    protocol
        .as_bytes()
        .split(|byte| *byte == b',')
        .map(<[u8]>::trim_ascii)
        .all(|name| !["h2", "http", "tls"].iter().any(|start| starts_with(name, start)))
}

/// Keeps the end-to-end headers of a response, and those of an upgrade if `upgraded`.
pub fn to_client(headers: &mut HeaderMap, upgraded: bool) {
    let upgrade = remove_hop_by_hop(headers);
    if upgraded && let Some(protocol) = upgrade {
        set_upgrade(headers, &protocol);
    }
}

/// Returns whether a field may be sent as a trailer. Fields for framing, routing or authentication are forbidden,
/// because a recipient that merges trailers into the headers would use them.
pub(super) fn is_allowed_trailer(name: &HeaderName) -> bool {
    static FORBIDDEN_TRAILERS: [HeaderName; 20] = [
        AUTHORIZATION,
        CACHE_CONTROL,
        CONTENT_ENCODING,
        CONTENT_LENGTH,
        CONTENT_RANGE,
        CONTENT_TYPE,
        COOKIE,
        EXPECT,
        FORWARDED,
        HOST,
        LOCATION,
        MAX_FORWARDS,
        RANGE,
        SET_COOKIE,
        TRAILER,
        WWW_AUTHENTICATE,
        X_CALL_ID,
        X_FORWARDED_FOR,
        X_FORWARDED_HOST,
        X_START_TIME,
    ];
    !HOP_BY_HOP.contains(name) && !FORBIDDEN_TRAILERS.contains(name)
}

/// Headers that apply to a single connection.
static HOP_BY_HOP: [HeaderName; 8] = [
    CONNECTION,
    UPGRADE,
    TRANSFER_ENCODING,
    TE,
    KEEP_ALIVE,
    PROXY_CONNECTION,
    PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION,
];

/// The meaning of a header for a proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HeaderKind {
    Connection,
    Upgrade,
    TransferEncoding,
    /// Any other hop-by-hop header.
    HopByHop,
    ContentLength,
    Expect,
    ForwardedFor,
    ForwardedHost,
    Host,
    CallId,
    UserAgent,
    Other,
}

impl HeaderKind {
    /// Matches the name as text, at a tenth of the cost of comparing it with each `HeaderName`.
    pub(super) fn of(name: &HeaderName) -> Self {
        match name.as_str() {
            "connection" => Self::Connection,
            "upgrade" => Self::Upgrade,
            "transfer-encoding" => Self::TransferEncoding,
            "te"
            | "keep-alive"
            | "proxy-connection"
            | "proxy-authenticate"
            | "proxy-authorization" => Self::HopByHop,
            "content-length" => Self::ContentLength,
            "expect" => Self::Expect,
            "x-forwarded-for" => Self::ForwardedFor,
            "x-forwarded-host" => Self::ForwardedHost,
            "host" => Self::Host,
            "x-call-id" | "x-start-time" => Self::CallId,
            "user-agent" => Self::UserAgent,
            _ => Self::Other,
        }
    }

    /// Returns whether the header is hop-by-hop.
    pub(super) fn is_hop_by_hop(self) -> bool {
        matches!(self, Self::Connection | Self::Upgrade | Self::TransferEncoding | Self::HopByHop)
    }
}

/// Removes all hop-by-hop headers except `Trailer`, because hyper sends only announced trailers to clients. Returns the
/// value of `Upgrade`, if `Connection` names it.
fn remove_hop_by_hop(headers: &mut HeaderMap) -> Option<HeaderValue> {
    // One pass is cheaper than a lookup of each: most heads have at most one of them.
    if !headers.keys().any(|name| HeaderKind::of(name).is_hop_by_hop()) {
        return None;
    }
    let named = connection_options(headers.get_all(CONNECTION));
    remove_connection_named(headers, &named);
    let upgrade = headers.remove(UPGRADE);
    for name in &HOP_BY_HOP {
        headers.remove(name);
    }
    upgrade.filter(|_| named.contains(&UPGRADE))
}

/// Removes the headers that `Connection` names, except protected ones and `Upgrade`.
pub(super) fn remove_connection_named(headers: &mut HeaderMap, named: &[HeaderName]) {
    for name in named.iter().filter(|name| !PROTECTED.contains(*name) && **name != UPGRADE) {
        headers.remove(name);
    }
}

/// Returns whether `Connection` names the header, and it is not protected.
fn is_connection_named(named: &[HeaderName], name: &HeaderName) -> bool {
    // Usually it names no header.
    !named.is_empty()
        && named.binary_search_by(|other| other.as_str().cmp(name.as_str())).is_ok()
        && !PROTECTED.contains(name)
}

/// Returns the headers that `Connection` names, without `keep-alive` and `close`.
pub(super) fn connection_options<'a>(
    values: impl IntoIterator<Item = &'a HeaderValue>,
) -> Vec<HeaderName> {
    let values = values.into_iter().filter_map(|value| value.to_str().ok());
    let mut named: Vec<HeaderName> = values
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|name| {
            !name.eq_ignore_ascii_case("keep-alive") && !name.eq_ignore_ascii_case("close")
        })
        .filter_map(|name| HeaderName::from_bytes(name.as_bytes()).ok())
        .collect();
    // Sorted for binary search: a head of 1 MiB can name very many headers.
    named.sort_unstable_by(|one, other| one.as_str().cmp(other.as_str()));
    named
}

pub(super) fn set_upgrade(headers: &mut HeaderMap, protocol: &HeaderValue) {
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(UPGRADE, protocol.clone());
}

/// Joins all values of `X-Forwarded-For` and `client_address` into one value.
fn append_forwarded_for<'a>(
    values: impl IntoIterator<Item = &'a HeaderValue>,
    client_address: &HeaderValue,
) -> HeaderValue {
    let mut list = BytesMut::new();
    for value in values {
        list.put_slice(value.as_bytes());
        list.put_slice(b", ");
    }
    list.put_slice(client_address.as_bytes());
    HeaderValue::from_maybe_shared(list.freeze()).unwrap_or_else(|_| client_address.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        headers
    }

    fn forwarded(
        sent: &HeaderMap,
        host: &'static str,
        client_address: &'static str,
    ) -> (HeaderMap, Option<HeaderValue>) {
        let [host, client_address] = [host, client_address].map(HeaderValue::from_static);
        let mut headers = HeaderMap::new();
        let put = |name: &HeaderName, value: &HeaderValue| {
            headers.append(name.clone(), value.clone());
        };
        let upgrade =
            to_upstream(sent, &host, &client_address, Some(&RequestIds::from_headers(sent)), put);
        (headers, upgrade)
    }

    #[track_caller]
    fn check(sent: &[(&'static str, &'static str)], expect: &[(&'static str, &'static str)]) {
        let (host, client_address) = ("provider:8081", "10.0.0.9");
        let (mut headers, _) = forwarded(&map(sent), host, client_address);
        headers.remove(USER_AGENT);
        headers.remove(X_START_TIME);
        if !sent.iter().any(|(name, _)| *name == X_CALL_ID) {
            headers.remove(X_CALL_ID);
        }
        assert_eq!(headers, map(expect));
    }

    #[test]
    fn the_host_and_address_of_the_client_are_forwarded() {
        check(
            &[("host", "gateway.test")],
            &[
                ("host", "provider:8081"),
                ("x-forwarded-host", "gateway.test"),
                ("x-forwarded-for", "10.0.0.9"),
            ],
        );
    }

    #[test]
    fn the_addresses_of_earlier_proxies_are_joined_in_one_header() {
        check(
            &[
                ("host", "g"),
                ("x-forwarded-host", "public.example"),
                ("x-forwarded-for", "203.0.113.9"),
                ("x-forwarded-for", "198.51.100.1, 198.51.100.2"),
            ],
            &[
                ("host", "provider:8081"),
                ("x-forwarded-host", "public.example"),
                ("x-forwarded-for", "203.0.113.9, 198.51.100.1, 198.51.100.2, 10.0.0.9"),
            ],
        );
    }

    #[test]
    fn hop_by_hop_headers_are_removed() {
        check(
            &[
                ("host", "g"),
                ("connection", "keep-alive, X-Secret, host, x-call-id"),
                ("x-call-id", "1"),
                ("x-secret", "1"),
                ("keep-alive", "timeout=5"),
                ("te", "trailers"),
                ("proxy-authorization", "Basic eDp5"),
                ("proxy-connection", "keep-alive"),
                ("transfer-encoding", "chunked"),
                ("upgrade", "h2c"),
                ("expect", "100-continue"),
                ("x-kept", "yes"),
            ],
            &[
                ("host", "provider:8081"),
                ("x-forwarded-host", "g"),
                ("x-forwarded-for", "10.0.0.9"),
                ("x-call-id", "1"),
                ("x-kept", "yes"),
            ],
        );
    }

    #[test]
    fn headers_of_the_gateway_are_sent_once() {
        let sent = map(&[
            ("user-agent", "curl"),
            ("x-call-id", "mine"),
            ("x-call-id", "other"),
            ("x-start-time", "0"),
            ("host", "a"),
        ]);
        let (headers, _) = forwarded(&sent, "p", "p");
        for name in [USER_AGENT, X_CALL_ID, X_START_TIME, HOST] {
            assert_eq!(headers.get_all(&name).iter().count(), 1, "{name}");
        }
        assert_eq!(
            (&headers[X_CALL_ID], &headers[USER_AGENT]),
            (&"mine".parse().unwrap(), &"curl".parse().unwrap())
        );
        assert_ne!(headers[X_START_TIME], "0");
    }

    #[test]
    fn an_upgrade_and_its_acceptance_are_forwarded() {
        let sent = map(&[("host", "g"), ("connection", "Upgrade"), ("upgrade", "websocket")]);
        let (headers, protocol) = forwarded(&sent, "p", "p");
        assert_eq!(protocol, Some(HeaderValue::from_static("websocket")));
        assert_eq!(headers[CONNECTION], "upgrade");
        let mut response = map(&[("connection", "upgrade"), ("upgrade", "websocket")]);
        to_client(&mut response, true);
        assert_eq!(response[UPGRADE], "websocket");
        to_client(&mut response, false);
        assert!(response.is_empty());
    }
}
