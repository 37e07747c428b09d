//! Startup: all invalid settings are reported together, with an exit status for each kind of failure. And the
//! healthcheck command.

use std::net::SocketAddr;
use std::process::Output;

use crate::support::gateway::{Builder, Gateway, command};
use crate::support::provider::Provider;
use crate::support::within;

async fn run(arguments: &[&str]) -> Output {
    let output = command().args(arguments).kill_on_drop(true).output();
    within("the process exits", output).await.unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[tokio::test]
async fn all_invalid_settings_are_reported_together() {
    let output = Gateway::builder()
        .var("functions_provider_url", "provider:8080")
        .var("read_timeout", "ten")
        .var("max_calls", "0")
        .var("basic_auth", "perhaps")
        .var("log_format", "xml")
        .var("listen_address", "localhost")
        .run_to_exit(&["--idle-timeout", "-1s"])
        .await;
    let error_text = stderr(&output);
    assert_eq!(output.status.code(), Some(64), "{error_text}");
    for (name, value, expected) in [
        ("functions_provider_url", "provider:8080", "http"),
        ("read_timeout", "ten", "duration"),
        ("max_calls", "0", "from 1"),
        ("basic_auth", "perhaps", "true or false"),
        ("log_format", "xml", "json"),
        ("listen_address", "localhost", "IP address"),
        ("idle_timeout", "-1s", "duration"),
    ] {
        let lines = error_text.lines().filter(|line| line.contains(name)).collect::<Vec<_>>();
        assert_eq!(lines.len(), 1, "{name}: {error_text}");
        assert!(lines[0].contains(&format!("{value:?}")), "{error_text}");
        assert!(lines[0].contains(expected), "{error_text}");
    }
    assert_eq!(error_text.lines().count(), 7, "{error_text}");
}

#[tokio::test]
async fn a_start_without_a_provider_names_the_missing_setting() {
    let output = run(&[]).await;
    let error_text = stderr(&output);
    assert_eq!(output.status.code(), Some(64), "{error_text}");
    assert!(error_text.contains("functions_provider_url is not set"), "{error_text}");
    assert!(error_text.contains("gateway up"), "{error_text}");
    assert_eq!(error_text.lines().count(), 4, "{error_text}");
}

#[tokio::test]
async fn an_invalid_command_line_is_a_usage_error() {
    for arguments in [["--no-such-flag"], ["no-such-role"], ["--port"]] {
        let output = run(&arguments).await;
        assert_eq!(output.status.code(), Some(64), "{arguments:?}: {}", stderr(&output));
        assert!(stderr(&output).contains("--help"), "{}", stderr(&output));
        assert!(output.stdout.is_empty());
    }
}

#[tokio::test]
async fn help_and_version_exit_successfully() {
    for arguments in [["--help"], ["--version"]] {
        let output = run(&arguments).await;
        assert_eq!(output.status.code(), Some(0), "{arguments:?}");
        assert!(output.stderr.is_empty());
        assert!(String::from_utf8(output.stdout).unwrap().contains("gateway"));
    }
}

#[tokio::test]
async fn an_unknown_log_level_is_refused() {
    let provider = Provider::builder().start();
    for level in ["loud", "info,loud", "gateway=loud", "gateway", "info,,debug", "="] {
        let output =
            Gateway::builder().provider(&provider).var("log_level", level).run_to_exit(&[]).await;
        let error_text = stderr(&output);
        assert_eq!(output.status.code(), Some(64), "{level}: {error_text}");
        assert!(
            error_text.contains(&format!("log_level: {level:?} is not error, warn, info")),
            "{error_text}"
        );
    }
    for level in ["off", "INFO", "gateway=debug,info", "access=off,warn"] {
        let builder = Gateway::builder().provider(&provider).var("log_level", level);
        // The port is what is refused.
        let error_text = stderr(&builder.var("port", "x").run_to_exit(&[]).await);
        assert!(
            !error_text.contains("log_level") && error_text.contains("port"),
            "{level}: {error_text}"
        );
    }
}

#[tokio::test]
async fn a_misspelled_setting_is_reported() {
    let provider = Provider::builder().start();
    let gateway = Gateway::builder()
        .provider(&provider)
        .var("upstream_timeot", "secret")
        .var("PORTS", "1")
        .var("UPSTREAM_TIMEOUT", "1s");
    let gateway = gateway.start().await;
    gateway.wait_for_log("variable upstream_timeot is not a setting").await;
    let warnings: Vec<_> =
        gateway.log().into_iter().filter(|line| line.contains("is not a setting")).collect();
    assert!(warnings.len() == 1 && warnings[0].contains("upstream_timeout"), "{warnings:?}");
    assert!(!warnings[0].contains("secret"), "{warnings:?}");
}

#[tokio::test]
async fn completions_are_printed_for_each_shell() {
    for (shell, has) in
        [("bash", "complete -F"), ("zsh", "#compdef gateway"), ("fish", "complete -c gateway")]
    {
        let output = run(&["completions", shell]).await;
        let script = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(0), "{shell}");
        assert!(script.contains(has) && script.contains("with-worker"), "{shell}");
    }
}

