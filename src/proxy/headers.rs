//! Which headers cross the gateway, and which are added. The only place that knows hop-by-hop headers. No I/O.

use bytes::{BufMut, BytesMut};
use http::header::{
    AUTHORIZATION, CACHE_CONTROL, CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE,
    CONTENT_TYPE, COOKIE, EXPECT, FORWARDED, HOST, LOCATION, MAX_FORWARDS, PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION, RANGE, SET_COOKIE, TE, TRAILER, TRANSFER_ENCODING, UPGRADE, USER_AGENT,
    WWW_AUTHENTICATE,
};
use http::{HeaderMap, HeaderName, HeaderValue};

use crate::call_id::{RequestIds, USER_AGENT_VALUE, X_CALL_ID, X_START_TIME};

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");

/// What `Connection` cannot take away: these were put there by the gateway, or it sees to them itself.
static OURS: [HeaderName; 5] = [AUTHORIZATION, HOST, TRAILER, X_CALL_ID, X_START_TIME];

/// Says by `put` which headers a request to `host` has, made on behalf of `peer`: the caller's own, but for what
/// concerns its connection, and ours (`ids`, if it is a call). What the caller sent is only read: a map that changes costs more than one walk.
///
/// Returns the protocol that the caller wants to change to, if any: an upgrade is the one hop-by-hop matter that
/// is passed on.
pub fn to_upstream(
    headers: &HeaderMap,
    host: &HeaderValue,
    peer: &HeaderValue,
    ids: Option<&RequestIds>,
    mut put: impl FnMut(&HeaderName, &HeaderValue),
) -> Option<HeaderValue> {
    let named = named_by_connection(headers.get_all(CONNECTION));
    let (mut caller_host, mut upgrade) = (None, None);
    let (mut tells_host, mut tells_agent, mut tells_peers) = (false, false, false);
    put(&HOST, host);
    for (name, value) in headers {
        match Kind::of(name) {
            Kind::Host => caller_host = caller_host.or(Some(value)),
            Kind::Upgrade => upgrade = Some(value),
            // hyper has answered 100-continue by the time the body is read.
            Kind::Connection | Kind::TransferEncoding | Kind::HopByHop | Kind::Expect => {}
            Kind::Stamp if ids.is_some() => {}
            _ if is_named(&named, name) => {}
            Kind::ForwardedFor => tells_peers = true,
            kind => {
                tells_host |= kind == Kind::ForwardedHost;
                tells_agent |= kind == Kind::UserAgent;
                put(name, value);
            }
        }
    }
    if let Some(caller_host) = caller_host.filter(|_| !tells_host) {
        put(&X_FORWARDED_HOST, caller_host);
    }
    if tells_peers {
        put(&X_FORWARDED_FOR, &chain(headers.get_all(X_FORWARDED_FOR), peer));
    } else {
        put(&X_FORWARDED_FOR, peer);
    }
    if !tells_agent {
        put(&USER_AGENT, &USER_AGENT_VALUE);
    }
    if let Some(ids) = ids {
        put(&X_CALL_ID, &ids.call_id);
        put(&X_START_TIME, &ids.start_time);
    }
    let upgrade = upgrade.filter(|it| named.contains(&UPGRADE) && is_harmless(it))?;
    put(&CONNECTION, &HeaderValue::from_static("upgrade"));
    put(&UPGRADE, upgrade);
    Some(upgrade.clone())
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

/// Leaves the headers of an answer that are meant for the caller; `upgraded`: it may change protocols.
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

/// What a header is to a proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Connection,
    Upgrade,
    TransferEncoding,
    /// Another one that concerns one connection alone.
    HopByHop,
    ContentLength,
    Expect,
    ForwardedFor,
    ForwardedHost,
    Host,
    Stamp,
    UserAgent,
    Other,
}

impl Kind {
    /// Compared as text, which costs a tenth of comparing names with each.
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
            "x-call-id" | "x-start-time" => Self::Stamp,
            "user-agent" => Self::UserAgent,
            _ => Self::Other,
        }
    }

    /// Whether the header concerns one connection alone.
    pub(super) fn is_hop_by_hop(self) -> bool {
        matches!(self, Self::Connection | Self::Upgrade | Self::TransferEncoding | Self::HopByHop)
    }
}

