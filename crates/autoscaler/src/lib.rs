//! Scales functions by load.

pub mod alerts;
mod autoscaler;
pub mod cluster_view;
pub mod decide;
pub mod gossip;
pub mod loads;
mod managed;
pub mod peers;
pub mod reconciler;
pub mod sampler;

pub use crate::autoscaler::*;
