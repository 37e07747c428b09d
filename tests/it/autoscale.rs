//! Scaling by load: a provider that keeps count, calls that are held, and windows as short as they may be.

mod by_load;
mod several;
mod support;
mod to_zero;
