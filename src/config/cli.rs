//! The command line: roles, flags and `--help`, all made from the table of settings. No I/O.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Command, ValueHint};
use clap_complete::generate;
use clap_complete::shells::{Bash, Fish, Zsh};

use crate::config::help;
use crate::config::settings::{Role, SETTINGS, Setting};

/// What the command line asks for; settings given as flags are in `flags`.
#[derive(Debug)]
pub enum Asked {
    Serve,
    Worker,
    Provider,
    Up {
        stack: Option<PathBuf>,
        /// The stack file is read at the start alone.
        once: bool,
    },
    /// `gateway secret set NAME`
    SecretSet {
        name: String,
        /// Empty for the default.
        namespace: String,
        /// `None`: the value comes from standard input.
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
    /// `gateway completions SHELL`: the script.
    Completions {
        script: Vec<u8>,
    },
}

/// A parsed command line.
#[derive(Debug)]
pub struct CommandLine {
    pub asked: Asked,
    matches: ArgMatches,
}

impl CommandLine {
    /// Reads `args`, the program's name first. The error renders help, version or a usage line.
    pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Self, clap::Error> {
        let matches = command().try_get_matches_from(joined(args))?;
        Ok(match matches.subcommand() {
            None => Self { asked: Asked::Serve, matches },
            Some(("serve", sub)) => Self { asked: Asked::Serve, matches: sub.clone() },
            Some(("worker", sub)) => Self { asked: Asked::Worker, matches: sub.clone() },
            Some(("up", sub)) => Self {
                asked: Asked::Up {
                    stack: sub.get_one::<PathBuf>("STACK").cloned(),
                    once: sub.get_flag("once"),
                },
                matches: sub.clone(),
            },
            Some(("secret", sub)) => {
                let (_, set) = sub.subcommand().unwrap_or_else(|| unreachable!("required"));
                let text = |name| set.get_one::<String>(name).cloned().unwrap_or_default();
                let asked = Asked::SecretSet {
                    name: text("NAME"),
                    namespace: text("namespace"),
                    from_file: set.get_one::<PathBuf>("from-file").cloned(),
                };
                Self { asked, matches: set.clone() }
            }
            Some(("provider", sub)) => {
                let (_, process) = sub.subcommand().unwrap_or_else(|| unreachable!("required"));
                Self { asked: Asked::Provider, matches: process.clone() }
            }
            Some(("queue", sub)) => {
                let (what, sub) = sub.subcommand().unwrap_or_else(|| unreachable!("required"));
                let path = |name: &str| sub.get_one::<PathBuf>(name).cloned().unwrap_or_default();
                let asked = match what {
                    "check" => Asked::QueueCheck { file: path("FILE") },
                    _ => Asked::QueueSalvage { file: path("FILE"), out: path("OUT") },
                };
                Self { asked, matches: sub.clone() }
            }
            Some(("completions", sub)) => {
                let shell = sub.get_one::<String>("SHELL").map_or("bash", String::as_str);
                Self {
                    asked: Asked::Completions { script: completions(shell) },
                    matches: sub.clone(),
                }
            }
            Some((_, sub)) => Self {
                asked: Asked::Healthcheck {
                    url: sub.get_one::<String>("URL").cloned().unwrap_or_default(),
                },
                matches: sub.clone(),
            },
        })
    }

