//! Function metrics: existing functions, under bounded names, whatever names clients send.

use std::fmt::Write as _;

use crate::support::connection::{get, post};
use crate::support::gateway::Gateway;
use crate::support::provider::{Provider, respond_ok};

const LISTED: &str = r#"[
    {"name":"echo","namespace":"fn","image":"i","replicas":3,"availableReplicas":2,"labels":
        {"com.openfaas.scale.min":"2","com.openfaas.scale.type":"capacity","com.openfaas.scale.target":"25"}},
    {"name":"plain","image":"i","replicas":1,"availableReplicas":1,"labels":null}]"#;

#[tokio::test]
async fn made_up_function_names_do_not_grow_the_metrics() {
    const BATCHES: usize = 50;
    const CALLS: usize = 100;
    let provider = Provider::builder()
        .handler(async |mut call| {
            call.respond(404, "").await;
            Some(call.connection)
        })
        .start();
    let gateway = Gateway::in_front_of(&provider).await;
    let before = gateway.metrics().await.len();
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..4 {
        let mut client = gateway.connect().await;
        tasks.spawn(async move {
            for batch in 0..BATCHES {
                let mut requests = String::new();
                for call in 0..CALLS {
                    let target = format!("/function/made-up-{task}-{batch}-{call}.ns{call}");
                    let _ = write!(requests, "{}", get(&target));
                }
                client.send(requests).await;
                for _ in 0..CALLS {
                    assert_eq!(client.read_response().await.status(), 404);
                }
            }
        });
    }
    tasks.join_all().await;
    let all = (4 * BATCHES * CALLS) as u64;
    gateway.wait_for_metric("all calls are counted", |m| m.calls("unknown", "404") == all).await;
    let metrics = gateway.metrics().await;
    assert!(!metrics.text.contains("made-up"));
    let grown = metrics.len() - before;
    assert!(grown <= 20, "{grown} series more");
}

#[tokio::test]
async fn a_function_that_responds_is_registered() {
    let provider = Provider::builder()
        .handler(async |mut call| {
            let status = if call.head.target().ends_with("/missing") { 404 } else { 200 };
            call.respond(status, "").await;
            Some(call.connection)
        })
        .start();
    let gateway = Gateway::in_front_of(&provider).await;
    gateway.get("/function/new/missing").await;
    gateway
        .wait_for_metric("the unknown function is counted", |m| m.calls("unknown", "404") == 1)
        .await;
    gateway.get("/function/new/page").await;
    gateway.wait_for_metric("the function is registered", |m| m.calls("new.fn", "200") == 1).await;
    // On any thread, and in every notation of the name.
    for _ in 0..10 {
        gateway.get("/function/new.fn/missing").await;
    }
    gateway
        .wait_for_metric("the function is still registered", |m| m.calls("new.fn", "404") == 10)
        .await;
    assert_eq!(gateway.metrics().await.calls("unknown", "404"), 1);
}

#[tokio::test]
async fn an_error_of_the_provider_registers_no_function() {
    let provider = Provider::builder()
        .handler(async |mut call| {
            call.read_body().await.ok()?;
            let response =
                "HTTP/1.1 500 X\r\nX-OpenFaaS-Internal: proxy\r\nContent-Length: 0\r\n\r\n";
            call.connection.send(response).await;
            Some(call.connection)
        })
        .start();
    let gateway = Gateway::in_front_of(&provider).await;
    let response = gateway.get("/function/made-up").await;
    assert_eq!((response.status(), response.header("x-openfaas-internal")), (500, Some("proxy")));
    gateway
        .wait_for_metric("the unknown function is counted", |m| m.calls("unknown", "500") == 1)
        .await;
}

