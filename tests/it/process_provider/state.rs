use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use gateway_base::shutdown::Tasks;
use gateway_provider::process::ProcessProvider;
use gateway_provider::types::FunctionDeployment;
use http::Method;
use serde_json::{Value, json};

use super::support::{Provider, config, is_running, read_pid, wait_until_gone};

/// Passes the state directory to the helper below.
const CHILD: &str = "GATEWAY_TEST_STATE_DIR";

#[tokio::test]
async fn functions_secrets_and_namespaces_survive_a_restart() {
    let provider = Provider::start().await;
    provider.api(Method::POST, "/system/namespace/dev", json!({})).await;
    let secret = json!({ "name": "key", "namespace": "dev", "value": "hush" });
    provider.api(Method::POST, "/system/secrets", secret).await;
    let script = r#"sh -c 'cat "$secrets_path/key"'"#;
    let deployment =
        json!({ "service": "f", "namespace": "dev", "envProcess": script, "secrets": ["key"] });
    provider.api(Method::POST, "/system/functions", deployment).await;
    provider.scale("f.dev", 4).await;
    let before = provider.status("f.dev").await;

    let provider = Provider::start_in(provider.stop().await).await;
    assert_eq!(provider.status("f.dev").await, before);
    assert_eq!(before["replicas"], 4);
    assert_eq!(provider.get("/function/f.dev").await.text(), "hush");
    assert_eq!(provider.get("/system/namespaces").await.json(), json!(["dev", "openfaas-fn"]));
    provider.stop().await;
}

/// The processes cannot be started: the test counts the attempts.
#[tokio::test]
async fn a_function_does_not_exceed_its_replica_limit() {
    let provider = Provider::start().await;
    provider.deploy("f", "cat", json!({})).await;
    provider.scale("f", 1_000_000_000).await;
    let http = json!({ "service": "f", "envProcess": "cat", "envVars": { "mode": "http" } });
    let response = provider.api(Method::PUT, "/system/functions", http).await;
    assert_eq!(response.status.as_u16(), 400, "{}", response.text());
    assert!(response.text().contains("more than the 1000 processes"), "{}", response.text());
    let status = provider.status("f").await;
    assert_eq!((&status["replicas"], &status["envVars"]), (&json!(1_000_000_000), &json!({})));

    let file = provider.path("state/functions/openfaas-fn/f.json");
    let directory = provider.stop().await;
    let mut saved: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    saved["deployment"]["envVars"] = json!({ "mode": "http" });
    saved["deployment"]["envProcess"] = json!("/nowhere");
    std::fs::write(&file, saved.to_string()).unwrap();
    let provider = Provider::start_in(directory).await;
    assert_eq!(provider.status("f").await["replicas"], 1000);
    provider.stop().await;
}

/// No test by itself: the next test runs it in a process that it can kill.
#[tokio::test]
async fn helper_run_a_provider_until_it_is_killed() {
    let Some(root) = std::env::var_os(CHILD).map(PathBuf::from) else { return };
    let tasks = Tasks::default();
    let process = ProcessProvider::open(&config(&root.join("state")), &tasks).await.unwrap();
    let pid = root.join("pid");
    let script = format!("sh -c 'echo $$ > {}; sleep 1000; true'", pid.display());
    let deployment = FunctionDeployment {
        service: "replica".to_owned(),
        env_process: script,
        env_vars: Some([("mode".to_owned(), "http".to_owned())].into()),
        ..FunctionDeployment::default()
    };
    process.deploy(deployment).await.unwrap();
    std::future::pending().await
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[tokio::test]
async fn processes_of_a_killed_provider_are_ended_and_its_state_is_intact() {
    let directory = Arc::new(tempfile::tempdir().unwrap());
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["helper_run_a_provider_until_it_is_killed", "--nocapture"])
        .env(CHILD, directory.path())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let child = Killed(child);
    let pid_file = directory.path().join("pid");
    let orphan = read_pid(&pid_file).await;

    let error =
        ProcessProvider::open(&config(&directory.path().join("state")), &Tasks::default()).await;
    let error = format!("{:#}", error.unwrap_err());
    assert!(error.contains("in use by another provider"), "{error}");

    drop(child);
    assert!(is_running(orphan));
    std::fs::remove_file(&pid_file).unwrap();
    let provider = Provider::start_in(directory).await;
    wait_until_gone(orphan).await;
    assert_eq!(provider.status("replica").await["replicas"], 1);
    let successor = read_pid(&pid_file).await;
    provider.stop().await;
    assert!(!is_running(successor));
}

#[tokio::test]
async fn a_damaged_state_file_stops_the_start_and_is_named() {
    let provider = Provider::start().await;
    provider.deploy("f", "cat", json!({})).await;
    let file = provider.path("state/functions/openfaas-fn/f.json");
    let directory = provider.stop().await;
    std::fs::write(&file, b"{").unwrap();
    let tasks = Tasks::default();
    let error =
        ProcessProvider::open(&config(&directory.path().join("state")), &tasks).await.unwrap_err();
    assert!(format!("{error:#}").contains("openfaas-fn/f.json is damaged"), "{error:#}");
    tasks.stop(Duration::from_secs(5)).await.unwrap();
}
