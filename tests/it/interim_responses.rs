//! Interim responses (RFC 9110, 15.2): HTTP/1.1 clients receive them immediately, and never in place of, or inside,
//! another response.

use tokio::net::TcpSocket;

use crate::support::connection::{Connection, get, post};
use crate::support::gateway::Gateway;
use crate::support::provider::{Invocation, Provider};
use crate::support::queue::{fast_retry, with_embedded_queue};

const HINTS: &str = "HTTP/1.1 103 Early Hints\r\nLink: </x>; rel=preload\r\nLink: </y>\r\n\r\n";
const FINAL: &str = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nfinal";

/// A client with a small receive buffer.
async fn connect_with_small_buffer(gateway: &Gateway) -> Connection {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    Connection::new(socket.connect(gateway.address).await.unwrap())
}

/// Reads responses up to the final one. Returns the statuses of the interim ones, and the final body.
async fn statuses(client: &mut Connection) -> (Vec<u16>, String) {
    let mut before = Vec::new();
    loop {
        let response = client.read_response().await;
        match response.status() {
            100..200 => before.push(response.status()),
            _ => return (before, response.text().to_owned()),
        }
    }
}

#[tokio::test]
async fn each_interim_response_is_forwarded_immediately() {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    let mut client = gateway.connect().await;
    for _ in 0..2 {
        client.send(get("/function/hints")).await;
        let mut call = provider.next_call().await;
        call.connection.send("HTTP/1.1 102 Processing\r\n\r\n").await;
        assert_eq!(client.read_head().await.start, "HTTP/1.1 102 Processing");
        call.connection.send(HINTS).await;
        let hints = client.read_head().await;
        assert_eq!(hints.start, "HTTP/1.1 103 Early Hints");
        let links = hints.headers.iter().filter(|(name, _)| name == "link");
        assert_eq!(
            links.map(|(_, v)| v.as_str()).collect::<Vec<_>>(),
            ["</x>; rel=preload", "</y>"]
        );
        call.connection
            .send(
                "HTTP/1.1 199 Almost\r\nConnection: x-hop, keep-alive\r\nX-Hop: 1\r\nKeep-Alive: 5\r\n\
                 Upgrade: h2c\r\nContent-Length: 7\r\nX-Kept: yes\r\n\r\n",
            )
            .await;
        let almost = client.read_head().await;
        assert_eq!(almost.start, "HTTP/1.1 199 Almost");
        assert_eq!(almost.headers, [("x-kept".to_owned(), "yes".to_owned())]);
        // An incomplete interim response is not forwarded.
        call.connection.send(&HINTS[..30]).await;
        call.connection.send(&HINTS[30..]).await;
        assert_eq!(client.read_head().await.status(), 103);
        call.connection.send(FINAL).await;
        let response = client.read_response().await;
        assert_eq!((response.status(), response.text()), (200, "final"));
        assert!(response.header("x-call-id").is_some());
        provider.reuse_connection(call);
    }
}

#[tokio::test]
async fn interim_responses_in_one_write_with_the_final_one_precede_it() {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    let mut client = gateway.connect().await;
    for count in [1, 20] {
        client.send(get("/function/hints")).await;
        let mut call = provider.next_call().await;
        call.connection.send(format!("{}{FINAL}", HINTS.repeat(count))).await;
        assert_eq!(statuses(&mut client).await, (vec![103; count], "final".to_owned()));
        provider.reuse_connection(call);
    }
}

#[tokio::test]
async fn http_1_0_clients_receive_no_interim_responses() {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    let mut client = gateway.connect().await;
    client.send("GET /function/hints HTTP/1.0\r\n\r\n").await;
    let mut call = provider.next_call().await;
    call.connection.send(HINTS).await;
    call.connection.send(FINAL).await;
    assert_eq!(statuses(&mut client).await, (vec![], "final".to_owned()));
}

#[tokio::test]
async fn a_client_receives_100_continue_once_and_only_if_it_expects_it() {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    for (expect, before) in [("Expect: 100-continue\r\n", vec![100, 103]), ("", vec![103])] {
        let mut client = gateway.connect().await;
        let head = "POST /function/hints HTTP/1.1\r\nHost: g\r\nContent-Length: 5\r\n";
        client.send(format!("{head}{expect}\r\n")).await;
        let mut call = provider.next_call().await;
        assert_eq!(call.head.header("expect"), None);
        // Some servers send this without an expectation in the request.
        call.connection.send("HTTP/1.1 100 Continue\r\n\r\n").await;
        call.connection.send(HINTS).await;
        client.send("hello").await;
        assert_eq!(call.read_body().await.unwrap(), b"hello");
        call.connection.send(FINAL).await;
        assert_eq!(statuses(&mut client).await, (before, "final".to_owned()));
    }
}

#[tokio::test]
async fn interim_responses_are_forwarded_while_the_request_is_sent() {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    let mut client = gateway.connect().await;
    client
        .send("POST /function/hints HTTP/1.1\r\nHost: g\r\nContent-Length: 10\r\n\r\nfirst")
        .await;
    let mut call = provider.next_call().await;
    call.connection.read_until("first").await;
    call.connection.send(HINTS).await;
    assert_eq!(client.read_head().await.status(), 103);
    client.send("again").await;
    call.connection.read_until("again").await;
    call.connection.send(FINAL).await;
    assert_eq!(client.read_response().await.text(), "final");
}

