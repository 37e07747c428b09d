//! Access to the metrics port: scrapers of the own network, but no web page.

use std::process::Stdio;

use tokio::io::{AsyncBufReadExt, BufReader};

use crate::support::connection::{Connection, Response};
use crate::support::gateway::{Gateway, command};
use crate::support::provider::Provider;
use crate::support::within;

async fn ask(gateway: &Gateway, target: &str, headers: &str) -> Response {
    let request = format!("GET {target} HTTP/1.1\r\n{headers}\r\n\r\n");
    Connection::connect(gateway.metrics_address).await.exchange(request).await
}

#[tokio::test]
async fn a_rebound_host_name_cannot_read_the_metrics() {
    let provider = Provider::replying("hello");
    let gateway = Gateway::in_front_of(&provider).await;
    for host in ["rebind.example.com:8082", "localhost.example.com", "127.0.0.1.example.com"] {
        let response = ask(&gateway, "/metrics", &format!("Host: {host}")).await;
        assert_eq!(response.status(), 403, "{host}");
        assert!(response.text().contains("metrics_hosts"), "{response}");
    }
    let absolute = ask(&gateway, "http://rebind.example.com/metrics", "Host: 127.0.0.1").await;
    assert_eq!(absolute.status(), 403);
    for foreign in ["Origin: http://page.example.com", "Sec-Fetch-Site: cross-site"] {
        let response = ask(&gateway, "/metrics", &format!("Host: 127.0.0.1\r\n{foreign}")).await;
        assert_eq!(response.status(), 403, "{foreign}");
    }
}

#[tokio::test]
async fn scrapers_and_probes_can_read_the_metrics() {
    let provider = Provider::replying("hello");
    let gateway = Gateway::builder()
        .provider(&provider)
        .var("metrics_hosts", "metrics.example.com, *.prod.example.com")
        .start()
        .await;
    for host in [
        "127.0.0.1:8082",
        "[::1]",
        "10.1.2.3:8082",
        "gateway:8082",
        "gateway.openfaas.svc.cluster.local:8082",
        "metrics.example.com:8082",
        "node1.prod.example.com",
    ] {
        assert_eq!(
            ask(&gateway, "/metrics", &format!("Host: {host}")).await.status(),
            200,
            "{host}"
        );
    }
    assert_eq!(ask(&gateway, "/healthz", "Host: check.example.com").await.status(), 200);
    let other = ask(&gateway, "/metrics", "Host: other.example.com").await;
    assert_eq!(other.status(), 403);
}

#[tokio::test]
async fn up_logs_that_it_ignores_the_listen_address() {
    let state = tempfile::TempDir::new().unwrap();
    let mut up = command();
    up.arg("up").env("PATH", "/usr/bin:/bin").env("listen_address", "0.0.0.0");
    up.envs([("port", "0"), ("metrics_port", "0"), ("provider_port", "0")]);
    up.current_dir(state.path()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = up.kill_on_drop(true).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let is_logged = async {
        while let Some(line) = lines.next_line().await.unwrap() {
            if line.contains("listen_address is ignored: gateway up listens on 127.0.0.1 only") {
                return true;
            }
        }
        false
    };
    assert!(within("a warning is logged", is_logged).await);
}
