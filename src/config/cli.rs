//! The command line: roles, flags and `--help`, generated from the table of settings. No I/O.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Command, ValueHint};
use clap_complete::generate;
use clap_complete::shells::{Bash, Fish, Zsh};

use crate::config::help;
use crate::config::settings::{Role, SETTINGS, Setting};

/// A parsed subcommand. [`CommandLine::flag`] returns settings given as flags.
#[derive(Debug)]
pub enum Subcommand {
    Serve,
    Worker,
    Provider,
    Up {
        stack: Option<PathBuf>,
        /// The stack file is read only at the start.
        once: bool,
    },
    /// `gateway secret set NAME`
    SecretSet {
        name: String,
        /// Empty for the default.
        namespace: String,
        /// `None`: the value is read from standard input.
        from_file: Option<PathBuf>,
    },
    /// `gateway queue check FILE`
    QueueCheck {
        file: PathBuf,
    },
    /// `gateway queue salvage FILE OUT`
    QueueSalvage {
        file: PathBuf,
        out: PathBuf,
    },
    /// `gateway healthcheck [URL]`
    Healthcheck {
        url: String,
    },
    /// `gateway completions SHELL`
    Completions {
        script: Vec<u8>,
    },
}

/// A parsed command line.
#[derive(Debug)]
pub struct CommandLine {
    pub subcommand: Subcommand,
    matches: ArgMatches,
}

impl CommandLine {
    /// Parses `args`, which begin with the name of the program.
    ///
    /// # Errors
    /// Help, version or a usage error, to be printed.
    pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Self, clap::Error> {
        let matches = command().try_get_matches_from(join_flag_values(args))?;
        Ok(match matches.subcommand() {
            None => Self { subcommand: Subcommand::Serve, matches },
            Some(("serve", sub)) => Self { subcommand: Subcommand::Serve, matches: sub.clone() },
            Some(("worker", sub)) => Self { subcommand: Subcommand::Worker, matches: sub.clone() },
            Some(("up", sub)) => Self {
                subcommand: Subcommand::Up {
                    stack: sub.get_one::<PathBuf>("STACK").cloned(),
                    once: sub.get_flag("once"),
                },
                matches: sub.clone(),
            },
            Some(("secret", sub)) => {
                let (_, set) = sub.subcommand().unwrap_or_else(|| unreachable!("required"));
                let text = |name| set.get_one::<String>(name).cloned().unwrap_or_default();
                let asked = Subcommand::SecretSet {
                    name: text("NAME"),
                    namespace: text("namespace"),
                    from_file: set.get_one::<PathBuf>("from-file").cloned(),
                };
                Self { subcommand: asked, matches: set.clone() }
            }
            Some(("provider", sub)) => {
                let (_, process) = sub.subcommand().unwrap_or_else(|| unreachable!("required"));
                Self { subcommand: Subcommand::Provider, matches: process.clone() }
            }
            Some(("queue", sub)) => {
                let (action, sub) = sub.subcommand().unwrap_or_else(|| unreachable!("required"));
                let path = |name: &str| sub.get_one::<PathBuf>(name).cloned().unwrap_or_default();
                let asked = match action {
                    "check" => Subcommand::QueueCheck { file: path("FILE") },
                    _ => Subcommand::QueueSalvage { file: path("FILE"), out: path("OUT") },
                };
                Self { subcommand: asked, matches: sub.clone() }
            }
            Some(("completions", sub)) => {
                let shell = sub.get_one::<String>("SHELL").map_or("bash", String::as_str);
                Self {
                    subcommand: Subcommand::Completions { script: completions(shell) },
                    matches: sub.clone(),
                }
            }
            Some((_, sub)) => Self {
                subcommand: Subcommand::Healthcheck {
                    url: sub.get_one::<String>("URL").cloned().unwrap_or_default(),
                },
                matches: sub.clone(),
            },
        })
    }

    /// Returns the value of a flag, by the name of its setting.
    pub fn flag(&self, name: &str) -> Option<String> {
        self.matches.try_get_one::<String>(name).ok().flatten().cloned()
    }
}

