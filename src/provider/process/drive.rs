//! A forked process from its start to its end: input, output, deadline, log lines.

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

use crate::provider::process::activity;
use crate::provider::process::group::Group;
use crate::provider::process::input::{Broken, Input};
use crate::provider::process::lines::Lines;
use crate::provider::process::places::Place;
use crate::provider::process::runner::{RunnerTasks, TERMINATION};
use crate::provider::process::stream::Writer;
use crate::provider::process::workload::Workload;

/// How much output is read at once.
const CHUNK: usize = 32 << 10;
/// How long what a process has started may outlive it, while the output is still open.
const LINGER: Duration = Duration::from_secs(5);

/// How a process ended.
#[derive(Debug)]
pub(super) enum Outcome {
    CallerLeft,
    Ended(ExitStatus),
    Failed(io::Error),
    RequestBroken,
    Stopped,
    Timeout(Duration),
}

/// Everything about one running process.
pub(super) struct Driver {
    pub(super) workload: Arc<Workload>,
    pub(super) instance: Arc<str>,
    pub(super) group: Group,
    pub(super) input: Input,
    pub(super) output: pipe::Receiver,
    /// Standard error, where it is not part of the answer.
    pub(super) errors: Option<ChildStderr>,
    pub(super) log_output: bool,
    pub(super) started: Instant,
    pub(super) permit: activity::Call,
    pub(super) place: Place,
    /// Cancelled when the caller is gone.
    pub(super) left: CancellationToken,
}

impl Driver {
    /// Runs the process to its end, writes the output to `writer` and then says how it ended.
    pub(super) async fn run(
        mut self,
        writer: Writer,
        report: oneshot::Sender<Outcome>,
        tasks: &RunnerTasks,
    ) {
        self.log("Forking fprocess.".to_owned());
        let mut written = 0;
        let outcome = self.outcome(&writer, &mut written, tasks).await;
        self.log_end(&outcome, written);
        match &outcome {
            Outcome::Stopped => self.group.end(TERMINATION, &tasks.cut).await,
            // Nothing outlives its call.
            _ => self.group.reap().await,
        }
        // Before the caller learns of it: its next call must find room.
        drop((self.permit, self.place));
        let success = matches!(&outcome, Outcome::Ended(status) if status.success());
        // Said first: whoever finds the output at its end, or broken off, asks why.
        let _ = report.send(outcome);
        if success {
            let _ = writer.end().await;
        } else {
            drop(writer);
        }
        self.input.discard().await;
    }

    /// Waits for the process to end, or for a reason to end it.
    async fn outcome(
        &mut self,
        writer: &Writer,
        written: &mut usize,
        tasks: &RunnerTasks,
    ) -> Outcome {
        let limit = self.workload.spec.exec_timeout;
        let left = self.left.clone();
        let deadline = async {
            match limit {
                Some(limit) => tokio::time::sleep(limit).await,
                None => std::future::pending().await,
            }
        };
        // All branches are cancel-safe, or end the process whose state they would lose.
        tokio::select! {
            ended = self.exchange(writer, written) => match ended {
                Ok(Ok(status)) => Outcome::Ended(status),
                Ok(Err(Broken)) => Outcome::RequestBroken,
                Err(error) => Outcome::Failed(error),
            },
            () = deadline => Outcome::Timeout(limit.unwrap_or_default()),
            () = left.cancelled() => Outcome::CallerLeft,
            () = tasks.stopping.cancelled() => Outcome::Stopped,
        }
    }

    /// Passes input and output until the process has ended.
    async fn exchange(
        &mut self,
        writer: &Writer,
        written: &mut usize,
    ) -> io::Result<Result<ExitStatus, Broken>> {
        let Self { workload, instance, group, input, output, errors, log_output, .. } = self;
        let mut lines = log_output.then(Lines::default);
        let logs = &workload.logs;
        let log = |line: String| logs.write(instance, line);
        let pass_output = async {
            let mut buffer = BytesMut::new();
            loop {
                buffer.reserve(CHUNK);
                if output.read_buf(&mut buffer).await? == 0 {
                    lines.iter_mut().for_each(|lines| lines.finish(log));
                    return Ok(());
                }
                lines.iter_mut().for_each(|lines| lines.push(&buffer, log));
                *written += buffer.len();
                if writer.data(buffer.split().freeze()).await.is_err() {
                    return Ok(());
                }
            }
        };
        let log_errors = async {
            if let Some(errors) = errors.take() {
                logs.write_all(Arc::clone(instance), errors).await;
            }
            io::Result::Ok(())
        };
        let mut outputs = pin!(async { tokio::try_join!(pass_output, log_errors) });
        let mut input = pin!(input.pass_on());
        let (mut outputs_done, mut input_done) = (false, false);
        let status = loop {
            // Cancel-safe: the futures are pinned outside, and `leader_ended` takes nothing.
            tokio::select! {
                status = group.leader_ended() => break status?,
                done = &mut outputs, if !outputs_done => {
                    done?;
                    outputs_done = true;
                }
                passed = &mut input, if !input_done => match passed {
                    Ok(()) => input_done = true,
                    Err(broken) => return Ok(Err(broken)),
                },
            }
        };
        // What has left the group may have the output open, too.
        if !outputs_done {
            match timeout(LINGER, &mut outputs).await {
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
            Outcome::CallerLeft => self.log("Killed: the caller has left".to_owned()),
            Outcome::Ended(status) if status.success() => {}
            Outcome::Ended(status) => self.log(format!("Failed: {status}")),
            Outcome::Failed(error) => self.log(format!("Killed: {error}")),
            Outcome::RequestBroken => self.log("Killed: the request broke off".to_owned()),
            Outcome::Stopped => self.log("Ended: the provider stops".to_owned()),
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
