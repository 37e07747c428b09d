//! Texts of `-h` and `--help`. No I/O.

use crate::config::settings::Setting;

/// Settings that `-h` shows; `--help` shows all.
pub(super) const COMMON: &[&str] = &[
    "functions_provider_url",
    "function_namespace",
    "port",
    "worker_metrics_port",
    "provider_address",
    "provider_port",
    "upstream_timeout",
    "basic_auth",
    "secret_mount_path",
    "scale_from_zero",
    "autoscale",
    "queue",
    "with_worker",
    "faas_nats_address",
    "max_inflight",
    "state_dir",
    "access_log",
    "log_level",
];

pub(super) fn is_common(setting: &Setting) -> bool {
    COMMON.contains(&setting.name)
}

/// Returns the first sentence of the description, with variable and default.
pub(super) fn short(setting: &Setting) -> String {
    let about = setting.help;
    let is_outside_parentheses = |at: &usize| {
        let before = &about[..*at];
        before.matches('(').count() == before.matches(')').count()
    };
    let ends = [". ", "; "].into_iter().flat_map(|end| about.match_indices(end));
    let ends = ends.map(|(at, _)| at).filter(is_outside_parentheses).min();
    let sentence = about[..ends.unwrap_or(about.len())].trim_end_matches('.');
    with_variable_and_default(sentence, setting)
}

pub(super) fn long(setting: &Setting) -> String {
    with_variable_and_default(setting.help, setting)
}

fn with_variable_and_default(about: &str, setting: &Setting) -> String {
    let default = match setting.default {
        "" => String::new(),
        default => format!(" [default: {default}]"),
    };
    format!("{about} [env: {}]{default}", setting.name)
}

/// Returns the text after the settings: `examples`, each with its purpose, and how settings are given.
pub(super) fn after_help(examples: &[(&str, &str)]) -> String {
    let mut text = String::from("Examples:\n");
    for (line, meaning) in examples {
        let meaning = if meaning.is_empty() { String::new() } else { format!("  # {meaning}") };
        text.push_str(&format!("  {line}{meaning}\n"));
    }
    text.push_str(
        "\nEach setting can be given as a flag or as the environment variable named in its line; the flag has \
         precedence. Durations are those of Go (1m30s, 700ms) or whole seconds. A flag for true or false needs no value. \
         -h shows the most common settings, --help shows all.",
    );
    text
}
