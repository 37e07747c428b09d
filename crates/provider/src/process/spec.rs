//! Parses a deployment into command, mode and limits. No I/O.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use axum::http::HeaderValue;

use crate::process::shell_words;
use crate::types::FunctionDeployment;
use gateway_base::duration;

/// Default of `exec_timeout`. The gateway usually times out earlier; this limits calls of clients without a timeout.
const DEFAULT_EXEC_TIMEOUT: Duration = Duration::from_secs(600);

/// A parsed deployment.
#[derive(Debug, PartialEq)]
pub(super) struct FunctionSpec {
    /// The program and its arguments; never empty.
    pub(super) argv: Vec<String>,
    /// Working directory; `None`: that of the provider.
    pub(super) working_directory: Option<PathBuf>,
    pub(super) env: BTreeMap<String, String>,
    pub(super) secrets: Vec<String>,
    /// `exec_timeout`; `None` (0 in the deployment): unlimited.
    pub(super) exec_timeout: Option<Duration>,
    /// `max_inflight`: maximum calls in flight per replica; 0: unlimited.
    pub(super) max_inflight: u64,
    pub(super) mode: Mode,
}

#[derive(Debug, PartialEq)]
pub(super) enum Mode {
    /// One process for each call.
    Fork(ForkOptions),
    /// Processes that listen on a port.
    Http {
        /// `ready_path`: path that a ready replica responds to with 200; `None`: a replica that accepts connections is
        /// ready.
        ready_path: Option<String>,
    },
}

#[derive(Debug, PartialEq)]
pub(super) struct ForkOptions {
    /// `content_type` of all responses.
    pub(super) content_type: Option<HeaderValue>,
    /// `combine_output`: whether standard error is part of the response.
    pub(super) combine_output: bool,
    /// `cgi_headers`: whether environment variables describe the request.
    pub(super) cgi_headers: bool,
    /// `write_debug`: whether the output is logged as well.
    pub(super) write_debug: bool,
}

impl FunctionSpec {
    /// Parses a deployment.
    ///
    /// # Errors
    /// Description of the first invalid field, for the client.
    pub(super) fn parse(deployment: &FunctionDeployment) -> Result<Self, String> {
        let env = deployment.env_vars.clone().unwrap_or_default();
        check_environment(&env)?;
        let mut words = parse_command(&deployment.env_process, &env)?;
        let directory = parse_directory(&deployment.working_directory)?;
        // The kernel would resolve a relative path in the provider's directory.
        if let Some(directory) = &directory
            && words[0].contains('/')
        {
            words[0] = directory.join(&words[0]).to_string_lossy().into_owned();
        }
        let mode = match env.get("mode").map_or("fork", |mode| mode.trim()) {
            // `streaming` and `serializing` are fork modes of OpenFaaS watchdogs.
            "" | "fork" | "streaming" | "serializing" => Mode::Fork(ForkOptions {
                content_type: parse_variable(&env, "content_type", "a header's value", |text| {
                    HeaderValue::from_str(text).ok()
                })?,
                combine_output: parse_boolean(&env, "combine_output", true)?,
                cgi_headers: parse_boolean(&env, "cgi_headers", true)?,
                write_debug: parse_boolean(&env, "write_debug", false)?,
            }),
            "http" => Mode::Http {
                ready_path: parse_variable(
                    &env,
                    "ready_path",
                    "a path such as /_/ready",
                    parse_ready_path,
                )?,
            },
            other => return Err(format!("envVars: mode: {other:?} is not fork or http")),
        };
        let exec_timeout =
            parse_variable(&env, "exec_timeout", duration::EXPECTED, duration::parse)?;
        let max_inflight = parse_variable(&env, "max_inflight", "a whole number", from_str)?;
        Ok(Self {
            argv: words,
            working_directory: directory,
            secrets: deployment.secrets.clone().unwrap_or_default(),
            exec_timeout: Some(exec_timeout.unwrap_or(DEFAULT_EXEC_TIMEOUT))
                .filter(|d| !d.is_zero()),
            max_inflight: max_inflight.unwrap_or_default(),
            mode,
            env,
        })
    }
}

