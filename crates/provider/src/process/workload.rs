//! State that the processes of a function share, in both modes.

use std::sync::Arc;

use crate::process::activity::Activity;
use crate::process::logs::Logs;
use crate::process::spec::FunctionSpec;
use gateway_base::function::Function;

#[derive(Debug)]
pub(super) struct Workload {
    pub(super) function: Function,
    pub(super) spec: FunctionSpec,
    pub(super) logs: Arc<Logs>,
    pub(super) activity: Arc<Activity>,
}
