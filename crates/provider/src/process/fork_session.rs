//! One forked process from its start to its exit: input, output, deadline, log lines.

use std::io;
use std::pin::pin;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::process::ChildStderr;
use tokio::sync::oneshot;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::process::activity;
use crate::process::channel_body::BodyWriter;
use crate::process::fork_limiter::ForkPermit;
use crate::process::input::{RequestAborted, StdinForwarder};
use crate::process::launcher::{ProcessTasks, TERMINATION_GRACE};
use crate::process::line_splitter::LineSplitter;
use crate::process::process_group::ProcessGroup;
use crate::process::workload::Workload;

/// Buffer size for reading output.
const READ_CHUNK_BYTES: usize = 32 << 10;
/// Limit for descendants that keep the output open after the process has exited.
const OUTPUT_LINGER_TIMEOUT: Duration = Duration::from_secs(5);

/// Result of a forked process.
#[derive(Debug)]
pub(super) enum Outcome {
    ClientDisconnected,
    Exited(ExitStatus),
    Failed(io::Error),
    RequestAborted,
    Stopped,
    Timeout(Duration),
}

/// State of one running process.
pub(super) struct ForkSession {
    pub(super) workload: Arc<Workload>,
    pub(super) instance: Arc<str>,
    pub(super) group: ProcessGroup,
    pub(super) input: StdinForwarder,
    pub(super) output: pipe::Receiver,
    /// Standard error, unless it is part of the response.
    pub(super) stderr: Option<ChildStderr>,
    pub(super) log_output: bool,
    pub(super) started: Instant,
    pub(super) in_flight: activity::InFlightGuard,
    pub(super) fork_permit: ForkPermit,
    /// Cancelled when the client has disconnected.
    pub(super) client_gone: CancellationToken,
}

impl ForkSession {
    /// Drives the process until it has exited, writes the output to `writer`, and sends the outcome to `report`.
    pub(super) async fn run(
        mut self,
        writer: BodyWriter,
        report: oneshot::Sender<Outcome>,
        tasks: &ProcessTasks,
    ) {
        self.log("Forking fprocess.".to_owned());
        let mut written = 0;
        let outcome = self.wait_outcome(&writer, &mut written, tasks).await;
        self.log_end(&outcome, written);
        match &outcome {
            Outcome::Stopped => self.group.terminate(TERMINATION_GRACE, &tasks.force_kill).await,
            // Kills descendants: no process outlives its call.
            _ => self.group.kill_and_wait().await,
        }
        // Releases the permits before the response ends: the client's next call must not be rejected.
        drop((self.in_flight, self.fork_permit));
        let success = matches!(&outcome, Outcome::Exited(status) if status.success());
        // The outcome is sent first: the reader of the output waits for it after the end.
        let _ = report.send(outcome);
        if success {
            let _ = writer.finish().await;
        } else {
            drop(writer);
        }
        self.input.discard().await;
    }

    /// Waits for the process to exit, or for a reason to stop it.
    async fn wait_outcome(
        &mut self,
        writer: &BodyWriter,
        written: &mut usize,
        tasks: &ProcessTasks,
    ) -> Outcome {
        let limit = self.workload.spec.exec_timeout;
        let client_gone = self.client_gone.clone();
        let deadline = async {
            match limit {
                Some(limit) => tokio::time::sleep(limit).await,
                None => std::future::pending().await,
            }
        };
        // All branches are cancel-safe, or stop the process whose state they would lose.
        tokio::select! {
            ended = self.pump_until_exit(writer, written) => match ended {
                Ok(Ok(status)) => Outcome::Exited(status),
                Ok(Err(RequestAborted)) => Outcome::RequestAborted,
                Err(error) => Outcome::Failed(error),
            },
            () = deadline => Outcome::Timeout(limit.unwrap_or_default()),
            () = client_gone.cancelled() => Outcome::ClientDisconnected,
            () = tasks.stopping.cancelled() => Outcome::Stopped,
        }
    }

    /// Forwards input and output until the process has exited.
    async fn pump_until_exit(
        &mut self,
        writer: &BodyWriter,
        written: &mut usize,
    ) -> io::Result<Result<ExitStatus, RequestAborted>> {
        let Self { workload, instance, group, input, output, stderr, log_output, .. } = self;
        let mut lines = log_output.then(LineSplitter::default);
        let logs = &workload.logs;
        let log = |line: String| logs.write(instance, line);
        let forward_output = async {
            let mut buffer = BytesMut::new();
            loop {
                buffer.reserve(READ_CHUNK_BYTES);
                if output.read_buf(&mut buffer).await? == 0 {
                    lines.iter_mut().for_each(|lines| lines.finish(log));
                    return Ok(());
                }
                lines.iter_mut().for_each(|lines| lines.push(&buffer, log));
                *written += buffer.len();
                if writer.write(buffer.split().freeze()).await.is_err() {
                    return Ok(());
                }
            }
        };
        let log_errors = async {
            if let Some(stderr) = stderr.take() {
                logs.write_all(Arc::clone(instance), stderr).await;
            }
            io::Result::Ok(())
        };
        let mut outputs = pin!(async { tokio::try_join!(forward_output, log_errors) });
        let mut input = pin!(input.forward());
        let (mut outputs_done, mut input_done) = (false, false);
        let status = loop {
            // Cancel-safe: the futures are pinned outside of the loop, and `wait_leader` is cancel-safe.
            tokio::select! {
                status = group.wait_leader() => break status?,
                done = &mut outputs, if !outputs_done => {
                    done?;
                    outputs_done = true;
                }
                forwarded = &mut input, if !input_done => match forwarded {
                    Ok(()) => input_done = true,
                    Err(aborted) => return Ok(Err(aborted)),
                },
            }
        };
        // A descendant that has left the group may still have the output open.
        if !outputs_done {
            match timeout(OUTPUT_LINGER_TIMEOUT, &mut outputs).await {
                Ok(done) => outputs_done = done.map(|_| true)?,
                Err(_) => group.kill(),
            }
        }
        if !outputs_done {
            outputs.await?;
        }
        Ok(Ok(status))
    }

    fn log_end(&self, outcome: &Outcome, written: usize) {
        match outcome {
            Outcome::ClientDisconnected => self.log("Killed: the client disconnected".to_owned()),
            Outcome::Exited(status) if status.success() => {}
            Outcome::Exited(status) => self.log(format!("Failed: {status}")),
            Outcome::Failed(error) => self.log(format!("Killed: {error}")),
            Outcome::RequestAborted => self.log("Killed: the request was aborted".to_owned()),
            Outcome::Stopped => self.log("Stopped: the provider is shutting down".to_owned()),
            Outcome::Timeout(limit) => {
                self.log(format!("Killed: exec_timeout of {limit:?} reached"))
            }
        }
        let seconds = self.started.elapsed().as_secs_f64();
        self.log(format!("Wrote {written} Bytes - Duration: {seconds:.6} seconds"));
    }

    fn log(&self, line: String) {
        self.workload.logs.write(&self.instance, line);
    }
}
