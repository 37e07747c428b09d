//! State that the processes of a function share, in both modes.

use std::sync::Arc;

use crate::function::Function;
use crate::provider::process::activity::Activity;
use crate::provider::process::logs::Logs;
use crate::provider::process::spec::FunctionSpec;

#[derive(Debug)]
pub(super) struct Workload {
    pub(super) function: Function,
    pub(super) spec: FunctionSpec,
    pub(super) logs: Arc<Logs>,
    pub(super) activity: Arc<Activity>,
}