/// Returns the initial number of replicas of a new function.
pub(super) fn initial_replicas(deployment: &FunctionDeployment) -> Result<u64, String> {
    const LABEL: &str = "com.openfaas.scale.min";
    match deployment.labels.as_ref().and_then(|labels| labels.get(LABEL)) {
        None => Ok(1),
        Some(text) => {
            let parsed = from_str::<u64>(text);
            parsed.map(|n| n.max(1)).ok_or_else(|| invalid("label", LABEL, text, "a whole number"))
        }
    }
}

fn parse_command(env_process: &str, env: &BTreeMap<String, String>) -> Result<Vec<String>, String> {
    let line = match env_process.trim() {
        "" => env.get("fprocess").map_or("", |line| line.trim()),
        line => line,
    };
    if line.contains('\0') {
        return Err("envProcess: a command cannot contain a NUL character".to_owned());
    }
    let words =
        shell_words::split(line).map_err(|error| format!("envProcess: {line:?}: {error}"))?;
    if words.first().is_none_or(String::is_empty) {
        return Err(
            "envProcess is missing: this provider runs commands, not images, so a function needs \
                    envProcess (fprocess in a stack file) with the command to run"
                .to_owned(),
        );
    }
    Ok(words)
}

fn parse_directory(path: &str) -> Result<Option<PathBuf>, String> {
    match path {
        "" => Ok(None),
        path if path.starts_with('/') && !path.contains('\0') => Ok(Some(PathBuf::from(path))),
        path => Err(format!("workingDirectory: {path:?} is not an absolute path")),
    }
}

fn check_environment(env: &BTreeMap<String, String>) -> Result<(), String> {
    let wrong_name = |name: &str| name.is_empty() || name.contains(['=', '\0']);
    match env.iter().find(|(name, value)| wrong_name(name) || value.contains('\0')) {
        Some((name, _)) => Err(format!("envVars: {name:?} cannot be an environment variable")),
        None => Ok(()),
    }
}

fn parse_boolean(
    env: &BTreeMap<String, String>,
    name: &str,
    default: bool,
) -> Result<bool, String> {
    let parsed = parse_variable(env, name, "true or false", |text| match text {
        "true" | "1" => Some(true),
        "false" | "0" => Some(false),
        _ => None,
    })?;
    Ok(parsed.unwrap_or(default))
}

/// Parses the variable `name`; `None` if it is missing or empty.
fn parse_variable<T>(
    env: &BTreeMap<String, String>,
    name: &str,
    expected: &str,
    parse: impl FnOnce(&str) -> Option<T>,
) -> Result<Option<T>, String> {
    match env.get(name).map(|text| text.trim()) {
        None | Some("") => Ok(None),
        Some(text) => parse(text).map(Some).ok_or_else(|| invalid("envVars", name, text, expected)),
    }
}

fn invalid(place: &str, name: &str, text: &str, expected: &str) -> String {
    format!("{place}: {name}: {text:?} is not {expected}")
}

fn from_str<T: FromStr>(text: &str) -> Option<T> {
    text.parse().ok()
}

