//! The proof that a callback comes from here, and that nobody changed its body on the way. No I/O.

use std::fmt::Write;

use http::HeaderValue;
use ring::hmac;

/// What callbacks are signed with. Not shown by `Debug`.
#[derive(Clone, Debug)]
pub struct Secret(hmac::Key);

impl Secret {
    pub fn new(secret: &[u8]) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, secret))
    }

    /// `sha256=` and the HMAC-SHA256 of `body` in hexadecimal digits.
    pub fn sign(&self, body: &[u8]) -> HeaderValue {
        let mut text = "sha256=".to_owned();
        for byte in hmac::sign(&self.0, body).as_ref() {
            // Writing to a string does not fail.
            let _ = write!(text, "{byte:02x}");
        }
        HeaderValue::from_maybe_shared(bytes::Bytes::from(text))
            .unwrap_or_else(|_| unreachable!("hexadecimal digits are visible"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 4231, 4.3, and the empty message under the empty key.
    #[test]
    fn signatures_are_those_of_the_standard() {
        let signed = Secret::new(b"Jefe").sign(b"what do ya want for nothing?");
        let expect = "sha256=5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843";
        assert_eq!(signed, expect);
        let signed = Secret::new(b"").sign(b"");
        let expect = "sha256=b613679a0814d9ec772f95d778c35fc5ff1697c493715653c6c712144292c5ad";
        assert_eq!(signed, expect);
    }

    #[test]
    fn a_secret_is_not_shown() {
        assert!(!format!("{:?}", Secret::new(b"Jefe")).contains("Jefe"));
    }
}
