//! A provider on a free port, and an HTTP client for it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use bytes::Bytes;
use gateway_base::build_info::BuildInfo;
use gateway_base::shutdown::Tasks;
use gateway_provider::process::{Config, ProcessProvider, router};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::client::conn::http1::handshake;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

/// Longer than anything here takes, even on a busy machine.
pub const DEADLINE: Duration = Duration::from_secs(30);

pub struct Provider {
    pub process: Arc<ProcessProvider>,
    pub address: SocketAddr,
    tasks: Tasks,
    directory: Arc<TempDir>,
}

/// A completely read response.
#[derive(Debug)]
pub struct CollectedResponse {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl CollectedResponse {
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }
}

impl Provider {
    pub async fn start() -> Self {
        Self::start_in(Arc::new(tempfile::tempdir().unwrap())).await
    }

    /// Starts a provider on the state of an earlier one.
    pub async fn start_in(directory: Arc<TempDir>) -> Self {
        let config = config(&directory.path().join("state"));
        Self::start_with(directory, config).await
    }

    pub async fn start_with(directory: Arc<TempDir>, config: Config) -> Self {
        let tasks = Tasks::default();
        let process = ProcessProvider::open(&config, &tasks).await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = router(Arc::clone(&process), BuildInfo::default());
        tasks.spawn(|stopping| async move {
            let serving = axum::serve(listener, router);
            serving.with_graceful_shutdown(stopping.cancelled_owned()).await.unwrap();
        });
        Self { process, address, tasks, directory }
    }

    /// Stops the provider, and returns its directory.
    pub async fn stop(self) -> Arc<TempDir> {
        self.process.stop(Duration::from_secs(10)).await;
        self.tasks.stop(DEADLINE).await.unwrap();
        self.directory
    }

    /// A path in the test's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Sends a request on its own connection, which is closed when the response is dropped.
    pub async fn send(&self, request: Request<Body>) -> Response<Incoming> {
        let sending = async {
            let tcp = TcpStream::connect(self.address).await.unwrap();
            let (mut sender, connection) = handshake(TokioIo::new(tcp)).await.unwrap();
            self.tasks.spawn(|_| async move {
                let _ = connection.await;
            });
            sender.send_request(request).await.unwrap()
        };
        timeout(DEADLINE, sending).await.expect("a response in time")
    }

    pub async fn request(&self, request: Request<Body>) -> CollectedResponse {
        let (head, body) = self.send(request).await.into_parts();
        let body = timeout(DEADLINE, body.collect()).await.expect("a body in time");
        let body = body.expect("a complete body").to_bytes();
        CollectedResponse { status: head.status, headers: head.headers, body }
    }

    pub async fn get(&self, path: &str) -> CollectedResponse {
        self.request(request(Method::GET, path, Body::empty())).await
    }

    pub async fn post(&self, path: &str, body: impl Into<Body>) -> CollectedResponse {
        self.request(request(Method::POST, path, body.into())).await
    }

    /// Sends JSON to the API.
    pub async fn api(&self, method: Method, path: &str, body: Value) -> CollectedResponse {
        self.request(request(method, path, Body::from(body.to_string()))).await
    }

    /// Deploys a function and asserts success.
    pub async fn deploy(&self, name: &str, env_process: &str, env_vars: Value) {
        let deployment =
            json!({ "service": name, "image": "", "envProcess": env_process, "envVars": env_vars });
        let response = self.api(Method::POST, "/system/functions", deployment).await;
        assert_eq!(response.status, StatusCode::ACCEPTED, "{}", response.text());
    }

    pub async fn scale(&self, name: &str, replicas: u64) {
        let body = json!({ "serviceName": name, "replicas": replicas });
        let path = format!("/system/scale-function/{name}");
        let response = self.api(Method::POST, &path, body).await;
        assert_eq!(response.status, StatusCode::ACCEPTED, "{}", response.text());
    }

    pub async fn status(&self, name: &str) -> Value {
        self.get(&format!("/system/function/{name}")).await.json()
    }

    /// Texts of the function's log lines.
    pub async fn logs(&self, name: &str) -> Vec<String> {
        let response = self.get(&format!("/system/logs?name={name}")).await;
        assert_eq!(response.status, StatusCode::OK);
        let text = |line: &str| {
            serde_json::from_str::<Value>(line).unwrap()["text"].as_str().unwrap().to_owned()
        };
        response.text().lines().map(text).collect()
    }

    pub async fn wait_until_available(&self, name: &str, replicas: u64) {
        eventually(async || self.status(name).await["availableReplicas"] == replicas).await;
    }

    pub async fn wait_for_log(&self, name: &str, text: &str) {
        eventually(async || self.logs(name).await.iter().any(|line| line.contains(text))).await;
    }
}

pub fn request(method: Method, path: &str, body: Body) -> Request<Body> {
    Request::builder().method(method).uri(path).header("host", "provider").body(body).unwrap()
}

pub fn config(state_dir: &Path) -> Config {
    let path = std::env::var_os("PATH").unwrap().into_string().unwrap();
    Config { state_dir: state_dir.to_owned(), environment: vec![("PATH".to_owned(), path)] }
}

/// Polls until `condition` holds.
#[track_caller]
pub fn eventually(mut condition: impl AsyncFnMut() -> bool) -> impl Future<Output = ()> {
    let location = std::panic::Location::caller();
    async move {
        let began = Instant::now();
        while !condition().await {
            assert!(began.elapsed() < DEADLINE, "not in time: {location}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Reads the process id that a function has written to `path`.
pub async fn read_pid(path: &Path) -> u32 {
    let mut pid = None;
    eventually(async || {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        pid = text.strip_suffix('\n').and_then(|text| text.parse().ok());
        pid.is_some()
    })
    .await;
    pid.unwrap()
}

/// Returns whether a process runs; a zombie does not.
pub fn is_running(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit(") ").next().unwrap().starts_with('Z'))
}

pub async fn wait_until_gone(pid: u32) {
    eventually(async || !is_running(pid)).await;
}
