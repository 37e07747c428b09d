//! The command line: roles, flags and `--help`, all made from the table of settings. No I/O.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Arg, ArgMatches, Command};

use crate::config::settings::{Role, SETTINGS, Setting};

/// What the command line asks for; settings given as flags are in `flags`.
#[derive(Debug)]
pub enum Asked {
    Serve,
    Worker,
    Provider,
    Up {
        stack: Option<PathBuf>,
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
        let matches = command().try_get_matches_from(args)?;
        Ok(match matches.subcommand() {
            None => Self { asked: Asked::Serve, matches },
            Some(("serve", sub)) => Self { asked: Asked::Serve, matches: sub.clone() },
            Some(("worker", sub)) => Self { asked: Asked::Worker, matches: sub.clone() },
            Some(("up", sub)) => Self {
                asked: Asked::Up { stack: sub.get_one::<PathBuf>("STACK").cloned() },
                matches: sub.clone(),
            },
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

fn command() -> Command {
    Command::new("gateway")
        .version(env!("CARGO_PKG_VERSION"))
        .about("An API gateway for functions. Without a command it serves.")
        .after_help(
            "Every setting can be given as a flag or as the environment variable that its line names; the flag \
             wins. Durations are Go's (1m30s, 700ms) or whole seconds.",
        )
        .args_conflicts_with_subcommands(true)
        .args(flags(Role::Serve))
        .subcommand(
            Command::new("serve").about("Serve calls, in front of a provider").args(flags(Role::Serve)),
        )
        .subcommand(
            Command::new("worker")
                .about("Make queued calls, in a process of its own beside gateways that take them in")
                .args(flags(Role::Worker)),
        )
        .subcommand(
            Command::new("up")
                .about("Gateway and provider in one process, on loopback, with the functions of a stack file")
                .arg(
                    Arg::new("STACK")
                        .value_parser(clap::value_parser!(PathBuf))
                        .help("An OpenFaaS stack file (YAML), whose functions are deployed"),
                )
                .args(flags(Role::Up)),
        )
        .subcommand(
            Command::new("provider")
                .about("Run functions, behind the provider API")
                .subcommand_required(true)
                .subcommand(
                    Command::new("process")
                        .about("Functions as local processes")
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

fn flags(role: Role) -> impl Iterator<Item = Arg> {
    SETTINGS.iter().filter(move |setting| setting.roles.contains(&role)).map(flag)
}

fn flag(setting: &'static Setting) -> Arg {
    let mut help = format!("{} [variable: {}]", setting.about, setting.name);
    if !setting.default.is_empty() {
        help.push_str(&format!(" [default: {}]", setting.default));
    }
    Arg::new(setting.name)
        .long(setting.name.replace('_', "-"))
        .value_name(setting.value)
        .allow_hyphen_values(true)
        .help(help)
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
        let Asked::Up { stack } = parse("gateway up a.yaml --port 1").unwrap().asked else {
            panic!("not up")
        };
        assert_eq!(stack, Some(PathBuf::from("a.yaml")));
    }

    #[test]
    fn help_names_every_setting_of_its_role() {
        for (name, role) in [("serve", Role::Serve), ("worker", Role::Worker), ("up", Role::Up)] {
            let help = command().find_subcommand_mut(name).unwrap().render_help().to_string();
            let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
            for setting in SETTINGS {
                let named = help.contains(&format!("[variable: {}]", setting.name));
                assert_eq!(named, setting.roles.contains(&role), "{name}: {}", setting.name);
            }
        }
    }
}
