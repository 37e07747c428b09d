use prost::Message as _;

use super::*;
use crate::stan::proto::Publish;

const NOW: UnixMillis = 7;

/// The three jobs that the recorded Go gateway published.
fn recorded() -> Vec<Bytes> {
    let lines = include_str!("../../../../../tests/stan/transcript.jsonl").lines();
    let rows = lines.map(|line| serde_json::from_str::<Value>(line).unwrap());
    let published = rows
        .filter(|row| row["line"].as_str().is_some_and(|line| line.starts_with("PUB _STAN.pub.")));
    published
        .map(|row| STANDARD.decode(row["payload_base64"].as_str().unwrap()).unwrap())
        .map(|message| Publish::decode(message.as_slice()).unwrap().data)
        .collect()
}

fn decoded(message: &[u8]) -> (QueuedCall, Progress) {
    decode(message, "fn", || "fresh".to_owned(), NOW).unwrap()
}

fn header<'a>(call: &'a QueuedCall, name: &str) -> Vec<&'a str> {
    call.headers.get_all(name).iter().map(|value| value.to_str().unwrap()).collect()
}

#[test]
fn a_message_of_the_go_gateway_is_reencoded_identically() {
    let recorded = recorded();
    assert_eq!(recorded.len(), 3);
    for message in recorded {
        assert_eq!(Payload::from_json(&message).unwrap().to_json(), message);
        // This gateway also writes the namespace of the function and the host that the client used.
        let (mut call, progress) = decoded(&message);
        let text = std::str::from_utf8(&message).unwrap();
        if text.contains(r#""Function":"echo""#) {
            assert_eq!(call.function.to_string(), "echo.fn");
            call.function.namespace.clear();
        }
        assert_eq!(header(&call, "x-forwarded-host"), ["127.0.0.1:8080"]);
        let written = encode(&call, &progress);
        let ours = br#""X-Forwarded-Host":["127.0.0.1:8080"],"#;
        let at = written.windows(ours.len()).position(|part| part == ours).unwrap();
        let without = [&written[..at], &written[at + ours.len()..]].concat();
        assert_eq!(String::from_utf8(without).unwrap(), text);
    }
}

#[test]
fn a_call_of_the_go_gateway_is_decoded() {
    let calls: Vec<QueuedCall> = recorded().iter().map(|message| decoded(message).0).collect();
    let [first, second, third] = calls.as_slice() else { panic!("{calls:?}") };
    assert_eq!(first.id, "10a17e36-996d-4dcd-a42f-e6984d2f1364");
    assert_eq!((first.target.as_str(), &first.body[..]), ("/p/q?a=1&b=%20", &b"first job"[..]));
    assert_eq!(header(first, "x-multi"), ["a", "b"]);
    assert_eq!(header(first, "content-length").len(), 0);
    let callback = "http://user:pw@127.0.0.1:8081/function/callback?x=1#frag";
    assert_eq!(first.options.callback.as_deref(), Some(callback));
    assert_eq!(first.options.submitted_at, 1_795_389_260_004);
    assert_eq!(second.function.to_string(), "echo.openfaas-fn");
    assert_eq!((second.target.as_str(), &second.body[..]), ("", &b"\x00\x01\xff\xfe"[..]));
    assert_eq!((third.target.as_str(), third.body.len()), ("/", 0));
    assert_eq!(third.options.callback, None);
}

