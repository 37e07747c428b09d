//! A queued call and its encoding in storage and messages. No I/O.

use std::borrow::Cow;

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue};
use ring::digest;
use serde::{Deserialize, Serialize};

use gateway_base::function::{Function, has_dot_segment};
use gateway_http::names::{X_GATEWAY_CALLBACK, X_GATEWAY_CALLBACKS};

/// Milliseconds since 1970.
pub type UnixMillis = u64;

/// A call that is executed asynchronously.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueuedCall {
    pub id: String,
    pub function: Function,
    /// Path and query after the function's name, as received. Mostly empty.
    pub target: String,
    /// Headers of the client's request, without the hop-by-hop headers.
    pub headers: HeaderMap,
    pub body: Bytes,
    pub options: CallOptions,
}

/// Options of a call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CallOptions {
    /// URL that receives the response.
    pub callback: Option<String>,
    pub submitted_at: UnixMillis,
    /// Earliest time of execution.
    pub not_before: Option<UnixMillis>,
    /// Latest time of the start of an execution.
    pub expires_at: Option<UnixMillis>,
    pub max_attempts: Option<u32>,
    /// Key chosen by the client. Calls with the same key are enqueued once.
    pub idempotency_key: Option<String>,
    /// The client chose the id, so that knowing the id does not authorize a request.
    pub chosen_id: bool,
    /// Digest of function, target and body ([`QueuedCall::digest`]). It distinguishes calls with the same id.
    pub digest: Option<String>,
}

/// Errors of decoding a stored call.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    #[error("a queued call has version {0}, which this gateway does not support")]
    UnsupportedVersion(u8),
    #[error("a queued call is truncated")]
    Truncated,
    #[error("a queued call cannot be parsed")]
    InvalidJson(#[from] serde_json::Error),
    #[error("a queued call has an invalid function, target or header")]
    InvalidField,
}

/// A string that is borrowed from the input if it contains no escapes.
#[derive(Serialize, Deserialize)]
struct CowStr<'a>(#[serde(borrow)] Cow<'a, str>);

/// The metadata of a call: all but the body. Decoders ignore unknown members, so that members can be added.
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
    /// Each byte of a value is stored as one character, since header values need not be UTF-8.
    #[serde(borrow, default)]
    headers: Vec<(CowStr<'a>, CowStr<'a>)>,
    // The members of `CallOptions` are repeated here: `#[serde(flatten)]` would buffer them first, at twice the cost.
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

/// Maximum number of headers of a call. It leaves room for the headers that are added on the way to the function: a
/// full `HeaderMap` accepts no more.
pub(crate) const MAX_HEADERS: usize = 4096;

/// Prefix of headers that gateways and workers add for each other.
const INTERNAL_HEADER_PREFIX: &str = "x-gateway-";

/// Version of the encoding. It is raised when an older gateway could not execute the call correctly.
const FORMAT_VERSION: u8 = 1;

impl QueuedCall {
    /// Encodes the call: version (1 byte), length of the envelope (4 bytes, big-endian), envelope as JSON, body.
    pub fn encode(&self) -> Bytes {
        let envelope = serde_json::to_vec(&self.envelope()).unwrap_or_default();
        let mut bytes = BytesMut::with_capacity(5 + envelope.len() + self.body.len());
        bytes.put_u8(FORMAT_VERSION);
        bytes.put_u32(u32::try_from(envelope.len()).unwrap_or(u32::MAX));
        bytes.put_slice(&envelope);
        bytes.put_slice(&self.body);
        bytes.freeze()
    }

    /// Decodes a call.
    ///
    /// # Errors
    ///
    /// When `bytes` are not a call, or have an unsupported version. A retry cannot succeed.
    pub fn decode(bytes: &Bytes) -> Result<Self, DecodeError> {
        let (envelope, body_at) = split_envelope(bytes)?;
        Self::from_envelope(envelope, bytes.slice(body_at..))
    }

    /// Decodes a call without its body, which may be large.
    ///
    /// # Errors
    ///
    /// As [`Self::decode`].
    pub fn decode_without_body(bytes: &[u8]) -> Result<Self, DecodeError> {
        Self::from_envelope(split_envelope(bytes)?.0, Bytes::new())
    }

    /// Extracts the id from bytes that cannot be decoded, for the log.
    pub fn extract_id(bytes: &[u8]) -> Option<String> {
        #[derive(Deserialize)]
        struct Named {
            id: String,
        }
        let (_version, rest) = bytes.split_first()?;
        let (length, rest) = rest.split_first_chunk::<4>()?;
        let envelope = rest.get(..u32::from_be_bytes(*length) as usize)?;
        Some(serde_json::from_slice::<Named>(envelope).ok()?.id)
    }

    /// Returns a digest of function, target and body.
    pub fn digest(&self) -> String {
        let mut context = digest::Context::new(&digest::SHA256);
        for part in [self.function.to_string().as_bytes(), b"\n", self.target.as_bytes(), b"\n"] {
            context.update(part);
        }
        context.update(&self.body);
        // 128 bits are enough: a collision affects only the client that constructed it.
        let half = context.finish().as_ref().first_chunk().copied();
        format!("{:032x}", u128::from_be_bytes(half.unwrap_or_default()))
    }

