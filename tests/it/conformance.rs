//! Plays the recorded conformance suites against the real binary.

use std::path::Path;
use std::process::Command;

/// Suites whose every case passes. The last one leaves a list of functions behind in the scripted provider.
const SUITES: [&str; 7] = ["proxy", "system", "auth", "scale", "metrics", "hardening", "async"];

#[test]
fn every_case_of_the_suites_holds() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/conformance");
    let state = tempfile::tempdir().unwrap();
    let played = Command::new("python3")
        .arg(folder.join("conformance"))
        .args(["--gateway", env!("CARGO_BIN_EXE_gateway")])
        .args(["--env", "queue=embedded"])
        .args(["--env", &format!("state_dir={}", state.path().display())])
        .args(SUITES.map(|suite| folder.join(format!("{suite}.json"))))
        .output()
        .expect("python3 plays the suites");
    let told = String::from_utf8_lossy(&played.stdout);
    println!("{told}{}", String::from_utf8_lossy(&played.stderr));
    assert!(played.status.success());
    // A player that finds no case says so with a success.
    let passed: u32 = told.lines().last().unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!(passed >= 167, "only {passed} cases were played");
}
