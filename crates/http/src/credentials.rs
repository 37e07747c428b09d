//! Credentials from mounted files: verified on incoming requests and added to requests to the provider.

pub mod attempts;
mod credential_set;

use futures_util::future::BoxFuture;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::header::AUTHORIZATION;
use http::{HeaderMap, HeaderValue};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::credentials::credential_set::{BasicCredentials, CredentialSet};

/// Interval at which the files are read.
const REREAD_INTERVAL: Duration = Duration::from_secs(2);
/// A change is applied if the files have the same content after this time. A read during an update may return half of a
/// password, or the user name with the old password.
const CONFIRMATION_DELAY: Duration = Duration::from_millis(200);

/// Why credentials are unavailable.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    #[error("basic_auth: cannot read {0}")]
    Unreadable(PathBuf, #[source] std::io::Error),
    #[error("basic_auth: {0} is empty, or has characters that are not allowed in a header")]
    Unusable(PathBuf),
    #[error("the system has no random numbers to generate the provider's credentials")]
    NoRandomness,
}

/// User and password from `basic-auth-user` and `basic-auth-password`, and the pairs that they replaced.
pub struct Credentials {
    /// `None` if the credentials were generated.
    directory: Option<PathBuf>,
    set: ArcSwap<CredentialSet>,
}

impl Credentials {
    /// Reads the files in `directory`.
    ///
    /// # Errors
    /// A file cannot be read, or is empty or invalid. The process should not start.
    pub fn read(directory: &Path) -> Result<Arc<Self>, CredentialsError> {
        let set = ArcSwap::from_pointee(CredentialSet::new(read_credentials(directory)?));
        Ok(Arc::new(Self { directory: Some(directory.to_owned()), set }))
    }

    /// Generates random credentials. They are valid for the lifetime of the process.
    ///
    /// # Errors
    /// The system has no random numbers.
    pub fn generate() -> Result<Arc<Self>, CredentialsError> {
        let mut password = [0; 32];
        let random = ring::rand::SystemRandom::new();
        ring::rand::SecureRandom::fill(&random, &mut password)
            .map_err(|_| CredentialsError::NoRandomness)?;
        let pair = BasicCredentials::new("gateway", &STANDARD.encode(password));
        let pair = pair.ok_or(CredentialsError::NoRandomness)?;
        Ok(Arc::new(Self { directory: None, set: ArcSwap::from_pointee(CredentialSet::new(pair)) }))
    }

    /// Returns whether `headers` have the current credentials. Constant time for wrong ones of the same length.
    pub fn verify(&self, headers: &HeaderMap) -> bool {
        let Some(given) = headers.get(AUTHORIZATION).and_then(decode_basic) else { return false };
        self.set.load().verify(&given)
    }

    /// Like [`verify`](Self::verify), but also accepts credentials replaced a short time ago: gateways load a change at
    /// a different time than their provider.
    pub fn verify_recent(&self, headers: &HeaderMap) -> bool {
        let Some(given) = headers.get(AUTHORIZATION).and_then(decode_basic) else { return false };
        self.set.load().verify_recent(&given, Instant::now())
    }

    /// Makes the next request to the provider use the current credentials first, even if it has accepted replaced ones.
    pub fn prefer_current(&self) {
        self.update(|set| set.with_accepted(set.current()));
    }

    /// Returns whether the provider accepted only replaced credentials when it was last queried.
    pub fn provider_accepts_replaced_only(&self) -> bool {
        self.set.load().prefers_replaced()
    }

    fn record_accepted(&self, pair: &Arc<BasicCredentials>) {
        self.update(|set| set.with_accepted(pair));
    }

    /// Applies `change` atomically.
    fn update(&self, change: impl Fn(&CredentialSet) -> Option<CredentialSet>) {
        // Most requests change nothing, and must not write to shared memory.
        if change(&self.set.load()).is_some() {
            self.set.rcu(|set| change(set).map_or_else(|| Arc::clone(set), Arc::new));
        }
    }

