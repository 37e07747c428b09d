//! Names of streams, subjects and consumers. No I/O.
use crate::jetstream::wire::ids::BatchKey;
use crate::jetstream::wire::tokens::{decode_token, encode_token};
use gateway_base::function::Function;

/// The names of one queue.
#[derive(Clone, Debug)]
pub(in crate::jetstream) struct Subjects {
    /// Name of the queue as a token.
    queue: String,
    pub(in crate::jetstream) calls: String,
    pub(in crate::jetstream) dead_letters: String,
    /// Final states and responses.
    pub(in crate::jetstream) results: String,
    pub(in crate::jetstream) idempotency: String,
    /// Running lists and cancel markers.
    pub(in crate::jetstream) claims: String,
    /// Bodies larger than one message.
    pub(in crate::jetstream) bodies: String,
    /// Records of unfinished batches.
    pub(in crate::jetstream) batches: String,
}

/// Function and call id of a subject.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::jetstream) struct CallSubject {
    pub(in crate::jetstream) function: Function,
    pub(in crate::jetstream) id: String,
}

impl Subjects {
    pub(in crate::jetstream) fn new(queue: &str) -> Self {
        let queue = encode_token(queue);
        let stream = |what| format!("gateway-{queue}-{what}");
        Self {
            calls: stream("calls"),
            dead_letters: stream("dead"),
            results: stream("notes"),
            idempotency: stream("keys"),
            claims: stream("claims"),
            bodies: stream("bodies"),
            batches: stream("open"),
            queue,
        }
    }

    /// Returns the wildcard for all subjects of the kind `root`.
    pub(in crate::jetstream) fn all(&self, root: &str) -> String {
        format!("{root}.{}.>", self.queue)
    }

    /// Returns the subject of a call. Its last three tokens identify the call, in every kind.
    pub(in crate::jetstream) fn call(&self, root: &str, function: &Function, id: &str) -> String {
        format!("{root}.{}.{}.{}", self.queue, function_tokens(function), encode_token(id))
    }

    /// Returns the subject of a batch.
    pub(in crate::jetstream) fn batch(
        &self,
        root: &str,
        function: &Function,
        key: BatchKey,
    ) -> String {
        format!("{root}.{}.{}.{}", self.queue, function_tokens(function), key.token())
    }

    /// Returns the subject of the record of the batch on `subject`.
    pub(in crate::jetstream) fn batch_record(&self, subject: &str) -> Option<String> {
        let rest = subject.strip_prefix(CALLS)?;
        Some(format!("{BATCHES}{rest}"))
    }

    /// Returns the subject of a dead letter that is named by [`letter_id`] or by a batch key, or `None` for the id of a
    /// call. `None` as the function stands for any.
    pub(in crate::jetstream) fn letter(
        &self,
        function: Option<&Function>,
        id: &str,
    ) -> Option<String> {
        // No id of a call is encoded with this character.
        let name = id.strip_prefix('+')?;
        let valid = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric());
        let function = function.map_or_else(|| "*.*".to_owned(), function_tokens);
        valid.then(|| format!("{DEAD_LETTERS}.{}.{function}.{id}", self.queue))
    }

    /// Returns whether `subject` is that of one message of `function` in the queue.
    pub(in crate::jetstream) fn is_message_of(&self, function: &Function, subject: &str) -> bool {
        let prefix = format!("{CALLS}.{}.{}.", self.queue, function_tokens(function));
        subject.strip_prefix(&prefix).is_some_and(|token| {
            !token.is_empty()
                && !token.contains(['.', '*', '>'])
                && !token.contains(char::is_whitespace)
        })
    }

    /// Returns the wildcard for the batch `key` of any function.
    pub(in crate::jetstream) fn by_key(&self, root: &str, key: BatchKey) -> String {
        format!("{root}.{}.*.*.{}", self.queue, key.token())
    }

    /// Returns the wildcard for the call `id` of any function.
    pub(in crate::jetstream) fn by_id(&self, root: &str, id: &str) -> String {
        format!("{root}.{}.*.*.{}", self.queue, encode_token(id))
    }

    /// Returns the wildcard for all calls of `function`, or of all functions.
    pub(in crate::jetstream) fn of_function(
        &self,
        root: &str,
        function: Option<&Function>,
    ) -> String {
        match function {
            Some(function) => format!("{root}.{}.{}.*", self.queue, function_tokens(function)),
            None => format!("{root}.{}.*.*.*", self.queue),
        }
    }

    /// Returns the message id of a publish with an idempotency key. `revision` is the revision of an earlier entry
    /// whose call was purged; it makes the id differ. Tokens contain no dot.
    pub(in crate::jetstream) fn idempotent_message_id(key: &str, revision: u64) -> String {
        match revision {
            0 => format!("key-{}", encode_token(key)),
            revision => format!("key-{}.{revision}", encode_token(key)),
        }
    }

    pub(in crate::jetstream) fn idempotency_key(&self, key: &str) -> String {
        format!("{IDEMPOTENCY}.{}.{}", self.queue, encode_token(key))
    }

    /// Returns the subject of the running list of a receiver.
    pub(in crate::jetstream) fn running_list(&self, receiver_id: &str) -> String {
        format!("{CLAIMS}.{}.by.{receiver_id}", self.queue)
    }

    /// Returns the subject of the cancel marker of a call; of all calls for `*`.
    pub(in crate::jetstream) fn cancel_marker(&self, call_ref: impl std::fmt::Display) -> String {
        format!("{CLAIMS}.{}.not.{call_ref}", self.queue)
    }

    /// Returns the subject of probes. It is neither a running list nor a cancel marker.
    pub(in crate::jetstream) fn probe(&self) -> String {
        format!("{CLAIMS}.{}.look", self.queue)
    }

    /// Returns the subject of the restart marker. No wildcard for dead letters matches it.
    pub(in crate::jetstream) fn restart_marker(&self) -> String {
        format!("{DEAD_LETTERS}.{}.server", self.queue)
    }

    /// Returns the subject on which new consumers are announced.
    pub(in crate::jetstream) fn new_consumers(&self) -> String {
        format!("{EVENTS}.{}", self.queue)
    }

    /// Returns the subject on which changes of batches are announced.
    pub(in crate::jetstream) fn dirty_batches(&self) -> String {
        format!("{EVENTS}.{}.taken", self.queue)
    }

    /// Returns the subject of a chunk of `name`.
    pub(in crate::jetstream) fn chunk(
        &self,
        root: &str,
        name: &str,
        number: impl std::fmt::Display,
    ) -> String {
        format!("{root}.{}.{name}.{number}", self.queue)
    }
}

