//! Signatures of callbacks as defined by Standard Webhooks. The receiver can verify the sender, the content and the
//! time, so a recorded callback cannot be replayed later. No I/O.

use base64::Engine;
use base64::alphabet::STANDARD as ALPHABET;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig, STANDARD};
use http::{HeaderMap, HeaderName, HeaderValue};
use ring::hmac;

const WEBHOOK_ID: HeaderName = HeaderName::from_static("webhook-id");
const WEBHOOK_TIMESTAMP: HeaderName = HeaderName::from_static("webhook-timestamp");
const WEBHOOK_SIGNATURE: HeaderName = HeaderName::from_static("webhook-signature");

/// Prefix of a secret in base64.
const BASE64_PREFIX: &[u8] = b"whsec_";
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &ALPHABET,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Why a text is not a valid secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSecret {
    #[error("is empty: anyone could sign with it")]
    Empty,
    #[error("begins with whsec_, but the rest is not base64")]
    NotBase64,
}

/// A key that signs callbacks. `Debug` does not show it.
#[derive(Clone, Debug)]
pub struct Secret(hmac::Key);

impl Secret {
    /// Parses the content of a file: `whsec_` and base64, otherwise the bytes as they are. Surrounding white space is
    /// ignored.
    ///
    /// # Errors
    /// When the secret is empty or not valid base64.
    pub fn parse(text: &[u8]) -> Result<Self, InvalidSecret> {
        let text = text.trim_ascii();
        let decoded = text.strip_prefix(BASE64_PREFIX).map(|encoded| BASE64.decode(encoded));
        let bytes = decoded.transpose().map_err(|_| InvalidSecret::NotBase64)?;
        match bytes.as_deref().unwrap_or(text) {
            [] => Err(InvalidSecret::Empty),
            bytes => Ok(Self(hmac::Key::new(hmac::HMAC_SHA256, bytes))),
        }
    }

    /// Returns `v1,` and the HMAC-SHA256 of id, time and body in base64.
    fn sign(&self, id: &str, timestamp: u64, body: &[u8]) -> String {
        let mut context = hmac::Context::with_key(&self.0);
        context.update(format!("{id}.{timestamp}.").as_bytes());
        context.update(body);
        format!("v1,{}", STANDARD.encode(context.sign()))
    }
}

/// Signs one attempt of the callback for the call `call_id`, sent at `timestamp` (Unix time in seconds), with each of
/// `secrets`: during a key rotation a receiver knows only one of them. Does nothing without secrets.
pub(super) fn sign(
    secrets: &[Secret],
    call_id: &str,
    timestamp: u64,
    body: &[u8],
    headers: &mut HeaderMap,
) {
    if secrets.is_empty() {
        return;
    }
    let id = message_id(call_id);
    let signatures: Vec<_> =
        secrets.iter().map(|secret| secret.sign(&id, timestamp, body)).collect();
    // All values consist of visible characters, as call ids do.
    let values = [
        (WEBHOOK_ID, HeaderValue::try_from(id)),
        (WEBHOOK_SIGNATURE, HeaderValue::try_from(signatures.join(" "))),
    ];
    for (name, value) in values {
        if let Ok(value) = value {
            headers.insert(name, value);
        }
    }
    headers.insert(WEBHOOK_TIMESTAMP, timestamp.into());
}

/// Converts a call id to a message id. A client may have chosen the call id, and a dot in it would make the signed
/// text ambiguous: the id of one message could equal id, time and start of the body of another.
fn message_id(call_id: &str) -> String {
    call_id.replace('%', "%25").replace('.', "%2E")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signed(secrets: &[&str], id: &str, timestamp: u64, body: &str) -> HeaderMap {
        let secrets: Vec<_> =
            secrets.iter().map(|secret| Secret::parse(secret.as_bytes()).unwrap()).collect();
        let mut headers = HeaderMap::new();
        sign(&secrets, id, timestamp, body.as_bytes(), &mut headers);
        headers
    }

    /// The example from the test suites of the Standard Webhooks libraries.
    const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    const ID: &str = "msg_p5jXN8AQM9LWM0D4loKWxJek";
    const BODY: &str = r#"{"test": 2432232314}"#;
    const SIGNATURE: &str = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=";

    #[test]
    fn the_signature_matches_the_example_of_the_standard() {
        let headers = signed(&[SECRET], ID, 1_614_265_330, BODY);
        assert_eq!(headers[WEBHOOK_ID], ID);
        assert_eq!(headers[WEBHOOK_TIMESTAMP], "1614265330");
        assert_eq!(headers[WEBHOOK_SIGNATURE], SIGNATURE);
        let text = signed(&["Jefe"], "id-1", 1, "body");
        assert_eq!(text[WEBHOOK_SIGNATURE], "v1,2ASM+J2NtZ9HEpviwvFP4L38NvVywe6x2M9bwVMZ7SQ=");
    }

    #[test]
    fn id_time_and_body_are_signed() {
        let others =
            [(ID, 1_614_265_331, BODY), ("other", 1_614_265_330, BODY), (ID, 1_614_265_330, "")];
        for (id, timestamp, body) in others {
            assert_ne!(signed(&[SECRET], id, timestamp, body)[WEBHOOK_SIGNATURE], SIGNATURE);
        }
    }

    #[test]
    fn two_secrets_give_two_signatures_and_none_gives_none() {
        let headers = signed(&[SECRET, "Jefe"], ID, 1_614_265_330, BODY);
        let both: Vec<_> = headers[WEBHOOK_SIGNATURE].to_str().unwrap().split(' ').collect();
        assert!(both.len() == 2 && both[0] == SIGNATURE && both[1].starts_with("v1,"), "{both:?}");
        assert!(signed(&[], ID, 1, BODY).is_empty());
    }

    #[test]
    fn an_id_cannot_extend_into_time_or_body() {
        let headers = signed(&[SECRET], "a.1.b%", 2, "c");
        assert_eq!(headers[WEBHOOK_ID], "a%2E1%2Eb%25");
        let other = signed(&[SECRET], "a", 1, "b%.2.c");
        assert_ne!(headers[WEBHOOK_SIGNATURE], other[WEBHOOK_SIGNATURE]);
    }

    #[test]
    fn a_secret_is_text_or_base64() {
        for (text, expect) in [
            ("Jefe", Ok(())),
            ("  Jefe\n", Ok(())),
            (SECRET, Ok(())),
            ("whsec_SmVmZQ==", Ok(())),
            ("whsec_SmVmZQ", Ok(())),
            ("", Err(InvalidSecret::Empty)),
            (" \n", Err(InvalidSecret::Empty)),
            ("whsec_", Err(InvalidSecret::Empty)),
            ("whsec_!", Err(InvalidSecret::NotBase64)),
        ] {
            assert_eq!(Secret::parse(text.as_bytes()).map(|_| ()), expect, "{text:?}");
        }
        let [text, encoded] =
            ["Jefe", "whsec_SmVmZQ=="].map(|secret| signed(&[secret], "id", 1, "body"));
        assert_eq!(text, encoded);
    }

    #[test]
    fn debug_does_not_show_a_secret() {
        assert!(!format!("{:?}", Secret::parse(b"Jefe")).contains("Jefe"));
    }
}