    /// Applies changes of the files until `stopping`. `reloads` triggers an immediate read.
    pub fn watch_files(
        self: Arc<Self>,
        stopping: CancellationToken,
        mut reloads: watch::Receiver<u64>,
    ) -> BoxFuture<'static, ()> {
        Box::pin(async move {
            let Some(directory) = &self.directory else { return };
            let (mut was_readable, mut candidate) = (true, None);
            loop {
                let pause = if candidate.is_some() { CONFIRMATION_DELAY } else { REREAD_INTERVAL };
                // All branches are cancel-safe. A reload does not shorten the confirmation delay.
                tokio::select! {
                    () = stopping.cancelled() => return,
                    Ok(()) = reloads.changed(), if candidate.is_none() => {}
                    () = tokio::time::sleep(pause) => {}
                }
                self.update(|set| set.without_expired(Instant::now()));
                match read_credentials(directory) {
                    Ok(pair) if pair == **self.set.load().current() => {
                        (was_readable, candidate) = (true, None);
                    }
                    Ok(pair) if candidate.as_ref() == Some(&pair) => {
                        (was_readable, candidate) = (true, None);
                        self.replace(pair);
                    }
                    Ok(pair) => candidate = Some(pair),
                    Err(error) => {
                        candidate = None;
                        if std::mem::take(&mut was_readable) {
                            let error = &error as &dyn std::error::Error;
                            tracing::warn!(
                                error,
                                "Cannot read the credentials; the previous ones stay in use"
                            );
                        }
                    }
                }
            }
        })
    }

    fn replace(&self, pair: BasicCredentials) {
        let (pair, now) = (Arc::new(pair), Instant::now());
        self.set.rcu(|set| Arc::new(set.with_current(&pair, now)));
        tracing::info!("Credentials changed");
    }
}

fn read_credentials(directory: &Path) -> Result<BasicCredentials, CredentialsError> {
    let read_file = |name: &str| {
        let path = directory.join(name);
        match std::fs::read_to_string(&path) {
            Ok(text) if text.trim().is_empty() => Err(CredentialsError::Unusable(path)),
            Ok(text) => Ok(text.trim().to_owned()),
            Err(error) => Err(CredentialsError::Unreadable(path, error)),
        }
    };
    BasicCredentials::new(&read_file("basic-auth-user")?, &read_file("basic-auth-password")?)
        .ok_or_else(|| CredentialsError::Unusable(directory.to_owned()))
}

/// Decodes a basic `Authorization` to `user:password`.
fn decode_basic(value: &HeaderValue) -> Option<Vec<u8>> {
    let (scheme, encoded) = value.to_str().ok()?.trim().split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    STANDARD.decode(encoded.trim()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn credentials() -> Credentials {
        let set = CredentialSet::new(BasicCredentials::new("admin", "s3cret").unwrap());
        Credentials { directory: None, set: ArcSwap::from_pointee(set) }
    }

    #[track_caller]
    fn check(authorization: &str, expect: bool) {
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, HeaderValue::from_str(authorization).unwrap());
        assert_eq!(credentials().verify(&headers), expect, "{authorization:?}");
    }

    #[test]
    fn generated_credentials_are_distinct() {
        let [one, other] = [Credentials::generate().unwrap(), Credentials::generate().unwrap()];
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, one.set.load().current().header().clone());
        assert!(one.verify(&headers) && !other.verify(&headers));
        assert!(!format!("{headers:?}").contains("Basic"), "{headers:?}");
    }

    #[test]
    fn only_the_right_credentials_are_accepted() {
        let good = STANDARD.encode("admin:s3cret");
        check(&format!("Basic {good}"), true);
        check(&format!("basic  {good} "), true);
        check(&format!("Bearer {good}"), false);
        check(&format!("Basic {}", STANDARD.encode("admin:s3cre")), false);
        check(&format!("Basic {}", STANDARD.encode("admin:s3cret:")), false);
        check(&format!("Basic {}", STANDARD.encode("")), false);
        check("Basic !!!", false);
        check("Basic", false);
        check("", false);
        assert!(!credentials().verify(&HeaderMap::new()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_partially_written_password_is_not_applied() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(directory.path().join(name), text);
        write("basic-auth-user", "admin").unwrap();
        write("basic-auth-password", "old").unwrap();
        let credentials = Credentials::read(directory.path()).unwrap();
        let accepts = |password: &str| {
            let header = BasicCredentials::new("admin", password).unwrap().header().clone();
            credentials.verify(&HeaderMap::from_iter([(AUTHORIZATION, header)]))
        };
        let (_reload, reloads) = watch::channel(0);
        let stopping = CancellationToken::new();
        let following = Arc::clone(&credentials).watch_files(stopping.clone(), reloads);
        let changes = async {
            tokio::time::sleep(REREAD_INTERVAL / 2).await;
            write("basic-auth-password", "ne").unwrap();
            tokio::time::sleep(REREAD_INTERVAL / 2 + CONFIRMATION_DELAY / 2).await;
            // The incomplete password has been read by now.
            write("basic-auth-password", "new").unwrap();
            tokio::time::sleep(CONFIRMATION_DELAY).await;
            assert_eq!(["old", "ne", "new"].map(accepts), [true, false, false]);
            tokio::time::sleep(CONFIRMATION_DELAY).await;
            assert_eq!(["old", "ne", "new"].map(accepts), [false, false, true]);
            stopping.cancel();
        };
        tokio::join!(following, changes);
    }
}
