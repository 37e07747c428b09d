//! Fork mode: one process for each call, with the request on its standard input and the answer on its output.
//!
//! A process that fails is answered 500, and whether it fails is only known when it ends. So output is held back until
//! then, up to `MAX_BUFFERED_OUTPUT`. Beyond that the answer begins with 200, and breaks off if the process fails after all.

use std::io;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;

use axum::body::Body;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use bytes::{Bytes, BytesMut};
use http_body::Body as _;
use tokio::net::unix::pipe;
use tokio::process::ChildStderr;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::provider::process::cgi;
use crate::provider::process::channel_body::{self, BodyEvent, ChannelBody};
use crate::provider::process::fork_session::{ForkSession, Outcome};
use crate::provider::process::input::StdinForwarder;
use crate::provider::process::invocation::{Invocation, InvocationError, set_duration_header};
use crate::provider::process::launcher::ProcessLauncher;
use crate::provider::process::process_group::ProcessGroup;
use crate::provider::process::spec::ForkOptions;
use crate::provider::process::workload::Workload;

/// How much output may wait for the process to end.
const MAX_BUFFERED_OUTPUT: usize = 1 << 20;

/// Runs the function's command for `invoke`, unless `limit` of them run already, or all places are taken.
///
/// The process belongs to a task of its own, so that its deadline holds even while nobody reads the answer. The task
/// ends it when the caller leaves, which is when this future or the answer's body is dropped.
pub(super) async fn invoke(
    launcher: &ProcessLauncher,
    workload: &Arc<Workload>,
    fork: &ForkOptions,
    limit: u64,
    call: Invocation,
) -> Result<Response, InvocationError> {
    let function = &workload.function;
    let permit = workload.activity.begin_call(limit);
    let permit = permit.ok_or_else(|| InvocationError::TooManyInFlight(function.clone(), limit))?;
    let limiter = &launcher.fork_limiter;
    let place = limiter
        .try_acquire()
        .ok_or_else(|| InvocationError::ForkLimitReached(function.clone(), limiter.limit))?;
    let (mut group, output, errors) = start(launcher, workload, fork, &call)
        .map_err(|e| InvocationError::StartFailed(function.clone(), e))?;
    let content_type =
        fork.content_type.clone().or_else(|| call.head.headers.get(CONTENT_TYPE).cloned());
    let (writer, stream) = channel_body::channel();
    let (report, outcome) = oneshot::channel();
    let left = CancellationToken::new();
    let driver = ForkSession {
        workload: Arc::clone(workload),
        instance: format!("{}-{}", function.name, group.id()).into(),
        input: StdinForwarder::new(group.stdin(), call.body),
        group,
        output,
        stderr: errors,
        log_output: fork.write_debug,
        started: call.started,
        in_flight: permit,
        fork_permit: place,
        client_gone: left.clone(),
    };
    let tasks = launcher.tasks.clone();
    launcher.tasks.spawn(async move { driver.run(writer, report, &tasks).await });
    let mut response = respond(workload, stream, outcome, left, content_type).await?;
    set_duration_header(&mut response, call.started.elapsed());
    Ok(response)
}

fn start(
    launcher: &ProcessLauncher,
    workload: &Workload,
    fork: &ForkOptions,
    call: &Invocation,
) -> io::Result<(ProcessGroup, pipe::Receiver, Option<ChildStderr>)> {
    let mut command = launcher.command(workload);
    if fork.cgi_headers {
        command.envs(cgi::variables(&call.head, &call.path, call.body.size_hint().exact()));
    }
    let (reader, writer) = io::pipe()?;
    if fork.combine_output {
        // One pipe for both, so that the answer has them in the order in which they were written.
        command.stderr(writer.try_clone()?);
    }
    command.stdin(Stdio::piped()).stdout(writer);
    let mut group = ProcessGroup::start(&mut command, &workload.activity, &launcher.orphans)?;
    // The command still holds the pipe's other end; while it does, the output would never end.
    drop(command);
    let errors = group.stderr();
    Ok((group, pipe::Receiver::from_owned_fd(reader.into())?, errors))
}

/// Waits for as much output as decides the status.
async fn respond(
    workload: &Workload,
    mut stream: ChannelBody<()>,
    outcome: oneshot::Receiver<Outcome>,
    left: CancellationToken,
    content_type: Option<HeaderValue>,
) -> Result<Response, InvocationError> {
    let guard = left.drop_guard();
    // Copied together: chunks may be small, and each would keep the whole of its buffer.
    let mut held = BytesMut::new();
    while held.len() <= MAX_BUFFERED_OUTPUT {
        match stream.next().await {
            BodyEvent::Data(data) => held.extend_from_slice(&data),
            BodyEvent::End | BodyEvent::Aborted => {
                let status = finish(workload, outcome.await)?;
                // The process has ended; the task may still be reading what it left of the request.
                guard.disarm();
                return Ok(full_response(status, held.freeze(), content_type));
            }
        }
    }
    let content_type = content_type.unwrap_or_else(|| guess_content_type(&held));
    let mut response = Body::new(stream.with_prefix(held.freeze(), guard)).into_response();
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    Ok(response)
}

