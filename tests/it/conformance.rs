//! Plays the recorded conformance suites against the real binary.

use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use crate::support::nats::free_port;

/// Suites whose every case passes. The last one leaves a list of functions behind in the scripted provider.
const SUITES: [&str; 7] = ["proxy", "system", "auth", "scale", "metrics", "hardening", "async"];

/// The player's ports are always the same, and it may not be allowed to have a network of its own.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Plays `suites` against what `gateway` starts, with `settings`; `least` cases are there at least.
fn play(suites: &[&str], gateway: &str, settings: &[(&str, &str)], least: u32) {
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/conformance");
    let mut player = Command::new("python3");
    player.arg(folder.join("conformance")).args(["--gateway", gateway]);
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
    play(&SUITES, env!("CARGO_BIN_EXE_gateway"), &settings, 167);
}

#[test]
fn every_case_of_queued_calls_holds_on_jetstream() {
    let (state, port) = (tempfile::tempdir().unwrap(), free_port().to_string());
    // In the player's network, which may be one of its own. Both end when the player is done with the gateway.
    let both = state.path().join("both");
    let script = format!(
        "nats-server -a 127.0.0.1 -p {port} -js -sd {state} &\n\
         until (: > /dev/tcp/127.0.0.1/{port}) 2> /dev/null; do sleep 0.05; done\n\
         {gateway} &\n\
         trap 'kill $(jobs -p)' TERM\n\
         wait\n\
         wait\n",
        state = state.path().display(),
        gateway = env!("CARGO_BIN_EXE_gateway"),
    );
    std::fs::write(&both, script).unwrap();
    let settings = [
        ("queue", "jetstream"),
        ("faas_nats_address", "127.0.0.1"),
        ("faas_nats_port", port.as_str()),
    ];
    play(&["async"], &format!("bash {}", both.display()), &settings, 11);
}
