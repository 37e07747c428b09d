//! A queued call, as it is stored and sent. No I/O.

use std::borrow::Cow;

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue};
use ring::digest;
use serde::{Deserialize, Serialize};

use crate::callback_chain::{X_GATEWAY_CALLBACK, X_GATEWAY_CALLBACKS};
use crate::function::{Function, has_dot_segment};

/// Milliseconds since 1970.
pub type UnixMillis = u64;

/// A call that is made later.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueuedCall {
    pub id: String,
    pub function: Function,
    /// Path and query behind the function's name, as they came; mostly nothing.
    pub target: String,
    /// The caller's headers, those that concern its connection apart.
    pub headers: HeaderMap,
    pub body: Bytes,
    pub options: CallOptions,
}

/// What a caller wants of its call beyond that it is made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CallOptions {
    /// Where the answer goes.
    pub callback: Option<String>,
    pub submitted_at: UnixMillis,
    /// Not made before.
    pub not_before: Option<UnixMillis>,
    /// Not made later.
    pub expires_at: Option<UnixMillis>,
    pub max_attempts: Option<u32>,
    /// The caller's own name for the call: the same one is not queued twice.
    pub idempotency_key: Option<String>,
    /// The caller chose the id, so that knowing it proves nothing.
    pub chosen_id: bool,
    /// Tells the call from others under the same id: [`QueuedCall::digest`].
    pub digest: Option<String>,
}

/// Why stored bytes are no call.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    #[error("a queued call of version {0}, which this gateway does not know")]
    UnsupportedVersion(u8),
    #[error("a queued call is cut short")]
    Truncated,
    #[error("a queued call cannot be parsed")]
    InvalidJson(#[from] serde_json::Error),
    #[error("a queued call has an invalid function, target or header")]
    InvalidField,
}

/// Text that is read in place, where it is written without escapes.
#[derive(Serialize, Deserialize)]
struct CowStr<'a>(#[serde(borrow)] Cow<'a, str>);

/// All but the body. Members may be added; one that is not known is skipped.
#[derive(Serialize, Deserialize)]
pub struct Envelope<'a> {
    #[serde(borrow)]
    id: Cow<'a, str>,
    #[serde(borrow)]
    name: Cow<'a, str>,
    #[serde(borrow)]
    namespace: Cow<'a, str>,
    #[serde(borrow, default, skip_serializing_if = "str::is_empty")]
    target: Cow<'a, str>,
    /// Values byte for byte as characters: a header need not be UTF-8.
    #[serde(borrow, default)]
    headers: Vec<(CowStr<'a>, CowStr<'a>)>,
    // Those of `CallOptions`, one by one: flattened they would be gathered before they are read, at twice the price.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    callback: Option<Cow<'a, str>>,
    #[serde(default)]
    submitted_at: UnixMillis,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    not_before: Option<UnixMillis>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    expires_at: Option<UnixMillis>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    max_attempts: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    idempotency_key: Option<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    chosen_id: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    digest: Option<Cow<'a, str>>,
}

/// Headers that a call may have, which leaves room for those that are added on its way to the function: a map of
/// headers that is full takes no more.
pub(in crate::queue) const MAX_HEADERS: usize = 4096;

/// How the names of headers begin that gateways and workers write for each other.
const INTERNAL_HEADER_PREFIX: &str = "x-gateway-";

/// Raised when an older gateway could not make the call rightly.
const FORMAT_VERSION: u8 = 1;

impl QueuedCall {
    /// The version, the length of what follows it, the metadata as JSON, the body.
    pub fn encode(&self) -> Bytes {
        let meta = serde_json::to_vec(&self.envelope()).unwrap_or_default();
        let mut bytes = BytesMut::with_capacity(5 + meta.len() + self.body.len());
        bytes.put_u8(FORMAT_VERSION);
        bytes.put_u32(u32::try_from(meta.len()).unwrap_or(u32::MAX));
        bytes.put_slice(&meta);
        bytes.put_slice(&self.body);
        bytes.freeze()
    }

    /// The call that `bytes` hold.
    ///
    /// # Errors
    /// When they are none, or of a version to come.
    pub fn decode(bytes: &Bytes) -> Result<Self, DecodeError> {
        let (meta, body_at) = split_envelope(bytes)?;
        Self::from_envelope(meta, bytes.slice(body_at..))
    }

    /// The call that `bytes` hold, but without its body, which may be large.
    ///
    /// # Errors
    /// As those of `decode`.
    pub fn decode_without_body(bytes: &[u8]) -> Result<Self, DecodeError> {
        Self::from_envelope(split_envelope(bytes)?.0, Bytes::new())
    }