    /// The value of a setting's flag, by the setting's name.
    pub fn flag(&self, name: &str) -> Option<String> {
        self.matches.try_get_one::<String>(name).ok().flatten().cloned()
    }
}

/// The command line as it can be written.
pub(super) fn command() -> Command {
    Command::new("gateway")
        .version(env!("CARGO_PKG_VERSION"))
        .about("An API gateway for functions. Without a command it serves, in front of a provider.")
        .after_help(help::after(&[
            ("gateway up stack.yaml", "functions of this machine, with everything they need"),
            ("gateway serve --functions-provider-url http://provider:8081", "in front of a provider"),
            ("gateway completions bash", "what bash completes commands and flags with"),
        ]))
        .args_conflicts_with_subcommands(true)
        .args(flags(Role::Serve))
        .subcommand(
            Command::new("serve")
                .about("Serve calls, in front of a provider")
                .after_help(help::after(&[
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
                .about("Execute queued calls, in a process of its own beside gateways that queue them")
                .after_help(help::after(&[
                    ("gateway worker --faas-nats-address nats --max-inflight 100", ""),
                    (
                        "gateway worker --faas-nats-address nats --functions-provider-url http://provider:8081",
                        "without a gateway in between",
                    ),
                ]))
                .args(flags(Role::Worker)),
        )
        .subcommand(
            Command::new("up")
                .about("Gateway and provider in one process, on loopback, with the functions of a stack file")
                .after_help(help::after(&[
                    ("gateway up examples/stack.yaml", ""),
                    ("gateway up stack.yaml --port 9000 --with-worker=false", ""),
                ]))
                .arg(
                    Arg::new("STACK")
                        .value_parser(clap::value_parser!(PathBuf))
                        .value_hint(ValueHint::FilePath)
                        .help("An OpenFaaS stack file (YAML), whose functions are deployed, and changed when it changes"),
                )
                .arg(once())
                .args(flags(Role::Up)),
        )
        .subcommand(secret())
        .subcommand(
            Command::new("provider")
                .about("Run functions, behind the provider API")
                .subcommand_required(true)
                .subcommand(
                    Command::new("process")
                        .about("Functions as local processes")
                        .after_help(help::after(&[(
                            "gateway provider process --state-dir /var/lib/gateway",
                            "",
                        )]))
                        .args(flags(Role::Provider)),
                ),
        )
        .subcommand(queue_command())
        .subcommand(
            Command::new("healthcheck")
                .about("Ask a URL for its health: exit status 0 for 2xx, 1 otherwise")
                .arg(
                    Arg::new("URL")
                        .default_value("http://127.0.0.1:8080/_/healthz")
                        .help("The http URL to ask"),
                ),
        )
        .subcommand(completions_command())
}

fn completions_command() -> Command {
    Command::new("completions")
        .about("Print what a shell completes commands and flags with")
        .after_help(help::after(&[
            ("gateway completions bash > /etc/bash_completion.d/gateway", ""),
            ("gateway completions zsh > /usr/local/share/zsh/site-functions/_gateway", ""),
            ("gateway completions fish > ~/.config/fish/completions/gateway.fish", ""),
        ]))
        .arg(Arg::new("SHELL").required(true).value_parser(["bash", "zsh", "fish"]))
}

/// The script with which `shell` completes commands and flags.
fn completions(shell: &str) -> Vec<u8> {
    let (mut command, mut script) = (command(), Vec::new());
    match shell {
        "zsh" => generate(Zsh, &mut command, "gateway", &mut script),
        "fish" => generate(Fish, &mut command, "gateway", &mut script),
        _ => generate(Bash, &mut command, "gateway", &mut script),
    }
    script
}

/// `gateway queue`: what to do with a queue's file while no gateway uses it.
fn queue_command() -> Command {
    let path = |name: &'static str, help: &'static str| {
        Arg::new(name).required(true).value_parser(clap::value_parser!(PathBuf)).help(help)
    };
    let file = || path("FILE", "The queue's file, queue.redb in the state directory");
    Command::new("queue")
        .about("Check a queue's file, or copy what can be read of a damaged one")
        .subcommand_required(true)
        .subcommand(
            Command::new("check")
                .about("Count what can be read of FILE, which is not changed: exit status 0 if it is sound")
                .arg(file()),
        )
        .subcommand(
            Command::new("salvage")
                .about("Copy what can be read of FILE, which is not changed, to the new file OUT")
                .arg(file())
                .arg(path("OUT", "The new file")),
        )
}

fn once() -> Arg {
    Arg::new("once")
        .long("once")
        .action(ArgAction::SetTrue)
        .help("Read the stack file at the start alone, and do not follow its changes")
}

fn secret() -> Command {
    let state_dir = SETTINGS.iter().filter(|setting| setting.name == "state_dir").map(flag);
    Command::new("secret").about("Secrets of functions").subcommand_required(true).subcommand(
        Command::new("set")
            .about("Create a secret in a state directory, or change it; functions that run see the new value")
            .arg(Arg::new("NAME").required(true).help("The secret's name"))
            .arg(
                Arg::new("from-file")
                    .long("from-file")
                    .value_name("FILE")
                    .value_parser(clap::value_parser!(PathBuf))
                    .help("Where the value is; without it, standard input, whose last line break is left out"),
            )
            .arg(
                Arg::new("namespace")
                    .long("namespace")
                    .value_name("NAME")
                    .help("The namespace of the functions that use it [default: openfaas-fn]"),
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
        .value_name(setting.value)
        .allow_hyphen_values(true)
        .help_heading(setting.group)
        .hide_short_help(!help::is_common(setting))
        .help(help::short(setting))
        .long_help(help::long(setting));
    match alone(setting) {
        // Another value follows an equals sign, or what comes next on the line would be taken for it.
        Some(value) => flag.num_args(0..=1).require_equals(true).default_missing_value(value),
        None => flag,
    }
}

/// What the flag stands for if it has no value.
fn alone(setting: &Setting) -> Option<&'static str> {
    match (setting.value, setting.name) {
        ("BOOLEAN", _) | (_, "autoscale" | "with_worker") => Some("true"),
        (_, "access_log") => Some("on"),
        _ => None,
    }
}

/// `--flag value` made `--flag=value`, for flags that need no value and for what can only be one.
fn joined(args: impl IntoIterator<Item = OsString>) -> impl Iterator<Item = OsString> {
    const VALUES: [&str; 8] = ["true", "false", "1", "0", "auto", "on", "off", "errors"];
    let needs_none = |flag: &OsString| {
        let flag = flag.to_str().and_then(|flag| flag.strip_prefix("--"));
        let name = flag.unwrap_or_default().replace('-', "_");
        SETTINGS.iter().any(|setting| setting.name == name && alone(setting).is_some())
    };
    let mut args = args.into_iter().peekable();
    std::iter::from_fn(move || {
        let mut arg = args.next()?;
        let is_value = |next: &OsString| next.to_str().is_some_and(|next| VALUES.contains(&next));
        if needs_none(&arg)
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
    fn the_command_tree_is_sound() {
        command().debug_assert();
    }

    #[test]
    fn no_command_means_serve() {
        let line = parse("gateway --port 9 --function-namespace x").unwrap();
        assert!(matches!(line.asked, Asked::Serve));
        assert_eq!(line.flag("port").as_deref(), Some("9"));
        assert_eq!(line.flag("metrics_port"), None);
    }

    #[test]
    fn what_is_done_with_a_queues_file_is_asked_by_its_name() {
        let Asked::QueueSalvage { file, out } = parse("gateway queue salvage a b").unwrap().asked
        else {
            panic!("not salvage")
        };
        assert_eq!((file, out), (PathBuf::from("a"), PathBuf::from("b")));
        assert!(matches!(parse("gateway queue check a").unwrap().asked, Asked::QueueCheck { .. }));
        for line in ["gateway queue", "gateway queue check", "gateway queue salvage a"] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn roles_take_their_own_flags_only() {
        let line = parse("gateway provider process --provider-port 1").unwrap();
        assert!(matches!(line.asked, Asked::Provider));
        assert!(parse("gateway provider process --port 1").is_err());
        assert!(parse("gateway provider").is_err());
        let Asked::Up { stack, once } = parse("gateway up a.yaml --port 1").unwrap().asked else {
            panic!("not up")
        };
        assert_eq!((stack, once), (Some(PathBuf::from("a.yaml")), false));
        let once = parse("gateway up a.yaml --once").unwrap().asked;
        assert!(matches!(once, Asked::Up { once: true, .. }));
    }

    #[test]
    fn a_secret_has_a_name_and_comes_from_a_file_or_from_standard_input() {
        let line = parse("gateway secret set token --from-file f --state-dir d").unwrap();
        assert_eq!(line.flag("state_dir").as_deref(), Some("d"));
        let Asked::SecretSet { name, namespace, from_file } = line.asked else { panic!("not it") };
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
            let Asked::Up { stack, .. } = line.asked else { panic!("not up") };
            assert_eq!(stack, Some(PathBuf::from("a.yaml")));
        }
        let line = parse("gateway --access-log --basic-auth --port 9 --nats-tls").unwrap();
        for (name, expect) in
            [("access_log", "on"), ("basic_auth", "true"), ("port", "9"), ("nats_tls", "true")]
        {
            assert_eq!(line.flag(name).as_deref(), Some(expect), "{name}");
        }
        // What is no value of such a flag is refused where nothing else can stand.
        assert!(parse("gateway --basic-auth perhaps").is_err());
    }

    #[test]
    fn each_shell_has_a_script_that_knows_the_flags() {
        for shell in ["bash", "zsh", "fish"] {
            let line = parse(&format!("gateway completions {shell}")).unwrap();
            let Asked::Completions { script } = line.asked else { panic!("no completions") };
            let script = String::from_utf8(script).unwrap();
            assert!(script.contains("with-worker") && script.contains("completions"), "{shell}");
        }
        assert!(parse("gateway completions csh").is_err());
        assert!(parse("gateway completions").is_err());
    }

    #[test]
    fn short_help_has_what_is_set_often_and_long_help_has_groups() {
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
    fn help_names_every_setting_of_its_role() {
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
