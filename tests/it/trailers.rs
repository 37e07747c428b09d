//! Trailers: headers after a body.

use crate::support::gateway::Gateway;
use crate::support::provider::Provider;

#[tokio::test]
async fn request_trailers_reach_the_function() {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    let mut client = gateway.connect().await;
    client
        .send(
            "POST /function/sum HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\
             Trailer: X-Checksum\r\n\r\n4\r\ndata\r\n0\r\nX-Checksum: 42\r\n\
             Content-Length: 9\r\nX-Forwarded-For: 127.0.0.1\r\nHost: else.where\r\n\r\n",
        )
        .await;
    let mut call = provider.next_call().await;
    assert_eq!(call.connection.read_chunk().await.unwrap(), b"data");
    assert_eq!(call.connection.read_chunk().await.unwrap(), b"");
    assert_eq!(call.connection.read_trailers().await.unwrap(), ["x-checksum: 42"]);
    call.connection.send("HTTP/1.1 204 X\r\n\r\n").await;
    assert_eq!(client.read_response().await.status(), 204);
}

#[tokio::test]
async fn a_request_after_trailers_may_have_many_headers() {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    let mut client = gateway.connect().await;
    let many: String = (0..150).map(|number| format!("X-Many-{number}: 1\r\n")).collect();
    let requests = [
        "POST /function/sum HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n\
         4\r\ndata\r\n0\r\nX-Checksum: 42\r\n\r\n"
            .to_owned(),
        format!("GET /function/sum HTTP/1.1\r\nHost: g\r\n{many}\r\n"),
    ];
    for request in requests {
        client.send(request).await;
        let mut call = provider.next_call().await;
        call.read_body().await.unwrap();
        call.connection.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
        assert_eq!(client.read_response().await.status(), 200);
    }
}

#[tokio::test]
async fn response_trailers_reach_a_client_that_accepts_them() {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    for (te, expect) in [("TE: trailers\r\n", vec!["x-checksum: 42"]), ("", vec![])] {
        let mut client = gateway.connect().await;
        client.send(format!("GET /function/sum HTTP/1.1\r\nHost: g\r\n{te}\r\n")).await;
        let mut call = provider.next_call().await;
        call.connection
            .send(
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Checksum\r\n\r\n\
                 4\r\ndata\r\n0\r\nX-Checksum: 42\r\n\r\n",
            )
            .await;
        assert_eq!(client.read_head().await.status(), 200);
        assert_eq!(client.read_chunk().await.unwrap(), b"data");
        assert_eq!(client.read_chunk().await.unwrap(), b"");
        assert_eq!(client.read_trailers().await.unwrap(), expect);
    }
}
