//! JSON types of the provider API: functions, scale requests, secrets, namespaces, log lines. No I/O.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A function as the provider reports it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct FunctionStatus {
    pub name: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    pub image: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub env_process: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub env_vars: Option<BTreeMap<String, String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub constraints: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secrets: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub labels: Option<BTreeMap<String, String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub annotations: Option<BTreeMap<String, String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limits: Option<Resources>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requests: Option<Resources>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub read_only_root_filesystem: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub invocation_count: Option<f64>,
    /// Number of desired replicas.
    pub replicas: u64,
    /// Number of ready replicas.
    pub available_replicas: u64,
    /// RFC 3339.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub created_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    /// Reason why no replica is ready, if replicas fail to start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_failure: Option<StartFailure>,
}

/// The fields of a function's status that the gateway uses. The gateway forwards other fields without parsing them, so
/// an unexpected value there is not an error.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct FunctionSummary {
    pub name: String,
    pub namespace: Option<String>,
    pub labels: Option<BTreeMap<String, String>>,
    pub annotations: Option<BTreeMap<String, String>>,
    pub replicas: u64,
    pub available_replicas: u64,
    pub usage: Option<Usage>,
    /// `None` unless it has the format of the process provider.
    #[serde(deserialize_with = "none_if_invalid")]
    pub start_failure: Option<StartFailure>,
}

/// Failed starts of a function, for operators. `last_output` is untrusted text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StartFailure {
    /// Number of consecutive failed starts.
    pub starts: u64,
    /// Reason of the last failure, such as `exit status: 1`.
    pub reason: String,
    /// Last output line of the last failed process.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub last_output: String,
}

/// Deserializes a value of an unexpected format as `None`.
fn none_if_invalid<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: serde::Deserializer<'de>,
    T: serde::de::DeserializeOwned,
{
    let value = serde_json::Value::deserialize(deserializer)?;
    Ok(serde_json::from_value(value).ok())
}

/// Request body for deploying a function.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct FunctionDeployment {
    pub service: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    pub image: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub env_process: String,
    /// Extension of the process provider: absolute path of the working directory; empty: that of the provider.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub working_directory: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub env_vars: Option<BTreeMap<String, String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub constraints: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secrets: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub labels: Option<BTreeMap<String, String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub annotations: Option<BTreeMap<String, String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limits: Option<Resources>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requests: Option<Resources>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub read_only_root_filesystem: bool,
}

/// Memory and CPU in the notation of Kubernetes (`128Mi`, `100m`).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Resources {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub memory: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub cpu: String,
}

/// Resource usage of a function's processes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Usage {
    /// Millicores.
    pub cpu: f64,
    pub total_memory_bytes: f64,
}

/// Body of `DELETE /system/functions`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DeleteFunction {
    pub function_name: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub namespace: String,
}

/// Body of `POST /system/scale-function/NAME`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ScaleRequest {
    #[serde(default)]
    pub service_name: String,
    pub replicas: u64,
}

/// A secret. `Debug` does not print its value.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Secret {
    pub name: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub value: String,
    /// Base64, for a binary value.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub raw_value: String,
}

/// Body of `/system/namespace/NAME` requests.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Namespace {
    pub name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub labels: Option<BTreeMap<String, String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub annotations: Option<BTreeMap<String, String>>,
}

/// One line of `GET /system/logs`, as NDJSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LogLine {
    pub name: String,
    pub namespace: String,
    /// Name of the replica that wrote the line.
    pub instance: String,
    /// RFC 3339, with nanoseconds.
    pub timestamp: String,
    pub text: String,
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Secret").field("name", &self.name).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_invalid_start_failure_is_ignored() {
        let read = |failure: &str| {
            let text = format!(r#"{{"name":"f","replicas":1,"startFailure":{failure}}}"#);
            let summary: FunctionSummary = serde_json::from_str(&text).unwrap();
            (summary.replicas, summary.start_failure.map(|failure| failure.starts))
        };
        assert_eq!(read(r#"{"starts":3,"reason":"exit status: 1"}"#), (1, Some(3)));
        for other in ["null", "true", "\"x\"", "{}", "[]", r#"{"starts":"3","reason":7}"#] {
            assert_eq!(read(other), (1, None), "{other}");
        }
    }
}