    /// The id in `bytes` that hold no call that can be made, if it can be read all the same: for the log.
    pub fn extract_id(bytes: &[u8]) -> Option<String> {
        #[derive(Deserialize)]
        struct Named {
            id: String,
        }
        let (_version, rest) = bytes.split_first()?;
        let (length, rest) = rest.split_first_chunk::<4>()?;
        let meta = rest.get(..u32::from_be_bytes(*length) as usize)?;
        Some(serde_json::from_slice::<Named>(meta).ok()?.id)
    }

    /// The same for calls of the same function with the same target and body, and for no others.
    pub fn digest(&self) -> String {
        let mut context = digest::Context::new(&digest::SHA256);
        for part in [self.function.to_string().as_bytes(), b"\n", self.target.as_bytes(), b"\n"] {
            context.update(part);
        }
        context.update(&self.body);
        // Half of it is enough: whoever finds two that are alike fools nobody but himself.
        let half = context.finish().as_ref().first_chunk().copied();
        format!("{:032x}", u128::from_be_bytes(half.unwrap_or_default()))
    }

    /// This call under another id, which a gateway made: the one that its caller chose is another call's.
    #[must_use]
    pub fn with_new_id(mut self, id: String) -> Self {
        // The key by which the id is told can be guessed.
        self.options.chosen_id = self.options.idempotency_key.is_some();
        Self { id, ..self }
    }

    /// The headers that the function is told: those that gateways and workers write for each other are not among them,
    /// but for the marks of a callback. A function that passes its request on must pass these on, too.
    pub fn function_headers(&self) -> HeaderMap {
        let mut headers = self.headers.clone();
        let is_internal = |name: &&HeaderName| {
            name.as_str().starts_with(INTERNAL_HEADER_PREFIX)
                && **name != X_GATEWAY_CALLBACK
                && **name != X_GATEWAY_CALLBACKS
        };
        let internal: Vec<HeaderName> = self.headers.keys().filter(is_internal).cloned().collect();
        for name in internal {
            headers.remove(name);
        }
        headers
    }

    /// All but the body.
    pub fn envelope(&self) -> Envelope<'_> {
        let options = &self.options;
        Envelope {
            id: (&self.id).into(),
            name: (&self.function.name).into(),
            namespace: (&self.function.namespace).into(),
            target: (&self.target).into(),
            headers: self
                .headers
                .iter()
                .map(|(n, v)| (CowStr(n.as_str().into()), CowStr(header_text(v))))
                .collect(),
            callback: options.callback.as_deref().map(Cow::from),
            submitted_at: options.submitted_at,
            not_before: options.not_before,
            expires_at: options.expires_at,
            max_attempts: options.max_attempts,
            idempotency_key: options.idempotency_key.as_deref().map(Cow::from),
            chosen_id: options.chosen_id,
            digest: options.digest.as_deref().map(Cow::from),
        }
    }

    /// The call that `envelope` and `body` make.
    ///
    /// # Errors
    /// `DecodeError::InvalidField` when it has a function, a target or headers that cannot be: who stored it may be a stranger.
    pub fn from_envelope(meta: Envelope<'_>, body: Bytes) -> Result<Self, DecodeError> {
        if meta.headers.len() > MAX_HEADERS || !is_valid_target(&meta.target) {
            return Err(DecodeError::InvalidField);
        }
        let mut headers = HeaderMap::with_capacity(meta.headers.len());
        for (CowStr(name), CowStr(value)) in &meta.headers {
            let name = HeaderName::from_bytes(name.as_bytes());
            let (Ok(name), Some(value)) = (name, parse_header_text(value)) else {
                return Err(DecodeError::InvalidField);
            };
            headers.append(name, value);
        }
        let options = CallOptions {
            callback: meta.callback.map(Cow::into_owned),
            submitted_at: meta.submitted_at,
            not_before: meta.not_before,
            expires_at: meta.expires_at,
            max_attempts: meta.max_attempts,
            idempotency_key: meta.idempotency_key.map(Cow::into_owned),
            chosen_id: meta.chosen_id,
            digest: meta.digest.map(Cow::into_owned),
        };
        let function =
            Function { name: meta.name.into_owned(), namespace: meta.namespace.into_owned() };
        // As its label it must lead to itself.
        if Function::parse(&function.to_string(), "").as_ref() != Some(&function) {
            return Err(DecodeError::InvalidField);
        }
        let (id, target) = (meta.id.into_owned(), meta.target.into_owned());
        Ok(Self { id, function, target, headers, body, options })
    }
}

/// A header's value, each of its bytes as a character: it need not be UTF-8.
fn header_text(value: &HeaderValue) -> Cow<'_, str> {
    let text = value.to_str().map(Cow::Borrowed);
    text.unwrap_or_else(|_| value.as_bytes().iter().map(|byte| *byte as char).collect())
}

fn parse_header_text(text: &str) -> Option<HeaderValue> {
    if text.is_ascii() {
        return HeaderValue::from_str(text).ok();
    }
    let bytes: Result<Vec<u8>, _> = text.chars().map(u8::try_from).collect();
    HeaderValue::from_bytes(&bytes.ok()?).ok()
}

