//! Buffers for large reads, used again as soon as they are free: the processor's cache may still hold them.

use std::cell::RefCell;

use bytes::BytesMut;

/// The room of each.
pub(super) const SIZE: usize = 64 << 10;
/// So many of a thread's buffers are remembered, until the next sweep. More would not stay in the cache.
const REMEMBERED: usize = 16;

thread_local! {
    /// Empty handles of this thread's buffers, the last one lent at the end. Whoever holds another handle of the same
    /// buffer is still using it.
    static LENT: RefCell<Vec<BytesMut>> = const { RefCell::new(Vec::new()) };
}

/// Replaces `used`, in which nothing is left, by an empty buffer with room for `SIZE` bytes: the last one lent among
/// those that nobody uses.
pub(super) fn renew(used: &mut BytesMut) {
    // Otherwise the old one would not be free yet.
    *used = BytesMut::new();
    *used = take();
}

/// Lets go of this thread's buffers. Those in use live on for as long as they are.
pub(super) fn forget() {
    LENT.with_borrow_mut(Vec::clear);
}

fn take() -> BytesMut {
    LENT.with_borrow_mut(|lent| {
        let free = lent.iter_mut().rposition(|buffer| buffer.try_reclaim(SIZE));
        let mut buffer = match free {
            Some(at) => lent.remove(at),
            None => {
                // Somebody takes its time with the oldest.
                if lent.len() == REMEMBERED {
                    lent.remove(0);
                }
                BytesMut::with_capacity(SIZE)
            }
        };
        lent.push(buffer.split_off(buffer.capacity()));
        buffer
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A buffer in use, as it is once something was read into it.
    fn used() -> bytes::Bytes {
        let mut buffer = take();
        assert!(buffer.is_empty() && buffer.capacity() >= SIZE);
        buffer.resize(SIZE, b'x');
        buffer.freeze()
    }

    #[test]
    fn the_buffer_that_was_used_last_is_used_again() {
        let (first, second) = (used(), used());
        let (first_at, second_at) = (first.as_ptr(), second.as_ptr());
        assert_ne!(first_at, second_at);
        drop((first, second));
        assert_eq!(used().as_ptr(), second_at);
        let again = used();
        assert_eq!(again.as_ptr(), second_at);
        assert_eq!(used().as_ptr(), first_at);
    }

    #[test]
    fn a_buffer_that_is_empty_is_renewed_by_itself() {
        let mut buffer = take();
        buffer.resize(1, b'x');
        let at = buffer.as_ptr();
        buffer.clear();
        renew(&mut buffer);
        assert_eq!((buffer.as_ptr(), buffer.capacity()), (at, SIZE));
    }

    #[test]
    fn a_buffer_that_is_forgotten_can_still_be_used() {
        let kept = used();
        forget();
        assert_eq!(LENT.with_borrow(Vec::len), 0);
        assert!(used().as_ptr() != kept.as_ptr() && kept.len() == SIZE);
    }

    #[test]
    fn a_buffer_of_which_a_part_is_in_use_is_left_alone() {
        let whole = used();
        let (at, part) = (whole.as_ptr(), whole.slice(SIZE - 1..));
        drop(whole);
        let other = used();
        assert_ne!(other.as_ptr(), at);
        assert_eq!(&part[..], b"x");
        drop(part);
        assert_eq!(used().as_ptr(), at);
    }

    #[test]
    fn buffers_that_stay_in_use_are_forgotten() {
        let kept: Vec<_> = (0..2 * REMEMBERED).map(|_| used()).collect();
        assert_eq!(LENT.with_borrow(Vec::len), REMEMBERED);
        let last = kept.last().map(|last| last.as_ptr());
        drop(kept);
        assert_eq!(Some(used().as_ptr()), last);
        assert_eq!(LENT.with_borrow(Vec::len), REMEMBERED);
    }
}
