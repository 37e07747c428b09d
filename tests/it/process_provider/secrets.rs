use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use http::{Method, StatusCode};
use serde_json::{Value, json};

use super::support::{Provider, config};
use crate::support::report_skipped;

async fn secret(provider: &Provider, method: Method, body: Value) -> u16 {
    provider.api(method, "/system/secrets", body).await.status.as_u16()
}

#[tokio::test]
async fn secrets_can_be_created_listed_without_values_updated_and_deleted() {
    let provider = Provider::start().await;
    let body = json!({ "name": "key", "value": "hush" });
    assert_eq!(secret(&provider, Method::PUT, body.clone()).await, 404);
    assert_eq!(secret(&provider, Method::POST, body.clone()).await, 201);
    assert_eq!(secret(&provider, Method::POST, body.clone()).await, 409);
    assert_eq!(secret(&provider, Method::PUT, body).await, 202);
    assert_eq!(secret(&provider, Method::POST, json!({ "name": "../x" })).await, 400);
    assert_eq!(secret(&provider, Method::POST, json!({ "value": "x" })).await, 400);
    let raw = json!({ "name": "raw", "rawValue": "not base64" });
    assert_eq!(secret(&provider, Method::POST, raw).await, 400);
    let elsewhere = json!({ "name": "key", "namespace": "dev", "value": "x" });
    assert_eq!(secret(&provider, Method::POST, elsewhere).await, 404);
    let outside = json!({ "name": "lock", "namespace": "../..", "value": "x" });
    for method in [Method::POST, Method::PUT, Method::DELETE] {
        assert_eq!(secret(&provider, method, outside.clone()).await, 404);
    }
    let list = provider.get("/system/secrets?namespace=openfaas-fn").await;
    assert_eq!(list.json(), json!([{ "name": "key", "namespace": "openfaas-fn" }]));
    assert_eq!(secret(&provider, Method::DELETE, json!({ "name": "key" })).await, 202);
    assert_eq!(secret(&provider, Method::DELETE, json!({ "name": "key" })).await, 404);
    assert_eq!(provider.get("/system/secrets").await.json(), json!([]));
    provider.stop().await;
}

#[tokio::test]
async fn a_function_sees_the_current_values_of_its_secrets() {
    let provider = Provider::start().await;
    for (name, value) in [("mine", "one"), ("other", "two")] {
        let body = json!({ "name": name, "value": value });
        assert_eq!(secret(&provider, Method::POST, body).await, 201);
    }
    let script = r#"sh -c 'ls "$secrets_path"; cat "$secrets_path/mine"; [ "$PWD" ]'"#;
    let deployment = json!({ "service": "f", "envProcess": script, "secrets": ["mine"] });
    let response = provider.api(Method::POST, "/system/functions", deployment).await;
    assert_eq!(response.status, StatusCode::ACCEPTED, "{}", response.text());
    let response = provider.get("/function/f").await;
    assert_eq!((response.status.as_u16(), response.text()), (200, "mine\none"));
    let body = json!({ "name": "mine", "rawValue": "dGhyZWU=" });
    assert_eq!(secret(&provider, Method::PUT, body).await, 202);
    assert_eq!(provider.get("/function/f").await.text(), "mine\nthree");

    // The values are in files that only this user can read.
    let store = provider.path("state/secrets/store/openfaas-fn");
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&store), mode(&store.join("mine"))), (0o700, 0o600));
    provider.stop().await;
}

/// The flags of unshare(1) that create a namespace in which mounting works, found without the provider.
fn flags_that_mount() -> Option<&'static [&'static str]> {
    // As the provider does; only root can.
    let _ = std::fs::create_dir_all("/var/openfaas/secrets");
    let ways: [&[&str]; 2] = [&["--mount"], &["--user", "--map-root-user", "--mount"]];
    let mount = ["mount", "-t", "tmpfs", "none", "/var/openfaas"];
    ways.into_iter().find(|flags| succeeds("unshare", &[*flags, &mount].concat()))
}

fn succeeds(program: &str, arguments: &[&str]) -> bool {
    Command::new(program).args(arguments).output().is_ok_and(|output| output.status.success())
}

/// Where mounting is possible, `/var/openfaas/secrets` contains the function's own secrets only. Where setpriv(1) works
/// too, the function cannot unmount it.
#[tokio::test]
async fn with_mounts_a_function_sees_its_own_secrets_only() {
    let flags = flags_that_mount();
    let provider = Provider::start().await;
    for name in ["mine", "other"] {
        let body = json!({ "name": name, "value": format!("value of {name}") });
        assert_eq!(secret(&provider, Method::POST, body).await, 201);
    }
    let store = provider.path("state/secrets/store/openfaas-fn");
    let script = format!("sh -c 'echo $secrets_path; ls {}; ls $secrets_path'", store.display());
    let deployment = json!({ "service": "f", "envProcess": script, "secrets": ["mine"] });
    provider.api(Method::POST, "/system/functions", deployment).await;
    let response = provider.get("/function/f").await;
    let lines: Vec<_> = response.text().lines().collect();
    let Some(flags) = flags else {
        assert!(lines[0].ends_with("state/secrets/views/openfaas-fn/f"), "{lines:?}");
        provider.stop().await;
        return report_skipped("nothing can be mounted in a namespace");
    };
    assert_eq!((lines[0], lines.last()), ("/var/openfaas/secrets", Some(&"mine")));
    assert!(!lines.contains(&"other"), "{lines:?}");
    // The function's mount is not visible outside.
    assert!(!Path::new("/var/openfaas/secrets/mine").exists());

    let setpriv = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", "true"];
    if succeeds("unshare", &[flags, &setpriv].concat()) {
        let all = provider.path("state/secrets").canonicalize().unwrap();
        let (all, store) = (all.display(), store.display());
        let undo = format!("umount {all}; umount -l {all}; cat {store}/other");
        let script = format!(
            "sh -c '({undo}; unshare --user --map-root-user --mount sh -c \"{undo}\") 2>&1; true'"
        );
        let deployment = json!({ "service": "f", "envProcess": script, "secrets": ["mine"] });
        provider.api(Method::PUT, "/system/functions", deployment).await;
        let response = provider.get("/function/f").await;
        assert_eq!(response.status, StatusCode::OK, "{}", response.text());
        assert!(response.text().contains("/other: No such file"), "{}", response.text());
        assert!(!response.text().contains("value of other"), "{}", response.text());
    }
    provider.stop().await;
}

#[tokio::test]
async fn without_mounts_secrets_path_names_the_secrets_directory() {
    let directory = Arc::new(tempfile::tempdir().unwrap());
    let mut config = config(&directory.path().join("state"));
    // With this PATH there is no mount program.
    config.environment = vec![("PATH".to_owned(), "/nowhere".to_owned())];
    let provider = Provider::start_with(directory, config).await;
    let body = json!({ "name": "mine", "value": "one" });
    assert_eq!(secret(&provider, Method::POST, body).await, 201);
    let script = r#"/bin/sh -c 'echo $secrets_path; read x < "$secrets_path/mine" || echo "$x"'"#;
    let deployment = json!({ "service": "f", "envProcess": script, "secrets": ["mine"] });
    let response = provider.api(Method::POST, "/system/functions", deployment).await;
    assert_eq!(response.status, StatusCode::ACCEPTED, "{}", response.text());
    let view = provider.path("state/secrets/views/openfaas-fn/f").canonicalize().unwrap();
    assert_eq!(provider.get("/function/f").await.text(), format!("{}\none\n", view.display()));
    provider.stop().await;
}
