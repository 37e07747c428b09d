//! Many concurrent calls that fail in many ways: in the end, every resource is released.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use tokio::task::JoinSet;

use crate::support::connection::{Connection, get, post};
use crate::support::gateway::Gateway;
use crate::support::provider::{Invocation, Provider};
use crate::support::{eventually, within};

const LISTED: &str = r#"[{"name":"echo","namespace":"fn","replicas":1,"availableReplicas":1}]"#;
const MAX_IN_FLIGHT: usize = 40;

/// Each call succeeds or fails in a different way.
async fn misbehave(mut call: Invocation, number: usize) -> Option<Connection> {
    match number % 7 {
        0 => None,
        1 => {
            call.connection.reset();
            None
        }
        2 => {
            call.connection
                .try_send("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
                .await
                .ok()?;
            None
        }
        3 => {
            let half = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n";
            call.connection.try_send(half).await.ok()?;
            tokio::time::sleep(Duration::from_millis(20)).await;
            None
        }
        4 => {
            tokio::time::sleep(Duration::from_millis(30)).await;
            call.read_body().await.ok()?;
            call.connection
                .try_send("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nlate")
                .await
                .ok()?;
            Some(call.connection)
        }
        _ => {
            call.read_body().await.ok()?;
            call.connection
                .try_send("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfine")
                .await
                .ok()?;
            // A connection that dies in the pool, or stays in it.
            number.is_multiple_of(2).then_some(call.connection)
        }
    }
}

/// Sends one call, and disconnects at one point or another.
async fn call(client: &mut Connection, number: usize) -> Option<u16> {
    let request = match number % 3 {
        0 => get("/function/echo"),
        1 => post("/function/echo", "body"),
        _ => post("/function/echo.fn/sub", &"long body ".repeat(10_000)),
    };
    match number % 11 {
        0 => {
            client.try_send(&request[..request.len() / 2]).await.ok()?;
            None
        }
        1 => {
            client.try_send(request).await.ok()?;
            None
        }
        2 => {
            client.try_send(request).await.ok()?;
            client.try_read_head().await?;
            None
        }
        _ => {
            client.try_send(request).await.ok()?;
            let head = client.try_read_head().await?;
            client.read_body(&head).await.ok()?;
            Some(head.status())
        }
    }
}

#[tokio::test]
async fn all_permits_connections_and_memory_are_released_after_failures() {
    let (number, calm) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let is_calm = Arc::clone(&calm);
    let provider = Provider::builder()
        .listing(LISTED)
        .handler(move |mut call| {
            let (number, calm) = (number.fetch_add(1, SeqCst), is_calm.load(SeqCst));
            async move {
                if calm {
                    call.connection.read_to_close().await;
                    return None;
                }
                misbehave(call, number).await
            }
        })
        .start();
    let gateway =
        Gateway::builder().provider(&provider).var("max_calls", MAX_IN_FLIGHT).start().await;
    gateway
        .wait_for_metric("the function is listed", |m| m.text.contains("gateway_service_count{"))
        .await;
    let files = gateway.open_files();
    let address = gateway.address;
    let mut clients = JoinSet::new();
    for seed in 0..60 {
        clients.spawn(async move {
            let mut client = Connection::connect(address).await;
            let mut well = 0;
            for number in 0..30 {
                match call(&mut client, seed * 7 + number).await {
                    Some(200) => well += 1,
                    Some(502 | 503) => {}
                    Some(other) => panic!("{other}"),
                    None => client = Connection::connect(address).await,
                }
            }
            well
        });
    }
    let well: u64 = within("all calls are counted", clients.join_all()).await.iter().sum();
    assert!(well > 0);
    let labels = [("function_name", "echo.fn")];
    gateway
        .wait_for_metric("all calls have ended", |m| {
            let started = m.get("gateway_function_invocation_started", &labels);
            m.in_flight("echo.fn") == 0.0
                && started == m.get("gateway_function_invocation_total", &labels)
        })
        .await;
    let metrics = gateway.metrics().await;
    let total = |code: &str| metrics.calls("echo.fn", code);
    assert!(total("200") >= well && total("499") > 0 && total("502") > 0, "{}", metrics.text);
    assert_eq!(metrics.calls("unknown", "200"), 0);

    // Every permit is free again: exactly the maximum number of calls runs at the same time.
    calm.store(true, SeqCst);
    let before = provider.call_count();
    let mut held = Vec::new();
    for _ in 0..MAX_IN_FLIGHT {
        let mut client = gateway.connect().await;
        client.send(post("/function/echo", "")).await;
        held.push(client);
    }
    eventually("all calls fit", async || provider.call_count() == before + MAX_IN_FLIGHT).await;
    assert_eq!(gateway.get("/function/echo").await.status(), 503);
    drop(held);
    // Every connection is free, too, once the idle ones have been reaped.
    eventually("no file is left open", async || gateway.open_files() <= files).await;
}
