//! The start of the process: settings that cannot be used are all named at once, in words, with a status for each
//! kind of failure. And the probe that asks whether it went well.

use std::net::SocketAddr;
use std::process::Output;

use crate::support::gateway::{Builder, Gateway, command};
use crate::support::provider::Provider;
use crate::support::within;

async fn run(arguments: &[&str]) -> Output {
    let output = command().args(arguments).kill_on_drop(true).output();
    within("a run that ends", output).await.unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[tokio::test]
async fn every_mistake_is_named_in_one_start() {
    let output = Gateway::builder()
        .var("functions_provider_url", "provider:8080")
        .var("read_timeout", "ten")
        .var("max_calls", "0")
        .var("basic_auth", "perhaps")
        .var("log_format", "xml")
        .var("listen_address", "localhost")
        .output(&["--idle-timeout", "-1s"])
        .await;
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(64), "{said}");
    for (name, value, expected) in [
        ("functions_provider_url", "provider:8080", "http"),
        ("read_timeout", "ten", "duration"),
        ("max_calls", "0", "from 1"),
        ("basic_auth", "perhaps", "true or false"),
        ("log_format", "xml", "json"),
        ("listen_address", "localhost", "IP address"),
        ("idle_timeout", "-1s", "duration"),
    ] {
        let lines = said.lines().filter(|line| line.contains(name)).collect::<Vec<_>>();
        assert_eq!(lines.len(), 1, "{name}: {said}");
        assert!(lines[0].contains(&format!("{value:?}")), "{said}");
        assert!(lines[0].contains(expected), "{said}");
    }
    assert_eq!(said.lines().count(), 7, "{said}");
}

#[tokio::test]
async fn a_start_without_a_provider_says_what_is_missing() {
    let output = run(&[]).await;
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(64), "{said}");
    assert!(said.contains("functions_provider_url is not set"), "{said}");
    assert!(said.contains("gateway up"), "{said}");
    assert_eq!(said.lines().count(), 4, "{said}");
}

#[tokio::test]
async fn a_command_line_that_cannot_be_read_is_a_usage_error() {
    for arguments in [["--no-such-flag"], ["no-such-role"], ["--port"]] {
        let output = run(&arguments).await;
        assert_eq!(output.status.code(), Some(64), "{arguments:?}: {}", stderr(&output));
        assert!(stderr(&output).contains("--help"), "{}", stderr(&output));
        assert!(output.stdout.is_empty());
    }
}

#[tokio::test]
async fn help_and_version_are_no_failures() {
    for arguments in [["--help"], ["--version"]] {
        let output = run(&arguments).await;
        assert_eq!(output.status.code(), Some(0), "{arguments:?}");
        assert!(output.stderr.is_empty());
        assert!(String::from_utf8(output.stdout).unwrap().contains("gateway"));
    }
}

#[tokio::test]
async fn a_level_that_does_not_exist_is_refused() {
    let provider = Provider::builder().start();
    for level in ["loud", "info,loud", "gateway=loud", "gateway", "info,,debug", "="] {
        let output =
            Gateway::builder().provider(&provider).var("log_level", level).output(&[]).await;
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(64), "{level}: {said}");
        assert!(said.contains(&format!("log_level: {level:?} is not error, warn, info")), "{said}");
    }
    for level in ["off", "INFO", "gateway=debug,info", "access=off,warn"] {
        let builder = Gateway::builder().provider(&provider).var("log_level", level);
        // It is the port that is refused.
        let said = stderr(&builder.var("port", "x").output(&[]).await);
        assert!(!said.contains("log_level") && said.contains("port"), "{level}: {said}");
    }
}

