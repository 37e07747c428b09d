//! Authentication to the NATS server, and of the NATS server.

use std::path::{Path, PathBuf};

use gateway_queue::jetstream::{Auth, JetStream, Options};
use gateway_queue::{Error, JobQueue as _, JobStore as _};

use crate::support::eventually;
use crate::support::jetstream_queue::{TestQueue, call, options, succeeded};
use crate::support::nats::Nats;

#[tokio::test]
async fn password_and_token_authentication_work() {
    let nats = Nats::start_with(&["--user", "u", "--pass", "secret"]);
    let auth = |password: &str| {
        let (user, password) = ("u".to_owned(), password.to_owned());
        Options { auth: Auth::Password { user, password }, ..options(&nats) }
    };
    let queue = TestQueue::open(auth("secret")).await;
    eventually("the server responds", async || queue.inner.status("x").await.is_ok()).await;
    let other = TestQueue::open(auth("wrong")).await;
    assert_eq!(other.inner.publish(call("a"), None).await, Err(Error::Unreachable));
    assert!(!format!("{:?}", auth("secret")).contains("secret"));

    let nats = Nats::start_with(&["--auth", "a-token"]);
    let auth = Auth::Token("a-token".to_owned());
    let queue = TestQueue::open(Options { auth, ..options(&nats) }).await;
    eventually("the token is accepted", async || queue.inner.status("x").await.is_ok()).await;
}

#[tokio::test]
async fn nkey_authentication_works() {
    // A key pair for this test only.
    const PUBLIC: &str = "UDFY7NKZWTGG7GME2SROYCQLCRBCXT5ZOMK6A4R6FIQLPRWET2IVJZBU";
    const SEED: &str = "SUAAEM52D7C277JUXNPB23SDVGJLKND55UTXOUID3PHJU2TX3ENV2HEAZU";
    let directory = tempfile::TempDir::new().unwrap();
    let (config, seed) = (directory.path().join("nats.conf"), directory.path().join("seed"));
    let users = format!("authorization {{ users = [ {{ nkey: {PUBLIC} }} ] }}");
    std::fs::write(&config, users).unwrap();
    std::fs::write(&seed, format!("{SEED}\n")).unwrap();
    let nats = Nats::start_with(&["-c", config.to_str().unwrap()]);
    let queue = TestQueue::open(Options { auth: Auth::NkeySeed(seed), ..options(&nats) }).await;
    eventually("the key is accepted", async || queue.inner.status("x").await.is_ok()).await;
    // Permanent errors are reported immediately.
    let none = directory.path().join("none");
    for options in [
        Options { auth: Auth::NkeySeed(none.clone()), ..options(&nats) },
        Options { auth: Auth::Credentials(none.clone()), ..options(&nats) },
        Options { root_ca: Some(none), ..options(&nats) },
        Options { servers: vec!["http://x y".to_owned()], ..options(&nats) },
    ] {
        assert!(JetStream::open(options).await.is_err());
    }
}

/// Path of a key, certificate or token for these tests.
fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/support/nats").join(name)
}

#[tokio::test]
async fn credentials_file_authentication_works() {
    let nats = Nats::start_with(&["-c", fixture("operator.conf").to_str().unwrap()]);
    let auth = Auth::Credentials(fixture("user.creds"));
    let queue = TestQueue::open(Options { auth, ..options(&nats) }).await;
    eventually("the credentials are accepted", async || queue.inner.status("x").await.is_ok())
        .await;
    queue.publish(call("a")).await;
    queue.settle(queue.receive().await, succeeded()).await;
    let other = TestQueue::open(options(&nats)).await;
    assert_eq!(other.inner.publish(call("b"), None).await, Err(Error::Unreachable));
}

#[tokio::test]
async fn a_server_certificate_is_verified() {
    let [certificate, key] = ["server.pem", "server.key"].map(fixture);
    let (certificate, key) = (certificate.to_str().unwrap(), key.to_str().unwrap());
    let nats = Nats::start_with(&["--tls", "--tlscert", certificate, "--tlskey", key]);
    let servers = |nats: &Nats| vec![nats.url().replace("nats://", "tls://")];
    let over_tls = Options { tls: true, servers: servers(&nats), ..options(&nats) };
    let known = Options { root_ca: Some(fixture("ca.pem")), ..over_tls.clone() };
    let queue = TestQueue::open(known.clone()).await;
    eventually("the certificate is accepted", async || queue.inner.status("x").await.is_ok()).await;
    queue.publish(call("a")).await;
    queue.settle(queue.receive().await, succeeded()).await;
    // A client without the CA refuses the server, and a client with it refuses a server without TLS.
    let without_ca = TestQueue::open(over_tls).await;
    assert_eq!(without_ca.inner.publish(call("b"), None).await, Err(Error::Unreachable));
    let plain = Nats::start();
    let deceived = TestQueue::open(Options { servers: servers(&plain), ..known }).await;
    assert_eq!(deceived.inner.publish(call("b"), None).await, Err(Error::Unreachable));
}
