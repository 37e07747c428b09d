//! Names of streams, subjects and consumers on the server. No I/O.

use crate::function::Function;
use crate::queue::jetstream::ids::Key;

/// The names that belong to one queue.
#[derive(Clone, Debug)]
pub(super) struct Names {
    /// The queue's name as a token.
    queue: String,
    pub(super) calls: String,
    pub(super) dead: String,
    /// Final states and answers.
    pub(super) notes: String,
    pub(super) keys: String,
    /// Who makes which calls at this moment, and which are being taken back.
    pub(super) claims: String,
    /// Bodies that are too large for one message.
    pub(super) bodies: String,
    /// Which calls of messages that are there with several are over.
    pub(super) open: String,
}

/// A function and a call's id, as a subject says them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Named {
    pub(super) function: Function,
    pub(super) id: String,
}

impl Names {
    pub(super) fn new(queue: &str) -> Self {
        let queue = token(queue);
        let stream = |what| format!("gateway-{queue}-{what}");
        Self {
            calls: stream("calls"),
            dead: stream("dead"),
            notes: stream("notes"),
            keys: stream("keys"),
            claims: stream("claims"),
            bodies: stream("bodies"),
            open: stream("open"),
            queue,
        }
    }

    /// All subjects of the kind `root`.
    pub(super) fn all(&self, root: &str) -> String {
        format!("{root}.{}.>", self.queue)
    }

    /// The subject of a call. Its last three tokens say which one it is, whatever the kind.
    pub(super) fn call(&self, root: &str, function: &Function, id: &str) -> String {
        format!("{root}.{}.{}.{}", self.queue, tokens(function), token(id))
    }

    /// The subject of several calls together.
    pub(super) fn together(&self, root: &str, function: &Function, key: Key) -> String {
        format!("{root}.{}.{}.{}", self.queue, tokens(function), key.token())
    }

    /// The subject of the record of the calls under `subject`.
    pub(super) fn record_of(&self, subject: &str) -> Option<String> {
        let rest = subject.strip_prefix(CALLS)?;
        Some(format!("{OPEN}{rest}"))
    }

    /// A subject that means those, whatever their function.
    pub(super) fn by_key(&self, root: &str, key: Key) -> String {
        format!("{root}.{}.*.*.{}", self.queue, key.token())
    }

    /// A subject that means the call with `id`, whatever its function.
    pub(super) fn by_id(&self, root: &str, id: &str) -> String {
        format!("{root}.{}.*.*.{}", self.queue, token(id))
    }

    /// The subjects of all calls of `function`, or of every function.
    pub(super) fn of(&self, root: &str, function: Option<&Function>) -> String {
        match function {
            Some(function) => format!("{root}.{}.{}.*", self.queue, tokens(function)),
            None => format!("{root}.{}.*.*.*", self.queue),
        }
    }

    /// What the server knows a repeated publish with a key by. `note` is the number of what was noted of the key before,
    /// of a call that was purged: the next one is another. No token has a dot.
    pub(super) fn message_of_key(key: &str, note: u64) -> String {
        match note {
            0 => format!("key-{}", token(key)),
            note => format!("key-{}.{note}", token(key)),
        }
    }

    pub(super) fn key(&self, key: &str) -> String {
        format!("{KEYS}.{}.{}", self.queue, token(key))
    }

    /// The list of the calls that `taker` makes.
    pub(super) fn list(&self, taker: &str) -> String {
        format!("{CLAIMS}.{}.by.{taker}", self.queue)
    }

    /// The mark on the call at `place` that it is taken back; of any call for `*`.
    pub(super) fn mark(&self, place: impl std::fmt::Display) -> String {
        format!("{CLAIMS}.{}.not.{place}", self.queue)
    }

    /// What is stored to see whether that can be done. It is neither a list nor a mark.
    pub(super) fn look(&self) -> String {
        format!("{CLAIMS}.{}.look", self.queue)
    }

    /// What is noted of the server. Nothing that means dead calls means this.
    pub(super) fn seen(&self) -> String {
        format!("{DEAD}.{}.server", self.queue)
    }

    /// Where it is said that there is a consumer for one more function.
    pub(super) fn news(&self) -> String {
        format!("{NEWS}.{}", self.queue)
    }

    /// Where it is said that a call is taken out of a message with others.
    pub(super) fn taken(&self) -> String {
        format!("{NEWS}.{}.taken", self.queue)
    }

