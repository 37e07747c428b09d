//! The JSON that a provider speaks: functions, scale requests, secrets, namespaces, log lines. No I/O.

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
    /// How many replicas are wanted.
    pub replicas: u64,
    /// How many of them can be called.
    pub available_replicas: u64,
    /// RFC 3339.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub created_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    /// Why there is no replica to call, if none can be started.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_failure: Option<StartFailure>,
}

/// What the gateway itself needs of a function's status. The rest is passed on, not understood: an odd value there is
/// none of the gateway's business.
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
    /// Read only if it is what our own provider would write.
    #[serde(deserialize_with = "if_understood")]
    pub start_failure: Option<StartFailure>,
}

/// How the starts of a function fail. For operators: the last line may say anything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StartFailure {
    /// How many have failed in a row.
    pub starts: u64,
    /// How the last one ended, such as `exit status: 1`.
    pub reason: String,
    /// The last line that it wrote.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub last_output: String,
}

/// What is not understood counts as absent.
fn if_understood<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: serde::Deserializer<'de>,
    T: serde::de::DeserializeOwned,
{
    let value = serde_json::Value::deserialize(deserializer)?;
    Ok(serde_json::from_value(value).ok())
}

/// A function as it is to be deployed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct FunctionDeployment {
    pub service: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    pub image: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub env_process: String,
    /// The process provider's own: where the command runs, as an absolute path; empty: where the provider does.
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

/// Memory and CPU, as Kubernetes writes them (`128Mi`, `100m`).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Resources {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub memory: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub cpu: String,
}

/// What a function's processes use.
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

/// A secret. Never printed with its value.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Secret {
    pub name: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub value: String,
    /// Base64, for a value that is no text.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub raw_value: String,
}

/// Body of the `/system/namespace/NAME` calls.
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
    /// Which replica wrote it.
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
    fn a_start_failure_of_another_kind_spoils_no_status() {
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
