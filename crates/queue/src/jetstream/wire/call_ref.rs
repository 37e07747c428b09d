//! References to calls and to batches. No I/O.
use crate::jetstream::wire::ids::BatchKey;
use gateway_base::function::Function;

/// Index of a call within its batch.
pub(in crate::jetstream) type BatchIndex = u8;

/// Identifies a call by its message, and by its index where the message is a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(in crate::jetstream) struct CallRef {
    pub(in crate::jetstream) sequence: u64,
    pub(in crate::jetstream) index: Option<BatchIndex>,
}

impl CallRef {
    /// Identifies a call that has its own message.
    pub(in crate::jetstream) fn single(sequence: u64) -> Self {
        Self { sequence, index: None }
    }

    pub(in crate::jetstream) fn in_batch(sequence: u64, index: BatchIndex) -> Self {
        Self { sequence, index: Some(index) }
    }
}

/// Formats the reference as one token of a subject.
impl std::fmt::Display for CallRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.index {
            Some(index) => write!(f, "{}-{index}", self.sequence),
            None => write!(f, "{}", self.sequence),
        }
    }
}

/// Identifies a batch.
#[derive(Clone, Debug)]
pub(in crate::jetstream) struct BatchRef {
    pub(in crate::jetstream) function: Function,
    pub(in crate::jetstream) key: BatchKey,
    pub(in crate::jetstream) sequence: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_reference_is_one_token() {
        assert_eq!(CallRef::single(12).to_string(), "12");
        assert_eq!(CallRef::in_batch(12, 3).to_string(), "12-3");
    }
}