    /// The part `number` of what is stored in parts under `name`.
    pub(super) fn part(&self, root: &str, name: &str, number: impl std::fmt::Display) -> String {
        format!("{root}.{}.{name}.{number}", self.queue)
    }
}

/// Kinds of subjects. The first is what an operator sees; no two overlap.
pub(super) const CALLS: &str = "faas";
pub(super) const DEAD: &str = "faas-dead";
pub(super) const ENDS: &str = "faas-end";
pub(super) const ANSWERS: &str = "faas-answer";
pub(super) const KEYS: &str = "faas-key";
pub(super) const CLAIMS: &str = "faas-claim";
pub(super) const BODIES: &str = "faas-body";
pub(super) const OPEN: &str = "faas-open";
/// No stream has these.
const NEWS: &str = "faas-new";

/// `text` as one token of a subject: what may not stand there becomes `=` and two hexadecimal digits.
pub fn token(text: &str) -> String {
    use std::fmt::Write as _;
    if text.is_empty() {
        // No byte is written so: no other text has this token.
        return "=".to_owned();
    }
    let mut token = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_' {
            token.push(byte as char);
        } else {
            // Writing to a string does not fail.
            let _ = write!(token, "={byte:02X}");
        }
    }
    token
}

/// The text that has become `token`.
pub(super) fn text(token: &str) -> Option<String> {
    if token == "=" {
        return Some(String::new());
    }
    let mut bytes = Vec::with_capacity(token.len());
    let mut rest = token.as_bytes();
    while let Some((first, behind)) = rest.split_first() {
        rest = behind;
        if *first != b'=' {
            bytes.push(*first);
            continue;
        }
        let (digits, behind) = rest.split_first_chunk::<2>()?;
        bytes.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?);
        rest = behind;
    }
    String::from_utf8(bytes).ok()
}

fn tokens(function: &Function) -> String {
    format!("{}.{}", token(&function.namespace), token(&function.name))
}

/// The key of the calls that are together under this subject; `None` for that of a call alone.
pub(super) fn key(subject: &str) -> Option<Key> {
    Key::of_token(subject.rsplit('.').next()?)
}

/// How many calls are under this subject.
pub(super) fn calls(subject: &str) -> usize {
    key(subject).map_or(1, Key::count)
}

/// What a call's subject says.
pub(super) fn named(subject: &str) -> Option<Named> {
    let mut tokens = subject.rsplit('.');
    let (id, name, namespace) = (tokens.next()?, tokens.next()?, tokens.next()?);
    let function = Function { name: text(name)?, namespace: text(namespace)? };
    Some(Named { function, id: text(id)? })
}

/// The name of the consumer of `function`. A comma stands in no token.
pub(super) fn consumer(function: &Function) -> String {
    format!("{},{}", token(&function.namespace), token(&function.name))
}

/// The function whose consumer has this name.
pub(super) fn consumed(consumer: &str) -> Option<Function> {
    let (namespace, name) = consumer.split_once(',')?;
    let function = Function { name: text(name)?, namespace: text(namespace)? };
    (!function.name.is_empty()).then_some(function)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function(name: &str, namespace: &str) -> Function {
        Function { name: name.to_owned(), namespace: namespace.to_owned() }
    }

    #[test]
    fn a_token_leads_back_to_its_text() {
        for text_ in ["", "a", "a.b", "=", "*", ">", "a b\r\n", "ä", "a=41", "A_b-9"] {
            let token = token(text_);
            assert!(!token.is_empty() && !token.contains(['.', '*', '>', ' ', '\r', ',']));
            assert_eq!(text(&token).as_deref(), Some(text_), "{token}");
        }
        assert_eq!((text("=4"), text("=XY"), text("=FF")), (None, None, None));
    }

    #[test]
    fn a_subject_says_which_call_it_is() {
        let names = Names::new("faas.request");
        for function in [function("a.b", "dev"), function("a", "")] {
            let subject = names.call(CALLS, &function, "id.1");
            let id = "id.1".to_owned();
            assert_eq!(named(&subject), Some(Named { function: function.clone(), id }));
            assert_eq!(consumed(&consumer(&function)), Some(function));
        }
        let subject = names.call(CALLS, &function("echo", "fn"), "1");
        assert_eq!(subject, "faas.faas=2Erequest.fn.echo.1");
        assert_eq!(names.by_id(CALLS, "1"), "faas.faas=2Erequest.*.*.1");
    }
}