#[tokio::test]
async fn a_variable_that_is_nearly_a_setting_is_told_of() {
    let provider = Provider::builder().start();
    let gateway = Gateway::builder()
        .provider(&provider)
        .var("upstream_timeot", "secret")
        .var("PORTS", "1")
        .var("UPSTREAM_TIMEOUT", "1s");
    let gateway = gateway.start().await;
    gateway.logs("variable upstream_timeot is no setting").await;
    let told: Vec<_> =
        gateway.log().into_iter().filter(|it| it.contains("is no setting")).collect();
    assert!(told.len() == 1 && told[0].contains("upstream_timeout"), "{told:?}");
    assert!(!told[0].contains("secret"), "{told:?}");
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

/// A second process on the port of the first, which `setting` chose.
async fn is_refused(role: &[&str], builder: Builder, setting: &str, taken: SocketAddr) {
    let builder = builder.var(setting, taken.port()).var("log_level", "error");
    let output = builder.output(role).await;
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    let expect = format!("cannot listen on {taken}: set {setting} to a port that is free");
    assert!(said.contains(&expect), "{said}");
}

#[tokio::test]
async fn a_port_that_another_process_has_is_named_with_the_setting_that_chose_it() {
    let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = other.local_addr().unwrap();
    let (state, provider) = (tempfile::tempdir().unwrap(), Provider::by_hand());
    let in_state = || Gateway::builder().var("state_dir", state.path().display());
    for setting in ["port", "metrics_port"] {
        is_refused(&[], Gateway::builder().provider(&provider), setting, taken).await;
        is_refused(&["up"], in_state().var("provider_port", "0"), setting, taken).await;
    }
    is_refused(&["up"], in_state(), "provider_port", taken).await;
    is_refused(&["provider", "process"], in_state(), "provider_port", taken).await;
    let worker = Gateway::worker().var("faas_nats_address", "127.0.0.1");
    is_refused(&["worker"], worker, "worker_metrics_port", taken).await;
}

#[tokio::test]
async fn callers_are_sent_to_in_the_way_that_was_chosen_or_not_at_all() {
    let provider = Provider::saying("hello");
    let builder = || Gateway::builder().provider(&provider);
    let gateway = builder().var("tcp_congestion_control", "reno").start().await;
    assert_eq!(gateway.get("/function/echo").await.text(), "hello");
    let output = builder().var("tcp_congestion_control", "none-such").output(&[]).await;
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("cannot use tcp_congestion_control=none-such: name one"), "{said}");
}

#[tokio::test]
async fn two_gateways_never_share_a_port() {
    let provider = Provider::by_hand();
    let first = Gateway::before(&provider).await;
    is_refused(&[], Gateway::builder().provider(&provider), "port", first.address).await;
    assert_eq!(first.get("/_/healthz").await.status(), 200);
}

#[tokio::test]
async fn a_gateway_can_be_started_again_on_the_port_it_had() {
    let provider = Provider::saying("hello");
    let first = Gateway::before(&provider).await;
    let port = first.address.port();
    let mut caller = first.connect().await;
    assert_eq!(caller.get("/function/echo").await.text(), "hello");
    // It closes first, so its side of the connection lingers.
    assert!(first.terminate().await.success());
    let second = Gateway::builder().provider(&provider).var("port", port).start().await;
    assert_eq!(second.get("/function/echo").await.text(), "hello");
}

#[tokio::test]
async fn the_probe_says_how_a_url_is() {
    let provider = Provider::builder()
        .api(|head, _| (head.target() == "/sick").then(|| (500, String::new())))
        .start();
    let gateway = Gateway::before(&provider).await;
    let probe = async |url: String| {
        let output = run(&["healthcheck", &url]).await;
        (output.status.code(), stderr(&output))
    };
    let (code, said) = probe(format!("http://{}/_/healthz", gateway.address)).await;
    assert_eq!((code, said.as_str()), (Some(0), ""));
    let (code, said) = probe(format!("{}/sick", provider.url())).await;
    assert_eq!((code, said.contains("500")), (Some(1), true), "{said}");
    let address = gateway.address;
    assert!(gateway.terminate().await.success());
    let (code, said) = probe(format!("http://{address}/_/healthz")).await;
    assert_eq!((code, said.lines().count()), (Some(1), 1), "{said}");
    let (code, said) = probe("no url".to_owned()).await;
    assert_eq!((code, said.lines().count()), (Some(1), 1), "{said}");
}

#[tokio::test]
async fn probes_are_answered_on_the_port_that_callers_cannot_fill() {
    let provider = Provider::saying("hello");
    let gateway = Gateway::builder().provider(&provider).var("max_connections", "1").start().await;
    let _only = gateway.connect().await;
    let url = format!("http://{}/_/healthz", gateway.metrics_address);
    let probed = run(&["healthcheck", &url]).await;
    assert_eq!(probed.status.code(), Some(0), "{}", stderr(&probed));
}