#[tokio::test]
async fn functions_of_every_namespace_are_shown() {
    let provider = Provider::builder()
        .api(|head, _| match head.target() {
            "/system/namespaces" => Some((200, r#"["fn","dev"]"#.to_owned())),
            "/system/functions?namespace=dev" => {
                Some((200, r#"[{"name":"echo","replicas":7}]"#.to_owned()))
            }
            "/system/functions?namespace=fn" => {
                Some((200, r#"[{"name":"echo","namespace":"fn","replicas":1}]"#.to_owned()))
            }
            _ => None,
        })
        .start();
    let gateway = Gateway::in_front_of(&provider).await;
    gateway
        .wait_for_metric("both are listed", |m| {
            let count = |name| m.get("gateway_service_count", &[("function_name", name)]);
            (count("echo.fn"), count("echo.dev")) == (Some(1.0), Some(7.0))
        })
        .await;
}

#[tokio::test]
async fn requests_of_the_api_are_counted_under_their_route() {
    let provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    for number in 0..5 {
        gateway.get(&format!("/system/function/made-up-{number}")).await;
        gateway.get(&format!("/system/made-up/{number}")).await;
        gateway.post(&format!("/system/scale-function/made-up-{number}"), "{").await;
    }
    gateway.connect().await.exchange("BREW /system/functions HTTP/1.1\r\nHost: g\r\n\r\n").await;
    gateway.connect().await.exchange(post("/system/info", "")).await;
    let metrics = gateway.metrics().await;
    assert!(!metrics.text.contains("made-up") && !metrics.text.contains("BREW"));
    let count = |method, path, status| {
        let labels = [("method", method), ("path", path), ("status", status)];
        metrics.get("http_requests_total", &labels)
    };
    assert_eq!(count("GET", "/system/function/{name}", "404"), Some(5.0));
    assert_eq!(count("POST", "/system/scale-function/{name}", "400"), Some(5.0));
    let labels = [("path", "/system/function/{name}")];
    assert_eq!(metrics.get("http_request_duration_seconds_count", &labels), Some(5.0));
}

#[tokio::test]
async fn a_call_is_recorded_when_its_response_body_ends() {
    let mut provider = Provider::builder().listing(LISTED).start();
    let gateway = Gateway::in_front_of(&provider).await;
    gateway
        .wait_for_metric("the function is listed", |m| m.text.contains("gateway_service_count{"))
        .await;
    let mut client = gateway.connect().await;
    client.send(get("/function/echo")).await;
    let mut call = provider.next_call().await;
    call.connection
        .send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n")
        .await;
    client.read_until("half").await;
    let metrics = gateway.metrics().await;
    assert_eq!((metrics.in_flight("echo.fn"), metrics.calls("echo.fn", "200")), (1.0, 0));
    let labels = [("function_name", "echo.fn")];
    assert_eq!(metrics.get("gateway_function_invocation_started", &labels), Some(1.0));
    let began = std::time::Instant::now();
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    let paused = began.elapsed().as_secs_f64();
    call.connection.send("0\r\n\r\n").await;
    client.read_until("0\r\n\r\n").await;
    gateway.wait_for_metric("the call has finished", |m| m.calls("echo.fn", "200") == 1).await;
    let metrics = gateway.metrics().await;
    assert_eq!(metrics.in_flight("echo.fn"), 0.0);
    assert!(metrics.get("gateway_functions_seconds_sum", &labels).unwrap() >= paused);
    let fast = [("function_name", "echo.fn"), ("le", "0.25")];
    assert_eq!(metrics.get("gateway_functions_seconds_bucket", &fast), Some(0.0));
}

#[tokio::test]
async fn replica_gauges_show_what_the_provider_reports() {
    let provider =
        Provider::builder().listing(LISTED).handler(|call| respond_ok(call, "hello")).start();
    let gateway = Gateway::in_front_of(&provider).await;
    gateway
        .wait_for_metric("the function is listed", |m| m.text.contains("gateway_service_count{"))
        .await;
    let metrics = gateway.metrics().await;
    let of = |name: &str, function: &str| metrics.get(name, &[("function_name", function)]);
    assert_eq!(of("gateway_service_count", "echo.fn"), Some(3.0));
    assert_eq!(of("gateway_service_ready_count", "echo.fn"), Some(2.0));
    assert_eq!(of("gateway_service_min", "echo.fn"), Some(2.0));
    let target = [("function_name", "echo.fn"), ("scaling_type", "capacity")];
    assert_eq!(metrics.get("gateway_service_target_load", &target), Some(25.0));
    assert_eq!(of("gateway_service_count", "plain.fn"), Some(1.0));
    assert_eq!(of("gateway_service_min", "plain.fn"), Some(1.0));
    let target = [("function_name", "plain.fn"), ("scaling_type", "rps")];
    assert_eq!(metrics.get("gateway_service_target_load", &target), Some(50.0));
    for function in ["echo.fn", "plain.fn"] {
        assert_eq!(of("gateway_function_invocation_inflight", function), Some(0.0));
        assert_eq!(of("gateway_function_invocation_total", function), None);
    }

    provider
        .set_functions(r#"[{"name":"echo","namespace":"fn","replicas":5,"availableReplicas":5}]"#);
    let count = |m: &crate::support::metrics::Metrics, function| {
        m.get("gateway_service_count", &[("function_name", function)])
    };
    gateway.wait_for_metric("the function is scaled", |m| count(m, "echo.fn") == Some(5.0)).await;
    assert_eq!(count(&gateway.metrics().await, "plain.fn"), None);
}
