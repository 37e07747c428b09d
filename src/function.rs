//! A function's name and namespace. No I/O.

mod path;

use std::fmt;

pub use path::has_dot_segment;

/// A function, as the provider knows it. Parsed at the door: past `routes` no string is a function's name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Function {
    /// The name without its namespace.
    pub name: String,
    /// The namespace; empty when none is known.
    pub namespace: String,
}

impl Function {
    /// Splits `figlet.dev` at its last dot; `figlet` alone lives in `default_namespace`.
    ///
    /// `None` if a part of the name is missing or too long, or has a byte outside `[-a-zA-Z_0-9.]`.
    pub fn parse(segment: &str, default_namespace: &str) -> Option<Self> {
        let (name, namespace) = segment.rsplit_once('.').unwrap_or((segment, default_namespace));
        if name.is_empty() || !segment.bytes().all(is_name_byte) {
            return None;
        }
        // `figlet.` names no namespace; it is not the default one either.
        if segment.ends_with('.') {
            return None;
        }
        // The provider need not be asked, and names become parts of others.
        if name.len() > LONGEST || namespace.len() > LONGEST {
            return None;
        }
        Some(Self { name: name.to_owned(), namespace: namespace.to_owned() })
    }
}

/// A name or a namespace is no longer: as long as one of the DNS.
const LONGEST: usize = 253;

/// Whether `byte` may stand in a function's name or namespace.
pub fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.')
}

impl fmt::Display for Function {
    /// `name.namespace`, or the name alone: what callers write, and metrics show.
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
    fn the_last_dot_divides_name_and_namespace() {
        check("figlet", "openfaas-fn", Some(("figlet", "openfaas-fn")));
        check("figlet", "", Some(("figlet", "")));
        check("figlet.dev", "openfaas-fn", Some(("figlet", "dev")));
        check("a.b.dev", "openfaas-fn", Some(("a.b", "dev")));
        check("A_b-9", "x", Some(("A_b-9", "x")));
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for segment in ["", ".", ".dev", "figlet.", "bad$name", "a b", "a/b", "ä", "a%20b"] {
            check(segment, "openfaas-fn", None);
        }
    }

    #[test]
    fn a_name_is_no_longer_than_one_of_the_dns() {
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
}
