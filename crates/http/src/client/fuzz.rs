//! Properties of the response parser that the fuzzer checks.

use bytes::BytesMut;
use http::HeaderMap;

use crate::client::http1::wire::ParseError;
use crate::client::http1::wire::body_decoder::BodyDecoder;
use crate::client::http1::wire::response::parse_final_head;

/// A head is parsed to the same result however its bytes are split.
pub(crate) fn response_head(data: &[u8]) {
    let Some((first, text)) = data.split_first() else { return };
    let to_head = first & 1 == 1;
    let mut whole = BytesMut::from(text);
    let whole_result = parse_final_head(&mut whole, to_head);
    let mut pieces = BytesMut::new();
    for piece in text.chunks(usize::from(first >> 1).max(1)) {
        pieces.extend_from_slice(piece);
        match (parse_final_head(&mut pieces, to_head), &whole_result) {
            (Ok(None), _) => {}
            (Ok(Some(got)), Ok(Some(head))) => {
                let summary = |head: &crate::client::http1::wire::response::ResponseHead| {
                    format!("{:?}", (&head.response, head.body, head.keep_alive))
                };
                assert_eq!(summary(&got), summary(head));
                // The rest of the piece is a prefix of the rest of the whole input.
                assert!(whole.starts_with(&pieces));
                return;
            }
            (Err(_), Err(_)) => return,
            (got, all) => panic!("{:?} in pieces, {:?} at once", got.is_ok(), all.is_ok()),
        }
    }
}

/// A chunked body is decoded to the same result however its bytes are split.
pub(crate) fn chunked_body(data: &[u8]) {
    let Some((first, text)) = data.split_first() else { return };
    let whole_result = decode(text, text.len().max(1));
    let in_pieces = decode(text, usize::from(*first).max(1));
    assert_eq!(whole_result, in_pieces);
}

type Decoded = (Vec<u8>, Option<HeaderMap>, Result<bool, ParseError>);

/// Decodes `text` in pieces of `size` bytes. Returns data, trailers, and whether the body is complete.
fn decode(text: &[u8], size: usize) -> Decoded {
    let (mut decoder, mut input) = (BodyDecoder::chunked(), BytesMut::new());
    let (mut data, mut trailers) = (Vec::new(), None);
    for piece in text.chunks(size) {
        input.extend_from_slice(piece);
        loop {
            match decoder.decode_frame(&mut input) {
                Ok(Some(frame)) => match frame.into_data() {
                    Ok(piece) => data.extend_from_slice(&piece),
                    Err(frame) => trailers = frame.into_trailers().ok(),
                },
                Ok(None) => break,
                Err(error) => return (data, trailers, Err(error)),
            }
        }
    }
    let done = decoder.is_done();
    (data, trailers, Ok(done))
}
