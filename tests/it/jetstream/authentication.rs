//! Authentication to the NATS server, and of the NATS server.

use std::path::{Path, PathBuf};

use gateway::queue::Error;
use gateway::queue::jetstream::{Auth, JetStream, Options};

use crate::support::eventually;
use crate::support::jetstream_queue::{Gateway, call, options, succeeded};
use crate::support::nats::Nats;

#[tokio::test]
async fn one_who_is_not_let_in_is_told_so_and_one_who_is_works() {
    let nats = Nats::start_with(&["--user", "u", "--pass", "secret"]);
    let auth = |password: &str| {
        let (user, password) = ("u".to_owned(), password.to_owned());
        Options { auth: Auth::Password { user, password }, ..options(&nats) }
    };
    let it = Gateway::open(auth("secret")).await;
    eventually("the server answers", async || it.queue.status("x").await.is_ok()).await;
    let other = Gateway::open(auth("wrong")).await;
    assert_eq!(other.queue.publish(call("a")).await, Err(Error::Unreachable));
    assert!(!format!("{:?}", auth("secret")).contains("secret"));

    let nats = Nats::start_with(&["--auth", "a-token"]);
    let auth = Auth::Token("a-token".to_owned());
    let it = Gateway::open(Options { auth, ..options(&nats) }).await;
    eventually("the token lets in", async || it.queue.status("x").await.is_ok()).await;
}

#[tokio::test]
async fn a_key_in_a_file_lets_in() {
    // Made for this test.
    const PUBLIC: &str = "UDFY7NKZWTGG7GME2SROYCQLCRBCXT5ZOMK6A4R6FIQLPRWET2IVJZBU";
    const SEED: &str = "SUAAEM52D7C277JUXNPB23SDVGJLKND55UTXOUID3PHJU2TX3ENV2HEAZU";
    let directory = tempfile::TempDir::new().unwrap();
    let (config, seed) = (directory.path().join("nats.conf"), directory.path().join("seed"));
    let users = format!("authorization {{ users = [ {{ nkey: {PUBLIC} }} ] }}");
    std::fs::write(&config, users).unwrap();
    std::fs::write(&seed, format!("{SEED}\n")).unwrap();
    let nats = Nats::start_with(&["-c", config.to_str().unwrap()]);
    let it = Gateway::open(Options { auth: Auth::NkeySeed(seed), ..options(&nats) }).await;
    eventually("the key lets in", async || it.queue.status("x").await.is_ok()).await;
    // What can never be is said at once.
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

/// Keys, certificates and tokens that were made for these tests.
fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/support/nats").join(name)
}

#[tokio::test]
async fn a_credentials_file_lets_in() {
    let nats = Nats::start_with(&["-c", fixture("operator.conf").to_str().unwrap()]);
    let auth = Auth::Credentials(fixture("user.creds"));
    let it = Gateway::open(Options { auth, ..options(&nats) }).await;
    eventually("it lets in", async || it.queue.status("x").await.is_ok()).await;
    it.publish(call("a")).await;
    it.settle(it.take().await, succeeded()).await;
    let other = Gateway::open(options(&nats)).await;
    assert_eq!(other.queue.publish(call("b")).await, Err(Error::Unreachable));
}

#[tokio::test]
async fn a_server_is_believed_by_its_certificate() {
    let [certificate, key] = ["server.pem", "server.key"].map(fixture);
    let (certificate, key) = (certificate.to_str().unwrap(), key.to_str().unwrap());
    let nats = Nats::start_with(&["--tls", "--tlscert", certificate, "--tlskey", key]);
    let servers = |nats: &Nats| vec![nats.url().replace("nats://", "tls://")];
    let over_tls = Options { tls: true, servers: servers(&nats), ..options(&nats) };
    let known = Options { root_ca: Some(fixture("ca.pem")), ..over_tls.clone() };
    let it = Gateway::open(known.clone()).await;
    eventually("it is believed", async || it.queue.status("x").await.is_ok()).await;
    it.publish(call("a")).await;
    it.settle(it.take().await, succeeded()).await;
    // Not by one who does not know who signed it, nor is one without any.
    let stranger = Gateway::open(over_tls).await;
    assert_eq!(stranger.queue.publish(call("b")).await, Err(Error::Unreachable));
    let plain = Nats::start();
    let deceived = Gateway::open(Options { servers: servers(&plain), ..known }).await;
    assert_eq!(deceived.queue.publish(call("b")).await, Err(Error::Unreachable));
}
