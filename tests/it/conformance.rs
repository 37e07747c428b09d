//! Runs the recorded conformance suites against the real binary.

use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use crate::support::fake_stan::CLUSTER;
use crate::support::nats::free_port;
use crate::support::{nats_streaming, report};

/// Suites whose every case passes. The last one leaves a list of functions behind in the scripted provider.
const SUITES: [&str; 7] = ["proxy", "system", "auth", "scale", "metrics", "hardening", "async"];

/// The runner's ports are fixed, and it may not be allowed to create a network namespace.
static SUITE_LOCK: Mutex<()> = Mutex::new(());

/// Runs `suites` against a gateway with `settings`. At least `least` cases must have run.
fn run_suites(suites: &[&str], gateway: &str, settings: &[(&str, &str)], only: &str, least: u32) {
    let _guard = SUITE_LOCK.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/conformance");
    let mut runner = Command::new("python3");
    runner.arg(folder.join("conformance")).args(["--gateway", gateway, "--only", only]);
    for (name, value) in settings {
        runner.args(["--env", &format!("{name}={value}")]);
    }
    runner.args(suites.iter().map(|suite| folder.join(format!("{suite}.json"))));
    let output = runner.output().expect("python3 runs the suites");
    let report_text = String::from_utf8_lossy(&output.stdout);
    println!("{report_text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success());
    // A runner that finds no case exits successfully.
    let passed: u32 =
        report_text.lines().last().unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!(passed >= least, "only {passed} cases were run");
    report(&format!("CONFORMANCE: {passed} cases passed"));
}

#[test]
fn all_conformance_cases_pass() {
    let state = tempfile::tempdir().unwrap();
    let settings = [("queue", "embedded"), ("state_dir", state.path().to_str().unwrap())];
    run_suites(&SUITES, env!("CARGO_BIN_EXE_gateway"), &settings, "", 167);
}

/// Runs the suite of queued calls with the server that `server` starts in the background, which listens on `port`.
/// `only` is a regular expression for the cases.
fn run_async_suite(server: &str, port: u16, settings: &[(&str, &str)], only: &str, least: u32) {
    let state = tempfile::tempdir().unwrap();
    // In the runner's network namespace, if it has one. All processes end when the runner stops the gateway.
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
    run_suites(
        &["async"],
        &format!("bash {}", all.display()),
        &[&address, settings].concat(),
        only,
        least,
    );
}

#[test]
fn all_async_conformance_cases_pass_on_jetstream() {
    let port = free_port();
    let server = format!("nats-server -a 127.0.0.1 -p {port} -js -sd store");
    run_async_suite(&server, port, &[("queue", "jetstream")], "", 11);
}

#[test]
fn all_async_conformance_cases_pass_on_nats_streaming() {
    let port = free_port();
    let program = nats_streaming::program();
    let server = format!(
        "{} -a 127.0.0.1 -p {port} -cid {CLUSTER} -store file -dir store",
        program.display()
    );
    let settings = [("queue", "stan"), ("faas_nats_cluster_name", CLUSTER)];
    // `.ci/run` explains why `async_get` is excluded.
    run_async_suite(&server, port, &settings, "^(?!async_get$)", 10);
}