/// Whether `target` can stand behind a function's name without leading to another place.
fn is_valid_target(target: &str) -> bool {
    let path = target.split_once('?').map_or(target, |(path, _)| path);
    (path.is_empty() || path.starts_with('/')) && !has_dot_segment(path)
}

/// The metadata of an encoded call, and where its body begins.
fn split_envelope(bytes: &[u8]) -> Result<(Envelope<'_>, usize), DecodeError> {
    let (version, rest) = bytes.split_first().ok_or(DecodeError::Truncated)?;
    if *version != FORMAT_VERSION {
        return Err(DecodeError::UnsupportedVersion(*version));
    }
    let (length, _) = rest.split_first_chunk::<4>().ok_or(DecodeError::Truncated)?;
    let body_at = 5 + u32::from_be_bytes(*length) as usize;
    let meta = bytes.get(5..body_at).ok_or(DecodeError::Truncated)?;
    Ok((serde_json::from_slice(meta)?, body_at))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call() -> QueuedCall {
        let mut headers = HeaderMap::new();
        headers.append("x-a", HeaderValue::from_static("1"));
        headers.append("x-a", HeaderValue::from_bytes(b"\xff\xfe").unwrap());
        QueuedCall {
            id: "id-1".to_owned(),
            function: Function { name: "echo".to_owned(), namespace: "dev".to_owned() },
            target: "/p/q?x=1".to_owned(),
            headers,
            body: Bytes::from_static(b"\x00\xffbody"),
            options: CallOptions {
                callback: Some("http://c/".to_owned()),
                submitted_at: 5,
                max_attempts: Some(3),
                ..CallOptions::default()
            },
        }
    }

    #[test]
    fn what_is_decoded_is_what_was_encoded() {
        assert_eq!(QueuedCall::decode(&call().encode()).unwrap(), call());
    }

    #[test]
    fn a_function_is_not_told_what_gateways_tell_each_other() {
        let mut call = call();
        for name in ["x-gateway-attempts", "x-gateway-of-tomorrow", "x-gatewayed"] {
            call.headers.append(name, HeaderValue::from_static("1"));
        }
        call.headers.append(X_GATEWAY_CALLBACK, HeaderValue::from_static("1"));
        let headers = call.function_headers();
        let names: Vec<&str> = headers.keys().map(HeaderName::as_str).collect();
        assert_eq!(names, ["x-a", "x-gateway-callback", "x-gatewayed"]);
        assert_eq!(headers.get_all("x-a").iter().count(), 2);
    }

    #[test]
    fn a_member_that_is_not_known_is_skipped() {
        let json =
            br#"{"id":"a","name":"echo","namespace":"dev","submitted_at":5,"of_tomorrow":[1]}"#;
        let mut bytes = vec![FORMAT_VERSION];
        bytes.extend_from_slice(&u32::try_from(json.len()).unwrap().to_be_bytes());
        bytes.extend_from_slice(json);
        bytes.extend_from_slice(b"body");
        let call = QueuedCall::decode(&bytes.into()).unwrap();
        assert_eq!((call.id.as_str(), &call.body[..]), ("a", &b"body"[..]));
    }

    #[test]
    fn a_stranger_can_say_no_more_of_a_call_than_a_caller() {
        let read = |change: &dyn Fn(&mut Envelope<'_>)| {
            let call = call();
            let mut meta = call.envelope();
            change(&mut meta);
            QueuedCall::from_envelope(meta, Bytes::new())
        };
        let headers = |count: usize| {
            move |meta: &mut Envelope<'_>| {
                meta.headers = (0..count)
                    .map(|n| (CowStr(format!("h{n}").into()), CowStr("1".into())))
                    .collect();
            }
        };
        assert_eq!(read(&headers(MAX_HEADERS)).unwrap().headers.len(), MAX_HEADERS);
        for count in [MAX_HEADERS + 1, 40_000] {
            assert!(matches!(read(&headers(count)), Err(DecodeError::InvalidField)), "{count}");
        }
        let target = |target: &str| read(&|meta| meta.target = target.to_owned().into()).is_ok();
        for good in ["", "/", "/p/q?x=/../", "?x", "/a..b/.c"] {
            assert!(target(good), "{good}");
        }
        for bad in ["x", "@x", "/..", "/%2e%2E/system", "/a%2f../b", "/.\\x"] {
            assert!(!target(bad), "{bad}");
        }
    }

    #[test]
    fn what_is_no_call_is_refused() {
        let whole = call().encode();
        for end in 0..whole.len() - call().body.len() {
            assert!(QueuedCall::decode(&whole.slice(..end)).is_err(), "{end}");
        }
        let mut later = whole.to_vec();
        later[0] = 2;
        assert!(matches!(
            QueuedCall::decode(&later.into()),
            Err(DecodeError::UnsupportedVersion(2))
        ));
    }
}
