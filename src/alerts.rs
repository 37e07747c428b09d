//! `POST /system/alert`: Alertmanager's webhook. A firing alert scales its function up by a step, a resolved one back
//! to its minimum.

mod step;

use std::sync::Arc;

use axum::extract::{Request, State};
use http::StatusCode;
use serde::Deserialize;

use crate::error::Error;
use crate::function::Function;
use crate::proxy::client;
use crate::system::{Api, MAX_BODY, read};

pub use step::Bounds;
use step::{Alarm, replicas_after};

/// What Alertmanager sends, as far as it matters.
#[derive(Debug, Deserialize)]
struct Notification {
    #[serde(default)]
    alerts: Vec<Alert>,
}

#[derive(Debug, Deserialize)]
struct Alert {
    #[serde(default)]
    status: String,
    #[serde(default)]
    labels: Labels,
}

#[derive(Debug, Default, Deserialize)]
struct Labels {
    #[serde(default)]
    function_name: String,
}

/// Carries every alert out; one that fails does not keep the others from it.
pub async fn alert(State(api): State<Arc<Api>>, request: Request) -> Result<StatusCode, Error> {
    let body = read(request.into_body(), MAX_BODY).await?;
    let notification: Notification = serde_json::from_slice(&body)
        .map_err(|error| Error::BadRequest(format!("the body is no alert: {error}")))?;
    // One deadline for all of them, however many there are.
    let carried_out =
        tokio::time::timeout(api.timeouts.upstream, carry_out_all(&api, notification));
    match carried_out.await.map_err(|_| Error::Upstream(client::Error::Timeout))? {
        None => Ok(StatusCode::OK),
        Some(error) => Err(Error::Provider(error.to_string())),
    }
}

/// Returns the last failure.
async fn carry_out_all(api: &Api, notification: Notification) -> Option<Error> {
    let mut failure = None;
    for alert in notification.alerts {
        if let Err(error) = carry_out(api, &alert).await {
            let name = &alert.labels.function_name;
            tracing::warn!(function = name, error = %error, "An alert did not scale {name}");
            failure = Some(error);
        }
    }
    failure
}

async fn carry_out(api: &Api, alert: &Alert) -> Result<(), Error> {
    let name = &alert.labels.function_name;
    let function = Function::parse(name, &api.default_namespace).ok_or_else(|| {
        Error::BadRequest(format!(
            "an alert's label function_name is {name:?}, which names no function"
        ))
    })?;
    let alarm = match alert.status.as_str() {
        "firing" => Alarm::Firing,
        "resolved" => Alarm::Resolved,
        other => return Err(Error::BadRequest(format!("an alert's status is {other:?}"))),
    };
    let status = api.provider.status(&function).await?;
    if api.ignored_alerts.as_ref().is_some_and(|ignored| ignored.ignores(&function, &status)) {
        return Ok(());
    }
    let bounds = Bounds::from_labels(&status.labels.unwrap_or_default());
    let Some(replicas) = replicas_after(alarm, status.replicas, bounds) else { return Ok(()) };
    let scaled = api.provider.scale(&function, replicas).await;
    api.metrics.known.changed(Some(&function.name));
    scaled?;
    tracing::info!(
        function = %function, from = status.replicas, replicas,
        "Scaled {function} from {} to {replicas} on an alert", status.replicas
    );
    Ok(())
}