/// Takes out what concerns one connection alone, the announcement of trailers apart: hyper passes on to callers just
/// those trailers that are announced. Returns what `Upgrade` said, if `Connection` names it.
fn take_hop_by_hop(headers: &mut HeaderMap) -> Option<HeaderValue> {
    // One walk is cheaper than looking for each: most heads have none of them, or one.
    if !headers.keys().any(|name| Kind::of(name).is_hop_by_hop()) {
        return None;
    }
    let named = named_by_connection(headers.get_all(CONNECTION));
    take_named(headers, &named);
    let upgrade = headers.remove(UPGRADE);
    for name in &HOP_BY_HOP {
        headers.remove(name);
    }
    upgrade.filter(|_| named.contains(&UPGRADE))
}

/// Takes out what `Connection` names.
pub(super) fn take_named(headers: &mut HeaderMap, named: &[HeaderName]) {
    for name in named.iter().filter(|name| !OURS.contains(*name) && **name != UPGRADE) {
        headers.remove(name);
    }
}

/// Whether `Connection` takes a header away.
fn is_named(named: &[HeaderName], name: &HeaderName) -> bool {
    // Mostly it names none.
    !named.is_empty()
        && named.binary_search_by(|other| other.as_str().cmp(name.as_str())).is_ok()
        && !OURS.contains(name)
}

/// The headers that `Connection` names; what it says of the connection itself is no header.
pub(super) fn named_by_connection<'a>(
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
    // In order: a head of 1 MiB can name very many, and each header is looked for among them.
    named.sort_unstable_by(|one, other| one.as_str().cmp(other.as_str()));
    named
}

pub(super) fn announce_upgrade(headers: &mut HeaderMap, protocol: &HeaderValue) {
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(UPGRADE, protocol.clone());
}

/// Those that passed the request on, and `peer` behind them: one header whatever came.
fn chain<'a>(told: impl IntoIterator<Item = &'a HeaderValue>, peer: &HeaderValue) -> HeaderValue {
    let mut list = BytesMut::new();
    for value in told {
        list.put_slice(value.as_bytes());
        list.put_slice(b", ");
    }
    list.put_slice(peer.as_bytes());
    HeaderValue::from_maybe_shared(list.freeze()).unwrap_or_else(|_| peer.clone())
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

    fn passed_on(
        sent: &HeaderMap,
        host: &'static str,
        peer: &'static str,
    ) -> (HeaderMap, Option<HeaderValue>) {
        let [host, peer] = [host, peer].map(HeaderValue::from_static);
        let mut headers = HeaderMap::new();
        let put = |name: &HeaderName, value: &HeaderValue| {
            headers.append(name.clone(), value.clone());
        };
        let upgrade = to_upstream(sent, &host, &peer, Some(&RequestIds::from_headers(sent)), put);
        (headers, upgrade)
    }

    #[track_caller]
    fn check(sent: &[(&'static str, &'static str)], expect: &[(&'static str, &'static str)]) {
        let (host, peer) = ("provider:8081", "10.0.0.9");
        let (mut headers, _) = passed_on(&map(sent), host, peer);
        headers.remove(USER_AGENT);
        headers.remove(X_START_TIME);
        if !sent.iter().any(|(name, _)| *name == X_CALL_ID) {
            headers.remove(X_CALL_ID);
        }
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
    fn what_the_gateway_says_is_said_once() {
        let sent = map(&[
            ("user-agent", "curl"),
            ("x-call-id", "mine"),
            ("x-call-id", "other"),
            ("x-start-time", "0"),
            ("host", "a"),
        ]);
        let (headers, _) = passed_on(&sent, "p", "p");
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
    fn an_upgrade_is_passed_on_and_so_is_its_acceptance() {
        let sent = map(&[("host", "g"), ("connection", "Upgrade"), ("upgrade", "websocket")]);
        let (headers, wanted) = passed_on(&sent, "p", "p");
        assert_eq!(wanted, Some(HeaderValue::from_static("websocket")));
        assert_eq!(headers[CONNECTION], "upgrade");
        let mut answer = map(&[("connection", "upgrade"), ("upgrade", "websocket")]);
        to_caller(&mut answer, true);
        assert_eq!(answer[UPGRADE], "websocket");
        to_caller(&mut answer, false);
        assert!(answer.is_empty());
    }
}
