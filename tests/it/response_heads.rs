//! Responses of functions whose heads or chunks are ambiguous, and responses about the protocol.

use crate::support::connection::{Response, get};
use crate::support::gateway::Gateway;
use crate::support::provider::Provider;

/// The client's response when a function sends `said` and closes.
async fn response_to(sent: &[u8]) -> Response {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    let mut client = gateway.connect().await;
    client.send(get("/function/odd")).await;
    let mut call = provider.next_call().await;
    // A gateway that refuses the response may close before all of it is written.
    let _ = call.connection.try_send(sent).await;
    drop(call);
    client.read_response().await
}

#[tokio::test]
async fn whitespace_before_the_colon_of_a_header_is_removed() {
    let response = response_to(
        b"HTTP/1.1 200 OK\r\nX-A : 1\r\nX-B \t : 2\r\nTransfer-Encoding : chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    )
    .await;
    assert_eq!((response.status(), response.text()), (200, "ok"));
    assert_eq!((response.header("x-a"), response.header("x-b")), (Some("1"), Some("2")));
}

#[tokio::test]
async fn a_control_character_in_the_extension_of_a_chunk_is_a_bad_gateway() {
    for extension in ["a\nb", "a\0b", "a=\"\n\"", "\n0\r\n\r\n"] {
        let sent = format!(
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;{extension}\r\nok\r\n0\r\n\r\n"
        );
        let response = response_to(sent.as_bytes()).await;
        assert_eq!(response.status(), 502, "{extension:?}: {response}");
        assert!(response.text().contains("not valid HTTP"), "{response}");
    }
    let sent =
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;a=\"\tb\" ;c\r\nok\r\n0\r\n\r\n";
    assert_eq!(response_to(sent.as_bytes()).await.text(), "ok");
}

#[tokio::test]
async fn a_head_of_a_mebibyte_is_the_largest() {
    let head = |length: usize| {
        let frame = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-Pad: \r\n\r\n".len();
        let pad = "p".repeat(length - frame);
        format!("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-Pad: {pad}\r\n\r\nok")
    };
    let response = response_to(head(1 << 20).as_bytes()).await;
    assert_eq!((response.status(), response.text()), (200, "ok"));
    for length in [(1 << 20) + 1, (1 << 20) + (100 << 10), 3 << 20] {
        let response = response_to(head(length).as_bytes()).await;
        assert_eq!(response.status(), 502, "{length}");
        assert!(response.text().contains("1 MiB"), "{response}");
    }
}

#[tokio::test]
async fn a_426_names_the_required_protocols() {
    let response = response_to(
        b"HTTP/1.1 426 Upgrade Required\r\nConnection: Upgrade, X-Hop\r\nX-Hop: 1\r\nUpgrade: a/1\r\n\
          Upgrade: b\r\nContent-Length: 4\r\n\r\nthis",
    )
    .await;
    assert_eq!((response.status(), response.text()), (426, "this"));
    let upgrades = response.head.headers.iter().filter(|(name, _)| name == "upgrade");
    assert_eq!(upgrades.map(|(_, value)| value.as_str()).collect::<Vec<_>>(), ["a/1", "b"]);
    assert_eq!(response.header("connection"), Some("upgrade"));
    assert_eq!(response.header("x-hop"), None);
}

#[tokio::test]
async fn other_responses_have_no_upgrade_header() {
    for status in ["200 OK", "400 Bad Request"] {
        let sent = format!(
            "HTTP/1.1 {status}\r\nConnection: Upgrade\r\nUpgrade: a/1\r\nContent-Length: 0\r\n\r\n"
        );
        let response = response_to(sent.as_bytes()).await;
        assert_eq!((response.header("upgrade"), response.header("connection")), (None, None));
    }
}
