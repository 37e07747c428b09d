//! Which headers cross the gateway, and which are added. The only place that knows hop-by-hop headers. No I/O.

use bytes::{BufMut, BytesMut};
use http::header::Entry;
use http::header::{
    AUTHORIZATION, CACHE_CONTROL, CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE,
    CONTENT_TYPE, COOKIE, EXPECT, FORWARDED, HOST, LOCATION, MAX_FORWARDS, PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION, RANGE, SET_COOKIE, TE, TRAILER, TRANSFER_ENCODING, UPGRADE, USER_AGENT,
    WWW_AUTHENTICATE,
};
use http::{HeaderMap, HeaderName, HeaderValue};

use crate::call_id::{PRODUCT, X_CALL_ID, X_START_TIME};

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");

/// What `Connection` cannot take away: these were put there by the gateway, or it sees to them itself.
static OURS: [HeaderName; 5] = [AUTHORIZATION, HOST, TRAILER, X_CALL_ID, X_START_TIME];

/// Makes a caller's headers those of a request to `host`, on behalf of `peer`.
///
/// Returns the protocol that the caller wants to change to, if any: an upgrade is the one hop-by-hop matter that
/// is passed on.
pub fn to_upstream(
    headers: &mut HeaderMap,
    host: &HeaderValue,
    peer: &HeaderValue,
) -> Option<HeaderValue> {
    let upgrade = end_to_end(headers);
    if let Some(caller_host) = headers.insert(HOST, host.clone()) {
        headers.entry(X_FORWARDED_HOST).or_insert(caller_host);
    }
    append_forwarded_for(headers, peer);
    headers.entry(USER_AGENT).or_insert(PRODUCT);
    upgrade
}

/// Leaves a request's headers that are meant for its destination, and the wish to change protocols, which is
/// returned.
pub fn end_to_end(headers: &mut HeaderMap) -> Option<HeaderValue> {
    let upgrade = take_hop_by_hop(headers).filter(is_harmless);
    // hyper has answered 100-continue by the time the body is read.
    headers.remove(EXPECT);
    if let Some(protocol) = &upgrade {
        announce_upgrade(headers, protocol);
    }
    upgrade
}

/// Whether a change to `protocol` keeps what the connection can reach to what was asked for. One to another HTTP or
/// to TLS opens all of the upstream, past every check that is made here.
fn is_harmless(protocol: &HeaderValue) -> bool {
    let starts_with = |name: &[u8], start: &str| {
        name.get(..start.len()).is_some_and(|n| n.eq_ignore_ascii_case(start.as_bytes()))
    };
    protocol
        .as_bytes()
        .split(|byte| *byte == b',')
        .map(<[u8]>::trim_ascii)
        .all(|name| !["h2", "http", "tls"].iter().any(|start| starts_with(name, start)))
}

/// Makes an upstream's headers those of an answer to the caller; `upgraded`: it has agreed to change protocols.
pub fn to_caller(headers: &mut HeaderMap, upgraded: bool) {
    let upgrade = take_hop_by_hop(headers);
    if upgraded && let Some(protocol) = upgrade {
        announce_upgrade(headers, &protocol);
    }
}

