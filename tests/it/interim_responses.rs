//! Interim responses (RFC 9110, 15.2): they reach clients of HTTP/1.1 as they come, and never in place, or inside, of
//! another response.

use tokio::net::TcpSocket;

use crate::support::gateway::Gateway;
use crate::support::provider::{Call, Provider};
use crate::support::queue::{patient, queueing};
use crate::support::wire::{Wire, get, post};

const HINTS: &str = "HTTP/1.1 103 Early Hints\r\nLink: </x>; rel=preload\r\nLink: </y>\r\n\r\n";
const FINAL: &str = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nfinal";

/// A client that the kernel keeps little for.
async fn narrow(gateway: &Gateway) -> Wire {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    Wire::new(socket.connect(gateway.address).await.unwrap())
}

/// Reads responses up to the final one; the statuses of those before it.
async fn statuses(client: &mut Wire) -> (Vec<u16>, String) {
    let mut before = Vec::new();
    loop {
        let answer = client.answer().await;
        match answer.status() {
            100..200 => before.push(answer.status()),
            _ => return (before, answer.text().to_owned()),
        }
    }
}

#[tokio::test]
async fn each_arrives_before_the_function_goes_on() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    let mut client = gateway.connect().await;
    for _ in 0..2 {
        client.send(get("/function/hints")).await;
        let mut call = provider.call().await;
        call.wire.send("HTTP/1.1 102 Processing\r\n\r\n").await;
        assert_eq!(client.head().await.start, "HTTP/1.1 102 Processing");
        call.wire.send(HINTS).await;
        let hints = client.head().await;
        assert_eq!(hints.start, "HTTP/1.1 103 Early Hints");
        let links = hints.headers.iter().filter(|(name, _)| name == "link");
        assert_eq!(
            links.map(|(_, v)| v.as_str()).collect::<Vec<_>>(),
            ["</x>; rel=preload", "</y>"]
        );
        call.wire
            .send(
                "HTTP/1.1 199 Almost\r\nConnection: x-hop, keep-alive\r\nX-Hop: 1\r\nKeep-Alive: 5\r\n\
                 Upgrade: h2c\r\nContent-Length: 7\r\nX-Kept: yes\r\n\r\n",
            )
            .await;
        let almost = client.head().await;
        assert_eq!(almost.start, "HTTP/1.1 199 Almost");
        assert_eq!(almost.headers, [("x-kept".to_owned(), "yes".to_owned())]);
        // A part of one is not passed on before the rest is there.
        call.wire.send(&HINTS[..30]).await;
        call.wire.send(&HINTS[30..]).await;
        assert_eq!(client.head().await.status(), 103);
        call.wire.send(FINAL).await;
        let answer = client.answer().await;
        assert_eq!((answer.status(), answer.text()), (200, "final"));
        assert!(answer.header("x-call-id").is_some());
        provider.keep(call);
    }
}

#[tokio::test]
async fn those_that_come_along_with_the_final_response_precede_it() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    let mut client = gateway.connect().await;
    for count in [1, 20] {
        client.send(get("/function/hints")).await;
        let mut call = provider.call().await;
        call.wire.send(format!("{}{FINAL}", HINTS.repeat(count))).await;
        assert_eq!(statuses(&mut client).await, (vec![103; count], "final".to_owned()));
        provider.keep(call);
    }
}

#[tokio::test]
async fn a_client_of_http_1_0_gets_none() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    let mut client = gateway.connect().await;
    client.send("GET /function/hints HTTP/1.0\r\n\r\n").await;
    let mut call = provider.call().await;
    call.wire.send(HINTS).await;
    call.wire.send(FINAL).await;
    assert_eq!(statuses(&mut client).await, (vec![], "final".to_owned()));
}

#[tokio::test]
async fn a_client_is_told_to_continue_once_and_only_if_it_asks() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    for (expect, before) in [("Expect: 100-continue\r\n", vec![100, 103]), ("", vec![103])] {
        let mut client = gateway.connect().await;
        let head = "POST /function/hints HTTP/1.1\r\nHost: g\r\nContent-Length: 5\r\n";
        client.send(format!("{head}{expect}\r\n")).await;
        let mut call = provider.call().await;
        assert_eq!(call.head.header("expect"), None);
        // As a server does that knows nothing of what was asked.
        call.wire.send("HTTP/1.1 100 Continue\r\n\r\n").await;
        call.wire.send(HINTS).await;
        client.send("hello").await;
        assert_eq!(call.body().await.unwrap(), b"hello");
        call.wire.send(FINAL).await;
        assert_eq!(statuses(&mut client).await, (before, "final".to_owned()));
    }
}

#[tokio::test]
async fn they_arrive_while_the_request_is_still_being_sent() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    let mut client = gateway.connect().await;
    client
        .send("POST /function/hints HTTP/1.1\r\nHost: g\r\nContent-Length: 10\r\n\r\nfirst")
        .await;
    let mut call = provider.call().await;
    call.wire.until("first").await;
    call.wire.send(HINTS).await;
    assert_eq!(client.head().await.status(), 103);
    client.send("again").await;
    call.wire.until("again").await;
    call.wire.send(FINAL).await;
    assert_eq!(client.answer().await.text(), "final");
}