#[tokio::test]
async fn interim_responses_do_not_interleave_with_the_previous_response() {
    const SIZE: usize = 4 << 20;
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    let mut client = gateway.connect().await;
    client.send([get("/function/large"), get("/function/hints")].concat()).await;
    let mut large = provider.next_call().await;
    let functions = async {
        large.connection.send(format!("HTTP/1.1 200 OK\r\nContent-Length: {SIZE}\r\n\r\n")).await;
        large.connection.send(vec![b'l'; SIZE]).await;
        // The next call may come on the same connection.
        provider.reuse_connection(large);
        let mut hints = provider.next_call().await;
        hints.connection.send(HINTS.repeat(3)).await;
        hints.connection.send(FINAL).await;
        hints
    };
    let takes = async {
        let response = client.read_response().await;
        assert!(response.body.len() == SIZE && response.body.iter().all(|byte| *byte == b'l'));
        statuses(&mut client).await
    };
    let (_hints, received) = tokio::join!(functions, takes);
    assert_eq!(received, (vec![103; 3], "final".to_owned()));
}

#[tokio::test]
async fn a_client_that_does_not_read_blocks_no_other_and_receives_complete_responses() {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    let mut client = connect_with_small_buffer(&gateway).await;
    client.send(get("/function/hints")).await;
    let mut call = provider.next_call().await;
    let pad = "p".repeat(60 << 10);
    for number in 0..15 {
        call.connection
            .send(format!("HTTP/1.1 103 X\r\nX-Number: {number}\r\nX-Pad: {pad}\r\n\r\n"))
            .await;
    }
    call.connection.send(FINAL).await;
    // The gateway has read the response and finished the call before the client reads anything.
    gateway.wait_for_metric("the call has ended", |m| m.text.contains("code=\"200\"")).await;
    let mut last = None;
    loop {
        let response = client.read_response().await;
        if response.status() == 200 {
            assert_eq!(response.text(), "final");
            break;
        }
        assert_eq!(response.header("x-pad"), Some(&*pad));
        let number = response.header("x-number").unwrap().parse::<u32>().unwrap();
        assert!(last.is_none_or(|last| last < number), "{number} after {last:?}");
        last = Some(number);
    }
    assert!(last.is_some());
    provider.reuse_connection(call);
    client.send(get("/function/hints")).await;
    provider.next_call().await.connection.send(FINAL).await;
    assert_eq!(statuses(&mut client).await, (vec![], "final".to_owned()));
}

#[tokio::test]
async fn too_many_interim_responses_are_a_bad_gateway() {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    for (head, count) in [
        (HINTS.to_owned(), 1001),
        (format!("HTTP/1.1 103 X\r\nA: {}\r\n\r\n", "p".repeat(600 << 10)), 2),
    ] {
        let mut client = gateway.connect().await;
        client.send(get("/function/hints")).await;
        let mut call = provider.next_call().await;
        let flood = tokio::spawn(async move {
            for _ in 0..count {
                if call.connection.try_send(&head).await.is_err() {
                    break;
                }
            }
            call
        });
        let mut response = client.read_response().await;
        while response.status() < 200 {
            response = client.read_response().await;
        }
        assert_eq!(response.status(), 502, "{response}");
        drop(flood.await.unwrap());
    }
}

#[tokio::test]
async fn a_queued_call_ignores_interim_responses() {
    let provider = fast_retry()
        .handler(|mut call: Invocation| async move {
            call.read_body().await.unwrap();
            call.connection.send(format!("{HINTS}{FINAL}")).await;
            Some(call.connection)
        })
        .start();
    let state = tempfile::tempdir().unwrap();
    let gateway = with_embedded_queue(&provider, state.path()).start().await;
    let id = gateway.enqueue("hints", &[], "hello").await;
    gateway.wait_for_state(&id, "succeeded").await;
    let result = gateway.result(&id).await;
    assert_eq!((result.status(), result.text(), result.header("link")), (200, "final", None));
}

#[tokio::test]
async fn interim_responses_to_provider_queries_are_not_forwarded() {
    let mut provider = Provider::manual();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/auth", listener.local_addr().unwrap());
    let gateway = Gateway::builder().provider(&provider).var("auth_proxy_url", url).start().await;
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let mut connection = Connection::new(tcp);
            if connection.try_read_head().await.is_some() {
                let _ = connection
                    .try_send(format!("{HINTS}HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"))
                    .await;
            }
        }
    });
    let mut client = gateway.connect().await;
    client.send(get("/system/functions")).await;
    assert_eq!(client.read_response().await.status(), 200);
    // They do not arrive later either.
    client.send(post("/function/hints", "")).await;
    provider.next_call().await.connection.send(FINAL).await;
    assert_eq!(statuses(&mut client).await, (vec![], "final".to_owned()));
}