fn finish(
    workload: &Workload,
    outcome: Result<Outcome, oneshot::error::RecvError>,
) -> Result<ExitStatus, InvocationError> {
    let function = workload.function.clone();
    match outcome {
        Ok(Outcome::Exited(status)) => Ok(status),
        Ok(Outcome::Failed(error)) => Err(InvocationError::StartFailed(function, error)),
        Ok(Outcome::Timeout(limit)) => Err(InvocationError::Timeout(function, limit)),
        Ok(Outcome::RequestAborted | Outcome::ClientDisconnected) => {
            Err(InvocationError::RequestAborted(function))
        }
        // Without a word, the task was ended with its runtime.
        Ok(Outcome::Stopped) | Err(_) => Err(InvocationError::Stopped(function)),
    }
}

/// The answer of a process that has ended.
fn full_response(
    status: ExitStatus,
    mut body: Bytes,
    content_type: Option<HeaderValue>,
) -> Response {
    let mut code = StatusCode::OK;
    if !status.success() {
        code = StatusCode::INTERNAL_SERVER_ERROR;
        if body.is_empty() {
            body = format!("{status}\n").into();
        }
    }
    let content_type = content_type.unwrap_or_else(|| guess_content_type(&body));
    (code, [(CONTENT_TYPE, content_type)], body).into_response()
}

/// What callers of a classic watchdog get when nobody has said what the output is.
fn guess_content_type(output: &[u8]) -> HeaderValue {
    // A character may be cut at the end of what has been read so far.
    let text = std::str::from_utf8(output).map_or_else(|e| e.error_len().is_none(), |_| true);
    HeaderValue::from_static(match text && !output.contains(&0) {
        true => "text/plain; charset=utf-8",
        false => "application/octet-stream",
    })
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use axum::http::Request;
    use axum::http::header::RETRY_AFTER;

    use super::*;
    use crate::function::Function;
    use crate::provider::process::fork_limiter::ForkLimiter;
    use crate::provider::process::logs::Logs;
    use crate::provider::process::orphans::Orphans;
    use crate::provider::process::secrets::Secrets;
    use crate::provider::process::spec::{FunctionSpec, Mode};
    use crate::provider::types::FunctionDeployment;
    use crate::shutdown::Tasks;

    fn workload(env_process: &str) -> Arc<Workload> {
        let deployment = FunctionDeployment {
            service: "f".to_owned(),
            env_process: env_process.to_owned(),
            ..FunctionDeployment::default()
        };
        Arc::new(Workload {
            function: Function { name: "f".to_owned(), namespace: "ns".to_owned() },
            spec: FunctionSpec::parse(&deployment).unwrap(),
            logs: Arc::new(Logs::new()),
            activity: Arc::default(),
        })
    }

    async fn run(launcher: &ProcessLauncher, workload: &Arc<Workload>) -> Response {
        let Mode::Fork(fork) = &workload.spec.mode else { panic!("not in fork mode") };
        let (head, body) = Request::new(Body::empty()).into_parts();
        let call = Invocation { head, body, path: "/".to_owned(), started: Instant::now() };
        invoke(launcher, workload, fork, u64::MAX, call).await.into_response()
    }

    #[tokio::test]
    async fn calls_beyond_the_places_of_all_functions_are_answered_503() {
        let root = tempfile::tempdir().unwrap();
        let orphans = Orphans::open(root.path().join("running")).unwrap();
        let secrets = Secrets::open(root.path().join("secrets")).unwrap();
        let mut launcher =
            ProcessLauncher::new(&Tasks::default(), orphans, secrets, None, Vec::new());
        launcher.fork_limiter = ForkLimiter::new(1);
        let gate = root.path().join("gate");
        let slow = format!("sh -c 'until [ -e {} ]; do sleep 0.02; done'", gate.display());
        let (slow, quick) = (workload(&slow), workload("true"));
        let meanwhile = async {
            while launcher.fork_limiter.try_acquire().is_some() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            let refused = run(&launcher, &quick).await;
            std::fs::write(&gate, "").unwrap();
            refused
        };
        let (first, refused) = tokio::join!(run(&launcher, &slow), meanwhile);
        assert_eq!(first.status(), StatusCode::OK);
        assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert!(refused.headers().contains_key(RETRY_AFTER));
        assert_eq!(refused.headers()["x-openfaas-internal"], "proxy");
        // Another finds the place free again.
        assert_eq!(run(&launcher, &quick).await.status(), StatusCode::OK);
        launcher.tasks.stop(Duration::from_secs(5)).await;
    }
}
