//! What the fuzzer checks of responses from upstreams.

use bytes::BytesMut;
use http::HeaderMap;

use crate::proxy::wire::Malformed;
use crate::proxy::wire::answer::take_final;
use crate::proxy::wire::decoder::Decoder;

/// A head is read in the same way however its bytes arrive.
pub(crate) fn response_head(data: &[u8]) {
    let Some((first, text)) = data.split_first() else { return };
    let to_head = first & 1 == 1;
    let mut whole = BytesMut::from(text);
    let at_once = take_final(&mut whole, to_head);
    let mut pieces = BytesMut::new();
    for piece in text.chunks(usize::from(first >> 1).max(1)) {
        pieces.extend_from_slice(piece);
        match (take_final(&mut pieces, to_head), &at_once) {
            (Ok(None), _) => {}
            (Ok(Some(got)), Ok(Some(head))) => {
                let told = |head: &crate::proxy::wire::answer::Head| {
                    format!("{:?}", (&head.answer, head.body, head.keep_alive))
                };
                assert_eq!(told(&got), told(head));
                // What is left of the piece is the beginning of what was left of all.
                assert!(whole.starts_with(&pieces));
                return;
            }
            (Err(_), Err(_)) => return,
            (got, all) => panic!("{:?} in pieces, {:?} at once", got.is_ok(), all.is_ok()),
        }
    }
}

/// A body that is framed in chunks is the same however its bytes arrive.
pub(crate) fn chunked_body(data: &[u8]) {
    let Some((first, text)) = data.split_first() else { return };
    let at_once = decode(text, text.len().max(1));
    let in_pieces = decode(text, usize::from(*first).max(1));
    assert_eq!(at_once, in_pieces);
}

type Decoded = (Vec<u8>, Option<HeaderMap>, Result<bool, Malformed>);

/// Data and trailers of what is fed in pieces of `size`, and whether the body is done.
fn decode(text: &[u8], size: usize) -> Decoded {
    let (mut decoder, mut input) = (Decoder::chunked(), BytesMut::new());
    let (mut data, mut trailers) = (Vec::new(), None);
    for piece in text.chunks(size) {
        input.extend_from_slice(piece);
        loop {
            match decoder.take_frame(&mut input) {
                Ok(Some(frame)) => match frame.into_data() {
                    Ok(piece) => data.extend_from_slice(&piece),
                    Err(frame) => trailers = frame.into_trailers().ok(),
                },
                Ok(None) => break,
                Err(malformed) => return (data, trailers, Err(malformed)),
            }
        }
    }
    let done = decoder.is_done();
    (data, trailers, Ok(done))
}
