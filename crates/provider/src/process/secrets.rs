//! Stores secrets as files that only this user may read, with a directory of copies for each function.

use std::path::{Path, PathBuf};
use std::{fs, io};

use crate::process::files;
use gateway_base::function::Function;

/// All secrets below one directory: originals in `store/NAMESPACE/SECRET`, copies in `views/NAMESPACE/FUNCTION/SECRET`.
#[derive(Debug)]
pub(super) struct Secrets {
    pub(super) root: PathBuf,
}

impl Secrets {
    pub(super) fn open(root: PathBuf) -> io::Result<Self> {
        files::create_private_directory(&root)?;
        Ok(Self { root })
    }

    /// Returns namespaces that have or had a secret.
    pub(super) fn namespaces(&self) -> io::Result<Vec<String>> {
        files::file_names(&self.root.join("store"))
    }

    pub(super) fn metadata(&self, namespace: &str, name: &str) -> io::Result<fs::Metadata> {
        fs::metadata(self.namespace_directory(namespace).join(name))
    }

    /// Returns the names of the secrets in `namespace`.
    pub(super) fn names(&self, namespace: &str) -> io::Result<Vec<String>> {
        files::file_names(&self.namespace_directory(namespace))
    }

    pub(super) fn has(&self, namespace: &str, name: &str) -> bool {
        is_secret_name(name) && self.namespace_directory(namespace).join(name).is_file()
    }

    pub(super) fn put(&self, namespace: &str, name: &str, value: &[u8]) -> io::Result<()> {
        files::replace(&self.namespace_directory(namespace).join(name), value)
    }

    pub(super) fn remove(&self, namespace: &str, name: &str) -> io::Result<()> {
        files::remove(&self.namespace_directory(namespace).join(name))
    }

    /// Returns the directory with the secrets of `function`.
    pub(super) fn view(&self, function: &Function) -> PathBuf {
        self.root.join("views").join(&function.namespace).join(&function.name)
    }

    /// Updates the function's directory to contain the secrets in `wanted` that exist.
    ///
    /// The files are copies, since the store is covered by a mount where the function runs. Each is replaced
    /// atomically, so that a running process reads the new value at the same path.
    pub(super) fn refresh_view(&self, function: &Function, wanted: &[String]) -> io::Result<()> {
        let view = self.view(function);
        files::create_private_directory(&view)?;
        for name in files::file_names(&view)? {
            if !(wanted.contains(&name) && self.has(&function.namespace, &name)) {
                files::remove(&view.join(name))?;
            }
        }
        for name in wanted.iter().filter(|name| self.has(&function.namespace, name)) {
            let value = fs::read(self.namespace_directory(&function.namespace).join(name))?;
            let copy = view.join(name);
            if !fs::read(&copy).is_ok_and(|old| old == value) {
                files::replace(&copy, &value)?;
            }
        }
        Ok(())
    }

    pub(super) fn remove_view(&self, function: &Function) -> io::Result<()> {
        match fs::remove_dir_all(self.view(function)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    fn namespace_directory(&self, namespace: &str) -> PathBuf {
        let store: &Path = self.root.as_ref();
        store.join("store").join(namespace)
    }
}

/// Returns whether `name` is valid as a file name, and as a key of a Kubernetes Secret.
pub(super) fn is_secret_name(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    (1..=200).contains(&name.len()) && name.bytes().all(plain) && !name.starts_with('.')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_has_the_current_values_of_the_wanted_secrets_only() {
        let root = tempfile::tempdir().unwrap();
        let secrets = Secrets::open(root.path().join("secrets")).unwrap();
        let function = Function { name: "f".to_owned(), namespace: "ns".to_owned() };
        let wanted = ["a".to_owned(), "b".to_owned(), "missing".to_owned()];
        for (name, value) in [("a", "1"), ("b", "2"), ("c", "3")] {
            secrets.put("ns", name, value.as_bytes()).unwrap();
        }
        let view = secrets.view(&function);
        secrets.refresh_view(&function, &wanted).unwrap();
        assert_eq!(files::file_names(&view).unwrap(), ["a", "b"]);
        secrets.put("ns", "a", b"new").unwrap();
        secrets.remove("ns", "b").unwrap();
        secrets.refresh_view(&function, &wanted).unwrap();
        assert_eq!(files::file_names(&view).unwrap(), ["a"]);
        assert_eq!(fs::read(view.join("a")).unwrap(), b"new");
        assert_eq!(secrets.names("ns").unwrap(), ["a", "c"]);
        secrets.remove_view(&function).unwrap();
        secrets.remove_view(&function).unwrap();
        assert!(!view.exists());
    }

    #[test]
    fn a_name_cannot_escape_the_directory() {
        assert!(is_secret_name("db-password") && is_secret_name("tls.crt"));
        for name in ["", ".", "..", ".hidden", "a/b", "../a", "a\0", "ä"] {
            assert!(!is_secret_name(name), "{name:?}");
        }
    }
}
