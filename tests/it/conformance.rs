//! Plays the recorded conformance suites against the real binary.

use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use crate::support::fake_stan::CLUSTER;
use crate::support::nats::free_port;
use crate::support::nats_streaming;

/// Suites whose every case passes. The last one leaves a list of functions behind in the scripted provider.
const SUITES: [&str; 7] = ["proxy", "system", "auth", "scale", "metrics", "hardening", "async"];

/// The player's ports are always the same, and it may not be allowed to have a network of its own.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Plays `suites` against what `gateway` starts, with `settings`; `least` cases are there at least.
fn play(suites: &[&str], gateway: &str, settings: &[(&str, &str)], only: &str, least: u32) {
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/conformance");
    let mut player = Command::new("python3");
    player.arg(folder.join("conformance")).args(["--gateway", gateway, "--only", only]);
    for (name, value) in settings {
        player.args(["--env", &format!("{name}={value}")]);
    }
    player.args(suites.iter().map(|suite| folder.join(format!("{suite}.json"))));
    let played = player.output().expect("python3 plays the suites");
    let told = String::from_utf8_lossy(&played.stdout);
    println!("{told}{}", String::from_utf8_lossy(&played.stderr));
    assert!(played.status.success());
    // A player that finds no case says so with a success.
    let passed: u32 = told.lines().last().unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!(passed >= least, "only {passed} cases were played");
}

#[test]
fn every_case_of_the_suites_holds() {
    let state = tempfile::tempdir().unwrap();
    let settings = [("queue", "embedded"), ("state_dir", state.path().to_str().unwrap())];
    play(&SUITES, env!("CARGO_BIN_EXE_gateway"), &settings, "", 167);
}

/// Plays the suite of queued calls on the server that `server` starts in the background, which listens on `port`.
///
/// `only`: the cases by a regular expression.
fn play_queued(server: &str, port: u16, settings: &[(&str, &str)], only: &str, least: u32) {
    let state = tempfile::tempdir().unwrap();
    // In the player's network, which may be one of its own. All end when the player is done with the gateway.
    let all = state.path().join("all");
    let script = format!(
        "cd {state} || exit\n\
         {server} &\n\
         until (: > /dev/tcp/127.0.0.1/{port}) 2> /dev/null; do sleep 0.05; done\n\
         {gateway} &\n\
         trap 'kill $(jobs -p)' TERM\n\
         wait\n\
         wait\n",
        state = state.path().display(),
        gateway = env!("CARGO_BIN_EXE_gateway"),
    );
    std::fs::write(&all, script).unwrap();
    let port = port.to_string();
    let address = [("faas_nats_address", "127.0.0.1"), ("faas_nats_port", port.as_str())];
    play(
        &["async"],
        &format!("bash {}", all.display()),
        &[&address, settings].concat(),
        only,
        least,
    );
}

#[test]
fn every_case_of_queued_calls_holds_on_jetstream() {
    let port = free_port();
    let server = format!("nats-server -a 127.0.0.1 -p {port} -js -sd store");
    play_queued(&server, port, &[("queue", "jetstream")], "", 11);
}

#[test]
fn every_case_of_queued_calls_holds_on_nats_streaming() {
    let port = free_port();
    let program = nats_streaming::program();
    let server = format!(
        "{} -a 127.0.0.1 -p {port} -cid {CLUSTER} -store file -dir store",
        program.display()
    );
    let settings = [("queue", "stan"), ("faas_nats_cluster_name", CLUSTER)];
    // `.ci/run` says why `async_get` is not among them.
    play_queued(&server, port, &settings, "^(?!async_get$)", 10);
}
