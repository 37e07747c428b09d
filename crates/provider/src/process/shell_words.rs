//! Splits a command line into words with the quoting rules of a shell, without expansions. No I/O.
//!
//! The crate `shlex` is not used, because its results differ for users: it takes a word that begins with `#` for a
//! comment and drops the rest of the line, it does not separate words at a carriage return, and its error does not say
//! which quote is open.

/// An unclosed quote, or a backslash at the end.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} without its counterpart")]
pub(super) struct Unbalanced(&'static str);

/// Splits `line` into words. Quotes group characters; a backslash escapes the next character, except in single quotes.
///
/// # Errors
/// An unclosed quote, or a backslash at the end.
pub(super) fn split(line: &str) -> Result<Vec<String>, Unbalanced> {
    let mut words = Vec::new();
    // `None` between words; an empty word such as `''` is `Some`.
    let mut word: Option<String> = None;
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match c {
            c if c.is_whitespace() => words.extend(word.take()),
            '\'' => single_quoted(&mut chars, word.get_or_insert_default())?,
            '"' => double_quoted(&mut chars, word.get_or_insert_default())?,
            '\\' => {
                let next = chars.next().ok_or(Unbalanced("a backslash"))?;
                word.get_or_insert_default().push(next);
            }
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    Ok(words)
}

fn single_quoted(chars: &mut std::str::Chars<'_>, word: &mut String) -> Result<(), Unbalanced> {
    for c in chars {
        if c == '\'' {
            return Ok(());
        }
        word.push(c);
    }
    Err(Unbalanced("a single quote"))
}

/// In double quotes, a backslash escapes only `"`, `\`, `$` and a backtick, as in POSIX.
fn double_quoted(chars: &mut std::str::Chars<'_>, word: &mut String) -> Result<(), Unbalanced> {
    let unbalanced = Unbalanced("a double quote");
    while let Some(c) = chars.next() {
        match c {
            '"' => return Ok(()),
            '\\' => match chars.next() {
                Some(next @ ('"' | '\\' | '$' | '`')) => word.push(next),
                Some(next) => word.extend(['\\', next]),
                None => return Err(unbalanced),
            },
            c => word.push(c),
        }
    }
    Err(unbalanced)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(line: &str, expect: &[&str]) {
        assert_eq!(split(line).unwrap(), expect, "{line:?}");
    }

    #[test]
    fn words_are_split_like_in_a_shell() {
        check("", &[]);
        check("  cat  ", &["cat"]);
        check("a\tb\nc", &["a", "b", "c"]);
        check("sh -c 'echo \"hi\" $x'", &["sh", "-c", "echo \"hi\" $x"]);
        check(r#"say "a 'b' \"c\" \\ \n""#, &["say", r#"a 'b' "c" \ \n"#]);
        check(r"a\ b c\'d", &["a b", "c'd"]);
        check("pre'fix'\"ed\"", &["prefixed"]);
        check("a '' \"\"", &["a", "", ""]);
        check("$HOME `id` *", &["$HOME", "`id`", "*"]);
        check("grüße 'schöne neue'", &["grüße", "schöne neue"]);
    }

    #[test]
    fn an_unclosed_quote_is_rejected() {
        for line in ["'", "\"", "a 'b", "a \"b", "\"\\", "a\\"] {
            assert!(split(line).is_err(), "{line:?}");
        }
    }
}