#[test]
fn additional_headers_are_stored_and_hidden_from_the_function() {
    let (mut call, _) = decoded(&recorded()[0]);
    call.options.expires_at = Some(9);
    call.options.max_attempts = Some(4);
    let progress = Progress { attempts: 2, not_before: Some(8), ..Progress::default() };
    assert_eq!(decoded(&encode(&call, &progress)), (call.clone(), progress));
    // A client cannot set them.
    let mut forged = call.clone();
    forged.options.max_attempts = None;
    forged.headers.insert(ATTEMPTS, HeaderValue::from_static("7"));
    forged.headers.insert(MAX_ATTEMPTS, HeaderValue::from_static("7"));
    let (read, progress) = decoded(&encode(&forged, &Progress::default()));
    assert_eq!((read.options.max_attempts, progress.attempts), (None, 0));
    let reason = Progress { reason: Some("gave up".to_owned()), ..Progress::default() };
    let dead = encode(&call, &reason);
    assert!(String::from_utf8_lossy(&dead).contains(r#""X-Gateway-Reason":["gave up"]"#));
}

#[test]
fn option_headers_of_a_go_gateways_client_are_evaluated_and_hidden_from_the_function() {
    let read = |headers: &str| {
        let message = format!(r#"{{"Function":"f","Header":{{{headers}}}}}"#);
        let (call, progress) = decode(message.as_bytes(), "fn", String::new, 1000).unwrap();
        assert_eq!(call.headers.keys().collect::<Vec<_>>(), [&X_CALL_ID]);
        assert_eq!(progress, Progress::default());
        call.options
    };
    let all = r#""X-Delay-Seconds":["2"],"X-Expires-Seconds":[" 5 "],"X-Max-Attempts":["3"]"#;
    let options = read(all);
    assert_eq!((options.not_before, options.expires_at), (Some(3000), Some(6000)));
    assert_eq!(options.max_attempts, Some(3));
    for invalid in [
        r#""X-Delay-Seconds":["0"],"X-Max-Attempts":["0"]"#,
        r#""X-Delay-Seconds":["-1"],"X-Expires-Seconds":["soon"],"X-Max-Attempts":["1001"]"#,
        r#""X-Delay-Seconds":["31622401"],"X-Expires-Seconds":["18446744073709551615"]"#,
    ] {
        assert_eq!(
            read(invalid),
            CallOptions { submitted_at: 1000, ..CallOptions::default() },
            "{invalid}"
        );
    }
}

#[test]
fn a_path_is_encoded_for_a_request() {
    let target = |path: &str, query: &str| {
        let payload =
            Payload { path: path.to_owned(), query_string: query.to_owned(), ..Payload::default() };
        target(&payload).ok()
    };
    for (path, query, expect) in [
        ("", "", ""),
        ("", "a", "?a"),
        ("/a b/é?#", "x y", "/a%20b/%C3%A9%3F%23?x%20y"),
        ("/a%2Fb//c", "a=%20?", "/a%2Fb//c?a=%20?"),
        ("a", "", "/a"),
    ] {
        assert_eq!(target(path, query).as_deref(), Some(expect));
        assert!(format!("/function/f{expect}").parse::<http::Uri>().is_ok(), "{expect}");
    }
    for path in ["/..", "/a/../b", "/%2e%2E/b", "/a%2f..%5Cb", "/a\\..\\b", "/."] {
        assert_eq!(target(path, ""), None, "{path}");
    }
}

#[test]
fn an_invalid_message_is_rejected() {
    for message in [
        &b""[..],
        b"{}",
        b"\xff",
        br#"{"Function":"a b"}"#,
        br#"{"Function":"../system"}"#,
        br#"{"Function":"f","Body":"!"}"#,
        br#"{"Function":"f","Header":{"a b":["c"]}}"#,
        br#"{"Function":"f","Header":{"a":["b\nc"]}}"#,
        br#"{"Function":"f","Path":"/../x"}"#,
    ] {
        assert!(decode(message, "fn", String::new, NOW).is_err(), "{message:?}");
    }
}

#[test]
fn connection_headers_are_removed() {
    let message = br#"{"Function":"f","Header":{"Connection":["x-a, Upgrade"],"Upgrade":["websocket"],"X-A":["1"],"Transfer-Encoding":["chunked"],"Host":["h"],"X-B":["2"]}}"#;
    let (call, _) = decoded(message);
    let names: Vec<&str> = call.headers.keys().map(HeaderName::as_str).collect();
    assert_eq!((names.as_slice(), call.id.as_str()), (&["x-b", "x-call-id"][..], "fresh"));
}

#[test]
fn headers_and_attempts_of_other_programs_are_limited() {
    let headers = |count: usize| -> String {
        let names: Vec<String> = (0..count).map(|number| format!(r#""h{number}":["1"]"#)).collect();
        format!(r#"{{"Function":"echo","Header":{{{}}}}}"#, names.join(","))
    };
    let decode = |message: &str| decode(message.as_bytes(), "fn", || "fresh".to_owned(), NOW);
    // The call's id is one more.
    assert_eq!(decode(&headers(MAX_HEADERS)).unwrap().0.headers.len(), MAX_HEADERS + 1);
    assert!(matches!(decode(&headers(40_000)), Err(DecodeError::Invalid(_))));
    let often = r#"{"Function":"echo","Header":{"X-Gateway-Attempts":["4294967295"]}}"#;
    assert_eq!(decode(often).unwrap().1.attempts, MAX_STORED_ATTEMPTS);
}
