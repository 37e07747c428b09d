//! Headers that follow a body.

use crate::support::gateway::Gateway;
use crate::support::provider::Provider;

#[tokio::test]
async fn those_of_a_request_reach_the_function() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    let mut caller = gateway.connect().await;
    caller
        .send(
            "POST /function/sum HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\
             Trailer: X-Checksum\r\n\r\n4\r\ndata\r\n0\r\nX-Checksum: 42\r\n\
             Content-Length: 9\r\nX-Forwarded-For: 127.0.0.1\r\nHost: else.where\r\n\r\n",
        )
        .await;
    let mut call = provider.call().await;
    assert_eq!(call.wire.chunk().await.unwrap(), b"data");
    assert_eq!(call.wire.chunk().await.unwrap(), b"");
    assert_eq!(call.wire.trailers().await.unwrap(), ["x-checksum: 42"]);
    call.wire.send("HTTP/1.1 204 X\r\n\r\n").await;
    assert_eq!(caller.answer().await.status(), 204);
}

#[tokio::test]
async fn the_request_behind_them_may_have_many_headers() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    let mut caller = gateway.connect().await;
    let many: String = (0..150).map(|number| format!("X-Many-{number}: 1\r\n")).collect();
    let requests = [
        "POST /function/sum HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n\
         4\r\ndata\r\n0\r\nX-Checksum: 42\r\n\r\n"
            .to_owned(),
        format!("GET /function/sum HTTP/1.1\r\nHost: g\r\n{many}\r\n"),
    ];
    for request in requests {
        caller.send(request).await;
        let mut call = provider.call().await;
        call.body().await.unwrap();
        call.wire.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
        assert_eq!(caller.answer().await.status(), 200);
    }
}

#[tokio::test]
async fn those_of_an_answer_reach_a_caller_who_takes_them() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    for (te, expect) in [("TE: trailers\r\n", vec!["x-checksum: 42"]), ("", vec![])] {
        let mut caller = gateway.connect().await;
        caller.send(format!("GET /function/sum HTTP/1.1\r\nHost: g\r\n{te}\r\n")).await;
        let mut call = provider.call().await;
        call.wire
            .send(
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Checksum\r\n\r\n\
                 4\r\ndata\r\n0\r\nX-Checksum: 42\r\n\r\n",
            )
            .await;
        assert_eq!(caller.head().await.status(), 200);
        assert_eq!(caller.chunk().await.unwrap(), b"data");
        assert_eq!(caller.chunk().await.unwrap(), b"");
        assert_eq!(caller.trailers().await.unwrap(), expect);
    }
}