/// Kinds of subjects. Operators see the first one; no two overlap.
pub(in crate::jetstream) const CALLS: &str = "faas";
pub(in crate::jetstream) const DEAD_LETTERS: &str = "faas-dead";
pub(in crate::jetstream) const FINAL_RECORDS: &str = "faas-end";
pub(in crate::jetstream) const RESPONSES: &str = "faas-answer";
pub(in crate::jetstream) const IDEMPOTENCY: &str = "faas-key";
pub(in crate::jetstream) const CLAIMS: &str = "faas-claim";
pub(in crate::jetstream) const BODIES: &str = "faas-body";
pub(in crate::jetstream) const BATCHES: &str = "faas-open";
/// No stream stores these.
const EVENTS: &str = "faas-new";

fn function_tokens(function: &Function) -> String {
    format!("{}.{}", encode_token(&function.namespace), encode_token(&function.name))
}

/// Returns the id of a dead letter whose message names no call.
pub(in crate::jetstream) fn letter_id(sequence: u64) -> String {
    format!("+n{sequence}")
}

/// Returns the key of the batch on this subject, or `None` for a single call.
pub(in crate::jetstream) fn batch_key(subject: &str) -> Option<BatchKey> {
    BatchKey::from_token(subject.rsplit('.').next()?)
}

/// Returns the number of calls on this subject.
pub(in crate::jetstream) fn call_count(subject: &str) -> usize {
    batch_key(subject).map_or(1, BatchKey::count)
}

/// Parses the subject of a call.
pub(in crate::jetstream) fn parse(subject: &str) -> Option<CallSubject> {
    let mut tokens = subject.rsplit('.');
    let (id, name, namespace) = (tokens.next()?, tokens.next()?, tokens.next()?);
    let function = Function { name: decode_token(name)?, namespace: decode_token(namespace)? };
    Some(CallSubject { function, id: decode_token(id)? })
}

/// Returns the name of the consumer of `function`. Tokens contain no comma.
pub(in crate::jetstream) fn consumer_name(function: &Function) -> String {
    format!("{},{}", encode_token(&function.namespace), encode_token(&function.name))
}

/// Returns the function of a consumer.
pub(in crate::jetstream) fn function_of_consumer(consumer: &str) -> Option<Function> {
    let (namespace, name) = consumer.split_once(',')?;
    let function = Function { name: decode_token(name)?, namespace: decode_token(namespace)? };
    (!function.name.is_empty()).then_some(function)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function(name: &str, namespace: &str) -> Function {
        Function { name: name.to_owned(), namespace: namespace.to_owned() }
    }

    #[test]
    fn a_subject_identifies_its_call() {
        let subjects = Subjects::new("faas.request");
        for function in [function("a.b", "dev"), function("a", "")] {
            let subject = subjects.call(CALLS, &function, "id.1");
            let id = "id.1".to_owned();
            assert_eq!(parse(&subject), Some(CallSubject { function: function.clone(), id }));
            assert_eq!(function_of_consumer(&consumer_name(&function)), Some(function));
        }
        let subject = subjects.call(CALLS, &function("echo", "fn"), "1");
        assert_eq!(subject, "faas.faas=2Erequest.fn.echo.1");
        assert_eq!(subjects.by_id(CALLS, "1"), "faas.faas=2Erequest.*.*.1");
    }

    #[test]
    fn a_dead_letter_of_a_message_never_has_the_subject_of_a_call() {
        let (subjects, echo) = (Subjects::new("q"), function("echo", "fn"));
        let id = letter_id(7);
        let subject = subjects.letter(Some(&echo), &id).unwrap();
        assert_eq!(subject, "faas-dead.q.fn.echo.+n7");
        assert_eq!(subjects.letter(None, &id).unwrap(), "faas-dead.q.*.*.+n7");
        assert_ne!(subject, subjects.call(DEAD_LETTERS, &echo, &id));
        for id in ["id", "+", "+a.b", "+*", "+>", "+a b", "++a"] {
            assert_eq!(subjects.letter(Some(&echo), id), None, "{id}");
        }
    }

    #[test]
    fn only_messages_of_the_function_belong_to_it() {
        let (subjects, echo) = (Subjects::new("q"), function("echo", "fn"));
        for subject in ["faas.q.fn.echo.1", "faas.q.fn.echo.+000000000001", "faas.q.fn.echo.=ZZ"] {
            assert!(subjects.is_message_of(&echo, subject), "{subject}");
        }
        for subject in
            ["faas.q.fn.echo.", "faas.q.fn.echo.*", "faas.q.fn.echo.1.2", "faas.q.fn.b.1", "x"]
        {
            assert!(!subjects.is_message_of(&echo, subject), "{subject}");
        }
    }
}
