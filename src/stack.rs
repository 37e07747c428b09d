//! OpenFaaS stack files: the functions that they describe, ready to be deployed. No I/O.

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::provider::types::{FunctionDeployment, Resources};

/// Why a stack file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StackError {
    #[error("not a stack file: {0}")]
    Yaml(#[from] serde_norway::Error),
    #[error("it has no functions")]
    Empty,
    #[error("function {0} has no fprocess: here a function is a command, such as `fprocess: cat`")]
    NoCommand(String),
}

#[derive(Deserialize)]
struct Stack {
    #[serde(default)]
    functions: BTreeMap<String, Entry>,
}

/// A function's entry. What concerns the building of images is left alone.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Entry {
    image: String,
    namespace: String,
    #[serde(alias = "envProcess")]
    fprocess: String,
    environment: BTreeMap<String, Scalar>,
    secrets: Option<Vec<String>>,
    labels: Option<BTreeMap<String, Scalar>>,
    annotations: Option<BTreeMap<String, Scalar>>,
    constraints: Option<Vec<String>>,
    limits: Option<Resources>,
    requests: Option<Resources>,
    readonly_root_filesystem: bool,
}

/// YAML takes `true` and `5` for what they look like; a variable is text all the same.
#[derive(Deserialize)]
#[serde(untagged)]
enum Scalar {
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
    Null,
}

impl From<Scalar> for String {
    fn from(scalar: Scalar) -> Self {
        match scalar {
            Scalar::Bool(value) => value.to_string(),
            Scalar::Int(value) => value.to_string(),
            Scalar::Float(value) => value.to_string(),
            Scalar::Text(value) => value,
            Scalar::Null => Self::new(),
        }
    }
}

/// Reads the functions of a stack file, in the order of their names.
pub fn parse(text: &str) -> Result<Vec<FunctionDeployment>, StackError> {
    let stack: Stack = serde_norway::from_str(text)?;
    if stack.functions.is_empty() {
        return Err(StackError::Empty);
    }
    stack.functions.into_iter().map(|(name, entry)| deployment(name, entry)).collect()
}

fn deployment(name: String, entry: Entry) -> Result<FunctionDeployment, StackError> {
    if entry.fprocess.trim().is_empty() {
        return Err(StackError::NoCommand(name));
    }
    Ok(FunctionDeployment {
        service: name,
        namespace: entry.namespace,
        image: entry.image,
        env_process: entry.fprocess,
        env_vars: Some(texts(entry.environment)),
        constraints: entry.constraints,
        secrets: entry.secrets,
        labels: entry.labels.map(texts),
        annotations: entry.annotations.map(texts),
        limits: entry.limits,
        requests: entry.requests,
        read_only_root_filesystem: entry.readonly_root_filesystem,
    })
}

fn texts(map: BTreeMap<String, Scalar>) -> BTreeMap<String, String> {
    map.into_iter().map(|(name, value)| (name, value.into())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stack_file_as_faas_cli_writes_it_is_read() {
        let functions = parse(
            "version: 1.0\n\
             provider:\n  name: openfaas\n  gateway: http://127.0.0.1:8080\n\
             functions:\n\
             \x20 echo:\n    lang: dockerfile\n    handler: ./echo\n    image: echo:latest\n    fprocess: cat\n\
             \x20   environment:\n      write_debug: true\n      exec_timeout: 5\n      note: hi\n\
             \x20   labels:\n      com.openfaas.scale.max: 5\n\
             \x20   limits:\n      memory: 128Mi\n\
             \x20 also:\n    envProcess: env\n    namespace: dev\n    secrets: [token]\n",
        )
        .unwrap();
        let [also, echo] = functions.as_slice() else { panic!("{functions:?}") };
        assert_eq!((also.service.as_str(), also.namespace.as_str()), ("also", "dev"));
        assert_eq!(also.secrets.as_deref(), Some(&["token".to_owned()][..]));
        assert_eq!(echo.env_process, "cat");
        let vars = echo.env_vars.as_ref().unwrap();
        assert_eq!((&*vars["write_debug"], &*vars["exec_timeout"]), ("true", "5"));
        assert_eq!(echo.labels.as_ref().unwrap()["com.openfaas.scale.max"], "5");
        assert_eq!(echo.limits.as_ref().unwrap().memory, "128Mi");
    }

    #[test]
    fn what_is_wrong_is_said() {
        let error = |text: &str| parse(text).unwrap_err().to_string();
        assert!(error("functions: {a: {image: x}}").contains("function a has no fprocess"));
        assert!(error("functions: {}").contains("no functions"));
        assert!(error("functions: [").contains("not a stack file"));
        assert!(error("functions: {a: {fprocess: {}}}").contains("not a stack file"));
    }
}
