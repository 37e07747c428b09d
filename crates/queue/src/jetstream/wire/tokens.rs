//! Encodes any text as one token of a subject. No I/O.

/// Encodes `text` as one token of a subject: other bytes become `=` and two hexadecimal digits.
pub fn encode_token(text: &str) -> String {
    use std::fmt::Write as _;
    if text.is_empty() {
        // No byte is encoded like this, so the token is unique.
        return "=".to_owned();
    }
    let mut token = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_' {
            token.push(byte as char);
        } else {
            // Writing to a string cannot fail.
            let _ = write!(token, "={byte:02X}");
        }
    }
    token
}

/// Decodes a token.
pub(in crate::jetstream) fn decode_token(token: &str) -> Option<String> {
    if token == "=" {
        return Some(String::new());
    }
    let mut bytes = Vec::with_capacity(token.len());
    let mut rest = token.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        rest = tail;
        if *first != b'=' {
            bytes.push(*first);
            continue;
        }
        let (digits, tail) = rest.split_first_chunk::<2>()?;
        bytes.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?);
        rest = tail;
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_can_be_decoded() {
        for text_ in ["", "a", "a.b", "=", "*", ">", "a b\r\n", "ä", "a=41", "A_b-9"] {
            let token = encode_token(text_);
            assert!(!token.is_empty() && !token.contains(['.', '*', '>', ' ', '\r', ',']));
            assert_eq!(decode_token(&token).as_deref(), Some(text_), "{token}");
        }
        assert_eq!(
            (decode_token("=4"), decode_token("=XY"), decode_token("=FF")),
            (None, None, None)
        );
    }
}