/// Returns the definition of the command line.
pub(super) fn command() -> Command {
    Command::new("gateway")
        .version(env!("CARGO_PKG_VERSION"))
        .about("An API gateway for functions. Without a command, the same as serve.")
        .after_help(help::after_help(&[
            ("gateway up stack.yaml", "functions on this machine, with everything they need"),
            ("gateway serve --functions-provider-url http://provider:8081", "in front of a provider"),
            ("gateway completions bash", "script for completion in bash"),
        ]))
        .args_conflicts_with_subcommands(true)
        .args(flags(Role::Serve))
        .subcommand(
            Command::new("serve")
                .about("Proxy calls of functions to a provider")
                .after_help(help::after_help(&[
                    ("gateway serve --functions-provider-url http://provider:8081 --scale-from-zero", ""),
                    ("functions_provider_url=http://provider:8081 basic_auth=true gateway serve", ""),
                    (
                        "gateway serve --functions-provider-url http://provider:8081 --faas-nats-address nats",
                        "with queued calls",
                    ),
                ]))
                .args(flags(Role::Serve)),
        )
        .subcommand(
            Command::new("worker")
                .about("Execute the queued calls of gateways, in a separate process")
                .after_help(help::after_help(&[
                    ("gateway worker --faas-nats-address nats --max-inflight 100", ""),
                    (
                        "gateway worker --faas-nats-address nats --functions-provider-url http://provider:8081",
                        "without calling through a gateway",
                    ),
                ]))
                .args(flags(Role::Worker)),
        )
        .subcommand(
            Command::new("up")
                .about("Run gateway and provider in one process, on loopback, with the functions of a stack file")
                .after_help(help::after_help(&[
                    ("gateway up examples/stack.yaml", ""),
                    ("gateway up stack.yaml --port 9000 --with-worker=false", ""),
                ]))
                .arg(
                    Arg::new("STACK")
                        .value_parser(clap::value_parser!(PathBuf))
                        .value_hint(ValueHint::FilePath)
                        .help("OpenFaaS stack file (YAML). Its functions are deployed, and updated when it changes"),
                )
                .arg(once_flag())
                .args(flags(Role::Up)),
        )
        .subcommand(secret_command())
        .subcommand(
            Command::new("provider")
                .about("Run functions behind the provider API")
                .subcommand_required(true)
                .subcommand(
                    Command::new("process")
                        .about("Run functions as local processes")
                        .after_help(help::after_help(&[(
                            "gateway provider process --state-dir /var/lib/gateway",
                            "",
                        )]))
                        .args(flags(Role::Provider)),
                ),
        )
        .subcommand(queue_command())
        .subcommand(
            Command::new("healthcheck")
                .about("Request a URL: exit status 0 for a 2xx response, 1 otherwise")
                .arg(
                    Arg::new("URL")
                        .default_value("http://127.0.0.1:8080/_/healthz")
                        .help("The http URL to request"),
                ),
        )
        .subcommand(completions_command())
}

fn completions_command() -> Command {
    Command::new("completions")
        .about("Print the script with which a shell completes commands and flags")
        .after_help(help::after_help(&[
            ("gateway completions bash > /etc/bash_completion.d/gateway", ""),
            ("gateway completions zsh > /usr/local/share/zsh/site-functions/_gateway", ""),
            ("gateway completions fish > ~/.config/fish/completions/gateway.fish", ""),
        ]))
        .arg(Arg::new("SHELL").required(true).value_parser(["bash", "zsh", "fish"]))
}

/// Returns the script with which `shell` completes commands and flags.
fn completions(shell: &str) -> Vec<u8> {
    let (mut command, mut script) = (command(), Vec::new());
    match shell {
        "zsh" => generate(Zsh, &mut command, "gateway", &mut script),
        "fish" => generate(Fish, &mut command, "gateway", &mut script),
        _ => generate(Bash, &mut command, "gateway", &mut script),
    }
    script
}

/// `gateway queue`: maintenance of a queue file that no gateway uses.
fn queue_command() -> Command {
    let path = |name: &'static str, help: &'static str| {
        Arg::new(name).required(true).value_parser(clap::value_parser!(PathBuf)).help(help)
    };
    let file = || path("FILE", "The queue file, queue.redb in the state directory");
    Command::new("queue")
        .about("Check a queue file, or copy the readable part of a damaged one")
        .subcommand_required(true)
        .subcommand(
            Command::new("check")
                .about("Count the readable calls and results of FILE without changing it: exit status 0 if it is sound")
                .arg(file()),
        )
        .subcommand(
            Command::new("salvage")
                .about("Copy the readable part of FILE to the new file OUT, without changing FILE")
                .arg(file())
                .arg(path("OUT", "The new file")),
        )
}