/// Whether a field may follow a body. One that frames, routes or vouches comes too late there, and is not to be taken for
/// a header by those who join the two.
pub(super) fn may_trail(name: &HeaderName) -> bool {
    static TOO_LATE: [HeaderName; 20] = [
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
    !HOP_BY_HOP.contains(name) && !TOO_LATE.contains(name)
}

/// Headers that concern one connection alone.
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

/// The place of `name` in `HOP_BY_HOP`. Compared as text, which costs a tenth of comparing names with each.
fn hop_by_hop(name: &HeaderName) -> Option<usize> {
    match name.as_str() {
        "connection" => Some(0),
        "upgrade" => Some(1),
        "transfer-encoding" => Some(2),
        "te" => Some(3),
        "keep-alive" => Some(4),
        "proxy-connection" => Some(5),
        "proxy-authenticate" => Some(6),
        "proxy-authorization" => Some(7),
        _ => None,
    }
}

/// Takes out what concerns one connection alone, the announcement of trailers apart: hyper passes on to callers just
/// those trailers that are announced. Returns what `Upgrade` said, if `Connection` names it.
fn take_hop_by_hop(headers: &mut HeaderMap) -> Option<HeaderValue> {
    // One walk is cheaper than looking for each: most heads have none of them, or one.
    let mut present = [false; 8];
    for place in headers.keys().filter_map(hop_by_hop) {
        present[place] = true;
    }
    if !present.contains(&true) {
        return None;
    }
    let named = if present[0] { named_by_connection(headers) } else { Vec::new() };
    for name in named.iter().filter(|name| !OURS.contains(*name) && **name != UPGRADE) {
        headers.remove(name);
    }
    let mut upgrade = None;
    for (name, _) in HOP_BY_HOP.iter().zip(present).filter(|(_, present)| *present) {
        let value = headers.remove(name);
        if *name == UPGRADE {
            upgrade = value;
        }
    }
    upgrade.filter(|_| named.contains(&UPGRADE))
}

/// The headers that `Connection` names; what it says of the connection itself is no header.
fn named_by_connection(headers: &HeaderMap) -> Vec<HeaderName> {
    headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|name| {
            !name.eq_ignore_ascii_case("keep-alive") && !name.eq_ignore_ascii_case("close")
        })
        .filter_map(|name| HeaderName::from_bytes(name.as_bytes()).ok())
        .collect()
}

fn announce_upgrade(headers: &mut HeaderMap, protocol: &HeaderValue) {
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(UPGRADE, protocol.clone());
}

/// Appends the peer to the list of those that passed the request on, one header whatever came.
fn append_forwarded_for(headers: &mut HeaderMap, peer: &HeaderValue) {
    let mut entry = match headers.entry(X_FORWARDED_FOR) {
        Entry::Vacant(entry) => {
            entry.insert(peer.clone());
            return;
        }
        Entry::Occupied(entry) => entry,
    };
    let mut list = BytesMut::new();
    for value in entry.iter() {
        list.put_slice(value.as_bytes());
        list.put_slice(b", ");
    }
    list.put_slice(peer.as_bytes());
    let list = HeaderValue::from_maybe_shared(list.freeze()).unwrap_or_else(|_| peer.clone());
    entry.insert(list);
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

    #[track_caller]
    fn check(sent: &[(&'static str, &'static str)], expect: &[(&'static str, &'static str)]) {
        let mut headers = map(sent);
        to_upstream(
            &mut headers,
            &HeaderValue::from_static("provider:8081"),
            &HeaderValue::from_static("10.0.0.9"),
        );
        headers.remove(USER_AGENT);
        assert_eq!(headers, map(expect));
    }

    #[test]
    fn the_callers_host_and_address_are_told() {
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
    fn a_chain_of_proxies_is_kept_in_one_header() {
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
    fn what_concerns_the_connection_stays_here() {
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
    fn an_upgrade_is_passed_on_and_so_is_its_acceptance() {
        let mut headers =
            map(&[("host", "g"), ("connection", "Upgrade"), ("upgrade", "websocket")]);
        let host = HeaderValue::from_static("p");
        let wanted = to_upstream(&mut headers, &host, &host);
        assert_eq!(wanted, Some(HeaderValue::from_static("websocket")));
        assert_eq!(headers[CONNECTION], "upgrade");
        let mut answer = map(&[("connection", "upgrade"), ("upgrade", "websocket")]);
        to_caller(&mut answer, true);
        assert_eq!(answer[UPGRADE], "websocket");
        to_caller(&mut answer, false);
        assert!(answer.is_empty());
    }
}
