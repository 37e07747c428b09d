//! Checks whether the function of a call to enqueue exists.

use std::time::Duration;

use crate::error::Error;
use crate::functions::registry::FunctionRegistry;
use gateway_base::function::Function;
use gateway_provider::{self as provider, Provider};
use gateway_queue::ingress::QueueIngress;
use gateway_queue::unconfirmed::MAX_UNCONFIRMED;

/// Timeout for asking the provider whether a function exists. After it the provider counts as unavailable.
const FUNCTION_CHECK_TIMEOUT: Duration = Duration::from_secs(2);

/// Checks that `function` exists.
///
/// While the provider is unavailable, calls of unconfirmed functions are accepted, up to a limit on the number of
/// different names.
///
/// # Errors
/// When the provider answers that the function does not exist, or when the limit is reached.
pub async fn check_function_exists(
    registry: &FunctionRegistry,
    provider: &Provider,
    ingress: &QueueIngress,
    function: &Function,
    id: &str,
) -> Result<(), Error> {
    if registry.contains(function) {
        return Ok(());
    }
    let timeout = provider.timeout.min(FUNCTION_CHECK_TIMEOUT);
    let provider = Provider { timeout, ..provider.clone() };
    // Boxed: this future is rarely needed, and large.
    match Box::pin(provider.status(function)).await {
        Ok(_) => {
            ingress.unconfirmed.clear();
            registry.confirm(function);
            Ok(())
        }
        Err(error @ provider::Error::NoSuchFunction(_)) => {
            ingress.unconfirmed.clear();
            Err(error.into())
        }
        Err(error) => {
            tracing::debug!(
                call_id = id, %function, %error,
                "The provider could not confirm the function of a queued call"
            );
            match ingress.unconfirmed.admit(function) {
                true => Ok(()),
                false => Err(Error::UnconfirmedLimit(function.clone(), MAX_UNCONFIRMED)),
            }
        }
    }
}
