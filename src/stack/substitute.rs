//! `${NAME}` and `${NAME:-default}` in a stack file's texts. No I/O.

/// `text` with its variables replaced; an error says what is wrong and what to write instead. `$${` stands for `${`.
pub(super) fn substitute(
    text: &str,
    var: &dyn Fn(&str) -> Option<String>,
) -> Result<String, String> {
    let (mut done, mut rest) = (String::with_capacity(text.len()), text);
    while let Some(at) = rest.find("${") {
        let (before, from) = rest.split_at(at);
        if let Some(before) = before.strip_suffix('$') {
            done.push_str(before);
            done.push_str("${");
            rest = &from[2..];
            continue;
        }
        done.push_str(before);
        let Some((inside, behind)) = from[2..].split_once('}') else {
            return Err("${ has no closing brace; $${ stands for a plain ${".to_owned());
        };
        done.push_str(&variable_value(inside, var)?);
        rest = behind;
    }
    done.push_str(rest);
    Ok(done)
}

fn variable_value(inside: &str, var: &dyn Fn(&str) -> Option<String>) -> Result<String, String> {
    let (name, default) = match inside.split_once(":-") {
        Some((name, default)) => (name, Some(default)),
        None => (inside, None),
    };
    let first = name.bytes().next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_');
    if !first || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
        return Err(format!(
            "${{{inside}}} is not understood: write ${{NAME}} or ${{NAME:-default}}, or $${{ for a plain ${{"
        ));
    }
    let set = var(name).filter(|value| default.is_none() || !value.is_empty());
    set.or_else(|| default.map(str::to_owned)).ok_or_else(|| {
        format!("the variable {name} is not set: set it, or write ${{{name}:-default}}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_replaced_or_refused_with_what_to_write() {
        let var = |name: &str| match name {
            "A" => Some("one".to_owned()),
            "EMPTY" => Some(String::new()),
            _ => None,
        };
        for (text, expect) in [
            ("plain $A $$ {A}", "plain $A $$ {A}"),
            ("<${A}${A}>", "<oneone>"),
            ("${A:-two} ${B:-two} ${B:-} ${B:-http://x:1/-}", "one two  http://x:1/-"),
            ("${EMPTY}|${EMPTY:-full}", "|full"),
            ("$${A} and $$${A}", "${A} and $${A}"),
        ] {
            assert_eq!(substitute(text, &var).as_deref(), Ok(expect), "{text}");
        }
        for (text, expect) in [
            ("${B}", "the variable B is not set: set it, or write ${B:-default}"),
            ("${A", "no closing brace"),
            ("${A:=x}", "${A:=x} is not understood"),
            ("${}", "not understood"),
            ("${1A}", "not understood"),
        ] {
            let error = substitute(text, &var).unwrap_err();
            assert!(error.contains(expect), "{text}: {error}");
        }
    }
}