/// Starts a second process on the port of the first, which `setting` selected.
async fn assert_port_refused(role: &[&str], builder: Builder, setting: &str, used: SocketAddr) {
    let builder = builder.var(setting, used.port()).var("log_level", "error");
    let output = builder.run_to_exit(role).await;
    let error_text = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{error_text}");
    assert_eq!(error_text.lines().count(), 1, "{error_text}");
    let expect = format!("cannot listen on {used}: set {setting} to a port that is free");
    assert!(error_text.contains(&expect), "{error_text}");
}

#[tokio::test]
async fn a_port_in_use_is_reported_with_its_setting() {
    let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let used = other.local_addr().unwrap();
    let (state, provider) = (tempfile::tempdir().unwrap(), Provider::manual());
    let in_state = || Gateway::builder().var("state_dir", state.path().display());
    for setting in ["port", "metrics_port"] {
        assert_port_refused(&[], Gateway::builder().provider(&provider), setting, used).await;
        assert_port_refused(&["up"], in_state().var("provider_port", "0"), setting, used).await;
    }
    assert_port_refused(&["up"], in_state(), "provider_port", used).await;
    assert_port_refused(&["provider", "process"], in_state(), "provider_port", used).await;
    let worker = Gateway::worker().var("faas_nats_address", "127.0.0.1");
    assert_port_refused(&["worker"], worker, "worker_metrics_port", used).await;
}

#[tokio::test]
async fn an_unavailable_congestion_control_stops_the_start() {
    let provider = Provider::replying("hello");
    let builder = || Gateway::builder().provider(&provider);
    let gateway = builder().var("tcp_congestion_control", "reno").start().await;
    assert_eq!(gateway.get("/function/echo").await.text(), "hello");
    let output = builder().var("tcp_congestion_control", "none-such").run_to_exit(&[]).await;
    let error_text = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{error_text}");
    assert!(
        error_text.contains("cannot use tcp_congestion_control=none-such: name one"),
        "{error_text}"
    );
}

#[tokio::test]
async fn two_gateways_never_share_a_port() {
    let provider = Provider::manual();
    let first = Gateway::in_front_of(&provider).await;
    assert_port_refused(&[], Gateway::builder().provider(&provider), "port", first.address).await;
    assert_eq!(first.get("/_/healthz").await.status(), 200);
}

#[tokio::test]
async fn a_gateway_can_restart_on_its_port() {
    let provider = Provider::replying("hello");
    let first = Gateway::in_front_of(&provider).await;
    let port = first.address.port();
    let mut client = first.connect().await;
    assert_eq!(client.get("/function/echo").await.text(), "hello");
    // The gateway closes first, so its side of the connection is in TIME_WAIT.
    assert!(first.terminate().await.success());
    let second = Gateway::builder().provider(&provider).var("port", port).start().await;
    assert_eq!(second.get("/function/echo").await.text(), "hello");
}

#[tokio::test]
async fn the_healthcheck_exits_by_the_status_of_a_url() {
    let provider = Provider::builder()
        .api(|head, _| (head.target() == "/sick").then(|| (500, String::new())))
        .start();
    let gateway = Gateway::in_front_of(&provider).await;
    let probe = async |url: String| {
        let output = run(&["healthcheck", &url]).await;
        (output.status.code(), stderr(&output))
    };
    let (code, error_text) = probe(format!("http://{}/_/healthz", gateway.address)).await;
    assert_eq!((code, error_text.as_str()), (Some(0), ""));
    let (code, error_text) = probe(format!("{}/sick", provider.url())).await;
    assert_eq!((code, error_text.contains("500")), (Some(1), true), "{error_text}");
    let address = gateway.address;
    assert!(gateway.terminate().await.success());
    let (code, error_text) = probe(format!("http://{address}/_/healthz")).await;
    assert_eq!((code, error_text.lines().count()), (Some(1), 1), "{error_text}");
    let (code, error_text) = probe("no url".to_owned()).await;
    assert_eq!((code, error_text.lines().count()), (Some(1), 1), "{error_text}");
}

#[tokio::test]
async fn probes_are_answered_on_the_metrics_port() {
    let provider = Provider::replying("hello");
    let gateway = Gateway::builder().provider(&provider).var("max_connections", "1").start().await;
    let _only = gateway.connect().await;
    let url = format!("http://{}/_/healthz", gateway.metrics_address);
    let probed = run(&["healthcheck", &url]).await;
    assert_eq!(probed.status.code(), Some(0), "{}", stderr(&probed));
}
