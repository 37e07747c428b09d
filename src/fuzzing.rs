//! Fuzz targets of this crate: every pure parser of external input, with properties that must hold for any input.
//! `fuzz/` runs them under libFuzzer.

use gateway_base::fuzzing::Target;

use crate::stack;

/// The targets of this package by name, which is the name of the seed file.
pub const TARGETS: &[(&str, Target)] = &[("stack_file", stack::fuzz::stack_file)];

/// Returns the target called `name`, of any crate.
#[cfg(fuzzing)]
pub fn target(name: &str) -> Option<Target> {
    use gateway_base::fuzzing as base;
    use gateway_http::fuzzing as http;
    use gateway_proxy::fuzzing as proxy;
    use gateway_queue::fuzzing as queue;
    use gateway_worker::fuzzing as worker;

    let crates =
        [TARGETS, base::TARGETS, http::TARGETS, proxy::TARGETS, queue::TARGETS, worker::TARGETS];
    let mut all = crates.into_iter().flatten();
    all.find(|(known, _)| *known == name).map(|(_, target)| *target)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::TARGETS;

    #[test]
    fn every_target_accepts_its_seeds_and_their_prefixes() {
        let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds/gateway");
        gateway_base::fuzzing::replay(&seeds, TARGETS).unwrap();
    }
}
