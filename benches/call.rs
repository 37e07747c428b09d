//! Microbenchmarks of single steps of a call, run by `cargo bench`. They show which step a change affects; the cost of a
//! whole call is measured in comparison with nginx (docs/PERFORMANCE.md).

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use gateway_http::call_id::RequestIds;
use gateway_http::deadlines::ConnectionDeadlines;
use gateway_http::headers::{to_client, to_upstream};
use gateway_http::limit::ConcurrencyLimit;
use gateway_proxy::metrics::calls::Outcome;
use gateway_proxy::metrics::{Metrics, calls::Shard};
use http::header::{ACCEPT, CONNECTION, CONTENT_TYPE, DATE, HOST, SERVER, USER_AGENT};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

const ROUNDS: u32 = 7;
const ROUND_DURATION: Duration = Duration::from_millis(200);

/// Prints the time of `step` without that of `setup`, as the median of `ROUNDS` rounds.
fn time<T>(name: &str, mut setup: impl FnMut() -> T, mut step: impl FnMut(T)) {
    let mut rounds: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let (start, mut spent, mut count) = (Instant::now(), Duration::ZERO, 0_u32);
            while start.elapsed() < ROUND_DURATION {
                let batch: Vec<T> = (0..1000).map(|_| setup()).collect();
                let begin = Instant::now();
                batch.into_iter().for_each(&mut step);
                spent += begin.elapsed();
                count += 1000;
            }
            spent.as_secs_f64() * 1e9 / f64::from(count)
        })
        .collect();
    rounds.sort_unstable_by(f64::total_cmp);
    println!("{name:<44}{:>8.0} ns", rounds[rounds.len() / 2]);
}

fn request() -> HeaderMap {
    HeaderMap::from_iter([
        (HOST, HeaderValue::from_static("gateway.example:8080")),
        (USER_AGENT, HeaderValue::from_static("curl/8.5.0")),
        (ACCEPT, HeaderValue::from_static("*/*")),
        (CONNECTION, HeaderValue::from_static("keep-alive")),
    ])
}

fn response() -> HeaderMap {
    HeaderMap::from_iter([
        (SERVER, HeaderValue::from_static("function")),
        (DATE, HeaderValue::from_static("Mon, 23 Nov 2026 04:00:00 GMT")),
        (CONTENT_TYPE, HeaderValue::from_static("text/plain")),
        (CONNECTION, HeaderValue::from_static("keep-alive")),
    ])
}

/// Returns a thread's shard after calls of `functions` functions.
fn shard(functions: usize) -> Arc<Shard> {
    let metrics = Metrics::new(1, &"openfaas-fn".into()).expect("the metrics are valid");
    let shard = metrics.shard(0);
    for number in 0..functions {
        let mut call = shard.begin(&format!("f{number}"), Instant::now()).expect("a valid name");
        call.confirm(&shard);
        call.set_status(StatusCode::OK);
        call.finish(Outcome::Complete, Instant::now());
    }
    shard
}

fn main() {
    time("request ids", request, |headers| {
        black_box(RequestIds::from_headers(&headers));
    });
    let (host, peer) =
        (HeaderValue::from_static("provider:8081"), HeaderValue::from_static("10.0.0.9"));
    let request_ids = RequestIds::from_headers(&HeaderMap::new());
    time("convert request headers for the upstream", request, |headers| {
        let mut length = 0;
        let put =
            |name: &HeaderName, value: &HeaderValue| length += name.as_str().len() + value.len();
        to_upstream(&headers, &host, &peer, Some(&request_ids), put);
        black_box(length);
    });
    time("convert response headers for the client", response, |mut headers| {
        to_client(&mut headers, false)
    });
    for functions in [1, 5_000] {
        let shard = shard(functions);
        time(&format!("count a call, {functions} registered functions"), Instant::now, |now| {
            let mut call = shard.begin("f0", now).expect("a valid name");
            call.set_status(StatusCode::OK);
            call.finish(Outcome::Complete, now);
        });
    }
    let limit = ConcurrencyLimit::new(10_000, 2);
    let cache = limit.permit_cache(0);
    time("acquire and release a permit", || (), |()| drop(black_box(limit.try_acquire(&cache))));
    let deadlines = ConnectionDeadlines::new();
    time("set the deadlines of a call", Instant::now, |now| {
        deadlines.on_head_started(Duration::from_secs(60));
        deadlines
            .exchange()
            .set_deadline(deadlines.on_exchange_started() + Duration::from_secs(60));
        deadlines.on_exchange_finished(now, Duration::from_secs(60));
    });
}
