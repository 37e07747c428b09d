//! Environment variables that are probably misspelt settings. No I/O.

use crate::config::settings::{Role, SETTINGS};

/// Returns those of `names` that are one edit away from a setting of `role`, each with that setting. Settings of one
/// word, such as `port`, are not considered: they resemble too many other variables.
pub fn likely_typos<'a>(
    role: Role,
    names: impl Iterator<Item = &'a str>,
) -> impl Iterator<Item = (&'a str, &'static str)> {
    let unknown = names.filter(|name| SETTINGS.iter().all(|setting| setting.name != *name));
    unknown.filter_map(move |name| {
        let meant = SETTINGS.iter().find(|setting| {
            setting.roles.contains(&role)
                && setting.name.contains('_')
                && is_one_edit(name.as_bytes(), setting.name.as_bytes())
        });
        Some((name, meant?.name))
    })
}

/// Returns whether inserting, deleting or replacing one letter, or swapping two adjacent ones, turns one name into the
/// other.
fn is_one_edit(mut one: &[u8], mut other: &[u8]) -> bool {
    while let (Some((a, rest_of_one)), Some((b, rest_of_other))) =
        (one.split_first(), other.split_first())
        && a == b
    {
        (one, other) = (rest_of_one, rest_of_other);
    }
    while let (Some((a, rest_of_one)), Some((b, rest_of_other))) =
        (one.split_last(), other.split_last())
        && a == b
    {
        (one, other) = (rest_of_one, rest_of_other);
    }
    match (one, other) {
        ([], [_]) | ([_], [] | [_]) => true,
        ([a, b], [c, d]) => (a, b) == (d, c),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_one_edit_away_from_a_setting_is_reported() {
        let meant = |name: &'static str| likely_typos(Role::Serve, [name].into_iter()).next();
        for (name, setting) in [
            ("read_timeuot", "read_timeout"),
            ("read_timeou", "read_timeout"),
            ("read_timeouts", "read_timeout"),
            ("read-timeout", "read_timeout"),
            ("readtimeout", "read_timeout"),
            ("Log_level", "log_level"),
            ("faas_nats_adress", "faas_nats_address"),
        ] {
            assert_eq!(meant(name), Some((name, setting)));
        }
        for name in [
            "read_timeout",
            "READ_TIMEOUT",
            "LOG_LEVEL",
            "PORT",
            "ports",
            "queues",
            "HOME",
            "PATH",
            "http_proxy",
            "no_proxy",
            "raed_timeuot",
            "_",
            "",
            "worker_metric_port",
        ] {
            assert_eq!(meant(name), None, "{name}");
        }
    }
}