fn parse_ready_path(text: &str) -> Option<String> {
    let valid = text.starts_with('/') && text.parse::<http::Uri>().is_ok();
    valid.then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deployment(env_process: &str, env: &[(&str, &str)]) -> FunctionDeployment {
        let env = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        FunctionDeployment {
            env_process: env_process.to_owned(),
            env_vars: Some(env.collect()),
            ..FunctionDeployment::default()
        }
    }

    #[track_caller]
    fn refused(env_process: &str, env: &[(&str, &str)], expect: &str) {
        let reason = FunctionSpec::parse(&deployment(env_process, env)).unwrap_err();
        assert!(reason.contains(expect), "{reason}");
    }

    #[test]
    fn a_command_without_settings_has_the_defaults_of_the_classic_watchdog() {
        let spec = FunctionSpec::parse(&deployment("cat -n", &[])).unwrap();
        assert_eq!(spec.argv, ["cat", "-n"]);
        assert_eq!(spec.exec_timeout, Some(DEFAULT_EXEC_TIMEOUT));
        assert_eq!(spec.max_inflight, 0);
        let Mode::Fork(fork) = spec.mode else { panic!("{:?}", spec.mode) };
        assert!(fork.combine_output && fork.cgi_headers && !fork.write_debug);
    }

    #[test]
    fn a_relative_command_is_resolved_in_its_working_directory() {
        let words = |command: &str, directory: &str| {
            let mut deployment = deployment(command, &[]);
            directory.clone_into(&mut deployment.working_directory);
            FunctionSpec::parse(&deployment)
                .map(|spec| (spec.argv.concat(), spec.working_directory))
        };
        let stacks = Some(PathBuf::from("/stacks"));
        assert_eq!(words("./run.sh", "/stacks").unwrap().0, "/stacks/./run.sh");
        assert_eq!(words("/bin/cat", "/stacks"), Ok(("/bin/cat".to_owned(), stacks.clone())));
        assert_eq!(words("cat", "/stacks"), Ok(("cat".to_owned(), stacks)));
        assert_eq!(words("./run.sh", ""), Ok(("./run.sh".to_owned(), None)));
        assert!(words("cat", "stacks").unwrap_err().contains("not an absolute path"));
    }

    #[test]
    fn variables_of_the_watchdogs_are_supported() {
        let env = [
            ("fprocess", "node index.js"),
            ("mode", "http"),
            ("exec_timeout", "1m30s"),
            ("max_inflight", "7"),
            ("ready_path", "/ready"),
        ];
        let spec = FunctionSpec::parse(&deployment("", &env)).unwrap();
        assert_eq!(spec.argv, ["node", "index.js"]);
        assert_eq!(spec.exec_timeout, Some(Duration::from_secs(90)));
        assert_eq!(spec.max_inflight, 7);
        assert_eq!(spec.mode, Mode::Http { ready_path: Some("/ready".to_owned()) });
        let unbounded = FunctionSpec::parse(&deployment("cat", &[("exec_timeout", "0")])).unwrap();
        assert_eq!(unbounded.exec_timeout, None);
    }

    #[test]
    fn an_invalid_deployment_is_rejected_with_a_reason() {
        refused("", &[], "runs commands, not images");
        refused("''", &[], "runs commands, not images");
        refused("sh -c 'x", &[], "a single quote");
        refused("cat", &[("exec_timeout", "soon")], "exec_timeout: \"soon\" is not a duration");
        refused("cat", &[("max_inflight", "-1")], "max_inflight: \"-1\" is not a whole number");
        refused("cat", &[("combine_output", "maybe")], "combine_output");
        refused("cat", &[("mode", "wasm")], "mode: \"wasm\" is not fork or http");
        refused("cat", &[("mode", "http"), ("ready_path", "ready")], "ready_path");
        refused("cat", &[("a=b", "c")], "\"a=b\"");
    }

    #[test]
    fn the_initial_number_of_replicas_is_the_label_or_one() {
        let mut deployment = deployment("cat", &[]);
        assert_eq!(initial_replicas(&deployment), Ok(1));
        let label =
            |value: &str| Some([("com.openfaas.scale.min".to_owned(), value.to_owned())].into());
        deployment.labels = label("3");
        assert_eq!(initial_replicas(&deployment), Ok(3));
        deployment.labels = label("many");
        assert!(initial_replicas(&deployment).unwrap_err().contains("com.openfaas.scale.min"));
    }
}
