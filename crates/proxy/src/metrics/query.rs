//! Invocation counts of functions, from Prometheus if configured: it has a longer history than this process.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use http::{HeaderMap, Method};
use serde::Deserialize;

use crate::error::Error;
use crate::metrics::Metrics;
use gateway_base::sync::lock_unpoisoned;
use gateway_http::client::{Client, Origin};
use gateway_provider::{build_request, parse_json, send_and_collect};

const QUERY_TARGET: &str =
    "/api/v1/query?query=sum%20by%20(function_name)%20(gateway_function_invocation_total)";
/// Counts are optional, so the list waits only this long for them.
const QUERY_TIMEOUT: Duration = Duration::from_secs(2);
/// Time without queries after a failure: a name that does not resolve can take seconds to fail.
const RETRY_AFTER_FAILURE: Duration = Duration::from_secs(10);

/// Source of invocation counts.
pub struct InvocationCounts {
    prometheus: Option<Origin>,
    /// Time of the last failed query. A leaf.
    failed_at: Mutex<Option<Instant>>,
}

#[derive(Deserialize)]
struct QueryResponse {
    data: Data,
}

#[derive(Deserialize)]
struct Data {
    result: Vec<Sample>,
}

#[derive(Deserialize)]
struct Sample {
    metric: HashMap<String, String>,
    /// Timestamp, and the value as a string.
    value: (f64, String),
}

impl InvocationCounts {
    /// Counts from `prometheus`, or from this process's own metrics if it is `None`.
    pub fn new(prometheus: Option<Origin>) -> Arc<Self> {
        Arc::new(Self { prometheus, failed_at: Mutex::default() })
    }

    /// Returns the counts by `name.namespace`; empty while Prometheus is unreachable.
    pub async fn by_function(
        &self,
        client: &Arc<Client>,
        metrics: &Metrics,
    ) -> HashMap<String, u64> {
        let Some(prometheus) = &self.prometheus else { return metrics.invocations() };
        if self.failed_at().is_some_and(|at| at.elapsed() < RETRY_AFTER_FAILURE) {
            return HashMap::new();
        }
        let result = query(client, prometheus).await;
        self.set_failed_at(result.is_err().then(Instant::now));
        result.unwrap_or_else(|error| {
            tracing::debug!(%error, "Prometheus does not respond; functions are listed without counts");
            HashMap::new()
        })
    }

    fn failed_at(&self) -> Option<Instant> {
        *lock_unpoisoned(&self.failed_at)
    }

    fn set_failed_at(&self, failed_at: Option<Instant>) {
        *lock_unpoisoned(&self.failed_at) = failed_at;
    }
}

async fn query(client: &Arc<Client>, prometheus: &Origin) -> Result<HashMap<String, u64>, Error> {
    let request = build_request(
        Method::GET,
        prometheus,
        QUERY_TARGET,
        HeaderMap::new(),
        bytes::Bytes::new(),
    )?;
    let (_, body) = send_and_collect(client, prometheus, request, QUERY_TIMEOUT).await?;
    Ok(counts(parse_json(&body)?))
}

fn counts(response: QueryResponse) -> HashMap<String, u64> {
    response
        .data
        .result
        .into_iter()
        .filter_map(|mut sample| {
            let count: f64 = sample.value.1.parse().ok()?;
            Some((sample.metric.remove("function_name")?, count as u64))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_response_of_prometheus_is_parsed() {
        let response = parse_json(
            br#"{"status":"success","data":{"resultType":"vector","result":[
                {"metric":{"function_name":"echo.fn"},"value":[1700000000.1,"42"]},
                {"metric":{},"value":[1,"1"]},
                {"metric":{"function_name":"odd.fn"},"value":[1,"many"]}]}}"#,
        )
        .unwrap();
        assert_eq!(counts(response), HashMap::from([("echo.fn".to_owned(), 42)]));
    }
}
