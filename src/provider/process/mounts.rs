//! Puts a function's secrets where functions look for them, `/var/openfaas/secrets`, in a mount namespace of its own.
//! Whether this machine allows that is found out by doing it.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::process::Command;
use tokio::time::timeout;

use crate::provider::process::command::find_program;
use crate::provider::process::files;

/// Where functions look for their secrets.
pub(super) const SECRETS_DIRECTORY: &str = "/var/openfaas/secrets";

/// Runs in the new namespace. Arguments come by position and are never part of the script: mount(8), the directory
/// with the function's secrets, where they are to be, the directory with everyone's secrets, and then the command.
const SCRIPT: &str = r#"set -e
[ -d "$3" ] || { "$1" -t tmpfs -o mode=0755,size=64k none "${3%/*}"; mkdir "$3"; }
"$1" --bind "$2" "$3"
"$1" -t tmpfs -o mode=0700,size=4k none "$4"
shift 4
exec "$@""#;

/// Arguments of setpriv(1) that take from a command what it would need to undo the mounts, even if it runs as root.
const DROP_PRIVILEGES: [&str; 3] = ["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"];

/// As root the namespace comes with no strings; else it takes a user namespace, in which the function is root in name.
const UNSHARE_FLAGS: [&[&str]; 2] = [&["--mount"], &["--user", "--map-root-user", "--mount"]];

/// How long trying one way may take.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);

/// How to run a command with secrets mounted.
#[derive(Debug)]
pub(super) struct Mounts {
    unshare: PathBuf,
    flags: &'static [&'static str],
    shell: PathBuf,
    mount: PathBuf,
    /// Where it works: a command cannot unmount what covers up everyone's secrets.
    setpriv: Option<PathBuf>,
    /// The directory that holds everyone's secrets, covered up in the namespace.
    secrets_root: PathBuf,
}

impl Mounts {
    /// Tries each way with a secret of its own below `all`; an error tells why none works.
    pub(super) async fn probe(secrets_root: &Path, path: &str) -> anyhow::Result<Self> {
        let program =
            |name| find_program(name, path).with_context(|| format!("{name} is not installed"));
        let (unshare, shell, mount) = (program("unshare")?, program("sh")?, program("mount")?);
        // The place must be there before it can be mounted on. Only root can make it, which is fine: it stays empty.
        let _ = std::fs::create_dir_all(SECRETS_DIRECTORY);
        let view = secrets_root.join(".probe");
        files::replace(&view.join("probe"), b"seen")?;
        let setpriv = find_program("setpriv", path);
        // The safer first.
        let tools = setpriv.map(Some).into_iter().chain([None]);
        let ways = tools.flat_map(|setpriv| UNSHARE_FLAGS.map(|flags| (setpriv.clone(), flags)));
        let mut error = None;
        for (setpriv, flags) in ways {
            let mounts = Self {
                unshare: unshare.clone(),
                flags,
                shell: shell.clone(),
                mount: mount.clone(),
                setpriv,
                secrets_root: secrets_root.to_owned(),
            };
            match mounts.try_once(&view, path).await {
                Ok(()) => return Ok(mounts),
                Err(reason) => error = Some(reason),
            }
        }
        Err(error.unwrap_or_else(|| anyhow::anyhow!("no way to try")))
    }

    /// A command line that runs `words` with the secrets in `view` mounted.
    pub(super) fn wrap(&self, view: &Path, words: &[String]) -> Command {
        let mut command = Command::new(&self.unshare);
        command.args(self.flags).arg(&self.shell).args(["-c", SCRIPT, "sh"]);
        command.arg(&self.mount).arg(view).arg(SECRETS_DIRECTORY).arg(&self.secrets_root);
        if let Some(setpriv) = &self.setpriv {
            command.arg(setpriv).args(DROP_PRIVILEGES).arg("--");
        }
        command.args(words);
        command
    }

    /// Whether a command is kept from undoing the mounts.
    pub(super) fn are_protected(&self) -> bool {
        self.setpriv.is_some()
    }

    async fn try_once(&self, view: &Path, path: &str) -> anyhow::Result<()> {
        let words = ["cat".to_owned(), format!("{SECRETS_DIRECTORY}/probe")];
        let mut command = self.wrap(view, &words);
        command.env_clear().env("PATH", path).stdin(Stdio::null()).kill_on_drop(true);
        let output =
            timeout(PROBE_TIMEOUT, command.output()).await.context("no answer in time")??;
        if !output.status.success() || output.stdout != b"seen" {
            bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    }
}
