//! Substitutes `${NAME}` and `${NAME:-default}` in strings of a stack file. No I/O.

/// Replaces the variables in `text`. `$${` stands for `${`.
///
/// # Errors
/// A message with the problem and its remedy.
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
        let Some((expression, after)) = from[2..].split_once('}') else {
            return Err("${ has no closing brace; $${ stands for a plain ${".to_owned());
        };
        done.push_str(&variable_value(expression, var)?);
        rest = after;
    }
    done.push_str(rest);
    Ok(done)
}

fn variable_value(
    expression: &str,
    var: &dyn Fn(&str) -> Option<String>,
) -> Result<String, String> {
    let (name, default) = match expression.split_once(":-") {
        Some((name, default)) => (name, Some(default)),
        None => (expression, None),
    };
    let valid_start = name.bytes().next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_');
    if !valid_start || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
        return Err(format!(
            "${{{expression}}} is invalid: write ${{NAME}} or ${{NAME:-default}}, or $${{ for a plain ${{"
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
    fn variables_are_replaced_or_rejected_with_a_remedy() {
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
            ("${A:=x}", "${A:=x} is invalid"),
            ("${}", "is invalid"),
            ("${1A}", "is invalid"),
        ] {
            let error = substitute(text, &var).unwrap_err();
            assert!(error.contains(expect), "{text}: {error}");
        }
    }
}
