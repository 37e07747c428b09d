//! Fork mode: one process for each call, with the request on its standard input and the response on its output.
//!
//! The response has status 500 if the process fails, which is known only when it exits. So the output is buffered until
//! then, up to `MAX_BUFFERED_OUTPUT`. A longer response starts with 200, and is aborted if the process fails later.

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

use crate::backend::Invocation;
use crate::process::cgi;
use crate::process::channel_body::{self, BodyEvent, ChannelBody};
use crate::process::fork_session::{ForkSession, Outcome};
use crate::process::input::StdinForwarder;
use crate::process::invocation::{InvocationError, set_duration_header};
use crate::process::launcher::ProcessLauncher;
use crate::process::process_group::ProcessGroup;
use crate::process::spec::ForkOptions;
use crate::process::workload::Workload;

/// Maximum output in bytes that is buffered until the process exits.
const MAX_BUFFERED_OUTPUT: usize = 1 << 20;

/// Runs the function's command for one call. Fails if the function has `limit` calls in flight, or the provider has no
/// fork permit left.
///
/// The process is driven by a separate task, so that its deadline holds even while the client does not read the
/// response. The task kills it when the client disconnects, that is, when this future or the response body is dropped.
pub(super) async fn invoke(
    launcher: &ProcessLauncher,
    workload: &Arc<Workload>,
    fork: &ForkOptions,
    limit: u64,
    invocation: Invocation,
) -> Result<Response, InvocationError> {
    let function = &workload.function;
    let in_flight = workload.activity.begin_call(limit);
    let in_flight =
        in_flight.ok_or_else(|| InvocationError::TooManyInFlight(function.clone(), limit))?;
    let limiter = &launcher.fork_limiter;
    let fork_permit = limiter
        .try_acquire()
        .ok_or_else(|| InvocationError::ForkLimitReached(function.clone(), limiter.limit))?;
    let (mut group, output, stderr) = start(launcher, workload, fork, &invocation)
        .map_err(|e| InvocationError::StartFailed(function.clone(), e))?;
    let content_type =
        fork.content_type.clone().or_else(|| invocation.head.headers.get(CONTENT_TYPE).cloned());
    let (writer, body) = channel_body::channel();
    let (report, outcome) = oneshot::channel();
    let client_gone = CancellationToken::new();
    let session = ForkSession {
        workload: Arc::clone(workload),
        instance: format!("{}-{}", function.name, group.id()).into(),
        input: StdinForwarder::new(group.stdin(), invocation.body),
        group,
        output,
        stderr,
        log_output: fork.write_debug,
        started: invocation.started,
        in_flight,
        fork_permit,
        client_gone: client_gone.clone(),
    };
    let tasks = launcher.tasks.clone();
    launcher.tasks.spawn(async move { session.run(writer, report, &tasks).await });
    let mut response = respond(workload, body, outcome, client_gone, content_type).await?;
    set_duration_header(&mut response, invocation.started.elapsed());
    Ok(response)
}

fn start(
    launcher: &ProcessLauncher,
    workload: &Workload,
    fork: &ForkOptions,
    invocation: &Invocation,
) -> io::Result<(ProcessGroup, pipe::Receiver, Option<ChildStderr>)> {
    let mut command = launcher.command(workload);
    if fork.cgi_headers {
        command.envs(cgi::variables(
            &invocation.head,
            &invocation.path,
            invocation.body.size_hint().exact(),
        ));
    }
    let (reader, writer) = io::pipe()?;
    if fork.combine_output {
        // One pipe for both outputs keeps the order in which they were written.
        command.stderr(writer.try_clone()?);
    }
    command.stdin(Stdio::piped()).stdout(writer);
    let mut group = ProcessGroup::start(&mut command, &workload.activity, &launcher.orphans)?;
    // The command holds the write end of the pipe; until it is dropped, the output has no end.
    drop(command);
    let stderr = group.stderr();
    Ok((group, pipe::Receiver::from_owned_fd(reader.into())?, stderr))
}

/// Waits until the status is known: the process has exited, or its output exceeds the buffer.
async fn respond(
    workload: &Workload,
    mut body: ChannelBody<()>,
    outcome: oneshot::Receiver<Outcome>,
    client_gone: CancellationToken,
    content_type: Option<HeaderValue>,
) -> Result<Response, InvocationError> {
    let guard = client_gone.drop_guard();
    // Copies the chunks: a small chunk would keep its whole read buffer allocated.
    let mut buffered = BytesMut::new();
    while buffered.len() <= MAX_BUFFERED_OUTPUT {
        match body.next().await {
            BodyEvent::Data(data) => buffered.extend_from_slice(&data),
            BodyEvent::End | BodyEvent::Aborted => {
                let status = finish(workload, outcome.await)?;
                // The process has exited. The task may still discard the rest of the request body.
                guard.disarm();
                return Ok(full_response(status, buffered.freeze(), content_type));
            }
        }
    }
    let content_type = content_type.unwrap_or_else(|| guess_content_type(&buffered));
    let mut response = Body::new(body.with_prefix(buffered.freeze(), guard)).into_response();
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
        // The sender was dropped: the runtime is shutting down.
        Ok(Outcome::Stopped) | Err(_) => Err(InvocationError::Stopped(function)),
    }
}

/// Builds the response of a process that has exited.
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

/// Guesses the content type of output without one, like the classic watchdog.
fn guess_content_type(output: &[u8]) -> HeaderValue {
    // The last character may be incomplete in the output read so far.
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
    use crate::process::fork_limiter::ForkLimiter;
    use crate::process::logs::Logs;
    use crate::process::orphans::Orphans;
    use crate::process::secrets::Secrets;
    use crate::process::spec::{FunctionSpec, Mode};
    use crate::types::FunctionDeployment;
    use gateway_base::function::Function;
    use gateway_base::shutdown::Tasks;

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
        let invocation = Invocation { head, body, path: "/".to_owned(), started: Instant::now() };
        invoke(launcher, workload, fork, u64::MAX, invocation).await.into_response()
    }

    #[tokio::test]
    async fn calls_beyond_the_fork_limit_get_status_503() {
        let root = tempfile::tempdir().unwrap();
        let orphans = Orphans::open(root.path().join("running")).unwrap();
        let secrets = Secrets::open(root.path().join("secrets")).unwrap();
        let mut launcher =
            ProcessLauncher::new(&Tasks::default(), orphans, secrets, None, Vec::new());
        launcher.fork_limiter = ForkLimiter::new(1);
        let gate = root.path().join("gate");
        let slow = format!("sh -c 'until [ -e {} ]; do sleep 0.02; done'", gate.display());
        let (slow, quick) = (workload(&slow), workload("true"));
        let second = async {
            while launcher.fork_limiter.try_acquire().is_some() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            let rejected = run(&launcher, &quick).await;
            std::fs::write(&gate, "").unwrap();
            rejected
        };
        let (first, rejected) = tokio::join!(run(&launcher, &slow), second);
        assert_eq!(first.status(), StatusCode::OK);
        assert_eq!(rejected.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert!(rejected.headers().contains_key(RETRY_AFTER));
        assert_eq!(rejected.headers()["x-openfaas-internal"], "proxy");
        // The permit is free again.
        assert_eq!(run(&launcher, &quick).await.status(), StatusCode::OK);
        launcher.tasks.stop(Duration::from_secs(5)).await;
    }
}
