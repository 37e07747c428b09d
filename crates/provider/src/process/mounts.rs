//! Mounts a function's secrets at `/var/openfaas/secrets`, in a separate mount namespace. A probe tests whether this
//! machine allows that.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::process::Command;
use tokio::time::timeout;

use crate::process::command::find_program;
use crate::process::files;

/// Directory where functions read their secrets.
pub(super) const SECRETS_DIRECTORY: &str = "/var/openfaas/secrets";

/// Shell script that runs in the new namespace. Positional arguments, never parts of the script: mount(8), the
/// directory with the function's secrets, the mount point, the directory with the secrets of all functions, and then
/// the command.
const SCRIPT: &str = r#"set -e
[ -d "$3" ] || { "$1" -t tmpfs -o mode=0755,size=64k none "${3%/*}"; mkdir "$3"; }
"$1" --bind "$2" "$3"
"$1" -t tmpfs -o mode=0700,size=4k none "$4"
shift 4
exec "$@""#;

/// Arguments of setpriv(1) that drop the privileges for undoing the mounts, even for root.
const DROP_PRIVILEGES: [&str; 3] = ["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"];

/// Alternative flags of unshare(1): root needs only a mount namespace; other users need a user namespace as well, in
/// which the function appears to run as root.
const UNSHARE_FLAGS: [&[&str]; 2] = [&["--mount"], &["--user", "--map-root-user", "--mount"]];

/// Limit for one attempt of the probe.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);

/// Runs commands with secrets mounted.
#[derive(Debug)]
pub(super) struct Mounts {
    unshare: PathBuf,
    flags: &'static [&'static str],
    shell: PathBuf,
    mount: PathBuf,
    /// setpriv(1), if it works: the command cannot unmount the cover of the secrets directory.
    setpriv: Option<PathBuf>,
    /// The directory with the secrets of all functions, covered by an empty mount in the namespace.
    secrets_root: PathBuf,
}

impl Mounts {
    /// Tries all variants with a test secret below `secrets_root`; an error has the reason of the last failure.
    pub(super) async fn probe(secrets_root: &Path, path: &str) -> anyhow::Result<Self> {
        let program =
            |name| find_program(name, path).with_context(|| format!("{name} is not installed"));
        let (unshare, shell, mount) = (program("unshare")?, program("sh")?, program("mount")?);
        // The mount point must exist. Only root can create it; errors are ignored, since the script falls back to a
        // tmpfs.
        let _ = std::fs::create_dir_all(SECRETS_DIRECTORY);
        let view = secrets_root.join(".probe");
        files::replace(&view.join("probe"), b"seen")?;
        let setpriv = find_program("setpriv", path);
        // Tries the variants with setpriv first.
        let tools = setpriv.map(Some).into_iter().chain([None]);
        let variants =
            tools.flat_map(|setpriv| UNSHARE_FLAGS.map(|flags| (setpriv.clone(), flags)));
        let mut error = None;
        for (setpriv, flags) in variants {
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
        Err(error.unwrap_or_else(|| anyhow::anyhow!("no variant to try")))
    }

    /// Returns a command that runs `words` with the secrets in `view` mounted.
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

    /// Returns whether a command cannot undo the mounts.
    pub(super) fn are_protected(&self) -> bool {
        self.setpriv.is_some()
    }

    async fn try_once(&self, view: &Path, path: &str) -> anyhow::Result<()> {
        let words = ["cat".to_owned(), format!("{SECRETS_DIRECTORY}/probe")];
        let mut command = self.wrap(view, &words);
        command.env_clear().env("PATH", path).stdin(Stdio::null()).kill_on_drop(true);
        let output = timeout(PROBE_TIMEOUT, command.output()).await.context("timed out")??;
        if !output.status.success() || output.stdout != b"seen" {
            bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    }
}
