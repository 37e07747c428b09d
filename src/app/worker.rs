//! The worker, put together: a thread of its own, and what it needs to call back.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::config;
use crate::proxy::client::Tls;
use crate::queue::Queue;
use crate::queued::Intake;
use crate::shutdown::Stages;
use crate::worker::Worker;
use crate::worker::callback::signature::Secret;
use crate::worker::callback::{Callbacks, Pace};

/// The file in `secret_mount_path` that callbacks are signed with.
const SECRET: &str = "callback-secret";
/// How often what has been kept for long enough is forgotten.
const FORGET_EVERY: Duration = Duration::from_secs(1);

/// Runs `worker` on this thread until the stop.
pub(super) fn run(worker: Worker, stages: &Stages) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    match runtime {
        Ok(runtime) => {
            let client = Arc::clone(&worker.caller.client);
            runtime.block_on(async {
                // The sweep holds nothing over an await.
                tokio::select! {
                    () = Arc::new(worker).run(stages) => {}
                    () = client.keep_swept() => {}
                }
            });
            runtime.shutdown_background();
        }
        Err(error) => tracing::error!(%error, "The thread that makes queued calls cannot start"),
    }
}

/// What sends callbacks, with the secret if there is one.
pub(super) fn callbacks(config: &config::Queue, tls: Tls) -> anyhow::Result<Callbacks> {
    let path = config.secrets.join(SECRET);
    let secret = match std::fs::read(&path) {
        Ok(secret) => Some(Secret::new(secret.trim_ascii())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => {
            return Err(error).with_context(|| format!("cannot read {}", path.display()));
        }
    };
    Ok(Callbacks::new(config.callback_allow.clone(), secret, Pace::default(), tls))
}

/// Has the queue forget what has been kept for long enough, and counts what is there, again and again. Does not end.
pub(super) async fn keep_tidy(intake: Arc<Intake>) {
    let mut pause = FORGET_EVERY;
    loop {
        tokio::time::sleep(pause).await;
        match &intake.queue {
            Queue::Embedded(queue) => queue.expire().await,
            Queue::JetStream(queue) => queue.expire().await,
        }
        let start = Instant::now();
        if let Err(error) = intake.count().await {
            tracing::debug!(%error, "What the queue holds cannot be counted");
        }
        // A queue that is long to count is counted less often.
        pause = FORGET_EVERY.max(start.elapsed() * 20);
    }
}