fn once_flag() -> Arg {
    Arg::new("once")
        .long("once")
        .action(ArgAction::SetTrue)
        .help("Read the stack file only at the start, and do not follow its changes")
}

fn secret_command() -> Command {
    let state_dir = SETTINGS.iter().filter(|setting| setting.name == "state_dir").map(flag);
    Command::new("secret").about("Manage secrets of functions").subcommand_required(true).subcommand(
        Command::new("set")
            .about("Create or change a secret in a state directory; running functions see the new value")
            .arg(Arg::new("NAME").required(true).help("Name of the secret"))
            .arg(
                Arg::new("from-file")
                    .long("from-file")
                    .value_name("FILE")
                    .value_parser(clap::value_parser!(PathBuf))
                    .help("File with the value; default: standard input, without its last line break"),
            )
            .arg(
                Arg::new("namespace")
                    .long("namespace")
                    .value_name("NAME")
                    .help("Namespace of the functions that use it [default: openfaas-fn]"),
            )
            .args(state_dir),
    )
}

fn flags(role: Role) -> impl Iterator<Item = Arg> {
    SETTINGS.iter().filter(move |setting| setting.roles.contains(&role)).map(flag)
}

fn flag(setting: &'static Setting) -> Arg {
    let flag = Arg::new(setting.name)
        .long(setting.name.replace('_', "-"))
        .value_name(setting.value_kind)
        .allow_hyphen_values(true)
        .help_heading(setting.group)
        .hide_short_help(!help::is_common(setting))
        .help(help::short(setting))
        .long_help(help::long(setting));
    match implied_value(setting) {
        // Any other value needs an equals sign, or the next argument would be taken for it.
        Some(value) => flag.num_args(0..=1).require_equals(true).default_missing_value(value),
        None => flag,
    }
}

/// Returns the value of a flag that is given without one, if that is permitted.
fn implied_value(setting: &Setting) -> Option<&'static str> {
    match (setting.value_kind, setting.name) {
        ("BOOLEAN", _) | (_, "autoscale" | "with_worker") => Some("true"),
        (_, "access_log") => Some("on"),
        _ => None,
    }
}

