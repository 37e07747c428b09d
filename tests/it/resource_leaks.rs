//! Many calls at once, most of which go wrong in some way: in the end everything is accounted for and given back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use tokio::task::JoinSet;

use crate::support::gateway::Gateway;
use crate::support::provider::{Call, Provider};
use crate::support::wire::{Wire, get, post};
use crate::support::{eventually, within};

const LISTED: &str = r#"[{"name":"echo","namespace":"fn","replicas":1,"availableReplicas":1}]"#;
const MOST: usize = 40;

/// Each call goes well or wrong in another way.
async fn misbehave(mut call: Call, number: usize) -> Option<Wire> {
    match number % 7 {
        0 => None,
        1 => {
            call.wire.reset();
            None
        }
        2 => {
            call.wire.try_send("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf").await.ok()?;
            None
        }
        3 => {
            let half = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n";
            call.wire.try_send(half).await.ok()?;
            tokio::time::sleep(Duration::from_millis(20)).await;
            None
        }
        4 => {
            tokio::time::sleep(Duration::from_millis(30)).await;
            call.body().await.ok()?;
            call.wire.try_send("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nlate").await.ok()?;
            Some(call.wire)
        }
        _ => {
            call.body().await.ok()?;
            call.wire.try_send("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfine").await.ok()?;
            // A connection that dies in the pool, or lives on in it.
            number.is_multiple_of(2).then_some(call.wire)
        }
    }
}

/// Calls once, and leaves at one point or another.
async fn call(caller: &mut Wire, number: usize) -> Option<u16> {
    let request = match number % 3 {
        0 => get("/function/echo"),
        1 => post("/function/echo", "body"),
        _ => post("/function/echo.fn/sub", &"long body ".repeat(10_000)),
    };
    match number % 11 {
        0 => {
            caller.try_send(&request[..request.len() / 2]).await.ok()?;
            None
        }
        1 => {
            caller.try_send(request).await.ok()?;
            None
        }
        2 => {
            caller.try_send(request).await.ok()?;
            caller.try_head().await?;
            None
        }
        _ => {
            caller.try_send(request).await.ok()?;
            let head = caller.try_head().await?;
            caller.body(&head).await.ok()?;
            Some(head.status())
        }
    }
}

#[tokio::test]
async fn everything_is_given_back_whatever_goes_wrong() {
    let (number, calm) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let is_calm = Arc::clone(&calm);
    let provider = Provider::builder()
        .lists(LISTED)
        .answering(move |mut call| {
            let (number, calm) = (number.fetch_add(1, SeqCst), is_calm.load(SeqCst));
            async move {
                if calm {
                    call.wire.closed().await;
                    return None;
                }
                misbehave(call, number).await
            }
        })
        .start();
    let gateway = Gateway::builder().provider(&provider).var("max_calls", MOST).start().await;
    gateway.metrics_show("listed", |m| m.text.contains("gateway_service_count{")).await;
    let files = gateway.open_files();
    let address = gateway.address;
    let mut callers = JoinSet::new();
    for seed in 0..60 {
        callers.spawn(async move {
            let mut caller = Wire::connect(address).await;
            let mut well = 0;
            for number in 0..30 {
                match call(&mut caller, seed * 7 + number).await {
                    Some(200) => well += 1,
                    Some(502 | 503) => {}
                    Some(other) => panic!("{other}"),
                    None => caller = Wire::connect(address).await,
                }
            }
            well
        });
    }
    let well: u64 = within("all calls", callers.join_all()).await.iter().sum();
    assert!(well > 0);
    let labels = [("function_name", "echo.fn")];
    gateway
        .metrics_show("all that began has ended", |m| {
            let started = m.get("gateway_function_invocation_started", &labels);
            m.in_flight("echo.fn") == 0.0
                && started == m.get("gateway_function_invocation_total", &labels)
        })
        .await;
    let metrics = gateway.metrics().await;
    let total = |code: &str| metrics.calls("echo.fn", code);
    assert!(total("200") >= well && total("499") > 0 && total("502") > 0, "{}", metrics.text);
    assert_eq!(metrics.calls("unknown", "200"), 0);

    // Every place is free again: so many calls fit at once, and not one more.
    calm.store(true, SeqCst);
    let before = provider.calls();
    let mut held = Vec::new();
    for _ in 0..MOST {
        let mut caller = gateway.connect().await;
        caller.send(post("/function/echo", "")).await;
        held.push(caller);
    }
    eventually("all fit", async || provider.calls() == before + MOST).await;
    assert_eq!(gateway.get("/function/echo").await.status(), 503);
    drop(held);
    // And so is every connection, once idle ones have been looked after.
    eventually("no file is left open", async || gateway.open_files() <= files).await;
}