    /// Returns the call under a generated id, because the id that the client chose belongs to another call.
    #[must_use]
    pub fn with_new_id(mut self, id: String) -> Self {
        // A client that guesses the idempotency key learns the id, so the id does not authorize a request either.
        self.options.chosen_id = self.options.idempotency_key.is_some();
        Self { id, ..self }
    }

    /// Returns the headers for the function. Internal headers are removed, except for the marks of a callback: a
    /// function that forwards its request must forward these as well.
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

    /// Returns the metadata of the call: all but the body.
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

    /// Builds a call from its parts.
    ///
    /// # Errors
    ///
    /// `DecodeError::InvalidField` when the function, the target or a header is invalid. Writers to the store are not
    /// trusted.
    pub fn from_envelope(envelope: Envelope<'_>, body: Bytes) -> Result<Self, DecodeError> {
        if envelope.headers.len() > MAX_HEADERS || !is_valid_target(&envelope.target) {
            return Err(DecodeError::InvalidField);
        }
        let mut headers = HeaderMap::with_capacity(envelope.headers.len());
        for (CowStr(name), CowStr(value)) in &envelope.headers {
            let name = HeaderName::from_bytes(name.as_bytes());
            let (Ok(name), Some(value)) = (name, parse_header_text(value)) else {
                return Err(DecodeError::InvalidField);
            };
            headers.append(name, value);
        }
        let options = CallOptions {
            callback: envelope.callback.map(Cow::into_owned),
            submitted_at: envelope.submitted_at,
            not_before: envelope.not_before,
            expires_at: envelope.expires_at,
            max_attempts: envelope.max_attempts,
            idempotency_key: envelope.idempotency_key.map(Cow::into_owned),
            chosen_id: envelope.chosen_id,
            digest: envelope.digest.map(Cow::into_owned),
        };
        let function = Function {
            name: envelope.name.into_owned(),
            namespace: envelope.namespace.into_owned(),
        };
        // The label of the function must parse to the same function.
        if Function::parse(&function.to_string(), "").as_ref() != Some(&function) {
            return Err(DecodeError::InvalidField);
        }
        let (id, target) = (envelope.id.into_owned(), envelope.target.into_owned());
        Ok(Self { id, function, target, headers, body, options })
    }
}

/// Converts a header value to text, one character per byte: a value need not be UTF-8.
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

/// Returns whether `target` can follow a function's name without escaping its path.
fn is_valid_target(target: &str) -> bool {
    let path = target.split_once('?').map_or(target, |(path, _)| path);
    (path.is_empty() || path.starts_with('/')) && !has_dot_segment(path)
}

/// Splits an encoded call into its envelope and the offset of its body.
fn split_envelope(bytes: &[u8]) -> Result<(Envelope<'_>, usize), DecodeError> {
    let (version, rest) = bytes.split_first().ok_or(DecodeError::Truncated)?;
    if *version != FORMAT_VERSION {
        return Err(DecodeError::UnsupportedVersion(*version));
    }
    let (length, _) = rest.split_first_chunk::<4>().ok_or(DecodeError::Truncated)?;
    let body_at = 5 + u32::from_be_bytes(*length) as usize;
    let envelope = bytes.get(5..body_at).ok_or(DecodeError::Truncated)?;
    Ok((serde_json::from_slice(envelope)?, body_at))
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
    fn a_decoded_call_equals_the_encoded_one() {
        assert_eq!(QueuedCall::decode(&call().encode()).unwrap(), call());
    }

    #[test]
    fn internal_headers_are_not_sent_to_functions() {
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
    fn unknown_envelope_members_are_ignored() {
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
    fn invalid_envelopes_are_rejected() {
        let read = |change: &dyn Fn(&mut Envelope<'_>)| {
            let call = call();
            let mut envelope = call.envelope();
            change(&mut envelope);
            QueuedCall::from_envelope(envelope, Bytes::new())
        };
        let headers = |count: usize| {
            move |envelope: &mut Envelope<'_>| {
                envelope.headers = (0..count)
                    .map(|n| (CowStr(format!("h{n}").into()), CowStr("1".into())))
                    .collect();
            }
        };
        assert_eq!(read(&headers(MAX_HEADERS)).unwrap().headers.len(), MAX_HEADERS);
        for count in [MAX_HEADERS + 1, 40_000] {
            assert!(matches!(read(&headers(count)), Err(DecodeError::InvalidField)), "{count}");
        }
        let target =
            |target: &str| read(&|envelope| envelope.target = target.to_owned().into()).is_ok();
        for good in ["", "/", "/p/q?x=/../", "?x", "/a..b/.c"] {
            assert!(target(good), "{good}");
        }
        for bad in ["x", "@x", "/..", "/%2e%2E/system", "/a%2f../b", "/.\\x"] {
            assert!(!target(bad), "{bad}");
        }
    }

    #[test]
    fn truncated_and_later_encodings_are_rejected() {
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