#[tokio::test]
async fn they_are_not_written_into_the_response_before() {
    const SIZE: usize = 4 << 20;
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    let mut client = gateway.connect().await;
    client.send([get("/function/large"), get("/function/hints")].concat()).await;
    let mut large = provider.call().await;
    let functions = async {
        large.wire.send(format!("HTTP/1.1 200 OK\r\nContent-Length: {SIZE}\r\n\r\n")).await;
        large.wire.send(vec![b'l'; SIZE]).await;
        // The next call may come on the same connection.
        provider.keep(large);
        let mut hints = provider.call().await;
        hints.wire.send(HINTS.repeat(3)).await;
        hints.wire.send(FINAL).await;
        hints
    };
    let takes = async {
        let answer = client.answer().await;
        assert!(answer.body.len() == SIZE && answer.body.iter().all(|byte| *byte == b'l'));
        statuses(&mut client).await
    };
    let (_hints, taken) = tokio::join!(functions, takes);
    assert_eq!(taken, (vec![103; 3], "final".to_owned()));
}

#[tokio::test]
async fn a_client_that_takes_nothing_holds_nobody_up_and_gets_whole_responses() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    let mut client = narrow(&gateway).await;
    client.send(get("/function/hints")).await;
    let mut call = provider.call().await;
    let pad = "p".repeat(60 << 10);
    for number in 0..15 {
        call.wire
            .send(format!("HTTP/1.1 103 X\r\nX-Number: {number}\r\nX-Pad: {pad}\r\n\r\n"))
            .await;
    }
    call.wire.send(FINAL).await;
    // All of it was read, and the call has ended, before the client takes anything.
    gateway.metrics_show("it has ended", |m| m.text.contains("code=\"200\"")).await;
    let mut last = None;
    loop {
        let answer = client.answer().await;
        if answer.status() == 200 {
            assert_eq!(answer.text(), "final");
            break;
        }
        assert_eq!(answer.header("x-pad"), Some(&*pad));
        let number = answer.header("x-number").unwrap().parse::<u32>().unwrap();
        assert!(last.is_none_or(|last| last < number), "{number} after {last:?}");
        last = Some(number);
    }
    assert!(last.is_some());
    provider.keep(call);
    client.send(get("/function/hints")).await;
    provider.call().await.wire.send(FINAL).await;
    assert_eq!(statuses(&mut client).await, (vec![], "final".to_owned()));
}

#[tokio::test]
async fn too_many_are_a_bad_gateway() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    for (head, count) in [
        (HINTS.to_owned(), 1001),
        (format!("HTTP/1.1 103 X\r\nA: {}\r\n\r\n", "p".repeat(600 << 10)), 2),
    ] {
        let mut client = gateway.connect().await;
        client.send(get("/function/hints")).await;
        let mut call = provider.call().await;
        let flood = tokio::spawn(async move {
            for _ in 0..count {
                if call.wire.try_send(&head).await.is_err() {
                    break;
                }
            }
            call
        });
        let mut answer = client.answer().await;
        while answer.status() < 200 {
            answer = client.answer().await;
        }
        assert_eq!(answer.status(), 502, "{answer}");
        drop(flood.await.unwrap());
    }
}

#[tokio::test]
async fn a_queued_call_has_none() {
    let provider = patient()
        .answering(|mut call: Call| async move {
            call.body().await.unwrap();
            call.wire.send(format!("{HINTS}{FINAL}")).await;
            Some(call.wire)
        })
        .start();
    let state = tempfile::tempdir().unwrap();
    let gateway = queueing(&provider, state.path()).start().await;
    let id = gateway.queued("hints", &[], "hello").await;
    gateway.becomes(&id, "succeeded").await;
    let result = gateway.result(&id).await;
    assert_eq!((result.status(), result.text(), result.header("link")), (200, "final", None));
}

#[tokio::test]
async fn those_to_a_question_of_the_gateways_own_stay_here() {
    let mut provider = Provider::by_hand();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/auth", listener.local_addr().unwrap());
    let gateway = Gateway::builder().provider(&provider).var("auth_proxy_url", url).start().await;
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let mut wire = Wire::new(tcp);
            if wire.try_head().await.is_some() {
                let _ = wire
                    .try_send(format!("{HINTS}HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"))
                    .await;
            }
        }
    });
    let mut client = gateway.connect().await;
    client.send(get("/system/functions")).await;
    assert_eq!(client.answer().await.status(), 200);
    // Nor do they come later.
    client.send(post("/function/hints", "")).await;
    provider.call().await.wire.send(FINAL).await;
    assert_eq!(statuses(&mut client).await, (vec![], "final".to_owned()));
}
