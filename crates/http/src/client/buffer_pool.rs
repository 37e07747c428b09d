//! A pool of read buffers for each thread. A buffer is reused as soon as it is free, while it may still be in the CPU
//! cache.

use std::cell::RefCell;

use bytes::BytesMut;

/// Capacity of each buffer.
pub(super) const BUFFER_BYTES: usize = 64 << 10;
/// Maximum number of buffers in the pool of a thread. More would not stay in the cache.
const MAX_POOLED_BUFFERS: usize = 16;

thread_local! {
    /// Empty handles of the buffers of this thread, the most recently used last. A buffer is in use while there are
    /// other handles of it.
    static POOL: RefCell<Vec<BytesMut>> = const { RefCell::new(Vec::new()) };
}

/// Replaces `used`, which must be empty, by an empty buffer of `BUFFER_BYTES`: the most recently used free one.
pub(super) fn replace(used: &mut BytesMut) {
    // Release the old buffer first, so that it is free.
    *used = BytesMut::new();
    *used = acquire();
}

/// Removes all buffers of this thread from the pool. Buffers in use are freed when their last handle is dropped.
pub(super) fn clear() {
    POOL.with_borrow_mut(Vec::clear);
}

fn acquire() -> BytesMut {
    POOL.with_borrow_mut(|pool| {
        let free = pool.iter_mut().rposition(|buffer| buffer.try_reclaim(BUFFER_BYTES));
        let mut buffer = match free {
            Some(at) => pool.remove(at),
            None => {
                // The oldest buffer is in use for long: remove it from the pool.
                if pool.len() == MAX_POOLED_BUFFERS {
                    pool.remove(0);
                }
                BytesMut::with_capacity(BUFFER_BYTES)
            }
        };
        pool.push(buffer.split_off(buffer.capacity()));
        buffer
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a full buffer in use.
    fn used() -> bytes::Bytes {
        let mut buffer = acquire();
        assert!(buffer.is_empty() && buffer.capacity() >= BUFFER_BYTES);
        buffer.resize(BUFFER_BYTES, b'x');
        buffer.freeze()
    }

    #[test]
    fn the_most_recently_used_free_buffer_is_reused() {
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
    fn an_empty_buffer_is_replaced_by_itself() {
        let mut buffer = acquire();
        buffer.resize(1, b'x');
        let at = buffer.as_ptr();
        buffer.clear();
        replace(&mut buffer);
        assert_eq!((buffer.as_ptr(), buffer.capacity()), (at, BUFFER_BYTES));
    }

    #[test]
    fn a_buffer_in_use_survives_a_clear_of_the_pool() {
        let kept = used();
        clear();
        assert_eq!(POOL.with_borrow(Vec::len), 0);
        assert!(used().as_ptr() != kept.as_ptr() && kept.len() == BUFFER_BYTES);
    }

    #[test]
    fn a_partly_used_buffer_is_not_reused() {
        let whole = used();
        let (at, part) = (whole.as_ptr(), whole.slice(BUFFER_BYTES - 1..));
        drop(whole);
        let other = used();
        assert_ne!(other.as_ptr(), at);
        assert_eq!(&part[..], b"x");
        drop(part);
        assert_eq!(used().as_ptr(), at);
    }

    #[test]
    fn buffers_that_stay_in_use_leave_the_pool() {
        let kept: Vec<_> = (0..2 * MAX_POOLED_BUFFERS).map(|_| used()).collect();
        assert_eq!(POOL.with_borrow(Vec::len), MAX_POOLED_BUFFERS);
        let last = kept.last().map(|last| last.as_ptr());
        drop(kept);
        assert_eq!(Some(used().as_ptr()), last);
        assert_eq!(POOL.with_borrow(Vec::len), MAX_POOLED_BUFFERS);
    }
}
