//! Detects shell syntax in a command line. No I/O.

/// Returns the first unquoted operator or expansion in `line` that requires a shell.
pub(super) fn shell_operator(line: &str) -> Option<String> {
    let mut chars = line.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\\' => {
                chars.next();
            }
            '\'' => {
                chars.by_ref().find(|c| *c == '\'');
            }
            '"' => {
                while let Some(c) = chars.next() {
                    match c {
                        '"' => break,
                        '\\' => {
                            chars.next();
                        }
                        _ => {}
                    }
                }
            }
            '|' | '&' | ';' | '<' | '>' => {
                let twice = chars.peek() == Some(&c) && c != ';';
                return Some(if twice { [c, c].iter().collect() } else { c.to_string() });
            }
            '`' => return Some(c.to_string()),
            '$' => match chars.peek() {
                Some('(') => return Some("$(".to_owned()),
                Some(next) if next.is_ascii_alphabetic() || *next == '_' => {
                    let is_name = |c: &char| c.is_ascii_alphanumeric() || *c == '_';
                    let name: String = std::iter::from_fn(|| chars.next_if(is_name)).collect();
                    return Some(format!("${name}"));
                }
                _ => {}
            },
            _ => {}
        }
    }
    None
}

/// Returns `line` as one shell word in single quotes. Unlike the crate `shlex`, which chooses the quotes by the content,
/// so messages print every command in the same way.
pub fn single_quoted(line: &str) -> String {
    format!("'{}'", line.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_unquoted_shell_syntax_is_detected() {
        for (line, expect) in [
            ("cat", None),
            ("cat | wc -l", Some("|")),
            ("a && b", Some("&&")),
            ("a || b", Some("||")),
            ("a &", Some("&")),
            ("a; b", Some(";")),
            ("a > f", Some(">")),
            ("a >> f", Some(">>")),
            ("a 2>&1", Some(">")),
            ("a < f", Some("<")),
            ("echo `id`", Some("`")),
            ("echo $(id)", Some("$(")),
            ("node $HANDLER/x", Some("$HANDLER")),
            ("awk {print} $1", None),
            ("sh -c 'a | b > $X'", None),
            (r#"sh -c "a | \" | b""#, None),
            (r"jq .a\|.b", None),
        ] {
            assert_eq!(shell_operator(line).as_deref(), expect, "{line}");
        }
        assert_eq!(single_quoted("it's"), r"'it'\''s'");
    }
}
