//! Autoscaling by load: a provider that counts scale requests, calls that are held open, and the shortest windows.

mod by_load;
mod several;
mod support;
mod to_zero;