/// Joins `--flag value` to `--flag=value` for flags that may have no value, if the next argument can only be a value.
fn join_flag_values(args: impl IntoIterator<Item = OsString>) -> impl Iterator<Item = OsString> {
    const VALUES: [&str; 8] = ["true", "false", "1", "0", "auto", "on", "off", "errors"];
    let may_have_no_value = |flag: &OsString| {
        let flag = flag.to_str().and_then(|flag| flag.strip_prefix("--"));
        let name = flag.unwrap_or_default().replace('-', "_");
        SETTINGS.iter().any(|setting| setting.name == name && implied_value(setting).is_some())
    };
    let mut args = args.into_iter().peekable();
    std::iter::from_fn(move || {
        let mut arg = args.next()?;
        let is_value = |next: &OsString| next.to_str().is_some_and(|next| VALUES.contains(&next));
        if may_have_no_value(&arg)
            && let Some(value) = args.next_if(is_value)
        {
            arg.push("=");
            arg.push(value);
        }
        Some(arg)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<CommandLine, clap::Error> {
        CommandLine::parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn the_definition_is_valid() {
        command().debug_assert();
    }

    #[test]
    fn no_command_means_serve() {
        let line = parse("gateway --port 9 --function-namespace x").unwrap();
        assert!(matches!(line.subcommand, Subcommand::Serve));
        assert_eq!(line.flag("port").as_deref(), Some("9"));
        assert_eq!(line.flag("metrics_port"), None);
    }

    #[test]
    fn queue_subcommands_take_files() {
        let Subcommand::QueueSalvage { file, out } =
            parse("gateway queue salvage a b").unwrap().subcommand
        else {
            panic!("not salvage")
        };
        assert_eq!((file, out), (PathBuf::from("a"), PathBuf::from("b")));
        assert!(matches!(
            parse("gateway queue check a").unwrap().subcommand,
            Subcommand::QueueCheck { .. }
        ));
        for line in ["gateway queue", "gateway queue check", "gateway queue salvage a"] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn roles_accept_only_their_own_flags() {
        let line = parse("gateway provider process --provider-port 1").unwrap();
        assert!(matches!(line.subcommand, Subcommand::Provider));
        assert!(parse("gateway provider process --port 1").is_err());
        assert!(parse("gateway provider").is_err());
        let Subcommand::Up { stack, once } =
            parse("gateway up a.yaml --port 1").unwrap().subcommand
        else {
            panic!("not up")
        };
        assert_eq!((stack, once), (Some(PathBuf::from("a.yaml")), false));
        let once = parse("gateway up a.yaml --once").unwrap().subcommand;
        assert!(matches!(once, Subcommand::Up { once: true, .. }));
    }

    #[test]
    fn a_secret_has_a_name_and_is_read_from_a_file_or_standard_input() {
        let line = parse("gateway secret set token --from-file f --state-dir d").unwrap();
        assert_eq!(line.flag("state_dir").as_deref(), Some("d"));
        let Subcommand::SecretSet { name, namespace, from_file } = line.subcommand else {
            panic!("not secret set")
        };
        assert_eq!((name.as_str(), namespace.as_str()), ("token", ""));
        assert_eq!(from_file, Some(PathBuf::from("f")));
        assert!(parse("gateway secret set").is_err() && parse("gateway secret").is_err());
    }

    #[test]
    fn a_flag_that_is_true_or_false_needs_no_value() {
        for (line, expect) in [
            ("gateway up --with-worker a.yaml", "true"),
            ("gateway up --with-worker=false a.yaml", "false"),
            ("gateway up --with-worker false a.yaml", "false"),
            ("gateway up a.yaml --with-worker auto", "auto"),
            ("gateway up a.yaml --with-worker", "true"),
        ] {
            let line = parse(line).unwrap();
            assert_eq!(line.flag("with_worker").as_deref(), Some(expect), "{line:?}");
            let Subcommand::Up { stack, .. } = line.subcommand else { panic!("not up") };
            assert_eq!(stack, Some(PathBuf::from("a.yaml")));
        }
        let line = parse("gateway --access-log --basic-auth --port 9 --nats-tls").unwrap();
        for (name, expect) in
            [("access_log", "on"), ("basic_auth", "true"), ("port", "9"), ("nats_tls", "true")]
        {
            assert_eq!(line.flag(name).as_deref(), Some(expect), "{name}");
        }
        // Another argument is refused where only a value can follow.
        assert!(parse("gateway --basic-auth perhaps").is_err());
    }

    #[test]
    fn the_script_of_each_shell_has_the_flags() {
        for shell in ["bash", "zsh", "fish"] {
            let line = parse(&format!("gateway completions {shell}")).unwrap();
            let Subcommand::Completions { script } = line.subcommand else {
                panic!("no completions")
            };
            let script = String::from_utf8(script).unwrap();
            assert!(script.contains("with-worker") && script.contains("completions"), "{shell}");
        }
        assert!(parse("gateway completions csh").is_err());
        assert!(parse("gateway completions").is_err());
    }

    #[test]
    fn short_help_has_common_settings_and_long_help_has_groups() {
        let mut command = command();
        let up = command.find_subcommand_mut("up").unwrap();
        let (short, long) = (up.render_help().to_string(), up.render_long_help().to_string());
        assert!(short.lines().count() <= 70, "{short}");
        assert!(short.contains("--port") && !short.contains("--max-idle-conns"), "{short}");
        for text in ["Queued calls:", "Scaling:", "--with-worker[=<CHOICE>]", "Examples:"] {
            assert!(long.contains(text), "{text}: {long}");
        }
        let groups: Vec<&str> = SETTINGS.iter().map(|setting| setting.group).collect();
        assert!(groups.iter().all(|group| !group.is_empty()));
        for name in help::COMMON {
            assert!(SETTINGS.iter().any(|setting| setting.name == *name), "{name}");
        }
    }

    #[test]
    fn help_lists_all_settings_of_its_role_and_no_others() {
        for (name, role) in [("serve", Role::Serve), ("worker", Role::Worker), ("up", Role::Up)] {
            let help = command().find_subcommand_mut(name).unwrap().render_long_help().to_string();
            let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
            for setting in SETTINGS {
                let named = help.contains(&format!("[env: {}]", setting.name));
                assert_eq!(named, setting.roles.contains(&role), "{name}: {}", setting.name);
            }
        }
    }
}
