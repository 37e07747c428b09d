//! `GET /system/logs`: the log provider's stream, passed on line by line as it comes.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};
use http::StatusCode;

use crate::error::Error;
use crate::serve::caller::Caller;
use crate::system::{Api, stream};

/// A followed log may have nothing to say for long.
const LONGEST_SILENCE: Duration = Duration::from_secs(3600);

pub async fn logs(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, Error> {
    let mut answer = api.send(&caller, &api.logs, request).await?;
    match answer.status() {
        StatusCode::NOT_FOUND | StatusCode::NOT_IMPLEMENTED => {
            Ok(StatusCode::NOT_IMPLEMENTED.into_response())
        }
        status if status.is_success() => {
            answer.body_mut().bound_pauses(LONGEST_SILENCE);
            Ok(stream(answer))
        }
        status => Err(Error::Provider(format!("the log provider answered {status}"))),
    }
}
