//! A function's name and namespace. No I/O.

mod path;

use std::fmt;

pub use path::has_dot_segment;

/// Name and namespace of a function. Parsed when a request is routed: no later code handles a function's name as a string.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Function {
    /// The name without its namespace.
    pub name: String,
    /// The namespace; empty when none is known.
    pub namespace: String,
}

impl Function {
    /// Splits `figlet.dev` at its last dot; `figlet` alone is in `default_namespace`.
    ///
    /// Returns `None` if a part is empty or longer than 253 bytes, or has a byte outside `[-a-zA-Z_0-9.]`.
    pub fn parse(segment: &str, default_namespace: &str) -> Option<Self> {
        let (name, namespace) = segment.rsplit_once('.').unwrap_or((segment, default_namespace));
        if name.is_empty() || !segment.bytes().all(is_name_byte) {
            return None;
        }
        // A trailing dot is an empty namespace, not the default one.
        if segment.ends_with('.') {
            return None;
        }
        // Longer names cannot exist, and names become parts of NATS subjects and file names.
        if name.len() > MAX_NAME_BYTES || namespace.len() > MAX_NAME_BYTES {
            return None;
        }
        Some(Self { name: name.to_owned(), namespace: namespace.to_owned() })
    }
}

/// Maximum bytes of a name or a namespace: the limit of DNS names.
const MAX_NAME_BYTES: usize = 253;

/// Returns whether `byte` is allowed in a name or namespace.
pub fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.')
}

/// Description of a DNS label, for errors.
pub const DNS_LABEL_RULE: &str = "at most 63 of a-z, 0-9 and -, none of them - at either end";

/// Returns whether `name` is valid for a function or namespace: a DNS label, as in Kubernetes.
pub fn is_dns_label(name: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    (1..=63).contains(&name.len())
        && name.bytes().all(inner)
        && !name.starts_with('-')
        && !name.ends_with('-')
}

impl fmt::Display for Function {
    /// `name.namespace`, or the name alone if there is no namespace: the form used in paths and metrics.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        if !self.namespace.is_empty() {
            write!(f, ".{}", self.namespace)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(segment: &str, default_namespace: &str, expect: Option<(&str, &str)>) {
        let got = Function::parse(segment, default_namespace);
        let got = got.as_ref().map(|f| (f.name.as_str(), f.namespace.as_str()));
        assert_eq!(got, expect, "{segment:?}");
    }

    #[test]
    fn the_last_dot_separates_name_and_namespace() {
        check("figlet", "openfaas-fn", Some(("figlet", "openfaas-fn")));
        check("figlet", "", Some(("figlet", "")));
        check("figlet.dev", "openfaas-fn", Some(("figlet", "dev")));
        check("a.b.dev", "openfaas-fn", Some(("a.b", "dev")));
        check("A_b-9", "x", Some(("A_b-9", "x")));
    }

    #[test]
    fn an_invalid_name_is_rejected() {
        for segment in ["", ".", ".dev", "figlet.", "bad$name", "a b", "a/b", "ä", "a%20b"] {
            check(segment, "openfaas-fn", None);
        }
    }

    #[test]
    fn a_name_is_limited_to_253_bytes() {
        let (longest, longer) = ("a".repeat(253), "a".repeat(254));
        check(&longest, "fn", Some((longest.as_str(), "fn")));
        check(&format!("a.{longest}"), "fn", Some(("a", longest.as_str())));
        check(&longer, "fn", None);
        check(&format!("a.{longer}"), "fn", None);
    }

    #[test]
    fn a_label_is_name_dot_namespace() {
        let label = |name: &str, ns: &str| Function::parse(name, ns).unwrap().to_string();
        assert_eq!(label("figlet", "dev"), "figlet.dev");
        assert_eq!(label("figlet", ""), "figlet");
    }

    #[test]
    fn names_are_dns_labels() {
        for name in ["a", "figlet", "a-1", "0", &"x".repeat(63)] {
            assert!(is_dns_label(name), "{name}");
        }
        for name in ["", "-a", "a-", "A", "a_b", "a.b", "..", "a/b", "ä", &"x".repeat(64)] {
            assert!(!is_dns_label(name), "{name}");
        }
    }
}
