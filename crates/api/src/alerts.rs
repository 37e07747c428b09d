//! `POST /system/alert`: webhook for Alertmanager. A firing alert scales its function up by one step, a resolved alert
//! back to its minimum.

mod step;

use std::sync::Arc;

use axum::extract::{Request, State};
use http::StatusCode;
use serde::Deserialize;

use crate::body::{MAX_BODY, read_body};
use crate::state::ApiState;
use gateway_base::function::Function;
use gateway_http::client;
use gateway_proxy::error::Error;

use step::{AlertStatus, replicas_after};

/// The used fields of a notification.
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

/// Applies every alert; a failed one does not stop the others.
///
/// # Errors
/// The body is invalid, the timeout has passed, or an alert failed: then the last failure.
pub async fn alert(
    State(api): State<Arc<ApiState>>,
    request: Request,
) -> Result<StatusCode, Error> {
    let body = read_body(request.into_body(), MAX_BODY).await?;
    let notification: Notification = serde_json::from_slice(&body).map_err(|error| {
        Error::BadRequest(format!("the body is not a valid notification: {error}"))
    })?;
    // One timeout for all alerts.
    let applied = tokio::time::timeout(api.timeouts.upstream, apply_all(&api, notification));
    match applied.await.map_err(|_| Error::Upstream(client::Error::Timeout))? {
        None => Ok(StatusCode::OK),
        Some(error) => Err(Error::Provider(error.to_string())),
    }
}

/// Applies all alerts; returns the last failure.
async fn apply_all(api: &ApiState, notification: Notification) -> Option<Error> {
    let mut failure = None;
    for alert in notification.alerts {
        if let Err(error) = apply_alert(api, &alert).await {
            let name = &alert.labels.function_name;
            tracing::warn!(function = name, error = %error, "Cannot scale {name} on an alert");
            failure = Some(error);
        }
    }
    failure
}

async fn apply_alert(api: &ApiState, alert: &Alert) -> Result<(), Error> {
    let name = &alert.labels.function_name;
    let function = Function::parse(name, &api.default_namespace).ok_or_else(|| {
        Error::BadRequest(format!(
            "an alert's label function_name is {name:?}, which is not a valid function name"
        ))
    })?;
    let alert_status = match alert.status.as_str() {
        "firing" => AlertStatus::Firing,
        "resolved" => AlertStatus::Resolved,
        other => return Err(Error::BadRequest(format!("an alert's status is {other:?}"))),
    };
    let status = api.provider.status(&function).await?;
    let policy = api.metrics.function_registry.record_status(&function, &status);
    if api.alert_filter.as_ref().is_some_and(|filter| filter.ignores(&function, &policy)) {
        return Ok(());
    }
    let Some(replicas) = replicas_after(alert_status, status.replicas, &policy.scaling) else {
        return Ok(());
    };
    let scaled = api.provider.scale(&function, replicas).await;
    api.metrics.function_registry.invalidate(Some(&function.name));
    scaled?;
    tracing::info!(
        function = %function, from = status.replicas, replicas,
        "Scaled {function} from {} to {replicas} on an alert", status.replicas
    );
    Ok(())
}
