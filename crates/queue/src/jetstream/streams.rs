//! The streams of a queue. Missing ones are created. Settings of existing ones are updated where NATS allows it and
//! nothing stored is removed by it; a stream that cannot be used is refused.

mod configs;
mod drift;
mod restart_marker;
use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::context::{CreateStreamErrorKind, GetStreamErrorKind};
use async_nats::jetstream::stream::Config;

use crate::jetstream::api::JetStreamApi;
use crate::jetstream::error::NatsError;
use crate::jetstream::options::Options;
use crate::jetstream::streams::configs::stream_configs;
use crate::jetstream::streams::drift::{Drift, compare};
use crate::jetstream::streams::restart_marker::last_before_restart;
use crate::jetstream::wire::subjects::Subjects;

/// Ensures that all streams exist and are usable. Returns the sequence of the last call that was stored before the
/// server was started.
///
/// # Errors
/// [`NatsError::Incompatible`] when a stream cannot be used: the operator must act. Other errors pass.
pub(super) async fn ensure_streams(
    api: &JetStreamApi,
    subjects: &Subjects,
    options: &Options,
) -> Result<u64, NatsError> {
    let mut last = 0;
    for config in stream_configs(subjects, options) {
        match api.context.get_stream(&config.name).await {
            Ok(stream) => {
                let info = stream.cached_info();
                if config.name == subjects.calls {
                    last = info.state.last_sequence;
                }
                migrate(api, &config, &info.config).await?;
            }
            Err(error) => match error.kind() {
                GetStreamErrorKind::JetStream(error)
                    if error.error_code() == ErrorCode::STREAM_NOT_FOUND =>
                {
                    create_stream(api, config).await?;
                }
                GetStreamErrorKind::JetStream(error) if error.code() != 503 => {
                    return Err(NatsError::Rejected(error.error_code().0, error.to_string()));
                }
                _ => return Err(NatsError::Unavailable),
            },
        }
    }
    last_before_restart(api, subjects, last).await
}

/// Updates the settings of an existing stream.
///
/// # Errors
/// [`NatsError::Incompatible`] when the stream has settings that the queue cannot work with and that NATS never
/// changes.
async fn migrate(api: &JetStreamApi, expected: &Config, found: &Config) -> Result<(), NatsError> {
    let stream = &expected.name;
    let Drift { updated, changes, by_hand } =
        compare(expected, found).map_err(|reason| NatsError::Incompatible(reason.into()))?;
    if !by_hand.is_empty() {
        let settings = by_hand.join(", ");
        tracing::warn!(
            stream,
            settings,
            "A stream of the queue differs from the settings. Change it with `nats stream edit`, or the setting"
        );
    }
    if changes.is_empty() {
        return Ok(());
    }
    let settings = changes.join(", ");
    match api.context.update_stream(updated).await {
        Ok(_) => tracing::info!(stream, settings, "Settings of a stream updated"),
        // The queue works with the existing settings, and the user may not be permitted to change them.
        Err(error) => tracing::warn!(
            stream, settings, %error,
            "The settings of a stream cannot be updated. Change them with `nats stream edit`"
        ),
    }
    Ok(())
}

async fn create_stream(api: &JetStreamApi, config: Config) -> Result<(), NatsError> {
    let (name, subjects) = (config.name.clone(), config.subjects.join(", "));
    match api.context.create_stream(config).await {
        Ok(_) => {
            tracing::info!(stream = name, "Stream created");
            Ok(())
        }
        Err(error) => match error.kind() {
            CreateStreamErrorKind::JetStream(error)
                if error.error_code() == ErrorCode::STREAM_SUBJECT_OVERLAP =>
            {
                let reason = format!(
                    "the stream {name} cannot be created, since another stream has its subjects ({subjects}): set \
                     faas_nats_channel to another name, or remove the other stream"
                );
                Err(NatsError::Incompatible(reason.into()))
            }
            CreateStreamErrorKind::JetStream(error) if error.code() != 503 => {
                Err(NatsError::Rejected(error.error_code().0, error.to_string()))
            }
            _ => Err(NatsError::Unavailable),
        },
    }
}
